"""How well a score tells cases with a patient from cases without: right guesses, area under the curve, and
who is found at few false alarms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A measured share and its standard error; nan where there was nothing to measure."""

    value: float
    error: float

    def interval(self, deviations: float = 1.96) -> tuple[float, float]:
        """The values that are so many standard errors below and above, within [0, 1]."""
        reach = deviations * self.error
        return max(0.0, self.value - reach), min(1.0, self.value + reach)


def auc(inside: np.ndarray, outside: np.ndarray) -> Estimate:
    """The probability that a case inside scores more than one outside, ties counted half; mean over columns.

    The error is that of cases, not of columns: those of a row may depend on one another.

    Args:
        inside, outside: scores, shapes (m, columns) and (n, columns); a column is an attack of its own.
    Returns:
        nan where either has fewer than two rows.
    Reference: DeLong, DeLong, Clarke-Pearson 1988, structural components.
    """
    if min(len(inside), len(outside)) < 2:
        return Estimate(math.nan, math.nan)
    columns = range(inside.shape[1])
    of_inside = np.mean([_share_below(outside[:, one], inside[:, one]) for one in columns], axis=0)
    of_outside = np.mean([_share_below(-inside[:, one], -outside[:, one]) for one in columns], axis=0)
    return Estimate(float(of_inside.mean()), _error(of_inside, of_outside))


def right_guesses(inside: np.ndarray, outside: np.ndarray) -> Estimate:
    """The share of right guesses, where a score above 0 means inside and both cases are as likely.

    Args, Returns: as `auc`.
    """
    if min(len(inside), len(outside)) < 2:
        return Estimate(math.nan, math.nan)
    found, passed = (inside > 0).mean(axis=1), (outside <= 0).mean(axis=1)
    return Estimate(float(found.mean() + passed.mean()) / 2, _error(found, passed) / 2)


def share_found(inside: np.ndarray, outside: np.ndarray, *, false_alarms: float = 0.01) -> float:
    """The share inside that scores above all but `false_alarms` of those outside; nan where there is nobody.

    Args:
        inside, outside: scores, shapes (m,) and (n,). With n below 1 / `false_alarms`, no false alarm is
            admitted.
    """
    if not (len(inside) and len(outside)):
        return math.nan
    admitted = math.floor(false_alarms * len(outside) + 1e-9)
    return float((inside > np.sort(outside)[-1 - admitted]).mean())


def share_found_interval(
    inside: np.ndarray, outside: np.ndarray, *, false_alarms: float = 0.01, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of `share_found` over resampled cases."""
    if not (len(inside) and len(outside)):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    drawn = [
        share_found(
            generator.choice(inside, len(inside)),
            generator.choice(outside, len(outside)),
            false_alarms=false_alarms,
        )
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _share_below(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value the share of `known` below it, ties counted half."""
    ordered = np.sort(known)
    below, upto = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray((below + upto) / (2 * len(known)))


def _error(one: np.ndarray, other: np.ndarray) -> float:
    """Of the sum of two independent means."""
    return math.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
