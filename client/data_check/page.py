"""Render the data check as one offline HTML page: embedded pictures, SVG drawings, no script, no links.

It shows images, so it stays in the hospital. It holds no path, no identifier and no date finer than a month;
a file is its number.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from client.data_check import screening, text
from client.data_check.check import Readiness
from client.data_check.profile import ACQUISITION, MEASURES, Numbers
from client.data_check.words import LANGUAGES
from client.dicom.index import PARTS
from common.artifacts import ARTIFACTS, INDEX
from common.errors import ConfigError
from common.files import write_bytes
from common.i18n import Say, counted, speaker
from common.preprocess import from_stored

CT_WINDOW_HU = (-200.0, 800.0)  # soft tissue with its streaks, and bone
TILE, CAPTION, COLUMNS = 120, 16, 8
SHOWN = 16  # slices of a contact sheet
SHOWN_TRENDS = 30
INK, MUTED, RULE, BLUE, RED = "#1a1a1a", "#555555", "#d9d9d9", "#0063a3", "#a80000"
WIDTH, ROW = 420, 54


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One contact sheet. `more` slices are not on it."""

    title: str
    picture: str  # data URI
    alt: str
    more: int


def write_page(path: Path, found: Readiness, language: str) -> None:
    """Render the page into `path`, readable by its owner only.

    Raises:
        ConfigError: `not-writable`; `bad-argument`, the language, or the page would lie among the images.
    """
    if path.resolve().is_relative_to(found.subject.slices.intake.root.resolve()):
        raise ConfigError(
            f"{path}: lies in the folder of images", code="bad-argument", hint="--html FILE, anywhere else"
        )
    content = render(found, language)
    try:
        write_bytes(path, content.encode(), 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}",
            code="not-writable",
            hint="--html FILE names a new file",
        ) from None


