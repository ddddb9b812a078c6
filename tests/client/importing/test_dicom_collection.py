"""DICOM collections: the files stay as they are, a patient is at one site, a person's name is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pydicom
import pytest

from client.data.cohort import load_cohort
from client.site.config import read_site
from client.site.kind import admit_kind
from tests.helpers.command_line import typed
from tests.helpers.public_collections import rows_of, scanner_slice, tcia, write_csv

Capture = pytest.CaptureFixture[str]
TCGA = ("TCGA-17-Z001", "TCGA-17-Z002", "TCGA-50-5044")


def ran(capsys: Capture, src: Path, out: Path, *more: object) -> tuple[object, str, str]:
    return typed(capsys, "data", "import", "dicom", src, out, "--collection", "TCGA-LUAD, CC BY 3.0", *more)


def imported(capsys: Capture, src: Path, out: Path, *more: object) -> tuple[dict[str, Any], str]:
    code, said, talk = ran(capsys, src, out, "--format", "json", *more)
    assert code == 0, talk
    return json.loads(said), talk


def test_sites_stand_in_the_patient_id(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA)
    before = {path: path.read_bytes() for path in src.rglob("*.dcm")}
    more = ("--site-by", "patient", "--pattern", "TCGA-(?P<site>[^-]+)-")
    report, talk = imported(capsys, src, tmp_path / "out", *more)
    assert [(site["site"], site["patients"], site["images"]) for site in report["sites"]] == [
        ("17", 2, 4),
        ("50", 1, 2),
    ]
    assert talk == ""
    for path, content in before.items():
        assert path.read_bytes() == content
    for name in ("17", "50"):
        site = tmp_path / "out" / name
        for path in site.rglob("*.dcm"):
            original = src / path.relative_to(site / "images")
            assert path.read_bytes() == before[original]
            assert os.path.samefile(path, original)  # a hard link
        assert "TCGA-LUAD" in admit_kind(*read_site(site))
        assert not any(record.imported for record in load_cohort(site).records)
        assert (read_site(site)[0].kind, read_site(site)[0].labels) == ("public", "none")


def test_copies_where_asked_and_files_of_archives(tmp_path: Path, capsys: Capture) -> None:
    import shutil

    src = tcia(tmp_path / "unpacked", TCGA[:1])
    (tmp_path / "src").mkdir()
    shutil.make_archive(str(tmp_path / "src" / "study"), "zip", src)
    shutil.copytree(tcia(tmp_path / "more", TCGA[1:2]), tmp_path / "src" / "more")
    report, _ = imported(capsys, tmp_path / "src", tmp_path / "out", "--copy")
    assert report["sites"][0]["patients"] == 2
    for path in (tmp_path / "out").rglob("*.dcm"):
        assert path.stat().st_nlink == 1
    assert len(load_cohort(tmp_path / "out" / "src").records) == 4


def test_a_patient_of_two_scanners_is_at_one_site(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA[:2])
    tcia(src / "ge", [TCGA[0]], "GE MEDICAL SYSTEMS", slices=3)
    report, _ = imported(capsys, src, tmp_path / "out", "--site-by", "manufacturer")
    assert [(site["site"], site["patients"], site["images"]) for site in report["sites"]] == [
        ("ge-medical-systems", 1, 3),
        ("siemens", 1, 2),
    ]
    assert report["left_out"] == {"other-site": 2}
    report, _ = imported(capsys, src, tmp_path / "out2", "--site-by", "folder")
    assert [site["site"] for site in report["sites"]] == ["ge", "tcga-17-z002"]


def test_a_label_sheet_keeps_its_keys(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA)
    first = sorted(src.rglob("*.dcm"))[0]
    series = str(pydicom.dcmread(sorted(src.rglob("*.dcm"))[-1]).SeriesInstanceUID)
    rows: list[list[object]] = [
        ["file", "series_uid", "metal"],
        [first.relative_to(src).as_posix(), "", 1],
        ["", series, 0],
        ["gone.dcm", "", 0],
    ]
    sheet = write_csv(tmp_path / "s.csv", rows)
    more = ("--site-by", "patient", "--pattern", "TCGA-(?P<site>[^-]+)-", "--labels", sheet)
    report, talk = imported(capsys, src, tmp_path / "out", *more)
    assert [site["labels"] for site in report["sites"]] == [
        {"metal": {"present": 1, "absent": 0}},
        {"metal": {"present": 0, "absent": 1}},
    ]
    assert "1 of 3 rows" in talk
    assert rows_of(tmp_path / "out" / "50") == [{"series_uid": series, "metal": "0"}]
    cohort = load_cohort(tmp_path / "out" / "17")
    assert int((cohort.labels[:, 0] == 1).sum()) == 1
    sheet = write_csv(tmp_path / "s.csv", [rows[0], rows[3]])
    code, said, talk = ran(capsys, src, tmp_path / "o", "--labels", sheet)
    assert (code, said, "[labels-match-nothing]" in talk) == (2, "", True)
    assert not (tmp_path / "o").exists()


def test_what_is_not_imported(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA, slices=10)
    paths = sorted(src.rglob("*.dcm"))
    paths[0].write_bytes(paths[0].read_bytes()[:-50])  # truncated
    derived, nameless = pydicom.dcmread(paths[1]), pydicom.dcmread(paths[2])
    derived.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    derived.save_as(paths[1])
    nameless.PatientID = ""
    nameless.save_as(paths[2])
    (src / "LICENSE").write_text("CC BY 3.0")
    (src / "metadata.csv").write_text("Series UID,…")
    code, _, talk = ran(capsys, src, tmp_path / "out")
    assert (code, "1 × no-patient, 1 × truncated" in talk) == (2, True)
    report, _ = imported(capsys, src, tmp_path / "out", "--accept-quarantine")
    assert sorted(one["code"] for one in report["not_imported"]) == ["no-patient", "truncated"]
    assert report["left_out"]["secondary"] == 1
    assert sum(site["images"] for site in report["sites"]) == 27


def test_a_folder_of_persons_is_reported(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA[:1])
    path = src / "x.dcm"
    scanner_slice(path, "4711", 1)
    dataset = pydicom.dcmread(path)
    dataset.PatientName = "Meier^Anna"
    dataset.save_as(path)
    _, talk = imported(capsys, src, tmp_path / "out")
    assert "1 files name a person" in talk
    assert "with loss" not in talk
    assert "Meier" not in talk


def test_images_compressed_with_loss_are_reported(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA[:1])
    path = next(src.rglob("*.dcm"))
    dataset = pydicom.dcmread(path)
    dataset.LossyImageCompression = "01"
    dataset.save_as(path)
    _, talk = imported(capsys, src, tmp_path / "out")
    assert "1 images were compressed with loss" in talk


def test_a_pattern_belongs_to_the_patient_id(tmp_path: Path, capsys: Capture) -> None:
    src = tcia(tmp_path / "src", TCGA[:1])
    for more in (("--pattern", "(?P<site>x)"), ("--site-by", "patient")):
        code, _, talk = ran(capsys, src, tmp_path / "out", *more)
        assert (code, "[bad-argument]" in talk) == (2, True)
    assert not (tmp_path / "out").exists()
