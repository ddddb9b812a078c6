"""Render predictions as one offline HTML page: embedded pictures, no script, no request to anywhere."""

from __future__ import annotations

import base64
import io

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from client.data_check.page import CT_WINDOW_HU
from client.predict import text
from client.predict.explanation import tested
from client.predict.predict import Picture, Predictions
from client.predict.words import LANGUAGES
from common.i18n import Say, speaker
from common.operating_point import LEAST_FOUND
from common.preprocess import from_stored

OUTLINE = 0.5
"""A map is drawn as the outline of where it reaches this share of its largest value."""
LINE_RGB = (255, 190, 0)
SIDE = 256
"""Pixels of a picture on the page: twice what the model usually sees."""


def render(found: Predictions, language: str, *, names: bool = False) -> str:
    """The page as one string. Every value is escaped.

    Args:
        names: show file names.
    """
    say = speaker(language, LANGUAGES)
    environment = Environment(
        loader=PackageLoader("client.predict", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    low, high = CT_WINDOW_HU
    return environment.get_template("page.html.j2").render(
        say=say,
        language=language,
        names=names,
        found=found,
        summary=text.summary_text(found, say),
        open=text.open_text(found, say),
        columns=text.columns(found, say),
        rows=text.series_rows(found, say),
        unjudged=[
            (study.number, series.number, said)
            for study in found.studies
            for series in study.series
            if (said := text.unjudged_text(series, say))
        ],
        first_files=[
            (study.number, series.number, series.images[0].file)
            for study in found.studies
            for series in study.series
        ],
        steps=[
            {
                "artifact": text.artifact_text(step.artifact, say),
                "where": step.where(say),
                "advice": step.advice(say),
                "repeat": step.remedy.repeat,
                "dose": step.dose(say),
                "steps": step.remedy.steps(language),
                "sources": step.remedy.sources,
            }
            for step in text.next_steps(found.studies)
        ],
        no_step=text.no_step_text(found, say),
        pictures=[
            (
                png(picture),
                caption(picture, found, say),
            )
            for picture in found.pictures
        ],
        maps=map_rows(found, say),
        side=SIDE,
        window=say("window", low=f"{low:g}", high=f"{high:g}"),
        basis=text.basis_rows(found, say),
        points=text.point_rows(found, say),
        share=f"{100 * LEAST_FOUND:g}",
        skipped=text.skipped_rows(found, say, names=names),
        limits=text.limits(found, say),
        present=text.presence_texts(say),
    )


def caption(picture: Picture, found: Predictions, say: Say) -> str:
    """Which image it is, by numbers, and what the model says of it."""
    own = found.studies[picture.study - 1].series[picture.series - 1]
    series, image = own.at_scanner, own.images[picture.image - 1].at_scanner
    said = say(
        "picture",
        study=picture.study,
        series=picture.series,
        image=picture.image,
        scanner=say("scanner", series=series, image=image) if None not in (series, image) else "",
        artifact=text.artifact_text(picture.finding.artifact, say),
        value=text.value_text(picture.finding),
    )
    return said if picture.where is None else f"{said} · {say('map')}"


def map_rows(found: Predictions, say: Say) -> list[str]:
    """Of each artifact with a map: what such maps were worth when they were tested."""
    rows = []
    for name in dict.fromkeys(one.finding.artifact for one in found.pictures if one.where is not None):
        one = tested(found.model.name, name)
        if one is not None:
            rows.append(
                say(
                    "map-score",
                    artifact=text.artifact_text(name, say),
                    images=one.images,
                    people=one.people,
                    pointing=f"{one.pointing[0]:.0%}",
                    low=f"{one.pointing[1]:.0%}",
                    high=f"{one.pointing[2]:.0%}",
                    iou=f"{one.iou[0]:.2f}",
                    control=f"{one.control_pointing:.0%}",
                    control_iou=f"{one.control_iou:.2f}",
                )
            )
    return rows


def png(picture: Picture) -> str:
    """A picture as a data URI."""
    from PIL import Image
    from scipy.ndimage import binary_erosion

    image = from_stored(picture.pixels, picture.modality)
    low, high = CT_WINDOW_HU if picture.modality == "CT" else (0.0, 1.0)
    grey = np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    shown = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if picture.where is not None and picture.where.max() > 0:
        values = Image.fromarray(np.float32(picture.where / picture.where.max()))
        inside = np.asarray(values.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) >= OUTLINE
        line = inside & ~binary_erosion(inside, iterations=2, border_value=1)
        pixels = np.array(shown.convert("RGB"))
        pixels[line] = LINE_RGB
        shown = Image.fromarray(pixels)
    stream = io.BytesIO()
    shown.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
