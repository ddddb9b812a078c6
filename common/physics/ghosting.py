"""Periodic motion: copies of what breathes or pulsates along phase encoding, n / period pixels apart.

Forward model: the signal of the moving part is displaced along phase encoding by d(j) in k-space line j, a
phase ramp on that line; the rest stays. Breathing moves the side of the body that is free to move, most at
its rim (a flattened-expiration waveform); a pulse moves a vessel; nodding moves all. A strictly periodic
waveform gives sharp copies; its period wanders by about 10 %, which turns them into the haze that scanners
show.
Approximation: one displacement along one axis; through-plane motion and inflow are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, integer, per_slice, uniform


@dataclass(frozen=True, kw_only=True)
class Ghosting:
    severity: float
    phase_encoding: str
    amplitude_px: float
    period_lines: float
    phase: float
    wander: float
    """Depth of the modulation of the period, radians; 0 is strictly periodic."""
    part: str
    """What moves: "all", "wall" (one side of the body) or "vessel"."""
    place: tuple[float, float] = (0.0, 0.0)
    """wall: direction of the moving side (y, x), a unit vector; vessel: centre (y, x), px."""
    reach_px: float = 1.0
    """wall: distance over which the movement fades, and where it is half; vessel: radius."""
    centre: tuple[float, float] = (0.0, 0.0)
    """Of the body (y, x), px."""


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Ghosting:
    """Displacements of 9 px x severity at matrix 256 (all and wall; vessels twice that), a period of 4-20
    lines.
    """
    scale, frame = acquisition.pixel_scale, acquisition.frame
    part = ("all", "wall", "wall", "vessel")[integer(generator, 0, 3)]
    amplitude = 9.0 * severity * scale * uniform(generator, 0.85, 1.15)
    place, reach = (0.0, 0.0), 1.0
    angle = uniform(generator, 0, 2 * math.pi)
    if part == "wall":  # towards one side along phase encoding: the front of the body, most often
        side = 1.0 if angle < math.pi / 2 else -1.0
        place = (0.0, side) if acquisition.phase_encoding == "ROW" else (side, 0.0)
        reach = 0.5 * min(frame.half_height, frame.half_width)
    elif part == "vessel":
        place = frame.at(uniform(generator, 0.1, 0.7), angle)
        reach = (5.0 + 9.0 * severity) * scale
        amplitude *= 2
    return Ghosting(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        amplitude_px=amplitude,
        period_lines=uniform(generator, 4, 20),
        phase=uniform(generator, 0, 2 * math.pi),
        wander=uniform(generator, 0.2, 0.8),
        part=part,
        place=place,
        reach_px=reach,
        centre=(frame.y, frame.x),
    )


def apply(image: Tensor, params: Ghosting | Sequence[Ghosting]) -> tuple[Tensor, Tensor]:
    """Let the body breathe or pulsate.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    parts = torch.stack([moving_part(one, *images.shape[-2:]) for one in each]).to(images.device)

    def step(turned: list[Tensor]) -> list[Tensor]:
        signal, part = turned
        lines = signal.shape[-2]
        shifts = torch.stack([displacement(one, lines) for one in each]).to(signal.device)
        angle = -2 * math.pi * kspace.frequencies(lines, signal.device) * shifts
        moved = kspace.to_kspace(signal * part) * torch.polar(torch.ones_like(angle), angle)[..., None]
        return [kspace.to_image(kspace.to_kspace(signal * (1 - part)) + moved).abs()]

    (ghosted,) = kspace.readout_last([images, parts], [one.phase_encoding for one in each], step)
    return kspace.with_mask(images, ghosted, single=single)


def displacement(params: Ghosting, lines: int) -> Tensor:
    """Of each k-space line along phase encoding, px: flattened at one end as breathing is at expiration, mean
    about zero; (lines,).
    """
    line = torch.arange(lines, dtype=torch.float32) - lines // 2
    turn = 2 * math.pi * line / params.period_lines + params.wander * torch.sin(
        2 * math.pi * line / (4.7 * params.period_lines)
    )
    return params.amplitude_px * (torch.cos(turn / 2 + params.phase).pow(4) - 0.375)


def moving_part(params: Ghosting, rows: int, columns: int) -> Tensor:
    """Share of each pixel's signal that moves, 0..1, (rows, columns)."""
    if params.part == "all":
        return torch.ones(rows, columns)
    y = torch.arange(rows, dtype=torch.float32)[:, None]
    x = torch.arange(columns, dtype=torch.float32)[None, :]
    if params.part == "vessel":
        distance = torch.sqrt((y - params.place[0]).square() + (x - params.place[1]).square())
        return ((params.reach_px - distance) / 2 + 0.5).clamp(0, 1)
    outwards = (y - params.centre[0]) * params.place[0] + (x - params.centre[1]) * params.place[1]
    return ((outwards - params.reach_px) / params.reach_px + 0.5).clamp(0, 1)
