"""Small images that fedqc wrote, or seems not to have written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice


def write(path: Path, patient: str = "PHANTOM-0001", *, ours: bool = True, **header: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = HeaderFacts(
        modality="CT",
        pixel_spacing_mm=1.0,
        patient_id=patient,
        study_uid=make_uid(b"study"),
        series_uid=make_uid(b"series"),
        sop_uid=make_uid(path.name.encode()),
        instance_number=1,
    )
    write_slice(path, np.zeros((8, 8)), facts)
    if not ours or header:
        dataset = pydicom.dcmread(path)
        for name, value in header.items():
            setattr(dataset, name, value)
        if not ours:
            dataset.file_meta.ImplementationVersionName = "SCANNER 1"
        dataset.save_as(path)
