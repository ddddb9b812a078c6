"""A small CT scanner: parallel beam, ten energies, filtered back-projection. Shared by the CT artifacts.

Artifacts are made by the *difference method*: out = clean + FBP(sinogram with artifact - sinogram without). FBP is linear, so one
reconstruction of the difference is enough, and an image without artifact is not blurred by a re-reconstruction which a network
would learn instead of the artifact.

Lengths in sinograms are in cm of water equivalent. The thin-object limit is exact by construction: a material's attenuation is
scaled so that a short path through it measures exactly what its HU says; everything else is hardening.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WORKING_SIZE = 192
"""Larger slices are projected at this size; the (smooth) difference is interpolated back."""

HU_RANGE = (-1024.0, 3071.0)

ENERGIES_KEV = np.array([35.0, 42, 50, 58, 65, 73, 82, 92, 103, 115])
SPECTRUM = np.array([0.06, 0.11, 0.15, 0.18, 0.15, 0.11, 0.09, 0.07, 0.05, 0.03])
"""Share of detected photons at 120 kVp behind 3 mm Al, rounded; sums to one."""

_TABLE_KEV = np.array([30.0, 40, 50, 60, 80, 100, 150])
_MASS_ATTENUATION = {  # cm2/g, rounded from NIST XCOM / NISTIR 5632 tables 3 and 4; CoCr as 0.7 Co + 0.3 Cr
    "water": [0.3756, 0.2683, 0.2269, 0.2059, 0.1837, 0.1707, 0.1505],
    "bone": [1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855, 0.1480],
    "titanium": [4.972, 2.214, 1.213, 0.7661, 0.4052, 0.2721, 0.1649],
    "steel": [8.176, 3.629, 1.958, 1.205, 0.5952, 0.3717, 0.1964],
    "cobalt_chrome": [8.20, 3.64, 1.97, 1.21, 0.596, 0.371, 0.195],
}
_DENSITY = {"water": 1.0, "bone": 1.92, "titanium": 4.51, "steel": 7.90, "cobalt_chrome": 8.40}  # g/cm3
METALS = ("titanium", "steel", "cobalt_chrome")


@lru_cache(maxsize=1)
def attenuation() -> dict[str, Tensor]:
    """Material -> linear attenuation at `ENERGIES_KEV`, 1/cm, float32 (10,); log-log interpolation of the tables."""
    return {
        name: torch.tensor(
            _DENSITY[name] * np.exp(np.interp(np.log(ENERGIES_KEV), np.log(_TABLE_KEV), np.log(values))),
            dtype=torch.float32,
        )
        for name, values in _MASS_ATTENUATION.items()
    }


@lru_cache(maxsize=1)
def spectrum() -> Tensor:
    return torch.tensor(SPECTRUM / SPECTRUM.sum(), dtype=torch.float32)


def mean_attenuation(material: str) -> float:
    """Spectrum mean of the attenuation, 1/cm: what a very thin object measures."""
    return float(attenuation()[material] @ spectrum())


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Parallel-beam geometry for size x size pixels, detectors one pixel apart. Pixels outside the inscribed circle are not seen.

    forward: sparse (views * size, size * size), in pixels; back: its transpose; ramp: filter on 2 * size samples.
    """

    size: int
    views: int
    forward: Tensor
    back: Tensor
    ramp: Tensor
    cosines: Tensor
    sines: Tensor


@lru_cache(maxsize=4)
def projector(size: int) -> Projector:
    """Build (0.3-1 s, vectorised) or reuse the projector for size x size images, with 9/8 * size views over half a turn.

    Linear interpolation on the detector; Hann-windowed ramp built from its spatial samples (Kak and Slaney, 1988, section 3.3).
    """
    views = size * 9 // 8
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = (x * x + y * y) <= (size / 2 - 1) ** 2
    angles = torch.arange(views, dtype=torch.float32) * (math.pi / views)
    cosines, sines = torch.cos(angles), torch.sin(angles)
    position = x[inside][:, None] * cosines + y[inside][:, None] * sines + (size - 1) / 2
    lower = position.floor()
    weight = position.sub_(lower)
    first = torch.arange(views, dtype=torch.int32) * size + lower.int()
    ray = torch.stack([first, first + 1], -1).reshape(-1)
    value = torch.stack([1 - weight, weight], -1).reshape(-1)
    del position, lower, weight, first
    per_pixel = inside.reshape(-1).int() * (2 * views)
    pixel = torch.repeat_interleave(torch.arange(size * size, dtype=torch.int32), per_pixel)
    back = _csr(per_pixel, ray, value, (size * size, views * size))
    order = torch.argsort(ray, stable=True)
    forward = _csr(torch.bincount(ray, minlength=views * size), pixel[order], value[order], (views * size, size * size))

    offset = torch.fft.fftfreq(2 * size, d=1 / (2 * size)).round()
    kernel = torch.where(offset.abs() % 2 == 1, -1 / (math.pi * offset.clamp(min=-size) + 1e-9) ** 2, torch.zeros(()))
    kernel[0] = 0.25
    ramp = torch.fft.rfft(kernel).real
    frequency = torch.arange(ramp.numel()) / (ramp.numel() - 1)
    ramp = ramp * (0.5 + 0.5 * torch.cos(math.pi * frequency))
    return Projector(size=size, views=views, forward=forward, back=back, ramp=ramp, cosines=cosines, sines=sines)


