"""Slices to inject artifacts into, maps for them, and what came out."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np

from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.simulation.injection import (
    inject,
)

SIDE = 64
Y, X = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]


def ct_slice(position: int) -> np.ndarray:
    """A body with two dense bones."""
    image = np.where((Y / 0.7) ** 2 + (X / 0.9) ** 2 < 1, 40.0 + position, -1000.0)
    for centre in (-0.5, 0.5):
        image[(Y / 0.15) ** 2 + ((X - centre) / 0.12) ** 2 < 1] = 1200.0
    return image


def mr_slice(position: int, kind: int) -> np.ndarray:
    """A head: fat, skull, brain; of several contrasts."""
    radius = np.sqrt((Y / 0.8) ** 2 + (X / 0.7) ** 2)
    brain = 300.0 + 60 * kind + 40 * np.sin(9 * X + position) * np.cos(7 * Y)
    return np.select([radius > 1, radius > 0.86, radius > 0.78], [0.0, 900.0, 60.0], brain)


def write(path: Path, image: np.ndarray, patient: str, number: int, *, ct: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slice(
        path,
        image,
        HeaderFacts(
            modality="CT" if ct else "MR",
            pixel_spacing_mm=5.0,
            patient_id=patient,
            study_uid=make_uid(f"study {patient}".encode()),
            series_uid=make_uid(f"series {patient}".encode()),
            sop_uid=make_uid(f"{path}".encode()),
            instance_number=number,
            slice_position_mm=4.0 * number,
            manufacturer="ACME",
        ),
    )


def write_map(path: Path, hospitals: dict[str, object], **fields: object) -> Path:
    whole = {
        "labels": "labels.csv",
        "versions": {"clean": 1, "each": 1, "together": 0},
        **fields,
        "hospitals": hospitals,
    }
    path.write_text(json.dumps(whole))
    return path


BOTH = {
    "h1": [
        {"folder": "scanner_ct", "accept": ["no_artifact"]},
        {"folder": "scanner_mr", "accept": ["no_artifact"]},
    ]
}


def run(src: Path, out: Path, map_file: Path, seed: int = 7) -> list[str]:
    said: list[str] = []
    inject(src, out, map_file=map_file, seed=seed, say=said.append)
    return said


def rows_of(site: Path) -> list[dict[str, str]]:
    with (site / "labels.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
