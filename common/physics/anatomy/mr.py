"""Bodies in MR: signal and fat share of a few adjacent slices of one invented patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics.acquisition import uniform
from common.physics.anatomy.scene import Scene, union

INVENTED = ("ANY", "ANY_EPI")
"""Contrasts drawn anew for every patient; in the second fat is dark."""

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
    "EPI": {  # T2*-weighted echo-planar, fat suppressed
        "fat": 0.07,
        "skin": 0.06,
        "muscle": 0.12,
        "bone": 0.01,
        "marrow": 0.05,
        "white": 0.45,
        "grey": 0.6,
        "fluid": 1.0,
        "organ": 0.3,
        "organ2": 0.45,
        "vessel": 0.05,
        "lesion": 0.85,
        "gas": 0.0,
    },
    "DWI": {  # diffusion-weighted echo-planar, fat suppressed
        "fat": 0.07,
        "skin": 0.06,
        "muscle": 0.13,
        "bone": 0.01,
        "marrow": 0.05,
        "white": 0.62,
        "grey": 0.72,
        "fluid": 0.12,
        "organ": 0.3,
        "organ2": 0.55,
        "vessel": 0.04,
        "lesion": 1.0,
        "gas": 0.0,
    },
    "GRE": {  # T1-weighted spoiled gradient echo, blood bright
        "fat": 0.7,
        "skin": 0.4,
        "muscle": 0.42,
        "bone": 0.03,
        "marrow": 0.45,
        "white": 0.66,
        "grey": 0.52,
        "fluid": 0.15,
        "organ": 0.6,
        "organ2": 0.55,
        "vessel": 0.95,
        "lesion": 0.35,
        "gas": 0.0,
    },
}


@dataclass(frozen=True, kw_only=True)
class MrAnatomy:
    signal: Tensor
    """(slices, size, size), 0..about 1."""
    fat: Tensor
    """Share of the signal that is fat, 0..1."""


def _invented(scene: Scene) -> dict[str, float]:
    """A contrast no protocol has: any signal for any tissue, so that no order of tissues can be learned (Billot et al., MedIA 2023)."""
    table = {name: uniform(scene.generator, 0.05, 1.0) for name in CONTRASTS["T1"]}
    return table | {"gas": 0.0, "bone": 0.2 * table["bone"], "fat": max(table["fat"], 0.3)}


class _Mr:
    """Signal and fat, painted tissue by tissue."""

    def __init__(self, scene: Scene, contrast: str) -> None:
        self.scene = scene
        self.table = _invented(scene) if contrast in INVENTED else CONTRASTS[contrast]
        self.table = {name: value * uniform(scene.generator, 0.88, 1.12) for name, value in self.table.items()}
        if contrast == "ANY_EPI":
            self.table |= {name: 0.08 * self.table[name] for name in ("fat", "marrow", "skin", "bone")}
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


def _surface(scene: Scene, mr: _Mr, distance: Tensor, fat: float, inside: str = "muscle") -> Tensor:
    """Skin, a fat layer of uneven thickness and what lies inside it; the distance outside of that."""
    inner = distance + 0.02 + fat * (1 + 0.25 * scene.texture(5))
    mr.paint(scene.solid(distance), "skin")
    mr.paint(scene.solid(distance + 0.016), "fat")
    mr.paint(scene.solid(inner), inside)
    return inner


def _cortex(scene: Scene, mr: _Mr, depth: Tensor, radius: float, cells: int = 26, region: Tensor | float = 1.0) -> None:
    """Cerebrum, from depth 0 (centre) to 1 (surface): white matter, a grey ribbon along the surface and along sulci filled with fluid."""
    bank = scene.texture(cells).abs()
    rough = depth + 0.025 * scene.texture(cells) + 0.05 * (0.4 - bank).clamp(min=0)
    mr.paint(region * scene.cover(depth, radius), "fluid")
    mr.paint(region * scene.cover(rough, radius), "grey")
    near = ((depth - 0.35) * 3).clamp(0, 1)
    white = ((bank - 0.5 * near) * 3 + 0.5).clamp(0, 1) * scene.cover(rough + 0.06 * scene.texture(cells // 2), radius, 0.88)
    mr.paint(region * white, "white")
    width = uniform(scene.generator, 0.08, 0.22)
    sulci = ((width - bank) * 6).clamp(0, 1) * ((depth - uniform(scene.generator, 0.5, 0.7)) * 6).clamp(0, 1)
    mr.paint(region * sulci * scene.cover(depth, radius), "fluid")


def _cerebellum(scene: Scene, mr: _Mr, depth: Tensor, radius: float, region: Tensor | float = 1.0) -> None:
    """Cerebellum, from depth 0 (centre) to 1 (surface): grey leaves parallel to the surface, branching white matter."""
    mr.paint(region * scene.cover(depth, radius), "grey")
    tree = ((0.72 - depth + 0.25 * scene.texture(22)) * 3).clamp(0, 1)
    mr.paint(region * tree * 0.9, "white")
    leaves = torch.sin(36 * depth * radius / 0.25 + 3 * scene.texture(18)) * (0.6 + 0.5 * scene.texture(20)) - 0.3
    mr.paint(region * leaves.clamp(0, 0.35) * scene.cover(depth, radius, 0.98) * ((depth - 0.4) * 3).clamp(0, 1), "fluid")


def _scaled(scene: Scene, round_: Tensor, high: Tensor, wide: Tensor, power: float = 2.0) -> Tensor:
    """The outline `round_` (a star of radius about 1) stretched to these half-axes; above power 2 its corners fill."""
    square = ((scene.y / high).abs() ** power + (scene.x / wide).abs() ** power) ** (1 / power)
    return square * round_ / torch.sqrt(scene.y**2 + scene.x**2).clamp(min=1e-3)


BRAIN_LEVELS = ("vertex", "convexity", "middle", "middle", "low", "posterior_fossa", "foramen")


def brain_only_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial brain without a bright scalp, as echo-planar images show it, from the vertex down to the foramen magnum."""
    mr = _Mr(scene, contrast)
    rim = uniform(scene.generator, 0.0, 1.0)
    for tissue in ("fat", "marrow", "skin", "muscle"):
        mr.table[tissue] = min(mr.table[tissue], 0.14) * rim
    level = BRAIN_LEVELS[int(uniform(scene.generator, 0, len(BRAIN_LEVELS)))]
    height, width = scene.number(0.66, 0.78, 0.03), scene.number(0.52, 0.62, 0.03)
    if level in ("vertex", "foramen"):
        shrunk = scene.number(0.35, 0.7, 0.15) if level == "vertex" else scene.number(0.75, 0.9, 0.03)
        height, width = height * shrunk, width * shrunk
    head = _scaled(scene, scene.star(0, 0, (1.0,) * 9, jitter=0.02), height * 1.16 + 0.04, width * 1.18 + 0.05)
    mr.paint(scene.cover(head, 0.6), "skin")
    mr.paint(scene.cover(head, 0.6, 0.97), "fat")
    mr.paint(scene.cover(head, 0.6, 0.93 + 0.01 * scene.texture(6)), "bone")
    wobble = 0.03 * scene.texture(6)
    if level in ("posterior_fossa", "foramen"):
        _faint_face(scene, mr, height, width)
        _posterior_fossa(scene, mr, level == "foramen")
    else:
        round_ = scene.star(0, 0, (1.0, 1.0, 0.98, 1.0, 1.0, 1.0, 1.0, 0.97, 0.93, 0.97, 1.0, 1.0), jitter=0.025)
        depth = _scaled(scene, round_, height, width) + wobble
        if level == "low":
            depth = depth + _notches(scene, height)
        _cortex(scene, mr, depth, 0.55, cells=int(uniform(scene.generator, 23, 32)))
        inside = scene.cover(depth, 0.55, 0.98)
        fissure = scene.cover((scene.x + 0.02 * wobble).abs() / 0.014, 0.014)
        if level != "low":
            mr.paint(fissure * inside * ((scene.y.abs() / height - scene.number(0.1, 0.5)) * 8).clamp(0, 1), "fluid")
        if level == "middle":
            _ventricles(scene, mr)
        if level == "low":
            _skull_floor(scene, mr, height, width)
    for _ in range(int(uniform(scene.generator, 0, 2.5))):
        mr.paint(scene.spot(0.3, 0.25, 0.015, 0.05) * (mr.signal > 0.3), "lesion")
    return mr.done()


