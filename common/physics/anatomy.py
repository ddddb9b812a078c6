"""Anatomy-like phantoms: a few adjacent slices of one invented patient, as HU (CT) or signal and fat share (MR).

Ellipses with anti-aliased edges on a smoothly warped grid, band-limited textures, random lesions. Nothing here knows about artifacts.
Coordinates: y down and x right, -1..1 across the field of view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from common.physics.acquisition import uniform

SLICE_STEP = 0.35
"""How far textures turn from one slice to the next, radians: neighbours correlate with cos(0.35) = 0.94."""

CONTRASTS: dict[str, dict[str, float]] = {  # signal relative to the brightest tissue, rounded from usual 1.5 T protocols
    "T1": {
        "fat": 1.0,
        "skin": 0.5,
        "muscle": 0.42,
        "bone": 0.05,
        "marrow": 0.85,
        "white": 0.76,
        "grey": 0.55,
        "fluid": 0.16,
        "organ": 0.56,
        "organ2": 0.44,
        "vessel": 0.12,
        "lesion": 0.3,
        "gas": 0.0,
    },
    "T2": {
        "fat": 0.75,
        "skin": 0.35,
        "muscle": 0.2,
        "bone": 0.04,
        "marrow": 0.55,
        "white": 0.36,
        "grey": 0.55,
        "fluid": 1.0,
        "organ": 0.32,
        "organ2": 0.58,
        "vessel": 0.06,
        "lesion": 0.85,
        "gas": 0.0,
    },
    "PD": {
        "fat": 0.8,
        "skin": 0.5,
        "muscle": 0.55,
        "bone": 0.06,
        "marrow": 0.65,
        "white": 0.62,
        "grey": 0.8,
        "fluid": 0.86,
        "organ": 0.66,
        "organ2": 0.72,
        "vessel": 0.15,
        "lesion": 0.95,
        "gas": 0.0,
    },
    "FLAIR": {
        "fat": 0.85,
        "skin": 0.4,
        "muscle": 0.32,
        "bone": 0.04,
        "marrow": 0.6,
        "white": 0.5,
        "grey": 0.64,
        "fluid": 0.08,
        "organ": 0.45,
        "organ2": 0.55,
        "vessel": 0.1,
        "lesion": 1.0,
        "gas": 0.0,
    },
}


@lru_cache(maxsize=32)
def _spline(size: int, cells: int) -> Tensor:
    """Cubic B-spline interpolation from `cells` + 3 coarse points to `size` pixels, (size, cells + 3), rows scaled to unit variance."""
    place = (torch.arange(size, dtype=torch.float32) + 0.5) * cells / size
    distance = (place[:, None] - torch.arange(-1, cells + 2, dtype=torch.float32)[None, :]).abs()
    inner = (4 - 6 * distance**2 + 3 * distance**3) / 6
    outer = (2 - distance).clamp(min=0) ** 3 / 6
    weights = torch.where(distance < 1, inner, outer)
    return weights / weights.square().sum(1, keepdim=True).sqrt()


class Scene:
    """The grid of one patient's slices, warped, and the generator that draws from it."""

    def __init__(self, size: int, slices: int, generator: torch.Generator, zoom: float) -> None:
        self.size, self.slices, self.generator = size, slices, generator
        self.place = torch.arange(slices, dtype=torch.float32)[:, None, None]
        axis = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
        angle = uniform(generator, -0.16, 0.16)
        flat_y = axis[:, None] - uniform(generator, -0.05, 0.05)
        flat_x = axis[None, :] - uniform(generator, -0.05, 0.05)
        y = (flat_y * math.cos(angle) + flat_x * math.sin(angle)) / zoom
        x = (flat_x * math.cos(angle) - flat_y * math.sin(angle)) / zoom
        self.y = y + 0.02 * self.texture(4)
        self.x = x + 0.02 * self.texture(4)
        self.pixels_per_unit = zoom * size / 2

    def shrink(self, factor: float) -> None:
        """Make everything drawn from now on smaller."""
        self.y, self.x = self.y / factor, self.x / factor
        self.pixels_per_unit *= factor

    def number(self, low: float, high: float, drift: float = 0.06) -> Tensor:
        """One value a slice, (slices, 1, 1): uniform for the patient, drifting by a share of its range from slice to slice."""
        start, slope = torch.rand(2, generator=self.generator).tolist()
        return low + (high - low) * (start + drift * (slope - 0.5) * 2 * self.place)

    def chance(self, probability: float) -> bool:
        return uniform(self.generator, 0, 1) < probability

    def texture(self, cells: int) -> Tensor:
        """Band-limited noise of unit variance, about `cells` blobs across, (slices, size, size); neighbours are alike."""
        spline = _spline(self.size, cells)
        here, there = torch.randn(2, cells + 3, cells + 3, generator=self.generator)
        turn = SLICE_STEP * self.place
        return spline @ (torch.cos(turn) * here + torch.sin(turn) * there) @ spline.T

    def level(self, y: Tensor | float, x: Tensor | float, height: Tensor | float, width: Tensor | float, angle: float = 0.0) -> Tensor:
        """1 on the ellipse with these half-axes, 0 in its centre; (slices, size, size)."""
        dy, dx = self.y - y, self.x - x
        if angle:
            dy, dx = dy * math.cos(angle) + dx * math.sin(angle), dx * math.cos(angle) - dy * math.sin(angle)
        return torch.sqrt((dy / height) ** 2 + (dx / width) ** 2)

    def cover(self, level: Tensor, radius: Tensor | float, at: Tensor | float = 1.0) -> Tensor:
        """Pixel coverage 0..1 of the region level < at, for an object of smallest half-axis `radius`."""
        return ((at - level) * (radius * self.pixels_per_unit) + 0.5).clamp(0, 1)

    def ellipse(self, y: Tensor | float, x: Tensor | float, height: Tensor | float, width: Tensor | float, angle: float = 0.0) -> Tensor:
        """Pixel coverage of an ellipse, anti-aliased."""
        smallest = torch.minimum(torch.as_tensor(height), torch.as_tensor(width))
        return self.cover(self.level(y, x, height, width, angle), smallest)

    def spot(self, reach_y: float, reach_x: float, low: float, high: float) -> Tensor:
        """Coverage of a randomly placed ellipse within a central box."""
        height, width = self.number(low, high), self.number(low, high)
        return self.ellipse(self.number(-reach_y, reach_y), self.number(-reach_x, reach_x), height, width, uniform(self.generator, 0, 3.1))


