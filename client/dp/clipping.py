"""Clip each patient's gradient once, which bounds a patient's influence on a step.

A row is clipped by its own values alone, whatever the other rows hold. A patient whose vector is not finite
weighs zero, silently: an error or a warning would tell that such a patient exists. Floats bound the norm up
to rounding; `client.dp.release` makes the bound exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

VALUES_PER_BLOCK = 1 << 20  # bounds the memory of float64 copies; changes nothing else


def patient_means(
    per_slice: Tensor, owner: Tensor, num_patients: int, weights: Tensor | None = None
) -> Tensor:
    """The mean of each patient's rows: the gradient of that patient's mean loss, from per-slice gradients.

    Args:
        per_slice: shape (slices, n).
        owner: shape (slices,), which patient a row belongs to, 0 ... num_patients - 1; each has at least one.
        weights: shape (slices,), sums to 1 for each patient; None: a patient's rows weigh the same.
    Returns:
        shape (num_patients, n), the dtype of `per_slice`.
    """
    total = per_slice.new_zeros(num_patients, per_slice.shape[1])
    if weights is not None:
        return total.index_add_(0, owner, per_slice * weights[:, None])
    slices = torch.bincount(owner, minlength=num_patients).clamp(min=1)
    return total.index_add_(0, owner, per_slice / slices[owner, None])


def clipped(per_patient: np.ndarray, clip_norm: float) -> np.ndarray:
    """Each row, scaled down to norm `clip_norm` at most, up to rounding; zero where the row is not finite.

    Args:
        per_patient: floats, shape (patients, n).
        clip_norm: L2 bound of one patient, finite and above 0.
    Returns:
        float64, shape (patients, n).
    """
    rows = np.array(per_patient, dtype=np.float64, order="C")
    with np.errstate(invalid="ignore"):  # what is not finite stays so in a maximum
        largest = np.maximum(rows.max(axis=1, initial=0.0), -rows.min(axis=1, initial=0.0))
    broken = ~np.isfinite(largest)
    rows[broken] = 0
    largest[broken | (largest == 0)] = 1
    # divided by its largest value first, so that no square is too large or too small for a float
    unit = rows / largest[:, None]
    reach = clip_norm / np.maximum(np.sqrt(np.square(unit).sum(axis=1)), 1.0)
    too_long = largest > reach
    return np.multiply(unit, reach[:, None], out=rows, where=too_long[:, None])


def clipped_sum(per_patient: np.ndarray, clip_norm: float) -> np.ndarray:
    """The sum over patients of their clipped vectors, float64, shape (n,). Without noise: not to be released
    from patients of a hospital.
    """
    total = np.zeros(per_patient.shape[1])
    for block in row_blocks(per_patient):
        total += clipped(block, clip_norm).sum(axis=0)
    return total


def row_blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows`, some at a time, so that copies of a block stay small."""
    height = max(1, VALUES_PER_BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), height):
        yield rows[start : start + height]