def _ventricles(scene: Scene, mr: _Mr) -> None:
    """Lateral ventricles with thalami and basal ganglia beside them, or the bodies of the ventricles above those."""
    swell = scene.number(0.7, 1.4)
    if scene.chance(0.4):
        for side in (-1, 1):
            mr.paint(scene.ellipse(0, side * 0.085, 0.27 * swell, 0.03 * swell, side * 0.12), "fluid")
        return
    for side in (-1, 1):
        tilt = side * uniform(scene.generator, 0.3, 0.5)
        mr.paint(scene.ellipse(-0.05, side * 0.21, 0.13, 0.055, tilt), "grey")
        mr.paint(scene.ellipse(0.09, side * 0.09, 0.09, 0.065, tilt), "grey")
        mr.paint(scene.ellipse(-0.16, side * 0.08, 0.11 * swell, 0.03 * swell, tilt), "fluid")
        mr.paint(scene.ellipse(0.23, side * 0.15, 0.12 * swell, 0.035 * swell, -tilt), "fluid")
        mr.paint(scene.ellipse(-0.06, side * 0.4, 0.1, 0.016, side * 0.3), "fluid")
    mr.paint(scene.ellipse(0.08, 0, 0.09, 0.014 * swell), "fluid")


def _notches(scene: Scene, height: Tensor) -> Tensor:
    """What to add to the depth to part the frontal from the temporal lobes and to narrow the frontal ones."""
    cut = torch.zeros_like(scene.y)
    for side in (-1, 1):
        notch = scene.segment(-0.36, side * 0.8, -0.24, side * 0.36, 0.0) + 0.02 * scene.texture(12)
        cut = cut + 0.6 * torch.exp(-((notch.clamp(min=0) / 0.035) ** 2))
        cut = cut + 0.35 * torch.exp(-(scene.level(-0.8 * height, side * 0.52, 0.3, 0.16) ** 2))
    return cut


def _skull_floor(scene: Scene, mr: _Mr, height: Tensor, width: Tensor) -> None:
    """Where the temporal lobes are: notches beside them, midbrain in its cistern, a dark floor in front, sometimes bright eyes."""
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(0.18, side * 0.12, 0.26, side * 0.26, 0.012)), "fluid")
    mr.paint(scene.cover(scene.star(0.02, 0, (0.17, 0.12, 0.14, 0.16, 0.14, 0.12), jitter=0.1), 0.13), "fluid")
    mr.paint(scene.cover(scene.star(0.07, 0, (0.1, 0.11, 0.07, 0.11, 0.1, 0.1, 0.05, 0.1), jitter=0.05), 0.09), "white")
    mr.paint(scene.ellipse(0.12, 0, 0.016, 0.016), "fluid")
    if scene.chance(0.6):
        floor = scene.cover(scene.star(-0.62 * height, 0, (0.2, 0.2, 0.16, 0.2, 0.2, 0.2), jitter=0.25), 0.18)
        mr.paint(floor, "gas")
    if scene.chance(0.6):
        for side in (-1, 1):
            mr.paint(scene.ellipse(-0.98 * height, side * 0.5 * width, 0.16, 0.16), "bone")
            mr.paint(scene.ellipse(-1.0 * height, side * 0.5 * width, 0.115, 0.11), "fluid")
            mr.paint(scene.solid(scene.segment(-0.58, side * 0.26, -0.4, side * 0.15, 0.02)), "muscle")


def _faint_face(scene: Scene, mr: _Mr, height: Tensor, width: Tensor) -> None:
    """What fat suppression leaves of a face: faint muscle and mucosa around air."""
    face = scene.solid(scene.level(-0.35, 0, 0.5, width * 0.95) - 1)
    mr.paint(face * ((scene.texture(18) - 0.2) * 2).clamp(0, 1), "muscle")
    for side in (-1, 1):
        mr.paint(scene.ellipse(-0.4, side * 0.2, scene.number(0.12, 0.18), 0.1), "gas")
    mr.paint(face * scene.lines(20, 0.15) * (scene.y < -0.2) * 0.4, "fluid")


def _posterior_fossa(scene: Scene, mr: _Mr, foramen: bool) -> None:
    """Cerebellum and pons with temporal poles, or the medulla with the tonsils, or just the cord in its fluid."""
    if foramen and scene.chance(0.5):
        mr.paint(scene.ellipse(0.2, 0, 0.15, 0.17), "fluid")
        mr.paint(scene.ellipse(0.2, 0, 0.08, 0.1), "white")
        return
    size = scene.number(0.55, 0.75) if foramen else scene.number(0.85, 1.0)
    radii = (0.5, 0.5, 0.42, 0.3, 0.42, 0.5, 0.5, 0.42, 0.3, 0.3, 0.3, 0.42)
    depth = scene.star(0.3, 0, radii, size, jitter=0.06) + 0.02 * scene.texture(14)
    mr.paint(scene.cover(depth, 0.4, 1.03), "fluid")
    _cerebellum(scene, mr, depth, 0.4)
    mr.paint(scene.solid(scene.segment(0.42, 0, 0.7, 0, 0.012)), "fluid")
    stem = scene.star(0.06, 0, (0.17, 0.15, 0.13, 0.15, 0.17, 0.16, 0.14, 0.16), size)
    mr.paint(scene.cover(stem + 0.06 * scene.texture(16), 0.14, 1.1), "fluid")
    mr.paint(scene.cover(stem, 0.14), "white")
    mr.paint(scene.ellipse(0.2, 0, scene.number(0.025, 0.05), scene.number(0.05, 0.1)), "fluid")
    if not foramen:
        for side in (-1, 1):
            pole = scene.star(-0.18, side * 0.36, (0.18, 0.2, 0.16, 0.2, 0.18, 0.2, 0.22, 0.2), scene.number(0.75, 1.1), jitter=0.14)
            _cortex(scene, mr, pole, 0.18, cells=24)


