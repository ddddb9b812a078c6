"""Low dose: noise of too few photons on every ray, with the grain that filtered back-projection gives it.

Forward model: twelve-energy transmission through water and bone, quanta counted with Poisson and electronic
noise, water-only correction; FBP of measured minus exact. No bow-tie filter and no modulation of the tube
current within a turn: noise is strongest in the middle of the body and runs along its longest axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, integer, uniform


@dataclass(frozen=True, kw_only=True)
class LowDose:
    severity: float
    photons: float
    """Unattenuated quanta per ray."""
    pixel_spacing_mm: float
    noise_seed: int


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> LowDose:
    """4e5 quanta a ray down to 1.6e4; more for a wide body."""
    return LowDose(
        severity=severity,
        photons=ct.exposure(acquisition) * 10 ** (5.6 - 1.4 * severity + uniform(generator, -0.1, 0.1)),
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
        noise_seed=integer(generator, 0, 2**31 - 1),
    )


def apply(image: Tensor, params: LowDose | Sequence[LowDose]) -> tuple[Tensor, Tensor]:
    """Scan with fewer photons.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """

    def difference_of(square: Tensor, pixel_cm: float, each: list[LowDose]) -> Tensor:
        error, _, paths = ct.counting_error(
            square, pixel_cm, [one.photons for one in each], [one.noise_seed for one in each]
        )
        return ct.reconstruct(error, paths)

    return ct.add_difference(image, params, difference_of)
