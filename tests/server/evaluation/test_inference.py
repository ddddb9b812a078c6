"""Holm against a published example, the smallest of equal sites against tables, p values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from server.evaluation.inference import below_half, expected_minimum, expit, holm, two_sided

RAW = [
    0.838541367553,
    0.642193923795,
    0.680845947633,
    0.967833824309,
    0.71626938238,
    0.177096952723,
    5.23656777208e-05,
    0.0202732688798,
    0.00028140506198,
    0.0149877310796,
]
"""Ten p values with Holm's correction by R's multtest (mt.rawp2adjp), as the tests of statsmodels quote
them.
"""
ADJUSTED = {
    5.23656777208e-05: 5.2365677720800005e-04,
    0.00028140506198: 2.5326455578199999e-03,
    0.0149877310796: 1.1990184863680001e-01,
    0.0202732688798: 1.4191288215860001e-01,
}


def test_holm_is_that_of_r() -> None:
    found = dict(zip(RAW, holm(RAW), strict=True))
    for p, adjusted in ADJUSTED.items():
        assert found[p] == pytest.approx(adjusted, rel=1e-9)
    assert found[0.177096952723] == 1.0
    assert max(found.values()) == 1.0


def test_holm_never_falls_and_does_not_count_what_was_not_tested() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm([0.01, math.nan, 0.04, 0.03, 0.005])
    assert math.isnan(with_gap[1])
    assert [p for p in with_gap if not math.isnan(p)] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(("count", "standard"), [(2, 0.56419), (3, 0.84628), (5, 1.16296), (10, 1.53875)])
def test_the_smallest_of_equal_sites_is_that_of_normal_order_statistics(count: int, standard: float) -> None:
    """Tippett (1925); Harter (1961)."""
    found = expected_minimum(np.full(count, 0.8), np.full(count, 0.02))
    assert found == pytest.approx(0.8 - standard * 0.02, abs=1e-5)


def test_the_smallest_of_sites_of_unequal_precision_is_that_of_a_simulation() -> None:
    errors = np.array([0.01, 0.03, 0.08])
    drawn = np.random.default_rng(0).normal(0.7, errors, (200_000, 3)).min(axis=1)
    assert expected_minimum(np.full(3, 0.7), errors) == pytest.approx(drawn.mean(), abs=5e-4)
    assert expected_minimum(np.array([0.6]), np.array([0.1])) == 0.6
    assert math.isnan(expected_minimum(np.array([0.6, 0.7]), np.array([0.1, math.nan])))


def test_p_values_by_hand() -> None:
    assert two_sided(0.0196, 0.01) == pytest.approx(0.05, abs=1e-4)
    assert two_sided(0.0, 0.0) == 1.0
    assert math.isnan(two_sided(0.1, 0.0))
    assert math.isnan(two_sided(0.1, math.nan))
    assert below_half(0.5, 20, 30) == pytest.approx(0.5, abs=0.01)
    assert below_half(0.2, 20, 30) < 0.001 < below_half(0.4, 5, 5)
    assert (expit(0.0), expit(-800.0)) == (0.5, 0.0)
    assert math.isnan(expit(math.nan))


def test_below_half_is_right_about_as_often_as_it_says() -> None:
    """A score that tells nothing: in 2000 hospitals of 8 and 20 patients p is below 0.05 in about 5 %."""
    rng = np.random.default_rng(1)
    scores = rng.random((2000, 28))
    wins = (scores[:, :8, None] > scores[:, None, 8:]).mean(axis=(1, 2))
    below = np.mean([below_half(float(auroc), 8, 20) < 0.05 for auroc in wins])
    assert 0.03 < below < 0.065
