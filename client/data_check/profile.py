"""Profile how images were acquired, as distributions over patients, and compare two profiles.

A profile stays in the hospital.

A patient counts once: each of a patient's slices weighs one over how many slices of the modality the patient
has. Numbers are binned at the values or deciles of the profile that is compared *with*, so that a profile can
be stored and met by later data.

Two profiles are compared by the population stability index, PSI = Σ (q - p) ln(q / p): below 0.1 nothing
moved, from 0.25 the population is another (Siddiqi, Credit Risk Scorecards, 2006, ch. 9). Small samples
differ by chance: without any change PSI is close to (1/n + 1/m) χ² with bins - 1 degrees of freedom (Yurdakul
and Naranjo, J. Risk Model Validation 14(4), 2020), so that a change also has to exceed that law's 95th
(`moved`) or 99th percentile (`alarming`).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.data_check.vocabulary import MISSING, WORDS, shown
from client.dicom.index import SliceRecord
from common.errors import DataError
from common.files import write_bytes

FORMAT = 1
MOVED, ALARMING = 0.1, 0.25
MAX_BYTES = 16 << 20
MAX_LETTERS = 40  # of a word
_BINS = 10
_TOLERANCE = 1e-3  # of a value: 4.999 mm is 5 mm
_MIN_IN_BIN = 4  # patients, so that few patients make few bins

WORD_FIELDS = ("vendor", "model", "field_strength_t", "kvp", "kernel", "sequence")
NUMBER_FIELDS = (
    "slice_thickness_mm",
    "pixel_spacing_mm",
    "echo_time_ms",
    "repetition_time_ms",
    "mean",
    "spread",
    "detail",
)
ACQUISITION = (*WORD_FIELDS, *NUMBER_FIELDS[:4])
MEASURES = NUMBER_FIELDS[4:]
_OF_ONE = {
    "kvp": "CT",
    "kernel": "CT",
    "field_strength_t": "MR",
    "sequence": "MR",
    "echo_time_ms": "MR",
    "repetition_time_ms": "MR",
}


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A number over patients."""

    low: float  # 5th, 50th and 95th percentile
    median: float
    high: float
    edges: tuple[float, ...]  # inner edges of the bins
    weights: tuple[float, ...]  # patients in each bin, one more than edges
    missing: float  # patients whose headers do not say


@dataclass(frozen=True, kw_only=True)
class Population:
    """One modality's patients."""

    patients: int
    slices: int
    words: dict[str, dict[str, float]]  # field -> word -> patients
    numbers: dict[str, Numbers]


@dataclass(frozen=True, kw_only=True)
class Profile:
    modalities: dict[str, Population]
    patients: int


@dataclass(frozen=True, kw_only=True)
class Move:
    """How one field differs from the profile that the model was trained on."""

    modality: str
    field: str
    verdict: Literal["steady", "moved", "alarming"]
    psi: float
    shifted: float  # share of patients that lie in another bin now: total variation distance, 0 to 1
    before: str
    now: str
    new: tuple[tuple[str, float], ...]  # words that training never saw, and the share of patients


class Acquisition:
    """The fields of a profile of each slice, worked out once."""

    def __init__(self, records: Sequence[SliceRecord], measures: Sequence[Sequence[Any]], key: bytes) -> None:
        self.patients = np.array([record.patient for record in records], dtype=np.str_)
        self.modality = np.array([record.modality for record in records], dtype=np.str_)
        self.words = {
            field: np.array([word(field, record, key) for record in records], dtype=np.str_)
            for field in WORD_FIELDS
        }
        columns: dict[str, list[float | None]] = {
            "slice_thickness_mm": [record.slice_thickness_mm for record in records],
            "pixel_spacing_mm": [
                record.pixel_spacing_mm[0] if record.pixel_spacing_mm else None for record in records
            ],
            "echo_time_ms": [record.echo_time_ms for record in records],
            "repetition_time_ms": [record.repetition_time_ms for record in records],
        } | {name: [measured[place] for measured in measures] for place, name in enumerate(MEASURES)}
        self.numbers = {field: np.array(values, np.float64) for field, values in columns.items()}

    def profile(self, chosen: np.ndarray | None = None, like: Profile | None = None) -> Profile:
        """The profile of the slices `chosen` (bool); binned as `like` is, or at its own deciles."""
        chosen = np.ones(len(self.patients), bool) if chosen is None else chosen
        found = {}
        for modality in sorted(set(self.modality[chosen].tolist())):
            own = chosen & (self.modality == modality)
            reference = like.modalities.get(modality) if like else None
            found[modality] = self._population(modality, own, reference)
        return Profile(modalities=found, patients=len(set(self.patients[chosen].tolist())))

    def _population(self, modality: str, own: np.ndarray, like: Population | None) -> Population:
        _, patient, slices = np.unique(self.patients[own], return_inverse=True, return_counts=True)
        weight = 1 / slices[patient]
        words = {}
        for field in WORD_FIELDS:
            if _OF_ONE.get(field, modality) == modality:
                values, place = np.unique(self.words[field][own], return_inverse=True)
                words[field] = dict(zip(values.tolist(), np.bincount(place, weight).tolist(), strict=True))
        numbers = {}
        for field in NUMBER_FIELDS:
            if _OF_ONE.get(field, modality) == modality:
                edges = like.numbers[field].edges if like and field in like.numbers else None
                numbers[field] = _numbers(self.numbers[field][own], weight, edges)
        return Population(patients=len(slices), slices=int(own.sum()), words=words, numbers=numbers)


