"""Beam hardening: dark bands between dense bones and cupping, because the scanner corrects for water only.

Forward model: twelve-energy transmission through water and bone, corrected as if all were water, minus the
monochromatic sinogram; FBP of the difference; its mean over soft tissue removed in part (scanners are
calibrated to it); scaled so that the darkest 3 % of soft tissue lie `depth_hu` below the rest. The physics
gives the shape, `depth_hu` the strength: unscaled bands of a slice depend mostly on how much bone it shows,
and many would be invisible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics import ct
from common.physics.acquisition import MAX_HARDENING_GAIN, Acquisition, uniform


@dataclass(frozen=True, kw_only=True)
class BeamHardening:
    severity: float
    depth_hu: float
    bone_density: float
    """Factor on the bone path inside the artifact."""
    water_error: float
    """Share of the water correction that is missing: cupping."""
    centring: float
    """Share of the mean change in soft tissue that calibration removes."""
    pixel_spacing_mm: float
    max_gain: float = MAX_HARDENING_GAIN
    """At severity 1."""


def draw(severity: float, generator: torch.Generator, acquisition: Acquisition) -> BeamHardening:
    """Bands of 180 HU x severity (54 HU at 0.3: just visible in a brain window)."""
    return BeamHardening(
        severity=severity,
        depth_hu=180 * severity * uniform(generator, 0.9, 1.1),
        bone_density=uniform(generator, 1.0, 1.25),
        water_error=uniform(generator, 0.0, 0.06),
        centring=uniform(generator, 0.6, 1.0),
        pixel_spacing_mm=acquisition.pixel_spacing_mm,
        max_gain=acquisition.hardening_gain,
    )


def apply(image: Tensor, params: BeamHardening | Sequence[BeamHardening]) -> tuple[Tensor, Tensor]:
    """Harden the beam.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """

    def difference_of(square: Tensor, pixel_cm: float, each: list[BeamHardening]) -> Tensor:
        paths = ct.project(square, pixel_cm)
        return scale(ct.reconstruct(sinogram_error(paths, each), paths), square, each)

    return ct.add_difference(image, params, difference_of)


def sinogram_error(paths: ct.Paths, params: Sequence[BeamHardening]) -> Tensor:
    """Measured minus monochromatic water-equivalent path, cm, at full physical strength whatever the
    severity.

    The part proportional to the bone path, which only changes the CT number of bone, is taken off by least
    squares.
    """
    density = ct.column([one.bone_density for one in params], paths.bone)
    missing = ct.column([one.water_error for one in params], paths.bone)
    bone = paths.bone * density
    transmitted = ct.transmission(paths.water, bone)
    corrected = ct.water_equivalent(transmitted)
    raw = -torch.log(transmitted.clamp(min=1e-9)) / ct.mean_attenuation("water")
    error = torch.lerp(corrected, raw, missing) - paths.water - bone
    share = (error * bone).sum((-2, -1), keepdim=True) / bone.square().sum((-2, -1), keepdim=True).clamp(
        min=1e-6
    )
    return error - share * bone


def scale(difference: Tensor, images: Tensor, params: Sequence[BeamHardening]) -> Tensor:
    """Centre a HU difference over soft tissue and scale it to each slice's `depth_hu`, saturating at twice
    that; less inside bone.

    What calibration takes off is proportional to density: air stays air.
    """
    scaled = []
    bone, density = ((images - 150) / 600).clamp(0, 1), ((images + 1000) / 1000).clamp(0, 1)
    for change, tissue, calibrated, matter, one in zip(
        difference, ct.soft_tissue(images), bone, density, params, strict=True
    ):
        values = change[tissue]
        if values.numel() < 50:
            scaled.append(torch.zeros_like(change))
            continue
        gain = (one.depth_hu / ct.depth_below_mean(values).clamp(min=1e-3)).clamp(
            max=one.max_gain * one.severity
        )
        limit = max(2 * one.depth_hu, 1e-3)
        bands = limit * torch.tanh((change - one.centring * values.mean() * matter) * (gain / limit))
        scaled.append(bands * (1 - 0.8 * calibrated))
    return torch.stack(scaled)
