"""Bodies in CT: HU of a few adjacent slices of one invented patient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.physics.acquisition import uniform
from common.physics.anatomy.scene import Scene, union


class _Ct:
    """HU, painted tissue by tissue."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.hu = torch.full((scene.slices, scene.size, scene.size), -1000.0)

    def paint(self, cover: Tensor, hu: float | Tensor) -> None:
        self.hu = torch.lerp(self.hu, torch.as_tensor(hu), cover)


def head_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial head: scalp, skull, brain, ventricles; two slices in three at the level of the petrous
    bones.
    """
    ct = _Ct(scene)
    height, width = scene.number(0.78, 0.9, 0.03), scene.number(0.62, 0.74, 0.03)
    outline = scene.level(0, 0, height, width)
    ct.paint(scene.cover(outline, width), 25.0)
    ct.paint(scene.cover(outline, width, 0.975), -85.0)
    ct.paint(scene.cover(outline, width, uniform(scene.generator, 0.92, 0.96)), 45.0)
    outer = uniform(scene.generator, 0.88, 0.92)
    thickness = uniform(scene.generator, 0.07, 0.12) * (1 + 0.15 * scene.texture(5))
    ct.paint(scene.cover(outline, width, outer), scene.number(900, 1400))
    ct.paint(
        scene.cover((outline - outer + thickness / 2).abs() / (thickness * 0.2), 0.02), scene.number(300, 700)
    )
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
            ct.paint(
                scene.ellipse(y, side * 0.4 * width / 0.68, 0.075, 0.22, -tilt)
                * scene.cover(depth, width, 1.0),
                dense,
            )
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
        ct.paint(
            scene.cover(scene.x.abs() / 0.01, 0.01) * scene.cover(depth, width, 0.95) * (depth > 0.5), 48.0
        )
    if scene.chance(0.4):
        ct.paint(
            scene.spot(0.4, 0.35, 0.03, 0.12),
            scene.number(58, 75) if scene.chance(0.5) else scene.number(12, 22),
        )
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
    """Skin, fat and muscle of a body wider than high: (outline level, half-height, half-width), wall ending
    at level `inner`.
    """
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
        ct.paint(
            scene.ellipse(y + 1.6 * size, side * 1.35 * size, 0.03, size * 0.6, side * 0.3),
            scene.number(400, 700),
        )
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
    ct.paint(
        scene.ellipse(
            -0.12, scene.number(-0.04, 0.14), scene.number(0.22, 0.3), scene.number(0.22, 0.32), 0.4
        ),
        45.0,
    )
    ct.paint(
        scene.ellipse(-0.1, scene.number(0.0, 0.16), scene.number(0.12, 0.18), scene.number(0.12, 0.18)),
        blood,
    )
    spine_y = 0.48 * height
    ct.paint(scene.ellipse(spine_y - 0.18, 0.1, 0.05, 0.05), blood)
    _spine_ct(scene, ct, spine_y, scene.number(0.09, 0.12, 0.02))
    count = int(uniform(scene.generator, 8, 13))
    start = uniform(scene.generator, 0, 1)
    for number in range(count):
        angle = (number + start) * 2 * math.pi / count
        y, x = 0.8 * height * math.sin(angle), 0.8 * width * math.cos(angle)
        ct.paint(
            scene.ellipse(y, x, 0.028, scene.number(0.06, 0.11), angle + math.pi / 2), scene.number(400, 900)
        )
    ct.paint(scene.ellipse(-0.82 * height, 0, 0.03, 0.09), 350.0)
    if scene.chance(0.5):
        for side in (-1, 1):
            ct.paint(
                scene.ellipse(0.55 * height, side * 0.6 * width, 0.03, 0.15, side * 0.6),
                scene.number(500, 900),
            )
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
    liver = scene.level(
        -0.06, side * -0.36, scene.number(0.32, 0.42), scene.number(0.32, 0.42)
    ) + 0.07 * scene.texture(5)
    ct.paint(scene.cover(liver, 0.35) * cavity, scene.number(50, 65) + gain * 50 + 5 * scene.texture(14))
    ct.paint(
        scene.ellipse(0.06, side * 0.55, 0.2, 0.11, side * 0.3) * cavity, scene.number(45, 55) + gain * 70
    )
    bowel = ((scene.texture(9)) * 5).clamp(0, 1) * scene.cover(
        scene.level(-0.25, side * 0.18, 0.3, 0.45), 0.3
    )
    ct.paint(bowel * cavity, scene.number(20, 50))
    gas = ((scene.texture(12) - 0.9) * 5).clamp(0, 1) * scene.cover(
        scene.level(-0.3, side * 0.15, 0.22, 0.4), 0.22
    )
    ct.paint(gas * cavity, -850.0)
    spine_y, size = scene.number(0.24, 0.3, 0.03), scene.number(0.1, 0.13, 0.02)
    for edge in (-1, 1):
        ct.paint(scene.ellipse(0.42, edge * 0.18, 0.1, 0.14), 55.0)
        ct.paint(
            scene.ellipse(
                scene.number(0.12, 0.2), edge * scene.number(0.32, 0.4, 0.02), 0.15, 0.1, edge * 0.3
            )
            * cavity,
            35 + gain * 130,
        )
    _spine_ct(scene, ct, spine_y, size)
    ct.paint(scene.ellipse(spine_y - 1.6 * size, 0.05, 0.05, 0.05), 42 + gain * 160)
    for edge in (-1, 1):
        for angle in (0.1, 0.5, 0.9):
            y, x = 0.84 * height * math.sin(angle), edge * 0.84 * width * math.cos(angle)
            ct.paint(
                scene.ellipse(y, x, 0.026, scene.number(0.05, 0.1), edge * (angle + math.pi / 2)),
                scene.number(400, 800),
            )
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
        x, y, size = (
            side * scene.number(0.46, 0.54, 0.03),
            scene.number(-0.06, 0.06, 0.03),
            scene.number(0.13, 0.17, 0.03),
        )
        ct.paint(scene.ellipse(y, x - side * 0.13, size * 1.5, 0.06, side * 0.25), scene.number(800, 1200))
        ct.paint(scene.ellipse(y, x, size, size), scene.number(900, 1300))
        ct.paint(
            scene.ellipse(y, x, size * 0.84, size * 0.84), scene.number(350, 650) + 60 * scene.texture(24)
        )
        if scene.chance(0.6):
            ct.paint(scene.ellipse(y + 0.04, x + side * 0.2, 0.09, 0.07), scene.number(500, 800))
    ct.paint(scene.ellipse(0.33, 0, 0.07, scene.number(0.14, 0.24)), scene.number(350, 600))
    ct.paint(
        scene.ellipse(scene.number(-0.16, -0.06), 0, scene.number(0.1, 0.17), scene.number(0.14, 0.24)),
        130.0 if enhanced else 6.0,
    )
    ct.paint(scene.ellipse(0.17, scene.number(-0.03, 0.03), 0.08, 0.09), 40.0)
    if scene.chance(0.6):
        ct.paint(scene.ellipse(0.15, 0, 0.04, 0.05), -800.0)
    for side in (-1, 1):
        ct.paint(scene.ellipse(-0.3, side * 0.25, 0.03, 0.03), 180.0 if enhanced else 45.0)
    return ct.hu


def _fibres(scene: Scene, ct: _Ct, region: Tensor, hu: float | Tensor = 55.0, fat: float = 0.12) -> None:
    """Muscle with streaks of fat."""
    ct.paint(region, hu + 4 * scene.texture(30))
    ct.paint(region * scene.lines(24, fat) * 0.8, -90.0)


def _bone(
    scene: Scene, ct: _Ct, distance: Tensor, rim: float, dense: Tensor | float, spongy: Tensor | float
) -> None:
    """Cortex of this thickness around trabeculae, from the distance outside of the bone."""
    ct.paint(scene.solid(distance), dense)
    ct.paint(scene.solid(distance + rim), spongy + 30 * scene.texture(48) + 20 * scene.texture(20))


def spine_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial lumbar vertebra close up: it fills the image between the muscles of the back, psoas, vessels,
    fat and bowel.
    """
    ct = _Ct(scene)
    fat = -95 + 10 * scene.texture(16)
    ct.paint(torch.ones_like(scene.y), fat)
    bowel = ((scene.texture(11) + 0.1) * 4).clamp(0, 1) * scene.solid(
        scene.y + 0.55 + 0.08 * scene.texture(8)
    )
    ct.paint(bowel, scene.number(20, 45))
    ct.paint(bowel * ((scene.texture(13) - 0.7) * 4).clamp(0, 1), -700.0)
    size = scene.number(0.34, 0.42, 0.03)
    y = scene.number(-0.16, -0.08, 0.03)
    for side in (-1, 1):
        psoas = scene.star(
            y + 0.1,
            side * 0.62,
            (0.22, 0.3, 0.32, 0.3, 0.22, 0.26, 0.32, 0.26),
            scene.number(0.75, 1.1),
            jitter=0.08,
        )
        _fibres(scene, ct, scene.cover(psoas, 0.25))
        back = scene.star(
            0.66,
            side * 0.42,
            (0.4, 0.3, 0.24, 0.26, 0.36, 0.28, 0.24, 0.3),
            scene.number(0.9, 1.1),
            jitter=0.06,
        )
        _fibres(scene, ct, scene.cover(back, 0.28), fat=uniform(scene.generator, 0.05, 0.3))
        flank = scene.solid(scene.segment(0.1, side * 0.95, 0.45, side * 0.9, 0.13) + 0.03 * scene.texture(8))
        _fibres(scene, ct, flank)
    blood = scene.number(150, 260) if enhanced else scene.number(38, 50)
    ct.paint(scene.ellipse(y - 0.56, 0.1, 0.13, 0.13), blood)
    ct.paint(
        scene.cover(
            scene.star(y - 0.54, -0.24, (0.15, 0.13, 0.1, 0.12, 0.16, 0.13, 0.1, 0.12), jitter=0.1), 0.12
        ),
        blood - 8,
    )
    if scene.chance(0.4):
        plaque = scene.solid((scene.level(y - 0.56, 0.1, 0.125, 0.125) - 1).abs() * 0.125 - 0.014)
        ct.paint(plaque * ((scene.texture(14) - 0.3) * 4).clamp(0, 1), scene.number(400, 900))
    dense, spongy = scene.number(450, 900), scene.number(110, 240)
    rim = uniform(scene.generator, 0.02, 0.045)
    round_ = scene.star(
        y, 0, (1.25, 1.2, 1.0, 0.82, 1.0, 1.2, 1.25, 1.15, 1.02, 1.0, 1.02, 1.15), size, jitter=0.02
    )
    if scene.chance(0.25):  # a disc in its margin
        ct.paint(scene.cover(round_, 0.4), scene.number(75, 110))
        ct.paint(
            scene.cover((round_ - 0.9).abs() / 0.06, 0.03) * ((scene.texture(8) - 0.2) * 3).clamp(0, 1), dense
        )
    else:
        _bone(scene, ct, (round_ - 1) * 0.4, rim, dense, spongy)
    canal_y = y + 1.18 * size
    arch = union(
        *(scene.segment(canal_y - 0.1, side * 0.3, canal_y + 0.3, side * 0.06, 0.08) for side in (-1, 1)),
        softness=0.02,
    )
    for side in (-1, 1):
        facet = (
            scene.star(canal_y + 0.1, side * 0.32, (0.1, 0.13, 0.16, 0.13, 0.1, 0.12, 0.16, 0.12), jitter=0.1)
            - 1
        ) * 0.12
        arch = union(
            arch, facet, scene.segment(canal_y, side * 0.3, canal_y + 0.06, side * 0.75, 0.045), softness=0.02
        )
    thorn = union(
        scene.segment(canal_y + 0.28, 0, canal_y + scene.number(0.45, 0.7), 0, 0.055), arch, softness=0.03
    )
    thorn = torch.maximum(thorn, -(scene.level(canal_y, 0, 0.18, 0.22) - 1) * 0.18)
    _bone(scene, ct, thorn, 0.028, dense + 100, spongy + 120)
    canal = scene.star(canal_y, 0, (0.22, 0.16, 0.2, 0.16, 0.22, 0.19, 0.15, 0.19), jitter=0.03)
    ct.paint(scene.cover(canal, 0.17), -40.0)
    ct.paint(scene.ellipse(canal_y - 0.02, 0, 0.12, 0.16), scene.number(15, 35))
    for side in (-1, 1):
        joint = scene.segment(canal_y + 0.04, side * 0.38, canal_y + 0.18, side * 0.28, 0.008)
        ct.paint(scene.solid(joint), 60.0)
    if scene.chance(0.5):
        skin = scene.y - scene.number(0.9, 1.0, 0.03)
        ct.paint(scene.solid(-skin), -100.0)
        ct.paint(scene.solid(0.06 - skin), -1000.0)
    return ct.hu


