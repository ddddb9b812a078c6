"""Trunk and limbs in MR: signal and fat share of a few adjacent slices of one invented patient."""

from __future__ import annotations

import torch
from torch import Tensor

from common.physics.acquisition import uniform
from common.physics.anatomy.scene import Scene, union
from common.physics.anatomy.tissue import MrAnatomy, Painter, scaled, surface


def abdomen_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial abdomen: fat ring, wall, liver, spleen, kidneys in fat, bowel, spine, vessels."""
    mr = Painter(scene, contrast)
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
    liver = scene.level(
        -0.08, side * -0.32, scene.number(0.32, 0.42), scene.number(0.32, 0.42)
    ) + 0.08 * scene.texture(5)
    mr.paint(scene.cover(liver, 0.35) * cavity, "organ")
    vessels = ((0.12 - scene.texture(12).abs()) * 6).clamp(0, 1) * scene.cover(liver, 0.35, 0.85)
    mr.paint(vessels * cavity, "vessel" if scene.chance(0.5) else "fluid")
    mr.paint(scene.ellipse(0.08, side * scene.number(0.48, 0.56), 0.2, 0.1, side * 0.3) * cavity, "organ2")
    bowel = ((scene.texture(9) - 0.1) * 5).clamp(0, 1) * scene.cover(
        scene.level(-0.25, side * 0.15, 0.28, 0.42), 0.28
    )
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


def _spine_mr(scene: Scene, mr: Painter) -> None:
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
    mr = Painter(scene, contrast)
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
        by, bx, bone = (
            y + scene.number(-0.08, 0.02),
            x + side * scene.number(-0.02, 0.06),
            scene.number(0.075, 0.105, 0.02),
        )
        mr.paint(scene.ellipse(by, bx, bone, bone), "bone")
        mr.paint(scene.ellipse(by, bx, bone * 0.62, bone * 0.62), "marrow")
        vy, vx = y + scene.number(0.0, 0.15), x - side * scene.number(0.08, 0.16)
        mr.paint(scene.ellipse(vy, vx, 0.03, 0.03), "vessel")
        mr.paint(scene.ellipse(vy + 0.05, vx, 0.03, 0.03), "fluid" if scene.chance(0.5) else "vessel")
        if scene.chance(0.4):
            mr.paint(
                inside * scene.ellipse(y + scene.number(-0.2, 0.2), x + scene.number(-0.2, 0.2), 0.06, 0.05),
                "lesion",
            )
    return mr.done()


def chest_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """An axial chest: dark lungs with vessels, heart or great vessels or the dome of the liver, wall, spine,
    often arms.
    """
    mr = Painter(scene, contrast)
    if contrast == "GRE" and scene.chance(0.6):  # fat suppressed
        mr.table["fat"], mr.table["marrow"] = 0.25 * mr.table["fat"], 0.3 * mr.table["marrow"]
    arms = scene.chance(0.6)
    scene.shrink(0.85 if arms else 1.0)
    high, wide = scene.number(0.58, 0.7, 0.02), scene.number(0.86, 0.94, 0.02)
    round_ = scene.star(0, 0, (1.0, 1.0, 1.0, 0.97, 1.0, 1.0, 1.0, 0.98, 1.0, 0.97, 1.0, 0.98), jitter=0.015)
    trunk = (scaled(scene, round_, high, wide, 2.5) - 1) * 0.65
    fat = uniform(scene.generator, 0.03, 0.1)
    if arms:
        for side in (-1, 1):
            y, radius = scene.number(-0.1, 0.2), scene.number(0.14, 0.18, 0.02)
            _limb(
                scene,
                mr,
                (scene.level(y, side * (wide + radius + 0.03), radius * 1.2, radius) - 1) * radius,
                0.03,
            )
            mr.paint(scene.ellipse(y, side * (wide + radius + 0.03), 0.06, 0.06), "bone")
            mr.paint(scene.ellipse(y, side * (wide + radius + 0.03), 0.04, 0.04), "marrow")
    inner = surface(scene, mr, trunk, fat)
    mr.paint(scene.solid(inner + 0.02) * scene.lines(18, 0.16), "fat")
    for side in (-1, 1):
        mr.paint(scene.solid(inner) * scene.ellipse(0.4, side * 0.2, 0.14, 0.15), "muscle")
    cage = inner + uniform(scene.generator, 0.07, 0.11) + 0.015 * scene.texture(8)
    angle = torch.atan2(scene.y, scene.x)
    ribs = scene.solid((cage - 0.03).abs() - 0.022) * (
        (torch.sin(11 * angle + uniform(scene.generator, 0, 6)) + 0.2) * 4
    ).clamp(0, 1)
    mr.paint(ribs, "bone")
    mr.paint(ribs * scene.solid((cage - 0.03).abs() - 0.01), "marrow")
    mr.paint(scene.solid(cage), "fat")
    lung = torch.full_like(cage, 1.0)
    for side in (-1, 1):
        shape = scene.star(
            -0.02, side * 0.43, (0.36, 0.4, 0.44, 0.4, 0.36, 0.44, 0.46, 0.44), high / 0.62, jitter=0.05
        )
        lung = torch.minimum(lung, (shape - 1) * 0.4)
    lung = scene.solid(torch.maximum(lung, cage))
    dark = 0.4 * mr.table["organ"]
    mr.paint(lung, "gas")
    mr.signal = mr.signal + lung * dark * (0.25 + 0.08 * scene.texture(10))
    hilum = (1.3 - ((scene.x.abs() - 0.2) / 0.45) ** 2 - (scene.y / 0.5) ** 2).clamp(0, 1)
    vessels = (
        torch.maximum(scene.lines(30, 0.2), scene.lines(18, 0.14))
        * hilum
        * ((scene.texture(16) + 0.4) * 2).clamp(0, 1)
    )
    mr.paint(lung * vessels, "vessel" if mr.table["vessel"] > 0.3 else "organ2")
    kind = ("heart", "heart", "great_vessels", "dome")[int(uniform(scene.generator, 0, 4))]
    if kind == "dome":
        dome = scene.star(
            -0.02,
            -0.42,
            (0.42, 0.36, 0.36, 0.38, 0.38, 0.4, 0.42, 0.42),
            scene.number(0.7, 1.0, 0.15),
            jitter=0.03,
        )
        liver = scene.solid(torch.maximum((dome - 1) * 0.38, cage + 0.01))
        mr.paint(liver, "organ")
        mr.paint(liver * scene.lines(18, 0.08) * ((scene.texture(12)) * 2).clamp(0, 1), "vessel")
    if kind == "great_vessels":
        mr.paint(
            scene.cover(
                scene.star(-0.1, 0.02, (0.18, 0.24, 0.3, 0.24, 0.18, 0.24, 0.3, 0.24), jitter=0.08), 0.2
            )
            * 0.8,
            "fat",
        )
        for vessel_y, vessel_x, bore in (
            (-0.2, -0.05, 0.1),
            (-0.12, 0.1, 0.1),
            (-0.1, -0.17, 0.06),
            (0.02, 0.02, 0.07),
        ):
            mr.paint(
                scene.ellipse(vessel_y + uniform(scene.generator, -0.03, 0.03), vessel_x, bore, bore * 1.1),
                "vessel",
            )
        mr.paint(scene.solid(scene.segment(-0.08, 0.05, 0.02, 0.3, 0.05)), "vessel")
        mr.paint(scene.solid(scene.segment(-0.02, -0.1, 0.03, -0.3, 0.045)), "vessel")
        mr.paint(scene.ellipse(0.08, 0, 0.05, 0.06), "gas")
    else:
        _heart(scene, mr, scene.number(0.7, 0.85) if kind == "dome" else scene.number(0.9, 1.15))
    _spine_mr(scene, mr)
    mr.paint(scene.ellipse(0.2, 0.13, 0.07, 0.07), "vessel")
    return mr.done()


def _limb(scene: Scene, mr: Painter, distance: Tensor, fat: float) -> None:
    inside = scene.solid(surface(scene, mr, distance, fat))
    mr.paint(inside * scene.lines(20, 0.12), "fat")


def _heart(scene: Scene, mr: Painter, size: Tensor) -> None:
    """Muscle around four chambers of blood, some fat outside."""
    level = scene.star(-0.12, 0.1, (0.32, 0.32, 0.26, 0.24, 0.3, 0.28, 0.25, 0.3), size, jitter=0.08)
    mr.paint(scene.cover(level, 0.25, 1.12), "fat")
    mr.paint(scene.cover(level, 0.25), "muscle")
    chambers = (
        (-0.1, 0.22, 0.13, 0.1, 0.5),
        (-0.2, 0.03, 0.09, 0.14, 0.5),
        (-0.08, -0.1, 0.1, 0.08, 0.0),
        (0.02, 0.08, 0.07, 0.11, 0.2),
    )
    for y, x, half_y, half_x, tilt in chambers:
        chamber = scene.ellipse(
            -0.12 + (y + 0.12) * size, 0.1 + (x - 0.1) * size, half_y * size, half_x * size, tilt
        )
        mr.paint(chamber * scene.cover(level, 0.25, 0.95), "vessel")
    mr.paint(scene.cover(level, 0.25, 0.9) * scene.lines(20, 0.14) * 0.6, "muscle")
    mr.signal = mr.signal * (1 + 0.1 * scene.cover(level, 0.25) * scene.texture(22))


def spine_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """A sagittal lumbar or cervical spine: vertebrae, discs, cord or roots in fluid, processes, muscles and
    fat behind.
    """
    mr = Painter(scene, contrast)
    lumbar = scene.chance(0.65)
    unit = scene.number(0.95, 1.1, 0.02) * (1.0 if lumbar else 0.72)
    lordosis, lean = uniform(scene.generator, 0.06, 0.16), uniform(scene.generator, -0.08, 0.08)
    line = -0.2 + lean * scene.y - lordosis * torch.cos(2.1 * (scene.y - 0.1))
    tail = ((scene.y - 0.62) / 0.4).clamp(min=0) if lumbar else torch.zeros_like(scene.y)
    line = line + 0.32 * tail**1.5
    along = (scene.x - line) / unit
    back = line + (0.74 if lumbar else 0.68) * unit - 0.5 * tail * 0.3
    skin = uniform(scene.generator, 0.08, 0.3) * (0.75 + 0.25 * scene.y.clamp(-1, 1)) + 0.02 * scene.texture(
        4
    )
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
    body = (
        ((along / half).abs() * 1.08) ** 5
        + (step.abs() / (0.36 - 0.03 * (1 - (along / half) ** 2).clamp(min=0))) ** 5
    ) ** 0.2
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
    cord = scene.solid(
        (canal + 0.005).abs() - 0.033 * ((conus + 0.25 - scene.y) / 0.25).clamp(0, 1)
    ) * scene.solid(scene.y - conus)
    mr.paint(cord, "white")
    if lumbar:
        roots = torch.sin(110 * canal + scene.texture(6)).clamp(0, 1) * scene.solid(
            (canal - 0.01).abs() - 0.05
        )
        mr.paint(roots * scene.solid(conus - scene.y) * 0.45, "white")
    behind = place - 0.3 * (canal - 0.25) + 0.12 * scene.texture(6)
    thorn = behind - behind.floor() - 0.5
    length = 0.14 + 0.03 * torch.sin(3.3 * behind.floor() + 40 * lean)
    process = (((canal - 0.12 - length) / length).abs() ** 3 + (thorn.abs() / 0.25) ** 3) ** (
        1 / 3
    ) + 0.12 * scene.texture(14)
    gap = (((canal - 0.24) / 0.13).abs() ** 3 + ((thorn.abs() - 0.5).abs() / 0.14) ** 3) ** (
        1 / 3
    ) + 0.2 * scene.texture(14)
    mr.paint(scene.cover(gap, 0.03) * 0.6, "fat")
    mr.paint(scene.cover(process, 0.06, 1.12), "bone")
    mr.paint(scene.cover(process, 0.06, 0.9), "marrow")
    fade = torch.exp(-uniform(scene.generator, 0.2, 1.1) * (-(scene.x - 0.1)).clamp(min=0) ** 1.5)
    mr.signal = mr.signal * fade
    return mr.done()


def knee_mr(scene: Scene, contrast: str) -> MrAnatomy:
    """A knee, sagittal or axial: marrow in dark cortex, cartilage, menisci, ligaments, fat pad, muscles,
    fat.
    """
    mr = Painter(scene, contrast)
    if scene.chance(0.5):
        scene.mirror()
    if scene.chance(0.65):
        _knee_sagittal(scene, mr)
    else:
        _knee_axial(scene, mr)
    return mr.done()


def _bone(scene: Scene, mr: Painter, distance: Tensor, cortex: float) -> None:
    """Marrow with fine trabeculae in a dark rim."""
    mr.paint(scene.solid(distance), "bone")
    inside = scene.solid(distance + cortex)
    mr.paint(inside, "marrow")
    mr.signal = mr.signal * (1 - inside * (0.06 + 0.05 * scene.texture(24) + 0.05 * scene.texture(6)))


def _knee_sagittal(scene: Scene, mr: Painter) -> None:
    leg = union(
        scene.segment(-1.6, 0.05, -0.2, 0.0, scene.number(0.62, 0.72, 0.02)),
        scene.segment(0.0, -0.02, 1.6, 0.12, scene.number(0.52, 0.62, 0.02)),
        softness=0.1,
    )
    inner = surface(scene, mr, leg + 0.02 * scene.texture(3), uniform(scene.generator, 0.03, 0.12))
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
    mr.paint(
        scene.solid((scene.x - 0.3 - 0.03 * scene.texture(4)).abs() - 0.03)
        * inside
        * scene.solid(scene.y.abs() - 0.9, 0.2),
        "vessel",
    )
    joint = scene.number(0.28, 0.34, 0.02)
    condyle = scene.star(
        0.0, 0.02, (0.32, 0.3, 0.29, 0.31, 0.33, 0.3, 0.26, 0.3), scene.number(0.95, 1.08), jitter=0.025
    )
    femur = union((condyle - 1) * 0.3, scene.segment(-1.6, -0.08, -0.2, -0.06, 0.17), softness=0.06)
    plateau = (
        scene.star(joint + 0.17, 0.02, (0.36, 0.28, 0.2, 0.27, 0.36, 0.24, 0.14, 0.24), jitter=0.025) - 1
    ) * 0.2
    tibia = union(plateau, scene.segment(joint + 0.25, 0.0, 1.7, 0.02, 0.17), softness=0.06)
    patella = (
        scene.star(-0.16, -0.47, (0.08, 0.16, 0.2, 0.14, 0.08, 0.13, 0.2, 0.15), jitter=0.06) - 1
    ) * 0.1
    cartilage = scene.solid(femur - 0.035) * scene.solid(-0.12 - scene.y - 0.5 * (scene.x < -0.1))
    mr.paint(cartilage, "organ2")
    mr.paint(scene.solid(tibia - 0.025) * scene.solid(scene.y - joint - 0.05), "organ2")
    mr.paint(scene.solid(patella - 0.025) * (scene.x > -0.48), "organ2")
    if scene.chance(0.4):
        mr.paint(
            scene.solid(
                scene.segment(-0.55, -0.29, -0.3, -0.33, scene.number(0.02, 0.05)) + 0.02 * scene.texture(10)
            ),
            "fluid",
        )
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
    pad = scene.solid(
        union(scene.segment(0.08, -0.4, 0.22, -0.34, 0.07), scene.segment(0.2, -0.3, 0.26, -0.26, 0.04))
    )
    mr.paint(pad * scene.lines(26, 0.1) * 0.5, "fluid")


def _knee_axial(scene: Scene, mr: Painter) -> None:
    leg = (
        scene.star(
            0,
            0,
            (0.78, 0.78, 0.76, 0.76, 0.76, 0.78, 0.78, 0.76, 0.74, 0.72, 0.74, 0.76),
            scene.number(0.95, 1.08),
        )
        - 1
    ) * 0.75
    inside = scene.solid(surface(scene, mr, leg, uniform(scene.generator, 0.05, 0.16)))
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
            mr.paint(
                scene.solid(scene.segment(-0.42, side * 0.3, -0.3, side * 0.48, scene.number(0.02, 0.06))),
                "fluid",
            )
    patella = (
        scene.star(
            -0.56, scene.number(-0.05, 0.05), (0.28, 0.16, 0.1, 0.16, 0.28, 0.13, 0.1, 0.13), jitter=0.05
        )
        - 1
    ) * 0.12
    mr.paint(scene.solid(patella - 0.03) * scene.solid(-0.58 - scene.y), "organ2")
    _bone(scene, mr, femur, 0.02)
    _bone(scene, mr, patella, 0.02)
    for side in (-1, 1):
        mr.paint(scene.solid(scene.segment(-0.5, side * 0.3, -0.15, side * 0.56, 0.015)), "bone")
