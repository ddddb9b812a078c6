"""Clip each patient's gradient once, which bounds a patient's influence on a step.

The promise of `clipped_sum`: adding or removing one patient, with any number of slices and any values in
them, changes the sum by at most `clip_norm` in L2 (up to rounding), and leaves every other patient's part of
it unchanged. A patient whose vector is not finite weighs zero, silently: an error or a warning would tell
that such a patient exists.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patient_means(per_slice: Tensor, owner: Tensor, num_patients: int) -> Tensor:
    """The mean of each patient's rows: the gradient of that patient's mean loss, from per-slice gradients.

    Args:
        per_slice: shape (slices, n).
        owner: shape (slices,), which patient a row belongs to, 0 ... num_patients - 1; each has at least one.
    Returns:
        shape (num_patients, n), the dtype of `per_slice`.
    """
    slices = torch.bincount(owner, minlength=num_patients).clamp(min=1)
    total = torch.zeros(num_patients, per_slice.shape[1], dtype=per_slice.dtype)
    return total.index_add_(0, owner, per_slice / slices[owner, None])


def clip_factors(per_patient: Tensor, clip_norm: float) -> Tensor:
    """min(1, clip_norm / norm) of each row, 0 where the row is not finite; shape (patients,)."""
    norms = per_patient.norm(dim=1)
    factors = (clip_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    return torch.where(norms.isfinite(), factors, 0.0)


def clipped_sum(per_patient: Tensor, clip_norm: float) -> Tensor:
    """The sum over patients of their vectors, each scaled down to norm `clip_norm` at most.

    Args:
        per_patient: shape (patients, n); may have no rows.
        clip_norm: L2 bound of one patient.
    Returns:
        float64, shape (n,), without noise: not to be released.
    """
    per_patient = per_patient.to(torch.float64)
    factors = clip_factors(per_patient, clip_norm)
    counts = factors > 0
    return factors[counts] @ per_patient[counts]