def knee_ct(scene: Scene, enhanced: bool) -> Tensor:
    """One knee or two, or thighs: femur with patella, tibia with fibula, or shafts, among muscles and fat."""
    ct = _Ct(scene)
    two = scene.chance(0.6)
    scene.shrink(1.02 if two else 1.4)
    level = ("condyles", "condyles", "tibia", "thigh")[int(uniform(scene.generator, 0, 4))]
    height, size = uniform(scene.generator, -0.08, 0.08), scene.number(0.9, 1.08, 0.03)
    for side in (-1, 1) if two else (0,):
        _leg(
            scene,
            ct,
            level,
            height + scene.number(-0.03, 0.03),
            side * scene.number(0.46, 0.52, 0.02),
            side or 1,
            size,
            enhanced,
        )
    return ct.hu


def _leg(
    scene: Scene, ct: _Ct, level: str, y: Tensor, x: Tensor, side: int, size: Tensor, enhanced: bool
) -> None:
    skin = (
        scene.star(
            y, x, (0.42, 0.43, 0.43, 0.42, 0.42, 0.43, 0.42, 0.39, 0.39, 0.4, 0.42, 0.42), size, jitter=0.025
        )
        - 1
    ) * 0.4
    fat = uniform(scene.generator, 0.03, 0.1) * (1 + 0.25 * scene.texture(8))
    ct.paint(scene.solid(skin), 10.0)
    ct.paint(scene.solid(skin + 0.015), -105.0 + 8 * scene.texture(16))
    inside = scene.solid(skin + 0.02 + fat)
    shaft = level == "thigh"
    if shaft:
        _fibres(scene, ct, inside, fat=0.1)
        ct.paint(inside * scene.lines(14, 0.12), -85.0)
    bellies = (
        (0.16, 0.24, 0.11),
        (0.24, 0.06, 0.1),
        (0.24, -0.1, 0.11),
        (0.14, -0.25, 0.1),
        (-0.02, 0.3, 0.07),
    )
    for dy, dx, radius in bellies:
        belly = (
            scene.star(y + dy * size, x + side * dx * size, (radius,) * 7, size, jitter=0.14) - 1
        ) * radius
        _fibres(scene, ct, scene.solid(torch.maximum(belly, skin + 0.05)), fat=0.08)
    blood = scene.number(150, 280) if enhanced else scene.number(40, 50)
    for dy, dx in ((0.16, 0.0), (0.2, 0.04)):
        ct.paint(scene.ellipse(y + dy, x + dx, 0.03, 0.03), blood)
    dense, spongy = scene.number(900, 1500), scene.number(120, 320)
    if level == "condyles":
        radii = (0.26, 0.25, 0.27, 0.16, 0.04, 0.16, 0.27, 0.25, 0.26, 0.25, 0.22, 0.2, 0.14, 0.2, 0.22, 0.25)
        femur = (scene.star(y - 0.05 * size, x, radii, size, jitter=0.04) - 1) * 0.22
        patella = scene.star(
            y - 0.31 * size,
            x + side * 0.02,
            (0.15, 0.09, 0.06, 0.09, 0.15, 0.08, 0.06, 0.08),
            size,
            jitter=0.06,
        )
        ct.paint(scene.solid(scene.level(y - 0.2, x, 0.13, 0.22) - 1), scene.number(5, 45))
        ct.paint(scene.solid(femur - 0.012), 70.0)
        _bone(scene, ct, femur, 0.012, 0.7 * dense, spongy)
        _bone(scene, ct, (patella - 1) * 0.08, 0.015, 0.8 * dense, spongy + 80)
    elif level == "tibia":
        plateau = (0.25, 0.22, 0.18, 0.18, 0.22, 0.25, 0.23, 0.2, 0.21, 0.23)
        _bone(
            scene,
            ct,
            (scene.star(y - 0.06 * size, x, plateau, size, jitter=0.04) - 1) * 0.2,
            0.013,
            0.7 * dense,
            spongy,
        )
        _bone(
            scene,
            ct,
            (scene.level(y + 0.12 * size, x + side * 0.22 * size, 0.06, 0.05) - 1) * 0.05,
            0.014,
            dense,
            spongy,
        )
        ct.paint(scene.ellipse(y - 0.32 * size, x, 0.025, 0.08), 90.0)
    else:
        bone = (
            scene.star(
                y - 0.06, x + side * 0.02, (0.1, 0.1, 0.11, 0.1, 0.1, 0.1, 0.09, 0.1), size, jitter=0.04
            )
            - 1
        ) * 0.1
        _bone(scene, ct, bone, uniform(scene.generator, 0.03, 0.05), dense + 100, -40.0)


