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
    FEDERATED_FROZEN,
    IQM_FOREST,
    IQM_LOGISTIC,
    LOCAL,
    LOCAL_CLIPPED,
    LOCAL_DP,
    LOCAL_FROZEN,
    POOLED,
    PUBLIC,
)
from server.evaluation.report.numerals import Number, signed

WIDTH = 1000
PANEL, PHONE = 420, 350
"""Widths in pixels of a chart beside others and of a telephone's page: a text of size 12 is legible."""
LETTER = 0.56
"""Mean width of a letter by its size, from above: to leave texts their room."""
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
    LOCAL_FROZEN: Style(colour="#4a4a4a", marker="triangle", dash="1 3"),
    FEDERATED: Style(colour="#0063a3", marker="circle"),
    FEDERATED_DP: Style(colour="#007f5c", marker="diamond", dash="10 3 2 3"),
    FEDERATED_CLIPPED: Style(colour="#111111", marker="diamond", dash="5 2"),
    FEDERATED_FROZEN: Style(colour="#4a4a4a", marker="diamond", dash="1 3"),
    POOLED: Style(colour="#a3478a", marker="square", dash="4 2"),
    IQM_LOGISTIC: Style(colour="#5b3f8c", marker="cross", dash="6 2"),
    IQM_FOREST: Style(colour="#7a1f1f", marker="square", dash="1 2"),
}
OTHER = Style(colour="#333333", marker="circle", dash="1 3")


def style_of(model: str) -> Style:
    return STYLES.get(model.partition("/")[0], OTHER)


# pieces


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _svg(width: float, height: float, alt: str, parts: Iterable[Markup], shown: str = "figure") -> Markup:
    """`shown`: the figure's classes in page.css."""
    return Markup(
        '<svg viewBox="0 0 {w:g} {h:g}" role="img" aria-label="{alt}" class="{shown}">{body}</svg>'
    ).format(w=width, h=height, alt=alt, shown=shown, body=_join(parts))


def _room(text: str, size: float) -> float:
    """Width of a text in pixels, from above."""
    return sum(2 if ord(letter) > 0x2E80 else 1 for letter in text) * size * LETTER


