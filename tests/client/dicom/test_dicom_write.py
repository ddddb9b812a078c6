"""What is written reads back, and is the same for the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from client.dicom.dicom import IMPORTER, WRITER, exclusion, read_header, read_pixels
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice


@pytest.mark.parametrize(
    ("modality", "storage"),
    [
        ("CT", (12, False, 1.0, -1024.0)),
        ("CT", (16, True, 1.0, 0.0)),
        ("CT", (16, True, 0.5, -3.25)),
        ("MR", (12, False, 1.0, 0.0)),
        ("MR", (16, False, 0.1, 0.0)),
    ],
)
def test_written_slice_reads_back_to_within_half_a_step(
    tmp_path: Path, modality: str, storage: tuple[int, bool, float, float]
) -> None:
    bits, signed, slope, intercept = storage
    image = np.random.default_rng(1).uniform(0, 1000, (31, 17)).astype(np.float32)
    path = tmp_path / "a.dcm"
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=modality,  # type: ignore[arg-type]
            pixel_spacing_mm=(0.7, 0.9),
            patient_id="P1",
            study_uid=make_uid(b"a"),
            series_uid=make_uid(b"b"),
            sop_uid=make_uid(b"c"),
            instance_number=2,
            slice_position_mm=-7.5,
            slope=slope,
            intercept=intercept,
            bits_stored=bits,
            signed=signed,
            phase_encoding="ROW" if modality == "MR" else None,
            field_strength_t=1.5 if modality == "MR" else None,
            kvp=120 if modality == "CT" else None,
        ),
    )
    back, header = read_pixels(path), read_header(path)
    assert back.dtype == np.float32
    assert np.abs(back - image).max() <= slope / 2 + 1e-3
    assert (header.modality, header.rows, header.columns, header.bits) == (modality, 31, 17, bits)
    assert header.pixel_spacing_mm == (0.7, 0.9)
    assert header.slice_position_mm == -7.5
    assert (header.phase_encoding, header.field_strength_t, header.kvp) == (
        ("ROW", 1.5, None) if modality == "MR" else (None, None, 120.0)
    )
    assert exclusion(header) is None
    assert list(tmp_path.iterdir()) == [path]


def test_writing_clips_to_what_the_bits_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    ids = {
        "patient_id": "P",
        "study_uid": make_uid(b"a"),
        "series_uid": make_uid(b"b"),
        "sop_uid": make_uid(b"c"),
    }
    write_slice(
        path,
        np.array([[-5000.0, 9000.0]]),
        HeaderFacts(
            modality="CT",
            pixel_spacing_mm=1,
            instance_number=1,
            intercept=-1024,
            bits_stored=12,
            signed=False,
            **ids,
        ),
    )  # type: ignore[arg-type]
    assert read_pixels(path).tolist() == [[-1024.0, 3071.0]]


def test_uids_are_deterministic_and_valid() -> None:
    assert make_uid(b"x") == make_uid(b"x") != make_uid(b"y")
    assert pydicom.uid.UID(make_uid(b"x")).is_valid


def test_simulated_slices_are_derived_and_still_used(tmp_path: Path) -> None:
    """`data inject` writes DERIVED slices to be trained on. Another writer's are left out, and so are these
    once it has rewritten them.
    """
    ids = {
        "patient_id": "P",
        "study_uid": make_uid(b"a"),
        "series_uid": make_uid(b"b"),
        "sop_uid": make_uid(b"c"),
    }
    path = tmp_path / "a.dcm"
    write_slice(
        path,
        np.eye(4),
        HeaderFacts(
            modality="MR",
            pixel_spacing_mm=1,
            instance_number=1,
            derived=True,
            **ids,
        ),
    )  # type: ignore[arg-type]
    header = read_header(path)
    assert header.image_type[0] == "DERIVED"
    assert header.simulated
    assert exclusion(header) is None
    dataset = pydicom.dcmread(path)
    assert dataset.file_meta.ImplementationVersionName == WRITER
    dataset.file_meta.ImplementationVersionName = "ARCHIVE 1"
    dataset.save_as(path)
    assert exclusion(read_header(path)) == "derived"


def test_how_a_slice_was_acquired_is_written(tmp_path: Path) -> None:
    """Injected susceptibility uses the physics of the sequence: a spin echo stays one."""
    common = {
        "pixel_spacing_mm": 1.0,
        "patient_id": "P1",
        "study_uid": make_uid(b"a"),
        "series_uid": make_uid(b"b"),
        "sop_uid": make_uid(b"c"),
        "instance_number": 1,
    }
    image = np.random.default_rng(2).uniform(0, 1000, (16, 16))
    acquired = {
        "scanning_sequence": ("EP", "SE"),
        "sequence_variant": ("SK", "OSP"),
        "echo_time_ms": 87.5,
        "repetition_time_ms": 4200.0,
        "pixel_bandwidth_hz": 1502.4,
    }
    write_slice(tmp_path / "mr", image, HeaderFacts(modality="MR", **common, **acquired))  # type: ignore[arg-type]
    header = read_header(tmp_path / "mr")
    assert {name: getattr(header, name) for name in acquired} == acquired
    assert header.sequence == r"EP\SE SK\OSP"
    write_slice(
        tmp_path / "ct",
        image,
        HeaderFacts(modality="CT", kernel="B30f", kvp=100, **common),  # type: ignore[arg-type]
    )
    header = read_header(tmp_path / "ct")
    assert (header.kernel, header.kvp) == ("B30f", 100.0)


def imported(path: Path, patient: str = "P", **facts: Any) -> Path:
    write_slice(
        path,
        np.full((4, 6), 7.0),
        HeaderFacts(
            modality="MR",
            patient_id=patient,
            study_uid=make_uid(b"a"),
            series_uid=make_uid(b"b"),
            sop_uid=make_uid(path.name.encode()),
            instance_number=1,
            imported_from="PNG",
            **{
                "pixel_spacing_mm": None,
                "slice_thickness_mm": None,
                "slice_position_mm": None,
                "manufacturer": "",
                "model": "",
                "scanning_sequence": (),
                "sequence_variant": (),
                **facts,
            },
        ),
    )
    return path


def test_an_imported_slice_says_what_it_is_and_nothing_else(tmp_path: Path) -> None:
    path = imported(tmp_path / "a.dcm")
    dataset, header = pydicom.dcmread(path), read_header(path)
    assert dataset.file_meta.ImplementationVersionName == IMPORTER
    assert list(dataset.ImageType) == ["DERIVED", "SECONDARY", "OTHER"]
    assert (dataset.ConversionType, "PNG" in dataset.DerivationDescription) == ("WSD", True)
    equipment = dataset.ContributingEquipmentSequence[0]
    assert equipment.ManufacturerModelName == "fedqc data import"
    assert equipment.PurposeOfReferenceCodeSequence[0].CodeValue == "109103"
    for keyword in ("PixelSpacing", "SliceThickness", "ImagePositionPatient", "ImageOrientationPatient"):
        assert keyword not in dataset
    for keyword in ("PatientPosition", "BurnedInAnnotation", "MRAcquisitionType", "FrameOfReferenceUID"):
        assert keyword not in dataset
    assert (header.manufacturer, header.sequence, header.field_strength_t) == ("", "", None)
    assert (header.imported, header.simulated) == (True, False)
    assert np.array_equal(read_pixels(path), np.full((4, 6), 7.0))


def test_an_imported_slice_is_secondary_to_every_other_reader(tmp_path: Path) -> None:
    """Without the mark nothing takes it for a scanner's image."""
    path = imported(tmp_path / "a.dcm")
    assert exclusion(read_header(path)) is None
    dataset = pydicom.dcmread(path)
    dataset.file_meta.ImplementationVersionName = "ARCHIVE 1"
    dataset.save_as(path)
    assert exclusion(read_header(path)) == "secondary"


def test_an_imported_slice_keeps_what_is_known(tmp_path: Path) -> None:
    path = imported(
        tmp_path / "a.dcm",
        pixel_spacing_mm=(0.5, 0.75),
        slice_position_mm=3.0,
        orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
        corner_mm=(-3.0, 1.0, 2.0),
        lossy_method="ISO_10918_1",
        elements={"PatientAge": "024Y", "FlipAngle": "9"},
    )
    header, dataset = read_header(path), pydicom.dcmread(path)
    assert header.pixel_spacing_mm == (0.5, 0.75)
    assert header.slice_position_mm == 3.0  # along the normal, which is -x
    assert [float(value) for value in dataset.ImagePositionPatient] == [-3.0, 1.0, 2.0]
    assert (header.age_years, header.lossy, dataset.FlipAngle) == (24.0, True, 9)
    assert exclusion(header) == "lossy"
    assert exclusion(header, lossy="use") is None
