"""Gibbs ringing: ripples beside sharp edges, because high spatial frequencies were not acquired. A nuisance
of appearance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, per_slice, uniform


@dataclass(frozen=True, kw_only=True)
class Gibbs:
    severity: float
    keep_rows: float
    """Share of k-space acquired along the columns (axis -2), 0..1."""
    keep_columns: float


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Gibbs:
    """Between all and 35 % of k-space, on one axis or on both."""
    keep = 1 - 0.65 * severity * uniform(generator, 0.9, 1.0)
    both = uniform(generator, 0, 1)
    return Gibbs(
        severity=severity, keep_rows=keep if both < 0.75 else 1.0, keep_columns=keep if both > 0.25 else 1.0
    )


def apply(image: Tensor, params: Gibbs | Sequence[Gibbs]) -> tuple[Tensor, Tensor]:
    """Cut k-space off.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    rows, columns = (kspace.frequencies(count, images.device).abs() * 2 for count in images.shape[-2:])
    windows = torch.stack(
        [(rows <= one.keep_rows)[:, None] & (columns <= one.keep_columns)[None, :] for one in each]
    )
    changed = kspace.to_image(kspace.to_kspace(images) * windows).abs()
    return kspace.with_mask(images, changed, single=single)
