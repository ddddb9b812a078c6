"""Labels and axes stay true: artifacts lie along rows and columns, and nothing depends on what is shown."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from common.artifacts import MODALITIES
from common.augmentation import (
    MAX_SHIFT,
    MIN_CROP,
    augment_anatomy,
    augment_slices,
    augmenter,
)
from common.preprocess import CT_RANGE_HU, MR_CLIP, MR_STEPS

CT, MR = (MODALITIES.index(name) for name in ("CT", "MR"))
SIDE = 64
KEEPS_AXES = ("flip", "rotation", "scale", "crop", "shift", "contrast")


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(count: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4000, (count, SIDE, SIDE)).astype(np.int16)


def modality(code: int, count: int = 6) -> np.ndarray:
    return np.full(count, code, np.int8)


def test_mirror_images_and_quarter_turns_of_mr_are_exact() -> None:
    images = noise(40)
    found = augment_slices(images, modality(MR, 40), ("flip", "rotation"), drawn())
    which = []
    for before, after in zip(images, found, strict=True):
        forms = [np.rot90(one, k) for one in (before, before[:, ::-1]) for k in range(4)]
        which.append([np.array_equal(form, after) for form in forms].index(True))
    assert set(which) == set(range(8))


def ghosted(along: int) -> np.ndarray:
    """A disc, and a fainter one displaced along an axis, as of an EPI ghost; scaled MR, stored."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    disc = (np.hypot(rows, columns) < 9).astype(np.float32)
    image = disc + 0.6 * np.roll(disc, 22, axis=along)
    return (image * MR_STEPS * 0.6).astype(np.int16)


def direction_of_ghost(image: np.ndarray) -> float:
    """Angle between disc and ghost, in degrees, 0 to 90: by the two centres of mass."""
    bright, faint = image > 0.8 * image.max(), (image > 0.4 * image.max()) & (image < 0.7 * image.max())
    (y, x), (v, u) = (np.argwhere(part).mean(axis=0) for part in (bright, faint))
    return math.degrees(math.atan2(abs(y - v), abs(x - u)))


@pytest.mark.parametrize("along", [0, 1])
def test_a_ghost_stays_along_rows_or_columns(along: int) -> None:
    words = [word for word in KEEPS_AXES if word not in ("crop", "contrast")]
    images = np.stack([ghosted(along)] * 24)
    found = augment_slices(images, modality(MR, 24), words, drawn())
    angles = np.array([direction_of_ghost(image) for image in found])
    assert (np.minimum(angles, 90 - angles) < 4).all()
    assert {angle < 45 for angle in angles} == {True, False}  # quarter turns exchange the axes


def test_the_same_turn_before_an_artifact_is_free() -> None:
    image = ghosted(0).astype(np.float32) / MR_STEPS
    angles = [
        direction_of_ghost(augment_anatomy([image], "MR", ("rotation",), drawn(seed))[0])
        for seed in range(12)
    ]
    assert max(min(angle, 90 - angle) for angle in angles) > 8


def test_ct_is_turned_freely_as_its_geometry_has_no_axis() -> None:
    rows = np.full((SIDE, SIDE), -1024, np.int16)
    rows[30:34, 12:52] = 1000  # a bar
    angles = []
    for found in augment_slices(np.stack([rows] * 12), modality(CT, 12), ("rotation",), drawn()):
        places = np.argwhere(found > 0) - SIDE / 2
        y, x = np.linalg.svd(places - places.mean(0))[2][0]
        angles.append(math.degrees(math.atan2(y, x)) % 180)
    turned = [min(angle, 180 - angle) for angle in angles]
    assert max(turned) <= 16
    assert max(turned) > 5
    assert len({round(angle) for angle in turned}) > 5


