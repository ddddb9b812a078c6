"""Other looks of the same anatomy, to train public starting weights on (`fedqc data inject --views`).

What artifacts are mistaken for is added: in MR texture, bright and dark spots and the shading of a coil, in
CT contrast medium, dense spots, and streaks without a label. In CT position, texture, sharpness and noise are
drawn from ranges wider than any collection, too (domain randomization: Tobin et al., IROS 2017); in MR they
and the contrast stay the scanner's own, because drawing them anew cost accuracy at scanners left out
(docs/performance.md). All of it happens before an artifact is simulated, so that the artifact keeps its axis
and its physics, and to clean slices alike, so that nothing of it tells a label.

Approximation: the look is drawn on the finished image, not on tissue parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from client.views.acquisition import body_of
from common.artifacts import Modality
from common.physics import SIMULATORS
from common.physics.acquisition import Acquisition, acquire, integer, uniform
from common.preprocess import CT_RANGE_HU, resample

SIZES: dict[Modality, tuple[int, ...]] = {"CT": (128,), "MR": (128, 128, 160)}
"""Pixels of a side, one of which is drawn; no size above the slice's own."""
MR_SCALE = 1000.0
"""Signal of the 99.5th percentile before the look is drawn."""
CT_NUISANCES = {"photon_starvation": 0.15, "ct_motion": 0.12, "ring": 0.08, "low_dose": 0.12}
"""Simulator without a label -> chance, at severity .1 to .7."""


def randomized(
    image: Tensor, modality: Modality, spacing_mm: float, seed: int, labelled: Collection[str] = ()
) -> tuple[Tensor, float]:
    """A clean slice in another look, and its pixel spacing in mm.

    Args:
        image: square, HU or magnitude, float32.
        spacing_mm: of its pixels.
        seed: decides the look. Slices of one person get one seed, and so one look.
        labelled: simulators that are no nuisance, because their artifact has a label.
    Returns:
        float32 (S, S), HU within `CT_RANGE_HU` or magnitude from 0 to about `MR_SCALE`.
    """
    generator = torch.Generator().manual_seed(seed)
    moved, zoom = _moved(image, generator) if modality == "CT" else (image, 1.0)
    sizes = SIZES[modality]
    size = min(sizes[integer(generator, 0, len(sizes) - 1)], image.shape[0])
    small = torch.from_numpy(resample(moved.numpy(), size))
    spacing = spacing_mm * image.shape[0] / size / zoom
    if modality == "MR":
        return _mr_look(small, generator), spacing
    return _ct_look(small, spacing, generator, labelled), spacing


def other_protocol(acquisition: Acquisition, modality: Modality, seed: int) -> Acquisition:
    """An acquisition of the same slice by another protocol; what is EPI stays EPI."""
    generator = torch.Generator().manual_seed(seed)
    if modality == "CT":
        return replace(acquisition, hardening_gain=uniform(generator, 20, 80))
    is_epi = acquisition.sequence == "EPI"
    return replace(
        acquisition,
        phase_encoding=("ROW", "COL")[integer(generator, 0, 1)],
        field_tesla=(1.5, 3.0)[integer(generator, 0, 1)],
        sequence="EPI" if is_epi else ("SE", "GRE")[integer(generator, 0, 1)],
        bandwidth_hz_per_px=uniform(generator, 100, 350),
        echo_time_ms=uniform(generator, 20, 40) if is_epi else uniform(generator, 3, 20),
    )


def _chance(generator: torch.Generator, share: float) -> bool:
    return uniform(generator, 0, 1) < share