def word(field: str, record: SliceRecord, key: bytes) -> str:
    """What a profile says of a field of words."""
    if field == "kvp":
        return MISSING if record.kvp is None else f"{record.kvp:.0f}"
    if field == "field_strength_t":
        return MISSING if record.field_strength_t is None else f"{record.field_strength_t:.1f}"
    return _said(field, getattr(record, WORDS[field][1]), key)


@cache
def _said(field: str, text: str, key: bytes) -> str:
    return shown(text, WORDS[field][0](text), key)


def _numbers(values: np.ndarray, weight: np.ndarray, edges: tuple[float, ...] | None) -> Numbers:
    known = np.isfinite(values)
    values, missing, weight = values[known], float(weight[~known].sum()), weight[known]
    if not values.size:
        empty = edges or ()
        return Numbers(
            low=np.nan,
            median=np.nan,
            high=np.nan,
            edges=empty,
            weights=(0.0,) * (len(empty) + 1),
            missing=missing,
        )
    order = np.argsort(values, kind="stable")
    at = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()

    def quantile(share: float) -> float:
        return float(values[order][min(int(np.searchsorted(at, share)), len(at) - 1)])

    if edges is None:
        edges = _edges(values, quantile, patients=float(weight.sum()))
    found = np.bincount(
        np.searchsorted(np.array(edges), values, side="right"), weight, minlength=len(edges) + 1
    )
    return Numbers(
        low=quantile(0.05),
        median=quantile(0.5),
        high=quantile(0.95),
        edges=edges,
        weights=tuple(found.tolist()),
        missing=missing,
    )


