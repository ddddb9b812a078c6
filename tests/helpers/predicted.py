"""Slices for `fedqc predict`, and thresholds that call every image positive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.predict.operating_point import OperatingPoints, Point
from common.artifacts import DEFAULT_LABELS

POINT = Point(
    origin="phantoms",
    threshold=-50.0,
    sensitivity=0.9,
    specificity=0.8,
    positives=20,
    negatives=30,
    slope=1.0,
    offset=0.0,
)
ALARMS = OperatingPoints(
    images=dict.fromkeys(DEFAULT_LABELS, POINT), patients=dict.fromkeys(DEFAULT_LABELS, POINT)
)  # every image is called positive


def write(path: Path, seed: int, *, patient: str = "MUELLER", modality: str = "CT", **header: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    series = str(header.pop("series", "r"))
    image = np.random.default_rng(seed).uniform(-200, 900, (32, 32))
    if modality == "MR":
        image += 200
    write_slice(
        path,
        image if header.pop("body", True) else np.full((32, 32), -1000.0),
        HeaderFacts(
            modality=modality,  # type: ignore[arg-type]
            pixel_spacing_mm=1.0,
            patient_id=patient,
            study_uid=make_uid(f"{patient}/s".encode()),
            series_uid=make_uid(f"{patient}/{modality}/{series}".encode()),
            sop_uid=make_uid(str(path).encode()),
            instance_number=seed,
            slice_position_mm=float(seed),
            manufacturer="SIEMENS",
            model="Verio",
            intercept=-1024.0 if modality == "CT" else 0.0,
            kvp=120.0 if modality == "CT" else None,
        ),
    )
    if header:
        dataset = pydicom.dcmread(path)
        for keyword, content in header.items():
            setattr(dataset, keyword, content)
        dataset.save_as(path)
    return path
