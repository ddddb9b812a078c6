"""The mean of integer updates is the same bits in any order, and weights are patients."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.weights import GRID, LIMIT, advance
from server.aggregation import FederatedMean

SIZE = 4
UPDATES = st.lists(
    st.tuples(arrays(np.int32, SIZE, elements=st.integers(-LIMIT, LIMIT)), st.integers(1, 10_000)),
    min_size=1,
    max_size=12,
)
BASES = arrays(np.float32, SIZE, elements=st.floats(-64, 64, width=32))


def mean_of(base: np.ndarray, updates: list[tuple[np.ndarray, int]]) -> np.ndarray:
    mean = FederatedMean(SIZE)
    for update, weight in updates:
        mean.add(update, weight)
    return mean.result(base)


@given(BASES, UPDATES, st.data())
def test_the_order_of_arrival_changes_no_bit(
    base: np.ndarray, updates: list[tuple[np.ndarray, int]], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(updates))
    assert mean_of(base, shuffled).tobytes() == mean_of(base, updates).tobytes()


@given(BASES, UPDATES)
def test_it_is_the_exact_weighted_mean_rounded_to_the_grid(
    base: np.ndarray, updates: list[tuple[np.ndarray, int]]
) -> None:
    """Python's integers cannot wrap around: what they say is the sum; its fractions round ties to even."""
    total = [sum(int(update[i]) * weight for update, weight in updates) for i in range(SIZE)]
    weight = sum(weight for _, weight in updates)
    steps = np.array([round(Fraction(each, weight)) for each in total], np.int32)
    assert mean_of(base, updates).tobytes() == advance(base, steps).tobytes()


@given(BASES, UPDATES)
def test_who_holds_the_base_follows_by_the_steps_alone(
    base: np.ndarray, updates: list[tuple[np.ndarray, int]]
) -> None:
    mean = FederatedMean(SIZE)
    for update, weight in updates:
        mean.add(update, weight)
    assert mean.steps().dtype == np.int32
    assert advance(base, mean.steps()).tobytes() == mean.result(base).tobytes()


@given(BASES, UPDATES)
def test_the_mean_of_one_site_is_its_update(base: np.ndarray, updates: list[tuple[np.ndarray, int]]) -> None:
    update, weight = updates[0]
    assert mean_of(base, [(update, weight)]).tobytes() == advance(base, update).tobytes()


@given(BASES, UPDATES)
def test_a_site_with_a_double_weight_is_two_sites(
    base: np.ndarray, updates: list[tuple[np.ndarray, int]]
) -> None:
    (update, weight), *others = updates
    assert (
        mean_of(base, [(update, 2 * weight), *others]).tobytes()
        == mean_of(base, [(update, weight)] * 2 + others).tobytes()
    )


def test_weights_matter_by_hand() -> None:
    one = np.full(SIZE, round(1 / GRID), np.int32)  # moves every weight by 1
    mean = mean_of(np.zeros(SIZE, np.float32), [(one, 300), (np.zeros(SIZE, np.int32), 100)])
    assert mean.tolist() == [0.75] * SIZE


@pytest.mark.parametrize("sites", [1, 50, 10_000])
def test_the_largest_updates_of_many_sites_do_not_wrap(sites: int) -> None:
    mean = FederatedMean(1)
    for _ in range(min(sites, 50)):
        mean.add(np.array([LIMIT], np.int32), 10_000 * max(1, sites // 50))
    assert mean.result(np.zeros(1, np.float32)).tolist() == [GRID * LIMIT]


def test_adding_does_not_change_the_update() -> None:
    update = np.array([1, 2, 3, 4], np.int32)
    FederatedMean(SIZE).add(update, 7)
    assert update.tolist() == [1, 2, 3, 4]
