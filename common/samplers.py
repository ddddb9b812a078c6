"""Samplers by name: which slices one pass of training without noise takes, and in what order.

`balanced` counts labels over all patients, so that one patient changes how often every other is drawn. No
clip bounds that, and it is not the sampling that a private arm is accounted for: plans that have one are
refused (common/plan.py). Under privacy rare artifacts are balanced by public numbers, `class_weights`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.ndarray, np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""Takes the training rows, modality (n,) and labels (n, A) of all slices, and a generator; gives as many rows
as there are, in the order of the pass.
"""


def uniform(
    rows: np.ndarray, modality: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Every row once, shuffled."""
    return rng.permutation(rows)


def balanced(
    rows: np.ndarray, modality: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Rows drawn with replacement, by `draw_weights`."""
    if not len(rows):
        return rows
    return rng.choice(rows, size=len(rows), p=draw_weights(modality[rows], labels[rows]))


def draw_weights(modality: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How likely each slice is to be drawn, float64 (n,), sums to 1.

    A slice belongs to the class of each artifact that it shows (label above 0), and to that of clean slices
    of its modality where it shows none. It weighs one over the number of slices of its rarest class. Slices
    of which nothing was assessed teach nothing and are not drawn, unless there are no others.
    """
    present = labels > 0  # nan is not
    is_clean = ~present.any(axis=1)
    classes = np.column_stack([present, *(is_clean & (modality == code) for code in np.unique(modality))])
    assessed = ~np.isnan(labels).all(axis=1)
    classes &= assessed[:, None]
    weights = (classes / np.maximum(classes.sum(axis=0), 1)).max(axis=1, initial=0.0)
    return weights / weights.sum() if assessed.any() else np.full(len(labels), 1 / len(labels))


SAMPLERS: dict[str, Sampler] = {"uniform": uniform, "balanced": balanced}
