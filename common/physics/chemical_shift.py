"""Chemical shift: fat precesses 3.5 ppm more slowly than water, so it is drawn beside its place, or against
water in phase.

First kind: y = water + T_s fat, fat displaced along readout by s = 3.5 ppm * gamma * B0 / bandwidth per pixel
(sub-pixel Fourier shift): a dark rim on one side and a bright one on the other. In EPI with fat suppression
the scalp that was not suppressed lies 8-20 px away along phase encoding, a pale rim across the brain. Second
kind (gradient echo): y = |water + e^{i phi} fat| cancels pixels that hold both, a dark outline on all sides;
phi = pi in opposed phase. Without a fat map fat is estimated as the bright layer under the skin
(`fat_share`).
Approximation: all fat has one frequency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from common.errors import ImagingError
from common.physics import kspace
from common.physics.acquisition import Acquisition, as_batch, body_mask, per_slice, uniform

FAT_WATER_PPM = 3.5


@dataclass(frozen=True, kw_only=True)
class ChemicalShift:
    severity: float
    phase_encoding: str
    field_tesla: float
    bandwidth_hz_per_px: float
    """Along the axis of the displacement. Infinite: no displacement."""
    direction: int
    """+1 or -1: the polarity of the gradient."""
    kind: str = "first"
    """"first", "epi" or "second"."""
    phase_rad: float = 0.0
    """Second kind: between fat and water at the echo."""
    scalp: float = 0.0
    """EPI: signal of the fat that was not suppressed, relative to the 99th percentile of the slice."""
    scalp_width: float = 0.0
    """EPI: thickness of the scalp as a share of the half-axes of the body."""
    scalp_side_rad: float = 0.0
    """EPI: the direction in which the scalp is brightest; opposite it is a quarter as bright, for suppression
    fails in places.
    """
    frame: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """EPI: ellipse around the head: centre y, x and half-axes, px."""

    @property
    def shift_px(self) -> float:
        """Displacement of fat, with its sign."""
        return (
            self.direction
            * FAT_WATER_PPM
            * 1e-6
            * kspace.GYROMAGNETIC_HZ_PER_T
            * self.field_tesla
            / self.bandwidth_hz_per_px
        )


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> ChemicalShift:
    """The bandwidth at which fat moves by 9 px x severity at matrix 256 (2.7 px at 0.3, 1.4 px at 128: just
    visible).

    In EPI, which is fat-suppressed: a scalp of 15-60 % of the brain's signal, 14-34 px away at matrix 256.
    """
    scale, frame = acquisition.pixel_scale, acquisition.frame
    epi = acquisition.sequence == "EPI"
    spread = uniform(generator, 0.92, 1.08)
    shift = uniform(generator, 14, 34) * scale if epi else 9.0 * severity * scale * spread
    hertz = FAT_WATER_PPM * 1e-6 * kspace.GYROMAGNETIC_HZ_PER_T * acquisition.field_tesla
    return ChemicalShift(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        field_tesla=acquisition.field_tesla,
        bandwidth_hz_per_px=hertz / shift if shift > 0 else math.inf,
        direction=1 if uniform(generator, 0, 1) < 0.5 else -1,
        kind="epi" if epi else "first",
        scalp=0.6 * severity * spread if epi else 0.0,
        scalp_width=uniform(generator, 0.06, 0.12),
        scalp_side_rad=uniform(generator, 0, 2 * math.pi),
        frame=(frame.y, frame.x, 1.1 * frame.half_height, 1.1 * frame.half_width),
    )


def draw_second_kind(severity: float, generator: torch.Generator, acquisition: Acquisition) -> ChemicalShift:
    """An echo time at which fat and water are pi x severity apart (in 1.5 T, opposed at 2.2 ms); none in EPI,
    which is fat-suppressed.
    """
    return ChemicalShift(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        field_tesla=acquisition.field_tesla,
        bandwidth_hz_per_px=math.inf,
        direction=1,
        kind="second",
        phase_rad=0.0
        if acquisition.sequence == "EPI"
        else math.pi * severity * uniform(generator, 0.95, 1.0),
    )


def apply(
    image: Tensor, params: ChemicalShift | Sequence[ChemicalShift], fat: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shift the fat.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice; of one kind.
        fat: share of each pixel's signal that is fat, 0..1, same shape; estimated from the image if absent.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    Raises:
        ImagingError: the kinds differ.
    """
    images, each, single = per_slice(image, params)
    kind = each[0].kind
    if any(one.kind != kind for one in each):
        raise ImagingError("slices of one call must show one kind of chemical shift", code="bad-argument")
    if kind == "epi":
        shifted = _with_scalp(images, each)
    else:
        share = fat_share(images) if fat is None else as_batch(fat.float())[0]
        shifted = _out_of_phase(images, share, each) if kind == "second" else _beside(images, share, each)
    return kspace.with_mask(images, shifted, single=single)


