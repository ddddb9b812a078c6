"""Metal artifacts: beam hardening, photon starvation and noise of the rays through an implant.

Forward model: ellipses of titanium, steel or cobalt-chrome with exact chord lengths; ten energies; Poisson and electronic noise on the
rays that cross metal (noise of all other rays is the scanner's appearance, not an artifact); water-only correction; FBP of the
difference to the monochromatic sinogram; the metal itself is painted at the top of the CT number range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import Acquisition, as_batch, integer, uniform

PAINT_HU = 3071.0
ELECTRONIC_NOISE_QUANTA = 5.0
MAX_GAIN = 6.0


@dataclass(frozen=True, kw_only=True)
class Rod:
    """The cross-section of an implant: centre and semi-axes in pixels, angle of the first axis in radians."""

    y: float
    x: float
    semi_major_px: float
    semi_minor_px: float
    angle_rad: float


@dataclass(frozen=True, kw_only=True)
class Metal:
    severity: float
    rods: tuple[Rod, ...]
    material: str
    photons: float
    """Unattenuated quanta per ray."""
    least_depth_hu: float
    """Streaks are amplified (at most `MAX_GAIN` times) until the darkest 3 % of soft tissue lie so far below the rest; 0: pure physics."""
    pixel_spacing_mm: float
    noise_seed: int


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> Metal:
    """One to three rods, most often a pair facing each other; radius 0.8-2.6 px at matrix 128, 2e6 down to 1.5e5 quanta a ray."""
    scale = max(acquisition.rows, acquisition.columns) / 128
    radius = (0.8 + 1.8 * severity) * scale if severity > 0 else 0.0
    count = (1, 2, 2, 3)[integer(generator, 0, 3)]
    material = ct.METALS[integer(generator, 0, 2)]
    if material != "titanium":
        radius *= 0.7
    base = uniform(generator, 0, 2 * math.pi)
    if uniform(generator, 0, 1) < 0.6:
        base = uniform(generator, -0.35, 0.35)  # left and right: hips, screws, fillings
    rods = []
    for number in range(count):
        y, x = acquisition.frame.at(uniform(generator, 0.2, 0.68), base + number * math.pi + uniform(generator, -0.3, 0.3))
        size = radius * uniform(generator, 0.85, 1.2)
        stretch = uniform(generator, 1.0, 1.7)
        rods.append(
            Rod(y=y, x=x, semi_major_px=size * stretch, semi_minor_px=size, angle_rad=uniform(generator, 0, math.pi)),
        )
    return Metal(
        severity=severity,
        rods=tuple(rods),
        material=material,
        photons=10 ** (6.3 - 1.1 * severity),
        least_depth_hu=160.0 * severity,
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
        noise_seed=integer(generator, 0, 2**31 - 1),
    )


def apply(image: Tensor, params: Metal | Sequence[Metal]) -> tuple[Tensor, Tensor]:
    """Implant metal into slices.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """
    images, single = as_batch(image.float())
    each = [params] * images.shape[0] if isinstance(params, Metal) else list(params)
    size = max(images.shape[-2:])

    def difference_of(square: Tensor, pixel_cm: float) -> Tensor:
        paths = ct.project(square, pixel_cm)
        streaks = ct.reconstruct(sinogram_error(paths, each, size / square.shape[-1], _corner(images)), paths)
        return scale(streaks, square, each)

    changed = paint(images + ct.through_square(images, each[0].pixel_spacing_mm, difference_of), each).clamp(*ct.HU_RANGE)
    none = torch.tensor([not any(rod.semi_minor_px > 0 for rod in one.rods) for one in each])[:, None, None]
    changed = torch.where(none, images, changed)
    mask = (changed - images).abs() > 10
    return (changed[0], mask[0]) if single else (changed, mask)


def _corner(images: Tensor) -> tuple[int, int]:
    """Rows and columns of air that `ct.through_square` puts before the image."""
    rows, columns = images.shape[-2:]
    return (max(rows, columns) - rows) // 2, (max(rows, columns) - columns) // 2


def sinogram_error(paths: ct.Paths, params: Sequence[Metal], shrink: float = 1.0, corner: tuple[int, int] = (0, 0)) -> Tensor:
    """What metal adds to the water-equivalent sinogram beyond its own best monochromatic projection, cm.

    The part proportional to the metal path reconstructs to the implant itself, which is painted, so the least-squares
    proportional part is taken off; the rest is what streaks.

    Args:
        paths: line integrals of the slices without metal.
        shrink: image pixels per projected pixel.
        corner: rows and columns of padding before the image.
    """
    error = torch.zeros_like(paths.water)
    for slice_error, water, bone, one in zip(error, paths.water, paths.bone, params, strict=True):
        length = torch.zeros_like(water)
        for rod in one.rods:
            length += _chords(paths.scanner, rod, shrink, corner) * paths.pixel_cm
        rays = length > 0
        if not bool(rays.any()):
            continue
        metal, water, bone = length[rays], water[rays], bone[rays]
        quanta = one.photons * ct.transmission(water, bone, metal, one.material)
        generator = torch.Generator().manual_seed(one.noise_seed)
        quanta = torch.poisson(quanta, generator=generator) + ELECTRONIC_NOISE_QUANTA * torch.randn(quanta.shape, generator=generator)
        measured = ct.water_equivalent(quanta.clamp(min=1) / one.photons)
        without = ct.water_equivalent(ct.transmission(water, bone))
        added = measured - without
        slice_error[rays] = added - metal * ((added @ metal) / (metal @ metal))
    return error


def scale(difference: Tensor, images: Tensor, params: Sequence[Metal]) -> Tensor:
    """Amplify streaks that would be lost in a thin or airy slice to each slice's `least_depth_hu`."""
    scaled = []
    for change, tissue, one in zip(difference, ct.soft_tissue(images), params, strict=True):
        values = change[tissue]
        if values.numel() >= 50 and one.least_depth_hu > 0:
            change = change * (one.least_depth_hu / ct.depth_below_mean(values).clamp(min=1e-3)).clamp(1, MAX_GAIN)
        scaled.append(change)
    return torch.stack(scaled)


