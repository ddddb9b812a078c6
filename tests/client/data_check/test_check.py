"""What `fedqc data check` says of a folder: the verdict, why, what to do; and what it never says."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import yaml

import client.dicom.cache as cache_module
from client.data.cohort import admit_quarantine, check_site, load_cohort, open_slices, patient_forms
from client.data_check.check import Readiness, examine, look, paths_text
from client.data_check.page import render
from client.data_check.text import report_text
from client.data_check.words import LANGUAGES
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.site.config import next_bucket, nominal_bucket, read_site
from client.site.site_ledger import open_ledger
from client.supervision.preflight import check_data
from common.errors import ConfigError, DataError
from common.i18n import speaker
from common.plan import Split
from common.progress_bar import progress_shown
from tests.helpers.command_line import typed
from tests.helpers.translations import assert_same_sentences

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
SIZE = 32
SITE = {"name": "site-a", "kind": "synthetic", "cohort": "phantoms", "nominal_patients": 50}


@pytest.fixture(autouse=True)
def _cache_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def write(
    path: Path,
    patient: str,
    value: int,
    modality: str = "CT",
    image: np.ndarray | None = None,
    **header: object,
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if image is None:
        image = np.random.default_rng(value).uniform(0, 900, (16, 16))
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=modality,
            pixel_spacing_mm=1.0,
            patient_id=patient,
            study_uid=make_uid(patient.encode()),  # type: ignore[arg-type]
            series_uid=make_uid(patient.encode() + b"r"),
            sop_uid=make_uid(str(path).encode()),
            instance_number=1,
            manufacturer="SIEMENS",
            model="Verio",
            kvp=120.0 if modality == "CT" else None,
        ),
    )
    if header:
        dataset = pydicom.dcmread(path)
        for keyword, content in header.items():
            setattr(dataset, keyword, content)
        dataset.save_as(path)
    return path


def site(
    folder: Path, *, patients: int = 12, header: dict[str, object] | None = None, **fields: object
) -> Path:
    """CT and MR patients of two slices, labelled; parts fixed so that both sides of each artifact are in
    train and test.
    """
    rows = ["file,metal,motion,part"]
    for patient in range(patients):
        for number in range(2):
            mr, file = patient % 2, f"p{patient:03}/{number}.dcm"
            dated = {"StudyDate": f"2024{1 + patient % 12:02}15", "DeviceSerialNumber": f"S{patient % 3}"} | (
                header or {}
            )
            write(
                folder / "images" / file, f"P-{patient}", 10 * patient + number, "MR" if mr else "CT", **dated
            )
            value = patient // 2 % 2
            rows.append(
                f"{file},{'' if mr else value},{value if mr else ''},{'train' if patient % 3 else 'test'}"
            )
    (folder / "labels.csv").write_text("\n".join(rows))
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | fields))
    return folder


def examined(folder: Path, **how: Any) -> Readiness:
    return examine(look(folder, size=SIZE), **how)


def codes(found: Readiness, level: str | None = None) -> set[str]:
    return {finding.code for finding in found.findings if level in (None, finding.level)}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    return typed(capsys, "data", "check", *words)


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# verdicts


def test_a_good_site_is_ready_but_for_its_few_patients(tmp_path: Path) -> None:
    found = examined(site(tmp_path, nominal_patients=10))
    assert (found.verdict, codes(found)) == ("ready with warnings", {"few-patients"})
    assert found.artifact_patients["metal"] == {
        "train": {"present": 2, "absent": 2},
        "validation": {"present": 0, "absent": 0},
        "test": {"present": 1, "absent": 1},
    }


def test_the_slices_of_a_patient_are_told_by_class(tmp_path: Path) -> None:
    """Where patients with an artifact have more slices, their length alone tells them apart."""
    folder = site(tmp_path, nominal_patients=10)
    sheet = folder / "labels.csv"
    rows = [
        row.replace(",1,", ",,") if row.startswith("p002/0") else row for row in sheet.read_text().split()
    ]
    sheet.write_text("\n".join(rows))
    found = examined(folder)
    assert found.artifact_slices["metal"] == {"present": (1, 2.0, 2), "absent": (2, 2.0, 2)}
    text = report_text(found, speaker("en", LANGUAGES))
    assert re.search(r"Slices of a patient .*\n.*\n +metal +2 \(1 – 2\) +2 \(2 – 2\)", text)


def test_enough_patients_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.data_check.check.FEW_PATIENTS", 12)
    found = examined(site(tmp_path, nominal_patients=10))
    assert (found.verdict, found.findings) == ("ready", ())


def test_the_report_is_that_of_check_site_and_more(tmp_path: Path) -> None:
    folder = site(tmp_path)
    before = check_site(folder, size=SIZE)
    assert examined(folder).public().items() >= before.items()


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (None, "labels-missing"),
        ("file,metal\np000/0.dcm,maybe\n", "label-problems"),
        ("file,metal\np000/0.dcm,1\np000/0.dcm,1\n", "label-problems"),
        ("file,metal\nelsewhere.dcm,1\n", "labels-match-nothing"),
        ("file,metal,part\np000/0.dcm,1,train\np000/1.dcm,1,test\n", "leak"),
        ("file,metal,part\np000/0.dcm,1,train\np000/0.dcm,1,test\n", "label-problems"),
    ],
)
def test_labels_that_stop_a_site(tmp_path: Path, rows: str | None, code: str) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").unlink()
    if rows is not None:
        (folder / "labels.csv").write_text(rows)
    found = examined(folder)
    assert found.verdict == "not ready"
    assert codes(found, "stop") == {code}
    assert found.public()["used"] == 24, "the images are reported all the same"


def test_a_sheet_that_is_no_sheet(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").write_bytes(b"\0\1\2")
    assert codes(examined(folder), "stop") == {"labels-unreadable"}


def test_every_problem_of_the_sheet_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").write_text("file,metal\np000/0.dcm,SECRETCELL\np000/1.dcm,7\np000/1.dcm,1\n")
    status, out, err = run(capsys, folder, "--format", "json")
    assert status == 2
    assert [problem["row"] for problem in json.loads(out)["problems"]] == [2, 3, 4]
    status, text, _ = run(capsys, folder)
    assert (
        status,
        text.count("  [bad-label] row") + text.count("  [duplicate-label] row"),
        "SECRET" in out + text + err,
    ) == (2, 3, False)


def test_one_sided_artifacts_are_named(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").write_text(
        "file,metal,part\np000/0.dcm,1,test\np002/0.dcm,0,train\np004/0.dcm,1,train\n"
    )
    (one,) = [finding for finding in examined(folder).findings if finding.code == "one-sided"]
    assert one.values["where"] == "metal (test: 0 absent)"


def test_no_file_and_no_usable_file(tmp_path: Path) -> None:
    folder = site(tmp_path)
    for path in (folder / "images").rglob("*.dcm"):
        path.write_bytes(b"no image")
    found = examined(folder)
    assert {"no-usable-images", "too-many-quarantined"} <= codes(found, "stop")
    assert found.public()["found"] == 24
    for path in (folder / "images").rglob("*.dcm"):
        path.unlink()
    found = examined(folder)
    assert "no-files" in codes(found, "stop")
    for language in LANGUAGES:
        assert report_text(found, speaker(language, LANGUAGES))
        assert render(found, language)


def test_many_quarantined_files_stop_until_somebody_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path)
    for number in range(2):
        (folder / "images" / f"SECRETFILE{number}.dcm").write_bytes(b"x")
    status, out, _ = run(capsys, folder)
    assert status == 2
    assert "fedqc data prepare SITE --accept-quarantine" in out
    assert "SECRETFILE" not in out
    _, out, err = run(capsys, folder, "--show-paths")
    assert "SECRETFILE1.dcm" in err
    assert "SECRETFILE" not in out
    admit_quarantine(open_slices(folder), accept=True)
    status, out, _ = run(capsys, folder, "--format", "json")
    assert (status, json.loads(out)["verdict"]) == (0, "ready with warnings")


def test_one_rule_that_leaves_out_much_is_named(tmp_path: Path) -> None:
    folder = site(tmp_path)
    for patient in range(0, 12, 2):
        write(
            folder / f"images/p{patient:03}/1.dcm",
            f"P-{patient}",
            1,
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
        )
    (one,) = [finding for finding in examined(folder).findings if finding.code == "many-excluded"]
    assert one.values == {"files": 6, "of": 24, "rule": "localizer"}


def test_a_nominal_number_far_off_is_said(tmp_path: Path) -> None:
    far = examined(site(tmp_path / "a", nominal_patients=200))
    (finding,) = [one for one in far.findings if one.code == "nominal-patients"]
    right = nominal_bucket(finding.values["patients"])
    assert (finding.values["nominal"], finding.values["right"]) == (200, right)
    assert "nominal-patients" not in codes(examined(site(tmp_path / "b", nominal_patients=10)))


def test_headers_that_warn(tmp_path: Path) -> None:
    folder = site(tmp_path, header={"DeviceSerialNumber": "one", "StudyDate": "", "SliceThickness": "500"})
    found = examined(folder)
    assert {"one-scanner", "dates-missing", "implausible-units"} <= codes(found)
    (units,) = [finding for finding in found.findings if finding.code == "implausible-units"]
    assert units.values == {"fields": "24 × slice_thickness_mm"}
    assert found.months is None


def test_one_person_under_two_numbers_in_train_and_test(tmp_path: Path) -> None:
    folder = site(tmp_path)
    image = np.random.default_rng(5).uniform(0, 900, (16, 16))
    write(folder / "images/p000/0.dcm", "P-0", 0, image=image)
    write(
        folder / "images/p004/0.dcm", "P-4", 0, image=image + np.random.default_rng(6).uniform(0, 1, (16, 16))
    )
    found = examined(folder)
    assert {"near-duplicates", "near-duplicates-across-split"} <= codes(found, "warning")
    assert found.public()["near_duplicates"]["pairs_of_files"] == [[1, 9]]
    assert len(found.subject.slices.intake.records) == 24, "it warns and removes nothing"


def test_a_patient_that_nobody_names(tmp_path: Path) -> None:
    folder = site(tmp_path)
    write(folder / "images/p000/0.dcm", "P-0", 0, PatientID="", StudyInstanceUID="", SeriesInstanceUID="")
    (one,) = [finding for finding in examined(folder).findings if finding.code == "no-patient-id"]
    assert one.values == {"slices": 1}


def edited(folder: Path, patient: int, **header: object) -> None:
    """The same change in all headers of a patient."""
    for path in sorted((folder / f"images/p{patient:03}").glob("*.dcm")):
        dataset = pydicom.dcmread(path)
        for keyword, value in header.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)


@pytest.mark.parametrize("patient_id", ["", "ANONYMOUS", "0000", "Unknown"])
def test_a_hospital_without_patient_ids_stops_until_a_fallback_is_named(
    tmp_path: Path, patient_id: str
) -> None:
    folder = site(tmp_path, kind="hospital")
    for patient in (0, 1):
        edited(folder, patient, PatientID=patient_id, PatientName="Li^Wei", PatientBirthDate="19700301")
    edited(folder, 1, StudyInstanceUID=make_uid(b"another study"))
    found = examined(folder)
    assert "patient-id-missing" in codes(found, "stop")
    with pytest.raises(DataError) as caught:
        load_cohort(folder, size=SIZE)
    assert caught.value.code == "patient-id-missing"
    expected = {"name-and-birth-date": (11, "patient"), "study": (12, "study")}
    for fallback, (patients, unit) in expected.items():
        fields = {"kind": "hospital", "patients": {"fallback": fallback}}
        (folder / "site.yaml").write_text(yaml.safe_dump(SITE | fields))
        found = examined(folder)
        assert (found.intake.patients, found.public()["unit"]) == (patients, unit)
        assert codes(found) & {"patient-id-missing", "patient-fallback"} == {"patient-fallback"}
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE))
    assert "patient-id-missing" in codes(examined(folder), "warning"), "generated images stop nothing"


def test_alike_ids_are_listed_and_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site(tmp_path)
    edited(folder, 0, PatientID="SECRET-00100")
    edited(folder, 3, PatientID="secret-100")
    (one,) = [finding for finding in examined(folder).findings if finding.code == "patient-ids-alike"]
    assert (one.level, one.values) == ("warning", {"groups": 1, "patients": 2, "across_split": 0})
    edited(folder, 0, PatientID="P-0")
    edited(folder, 1, PatientID="SECRET-00100")  # train, and the other one in test
    (one,) = [finding for finding in examined(folder).findings if finding.code == "patient-ids-alike"]
    assert one.values["across_split"] == 1
    _, out, err = run(capsys, folder, "--show-paths")
    assert [f"images/p{patient:03}" in err and f"p{patient:03}" not in out for patient in (1, 3)] == [
        True,
        True,
    ]
    assert "SECRET" not in (out + err).upper().replace(str(tmp_path).upper(), "")
    joined = {"patients": {"join": ["zeros", "case"]}, "labels": "none.csv"}
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | joined))
    found = examined(folder)
    assert found.intake.patients == 11
    assert "patient-ids-alike" not in codes(found)


def test_one_id_on_two_people(tmp_path: Path) -> None:
    folder = site(tmp_path)
    path = folder / "images/p000/0.dcm"
    edited(folder, 0, PatientBirthDate="19700301")
    dataset = pydicom.dcmread(path)
    dataset.PatientBirthDate = "19800301"
    dataset.save_as(path)
    (one,) = [finding for finding in examined(folder).findings if finding.code == "patient-id-of-several"]
    assert one.values == {"patients": 1}


def test_one_id_of_two_issuers_is_one_patient_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path)
    for number, issuer in enumerate(("CLINIC-SECRET-A", "CLINIC-SECRET-B")):
        path = folder / f"images/p000/{number}.dcm"
        dataset = pydicom.dcmread(path)
        dataset.IssuerOfPatientID = issuer
        dataset.save_as(path)
    found = examined(folder)
    assert found.intake.patients == 12
    (one,) = [finding for finding in found.findings if finding.code == "patient-id-of-issuers"]
    assert (one.level, one.values) == ("warning", {"patients": 1})
    _, out, err = run(capsys, folder, "--show-paths")
    assert "patient-id-of-issuers: " in err
    assert "SECRET" not in out + err
    kept = b"".join(path.read_bytes() for path in (folder / "state/cache").iterdir())
    assert b"SECRET" not in kept
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | {"patients": {"join": ["issuer"]}}))
    assert "patient-id-of-issuers" not in codes(examined(folder))


def test_the_opt_out_list_is_always_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = site(tmp_path)
    assert "opt-out list: listed 0, found 0 in this folder" in run(capsys, folder)[1]
    edited(folder, 0, PatientID="SECRET-0100")
    edited(folder, 1, PatientID="SECRET-77")
    edited(folder, 2, PatientID="")
    (folder / "cohort.yaml").write_text("opt_out_file: out.csv\n")
    (folder / "out.csv").write_bytes(
        "PatientID;Date\r\nsecret-100;1\r\nSECRET-７７;2\r\nX1;3\r\n".encode("utf-16")
    )
    _, out, err = run(capsys, folder, "--format", "json")
    assert json.loads(out)["opt_out"] == {"listed": 3, "found": 1, "near": 1, "without_id": 2}
    text = run(capsys, folder)[1]
    assert "opt-out list: listed 3, found 1 in this folder" in text
    assert "[opt-out-alike]" in text
    assert "[opt-out-without-id]" in text
    assert "SECRET" not in (out + text + err).upper().replace(str(tmp_path).upper(), "")
    assert json.loads(out)["excluded"]["opted-out"] == 2
    (folder / "out.csv").write_text("X1\n")
    assert "opt-out-not-found" in codes(examined(folder), "note")
    (folder / "out.csv").write_text("X1\nsee the secretary\n")
    with pytest.raises(ConfigError, match="line 2"):
        examined(folder)


def test_a_hospital_without_ethics_approval_is_told(tmp_path: Path) -> None:
    folder = site(tmp_path, kind="hospital")
    assert "ethics-missing" in codes(examined(folder), "warning")
    (folder / "cohort.yaml").write_text("ethics_approval: E1\nconsent_basis: broad\n")
    assert "ethics-missing" not in codes(examined(folder))


# any folder


def test_a_folder_without_site_yaml_is_looked_at_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = site(tmp_path / "SECRETFOLDER") / "images"
    before = listing(images)
    status, out, err = run(capsys, images, "--format", "json")
    report = json.loads(out)
    assert (status, report["verdict"], report["found"], report["used"], report["split"]) == (
        0,
        "ready with warnings",
        24,
        24,
        None,
    )
    assert "no-site" in {finding["code"] for finding in report["findings"]}
    assert listing(images) == before
    (state,) = (tmp_path / "xdg/fedqc").iterdir()
    assert str(state) in err
    assert "SECRET" not in out + err
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state.parent, state, state / "cache")} == {0o700}


def test_the_cache_is_never_among_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = site(tmp_path) / "images"
    monkeypatch.setenv("XDG_CACHE_HOME", str(images / ".cache"))
    before = listing(images)
    with pytest.raises(ConfigError) as caught:
        look(images)
    assert caught.value.code == "bad-cache-folder"
    assert listing(images) == before


def test_what_is_no_folder_of_images_is_said(tmp_path: Path) -> None:
    for path in (
        tmp_path / "nowhere",
        site(tmp_path / "sites/a").parent,
        tmp_path,
        tmp_path / "sites/a/images/p000/0.dcm",
    ):
        with pytest.raises(ConfigError) as caught:
            look(path)
        assert caught.value.code == "no-such-site"


def test_the_second_time_nothing_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site(tmp_path)
    first = examined(folder)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(cache_module.Workers, "map", fail)
    monkeypatch.setattr(cache_module.StoredSlices, "__getitem__", fail)
    again = examined(folder)
    assert not again.subject.slices.built
    assert again.public() == first.public()


# against training


def grown(folder: Path, **header: object) -> None:
    """Forty more CT patients."""
    for patient in range(40):
        write(
            folder / f"images/new{patient}.dcm",
            f"N-{patient}",
            1000 + patient,
            **({"DeviceSerialNumber": "S1"} | header),
        )


def test_new_patients_are_compared_with_those_trained_on(tmp_path: Path) -> None:
    folder = site(tmp_path, patients=60)
    assert examined(folder, against="own").drift.source == "this index"  # type: ignore[union-attr]
    grown(folder, KVP="80", Manufacturer="GE MEDICAL SYSTEMS", StudyDate="20250101")
    found = examined(folder, against="own")
    assert found.drift is not None
    assert (found.drift.source, found.drift.compared) == ("earlier index", "patients not trained on")
    assert found.drift.patients == 40 + 20, "and those of the test part"
    alarming = {move.field for move in found.drift.moves if move.verdict == "alarming"}
    assert {"kvp", "vendor"} <= alarming
    assert "kernel" not in alarming
    assert "drift" in codes(found, "warning")
    (vendor,) = [move for move in found.drift.moves if (move.modality, move.field) == ("CT", "vendor")]
    assert "GE" in dict(vendor.new)


def test_the_profile_of_the_last_training_is_kept_and_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.data_check.check.KEPT_PROFILES", 1)
    folder = site(tmp_path)
    trained = examined(folder).subject
    with open_ledger(*read_site(folder)) as ledger:
        ledger.record_non_private(request="run", purpose="federated", fingerprint=trained.slices.fingerprint)
    for number in range(3):
        write(folder / f"images/more{number}.dcm", f"M-{number}", 500 + number)
        found = examined(folder, against="own", plan_split=Split(train=1, test=0))
        assert found.drift is not None
        assert found.drift.source == "ledger"
    kept = {path.name for path in (folder / "state").glob("profile-*.json")}
    assert kept == {
        f"profile-{trained.slices.fingerprint}.json",
        f"profile-{found.subject.slices.fingerprint}.json",
    }


def test_another_folder_is_compared_with_a_sites_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = site(tmp_path / "a", patients=24)
    assert run(capsys, trained)[0] == 0
    new = tmp_path / "new"
    grown(tmp_path / "b")
    (tmp_path / "b/images").rename(new)
    status, out, _ = run(capsys, new, "--training-profile", trained, "--format", "json")
    report = json.loads(out)["against_training"]
    assert (status, report["source"], report["trained_patients"]) == (0, "file", 16)
    assert {move["field"] for move in report["fields"]} >= {"kvp", "vendor", "modality", "detail"}
    status, text, _ = run(
        capsys, new, "--training-profile", next((trained / "state").glob("profile-*.json")), "--lang", "zh"
    )
    assert (status, "与训练数据比较" in text) == (0, True)


def test_no_profile_to_compare_with_is_said(tmp_path: Path) -> None:
    images = site(tmp_path) / "images"
    for against in ("own", tmp_path / "nowhere.json", tmp_path):
        with pytest.raises((ConfigError, DataError)) as caught:
            examined(images, against=against)
        assert caught.value.code == "no-profile"
        assert caught.value.hint


# what is never said

FIELDS = (
    *(
        "PatientID",
        "PatientName",
        "PatientAddress",
        "OtherPatientIDs",
        "PatientComments",
        "InstitutionName",
        "InstitutionAddress",
    ),
    *(
        "InstitutionalDepartmentName",
        "StationName",
        "ReferringPhysicianName",
        "PerformingPhysicianName",
        "OperatorsName",
    ),
    *(
        "NameOfPhysiciansReadingStudy",
        "StudyDescription",
        "SeriesDescription",
        "StudyID",
        "AccessionNumber",
        "Manufacturer",
    ),
    *(
        "ManufacturerModelName",
        "DeviceSerialNumber",
        "SoftwareVersions",
        "ProtocolName",
        "BodyPartExamined",
        "ConvolutionKernel",
    ),
    *(
        "SequenceName",
        "ScanningSequence",
        "ScanOptions",
        "ImageComments",
        "RequestedProcedureDescription",
        "RequestingPhysician",
    ),
    *("PerformedProcedureStepDescription", "ContrastBolusAgent", "FilterType", "PatientState", "Occupation"),
    "AdmittingDiagnosesDescription",
)


def test_no_marker_of_a_header_or_a_name_is_in_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    markers = {keyword: f"ZQ{number:02}XK" for number, keyword in enumerate(FIELDS)}
    folder = site(tmp_path / "ZQ90XK", header=markers)
    (folder / "images/ZQ91XK").mkdir()
    (folder / "images/ZQ91XK/ZQ92XK.dcm").write_bytes(b"ZQ93XK")
    (folder / "labels.csv").write_text(
        "file,reader,metal,note\np000/0.dcm,ZQ94XK,1,ZQ95XK\nZQ96XK.dcm,ZQ94XK,ZQ97XK,\n"
    )
    dataset = pydicom.dcmread(folder / "images/p000/0.dcm")
    identifiers = [
        str(dataset[keyword].value) for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    ]
    secrets = [
        *(f"ZQ{number:02}XK" for number in (*range(len(FIELDS)), *range(90, 98))),
        *identifiers,
        "20240115",
        "20240215",
    ]
    assert len(secrets) > 40
    said = []
    for words in (
        [folder],
        [folder, "--format", "json"],
        [folder, "--html", tmp_path / "page.html"],
        [folder, "--lang", "zh"],
    ):
        _, out, err = run(capsys, *words)
        said += [out, err.replace(str(tmp_path / "page.html"), "")]
    images = folder / "images"
    said += [*run(capsys, images)[1:], *run(capsys, images, "--format", "json")[1:]]
    said.append((tmp_path / "page.html").read_text())
    said.append(caplog.text)
    assert len(said) == 14
    assert sum(map(len, said)) > 30_000
    together = "\n".join(said)
    for secret in secrets:
        raw = secret.encode()
        for form in (
            secret,
            raw.hex(),
            base64.b64encode(raw).decode().rstrip("="),
            base64.b32encode(raw).decode().rstrip("="),
        ):
            assert form.lower() not in together.lower(), secret
    found = examined(folder)
    assert any("ZQ17XK" in line for line in paths_text(found.subject)), (
        "on request, on the operator's terminal"
    )


# the page


def test_the_page_needs_nothing_from_outside_and_shows_no_fine_date(tmp_path: Path) -> None:
    folder = site(tmp_path)
    image = np.random.default_rng(5).uniform(0, 900, (16, 16))
    for number in (0, 4):
        write(
            folder / f"images/p00{number}/0.dcm",
            f"P-{number}",
            0,
            image=image + number / 9,
            StudyDate="20240115",
        )
    for language in LANGUAGES:
        page = render(examined(folder, against="own"), language)
        assert not re.search(r"https?:|<script|<link|<iframe|url\(|@import|onload", page)
        assert set(re.findall(r'src="(.{22})', page)) == {"data:image/png;base64,"}
        assert page.count("<img") == 5, "metal and motion with and without, near-duplicates"
        assert not re.search(r"2024-?\d\d-?\d\d", page)
        assert page.count("<svg") >= 7
        assert str(tmp_path) not in page


def test_the_page_is_its_owners_and_a_bad_place_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path)
    assert run(capsys, folder, "--html", tmp_path / "out/page.html")[0] == 0
    assert stat.S_IMODE((tmp_path / "out/page.html").stat().st_mode) == 0o600
    status, _, err = run(capsys, folder, "--html", folder / "labels.csv/page.html")
    assert (status, "[not-writable]" in err) == (2, True)
    before = listing(folder / "images")
    assert run(capsys, folder, "--html", folder / "images/page.html")[0] == 2
    assert listing(folder / "images") == before
    assert run(capsys, folder, "--lang", "fr")[0] == 2


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_old_age_keys_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str], language: str) -> None:
    folder = site(tmp_path / "site", patients=2)
    for ages, noted in (("{least: 0}", True), ("{min: 0}", False)):
        (folder / "cohort.yaml").write_text(f"include: {{age_years: {ages}}}", encoding="utf-8")
        _, out, _ = run(capsys, folder, "--lang", language)
        assert ("[old-age-keys]" in out) == noted


def test_languages_say_the_same() -> None:
    assert_same_sentences(LANGUAGES)


def test_every_finding_has_words_and_a_remedy() -> None:
    source = (Path(__file__).parents[3] / "client/data_check/check.py").read_text()
    raised = set(re.findall(r'Finding\(\s*code="([a-z-]+)"', source)) | {"leak"}
    assert len(raised) > 25
    assert {key for code in raised for key in (f"{code}.found", f"{code}.do")} <= LANGUAGES["en"].keys()


def test_progress_is_told_in_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("common.progress_bar.time.monotonic", lambda: clock[0])
    with progress_shown() as progress:
        for done in range(1, 101):
            clock[0] += 0.5
            progress("slices", done, 100)
        progress("headers", 1, 1)
    said = capsys.readouterr()
    assert said.out == ""
    lines: Sequence[str] = said.err.splitlines()
    assert len(lines) == 7
    assert lines[0] == "decoding slices: 17 of 100, 39 s left"
    assert lines[-1] == "decoding slices: 100 of 100 in 50 s"


@needs_real_data
def test_real_folders_give_a_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, REAL, "--format", "json", "--html", tmp_path / "page.html")
    report = json.loads(out)
    assert (status, report["verdict"]) == (0, "ready with warnings")
    assert {"Siemens", "GE", "Philips"} <= report["acquisition"]["CT"]["vendor"].keys()
    assert report["acquisition"]["MR"]["model"]["uMR 770"] == 1
    assert report["found"] == report["used"] + len(report["quarantined"]) + report["duplicates"] + sum(
        report["excluded"].values()
    )


def body(seed: int) -> np.ndarray:
    """A head in Hounsfield units: air, soft tissue with fat, dense bone."""
    y, x = np.mgrid[:64, :64] - 31.5
    image = np.full((64, 64), -1000.0)
    image[x**2 + y**2 < 27**2] = 40
    image[(x - 8) ** 2 + y**2 < 30] = 900
    image[(x + 9) ** 2 + (y - 6) ** 2 < 20] = -90
    return image + np.random.default_rng(seed).normal(0, 8, image.shape)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda hu: hu, None),
        (lambda hu: hu - 1024, "hu-too-low"),  # rescaled twice
        (lambda hu: np.pad(hu[::2, ::2], 24, constant_values=-1000), None),  # a small body in a wide field
        (lambda hu: hu + 1024, "hu-too-high"),  # the offset was added, and is not subtracted
        (lambda hu: hu + 2048, "hu-too-high"),
        (lambda hu: np.where(hu < 0, hu + 4096, hu), "hu-wrong-sign"),  # 12 bits with a sign, read without
        (lambda hu: np.where(hu < -800, -1000, 30.0 * (hu > 500) - 600), None),  # lung and bone: unknown
        (lambda hu: hu[20:44, 20:44], None),  # no air in a small field of view
        (lambda hu: np.full_like(hu, 7.0), "blank-slices"),
    ],
)
def test_values_that_cannot_be_hounsfield_units_are_named(
    tmp_path: Path, wrong: Callable[[np.ndarray], np.ndarray], expected: str | None
) -> None:
    for patient in range(3):
        write(tmp_path / f"images/{patient}.dcm", f"P{patient}", patient, image=wrong(body(patient)))
    found = codes(examined(tmp_path / "images"), "warning")
    assert {code for code in found if code.startswith(("hu-", "blank"))} == ({expected} - {None})


@pytest.mark.parametrize(
    ("changed", "representation", "expected"),
    [
        (lambda signal: signal, 0, None),
        (lambda signal: signal, 1, None),
        (lambda signal: np.where(signal > 800, signal - 2000, signal), 1, "mr-negative"),
        (lambda signal: signal - 500, 1, "mr-negative"),  # a real image
        (
            lambda signal: np.where(signal < 30, 65_500 + signal, signal),
            0,
            "mr-wrong-sign",
        ),  # noise about zero
        (lambda signal: np.full_like(signal, 900), 0, "blank-slices"),
    ],
)
def test_values_that_cannot_be_mr_magnitudes_are_named(
    tmp_path: Path, changed: Callable[[np.ndarray], np.ndarray], representation: int, expected: str | None
) -> None:
    for patient in range(3):
        signal = changed(np.clip(body(patient) + 1000, 0, None)).astype("<i4")
        header: dict[str, object] = {
            "PixelRepresentation": representation,
            "RescaleSlope": "1",
            "RescaleIntercept": "0",
            "PixelData": signal.astype("<i2" if representation else "<u2").tobytes(),
        }
        path = tmp_path / f"images/{patient}.dcm"
        write(path, f"P{patient}", patient, "MR", image=np.zeros((64, 64)), **header)
    found = codes(examined(tmp_path / "images"), "warning")
    assert {code for code in found if code.startswith(("mr-", "hu-", "blank"))} == ({expected} - {None})


def test_an_archive_that_compresses_with_loss_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path, header={"LossyImageCompression": "01", "ImageType": ["DERIVED", "PRIMARY"]})
    status, out, _ = run(capsys, folder)
    assert status == 2
    assert "lossy: use" in out
    (folder / "cohort.yaml").write_text("lossy: use\n")
    found = examined(folder)
    assert found.intake.intake.used == 24
    assert "lossy-used" in codes(found, "note")
    assert not codes(found, "stop")


def test_files_of_other_formats_and_foreign_files_change_no_verdict(tmp_path: Path) -> None:
    folder = site(tmp_path)
    for number in range(9):
        (folder / f"images/{number}.exe").write_bytes(b"MZ" + bytes(200))
        (folder / f"images/{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    found = examined(folder)
    assert not codes(found, "stop")
    assert "other-formats" in codes(found, "note")
    assert found.public()["excluded"] == {"foreign-file": 9, "picture-file": 9}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_phase_images_are_named_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lang: str
) -> None:
    folder = site(tmp_path)
    for number in range(12):
        header: dict[str, object] = {"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}
        write(folder / f"images/phase{number}.dcm", f"P-{number}", number + 500, "MR", **header)
    status, out, _ = run(capsys, folder, "--lang", lang)
    assert status == 0
    assert "fedqc explain not-magnitude" in out


# patients of an earlier cohort


def test_patients_of_an_earlier_cohort_are_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run leaves them out; the operator is told how many, and counts training patients without them."""
    folder = site(tmp_path, nominal_patients=10)
    forms = patient_forms(load_cohort(folder, size=SIZE).records)
    with open_ledger(*read_site(folder)) as ledger:
        ledger.admit_patients({patient: forms[patient] for patient in sorted(forms)[:4]})
    assert examined(folder).public()["patients_left_out"] == 0, "the same budget"
    before = check_site(folder, size=SIZE)
    newer = SITE | {"cohort": "newer", "cohort_disjoint": True, "nominal_patients": 10}
    (folder / "site.yaml").write_text(yaml.safe_dump(newer))
    found, report = examined(folder), check_site(folder, size=SIZE)
    assert examined(folder).public().items() >= report.items()
    assert (report["patients"], report["patients_left_out"]) == (12, 4)
    assert sum(report["patients_by_part"].values()) == 8 == sum(before["patients_by_part"].values()) - 4
    assert {finding.code: finding.values for finding in found.findings}["few-patients"]["patients"] == 8
    assert "12 patients, of them 4 in an earlier cohort (left out)" in run(capsys, folder)[1]
    assert "of them 4 in an earlier cohort" in render(found, "en")
    assert "其中 4 名属于更早的队列" in run(capsys, folder, "--lang", "zh")[1]
    data = next(check for check in check_data(*read_site(folder)[::-1], None) if check.check == "data")
    assert "12 patients, of them 4 in an earlier cohort (left out), prepared" in data.found