def skull_base_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial head below the cerebrum: eyes or maxillary sinuses or teeth in front, temporal lobes, cerebellum or neck behind."""
    mr = _Mr(scene, contrast)
    scene.shrink(0.95)
    level = ("orbits", "sinuses", "sinuses", "mouth")[int(uniform(scene.generator, 0, 4))]
    radii = (0.72, 0.74, 0.8, 0.86, 0.88, 0.86, 0.8, 0.74, 0.72, 0.73, 0.78, 0.84, 0.9, 0.84, 0.78, 0.73)
    head = (scene.star(0, 0, radii, scene.number(0.95, 1.05), jitter=0.015) - 1) * 0.75
    tip = scene.number(-0.98, -0.9, 0.02)
    nose = union(scene.level(tip + 0.16, 0, 0.17, 0.15) * 0.13 - 0.13, head, softness=0.04)
    for side in (-1, 1):
        ear = (scene.level(0.1, side * 0.78, 0.14, 0.045, -side * 0.4) - 1) * 0.045
        nose = union(nose, ear, softness=0.015)
    _surface(scene, mr, nose, uniform(scene.generator, 0.05, 0.1))
    inside = scene.solid(nose + 0.1)
    mr.paint(inside * scene.lines(18, 0.16), "fat")
    mr.paint(scene.cover(scene.star(-0.35, 0, (0.5, 0.4, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5), jitter=0.08), 0.4), "fat")
    for side in (-1, 1):
        muscle = scene.star(-0.22, side * 0.56, (0.09, 0.2, 0.3, 0.2, 0.09, 0.2, 0.3, 0.2), scene.number(0.8, 1.0), jitter=0.1)
        mr.paint(scene.cover(muscle, 0.1), "muscle")
        mr.paint(scene.cover(muscle, 0.1) * scene.lines(28, 0.1) * 0.6, "fat")
    if level == "orbits":
        _orbits(scene, mr)
    elif level == "sinuses":
        _sinuses(scene, mr)
    else:
        _mouth(scene, mr)
    if level == "mouth":
        _neck(scene, mr)
    else:
        _fossa(scene, mr, nose, temporal=level == "orbits")
    return mr.done()


def _orbits(scene: Scene, mr: _Mr) -> None:
    """Eyes in cones of fat with optic nerves and muscles; ethmoid cells between them."""
    for side in (-1, 1):
        cone = union(scene.segment(-0.66, side * 0.36, -0.2, side * 0.14, 0.1), (scene.level(-0.6, side * 0.36, 0.2, 0.2) - 1) * 0.2)
        mr.paint(scene.solid(cone - 0.02), "bone")
        mr.paint(scene.solid(cone), "fat")
        for shift in (-0.12, 0.12):
            mr.paint(scene.solid(scene.segment(-0.6, side * 0.36 + 1.3 * shift, -0.22, side * 0.15 + 0.3 * shift, 0.018)), "muscle")
        mr.paint(scene.solid(scene.segment(-0.55, side * 0.35, -0.18, side * 0.13, 0.018)), "white")
        mr.paint(scene.ellipse(-0.66, side * 0.37, 0.135, 0.13), "skin")
        mr.paint(scene.ellipse(-0.66, side * 0.37, 0.12, 0.115), "fluid")
        mr.paint(scene.ellipse(-0.75, side * 0.37, 0.02, 0.05), "organ2")
    cells = scene.star(-0.45, 0, (0.12, 0.13, 0.25, 0.13, 0.12, 0.13, 0.28, 0.13), jitter=0.06)
    mr.paint(scene.cover(cells, 0.12), "organ2")
    mr.paint(scene.cover(cells, 0.12, 0.92) * ((scene.texture(18).abs() - 0.25) * 5).clamp(0, 1), "gas")


def _sinuses(scene: Scene, mr: _Mr) -> None:
    """Maxillary sinuses and a nasal cavity full of air with its septum and turbinates; pterygoid muscles, sphenoid sinus."""
    for side in (-1, 1):
        sinus = scene.star(-0.47, side * 0.34, (0.17, 0.2, 0.24, 0.2, 0.17, 0.2, 0.2, 0.2), scene.number(0.65, 1.05), jitter=0.16)
        mr.paint(scene.cover(sinus, 0.18, 1.12), "bone")
        mr.paint(scene.cover(sinus, 0.18), "fluid" if scene.chance(0.2) else "organ2")
        mr.paint(scene.cover(sinus, 0.18, 0.92), "gas")
        ptery = scene.star(-0.12, side * 0.34, (0.1, 0.13, 0.16, 0.13, 0.1, 0.13, 0.16, 0.13), jitter=0.12)
        mr.paint(scene.cover(ptery, 0.1), "muscle")
        mr.paint(scene.solid(scene.segment(-0.05, side * 0.58, 0.05, side * 0.53, 0.05)), "bone")
        mr.paint(scene.solid(scene.segment(-0.05, side * 0.58, 0.05, side * 0.53, 0.028)), "marrow")
    nasal = scene.star(-0.5, 0, (0.13, 0.18, 0.34, 0.18, 0.13, 0.18, 0.3, 0.18), jitter=0.12)
    mr.paint(scene.cover(nasal, 0.13, 1.1), "bone")
    mr.paint(scene.cover(nasal, 0.13), "gas")
    mr.paint(scene.solid(scene.segment(-0.8, 0, -0.22, uniform(scene.generator, -0.02, 0.02), 0.013)), "organ2")
    for side in (-1, 1):
        mr.paint(scene.cover(scene.star(-0.47, side * 0.08, (0.03, 0.08, 0.16, 0.08, 0.03, 0.08, 0.16, 0.08), jitter=0.2), 0.04), "organ2")
    mr.paint(scene.ellipse(-0.16, 0, 0.06, scene.number(0.1, 0.16)), "gas" if scene.chance(0.6) else "organ2")


def _mouth(scene: Scene, mr: _Mr) -> None:
    """Tongue inside a dark arch of teeth and jaw, cheeks, masseters, rami with marrow, airway, parotid glands."""
    arch = (scene.star(-0.4, 0, (0.42, 0.44, 0.4, 0.36, 0.4, 0.44, 0.42, 0.42, 0.4, 0.38, 0.4, 0.42), jitter=0.02) - 1).abs() * 0.4
    arch = scene.solid(arch - 0.05) * (scene.y < -0.3)
    mr.paint(arch, "marrow" if scene.chance(0.5) else "bone")
    angle = torch.atan2(scene.y + 0.4, scene.x)
    mr.paint(arch * (torch.sin(20 * angle + 2 * scene.texture(8)) * 2 + 0.4).clamp(0, 1), "bone")
    tongue = scene.star(-0.38, 0, (0.3, 0.32, 0.26, 0.32, 0.3, 0.3, 0.33, 0.3), jitter=0.03)
    mr.paint(scene.cover(tongue, 0.3), "muscle")
    mr.paint(scene.cover(tongue, 0.3) * scene.lines(26, 0.14) * 0.5, "fat")
    mr.paint(scene.solid(scene.segment(-0.6, 0, -0.25, 0, 0.01)), "fat")
    mr.paint(scene.ellipse(-0.08, scene.number(-0.03, 0.03), scene.number(0.03, 0.06), scene.number(0.06, 0.13)), "gas")
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(-0.28, side * 0.47, -0.05, side * 0.53, 0.05)), "bone")
        mr.paint(scene.solid(scene.segment(-0.28, side * 0.47, -0.05, side * 0.53, 0.025)), "marrow")
        parotid = scene.star(0.02, side * 0.56, (0.1, 0.14, 0.14, 0.14, 0.1, 0.14, 0.14, 0.14), jitter=0.12)
        mr.paint(scene.cover(parotid, 0.1) * (0.5 + 0.2 * scene.texture(16)).clamp(0, 1), "organ")


def _neck(scene: Scene, mr: _Mr) -> None:
    """A high vertebra with the cord, vessels beside it and layered muscles behind."""
    mr.paint(scene.cover(scene.star(0.12, 0, (0.2, 0.14, 0.1, 0.14, 0.2, 0.14, 0.12, 0.14), jitter=0.06), 0.12), "bone")
    mr.paint(scene.cover(scene.star(0.12, 0, (0.17, 0.11, 0.07, 0.11, 0.17, 0.11, 0.09, 0.11), jitter=0.06), 0.1), "marrow")
    mr.paint(scene.ellipse(0.31, 0, 0.11, 0.14), "bone")
    mr.paint(scene.ellipse(0.31, 0, 0.095, 0.12), "fluid")
    mr.paint(scene.ellipse(0.31, 0, 0.055, 0.075), "white")
    for side in (-1, 1):
        mr.paint(scene.ellipse(0.02, side * 0.33, 0.045, 0.045), "vessel")
        mr.paint(scene.ellipse(0.12, side * 0.38, 0.055, 0.05), "vessel" if scene.chance(0.6) else "fluid")
        for y, x, high, wide, tilt in ((0.42, 0.3, 0.1, 0.2, 0.6), (0.58, 0.18, 0.07, 0.2, 0.3), (0.28, 0.52, 0.16, 0.08, -0.4)):
            level = scene.level(y, side * x, high, wide, side * tilt)
            mr.paint(scene.cover(level, high, 1.15), "fat")
            mr.paint(scene.cover(level, high), "muscle")
    mr.paint(scene.solid(scene.segment(0.5, 0, 0.8, 0, 0.015)), "fat")


def _fossa(scene: Scene, mr: _Mr, head: Tensor, temporal: bool) -> None:
    """The posterior fossa in its bone: cerebellum and brainstem; clivus, petrous bones with air cells, temporal lobes."""
    size = scene.number(0.9, 1.02)
    cavity = scene.star(0.33, 0, (0.55, 0.52, 0.46, 0.43, 0.46, 0.52, 0.55, 0.46, 0.36, 0.32, 0.36, 0.46), size, jitter=0.025)
    shell = union((cavity - 1) * 0.45, (scene.level(0.14, 0, 0.15, 0.58) - 1) * 0.2, softness=0.05)
    mr.paint(scene.solid(torch.maximum(shell - 0.06, head + 0.09)), "bone")
    rough = torch.maximum(shell - 0.035, head + 0.11)
    mr.paint(scene.solid(rough) * ((scene.texture(22) + 0.3) * 2).clamp(0, 1) * 0.7, "marrow")
    for side in (-1, 1):
        if temporal:
            lobe = scene.star(-0.1, side * 0.42, (0.2, 0.24, 0.2, 0.22, 0.2, 0.24, 0.24, 0.24), scene.number(0.9, 1.1), jitter=0.04)
            mr.paint(scene.cover(lobe, 0.2, 1.12), "bone")
            _cortex(scene, mr, lobe, 0.2, cells=26)
        cells = scene.solid(scene.level(0.22, side * 0.55, 0.13, 0.1) - 1) * ((scene.texture(20).abs() - 0.3) * 4).clamp(0, 1)
        mr.paint(cells, "gas")
        mr.paint(scene.solid(scene.segment(0.12, side * 0.72, 0.14, side * 0.5, 0.025)), "gas")
        mr.paint(scene.ellipse(0.02, side * 0.22, 0.035, 0.05), "vessel")
    clivus = scene.star(-0.02, 0, (0.16, 0.09, 0.07, 0.09, 0.16, 0.09, 0.08, 0.09), jitter=0.08)
    mr.paint(scene.cover(clivus, 0.08, 1.15), "bone")
    mr.paint(scene.cover(clivus, 0.08), "marrow")
    mr.paint(scene.cover(cavity, 0.45), "fluid")
    depth = torch.maximum(cavity / 0.94, scene.star(0.36, 0, (0.52, 0.5, 0.5, 0.44, 0.5, 0.5, 0.52, 0.4, 0.3, 0.26, 0.3, 0.4), size))
    _cerebellum(scene, mr, depth, 0.42)
    mr.paint(scene.solid(scene.segment(0.55, 0, 0.8, 0, 0.014)), "fluid")
    stem = scene.star(0.14, 0, (0.15, 0.13, 0.12, 0.13, 0.15, 0.14, 0.12, 0.14), scene.number(0.7, 1.1))
    mr.paint(scene.cover(stem, 0.13, 1.15), "fluid")
    mr.paint(scene.cover(stem, 0.13), "white")
    mr.paint(scene.ellipse(0.3, 0, scene.number(0.03, 0.05), scene.number(0.05, 0.1)), "fluid")
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(0.16, side * 0.16, 0.13, side * 0.36, 0.014)), "fluid")
        if scene.chance(0.5):
            mr.paint(scene.ellipse(0.3, side * 0.6, 0.05, 0.04), "vessel")


def head_sagittal_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """A sagittal head and neck, in or beside the midline: cerebrum, cerebellum, brainstem and cord, face with airways, vertebrae."""
    mr = _Mr(scene, contrast)
    if scene.chance(0.25):
        scene.mirror()
    midline = scene.chance(0.6)
    small = scene.number(0.95, 1.03) if midline else scene.number(0.82, 0.98)
    cranium = (scene.star(-0.3, 0.1, (0.74, 0.74, 0.7, 0.6, 0.6, 0.68, 0.73, 0.7, 0.62, 0.61, 0.65, 0.71), small, jitter=0.012) - 1) * 0.6
    parts = [
        cranium,
        scene.segment(-0.05, -0.34, 0.45, -0.36, 0.26),
        scene.segment(0.5, -0.45, 0.58, -0.1, 0.2),
        scene.segment(0.2, 0.14, 1.7, 0.22, scene.number(0.34, 0.4, 0.03)),
    ]
    if midline:
        tip = uniform(scene.generator, 0.16, 0.24)
        parts += [
            scene.segment(-0.06, -0.6, tip, -0.8, 0.035),
            scene.segment(tip, -0.78, tip + 0.04, -0.62, 0.05),
            scene.segment(0.36, -0.64, 0.37, -0.55, 0.06),
            scene.segment(0.47, -0.63, 0.48, -0.55, 0.055),
            scene.segment(0.64, -0.58, 0.67, -0.5, 0.1),
        ]
    outline = union(*parts, softness=0.035)
    _surface(scene, mr, outline, uniform(scene.generator, 0.035, 0.075))
    inside = scene.solid(outline + 0.09)
    mr.paint(inside * scene.lines(16, 0.16), "fat")
    mr.paint(inside * scene.lines(26, 0.1) * 0.6, "fat")
    cerebrum = scene.star(-0.32, 0.1, (0.6, 0.5, 0.38, 0.34, 0.38, 0.48, 0.6, 0.6, 0.52, 0.51, 0.55, 0.6), small, jitter=0.02)
    cerebellum = scene.star(0.06, 0.37, (0.24, 0.22, 0.18, 0.2, 0.24, 0.22, 0.19, 0.22), small, jitter=0.04) + 0.03 * scene.texture(12)
    cavity = union((cerebrum - 1) * 0.45, (cerebellum - 1) * 0.18, softness=0.03)
    if midline:
        cavity = union(cavity, scene.segment(-0.05, 0.12, 0.28, 0.2, 0.1), softness=0.03)
        _face_midline(scene, mr)
        _neck_sagittal(scene, mr)
    else:
        _face_lateral(scene, mr)
    bone = scene.number(0.05, 0.08, 0.03)
    mr.paint(scene.solid(torch.maximum(cavity - bone, outline + 0.06)), "bone")
    diploe = scene.solid((cavity - 0.5 * bone).abs() - 0.2 * bone + 0.008 * scene.texture(9))
    mr.paint(diploe, "marrow")
    mr.paint(scene.solid(cavity), "fluid")
    _cortex(scene, mr, cerebrum, 0.45, cells=int(uniform(scene.generator, 27, 36)))
    gap = scene.solid(cerebellum * 0.18 - 0.19)
    mr.paint(gap * scene.solid(cavity), "fluid")
    _cerebellum(scene, mr, cerebellum, 0.19)
    if midline:
        _brainstem(scene, mr)
    else:
        mr.paint(scene.solid(scene.segment(-0.1, -0.28, -0.26, 0.25, 0.008) + 0.025 * scene.texture(16)), "fluid")
        mr.paint(scene.ellipse(-0.2, 0.2, scene.number(0.02, 0.05), scene.number(0.08, 0.16), 0.4), "fluid")
    return mr.done()


def _brainstem(scene: Scene, mr: _Mr) -> None:
    """What lies in the midline: callosal arch over a ventricle, thalamus, pons, medulla, cord."""
    arch = scene.level(-0.2, 0.08, 0.16, 0.3)
    above = scene.solid(scene.y + 0.17 - 0.2 * (scene.x - 0.08), 0.03)
    mr.paint(scene.cover(arch, 0.2) * above, "fluid" if scene.chance(0.7) else "grey")
    mr.paint(scene.solid((arch - 1).abs() * 0.2 - 0.03) * above, "white")
    mr.paint(scene.ellipse(-0.17, 0.1, 0.1, 0.17), "grey")
    mr.paint(scene.solid(scene.segment(-0.05, 0.06, 0.3, 0.19, 0.1)), "fluid")
    mr.paint(scene.cover(scene.star(0.02, 0.13, (0.07, 0.1, 0.13, 0.11, 0.11, 0.11, 0.12, 0.1), jitter=0.05), 0.09), "white")
    mr.paint(scene.solid(scene.segment(-0.12, 0.12, 0.05, 0.15, 0.07)), "white")
    mr.paint(scene.solid(scene.segment(0.08, 0.16, 0.32, 0.21, 0.05)), "white")
    mr.paint(scene.solid(scene.segment(0.0, 0.23, 0.1, 0.24, 0.018)), "fluid")


def _face_midline(scene: Scene, mr: _Mr) -> None:
    """Frontal and sphenoid sinus, nasal cavity, palate, tongue, jaw, clivus and the airway down to the larynx."""
    mr.paint(scene.solid(union(scene.segment(0.05, -0.55, 0.2, -0.6, 0.06), scene.segment(0.1, -0.5, 0.18, -0.1, 0.1))), "gas")
    if scene.chance(0.6):
        mr.paint(scene.solid(scene.segment(0.04, -0.5, 0.06, -0.2, 0.03)), "organ2")
        mr.paint(scene.solid(scene.segment(0.16, -0.52, 0.17, -0.2, 0.045)), "organ2")
    mr.paint(scene.solid(scene.segment(0.28, -0.55, 0.28, -0.2, 0.025)), "bone")
    mr.paint(scene.solid(scene.segment(0.29, -0.2, 0.38, -0.08, 0.03)), "muscle")
    mr.paint(scene.solid(scene.segment(0.33, -0.58, 0.45, -0.59, 0.03)), "bone")
    tongue = scene.star(0.46, -0.35, (0.2, 0.19, 0.14, 0.18, 0.2, 0.19, 0.15, 0.18), scene.number(0.9, 1.05), jitter=0.03)
    mr.paint(scene.cover(tongue, 0.15), "muscle")
    fan = torch.sin(14 * torch.atan2(scene.y - 0.66, scene.x + 0.46) + 1.5 * scene.texture(12))
    mr.paint(scene.cover(tongue, 0.15) * (fan - 0.4).clamp(0, 0.35), "fat")
    mr.paint(scene.solid(scene.segment(0.58, -0.56, 0.68, -0.52, 0.065)), "bone")
    mr.paint(scene.solid(scene.segment(0.59, -0.56, 0.67, -0.52, 0.04)), "marrow")
    airway = union(
        scene.segment(0.16, -0.1, 0.35, -0.07, 0.045),
        scene.segment(0.38, -0.06, 0.75, -0.05, 0.035),
        scene.segment(0.75, -0.06, 1.4, -0.02, 0.06),
    )
    mr.paint(scene.solid(airway - 0.02), "organ2")
    mr.paint(scene.solid(airway), "gas")
    mr.paint(scene.solid(scene.segment(0.5, -0.13, 0.62, -0.05, 0.018)), "organ2")
    mr.paint(scene.solid(scene.segment(0.02, -0.08, 0.24, 0.08, 0.06)), "marrow")
    mr.paint(scene.ellipse(-0.0, -0.12, 0.07, 0.09), "gas" if scene.chance(0.7) else "organ2")
    mr.paint(scene.ellipse(-0.14, -0.53, 0.09, 0.03, -0.25), "gas" if scene.chance(0.6) else "fat")


def _neck_sagittal(scene: Scene, mr: _Mr) -> None:
    """Cervical vertebrae with discs, cord in its fluid, spinous processes among fat and muscle."""
    bend = uniform(scene.generator, -0.06, 0.06)
    pitch = scene.number(0.135, 0.155, 0.0)
    place = (scene.y - 0.34) / pitch
    step = place - place.floor() - 0.5
    axis = 0.08 + bend * (scene.y - 0.3) * 2
    along = scene.x - axis
    below = scene.solid(0.32 - scene.y)
    column = scene.solid(along.abs() - 0.09) * below
    mr.paint(column, "bone")
    body = ((along / 0.075) ** 4 + (step / 0.4) ** 4) ** 0.25
    mr.paint(scene.cover(body, 0.06) * below, "marrow")
    mr.paint(scene.solid(scene.segment(0.3, 0.09, 0.4, 0.09, 0.045)), "marrow")
    disc = (along / 0.07) ** 2 + ((step.abs() - 0.5) / 0.1) ** 2
    mr.paint(scene.cover(disc, 0.03) * below * 0.6, "organ2")
    canal = scene.solid((along - 0.17).abs() - 0.065) * below
    mr.paint(canal, "fluid")
    mr.paint(scene.solid((along - 0.165).abs() - 0.036) * below, "white")
    process = ((along - 0.33) / 0.08) ** 2 + ((step + 0.5 * (along - 0.33)) / 0.28) ** 2
    mr.paint(scene.cover(process, 0.04) * scene.solid(0.42 - scene.y), "marrow")
    mr.paint(scene.solid(scene.segment(0.35, 0.5, 1.4, 0.5, 0.012)), "fat")


def _face_lateral(scene: Scene, mr: _Mr) -> None:
    """An eye in its fat, the maxillary sinus, chewing muscles, jaw and mastoid cells."""
    mr.paint(scene.ellipse(0.02, -0.42, 0.15, 0.2), "fat")
    mr.paint(scene.solid(scene.segment(-0.06, -0.45, -0.02, -0.22, 0.018)), "muscle")
    mr.paint(scene.solid(scene.segment(0.1, -0.45, 0.06, -0.22, 0.018)), "muscle")
    mr.paint(scene.ellipse(0.02, -0.53, 0.1, 0.1), "fluid")
    sinus = scene.star(0.27, -0.4, (0.14, 0.13, 0.14, 0.14, 0.13, 0.12, 0.13, 0.13), scene.number(0.8, 1.1), jitter=0.08)
    mr.paint(scene.cover(sinus, 0.13, 1.12), "bone")
    mr.paint(scene.cover(sinus, 0.13), "gas")
    for y, x, high, wide, tilt in ((0.28, -0.14, 0.16, 0.07, 0.3), (0.42, 0.3, 0.28, 0.07, -0.2), (0.75, 0.2, 0.3, 0.06, 0.15)):
        level = scene.level(y, x, high, wide, tilt)
        mr.paint(scene.cover(level, wide, 1.2), "fat")
        mr.paint(scene.cover(level, wide), "muscle")
    jaw = union(scene.segment(0.63, -0.48, 0.58, -0.14, 0.04), scene.segment(0.56, -0.1, 0.24, 0.0, 0.045), softness=0.05)
    mr.paint(scene.solid(jaw - 0.02), "bone")
    mr.paint(scene.solid(jaw), "marrow")
    mr.paint(scene.solid(scene.segment(0.48, -0.52, 0.46, -0.3, 0.06)), "bone")
    mr.paint(scene.solid(scene.level(0.2, 0.2, 0.12, 0.1) - 1) * ((scene.texture(20).abs() - 0.3) * 4).clamp(0, 1), "gas")


def chest_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial chest: dark lungs with vessels, heart or great vessels or the dome of the liver, wall, spine, often arms."""
    mr = _Mr(scene, contrast)
    if contrast == "GRE" and scene.chance(0.6):  # fat suppressed
        mr.table["fat"], mr.table["marrow"] = 0.25 * mr.table["fat"], 0.3 * mr.table["marrow"]
    arms = scene.chance(0.6)
    scene.shrink(0.85 if arms else 1.0)
    high, wide = scene.number(0.58, 0.7, 0.02), scene.number(0.86, 0.94, 0.02)
    round_ = scene.star(0, 0, (1.0, 1.0, 1.0, 0.97, 1.0, 1.0, 1.0, 0.98, 1.0, 0.97, 1.0, 0.98), jitter=0.015)
    trunk = (_scaled(scene, round_, high, wide, 2.5) - 1) * 0.65
    fat = uniform(scene.generator, 0.03, 0.1)
    if arms:
        for side in (-1, 1):
            y, radius = scene.number(-0.1, 0.2), scene.number(0.14, 0.18, 0.02)
            _limb(scene, mr, (scene.level(y, side * (wide + radius + 0.03), radius * 1.2, radius) - 1) * radius, 0.03)
            mr.paint(scene.ellipse(y, side * (wide + radius + 0.03), 0.06, 0.06), "bone")
            mr.paint(scene.ellipse(y, side * (wide + radius + 0.03), 0.04, 0.04), "marrow")
    inner = _surface(scene, mr, trunk, fat)
    mr.paint(scene.solid(inner + 0.02) * scene.lines(18, 0.16), "fat")
    for side in (-1, 1):
        mr.paint(scene.solid(inner) * scene.ellipse(0.4, side * 0.2, 0.14, 0.15), "muscle")
    cage = inner + uniform(scene.generator, 0.07, 0.11) + 0.015 * scene.texture(8)
    angle = torch.atan2(scene.y, scene.x)
    ribs = scene.solid((cage - 0.03).abs() - 0.022) * ((torch.sin(11 * angle + uniform(scene.generator, 0, 6)) + 0.2) * 4).clamp(0, 1)
    mr.paint(ribs, "bone")
    mr.paint(ribs * scene.solid((cage - 0.03).abs() - 0.01), "marrow")
    mr.paint(scene.solid(cage), "fat")
    lung = torch.full_like(cage, 1.0)
    for side in (-1, 1):
        shape = scene.star(-0.02, side * 0.43, (0.36, 0.4, 0.44, 0.4, 0.36, 0.44, 0.46, 0.44), high / 0.62, jitter=0.05)
        lung = torch.minimum(lung, (shape - 1) * 0.4)
    lung = scene.solid(torch.maximum(lung, cage))
    dark = 0.4 * mr.table["organ"]
    mr.paint(lung, "gas")
    mr.signal = mr.signal + lung * dark * (0.25 + 0.08 * scene.texture(10))
    hilum = (1.3 - ((scene.x.abs() - 0.2) / 0.45) ** 2 - (scene.y / 0.5) ** 2).clamp(0, 1)
    vessels = torch.maximum(scene.lines(30, 0.2), scene.lines(18, 0.14)) * hilum * ((scene.texture(16) + 0.4) * 2).clamp(0, 1)
    mr.paint(lung * vessels, "vessel" if mr.table["vessel"] > 0.3 else "organ2")
    kind = ("heart", "heart", "great_vessels", "dome")[int(uniform(scene.generator, 0, 4))]
    if kind == "dome":
        dome = scene.star(-0.02, -0.42, (0.42, 0.36, 0.36, 0.38, 0.38, 0.4, 0.42, 0.42), scene.number(0.7, 1.0, 0.15), jitter=0.03)
        liver = scene.solid(torch.maximum((dome - 1) * 0.38, cage + 0.01))
        mr.paint(liver, "organ")
        mr.paint(liver * scene.lines(18, 0.08) * ((scene.texture(12)) * 2).clamp(0, 1), "vessel")
    if kind == "great_vessels":
        mr.paint(scene.cover(scene.star(-0.1, 0.02, (0.18, 0.24, 0.3, 0.24, 0.18, 0.24, 0.3, 0.24), jitter=0.08), 0.2) * 0.8, "fat")
        for vessel_y, vessel_x, bore in ((-0.2, -0.05, 0.1), (-0.12, 0.1, 0.1), (-0.1, -0.17, 0.06), (0.02, 0.02, 0.07)):
            mr.paint(scene.ellipse(vessel_y + uniform(scene.generator, -0.03, 0.03), vessel_x, bore, bore * 1.1), "vessel")
        mr.paint(scene.solid(scene.segment(-0.08, 0.05, 0.02, 0.3, 0.05)), "vessel")
        mr.paint(scene.solid(scene.segment(-0.02, -0.1, 0.03, -0.3, 0.045)), "vessel")
        mr.paint(scene.ellipse(0.08, 0, 0.05, 0.06), "gas")
    else:
        _heart(scene, mr, scene.number(0.7, 0.85) if kind == "dome" else scene.number(0.9, 1.15))
    _spine_mr(scene, mr)
    mr.paint(scene.ellipse(0.2, 0.13, 0.07, 0.07), "vessel")
    return mr.done()