def _chords(scanner: ct.Projector, rod: Rod, shrink: float, corner: tuple[int, int]) -> Tensor:
    """Length of each ray inside the ellipse, in projected pixels, averaged over the detector's width; (views, detectors)."""
    major, minor = rod.semi_major_px / shrink, rod.semi_minor_px / shrink
    if minor <= 0:
        return torch.zeros(scanner.views, scanner.size)
    centre = (scanner.size - 1) / 2
    y = (rod.y + corner[0] + 0.5) / shrink - 0.5 - centre
    x = (rod.x + corner[1] + 0.5) / shrink - 0.5 - centre
    along = scanner.cosines * math.cos(rod.angle_rad) + scanner.sines * math.sin(rod.angle_rad)
    radius = torch.sqrt((major * along) ** 2 + minor**2 * (1 - along**2))[:, None]
    detector = torch.arange(scanner.size) - centre - (x * scanner.cosines + y * scanner.sines)[:, None]
    total = torch.zeros_like(detector)
    for part in (-0.333, 0.0, 0.333):
        total += torch.sqrt((radius**2 - (detector + part) ** 2).clamp(min=0))
    return total * (2 * major * minor / 3) / radius**2


def paint(images: Tensor, params: Sequence[Metal]) -> Tensor:
    """The slices with their metal drawn in at `PAINT_HU`, weighted by pixel coverage."""
    rows, columns = images.shape[-2:]
    y = torch.arange(rows, dtype=torch.float32)[:, None]
    x = torch.arange(columns, dtype=torch.float32)[None, :]
    painted = []
    for image, one in zip(images, params, strict=True):
        for rod in one.rods:
            if rod.semi_minor_px <= 0:
                continue
            u = (x - rod.x) * math.cos(rod.angle_rad) + (y - rod.y) * math.sin(rod.angle_rad)
            v = (y - rod.y) * math.cos(rod.angle_rad) - (x - rod.x) * math.sin(rod.angle_rad)
            level = torch.sqrt((u / rod.semi_major_px) ** 2 + (v / rod.semi_minor_px) ** 2)
            cover = ((1 - level) * rod.semi_minor_px + 0.5).clamp(0, 1) * min(1.0, 2 * rod.semi_minor_px)
            image = torch.lerp(image, torch.tensor(PAINT_HU), cover)
        painted.append(image)
    return torch.stack(painted)
