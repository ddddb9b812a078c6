"""Views teach the pair of what was injected and nothing else, and follow from one patient and the key."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.views import injected
from client.views.injected import PatientViews, ViewCoins, views_of_patient
from common.artifacts import DEFAULT_LABELS, INDEX, applies_to
from common.augmentation import augment_anatomy
from common.plan import Inject
from common.preprocess import MR_STEPS, from_stored, normalize_image, to_stored
from tests.helpers.injected import ct_slice, mr_slice
from tests.helpers.slice_record import RECORD

MR = [INDEX[name] for name in ("chemical_shift", "motion", "susceptibility")]
COINS = ViewCoins(key=b"k" * 32, run="r", patient="p")
BLANK = np.full(len(DEFAULT_LABELS), np.nan, np.float32)


def patient(modality: str, slices: int = 3) -> tuple[np.ndarray, list, np.ndarray]:
    draw = mr_slice if modality == "MR" else lambda position, kind: ct_slice(position)
    images = [normalize_image(draw(number, 1).astype(np.float32), modality, 64) for number in range(slices)]
    records = [
        replace(RECORD, number=number, modality=modality, rows=64, columns=64, pixel_spacing_mm=(3.0, 3.0))
        for number in range(slices)
    ]
    return np.stack([to_stored(image, modality) for image in images]), records, np.tile(BLANK, (slices, 1))


def views_of(
    modality: str = "MR", coins: ViewCoins = COINS, slices: int = 3, most: int = 2, **inject: object
) -> PatientViews:
    return views_of_patient(*patient(modality, slices), coins, Inject(**inject), max_slices=most)


@pytest.fixture(autouse=True, scope="module")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_only_the_pair_is_assessed(modality: str) -> None:
    made = views_of(modality, views=4)
    assessed = ~np.isnan(made.labels)
    shown = made.labels == 1
    with_artifact = shown.any(axis=1)
    injected = shown.any(axis=0)
    assert (assessed == injected).all(), "an artifact is assessed in all views if one of them shows it"
    assert shown[with_artifact].sum(axis=1).tolist() == [1] * int(with_artifact.sum())
    untouched = made.labels[~with_artifact]
    assert len(untouched) == 2, "view 0, of two slices"
    assert ((untouched == 0) == injected).all()
    assert np.isnan(untouched[:, ~injected]).all()
    assert not injected[~np.array(applies_to(modality, DEFAULT_LABELS))].any()
    assert made.left_out + int(with_artifact.sum()) // 2 == 3


def test_every_view_weighs_the_same() -> None:
    made = views_of(views=4)
    assert made.weights.sum() == pytest.approx(1)
    assert np.ptp(made.weights) == pytest.approx(0)


def test_view_zero_is_the_cached_slice_within_a_step_and_the_others_are_not() -> None:
    images, records, labels = patient("MR")
    made = views_of_patient(images, records, labels, COINS, Inject(), max_slices=3)
    untouched = made.images[~(made.labels == 1).any(axis=1)]
    steps = np.abs(untouched.astype(int) - images.astype(int)).max()
    assert steps <= 0.005 * MR_STEPS, "scaled once more, as all views are"
    assert np.abs(made.images[3:6].astype(int) - images.astype(int)).max() > 0.1 * MR_STEPS


def test_views_depend_on_key_run_and_patient_and_are_repeated() -> None:
    before = views_of()
    assert (views_of().images == before.images).all()
    for other in (
        replace(COINS, key=b"l" * 32),
        replace(COINS, run="s"),
        replace(COINS, patient="q"),
    ):
        again = views_of(coins=other)
        same = again.images.shape == before.images.shape and (again.images == before.images).all()
        assert not same


def test_coins_of_two_views_differ_and_names_do_not_run_together() -> None:
    def number(coins: ViewCoins, what: int | str) -> int:
        return coins.generator(what).initial_seed()

    seeds = [number(COINS, view) for view in range(4)]
    seeds += [number(replace(COINS, run='r", "p'), 0), number(replace(COINS, run="rp", patient=""), 0)]
    assert len(set(seeds)) == len(seeds)


def test_more_views_keep_the_first_ones() -> None:
    few, many = views_of(views=3), views_of(views=8)
    assert (many.images[: len(few.images)] == few.images).all()


def test_an_artifact_that_the_sheet_marks_is_not_injected() -> None:
    images, records, labels = patient("MR")
    labels[:, INDEX["motion"]] = 1
    made = views_of_patient(images, records, labels, COINS, Inject(views=8), max_slices=3)
    assert np.isnan(made.labels[:, INDEX["motion"]]).all()
    labels[:, MR] = 1
    assert not len(views_of_patient(images, records, labels, COINS, Inject(), max_slices=3).images)


def test_a_patient_without_a_body_has_no_views() -> None:
    images, records, labels = patient("MR")
    made = views_of_patient(np.zeros_like(images), records, labels, COINS, Inject(), max_slices=3)
    assert (made.images.shape, made.labels.shape, made.weights.shape) == ((0, 64, 64), (0, 5), (0,))


def test_one_view_is_either_side_of_the_pair() -> None:
    sides = set()
    for number in range(12):
        made = views_of(coins=replace(COINS, patient=str(number)), views=1)
        values = made.labels[~np.isnan(made.labels)]
        assert len(set(values.tolist())) <= 1
        assert made.weights.sum() in (pytest.approx(1), 0)
        sides.update(values.tolist())
    assert sides == {0.0, 1.0}


WORDS = ("flip", "rotation", "scale", "crop", "shift", "elastic", "contrast")


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_anatomy_is_changed_before_the_artifact_and_the_same_in_all_views(
    modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the simulators get is the changed anatomy, acquired along the axes of the header."""
    given: list[tuple[list[np.ndarray], dict[str, float], list[str]]] = []
    real = injected.corrupt

    def spy(
        images: list, modality: str, severities: dict, acquisitions: list, generator: object, **more: object
    ) -> object:
        along = [getattr(one, "phase_encoding", "") for one in acquisitions]
        given.append(([image.copy() for image in images], severities, along))
        return real(images, modality, severities, acquisitions, generator, **more)

    monkeypatch.setattr(injected, "corrupt", spy)
    images, records, labels = patient(modality)
    made = views_of_patient(images, records, labels, COINS, Inject(views=4), max_slices=3, augment=WORDS)
    generator = COINS.generator(f"anatomy {modality}")
    clean = [from_stored(image, modality) for image in images]
    expected = augment_anatomy(clean, modality, WORDS, generator)
    assert len(made.images) > 3
    assert any(not severities for _, severities, _ in given)
    assert any(severities for _, severities, _ in given)
    for shown, _, along in given:
        assert all(np.array_equal(one, other) for one, other in zip(shown, expected, strict=True))
        assert set(along) <= {"COL", "ROW", ""}
    assert not any(np.array_equal(one, other) for one, other in zip(clean, expected, strict=True))


def test_augmented_views_follow_from_key_run_and_patient() -> None:
    def views(coins: ViewCoins) -> bytes:
        return views_of_patient(*patient("MR"), coins, Inject(), max_slices=2, augment=WORDS).images.tobytes()

    assert views(COINS) == views(COINS)
    others = [replace(COINS, run="s"), replace(COINS, patient="q"), replace(COINS, key=b"l" * 32)]
    assert len({views(COINS), *map(views, others)}) == 4


def test_slices_of_both_modalities_have_views_of_their_own() -> None:
    one, other = patient("CT", 1), patient("MR", 1)
    both = (np.concatenate([one[0], other[0]]), one[1] + other[1], np.concatenate([one[2], other[2]]))
    made = views_of_patient(*both, COINS, Inject(), max_slices=4)
    for code, modality in enumerate(("CT", "MR")):
        assessed = ~np.isnan(made.labels[made.modality == code])
        assert not assessed[:, ~np.array(applies_to(modality, DEFAULT_LABELS))].any()
        assert made.weights[made.modality == code].sum() == pytest.approx(0.5)
