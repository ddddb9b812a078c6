"""What a model does at an operating point, and how far its probabilities hold, from the counts of sites.

The operating point and the calibration of a model are found on the coordinator's public patients
(`common.operating_point`), never on those of the site that is scored. A site's counts have thresholds at the
edges of its bins alone: an exact site has 479, one that discloses 20 bins has 19, one that sends noise has 7.
So the point is chosen among the edges of the site's own bins, and at it true and false positives are exact.
What needs a score within a bin (average precision, Brier, calibration) takes the bin's middle.

A probability is 1 / (1 + exp(-(slope * score + offset))) with Platt's two parameters, as `fedqc predict`
prints. Calibration at a site is of its logit z: the slope of the logistic regression of the label on z, and
the intercept where that slope is held at 1 (calibration in the large; Van Calster et al., BMC Medicine
17:230, 2019). Net benefit: Vickers and Elkin, Medical Decision Making 26:565, 2006.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.counts import BINS, LOGIT_LIMIT, NOISED_BINS, Counts, crowded, fine_edges
from common.operating_point import logistic_fit, platt, youden
from server.evaluation.inference import Z
from server.evaluation.noised import NoisedCounts

LEAST_PUBLIC = 5
"""With and without an artifact each: fewer public patients choose no threshold."""
LEAST_PATIENTS = 10
"""Likewise of a site: fewer say nothing about calibration."""
STATED_PREVALENCES = (0.01, 0.05, 0.2)
GROUPS = 10
"""Groups of a reliability plot, of about equal size and at least `LEAST_PATIENTS` patients each."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A proportion of counted patients with Wilson's 95 % interval (JASA 22:209, 1927); of noised counts with
    the interval of a ratio of noised sums."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where an artifact is called present, found on public patients."""

    place: int  # present from this fine bin on
    threshold: float  # its lower edge, a logit; -inf: everybody is called positive
    sensitivity: float  # on the public patients
    specificity: float
    positives: int
    negatives: int
    slope: float  # of the probability; 0: there is none
    offset: float
    middles: np.ndarray  # (BINS,), the score that stands for each fine bin

    def logits(self) -> np.ndarray:
        """The logit of the probability of each fine bin, (BINS,)."""
        return np.clip(self.slope * self.middles + self.offset, -500, 500)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Patients of similar probability: how many there are, the mean probability, and the share with."""

    n: int
    predicted: float
    observed: Share


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far probabilities hold at a site."""

    slope: Share  # 1 where they hold
    intercept: float  # 0 where they hold on average
    ece: float  # over `groups`
    brier: float
    brier_prevalence: float  # of giving everybody the site's prevalence
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Performance:
    """One artifact of one model at one site. What the counts do not allow is None; `reason` says why."""

    n: int
    positives: int
    average_precision: float | None
    point: Point | None
    tp: int | None = None
    fn: int | None = None
    fp: int | None = None
    tn: int | None = None
    sensitivity: Share | None = None
    specificity: Share | None = None
    calibration: Calibration | None = None
    is_coarse: bool = False
    is_crowded: bool = False
    reason: str = ""  # n0, one_class, no_point, noise

    @property
    def prevalence(self) -> float | None:
        return self.positives / self.n if self.n else None

    @property
    def accuracy(self) -> float | None:
        return None if self.tp is None or self.tn is None else (self.tp + self.tn) / self.n

    @property
    def balanced_accuracy(self) -> float | None:
        if self.sensitivity is None or self.specificity is None:
            return None
        return (self.sensitivity.value + self.specificity.value) / 2

    @property
    def precision(self) -> Share | None:
        """The positive predictive value at this site's prevalence; None without an alarm, or positives."""
        if self.tp is None or self.fp is None or not self.positives or not self.tp + self.fp:
            return None
        return wilson(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float | None:
        if self.tp is None or self.fp is None or self.fn is None:
            return None
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if self.positives else None

    @property
    def alarms(self) -> float | None:
        """Per 100 scans of this site."""
        return None if self.tp is None or self.fp is None else 100 * (self.tp + self.fp) / self.n

    def at(self, prevalence: float) -> tuple[float | None, float] | None:
        """Positive predictive value, and alarms per 100 scans, at another prevalence; None without an
        operating point, the first None without an alarm.
        """
        if self.sensitivity is None or self.specificity is None:
            return None
        found = prevalence * self.sensitivity.value
        alarms = found + (1 - prevalence) * (1 - self.specificity.value)
        return (found / alarms if alarms > 0 else None), 100 * alarms

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, of `fedqc report --format json`."""
        point = None
        if self.point is not None:
            point = {
                key: value for key, value in asdict(self.point).items() if key not in ("middles", "place")
            }
            point["threshold"] = None if self.point.place == 0 else self.point.threshold
        stated = {
            f"{prevalence:g}": {"precision": found[0], "alarms_per_100": found[1]}
            for prevalence in STATED_PREVALENCES
            if (found := self.at(prevalence)) is not None
        }
        counted = ("n", "positives", "tp", "fn", "fp", "tn", "average_precision", "reason")
        computed = ("prevalence", "accuracy", "balanced_accuracy", "f1")
        return {
            **{name: getattr(self, name) for name in (*counted, *computed)},
            **{
                name: None if (share := getattr(self, name)) is None else asdict(share)
                for name in ("sensitivity", "specificity", "precision")
            },
            "alarms_per_100": self.alarms,
            "at_prevalence": stated,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "point": point,
            "coarse": self.is_coarse,
            "crowded": self.is_crowded,
        }


def wilson(count: int, of: int) -> Share:
    """A share of counted patients with its interval. Ours because scipy's binomtest computes a p value with
    it, which takes most of a CPU-ms a share.

    Args:
        of: above 0.
    """
    share, z2 = count / of, Z**2 / of
    middle = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * float(np.sqrt(share * (1 - share) / of + z2 / (4 * of)))
    return Share(
        value=share, low=min(share, max(0.0, middle - half)), high=max(share, min(1.0, middle + half))
    )


def middles_of(edges: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The lower edges of the fine bins, (BINS,), the first -inf, and the score that stands for each, (BINS,).

    Args:
        edges: (EDGES,) of one artifact; None: equal bins between -12 and 12.
    """
    inner = (
        np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, BINS + 1)[1:-1]
        if edges is None
        else fine_edges(edges[None])[0]
    )
    outer = [inner[:1] - (inner[1] - inner[0]), inner, inner[-1:] + (inner[-1] - inner[-2])]
    ends = np.concatenate(outer)
    return np.concatenate([[-np.inf], inner]), (ends[1:] + ends[:-1]) / 2


