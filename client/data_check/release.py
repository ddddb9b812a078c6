"""The acquisition profile that may leave the hospital: a smaller object than `profile.Profile`, of words that
we wrote and coarse counts.

Promise: no text of a header can stand in it, because every key is one of the literals below and every value a
    multiple of ten or "<10".
All keys are always there, so that nobody sees that a rare value occurs once. It is DISCLOSED: computed from
patients without noise, outside the privacy guarantee, and nothing sends it yet. One index has one release: it
is made once and then read from the disk, so that asking twice tells nothing more. Two releases of two indexes
may still tell, of a count that passes a multiple of ten, that somebody came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from client.data_check import vocabulary
from client.dicom.index import SliceRecord
from common.artifacts import MODALITIES, Modality
from common.errors import RunError
from common.files import write_bytes
from common.wire import DISCLOSED, WireMessage

CELL = 10
"""Counts of patients below this are not told, others are rounded down to a multiple of it."""

Count = Literal["<10"] | Annotated[int, Field(ge=CELL, multiple_of=CELL)]
Vendor = Literal["Siemens", "GE", "Philips", "Canon", "Fujifilm", "United Imaging", "Neusoft", "other"]
FieldStrength = Literal["0.5", "1.0", "1.5", "3.0", "7.0", "other"]
TubeVoltage = Literal["80", "100", "120", "140", "other"]
Thickness = Literal["below 1", "1 to 2", "2 to 3", "3 to 5", "5 and above", "other"]
BodyPart = Literal["head", "neck", "chest", "abdomen", "pelvis", "spine", "limb", "whole body", "other"]


class ReleasedProfile(WireMessage):
    """Patients by how they were imaged; one who was imaged in two ways counts in both."""

    patients: Annotated[Count, DISCLOSED]
    modality: Annotated[dict[Modality, Count], DISCLOSED]
    vendor: Annotated[dict[Vendor, Count], DISCLOSED]
    field_strength_t: Annotated[dict[FieldStrength, Count], DISCLOSED]  # of MR
    kvp: Annotated[dict[TubeVoltage, Count], DISCLOSED]  # of CT
    slice_thickness_mm: Annotated[dict[Thickness, Count], DISCLOSED]
    body_part: Annotated[dict[BodyPart, Count], DISCLOSED]


def released_profile(state: Path, index: str, records: Sequence[SliceRecord]) -> ReleasedProfile:
    """The release of an index: the one that was made before, or a new one, which is kept in the state folder.

    Args:
        index: the index version (`Slices.fingerprint`) that `records` are.
    """
    path = state / f"release-{index}.json"
    try:
        return ReleasedProfile.from_bytes(path.read_bytes())
    except FileNotFoundError:
        pass
    except (OSError, RunError):
        path.unlink(missing_ok=True)  # damaged: the same index gives the same bytes
    made = make_release(records)
    write_bytes(path, made.to_bytes(), 0o600)
    return made


def make_release(records: Sequence[SliceRecord]) -> ReleasedProfile:
    """The release of these slices."""
    ct = [record for record in records if record.modality == "CT"]
    mr = [record for record in records if record.modality == "MR"]
    fields, voltages = get_args(FieldStrength), get_args(TubeVoltage)
    return ReleasedProfile(
        patients=coarse(len({record.patient for record in records})),
        modality=_counted(records, MODALITIES, lambda record: record.modality),
        vendor=_counted(records, get_args(Vendor), lambda record: vocabulary.vendor(record.manufacturer)),
        field_strength_t=_counted(mr, fields, lambda record: _near(record.field_strength_t, fields, 0.12)),
        kvp=_counted(ct, voltages, lambda record: _near(record.kvp, voltages, 0.06)),
        slice_thickness_mm=_counted(
            records, get_args(Thickness), lambda record: _thickness(record.slice_thickness_mm)
        ),
        body_part=_counted(
            records, get_args(BodyPart), lambda record: vocabulary.body_part(record.body_part)
        ),
    )


def coarse(count: int) -> Count:
    """A number of patients as it may be told."""
    return "<10" if count < CELL else count // CELL * CELL


def _counted(
    records: Sequence[SliceRecord], words: Sequence[str], word_of: Callable[[SliceRecord], str | None]
) -> dict[Any, Count]:
    patients: dict[str, set[str]] = {word: set() for word in words}
    for record in records:
        found = word_of(record)
        patients[found if found in patients else "other"].add(record.patient)
    return {word: coarse(len(members)) for word, members in patients.items()}


def _near(value: float | None, words: Sequence[str], tolerance: float) -> str | None:
    """The number among `words` that lies within this part of `value`."""
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    numbers = [word for word in words if word != "other"]
    best = min(numbers, key=lambda word: abs(float(word) - value))
    return best if abs(float(best) - value) <= tolerance * float(best) else None


def _thickness(value: float | None) -> str | None:
    if value is None or not math.isfinite(value) or value <= 0:
        return None
    limits = ((1.0, "below 1"), (2.0, "1 to 2"), (3.0, "2 to 3"), (5.0, "3 to 5"))
    return next((word for limit, word in limits if value < limit), "5 and above")
