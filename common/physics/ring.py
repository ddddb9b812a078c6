"""Rings: detector channels that count too much or too little in every view.

Forward model: a channel of gain 1 + g measures -ln(1 + g) more attenuation, whatever the object; FBP of that.
A scanner turns fully, so each ray of our half turn is measured by a channel on either side of the isocentre:
half of the error goes to either, which closes the circle. Approximation: the isocentre is the centre of the
image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, integer, uniform


@dataclass(frozen=True, kw_only=True)
class Ring:
    severity: float
    radii_px: tuple[float, ...]
    """Distance of each channel from the isocentre, image pixels."""
    gain_errors: tuple[float, ...]
    pixel_spacing_mm: float


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Ring:
    """Two to eight channels within the body, gain off by up to 0.8 (just visible) to 9 %; the same channels
    whatever the severity.

    A detector of ours is as wide as a pixel, several channels of a scanner.
    """
    frame, size = acquisition.frame, max(acquisition.rows, acquisition.columns)
    reach = min(max(frame.half_height, frame.half_width), size / 2 - 3)
    count = integer(generator, 2, 8)
    radii = tuple(reach * uniform(generator, 0.06, 0.9) for _ in range(count))
    largest = (0.008 + 0.082 * severity) if severity > 0 else 0.0
    signs = tuple(1 if uniform(generator, 0, 1) < 0.5 else -1 for _ in range(count))
    return Ring(
        severity=severity,
        radii_px=radii,
        gain_errors=tuple(sign * largest * uniform(generator, 0.4, 1.0) for sign in signs),
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
    )


def apply(image: Tensor, params: Ring | Sequence[Ring]) -> tuple[Tensor, Tensor]:
    """Miscalibrate some channels.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """
    longest = max(image.shape[-2:])

    def difference_of(square: Tensor, pixel_cm: float, each: list[Ring]) -> Tensor:
        size = square.shape[-1]
        scanner = ct.projector(size, square.device)
        profiles = torch.stack([channel_errors(one, size, longest / size) for one in each]).to(square.device)
        error = profiles[:, None, :].expand(-1, scanner.views, -1) / ct.mean_attenuation("water")
        return ct.back_project(error, scanner, pixel_cm)

    return ct.add_difference(image, params, difference_of)


def channel_errors(params: Ring, size: int, shrink: float = 1.0) -> Tensor:
    """Attenuation that each of `size` detectors adds, on the CPU; a channel between two detectors is shared
    by them.
    """
    profile = torch.zeros(size)
    centre = (size - 1) / 2
    for radius, gain in zip(params.radii_px, params.gain_errors, strict=True):
        for place in (centre - radius / shrink, centre + radius / shrink):
            lower = math.floor(place)
            for detector, weight in ((lower, lower + 1 - place), (lower + 1, place - lower)):
                if 0 <= detector < size:
                    profile[detector] -= 0.5 * weight * math.log1p(gain)
    return profile
