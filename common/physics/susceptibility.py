"""Susceptibility: voids, pile-up and distortion around metal implants and air.

Forward model: spheres of susceptibility difference dchi and radius a in three dimensions, whose outside field
is closed-form, dB = B0 (dchi / 3) (a / r)^3 (3 cos^2 - 1); frequency f = gamma dB. (a) signal moves f /
bandwidth, intensity conserved (voids and pile-up): along readout, in EPI along phase encoding, whose
bandwidth a pixel is a tenth; (b) gradient echo and EPI: dephasing by sinc(echo time x frequency difference
across the voxel) per axis; (c) no signal inside the sphere nor from spins far off resonance, which the
slice-selective pulse misses. Sources are inserted (implants, dental work) or, in EPI, where a head has air:
frontal sinus and ear canals. Approximations: no diffusion, spheres do not interact, displacement clipped at
25 px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.physics import kspace
from common.physics.acquisition import Acquisition, integer, per_slice, uniform

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
    """Along the axis of the displacement."""
    slice_px: float
    """Slice thickness in pixels."""
    sequence: str = "SE"
    """"SE", "GRE" or "EPI"."""


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Susceptibility:
    """One to three objects of air, titanium or cobalt-chrome whose disturbed zone reaches 16-34 px at matrix
    256 (0.3-1).
    """
    epi = acquisition.sequence == "EPI"
    material = ("air", "titanium", "titanium", "titanium", "cobalt_chrome")[integer(generator, 0, 4)]
    if epi:
        material = "air"
    dchi = MATERIALS_PPM[material] if severity > 0 else 0.0
    bandwidth = (
        uniform(generator, 15, 40)
        if epi
        else uniform(generator, 100, 220) * acquisition.bandwidth_hz_per_px / 200
    )
    surface_px = 2 * kspace.GYROMAGNETIC_HZ_PER_T * acquisition.field_tesla * dchi * 1e-6 / 3 / bandwidth
    zone = (8.0 + 26.0 * severity) * acquisition.pixel_scale
    # the zone ends where the displacement has fallen to 0.5 px (a^3 surface = 0.5 zone^3); air has no room
    # to fall, so it is large
    radius = (
        min(zone * (0.5 / surface_px) ** (1 / 3), 0.35 * zone) * (1.6 if epi else 1.0)
        if severity > 0
        else 0.0
    )
    spheres = []
    for place in _air_places(generator, acquisition) if epi else _places(generator, acquisition):
        size = radius * uniform(generator, 0.8, 1.15)
        for part in range(3 if material == "air" else 1):  # a cavity is irregular
            turn, away = uniform(generator, 0, 2 * math.pi), 0.8 * size * min(part, 1)
            spheres.append(
                Sphere(
                    y=place[0] + away * math.sin(turn),
                    x=place[1] + away * math.cos(turn),
                    depth_px=uniform(generator, -0.5, 0.5) * size
                    if not epi
                    else uniform(generator, 1.1, 1.7) * size,
                    radius_px=size * (1 - 0.25 * part),
                )
            )
    spin_echo = acquisition.sequence == "SE" or acquisition.spin_echo
    return Susceptibility(
        severity=severity,
        phase_encoding=acquisition.phase_encoding,
        sequence=acquisition.sequence,
        spheres=tuple(spheres),
        dchi_ppm=dchi,
        field_tesla=acquisition.field_tesla,
        field_axis="slice" if epi else ("slice", "slice", "row", "column")[integer(generator, 0, 3)],
        echo_time_ms=0.0 if spin_echo else uniform(generator, 0.3, 1.0) * min(acquisition.echo_time_ms, 40.0),
        bandwidth_hz_per_px=bandwidth,
        slice_px=acquisition.slice_thickness_mm / acquisition.pixel_spacing_mm,
    )


def _places(generator: torch.Generator, acquisition: Acquisition) -> list[tuple[float, float]]:
    """Where implants are: anywhere in tissue, half of them near the rim."""
    places = []
    for _ in range(integer(generator, 1, 3)):
        near_rim = uniform(generator, 0, 1) < 0.5
        radius = uniform(generator, 0.6, 0.9) if near_rim else uniform(generator, 0.1, 0.6)
        places.append(acquisition.frame.at(radius, uniform(generator, 0, 2 * math.pi)))
    return places


def _air_places(generator: torch.Generator, acquisition: Acquisition) -> list[tuple[float, float]]:
    """Where an axial head has air: under the frontal lobes and beside both temporal lobes, one or two of the
    three.

    The cavities lie below the slice: what shows is pile-up and stretching, not the hole.
    """
    frame = acquisition.frame
    sites = [(-math.pi / 2, 0.25), (math.radians(15), 0.3), (math.radians(165), 0.3)]
    first = integer(generator, 0, 2)
    chosen = [sites[first], *([sites[(first + 1) % 3]] if uniform(generator, 0, 1) < 0.6 else [])]
    places = []
    for middle, spread in chosen:
        angle, radius = middle + spread * uniform(generator, -1, 1), uniform(generator, 0.75, 1.0)
        places.append(
            (
                frame.y + radius * frame.half_height * math.sin(angle),
                frame.x + radius * frame.half_width * math.cos(angle),
            )
        )
    return places


def apply(image: Tensor, params: Susceptibility | Sequence[Susceptibility]) -> tuple[Tensor, Tensor]:
    """Disturb the field.

    Args:
        image: magnitude, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice.
    Returns:
        float32 magnitude, same shape; bool map of pixels changed by more than 3 % of the maximum.
    """
    images, each, single = per_slice(image, params)
    axes = [displaced_along(one) for one in each]
    losses, edges = zip(
        *(_disturbance(one, axis, images.shape, images.device) for one, axis in zip(each, axes, strict=True)),
        strict=True,
    )
    images_left = images * torch.stack(losses)
    # `displace` works along the last axis, readout_last turns "ROW" slices; a slice displaced along its rows
    # is what it leaves alone
    words = ["ROW" if axis == "column" else "COL" for axis in axes]
    (disturbed,) = kspace.readout_last(
        [images_left], words, lambda turned: [displace(turned[0], torch.stack(edges))]
    )
    return kspace.with_mask(images, disturbed, single=single)


def displaced_along(params: Susceptibility) -> str:
    """ "row": signal moves along the rows (the last axis), "column": along the columns; readout, or phase
    encoding in EPI.
    """
    kspace.check_phase_encoding([params.phase_encoding])
    return "row" if (params.phase_encoding == "ROW") == (params.sequence == "EPI") else "column"


def field_hz(params: Susceptibility, y: Tensor, x: Tensor, depth_px: float) -> Tensor:
    """Frequency offset at pixel positions (image axes) and a distance from the slice plane; zero inside the
    spheres.
    """
    # torch.broadcast_shapes imports sympy
    total = torch.zeros(np.broadcast_shapes(y.shape, x.shape), device=y.device)
    scale = kspace.GYROMAGNETIC_HZ_PER_T * params.field_tesla * params.dchi_ppm * 1e-6 / 3
    for sphere in params.spheres:
        dy, dx, dz = (y - sphere.y).square(), (x - sphere.x).square(), (depth_px - sphere.depth_px) ** 2
        square = dy + dx + (dz + 1e-6)
        along = {"slice": torch.full((), dz, device=y.device), "row": dx, "column": dy}[params.field_axis]
        inverse = square.rsqrt()
        shape = (3 * along * inverse.square() - 1) * inverse.pow(3) * (scale * sphere.radius_px**3)
        total = total + torch.where(square < sphere.radius_px**2, 0.0, shape)
    return total


def _disturbance(
    params: Susceptibility, along: str, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The remaining signal of each pixel (rows, columns), and the displacement at pixel edges, px: (lines,
    samples + 1), the axis along which signal moves last."""
    rows, columns = shape[-2:]
    lines, samples = (rows, columns) if along == "row" else (columns, rows)
    across = torch.arange(lines, dtype=torch.float32, device=device)[:, None]
    edge = torch.arange(samples + 1, dtype=torch.float32, device=device)[None, :] - 0.5
    centre = edge[:, :-1] + 0.5

    def at(line: Tensor, sample: Tensor, depth: float) -> Tensor:
        return (
            field_hz(params, line, sample, depth) if along == "row" else field_hz(params, sample, line, depth)
        )

    edges = at(across, edge, 0.0)
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    keep = torch.exp(-((middle / EXCITED_HZ) ** 2))
    if params.echo_time_ms > 0:
        over_lines = torch.gradient(middle, dim=0)[0]
        over_samples = edges[:, 1:] - edges[:, :-1]
        over_slice = at(across, centre, params.slice_px / 4) - at(across, centre, -params.slice_px / 4)
        for spread, width in ((over_lines, 1.0), (over_samples, 1.0), (over_slice, 2.0)):
            keep = keep * torch.sinc(spread * (width * params.echo_time_ms * 1e-3)).abs()
    for sphere in params.spheres:
        section = math.sqrt(max(sphere.radius_px**2 - sphere.depth_px**2, 0.0))
        line, sample = (sphere.y, sphere.x) if along == "row" else (sphere.x, sphere.y)
        distance = torch.sqrt((across - line).square() + (centre - sample).square())
        keep = keep * (1 - (section - distance + 0.5).clamp(0, 1) * min(1.0, 2 * section))
    edges = (edges / params.bandwidth_hz_per_px).clamp(-MAX_DISPLACEMENT_PX, MAX_DISPLACEMENT_PX)
    return keep if along == "row" else keep.T, edges