def _limb(scene: Scene, mr: _Mr, distance: Tensor, fat: float) -> None:
    inside = scene.solid(_surface(scene, mr, distance, fat))
    mr.paint(inside * scene.lines(20, 0.12), "fat")


def _heart(scene: Scene, mr: _Mr, size: Tensor) -> None:
    """Muscle around four chambers of blood, some fat outside."""
    level = scene.star(-0.12, 0.1, (0.32, 0.32, 0.26, 0.24, 0.3, 0.28, 0.25, 0.3), size, jitter=0.08)
    mr.paint(scene.cover(level, 0.25, 1.12), "fat")
    mr.paint(scene.cover(level, 0.25), "muscle")
    chambers = ((-0.1, 0.22, 0.13, 0.1, 0.5), (-0.2, 0.03, 0.09, 0.14, 0.5), (-0.08, -0.1, 0.1, 0.08, 0.0), (0.02, 0.08, 0.07, 0.11, 0.2))
    for y, x, half_y, half_x, tilt in chambers:
        chamber = scene.ellipse(-0.12 + (y + 0.12) * size, 0.1 + (x - 0.1) * size, half_y * size, half_x * size, tilt)
        mr.paint(chamber * scene.cover(level, 0.25, 0.95), "vessel")
    mr.paint(scene.cover(level, 0.25, 0.9) * scene.lines(20, 0.14) * 0.6, "muscle")
    mr.signal = mr.signal * (1 + 0.1 * scene.cover(level, 0.25) * scene.texture(22))


