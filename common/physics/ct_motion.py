"""Patient motion in CT: double contours and streaks, because later views see the body elsewhere.

Forward model: the views of half a turn see the body at rest up to a moment, turned about the image centre and
shifted after it, and a mix (sigmoid) over a few views between; FBP of the difference of the monochromatic
sinograms. In-plane and rigid; no interleaved repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, uniform


@dataclass(frozen=True, kw_only=True)
class CtMotion:
    severity: float
    angle_deg: float
    shift_y_px: float
    shift_x_px: float
    start: float
    """Share of the views taken when the movement is half done."""
    duration: float
    """Share of the views during which the movement goes from 12 % to 88 %."""
    pixel_spacing_mm: float


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> CtMotion:
    """Up to 4 degrees and 4 px at matrix 256, over some 3-10 of 144 views, in the middle 60 % of the scan."""
    sizes = []
    for largest in (4.0, 4.0 * acquisition.pixel_scale, 4.0 * acquisition.pixel_scale):
        sign = 1 if uniform(generator, 0, 1) < 0.5 else -1
        sizes.append(sign * largest * severity * uniform(generator, 0.4, 1.0))
    return CtMotion(
        severity=severity,
        angle_deg=sizes[0],
        shift_y_px=sizes[1],
        shift_x_px=sizes[2],
        start=uniform(generator, 0.2, 0.8),
        duration=uniform(generator, 0.02, 0.07),
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
    )


def apply(image: Tensor, params: CtMotion | Sequence[CtMotion]) -> tuple[Tensor, Tensor]:
    """Move the patient during the scan.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """
    longest = max(image.shape[-2:])

    def difference_of(square: Tensor, pixel_cm: float, each: list[CtMotion]) -> Tensor:
        density = ((square + 1000) / 1000).clamp(min=0)
        scanner = ct.projector(square.shape[-1], square.device)
        error = ct.integrals(_moved(density, each, longest / square.shape[-1]) - density, pixel_cm)
        view = (
            torch.arange(scanner.views, dtype=torch.float32).to(square.device)[None, :, None] + 0.5
        ) / scanner.views
        start, duration = (
            ct.column([getattr(one, name) for one in each], square) for name in ("start", "duration")
        )
        return ct.back_project(error * torch.sigmoid(4 * (view - start) / duration), scanner, pixel_cm)

    return ct.add_difference(image, params, difference_of)


def _moved(density: Tensor, params: Sequence[CtMotion], shrink: float) -> Tensor:
    """Each square slice turned about its centre, then shifted; linear interpolation, air around."""
    size = density.shape[-1]
    axis = (torch.arange(size, dtype=torch.float32) - (size - 1) / 2).to(density.device)
    y = axis[:, None] - ct.column([one.shift_y_px / shrink for one in params], density)
    x = axis[None, :] - ct.column([one.shift_x_px / shrink for one in params], density)
    angle = torch.deg2rad(ct.column([one.angle_deg for one in params], density))
    cosine, sine = torch.cos(angle), torch.sin(angle)
    grid = torch.stack([cosine * x + sine * y, cosine * y - sine * x], -1) * (2 / (size - 1))
    return torch.nn.functional.grid_sample(
        density[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )[:, 0]