def displace(images: Tensor, edges_px: Tensor) -> Tensor:
    """Move the signal of each pixel along the last axis, spread evenly between its displaced edges: intensity
    is conserved.

    Args:
        images: shape (slices, lines, samples).
        edges_px: displacement at the edges of the pixels, shape (slices, lines, samples + 1); zero gives the
            image back exactly.
    Returns:
        Same shape. Signal displaced out of the image is lost.
    Approximation: a quarter of a pixel is spread over at most one pixel.
    """
    slices, lines, samples = images.shape
    fine = torch.nn.functional.interpolate(
        edges_px, size=samples * SUBSAMPLES + 1, mode="linear", align_corners=True
    )
    # place 0 is the left edge of pixel 0
    place = (
        torch.arange(samples * SUBSAMPLES + 1, dtype=torch.float32, device=images.device) / SUBSAMPLES + fine
    )
    first, second = place[..., :-1], place[..., 1:]
    half = ((second - first).abs() / 2).clamp(1e-4, 0.5)
    low = (first + second) / 2 - half
    pixel = (low + 1e-4).floor()
    inside = ((pixel + 1 - low) / (2 * half)).clamp(0, 1)
    signal = images.repeat_interleave(SUBSAMPLES, -1) / SUBSAMPLES
    index = pixel.long() + 1
    out = torch.zeros(slices, lines, samples + 3, device=images.device)
    out.scatter_add_(-1, index.clamp(0, samples + 1), signal * inside)
    out.scatter_add_(-1, (index + 1).clamp(0, samples + 2), signal * (1 - inside))
    return out[..., 1 : samples + 1]
