"""Mergeable sums of an evaluation; every metric is computed from them once, where it is reported.

A site turns patient scores into histograms over public bins. Histograms of disjoint patients add up exactly,
in any order. AUROC from a histogram counts a tie inside a bin as one half, as the Mann-Whitney statistic
does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from common.artifacts import DEFAULT_LABELS, NAMES

SLICES_OF_A_SCORE = 3
"""A patient's score is the expected maximum of so many of the patient's slices (`patient_scores`)."""

QUANTILES = 40
"""Bins between the public quantiles 1/40 ... 39/40 of a model's scores, from which all others are made."""
EDGES = QUANTILES - 1
BINS = 480
"""Of an exact site: each of the `QUANTILES` bins in twelve, fine enough that ties are rare."""
DISCLOSED_BINS = 20
"""What a hospital may disclose is coarser: every second public quantile."""
NOISED_BINS = 8
"""What a hospital sends with noise: every fifth, since each bin gets noise of its own."""
LOGIT_LIMIT = 12.0
"""Where no edges are given, `BINS` equal bins lie between -12 and 12."""
CROWDED = 0.2
"""More than this share of a class in one bin: where the bins are coarse, little can be said."""

_A_QUANTILE = BINS // QUANTILES

PROBABILITY_EDGES = np.log(np.arange(1, QUANTILES) / np.arange(QUANTILES - 1, 0, -1)).astype(np.float32)
"""(EDGES,) logits of the probabilities 1/40 ... 39/40: the edges of a baseline, which sees no public patient
and whose scores are logits of fitted probabilities.
"""


def quantile_edges(scores: np.ndarray) -> np.ndarray:
    """The quantiles 1/40 ... 39/40 of the given scores.

    They are rounded to 2^-16 of their range, so that another machine, whose scores differ in the last bit,
    gets the same.

    Args:
        scores: (patients, A) of public images, nan where not assessed.
    Returns:
        float32 (A, EDGES), not decreasing; of an artifact that no patient was assessed for, or whose scores
        are all alike, those of equal bins between -12 and 12, around that score.
    """
    shares = np.arange(1, QUANTILES) / QUANTILES
    found = np.empty((scores.shape[1], EDGES), np.float32)
    for row, column in zip(found, scores.T, strict=True):
        known = column[np.isfinite(column)].astype(np.float64)
        edges = np.quantile(known, shares) if len(known) else np.zeros(EDGES)
        reach = float(edges[-1] - edges[0])
        if reach > 0:
            step = 2.0 ** (np.floor(np.log2(reach)) - 16)
            edges = np.rint(edges / step) * step
        row[:] = edges
        if not row[-1] > row[0]:
            row[:] = float(row[0]) + LOGIT_LIMIT * (2 * shares - 1)
    return found


def fine_edges(edges: np.ndarray) -> np.ndarray:
    """The edges of all `BINS` bins: twelve equal ones between neighbouring quantiles, and outside of the
    outer ones twelve that become wider, as scores of other hospitals may lie there.

    Args:
        edges: (A, EDGES) of `quantile_edges`.
    Returns:
        float64 (A, BINS - 1), not decreasing; the quantiles are among them, bit for bit.
    """
    quantiles = edges.astype(np.float64)
    places = np.arange(_A_QUANTILE) / _A_QUANTILE
    low, high = quantiles[:, :-1, None], quantiles[:, 1:, None]
    between = np.clip(low * (1 - places) + high * places, low, high)
    inner = np.concatenate([between.reshape(len(quantiles), -1), quantiles[:, -1:]], axis=1)
    steps = np.arange(1, _A_QUANTILE)
    reach = (quantiles[:, -1:] - quantiles[:, :1]) / QUANTILES * (steps * (steps + 1) / 2)
    return np.concatenate([quantiles[:, :1] - reach[:, ::-1], inner, quantiles[:, -1:] + reach], axis=1)


