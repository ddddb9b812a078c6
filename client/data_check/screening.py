"""Find outliers, near duplicates and changes over time, for a person to look at.

They are warnings; no slice or patient is selected by them.

All of it is worked out from four measures a slice, which the cache keeps (`client.dicom.reading.measures`):
no pixel is read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from client.dicom.index import SliceRecord

MEASURES = ("mean", "spread", "detail")
OUTLYING_Z = 6.0
"""Robust z-score from which a slice is an outlier. Iglewicz and Hoaglin (1993) take 3.5 for one normal
population; a volume's first and last slices differ from its middle by more than that, and are in order."""
MIN_GROUP = 20  # slices of one protocol, below which nothing can be called unlike the rest
MAX_BITS = 3
"""Bits of 64 in which the difference hashes of near-duplicates differ at most."""
SAME_MEASURES = (
    0.02  # near-duplicates also agree in mean (of the spread), spread and detail to within this part
)
MAX_CANDIDATES = 30_000_000  # pairs compared, above which the search says that it is not complete
STEP_SD, STEP_Z = 1.0, 3.29
MIN_MONTHS, MIN_STUDIES = 6, 8
_CHUNK = 1 << 20


# unlike the rest


@dataclass(frozen=True, kw_only=True)
class Outliers:
    # float64 (slices, measures): robust z-scores within the protocol; 0 where the protocol has too few slices
    z: np.ndarray
    slices: np.ndarray  # int64: positions, the most unlike first


def protocols(records: Sequence[SliceRecord]) -> np.ndarray:
    """The protocol of each slice as a number, int64: modality, and sequence or kernel."""
    numbers: dict[tuple[str, str], int] = {}
    kinds = ((one.modality, one.kernel if one.modality == "CT" else one.sequence) for one in records)
    return np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds], np.int64)


def outliers(values: np.ndarray, groups: np.ndarray) -> Outliers:
    """Slices whose mean, spread or detail is far from the median of their protocol.

    z = 0.6745 (x - median) / MAD; where half of the slices share one value, (x - median) / (1.2533 mean
    absolute deviation).
    Args:
        values: float (slices, measures). groups: int (slices,).
    Reference: Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC (1993).
    """
    z = np.zeros(values.shape)
    order = np.argsort(groups, kind="stable")
    bounds = np.flatnonzero(np.diff(groups[order], prepend=-1, append=-1))
    for start, stop in pairwise(bounds):
        own = order[start:stop]
        if len(own) < MIN_GROUP:
            continue
        away = values[own] - np.median(values[own], axis=0)
        mad, mean = np.median(np.abs(away), axis=0), np.abs(away).mean(0)
        scale = np.where(mad > 0, mad / 0.6745, 1.2533 * mean)
        z[own] = np.divide(away, scale, out=np.zeros_like(away), where=scale > 0)
    worst = np.abs(z).max(1, initial=0.0)
    far = np.flatnonzero(worst > OUTLYING_Z)
    return Outliers(z=z, slices=far[np.argsort(-worst[far], kind="stable")])


