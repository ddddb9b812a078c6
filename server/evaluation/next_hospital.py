"""What to expect at the next hospital, from models scored at hospitals that took no part in their training.

Scores are taken on the logit scale, y = log(A / (1 - A)), where an interval stays between 0 and 1. From k
left-out hospitals the next *observed* value is expected within

    mean(y) +- t_{k-1; .975} s sqrt(1 + 1/k)

with s the standard deviation of the k values (Geisser, Predictive Inference, 1993, ch. 2). It holds nominal
coverage where hospitals have scores of equal precision, whatever the spread between hospitals. It is about a
score on a test set of similar size as these hospitals had, not about the true value behind it: intervals of
that (`random_effects`) need the standard errors and cover less than they say at few hospitals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, t

LEVEL = 0.95
MIN_HOSPITALS = 3
"""Of fewer there is no interval."""
FEW_HOSPITALS = 4
"""Up to so many, the interval is so wide that it says little."""
PRIOR_SCALE = 0.5
"""Of the half-normal prior of the spread between hospitals, on the logit scale (Roever et al., Research
Synthesis Methods 2021).
"""
PRIOR_REACH = 8.0
"""Scales of the prior up to which the spread is integrated; what lies beyond weighs 1e-15."""
GRID = 4001


def to_logit(auroc: np.ndarray, half_pair: np.ndarray) -> np.ndarray:
    """The logits of AUROCs; one of 0 or 1 moves by half a pair first.

    Args:
        auroc: in [0, 1], any shape.
        half_pair: half of one pair's share, 1 / (2 n_pos n_neg), same shape; of a macro AUROC the mean over
            its artifacts.
    """
    return logit(np.clip(auroc, np.where(auroc <= 0, half_pair, 0), np.where(auroc >= 1, 1 - half_pair, 1)))


def factor(hospitals: int) -> float:
    """Half the width of the prediction interval in standard deviations: 4.968 at 3 hospitals, 2.145 at 20."""
    return float(t.ppf(0.5 + LEVEL / 2, hospitals - 1) * np.sqrt(1 + 1 / hospitals))


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The t interval of the mean over hospitals, as low and high.

    Args:
        values: (..., k), one a hospital. nan comes back where k < 2.
    """
    return _around(values, lambda k: float(t.ppf(0.5 + LEVEL / 2, k - 1) / np.sqrt(k)), fewest=2)


def prediction_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of the next hospital's observed value, as low and high.

    Args:
        values: (..., k), one a left-out hospital: logits of AUROCs, or differences of two models. nan comes
            back where k < `MIN_HOSPITALS`.
    """
    return _around(values, factor, fewest=MIN_HOSPITALS)


def _around(values: np.ndarray, width: Any, *, fewest: int) -> tuple[np.ndarray, np.ndarray]:
    k = values.shape[-1]
    if k < fewest:
        return np.full(values.shape[:-1], np.nan), np.full(values.shape[:-1], np.nan)
    mean, half = values.mean(axis=-1), width(k) * values.std(axis=-1, ddof=1)
    return mean - half, mean + half


@dataclass(frozen=True, kw_only=True)
class RandomEffects:
    """Hospitals as draws from a normal distribution of true values, on the logit scale.

    Moments after DerSimonian and Laird (Controlled Clinical Trials 1986).
    """

    q: float  # Cochran's Q
    i2: float  # share of the observed spread that lies between hospitals
    tau2: float  # variance between hospitals
    mean: float
    standard_error: float  # of the mean
    hospitals: int

    def interval(self) -> tuple[float, float]:
        """The interval of the next hospital's true value with t_{k-2} (Higgins et al., JRSS A 2009)."""
        if self.hospitals < MIN_HOSPITALS:
            return np.nan, np.nan
        half = t.ppf(0.5 + LEVEL / 2, self.hospitals - 2) * np.hypot(np.sqrt(self.tau2), self.standard_error)
        return float(self.mean - half), float(self.mean + half)


def random_effects(values: np.ndarray, standard_errors: np.ndarray) -> RandomEffects | None:
    """The spread between hospitals apart from the errors within them.

    Args:
        values, standard_errors: (k,), logits.
    Returns:
        None where there are fewer than two hospitals, or a standard error is missing or 0.
    """
    k = len(values)
    if k < 2 or not (np.isfinite(standard_errors) & (standard_errors > 0)).all():
        return None
    weights = 1 / standard_errors**2
    fixed = np.average(values, weights=weights)
    q = float(weights @ (values - fixed) ** 2)
    tau2 = max(0.0, (q - (k - 1)) / (weights.sum() - weights @ weights / weights.sum()))
    weights = 1 / (standard_errors**2 + tau2)
    return RandomEffects(
        q=q,
        i2=max(0.0, 1 - (k - 1) / q) if q > 0 else 0.0,
        tau2=float(tau2),
        mean=float(np.average(values, weights=weights)),
        standard_error=float(weights.sum() ** -0.5),
        hospitals=k,
    )


