"""Slices become studies: which of them, in which order, with which label; and a study is learnt from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.artifacts import DEFAULT_LABELS
from common.augmentation import augmenter
from common.counts import per_patient
from common.devices import on_device
from common.learning import batches, extract_features, score, train_epochs
from common.models import fresh
from common.plan import Model, Training
from common.preprocess import to_channels
from common.studies import (
    Samples,
    Series,
    StudyImages,
    chosen_slices,
    concatenated,
    decisions,
    fused_decisions,
    sample_channels,
    samples_of,
    series_of_patients,
    with_neighbours,
)
from common.weights import flatten

SIDE, SLICES = 32, 4
COUNTS = (3, 1, 6)
"""Slices of three series, CT, MR and CT."""
MODEL = Model(name="study", args={"slices": SLICES, "pooling": "mean"})


def studies(seed: int = 0, *, reverse: bool = False) -> Samples:
    """Three studies; their slices lie in turn, not side by side."""
    rng = np.random.default_rng(seed)
    series = np.concatenate([np.full(count, number) for number, count in enumerate(COUNTS)])
    series = np.random.default_rng(1).permutation(series)
    order = np.argsort(series, kind="stable")[:: -1 if reverse else 1]
    labels = rng.integers(0, 2, (len(series), len(DEFAULT_LABELS))).astype(np.float32)
    labels[rng.random(labels.shape) < 0.4] = np.nan
    return samples_of(
        MODEL,
        rng.integers(-1000, 3000, (len(series), SIDE, SIDE)).astype(np.int16),
        (series == 1).astype(np.int8),
        labels,
        series // 2,
        lambda: Series(10 - series, order, series // 2),
    )


def images_of(samples: Samples) -> StudyImages:
    assert isinstance(samples.images, StudyImages)
    return samples.images


@given(st.integers(1, 200), st.sampled_from([2, 4, 8, 16, 32]))
def test_slices_are_chosen_evenly_and_in_their_order(count: int, length: int) -> None:
    slices = np.arange(100, 100 + count)
    found = chosen_slices(slices, length)
    assert len(found) == length
    if count <= length:
        assert found.tolist() == slices.tolist() + [-1] * (length - count)
        return
    assert np.isin(found, slices).all()
    gaps = np.diff(found)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    before, after = found[0] - slices[0], slices[-1] - found[-1]  # as far from one end as from the other
    assert abs(before - after) <= 1


def test_slices_of_ten_by_hand() -> None:
    assert chosen_slices(np.arange(10), 4).tolist() == [1, 3, 6, 8]


def test_a_network_of_slices_gets_the_slices_themselves() -> None:
    images, some = np.zeros((2, 4, 4), np.int16), np.zeros(2, np.int8)

    def never() -> Series:
        raise AssertionError

    found = samples_of(Model(), images, some, np.zeros((2, 5), np.float32), some, never)
    assert found.images is images
    assert found.first.tolist() == [0, 1]


def test_a_study_has_the_slices_of_its_series_and_the_maximum_of_their_labels() -> None:
    images = np.arange(6, dtype=np.int16)[:, None, None] * np.ones((1, 2, 2), np.int16)
    labels = np.array([[0, np.nan], [1, np.nan], [np.nan, 1], [0, 0], [np.nan, np.nan], [0, 0]], np.float32)
    found = samples_of(
        MODEL,
        images,
        np.array([0, 1, 0, 1, 0, 1], np.int8),
        labels,
        np.array([7, 8, 7, 8, 7, 8]),
        lambda: Series(
            np.array([5, 2, 5, 2, 5, 2]), np.array([4, 2, 0, 1, 3, 5]), np.array([5, 2, 5, 2, 5, 2])
        ),
    )
    assert images_of(found).rows.tolist() == [[4, 2, 0, -1], [1, 3, 5, -1]]
    np.testing.assert_array_equal(found.labels, [[0, 1], [1, 0]])
    assert found.patients.tolist() == [7, 8]
    assert found.modality.tolist() == [0, 1]
    assert found.first.tolist() == [0, 1]
    unassessed = samples_of(
        MODEL,
        images[:1],
        np.zeros(1, np.int8),
        labels[4:5],
        np.zeros(1, np.int64),
        lambda: Series(*np.zeros((3, 1), np.int64)),
    )
    assert np.isnan(unassessed.labels).all()


def test_a_patient_with_two_modalities_has_two_studies_where_series_are_unknown() -> None:
    series, order, _ = series_of_patients(np.array([3, 3, 9, 3]), np.array([0, 1, 0, 0]))
    assert series[0] == series[3]
    assert len(set(series)) == 3
    assert order.tolist() == [0, 1, 2, 3]


def test_the_network_sees_the_channels_of_each_slice_and_nan_elsewhere() -> None:
    samples = studies()
    images = images_of(samples)
    x = sample_channels(images, samples.modality, np.array([2, 0]))
    assert x.shape == (2, SLICES, 2, SIDE, SIDE)
    for study, rows in zip(x, images.rows[[2, 0]], strict=True):
        for seen, row in zip(study, rows, strict=True):
            if row < 0:
                assert seen.isnan().all()
                continue
            expected = to_channels(images.slices[[row]], images.modality[[row]])[0]
            assert np.array_equal(seen.numpy(), expected)
    ((_, batch),) = batches(images, samples.modality, np.array([2, 0]), 5)
    assert np.array_equal(batch.numpy(), x.numpy(), equal_nan=True)


def test_only_slices_are_augmented() -> None:
    samples = studies()
    seen: list[int] = []

    def darker(slices: np.ndarray, modality: np.ndarray) -> np.ndarray:
        seen.append(len(slices))
        return slices // 2

    ((_, x),) = batches(images_of(samples), samples.modality, np.arange(3), 3, darker)
    assert seen == [int((images_of(samples).rows >= 0).sum())]
    assert int(x[:, :, 0, 0, 0].isnan().sum()) == int((images_of(samples).rows < 0).sum())


def trained(samples: Samples, **changes: object) -> np.ndarray:
    model = fresh("study", 0, MODEL.args)
    training = Training(**({"batch_size": 2, "local_epochs": 2} | changes))  # type: ignore[arg-type]
    rows = np.arange(len(samples.images))
    train_epochs(model, samples.images, samples.modality, samples.labels, rows, training=training, seed=1)
    return flatten(model.state_dict())


def test_training_on_studies_repeats_its_bits_and_follows_their_slices() -> None:
    first = trained(studies())
    assert np.isfinite(first).all()
    assert first.tobytes() == trained(studies()).tobytes() != trained(studies(2)).tobytes()
    augmented = trained(studies(), augment=("flip", "contrast"), sampler="balanced")
    assert np.isfinite(augmented).all()
    laid_out = trained(studies(), memory_format="channels_last")
    assert 0 < np.abs(laid_out - first).max() < 0.01


def test_order_is_seen_by_the_recurrence_alone() -> None:
    one, turned = studies(), studies(reverse=True)
    for pooling, is_same in (("mean", True), ("gru", False)):
        model = fresh("study", 0, {"slices": SLICES, "pooling": pooling})
        found = [score(model, s.images, s.modality, np.array([0, 1])) for s in (one, turned)]
        assert np.allclose(found[0], found[1], atol=1e-6) == is_same, pooling


def test_scores_and_features_of_a_study_do_not_depend_on_the_company() -> None:
    samples, model = studies(), fresh("study", 0, {"slices": SLICES})
    for of in (score, extract_features):
        together = of(model, samples.images, samples.modality, np.arange(3))
        alone = np.concatenate([of(model, samples.images, samples.modality, np.array([i])) for i in range(3)])
        np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_studies_of_several_sites_side_by_side_are_the_same_studies() -> None:
    one, other = studies(), studies(5)
    given: list[tuple[np.ndarray | StudyImages, np.ndarray]] = [
        (one.images, np.array([1, 2])),
        (other.images, np.array([2])),
        (other.images, np.array([2, 0, 1])),
    ]
    together = concatenated(given)
    assert isinstance(together, StudyImages)
    expected = torch.cat([sample_channels(images, np.zeros(3), rows) for images, rows in given])
    found = sample_channels(together, np.zeros(6), np.arange(6))
    assert np.array_equal(found.numpy(), expected.numpy(), equal_nan=True)
    assert len(together.slices) == (together.rows >= 0).sum()  # and no slice of another study
    slices = np.arange(24, dtype=np.int16).reshape(6, 2, 2)
    plain = concatenated([(slices, np.array([5, 1])), (slices, np.array([0]))])
    assert np.array_equal(plain, slices[[5, 1, 0]])


@pytest.mark.parametrize("pooling", ["mean", "max", "attention", "gru"])
def test_a_network_of_studies_learns(pooling: str) -> None:
    """Bright squares in one slice of some studies: after training they are told from the others."""
    rng = np.random.default_rng(0)
    count = 12
    images = rng.integers(0, 1500, (count * 3, SIDE, SIDE)).astype(np.int16)
    patients, present = np.repeat(np.arange(count), 3), np.arange(count) % 2
    images[3 * np.flatnonzero(present) + 1, 8:20, 8:20] = 6000
    labels = np.full((len(images), len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:, 2] = 0
    labels[3 * np.flatnonzero(present) + 1, 2] = 1
    modality = np.ones(len(images), np.int8)
    model_args = {"slices": 4, "pooling": pooling}
    samples = samples_of(
        Model(name="study", args=model_args),
        images,
        modality,
        labels,
        patients,
        lambda: series_of_patients(patients, modality),
    )
    model = fresh("study", 0, model_args)
    training = Training(batch_size=4, local_epochs=15, learning_rate=3e-3)
    rows = np.arange(count)
    train_epochs(model, samples.images, samples.modality, samples.labels, rows, training=training, seed=1)
    found = score(model, samples.images, samples.modality, rows)[:, 2]
    assert found[present == 1].min() > found[present == 0].max()


def test_on_device_gives_a_network_of_studies_back_to_the_cpu() -> None:
    model = fresh("study", 0)
    with on_device(model) as where:
        assert {parameter.device for parameter in model.parameters()} == {where}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_neighbours_are_the_slices_beside_one_in_its_series(series: list[int], random: Any) -> None:
    order = list(range(len(series)))
    random.shuffle(order)
    found = with_neighbours(np.array(series), np.array(order))
    for number in set(series):
        own = [at for at in order if series[at] == number]
        for place, at in enumerate(own):
            expected = [at, own[max(0, place - 1)], own[min(len(own) - 1, place + 1)]]
            assert found[at].tolist() == expected


def neighbours(seed: int = 0, *, model: Model = Model(args={"neighbours": True})) -> Samples:  # noqa: B008
    """Slices 4, 0, 2 are a series, 1 and 3 another."""
    rng = np.random.default_rng(seed)
    return samples_of(
        model,
        rng.integers(-1000, 3000, (5, SIDE, SIDE)).astype(np.int16),
        np.array([0, 1, 0, 1, 0], np.int8),
        rng.integers(0, 2, (5, len(DEFAULT_LABELS))).astype(np.float32),
        np.array([6, 7, 6, 7, 6]),
        lambda: Series(np.array([8, 3, 8, 3, 8]), np.array([4, 1, 0, 3, 2]), np.zeros(5, np.int64)),
    )


def test_a_slice_with_its_neighbours_is_a_sample_with_the_label_of_the_slice() -> None:
    found, alone = neighbours(), neighbours(model=Model())
    assert images_of(found).rows.tolist() == [[0, 4, 2], [1, 1, 3], [2, 0, 2], [3, 1, 3], [4, 4, 0]]
    assert np.array_equal(found.labels, alone.labels)
    assert np.array_equal(found.patients, alone.patients)
    assert found.first.tolist() == [0, 1, 2, 3, 4]
    x = sample_channels(found.images, found.modality, np.array([0, 3]))
    slices = torch.from_numpy(to_channels(images_of(found).slices, found.modality))
    assert torch.equal(
        x, torch.stack([torch.cat(list(slices[[0, 4, 2]])), torch.cat(list(slices[[3, 1, 3]]))])
    )
    ((_, batch),) = batches(found.images, found.modality, np.array([0, 3]), 5)
    assert torch.equal(batch, x)


def test_neighbours_are_augmented_alike() -> None:
    """Where all three are one slice, all three stay one slice; and no two samples are changed alike."""
    samples = neighbours()
    same = StudyImages(
        slices=images_of(samples).slices,
        modality=samples.modality,
        rows=np.tile(np.array([[0], [2], [4], [0]]), (1, 3)),
        is_stacked=True,
    )
    see = augmenter(("flip", "rotation", "shift"), 3, alike=3)
    ((_, x),) = batches(same, np.zeros(4, np.int8), np.arange(4), 4, see)
    own, before, after = x.split(2, dim=1)
    assert torch.equal(own, before)
    assert torch.equal(own, after)
    assert not torch.equal(own[0], own[3])


def test_training_repeats_its_bits_and_follows_the_neighbours() -> None:
    def found(samples: Samples, augment: tuple[str, ...] = ()) -> bytes:
        model = fresh("small_cnn", 0, {"neighbours": True})
        training = Training(batch_size=2, augment=augment)  # type: ignore[arg-type]
        rows = np.array([0, 1])
        train_epochs(model, samples.images, samples.modality, samples.labels, rows, training=training, seed=1)
        return flatten(model.state_dict()).tobytes()

    samples = neighbours()
    changed = images_of(samples).slices.copy()
    changed[2] //= 2  # a neighbour of slice 0, itself not trained on
    other = replace(samples, images=replace(images_of(samples), slices=changed))
    assert found(samples) == found(samples) != found(other)
    assert found(samples, ("flip",)) != found(samples)


def test_slices_with_neighbours_of_several_sites_stay_beside_their_own() -> None:
    one, other = neighbours(), neighbours(5)
    given: list[tuple[np.ndarray | StudyImages, np.ndarray]] = [
        (one.images, np.array([3])),
        (other.images, np.array([0, 4])),
    ]
    expected = torch.cat([sample_channels(images, one.modality, rows) for images, rows in given])
    found = sample_channels(concatenated(given), one.modality[[3, 0, 4]], np.arange(3))
    assert torch.equal(found, expected)


def of_series(**args: Any) -> Samples:
    """Patient 5 has a study of three series (slices 0-1, 2, 6-7), patient 9 two studies of one (3, 4-5)."""
    labels = np.full((8, len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:, 0] = [0, 0, 1, 0, 0, 1, np.nan, np.nan]
    study = np.array([1, 1, 1, 7, 4, 4, 1, 1])
    return samples_of(
        Model(name="study", args={"slices": 2, "pooling": "mean"} | args),
        np.arange(8, dtype=np.int16)[:, None, None] * np.ones((1, SIDE, SIDE), np.int16),
        np.zeros(8, np.int8),
        labels,
        np.array([5, 5, 5, 9, 9, 9, 5, 5]),
        lambda: Series(np.array([2, 2, 0, 5, 3, 3, 1, 1]), np.arange(8)[::-1], study),
    )


def test_a_study_of_several_series_is_a_sample_where_features_are_fused() -> None:
    samples = of_series(fusion="max_features", series=4)
    assert images_of(samples).rows.tolist() == [
        [1, 0, 2, -1, 7, 6, -1, -1],
        [3, -1, -1, -1, -1, -1, -1, -1],
        [5, 4, -1, -1, -1, -1, -1, -1],
    ]
    assert samples.labels[:, 0].tolist() == [1, 0, 1]
    assert samples.patients.tolist() == [5, 9, 9]
    assert samples.fusion is None
    few = of_series(fusion="mean_features", series=2)
    assert images_of(few).rows[0].tolist() == [1, 0, 7, 6]  # of three series the first and the last
    logits = np.array([[1.0] * 5, [2.0] * 5, [3.0] * 5])
    for found, expected in zip(
        decisions(logits, samples, np.arange(3)), (logits, samples.labels, samples.patients), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("args", [{}, {"fusion": "mean_features"}, {"fusion": "noisy_or"}])
def test_a_site_without_slices_has_no_studies(args: dict[str, Any]) -> None:
    none = np.zeros(0, np.int64)
    samples = samples_of(
        Model(name="study", args={"slices": 2} | args),
        np.zeros((0, SIDE, SIDE), np.int16),
        none.astype(np.int8),
        np.zeros((0, len(DEFAULT_LABELS)), np.float32),
        none,
        lambda: Series(none, none, none),
    )
    assert len(samples.images) == 0
    found, labels, patients = decisions(np.zeros((0, len(DEFAULT_LABELS))), samples, none)
    assert len(found) == len(labels) == len(patients) == 0


def test_decisions_about_series_become_one_of_their_study_by_hand() -> None:
    """Of series that were assessed: the third of patient 5 was not."""
    logits = np.zeros((5, len(DEFAULT_LABELS)))
    logits[:, 0] = np.log([0.2 / 0.8, 0.5 / 0.5, 0.3 / 0.7, 0.6 / 0.4, 0.9 / 0.1])
    for fusion, expected in (("mean", [0.35, 0.3, 0.6]), ("noisy_or", [0.6, 0.3, 0.6])):
        samples = of_series(fusion=fusion)
        assert images_of(samples).rows.tolist() == [[1, 0], [2, -1], [3, -1], [5, 4], [7, 6]]
        found, labels, patients = decisions(logits, samples, np.arange(5))
        assert sorted(1 / (1 + np.exp(-found[:, 0]))) == pytest.approx(sorted(expected))
        scores, truth = per_patient(found, labels, patients)
        np.testing.assert_allclose(1 / (1 + np.exp(-scores[:, 0])), [expected[0], 0.6])
        assert truth[:, 0].tolist() == [1, 1]
        assert np.isnan(scores[:, 1]).all()
        only, _, whose = decisions(logits[:1], samples, np.array([0]))
        np.testing.assert_allclose(only[0], logits[0], atol=1e-12)
        assert whose.tolist() == [5]


@given(st.lists(st.floats(-60, 60), min_size=1, max_size=6))
def test_fused_decisions_stay_finite_and_within_their_bounds(values: list[float]) -> None:
    logits, whole = np.array(values)[:, None], np.ones((len(values), 1), bool)
    study = np.zeros(len(values), np.int64)
    mean, some = (fused_decisions(logits, whole, study, fusion)[0, 0] for fusion in ("mean", "noisy_or"))
    slack = 1e-6 * (1 + abs(logits).max())
    assert logits.min() - slack <= mean <= logits.max() + slack
    assert logits.max() - slack <= some <= logits.max() + np.log(len(values)) + np.logaddexp(0, logits).sum()
    assert some >= mean - slack
