"""Tests and their correction for several looks, and the minimum of several sites: arithmetic without data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)


def expit(value: float) -> float:
    """The inverse of the logit; nan of nan."""
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0 if value <= -700 else math.nan


def two_sided(value: float, standard_error: float) -> float:
    """The normal distribution's two-sided p of a difference; nan without a standard error.

    1 where value and standard error are both 0; nan where only the standard error is: it cannot be believed.
    """
    if standard_error > 0:
        return math.erfc(abs(value) / standard_error / math.sqrt(2))
    return 1.0 if value == standard_error == 0 else math.nan


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of one family: below a level with at most that probability for any true null
    hypothesis, however the tests depend on one another.

    Args:
        p: nan where a test could not be made; it stays nan and does not count.
    Reference: Holm, Scand J Statist 6:65 (1979), step-down.
    """
    made = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, (value, place) in enumerate(made):
        largest = max(largest, min(1.0, value * (len(made) - rank)))
        adjusted[place] = largest
    return adjusted


def below_half(auroc: float, m: float, n: float, variance: float | None = None) -> float:
    """One-sided p of an AUROC at or above 0.5, with half a pair of continuity correction.

    Args:
        m, n: patients with and without.
        variance: of the estimate; None: that of the Mann-Whitney statistic at 0.5, (m + n + 1) / 12 m n.
    """
    if variance is None:
        variance = (m + n + 1) / (12 * m * n)
    if not variance > 0:
        return math.nan
    return float(ndtr((auroc + 0.5 / max(m * n, 1.0) - 0.5) / math.sqrt(variance)))


def expected_minimum(values: np.ndarray, errors: np.ndarray) -> float:
    """The mean of the smallest of k normal estimates of one true value, with these standard errors.

    E min = t - integral over x of 1 - prod_i (1 - Phi(x / e_i)) below 0, plus that product above 0; t is the
    mean of the values, weighted by their inverse variances.

    Args:
        values, errors: (k,).
    Returns:
        nan unless every standard error is above 0; of one site its value.
    """
    if len(values) == 1:
        return float(values[0])
    if not (errors > 0).all():
        return math.nan
    weights = errors**-2.0
    x = np.linspace(-8, 8, 4001) * errors.max()
    survival = np.exp(sum(np.log(np.maximum(ndtr(-x / error), 1e-300)) for error in errors))
    shift = np.trapezoid(survival - np.heaviside(-x, 0.5), x)
    return float(weights @ values / weights.sum() + shift)
