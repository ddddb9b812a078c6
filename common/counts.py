"""Mergeable sums of an evaluation; every metric is computed from them once, where it is reported.

A site turns patient scores into histograms over public bins. Histograms of disjoint patients add up exactly,
in any order. AUROC from a histogram counts a tie inside a bin as one half, as the Mann-Whitney statistic
does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from common.artifacts import NAMES

SLICES_OF_A_SCORE = 3
"""A patient's score is the expected maximum of so many of the patient's slices (`patient_scores`)."""

BINS = 480
LOGIT_LIMIT = 12.0
"""Scores are logits, cut at ±12 and put into 480 bins of 0.05: fine enough that ties are rare, public, the
same everywhere.
"""
DISCLOSED_BINS, DISCLOSED_LIMIT = 20, 6.0
"""What a hospital may disclose is coarser: 20 bins of 0.6 between ±6, where logits mostly lie."""
NOISED_BINS = 8
"""What a hospital sends with noise: fewer bins, since each gets noise of its own."""


def to_bins(logits: np.ndarray) -> np.ndarray:
    """Bin number 0..BINS-1 of each logit, same shape, int64. Not-a-number goes to the middle: it carries no
    information.
    """
    finite = np.nan_to_num(
        np.asarray(logits, dtype=np.float64), nan=0.0, posinf=LOGIT_LIMIT, neginf=-LOGIT_LIMIT
    )
    return np.clip(np.floor((finite + LOGIT_LIMIT) * (BINS / (2 * LOGIT_LIMIT))), 0, BINS - 1).astype(
        np.int64
    )


def coarsen(logits: np.ndarray) -> np.ndarray:
    """Each logit replaced by the middle of its bin of `DISCLOSED_BINS`, same shape: all that follows from it
    is as coarse. Not-a-number stays, as `to_bins` has a place for it.
    """
    width = 2 * DISCLOSED_LIMIT / DISCLOSED_BINS
    bins = np.clip(
        np.floor((np.asarray(logits, np.float64) + DISCLOSED_LIMIT) / width), 0, DISCLOSED_BINS - 1
    )
    return (bins + 0.5) * width - DISCLOSED_LIMIT


def quantile_edges(scores: np.ndarray) -> np.ndarray:
    """The inner edges of `NOISED_BINS` bins that hold about equally many of the given scores.

    They are rounded to 2^-10, so that another machine, whose scores differ in the last bit, gets the same.

    Args:
        scores: (patients, A) of public images, nan where not assessed.
    Returns:
        float32 (A, NOISED_BINS - 1), not decreasing; zeros where no patient was assessed.
    """
    shares = np.arange(1, NOISED_BINS) / NOISED_BINS
    known = [column[np.isfinite(column)] for column in scores.T]
    edges = [np.quantile(column, shares) if len(column) else np.zeros(len(shares)) for column in known]
    return (np.rint(np.array(edges) * 1024) / 1024).astype(np.float32).reshape(scores.shape[1], -1)


def count_between(scores: np.ndarray, labels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Patients with (first) and without an artifact in the bins between `edges`, int64 (2, A, NOISED_BINS).

    One patient, whatever the scores and labels, is counted at most once an artifact: adding or removing one
    changes the result by at most sqrt(A) in L2, whatever the edges.

    Args:
        scores, labels: (P, A) of `per_patient`: one row a patient; labels 1, 0 or nan.
        edges: (A, NOISED_BINS - 1), not decreasing. A score equal to an edge lies above it; not-a-number
            counts as zero.
    """
    artifacts = labels.shape[1]
    counts = np.zeros((2, artifacts, NOISED_BINS), np.int64)
    for artifact in range(artifacts):
        values = np.nan_to_num(scores[:, artifact].astype(np.float64), nan=0.0)
        bins = np.searchsorted(edges[artifact].astype(np.float64), values, side="right")
        for row, present in enumerate((1, 0)):
            np.add.at(counts[row, artifact], bins[labels[:, artifact] == present], 1)
    return counts


