from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, chisquare

from client.dp.coins import Coins
from client.dp.sampler import draw_slices, sample_patients
from common.errors import ConfigError
from tests.helpers.coins import Planted

KEY = bytes(32)


def draws(num_patients: int, sample_rate: float, count: int) -> np.ndarray:
    """Who took part, shape (count, num_patients)."""
    took_part = np.zeros((count, num_patients), dtype=bool)
    coins = Coins(KEY)
    for row in took_part:
        row[sample_patients(num_patients, sample_rate, coins)] = True
    return took_part


def test_sizes_are_binomial_not_fixed() -> None:
    sizes = draws(20, 0.3, 4000).sum(axis=1)
    bins = np.arange(2, 11)
    observed = [
        np.sum(sizes <= bins[0]),
        *(np.sum(sizes == size) for size in bins[1:]),
        np.sum(sizes > bins[-1]),
    ]
    expected = [binom.cdf(bins[0], 20, 0.3), *binom.pmf(bins[1:], 20, 0.3), binom.sf(bins[-1], 20, 0.3)]
    assert chisquare(observed, 4000 * np.array(expected)).pvalue > 1e-4


def test_patients_are_independent_and_equally_likely() -> None:
    took_part = draws(8, 0.25, 8000).astype(float)
    error = math.sqrt(0.25 * 0.75 / 8000)
    assert np.abs(took_part.mean(axis=0) - 0.25).max() < 5 * error
    assert np.abs(np.corrcoef(took_part.T) - np.eye(8)).max() < 5 / math.sqrt(8000)


def test_a_rate_of_one_takes_everyone_and_draws_nothing() -> None:
    np.testing.assert_array_equal(sample_patients(5, 1.0, Planted([])), np.arange(5))


def test_only_a_rate_of_one_is_everyone() -> None:
    assert draws(50, 0.98, 200).mean() == pytest.approx(0.98, abs=0.007)


def test_a_step_may_be_empty() -> None:
    assert sample_patients(0, 0.5, Coins()).size == 0
    assert sample_patients(3, 1e-9, Coins()).size == 0


def test_sampling_is_fresh_in_every_step_and_every_training() -> None:
    assert len({sample_patients(100, 0.5, Coins()).tobytes() for _ in range(20)}) == 20
    coins = Coins()
    assert len({sample_patients(100, 0.5, coins).tobytes() for _ in range(20)}) == 20
    first, second = (sample_patients(100, 0.5, Coins(KEY)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_at_most_so_many_slices_of_a_patient_are_used() -> None:
    rows = np.arange(10, 30)
    coins = Coins()
    drawn = draw_slices(rows, 4, coins)
    assert len(set(drawn.tolist())) == 4
    assert set(drawn.tolist()) <= set(rows.tolist())
    np.testing.assert_array_equal(draw_slices(rows, 20, Planted([])), rows)
    seen = np.concatenate([draw_slices(rows, 4, coins) for _ in range(500)])
    assert len(np.unique(seen)) == 20


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.5, math.nan])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError):
        sample_patients(10, rate, Coins())