def _beside(images: Tensor, share: Tensor, params: Sequence[ChemicalShift]) -> Tensor:
    shifts = torch.tensor([one.shift_px for one in params], device=images.device)

    def step(turned: list[Tensor]) -> list[Tensor]:
        signal, part = turned
        fat_signal = signal * part
        return [(signal - fat_signal + _shift_last(fat_signal, shifts)).abs()]

    return kspace.readout_last([images, share], [one.phase_encoding for one in params], step)[0]


def _out_of_phase(images: Tensor, share: Tensor, params: Sequence[ChemicalShift]) -> Tensor:
    """|water + e^{i phi} fat|. An estimated share is all or nothing: the border pixels that hold both are
    made by blurring it.
    """
    mixed = avg_pool2d(share[:, None], 3, stride=1, padding=1, count_include_pad=False)[:, 0]
    phase = torch.tensor([one.phase_rad for one in params], device=images.device)[:, None, None]
    return images * torch.sqrt((1 - 2 * mixed * (1 - mixed) * (1 - torch.cos(phase))).clamp(min=0))


def _with_scalp(images: Tensor, params: Sequence[ChemicalShift]) -> Tensor:
    """The slices with the scalp that fat suppression left, displaced along phase encoding."""
    _, rows, columns = images.shape
    y = torch.arange(rows, dtype=torch.float32, device=images.device)[:, None]
    x = torch.arange(columns, dtype=torch.float32, device=images.device)[None, :]
    flat = images.reshape(images.shape[0], -1)
    top = flat.kthvalue(max(1, int(0.99 * flat.shape[-1])), dim=-1).values
    ghosts = []
    for one, brightest in zip(params, top, strict=True):
        shift_y, shift_x = (0.0, one.shift_px) if one.phase_encoding == "ROW" else (one.shift_px, 0.0)
        centre_y, centre_x, half_height, half_width = one.frame
        down, right = (y - shift_y - centre_y) / half_height, (x - shift_x - centre_x) / half_width
        level = torch.sqrt(down.square() + right.square())
        facing = (down * math.sin(one.scalp_side_rad) + right * math.cos(one.scalp_side_rad)) / level.clamp(
            min=1e-3
        )
        rim = min(half_height, half_width)
        inside, outside = (
            ((1 - level) * rim + 0.5).clamp(0, 1),
            ((level - 1 + one.scalp_width) * rim + 0.5).clamp(0, 1),
        )
        ghosts.append(one.scalp * brightest * inside * outside * (0.625 + 0.375 * facing))
    # fat and water have no fixed phase: they add in power
    return torch.sqrt(images.square() + torch.stack(ghosts).square())


def _shift_last(images: Tensor, shifts_px: Tensor) -> Tensor:
    """Each slice moved along the last axis by its sub-pixel shift, by the shift theorem."""
    samples = images.shape[-1]
    angle = -2 * math.pi * torch.fft.rfftfreq(samples, device=images.device) * shifts_px[:, None]
    ramp = torch.polar(torch.ones_like(angle), angle)[:, None, :]
    return torch.fft.irfft(torch.fft.rfft(images) * ramp, n=samples)