def noise_deviation(noise_multiplier: float, models: int) -> float:
    """Standard deviation of the noise on each count of an evaluation: noise multiplier times sensitivity.

    The sensitivity of all counts together is sqrt(models * artifacts) (`count_between` for each model).
    """
    return noise_multiplier * (models * len(NAMES)) ** 0.5


def per_patient(
    logits: np.ndarray, labels: np.ndarray, patients: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of patients from the slices that were assessed (`patient_scores`, `patient_labels`).

    Args:
        logits: (slices, A). labels: (slices, A), 1, 0 or nan (not assessed or impossible). patients:
            (slices,), any integers.
    Returns:
        (P, A) scores and (P, A) labels, nan where no slice was assessed; one row a patient, by number.
    """
    return patient_scores(logits, labels, patients), patient_labels(labels, patients)


def patient_labels(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Whether an artifact is in any slice of a patient that was assessed, (P, A), nan where none was.

    The maximum, because that is what the label says: a patient has an artifact that one slice has, however
    many slices there are.
    """
    ids, where = np.unique(patients, return_inverse=True)
    truth = np.full((len(ids), labels.shape[1]), -np.inf)
    np.maximum.at(truth, where, np.where(np.isnan(labels), -np.inf, labels))
    return np.where(np.isneginf(truth), np.nan, truth)


def patient_scores(logits: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """The expected maximum of `SLICES_OF_A_SCORE` = k slices that are drawn from a patient's n without
    replacement, (P, A), nan where no slice was assessed.

    A maximum over all slices rises with their number, and a patient with more of them seems to have more
    artifacts. This mean over all choices of k slices (a U-statistic, Hoeffding 1948) has the same expectation
    for every n >= k, and is known exactly: the slice of rank i has the weight C(i - 1, k - 1) / C(n, k). It
    does not fall where a slice's logit rises. The price: what a single slice of n shows weighs k / n. With
    fewer than k slices it is their maximum, which is lower.

    Args:
        logits, labels, patients: as in `per_patient`.
    """
    ids, where = np.unique(patients, return_inverse=True)
    scores = np.full((len(ids), logits.shape[1]), np.nan)
    for artifact in range(logits.shape[1]):
        rows = np.flatnonzero(~np.isnan(labels[:, artifact]))
        values = logits[rows, artifact].astype(np.float64)
        order = np.lexsort((values, where[rows]))
        owner, values = where[rows][order], values[order]
        first, number = np.unique(owner, return_index=True, return_counts=True)[1:]
        weights = rank_weights(np.arange(len(owner)) - np.repeat(first, number), np.repeat(number, number))
        used = weights > 0
        weighted = np.bincount(owner[used], weights[used] * values[used], minlength=len(ids))
        known = np.bincount(owner, minlength=len(ids)) > 0
        scores[known, artifact] = weighted[known]
    return scores


def rank_weights(ranks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """What each slice weighs in `patient_scores`: the chance that it is the highest of those drawn.

    Args:
        ranks: of each slice among those of its patient, 0 the lowest; below zero: no slice, which weighs 0.
        numbers: how many slices that patient has, at least 1; same shape.
    """
    drawn = np.minimum(SLICES_OF_A_SCORE, numbers)
    weights = np.where(ranks < 0, 0.0, drawn / numbers)
    for other in range(1, SLICES_OF_A_SCORE):
        below = np.maximum(ranks - other + 1, 0) / np.maximum(numbers - other, 1)
        weights = np.where(other < drawn, weights * below, weights)
    return weights


def auroc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Exact AUROCs, a tie as one half, shape (A,); nan without both classes.

    Args:
        scores, labels: (P, A) of `per_patient`.
    """
    found = np.full(labels.shape[1], np.nan)
    for artifact in range(labels.shape[1]):
        known = ~np.isnan(labels[:, artifact])
        places = np.unique(scores[known, artifact], return_inverse=True)[1]
        present = labels[known, artifact] == 1
        length = int(places.max(initial=-1)) + 1
        positives = np.bincount(places[present], minlength=length)[None]
        negatives = np.bincount(places[~present], minlength=length)[None]
        found[artifact] = _auroc(positives, negatives)[0]
    return found


def _auroc(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """From histograms (A, bins) of rising scores, shape (A,)."""
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + 0.5 * negatives)).sum(axis=1)
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Histograms of scores, one row an artifact: `positives` and `negatives`, each int64 of shape (A,
    BINS).
    """

    positives: np.ndarray
    negatives: np.ndarray

    @staticmethod
    def empty(artifacts: int = len(NAMES)) -> Counts:
        return Counts(
            positives=np.zeros((artifacts, BINS), np.int64), negatives=np.zeros((artifacts, BINS), np.int64)
        )

    @staticmethod
    def of(logits: np.ndarray, labels: np.ndarray) -> Counts:
        """Count patients: logits and labels of shape (P, A), labels nan where not assessed."""
        bins = to_bins(logits)
        counts = Counts.empty(labels.shape[1])
        for artifact in range(labels.shape[1]):
            np.add.at(counts.positives[artifact], bins[labels[:, artifact] == 1, artifact], 1)
            np.add.at(counts.negatives[artifact], bins[labels[:, artifact] == 0, artifact], 1)
        return counts

    def merge(self, other: Counts) -> Counts:
        return Counts(positives=self.positives + other.positives, negatives=self.negatives + other.negatives)

    @property
    def n_pos(self) -> np.ndarray:
        return self.positives.sum(axis=1)

    @property
    def n_neg(self) -> np.ndarray:
        return self.negatives.sum(axis=1)

    def auroc(self) -> np.ndarray:
        """P(score of a positive > score of a negative) + half of ties, shape (A,); nan without both
        classes.
        """
        return _auroc(self.positives, self.negatives)

    def auroc_variance(self) -> np.ndarray:
        """Variance of `auroc` by DeLong, DeLong & Clarke-Pearson (1988), shape (A,); nan with fewer than two
        of either class.

        Where every pair is ordered alike DeLong's variance is zero, which no finite sample justifies; there
        the Hanley & McNeil (1982) variance at the AUROC of half a pair less takes its place.
        """
        variance = np.full(len(self.positives), np.nan)
        for artifact, (pos, neg) in enumerate(zip(self.positives, self.negatives, strict=True)):
            m, n = int(pos.sum()), int(neg.sum())
            if m < 2 or n < 2:
                continue
            wins_of_pos = (np.cumsum(neg) - neg + 0.5 * neg) / n
            wins_of_neg = (m - np.cumsum(pos) + 0.5 * pos) / m
            theta = float((pos * wins_of_pos).sum() / m)
            s10 = float((pos * (wins_of_pos - theta) ** 2).sum() / (m - 1))
            s01 = float((neg * (wins_of_neg - theta) ** 2).sum() / (n - 1))
            variance[artifact] = s10 / m + s01 / n or hanley_mcneil(min(theta, 1 - 0.5 / (m * n)), m, n)
        return variance

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Score-type interval of each AUROC, shapes (A,), (A,); nan without both classes.

        Newcombe, Stat Med 25:559 (2006), method 5: all values whose Hanley-McNeil variance, with the mean
        class size in place of each, does not reject the observed one. It stays inside [0, 1] and is honest at
        an AUROC of 1.
        """
        z = NormalDist().inv_cdf(0.5 + level / 2)
        bounds = [
            _newcombe(float(theta), int(m), int(n), z)
            for theta, m, n in zip(self.auroc(), self.n_pos, self.n_neg, strict=True)
        ]
        return np.array([low for low, _ in bounds]), np.array([high for _, high in bounds])

    def roc(self, artifact: int) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rate over falling thresholds, each from 0 to 1, bins with no patient left
        out.
        """
        used = np.flatnonzero(self.positives[artifact] + self.negatives[artifact])[::-1]
        tpr = np.concatenate([[0], np.cumsum(self.positives[artifact][used]) / max(1, self.n_pos[artifact])])
        fpr = np.concatenate([[0], np.cumsum(self.negatives[artifact][used]) / max(1, self.n_neg[artifact])])
        return fpr, tpr

    def to_json(self) -> dict[str, object]:
        """Sparse, exact: artifact -> {positives: [[bin, n], ...], negatives: [...]}."""
        return {
            name: {
                "positives": [[int(b), int(row_p[b])] for b in np.flatnonzero(row_p)],
                "negatives": [[int(b), int(row_n[b])] for b in np.flatnonzero(row_n)],
            }
            for name, row_p, row_n in zip(NAMES, self.positives, self.negatives, strict=True)
        }

    @staticmethod
    def from_json(values: dict[str, dict[str, list[list[int]]]]) -> Counts:
        counts = Counts.empty()
        for artifact, name in enumerate(NAMES):
            for kind, rows in (("positives", counts.positives), ("negatives", counts.negatives)):
                for b, n in values[name][kind]:
                    rows[artifact, b] = n
        return counts


def hanley_mcneil(theta: float, m: float, n: float) -> float:
    """Variance of an AUROC from its value and class sizes alone (Hanley & McNeil, Radiology 143:29, 1982)."""
    q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
    return (theta * (1 - theta) + (m - 1) * (q1 - theta**2) + (n - 1) * (q2 - theta**2)) / (m * n)


def _newcombe(theta: float, m: int, n: int, z: float) -> tuple[float, float]:
    if m == 0 or n == 0:
        return np.nan, np.nan
    size = (m + n) / 2

    def excess(value: float) -> float:
        """(observed - value)^2 less the squared half-width that `value` itself implies."""
        return (theta - value) ** 2 - z**2 * hanley_mcneil(value, size, size) * (size * size) / (m * n)

    tiny = 1e-9
    low = _bisect(excess, 0.0, theta - tiny) if theta > tiny else 0.0
    high = _bisect(excess, theta + tiny, 1.0) if theta < 1 - tiny else 1.0
    return low, high


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Where `function` changes sign between `low` and `high`, to 1e-13. Ours because scipy.optimize takes 0.2
    CPU-s to import.
    """
    rises = function(high) > 0
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (low, middle) if (function(middle) > 0) == rises else (middle, high)
    return (low + high) / 2


def auroc_covariance(logits: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Covariance of the AUROCs of several models on the same patients.

    AUROC is a two-sample U-statistic, so each patient has an influence on each AUROC (DeLong's structural
    components); the covariance of two AUROCs, of whichever models and artifacts, is the sum over patients of
    the product of influences. Any linear contrast of scores at a site (a macro mean, a difference of arms)
    then has an analytic, paired variance.

    Args:
        logits: K arrays (P, A). labels: (P, A), nan where not assessed.
    Returns:
        (K*A, K*A), model-major; nan in rows and columns with fewer than two patients of either class. Where
        every pair of patients is ordered alike, the variance is that of `Counts.auroc_variance`, not zero;
        differences are then conservative.
    """
    patients, artifacts = labels.shape
    influence = np.full((patients, len(logits) * artifacts), np.nan)
    extra = np.zeros(len(logits) * artifacts)
    for k, scores in enumerate(logits):
        bins = to_bins(scores)
        for artifact in range(artifacts):
            pos, neg = labels[:, artifact] == 1, labels[:, artifact] == 0
            m, n = int(pos.sum()), int(neg.sum())
            if m < 2 or n < 2:
                continue
            p_hist = np.bincount(bins[pos, artifact], minlength=BINS)
            n_hist = np.bincount(bins[neg, artifact], minlength=BINS)
            wins_of_pos = (np.cumsum(n_hist) - 0.5 * n_hist) / n
            wins_of_neg = (m - np.cumsum(p_hist) + 0.5 * p_hist) / m
            column = np.zeros(patients)
            column[pos] = wins_of_pos[bins[pos, artifact]]
            column[neg] = wins_of_neg[bins[neg, artifact]]
            theta = column[pos].mean()
            column[pos] = (column[pos] - theta) / np.sqrt(m * (m - 1))
            column[neg] = (column[neg] - theta) / np.sqrt(n * (n - 1))
            influence[:, k * artifacts + artifact] = column
            if not column.any():
                extra[k * artifacts + artifact] = hanley_mcneil(1 - 0.5 / (m * n), m, n)
    return influence.T @ influence + np.diag(extra)