# twice there


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Near-duplicates in different series. The arrays are over all slices."""

    across_patients: np.ndarray  # bool: another patient has a slice like this one
    across_split: np.ndarray  # bool: so has a patient of another part of the split
    # a few pairs of positions across patients to look at, those across the split first
    pairs: tuple[tuple[int, int], ...]
    is_complete: bool


def near_duplicates(
    hashes: np.ndarray,
    values: np.ndarray,
    kinds: np.ndarray,
    series: np.ndarray,
    patients: np.ndarray,
    parts: np.ndarray,
    *,
    shown: int = 24,
) -> Duplicates:
    """Slices that look alike and are not neighbours in one series.

    Two hashes that differ in at most three bits agree in at least one of four bands of 16 bits, so that only
    slices with a common band are compared, and of those only slices with nearly the same spread: not every
    pair.
    Args:
        hashes: uint64 (slices,). values: float (slices, 3), see `MEASURES`. kinds, series, patients, parts:
            int (slices,); only slices of
        one kind (modality) are compared; parts below 0 are in no part.
    """
    count = len(hashes)
    across_patients, across_split = np.zeros(count, bool), np.zeros(count, bool)
    seen: dict[int, tuple[tuple[int, int], bool]] = {}  # of each pair of patients one pair of slices
    budget = MAX_CANDIDATES
    for first, second in _candidates(hashes, values[:, 1], kinds):
        budget -= len(first)
        if budget < 0:
            break
        near = (patients[first] != patients[second]) & (series[first] != series[second])
        first, second = first[near], second[near]
        near = (np.bitwise_count(hashes[first] ^ hashes[second]) <= MAX_BITS) & _alike(
            values[first], values[second]
        )
        first, second = first[near], second[near]
        across_patients[first] = across_patients[second] = True
        split = (parts[first] != parts[second]) & (parts[first] >= 0) & (parts[second] >= 0)
        across_split[first[split]] = across_split[second[split]] = True
        low, high = (
            np.minimum(patients[first], patients[second]),
            np.maximum(patients[first], patients[second]),
        )
        _, once = np.unique(
            low.astype(np.int64) * (int(patients.max(initial=0)) + 1) + high, return_index=True
        )
        for place in once[:1000].tolist():
            pair = int(low[place]) * count + int(high[place])
            seen.setdefault(pair, ((int(first[place]), int(second[place])), bool(split[place])))
    ordered = sorted(seen.values(), key=lambda one: (not one[1], one[0]))
    pairs = tuple((min(pair), max(pair)) for pair, _ in ordered[:shown])
    return Duplicates(
        across_patients=across_patients, across_split=across_split, pairs=pairs, is_complete=budget >= 0
    )


def _alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether the measures agree; float (pairs, 3) each."""
    spread = np.maximum(first[:, 1], second[:, 1])
    same_mean = np.abs(first[:, 0] - second[:, 0]) <= SAME_MEASURES * spread
    same_spread = np.abs(first[:, 1] - second[:, 1]) <= SAME_MEASURES * spread
    return (
        same_mean
        & same_spread
        & (np.abs(first[:, 2] - second[:, 2]) <= SAME_MEASURES * np.maximum(first[:, 2], second[:, 2]))
    )


