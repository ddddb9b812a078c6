"""Describe how a slice was acquired, as far as an artifact depends on it, and where the body lies in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from common.errors import ImagingError

Params = TypeVar("Params")

REFERENCE_MATRIX = 256
"""Pixel quantities in our tables are for this matrix; scale them by `Acquisition.pixel_scale`."""

MAX_HARDENING_GAIN = 25.0
"""Bands of beam hardening are amplified at most this much, so that a slice without bone stays clean."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The ellipse around the body, in pixels: centre and half-axes along rows (y) and columns (x)."""

    y: float
    x: float
    half_height: float
    half_width: float
    tissue: tuple[tuple[float, float], ...] = ()
    """A coarse grid of places (y, x) well inside tissue; anywhere if empty."""

    def at(self, radius: float, angle_rad: float) -> tuple[float, float]:
        """The place in tissue nearest to a fraction `radius` of the way from the centre to the rim, in
        direction `angle_rad`.
        """
        y, x = (
            self.y + radius * self.half_height * math.sin(angle_rad),
            self.x + radius * self.half_width * math.cos(angle_rad),
        )
        near_y, near_x = min(
            self.tissue, key=lambda place: (place[0] - y) ** 2 + (place[1] - x) ** 2, default=(y, x)
        )
        return (y, x) if math.hypot(near_y - y, near_x - x) < self.half_width / 16 else (near_y, near_x)


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """What `draw` needs to know. Fields of the other modality are ignored.

    `phase_encoding` is DICOM (0018,1312): "ROW" = phase runs along a row (axis -1), "COL" = along a column
    (axis -2).
    """

    rows: int
    columns: int
    frame: Frame
    pixel_spacing_mm: float = 1.0
    slice_thickness_mm: float = 5.0
    phase_encoding: str = "COL"
    sequence: str = "SE"
    """"SE", "GRE" or "EPI"; EPI is taken to be fat-suppressed."""
    spin_echo: bool = False
    """Whether a spin echo refocuses what EPI acquires: diffusion, not BOLD."""
    field_tesla: float = 1.5
    echo_time_ms: float = 10.0
    bandwidth_hz_per_px: float = 200.0
    hardening_gain: float = MAX_HARDENING_GAIN
    """Largest gain of beam hardening bands. Ribs and vertebrae of people are thinner and more porous than
    those of our phantoms, so real slices need more."""

    @property
    def pixel_scale(self) -> float:
        """Factor from pixels of a 256 matrix to pixels of this one."""
        return max(self.rows, self.columns) / REFERENCE_MATRIX


def acquire(image: Tensor, modality: str, **fields: float | str) -> Acquisition:
    """The acquisition of a real 2-D slice: its size and the frame of its body.

    Args:
        image: shape (rows, columns); HU or MR magnitude.
        modality: "CT" or "MR".
        fields: any other field of `Acquisition`, from the header.
    Raises:
        ImagingError: `image` has not two axes.
    """
    if image.ndim != 2:
        raise ImagingError(f"slice has {image.ndim} axes, expected 2", code="not-a-slice")
    rows, columns = image.shape
    image = image.cpu()
    return Acquisition(rows=rows, columns=columns, frame=frame_of(image, modality), **fields)  # type: ignore[arg-type]


def body_mask(image: Tensor, *, threshold: float | None = None) -> Tensor:
    """Where the body is: pixels with foreground on their left, right, above and below. Bool, same shape.

    Args:
        image: shape (..., rows, columns).
        threshold: foreground is above it; without it 12 % of the 99th percentile of each slice.
    Approximation: a concavity of the outline that is closed in both axes is filled.
    """
    smooth = torch.nn.functional.avg_pool2d(
        image.reshape(-1, 1, *image.shape[-2:]), 3, stride=1, padding=1
    ).reshape(image.shape)
    if threshold is None:
        flat = image.reshape(*image.shape[:-2], -1)
        level = flat.kthvalue(max(1, int(0.99 * flat.shape[-1])), dim=-1).values * 0.12
        foreground = smooth > level[..., None, None]
    else:
        foreground = smooth > threshold
    inside = torch.ones_like(foreground)
    solid = foreground.to(torch.uint8)
    for axis in (-1, -2):
        inside &= solid.cummax(axis).values.bool()
        inside &= solid.flip(axis).cummax(axis).values.flip(axis).bool()
    return inside


def frame_of(image: Tensor, modality: str) -> Frame:
    """The frame of the body in a slice (rows, columns): central 96 % of its row and column sums; the whole
    image if there is none.

    Tissue is above -200 HU, or above 30 % of the 99th percentile (an implant in air or in dark bone would
    show nothing).
    """
    rows, columns = image.shape
    image = image.float()
    mask = body_mask(image, threshold=-400.0 if modality == "CT" else None)
    if not bool(mask.any()):
        return Frame(y=(rows - 1) / 2, x=(columns - 1) / 2, half_height=rows / 2, half_width=columns / 2)
    edges = []
    for axis in (1, 0):
        share = mask.sum(axis).float().cumsum(0)
        share = share / share[-1]
        low = int((share < 0.02).sum())
        high = int((share < 0.98).sum())
        edges.append((low, max(high, low + 2)))
    (top, bottom), (left, right) = edges
    level = (
        -200.0
        if modality == "CT"
        else 0.3 * float(image.reshape(-1).kthvalue(int(0.99 * image.numel())).values)
    )
    width = max(3, max(rows, columns) // 40 * 2 + 1)
    mean = torch.nn.functional.avg_pool2d(
        (mask & (image > level))[None, None].float(), width, stride=1, padding=width // 2
    )[0, 0]
    step = max(2, max(rows, columns) // 32)
    places = (mean[::step, ::step] > 0.75).nonzero() * step
    return Frame(
        y=(top + bottom) / 2,
        x=(left + right) / 2,
        half_height=(bottom - top) / 2 * 1.04,
        half_width=(right - left) / 2 * 1.04,
        tissue=tuple((float(y), float(x)) for y, x in places.tolist()),
    )


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """One integer from low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def per_slice(image: Tensor, params: Params | Sequence[Params]) -> tuple[Tensor, list[Params], bool]:
    """`image` as float32 (slices, rows, columns), the parameters of each slice, and whether the slice axis
    was added.
    """
    images, single = as_batch(image.float())
    return images, list(params) if isinstance(params, Sequence) else [params] * len(images), single


def as_batch(image: Tensor) -> tuple[Tensor, bool]:
    """`image` with a slice axis in front, and whether it was added."""
    if image.ndim == 2:
        return image[None], True
    if image.ndim != 3:
        raise ImagingError(
            f"image has {image.ndim} axes, expected (rows, columns) or (slices, rows, columns)",
            code="not-a-slice",
        )
    return image, False
