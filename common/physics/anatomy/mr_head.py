"""Heads in MR: signal and fat share of a few adjacent slices of one invented patient."""

from __future__ import annotations

import torch
from torch import Tensor

from common.physics.acquisition import uniform
from common.physics.anatomy.scene import Scene, union
from common.physics.anatomy.tissue import MrAnatomy, Painter, scaled, surface


def brain_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial head: skin, fat, skull, cortex with sulci, white matter, ventricles, deep nuclei, sometimes
    eyes, sinuses, lesions.
    """
    mr = Painter(scene, contrast)
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
    sulci = ((0.3 - scene.texture(13).abs()) * 4).clamp(0, 1) * (
        (depth - uniform(scene.generator, 0.6, 0.75)) * 8
    ).clamp(0, 1)
    mr.paint(sulci * scene.cover(depth, width, 0.98), "grey")
    mr.paint(
        ((0.1 - scene.texture(13).abs()) * 7).clamp(0, 1)
        * ((depth - 0.72) * 8).clamp(0, 1)
        * scene.cover(depth, width, 0.99),
        "fluid",
    )
    fissure = scene.cover(scene.x.abs() / 0.012, 0.012) * ((depth - scene.number(0.35, 0.6)) * 9).clamp(0, 1)
    mr.paint(fissure * scene.cover(depth, width, 0.98), "fluid")
    swell = scene.number(0.7, 1.5)
    for side in (-1, 1):
        mr.paint(
            scene.ellipse(
                scene.number(0.02, 0.1), side * scene.number(0.13, 0.19, 0.02), 0.13, 0.07, side * 0.3
            ),
            "grey",
        )
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


def _cortex(
    scene: Scene, mr: Painter, depth: Tensor, radius: float, cells: int = 26, region: Tensor | float = 1.0
) -> None:
    """Cerebrum, from depth 0 (centre) to 1 (surface): white matter, a grey ribbon along the surface and along
    sulci filled with fluid.
    """
    bank = scene.texture(cells).abs()
    rough = depth + 0.025 * scene.texture(cells) + 0.05 * (0.4 - bank).clamp(min=0)
    mr.paint(region * scene.cover(depth, radius), "fluid")
    mr.paint(region * scene.cover(rough, radius), "grey")
    near = ((depth - 0.35) * 3).clamp(0, 1)
    white = ((bank - 0.5 * near) * 3 + 0.5).clamp(0, 1) * scene.cover(
        rough + 0.06 * scene.texture(cells // 2), radius, 0.88
    )
    mr.paint(region * white, "white")
    width = uniform(scene.generator, 0.08, 0.22)
    sulci = ((width - bank) * 6).clamp(0, 1) * ((depth - uniform(scene.generator, 0.5, 0.7)) * 6).clamp(0, 1)
    mr.paint(region * sulci * scene.cover(depth, radius), "fluid")


def _cerebellum(
    scene: Scene, mr: Painter, depth: Tensor, radius: float, region: Tensor | float = 1.0
) -> None:
    """Cerebellum, from depth 0 (centre) to 1 (surface): grey leaves parallel to the surface, branching white
    matter.
    """
    mr.paint(region * scene.cover(depth, radius), "grey")
    tree = ((0.72 - depth + 0.25 * scene.texture(22)) * 3).clamp(0, 1)
    mr.paint(region * tree * 0.9, "white")
    leaves = (
        torch.sin(36 * depth * radius / 0.25 + 3 * scene.texture(18)) * (0.6 + 0.5 * scene.texture(20)) - 0.3
    )
    mr.paint(
        region * leaves.clamp(0, 0.35) * scene.cover(depth, radius, 0.98) * ((depth - 0.4) * 3).clamp(0, 1),
        "fluid",
    )


BRAIN_LEVELS = ("vertex", "convexity", "middle", "middle", "low", "posterior_fossa", "foramen")


def brain_only_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial brain without a bright scalp, as echo-planar images show it, from the vertex down to the
    foramen magnum.
    """
    mr = Painter(scene, contrast)
    rim = uniform(scene.generator, 0.0, 1.0)
    for tissue in ("fat", "marrow", "skin", "muscle"):
        mr.table[tissue] = min(mr.table[tissue], 0.14) * rim
    level = BRAIN_LEVELS[int(uniform(scene.generator, 0, len(BRAIN_LEVELS)))]
    height, width = scene.number(0.66, 0.78, 0.03), scene.number(0.52, 0.62, 0.03)
    if level in ("vertex", "foramen"):
        shrunk = scene.number(0.35, 0.7, 0.15) if level == "vertex" else scene.number(0.75, 0.9, 0.03)
        height, width = height * shrunk, width * shrunk
    head = scaled(scene, scene.star(0, 0, (1.0,) * 9, jitter=0.02), height * 1.16 + 0.04, width * 1.18 + 0.05)
    mr.paint(scene.cover(head, 0.6), "skin")
    mr.paint(scene.cover(head, 0.6, 0.97), "fat")
    mr.paint(scene.cover(head, 0.6, 0.93 + 0.01 * scene.texture(6)), "bone")
    wobble = 0.03 * scene.texture(6)
    if level in ("posterior_fossa", "foramen"):
        _faint_face(scene, mr, height, width)
        _posterior_fossa(scene, mr, level == "foramen")
    else:
        round_ = scene.star(
            0, 0, (1.0, 1.0, 0.98, 1.0, 1.0, 1.0, 1.0, 0.97, 0.93, 0.97, 1.0, 1.0), jitter=0.025
        )
        depth = scaled(scene, round_, height, width) + wobble
        if level == "low":
            depth = depth + _notches(scene, height)
        _cortex(scene, mr, depth, 0.55, cells=int(uniform(scene.generator, 23, 32)))
        inside = scene.cover(depth, 0.55, 0.98)
        fissure = scene.cover((scene.x + 0.02 * wobble).abs() / 0.014, 0.014)
        if level != "low":
            mr.paint(
                fissure * inside * ((scene.y.abs() / height - scene.number(0.1, 0.5)) * 8).clamp(0, 1),
                "fluid",
            )
        if level == "middle":
            _ventricles(scene, mr)
        if level == "low":
            _skull_floor(scene, mr, height, width)
    for _ in range(int(uniform(scene.generator, 0, 2.5))):
        mr.paint(scene.spot(0.3, 0.25, 0.015, 0.05) * (mr.signal > 0.3), "lesion")
    return mr.done()


