"""Rigid motion: ghosts, ringing and smearing along phase encoding, from poses that change between k-space
lines.

Forward model: phase-encoding lines are split into segments, each acquired with the object in its own rigid
pose (rotation by resampling, translation by the shift theorem), y = F^-1 sum_k M_k F(R_k x); the pose of the
segment that holds the k-space centre is subtracted, so that the image as a whole does not move.
Approximations: in-plane, poses compose additively (small angles), magnitude images only.
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
class Motion:
    severity: float
    phase_encoding: str
    boundaries: tuple[int, ...]
    """First k-space line of every segment but the first."""
    angles_deg: tuple[float, ...]
    phase_shifts_px: tuple[float, ...]
    readout_shifts_px: tuple[float, ...]

    @property
    def segments(self) -> int:
        return len(self.angles_deg)


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Motion:
    """2-12 segments, poses up to 6 degrees and 8 px either way at matrix 256, one change close to the k-space
    centre.
    """
    lines = acquisition.columns if acquisition.phase_encoding == "ROW" else acquisition.rows
    scale = acquisition.pixel_scale
    segments = 2 + round(10 * severity * uniform(generator, 0.5, 1))
    side = 1 if uniform(generator, 0, 1) < 0.5 else -1
    boundaries = {lines // 2 + side * max(2, round(lines * uniform(generator, 0.02, 0.07)))}
    while len(boundaries) < segments - 1:
        boundaries.add(integer(generator, lines // 10, lines - lines // 10))
    centre = sum(boundary <= lines // 2 for boundary in boundaries)
    # the segment across the change that is close to the k-space centre
    beside = centre - 1 if side < 0 else centre + 1
    poses = []
    for limit in (6.0, 8.0 * scale, 5.0 * scale):
        reach = limit * severity
        pose = [
            reach * uniform(generator, 0.4, 1) * (1 if uniform(generator, 0, 1) < 0.5 else -1)
            for _ in range(segments)
        ]
        pose[beside] = -math.copysign(max(abs(pose[beside]), 0.7 * reach), pose[centre])
        poses.append(pose)
    angles, along_phase, along_readout = (tuple(value - pose[centre] for value in pose) for pose in poses)
    return Motion(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        boundaries=tuple(sorted(boundaries)),
        angles_deg=angles,
        phase_shifts_px=along_phase,
        readout_shifts_px=along_readout,
    )


def apply(image: Tensor, params: Motion | Sequence[Motion]) -> tuple[Tensor, Tensor]:
    """Move the object during acquisition.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    (moved,) = kspace.readout_last(
        [images], [one.phase_encoding for one in each], lambda turned: [_move(turned[0], each)]
    )
    return kspace.with_mask(images, moved, single=single)


def _segment_of_line(params: Motion, lines: int) -> Tensor:
    return torch.bucketize(torch.arange(lines), torch.tensor(params.boundaries, dtype=torch.long), right=True)


def _move(images: Tensor, params: Sequence[Motion]) -> Tensor:
    """Slices of shape (slices, PE, RO), moved."""
    _, lines, samples = images.shape
    device = images.device
    source = torch.tensor(
        [index for index, one in enumerate(params) for _ in range(one.segments)], device=device
    )
    angle = torch.deg2rad(torch.tensor([value for one in params for value in one.angles_deg], device=device))
    posed = kspace.to_kspace(_rotate(images[source], angle))
    start, rows, along = 0, [], []
    for one in params:
        segment = _segment_of_line(one, lines)
        rows.append(segment + start)
        along.append(
            torch.stack(
                [torch.tensor(one.phase_shifts_px)[segment], torch.tensor(one.readout_shifts_px)[segment]]
            )
        )
        start += one.segments
    picked = posed[torch.stack(rows).to(device), torch.arange(lines, device=device)]
    along_phase, along_readout = torch.stack(along).to(device).unbind(1)
    phase, readout = kspace.frequencies(lines, device)[:, None], kspace.frequencies(samples, device)[None, :]
    angle_of_k = -2 * math.pi * (phase * along_phase[..., None] + readout * along_readout[..., None])
    return kspace.to_image(picked * torch.polar(torch.ones_like(angle_of_k), angle_of_k)).abs()


def _rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Each slice turned about the centre by its angle (rad), linear interpolation; in pixels, so exact for a
    matrix of any shape.
    """
    count, rows, columns = images.shape
    y = torch.arange(rows, dtype=torch.float32, device=images.device)[:, None] - (rows - 1) / 2
    x = torch.arange(columns, dtype=torch.float32, device=images.device)[None, :] - (columns - 1) / 2
    cosine, sine = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    grid = torch.stack(
        [(cosine * x + sine * y) * (2 / (columns - 1)), (cosine * y - sine * x) * (2 / (rows - 1))], -1
    )
    turned = torch.nn.functional.grid_sample(
        images[:, None], grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    return turned.reshape(count, rows, columns)