def _moved(image: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """A CT slice mirrored, turned, scaled and shifted, and the scale."""
    if _chance(generator, 0.5):
        image = image.flip(-1)
    if _chance(generator, 0.15):
        image = image.flip(-2)
    if _chance(generator, 0.15):
        image = image.transpose(-2, -1)
    angle, zoom = math.radians(uniform(generator, -15, 15)), uniform(generator, 0.7, 1.15)
    y, x = uniform(generator, -0.12, 0.12), uniform(generator, -0.12, 0.12)
    aspect = uniform(generator, 0.92, 1.08)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    matrix = torch.tensor([[[cos * aspect, -sin, x], [sin, cos / aspect, y]]])
    air = CT_RANGE_HU[0]
    grid = functional.affine_grid(matrix, [1, 1, *image.shape], align_corners=False)
    moved = functional.grid_sample(image[None, None] - air, grid, align_corners=False)[0, 0]
    return moved + air, zoom


def _field(size: int, generator: torch.Generator, cells: int) -> Tensor:
    """Smooth noise of deviation 1, shape (size, size), that varies over `size / cells` pixels."""
    coarse = torch.randn(1, 1, cells, cells, generator=generator)
    smooth = functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[0, 0]
    return smooth / smooth.std().clamp(min=1e-6)


def _texture(size: int, generator: torch.Generator) -> Tensor:
    """Noise of deviation 1 at a drawn range of scales."""
    scales = [8, 16, 32, 64][integer(generator, 0, 2) :]
    total = torch.stack([_field(size, generator, cells) for cells in scales]).sum(0)
    return total / total.std().clamp(min=1e-6)


def spots(
    body: Tensor, generator: torch.Generator, count: int, radius: tuple[float, float], edge: float
) -> list[Tensor]:
    """Ellipses in the body, each a map 0 to 1 with an edge of `edge` pixels; `radius` as a share of the
    side.
    """
    places = body.nonzero()
    if not len(places):
        return []
    size = body.shape[-1]
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    spots = []
    for _ in range(count):
        y, x = places[integer(generator, 0, len(places) - 1)].tolist()
        turn = uniform(generator, 0, math.pi)
        a, b = (size * math.exp(uniform(generator, *map(math.log, radius))) for _ in range(2))
        u = (rows - y) * math.cos(turn) + (columns - x) * math.sin(turn)
        v = (columns - x) * math.cos(turn) - (rows - y) * math.sin(turn)
        distance = ((u / a) ** 2 + (v / b) ** 2).sqrt()
        spots.append(torch.sigmoid((1 - distance) * min(a, b) * 4 / edge))
    return spots


def _mr_look(image: Tensor, generator: torch.Generator) -> Tensor:
    size = image.shape[-1]
    low, high = (float(torch.quantile(image.flatten(), share)) for share in (0.01, 0.995))
    image = ((image - low) / max(high - low, 1e-6)).clamp(0, 1.5)
    body = body_of(image, "MR")
    if _chance(generator, 0.35):
        depth = uniform(generator, 0.03, 0.25)
        image = image * (1 + depth * _texture(size, generator)).clamp(0.2, 2)
    if _chance(generator, 0.5):
        for spot in spots(body, generator, integer(generator, 1, 3), (0.015, 0.09), 2.0):
            # no darker: a void is what a disturbed field leaves
            level = (
                uniform(generator, 0.75, 1.6) if _chance(generator, 0.8) else uniform(generator, 0.35, 0.75)
            )
            share = uniform(generator, 0.5, 1)
            image = image * (1 - share * spot) + share * spot * level
    if _chance(generator, 0.6):
        image = _shaded(image, generator)
    return image * MR_SCALE


def _shaded(image: Tensor, generator: torch.Generator) -> Tensor:
    """With the bias field of a coil."""
    simulator, severity = SIMULATORS["bias_field"], uniform(generator, 0.1, 0.7)
    return simulator.apply(image, simulator.draw(severity, generator, acquire(image, "MR")))[0]


def _ct_look(
    image: Tensor, spacing_mm: float, generator: torch.Generator, labelled: Collection[str]
) -> Tensor:
    size = image.shape[-1]
    body = body_of(image, "CT")
    tissue = body & (image > -200)
    if _chance(generator, 0.4):
        image = image + tissue * uniform(generator, 3, 25) * _field(size, generator, integer(generator, 2, 5))
    if _chance(generator, 0.4):
        image = image + tissue * uniform(generator, 5, 50) * _texture(size, generator)
    if _chance(generator, 0.3):  # iodine: what is soft becomes brighter
        image = image + ((image > 20) & (image < 150)) * uniform(generator, 10, 90)
    if _chance(generator, 0.6):
        for spot in spots(tissue, generator, integer(generator, 1, 5), (0.006, 0.025), 1.5):
            image = torch.maximum(image, image * (1 - spot) + spot * uniform(generator, 250, 1600))
    if _chance(generator, 0.4):
        for spot in spots(tissue, generator, integer(generator, 1, 3), (0.02, 0.07), 2.0):
            image = torch.maximum(image, image * (1 - spot) + spot * uniform(generator, 120, 600))
    if _chance(generator, 0.6):
        smooth = functional.avg_pool2d(image[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
        image = image + uniform(generator, -0.9, 0.8) * (image - smooth)
    if _chance(generator, 0.8):
        grain = torch.randn(size, size, generator=generator)
        if _chance(generator, 0.6):
            grain = functional.avg_pool2d(grain[None, None], 3, 1, 1)[0, 0] * 3
        image = image + uniform(generator, 1, 30) * grain
    for name, share in CT_NUISANCES.items():
        if _chance(generator, share):
            simulator = SIMULATORS[name]
            acquisition = acquire(image, "CT", pixel_spacing_mm=spacing_mm)
            drawn = simulator.draw(uniform(generator, 0.1, 0.7), generator, acquisition)
            if name not in labelled:
                image, _ = simulator.apply(image, drawn)
    return image.clamp(*CT_RANGE_HU)
