"""Claims about invented bodies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from common.physics.anatomy import FIELD_OF_VIEW_MM, MR_BODIES
from common.physics.anatomy.ct import CT_BODIES
from common.physics.anatomy.scene import Scene
from common.physics.anatomy.tissue import CONTRASTS, MrAnatomy

BODIES = [("CT", body) for body in CT_BODIES] + [("MR", body) for body in MR_BODIES]


def scene(seed: int, slices: int = 2) -> Scene:
    return Scene(64, slices, torch.Generator().manual_seed(seed), 0.92)


def draw_mr(body: str, seed: int, contrast: str = "T1") -> tuple[Scene, MrAnatomy]:
    """A patient and the grid he was drawn on."""
    grid = scene(seed)
    return grid, MR_BODIES[body](grid, contrast)


def pixels(modality: str, body: str, seed: int) -> Tensor:
    return CT_BODIES[body](scene(seed), seed % 2 == 0) if modality == "CT" else draw_mr(body, seed)[1].signal


def near(grid: Scene, y: float, x: float, radius: float = 0.06) -> Tensor:
    return (grid.y - y) ** 2 + (grid.x - x) ** 2 < radius**2


@pytest.mark.parametrize("body", CT_BODIES)
def test_ct_bodies_are_finite_hu(body: str) -> None:
    for seed in range(8):
        hu = pixels("CT", body, seed)
        assert hu.shape == (2, 64, 64)
        assert torch.isfinite(hu).all()
        assert hu.min() >= -1024
        assert hu.max() <= 3071


@pytest.mark.parametrize("contrast", CONTRASTS)
@pytest.mark.parametrize("body", MR_BODIES)
def test_mr_bodies_are_finite_signal_and_fat_shares(body: str, contrast: str) -> None:
    for seed in range(4):
        _, made = draw_mr(body, seed, contrast)
        assert made.signal.shape == made.fat.shape == (2, 64, 64)
        assert torch.isfinite(made.signal).all()
        assert made.signal.min() >= 0
        assert 0.1 < made.signal.max() < 3
        assert made.fat.min() >= 0
        assert made.fat.max() <= 1


def test_every_body_has_a_field_of_view_and_every_contrast_the_same_tissues() -> None:
    assert set(FIELD_OF_VIEW_MM) == set(CT_BODIES) | set(MR_BODIES)
    assert len({tuple(table) for table in CONTRASTS.values()}) == 1


@pytest.mark.parametrize(("modality", "body"), BODIES)
def test_neighbouring_slices_are_more_alike_than_patients(modality: str, body: str) -> None:
    patients = [pixels(modality, body, seed) for seed in range(8)]
    within = sum(float((one[0] - one[1]).abs().mean()) for one in patients) / 8
    between = sum(float((one[0] - other[0]).abs().mean()) for one, other in pairwise(patients)) / 7
    assert within < 0.6 * between


@pytest.mark.parametrize(("modality", "body"), BODIES)
def test_a_patient_is_drawn_again_from_the_same_seed(modality: str, body: str) -> None:
    assert torch.equal(pixels(modality, body, 3), pixels(modality, body, 3))


def test_a_brain_without_scalp_holds_no_fat_and_its_rim_is_faint() -> None:
    for seed in range(12):
        for contrast in ("EPI", "DWI", "T1"):
            _, made = draw_mr("brain_only", seed, contrast)
            bright = made.signal > 0.3 * made.signal.max()
            assert float((made.fat * bright).sum() / bright.sum()) < 0.02
            assert float((made.signal * made.fat).max()) < 0.25


def test_cerebrospinal_fluid_is_brightest_in_epi_and_dark_in_dwi() -> None:
    assert CONTRASTS["EPI"]["fluid"] == max(CONTRASTS["EPI"].values())
    assert CONTRASTS["DWI"]["fluid"] < CONTRASTS["DWI"]["white"]
    for contrast in ("EPI", "DWI"):
        assert max(CONTRASTS[contrast][tissue] for tissue in ("fat", "marrow", "skin")) <= 0.12


def test_knee_marrow_is_fat() -> None:
    for seed in range(8):
        grid, made = draw_mr("knee", seed)
        assert float(made.fat[near(grid, -0.03, 0.0)].min()) > 0.9


def test_a_sagittal_brain_is_water_in_a_scalp_of_fat() -> None:
    for seed in range(8):
        grid, made = draw_mr("head_sagittal", seed)
        assert float(made.fat[near(grid, -0.4, 0.1, 0.15)].max()) < 0.05
        shell = (grid.y < -0.3) & (made.fat > 0.8)
        assert float(made.signal[shell].median()) > 0.7


@pytest.mark.parametrize("body", ["skull_base", "chest", "spine", "knee"])
def test_bodies_with_a_fat_layer_show_fat_and_water(body: str) -> None:
    for seed in range(6):
        _, made = draw_mr(body, seed)
        tissue = made.signal > 0.15
        share = float(made.fat[tissue].mean())
        assert 0.1 < share < 0.92


def test_skull_base_and_chest_hold_air() -> None:
    for seed in range(6):
        grid, made = draw_mr("chest", seed)
        lungs = (grid.y.abs() < 0.4) & (grid.x.abs() < 0.8)
        assert 0.2 < float((made.signal[lungs] < 0.25).float().mean()) < 0.9
        grid, made = draw_mr("skull_base", seed)
        inside = near(grid, -0.35, 0.0, 0.5)
        assert float((made.signal[inside] < 0.08).float().mean()) > 0.02


@pytest.mark.parametrize(
    ("body", "air", "soft", "bone"),
    [("spine", 0.0, 0.25, 0.05), ("knee", 0.4, 0.2, 0.02), ("shoulder", 0.4, 0.12, 0.05)],
)
def test_ct_bodies_hold_air_soft_tissue_and_bone(body: str, air: float, soft: float, bone: float) -> None:
    """At least these shares: of the image below -900 HU, of the body within 20..120 HU and above 250 HU; some
    fat, no metal.
    """
    for seed in range(8):
        hu = CT_BODIES[body](scene(seed), False)
        assert float((hu < -900).float().mean()) >= air
        inside = hu[hu > -500]
        assert float(((inside > 20) & (inside < 120)).float().mean()) >= soft
        assert float((inside > 250).float().mean()) >= bone
        assert float(((inside > -130) & (inside < -60)).float().mean()) > 0.02
        assert hu.max() < 2200


def test_a_ct_spine_fills_its_image() -> None:
    for seed in range(8):
        hu = CT_BODIES["spine"](scene(seed), False)
        assert float((hu > -200).float().mean()) > 0.75


def test_qa_phantoms_are_rigid_and_mostly_of_few_materials() -> None:
    for seed in range(8):
        hu = CT_BODIES["qa_phantom"](scene(seed), False)
        counts = torch.bincount(((hu[0] + 1024) / 20).long().flatten())
        assert float(counts.sort(descending=True).values[:4].sum()) > 0.7 * hu[0].numel()
