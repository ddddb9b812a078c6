"""Susceptibility: voids, pile-up and distortion around metal implants and air.

Forward model: spheres of susceptibility difference dchi and radius a, whose outside field is closed-form,
dB = B0 (dchi / 3) (a / r)^3 (3 cos^2 - 1); frequency f = gamma dB. (a) signal moves f / bandwidth along readout, intensity conserved
(voids and pile-up); (b) gradient echo: dephasing by sinc(echo time x frequency difference across the voxel) per axis; (c) no signal
inside the sphere nor from spins far off resonance, which the slice-selective pulse misses. Approximations: no diffusion, spheres do not
interact, displacement clipped at 25 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, as_batch, integer, uniform

MAX_DISPLACEMENT_PX = 25.0
EXCITED_HZ = 2000.0
"""Half-width of the Gaussian excitation: spins further off resonance are missing from the slice."""
SUBSAMPLES = 4
MATERIALS_PPM = {"air": 9.4, "titanium": 185.0, "cobalt_chrome": 1100.0}
"""Difference to water; radii are chosen so that each disturbs a similar area."""


@dataclass(frozen=True, kw_only=True)
class Sphere:
    y: float
    x: float
    depth_px: float
    """Distance of the centre from the slice plane."""
    radius_px: float


@dataclass(frozen=True, kw_only=True)
class Susceptibility:
    severity: float
    phase_encoding: str
    spheres: tuple[Sphere, ...]
    dchi_ppm: float
    field_tesla: float
    field_axis: str
    """"slice", "row" or "column": the direction of B0 (axial slices: "slice")."""
    echo_time_ms: float
    """Zero for a spin echo: no dephasing."""
    bandwidth_hz_per_px: float
    slice_px: float
    """Slice thickness in pixels."""


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Susceptibility:
    """One to three objects of air, titanium or cobalt-chrome whose disturbed zone reaches 16-34 px at matrix 256 (0.3-1)."""
    material = ("air", "titanium", "titanium", "titanium", "cobalt_chrome")[integer(generator, 0, 4)]
    dchi = MATERIALS_PPM[material] if severity > 0 else 0.0
    bandwidth = uniform(generator, 100, 220) * acquisition.bandwidth_hz_per_px / 200
    surface_px = 2 * kspace.GYROMAGNETIC_HZ_PER_T * acquisition.field_tesla * dchi * 1e-6 / 3 / bandwidth
    zone = (8.0 + 26.0 * severity) * acquisition.pixel_scale
    # the zone ends where the displacement has fallen to 0.5 px (a^3 surface = 0.5 zone^3); air has no room to fall, so it is large
    radius = min(zone * (0.5 / surface_px) ** (1 / 3), 0.5 * zone) if severity > 0 else 0.0
    spheres = []
    for _ in range(integer(generator, 1, 3)):
        near_rim = uniform(generator, 0, 1) < 0.5
        y, x = acquisition.frame.at(
            uniform(generator, 0.6, 0.9) if near_rim else uniform(generator, 0.1, 0.6), uniform(generator, 0, 2 * math.pi)
        )
        size = radius * uniform(generator, 0.8, 1.15)
        for part in range(3 if material == "air" else 1):  # a cavity is irregular
            turn, away = uniform(generator, 0, 2 * math.pi), 0.8 * size * min(part, 1)
            spheres.append(
                Sphere(
                    y=y + away * math.sin(turn),
                    x=x + away * math.cos(turn),
                    depth_px=uniform(generator, -0.5, 0.5) * size,
                    radius_px=size * (1 - 0.25 * part),
                )
            )
    spin_echo = uniform(generator, 0, 1) < 0.7
    return Susceptibility(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        spheres=tuple(spheres),
        dchi_ppm=dchi,
        field_tesla=acquisition.field_tesla,
        field_axis=("slice", "slice", "row", "column")[integer(generator, 0, 3)],
        echo_time_ms=0.0 if spin_echo else uniform(generator, 0.3, 1.0) * acquisition.echo_time_ms,
        bandwidth_hz_per_px=bandwidth,
        slice_px=acquisition.slice_thickness_mm / acquisition.pixel_spacing_mm,
    )


def apply(image: Tensor, params: Susceptibility | Sequence[Susceptibility]) -> tuple[Tensor, Tensor]:
    """Disturb the field.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, single = as_batch(image.float())
    each = [params] * images.shape[0] if isinstance(params, Susceptibility) else list(params)

    def step(turned: list[Tensor]) -> list[Tensor]:
        (signal,) = turned
        lines, samples = signal.shape[-2:]
        fields = [_disturbance(one, lines, samples) for one in each]
        signal = signal * torch.stack([loss for _, loss in fields])
        return [displace(signal, torch.stack([edges for edges, _ in fields]))]

    (disturbed,) = kspace.readout_last([images], [one.phase_encoding for one in each], step)
    mask = kspace.changed_where(images, disturbed)
    return (disturbed[0], mask[0]) if single else (disturbed, mask)


