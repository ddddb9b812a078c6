"""A small CT scanner: parallel beam, twelve energies, filtered back-projection. Shared by the CT artifacts.

Artifacts are made by the *difference method*: out = clean + FBP(sinogram with artifact - sinogram without).
FBP is linear, so one reconstruction of the difference is enough, and an image without artifact is not blurred
by a re-reconstruction which a network would learn instead of the artifact.

Lengths in sinograms are in cm of water equivalent. The thin-object limit is exact by construction: a
material's attenuation is scaled so that a short path through it measures exactly what its HU says; everything
else is hardening.

Everything runs where its inputs are. Matrices are built on the CPU, so every device has the same; random
numbers are drawn on the CPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.physics.acquisition import Acquisition, per_slice

WORKING_SIZE = 192
"""Larger slices are projected at this size; the (smooth) difference is interpolated back."""

HU_RANGE = (-1024.0, 3071.0)

ENERGIES_KEV = np.array([29.6, 35.5, 41.2, 47.1, 53.1, 58.9, 65.4, 71.7, 79.9, 88.8, 99.5, 110.8])
SPECTRUM = np.array(
    [0.0080, 0.0276, 0.0532, 0.0744, 0.0879, 0.1736, 0.1184, 0.1153, 0.0989, 0.1068, 0.0930, 0.0429]
)
"""Mean energy and share of the signal of twelve bins (edges 15, 32, 38 ... 68, 76, 84, 94, 106, 120 keV); the
shares sum to one.

SpekPy 2.5.4 (Poludniowski et al., Med Phys 48:3630, 2021), model casim: 120 kV, tungsten, anode angle 12
degrees, 3 mm Al and 0.9 mm Ti; first half-value layer 7.9 mm Al. Photons are weighted by their energy, as a
detector that integrates energy measures them.
"""

_TABLE_KEV = np.array([20.0, 30, 40, 50, 60, 80, 100, 150])
_MASS_ATTENUATION = {
    "water": [0.8096, 0.3756, 0.2683, 0.2269, 0.2059, 0.1837, 0.1707, 0.1505],
    "bone": [4.001, 1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855, 0.1480],
    "titanium": [15.18, 4.765, 2.124, 1.168, 0.7399, 0.3943, 0.2666, 0.1634],
    "steel": [24.97, 8.551, 3.808, 2.057, 1.266, 0.6228, 0.3865, 0.2012],
    "cobalt_chrome": [24.75, 9.328, 4.170, 2.255, 1.384, 0.6742, 0.4129, 0.2082],
}
"""Total mass attenuation with coherent scattering, cm2/g.

Water and cortical bone (ICRU-44): NISTIR 5632, table 4. Implants, by mass, from the elements (mixture rule;
XCOM and Elam's tables agree within 0.2 %): titanium is Ti-6Al-4V (ASTM F136); steel is 316L (ASTM F138: Fe
65.5, Cr 17, Ni 12, Mo 2.5, Mn 2, Si 1 %); cobalt_chrome is ASTM F75 (Co 65, Cr 28, Mo 6, Si 1 %).
Interpolation between the energies costs at most 1 % (6 % below 30 keV).
"""
_DENSITY = {"water": 1.0, "bone": 1.92, "titanium": 4.43, "steel": 7.99, "cobalt_chrome": 8.30}
"""g/cm3: NISTIR 5632 table 2 (ICRU-44) for water and bone; the same ASTM standards' nominal alloys."""
METALS = ("titanium", "steel", "cobalt_chrome")
ELECTRONIC_NOISE_QUANTA = 5.0

CPU = torch.device("cpu")


@lru_cache(maxsize=1)
def attenuation() -> dict[str, Tensor]:
    """Material -> linear attenuation at `ENERGIES_KEV`, 1/cm, float32 (12,); log-log interpolation of the
    tables.
    """
    return {
        name: torch.tensor(
            _DENSITY[name] * np.exp(np.interp(np.log(ENERGIES_KEV), np.log(_TABLE_KEV), np.log(values))),
            dtype=torch.float32,
        )
        for name, values in _MASS_ATTENUATION.items()
    }


@lru_cache(maxsize=4)
def spectrum(device: torch.device = CPU) -> Tensor:
    """Share of the signal at each of `ENERGIES_KEV`, float32 (12,)."""
    return torch.tensor(SPECTRUM / SPECTRUM.sum(), dtype=torch.float32).to(device)