@dataclass(frozen=True, kw_only=True)
class MrAnatomy:
    signal: Tensor
    """(slices, size, size), 0..about 1."""
    fat: Tensor
    """Share of the signal that is fat, 0..1."""


class _Mr:
    """Signal and fat, painted tissue by tissue."""

    def __init__(self, scene: Scene, contrast: str) -> None:
        self.scene = scene
        self.table = {name: value * uniform(scene.generator, 0.88, 1.12) for name, value in CONTRASTS[contrast].items()}
        self.signal = torch.zeros(scene.slices, scene.size, scene.size)
        self.fat = torch.zeros_like(self.signal)

    def paint(self, cover: Tensor, tissue: str) -> None:
        self.signal = torch.lerp(self.signal, torch.tensor(self.table[tissue]), cover)
        self.fat = torch.lerp(self.fat, torch.tensor(1.0 if tissue in ("fat", "marrow") else 0.0), cover)

    def done(self) -> MrAnatomy:
        grain = 1 + 0.035 * self.scene.texture(self.scene.size // 4) + 0.05 * self.scene.texture(8)
        return MrAnatomy(signal=(self.signal * grain).clamp(min=0), fat=self.fat)


def brain_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial head: skin, fat, skull, cortex with sulci, white matter, ventricles, deep nuclei, sometimes eyes, sinuses, lesions."""
    mr = _Mr(scene, contrast)
    height, width = scene.number(0.8, 0.92, 0.03), scene.number(0.62, 0.74, 0.03)
    outline = scene.level(0, 0, height, width)
    skin, fat = uniform(scene.generator, 0.015, 0.03), uniform(scene.generator, 0.05, 0.1)
    fat_here = fat * (1 + 0.25 * scene.texture(5))
    bone = uniform(scene.generator, 0.05, 0.09)
    mr.paint(scene.cover(outline, width), "skin")
    mr.paint(scene.cover(outline, width, 1 - skin), "fat")
    inner = 1 - skin - fat_here
    mr.paint(scene.cover(outline, width, inner), "bone")
    if scene.chance(0.6):
        mr.paint(scene.cover((outline - inner + bone * 0.5).abs() / (bone * 0.16), bone * 0.16), "marrow")
    rim = inner - bone
    mr.paint(scene.cover(outline, width, rim), "fluid")
    depth = outline / rim
    folds = scene.texture(11)
    mr.paint(scene.cover(depth + 0.012 * folds, width * 0.85, 0.965), "grey")
    mr.paint(scene.cover(depth + 0.07 * folds + 0.035 * scene.texture(22), width * 0.85, 0.82), "white")
    sulci = ((0.3 - scene.texture(13).abs()) * 4).clamp(0, 1) * ((depth - uniform(scene.generator, 0.6, 0.75)) * 8).clamp(0, 1)
    mr.paint(sulci * scene.cover(depth, width, 0.98), "grey")
    mr.paint(
        ((0.1 - scene.texture(13).abs()) * 7).clamp(0, 1) * ((depth - 0.72) * 8).clamp(0, 1) * scene.cover(depth, width, 0.99), "fluid"
    )
    fissure = scene.cover(scene.x.abs() / 0.012, 0.012) * ((depth - scene.number(0.35, 0.6)) * 9).clamp(0, 1)
    mr.paint(fissure * scene.cover(depth, width, 0.98), "fluid")
    swell = scene.number(0.7, 1.5)
    for side in (-1, 1):
        mr.paint(scene.ellipse(scene.number(0.02, 0.1), side * scene.number(0.13, 0.19, 0.02), 0.13, 0.07, side * 0.3), "grey")
        tilt = side * uniform(scene.generator, 0.25, 0.5)
        mr.paint(scene.ellipse(-0.14, side * 0.09, 0.13 * swell, 0.035 * swell, tilt), "fluid")
        mr.paint(scene.ellipse(0.2, side * 0.13, 0.11 * swell, 0.035 * swell, -tilt), "fluid")
    mr.paint(scene.ellipse(0.03, 0, 0.07, 0.015 * swell), "fluid")
    if scene.chance(0.35):
        for side in (-1, 1):
            y, x = -0.72 * height, side * 0.42 * width
            mr.paint(scene.ellipse(y, x, 0.14, 0.12), "fat")
            mr.paint(scene.ellipse(y - 0.01, x, 0.085, 0.085), "fluid")
        mr.paint(scene.ellipse(-0.78 * height, 0, 0.1, 0.06), "gas")
    for _ in range(int(uniform(scene.generator, 0, 4))):
        mr.paint(scene.spot(0.5, 0.4, 0.015, 0.06), "lesion")
    return mr.done()


def abdomen_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial abdomen: fat ring, wall, liver, spleen, kidneys in fat, bowel, spine, vessels."""
    mr = _Mr(scene, contrast)
    height, width = scene.number(0.58, 0.72, 0.03), scene.number(0.8, 0.94, 0.03)
    outline = scene.level(0, 0, height, width)
    fat = uniform(scene.generator, 0.07, 0.17) * (1 + 0.2 * scene.texture(4))
    mr.paint(scene.cover(outline, height), "skin")
    mr.paint(scene.cover(outline, height, 0.975), "fat")
    mr.paint(scene.cover(outline, height, 0.97 - fat), "muscle")
    inner = 0.9 - fat
    cavity = scene.cover(outline, height, inner)
    mr.paint(cavity, "fat")
    side = 1 if scene.chance(0.5) else -1
    liver = scene.level(-0.08, side * -0.32, scene.number(0.32, 0.42), scene.number(0.32, 0.42)) + 0.08 * scene.texture(5)
    mr.paint(scene.cover(liver, 0.35) * cavity, "organ")
    vessels = ((0.12 - scene.texture(12).abs()) * 6).clamp(0, 1) * scene.cover(liver, 0.35, 0.85)
    mr.paint(vessels * cavity, "vessel" if scene.chance(0.5) else "fluid")
    mr.paint(scene.ellipse(0.08, side * scene.number(0.48, 0.56), 0.2, 0.1, side * 0.3) * cavity, "organ2")
    bowel = ((scene.texture(9) - 0.1) * 5).clamp(0, 1) * scene.cover(scene.level(-0.25, side * 0.15, 0.28, 0.42), 0.28)
    mr.paint(bowel * cavity, "organ2" if scene.chance(0.5) else "fluid")
    if scene.chance(0.4):
        mr.paint(scene.ellipse(-0.33, scene.number(-0.2, 0.3), 0.05, 0.09) * cavity, "gas")
    for edge in (-1, 1):
        y, x = scene.number(0.16, 0.22), edge * scene.number(0.3, 0.38, 0.02)
        mr.paint(scene.ellipse(y, x, 0.15, 0.1, edge * 0.3) * cavity, "organ2")
        mr.paint(scene.ellipse(y, x * 0.95, 0.06, 0.03, edge * 0.3) * cavity, "fat")
    _spine_mr(scene, mr)
    for _ in range(int(uniform(scene.generator, 0, 4))):
        mr.paint(scene.spot(0.35, 0.5, 0.02, 0.07) * cavity, "lesion")
    return mr.done()


def _spine_mr(scene: Scene, mr: _Mr) -> None:
    for edge in (-1, 1):
        mr.paint(scene.ellipse(0.42, edge * 0.17, 0.1, 0.14), "muscle")
    y, size = scene.number(0.2, 0.28, 0.03), scene.number(0.1, 0.14, 0.02)
    mr.paint(scene.ellipse(y, 0, size, size * 1.2), "bone")
    mr.paint(scene.ellipse(y, 0, size * 0.86, size * 1.05), "marrow")
    mr.paint(scene.ellipse(y + 1.35 * size, 0, 0.05, 0.06), "fluid")
    mr.paint(scene.ellipse(y + 1.35 * size, 0, 0.028, 0.035), "white")
    for x in (-0.06, 0.06):
        mr.paint(scene.ellipse(y - 1.6 * size, x, 0.045, 0.045), "vessel")


def legs_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """Two thighs: fat, muscles in compartments, cortical bone with marrow, vessels."""
    mr = _Mr(scene, contrast)
    half = scene.number(0.36, 0.42, 0.03)
    for side in (-1, 1):
        x, y = side * (half + uniform(scene.generator, 0.02, 0.08)), uniform(scene.generator, -0.06, 0.06)
        height, width = half * uniform(scene.generator, 1.0, 1.25), half
        outline = scene.level(y, x, height, width)
        mr.paint(scene.cover(outline, half), "skin")
        mr.paint(scene.cover(outline, half, 0.96), "fat")
        fat = uniform(scene.generator, 0.1, 0.28) * (1 + 0.2 * scene.texture(5))
        inside = scene.cover(outline, half, 0.95 - fat)
        mr.paint(inside, "muscle")
        septa = ((uniform(scene.generator, 0.06, 0.14) - scene.texture(7).abs()) * 7).clamp(0, 1)
        mr.paint(septa * inside, "fat")
        by, bx, bone = y + scene.number(-0.08, 0.02), x + side * scene.number(-0.02, 0.06), scene.number(0.075, 0.105, 0.02)
        mr.paint(scene.ellipse(by, bx, bone, bone), "bone")
        mr.paint(scene.ellipse(by, bx, bone * 0.62, bone * 0.62), "marrow")
        vy, vx = y + scene.number(0.0, 0.15), x - side * scene.number(0.08, 0.16)
        mr.paint(scene.ellipse(vy, vx, 0.03, 0.03), "vessel")
        mr.paint(scene.ellipse(vy + 0.05, vx, 0.03, 0.03), "fluid" if scene.chance(0.5) else "vessel")
        if scene.chance(0.4):
            mr.paint(inside * scene.ellipse(y + scene.number(-0.2, 0.2), x + scene.number(-0.2, 0.2), 0.06, 0.05), "lesion")
    return mr.done()


class _Ct:
    """HU, painted tissue by tissue."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.hu = torch.full((scene.slices, scene.size, scene.size), -1000.0)

    def paint(self, cover: Tensor, hu: float | Tensor) -> None:
        self.hu = torch.lerp(self.hu, torch.as_tensor(hu), cover)


def head_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial head: scalp, skull, brain, ventricles; two slices in three at the level of the petrous bones."""
    ct = _Ct(scene)
    height, width = scene.number(0.78, 0.9, 0.03), scene.number(0.62, 0.74, 0.03)
    outline = scene.level(0, 0, height, width)
    ct.paint(scene.cover(outline, width), 25.0)
    ct.paint(scene.cover(outline, width, 0.975), -85.0)
    ct.paint(scene.cover(outline, width, uniform(scene.generator, 0.92, 0.96)), 45.0)
    outer = uniform(scene.generator, 0.88, 0.92)
    thickness = uniform(scene.generator, 0.07, 0.12) * (1 + 0.15 * scene.texture(5))
    ct.paint(scene.cover(outline, width, outer), scene.number(900, 1400))
    ct.paint(scene.cover((outline - outer + thickness / 2).abs() / (thickness * 0.2), 0.02), scene.number(300, 700))
    rim = outer - thickness
    brain = 34 + 3.0 * scene.texture(14) + 2.0 * scene.texture(5)
    depth = outline / rim
    ct.paint(scene.cover(outline, width, rim), 8.0)
    ct.paint(scene.cover(depth + 0.02 * scene.texture(14), width, 0.97), brain)
    petrous = scene.chance(0.8)
    if petrous:
        y = scene.number(0.08, 0.25, 0.03)
        for side in (-1, 1):
            tilt = side * uniform(scene.generator, 0.45, 0.8)
            dense = scene.number(1000, 1600)
            ct.paint(scene.ellipse(y, side * 0.4 * width / 0.68, 0.075, 0.22, -tilt) * scene.cover(depth, width, 1.0), dense)
            cells = ((scene.texture(26) - 0.4) * 3).clamp(0, 1)
            ct.paint(scene.ellipse(y + 0.06, side * 0.56 * width / 0.68, 0.1, 0.08) * cells, -700.0)
        ct.paint(scene.ellipse(-0.1, 0, 0.07, 0.12), scene.number(700, 1100))
        if scene.chance(0.6):
            ct.paint(scene.ellipse(-0.12, 0, 0.05, 0.09), -850.0)
            for side in (-1, 1):
                ct.paint(scene.ellipse(-0.7 * height, side * 0.4 * width, 0.17, 0.14), -70.0)
                ct.paint(scene.ellipse(-0.72 * height, side * 0.4 * width, 0.1, 0.1), 15.0)
            ct.paint(scene.ellipse(-0.55 * height, 0, 0.2, 0.08), -800.0)
    else:
        swell = scene.number(0.6, 1.5)
        for side in (-1, 1):
            ct.paint(scene.ellipse(-0.14, side * 0.09, 0.14 * swell, 0.035 * swell, side * 0.35), 6.0)
            ct.paint(scene.ellipse(0.2, side * 0.13, 0.12 * swell, 0.035 * swell, -side * 0.35), 6.0)
        ct.paint(scene.cover(scene.x.abs() / 0.01, 0.01) * scene.cover(depth, width, 0.95) * (depth > 0.5), 48.0)
    if scene.chance(0.4):
        ct.paint(scene.spot(0.4, 0.35, 0.03, 0.12), scene.number(58, 75) if scene.chance(0.5) else scene.number(12, 22))
    if enhanced:
        for _ in range(4):
            ct.paint(scene.spot(0.4, 0.35, 0.012, 0.025), scene.number(140, 260))
    return ct.hu


def _arms(scene: Scene, ct: _Ct, width: Tensor) -> None:
    """Arms at the sides of the trunk: muscle, fat and one dense bone each."""
    for side in (-1, 1):
        radius = scene.number(0.13, 0.16, 0.02)
        y, x = scene.number(-0.1, 0.15, 0.03), side * (width + radius + 0.02)
        ct.paint(scene.ellipse(y, x, radius * 1.25, radius), -90.0)
        ct.paint(scene.ellipse(y, x, radius * 1.05, radius * 0.82), 55.0)
        bone = scene.number(0.07, 0.09, 0.02)
        ct.paint(scene.ellipse(y, x, bone, bone), scene.number(1200, 1600))


def _trunk(scene: Scene, ct: _Ct, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Skin, fat and muscle of a body wider than high: (outline level, half-height, half-width), wall ending at level `inner`."""
    height, width = scene.number(low, high, 0.03), scene.number(0.8, 0.93, 0.03)
    outline = scene.level(0, 0, height, width)
    fat = uniform(scene.generator, 0.05, 0.18) * (1 + 0.2 * scene.texture(4))
    ct.paint(scene.cover(outline, height), 20.0)
    ct.paint(scene.cover(outline, height, 0.98), -100.0 + 8 * scene.texture(10))
    ct.paint(scene.cover(outline, height, 0.975 - fat), 52.0 + 5 * scene.texture(12))
    return outline / (0.975 - fat), height, width


def _spine_ct(scene: Scene, ct: _Ct, y: Tensor, size: Tensor) -> None:
    ct.paint(scene.ellipse(y, 0, size, size * 1.2), scene.number(450, 800))
    ct.paint(scene.ellipse(y, 0, size * 0.82, size), 180 + 40 * scene.texture(20))
    ct.paint(scene.ellipse(y + 1.5 * size, 0, size * 0.65, size * 0.9), scene.number(500, 800))
    ct.paint(scene.ellipse(y + 1.35 * size, 0, size * 0.42, size * 0.5), 30.0)
    for side in (-1, 1):
        ct.paint(scene.ellipse(y + 1.6 * size, side * 1.35 * size, 0.03, size * 0.6, side * 0.3), scene.number(400, 700))
    ct.paint(scene.ellipse(y + 2.5 * size, 0, size * 0.7, 0.025), scene.number(400, 700))


def thorax_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial chest: lungs with vessels, heart, aorta, spine, ribs, sternum; often arms at the sides."""
    ct = _Ct(scene)
    arms = scene.chance(0.6)
    if arms:
        scene.shrink(0.78)
    wall, height, width = _trunk(scene, ct, 0.6, 0.72)
    if arms:
        _arms(scene, ct, width)
    blood = scene.number(160, 320) if enhanced else scene.number(38, 52)
    lungs = torch.zeros_like(wall)
    for side in (-1, 1):
        level = scene.level(
            scene.number(-0.06, 0.04), side * scene.number(0.4, 0.44, 0.02), height * 0.68, width * 0.36
        ) + 0.05 * scene.texture(5)
        lungs = torch.maximum(lungs, scene.cover(level, 0.3))
    lungs = lungs * scene.cover(wall, height, 0.86)
    ct.paint(scene.cover(wall, height, 0.86), -60.0)
    ct.paint(lungs, -860 + 25 * scene.texture(6))
    ct.paint(lungs * ((scene.texture(30) - 1.2) * 2).clamp(0, 0.8), 20.0)
    if scene.chance(0.35):
        ct.paint(lungs * scene.spot(0.35, 0.55, 0.04, 0.15), -200.0)
    ct.paint(scene.ellipse(-0.12, scene.number(-0.04, 0.14), scene.number(0.22, 0.3), scene.number(0.22, 0.32), 0.4), 45.0)
    ct.paint(scene.ellipse(-0.1, scene.number(0.0, 0.16), scene.number(0.12, 0.18), scene.number(0.12, 0.18)), blood)
    spine_y = 0.48 * height
    ct.paint(scene.ellipse(spine_y - 0.18, 0.1, 0.05, 0.05), blood)
    _spine_ct(scene, ct, spine_y, scene.number(0.09, 0.12, 0.02))
    count = int(uniform(scene.generator, 8, 13))
    start = uniform(scene.generator, 0, 1)
    for number in range(count):
        angle = (number + start) * 2 * math.pi / count
        y, x = 0.8 * height * math.sin(angle), 0.8 * width * math.cos(angle)
        ct.paint(scene.ellipse(y, x, 0.028, scene.number(0.06, 0.11), angle + math.pi / 2), scene.number(400, 900))
    ct.paint(scene.ellipse(-0.82 * height, 0, 0.03, 0.09), 350.0)
    if scene.chance(0.5):
        for side in (-1, 1):
            ct.paint(scene.ellipse(0.55 * height, side * 0.6 * width, 0.03, 0.15, side * 0.6), scene.number(500, 900))
    return ct.hu


def abdomen_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial abdomen: liver, spleen, kidneys, bowel with gas, spine, lower ribs; arms at the sides."""
    ct = _Ct(scene)
    scene.shrink(0.78)
    wall, height, width = _trunk(scene, ct, 0.58, 0.7)
    _arms(scene, ct, width)
    gain = 1.0 if enhanced else 0.0
    cavity = scene.cover(wall, height, 0.88)
    ct.paint(cavity, -95 + 10 * scene.texture(14))
    side = 1 if scene.chance(0.5) else -1
    liver = scene.level(-0.06, side * -0.36, scene.number(0.32, 0.42), scene.number(0.32, 0.42)) + 0.07 * scene.texture(5)
    ct.paint(scene.cover(liver, 0.35) * cavity, scene.number(50, 65) + gain * 50 + 5 * scene.texture(14))
    ct.paint(scene.ellipse(0.06, side * 0.55, 0.2, 0.11, side * 0.3) * cavity, scene.number(45, 55) + gain * 70)
    bowel = ((scene.texture(9)) * 5).clamp(0, 1) * scene.cover(scene.level(-0.25, side * 0.18, 0.3, 0.45), 0.3)
    ct.paint(bowel * cavity, scene.number(20, 50))
    gas = ((scene.texture(12) - 0.9) * 5).clamp(0, 1) * scene.cover(scene.level(-0.3, side * 0.15, 0.22, 0.4), 0.22)
    ct.paint(gas * cavity, -850.0)
    spine_y, size = scene.number(0.24, 0.3, 0.03), scene.number(0.1, 0.13, 0.02)
    for edge in (-1, 1):
        ct.paint(scene.ellipse(0.42, edge * 0.18, 0.1, 0.14), 55.0)
        ct.paint(
            scene.ellipse(scene.number(0.12, 0.2), edge * scene.number(0.32, 0.4, 0.02), 0.15, 0.1, edge * 0.3) * cavity, 35 + gain * 130
        )
    _spine_ct(scene, ct, spine_y, size)
    ct.paint(scene.ellipse(spine_y - 1.6 * size, 0.05, 0.05, 0.05), 42 + gain * 160)
    for edge in (-1, 1):
        for angle in (0.1, 0.5, 0.9):
            y, x = 0.84 * height * math.sin(angle), edge * 0.84 * width * math.cos(angle)
            ct.paint(scene.ellipse(y, x, 0.026, scene.number(0.05, 0.1), edge * (angle + math.pi / 2)), scene.number(400, 800))
    if scene.chance(0.4):
        ct.paint(scene.spot(0.3, 0.5, 0.03, 0.08) * cavity, scene.number(0, 25))
    return ct.hu


def pelvis_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial pelvis: two dense hips, sacrum, bladder, rectum with gas, muscles."""
    ct = _Ct(scene)
    wall, height, _ = _trunk(scene, ct, 0.52, 0.64)
    ct.paint(scene.cover(wall, height, 0.72), -90 + 10 * scene.texture(12))
    for side in (-1, 1):
        for _ in range(3):
            y, x = scene.number(-0.3, 0.35), side * scene.number(0.3, 0.65)
            ct.paint(scene.ellipse(y, x, 0.12, 0.16, side * 0.5) * scene.cover(wall, height, 0.95), 55.0)
        x, y, size = side * scene.number(0.46, 0.54, 0.03), scene.number(-0.06, 0.06, 0.03), scene.number(0.13, 0.17, 0.03)
        ct.paint(scene.ellipse(y, x - side * 0.13, size * 1.5, 0.06, side * 0.25), scene.number(800, 1200))
        ct.paint(scene.ellipse(y, x, size, size), scene.number(900, 1300))
        ct.paint(scene.ellipse(y, x, size * 0.84, size * 0.84), scene.number(350, 650) + 60 * scene.texture(24))
        if scene.chance(0.6):
            ct.paint(scene.ellipse(y + 0.04, x + side * 0.2, 0.09, 0.07), scene.number(500, 800))
    ct.paint(scene.ellipse(0.33, 0, 0.07, scene.number(0.14, 0.24)), scene.number(350, 600))
    ct.paint(scene.ellipse(scene.number(-0.16, -0.06), 0, scene.number(0.1, 0.17), scene.number(0.14, 0.24)), 130.0 if enhanced else 6.0)
    ct.paint(scene.ellipse(0.17, scene.number(-0.03, 0.03), 0.08, 0.09), 40.0)
    if scene.chance(0.6):
        ct.paint(scene.ellipse(0.15, 0, 0.04, 0.05), -800.0)
    for side in (-1, 1):
        ct.paint(scene.ellipse(-0.3, side * 0.25, 0.03, 0.03), 180.0 if enhanced else 45.0)
    return ct.hu


def add_table(scene: Scene, hu: Tensor) -> Tensor:
    """The slices with a curved patient table under the body."""
    base = uniform(scene.generator, 0.74, 0.84) - 0.12 * scene.x.square()
    for offset, value in ((0.0, -150.0), (0.09, -450.0)):
        line = scene.cover((scene.y - base - offset).abs() / 0.014, 0.014) * (scene.x.abs() < 0.72)
        hu = torch.maximum(hu, -1000 + (value + 1000) * line)
    return hu


def add_dense_spots(scene: Scene, hu: Tensor, count: int) -> Tensor:
    """The slices with calcifications or oral contrast: dense, but without streaks."""
    for _ in range(count):
        cover = scene.spot(0.35, 0.45, 0.012, 0.04) * (hu > -200)
        hu = torch.lerp(hu, scene.number(350, 1000), cover)
    return hu


CT_BODIES: dict[str, Callable[[Scene, bool], Tensor]] = {
    "head": head_ct,
    "thorax": thorax_ct,
    "abdomen": abdomen_ct,
    "pelvis": pelvis_ct,
}
MR_BODIES: dict[str, Callable[[Scene, str], MrAnatomy]] = {"brain": brain_mr, "abdomen": abdomen_mr, "legs": legs_mr}
FIELD_OF_VIEW_MM = {"head": 250.0, "brain": 240.0, "thorax": 400.0, "abdomen": 400.0, "pelvis": 400.0, "legs": 380.0}