def bayes_interval(values: np.ndarray, standard_errors: np.ndarray) -> tuple[float, float]:
    """The interval of the next hospital's true value, with a flat prior of the mean and a half-normal one of
    the spread between hospitals: a mixture of normals over the posterior of the spread.

    Args:
        values, standard_errors: (k,), logits; nan comes back as from `random_effects` None.
    """
    if random_effects(values, standard_errors) is None:
        return np.nan, np.nan
    spread = np.linspace(0, PRIOR_REACH * PRIOR_SCALE, GRID)
    weights = 1 / (standard_errors**2 + spread[:, None] ** 2)
    means = (weights @ values) / weights.sum(axis=1)
    squares = (weights * (values - means[:, None]) ** 2).sum(axis=1)
    log_posterior = 0.5 * (np.log(weights).sum(axis=1) - np.log(weights.sum(axis=1)) - squares)
    log_posterior -= 0.5 * (spread / PRIOR_SCALE) ** 2
    posterior = np.exp(log_posterior - log_posterior.max())
    posterior[[0, -1]] /= 2  # trapezoids
    posterior /= posterior.sum()
    deviations = np.sqrt(spread**2 + 1 / weights.sum(axis=1))
    reach = 40 * deviations.max()
    low, high = (
        brentq(lambda x, p=p: posterior @ norm.cdf(x, means, deviations) - p, -reach, reach)
        for p in (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
    )
    return float(low), float(high)


def jackknife(values: np.ndarray, without: np.ndarray) -> tuple[float, float]:
    """The interval of the mean over hospitals where each of them is a tester and a trainer of the others.

    Left-out scores share training hospitals, so that their spread understates the error of their mean. Here
    each hospital is dropped as both (Tukey's jackknife, t_{k-1}).

    Args:
        values: (k,), hospital h scored by a model of the others.
        without: (k, k), [h, i]: hospital h scored by a model that neither h nor i trained; the diagonal is
            not read.
    """
    k = len(values)
    others = ~np.eye(k, dtype=bool)
    means = np.array([without[others[:, i], i].mean() for i in range(k)])
    error = np.sqrt((k - 1) / k * ((means - means.mean()) ** 2).sum())
    half = t.ppf(0.5 + LEVEL / 2, k - 1) * error
    return float(values.mean() - half), float(values.mean() + half)


def on_logit_scale(
    means: np.ndarray | float, low: np.ndarray | float, high: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Intervals around mean AUROCs, made symmetric in logits (delta method), so that they end within 0 and 1.

    Args:
        means, low, high: of one shape. Bounds come back as they are where a mean is 0, 1 or nan.
    """
    means, low, high = np.asarray(means, float), np.asarray(low, float), np.asarray(high, float)
    slope = means * (1 - means)
    inside = slope > 0
    center, slope = logit(np.where(inside, means, 0.5)), np.where(inside, slope, 1)
    return (
        np.where(inside, expit(center - (means - low) / slope), low),
        np.where(inside, expit(center + (high - means) / slope), high),
    )


def hospitals_expected(
    aurocs: np.ndarray, standard_errors: np.ndarray, half_pairs: np.ndarray
) -> dict[str, Any]:
    """What k left-out hospitals say of the next one, as AUROCs.

    Args:
        aurocs, standard_errors, half_pairs: (k,); an error may be nan.
    Returns:
        `low`, `high`: the prediction interval; `too_few`: whether it says little; `random_effects`: `q`,
        `i2`, `tau2`, `mean`, `standard_error` (logits), and the intervals of the true value, `dl_low`,
        `dl_high`, `bayes_low`, `bayes_high` (AUROCs); None where the standard errors do not permit it.
    """
    values = to_logit(aurocs, half_pairs)
    errors = standard_errors / (expit(values) * expit(-values))
    low, high = prediction_interval(values)
    found, effects = None, random_effects(values, errors)
    if effects is not None:
        dl, bayes = expit(effects.interval()), expit(bayes_interval(values, errors))
        found = {
            "q": effects.q,
            "i2": effects.i2,
            "tau2": effects.tau2,
            "mean": effects.mean,
            "standard_error": effects.standard_error,
            **dict(zip(("dl_low", "dl_high", "bayes_low", "bayes_high"), (*dl, *bayes), strict=True)),
        }
    return {
        "low": float(expit(low)),
        "high": float(expit(high)),
        "too_few": MIN_HOSPITALS <= len(values) <= FEW_HOSPITALS,
        "random_effects": found,
    }