def render(found: Readiness, language: str) -> str:
    """The page as one string. Every value is escaped; the only markup is the template's and the drawings'."""
    say = speaker(language, LANGUAGES)
    environment = Environment(
        loader=PackageLoader("client.data_check", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        say=say,
        counted=lambda count, what: counted(say, count, what),
        found=found,
        language=language,
        intake=found.subject.slices.intake,
        finding_text=lambda finding: text.finding_text(finding.code, finding.values, say),
        left_out=text.left_out(found, say),
        flow=flow_figure(found, say),
        populations=[
            (
                modality,
                population,
                text.field_rows(population, ACQUISITION, say),
                [
                    (
                        say(name),
                        text.span_text(population.numbers[name], say),
                        histogram(population.numbers[name]),
                    )
                    for name in MEASURES
                ],
            )
            for modality, population in found.profile.modalities.items()
        ],
        parts=[part for part in PARTS if found.intake.patients_by_part.get(part)],
        artifacts={
            artifact.name: artifact.chinese if language == "zh" else artifact.name for artifact in ARTIFACTS
        },
        trends=[(trend, sparkline(trend)) for trend in _alarming_first(found.trends)[:SHOWN_TRENDS]],
        least_months=screening.MIN_MONTHS,
        least_studies=screening.MIN_STUDIES,
        sheets=contact_sheets(found, say),
        window=CT_WINDOW_HU,
        translated=lambda said: text.translated(said, say),
        new_words=lambda move: text.new_words(move.new, say),
        problems_shown=text.SHOWN_PROBLEMS,
    )


def _alarming_first(trends: Sequence[screening.Trend]) -> list[screening.Trend]:
    return sorted(
        (trend for trend in trends if len(trend.months) > 1), key=lambda trend: not trend.is_alarming
    )


# pictures


def contact_sheets(found: Readiness, say: Say) -> list[Sheet]:
    """Of each label slices with and without it, of unlabelled modalities a sample, outliers, and
    near-duplicates pair by pair.
    """
    sheets: list[Sheet] = []
    present = found.intake.labels.present
    modality = np.array([record.modality for record in found.subject.slices.intake.records], dtype=np.str_)
    chinese = say("artifact") != "artifact"
    for artifact in ARTIFACTS:
        for key, value in (("present", 1), ("absent", 0)):
            own = np.flatnonzero(present[:, INDEX[artifact.name]] == value)
            sheets += _sheet(
                found, own, say(f"contact.{key}", artifact=artifact.chinese if chinese else artifact.name)
            )
    for name in sorted(set(modality.tolist())):
        own = np.flatnonzero((modality == name) & np.isnan(present).all(1))
        sheets += _sheet(found, own, say("contact.any", modality=name))
    sheets += _sheet(found, found.outliers.slices, say("contact.outliers"), spread_out=False)
    pairs = np.array([place for pair in found.duplicates.pairs for place in pair], np.int64)
    return sheets + _sheet(found, pairs, say("contact.duplicates"), spread_out=False)


def _sheet(found: Readiness, slices: np.ndarray, title: str, *, spread_out: bool = True) -> list[Sheet]:
    """A sheet of some of these slices, one a patient first; none where there is no slice."""
    if not len(slices):
        return []
    chosen = _one_a_patient(slices, found.patients)[:SHOWN] if spread_out else slices[:SHOWN]
    numbers = found.numbers[chosen].tolist()
    alt = f"{title}: {', '.join(map(str, numbers))}"
    return [Sheet(title=title, picture=_png(found, chosen, numbers), alt=alt, more=len(slices) - len(chosen))]


def _one_a_patient(slices: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The middle slice of each patient first, then the others."""
    of_patient = patients[slices]
    _, place, counts = np.unique(of_patient, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    rank = np.empty(len(slices), np.int64)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rank[order] = np.arange(len(slices)) - starts
    from_middle = np.abs(rank - counts[place] // 2)
    return slices[np.lexsort((np.arange(len(slices)), from_middle))]


def _png(found: Readiness, slices: np.ndarray, numbers: Sequence[int]) -> str:
    from PIL import Image, ImageDraw

    rows = -(-len(slices) // COLUMNS)
    columns = min(len(slices), COLUMNS)
    gap = 4
    sheet = Image.new("L", (columns * (TILE + gap) - gap, rows * (TILE + CAPTION + gap) - gap), 255)
    draw = ImageDraw.Draw(sheet)
    records = found.subject.slices.intake.records
    for place, (position, number) in enumerate(zip(slices.tolist(), numbers, strict=True)):
        left, top = place % COLUMNS * (TILE + gap), place // COLUMNS * (TILE + CAPTION + gap)
        image = from_stored(np.asarray(found.subject.slices.images[position]), records[position].modality)
        low, high = CT_WINDOW_HU if records[position].modality == "CT" else (0.0, 1.0)
        grey = np.rint(np.clip((image - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(grey).resize((TILE, TILE), Image.Resampling.BILINEAR), (left, top))
        draw.text((left + 2, top + TILE + 2), str(number), fill=40)
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


# drawings


def flow_figure(found: Readiness, say: Say) -> Markup:
    """Boxes from what was found to what is used, and beside each arrow what was lost there."""
    steps = found.subject.slices.intake.flow
    width, height, gap = 178, 88, 34
    parts = []
    for place, step in enumerate(steps):
        left = place * (width + gap)
        lost = steps[place - 1].files - step.files if place else 0
        if place:
            parts.append(_line(left - gap + 3, height / 2, left - 5, height / 2, MUTED, 2))
            arrow = Markup('<path d="M{:.0f} {:.0f} l-8 -5 v10 z" fill="{}"/>')
            parts.append(arrow.format(left - 2, height / 2, MUTED))
        if lost:
            parts.append(_text(left - gap / 2, height + 18, f"−{lost}", anchor="middle", colour=RED))
        parts.append(
            Markup('<rect x="{}" y="1" width="{}" height="{}" rx="4" fill="#eef4fa" stroke="{}"/>').format(
                left + 1, width - 2, height - 2, BLUE
            )
        )
        name = _wrapped(say(f"step.{step.name}"), 24)
        for line, words in enumerate(name):
            parts.append(
                _text(left + width / 2, 18 + 14 * line, words, anchor="middle", colour=MUTED, size=12)
            )
        parts.append(
            _text(
                left + width / 2, 58, counted(say, step.files, "files"), anchor="middle", size=15, weight=600
            )
        )
        under = f"{counted(say, step.slices, 'slices')} · {counted(say, step.patients, 'patients')}"
        parts.append(_text(left + width / 2, 77, under, anchor="middle", size=12))
    total = len(steps) * (width + gap) - gap
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="figure">{}</svg>').format(
        total, height + 26, say("flow"), Markup("").join(parts)
    )


def _wrapped(words: str, most: int) -> list[str]:
    """At most two lines."""
    if len(words) <= most or " " not in words:
        return [words]
    break_at = words.rfind(" ", 0, most + 1)
    return [words[:break_at], words[break_at + 1 :]] if break_at > 0 else [words]


def histogram(numbers: Numbers) -> Markup:
    """Patients between the deciles' edges, drawn over the value: narrow bars where patients are close
    together.
    """
    if numbers.median != numbers.median or not numbers.edges:
        return Markup("")
    low, high = min(numbers.low, numbers.edges[0]), max(numbers.high, numbers.edges[-1])
    if not high > low:
        return Markup("")
    marks = [max(low, min(high, edge)) for edge in (low, *numbers.edges, high)]
    scale = (WIDTH / 2 - 10) / (high - low)
    spans = list(zip(numbers.weights, marks[:-1], marks[1:], strict=True))
    density = [weight / max(right - left, (high - low) / 200) for weight, left, right in spans]
    top = max(density) or 1
    bars = [
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="#7ab4e0"/>').format(
            5 + (left - low) * scale, 30 - 28 * value / top, max((right - left) * scale, 1), 28 * value / top
        )
        for value, (_, left, right) in zip(density, spans, strict=True)
    ]
    middle = 5 + (min(max(numbers.median, low), high) - low) * scale
    bars.append(_line(middle, 0, middle, 32, INK, 1.5))
    return Markup('<svg viewBox="0 0 {:g} 34" width="{:g}" height="34" aria-hidden="true">{}</svg>').format(
        WIDTH / 2, WIDTH / 2, Markup("").join(bars)
    )


def sparkline(trend: screening.Trend) -> Markup:
    """Monthly medians; the band is one robust standard deviation about zero."""
    values, colour = trend.medians, RED if trend.is_alarming else BLUE
    low, high = min(-1.5, *values), max(1.5, *values)
    across = [8 + (WIDTH - 16) * place / (len(values) - 1) for place in range(len(values))]
    down = [4 + (ROW - 8) * (high - value) / (high - low) for value in values]
    edge = [4 + (ROW - 8) * (high - value) / (high - low) for value in (1, -1)]
    band = Markup('<rect x="0" y="{:.1f}" width="{}" height="{:.1f}" fill="#f0f0f0"/>').format(
        edge[0], WIDTH, edge[1] - edge[0]
    )
    line = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.5"/>').format(
        " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True)), colour
    )
    dots = [
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2" fill="{}"/>').format(x, y, colour)
        for x, y in zip(across, down, strict=True)
    ]
    return Markup(
        '<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" aria-hidden="true">{body}</svg>'
    ).format(w=WIDTH, h=ROW, body=Markup("").join([band, line, *dots]))


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> Markup:
    return Markup(
        '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="{:g}"/>'
    ).format(x1, y1, x2, y2, colour, width)


def _text(
    x: float, y: float, words: str, *, anchor: str, colour: str = INK, size: int = 13, weight: int = 400
) -> Markup:
    return Markup(
        '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" fill="{}" font-size="{}" font-weight="{}">{}</text>'
    ).format(x, y, anchor, colour, size, weight, words)
