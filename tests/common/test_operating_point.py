"""The rule of an operating point and the fit of probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from common.operating_point import LEAST_FOUND, logistic_fit, platt, youden


def test_of_equal_sums_the_last_threshold_is_taken_and_enough_are_found() -> None:
    sensitivity = np.array([1.0, 0.9, 0.8, 0.7, 0.2])
    specificity = np.array([0.0, 0.5, 0.6, 1.0, 1.0])
    assert sensitivity[3] < LEAST_FOUND
    assert youden(sensitivity, specificity) == 2


def test_calibration_finds_the_law_that_labels_follow() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 2, 40_000)
    present = rng.random(40_000) < 1 / (1 + np.exp(-(0.7 * values - 1.2)))
    assert platt(values, present) == pytest.approx((0.7, -1.2), abs=0.05)


def test_calibration_of_separated_classes_stays_finite() -> None:
    slope, offset = platt(np.array([-1.0, -2, 1, 2]), np.array([False, False, True, True]))
    assert np.isfinite([slope, offset]).all()
    assert slope > 0


def test_a_weighted_fit_is_that_of_repeated_patients() -> None:
    values, target, often = np.array([-1.0, 0, 1, 2]), np.array([0.0, 1, 0, 1]), np.array([3, 1, 2, 4])
    repeated = logistic_fit(np.repeat(values, often), np.repeat(target, often))
    assert logistic_fit(values, target, weights=often) == pytest.approx(repeated, abs=1e-6)
