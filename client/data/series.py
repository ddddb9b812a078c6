"""Which slices of a site form a series, in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from client.dicom.index import SliceRecord
from common.series import Series


def series_of_records(records: Sequence[SliceRecord]) -> Series:
    """For `common.studies.samples_of`: the series and the study of each slice, and the slices in their order.

    A series is what has one patient, modality and Series Instance UID; a slice without the UID is a series of
    its own. A study has one patient, modality and Study Instance UID; a series without is a study of its own.
    Slices are ordered along the slice normal where all of a series have a position (Image Position
    and Image Orientation (Patient), else Slice Location), else by Instance Number where all have one, else by
    file; what is equal, such as the echoes of one place, by Instance Number, then file and frame.
    Reference: DICOM PS3.3 C.7.6.2.1.1.
    """
    names: dict[tuple[str, ...], int] = {}
    members: list[list[int]] = []
    for at, record in enumerate(records):
        name = record.patient, record.modality, record.series or f"{record.number}#{record.frame}"
        number = names.setdefault(name, len(names))
        if number == len(members):
            members.append([])
        members[number].append(at)
    series, order = np.zeros(len(records), np.int64), []
    for number, own in enumerate(members):
        series[own] = number
        order += _in_order(records, own)
    studies: dict[tuple[str, ...], int] = {}
    study = np.zeros(len(records), np.int64)
    for own in members:
        record = records[own[0]]  # of the first slice, should a series say several
        name = record.patient, record.modality, record.study or f"{record.number}#{record.frame}"
        study[own] = studies.setdefault(name, len(studies))
    return Series(series, np.array(order, np.int64), study)


def _in_order(records: Sequence[SliceRecord], own: list[int]) -> list[int]:
    """The slices of a series by their place."""

    def all_have(values: list[float | int | None]) -> list[float]:
        known = [0.0 if value is None else float(value) for value in values]
        return [0.0] * len(known) if None in values else known

    positions = all_have([records[at].slice_position_mm for at in own])
    instances = all_have([records[at].instance_number for at in own])
    keys = {
        at: (position, instance, records[at].number, records[at].frame)
        for at, position, instance in zip(own, positions, instances, strict=True)
    }
    return sorted(own, key=keys.__getitem__)
