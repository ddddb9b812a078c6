"""Chemical shift of the first kind: fat displaced along readout, a dark rim on one side and a bright one on the other.

Forward model: image = water + fat; y = water + T_s fat, a sub-pixel Fourier shift by s = 3.5 ppm * gamma * B0 / bandwidth per pixel.
Without a fat map, fat is estimated as the bright ring under the skin (`fat_share`). Approximation: water and fat in phase.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, as_batch, body_mask, uniform

FAT_WATER_PPM = 3.5


@dataclass(frozen=True, kw_only=True)
class ChemicalShift:
    severity: float
    phase_encoding: str
    field_tesla: float
    bandwidth_hz_per_px: float
    """Infinite for severity zero."""
    direction: int
    """+1 or -1: the polarity of the readout gradient."""

    @property
    def shift_px(self) -> float:
        """Displacement of fat along readout, with its sign."""
        return self.direction * FAT_WATER_PPM * 1e-6 * kspace.GYROMAGNETIC_HZ_PER_T * self.field_tesla / self.bandwidth_hz_per_px


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> ChemicalShift:
    """The bandwidth at which fat moves by 9 px x severity at matrix 256 (2.7 px at 0.3, 1.4 px at 128: just visible)."""
    shift = 9.0 * severity * acquisition.pixel_scale * uniform(generator, 0.92, 1.08)
    hertz = FAT_WATER_PPM * 1e-6 * kspace.GYROMAGNETIC_HZ_PER_T * acquisition.field_tesla
    return ChemicalShift(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        field_tesla=acquisition.field_tesla,
        bandwidth_hz_per_px=hertz / shift if shift > 0 else math.inf,
        direction=1 if uniform(generator, 0, 1) < 0.5 else -1,
    )


def apply(image: Tensor, params: ChemicalShift | Sequence[ChemicalShift], fat: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shift the fat.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
        fat: share of each pixel's signal that is fat, 0..1, same shape; estimated from the image if absent.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, single = as_batch(image.float())
    share = fat_share(images) if fat is None else as_batch(fat.float())[0]
    each = [params] * images.shape[0] if isinstance(params, ChemicalShift) else list(params)
    shifts = torch.tensor([one.shift_px for one in each])

    def step(turned: list[Tensor]) -> list[Tensor]:
        signal, part = turned
        fat_signal = signal * part
        return [(signal - fat_signal + _shift_last(fat_signal, shifts)).abs()]

    (shifted,) = kspace.readout_last([images, share], [one.phase_encoding for one in each], step)
    mask = kspace.changed_where(images, shifted)
    return (shifted[0], mask[0]) if single else (shifted, mask)


def _shift_last(images: Tensor, shifts_px: Tensor) -> Tensor:
    """Each slice moved along the last axis by its sub-pixel shift, by the shift theorem."""
    samples = images.shape[-1]
    ramp = torch.exp(-2j * math.pi * torch.fft.rfftfreq(samples) * shifts_px[:, None])[:, None, :]
    return torch.fft.irfft(torch.fft.rfft(images) * ramp, n=samples)


def fat_share(images: Tensor) -> Tensor:
    """Subcutaneous fat of slices (slices, rows, columns) as a share 0..1: bright, under the skin, connected to it.

    Walks inwards from the body outline, at most 6 % of the matrix, through bright pixels only; the dark band of the skull stops it before
    the cortex. A few pixels of dark skin may be crossed first. Fails where fat is dark (fat suppression): then nothing is marked.
    """
    depth_px = max(4, round(0.06 * max(images.shape[-2:])))
    skin_px = max(2, depth_px // 4)
    body = body_mask(images)
    flat = images.reshape(images.shape[0], -1)
    bright_level = flat.kthvalue(int(0.98 * flat.shape[-1]), dim=-1).values[:, None, None]
    bright = body & (images > 0.5 * bright_level)
    reached = ~body
    kept = torch.zeros_like(body)
    for depth in range(depth_px + skin_px):
        grown = torch.nn.functional.max_pool2d(reached[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
        front = grown & body & ~reached
        fat = front & bright
        kept |= fat
        reached |= fat if depth >= skin_px else front
    return kept.float()