def _edges(values: np.ndarray, quantile: Callable[[float], float], *, patients: float) -> tuple[float, ...]:
    """Inner edges of bins: around each value where there are few of them, else the range and the deciles in
    it.

    What lies outside every value, or outside the range, has a bin of its own, which is empty until other data
    come.
    """
    few = np.unique(values)
    bins = max(2, min(_BINS, int(patients) // _MIN_IN_BIN))
    if len(few) <= min(_BINS, patients / 2 + 1):
        return tuple(
            sorted({mark + side * _TOLERANCE * abs(mark) for mark in few.tolist() for side in (-1, 1)})
        )
    low, high = float(few[0]), float(few[-1])
    inner = {quantile(place / bins) for place in range(1, bins)} - {low, high}
    return (low - _TOLERANCE * abs(low), *sorted(inner), high + _TOLERANCE * abs(high))


def moves(trained: Profile, now: Profile) -> list[Move]:
    """Field by field what changed, the largest first. `now` is binned like `trained`.

    A modality that one of the two lacks is no move of its fields; `modality` itself is one.
    """
    found = [_of_modalities(trained, now)]
    for modality, new in now.modalities.items():
        old = trained.modalities.get(modality)
        if old is None:
            continue
        sizes = old.patients, new.patients
        for field, words in new.words.items():
            before = old.words.get(field, {})
            unseen = tuple(
                (name, count / new.patients) for name, count in words.items() if name not in before
            )
            found.append(
                _move(modality, field, before, words, sizes, said=(_main(before), _main(words)), new=unseen)
            )
        for field, numbers in new.numbers.items():
            was = old.numbers[field]
            bins = [dict(enumerate((*one.weights, one.missing))) for one in (was, numbers)]
            found.append(
                _move(modality, field, bins[0], bins[1], sizes, said=(_span(was), _span(numbers)), new=())
            )
    return sorted(found, key=lambda move: (("alarming", "moved", "steady").index(move.verdict), -move.psi))


def _of_modalities(trained: Profile, now: Profile) -> Move:
    before, after = (
        {name: float(one.patients) for name, one in profile.modalities.items()} for profile in (trained, now)
    )
    unseen = tuple(
        (name, count / max(now.patients, 1)) for name, count in after.items() if name not in before
    )
    sizes = trained.patients, now.patients
    return _move("", "modality", before, after, sizes, said=(_main(before), _main(after)), new=unseen)


def _move(
    modality: str,
    field: str,
    before: dict[Any, float],
    now: dict[Any, float],
    sizes: tuple[int, int],
    *,
    said: tuple[str, str],
    new: tuple[tuple[str, float], ...],
) -> Move:
    bins = sorted({name for counts in (before, now) for name, count in counts.items() if count > 0})
    counts = np.array([[one.get(name, 0.0) for name in bins] for one in (before, now)])
    old, recent = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
    # an empty bin has no logarithm
    padded = (counts + 0.5) / (counts.sum(1, keepdims=True) + 0.5 * max(len(bins), 1))
    psi = float(((padded[1] - padded[0]) * np.log(padded[1] / padded[0])).sum())
    return Move(
        modality=modality,
        field=field,
        verdict=_verdict(psi, len(bins), sizes),
        psi=psi,
        shifted=float(np.abs(old - recent).sum() / 2),
        before=said[0],
        now=said[1],
        new=new,
    )


def _verdict(psi: float, bins: int, sizes: tuple[int, int]) -> Literal["steady", "moved", "alarming"]:
    if bins < 2 or min(sizes) < 1:
        return "steady"
    from scipy.special import chdtri

    noise = 1 / sizes[0] + 1 / sizes[1]
    if psi >= max(ALARMING, noise * float(chdtri(bins - 1, 0.01))):
        return "alarming"
    return "moved" if psi >= max(MOVED, noise * float(chdtri(bins - 1, 0.05))) else "steady"


def _main(counts: dict[str, float]) -> str:
    """The three most common words with their shares."""
    total = sum(counts.values())
    return (
        ", ".join(
            f"{name} {count / total:.0%}" for name, count in Counter(counts).most_common(3) if count > 0
        )
        if total
        else "–"
    )


def _span(numbers: Numbers) -> str:
    if not np.isfinite(numbers.median):
        return MISSING
    return f"{numbers.median:.4g} ({numbers.low:.4g} – {numbers.high:.4g})"


# on disk


def profile_path(state: Path, index: str) -> Path:
    """Where the profile of a site's training patients lies, by the index it was made of."""
    return state / f"profile-{index}.json"


def keep_profile(path: Path, profile: Profile, patients: Sequence[str]) -> None:
    """Write a profile beside the pseudonyms of its patients, readable by the owner only. It never leaves the
    hospital.
    """
    text = json.dumps(
        {"format": FORMAT, "profile": asdict(profile), "patients": sorted(set(patients))}, allow_nan=True
    )
    try:
        if path.read_text(encoding="ascii") == text:
            return
    except (OSError, ValueError):
        pass
    write_bytes(path, text.encode(), 0o600)


def read_profile(path: Path) -> tuple[Profile, frozenset[str]]:
    """A profile and the pseudonyms of its patients.

    Raises:
        DataError: `no-profile` (not there), `bad-profile`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError
        value = json.loads(path.read_bytes())
        if value["format"] != FORMAT:
            raise ValueError
        profile = _profile_of(value["profile"])
        return profile, frozenset(map(str, value["patients"]))
    except OSError as error:
        raise DataError(
            f"{path}: no profile can be read ({error.strerror})",
            code="no-profile",
            hint="fedqc data check of the training site writes one",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        hint = "delete it; fedqc data check of the training site writes another"
        raise DataError(f"{path}: not a profile of this version", code="bad-profile", hint=hint) from None


def _profile_of(value: dict[str, Any]) -> Profile:
    found = {}
    for modality, one in value["modalities"].items():
        words = {
            field: {str(name): float(count) for name, count in one["words"][field].items()}
            for field in one["words"]
        }
        if not all(
            name.isprintable() and len(name) <= MAX_LETTERS for counts in words.values() for name in counts
        ):
            raise ValueError
        numbers = {}
        for field in NUMBER_FIELDS:
            if field in one["numbers"]:
                raw = one["numbers"][field]
                edges, weights = tuple(map(float, raw["edges"])), tuple(map(float, raw["weights"]))
                if len(weights) != len(edges) + 1:
                    raise ValueError
                low, median, high, missing = (
                    float(raw[name]) for name in ("low", "median", "high", "missing")
                )
                numbers[field] = Numbers(
                    low=low, median=median, high=high, edges=edges, weights=weights, missing=missing
                )
        expected = {
            field for field in (*WORD_FIELDS, *NUMBER_FIELDS) if _OF_ONE.get(field, modality) == modality
        }
        if modality not in ("CT", "MR") or expected != words.keys() | numbers.keys():
            raise ValueError
        found[modality] = Population(
            patients=int(one["patients"]), slices=int(one["slices"]), words=words, numbers=numbers
        )
    return Profile(modalities=found, patients=int(value["patients"]))


def acquisition_table(profile: Profile) -> dict[str, dict[str, Any]]:
    """A profile for a report: of each modality and field the words with patients (rounded to one decimal), or
    the percentiles.
    """
    table: dict[str, dict[str, Any]] = defaultdict(dict)
    for modality, one in profile.modalities.items():
        for field, counts in one.words.items():
            ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
            table[modality][field] = {name: round(count, 1) for name, count in ordered}
        for field, numbers in one.numbers.items():
            values = {"p5": numbers.low, "median": numbers.median, "p95": numbers.high}
            table[modality][field] = {
                name: float(f"{value:.4g}") if np.isfinite(value) else None for name, value in values.items()
            }
            table[modality][field]["missing"] = round(numbers.missing, 1)
    return dict(table)
