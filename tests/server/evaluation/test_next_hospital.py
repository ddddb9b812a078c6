"""The next hospital: reference numbers, coverage, and what shared training hospitals do to an interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import t

from server.evaluation.next_hospital import (
    bayes_interval,
    factor,
    hospitals_expected,
    jackknife,
    mean_interval,
    on_logit_scale,
    prediction_interval,
    random_effects,
    to_logit,
)

AUROCS, ERRORS = np.array([0.90, 0.85, 0.80, 0.95, 0.70]), np.array([0.30, 0.25, 0.20, 0.40, 0.20])
LOGITS = logit(AUROCS)
DRAWS = 20_000


def covered(bounds: tuple[np.ndarray | float, np.ndarray | float], values: np.ndarray | float) -> float:
    low, high = bounds
    return float(np.mean((low < values) & (values < high)))


def test_factors_of_the_standard_deviation() -> None:
    assert [round(factor(k), 3) for k in (3, 4, 5, 10, 20)] == [4.968, 3.558, 3.041, 2.373, 2.145]


def test_reference_vector() -> None:
    """DerSimonian-Laird as statsmodels.stats.meta_analysis.combine_effects(method_re="chi2") gives it."""
    found = random_effects(LOGITS, ERRORS)
    assert (found.q, found.tau2) == (pytest.approx(30.273257, abs=1e-6), pytest.approx(0.414761, abs=1e-6))
    assert (found.i2, found.mean) == (pytest.approx(0.8679, abs=5e-5), pytest.approx(1.764403, abs=1e-6))
    assert found.standard_error == pytest.approx(0.312894, abs=1e-6)
    assert expit(prediction_interval(LOGITS)) == pytest.approx([0.3531, 0.9859], abs=5e-5)
    assert expit(found.interval()) == pytest.approx([0.3742, 0.9828], abs=5e-5)
    assert expit(bayes_interval(LOGITS, ERRORS)) == pytest.approx([0.5543, 0.9658], abs=5e-5)


def test_the_parts_are_put_together_on_the_scale_of_auroc() -> None:
    standard_errors = ERRORS * AUROCS * (1 - AUROCS)
    found = hospitals_expected(AUROCS, standard_errors, np.full(5, 0.001))
    assert (found["low"], found["high"]) == (
        pytest.approx(0.3531, abs=5e-5),
        pytest.approx(0.9859, abs=5e-5),
    )
    assert found["random_effects"]["q"] == pytest.approx(30.273257, abs=1e-6)
    assert found["random_effects"]["bayes_high"] == pytest.approx(0.9658, abs=5e-5)
    assert found["too_few"] is False


def test_hospitals_that_agree_have_no_spread_between_them() -> None:
    found = random_effects(np.full(4, 1.5), np.array([0.2, 0.3, 0.2, 0.5]))
    assert (found.q, found.i2, found.tau2, found.mean) == (0, 0, 0, pytest.approx(1.5))


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("k", [3, 4, 5, 10, 20])
def test_it_covers_the_next_observed_value(k: int, tau: float) -> None:
    """Sites of equal precision: exactly 95 %, here within three Monte-Carlo errors (0.15 %)."""
    generator = np.random.default_rng(1000 * k + round(100 * tau))
    values = generator.normal(1.5, np.hypot(tau, 0.3), (DRAWS, k + 1))
    assert covered(prediction_interval(values[:, :k]), values[:, k]) == pytest.approx(0.95, abs=0.0047)


def test_with_mixed_precision_and_no_spread_it_covers_less() -> None:
    """As stated in docs/evaluation.md: 91 to 92 %, and less where the next test set is a small one."""
    generator, k = np.random.default_rng(5), 10
    errors = generator.choice([0.1, 0.6], (DRAWS, k + 1))
    values = generator.normal(1.5, errors)
    bounds = prediction_interval(values[:, :k])
    assert covered(bounds, values[:, k]) == pytest.approx(0.915, abs=0.01)
    assert covered(bounds, generator.normal(1.5, 0.6, DRAWS)) == pytest.approx(0.83, abs=0.01)


@pytest.mark.parametrize("k", [1, 2])
def test_one_or_two_hospitals_give_no_interval(k: int) -> None:
    found = hospitals_expected(AUROCS[:k], ERRORS[:k] / 10, np.full(k, 0.001))
    assert np.isnan([found["low"], found["high"]]).all()
    assert found["too_few"] is False


@pytest.mark.parametrize("k", [3, 4])
def test_three_or_four_are_marked(k: int) -> None:
    found = hospitals_expected(AUROCS[:k], ERRORS[:k] / 10, np.full(k, 0.001))
    assert found["too_few"] is True
    assert 0 < found["low"] < found["high"] < 1


def test_an_auroc_of_0_or_1_moves_by_half_a_pair() -> None:
    moved = to_logit(np.array([1.0, 0.0, 0.9]), np.array([1 / 200, 1 / 80, 1 / 200]))
    assert moved == pytest.approx(logit([1 - 1 / 200, 1 / 80, 0.9]))
    found = hospitals_expected(np.array([1.0, 0.8, 0.9]), np.array([0.0, 0.05, 0.04]), np.full(3, 1 / 200))
    assert np.isfinite([found["low"], found["high"]]).all()
    assert found["random_effects"] is None  # its standard error is 0


def test_jackknife_covers_where_training_hospitals_vary_as_much_as_test_hospitals() -> None:
    """Models of single hospitals: score[j, h] = a[j] + b[h], a and b of variance 1, 13 hospitals. The naive
    interval covers 85 %, as its spread shows little of the trainers.
    """
    generator, k, draws = np.random.default_rng(8), 13, 2_000
    others = ~np.eye(k, dtype=bool)
    naive = jackknifed = 0.0
    for _ in range(draws):
        trainers, testers = generator.normal(size=(2, k))
        total = trainers.sum()
        values = (total - trainers) / (k - 1) + testers
        without = (total - trainers[:, None] - trainers[None, :]) / (k - 2) + testers[:, None]
        assert without[others].size == k * (k - 1)
        naive += covered(mean_interval(values), 0.0)
        jackknifed += covered(jackknife(values, without), 0.0)
    assert naive / draws == pytest.approx(0.85, abs=0.025)
    assert jackknifed / draws == pytest.approx(0.95, abs=0.02)


def test_jackknife_of_scores_that_depend_on_no_training_is_the_t_interval() -> None:
    values = np.array([0.8, 0.9, 0.7, 0.85])
    half = t.ppf(0.975, 3) * values.std(ddof=1) / 2
    found = jackknife(values, np.broadcast_to(values[:, None], (4, 4)))
    assert found == pytest.approx((values.mean() - half, values.mean() + half))
    assert mean_interval(values) == pytest.approx(found)


@pytest.mark.parametrize(
    ("k", "center", "spread", "symmetric", "in_logits"),
    [(4, 1.0, 0.4, 0.946, 0.950), (5, 3.0, 1.0, 0.865, 0.914), (13, 3.0, 1.0, 0.888, 0.915)],
)
def test_a_mean_near_one_is_covered_more_often_in_logits(
    k: int, center: float, spread: float, symmetric: float, in_logits: float
) -> None:
    generator = np.random.default_rng(1)
    truth = expit(generator.normal(center, spread, 400_000)).mean()
    values = expit(generator.normal(center, spread, (DRAWS, k)))
    plain = mean_interval(values)
    moved = on_logit_scale(values.mean(axis=1), *plain)
    assert covered(plain, truth) == pytest.approx(symmetric, abs=0.01)
    assert covered(moved, truth) == pytest.approx(in_logits, abs=0.01)
    assert np.all((moved[0] >= 0) & (moved[1] <= 1))


def test_a_perfect_or_missing_mean_keeps_its_bounds() -> None:
    low, high = on_logit_scale(
        np.array([1.0, np.nan, 0.5]), np.array([1.0, 0.1, 0.25]), np.array([1, 0.2, 0.75])
    )
    assert low == pytest.approx([1.0, 0.1, expit(-1)])
    assert high == pytest.approx([1.0, 0.2, expit(1)])