def spine_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """A sagittal lumbar or cervical spine: vertebrae, discs, cord or roots in fluid, processes, muscles and fat behind."""
    mr = _Mr(scene, contrast)
    lumbar = scene.chance(0.65)
    unit = scene.number(0.95, 1.1, 0.02) * (1.0 if lumbar else 0.72)
    lordosis, lean = uniform(scene.generator, 0.06, 0.16), uniform(scene.generator, -0.08, 0.08)
    line = -0.2 + lean * scene.y - lordosis * torch.cos(2.1 * (scene.y - 0.1))
    tail = ((scene.y - 0.62) / 0.4).clamp(min=0) if lumbar else torch.zeros_like(scene.y)
    line = line + 0.32 * tail**1.5
    along = (scene.x - line) / unit
    back = line + (0.74 if lumbar else 0.68) * unit - 0.5 * tail * 0.3
    skin = uniform(scene.generator, 0.08, 0.3) * (0.75 + 0.25 * scene.y.clamp(-1, 1)) + 0.02 * scene.texture(4)
    fringe = back + skin - scene.x
    mr.paint(scene.solid(-fringe), "skin")
    mr.paint(scene.solid(0.02 - fringe), "fat")
    mr.paint(scene.solid(scene.x - back), "muscle")
    mr.paint(scene.solid(scene.x - back + 0.02) * scene.lines(20, 0.2), "fat")
    front = scene.solid(along + 0.16, 0.04)
    mr.paint(front, "fat")
    mr.paint(front * ((scene.texture(14) + 0.2) * 1.5).clamp(0, 1), "organ2" if lumbar else "muscle")
    mr.paint(front * scene.lines(18, 0.14) * 0.4, "fluid" if lumbar else "vessel")
    if lumbar:
        mr.paint(scene.solid((along + 0.26).abs() - 0.06) * scene.solid(scene.y - 0.5), "vessel")
    else:
        mr.paint(scene.solid((along + 0.3).abs() - 0.055 + 0.02 * scene.texture(5)), "gas")
    pitch = 0.27 * unit
    place = (scene.y + uniform(scene.generator, 0, 0.27)) / pitch + 0.15 * along
    number = place.floor()
    step = place - number - 0.5
    half = 0.15 * (1 - 0.25 * tail.clamp(max=1.5))
    mr.paint(scene.solid(along.abs() - half), "bone")
    marrow_here = 0.8 + 0.15 * torch.sin(2.7 * number + 9 * lean)
    body = (((along / half).abs() * 1.08) ** 5 + (step.abs() / (0.36 - 0.03 * (1 - (along / half) ** 2).clamp(min=0))) ** 5) ** 0.2
    vertebra = scene.cover(body, 0.1)
    mr.paint(vertebra, "marrow")
    mr.signal = mr.signal * (1 - vertebra * (1 - marrow_here) + 0.06 * vertebra * scene.texture(20))
    disc = ((along / half / 1.02) ** 2 + ((step.abs() - 0.5) / 0.13) ** 2).sqrt()
    worn = (torch.sin(4.1 * torch.round(place) + 50 * lean) * 0.5 + 0.5).clamp(0.1, 0.9)
    disc_cover = scene.cover(disc, 0.03)
    mr.paint(disc_cover, "muscle")
    mr.paint(disc_cover * scene.cover(disc, 0.03, 0.75) * (1 - worn) * 0.7, "fluid")
    canal = along - half - 0.09
    mr.paint(scene.solid(canal.abs() - 0.085), "fat")
    bulge = 0.02 * torch.exp(-(((step.abs() - 0.5) / 0.1) ** 2)) * worn
    mr.paint(scene.solid((canal + 0.01 - bulge).abs() - 0.065), "fluid")
    conus = scene.number(-0.4, -0.1) if lumbar else torch.tensor(9.0)
    cord = scene.solid((canal + 0.005).abs() - 0.033 * ((conus + 0.25 - scene.y) / 0.25).clamp(0, 1)) * scene.solid(scene.y - conus)
    mr.paint(cord, "white")
    if lumbar:
        roots = torch.sin(110 * canal + scene.texture(6)).clamp(0, 1) * scene.solid((canal - 0.01).abs() - 0.05)
        mr.paint(roots * scene.solid(conus - scene.y) * 0.45, "white")
    behind = place - 0.3 * (canal - 0.25) + 0.12 * scene.texture(6)
    thorn = behind - behind.floor() - 0.5
    length = 0.14 + 0.03 * torch.sin(3.3 * behind.floor() + 40 * lean)
    process = (((canal - 0.12 - length) / length).abs() ** 3 + (thorn.abs() / 0.25) ** 3) ** (1 / 3) + 0.12 * scene.texture(14)
    gap = (((canal - 0.24) / 0.13).abs() ** 3 + ((thorn.abs() - 0.5).abs() / 0.14) ** 3) ** (1 / 3) + 0.2 * scene.texture(14)
    mr.paint(scene.cover(gap, 0.03) * 0.6, "fat")
    mr.paint(scene.cover(process, 0.06, 1.12), "bone")
    mr.paint(scene.cover(process, 0.06, 0.9), "marrow")
    fade = torch.exp(-uniform(scene.generator, 0.2, 1.1) * (-(scene.x - 0.1)).clamp(min=0) ** 1.5)
    mr.signal = mr.signal * fade
    return mr.done()


