"""AUROC from counts that carry noise, with an interval that takes the noise into account.

Small on purpose: one artifact of one model at one site. Positives p and negatives n in bins i, j, each count
with independent noise of variance s^2; h is 1, 1/2 or 0 where a positive in bin i ranks above, with or below
a negative in bin j. Then T(theta) = sum p_i n_j (h_ij - theta) has mean zero at the AUROC of these bins,
since the noise of p and of n is independent and has mean zero; no count is clipped, which would shift it. The
interval is the set of theta that T does not reject (Fieller 1954, for a ratio):
T^2 <= z^2 (V_noise + V_patients), with

    V_noise    = s^2 (sum_i a_i^2 + sum_j b_j^2) - s^4 S, at least s^4 S
                 a_i = sum_j n_j (h_ij - theta),  b_j = sum_i p_i (h_ij - theta),  S = sum (h_ij - theta)^2
    V_patients = (sum p)^2 (sum n)^2 times the variance of Hanley and McNeil (1982) at theta

V_noise is unbiased but for its floor. Where a class cannot be told from none, or no theta is rejected, the
AUROC is *not estimable at this noise*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

from common.artifacts import DEFAULT_LABELS
from common.counts import coarse_bias, crowded, hanley_mcneil, widened

GRID = np.linspace(0, 1, 1001)
NOT_ESTIMABLE = "not-estimable-at-this-noise"
NOT_ESTIMABLE_HERE = "not-estimable-at-this-n-and-epsilon"
"""Decided before anybody was asked (common/estimability.py), whatever the counts say."""


@dataclass(frozen=True, kw_only=True)
class NoisedCounts:
    """Noised counts of one model at one site, `positives` and `negatives` int64 of shape (A, bins), below
    zero at times.
    """

    positives: np.ndarray
    negatives: np.ndarray
    deviation: float  # standard deviation of the noise on each count
    # whether the public numbers of the site let expect anything; where not, no AUROC is given, so that those
    # are not reported in which noise looks like a result
    expected: bool = True

    @property
    def n_pos(self) -> np.ndarray:
        """Estimated numbers of patients with each artifact, int64 (A,), at least 0."""
        return np.maximum(self.positives.sum(axis=1), 0)

    @property
    def n_neg(self) -> np.ndarray:
        """Likewise without it."""
        return np.maximum(self.negatives.sum(axis=1), 0)

    @property
    def n_deviation(self) -> float:
        """Standard deviation of the noise on an estimated number of patients."""
        return float(self.deviation * np.sqrt(self.positives.shape[1]))

    def auroc(self) -> np.ndarray:
        """Shape (A,), in 0..1; nan where it is not estimable."""
        return self._estimates[:, 0]

    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """The 95 % interval of each AUROC, shapes (A,), (A,), widened by the `bias` of the bins; nan where it
        is not estimable.
        """
        return widened(self._estimates[:, 1], self._estimates[:, 2], self.bias())

    def bias(self) -> np.ndarray:
        """What is to be added to each `auroc` for the patients who share a bin, shape (A,)."""
        rows = zip(self.positives, self.negatives, strict=True)
        return np.array([coarse_bias(pos, neg) for pos, neg in rows])

    def crowded(self) -> np.ndarray:
        """Whether one bin seems to hold more of a class than `common.counts.CROWDED`, bool (A,)."""
        return crowded(self.positives, self.negatives)

    def auroc_variance(self) -> np.ndarray:
        """Variance of `auroc` from noise and patients, shape (A,); nan where it is not estimable."""
        return self._estimates[:, 3] + self._estimates[:, 4]

    def noise_variance(self) -> np.ndarray:
        """The part of it from noise, which is independent between artifacts and models, shape (A,)."""
        return self._estimates[:, 3]

    def sampling_deviation(self) -> np.ndarray:
        """Standard deviation of `auroc` from the draw of patients alone, shape (A,)."""
        return np.sqrt(self._estimates[:, 4])

    @property
    def missing_reason(self) -> str:
        """Why an AUROC that is missing is."""
        return NOT_ESTIMABLE if self.expected else NOT_ESTIMABLE_HERE

    @cached_property
    def _estimates(self) -> np.ndarray:
        if not self.expected:
            return np.full((len(self.positives), 5), np.nan)
        rows = zip(self.positives, self.negatives, strict=True)
        return np.array([_estimate(pos, neg, self.deviation) for pos, neg in rows])

    def to_json(self, names: Sequence[str] = DEFAULT_LABELS) -> dict[str, object]:
        """artifact -> {positives: [n, ...], negatives: [...]}: every bin, as it was sent."""
        rows = zip(names, self.positives, self.negatives, strict=True)
        return {name: {"positives": pos.tolist(), "negatives": neg.tolist()} for name, pos, neg in rows}


def covariance(models: Sequence[NoisedCounts]) -> np.ndarray:
    """Of the AUROCs of several models, (K*A, K*A), model-major, from the noise alone: it is drawn anew for
    every count.
    """
    return np.diag(np.concatenate([counts.noise_variance() for counts in models]))


def sampling_deviations(models: Sequence[NoisedCounts]) -> np.ndarray:
    """Standard deviations of the same AUROCs from the draw of patients, (K*A,). All of them are of the same
    patients, and how they vary together no site sends; by Cauchy and Schwarz a sum of them with weights w
    varies by at most (sum |w| s)^2.
    """
    return np.concatenate([counts.sampling_deviation() for counts in models])


def _estimate(pos: np.ndarray, neg: np.ndarray, deviation: float) -> tuple[float, float, float, float, float]:
    """value, low, high, variance from noise and from patients; all nan where the AUROC is not estimable."""
    none = (np.nan,) * 5
    z = NormalDist().inv_cdf(0.975)
    m, n = float(pos.sum()), float(neg.sum())
    least = max(z * deviation * np.sqrt(len(pos)), 1.0)
    if min(m, n) < least:
        return none
    places = np.arange(len(pos))
    ranks = 0.5 * (1 + np.sign(places[:, None] - places[None, :]))
    wins = float(pos @ ranks @ neg)
    squared = (wins - GRID * m * n) ** 2
    variance = sum(_variances(pos, neg, ranks, deviation, GRID, m, n))
    kept = GRID[squared <= z**2 * variance]
    if not len(kept) or (kept[0] == 0 and kept[-1] == 1):
        return none
    value = float(np.clip(wins / (m * n), 0, 1))
    noise, patients = (
        float(part[0] / (m * n) ** 2)
        for part in _variances(pos, neg, ranks, deviation, np.array([value]), m, n)
    )
    return value, float(min(kept[0], value)), float(max(kept[-1], value)), noise, patients


def _variances(
    pos: np.ndarray,
    neg: np.ndarray,
    ranks: np.ndarray,
    deviation: float,
    thetas: np.ndarray,
    m: float,
    n: float,
) -> tuple[np.ndarray, np.ndarray]:
    """V_noise and V_patients at each theta."""
    centred = ranks[None] - thetas[:, None, None]
    spread = (centred**2).sum((1, 2))
    of_rows, of_columns = (centred @ neg) ** 2, (pos @ centred) ** 2
    noise = deviation**2 * (of_rows.sum(1) + of_columns.sum(1)) - deviation**4 * spread
    patients = np.array([hanley_mcneil(float(theta), m, n) for theta in thetas]) * (m * n) ** 2
    return np.maximum(noise, deviation**4 * spread), patients