@pytest.mark.parametrize("code", [CT, MR])
def test_outside_of_the_image_is_air(code: int) -> None:
    images = np.full((8, SIDE, SIDE), 300, np.int16)
    found = augment_slices(images, modality(code, 8), ("shift",), drawn())
    air = CT_RANGE_HU[0] if code == CT else 0.0
    corners = np.concatenate([found[:, at, other] for at, other in itertools.product((0, -1), (0, -1))])
    assert (corners == air).mean() > 0.5
    assert (found[:, SIDE // 2, SIDE // 2] == 300).all()


def test_a_shift_moves_by_at_most_its_share_and_a_crop_shows_at_least_its_own() -> None:
    point = np.zeros((64, SIDE, SIDE), np.int16)
    point[:, 31:33, 31:33] = 4000
    codes = modality(MR, 64)

    def moves(word: str) -> np.ndarray:
        found = augment_slices(point, codes, (word,), drawn()).astype(np.float64)
        places = np.arange(SIDE) - (SIDE - 1) / 2
        total = found.sum(axis=(1, 2))
        return np.stack([(found.sum(axis=2) @ places) / total, (found.sum(axis=1) @ places) / total], axis=1)

    assert MAX_SHIFT * SIDE * 0.8 < np.abs(moves("shift")).max() <= MAX_SHIFT * SIDE + 0.1
    assert np.abs(moves("scale")).max() < 0.1
    widest = (1 - MIN_CROP) / 2 * SIDE / MIN_CROP
    assert widest * 0.5 < np.abs(moves("crop")).max() <= widest + 0.1


def test_contrast_keeps_the_order_of_signals_and_the_range() -> None:
    ramp = np.linspace(0, MR_CLIP, SIDE)
    images = np.tile((ramp * MR_STEPS).astype(np.int16), (16, SIDE, 1))
    found = augment_slices(images, modality(MR, 16), ("contrast",), drawn())
    assert (np.diff(found.astype(int), axis=2) >= 0).all()
    assert found.min() >= 0
    assert found.max() <= MR_CLIP * MR_STEPS
    assert np.ptp(found[:, 0, 20]) > 200
    hu = np.tile(np.linspace(*CT_RANGE_HU, SIDE).astype(np.int16), (16, SIDE, 1))
    changed = augment_slices(hu, modality(CT, 16), ("contrast",), drawn()).astype(int)
    assert (np.diff(changed, axis=2) >= 0).all()
    assert np.abs(changed - hu).max() <= 0.03 * (1000 + CT_RANGE_HU[1]) + 1
    assert np.abs(changed - hu).max() > 20


def test_nothing_named_is_nothing_done() -> None:
    assert augmenter((), 1) is None
    images = noise()
    assert np.array_equal(augment_slices(images, modality(MR), (), drawn()), images)
    clean = [image.astype(np.float32) / MR_STEPS for image in images]
    kept = augment_anatomy(clean, "MR", (), drawn())
    assert all(np.array_equal(one, other) for one, other in zip(kept, clean, strict=True))


def test_a_change_draws_the_same_beside_another() -> None:
    images = noise()
    flipped = augment_slices(images, modality(MR), ("flip",), drawn())
    both = augment_slices(images, modality(MR), ("flip", "contrast"), drawn())
    contrast = augment_slices(flipped, modality(MR), ("contrast",), drawn())
    assert np.abs(both.astype(int) - contrast).max() <= 1


def test_the_same_seed_gives_the_same_bits_and_each_slice_its_own() -> None:
    images = np.stack([noise(1)[0]] * 6)
    one, again, other = (augment_slices(images, modality(MR), KEEPS_AXES, drawn(seed)) for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()
    assert len({image.tobytes() for image in one}) == 6


def test_what_is_done_to_a_slice_depends_on_no_other() -> None:
    images, codes = noise(), np.array([CT, MR, CT, MR, MR, CT], np.int8)
    before = augment_slices(images, codes, KEEPS_AXES, drawn())
    images[0] = 7
    after = augment_slices(images, codes, KEEPS_AXES, drawn())
    assert np.array_equal(before[1:], after[1:])


def test_all_slices_of_a_patient_are_bent_alike() -> None:
    image = noise(1)[0].astype(np.float32) / MR_STEPS
    one, other = augment_anatomy([image, image], "MR", ("elastic",), drawn())
    assert np.array_equal(one, other)
    assert not np.array_equal(one, image)
    line = np.zeros((SIDE, SIDE), np.float32)
    line[:, 31:33] = 1
    bent = augment_anatomy([line], "MR", ("elastic",), drawn())[0]
    middle = (bent @ np.arange(SIDE)) / bent.sum(axis=1)
    straight = np.polyval(np.polyfit(np.arange(SIDE), middle, 1), np.arange(SIDE))
    assert np.abs(middle - straight).max() > 0.5