def shoulder_ct(scene: Scene, enhanced: bool) -> Tensor:
    """An axial upper chest with the arms down: dense shoulders with humeral heads, scapulae and clavicles;
    lung apices, trachea, spine.
    """
    ct = _Ct(scene)
    wide, high = scene.number(0.86, 0.96, 0.02), scene.number(0.34, 0.42, 0.02)
    parts = [(scene.level(0, 0, high, 0.62) - 1) * high]
    joint_y, joint_x = scene.number(-0.02, 0.08, 0.03), wide - 0.24
    for side in (-1, 1):
        bulge = scene.star(
            joint_y, side * joint_x, (0.25, 0.25, 0.27, 0.25, 0.25, 0.25, 0.26, 0.25), jitter=0.05
        )
        parts.append((bulge - 1) * 0.25)
    skin = union(*parts, softness=0.08)
    fat = uniform(scene.generator, 0.02, 0.09) * (1 + 0.3 * scene.texture(6))
    ct.paint(scene.solid(skin), 15.0)
    ct.paint(scene.solid(skin + 0.012), -102.0 + 8 * scene.texture(14))
    inside = scene.solid(skin + 0.016 + fat)
    _fibres(scene, ct, inside, fat=0.08)
    ct.paint(inside * scene.lines(13, 0.1), -85.0)
    dense, spongy = scene.number(600, 1100), scene.number(150, 350)
    apex = scene.number(0.55, 1.1, 0.15)
    for side in (-1, 1):
        lung = scene.star(0.05, side * 0.26, (0.15, 0.2, 0.2, 0.2, 0.13, 0.17, 0.2, 0.18), apex, jitter=0.06)
        ct.paint(scene.cover(lung, 0.15, 1.2), -30.0)
        ct.paint(scene.cover(lung, 0.15), -870 + 25 * scene.texture(8))
        ct.paint(
            scene.cover(lung, 0.15) * scene.lines(30, 0.1) * ((scene.texture(14)) * 2).clamp(0, 0.8), 10.0
        )
        for number in range(3):
            angle = 0.9 * number - 0.9 + uniform(scene.generator, -0.1, 0.1)
            y, x = (
                0.05 + 0.26 * apex * torch.as_tensor(math.sin(angle)),
                side * (0.26 + 0.22 * apex * math.cos(angle)),
            )
            _bone(
                scene,
                ct,
                (scene.level(y, x, 0.022, 0.08, side * angle + math.pi / 2) - 1) * 0.022,
                0.012,
                dense,
                spongy,
            )
        head = (
            scene.star(
                joint_y - 0.02, side * (joint_x + 0.02), (0.12,) * 8, scene.number(0.9, 1.1), jitter=0.04
            )
            - 1
        ) * 0.12
        blade = union(
            scene.segment(
                joint_y + 0.02, side * (joint_x - 0.14), joint_y + 0.14, side * (joint_x - 0.26), 0.028
            ),
            scene.segment(joint_y + 0.14, side * (joint_x - 0.26), joint_y + 0.2, side * 0.34, 0.014),
            scene.segment(
                joint_y + 0.14, side * (joint_x - 0.24), joint_y + 0.2, side * (joint_x - 0.02), 0.02
            ),
            softness=0.015,
        )
        _bone(scene, ct, torch.maximum(blade, skin + 0.03), 0.014, dense + 100, spongy + 150)
        _bone(scene, ct, head, 0.016, dense + 200, spongy)
        if scene.chance(0.7):
            clavicle = scene.segment(
                -0.2, side * 0.12, joint_y - 0.16, side * (joint_x - 0.12), 0.026
            ) + 0.015 * scene.texture(5)
            _bone(scene, ct, torch.maximum(clavicle, skin + 0.04), 0.014, dense + 200, spongy + 100)
    blood = scene.number(150, 320) if enhanced else scene.number(38, 52)
    ct.paint(
        scene.cover(
            scene.star(-0.08, 0, (0.16, 0.14, 0.12, 0.14, 0.16, 0.14, 0.12, 0.14), jitter=0.08), 0.13
        ),
        -60.0,
    )
    for vessel_y, vessel_x, radius in (
        (-0.12, 0.1, 0.035),
        (-0.12, -0.1, 0.04),
        (-0.06, 0.13, 0.03),
        (-0.16, -0.02, 0.035),
    ):
        ct.paint(
            scene.ellipse(vessel_y, vessel_x + uniform(scene.generator, -0.02, 0.02), radius, radius), blood
        )
    ct.paint(scene.ellipse(-0.06, 0, 0.045, 0.04), -980.0)
    ct.paint(scene.ellipse(0.02, 0.02, 0.025, 0.035), 40.0)
    _spine_ct(scene, ct, scene.number(0.12, 0.16, 0.02), scene.number(0.055, 0.07, 0.02))
    return ct.hu


