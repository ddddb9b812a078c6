"""Read a site that has image-quality metrics of whole scans in place of images: `measures` of site.yaml.

The table is CSV with a row a scan: `file` names the scan, as the label sheet does, `patient` whose it is, and
a column for each metric of `common.measures.scaling`. Every scan is MR, as MRIQC's metrics are. Values are
scaled by public numbers; nothing is computed from the site's patients. Of cohort.yaml only the opt-outs hold:
a table has nothing else to select by.
"""

from __future__ import annotations

import csv
import hashlib
import hmac
import math
from collections.abc import Collection
from pathlib import Path

import numpy as np

from client.dicom.cache import Slices
from client.dicom.index import Intake, SliceRecord, Step, pseudonym
from client.dicom.patients import forms_of, is_listed
from common.errors import DataError
from common.measures import scaled, scaling

LEADING = ("file", "patient")


def read_measures(path: Path, key: bytes, *, opted_out: Collection[str] = ()) -> Slices:
    """The scans of a table as a cohort takes them: `images` is float32 (scans, metrics), scaled.

    Args:
        key: the site's; pseudonyms and the fingerprint of the table follow from it.
        opted_out: pseudonyms and normalised forms of patients whose scans are left out.
    Raises:
        DataError: `no-usable-images`: the file cannot be read, or has no row; `bad-measures`: a column is
            missing, a cell is no finite number, a scan is there twice, or a row names no patient.
    """
    try:
        content = path.read_bytes()
        rows = list(csv.DictReader(content.decode("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__})",
            code="no-usable-images",
            hint="site.yaml: measures = a CSV file with a row a scan",
        ) from None
    if not rows:
        raise DataError(f"{path}: no scan", code="no-usable-images", hint="a row a scan")
    names = scaling().names
    if missing := [name for name in (*LEADING, *names) if name not in rows[0]]:
        raise _bad(f"{path}: column {missing[0]} is missing", others=len(missing) - 1)
    seen: set[str] = set()
    records, values = [], []
    gone: set[str] = set()
    for number, row in enumerate(rows, start=1):
        file, patient = (row[name] or "" for name in LEADING)
        if not file or not patient or file in seen:
            what = (
                "names no scan" if not file else "names no patient" if not patient else "names a scan twice"
            )
            raise _bad(f"{path}: row {number + 1} {what}")
        seen.add(file)
        record = _record(path, number, file, patient, key)
        if is_listed(record, opted_out):
            gone.add(record.patient)
            continue
        records.append(record)
        values.append([_finite(row[name], path, number + 1, name) for name in names])
    intake = Intake(
        root=path.parent,
        found=len(records),
        used=len(records),
        records=tuple(records),
        quarantined=(),
        excluded=(),
        duplicates=(),
        shared_uids=0,
        excluded_slices={},
        flow=tuple(
            Step(
                name=name,
                files=len(records),
                slices=len(records),
                patients=len({one.patient for one in records}),
            )
            for name in ("found", "used")
        ),
        image_slices=len(records),
    )
    return Slices(
        intake=intake,
        images=scaled(np.array(values, np.float64).reshape(len(records), len(names))),
        measures=[],
        fingerprint=hmac.digest(key, b"measures:" + content, hashlib.sha256).hex()[:32],
        opted_out=frozenset(gone),
        built=False,
    )


def _finite(text: str | None, path: Path, row: int, name: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _bad(f"{path}: row {row}, {name}: not a finite number")
    return value


def _bad(what: str, *, others: int = 0) -> DataError:
    more = f" and {others} more" if others else ""
    return DataError(
        what + more,
        code="bad-measures",
        hint="write the table again: fedqc data import mriqc IQMS RATINGS OUT",
    )


def _record(path: Path, number: int, file: str, patient: str, key: bytes) -> SliceRecord:
    """What the index knows of a slice, of which a scan has next to nothing."""
    forms, near = forms_of(patient, "", key)
    who = pseudonym(patient, key)
    scan = pseudonym(f"scan:{file}", key)
    return SliceRecord(
        number=number,
        file=file,
        root=path.parent,
        place=path.name,
        frame=0,
        row=number - 1,
        content="",
        patient=who,
        study=scan,
        series=scan,
        image=scan,
        accession="",
        scanner="",
        series_number=None,
        instance_number=None,
        modality="MR",
        rows=0,
        columns=0,
        bits=0,
        pixel_spacing_mm=None,
        slice_thickness_mm=None,
        slice_position_mm=None,
        phase_encoding=None,
        manufacturer="",
        model="",
        field_strength_t=None,
        kvp=None,
        kernel="",
        sequence="",
        echo_time_ms=None,
        repetition_time_ms=None,
        study_date="",
        series_description="",
        body_part="",
        age_years=None,
        imported=True,
        patient_forms=forms,
        patient_near=near,
    )