def knee_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """A knee, sagittal or axial: marrow in dark cortex, cartilage, menisci, ligaments, fat pad, muscles, fat."""
    mr = _Mr(scene, contrast)
    if scene.chance(0.5):
        scene.mirror()
    if scene.chance(0.65):
        _knee_sagittal(scene, mr)
    else:
        _knee_axial(scene, mr)
    return mr.done()


def _bone(scene: Scene, mr: _Mr, distance: Tensor, cortex: float) -> None:
    """Marrow with fine trabeculae in a dark rim."""
    mr.paint(scene.solid(distance), "bone")
    inside = scene.solid(distance + cortex)
    mr.paint(inside, "marrow")
    mr.signal = mr.signal * (1 - inside * (0.06 + 0.05 * scene.texture(24) + 0.05 * scene.texture(6)))


def _knee_sagittal(scene: Scene, mr: _Mr) -> None:
    leg = union(
        scene.segment(-1.6, 0.05, -0.2, 0.0, scene.number(0.62, 0.72, 0.02)),
        scene.segment(0.0, -0.02, 1.6, 0.12, scene.number(0.52, 0.62, 0.02)),
        softness=0.1,
    )
    inner = _surface(scene, mr, leg + 0.02 * scene.texture(3), uniform(scene.generator, 0.03, 0.12))
    inside = scene.solid(inner)
    mr.paint(inside, "fat")
    for y0, x0, y1, x1, radius in (
        (-1.5, 0.38, -0.25, 0.4, 0.2),
        (-1.5, -0.35, -0.6, -0.36, 0.13),
        (0.2, 0.42, 1.5, 0.45, 0.2),
        (0.5, 0.3, 1.5, 0.25, 0.12),
    ):
        muscle = scene.solid(scene.segment(y0, x0, y1, x1, radius) + 0.03 * scene.texture(6)) * inside
        mr.paint(muscle, "muscle")
        mr.paint(muscle * scene.lines(22, 0.1) * 0.7, "fat")
    mr.paint(scene.solid((scene.x - 0.3 - 0.03 * scene.texture(4)).abs() - 0.03) * inside * scene.solid(scene.y.abs() - 0.9, 0.2), "vessel")
    joint = scene.number(0.28, 0.34, 0.02)
    condyle = scene.star(0.0, 0.02, (0.32, 0.3, 0.29, 0.31, 0.33, 0.3, 0.26, 0.3), scene.number(0.95, 1.08), jitter=0.025)
    femur = union((condyle - 1) * 0.3, scene.segment(-1.6, -0.08, -0.2, -0.06, 0.17), softness=0.06)
    plateau = (scene.star(joint + 0.17, 0.02, (0.36, 0.28, 0.2, 0.27, 0.36, 0.24, 0.14, 0.24), jitter=0.025) - 1) * 0.2
    tibia = union(plateau, scene.segment(joint + 0.25, 0.0, 1.7, 0.02, 0.17), softness=0.06)
    patella = (scene.star(-0.16, -0.47, (0.08, 0.16, 0.2, 0.14, 0.08, 0.13, 0.2, 0.15), jitter=0.06) - 1) * 0.1
    cartilage = scene.solid(femur - 0.035) * scene.solid(-0.12 - scene.y - 0.5 * (scene.x < -0.1))
    mr.paint(cartilage, "organ2")
    mr.paint(scene.solid(tibia - 0.025) * scene.solid(scene.y - joint - 0.05), "organ2")
    mr.paint(scene.solid(patella - 0.025) * (scene.x > -0.48), "organ2")
    if scene.chance(0.4):
        mr.paint(scene.solid(scene.segment(-0.55, -0.29, -0.3, -0.33, scene.number(0.02, 0.05)) + 0.02 * scene.texture(10)), "fluid")
    for x, size in ((-0.22, 0.1), (0.26, 0.11)):
        wedge = ((scene.y - joint + 0.015).abs() - 0.3 * (scene.x - x * 0.3).abs().clamp(max=0.3) * 0.9) * 1.0
        mr.paint(scene.solid(wedge) * scene.solid((scene.x - x).abs() - size), "bone")
    if scene.chance(0.5):
        mr.paint(scene.solid(scene.segment(0.02, 0.2, joint + 0.04, -0.1, 0.03)), "bone")
        mr.paint(scene.solid(scene.segment(0.08, 0.0, joint + 0.02, 0.3, 0.03)), "bone")
    _bone(scene, mr, femur, 0.02)
    _bone(scene, mr, tibia, 0.022)
    _bone(scene, mr, patella, 0.02)
    mr.paint(scene.solid(scene.segment(-0.28, -0.06, -0.22, 0.28, 0.004)), "bone")
    mr.paint(scene.solid(scene.segment(joint + 0.3, -0.2, joint + 0.28, 0.25, 0.004)), "bone")
    mr.paint(scene.solid(scene.segment(-1.4, -0.52, -0.34, -0.5, 0.03)), "bone")
    mr.paint(scene.solid(scene.segment(0.02, -0.5, joint + 0.28, -0.33, 0.028)), "bone")
    pad = scene.solid(union(scene.segment(0.08, -0.4, 0.22, -0.34, 0.07), scene.segment(0.2, -0.3, 0.26, -0.26, 0.04)))
    mr.paint(pad * scene.lines(26, 0.1) * 0.5, "fluid")


