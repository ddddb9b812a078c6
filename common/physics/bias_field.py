"""Bias field: smooth shading by the sensitivity of a coil. A nuisance of appearance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, per_slice, uniform


@dataclass(frozen=True, kw_only=True)
class BiasField:
    severity: float
    coefficients: tuple[float, ...]
    """Of y, x, xy, x^2 - 1/3, y^2 - 1/3 in the logarithm of the sensitivity; y and x run from -1 to 1."""


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> BiasField:
    """A polynomial of order 2 whose coefficients reach 1.0 x severity."""
    return BiasField(
        severity=severity, coefficients=tuple(severity * uniform(generator, -1, 1) for _ in range(5))
    )


def apply(image: Tensor, params: BiasField | Sequence[BiasField]) -> tuple[Tensor, Tensor]:
    """Shade.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    y = torch.linspace(-1, 1, images.shape[-2], device=images.device)[:, None]
    x = torch.linspace(-1, 1, images.shape[-1], device=images.device)[None, :]
    terms = torch.stack([y + 0 * x, x + 0 * y, x * y, x * x - 1 / 3 + 0 * y, y * y - 1 / 3 + 0 * x])
    log_gain = torch.einsum(
        "st,tyx->syx", torch.tensor([one.coefficients for one in each], device=images.device), terms
    )
    changed = images * torch.exp(log_gain)
    return kspace.with_mask(images, changed, single=single)
