"""Render the data check as one offline HTML page: embedded pictures, SVG drawings, no script, no links.

It shows images, so it stays in the hospital. It holds no path, no identifier and no date finer than a month;
a file is its number.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
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
from common.cohort_table import CohortTable, num_scored, table_rows
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
FLOW_WIDTH, FLOW_MAIN, FLOW_SIDE = 400, 180, 200  # of the flow: the boxes, and those of what was lost


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
    table = found.table
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
        flow=flow_figure(table, say),
        cohort_columns=list(table["columns"]),
        cohort_rows=groupby(
            table_rows(list(table["columns"].values()), say, chinese=language == "zh"),
            key=lambda row: row.group,
        ),
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


def flow_figure(table: CohortTable, say: Say) -> Markup:
    """Boxes downwards from the files found to those used, beside each what was lost there; then the parts, of
    which one is scored.
    """
    gap, line = 22, 16
    drawn: list[Markup] = []
    top = 1
    for step in table["files"]:
        lost = [f"−{count} {code}" for code, count in step["lost"].items()]
        lost += [
            say("cohort.flow.slices_of", count=count, code=code)
            for code, count in step["lost_slices"].items()
        ]
        height = max(62, line * len(lost) + 12)
        if top > 1:
            drawn.append(_arrow(FLOW_MAIN / 2, top - gap, top))
        if lost:
            middle = top + height / 2
            drawn.append(_line(FLOW_MAIN, middle, FLOW_SIDE, middle, MUTED, 2))
            drawn.append(_box(FLOW_SIDE, top, FLOW_WIDTH - FLOW_SIDE - 1, height, "#fff8f6", RED))
            first = middle - line * (len(lost) - 1) / 2 + 4
            drawn += [
                _text(FLOW_SIDE + 8, first + line * number, words, anchor="start", size=12)
                for number, words in enumerate(lost)
            ]
        under = say("cohort.flow.under", slices=step["slices"], patients=step["patients"])
        words: tuple[str, ...] = (
            say(f"cohort.flow.step.{step['step']}"),
            say("cohort.flow.box", files=step["files"]),
            under,
        )
        drawn.append(_titled_box(1, top, FLOW_MAIN - 1, height, words))
        top += height + gap
    parts = [part for part in PARTS if part in table["parts"]]
    tall = 84 + 18 * (1 + any(flow["unlabelled"] for flow in table["parts"].values()))
    tall += 18 * any(flow["disputed"] for flow in table["parts"].values())
    width = (FLOW_WIDTH - 2 - 8 * (len(parts) - 1)) / max(len(parts), 1)
    if parts and table["left_out"]:
        drawn.append(
            _text(
                FLOW_MAIN / 2 + 14,
                top - 5,
                f"−{table['left_out']} {say('cohort.flow.left_out')}",
                anchor="start",
                size=12,
                colour=RED,
            )
        )
        top += 8
    for place, part in enumerate(parts):
        flow, left = table["parts"][part], 1 + place * (width + 8)
        if not place:
            drawn.append(_arrow(FLOW_MAIN / 2, top - gap - (8 if table["left_out"] else 0), top))
        words = (
            say(f"cohort.column.{part}"),
            say("cohort.flow.part_box", patients=flow["patients"]),
            say("cohort.flow.part_under", slices=flow["slices"]),
            *(
                say(f"cohort.flow.{what}", count=flow[what])
                for what in ("unlabelled", "disputed")
                if flow[what]
            ),
            say("cohort.flow.labelled", count=flow["labelled"]),
            *([f"→ {say('cohort.flow.scored')}: {num_scored(table)}"] if part == table["scored"] else []),
        )
        drawn.append(_titled_box(left, top, width, tall, words))
    height = top + (tall if parts else -gap) + 2
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="figure flow">{}</svg>').format(
        FLOW_WIDTH, height, say("cohort.flow.title"), Markup("").join(drawn)
    )


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str) -> Markup:
    return Markup(
        '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="4" fill="{}" stroke="{}"/>'
    ).format(x, y, width, height, fill, stroke)


def _titled_box(x: float, y: float, width: float, height: float, words: Sequence[str]) -> Markup:
    """A title, a number below it, and small print."""
    parts = [_box(x, y, width, height, "#eef4fa", BLUE)]
    for line, said in enumerate(words):
        size, weight = (15, 600) if line == 1 else (12, 400)
        at = y + 17 + 19 * min(line, 1) + 18 * max(line - 1, 0)
        parts.append(
            _text(
                x + width / 2,
                at,
                said,
                anchor="middle",
                colour=INK if line else MUTED,
                size=size,
                weight=weight,
            )
        )
    return Markup("").join(parts)


def _arrow(x: float, top: float, bottom: float) -> Markup:
    head = Markup('<path d="M{:.1f} {:.1f} l-5 -8 h10 z" fill="{}"/>').format(x, bottom - 1, MUTED)
    return _line(x, top, x, bottom - 8, MUTED, 2) + head


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