def field_hz(params: Susceptibility, y: Tensor, x: Tensor, depth_px: float) -> Tensor:
    """Frequency offset at pixel positions (image axes) and a distance from the slice plane; zero inside the spheres."""
    total = torch.zeros(np.broadcast_shapes(y.shape, x.shape))  # torch.broadcast_shapes imports sympy
    scale = kspace.GYROMAGNETIC_HZ_PER_T * params.field_tesla * params.dchi_ppm * 1e-6 / 3
    for sphere in params.spheres:
        dy, dx, dz = (y - sphere.y).square(), (x - sphere.x).square(), (depth_px - sphere.depth_px) ** 2
        square = dy + dx + (dz + 1e-6)
        along = {"slice": torch.tensor(dz), "row": dx, "column": dy}[params.field_axis]
        inverse = square.rsqrt()
        shape = (3 * along * inverse.square() - 1) * inverse.pow(3) * (scale * sphere.radius_px**3)
        total = total + torch.where(square < sphere.radius_px**2, 0.0, shape)
    return total


def _disturbance(params: Susceptibility, lines: int, samples: int) -> tuple[Tensor, Tensor]:
    """Displacement at pixel edges along readout, px, (PE, RO + 1), and the remaining signal of each pixel, (PE, RO)."""
    phase = torch.arange(lines, dtype=torch.float32)[:, None]
    edge = torch.arange(samples + 1, dtype=torch.float32)[None, :] - 0.5

    def at(along_phase: Tensor, along_readout: Tensor, depth: float) -> Tensor:
        if params.phase_encoding == "ROW":
            return field_hz(params, along_readout, along_phase, depth)
        return field_hz(params, along_phase, along_readout, depth)

    edges = at(phase, edge, 0.0)
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    keep = torch.exp(-((middle / EXCITED_HZ) ** 2))
    if params.echo_time_ms > 0:
        across_phase = torch.gradient(middle, dim=0)[0]
        across_readout = edges[:, 1:] - edges[:, :-1]
        centre = torch.arange(samples, dtype=torch.float32)[None, :]
        across_slice = at(phase, centre, params.slice_px / 4) - at(phase, centre, -params.slice_px / 4)
        for spread, width in ((across_phase, 1.0), (across_readout, 1.0), (across_slice, 2.0)):
            keep = keep * torch.sinc(spread * (width * params.echo_time_ms * 1e-3)).abs()
    for sphere in params.spheres:
        section = math.sqrt(max(sphere.radius_px**2 - sphere.depth_px**2, 0.0))
        y, x = (sphere.x, sphere.y) if params.phase_encoding == "ROW" else (sphere.y, sphere.x)
        distance = torch.sqrt((phase - y).square() + (torch.arange(samples, dtype=torch.float32)[None, :] - x).square())
        keep = keep * (1 - (section - distance + 0.5).clamp(0, 1) * min(1.0, 2 * section))
    return (edges / params.bandwidth_hz_per_px).clamp(-MAX_DISPLACEMENT_PX, MAX_DISPLACEMENT_PX), keep


def displace(images: Tensor, edges_px: Tensor) -> Tensor:
    """Move the signal of each pixel along the last axis, spread evenly between its displaced edges: intensity is conserved.

    Args:
        images: shape (slices, lines, samples).
        edges_px: displacement at the edges of the pixels, shape (slices, lines, samples + 1); zero gives the image back exactly.
    Returns:
        Same shape. Signal displaced out of the image is lost.
    Approximation: a quarter of a pixel is spread over at most one pixel.
    """
    slices, lines, samples = images.shape
    fine = torch.nn.functional.interpolate(edges_px, size=samples * SUBSAMPLES + 1, mode="linear", align_corners=True)
    place = torch.arange(samples * SUBSAMPLES + 1, dtype=torch.float32) / SUBSAMPLES + fine  # 0 = left edge of pixel 0
    first, second = place[..., :-1], place[..., 1:]
    half = ((second - first).abs() / 2).clamp(1e-4, 0.5)
    low = (first + second) / 2 - half
    pixel = (low + 1e-4).floor()
    inside = ((pixel + 1 - low) / (2 * half)).clamp(0, 1)
    signal = images.repeat_interleave(SUBSAMPLES, -1) / SUBSAMPLES
    index = pixel.long() + 1
    out = torch.zeros(slices, lines, samples + 3)
    out.scatter_add_(-1, index.clamp(0, samples + 1), signal * inside)
    out.scatter_add_(-1, (index + 1).clamp(0, samples + 2), signal * (1 - inside))
    return out[..., 1 : samples + 1]