def _shortened(text: str, room: float, size: float) -> str:
    """The text, or its beginning where it is wider than `room`."""
    if _room(text, size) <= room:
        return text
    return text[: max(1, int(room / (size * LETTER)) - 1)] + "…"


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
    tinted ground. The figure is there twice: one row a line, and for narrow pages words above the interval.
    """
    return _join([_forest(groups, alt, axis, width=width) for width in (WIDTH, PHONE)])


def _forest(groups: Sequence[ForestGroup], alt: str, axis: str, *, width: int) -> Markup:
    rows = [row for group in groups for row in group.rows]
    narrow = width < WIDTH
    left, right, row_height, indent = 12.0, width - 12.0, 40.0, 30.0
    if not narrow:
        indent, row_height = 40.0, 23.0
        left = max(250.0, indent + 12 + max((_room(row.label, 13) for row in rows), default=0.0))
        right = width - max(230.0, 32 + max((_room(row.text, 13) for row in rows), default=0.0))
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    low = max(0.0, min(0.5, math.floor(min(ends, default=0.5) * 10) / 10))

    def x(value: float) -> float:
        return left + (min(max(value, low), 1.0) - low) / (1 - low) * (right - left)

    grounds: list[Markup] = []
    parts: list[Markup] = []
    y, top = 8.0, 8.0
    for group in groups:
        beside = not narrow or _room(group.title, 14) + _room(group.note, 12) < width - 30
        start = y + 8
        y += (11 if group.apart else 0) + row_height * (0.7 if narrow else 1)
        parts.append(_text(10, y - 5, _shortened(group.title, width - 20, 14), bold=True, size=14))
        if not beside:
            y += 17
        at, anchor = (width - 10, "end") if beside else (10, "start")
        parts.append(_text(at, y - 5, group.note, anchor=anchor, colour=MUTED, size=12))
        for row in group.rows:
            fits = indent + _room(row.label, 13) + _room(row.text, 13) < width - 20
            y += row_height + (0 if fits or not narrow else 16)
            style, middle = style_of(row.arm), y - 9
            words = middle - (15 if fits else 31) if narrow else middle + 4.5
            parts.append(_line(left, middle, right, middle, "#eeeeee"))
            parts.append(_marker(18 if narrow else 24, words - 4.5, style))
            parts.append(_text(indent, words, _shortened(row.label, width - indent - 6, 13)))
            if row.low is not None and row.high is not None:
                parts.append(_line(x(row.low), middle, x(row.high), middle, style.colour, 2.4))
                parts += [
                    _line(x(end), middle - 4, x(end), middle + 4, style.colour, 1.6)
                    for end in (row.low, row.high)
                ]
            if row.value is not None:
                parts.append(_marker(x(row.value), middle, style, 5.5))
            colour = INK if row.value is not None else MUTED
            if not narrow:
                parts.append(_text(right + 20, words, row.text, colour=colour))
            elif fits:
                parts.append(_text(width - 10, words, row.text, colour=colour, anchor="end"))
            else:
                parts.append(_text(indent, words + 16, row.text, colour=colour))
        if group.apart:
            grounds.append(
                Markup(
                    '<rect x="0" y="{:.1f}" width="{}" height="{:.1f}" fill="#eef4fa" stroke="#0063a3" '
                    'stroke-width="1"/>'
                ).format(start, width, y + 4 - start)
            )
        y += 9
    bottom = y + 2
    marks = ticks(low, 1.0)
    grid = [
        _line(x(tick), top, x(tick), bottom, MUTED if tick == 0.5 else RULE, 1, "4 3" if tick == 0.5 else "")
        for tick in marks
    ]
    labels = [
        _text(x(tick), bottom + 16, f"{tick:g}", anchor="middle", size=12, colour=MUTED) for tick in marks
    ]
    caption = _text(
        (left + right) / 2,
        bottom + 34,
        _shortened(axis, width - 4, 12),
        anchor="middle",
        size=12,
        colour=MUTED,
    )
    shown = "figure on-narrow" if narrow else "figure on-wide"
    return _svg(width, bottom + 42, alt, [*grounds, *grid, *parts, *labels, caption], shown)


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
    """Square panels, one figure each: as many side by side as the page has room for."""
    return _join([_roc_panel(panel, f"{alt} {panel.title}") for panel in panels])


def _roc_panel(panel: RocPanel, alt: str) -> Markup:
    left, head, side, foot = 24.0, 40.0, 170.0, 22.0
    width = left + side + 6
    parts = [
        _text(0, 15, _shortened(panel.title, width, 13), bold=True),
        _text(0, 32, _shortened(panel.note, width, 12), size=12, colour=MUTED),
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}" stroke="{}"/>').format(
            left, head, side, side, PAPER if panel.lines else "#f3f3f3", "#9a9a9a"
        ),
    ]
    if not panel.lines:
        parts.append(
            _text(left + side / 2, head + side / 2 + 5, panel.missing, anchor="middle", colour=MUTED)
        )
        return _svg(width, head + side + foot, alt, parts)
    parts.append(_line(left, head + side, left + side, head, "#b0b0b0", 1, "4 3"))
    for line in panel.lines:
        points = [(left + fpr * side, head + (1 - tpr) * side) for fpr, tpr in line.points]
        parts.append(_polyline(points, style_of(line.model), 1.3 if "/" in line.model else 1.9, line.label))
    for tick, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        below, beside = head + side + 15, head + (1 - tick) * side + (9 if tick == 1.0 else 4 * (tick > 0))
        parts.append(_text(left + tick * side, below, f"{tick:g}", anchor=anchor, size=12, colour=MUTED))
        parts.append(_text(left - 4, beside, f"{tick:g}", anchor="end", size=12, colour=MUTED))
    return _svg(width, head + side + foot, alt, parts)


# lines in a square


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A line to compare with, no arm's."""

    points: Sequence[tuple[float, float]]
    label: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over two axes, which end at `x` and `y`; without lines, what is missing."""

    title: str
    note: str
    missing: str
    lines: Sequence[RocLine]
    guides: Sequence[Guide] = ()
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)


def panels(found: Sequence[Panel], alt: str, axes: tuple[str, str], *, marks: bool = False) -> Markup:
    """Square panels, one figure each, with words at both axes.

    Args:
        axes: what is to the right, and what is up.
        marks: a marker on every point.
    """
    return _join([_panel(panel, f"{alt} {panel.title}", axes, marks) for panel in found])


def _panel(panel: Panel, alt: str, axes: tuple[str, str], marks: bool) -> Markup:
    left, head, side, foot = 38.0, 56.0, 190.0, 40.0
    width, height = left + side + 8, head + side + foot
    (first, last), (low, high) = panel.x, panel.y
    parts = [
        _text(0, 15, _shortened(panel.title, width, 13), bold=True),
        _text(0, 32, _shortened(panel.note, width, 12), size=12, colour=MUTED),
        _text(0, 49, _shortened(axes[1], width, 12), size=12, colour=MUTED),
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}" stroke="{}"/>').format(
            left, head, side, side, PAPER if panel.lines else "#f3f3f3", "#9a9a9a"
        ),
    ]
    if not panel.lines:
        for number, text in enumerate(_wrapped(panel.missing, side - 16, 12)):
            at = head + side / 2 + 16 * number
            parts.append(_text(left + side / 2, at, text, anchor="middle", size=12, colour=MUTED))
        return _svg(width, height, alt, parts)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (point[0] - first) / (last - first), (point[1] - low) / (high - low)
        return left + min(max(x, 0), 1) * side, head + (1 - min(max(y, 0), 1)) * side

    def inside(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Without what lies below the axis, so that no line runs along its edge."""
        return [place(point) for point in points if low <= point[1] <= high and first <= point[0] <= last]

    for guide, dash in zip(panel.guides, ("4 3", "1 3"), strict=False):
        style = Style(colour=MUTED, marker="circle", dash=dash)
        kept = [place(point) for point in guide.points if low <= point[1] <= high]
        parts.append(_polyline(kept, style, 1.1, guide.label))
    for line in panel.lines:
        style = style_of(line.model)
        points = inside(line.points)
        parts.append(_polyline(points, style, 1.9, line.label))
        parts += [_marker(*point, style, 3) for point in points if marks]
    for tick in ticks(first, last, 4):
        x, _ = place((tick, low))
        anchor = "start" if tick == first else "end" if tick == last else "middle"
        parts.append(_text(x, head + side + 15, f"{tick:g}", anchor=anchor, size=12, colour=MUTED))
    for tick in ticks(low, high, 4):
        _, y = place((first, tick))
        parts.append(_text(left - 4, y + 4, f"{tick:g}", anchor="end", size=12, colour=MUTED))
    words = _shortened(axes[0], width, 12)
    parts.append(_text(width / 2, head + side + 33, words, anchor="middle", size=12, colour=MUTED))
    return _svg(width, height, alt, parts)


