"""A balanced draw gives every class its share; a uniform one takes every slice once."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from common.artifacts import DEFAULT_LABELS
from common.plan import Training
from common.samplers import SAMPLERS, balanced, draw_weights, uniform

CT, MR = 0, 1


def site(*, clean: int = 80, motion: int = 16, both: int = 4, ct: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Modality and labels: MR slices that are clean, show motion, or motion and susceptibility; clean CT."""
    count = clean + motion + both
    labels = np.full((count + ct, len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:count, 2:] = 0
    labels[clean:count, DEFAULT_LABELS.index("motion")] = 1
    labels[clean + motion : count, DEFAULT_LABELS.index("susceptibility")] = 1
    labels[count:, :2] = 0
    return np.repeat([MR, CT], [count, ct]), labels


def test_each_class_weighs_as_much_as_its_rarest_members() -> None:
    modality, labels = site()
    weights = draw_weights(modality, labels)
    clean, motion, both, ct = (float(part.sum()) for part in np.split(weights, [80, 96, 100]))
    assert sum((clean, motion, both, ct)) == pytest.approx(1)
    assert clean == pytest.approx(both) == pytest.approx(ct)  # one over their size, times their size
    assert motion == pytest.approx(16 / 20 * clean)  # of a class of 20


def test_draws_follow_the_weights_and_come_from_the_training_rows() -> None:
    modality, labels = site()
    rows = np.flatnonzero(np.arange(len(labels)) % 4 != 3)
    drawn = np.concatenate([balanced(rows, modality, labels, np.random.default_rng(n)) for n in range(400)])
    assert set(drawn) <= set(rows)
    found = np.bincount(drawn, minlength=len(labels))[rows] / len(drawn)
    np.testing.assert_allclose(found, draw_weights(modality[rows], labels[rows]), atol=0.006)


def test_a_slice_that_nobody_assessed_is_not_drawn() -> None:
    modality, labels = site()
    labels[:10] = np.nan
    weights = draw_weights(modality, labels)
    assert (weights[:10] == 0).all()
    assert (weights[10:] > 0).all()
    assert draw_weights(modality[:10], labels[:10]).tolist() == [0.1] * 10


def test_a_severity_counts_as_present() -> None:
    labels = np.zeros((4, len(DEFAULT_LABELS)), np.float32)
    labels[0, 2] = 0.3
    assert draw_weights(np.full(4, MR), labels) == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_a_uniform_pass_is_the_shuffle_of_the_versions_before() -> None:
    modality, labels = site()
    rows = np.arange(0, 60, 2)
    found = uniform(rows, modality, labels, np.random.default_rng(5))
    assert found.tolist() == np.random.default_rng(5).permutation(rows).tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_pass_is_as_long_as_the_rows_and_repeated_by_its_seed(name: str) -> None:
    modality, labels = site()
    rows = np.arange(30)
    one, again, other = (
        SAMPLERS[name](rows, modality, labels, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert len(one) == len(rows)
    assert one.tolist() == again.tolist() != other.tolist()
    for few in (rows[:1], rows[:0]):
        assert SAMPLERS[name](few, modality, labels, np.random.default_rng(1)).tolist() == few.tolist()


def test_every_sampler_may_be_named() -> None:
    assert set(get_args(Training.model_fields["sampler"].annotation)) == set(SAMPLERS)
