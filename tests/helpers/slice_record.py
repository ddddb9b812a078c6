"""The record of one slice, for tests that change one field."""

from __future__ import annotations

from pathlib import Path

from client.dicom.index import SliceRecord

RECORD = SliceRecord(
    number=1,
    file="a.dcm",
    root=Path(),
    place="a.dcm",
    frame=0,
    row=0,
    content="",
    patient="p",
    study="s",
    series="r",
    image="i",
    accession="",
    scanner="x",
    series_number=1,
    instance_number=1,
    modality="MR",
    rows=16,
    columns=16,
    bits=16,
    pixel_spacing_mm=(1.0, 1.0),
    slice_thickness_mm=5.0,
    slice_position_mm=0.0,
    phase_encoding=None,
    manufacturer="SIEMENS",
    model="TrioTim",
    field_strength_t=3.0,
    kvp=None,
    kernel="",
    sequence="SE SK",
    echo_time_ms=30.0,
    repetition_time_ms=3000.0,
    study_date="20240115",
    series_description="",
    body_part="BRAIN",
    age_years=None,
)