def _candidates(
    hashes: np.ndarray, spread: np.ndarray, kinds: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs that share a band and have nearly the same spread, in pieces. A pair may come once
    for each band that it shares.

    A band takes every fourth bit, so that empty rows at the top of many images do not put them all into one
    bucket. Slices of a spread of 0 are blank, and alike for no reason.
    """
    bits = np.unpackbits(hashes[:, None].view(np.uint8), axis=1)
    for band in range(4):
        key = np.packbits(bits[:, band::4], axis=1).astype(np.int64) @ np.array(
            [256, 1]
        ) + 65536 * kinds.astype(np.int64)
        own = np.flatnonzero(spread > 0)
        own = own[np.lexsort((spread[own], key[own]))]
        # Within a bucket the slices stand by spread: those near enough to slice i follow it, up to stop[i].
        # one number that rises through all buckets
        place = key[own].astype(np.float64) * 4 + np.log(spread[own]) / 64
        stop = np.searchsorted(place, place + np.log1p(SAME_MEASURES * 1.05) / 64, side="right")
        begin = np.arange(len(own)) + 1
        for start, end in _pieces(stop - begin):
            length = np.maximum(stop[start:end] - begin[start:end], 0)
            first = np.repeat(np.arange(start, end), length)
            within = np.arange(len(first)) - np.repeat(np.cumsum(length) - length, length)
            second = first + 1 + within
            same = key[own[first]] == key[own[second]]
            yield own[first[same]], own[second[same]]


def _pieces(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of rows with about `_CHUNK` pairs together."""
    total = np.cumsum(np.maximum(lengths, 0))
    start = 0
    while start < len(lengths):
        done = int(total[start - 1]) if start else 0
        end = max(int(np.searchsorted(total, done + _CHUNK, side="right")), start + 1)
        yield start, end
        start = end


# changing


@dataclass(frozen=True, kw_only=True)
class Trend:
    """One measure of one scanner's slices of one modality, month by month."""

    scanner: int  # position among the scanners
    modality: str
    measure: str
    months: tuple[str, ...]  # YYYY-MM, those that have studies
    medians: tuple[float, ...]  # of the studies' values, in robust standard deviations of the protocol
    studies: int
    step: float  # last third of the months against those before: difference of medians, same unit
    z: float  # of the rank-sum test, 0 where there are too few months or studies
    is_alarming: bool


def trends(
    records: Sequence[SliceRecord],
    z: np.ndarray,
    scanners: np.ndarray,
    *,
    least_months: int = MIN_MONTHS,
    least: int = MIN_STUDIES,
) -> list[Trend]:
    """Whether a scanner's images changed over time, from the slices that have a date.

    The value of a study is the median of its slices' z-scores (`outliers`), so that protocols may be mixed
    and a long series counts as one. The studies of the last third of the months are compared with all before
    by the Wilcoxon rank-sum test (normal approximation, ties corrected). Alarming: two-sided p < 0.001, and
    the medians are at least one robust standard deviation apart.
    Args:
        z: float (slices, measures). scanners: int (slices,).
    """
    studies: dict[tuple[int, str, str, str], list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        month = month_of(record.study_date)
        if month:
            studies[int(scanners[position]), record.modality, month, record.study or record.patient].append(
                position
            )
    groups: dict[tuple[int, str], list[tuple[str, np.ndarray]]] = defaultdict(list)
    for (scanner, modality, month, _), slices in studies.items():
        groups[scanner, modality].append((month, np.median(z[slices], axis=0)))
    found = []
    for (scanner, modality), values in sorted(groups.items()):
        months = sorted({month for month, _ in values})
        of_month = np.array([months.index(month) for month, _ in values])
        table = np.array([value for _, value in values])
        recent = of_month >= len(months) - max(len(months) // 3, 1)
        enough = len(months) >= least_months and min(recent.sum(), (~recent).sum()) >= least
        for place, measure in enumerate(MEASURES):
            after, before = table[recent, place], table[~recent, place]
            step = float(np.median(after) - np.median(before)) if enough else 0.0
            score = rank_sum_z(after, before) if enough else 0.0
            found.append(
                Trend(
                    scanner=scanner,
                    modality=modality,
                    measure=measure,
                    months=tuple(months),
                    medians=tuple(
                        float(np.median(table[of_month == month, place])) for month in range(len(months))
                    ),
                    studies=len(values),
                    step=step,
                    z=score,
                    is_alarming=abs(score) > STEP_Z and abs(step) >= STEP_SD,
                )
            )
    return found


def month_of(study_date: str) -> str:
    """YYYY-MM of a study date, or "" where it is none."""
    known = (
        len(study_date) >= 6
        and study_date[:6].isdecimal()
        and study_date.isascii()
        and "01" <= study_date[4:6] <= "12"
    )
    return f"{study_date[:4]}-{study_date[4:6]}" if known else ""


def rank_sum_z(first: np.ndarray, second: np.ndarray) -> float:
    """Standard normal score of the Wilcoxon rank-sum statistic of `first`, ties corrected; 0 where all values
    are the same.
    """
    m, n = len(first), len(second)
    _, place, counts = np.unique(np.concatenate([first, second]), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    total = m + n
    variance = m * n / 12 * (total + 1 - (counts**3 - counts).sum() / (total * (total - 1)))
    return float((ranks[:m].sum() - m * (total + 1) / 2) / np.sqrt(variance)) if variance > 0 else 0.0


def scanners_of(records: Sequence[SliceRecord]) -> tuple[np.ndarray, list[int]]:
    """The scanner of each slice as a number from 0, int64, the one with the most slices first; and how many
    slices each has.

    A scanner is its serial number or station name; where the header has neither, maker and model stand for
    it.
    """
    names = [record.scanner or f"{record.manufacturer}\0{record.model}" for record in records]
    ordered = [name for name, _ in Counter(names).most_common()]
    numbers = {name: place for place, name in enumerate(ordered)}
    found = np.array([numbers[name] for name in names], np.int64)
    return found, np.bincount(found, minlength=len(ordered)).tolist() if names else []