def _knee_axial(scene: Scene, mr: _Mr) -> None:
    leg = (scene.star(0, 0, (0.78, 0.78, 0.76, 0.76, 0.76, 0.78, 0.78, 0.76, 0.74, 0.72, 0.74, 0.76), scene.number(0.95, 1.08)) - 1) * 0.75
    inside = scene.solid(_surface(scene, mr, leg, uniform(scene.generator, 0.05, 0.16)))
    mr.paint(inside, "fat")
    for y, x, high, wide, tilt in (
        (0.32, 0.42, 0.22, 0.13, 0.3),
        (0.42, 0.16, 0.15, 0.14, 0.0),
        (0.42, -0.22, 0.15, 0.16, 0.0),
        (0.3, -0.45, 0.2, 0.1, -0.3),
    ):
        size = scene.number(0.85, 1.1)
        muscle = scene.ellipse(y, x, high * size, wide * size, tilt) * inside
        mr.paint(muscle, "muscle")
        mr.paint(muscle * scene.lines(26, 0.1) * 0.7, "fat")
    for y, x in ((0.26, 0.02), (0.32, -0.05)):
        mr.paint(scene.ellipse(y, x, 0.05, 0.05), "vessel")
    radii = (0.48, 0.46, 0.48, 0.3, 0.08, 0.3, 0.48, 0.46, 0.48, 0.45, 0.4, 0.38, 0.28, 0.38, 0.4, 0.45)
    femur = (scene.star(-0.1, 0, radii, scene.number(0.85, 1.02), jitter=0.04) - 1) * 0.35
    mr.paint(scene.solid(femur - 0.04) * scene.solid(scene.y + 0.12, 0.1), "organ2")
    if scene.chance(0.5):
        for side in (-1, 1):
            mr.paint(scene.solid(scene.segment(-0.42, side * 0.3, -0.3, side * 0.48, scene.number(0.02, 0.06))), "fluid")
    patella = (scene.star(-0.56, scene.number(-0.05, 0.05), (0.28, 0.16, 0.1, 0.16, 0.28, 0.13, 0.1, 0.13), jitter=0.05) - 1) * 0.12
    mr.paint(scene.solid(patella - 0.03) * scene.solid(-0.58 - scene.y), "organ2")
    _bone(scene, mr, femur, 0.02)
    _bone(scene, mr, patella, 0.02)
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(-0.5, side * 0.3, -0.15, side * 0.56, 0.015)), "bone")


MR_BODIES: dict[str, Callable[[Scene, str], MrAnatomy]] = {
    "brain": brain_mr,
    "abdomen": abdomen_mr,
    "legs": legs_mr,
    "brain_only": brain_only_mr,
    "skull_base": skull_base_mr,
    "head_sagittal": head_sagittal_mr,
    "chest": chest_mr,
    "spine": spine_mr,
    "knee": knee_mr,
}
