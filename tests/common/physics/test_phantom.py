"""Claims about invented patients."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest

from common.artifacts import ARTIFACTS, DEFAULT_LABELS, applies_to
from common.errors import ConfigError
from common.physics import SHOWN_BY, SIMULATORS
from common.physics.appearance import PUBLIC_APPEARANCES, SITE_APPEARANCES, Appearance
from common.physics.phantom import PhantomSlice, draw_patients

EVERY = SITE_APPEARANCES + PUBLIC_APPEARANCES


def small(appearance: Appearance, **changes: object) -> Appearance:
    return replace(appearance, matrix=64, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def patients() -> list[list[PhantomSlice]]:
    return list(draw_patients(small(SITE_APPEARANCES[0]), 24, seed=7))


def test_every_artifact_has_a_simulator() -> None:
    assert tuple(SHOWN_BY) == (*DEFAULT_LABELS, "ct_motion")  # `quality` is a rating
    for label, shown in SHOWN_BY.items():
        assert all(SIMULATORS[name].label == label for name, _ in shown)
        assert sum(chance for _, chance in shown) == pytest.approx(1)


def test_patients_have_two_or_three_slices_of_one_modality(patients: list[list[PhantomSlice]]) -> None:
    assert [slices[0].patient for slices in patients] == list(range(24))
    for slices in patients:
        assert 2 <= len(slices) <= 3
        assert [one.position for one in slices] == list(range(len(slices)))
        assert len({one.modality for one in slices}) == 1
    modalities = [slices[0].modality for slices in patients]
    assert 5 <= modalities.count("CT") <= 19


def test_images_are_finite_and_in_their_units(patients: list[list[PhantomSlice]]) -> None:
    for one in (one for slices in patients for one in slices):
        assert one.image.dtype == np.float32
        assert one.image.shape == (64, 64)
        assert np.isfinite(one.image).all()
        assert one.pixel_spacing_mm > 0
        if one.modality == "CT":
            assert one.image.min() >= -1024
            assert one.image.max() <= 3071
            assert one.phase_encoding is None
        else:
            assert one.image.min() >= 0
            assert one.phase_encoding == SITE_APPEARANCES[0].phase_encoding


def test_labels_are_for_applicable_artifacts_only(patients: list[list[PhantomSlice]]) -> None:
    for one in (one for slices in patients for one in slices):
        applicable = {
            artifact.name
            for artifact, applies in zip(ARTIFACTS, applies_to(one.modality), strict=True)
            if applies and artifact.name != "quality"
        }
        assert set(one.labels) == applicable
        assert set(one.severities) == {name for name, label in one.labels.items() if label}
        assert all(0.4 <= severity <= 1 for severity in one.severities.values())


def test_patients_are_reproducible_and_do_not_depend_on_how_many(patients: list[list[PhantomSlice]]) -> None:
    again = list(draw_patients(small(SITE_APPEARANCES[0]), 3, seed=7))
    for slices, repeated in zip(patients, again, strict=False):
        for one, same in zip(slices, repeated, strict=True):
            assert np.array_equal(one.image, same.image)
            assert one.labels == same.labels
            assert one.severities == same.severities


def test_seed_and_hospital_change_the_patient(patients: list[list[PhantomSlice]]) -> None:
    other_seed = next(draw_patients(small(SITE_APPEARANCES[0]), 1, seed=8))
    other_site = next(draw_patients(small(SITE_APPEARANCES[1]), 1, seed=7))
    for other in (other_seed, other_site):
        assert not np.array_equal(patients[0][0].image, other[0].image)


def test_prevalence_one_and_zero_are_obeyed_on_at_least_one_slice() -> None:
    everything = small(SITE_APPEARANCES[2], prevalence=dict.fromkeys(SHOWN_BY, 1.0))
    nothing = small(SITE_APPEARANCES[2], prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0))
    for slices in islice(draw_patients(everything, 8, seed=1), 8):
        for name in slices[0].labels:
            assert max(one.labels[name] for one in slices) == 1
    assert not any(
        label
        for slices in draw_patients(nothing, 8, seed=1)
        for one in slices
        for label in one.labels.values()
    )


def test_movement_in_ct_changes_who_moves_and_nobody_else() -> None:
    """It has random numbers of its own: patients who stay still, MR, and all other labels keep every bit."""
    look = small(SITE_APPEARANCES[1])
    moving = replace(look, prevalence={**look.prevalence, "ct_motion": 0.5})
    moved = still = 0
    for before, after in zip(draw_patients(look, 16, seed=5), draw_patients(moving, 16, seed=5), strict=True):
        for one, other in zip(before, after, strict=True):
            assert {name: one.labels[name] for name in one.labels if name != "ct_motion"} == {
                name: other.labels[name] for name in other.labels if name != "ct_motion"
            }
            shows = other.labels.get("ct_motion") == 1
            assert np.array_equal(one.image, other.image) != shows
            moved, still = moved + shows, still + (other.labels.get("ct_motion") == 0)
    assert moved >= 3
    assert still >= 3


def test_movement_that_came_as_a_nuisance_is_labelled_too() -> None:
    look = small(SITE_APPEARANCES[0], nuisances={"ct_motion": 1.0}, ct_share=1.0)
    (slices,) = draw_patients(look, 1, seed=3)
    assert [one.labels["ct_motion"] for one in slices] == [1] * len(slices)
    assert all(0.1 <= one.severities["ct_motion"] <= 0.7 for one in slices)


def test_a_missing_prevalence_is_named() -> None:
    with pytest.raises(ConfigError, match="motion"):
        next(draw_patients(small(SITE_APPEARANCES[0], prevalence={"metal": 0.5}), 1, seed=0))


def test_adjacent_slices_are_more_alike_than_patients() -> None:
    clean = small(PUBLIC_APPEARANCES[0], prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0), ct_bodies=("head",))
    patients = [slices for slices in draw_patients(clean, 16, seed=3) if slices[0].modality == "CT"]

    def distance(one: PhantomSlice, other: PhantomSlice) -> float:
        return float(np.abs(one.image - other.image).mean())

    within = np.mean([distance(slices[0], slices[1]) for slices in patients])
    between = np.mean([distance(slices[0], other[0]) for slices, other in pairwise(patients)])
    assert within < 0.5 * between


def test_the_same_patient_without_artifact_differs_only_by_the_artifact() -> None:
    # as large as the field of view: on 64 pixels the bone of a small body is less than one wide
    base = small(SITE_APPEARANCES[0], ct_zoom=(0.85, 0.98), prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0))
    for name in DEFAULT_LABELS:
        with_it = replace(base, prevalence={**base.prevalence, name: 1.0})
        changed = []
        for clean, corrupted in zip(
            draw_patients(base, 6, seed=11), draw_patients(with_it, 6, seed=11), strict=True
        ):
            for one, other in zip(clean, corrupted, strict=True):
                if other.labels.get(name):
                    changed.append(float(np.abs(one.image - other.image).max()))
                else:
                    assert np.array_equal(one.image, other.image)
        assert changed
        assert min(changed) > 0


@pytest.mark.parametrize("appearance", EVERY, ids=lambda appearance: appearance.name)
def test_every_hospital_draws(appearance: Appearance) -> None:
    slices = [one for slices in draw_patients(small(appearance), 4, seed=0) for one in slices]
    assert all(np.isfinite(one.image).all() for one in slices)


def test_hospitals_are_told_apart_by_name_and_maker() -> None:
    assert len({appearance.name for appearance in EVERY}) == len(EVERY)
    assert len({appearance.manufacturer for appearance in SITE_APPEARANCES}) == len(SITE_APPEARANCES) == 4


def test_the_hospital_that_is_never_seen_lies_outside_public_appearances() -> None:
    unseen = SITE_APPEARANCES[-1]
    for public in PUBLIC_APPEARANCES:
        for field in ("gamma", "noise_percent", "kernel", "ct_noise_hu"):
            (low, high), (public_low, public_high) = getattr(unseen, field), getattr(public, field)
            assert high < public_low or public_high < low, (public.name, field)
        assert public.matrix != unseen.matrix
        assert not {"rician_noise", "low_dose"} & set(public.nuisances)  # they would reach its noise


def test_several_series_show_the_same_anatomy_and_an_artifact_in_some_of_them() -> None:
    appearance = small(SITE_APPEARANCES[1], ct_share=0.0, prevalence=dict.fromkeys(DEFAULT_LABELS, 1.0))
    patients = [by_series(slices) for slices in draw_patients(appearance, 6, seed=3, series=3)]
    shown = np.array([[shows(series) for series in patient] for patient in patients])
    assert shown.any(axis=1).all()  # every artifact of a patient is in one of the series ...
    assert 0.2 < shown.mean() < 0.9  # ... and not in all
    clean = replace(appearance, prevalence=dict.fromkeys(DEFAULT_LABELS, 0.0), nuisances={})
    first, second, _ = by_series(next(draw_patients(clean, 1, seed=3, series=3)))
    (alone,) = by_series(next(draw_patients(clean, 1, seed=3)))
    assert len(first) == len(second) == len(alone)
    assert np.array_equal(first[0].image, alone[0].image)
    assert not np.array_equal(first[0].image, second[0].image)  # another noise
    body, other = (one[0].image > 0.1 * np.percentile(one[0].image, 99) for one in (first, second))
    turned = [np.rot90(form, k) for form in (other, other.T) for k in range(4)]
    assert max((body & form).sum() / (body | form).sum() for form in turned) > 0.8


def by_series(slices: list[PhantomSlice]) -> list[list[PhantomSlice]]:
    numbers = sorted({item.series for item in slices})
    return [[item for item in slices if item.series == number] for number in numbers]


def shows(series: list[PhantomSlice]) -> list[bool]:
    """Of each artifact of the modality, whether a slice shows it."""
    return [any(item.labels[name] for item in series) for name in sorted(series[0].labels)]
