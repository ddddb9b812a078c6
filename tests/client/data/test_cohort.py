"""A site folder becomes arrays in one order; a patient is in one part; the check names nobody."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data.cohort import check_site, load_cohort
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.dicom.index import split_of
from client.dicom.sources import find_files
from client.site.config import read_site, site_key
from common.artifacts import DEFAULT_LABELS, INDEX
from common.errors import ConfigError, DataError, FedqcError

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
SITE = {"name": "site-a", "kind": "synthetic", "cohort": "phantoms", "nominal_patients": 50}


def write(path: Path, patient: str, value: int, modality: str = "CT") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(value).uniform(0, 900, (16, 16))
    write_slice(
        path,
        image,
        HeaderFacts(
            modality=modality,
            pixel_spacing_mm=1.0,
            patient_id=patient,
            study_uid=make_uid(patient.encode()),  # type: ignore[arg-type]
            series_uid=make_uid(b"r"),
            sop_uid=make_uid(str(path).encode()),
            instance_number=value,
            manufacturer="ACME",
        ),
    )


def site(folder: Path, *, patients: int = 8, parts: dict[int, str] | None = None, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file,metal,motion,metal_severity,part"]
    for patient in range(patients):
        for number in range(3):
            mr = patient % 2
            file = f"p{patient:03}/{number}.dcm"
            write(folder / "images" / file, f"SECRET-{patient}", 10 * patient + number, "MR" if mr else "CT")
            rows.append(
                f"{file},{'' if mr else number % 2},{number % 2 if mr else ''},,"
                f"{(parts or {}).get(patient, '')}"
            )
    (folder / "labels.csv").write_text("\n".join(rows))
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE | fields))
    return folder


def refusal(folder: Path) -> FedqcError:
    with pytest.raises(FedqcError) as caught:
        load_cohort(folder, size=16)
    assert caught.value.hint
    return caught.value


def test_everything_is_in_one_order(tmp_path: Path) -> None:
    cohort = load_cohort(site(tmp_path) / "site.yaml", size=16)
    n = 24
    assert cohort.images.shape == (n, 16, 16)
    assert cohort.images.dtype == np.int16
    assert (cohort.modality.dtype, cohort.part.dtype) == (np.int8, np.int8)
    assert (cohort.labels.dtype, cohort.patients.dtype) == (np.float32, np.int64)
    assert cohort.labels.shape == cohort.severities.shape == (n, len(DEFAULT_LABELS))
    assert cohort.numbers.tolist() == list(range(1, n + 1))
    assert set(cohort.vendors) == {"ACME"}
    assert sorted(set(cohort.patients.tolist())) == list(range(8))
    for position, record in enumerate(cohort.records):
        mr = int(record.file[1:4]) % 2
        assert cohort.modality[position] == mr
        assert cohort.labels[position, INDEX["motion" if mr else "metal"]] == int(record.file[5]) % 2
        assert np.isnan(cohort.labels[position, INDEX["metal" if mr else "motion"]])


def test_patient_never_spans_two_parts(tmp_path: Path) -> None:
    cohort = load_cohort(site(tmp_path, patients=20), size=16)
    for patient in range(20):
        assert len(set(cohort.part[cohort.patients == patient].tolist())) == 1
    assert set(cohort.part.tolist()) == {0, 2}


def test_split_is_stable_when_patients_are_added(tmp_path: Path) -> None:
    def parts(cohort_folder: Path) -> dict[str, int]:
        cohort = load_cohort(cohort_folder, size=16)
        return {record.file: int(part) for record, part in zip(cohort.records, cohort.part, strict=True)}

    before = parts(site(tmp_path, patients=10))
    after = parts(site(tmp_path, patients=16))
    assert before.items() <= after.items()


def test_the_sheet_may_fix_the_part(tmp_path: Path) -> None:
    fixed = {0: "train", 1: "test", 2: "train", 3: "test"}
    cohort = load_cohort(site(tmp_path, patients=4, parts=fixed), size=16)
    for record, part in zip(cohort.records, cohort.part, strict=True):
        assert part == (0 if fixed[int(record.file[1:4])] == "train" else 2)
    labels = tmp_path / "labels.csv"
    labels.write_text(labels.read_text().replace("p000/2.dcm,0,,,train", "p000/2.dcm,0,,,"))
    assert load_cohort(tmp_path, size=16).part.tolist() == cohort.part.tolist()
    labels.write_text(labels.read_text().replace("p000/2.dcm,0,,,", "p000/2.dcm,0,,,test"))
    assert refusal(tmp_path).code == "leak"


def test_a_patient_leaks_across_folders_only_as_an_error(tmp_path: Path) -> None:
    """The same PatientID in two folders, one labelled train and one test."""
    site(tmp_path, patients=2, parts={0: "train", 1: "test"})
    path = tmp_path / "images/p001/0.dcm"
    dataset = pydicom.dcmread(path)
    dataset.PatientID = "SECRET-0"
    dataset.save_as(path)
    assert refusal(tmp_path).code == "leak"


def test_check_reconciles_and_names_nobody(tmp_path: Path) -> None:
    site(tmp_path / "SITEFOLDER")
    images = tmp_path / "SITEFOLDER/images"
    (images / "p000/SECRETNAME").write_bytes(bytes(300))
    shutil.copy(images / "p000/0.dcm", images / "p000/copy.dcm")
    (images / "p001/0.dcm").write_bytes((images / "p001/0.dcm").read_bytes()[:-10])
    report = check_site(tmp_path / "SITEFOLDER/site.yaml", size=16)
    assert report["found"] == 26
    assert report["found"] == report["used"] + len(report["quarantined"]) + report["duplicates"] + sum(
        report["excluded"].values()
    )
    assert report["duplicates"] == 1
    assert {problem["code"] for problem in report["quarantined"]} == {"not-dicom", "truncated"}
    assert report["patients"] == 8 == sum(report["patients_by_part"].values())
    assert set(report["labels"]) == set(DEFAULT_LABELS)
    assert report["labels"]["metal"] == {"present": 4, "absent": 8, "not_assessed": 0}
    assert report["labels"]["susceptibility"] == {"present": 0, "absent": 0, "not_assessed": 11}
    assert report["label_problems"]["rows_without_image"]["count"] == 1
    text = json.dumps(report)
    for secret in ("SECRET", "SITEFOLDER", str(tmp_path), ".dcm", "2.25.", "p000", "ACME"):
        assert secret not in text


def test_the_second_load_opens_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_cohort(site(tmp_path), size=16)
    monkeypatch.setattr("client.dicom.cache.Workers", lambda *_: pytest.fail("a file was read again"))
    second = load_cohort(tmp_path, size=16)
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.part, second.part)
    assert first.fingerprint == second.fingerprint


def test_site_key_is_made_once_and_private(tmp_path: Path) -> None:
    key = site_key(tmp_path / "state")
    path = tmp_path / "state/site.key"
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert site_key(tmp_path / "state") == key
    assert list((tmp_path / "state").iterdir()) == [path]
    path.write_text("ab" * 32)
    assert site_key(tmp_path / "state") == bytes.fromhex("ab" * 32)
    for bad in ("", "ab", "zz" * 32):
        path.write_text(bad)
        with pytest.raises(ConfigError) as caught:
            site_key(tmp_path / "state")
        assert caught.value.code == "bad-site-key"


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    assert refusal(tmp_path).code == "no-such-site"
    site(tmp_path, images="elsewhere")
    assert refusal(tmp_path).code == "no-such-folder"
    (tmp_path / "elsewhere").mkdir()
    assert refusal(tmp_path).code == "empty-site"
    (tmp_path / "elsewhere/a").write_bytes(bytes(9))
    error = refusal(tmp_path)
    assert error.code == "no-usable-images"
    assert "not-dicom" in error.message
    write(tmp_path / "elsewhere/b", "P", 1)
    assert refusal(tmp_path).code == "too-many-quarantined"
    (tmp_path / "elsewhere/a").unlink()
    assert refusal(tmp_path).code == "labels-match-nothing"
    (tmp_path / "labels.csv").unlink()
    assert refusal(tmp_path).code == "labels-missing"


def test_state_inside_the_images_folder_is_refused(tmp_path: Path) -> None:
    site(tmp_path, images=".")
    assert refusal(tmp_path).code == "bad-site"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Site A"}, ("name", "'Site A'", "pattern")),
        ({"kind": "clinic"}, ("kind", "'clinic'", "hospital")),
        ({"nominal_patients": 0}, ("nominal_patients", "0", "greater than or equal to 1")),
        ({"nominal_patients": "50"}, ("nominal_patients", "'50'", "integer")),
        ({"colour": "red"}, ("colour", "unknown key")),
        ({"cohort": None}, ("cohort", "None")),
    ],
)
def test_site_yaml_errors_name_field_value_and_bound(
    tmp_path: Path, change: dict[str, object], words: tuple[str, ...]
) -> None:
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | change))
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path / "site.yaml")
    for word in ("site.yaml", *words):
        assert word in caught.value.message


@pytest.mark.parametrize(
    "text", ["", "- a", "name: [", "name: !!python/object:os.system x", "{" * 5000, "x" * 70_000]
)
def test_site_yaml_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path)
    assert caught.value.code == "bad-site"


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: a\n")
    with pytest.raises(
        ConfigError, match="`kind` is missing; `cohort` is missing; `nominal_patients` is missing"
    ):
        read_site(tmp_path)


def test_split_shares_are_checked() -> None:
    with pytest.raises(DataError):
        split_of("patient", bytes(32), 0.0, 0.0, 0.0)


@needs_real_data
@pytest.mark.parametrize("folder", ["awkward", "site_mr_philips_bangalore", "site_ct_ge_lightspeed_qiicr"])
def test_real_folders_reconcile_and_name_nobody(tmp_path: Path, folder: str) -> None:
    images = Path(str(REAL)) / folder
    files = [source.path for source in find_files(images)]
    sheet = ["file," + ",".join(DEFAULT_LABELS), *(f'"{path.relative_to(images)}",,,,,' for path in files)]
    (tmp_path / "labels.csv").write_text("\n".join(sheet))
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE | {"images": str(images)}))
    report = check_site(tmp_path, size=64)
    assert report["found"] == len(files)
    assert report["used"] > 0
    text = json.dumps(report)
    for path in files:
        assert path.name not in text
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True)
        except pydicom.errors.InvalidDicomError:
            continue
        for keyword in ("PatientID", "SOPInstanceUID", "StudyInstanceUID", "StudyDate", "InstitutionName"):
            value = str(dataset.get(keyword) or "")
            assert len(value) < 4 or value not in text


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True))
def test_adding_removing_or_reordering_patients_never_moves_one(tmp_path: Path, chosen: list[int]) -> None:
    whole = tmp_path / "whole"
    if not whole.exists():
        site(whole)
    everybody = load_cohort(whole, size=16)
    expected = dict(
        zip((record.patient for record in everybody.records), everybody.part.tolist(), strict=True)
    )
    with tempfile.TemporaryDirectory(dir=tmp_path) as other:
        some = Path(other)
        rows = ["file,metal,motion"]
        for place, patient in enumerate(chosen):  # in this order, under other names
            shutil.copytree(whole / f"images/p{patient:03}", some / f"images/{place:03}")
            rows += [f"{place:03}/{number}.dcm,,{'' if patient % 2 == 0 else 1}" for number in range(3)]
        (some / "labels.csv").write_text("\n".join(rows))
        shutil.copy(whole / "site.yaml", some)
        (some / "state").mkdir()
        shutil.copy(whole / "state/site.key", some / "state")
        found = load_cohort(some, size=16)
        parts = dict(zip((record.patient for record in found.records), found.part.tolist(), strict=True))
    assert len(parts) == len(chosen)
    assert parts == {patient: expected[patient] for patient in parts}


def test_a_sheet_may_name_images_by_uid_or_accession_and_series(tmp_path: Path) -> None:
    folder = site(tmp_path, patients=4)
    headers = {}
    for path in sorted((folder / "images").rglob("*.dcm")):
        dataset = pydicom.dcmread(path)
        dataset.AccessionNumber, dataset.SeriesNumber = f"ACC-{path.parent.name}", 3
        dataset.SeriesInstanceUID = make_uid(path.parent.name.encode())
        dataset.save_as(path)
        headers[path.relative_to(folder / "images").as_posix()] = dataset
    rows = ["sop_uid,series_uid,study_uid,accession,series,metal,motion"]
    rows += [f"{headers[f'p000/{number}.dcm'].SOPInstanceUID},,,,,{number % 2}," for number in range(3)]
    rows += [
        f",{headers['p001/0.dcm'].SeriesInstanceUID},,,,,1",
        ",,,ACC-p002,3,1,",
        f",,{headers['p003/0.dcm'].StudyInstanceUID},,,,0",
    ]
    (folder / "labels.csv").write_text("\n".join(rows))
    cohort = load_cohort(folder, size=16)
    by_file = {record.file: labels for record, labels in zip(cohort.records, cohort.labels, strict=True)}
    for number in range(3):
        assert by_file[f"p000/{number}.dcm"][INDEX["metal"]] == number % 2
        assert by_file[f"p001/{number}.dcm"][INDEX["motion"]] == 1
        assert by_file[f"p002/{number}.dcm"][INDEX["metal"]] == 1
        assert by_file[f"p003/{number}.dcm"][INDEX["motion"]] == 0
    assert cohort.report.labels.images_without_label == 0
    stored = b"".join(path.read_bytes() for path in (folder / "state/cache").iterdir())
    assert b"ACC-p0" not in stored
    assert str(headers["p000/0.dcm"].SOPInstanceUID).encode() not in stored


def test_too_many_unreadable_files_stop_a_run_until_somebody_looked(tmp_path: Path) -> None:
    folder = site(tmp_path)  # 24 images
    (folder / "images/bad-1").write_bytes(bytes(300))
    assert load_cohort(folder, size=16).report.intake.share_quarantined == 1 / 25
    (folder / "images/bad-2").write_bytes(bytes(300))
    refused = refusal(folder)
    assert (refused.code, refused.exit_status) == ("too-many-quarantined", 2)
    assert "2 of 26 files" in refused.message
    assert check_site(folder, size=16)["used"] == 24
    assert refusal(folder).code == "too-many-quarantined"  # a report accepts nothing
    assert len(load_cohort(folder, size=16, quarantine="accept").records) == 24
    assert len(load_cohort(folder, size=16).records) == 24  # remembered
    (folder / "images/bad-3").write_bytes(bytes(300))
    assert refusal(folder).code == "too-many-quarantined"  # one more than what was accepted


def test_who_opts_out_leaves_the_cohort(tmp_path: Path) -> None:
    folder = site(tmp_path)
    before = load_cohort(folder, size=16)
    (folder / "cohort.yaml").write_text("opt_out: [SECRET-3]\n")
    after = load_cohort(folder, size=16)
    assert len(after.records) == len(before.records) - 3
    assert not [record for record in after.records if record.file.startswith("p003")]
    assert after.fingerprint == before.fingerprint  # the same index, of which a patient is subtracted
    assert after.report.public()["excluded"] == {"opted-out": 3}
    flow = {step["step"]: step["patients"] for step in after.report.public()["flow"]}  # type: ignore[index]
    assert (flow["readable"], flow["in the cohort"], flow["used"]) == (8, 7, 7)
