"""AUROCs by subgroup of patients, and differences between levels, from the counts of sites.

Sites that are scored exactly count their patients once more in each level of `common.subgroups`, in 20 bins.
A row is of one site, or of several where that is named: counts of one shared model in the same bins add up.
Patients of two levels are others, so their AUROCs are independent; those of two severities share the patients
without the artifact, and their covariance is that of DeLong's components of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.counts import BINS, DISCLOSED_BINS, Counts, hanley_mcneil
from common.subgroups import LEVELS, PLACE, SEVERITY, pairs
from server.evaluation.inference import Z, holm, two_sided

FEW = 20
"""Patients of a class below which the variance that follows from them alone is not believed."""
Places = Mapping[str, Sequence[tuple[str, str]]]
"""Name -> the sites, each with its model, whose counts are one row."""


def subgroup_rows(
    places: Places, sums: Mapping[str, Mapping[str, np.ndarray]], artifacts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row each place, artifact and level with patients: numbers, AUROC, interval; else the `reason`."""
    rows: list[dict[str, Any]] = []
    for place, cells in places.items():
        counts = _together(cells, sums)
        auroc, (low, high) = counts.auroc(), counts.interval()
        for number, (artifact, (subgroup, level)) in enumerate((a, b) for a in artifacts for b in LEVELS):
            n_pos, n_neg = int(counts.n_pos[number]), int(counts.n_neg[number])
            if not n_pos + n_neg or (subgroup == SEVERITY and not n_pos):
                continue
            row: dict[str, Any] = {"place": place, "sites": [site for site, _ in cells], "artifact": artifact}
            row |= {"subgroup": subgroup, "level": level, "n_pos": n_pos, "n_neg": n_neg}
            is_few = min(n_pos, n_neg) < 2
            value = {"auroc": auroc[number], "low": low[number], "high": high[number]}
            row |= {name: math.nan if is_few else float(one) for name, one in value.items()}
            reason = {"reason": "one_patient" if n_pos and n_neg else "one_class"} if is_few else {}
            rows.append(row | reason)
    return rows


def subgroup_differences(
    places: Places, sums: Mapping[str, Mapping[str, np.ndarray]], artifacts: Sequence[str]
) -> list[dict[str, Any]]:
    """Every pair of levels of a subgroup that can both be estimated: `level` less `other`, with Holm's
    correction over all of the given places.
    """
    rows: list[dict[str, Any]] = []
    for place, cells in places.items():
        counts = _together(cells, sums)
        auroc, variance, bias = counts.auroc(), _variance(counts), counts.bias()
        for number, artifact in enumerate(artifacts):
            for subgroup, level, other in pairs():
                one, two = (number * len(LEVELS) + PLACE[subgroup, name] for name in (level, other))
                if not np.isfinite([variance[one], variance[two]]).all():
                    continue
                shared = _shared(counts, one, two) if subgroup == SEVERITY else 0.0
                spread = variance[one] + variance[two] - 2 * shared + (bias[one] - bias[two]) ** 2
                value, error = float(auroc[one] - auroc[two]), math.sqrt(max(float(spread), 0.0))
                row: dict[str, Any] = {
                    "place": place,
                    "artifact": artifact,
                    "subgroup": subgroup,
                    "level": level,
                }
                row |= {"other": other, "value": value, "low": value - Z * error, "high": value + Z * error}
                rows.append(row | {"p": two_sided(value, error)})
    adjusted = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def _together(cells: Sequence[tuple[str, str]], sums: Mapping[str, Mapping[str, np.ndarray]]) -> Counts:
    """Rows artifact by artifact, level by level."""
    total = np.sum([sums[site][model] for site, model in cells], axis=0, dtype=np.int64)
    coarse = total.reshape(2, -1, DISCLOSED_BINS)
    width = BINS // DISCLOSED_BINS
    fine = np.zeros((*coarse.shape[:2], BINS), np.int64)
    fine[..., width // 2 :: width] = coarse
    return Counts(positives=fine[0], negatives=fine[1], bins=DISCLOSED_BINS)


def _variance(counts: Counts) -> np.ndarray:
    """DeLong's, of few patients at least Hanley and McNeil's at an AUROC half a pair inside."""
    found = counts.auroc_variance()
    for number, (theta, m, n) in enumerate(zip(counts.auroc(), counts.n_pos, counts.n_neg, strict=True)):
        if np.isfinite(found[number]) and min(m, n) < FEW:
            half = 0.5 / (m * n)
            inside = float(np.clip(theta, half, 1 - half))
            found[number] = max(found[number], hanley_mcneil(inside, float(m), float(n)))
    return found


def _shared(counts: Counts, one: int, two: int) -> float:
    """The covariance of two AUROCs with the same negatives."""
    negatives = counts.negatives[one]
    n = int(negatives.sum())
    wins = []
    for positives in (counts.positives[one], counts.positives[two]):
        m = positives.sum()
        wins.append((m - np.cumsum(positives) + 0.5 * positives) / m)
    mean = [float((negatives * won).sum()) / n for won in wins]
    return float((negatives * (wins[0] - mean[0]) * (wins[1] - mean[1])).sum()) / (n - 1) / n
