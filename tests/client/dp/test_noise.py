from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from client.dp.noise import add_noise, fresh_generator, noise_grid
from common.errors import ConfigError


def test_the_noise_has_the_promised_deviation_and_shape() -> None:
    noised = add_noise(np.zeros(1_000_000), noise_multiplier=1.7, clip_norm=0.3)
    assert noised.std() == pytest.approx(1.7 * 0.3, rel=0.01)
    assert abs(noised.mean()) < 4 * 0.51 / 1000
    assert kstest(noised[:20_000] / 0.51, "norm").pvalue > 1e-4


def test_what_is_released_lies_on_a_public_grid() -> None:
    grid = noise_grid(1.7, 0.3)
    assert math.frexp(grid)[0] == 0.5  # a power of two, so that dividing by it is exact
    assert 0.51 * 2**-21 < grid <= 0.51 * 2**-20
    noised = add_noise(
        np.random.default_rng(0).standard_normal(1000) * 1e3, noise_multiplier=1.7, clip_norm=0.3
    )
    np.testing.assert_array_equal(noised, np.round(noised / grid) * grid)


def test_zero_noise_changes_nothing() -> None:
    total = np.random.default_rng(0).standard_normal(100)
    np.testing.assert_array_equal(add_noise(total, noise_multiplier=0, clip_norm=1e9), total)


def test_no_two_draws_are_alike_and_none_can_be_repeated() -> None:
    draws = [fresh_generator().standard_normal(4).tobytes() for _ in range(100)]
    assert len(set(draws)) == 100
    np.random.seed(0)  # noqa: NPY002
    first = add_noise(np.zeros(4), noise_multiplier=1, clip_norm=1)
    np.random.seed(0)  # noqa: NPY002
    assert not np.array_equal(first, add_noise(np.zeros(4), noise_multiplier=1, clip_norm=1))


def test_a_given_generator_repeats() -> None:
    first, second = (
        add_noise(np.zeros(4), noise_multiplier=1, clip_norm=1, generator=np.random.default_rng(5))
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "wrong",
    [{"noise_multiplier": -1}, {"noise_multiplier": math.nan}, {"clip_norm": 0}, {"clip_norm": math.inf}],
)
def test_numbers_that_promise_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        add_noise(np.zeros(3), **{"noise_multiplier": 1.0, "clip_norm": 1.0, **wrong})