def fat_share(images: Tensor) -> Tensor:
    """Subcutaneous fat of slices (slices, rows, columns) as a share 0..1: a bright layer under the skin with
    something dark beneath it.

    Walks inwards from the body outline, at most 9 % of the matrix, through bright pixels only; a few pixels
    of dark skin may be crossed first, from outside only. What the walk reached counts where, further in, the
    signal falls to half of the fat's within a few pixels (skull, muscle). Cortex or liver that touches the
    outline goes on being bright and is left alone, and so is a tumour that takes up contrast and grew
    through the skull. Fails where fat is dark (fat suppression) and where muscle is as bright as fat: then
    nothing is marked. A flat tumour in the scalp with dark bone beneath it is taken for fat.

    Args:
        images: magnitude, shape (slices, rows, columns).
    Returns:
        float32, same shape.
    """
    side = max(images.shape[-2:])
    depth_px, skin_px, gap_px = (
        max(4, round(0.09 * side)),
        max(2, round(0.015 * side)),
        max(2, round(0.03 * side)),
    )
    body = body_mask(images)
    flat = images.reshape(images.shape[0], -1)
    bright_level = flat.kthvalue(int(0.98 * flat.shape[-1]), dim=-1).values[:, None, None]
    bright = body & (images > 0.5 * bright_level)
    # dark pixels are crossed from outside only: a walk that came through fat would cross the skull
    skin = ~body
    kept = torch.zeros_like(body)
    for depth in range(depth_px):
        front = _grown(skin | kept) & bright & ~kept
        if depth < skin_px:
            skin = skin | _grown(skin) & body & ~bright
        kept = kept | front
    # the walk stops where it is dark, or at its limit where it is still bright: there it was no layer. Where
    # what goes on being bright is solid (a tumour, liver) and not a bridge (a vein), nothing above it counts
    stopped_at_limit = _grown(kept) & bright & ~kept
    half = depth_px // 2
    solid = _spread(~_spread(~bright, half), half)
    spread = _walked(stopped_at_limit, kept, half) | _walked(stopped_at_limit & solid, kept, depth_px)
    layer = kept & ~spread
    # beneath the layer the signal must fall to half of what it is in the layer, and not only in its last
    # partial pixel
    local = images.where(layer, torch.zeros_like(images))
    fat_level = max_pool2d(local[:, None], 2 * gap_px + 1, stride=1, padding=gap_px)[:, 0]
    dark = body & ~_grown(~body) & (images < 0.5 * fat_level)
    return _whole(layer & _walked(dark, layer, depth_px), kept, round(0.03 * side))


def _whole(layer: Tensor, bright: Tensor, reach_px: int) -> Tensor:
    """A layer without holes and islands, as a share 0..1: of the bright pixels nearby more than 80 % must be
    of the layer for a full share, and 40 % for any. Where the layer ends within bright tissue its share
    fades, so that the displaced fat leaves no hole with a straight edge.
    """
    width = 2 * reach_px + 1
    marked, of = (
        avg_pool2d(mask[:, None].float(), width, stride=1, padding=reach_px)[:, 0] for mask in (layer, bright)
    )
    density = marked / of.clamp(min=1e-6)
    share = ((density - 0.4) / 0.4).clamp(0, 1)
    return torch.where(layer | (density > 0.8), share, torch.zeros_like(share)) * bright


def _walked(start: Tensor, within: Tensor, steps: int) -> Tensor:
    """What is reached from `start` in so many steps of one pixel through `within`; `start` included."""
    reached = start
    for _ in range(steps):
        reached = _grown(reached) & within | reached
    return reached


def _spread(mask: Tensor, reach_px: int) -> Tensor:
    return max_pool2d(mask[:, None].float(), 2 * reach_px + 1, stride=1, padding=reach_px)[:, 0] > 0


def _grown(mask: Tensor) -> Tensor:
    return _spread(mask, 1)
