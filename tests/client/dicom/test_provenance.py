"""A few files of a folder say who wrote them and whether they name persons."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.dicom.provenance import SAMPLE, is_generated, looks_real, sample, with_real_ids
from tests.helpers.own_slices import write


def test_a_folder_is_generated_only_if_every_dicom_file_that_is_looked_at_says_so(tmp_path: Path) -> None:
    assert is_generated(tmp_path / "nowhere") is None
    (tmp_path / "notes.txt").write_text("no image")
    assert is_generated(tmp_path) is None
    for number in range(5):
        write(tmp_path / "a" / f"{number}.dcm")
    assert is_generated(tmp_path) is True
    (tmp_path / "a" / "2.dcm").write_bytes(b"damaged since")
    (tmp_path / "a" / "3.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"damaged since")
    assert is_generated(tmp_path) is True
    write(tmp_path / "b" / "scan.dcm", ours=False)
    assert is_generated(tmp_path) is False


def test_the_sample_is_spread_over_the_folder(tmp_path: Path) -> None:
    for number in range(3 * SAMPLE):
        (tmp_path / f"{number:04d}").touch()
    looked = sample(tmp_path)
    assert len(looked) == len(set(looked)) == SAMPLE
    assert looked[-1].name == f"{3 * SAMPLE - 3:04d}"
    assert sample(tmp_path, 1000) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("patient_id", "name", "birth"),
    [
        ("MUELLER^ANNA", "", ""),
        ("17", "Müller^Anna", ""),
        ("17", "王芳", ""),
        ("17", "", "19611224"),
        ("4711-19611224", "", ""),
        ("20240315001", "", ""),
        ("00123456", "", ""),
        ("MR0012345", "", ""),
    ],
)
def test_persons_are_seen(patient_id: str, name: str, birth: str) -> None:
    assert looks_real(patient_id, name, birth)


@pytest.mark.parametrize(
    "patient_id",
    [
        *("PHANTOM-0-0012", "HOSPITAL-A-B03-V02", "LIDC-IDRI-0314", "P-12", "ANONYMOUS", "sub-017", ""),
        *("7c9e6679", "3f2504e04f8911d39a0c0305e82c3301", "1.3.6.1.4.1.9328.50.1.0001", "volunteer 4"),
    ],
)
def test_generated_names_and_pseudonyms_are_not(patient_id: str) -> None:
    for name in ("", patient_id, "ANONYMOUS"):
        assert not looks_real(patient_id, name, "")
    assert not looks_real(patient_id, "", "19000101")


def test_files_that_name_a_person_are_counted_and_nobody_is_named(tmp_path: Path) -> None:
    write(tmp_path / "1.dcm")
    write(tmp_path / "2.dcm", "P-1", ours=False, PatientName="P-1")
    write(tmp_path / "4.dcm", ours=False, PatientName="Wang^Fang")
    (tmp_path / "3.dcm").write_bytes(b"\xff" * 200)
    assert with_real_ids(tmp_path) == 1
