"""Figures of a sweep as PNG: intervals of all settings, and their ROC curves in one square."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.arms import PUBLIC
from common.counts import Counts
from server.evaluation.compare import held_out_sites, training_sites
from server.evaluation.report.figures import INK, MUTED, PAPER, RULE, style_of, ticks
from server.evaluation_file import Evaluation
from server.run_folder import RunFolder

SCALE = 2
"""Pixels of a unit of length, so that text is sharp on dense screens."""
COLOURS = (
    "#0063a3", "#c44e00", "#007f5c", "#a3478a", "#8a6d00", "#111111", "#5fa8dc", "#e69f00",
    "#7bc8a4", "#d9a0c8", "#6b6b6b", "#7a1f1f",
)  # fmt: skip
RATES = np.linspace(0, 1, 201)


class _Canvas:
    """A drawing in units of length, a unit SCALE pixels."""

    def __init__(self, width: float, height: float) -> None:
        self.image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        at = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(at, fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def dot(self, x: float, y: float, radius: float, colour: str, *, filled: bool = True) -> None:
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self._draw.ellipse(box, fill=colour if filled else PAPER, outline=colour, width=SCALE)

    def text(
        self, x: float, y: float, text: str, size: float = 13, colour: str = INK, anchor: str = "lm"
    ) -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, fill=colour, font=font, anchor=anchor)

    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, "PNG", optimize=True)
        return file.getvalue()


def forest_png(settings: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], title: str, axis: str) -> bytes:
    """Intervals of every setting, one line an arm, with the values of the single seeds.

    Args:
        settings: words of a setting with its rows of `sweep_results` at one place.
    """
    # the starting weights are not trained: alike in most settings
    lines = [
        (words if number == 0 else "", row)
        for words, rows in settings
        for number, row in enumerate([row for row in rows if row["arm"] != PUBLIC] or rows)
    ]
    several = len({row["arm"] for _, row in lines}) > 1
    left, right, top, step = 430.0, 900.0, 44.0, 24.0
    bottom = top + step * len(lines)
    ends = [
        end
        for _, row in lines
        for end in (row["low"], row["high"], *row["per_seed"])
        if end is not None and math.isfinite(end)
    ]
    low, high = max(0.0, min(ends, default=0.4) - 0.02), min(1.0, max(ends, default=1.0) + 0.02)

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    canvas = _Canvas(1000, bottom + 52)
    canvas.text(10, 18, title, 16)
    for tick in ticks(low, high):
        canvas.line([(x(tick), top - 6), (x(tick), bottom)], MUTED if tick == 0.5 else RULE)
        canvas.text(x(tick), bottom + 12, f"{tick:g}", 12, MUTED, "mm")
    for number, (words, row) in enumerate(lines):
        y, colour = top + step * (number + 0.5), style_of(row["arm"]).colour
        canvas.text(10, y, words)
        if several:
            canvas.text(left - 12, y, row["arm"], 12, colour, "rm")
        if row["low"] is not None and row["high"] is not None and math.isfinite(row["low"]):
            canvas.line([(x(row["low"]), y), (x(row["high"]), y)], colour, 2)
        for value in row["per_seed"]:
            canvas.dot(x(value), y, 2.5, colour, filled=False)
        canvas.dot(x(row["value"]), y, 4.5, colour)
        canvas.text(right + 14, y, f"{row['value']:.3f}", 13)
    canvas.text((left + right) / 2, bottom + 34, axis, 12, MUTED, "mm")
    return canvas.png()


def roc_png(settings: Sequence[tuple[str, Sequence[RunFolder]]], arm: str, where: str) -> bytes | None:
    """ROC curves of one arm at one place, a line a setting; None where a site was scored with noise.

    A line is the mean sensitivity over artifacts, sites and seeds at each false positive rate (vertical
    averaging; Fawcett, Pattern Recognition Letters 27, 2006).
    """
    lines = []
    for words, runs in settings:
        curves = [curve for run in runs for curve in _curves(run.evaluation, arm, where)]
        if not curves:
            return None
        lines.append((words, np.mean(curves, axis=0)))
    left, top, side, step = 60.0, 40.0, 460.0, 22.0
    canvas = _Canvas(1000, max(top + side + 50, top + step * len(lines) + 30))
    canvas.text(left, 18, f"{arm}, {where}: mean over artifacts, sites and seeds", 14)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line([(left + tick * side, top), (left + tick * side, top + side)], RULE)
        canvas.line([(left, top + tick * side), (left + side, top + tick * side)], RULE)
        canvas.text(left + tick * side, top + side + 12, f"{tick:g}", 12, MUTED, "mm")
        canvas.text(left - 8, top + (1 - tick) * side, f"{tick:g}", 12, MUTED, "rm")
    canvas.line([(left, top + side), (left + side, top)], MUTED)
    for number, (words, tpr) in enumerate(lines):
        colour, y = COLOURS[number % len(COLOURS)], top + step * (number + 0.5)
        canvas.line(
            [(left + fpr * side, top + (1 - at) * side) for fpr, at in zip(RATES, tpr, strict=True)],
            colour,
            2,
        )
        canvas.line([(left + side + 30, y), (left + side + 60, y)], colour, 3)
        canvas.text(left + side + 70, y, f"{words}: area {np.trapezoid(tpr, RATES):.3f}")
    canvas.text(left + side / 2, top + side + 34, "1 - specificity", 12, MUTED, "mm")
    canvas.text(10, top - 12, "sensitivity", 12, MUTED)
    return canvas.png()


def _curves(evaluation: Evaluation, arm: str, where: str) -> list[np.ndarray]:
    """Sensitivity at `RATES`, of each artifact that a site's patients have and have not; of each site, by its
    own model.
    """
    sites = held_out_sites(evaluation) if where == "unseen" else training_sites(evaluation)
    found = []
    for site in sites:
        if site not in evaluation["counts"]:
            continue
        if evaluation["scoring"][site]["mode"] == "dp":
            return []
        of_models = evaluation["counts"][site]
        models = [f"{arm}/{site}"] if f"{arm}/{site}" in of_models else [arm]
        if models[0] not in of_models:  # a site that none of the local models is of
            models = [model for model in of_models if model.startswith(f"{arm}/")]
        for counts in (Counts.from_json(of_models[model]) for model in models):
            found += [
                np.interp(RATES, *counts.roc(number))
                for number in range(len(counts.n_pos))
                if counts.n_pos[number] and counts.n_neg[number]
            ]
    return found
