"""Draw figures as inline SVG: text stays text, no script, no font, no links. Strings are escaped by
`Markup.format`.

An arm is told by colour (Okabe-Ito, safe for colour-blind readers) and by marker or dash, never by colour
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from common.arms import (
    FEDERATED,
    FEDERATED_CLIPPED,
    FEDERATED_DP,
    LOCAL,
    LOCAL_CLIPPED,
    LOCAL_DP,
    POOLED,
    PUBLIC,
)
from server.evaluation.report.numerals import Number, signed

WIDTH = 1000
INK, MUTED, RULE, PAPER = "#1a1a1a", "#555555", "#d9d9d9", "#ffffff"


@dataclass(frozen=True, kw_only=True)
class Style:
    colour: str
    marker: str
    dash: str = ""


STYLES: dict[str, Style] = {
    PUBLIC: Style(colour="#6b6b6b", marker="cross", dash="2 4"),
    LOCAL: Style(colour="#c44e00", marker="triangle", dash="7 3"),
    LOCAL_DP: Style(colour="#8a6d00", marker="triangle", dash="2 2"),
    LOCAL_CLIPPED: Style(colour="#111111", marker="triangle", dash="9 2 2 2"),
    FEDERATED: Style(colour="#0063a3", marker="circle"),
    FEDERATED_DP: Style(colour="#007f5c", marker="diamond", dash="10 3 2 3"),
    FEDERATED_CLIPPED: Style(colour="#111111", marker="diamond", dash="5 2"),
    POOLED: Style(colour="#a3478a", marker="square", dash="4 2"),
}
OTHER = Style(colour="#333333", marker="circle", dash="1 3")


def style_of(model: str) -> Style:
    return STYLES.get(model.partition("/")[0], OTHER)


# pieces


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _svg(width: float, height: float, alt: str, parts: Iterable[Markup]) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {w:g} {h:g}" role="img" aria-label="{alt}" class="figure">{body}</svg>'
    ).format(w=width, h=height, alt=alt, body=_join(parts))


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = ""
) -> Markup:
    dashed = Markup(' stroke-dasharray="{}"').format(dash) if dash else Markup("")
    return Markup(
        '<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="{:g}"{}/>'
    ).format(x1, y1, x2, y2, colour, width, dashed)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: float = 13,
    colour: str = INK,
    bold: bool = False,
) -> Markup:
    weight = Markup(' font-weight="600"') if bold else Markup("")
    return Markup(
        '<text x="{:.1f}" y="{:.1f}" text-anchor="{}" font-size="{:g}" fill="{}"{}>{}</text>'
    ).format(x, y, anchor, size, colour, weight, text)


def _marker(x: float, y: float, style: Style, size: float = 5) -> Markup:
    shapes: dict[str, Callable[[], Markup]] = {
        "circle": lambda: Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:g}" fill="{}"/>').format(
            x, y, size, style.colour
        ),
        "square": lambda: _polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)], x, y, size * 0.85, style.colour),
        "diamond": lambda: _polygon([(0, -1), (1, 0), (0, 1), (-1, 0)], x, y, size * 1.25, style.colour),
        "triangle": lambda: _polygon([(0, -1), (1, 0.8), (-1, 0.8)], x, y, size * 1.1, style.colour),
        "cross": lambda: (
            _line(x - size * 0.8, y - size * 0.8, x + size * 0.8, y + size * 0.8, style.colour, 2.4)
            + _line(x - size * 0.8, y + size * 0.8, x + size * 0.8, y - size * 0.8, style.colour, 2.4)
        ),
    }
    return shapes[style.marker]()


def _polygon(corners: Sequence[tuple[float, float]], x: float, y: float, size: float, colour: str) -> Markup:
    points = " ".join(f"{x + dx * size:.1f},{y + dy * size:.1f}" for dx, dy in corners)
    return Markup('<polygon points="{}" fill="{}"/>').format(points, colour)


def _polyline(
    points: Sequence[tuple[float, float]], style: Style, width: float = 2, title: str = ""
) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = Markup(' stroke-dasharray="{}"').format(style.dash) if style.dash else Markup("")
    named = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup(
        '<polyline points="{}" fill="none" stroke="{}" stroke-width="{:g}" '
        'stroke-linejoin="round"{}>{}</polyline>'
    ).format(path, style.colour, width, dashed, named)


def swatch(model: str) -> Markup:
    """Line and marker of an arm, for a legend or a table row."""
    return swatch_of(style_of(model))


def swatch_of(style: Style) -> Markup:
    """Line and marker of a style, for a legend."""
    return Markup(
        '<svg viewBox="0 0 34 14" width="34" height="14" aria-hidden="true" class="swatch">{}{}</svg>'
    ).format(_polyline([(1, 7), (33, 7)], style), _marker(17, 7, style, 4))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers inside [low, high], at most about `most`."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [
        round(step * count, 10)
        for count in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


# forest plot


@dataclass(frozen=True, kw_only=True)
class ForestRow:
    arm: str
    label: str
    text: str
    value: Number
    low: Number
    high: Number


@dataclass(frozen=True, kw_only=True)
class ForestGroup:
    title: str
    note: str
    apart: bool
    rows: Sequence[ForestRow]


def forest(groups: Sequence[ForestGroup], alt: str, axis: str) -> Markup:
    """Per group a heading, per row a marker on its interval; groups set `apart` stand below a rule on a
    tinted ground.
    """
    left, right, row_height = 250.0, 770.0, 23.0
    ends = [
        end
        for group in groups
        for row in group.rows
        for end in (row.value, row.low, row.high)
        if end is not None
    ]
    low = max(0.0, min(0.5, math.floor(min(ends, default=0.5) * 10) / 10))

    def x(value: float) -> float:
        return left + (min(max(value, low), 1.0) - low) / (1 - low) * (right - left)

    parts: list[Markup] = []
    y, top = 8.0, 8.0
    for group in groups:
        if group.apart:
            y += 8
            height = row_height * (len(group.rows) + 1) + 12
            parts.append(
                Markup(
                    '<rect x="0" y="{:.1f}" width="{}" height="{:.1f}" fill="#eef4fa" stroke="#0063a3" '
                    'stroke-width="1"/>'
                ).format(y, WIDTH, height)
            )
            y += 3
        y += row_height
        parts.append(_text(10, y - 5, group.title, bold=True, size=14))
        parts.append(_text(WIDTH - 10, y - 5, group.note, anchor="end", colour=MUTED, size=12))
        for row in group.rows:
            y += row_height
            style, middle = style_of(row.arm), y - 9
            parts.append(_line(left, middle, right, middle, "#eeeeee"))
            parts.append(_marker(24, middle, style))
            parts.append(_text(40, middle + 4.5, row.label))
            if row.low is not None and row.high is not None:
                parts.append(_line(x(row.low), middle, x(row.high), middle, style.colour, 2.4))
                parts += [
                    _line(x(end), middle - 4, x(end), middle + 4, style.colour, 1.6)
                    for end in (row.low, row.high)
                ]
            if row.value is not None:
                parts.append(_marker(x(row.value), middle, style, 5.5))
            parts.append(
                _text(right + 20, middle + 4.5, row.text, colour=INK if row.value is not None else MUTED)
            )
        y += 9
    bottom = y + 2
    grid = [
        _line(x(tick), top, x(tick), bottom, MUTED if tick == 0.5 else RULE, 1, "4 3" if tick == 0.5 else "")
        for tick in ticks(low, 1.0)
    ]
    labels = [
        _text(x(tick), bottom + 16, f"{tick:g}", anchor="middle", size=12, colour=MUTED)
        for tick in ticks(low, 1.0)
    ]
    caption = _text((left + right) / 2, bottom + 34, axis, anchor="middle", size=12, colour=MUTED)
    tinted = [part for part in parts if part.startswith("<rect")]
    rest = [part for part in parts if not part.startswith("<rect")]
    return _svg(WIDTH, bottom + 42, alt, [*tinted, *grid, *rest, *labels, caption])


# differences


def difference_bar(value: Number, low: Number, high: Number, limit: float) -> Markup:
    """A difference and its interval around a zero line, from -limit to +limit; an end beyond is cut. Beside
    its numbers in a table.
    """
    width, height = 170.0, 18.0
    if value is None:
        return Markup("")

    def x(at: float) -> float:
        return width / 2 + min(max(at / limit, -1), 1) * (width / 2 - 6)

    parts = [_line(width / 2, 0, width / 2, height, MUTED, 1)]
    if low is not None and high is not None:
        colour = INK if low > 0 or high < 0 else "#8a8a8a"
        parts.append(_line(x(low), height / 2, x(high), height / 2, colour, 2.4))
    else:
        colour = "#8a8a8a"
    parts.append(
        Markup('<circle cx="{:.1f}" cy="{:g}" r="4.5" fill="{}"/>').format(x(value), height / 2, colour)
    )
    return Markup(
        '<svg viewBox="0 0 {0:g} {1:g}" width="{0:g}" height="{1:g}" role="img" aria-label="{2}">{3}</svg>'
    ).format(width, height, signed(value), _join(parts))


# ROC


@dataclass(frozen=True, kw_only=True)
class RocLine:
    model: str
    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RocPanel:
    title: str
    note: str
    missing: str
    lines: Sequence[RocLine]


def roc(panels: Sequence[RocPanel], alt: str) -> Markup:
    """Square panels side by side."""
    gap, head, foot = 22.0, 40.0, 22.0
    side = (WIDTH - gap * (len(panels) + 1)) / len(panels)
    parts: list[Markup] = []
    for number, panel in enumerate(panels):
        left = gap + number * (side + gap)
        parts.append(_text(left, 15, panel.title, bold=True))
        parts.append(_text(left, 32, panel.note, size=11.5, colour=MUTED))
        parts.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}" stroke="{}"/>'
            ).format(left, head, side, side, PAPER if panel.lines else "#f3f3f3", "#9a9a9a")
        )
        if not panel.lines:
            parts.append(
                _text(left + side / 2, head + side / 2 + 5, panel.missing, anchor="middle", colour=MUTED)
            )
            continue
        parts.append(_line(left, head + side, left + side, head, "#b0b0b0", 1, "4 3"))
        for line in panel.lines:
            points = [(left + fpr * side, head + (1 - tpr) * side) for fpr, tpr in line.points]
            parts.append(
                _polyline(points, style_of(line.model), 1.3 if "/" in line.model else 1.9, line.label)
            )
        for tick, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
            parts.append(
                _text(left + tick * side, head + side + 14, f"{tick:g}", anchor=anchor, size=11, colour=MUTED)
            )
        for tick in (0.0, 0.5, 1.0):
            parts.append(
                _text(
                    left - 3,
                    head + (1 - tick) * side + (9 if tick == 1.0 else 0),
                    f"{tick:g}",
                    anchor="end",
                    size=11,
                    colour=MUTED,
                )
            )
    return _svg(WIDTH, head + side + foot, alt, parts)


# curves


@dataclass(frozen=True, kw_only=True)
class Curve:
    model: str
    label: str
    points: Sequence[tuple[int, float]]


def curves(panels: Sequence[tuple[str, Sequence[Curve]]], alt: str, axis: str) -> Markup:
    """Line charts side by side, each line named at its end."""
    head, foot, plot, margin, names = 26.0, 40.0, 250.0, 46.0, 150.0
    share = WIDTH / len(panels)
    parts: list[Markup] = []
    for number, (title, lines) in enumerate(panels):
        left, right = number * share + margin, (number + 1) * share - names
        values = [value for line in lines for _, value in line.points]
        parts.append(_text(left, 15, title, bold=True))
        if not values:
            continue
        spread = (max(values) - min(values)) or 0.1
        low, high = min(values) - 0.06 * spread, max(values) + 0.06 * spread
        last = max(at for line in lines for at, _ in line.points) or 1

        def x(at: float, left: float = left, right: float = right, last: int = last) -> float:
            return left + at / last * (right - left)

        def y(value: float, low: float = low, high: float = high) -> float:
            return head + (high - value) / (high - low) * plot

        for tick in ticks(low, high):
            parts.append(_line(left, y(tick), right, y(tick), RULE))
            parts.append(_text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end", size=11.5, colour=MUTED))
        for tick in ticks(0, last, 8):
            if tick == int(tick):
                parts.append(
                    _text(x(tick), head + plot + 17, f"{tick:g}", anchor="middle", size=11.5, colour=MUTED)
                )
        parts.append(
            _text((left + right) / 2, head + plot + 34, axis, anchor="middle", size=12, colour=MUTED)
        )
        for line in lines:
            style = style_of(line.model)
            parts.append(
                _polyline(
                    [(x(at), y(value)) for at, value in line.points],
                    style,
                    1.5 if "/" in line.model else 2.2,
                    line.label,
                )
            )
            parts += [
                _marker(x(at), y(value), style, 3) for at, value in line.points if len(line.points) <= 25
            ]
        ends = sorted(
            ((y(line.points[-1][1]), line) for line in lines if line.points), key=lambda end: end[0]
        )
        placed: list[float] = []
        for wanted, _ in ends:
            placed.append(max(wanted, placed[-1] + 14) if placed else wanted)
        over = max(0.0, placed[-1] - (head + plot)) if placed else 0.0
        for (wanted, line), at in zip(ends, placed, strict=True):
            colour = style_of(line.model).colour
            parts.append(_line(x(line.points[-1][0]) + 4, wanted, right + 12, at - over, colour, 0.8))
            parts.append(_text(right + 15, at - over + 4, line.label, size=11.5, colour=colour))
    return _svg(WIDTH, head + plot + foot, alt, parts)


# the choice of settings

SERIES = (
    Style(colour="#6b6b6b", marker="cross", dash="2 4"),
    Style(colour="#c44e00", marker="triangle", dash="7 3"),
    Style(colour="#0063a3", marker="circle"),
    Style(colour="#a3478a", marker="square", dash="4 2"),
    Style(colour="#007f5c", marker="diamond", dash="10 3 2 3"),
    Style(colour="#8a6d00", marker="triangle", dash="2 2"),
)
"""Lines that are no arms, in their order."""
NARROW = 560
"""Width of a figure that is not shown across the whole page, so that a telephone leaves its text legible."""


@dataclass(frozen=True, kw_only=True)
class GainLine:
    label: str
    style: Style
    points: Sequence[tuple[float, float]]  # rate, above 0; gain


@dataclass(frozen=True, kw_only=True)
class GainWords:
    alt: str
    rate: str
    gain: str
    chosen: str


def gains_by_rate(lines: Sequence[GainLine], *, chosen: tuple[float, float], words: GainWords) -> Markup:
    """Gain over the logarithm of the rate, the chosen point in a ring. Losses larger than the best gain are
    drawn at the lower edge: they would flatten all else.
    """
    left, right, top, height = 52.0, NARROW - 16.0, 26.0, 260.0
    points = [chosen, *(point for line in lines for point in line.points)]
    exponents = [math.log10(rate) for rate, _ in points]
    first, last = min(exponents), max(exponents)
    best, least = max(gain for _, gain in points), min(gain for _, gain in points)
    floor = max(least, -abs(best))
    margin = 0.08 * ((best - floor) or 0.1)
    low, high = floor - margin, best + margin

    def x(rate: float) -> float:
        return left + 12 + (math.log10(rate) - first) / ((last - first) or 1.0) * (right - left - 24)

    def y(gain: float) -> float:
        return top + (high - max(gain, floor)) / (high - low) * height

    parts = [_text(4, 14, words.gain, size=13, colour=MUTED)]
    for tick in ticks(low, high):
        colour, dash = (MUTED, "4 3") if tick == 0 else (RULE, "")
        parts.append(_line(left, y(tick), right, y(tick), colour, 1, dash))
        parts.append(_text(left - 6, y(tick) + 4, signed(tick), anchor="end", size=12, colour=MUTED))
    for rate in sorted({rate for rate, _ in points}):
        parts.append(_text(x(rate), top + height + 17, f"{rate:g}", anchor="middle", size=12, colour=MUTED))
    middle = (left + right) / 2
    parts.append(_text(middle, top + height + 37, words.rate, anchor="middle", size=13, colour=MUTED))
    for line in lines:
        places = [(x(rate), y(gain)) for rate, gain in line.points]
        parts.append(_polyline(places, line.style, 2, line.label))
        parts += [_marker(*place, line.style, 4) for place in places]
    at, ring = (x(chosen[0]), y(chosen[1])), 9.5
    parts.append(
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="none" stroke="{}" stroke-width="2.4"/>').format(
            *at, ring, INK
        )
    )
    parts.append(_text(at[0], at[1] - ring - 5, words.chosen, anchor="middle", bold=True))
    return Markup(
        '<svg viewBox="0 0 {w:g} {h:g}" role="img" aria-label="{alt}" class="figure narrow">{body}</svg>'
    ).format(w=NARROW, h=top + height + 44, alt=words.alt, body=_join(parts))


# heat map


def shade(value: float) -> str:
    """Background for dark text: white at 0.5 or below, blue at 1."""
    share = min(max((value - 0.5) / 0.5, 0.0), 1.0)
    return "#" + "".join(f"{round(255 + (end - 255) * share):02x}" for end in (0x7A, 0xB4, 0xE0))
