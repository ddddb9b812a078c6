"""Combine the answers of several readers, and measure how far they agree.

Answers are arrays of shape (readers, items, artifacts): 1 present, 0 absent, nan not assessed. A reader is
first-level or of the panel.

| rule | an item is settled where |
|---|---|
| `agree` | all who assessed it say the same, and they are at least two |
| `majority` | more than half of those who assessed it say the same, and they are at least two |
| `unanimous` | every reader assessed it, and all say the same |
| `panel` | the panel answered; elsewhere as `agree` |

Under every rule the panel decides what the first level left open, by more than half of its answers. "Every
reader", and the need for two, count the readers who assessed this artifact anywhere: who reads only CT is not
missed in MR, and where one person read, that person's word stands. What is open is *disputed* (readers
differ) or *incomplete* (too few read it); both are not assessed until somebody decides.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.errors import DataError

Rule = Literal["agree", "majority", "unanimous", "panel"]
DRAWS = 2000
_DRAWS_AT_ONCE = 64  # bounds memory: draws × patients


@dataclass(frozen=True, kw_only=True)
class Consensus:
    """Each of shape (items, artifacts)."""

    present: np.ndarray  # float32: 1, 0, or nan = not assessed or not settled
    severity: np.ndarray  # float32: median of those who said present, nan where nobody gave one
    disputed: np.ndarray  # bool: readers differ and nobody has decided
    incomplete: np.ndarray  # bool: too few read it
    by_panel: np.ndarray  # bool: the panel's answer


@dataclass(frozen=True, kw_only=True)
class Kappa:
    """Chance-corrected agreement. `value` is nan where it is undefined: nothing read together, or everybody
    always says the same.
    """

    value: float
    low: float  # 95 %, bootstrap over patients; nan with fewer than two
    high: float
    standard_error: float  # large-sample, takes items for independent; Cohen's only, nan for Fleiss'
    observed: float  # share of (pairs of) answers that agree
    n: int  # items
    patients: int

    def public(self) -> dict[str, Any]:
        names = {
            "kappa": "value",
            "low": "low",
            "high": "high",
            "standard_error": "standard_error",
            "observed": "observed",
        }
        numbers = {name: getattr(self, at) for name, at in names.items()}
        return {name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()} | {
            "n": self.n,
            "patients": self.patients,
        }


def settle(answers: np.ndarray, severities: np.ndarray, is_panel: np.ndarray, rule: Rule) -> Consensus:
    """The labels that the readers' answers amount to.

    Args:
        answers, severities: float, shape (readers, items, artifacts), nan where not given.
        is_panel: bool (readers,).
    """
    first, panel = answers[~is_panel], answers[is_panel]
    ones, zeros = (first == 1).sum(0), (first == 0).sum(0)
    assessed = ones + zeros
    team = (~np.isnan(first)).any(1).sum(0)  # per artifact
    enough = assessed >= (team if rule == "unanimous" else np.minimum(team, 2))
    ahead = (2 * ones > assessed) | (2 * zeros > assessed)
    same = (ones == 0) | (zeros == 0)
    settled = (assessed > 0) & enough & (ahead if rule == "majority" else same)
    present = np.where(settled, (ones > zeros).astype(np.float32), np.float32(np.nan))
    panel_ones, panel_zeros = (panel == 1).sum(0), (panel == 0).sum(0)
    by_panel = (panel_ones != panel_zeros) & (~settled | (rule == "panel"))
    present = np.where(by_panel, (panel_ones > panel_zeros).astype(np.float32), present)
    is_open = np.isnan(present) & (assessed + panel_ones + panel_zeros > 0)
    disputed = is_open & (~same | (panel_ones > 0) & (panel_zeros > 0))
    said = np.where(answers == 1, severities, np.nan)
    by_first, of_panel = _median(said[~is_panel]), _median(said[is_panel])
    severity = np.where(by_panel & ~np.isnan(of_panel), of_panel, by_first)
    return Consensus(
        present=present.astype(np.float32),
        severity=np.where(present == 1, severity, np.nan).astype(np.float32),
        disputed=disputed,
        incomplete=is_open & ~disputed,
        by_panel=by_panel,
    )


def cohen_kappa(
    first: np.ndarray, second: np.ndarray, patients: np.ndarray, *, seed: int, draws: int = DRAWS
) -> Kappa:
    """Agreement of two readers on items that both assessed.

    Args:
        first, second: 1, 0 or nan, shape (items,); items that one of them did not assess are left out.
        patients: int (items,). The interval resamples patients, because the slices of one patient are alike.
        seed, draws: of the bootstrap.
    Reference: Cohen, Educ Psychol Meas 20 (1960) 37; standard error: Fleiss, Cohen and Everitt, Psychol Bull
        72 (1969) 323.
    """
    both = ~np.isnan(first) & ~np.isnan(second)
    cell = (2 * first[both] + second[both]).astype(np.int64)  # 00, 01, 10, 11
    sums = _per_patient(np.eye(4)[cell], patients[both])
    value, observed = _cohen(sums.sum(0))
    low, high = _interval(lambda drawn: _cohen(drawn)[0], sums, seed=seed, draws=draws)
    return Kappa(
        value=float(value),
        low=low,
        high=high,
        standard_error=_cohen_standard_error(sums.sum(0)),
        observed=float(observed),
        n=len(cell),
        patients=len(sums),
    )


def fleiss_kappa(counts: np.ndarray, patients: np.ndarray, *, seed: int, draws: int = DRAWS) -> Kappa:
    """Agreement of three or more readers on items that as many assessed.

    Args:
        counts: how many readers put the item into the category, shape (items, categories); every row has the
            same sum, at least two.
        patients, seed, draws: as in `cohen_kappa`.
    Raises:
        DataError: rows of different sums.
    Reference: Fleiss, Psychol Bull 76 (1971) 378.
    """
    raters = counts.sum(1)
    if len(counts) and (raters.min() != raters.max() or raters.min() < 2):
        raise DataError("Fleiss' kappa needs the same number of readers, at least two, for every item")
    count = float(raters[0]) if len(counts) else 2.0
    pairs = (counts * (counts - 1)).sum(1) / (count * (count - 1))
    sums = _per_patient(np.column_stack([np.ones(len(counts)), pairs, counts]), patients)
    value, observed = _fleiss(sums.sum(0))
    low, high = _interval(lambda drawn: _fleiss(drawn)[0], sums, seed=seed, draws=draws)
    return Kappa(
        value=float(value),
        low=low,
        high=high,
        standard_error=math.nan,
        observed=float(observed),
        n=len(counts),
        patients=len(sums),
    )


def agreement(
    answers: np.ndarray, sources: np.ndarray, patients: np.ndarray, *, seed: int
) -> tuple[dict[tuple[int, int], Kappa], Kappa | None]:
    """Of one artifact: Cohen's kappa of each pair of readers, and Fleiss' where at least three read
    something.

    Args:
        answers: shape (readers, images), first-level readers only.
        sources: which row of the sheet each answer comes from, same shape. One row for a whole series is one
            item, not one an image.
        patients: int (images,).
    """
    readers = [reader for reader in range(len(answers)) if not np.isnan(answers[reader]).all()]
    pairs = {}
    for place, first in enumerate(readers):
        for second in readers[place + 1 :]:
            one = _items(answers, sources, [first, second])
            pairs[first, second] = cohen_kappa(
                answers[first, one], answers[second, one], patients[one], seed=seed
            )
    if len(readers) < 3:
        return pairs, None
    one = _items(answers, sources, readers)
    said = answers[readers][:, one]
    return pairs, fleiss_kappa(
        np.column_stack([(said == 0).sum(0), (said == 1).sum(0)]), patients[one], seed=seed
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion, for independent trials; nan without any.

    Reference: Wilson, J Am Stat Assoc 22 (1927) 209.
    """
    from scipy.stats import binomtest  # most of a second

    if not trials:
        return math.nan, math.nan
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _items(answers: np.ndarray, sources: np.ndarray, readers: list[int]) -> np.ndarray:
    """Positions of images that all `readers` assessed, one for each combination of rows."""
    complete = np.flatnonzero(~np.isnan(answers[readers]).any(0))
    if not complete.size:
        return complete
    _, first = np.unique(sources[readers][:, complete], axis=1, return_index=True)
    return complete[np.sort(first)]