def qa_phantom_ct(scene: Scene, enhanced: bool) -> Tensor:
    """A quality-assurance object: a shell like a skull or a plastic drum, air or water inside, inserts of
    known HU; sometimes a holder.
    """
    ct = _Ct(scene)
    scene.stiffen()
    if scene.chance(0.6):
        _head_object(scene, ct)
    else:
        _drum(scene, ct)
    if scene.chance(0.5):
        holder = scene.solid((scene.level(-0.25, 0, 1.16, 0.92) - 1).abs() * 0.9 - 0.014) * scene.solid(
            -0.3 - scene.y
        )
        ct.paint(holder, scene.number(80, 300))
    return ct.hu + (100.0 if enhanced else 0.0) * ((ct.hu > 60) & (ct.hu < 200))


def _head_object(scene: Scene, ct: _Ct) -> None:
    """A dry skull, or only the top of one, around air; with plastic inserts on a stand."""
    small = scene.number(0.3, 0.6, 0.1) if scene.chance(0.25) else scene.number(0.92, 1.05, 0.03)
    radii = (0.58, 0.64, 0.7, 0.74, 0.7, 0.64, 0.58, 0.58, 0.66, 0.7, 0.66, 0.58)
    shell = (scene.star(0, 0, radii, small, jitter=0.02) - 1) * 0.62
    dense, thickness = (
        scene.number(700, 1400),
        uniform(scene.generator, 0.05, 0.09) * (1 + 0.2 * scene.texture(6)),
    )
    if float(small[0]) < 0.62:
        thickness = thickness * 2.2
    ring = scene.solid(shell) * scene.solid(-shell - thickness)
    ct.paint(ring, dense + 80 * scene.texture(20))
    ct.paint(scene.solid((shell + thickness / 2).abs() - 0.2 * thickness), 0.5 * dense)
    inside = scene.solid(shell + thickness)
    if scene.chance(0.35):
        ct.paint(inside, scene.number(-5, 40))
    floor = scene.chance(0.35)
    if floor and float(small[0]) > 0.62:
        for side in (-1, 1):
            petrous = scene.segment(-0.02, side * 0.12, 0.22, side * 0.5, 0.07) + 0.04 * scene.texture(14)
            ct.paint(scene.solid(petrous), dense + 150 * scene.texture(20))
            ct.paint(
                scene.solid(
                    scene.segment(-0.3, side * 0.52, -0.12, side * 0.2, 0.03) + 0.02 * scene.texture(14)
                ),
                dense,
            )
        face = ((scene.lines(14, 0.25) - 0.3) * 2).clamp(0, 1) * scene.cover(
            scene.level(-0.62, 0, 0.34, 0.36), 0.3
        )
        ct.paint(face, dense)
        ct.paint(scene.solid(scene.segment(-0.9, 0, -0.4, 0, 0.025)), dense)
    if scene.chance(0.85):
        _inserts(
            scene, ct, 0.24 * torch.minimum(small, torch.tensor(1.0)), int(uniform(scene.generator, 1, 5))
        )


