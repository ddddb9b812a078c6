from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.dp.clipping import clipped, clipped_sum, patient_means

VALUES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-30, 3e38, math.inf, -math.inf, math.nan])
ROWS = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=6)


@given(rows=ROWS, clip_norm=st.floats(1e-3, 1e3), gone=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_one_patient_moves_the_sum_by_at_most_the_clip(
    rows: list[list[float]], clip_norm: float, gone: int
) -> None:
    vectors = np.array(rows, dtype=np.float32)
    gone %= len(rows)
    without = np.delete(vectors, gone, axis=0)
    moved = clipped_sum(vectors, clip_norm) - clipped_sum(without, clip_norm)
    assert np.linalg.norm(moved) <= clip_norm * (1 + 1e-5)


def test_a_small_vector_is_untouched_and_a_large_one_keeps_its_direction() -> None:
    small, large = np.array([[0.3, 0.4]], dtype=np.float32), np.array([[30.0, 40.0]])
    np.testing.assert_array_equal(clipped(small, 1.0), small.astype(np.float64))
    np.testing.assert_allclose(clipped(large, 1.0), [[0.6, 0.8]], rtol=1e-15)


def test_values_whose_squares_no_float_holds_are_clipped_like_others() -> None:
    """1e300 squared is infinite, 1e-300 squared is zero; neither is a reason to drop a patient."""
    for scale in (1e308, 1e300, 1.0, 1e-300):
        np.testing.assert_allclose(
            clipped(np.array([[0.3, -0.4]]) * scale, 1e-301), [[0.6e-301, -0.8e-301]], rtol=1e-14
        )
    tiny = np.array([[5e-324, 0.0], [3e-310, -4e-310]])
    np.testing.assert_array_equal(clipped(tiny, 1.0), tiny)


def test_a_vector_that_is_not_finite_weighs_zero() -> None:
    vectors = np.array([[0.1, 0.2], [math.nan, 0.0], [math.inf, 1.0], [0.3, -0.1]])
    assert clipped(vectors, 1.0)[1:3].tolist() == [[0, 0], [0, 0]]
    np.testing.assert_array_equal(clipped_sum(vectors, 1.0), clipped_sum(vectors[[0, 3]], 1.0))


def test_no_patients_sum_to_zero() -> None:
    assert clipped_sum(np.zeros((0, 4)), 1.0).tolist() == [0, 0, 0, 0]


def test_blocks_change_nothing_and_the_input_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((20, 3))
    before = vectors.copy()
    whole = clipped_sum(vectors, 0.1)
    monkeypatch.setattr("client.dp.clipping.VALUES_PER_BLOCK", 7)
    np.testing.assert_allclose(clipped_sum(vectors, 0.1), whole, rtol=1e-14)
    np.testing.assert_array_equal(vectors, before)


def test_a_patient_is_the_mean_of_its_slices_whatever_the_others_hold() -> None:
    owner = torch.tensor([0, 1, 0, 2, 1])
    slices = torch.tensor([[1.0], [10.0], [3.0], [math.nan], [20.0]])
    means = patient_means(slices, owner, 3)
    assert means[:2].tolist() == [[2.0], [15.0]]
    assert means[2].isnan().all()


def test_five_slices_of_a_patient_are_clipped_once() -> None:
    one = patient_means(torch.full((1, 4), 100.0), torch.tensor([0]), 1).numpy()
    five = patient_means(torch.full((5, 4), 100.0), torch.zeros(5, dtype=torch.long), 1).numpy()
    assert np.linalg.norm(clipped_sum(five, 1.0)) == pytest.approx(1.0)
    np.testing.assert_allclose(clipped_sum(one, 1.0), clipped_sum(five, 1.0))