def _ventricles(scene: Scene, mr: Painter) -> None:
    """Lateral ventricles with thalami and basal ganglia beside them, or the bodies of the ventricles above
    those.
    """
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


def _skull_floor(scene: Scene, mr: Painter, height: Tensor, width: Tensor) -> None:
    """Where the temporal lobes are: notches beside them, midbrain in its cistern, a dark floor in front,
    sometimes bright eyes.
    """
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(0.18, side * 0.12, 0.26, side * 0.26, 0.012)), "fluid")
    mr.paint(
        scene.cover(scene.star(0.02, 0, (0.17, 0.12, 0.14, 0.16, 0.14, 0.12), jitter=0.1), 0.13), "fluid"
    )
    mr.paint(
        scene.cover(scene.star(0.07, 0, (0.1, 0.11, 0.07, 0.11, 0.1, 0.1, 0.05, 0.1), jitter=0.05), 0.09),
        "white",
    )
    mr.paint(scene.ellipse(0.12, 0, 0.016, 0.016), "fluid")
    if scene.chance(0.6):
        floor = scene.cover(scene.star(-0.62 * height, 0, (0.2, 0.2, 0.16, 0.2, 0.2, 0.2), jitter=0.25), 0.18)
        mr.paint(floor, "gas")
    if scene.chance(0.6):
        for side in (-1, 1):
            mr.paint(scene.ellipse(-0.98 * height, side * 0.5 * width, 0.16, 0.16), "bone")
            mr.paint(scene.ellipse(-1.0 * height, side * 0.5 * width, 0.115, 0.11), "fluid")
            mr.paint(scene.solid(scene.segment(-0.58, side * 0.26, -0.4, side * 0.15, 0.02)), "muscle")


def _faint_face(scene: Scene, mr: Painter, height: Tensor, width: Tensor) -> None:
    """What fat suppression leaves of a face: faint muscle and mucosa around air."""
    face = scene.solid(scene.level(-0.35, 0, 0.5, width * 0.95) - 1)
    mr.paint(face * ((scene.texture(18) - 0.2) * 2).clamp(0, 1), "muscle")
    for side in (-1, 1):
        mr.paint(scene.ellipse(-0.4, side * 0.2, scene.number(0.12, 0.18), 0.1), "gas")
    mr.paint(face * scene.lines(20, 0.15) * (scene.y < -0.2) * 0.4, "fluid")