def _drum(scene: Scene, ct: _Ct) -> None:
    """A round plastic shell full of water or solid plastic, with rods on a circle, a cube, or a pattern of
    bars.
    """
    radius = scene.number(0.7, 0.9, 0.02)
    level = scene.level(0, 0, radius, radius)
    ct.paint(scene.cover(level, radius), scene.number(80, 140))
    inside = scene.cover(level, radius, uniform(scene.generator, 0.9, 0.96))
    filling = uniform(scene.generator, 0, 1)
    ct.paint(
        inside,
        scene.number(-10, 10) if filling < 0.55 else scene.number(50, 130) if filling < 0.85 else -1000.0,
    )
    # air, PMP, LDPE, polystyrene, acrylic, acetal, PTFE
    materials = (
        -1000.0,
        -200.0,
        -100.0,
        -35.0,
        120.0,
        340.0,
        950.0,
    )
    count, turn = int(uniform(scene.generator, 4, 10)), uniform(scene.generator, 0, 6.3)
    place, size = uniform(scene.generator, 0.5, 0.68), uniform(scene.generator, 0.06, 0.12)
    for number in range(count):
        angle = turn + number * 2 * math.pi / count
        value = materials[int(uniform(scene.generator, 0, len(materials)))]
        ct.paint(
            scene.ellipse(place * radius * math.sin(angle), place * radius * math.cos(angle), size, size),
            value,
        )
    if scene.chance(0.5):
        bars = (torch.sin(scene.x * uniform(scene.generator, 25, 60)) * 4).clamp(0, 1)
        ct.paint(bars * scene.solid(torch.maximum(scene.y.abs() - 0.12, scene.x.abs() - 0.22)), 340.0)
    if scene.chance(0.4):
        _inserts(scene, ct, 0.2, 2)


def _inserts(scene: Scene, ct: _Ct, spread: Tensor | float, count: int) -> None:
    """Cylinders, hollow cylinders and cubes of plastic, with a stem through the slice or holes in them."""
    for _ in range(count):
        y, x = scene.number(-1, 1, 0.02) * spread, scene.number(-1, 1, 0.02) * spread
        size, value = (
            scene.number(0.05, 0.16, 0.04),
            scene.number(40, 160) if scene.chance(0.75) else scene.number(-120, 900),
        )
        if scene.chance(0.35):
            ct.paint(scene.solid(torch.maximum((scene.y - y).abs(), (scene.x - x).abs()) - 0.9 * size), value)
        else:
            ct.paint(scene.ellipse(y, x, size, size), value)
        if scene.chance(0.3):
            ct.paint(scene.ellipse(y, x, 0.4 * size, 0.4 * size), -1000.0)


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
    "spine": spine_ct,
    "knee": knee_ct,
    "shoulder": shoulder_ct,
    "qa_phantom": qa_phantom_ct,
}