def test_a_ledger_that_cannot_say_who_is_elsewhere_makes_a_site_not_ready(tmp_path: Path) -> None:
    folder = site(tmp_path)
    with open_ledger(*read_site(folder)) as ledger:
        ledger.admit_patients({"a": []})
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | {"cohort_disjoint": True}))
    found = examined(folder)
    assert found.verdict == "not ready"
    assert {finding.code: finding.values for finding in found.findings}["ledger-unusable"] == {
        "problem": "cohort-fixed"
    }
    assert "[cohort-fixed]" in report_text(found, speaker("en", LANGUAGES))


# split, assessed, buckets


def test_the_check_counts_with_the_split_that_a_run_would_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path, nominal_patients=10)
    sheet = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(re.sub(",(part|train|test)$", "", sheet, flags=re.M))
    shares = examined(folder).public()["split_shares"]
    assert shares == {"train": 0.7, "validation": 0.0, "test": 0.3, "from": "default"}
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | {"split": {"train": 0.5, "test": 0.5}}))
    found = examined(folder)
    assert found.public()["split_shares"] == {
        "train": 0.5,
        "validation": 0.0,
        "test": 0.5,
        "from": "site.yaml",
    }
    assert found.intake.patients_by_part == check_site(folder, size=SIZE)["patients_by_part"]
    assert "train 0.5, test 0.5 (site.yaml)" in report_text(found, speaker("en", LANGUAGES))
    other = examined(folder, plan_split=Split(train=0.6, test=0.4))
    assert "split-differs" in codes(other, "stop")
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: other\nsplit: {train: 0.6, test: 0.4}\n")
    assert "split-differs" in run(capsys, folder, "--plan", plan)[1]
    (folder / "state" / "split.json").write_text('{"train": 0.7, "validation": 0, "test": 0.3}')
    fixed = examined(folder)
    assert "split-fixed" in codes(fixed, "stop")
    assert fixed.public()["split_shares"] is None