def to_bins(scores: np.ndarray, edges: np.ndarray | None = None, *, bins: int = BINS) -> np.ndarray:
    """The bin 0..bins-1 of each score, same shape, int64.

    Coarse bins are unions of fine ones, whose edges are public quantiles. A score equal to an edge lies above
    it; not-a-number counts as zero.

    Args:
        scores: (P, A).
        edges: (A, EDGES), not decreasing; without, the bins are equal ones between -12 and 12.
        bins: `BINS`, `DISCLOSED_BINS` or `NOISED_BINS`.
    """
    values = np.nan_to_num(np.asarray(scores, np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if edges is None:
        equal = np.clip(values, -LOGIT_LIMIT, LOGIT_LIMIT)
        equal = np.floor((equal + LOGIT_LIMIT) * (BINS / (2 * LOGIT_LIMIT)))
        found = np.minimum(equal, BINS - 1).astype(np.int64)
    else:
        found = np.empty(values.shape, np.int64)
        for artifact, row in enumerate(fine_edges(edges)):
            found[:, artifact] = np.searchsorted(row, values[:, artifact], side="right")
    return found // (BINS // bins)


def count_between(scores: np.ndarray, labels: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Patients with (first) and without an artifact in `NOISED_BINS` bins, int64 (2, A, NOISED_BINS).

    One patient, whatever the scores and labels, is counted at most once an artifact: adding or removing one
    changes the result by at most sqrt(A) in L2, whatever the edges.

    Args:
        scores, labels: (P, A) of `per_patient`: one row a patient; labels 1, 0 or nan.
        edges: (A, EDGES), not decreasing.
    """
    bins = to_bins(scores, edges, bins=NOISED_BINS)
    counts = np.zeros((2, labels.shape[1], NOISED_BINS), np.int64)
    for artifact in range(labels.shape[1]):
        for row, present in enumerate((1, 0)):
            np.add.at(counts[row, artifact], bins[labels[:, artifact] == present, artifact], 1)
    return counts


def noise_deviation(noise_multiplier: float, models: int, artifacts: int) -> float:
    """Standard deviation of the noise on each count of an evaluation: noise multiplier times sensitivity.

    The sensitivity of all counts together is sqrt(models * artifacts) (`count_between` for each model).

    Args:
        artifacts: outputs of the plan's models, `model.labels`.
    """
    return noise_multiplier * (models * artifacts) ** 0.5


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
    BINS). Coarse bins are counted in the middle of their place among the fine ones.
    """

    positives: np.ndarray
    negatives: np.ndarray
    bins: int = BINS  # in how many the patients were counted

    @staticmethod
    def empty(artifacts: int = len(DEFAULT_LABELS)) -> Counts:
        return Counts(
            positives=np.zeros((artifacts, BINS), np.int64), negatives=np.zeros((artifacts, BINS), np.int64)
        )

    @staticmethod
    def of(
        scores: np.ndarray, labels: np.ndarray, edges: np.ndarray | None = None, *, bins: int = BINS
    ) -> Counts:
        """Count patients.

        Args:
            scores, labels: (P, A), labels nan where not assessed.
            edges, bins: as `to_bins`.
        """
        width = BINS // bins
        places = to_bins(scores, edges, bins=bins) * width + width // 2
        counts = Counts.empty(labels.shape[1])
        for artifact in range(labels.shape[1]):
            np.add.at(counts.positives[artifact], places[labels[:, artifact] == 1, artifact], 1)
            np.add.at(counts.negatives[artifact], places[labels[:, artifact] == 0, artifact], 1)
        return Counts(positives=counts.positives, negatives=counts.negatives, bins=bins)

    def merge(self, other: Counts) -> Counts:
        return Counts(
            positives=self.positives + other.positives,
            negatives=self.negatives + other.negatives,
            bins=min(self.bins, other.bins),
        )

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
            variance[artifact] = s10 / m + s01 / n or _of_equal_pairs(theta, m, n)
        return variance

    def interval(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Score-type interval of each AUROC, shapes (A,), (A,); nan without both classes.

        Newcombe, Stat Med 25:559 (2006), method 5: all values whose Hanley-McNeil variance, with the mean
        class size in place of each, does not reject the observed one. It stays inside [0, 1] and is honest at
        an AUROC of 1. Coarse bins widen it by their `bias`.
        """
        z = NormalDist().inv_cdf(0.5 + level / 2)
        bounds = [
            _newcombe(float(theta), int(m), int(n), z)
            for theta, m, n in zip(self.auroc(), self.n_pos, self.n_neg, strict=True)
        ]
        low, high = np.array(bounds).T
        return widened(low, high, self.bias())

    def bias(self) -> np.ndarray:
        """What is to be added to each `auroc` for the patients who share a coarse bin (`coarse_bias`), (A,);
        0 with fine ones, nan without both classes.
        """
        if self.bins == BINS:
            return np.where(self.n_pos * self.n_neg > 0, 0.0, np.nan)
        rows = zip(self._coarse(self.positives), self._coarse(self.negatives), strict=True)
        return np.array([coarse_bias(pos, neg) for pos, neg in rows])

    def crowded(self) -> np.ndarray:
        """Whether more than `CROWDED` of a class are in one coarse bin, bool (A,)."""
        if self.bins == BINS:
            return np.zeros(len(self.positives), bool)
        return crowded(self._coarse(self.positives), self._coarse(self.negatives))

    def _coarse(self, histogram: np.ndarray) -> np.ndarray:
        return histogram.reshape(len(histogram), self.bins, -1).sum(axis=2)

    def roc(self, artifact: int) -> tuple[np.ndarray, np.ndarray]:
        """False and true positive rate over falling thresholds, each from 0 to 1, bins with no patient left
        out.
        """
        used = np.flatnonzero(self.positives[artifact] + self.negatives[artifact])[::-1]
        tpr = np.concatenate([[0], np.cumsum(self.positives[artifact][used]) / max(1, self.n_pos[artifact])])
        fpr = np.concatenate([[0], np.cumsum(self.negatives[artifact][used]) / max(1, self.n_neg[artifact])])
        return fpr, tpr

    def to_json(self, names: Sequence[str] = DEFAULT_LABELS) -> dict[str, object]:
        """Sparse, exact: artifact, `names` in turn -> {positives: [[bin, n], ...], negatives: [...]}."""
        return {
            name: {
                "positives": [[int(b), int(row_p[b])] for b in np.flatnonzero(row_p)],
                "negatives": [[int(b), int(row_n[b])] for b in np.flatnonzero(row_n)],
            }
            for name, row_p, row_n in zip(names, self.positives, self.negatives, strict=True)
        }

    @staticmethod
    def from_json(
        values: Mapping[str, dict[str, list[list[int]]]], vocabulary: Sequence[str] = NAMES
    ) -> Counts:
        """From what `to_json` gave, rows in the order of the vocabulary."""
        names = [name for name in vocabulary if name in values]
        counts = Counts.empty(len(names))
        for artifact, name in enumerate(names):
            for kind, rows in (("positives", counts.positives), ("negatives", counts.negatives)):
                for b, n in values[name][kind]:
                    rows[artifact, b] = n
        return counts


def widened(low: np.ndarray, high: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An interval that holds what coarse bins hide: longer by `bias` on its side, within 0..1."""
    return np.maximum(low + np.minimum(bias, 0), 0), np.minimum(high + np.maximum(bias, 0), 1)


def crowded(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Whether more than `CROWDED` of a class are in one bin, bool (A,), from histograms (A, bins)."""
    fullest = [
        np.divide(rows.max(axis=1), total, out=np.zeros(len(rows)), where=total > 0)
        for rows in (positives, negatives)
        for total in [rows.sum(axis=1)]
    ]
    return np.maximum(*fullest) > CROWDED


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


def auroc_covariance(
    scores: Sequence[np.ndarray],
    labels: np.ndarray,
    edges: Sequence[np.ndarray] | np.ndarray | None = None,
    *,
    bins: int = BINS,
) -> np.ndarray:
    """Covariance of the AUROCs of several models on the same patients.

    AUROC is a two-sample U-statistic, so each patient has an influence on each AUROC (DeLong's structural
    components); the covariance of two AUROCs, of whichever models and artifacts, is the sum over patients of
    the product of influences. Any linear contrast of scores at a site (a macro mean, a difference of arms)
    then has an analytic, paired variance.

    Args:
        scores: K arrays (P, A). labels: (P, A), nan where not assessed.
        edges, bins: of each model, as `to_bins`.
    Returns:
        (K*A, K*A), model-major; nan in rows and columns with fewer than two patients of either class. Where
        every pair of patients is ordered alike, the variance is that of `Counts.auroc_variance`, not zero;
        differences are then conservative.
    """
    patients, artifacts = labels.shape
    influence = np.full((patients, len(scores) * artifacts), np.nan)
    extra = np.zeros(len(scores) * artifacts)
    for k, of_model in enumerate(scores):
        places = to_bins(of_model, None if edges is None else edges[k], bins=bins)
        for artifact in range(artifacts):
            pos, neg = labels[:, artifact] == 1, labels[:, artifact] == 0
            m, n = int(pos.sum()), int(neg.sum())
            if m < 2 or n < 2:
                continue
            p_hist = np.bincount(places[pos, artifact], minlength=bins)
            n_hist = np.bincount(places[neg, artifact], minlength=bins)
            wins_of_pos = (np.cumsum(n_hist) - 0.5 * n_hist) / n
            wins_of_neg = (m - np.cumsum(p_hist) + 0.5 * p_hist) / m
            column = np.zeros(patients)
            column[pos] = wins_of_pos[places[pos, artifact]]
            column[neg] = wins_of_neg[places[neg, artifact]]
            theta = column[pos].mean()
            column[pos] = (column[pos] - theta) / np.sqrt(m * (m - 1))
            column[neg] = (column[neg] - theta) / np.sqrt(n * (n - 1))
            influence[:, k * artifacts + artifact] = column
            if not column.any():
                extra[k * artifacts + artifact] = _of_equal_pairs(float(theta), m, n)
    return influence.T @ influence + np.diag(extra)


def _of_equal_pairs(theta: float, m: int, n: int) -> float:
    """The variance where DeLong's is zero, because every pair is ordered alike or ties."""
    return hanley_mcneil(min(max(theta, 1 - theta), 1 - 0.5 / (m * n)), m, n)


def coarse_bias(positives: np.ndarray, negatives: np.ndarray) -> float:
    """The AUROC that scores have, less the one that few bins show.

    Patients in one bin tie, which draws an AUROC towards one half: little where the bins hold equally many,
    much where most patients fall into an outer one. Computed for two normal classes of equal variance on some
    rising scale of the scores (the binormal model of Dorfman & Alf, J Math Psychol 6:487, 1969), which fill
    the bins together as these patients do. benchmarks/coarse_bins.py tables it.

    Args:
        positives, negatives: (bins,) of one artifact, with noise at times.
    Returns:
        not below zero where the shown AUROC is above one half, else not above; nan without both classes.
    """
    m, n = float(positives.sum()), float(negatives.sum())
    if m <= 0 or n <= 0:
        return np.nan
    shown = float(np.clip(_auroc(positives[None], negatives[None])[0], 0, 1))
    above = np.cumsum((positives + negatives)[::-1])[:-1] / (m + n)
    above = np.maximum.accumulate(np.clip(above, 0, 1))
    theta = min(max(shown, 1e-6), 1 - 1e-6)
    for _ in range(20):
        before, theta = theta, shown + theta - _shown(theta, above, m / (m + n))
        theta = min(max(theta, 1e-6), 1 - 1e-6)
        if abs(theta - before) < 1e-6:
            break
    return max(theta - shown, 0.0) if shown >= 0.5 else min(theta - shown, 0.0)


_CUTS = np.linspace(-9, 9, 721)


def _shown(theta: float, above: np.ndarray, prevalence: float) -> float:
    """What bins show of an AUROC where the shares `above` of both classes together, rising, lie over their
    edges.
    """
    from scipy.special import ndtr

    half = NormalDist().inv_cdf(theta) / 2**0.5
    tpr, fpr = ndtr(half - _CUTS), ndtr(-half - _CUTS)
    both = prevalence * tpr + (1 - prevalence) * fpr  # falls with the cut
    shares = [
        np.diff([0.0, *np.interp(above, both[::-1], rate[::-1]), 1.0])[::-1][None] for rate in (tpr, fpr)
    ]
    return float(_auroc(shares[0], shares[1])[0])
