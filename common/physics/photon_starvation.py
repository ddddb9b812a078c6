"""Photon starvation: streaks along the longest paths, left to right through shoulders and pelvis, where
almost no photon arrives.

Forward model: as `low_dose`, but only rays that keep few quanta are noisy: the error of a ray that expects N
quanta is weighted by 1 / (1 + N / `STARVED_QUANTA`). Noise of all other rays is the scanner's appearance.
Where the counts end in the electronic noise the logarithm clips, which adds the dark and bright bands of real
starvation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, integer, uniform

STARVED_QUANTA = 40.0


@dataclass(frozen=True, kw_only=True)
class PhotonStarvation:
    severity: float
    photons: float
    """Unattenuated quanta per ray."""
    pixel_spacing_mm: float
    noise_seed: int


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> PhotonStarvation:
    """2.5e5 quanta a ray down to 1.3e4, more for a wide body: streaks in a wide body, little in a head."""
    return PhotonStarvation(
        severity=severity,
        photons=ct.exposure(acquisition) * 10 ** (5.4 - 1.3 * severity + uniform(generator, -0.1, 0.1)),
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
        noise_seed=integer(generator, 0, 2**31 - 1),
    )


def apply(image: Tensor, params: PhotonStarvation | Sequence[PhotonStarvation]) -> tuple[Tensor, Tensor]:
    """Starve the longest rays.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """

    def difference_of(square: Tensor, pixel_cm: float, each: list[PhotonStarvation]) -> Tensor:
        error, quanta, paths = ct.counting_error(
            square, pixel_cm, [one.photons for one in each], [one.noise_seed for one in each]
        )
        return ct.reconstruct(error / (1 + quanta / STARVED_QUANTA), paths)

    return ct.add_difference(image, params, difference_of)