def test_how_many_training_patients_reach_the_next_bucket(tmp_path: Path) -> None:
    found = examined(site(tmp_path, nominal_patients=10))  # 8 of 12 patients train
    assert found.public()["next_bucket"] == {"patients": 2, "bucket": 10}
    for language, sentence in (
        ("en", "2 more training patients reach the next bucket (10)"),
        ("zh", "再增加 2 名训练患者即达到下一档（10）"),
    ):
        assert sentence in report_text(found, speaker(language, LANGUAGES))
    assert [next_bucket(count) for count in (0, 9, 10, 96, 9999, 10000)] == [
        (1, 1),
        (1, 10),
        (10, 20),
        (4, 100),
        (1, 10000),
        None,
    ]


@pytest.mark.parametrize(
    ("assessed", "cell", "level", "code"),
    [
        (["metal", "motion", "beam_hardening"], "", "stop", "assessed-differs"),
        (["metal"], "", "warning", "assessed-more"),
        ([], "", "warning", "none-assessed"),
        (None, "blank", "stop", "nothing-assessed"),
        (["metal"], "blank", "stop", "assessed-differs"),
    ],
)
def test_what_is_declared_is_compared_with_the_sheet(
    tmp_path: Path, assessed: list[str] | None, cell: str, level: str, code: str
) -> None:
    folder = site(tmp_path, **({} if assessed is None else {"assessed": assessed}))
    if cell:
        head, *rows = (folder / "labels.csv").read_text().splitlines()
        blank = [f"{row.split(',')[0]},,,{row.split(',')[3]}" for row in rows]
        (folder / "labels.csv").write_text("\n".join([head, *blank]))
    assert code in codes(examined(folder), level)


def test_an_accession_number_that_lost_its_zeros_is_reported(tmp_path: Path) -> None:
    folder = site(tmp_path, patients=2, header={})
    write(folder / "images" / "a.dcm", "P-0", 50, AccessionNumber="12345")
    write(folder / "images" / "b.dcm", "P-1", 51, AccessionNumber="0012345")
    (folder / "labels.csv").write_text("accession,metal\n12345,1\n")
    assert "lost-zeros" in codes(examined(folder), "warning")
    (folder / "labels.csv").write_text("accession,metal\n0012345,1\n")
    assert "lost-zeros" not in codes(examined(folder))
