"""Say of a slice why a model should not judge it: it lies outside what models of fedqc are trained on.

A modality other than CT and MR, a localizer, a derived or a damaged image never come here: intake leaves them
out, each with its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from client.data_check.check import cause_of_wrong_values
from client.data_check.profile import Acquisition, Numbers, Profile, read_profile
from client.data_check.vocabulary import MISSING
from client.dicom.index import SliceRecord
from common.artifacts import Modality
from common.errors import DataError
from common.preprocess import from_stored

WORD_FIELDS = ("vendor", "field_strength_t", "kvp")
NUMBER_FIELDS = ("slice_thickness_mm", "pixel_spacing_mm", "echo_time_ms", "repetition_time_ms")
MIN_BODY, CT_BODY_HU = 0.1, -400.0  # as client.views.acquisition
MIN_BODY_OF_RUN = 0.03
"""The public starts saw views of at least `MIN_BODY`; a run trains on every slice of its hospitals, also at
the ends of a stack and of a small body in a wide field.
"""
_SPREAD = 1  # among the measures of a slice: standard deviation, 0 where it is blank
_SHARES = 4  # the first of the shares


def newest_profile(state: Path) -> Profile | None:
    """How the patients that this site last trained on were acquired (`fedqc data check` keeps it); None where
    it is not known.
    """
    paths = sorted(state.glob("profile-*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in paths:
        with suppress(DataError):
            return read_profile(path)[0]
    return None


def outside(
    records: Sequence[SliceRecord],
    images: np.ndarray,
    measures: Sequence[Sequence[Any]],
    series: np.ndarray,
    *,
    profile: Profile | None,
    key: bytes,
    min_body: float = MIN_BODY,
) -> list[str]:
    """For each slice the reason why it is not judged, or "": `little-body`; a code of wrong values of its
    series (`hu-too-low`, ...); `field FIELD`, a FIELD that no training patient of the site had.

    Args:
        images: int16 (n, S, S) as cached. series: int64 (n,).
        profile: of this site's training patients; None: acquisition is not compared.
        key: the site's, which names words that are not in the vocabulary.
        min_body: share of a slice that must be body.
    """
    found = [""] * len(records)
    numbers = np.array([[one[_SPREAD], *one[_SHARES:]] for one in measures], np.float64)
    for number in np.unique(series):
        own = np.flatnonzero(series == number)
        shown = own[numbers[own, 0] > 0]
        if cause := cause_of_wrong_values(records[int(own[0])].modality, numbers[shown, 1:]):
            for at in own.tolist():
                found[at] = cause
    acquisition = None if profile is None else Acquisition(records, measures, key)
    for at, record in enumerate(records):
        if not found[at] and acquisition is not None and profile is not None:
            found[at] = _unseen(acquisition, at, record, profile)
        if not found[at]:
            image = from_stored(np.asarray(images[at]), record.modality)
            if body_share(image, record.modality) < min_body:
                found[at] = "little-body"
    return found


def body_share(image: np.ndarray, modality: Modality) -> float:
    """Share of a slice (S, S) that is body: the mean of `client.views.acquisition.body_of`, without torch."""
    padded = np.pad(image.astype(np.float32), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / np.float32(9)
    if modality == "CT":
        foreground = smooth > CT_BODY_HU
    else:
        place = max(1, int(0.99 * image.size)) - 1
        foreground = smooth > np.partition(image, place, axis=None)[place] * np.float32(0.12)
    inside = np.ones_like(foreground)
    for axis in (0, 1):
        inside &= np.logical_or.accumulate(foreground, axis)
        inside &= np.flip(np.logical_or.accumulate(np.flip(foreground, axis), axis), axis)
    return float(inside.mean())


def _unseen(acquisition: Acquisition, at: int, record: SliceRecord, profile: Profile) -> str:
    """A field of a header with a value that no training patient had; what the header does not say is none."""
    population = profile.modalities.get(record.modality)
    if population is None:
        return "field modality"
    for field in WORD_FIELDS:
        if field in population.words:
            word = str(acquisition.words[field][at])
            if word != MISSING and word not in population.words[field]:
                return f"field {field}"
    for field in NUMBER_FIELDS:
        if field in population.numbers and _lies_apart(
            float(acquisition.numbers[field][at]), population.numbers[field]
        ):
            return f"field {field}"
    return ""


def _lies_apart(value: float, trained: Numbers) -> bool:
    """Below the least or above the largest of the training patients."""
    if not np.isfinite(value) or not trained.edges:
        return False
    return value < trained.edges[0] or value >= trained.edges[-1]