def _posterior_fossa(scene: Scene, mr: Painter, foramen: bool) -> None:
    """Cerebellum and pons with temporal poles, or the medulla with the tonsils, or just the cord in its
    fluid.
    """
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
            pole = scene.star(
                -0.18,
                side * 0.36,
                (0.18, 0.2, 0.16, 0.2, 0.18, 0.2, 0.22, 0.2),
                scene.number(0.75, 1.1),
                jitter=0.14,
            )
            _cortex(scene, mr, pole, 0.18, cells=24)


def skull_base_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial head below the cerebrum: eyes or maxillary sinuses or teeth in front, temporal lobes,
    cerebellum or neck behind.
    """
    mr = Painter(scene, contrast)
    scene.shrink(0.95)
    level = ("orbits", "sinuses", "sinuses", "mouth")[int(uniform(scene.generator, 0, 4))]
    radii = (0.72, 0.74, 0.8, 0.86, 0.88, 0.86, 0.8, 0.74, 0.72, 0.73, 0.78, 0.84, 0.9, 0.84, 0.78, 0.73)
    head = (scene.star(0, 0, radii, scene.number(0.95, 1.05), jitter=0.015) - 1) * 0.75
    tip = scene.number(-0.98, -0.9, 0.02)
    nose = union(scene.level(tip + 0.16, 0, 0.17, 0.15) * 0.13 - 0.13, head, softness=0.04)
    for side in (-1, 1):
        ear = (scene.level(0.1, side * 0.78, 0.14, 0.045, -side * 0.4) - 1) * 0.045
        nose = union(nose, ear, softness=0.015)
    surface(scene, mr, nose, uniform(scene.generator, 0.05, 0.1))
    inside = scene.solid(nose + 0.1)
    mr.paint(inside * scene.lines(18, 0.16), "fat")
    mr.paint(
        scene.cover(scene.star(-0.35, 0, (0.5, 0.4, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5), jitter=0.08), 0.4), "fat"
    )
    for side in (-1, 1):
        muscle = scene.star(
            -0.22, side * 0.56, (0.09, 0.2, 0.3, 0.2, 0.09, 0.2, 0.3, 0.2), scene.number(0.8, 1.0), jitter=0.1
        )
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


def _orbits(scene: Scene, mr: Painter) -> None:
    """Eyes in cones of fat with optic nerves and muscles; ethmoid cells between them."""
    for side in (-1, 1):
        cone = union(
            scene.segment(-0.66, side * 0.36, -0.2, side * 0.14, 0.1),
            (scene.level(-0.6, side * 0.36, 0.2, 0.2) - 1) * 0.2,
        )
        mr.paint(scene.solid(cone - 0.02), "bone")
        mr.paint(scene.solid(cone), "fat")
        for shift in (-0.12, 0.12):
            mr.paint(
                scene.solid(
                    scene.segment(-0.6, side * 0.36 + 1.3 * shift, -0.22, side * 0.15 + 0.3 * shift, 0.018)
                ),
                "muscle",
            )
        mr.paint(scene.solid(scene.segment(-0.55, side * 0.35, -0.18, side * 0.13, 0.018)), "white")
        mr.paint(scene.ellipse(-0.66, side * 0.37, 0.135, 0.13), "skin")
        mr.paint(scene.ellipse(-0.66, side * 0.37, 0.12, 0.115), "fluid")
        mr.paint(scene.ellipse(-0.75, side * 0.37, 0.02, 0.05), "organ2")
    cells = scene.star(-0.45, 0, (0.12, 0.13, 0.25, 0.13, 0.12, 0.13, 0.28, 0.13), jitter=0.06)
    mr.paint(scene.cover(cells, 0.12), "organ2")
    mr.paint(scene.cover(cells, 0.12, 0.92) * ((scene.texture(18).abs() - 0.25) * 5).clamp(0, 1), "gas")


def _sinuses(scene: Scene, mr: Painter) -> None:
    """Maxillary sinuses and a nasal cavity full of air with its septum and turbinates; pterygoid muscles,
    sphenoid sinus.
    """
    for side in (-1, 1):
        sinus = scene.star(
            -0.47,
            side * 0.34,
            (0.17, 0.2, 0.24, 0.2, 0.17, 0.2, 0.2, 0.2),
            scene.number(0.65, 1.05),
            jitter=0.16,
        )
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
    mr.paint(
        scene.solid(scene.segment(-0.8, 0, -0.22, uniform(scene.generator, -0.02, 0.02), 0.013)), "organ2"
    )
    for side in (-1, 1):
        mr.paint(
            scene.cover(
                scene.star(-0.47, side * 0.08, (0.03, 0.08, 0.16, 0.08, 0.03, 0.08, 0.16, 0.08), jitter=0.2),
                0.04,
            ),
            "organ2",
        )
    mr.paint(scene.ellipse(-0.16, 0, 0.06, scene.number(0.1, 0.16)), "gas" if scene.chance(0.6) else "organ2")


def _mouth(scene: Scene, mr: Painter) -> None:
    """Tongue inside a dark arch of teeth and jaw, cheeks, masseters, rami with marrow, airway, parotid
    glands.
    """
    arch = (
        scene.star(-0.4, 0, (0.42, 0.44, 0.4, 0.36, 0.4, 0.44, 0.42, 0.42, 0.4, 0.38, 0.4, 0.42), jitter=0.02)
        - 1
    ).abs() * 0.4
    arch = scene.solid(arch - 0.05) * (scene.y < -0.3)
    mr.paint(arch, "marrow" if scene.chance(0.5) else "bone")
    angle = torch.atan2(scene.y + 0.4, scene.x)
    mr.paint(arch * (torch.sin(20 * angle + 2 * scene.texture(8)) * 2 + 0.4).clamp(0, 1), "bone")
    tongue = scene.star(-0.38, 0, (0.3, 0.32, 0.26, 0.32, 0.3, 0.3, 0.33, 0.3), jitter=0.03)
    mr.paint(scene.cover(tongue, 0.3), "muscle")
    mr.paint(scene.cover(tongue, 0.3) * scene.lines(26, 0.14) * 0.5, "fat")
    mr.paint(scene.solid(scene.segment(-0.6, 0, -0.25, 0, 0.01)), "fat")
    mr.paint(
        scene.ellipse(-0.08, scene.number(-0.03, 0.03), scene.number(0.03, 0.06), scene.number(0.06, 0.13)),
        "gas",
    )
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(-0.28, side * 0.47, -0.05, side * 0.53, 0.05)), "bone")
        mr.paint(scene.solid(scene.segment(-0.28, side * 0.47, -0.05, side * 0.53, 0.025)), "marrow")
        parotid = scene.star(0.02, side * 0.56, (0.1, 0.14, 0.14, 0.14, 0.1, 0.14, 0.14, 0.14), jitter=0.12)
        mr.paint(scene.cover(parotid, 0.1) * (0.5 + 0.2 * scene.texture(16)).clamp(0, 1), "organ")


def _neck(scene: Scene, mr: Painter) -> None:
    """A high vertebra with the cord, vessels beside it and layered muscles behind."""
    mr.paint(
        scene.cover(scene.star(0.12, 0, (0.2, 0.14, 0.1, 0.14, 0.2, 0.14, 0.12, 0.14), jitter=0.06), 0.12),
        "bone",
    )
    mr.paint(
        scene.cover(scene.star(0.12, 0, (0.17, 0.11, 0.07, 0.11, 0.17, 0.11, 0.09, 0.11), jitter=0.06), 0.1),
        "marrow",
    )
    mr.paint(scene.ellipse(0.31, 0, 0.11, 0.14), "bone")
    mr.paint(scene.ellipse(0.31, 0, 0.095, 0.12), "fluid")
    mr.paint(scene.ellipse(0.31, 0, 0.055, 0.075), "white")
    for side in (-1, 1):
        mr.paint(scene.ellipse(0.02, side * 0.33, 0.045, 0.045), "vessel")
        mr.paint(scene.ellipse(0.12, side * 0.38, 0.055, 0.05), "vessel" if scene.chance(0.6) else "fluid")
        for y, x, high, wide, tilt in (
            (0.42, 0.3, 0.1, 0.2, 0.6),
            (0.58, 0.18, 0.07, 0.2, 0.3),
            (0.28, 0.52, 0.16, 0.08, -0.4),
        ):
            level = scene.level(y, side * x, high, wide, side * tilt)
            mr.paint(scene.cover(level, high, 1.15), "fat")
            mr.paint(scene.cover(level, high), "muscle")
    mr.paint(scene.solid(scene.segment(0.5, 0, 0.8, 0, 0.015)), "fat")


def _fossa(scene: Scene, mr: Painter, head: Tensor, temporal: bool) -> None:
    """The posterior fossa in its bone: cerebellum and brainstem; clivus, petrous bones with air cells,
    temporal lobes.
    """
    size = scene.number(0.9, 1.02)
    cavity = scene.star(
        0.33, 0, (0.55, 0.52, 0.46, 0.43, 0.46, 0.52, 0.55, 0.46, 0.36, 0.32, 0.36, 0.46), size, jitter=0.025
    )
    shell = union((cavity - 1) * 0.45, (scene.level(0.14, 0, 0.15, 0.58) - 1) * 0.2, softness=0.05)
    mr.paint(scene.solid(torch.maximum(shell - 0.06, head + 0.09)), "bone")
    rough = torch.maximum(shell - 0.035, head + 0.11)
    mr.paint(scene.solid(rough) * ((scene.texture(22) + 0.3) * 2).clamp(0, 1) * 0.7, "marrow")
    for side in (-1, 1):
        if temporal:
            lobe = scene.star(
                -0.1,
                side * 0.42,
                (0.2, 0.24, 0.2, 0.22, 0.2, 0.24, 0.24, 0.24),
                scene.number(0.9, 1.1),
                jitter=0.04,
            )
            mr.paint(scene.cover(lobe, 0.2, 1.12), "bone")
            _cortex(scene, mr, lobe, 0.2, cells=26)
        cells = scene.solid(scene.level(0.22, side * 0.55, 0.13, 0.1) - 1) * (
            (scene.texture(20).abs() - 0.3) * 4
        ).clamp(0, 1)
        mr.paint(cells, "gas")
        mr.paint(scene.solid(scene.segment(0.12, side * 0.72, 0.14, side * 0.5, 0.025)), "gas")
        mr.paint(scene.ellipse(0.02, side * 0.22, 0.035, 0.05), "vessel")
    clivus = scene.star(-0.02, 0, (0.16, 0.09, 0.07, 0.09, 0.16, 0.09, 0.08, 0.09), jitter=0.08)
    mr.paint(scene.cover(clivus, 0.08, 1.15), "bone")
    mr.paint(scene.cover(clivus, 0.08), "marrow")
    mr.paint(scene.cover(cavity, 0.45), "fluid")
    depth = torch.maximum(
        cavity / 0.94,
        scene.star(0.36, 0, (0.52, 0.5, 0.5, 0.44, 0.5, 0.5, 0.52, 0.4, 0.3, 0.26, 0.3, 0.4), size),
    )
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
    """A sagittal head and neck, in or beside the midline: cerebrum, cerebellum, brainstem and cord, face with
    airways, vertebrae.
    """
    mr = Painter(scene, contrast)
    if scene.chance(0.25):
        scene.mirror()
    midline = scene.chance(0.6)
    small = scene.number(0.95, 1.03) if midline else scene.number(0.82, 0.98)
    cranium = (
        scene.star(
            -0.3,
            0.1,
            (0.74, 0.74, 0.7, 0.6, 0.6, 0.68, 0.73, 0.7, 0.62, 0.61, 0.65, 0.71),
            small,
            jitter=0.012,
        )
        - 1
    ) * 0.6
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
    surface(scene, mr, outline, uniform(scene.generator, 0.035, 0.075))
    inside = scene.solid(outline + 0.09)
    mr.paint(inside * scene.lines(16, 0.16), "fat")
    mr.paint(inside * scene.lines(26, 0.1) * 0.6, "fat")
    cerebrum = scene.star(
        -0.32, 0.1, (0.6, 0.5, 0.38, 0.34, 0.38, 0.48, 0.6, 0.6, 0.52, 0.51, 0.55, 0.6), small, jitter=0.02
    )
    cerebellum = scene.star(
        0.06, 0.37, (0.24, 0.22, 0.18, 0.2, 0.24, 0.22, 0.19, 0.22), small, jitter=0.04
    ) + 0.03 * scene.texture(12)
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
        mr.paint(
            scene.solid(scene.segment(-0.1, -0.28, -0.26, 0.25, 0.008) + 0.025 * scene.texture(16)), "fluid"
        )
        mr.paint(scene.ellipse(-0.2, 0.2, scene.number(0.02, 0.05), scene.number(0.08, 0.16), 0.4), "fluid")
    return mr.done()


def _brainstem(scene: Scene, mr: Painter) -> None:
    """What lies in the midline: callosal arch over a ventricle, thalamus, pons, medulla, cord."""
    arch = scene.level(-0.2, 0.08, 0.16, 0.3)
    above = scene.solid(scene.y + 0.17 - 0.2 * (scene.x - 0.08), 0.03)
    mr.paint(scene.cover(arch, 0.2) * above, "fluid" if scene.chance(0.7) else "grey")
    mr.paint(scene.solid((arch - 1).abs() * 0.2 - 0.03) * above, "white")
    mr.paint(scene.ellipse(-0.17, 0.1, 0.1, 0.17), "grey")
    mr.paint(scene.solid(scene.segment(-0.05, 0.06, 0.3, 0.19, 0.1)), "fluid")
    mr.paint(
        scene.cover(
            scene.star(0.02, 0.13, (0.07, 0.1, 0.13, 0.11, 0.11, 0.11, 0.12, 0.1), jitter=0.05), 0.09
        ),
        "white",
    )
    mr.paint(scene.solid(scene.segment(-0.12, 0.12, 0.05, 0.15, 0.07)), "white")
    mr.paint(scene.solid(scene.segment(0.08, 0.16, 0.32, 0.21, 0.05)), "white")
    mr.paint(scene.solid(scene.segment(0.0, 0.23, 0.1, 0.24, 0.018)), "fluid")


def _face_midline(scene: Scene, mr: Painter) -> None:
    """Frontal and sphenoid sinus, nasal cavity, palate, tongue, jaw, clivus and the airway down to the
    larynx.
    """
    mr.paint(
        scene.solid(
            union(scene.segment(0.05, -0.55, 0.2, -0.6, 0.06), scene.segment(0.1, -0.5, 0.18, -0.1, 0.1))
        ),
        "gas",
    )
    if scene.chance(0.6):
        mr.paint(scene.solid(scene.segment(0.04, -0.5, 0.06, -0.2, 0.03)), "organ2")
        mr.paint(scene.solid(scene.segment(0.16, -0.52, 0.17, -0.2, 0.045)), "organ2")
    mr.paint(scene.solid(scene.segment(0.28, -0.55, 0.28, -0.2, 0.025)), "bone")
    mr.paint(scene.solid(scene.segment(0.29, -0.2, 0.38, -0.08, 0.03)), "muscle")
    mr.paint(scene.solid(scene.segment(0.33, -0.58, 0.45, -0.59, 0.03)), "bone")
    tongue = scene.star(
        0.46, -0.35, (0.2, 0.19, 0.14, 0.18, 0.2, 0.19, 0.15, 0.18), scene.number(0.9, 1.05), jitter=0.03
    )
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


def _neck_sagittal(scene: Scene, mr: Painter) -> None:
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


def _face_lateral(scene: Scene, mr: Painter) -> None:
    """An eye in its fat, the maxillary sinus, chewing muscles, jaw and mastoid cells."""
    mr.paint(scene.ellipse(0.02, -0.42, 0.15, 0.2), "fat")
    mr.paint(scene.solid(scene.segment(-0.06, -0.45, -0.02, -0.22, 0.018)), "muscle")
    mr.paint(scene.solid(scene.segment(0.1, -0.45, 0.06, -0.22, 0.018)), "muscle")
    mr.paint(scene.ellipse(0.02, -0.53, 0.1, 0.1), "fluid")
    sinus = scene.star(
        0.27, -0.4, (0.14, 0.13, 0.14, 0.14, 0.13, 0.12, 0.13, 0.13), scene.number(0.8, 1.1), jitter=0.08
    )
    mr.paint(scene.cover(sinus, 0.13, 1.12), "bone")
    mr.paint(scene.cover(sinus, 0.13), "gas")
    for y, x, high, wide, tilt in (
        (0.28, -0.14, 0.16, 0.07, 0.3),
        (0.42, 0.3, 0.28, 0.07, -0.2),
        (0.75, 0.2, 0.3, 0.06, 0.15),
    ):
        level = scene.level(y, x, high, wide, tilt)
        mr.paint(scene.cover(level, wide, 1.2), "fat")
        mr.paint(scene.cover(level, wide), "muscle")
    jaw = union(
        scene.segment(0.63, -0.48, 0.58, -0.14, 0.04),
        scene.segment(0.56, -0.1, 0.24, 0.0, 0.045),
        softness=0.05,
    )
    mr.paint(scene.solid(jaw - 0.02), "bone")
    mr.paint(scene.solid(jaw), "marrow")
    mr.paint(scene.solid(scene.segment(0.48, -0.52, 0.46, -0.3, 0.06)), "bone")
    mr.paint(
        scene.solid(scene.level(0.2, 0.2, 0.12, 0.1) - 1) * ((scene.texture(20).abs() - 0.3) * 4).clamp(0, 1),
        "gas",
    )