@lru_cache(maxsize=8)
def mean_attenuation(material: str) -> float:
    """Spectrum mean of the attenuation, 1/cm: what a very thin object measures."""
    return float(attenuation()[material] @ spectrum())


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Parallel-beam geometry for size x size pixels, detectors one pixel apart. Pixels outside the inscribed
    circle are not seen.

    forward: sparse (views * size, size * size), in pixels; back: its transpose; ramp: filter on 2 * size
        samples.
    """

    size: int
    views: int
    forward: Tensor
    back: Tensor
    ramp: Tensor
    cosines: Tensor
    sines: Tensor


@lru_cache(maxsize=2)
def projector(size: int, device: torch.device = CPU) -> Projector:
    """Build or reuse the projector for size x size images, with 9/8 * size views over half a turn.

    It holds 55 MiB for 128 and 190 MiB for 192 (the matrix and its transpose: a product with a transposed
    view is fifty times slower), so only two are kept; `projector.cache_clear` frees them. Linear
    interpolation on the detector; Hann-windowed ramp built from its spatial samples (Kak and Slaney, 1988,
    section 3.3).
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
    forward = _csr(
        torch.bincount(ray, minlength=views * size), pixel[order], value[order], (views * size, size * size)
    )

    offset = torch.fft.fftfreq(2 * size, d=1 / (2 * size)).round()
    kernel = torch.where(
        offset.abs() % 2 == 1, -1 / (math.pi * offset.clamp(min=-size) + 1e-9) ** 2, torch.zeros(())
    )
    kernel[0] = 0.25
    ramp = torch.fft.rfft(kernel).real
    frequency = torch.arange(ramp.numel()) / (ramp.numel() - 1)
    ramp = ramp * (0.5 + 0.5 * torch.cos(math.pi * frequency))
    return Projector(
        size=size,
        views=views,
        forward=forward.to(device),
        back=back.to(device),
        ramp=ramp.to(device),
        cosines=cosines.to(device),
        sines=sines.to(device),
    )


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


def integrals(density: Tensor, pixel_cm: float) -> Tensor:
    """Line integrals of (slices, size, size) in cm, shape (slices, views, detectors); linear, the transpose
    of back-projection.
    """
    slices, size, _ = density.shape
    scanner = projector(size, density.device)
    flat = density.reshape(slices, -1).T.contiguous()
    return (scanner.forward @ flat).T.reshape(slices, scanner.views, size) * pixel_cm


def project(images: Tensor, pixel_cm: float) -> Paths:
    """Split HU into water and bone and project both.

    Args:
        images: HU, shape (slices, size, size); bone share rises linearly from 150 to 1000 HU.
        pixel_cm: pixel size.
    """
    density = ((images + 1000) / 1000).clamp(min=0)
    bone = density * ((images - 150) / 850).clamp(0, 1)
    both = integrals(torch.cat([density - bone, bone]), pixel_cm)
    return Paths(
        water=both[: len(images)],
        bone=both[len(images) :],
        pixel_cm=pixel_cm,
        scanner=projector(images.shape[-1], images.device),
    )


def reconstruct(difference: Tensor, paths: Paths) -> Tensor:
    """FBP of a sinogram difference (slices, views, detectors), cm of water, to a HU difference (slices, size,
    size).
    """
    return back_project(difference, paths.scanner, paths.pixel_cm)


def back_project(difference: Tensor, scanner: Projector, pixel_cm: float) -> Tensor:
    """The same without paths: filtered back-projection by a scanner."""
    size = scanner.size
    filtered = torch.fft.irfft(torch.fft.rfft(difference, n=2 * size) * scanner.ramp, n=2 * size)[..., :size]
    image = (scanner.back @ filtered.reshape(difference.shape[0], -1).T.contiguous()).T.reshape(
        -1, size, size
    )
    return image * (1000 * math.pi / scanner.views / pixel_cm)


def transmission(
    water: Tensor, bone: Tensor, metal: Tensor | None = None, material: str = "titanium"
) -> Tensor:
    """Share of photons that pass: sum over energies of the spectrum times exp(-attenuation).

    Args:
        water, bone: cm of water equivalent, any equal shape.
        metal: cm of `material`, same shape.
    """
    lengths = [water, bone] if metal is None else [water, bone, metal]
    rates = _rates("" if metal is None else material, water.device)
    return torch.exp(torch.stack(lengths, -1) @ rates) @ spectrum(water.device)


@lru_cache(maxsize=16)
def _rates(metal: str, device: torch.device) -> Tensor:
    """Minus the attenuation of water, bone and perhaps a metal, per cm as `transmission` counts it; (2 or 3,
    energies).
    """
    table = attenuation()
    rows = [table["water"], table["bone"] * (mean_attenuation("water") / mean_attenuation("bone"))]
    return -torch.stack([*rows, table[metal]] if metal else rows).to(device)


@lru_cache(maxsize=4)
def _water_table(device: torch.device) -> tuple[Tensor, float]:
    """Water thickness (cm) at equal steps of -ln(transmission), and the step."""
    thickness = torch.linspace(0, 160, 4096)
    logs = -torch.log(transmission(thickness, torch.zeros_like(thickness)).double()).numpy()
    step = 20.0 / 1023
    return torch.tensor(np.interp(np.arange(1024) * step, logs, thickness.numpy()), dtype=torch.float32).to(
        device
    ), step


def water_equivalent(transmitted: Tensor) -> Tensor:
    """The scanner's water-only hardening correction: cm of water with the measured transmission, by inverse
    look-up.
    """
    table, step = _water_table(transmitted.device)
    place = -torch.log(transmitted.clamp(min=1e-9)) / step
    lower = place.floor().clamp(0, table.numel() - 2)
    index = lower.long()
    return torch.lerp(table[index], table[index + 1], place - lower)