def point_of(public: Counts, artifact: int, edges: np.ndarray | None, bins: int = BINS) -> Point | None:
    """The operating point of one artifact among the edges of a site's bins.

    Args:
        public: fine counts of the public patients.
        edges: (EDGES,) of this artifact, or None.
        bins: of the site.
    Returns:
        None with fewer than `LEAST_PUBLIC` public patients of either class.
    """
    pos, neg = public.positives[artifact], public.negatives[artifact]
    n_pos, n_neg = int(pos.sum()), int(neg.sum())
    if min(n_pos, n_neg) < LEAST_PUBLIC:
        return None
    sensitivity = np.cumsum(pos[::-1])[::-1] / n_pos
    specificity = (np.cumsum(neg) - neg) / n_neg
    candidates = np.arange(bins) * (BINS // bins)
    place = int(candidates[youden(sensitivity[candidates], specificity[candidates])])
    lower, middles = middles_of(edges)
    present = np.repeat([True, False], [n_pos, n_neg])
    slope, offset = platt(np.concatenate([np.repeat(middles, pos), np.repeat(middles, neg)]), present)
    return Point(
        place=place,
        threshold=float(lower[place]),
        sensitivity=float(sensitivity[place]),
        specificity=float(specificity[place]),
        positives=n_pos,
        negatives=n_neg,
        slope=slope,
        offset=offset,
        middles=middles,
    )


def performance(counts: Counts, artifact: int, point: Point | None) -> Performance:
    """What exact counts say at an operating point, which is an edge of their bins."""
    pos, neg = counts.positives[artifact], counts.negatives[artifact]
    n_pos, n_neg = int(pos.sum()), int(neg.sum())
    coarse = counts.bins < BINS
    width = BINS // counts.bins
    full = coarse and bool(
        crowded(*(row.reshape(1, counts.bins, width).sum(axis=2) for row in (pos, neg)))[0]
    )
    basis: dict[str, Any] = {"n": n_pos + n_neg, "positives": n_pos, "is_coarse": coarse, "is_crowded": full}
    basis["average_precision"] = average_precision(pos, neg)
    if not n_pos + n_neg:
        return Performance(**basis, point=None, reason="n0")
    if point is None:
        return Performance(**basis, point=None, reason="no_point")
    tp, fp = int(pos[point.place :].sum()), int(neg[point.place :].sum())
    return Performance(
        **basis,
        point=point,
        tp=tp,
        fn=n_pos - tp,
        fp=fp,
        tn=n_neg - fp,
        sensitivity=wilson(tp, n_pos) if n_pos else None,
        specificity=wilson(n_neg - fp, n_neg) if n_neg else None,
        calibration=calibration([Scored.of(pos, neg, point)]),
        reason="" if n_pos and n_neg else "one_class",
    )


def noised_performance(counts: NoisedCounts, artifact: int, point: Point | None) -> Performance:
    """What noised counts say: sensitivity and specificity where a class can be told from none, else nothing.
    Numbers of patients are estimates.
    """
    sensitivity = specificity = None
    if point is not None:
        sensitivity = _noised_share(counts.positives[artifact], point, counts.deviation, below=False)
        specificity = _noised_share(counts.negatives[artifact], point, counts.deviation, below=True)
    n_pos, n_neg = int(counts.n_pos[artifact]), int(counts.n_neg[artifact])
    hidden = sensitivity is None or specificity is None
    reason = "no_point" if point is None else "noise" if hidden else ""
    return Performance(
        n=n_pos + n_neg,
        positives=n_pos,
        average_precision=None,
        point=point,
        is_coarse=True,
        is_crowded=bool(counts.crowded()[artifact]),
        reason=reason,
        sensitivity=sensitivity,
        specificity=specificity,
    )


def _noised_share(row: np.ndarray, point: Point, deviation: float, *, below: bool) -> Share | None:
    """The share of a class above (or below) the operating point: a ratio of noised sums, by the delta
    method.
    """
    bins, total = len(row), float(row.sum())
    if total < max(Z * deviation * np.sqrt(bins), 1.0):
        return None
    first = point.place // (BINS // NOISED_BINS)
    counted, used = (row[:first], first) if below else (row[first:], bins - first)
    share = float(np.clip(counted.sum() / total, 0, 1))
    noise = deviation**2 * (used * (1 - share) ** 2 + (bins - used) * share**2) / total**2
    inside = min(max(share, 0.5 / total), 1 - 0.5 / total)
    half = Z * float(np.sqrt(noise + inside * (1 - inside) / total))
    return Share(value=share, low=max(0.0, share - half), high=min(1.0, share + half))


def average_precision(positives: np.ndarray, negatives: np.ndarray) -> float | None:
    """The sum over falling thresholds of precision times the gain of recall, ties together; None without
    positives.
    """
    total = int(positives.sum())
    if not total:
        return None
    pos, neg = positives[::-1], negatives[::-1]
    found, called = np.cumsum(pos), np.cumsum(pos + neg)
    return float((pos * found / np.maximum(called, 1)).sum() / total)


# probabilities


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Patients by the logit of their probability: (k,) logits, and how many have the artifact or not."""

    logits: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray

    @staticmethod
    def of(positives: np.ndarray, negatives: np.ndarray, point: Point) -> Scored:
        """From fine histograms (BINS,); nobody where the model has no probability."""
        used = np.flatnonzero(positives + negatives) if point.slope > 0 else np.zeros(0, int)
        return Scored(logits=point.logits()[used], positives=positives[used], negatives=negatives[used])

    @staticmethod
    def together(parts: Sequence[Scored]) -> Scored:
        """All of them, by rising probability."""
        logits = np.concatenate([part.logits for part in parts] or [np.zeros(0)])
        order = np.argsort(logits, kind="stable")
        pos, neg = (
            np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0, int)])[order]
            for name in ("positives", "negatives")
        )
        return Scored(logits=logits[order], positives=pos, negatives=neg)

    @cached_property
    def probabilities(self) -> np.ndarray:
        return 1 / (1 + np.exp(-self.logits))

    @property
    def n(self) -> int:
        return int(self.positives.sum() + self.negatives.sum())


def calibration(parts: Sequence[Scored]) -> Calibration | None:
    """How far the probabilities of patients hold; None with fewer than `LEAST_PATIENTS` of either class, or
    where the classes are separated, so that no slope exists.
    """
    scored = Scored.together(parts)
    n_pos, n_neg = int(scored.positives.sum()), int(scored.negatives.sum())
    if min(n_pos, n_neg) < LEAST_PATIENTS:
        return None
    with_, without = np.flatnonzero(scored.positives), np.flatnonzero(scored.negatives)
    if with_[0] >= without[-1] or with_[-1] <= without[0]:
        return None
    z, p, each = scored.logits, scored.probabilities, scored.positives + scored.negatives
    share = scored.positives / each
    slope, offset = logistic_fit(z, share, weights=each)
    error = _slope_error(z, each, slope * z + offset)
    groups = reliability(scored)
    squares = (scored.positives * (1 - p) ** 2 + scored.negatives * p**2).sum()
    prevalence = n_pos / scored.n
    return Calibration(
        slope=Share(value=slope, low=slope - Z * error, high=slope + Z * error),
        intercept=_in_the_large(z, scored.positives.sum(), each),
        ece=sum(group.n * abs(group.observed.value - group.predicted) for group in groups) / scored.n,
        brier=float(squares / scored.n),
        brier_prevalence=prevalence * (1 - prevalence),
        groups=groups,
    )


def _slope_error(z: np.ndarray, each: np.ndarray, fitted: np.ndarray) -> float:
    """The standard error of a slope, from the information at the fit."""
    p = 1 / (1 + np.exp(-np.clip(fitted, -500, 500)))
    weight = each * p * (1 - p)
    mean = float(weight @ z / weight.sum()) if weight.sum() > 0 else 0.0
    information = float(weight @ (z - mean) ** 2)
    return information**-0.5 if information > 0 else np.inf


def _in_the_large(z: np.ndarray, positives: int, each: np.ndarray) -> float:
    """The shift of all logits that makes the expected number of positives the counted one, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        expected = float(each @ (1 / (1 + np.exp(-np.clip(z + middle, -500, 500)))))
        low, high = (middle, high) if expected < positives else (low, middle)
    return (low + high) / 2


def reliability(scored: Scored) -> tuple[Group, ...]:
    """Patients in up to `GROUPS` groups of rising probability and about equal size; patients of one bin stay
    together. Fewer than two groups' worth of patients give one.
    """
    each = scored.positives + scored.negatives
    wanted = max(1, min(GROUPS, scored.n // LEAST_PATIENTS))
    reached = np.cumsum(each) - each / 2
    owner = np.minimum((reached * wanted / max(scored.n, 1)).astype(int), wanted - 1)
    found = []
    for group in np.unique(owner):
        rows = owner == group
        n, pos = int(each[rows].sum()), int(scored.positives[rows].sum())
        predicted = float(each[rows] @ scored.probabilities[rows] / n)
        found.append(Group(n=n, predicted=predicted, observed=wilson(pos, n)))
    return tuple(found)


def decision_curve(parts: Sequence[Scored], thresholds: np.ndarray) -> np.ndarray:
    """Net benefit a patient of acting on a probability at or above each threshold, same shape; nan without
    patients.

    Args:
        thresholds: probabilities, inside 0..1, rising: what an alarm must be worth.
    """
    scored = Scored.together(parts)
    if not scored.n:
        return np.full(thresholds.shape, np.nan)
    first = np.searchsorted(scored.probabilities, thresholds, side="left")
    tp, fp = (
        np.concatenate([np.cumsum(row[::-1])[::-1], [0]])[first]
        for row in (scored.positives, scored.negatives)
    )
    return (tp - fp * thresholds / (1 - thresholds)) / scored.n


def net_benefit_of_all(prevalence: float, thresholds: np.ndarray) -> np.ndarray:
    """Net benefit of calling everybody positive."""
    return prevalence - (1 - prevalence) * thresholds / (1 - thresholds)
