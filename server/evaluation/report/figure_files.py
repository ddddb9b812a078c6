"""The figures of the page as files: SVG as they are on the page, and the same drawn as PNG.

PNG is drawn from the SVG by Pillow, with the few shapes that figures.py makes. Its font has Latin letters
alone, so that pictures are in English whatever the page's language.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont

from common.files import write_bytes
from common.i18n import speaker
from server.evaluation.report import decisions
from server.evaluation.report.figures import INK, PAPER
from server.evaluation.report.page import curve_figure, forest, roc_figures
from server.evaluation.report.paper import without_control
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation_file import Evaluation

SCALE, SMOOTH = 2, 2
"""Pixels of a unit of length, so that text is sharp, and how much finer it is drawn first."""
LATIN = str.maketrans(
    {"ε": "eps", "δ": "delta", "−": "-", "–": "-", "†": "*", "≈": "~", "×": "x", "…": "..."}
)
NAMESPACE = "http://www.w3.org/2000/svg"


def write_figures(evaluation: Evaluation, folder: Path, language: str = "en") -> list[Path]:
    """Write every figure of the report into a folder, as SVG and as PNG.

    Args:
        folder: made where it is missing; files of the same names are replaced.
        language: of the SVG files.
    Returns:
        the files, in the order of the page.
    """
    drawn = dict(_figures(evaluation, "en"))
    found = []
    for name, svg in _figures(evaluation, language):
        for path, content in (
            (folder / f"{name}.svg", standalone(svg).encode()),
            (folder / f"{name}.png", png(drawn[name])),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)
            found.append(path)
    return found


def _figures(evaluation: Evaluation, language: str) -> Iterator[tuple[str, str]]:
    """Name and SVG of each."""
    reading = Reading(evaluation, speaker(language, LANGUAGES), language)
    yield "forest", _parts(forest(reading))[0]
    blocks = {"roc": roc_figures(reading)}
    if reading.has_points:
        blocks |= {
            "calibration": decisions.calibration_figures(reading),
            "decision": decisions.decision_figures(reading),
        }
    for kind, found in blocks.items():
        for block in found:
            for artifact, svg in zip(reading.artifacts, _parts(block["figure"]), strict=True):
                yield f"{kind}-{'held-out' if block['held_out'] else 'training'}-{artifact}", svg
    if (curves := curve_figure(reading)) is not None:
        yield from zip(("curve-loss", "curve-auroc"), _parts(curves), strict=True)
    if (widths := decisions.width_figure(reading)) is not None:
        yield "interval-width", _parts(widths)[0]


def _parts(figure: Markup) -> list[str]:
    """The single drawings of a figure."""
    return re.findall(r"<svg.*?</svg>", without_control(figure))


def standalone(svg: str) -> str:
    """A drawing of the page as a file of its own: with its name space, size, font and a white ground."""
    width, height = _size(ET.fromstring(svg))
    head = (
        f'<svg xmlns="{NAMESPACE}" width="{width:g}" height="{height:g}" font-family="system-ui, sans-serif" '
    )
    ground = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
    start, rest = svg.removeprefix("<svg ").split(">", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{head}{start}>{ground}{rest}\n'


def png(svg: str) -> bytes:
    """A drawing as PNG."""
    root = ET.fromstring(svg)
    width, height = _size(root)
    zoom = SCALE * SMOOTH
    image = Image.new("RGB", (round(width * zoom), round(height * zoom)), PAPER)
    _draw(ImageDraw.Draw(image), root, zoom)
    image = image.resize((round(width * SCALE), round(height * SCALE)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _size(root: ET.Element) -> tuple[float, float]:
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    return width, height


def _draw(on: ImageDraw.ImageDraw, parent: ET.Element, zoom: float) -> None:
    for shape in parent:
        get = shape.attrib.get

        def number(name: str, default: float = 0.0, get=get) -> float:  # type: ignore[no-untyped-def]
            return float(get(name, default)) * zoom

        fill, stroke = _colour(get("fill")), _colour(get("stroke"))
        width = max(1, round(number("stroke-width", 1.0)))
        if shape.tag == "g":
            _draw(on, shape, zoom)
        elif shape.tag == "line":
            ends = [(number("x1"), number("y1")), (number("x2"), number("y2"))]
            _stroke(on, ends, stroke or INK, width, get("stroke-dasharray"), zoom)
        elif shape.tag == "polyline":
            points = _points(get("points", ""), zoom)
            _stroke(on, points, stroke or INK, width, get("stroke-dasharray"), zoom)
        elif shape.tag == "polygon":
            on.polygon(_points(get("points", ""), zoom), fill=fill)
        elif shape.tag == "rect":
            x, y = number("x"), number("y")
            box = (x, y, x + number("width"), y + number("height"))
            on.rectangle(box, fill=fill, outline=stroke, width=width)
        elif shape.tag == "circle":
            x, y, r = number("cx"), number("cy"), number("r")
            on.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=stroke, width=width if stroke else 0)
        elif shape.tag == "text":
            font = ImageFont.load_default(float(get("font-size", 13)) * zoom)
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[get("text-anchor", "start")]
            bold = max(1, round(zoom / 4)) if get("font-weight") else 0
            text = (shape.text or "").translate(LATIN)
            at = number("x"), number("y")
            on.text(at, text, fill=fill or INK, font=font, anchor=anchor, stroke_width=bold)


def _colour(text: str | None) -> str | None:
    return None if text in (None, "none") else text


def _points(text: str, zoom: float) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in text.split()]
    return [(float(x) * zoom, float(y) * zoom) for x, y in pairs]


def _stroke(
    on: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float]],
    colour: str,
    width: int,
    dashes: str | None,
    zoom: float,
) -> None:
    """A line through points, in dashes where it says so."""
    if len(points) < 2:
        return
    if dashes is None:
        on.line(points, fill=colour, width=width, joint="curve")
        return
    pattern = [float(dash) * zoom for dash in dashes.split()]
    place, left = 0, pattern[0]
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        length, done = math.hypot(x2 - x1, y2 - y1), 0.0
        while done < length:
            step = min(left, length - done)
            if place % 2 == 0:
                ends = [
                    (x1 + (x2 - x1) * at / length, y1 + (y2 - y1) * at / length) for at in (done, done + step)
                ]
                on.line(ends, fill=colour, width=width)
            done, left = done + step, left - step
            if left <= 0:
                place = (place + 1) % len(pattern)
                left = pattern[place]
