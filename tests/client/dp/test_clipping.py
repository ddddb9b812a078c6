from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.dp.clipping import clip_factors, clipped_sum, patient_means

VALUES = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, 1e-30, 3e38, math.inf, -math.inf, math.nan])
ROWS = st.lists(st.lists(VALUES, min_size=3, max_size=3), min_size=1, max_size=6)


@given(rows=ROWS, clip_norm=st.floats(1e-3, 1e3), gone=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_one_patient_moves_the_sum_by_at_most_the_clip(
    rows: list[list[float]], clip_norm: float, gone: int
) -> None:
    vectors = torch.tensor(rows, dtype=torch.float32)
    gone %= len(rows)
    without = torch.cat([vectors[:gone], vectors[gone + 1 :]])
    moved = clipped_sum(vectors, clip_norm) - clipped_sum(without, clip_norm)
    assert moved.norm().item() <= clip_norm * (1 + 1e-5)


def test_a_small_vector_is_untouched_and_a_large_one_keeps_its_direction() -> None:
    small, large = torch.tensor([[0.3, 0.4]]), torch.tensor([[30.0, 40.0]])
    assert torch.equal(clipped_sum(small, 1.0), small[0].double())
    torch.testing.assert_close(clipped_sum(large, 1.0), torch.tensor([0.6, 0.8], dtype=torch.float64))


def test_a_vector_that_is_not_finite_weighs_zero() -> None:
    vectors = torch.tensor([[0.1, 0.2], [math.nan, 0.0], [math.inf, 1.0], [0.3, -0.1]])
    assert clip_factors(vectors, 1.0).tolist() == [1, 0, 0, 1]
    assert torch.equal(clipped_sum(vectors, 1.0), clipped_sum(vectors[[0, 3]], 1.0))


def test_no_patients_sum_to_zero() -> None:
    assert clipped_sum(torch.zeros(0, 4), 1.0).tolist() == [0, 0, 0, 0]


def test_a_patient_is_the_mean_of_its_slices_whatever_the_others_hold() -> None:
    owner = torch.tensor([0, 1, 0, 2, 1])
    slices = torch.tensor([[1.0], [10.0], [3.0], [math.nan], [20.0]])
    means = patient_means(slices, owner, 3)
    assert means[:2].tolist() == [[2.0], [15.0]]
    assert means[2].isnan().all()


def test_five_slices_of_a_patient_are_clipped_once() -> None:
    one = patient_means(torch.full((1, 4), 100.0), torch.tensor([0]), 1)
    five = patient_means(torch.full((5, 4), 100.0), torch.zeros(5, dtype=torch.long), 1)
    assert clipped_sum(five, 1.0).norm().item() == pytest.approx(1.0)
    torch.testing.assert_close(clipped_sum(one, 1.0), clipped_sum(five, 1.0))
