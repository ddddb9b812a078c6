"""Tiny collections in the layout of public ones: pictures with a sheet, MR-ART, IXI, figshare, TCIA."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
from openpyxl import Workbook
from PIL import Image

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from tests.helpers.injected import ct_slice, mr_slice

SIDECAR = {  # of MR-ART: a sagittal MPRAGE
    "Modality": "MR",
    "MagneticFieldStrength": 3,
    "Manufacturer": "Siemens",
    "ManufacturersModelName": "Prisma",
    "BodyPartExamined": "HEAD",
    "MRAcquisitionType": "3D",
    "SeriesDescription": "MPRAGE_conventional",
    "ScanningSequence": "GR\\IR",
    "SequenceVariant": "SK\\SP\\MP",
    "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "NORM"],
    "SliceThickness": 1,
    "EchoTime": 0.00303,
    "RepetitionTime": 2.3,
    "InversionTime": 0.9,
    "FlipAngle": 9,
    "PixelBandwidth": 130,
    "ImageOrientationPatientDICOM": [0, 1, 0, 0, 0, -1],
    "InPlanePhaseEncodingDirectionDICOM": "ROW",
}


def grey(position: int = 0, kind: int = 0) -> np.ndarray:
    """A head as 8 bits."""
    image = mr_slice(position, kind)
    return (255 * image / image.max()).astype(np.uint8)


def save(path: Path, image: np.ndarray, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **how)
    return path


def write_csv(path: Path, rows: Iterable[Sequence[object]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_xlsx(path: Path, rows: Iterable[Sequence[object]]) -> Path:
    book = Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)
    return path


def head(side: int = 24, seed: int = 0) -> np.ndarray:
    """A volume that tells its axes apart: int16 (side, side + 4, side + 8), background 0."""
    shape = (side, side + 4, side + 8)
    grids = np.meshgrid(*(np.linspace(-1, 1, length) for length in shape), indexing="ij")
    inside = sum(grid**2 for grid in grids) < 0.8
    noise = np.random.default_rng(seed).integers(0, 40, shape)
    ramp = 100 * (grids[0] + 1) + 200 * (grids[1] + 1) + 400 * (grids[2] + 1)
    return np.where(inside, 100 + ramp + noise, 0).astype(np.int16)


def save_nifti(path: Path, volume: np.ndarray, zooms: Sequence[float] = (1, 1, 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = [-10, -20, -30]
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def mr_art(root: Path, people: int = 3) -> Path:
    """BIDS, three scans a person, each with its score in scans.tsv; MRIQC's results in derivatives/."""
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "MR-ART", "License": "CC0"}')
    write_csv(
        root / "participants.tsv",
        [["participant_id", "sex", "age"], *([f"sub-{n:06d}", "FM"[n % 2], "24.45"] for n in range(people))],
        "\t",
    )
    for person in range(people):
        name = f"sub-{person:06d}"
        rows: list[list[object]] = [["filename", "score"]]
        for score, acquisition in enumerate(("standard", "headmotion1", "headmotion2"), start=1):
            stem = f"{name}_acq-{acquisition}_T1w"
            save_nifti(root / name / "anat" / f"{stem}.nii.gz", head(seed=10 * person + score))
            (root / name / "anat" / f"{stem}.json").write_text(json.dumps(SIDECAR))
            rows.append([f"anat/{stem}.nii.gz", score])
        write_csv(root / name / f"{name}_scans.tsv", rows, "\t")
    save_nifti(root / "derivatives" / "mriqc" / "sub-000000_desc-mask_T1w.nii.gz", head())
    save_nifti(root / "sub-000000" / "anat" / "sub-000000_acq-standard_T1map.nii.gz", head())
    return root


def ixi(root: Path) -> Path:
    for person, (site, code) in enumerate((("Guys", "0828"), ("HH", "1211"), ("IOP", "0921")), start=2):
        save_nifti(root / f"IXI{person:03d}-{site}-{code}-T1.nii.gz", head(seed=person), (1.2, 0.9, 0.9))
    return root


def save_mat(path: Path, image: np.ndarray, pid: str = "100360", label: int = 1) -> Path:
    """As MATLAB 7.3 writes a structure: HDF5 behind a header, arrays transposed, text as character codes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        group = file.create_group("cjdata")
        group["image"] = image.T
        group["PID"] = np.array([[ord(letter)] for letter in pid], np.uint16)
        group["label"] = np.array([[float(label)]])
        group["tumorBorder"] = np.zeros((1, 8))
        group["tumorMask"] = np.zeros(image.T.shape, np.uint8)
    return path


def tcia(root: Path, patients: Sequence[str], maker: str = "SIEMENS", slices: int = 2) -> Path:
    """A folder a patient, study and series, as the NBIA Data Retriever lays them."""
    for patient in patients:
        for number in range(slices):
            path = root / patient / "01-01-2000-CT" / "3.000000-chest" / f"1-{number + 1:02d}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            scanner_slice(path, patient, number, maker)
    return root


def scanner_slice(path: Path, patient: str, number: int, maker: str = "SIEMENS") -> None:
    """An original CT slice of another writer than fedqc."""
    import pydicom

    facts = HeaderFacts(
        modality="CT",
        pixel_spacing_mm=0.7,
        patient_id=patient,
        study_uid=make_uid(f"study {patient}".encode()),
        series_uid=make_uid(f"series {patient}".encode()),
        sop_uid=make_uid(f"{patient} {path}".encode()),
        instance_number=number + 1,
        slice_position_mm=5.0 * number,
        manufacturer=maker,
    )
    write_slice(path, ct_slice(number + len(patient)), facts)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.ImplementationVersionName = "SCANNER 1"
    dataset.PatientName = patient
    dataset.save_as(path)


def rows_of(site: Path) -> list[dict[str, str]]:
    with (site / "labels.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def about(site: Path) -> dict[str, dict[str, Any]]:
    """What imported.jsonl says, by the picture."""
    lines = (site / "imported.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["source"]: line for line in map(json.loads, lines)}