def _wrapped(text: str, room: float, size: float) -> list[str]:
    """A text in lines that fit."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _room(f"{lines[-1]} {word}", size) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


# width of intervals


@dataclass(frozen=True, kw_only=True)
class WidthWords:
    alt: str
    x: str
    y: str
    guide: str


def widths(
    places: Sequence[tuple[float, float, bool, str]],
    model: str,
    words: WidthWords,
    *,
    guide: Callable[[float], float],
) -> Markup:
    """Width of each interval over the number of patients of the rarer class, on a logarithmic axis.

    Args:
        places: number, width, whether it was scored with noise (a hollow marker), and what it is.
        guide: the width to be expected of a number.
    """
    left, right, top, height = 46.0, PANEL - 12.0, 26.0, 240.0
    numbers = [number for number, *_ in places]
    first, last = math.log10(max(1.0, min(numbers) * 0.8)), math.log10(max(numbers) * 1.25)
    last = max(last, first + 0.3)
    high = min(1.0, max(width for _, width, *_ in places) * 1.1 + 0.02)

    def x(number: float) -> float:
        return left + (math.log10(number) - first) / (last - first) * (right - left)

    def y(width: float) -> float:
        return top + (1 - min(width / high, 1)) * height

    parts = [_text(4, 14, _shortened(words.y, PANEL - 8, 12), size=12, colour=MUTED)]
    for tick in ticks(0, high):
        parts.append(_line(left, y(tick), right, y(tick), RULE))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end", size=12, colour=MUTED))
    for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000):
        if first <= math.log10(tick) <= last:
            parts.append(_text(x(tick), top + height + 17, f"{tick}", anchor="middle", size=12, colour=MUTED))
    steps = [10 ** (first + (last - first) * step / 60) for step in range(61)]
    expected = [(x(number), y(guide(number))) for number in steps if guide(number) <= high]
    parts.append(_polyline(expected, Style(colour=MUTED, marker="circle", dash="4 3"), 1.3, words.guide))
    style = style_of(model)
    for number, width, noised, name in places:
        mark = (
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}" stroke="{}" stroke-width="1.6"/>').format(
                x(number), y(width), PAPER, style.colour
            )
            if noised
            else _marker(x(number), y(width), style, 4)
        )
        parts.append(Markup("<g><title>{}</title>{}</g>").format(name, mark))
    middle = _shortened(words.x, PANEL, 12)
    parts.append(_text(PANEL / 2, top + height + 37, middle, anchor="middle", size=12, colour=MUTED))
    return _svg(PANEL, top + height + 44, words.alt, parts)


# curves


@dataclass(frozen=True, kw_only=True)
class Curve:
    model: str
    label: str
    points: Sequence[tuple[int, float]]


def curves(panels: Sequence[tuple[str, tuple[float, float], Sequence[Curve]]], alt: str, axis: str) -> Markup:
    """Line charts, one figure each, each line named at its end.

    Args:
        panels: title, the span that the upright axis has at least, so that noise does not fill it, and lines.
    """
    return _join([_chart(title, lines, f"{alt} {title}", axis, span) for title, span, lines in panels])


def _chart(title: str, lines: Sequence[Curve], alt: str, axis: str, span: tuple[float, float]) -> Markup:
    head, foot, plot, margin = 26.0, 40.0, 250.0, 46.0
    names = min(PANEL / 2.4, 20 + max((_room(line.label, 12) for line in lines), default=0.0))
    left, right = margin, PANEL - names
    parts = [_text(left, 15, title, bold=True)]
    values = [value for line in lines for _, value in line.points]
    if not values:
        return _svg(PANEL, head + plot + foot, alt, parts)
    low, high = span
    low, high = min(low, *values), max(high, *values)
    low, high = low - 0.02 * (high - low), high + 0.02 * (high - low)
    last = max(at for line in lines for at, _ in line.points) or 1

    def x(at: float) -> float:
        return left + at / last * (right - left)

    def y(value: float) -> float:
        return head + (high - value) / (high - low) * plot

    for tick in ticks(low, high):
        parts.append(_line(left, y(tick), right, y(tick), RULE))
        parts.append(_text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end", size=12, colour=MUTED))
    for tick in ticks(0, last, 8):
        if tick == int(tick):
            parts.append(
                _text(x(tick), head + plot + 17, f"{tick:g}", anchor="middle", size=12, colour=MUTED)
            )
    parts.append(_text((left + right) / 2, head + plot + 34, axis, anchor="middle", size=12, colour=MUTED))
    for line in lines:
        style = style_of(line.model)
        places = [(x(at), y(value)) for at, value in line.points]
        parts.append(_polyline(places, style, 1.5 if "/" in line.model else 2.2, line.label))
        parts += [_marker(*place, style, 3) for place in places if len(places) <= 25]
    ends = [(y(line.points[-1][1]), line.model, line.label) for line in lines if line.points]
    if len(ends) * 14 > plot:  # one name an arm, at the middle of its lines
        arms: dict[str, list[tuple[float, str]]] = {}
        for at, model, label in ends:
            arm = model.partition("/")[0]
            arms.setdefault(arm, []).append((at, label.replace(model, arm)))
        ends = [(sum(at for at, _ in found) / len(found), arm, found[0][1]) for arm, found in arms.items()]
    ends.sort(key=lambda end: end[0])
    placed: list[float] = []
    for wanted, *_ in ends:
        placed.append(max(wanted, placed[-1] + 14) if placed else wanted)
    over = max(0.0, placed[-1] - (head + plot))
    for (wanted, model, label), at in zip(ends, placed, strict=True):
        colour = style_of(model).colour
        parts.append(_line(right + 4, wanted, right + 12, at - over, colour, 0.8))
        shown = _shortened(label, names - 16, 12)
        parts.append(_text(right + 15, at - over + 4, shown, size=12, colour=colour))
    return _svg(PANEL, head + plot + foot, alt, parts)


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
    left, right, top, height = 52.0, PANEL - 16.0, 26.0, 260.0
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
    free = 0.0
    for rate in sorted({rate for rate, _ in points}):
        half = _room(f"{rate:g}", 12) / 2
        if x(rate) - half >= free:
            parts.append(
                _text(x(rate), top + height + 17, f"{rate:g}", anchor="middle", size=12, colour=MUTED)
            )
            free = x(rate) + half + 4
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
    return _svg(PANEL, top + height + 44, words.alt, parts)


# heat map


def shade(value: float) -> str:
    """Background for dark text: white at 0.5 or below, at 1 the darkest blue on which `.interval` is read."""
    share = min(max((value - 0.5) / 0.5, 0.0), 1.0)
    return "#" + "".join(f"{round(255 + (end - 255) * share):02x}" for end in (0x84, 0xBB, 0xE3))
