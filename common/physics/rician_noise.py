"""Rician noise: the magnitude of a signal with Gaussian noise in both channels (Gudbjartsson and Patz, MRM
1995). A nuisance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, integer, per_slice, uniform


@dataclass(frozen=True, kw_only=True)
class RicianNoise:
    severity: float
    sigma: float
    """Standard deviation in each channel, relative to the maximum of the slice."""
    noise_seed: int


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> RicianNoise:
    """Up to 12 % of the maximum."""
    sigma = 0.12 * severity * uniform(generator, 0.9, 1.0)
    return RicianNoise(severity=severity, sigma=sigma, noise_seed=integer(generator, 0, 2**31 - 1))


def apply(image: Tensor, params: RicianNoise | Sequence[RicianNoise]) -> tuple[Tensor, Tensor]:
    """Add noise; drawn on the CPU, so that a GPU gives the same.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    drawn = torch.stack(
        [
            torch.randn(2, *images.shape[-2:], generator=torch.Generator().manual_seed(one.noise_seed))
            for one in each
        ]
    )
    sigma = torch.tensor([one.sigma for one in each], device=images.device)[:, None, None] * images.amax(
        (-2, -1), keepdim=True
    )
    real, imaginary = drawn.to(images.device).unbind(1)
    changed = torch.sqrt((images + sigma * real).square() + (sigma * imaginary).square())
    return kspace.with_mask(images, changed, single=single)