def _cohen(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kappa and observed agreement of 2 × 2 tables given as (..., 4) in the order 00, 01, 10, 11."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = tables / tables.sum(-1, keepdims=True)
        observed = share[..., 0] + share[..., 3]
        rows, columns = share[..., 2] + share[..., 3], share[..., 1] + share[..., 3]
        return _corrected(observed, rows * columns + (1 - rows) * (1 - columns)), observed


def _cohen_standard_error(table: np.ndarray) -> float:
    """Equation 13 of Fleiss, Cohen and Everitt (1969), for two categories; nan where kappa is."""
    kappa, _ = _cohen(table)
    if math.isnan(kappa):
        return math.nan
    share = (table / table.sum()).reshape(2, 2)
    rows, columns = share.sum(1), share.sum(0)
    chance = float(rows @ columns)
    diagonal = sum(share[i, i] * (1 - (rows[i] + columns[i]) * (1 - kappa)) ** 2 for i in range(2))
    beside = (1 - kappa) ** 2 * sum(share[i, j] * (columns[i] + rows[j]) ** 2 for i, j in ((0, 1), (1, 0)))
    variance = (diagonal + beside - (kappa - chance * (1 - kappa)) ** 2) / (table.sum() * (1 - chance) ** 2)
    return math.sqrt(max(float(variance), 0.0))


def _fleiss(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kappa and observed agreement from (..., 2 + categories): items, the sum of their shares of agreeing
    pairs, answers by category.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = sums[..., 1] / sums[..., 0]
        share = sums[..., 2:] / sums[..., 2:].sum(-1, keepdims=True)
        return _corrected(observed, (share**2).sum(-1)), observed


def _corrected(observed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """(observed - chance) / (1 - chance); nan where chance alone explains all."""
    rest = 1 - chance
    return np.where(rest > 1e-12, (observed - chance) / np.where(rest > 1e-12, rest, 1), np.nan)


def _per_patient(rows: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Rows summed by patient, shape (patients, ...)."""
    names, dense = np.unique(patients, return_inverse=True)
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, dense, rows)
    return sums


def _interval(
    statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray, *, seed: int, draws: int
) -> tuple[float, float]:
    """95 % percentile interval over resampled patients. Draws in which the statistic is undefined are left
    out.
    """
    count = len(sums)
    if count < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        times = generator.multinomial(
            count, np.full(count, 1 / count), size=min(_DRAWS_AT_ONCE, draws - start)
        )
        values.append(statistic(times @ sums))
    defined = np.concatenate(values)
    defined = defined[~np.isnan(defined)]
    if not defined.size:
        return math.nan, math.nan
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def _median(values: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        # a column of nan has the median nan, which is what is meant
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmedian(values, axis=0) if len(values) else np.full(values.shape[1:], np.nan)