def normals(seeds: Sequence[int], paths: Paths) -> Tensor:
    """Independent standard normal numbers for every ray of every slice, one seed a slice; the same on every
    device.
    """
    shape = (paths.scanner.views, paths.scanner.size)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(paths.water.device)


def counted(transmitted: Tensor, photons: Tensor, noise: Tensor) -> Tensor:
    """Water-equivalent path, cm, that a detector finds which counts quanta and adds electronic noise.

    Poisson and electronic noise are drawn as one normal number of their joint variance: below the 25 quanta^2
    of the electronics, which are normal, the skewness of the sum is under 0.08, and a normal number does not
    depend on the last bit of the transmission, as the steps of a Poisson generator do.
    Args:
        transmitted: share of photons that pass, any shape.
        photons: unattenuated quanta a ray; broadcasts to `transmitted`.
        noise: standard normal numbers, same shape as `transmitted`.
    """
    quanta = photons * transmitted
    quanta = quanta + torch.sqrt(quanta + ELECTRONIC_NOISE_QUANTA**2) * noise
    return water_equivalent(quanta.clamp(min=1) / photons)


def counting_error(
    square: Tensor, pixel_cm: float, photons: Sequence[float], seeds: Sequence[int]
) -> tuple[Tensor, Tensor, Paths]:
    """What counting quanta adds to the water-equivalent sinograms of some slices, cm; the quanta each ray
    expects; the paths.
    """
    paths = project(square, pixel_cm)
    unattenuated, transmitted = column(photons, square), transmission(paths.water, paths.bone)
    error = counted(transmitted, unattenuated, normals(seeds, paths)) - water_equivalent(transmitted)
    return error, unattenuated * transmitted, paths


def exposure(acquisition: Acquisition) -> float:
    """Factor on the photons of a body wider than 36 cm: scanners raise the tube current, though not by all
    that is lost.
    """
    width_cm = 0.2 * acquisition.frame.half_width * acquisition.pixel_spacing_mm
    return math.exp(0.15 * min(max(width_cm - 36, 0.0), 20.0))


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """One number a slice, shape (slices, 1, 1), float32, where `like` is."""
    return torch.tensor(values, dtype=torch.float32).to(like.device)[:, None, None]


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


def through_square(
    images: Tensor, pixel_mm: float, difference_of: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Run `difference_of(square slices, pixel size in cm) -> HU difference` on slices of any shape; the
    difference has their shape.

    Pads with air to a square and, above `WORKING_SIZE`, averages down and interpolates the difference back.
    """
    rows, columns = images.shape[-2:]
    size = max(rows, columns)
    top, left = (size - rows) // 2, (size - columns) // 2
    square = images
    if rows != columns:
        square = torch.nn.functional.pad(
            images, (left, size - columns - left, top, size - rows - top), value=-1000.0
        )
    if size <= WORKING_SIZE:
        difference = difference_of(square, pixel_mm / 10)
    else:
        small = torch.nn.functional.interpolate(
            square[:, None], size=(WORKING_SIZE, WORKING_SIZE), mode="area"
        )[:, 0]
        difference = difference_of(small, pixel_mm / 10 * size / WORKING_SIZE)
        difference = torch.nn.functional.interpolate(
            difference[:, None], size=(size, size), mode="bicubic", align_corners=False
        )[:, 0]
    return difference[:, top : top + rows, left : left + columns]


Params = TypeVar("Params", bound="Drawn")


class Drawn(Protocol):
    """What every CT artifact's parameters have."""

    @property
    def severity(self) -> float: ...
    @property
    def pixel_spacing_mm(self) -> float: ...


def add_difference(
    image: Tensor,
    params: Params | Sequence[Params],
    difference_of: Callable[[Tensor, float, list[Params]], Tensor],
) -> tuple[Tensor, Tensor]:
    """An artifact by the difference method; slices of severity zero are returned as they came.

    Args:
        image: HU, shape (rows, columns) or (slices, rows, columns).
        params: one for all slices, or one a slice (of equal pixel spacing).
        difference_of: (square slices, pixel size in cm, parameters of each slice) -> HU difference of the
            squares.
    Returns:
        float32 HU clipped to the CT number range, same shape; bool map of pixels changed by more than 10 HU.
    """
    images, each, single = per_slice(image, params)
    difference = through_square(
        images, each[0].pixel_spacing_mm, lambda square, pixel_cm: difference_of(square, pixel_cm, each)
    )
    return finish(images, images + difference, each, single=single)


def finish(
    images: Tensor, changed: Tensor, params: Sequence[Drawn], *, single: bool
) -> tuple[Tensor, Tensor]:
    """The last step of every `apply`: CT number range, identity at severity zero, where it changed by more
    than 10 HU.
    """
    shown = column([one.severity for one in params], images) > 0
    changed = torch.where(shown, changed.clamp(*HU_RANGE), images)
    mask = (changed - images).abs() > 10
    return (changed[0], mask[0]) if single else (changed, mask)
