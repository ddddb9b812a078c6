"""Every file is accounted for, patients keep together, nothing in the public form names anybody."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest

from client.dicom.cache import load_or_build
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.index import Intake, patient_pseudonyms, pseudonym, split_of
from common.errors import DataError

KEY = bytes(range(32))


def intake_of(root: Path, key: bytes = KEY) -> Intake:
    with tempfile.TemporaryDirectory() as cache:
        return load_or_build(root, key, Path(cache), 16).intake


def write(
    path: Path, *, patient: str = "P1", uid: str | None = None, value: float = 0.0, **changes: object
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(int(value)).integers(-900, 900, (16, 16)).astype(float)
    write_slice(
        path,
        image,
        HeaderFacts(
            modality="CT",
            pixel_spacing_mm=1.0,
            patient_id=patient,
            study_uid=make_uid(patient.encode()),
            series_uid=make_uid(patient.encode() + b"s"),
            sop_uid=uid or make_uid(str(path).encode()),
            instance_number=1,
        ),
    )
    if changes:
        dataset = pydicom.dcmread(path)
        for keyword, new in changes.items():
            setattr(dataset, keyword, new)
        dataset.save_as(path)
    return path


def messy(root: Path) -> Path:
    for number in range(6):
        write(root / f"a/{number}.dcm", patient=f"P{number % 3}", value=number)
    same = make_uid(b"same")
    for name in ("b/dup1", "b/dup2", "b/dup3"):
        write(root / name, uid=same, value=50)
    for name, value in (("b/conflict1", 60), ("b/conflict2", 61)):
        write(root / name, uid=make_uid(b"conflict"), value=value)
    write(root / "c/localizer.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write(root / "c/burned.dcm", BurnedInAnnotation="YES")
    (root / "c/notes.txt").write_text("P1 is well")
    cut = write(root / "c/cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-5])
    return root


def test_found_is_used_plus_quarantined_plus_duplicates_plus_excluded(tmp_path: Path) -> None:
    intake = intake_of(messy(tmp_path))
    assert intake.found == 15
    assert len(intake.records) == 7
    assert len(intake.duplicates) == 2
    assert sorted(problem.code for problem in intake.quarantined) == [
        "conflict",
        "conflict",
        "truncated",
    ]
    assert sorted(problem.code for problem in intake.excluded) == ["burned-in", "foreign-file", "localizer"]
    assert [record.number for record in intake.records] == sorted(record.number for record in intake.records)


def test_an_intake_that_does_not_reconcile_cannot_exist(tmp_path: Path) -> None:
    intake = intake_of(messy(tmp_path))
    with pytest.raises(AssertionError):
        dataclasses.replace(intake, found=16)
    with pytest.raises(AssertionError):
        dataclasses.replace(intake, used=intake.used - 1, duplicates=(*intake.duplicates, 1))


def test_good_files_do_not_notice_bad_neighbours(tmp_path: Path) -> None:
    alone, crowd = tmp_path / "alone", messy(tmp_path / "crowd")
    for number in range(6):
        (alone / "a").mkdir(parents=True, exist_ok=True)
        shutil.copy2(crowd / f"a/{number}.dcm", alone / f"a/{number}.dcm")

    def seen(root: Path) -> list[tuple[str, str]]:
        return [
            (record.file, record.patient)
            for record in intake_of(root).records
            if record.file.startswith("a/")
        ]

    assert seen(alone) == seen(crowd)
    assert len(seen(alone)) == 6


def test_a_shared_uid_of_two_patients_warns_and_removes_nothing(tmp_path: Path) -> None:
    """What happens to a patient's slices hangs on that patient alone: otherwise the privacy unit would be two
    patients.
    """
    for patient in ("P1", "P2"):
        write(tmp_path / patient, patient=patient, uid=make_uid(b"same"), value=ord(patient[1]))
    intake = intake_of(tmp_path)
    assert len(intake.records) == 2
    assert intake.shared_uids == 1


def test_the_index_is_deterministic(tmp_path: Path) -> None:
    root = messy(tmp_path)
    assert intake_of(root) == intake_of(root)


def test_the_flow_counts_files_slices_and_patients_at_every_step(tmp_path: Path) -> None:
    flow = {step.name: (step.files, step.slices, step.patients) for step in intake_of(messy(tmp_path)).flow}
    assert flow == {
        "found": (15, 13, 3),
        "readable": (14, 13, 3),
        "CT and MR, original and primary": (11, 11, 3),
        "in the cohort": (11, 11, 3),
        "used": (7, 7, 3),
    }


def test_the_patient_of_an_opt_out_list_is_the_one_of_the_header_in_any_character_set() -> None:
    for charset in ("utf-8", "gb18030"):
        raw = "病人7".encode(charset).decode("latin-1")
        assert pseudonym(f"PatientID:{raw}", KEY) in patient_pseudonyms(" 病人7 ", KEY)
    assert patient_pseudonyms("P1", KEY) == {
        pseudonym("PatientID:P1", KEY),
        pseudonym("patient-normalised:P1", KEY),
    }


def test_the_public_form_names_nobody(tmp_path: Path) -> None:
    intake = intake_of(messy(tmp_path))
    text = json.dumps(intake.public())
    for secret in ("P1", str(tmp_path), ".dcm", "2.25.", "notes", intake.records[0].patient):
        assert secret not in text
    assert all(
        "P1" not in str(dataclasses.asdict(record) | {"path": "", "file": ""}) for record in intake.records
    )


def test_pseudonyms_need_the_key() -> None:
    assert pseudonym("P1", KEY) == pseudonym("P1", KEY) != pseudonym("P1", bytes(32))
    assert len(pseudonym("P1", KEY)) == 16


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        intake_of(tmp_path / "absent")
    assert caught.value.code == "no-such-folder"


def test_an_empty_folder_is_an_empty_intake(tmp_path: Path) -> None:
    assert intake_of(tmp_path).found == 0


def test_split_shares_hold_on_average_and_never_move() -> None:
    names = [f"patient {number}" for number in range(4000)]
    parts = [split_of(name, KEY, 0.6, 0.1, 0.3) for name in names]
    assert parts.count("train") / 4000 == pytest.approx(0.6, abs=0.03)
    assert parts.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert parts == [split_of(name, KEY, 0.6, 0.1, 0.3) for name in names]
    assert parts == [split_of(name, KEY, 6, 1, 3) for name in names]
    assert [split_of(name, KEY, 1, 0, 0) for name in names[:50]] == ["train"] * 50
    assert [split_of(name, KEY, 0, 0, 1) for name in names[:50]] == ["test"] * 50
    assert parts != [split_of(name, bytes(32), 0.6, 0.1, 0.3) for name in names]


@pytest.mark.parametrize("shares", [(-0.1, 0.5, 0.6), (0, 0, 0)])
def test_split_refuses_impossible_shares(shares: tuple[float, float, float]) -> None:
    with pytest.raises(DataError):
        split_of("x", KEY, *shares)
