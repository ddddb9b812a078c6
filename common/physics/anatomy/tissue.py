"""MR signal and fat share, painted tissue by tissue; what several bodies share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from common.physics.acquisition import uniform
from common.physics.anatomy.scene import Scene

INVENTED = ("ANY", "ANY_EPI")
"""Contrasts drawn anew for every patient; in the second fat is dark."""

# signal relative to the brightest tissue, rounded from usual 1.5 T protocols
CONTRASTS: dict[str, dict[str, float]] = {
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
    """A contrast no protocol has: any signal for any tissue, so that no order of tissues can be learned
    (Billot et al., MedIA 2023).
    """
    table = {name: uniform(scene.generator, 0.05, 1.0) for name in CONTRASTS["T1"]}
    return table | {"gas": 0.0, "bone": 0.2 * table["bone"], "fat": max(table["fat"], 0.3)}


class Painter:
    """Signal and fat, painted tissue by tissue."""

    def __init__(self, scene: Scene, contrast: str) -> None:
        self.scene = scene
        self.table = _invented(scene) if contrast in INVENTED else CONTRASTS[contrast]
        self.table = {
            name: value * uniform(scene.generator, 0.88, 1.12) for name, value in self.table.items()
        }
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


def surface(scene: Scene, mr: Painter, distance: Tensor, fat: float, inside: str = "muscle") -> Tensor:
    """Skin, a fat layer of uneven thickness and what lies inside it; the distance outside of that."""
    inner = distance + 0.02 + fat * (1 + 0.25 * scene.texture(5))
    mr.paint(scene.solid(distance), "skin")
    mr.paint(scene.solid(distance + 0.016), "fat")
    mr.paint(scene.solid(inner), inside)
    return inner


def scaled(scene: Scene, round_: Tensor, high: Tensor, wide: Tensor, power: float = 2.0) -> Tensor:
    """The outline `round_` (a star of radius about 1) stretched to these half-axes; above power 2 its corners
    fill.
    """
    square = ((scene.y / high).abs() ** power + (scene.x / wide).abs() ** power) ** (1 / power)
    return square * round_ / torch.sqrt(scene.y**2 + scene.x**2).clamp(min=1e-3)