def _csr(counts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, size=shape, check_invariants=False)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Line integrals of a batch of slices, cm of water equivalent, shape (slices, views, detectors)."""

    water: Tensor
    bone: Tensor
    pixel_cm: float
    scanner: Projector


def project(images: Tensor, pixel_cm: float) -> Paths:
    """Split HU into water and bone and project both.

    Args:
        images: HU, shape (slices, size, size); bone share rises linearly from 150 to 1000 HU.
        pixel_cm: pixel size.
    """
    slices, size, _ = images.shape
    scanner = projector(size)
    density = ((images + 1000) / 1000).clamp(min=0)
    bone = density * ((images - 150) / 850).clamp(0, 1)
    both = torch.cat([density - bone, bone]).reshape(2 * slices, -1).T.contiguous()
    integrals = (scanner.forward @ both).T.reshape(2, slices, scanner.views, size) * pixel_cm
    return Paths(water=integrals[0], bone=integrals[1], pixel_cm=pixel_cm, scanner=scanner)


def reconstruct(difference: Tensor, paths: Paths) -> Tensor:
    """FBP of a sinogram difference (slices, views, detectors), cm of water, to a HU difference (slices, size, size)."""
    scanner = paths.scanner
    size = scanner.size
    filtered = torch.fft.irfft(torch.fft.rfft(difference, n=2 * size) * scanner.ramp, n=2 * size)[..., :size]
    image = (scanner.back @ filtered.reshape(difference.shape[0], -1).T.contiguous()).T.reshape(-1, size, size)
    return image * (1000 * math.pi / scanner.views / paths.pixel_cm)


def transmission(water: Tensor, bone: Tensor, metal: Tensor | None = None, material: str = "titanium") -> Tensor:
    """Share of photons that pass: sum over energies of the spectrum times exp(-attenuation).

    Args:
        water, bone: cm of water equivalent, any equal shape.
        metal: cm of `material`, same shape.
    """
    table = attenuation()
    rows = [table["water"], table["bone"] * (mean_attenuation("water") / mean_attenuation("bone"))]
    lengths = [water, bone]
    if metal is not None:
        rows.append(table[material])
        lengths.append(metal)
    return torch.exp(torch.stack(lengths, -1) @ -torch.stack(rows)) @ spectrum()


@lru_cache(maxsize=1)
def _water_table() -> tuple[Tensor, float]:
    """Water thickness (cm) at equal steps of -ln(transmission), and the step."""
    thickness = torch.linspace(0, 160, 4096)
    logs = -torch.log(transmission(thickness, torch.zeros_like(thickness)).double()).numpy()
    step = 20.0 / 1023
    return torch.tensor(np.interp(np.arange(1024) * step, logs, thickness.numpy()), dtype=torch.float32), step


def water_equivalent(transmitted: Tensor) -> Tensor:
    """The scanner's water-only hardening correction: cm of water with the measured transmission, by inverse look-up."""
    table, step = _water_table()
    place = -torch.log(transmitted.clamp(min=1e-9)) / step
    lower = place.floor().clamp(0, table.numel() - 2)
    index = lower.long()
    return torch.lerp(table[index], table[index + 1], place - lower)


def soft_tissue(images: Tensor) -> Tensor:
    """Bool map of -200..150 HU, at least two pixels away from bone."""
    near_bone = images > 250
    for axis in (-1, -2):
        for _ in range(2):  # twice: two pixels; shifted booleans are ten times cheaper than a maximum filter
            near_bone = near_bone | near_bone.roll(1, axis) | near_bone.roll(-1, axis)
    return (images > -200) & (images < 150) & ~near_bone


def depth_below_mean(values: Tensor) -> Tensor:
    """How far the darkest 3 % of some HU changes lie below their mean."""
    return values.mean() - values.kthvalue(max(1, int(0.03 * values.numel()))).values


def through_square(images: Tensor, pixel_mm: float, difference_of: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Run `difference_of(square slices, pixel size in cm) -> HU difference` on slices of any shape; the difference has their shape.

    Pads with air to a square and, above `WORKING_SIZE`, averages down and interpolates the difference back.
    """
    rows, columns = images.shape[-2:]
    size = max(rows, columns)
    top, left = (size - rows) // 2, (size - columns) // 2
    square = images
    if rows != columns:
        square = torch.nn.functional.pad(images, (left, size - columns - left, top, size - rows - top), value=-1000.0)
    if size <= WORKING_SIZE:
        difference = difference_of(square, pixel_mm / 10)
    else:
        small = torch.nn.functional.interpolate(square[:, None], size=(WORKING_SIZE, WORKING_SIZE), mode="area")[:, 0]
        difference = difference_of(small, pixel_mm / 10 * size / WORKING_SIZE)
        difference = torch.nn.functional.interpolate(difference[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0]
    return difference[:, top : top + rows, left : left + columns]
