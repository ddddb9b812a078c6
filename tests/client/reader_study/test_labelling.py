"""Workbooks are handed out, filled in and merged; two readers are blind to one another; nothing of a patient
is in a cell.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import pytest
import yaml
from PIL import Image

import client.reader_study.workbooks
from client.dicom.dicom_write import HeaderFacts, make_uid, write_slice
from client.labels.label_sheet import ImageName, RowKey, match_labels, read_labels
from client.labels.spreadsheet import SheetProblems
from client.reader_study.labelling import (
    _is_asked,
    _row_keys,
    check,
    hand_out,
    merge,
    report_text,
    site_images,
)
from client.reader_study.workbooks import About, Item, batch_name, picture, row_key
from client.site.config import SiteConfig
from common.artifacts import ARTIFACTS, DEFAULT_LABELS, INDEX, NAMES
from common.cli import main
from common.errors import ConfigError, DataError, FedqcError

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
METAL, BEAM, MOTION = INDEX["metal"], INDEX["beam_hardening"], INDEX["motion"]


def site(folder: Path, *, patients: int = 4, **fields: object) -> Path:
    """Patients 0, 2 … have CT, 1, 3 … MR; a series of three slices each."""
    for patient in range(patients):
        for number in range(3):
            path = folder / f"images/SECRETFOLDER{patient}/{number}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([patient, number]).uniform(0, 900, (16, 16))
            write_slice(
                path,
                pixels,
                HeaderFacts(
                    modality="MR" if patient % 2 else "CT",
                    pixel_spacing_mm=1.0,
                    patient_id=f"SECRETID{patient}",
                    study_uid=make_uid(b"%d" % patient),
                    series_uid=make_uid(b"series%d" % patient),
                    sop_uid=make_uid(str(path).encode()),
                    instance_number=3 - number,
                    manufacturer="SECRETMAKER",
                ),
            )
    values = {"name": "site-a", "kind": "synthetic", "cohort": "phantoms", "nominal_patients": 50} | fields
    (folder / "site.yaml").write_text(yaml.safe_dump(values))
    return folder


def files_of(folder: Path) -> dict[str, dict[str, str]]:
    """Reader → key of a row → file."""
    ours = site_images(folder, size=16)
    batch = batch_name("readers:7:image", ours.key)
    abouts = [About(batch=batch, reader=reader, per="image") for reader in ("1", "2", "3")]
    return {
        about.reader: {
            row_key(
                Item(identity=f"image:{record.file}#1", positions=(), modality=record.modality),
                about,
                ours.key,
            ): record.file
            for record in ours.records
        }
        for about in abouts
    }


def fill(path: Path, answer: Callable[[str, str, int], float | str | None], *, name: str = "") -> None:
    """Fill the open cells: `answer(key, title, row)`; titles are artifacts, also with _severity."""
    book = openpyxl.load_workbook(path)
    page = book.worksheets[0]
    titles = [str(cell.value).split("\n")[0] for cell in page[1]]
    for row in range(2, page.max_row + 1):
        for column in range(5, len(titles) + 1):
            cell = page.cell(row, column)
            if not cell.protection.locked:
                cell.value = answer(str(page.cell(row, 1).value), titles[column - 1], row)
    if name:
        book["how to 说明"].cell(2, 2).value = name
    book.save(path)


def labels_of(folder: Path) -> dict[str, dict[str, float]]:
    """File → artifact → consensus, as training would get it."""
    ours = site_images(folder, size=16)
    matched = match_labels(read_labels(ours.labels_path), ours.names, ours.may_occur, ours.site.consensus)
    return {
        record.file: dict(zip(INDEX, row.tolist(), strict=True))
        for record, row in zip(ours.records, matched.present, strict=True)
    }


def refusal(folder: Path, files: list[Path]) -> FedqcError:
    with pytest.raises(FedqcError) as caught:
        merge(folder, files, out=None, force=False, size=16)
    assert caught.value.hint
    return caught.value


def test_a_sheet_filled_and_merged_gives_the_expected_consensus(tmp_path: Path) -> None:
    folder = site(tmp_path)
    sheets = hand_out(folder, readers=2, out=None, per="image", size=16)
    assert [path.name for path in sheets] == ["labels-reader-1.xlsx", "labels-reader-2.xlsx"]
    files = files_of(folder)
    metal = {  # by reader and slice number: both 1, both 0, in dispute
        "1": {"0": 1, "1": 0, "2": 1},
        "2": {"0": 1, "1": 0, "2": 0},
    }
    for reader, path in zip(("1", "2"), sheets, strict=True):

        def says(key: str, title: str, row: int, reader: str = reader) -> float | None:
            file = files[reader][key]
            if title == "metal":
                return metal[reader][Path(file).stem]
            if title == "metal_severity" and metal[reader][Path(file).stem]:
                return 0.4 if reader == "1" else 0.8
            return {"motion": 0, "beam_hardening": None}.get(title)

        fill(path, says, name=f"Dr SECRETREADER {reader}")
    report = merge(folder, sheets, out=None, force=False, size=16)
    assert report["written"] == [str(folder / "labels.csv"), str(folder / "disputes.xlsx")]
    labels = labels_of(folder)
    for file, present in labels.items():
        ct = int(file[len("SECRETFOLDER")]) % 2 == 0
        expected = {"0": 1.0, "1": 0.0, "2": None}[Path(file).stem] if ct else None
        np.testing.assert_equal(present["metal"], np.nan if expected is None else expected)
        np.testing.assert_equal(present["motion"], np.nan if ct else 0.0)
        np.testing.assert_equal(present["beam_hardening"], np.nan)
    assert report["labels"]["metal"] == {"present": 2, "absent": 2, "disputed": 2, "incomplete": 0}
    table = read_labels(folder / "labels.csv")
    assert len(table.rows) == 24, "every reader's row is kept"
    assert [name for name, _ in table.readers] == ["reader-1", "reader-2"]
    (pair,) = report["agreement"]["metal"]["cohen"]
    assert (pair["n"], pair["patients"], pair["kappa"]) == (6, 2, 0.4)  # observed 4/6, by chance 4/9
    assert report["agreement"]["motion"]["cohen"][0]["kappa"] is None, "both always say 0"
    assert "who always say the same" in report_text(report)
    ours = site_images(folder, size=16)
    severity = match_labels(table, ours.names, ours.may_occur).severity[:, METAL]
    assert sorted(severity[~np.isnan(severity)].tolist()) == pytest.approx([0.6, 0.6]), (
        "the median of 0.4 and 0.8"
    )
    # The panel decides.
    disputes = folder / "disputes.xlsx"
    page = openpyxl.load_workbook(disputes).worksheets[0]
    assert page.max_row == 3
    assert all("metal: reader-" in str(page.cell(row, 5).value) for row in (2, 3))
    fill(disputes, lambda key, title, row: {"metal": 1, "metal_severity": 0.5}.get(title))
    again = merge(folder, [*sheets, disputes], out=None, force=True, size=16)
    assert again["written"] == [str(folder / "labels.csv")]
    assert again["labels"]["metal"] == {"present": 4, "absent": 2, "disputed": 0, "incomplete": 0}
    assert [reader["panel"] for reader in again["readers"]] == [False, False, True]
    everything = (folder / "labels.csv").read_text("utf-8-sig") + json.dumps([report, again]).replace(
        str(folder), ""
    )
    for secret in ("SECRETREADER", "SECRETID", "SECRETMAKER", "2.25."):
        assert secret not in everything
    assert "SECRETFOLDER" not in json.dumps([report, again]).replace(str(folder), "")


def test_the_merged_sheet_and_the_panels_answers_merge_as_well(tmp_path: Path) -> None:
    folder = site(tmp_path)
    sheets = hand_out(folder, readers=2, out=tmp_path / "given", per="image", size=16)
    fill(sheets[0], lambda key, title, row: {"metal": 1}.get(title))
    fill(sheets[1], lambda key, title, row: {"metal": 0}.get(title))
    merge(folder, sheets, out=None, force=False, size=16)
    fill(folder / "disputes.xlsx", lambda key, title, row: {"metal": 0}.get(title))
    report = merge(folder, [folder / "labels.csv", folder / "disputes.xlsx"], out=None, force=True, size=16)
    assert report["labels"]["metal"] == {"present": 0, "absent": 6, "disputed": 0, "incomplete": 0}
    assert list(report["blank_rows"].values()) == [0]
    assert {
        values["metal"] for values in labels_of(folder).values() if values["metal"] == values["metal"]
    } == {0.0}


def test_three_readers_of_a_unanimous_site(tmp_path: Path) -> None:
    folder = site(tmp_path, patients=2, consensus="unanimous")
    sheets = hand_out(folder, readers=3, out=None, per="image", size=16)
    files = files_of(folder)
    for reader, path in zip(("1", "2", "3"), sheets, strict=True):

        def says(key: str, title: str, row: int, reader: str = reader) -> int | None:
            number = Path(files[reader][key]).stem
            if title != "metal":
                return None
            return {"0": 1, "1": int(reader == "3"), "2": None if reader == "3" else 1}[number]

        fill(path, says)
    report = merge(folder, sheets, out=None, force=False, size=16)
    assert report["labels"]["metal"] == {"present": 1, "absent": 0, "disputed": 1, "incomplete": 1}
    assert report["agreement"]["metal"]["fleiss"]["n"] == 2
    assert len(report["agreement"]["metal"]["cohen"]) == 3
    assert sorted(report["blank_rows"].values()) == [3, 3, 4], (
        "three slices of MR, and one that reader 3 left out"
    )


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("per", ["image", "series"])
def test_readers_are_blind_to_one_another_and_to_who_it_is(tmp_path: Path, per: str) -> None:
    folder = site(tmp_path / "SECRETSITE")
    (folder / "labels.csv").write_text("file,metal\nSECRETFOLDER0/0.dcm,1\n")
    paths = hand_out(folder, readers=3, out=None, per="series" if per == "series" else "image", size=16)
    keys, orders = [], []
    for path in paths:
        assert path.stat().st_mode & 0o077 == 0
        for name, content in members(path).items():
            for secret in (b"SECRET", b"2.25.", b".dcm", str(tmp_path).encode(), make_uid(b"0").encode()):
                assert secret not in content + name.encode()
        page = openpyxl.load_workbook(path).worksheets[0]
        keys.append([str(page.cell(row, 1).value) for row in range(2, page.max_row + 1)])
        orders.append([members(path)[name] for name in sorted(members(path)) if name.endswith(".png")])
        answers = [
            page.cell(row, column).value
            for row in range(2, page.max_row + 1)
            for column in range(5, page.max_column + 1)
        ]
        assert answers
        assert not any(answers), "nobody's answers are in it"
    assert len(set().union(*keys)) == 3 * len(keys[0]) == 3 * (12 if per == "image" else 4), (
        "no key is in two workbooks"
    )
    assert all(Counter(order) == Counter(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_workbook_asks_what_can_occur_and_explains_itself(tmp_path: Path) -> None:
    (path,) = hand_out(site(tmp_path), readers=1, out=None, per="image", size=16)
    book = openpyxl.load_workbook(path)
    page, how, hidden = book.worksheets
    assert hidden.sheet_state == "hidden"
    assert page.protection.sheet
    titles = {str(cell.value).split("\n")[0]: cell.column for cell in page[1]}
    assert len(page._images) == 12
    for row in range(2, 14):
        ct = page.cell(row, titles["modality"]).value == "CT"
        for name, is_asked in (
            ("metal", ct),
            ("metal_severity", ct),
            ("motion", not ct),
            ("motion_severity", not ct),
        ):
            cell = page.cell(row, titles[name])
            assert cell.protection.locked is not is_asked
            assert (cell.fill.fill_type == "solid") is not is_asked
        assert page.cell(row, titles["key"]).protection.locked
    rules = {str(rule.sqref): rule for rule in page.data_validations.dataValidation}
    letter = page.cell(1, titles["metal"]).column_letter
    assert rules[f"{letter}2:{letter}13"].formula1 == '"1,0"'
    assert rules[f"{letter}2:{letter}13"].allow_blank
    letter = page.cell(1, titles["metal_severity"]).column_letter
    assert (rules[f"{letter}2:{letter}13"].formula1, rules[f"{letter}2:{letter}13"].formula2) == ("0", "1")
    text = "\n".join(str(row[0].value) for row in how.iter_rows())
    for artifact in ARTIFACTS:
        is_asked = artifact.name in DEFAULT_LABELS
        assert (artifact.definition in text) == is_asked
        assert (artifact.chinese in text) == is_asked
    assert "Blank is not 0" in text
    assert "留空不等于 0" in text


def test_readers_are_asked_about_more_where_the_site_says_that_it_is_assessed() -> None:
    about = {"name": "a", "kind": "public", "cohort": "c", "nominal_patients": 1}
    site = SiteConfig.model_validate({**about, "assessed": ("quality", "ct_motion")})
    asked = dict(zip(NAMES, _is_asked(site, "CT"), strict=True))
    assert [name for name, wanted in asked.items() if wanted] == [
        "metal",
        "beam_hardening",
        "quality",
        "ct_motion",
    ]
    assert _is_asked(site, "MR")[INDEX["quality"]]
    assert not _is_asked(SiteConfig.model_validate(about), "MR")[INDEX["quality"]]


def test_a_picture_shows_ct_in_two_windows_and_a_series_from_first_to_last() -> None:
    image = np.full((1, 32, 32), 40, np.int16)
    image[0, :, 16:] = 1500
    ct = np.asarray(Image.open(io.BytesIO(picture(image, "CT"))))
    assert ct.shape == (128, 256)
    # 40 and 1500 HU in -160..240, then in -1000..2000
    assert ct[64, [10, 120, 138, 250]].tolist() == [
        128,
        255,
        88,
        212,
    ]
    series = np.stack([np.full((32, 32), 4096 * step // 9, np.int16) for step in range(10)])
    mr = np.asarray(Image.open(io.BytesIO(picture(series, "MR"))))
    assert mr.shape == (128, 128 + 4 * 64)
    small = [int(mr[row, column]) for row in (32, 96) for column in range(160, 384, 64)]
    assert small == sorted(small)
    assert (small[0], small[-1]) == (0, 255)


def test_a_series_is_one_answer(tmp_path: Path) -> None:
    folder = site(tmp_path)
    sheets = hand_out(folder, readers=2, out=None, per="series", size=16)
    for path in sheets:
        fill(path, lambda key, title, row: {"metal": 1, "motion": 0}.get(title))
    report = merge(folder, sheets, out=None, force=False, size=16)
    assert report["labels"]["metal"]["present"] == 6
    assert all((values["metal"] == 1) or (values["motion"] == 0) for values in labels_of(folder).values())


def test_a_merged_row_names_its_images_and_no_others() -> None:
    names = [
        ImageName(file="a", series_uid="1.2"),
        ImageName(file="b", series_uid="1.2"),
        ImageName(file="c", series_uid="1.3"),
        ImageName(file="m", series_uid="1.4", frame=1),
        ImageName(file="m", series_uid="1.4", frame=2),
        ImageName(file="e"),
    ]
    sizes, shared = Counter(name.series_uid for name in names), {"m"}

    def keys(per: str, *positions: int) -> list[RowKey]:
        item = Item(identity="", positions=positions, modality="CT")
        return _row_keys(names, item, "series" if per == "series" else "image", sizes, shared)

    assert keys("series", 0, 1) == [RowKey(series_uid="1.2")]
    assert keys("series", 0) == [RowKey(file="a")], "half of a series"
    assert keys("series", 1, 2) == [RowKey(file="b"), RowKey(file="c")]
    assert keys("series", 5) == [RowKey(file="e")], "no UID"
    assert keys("image", 4) == [RowKey(file="m", frame=2)]
    assert keys("image", 0) == [RowKey(file="a")]


def test_a_workbook_of_another_site_or_reader_is_refused(tmp_path: Path) -> None:
    here, there = site(tmp_path / "here"), site(tmp_path / "there")
    (foreign,) = hand_out(there, readers=1, out=None, per="image", size=16)
    fill(foreign, lambda key, title, row: {"metal": 1}.get(title))
    assert refusal(here, [foreign]).code == "other-site"
    ours = hand_out(here, readers=2, out=None, per="image", size=16)
    for path in ours:
        fill(path, lambda key, title, row: {"metal": 1}.get(title))
    first, second = (openpyxl.load_workbook(path) for path in ours)
    for column in range(1, 12):
        first.worksheets[0].cell(3, column).value = second.worksheets[0].cell(3, column).value
    first.worksheets[0].cell(5, 1).value = first.worksheets[0].cell(4, 1).value
    first.save(ours[0])
    error = refusal(here, ours)
    assert isinstance(error, SheetProblems)
    assert [(one.sheet, one.row, one.code) for one in error.problems] == [
        (1, 3, "unknown-key"),
        (1, 5, "duplicate-label"),
    ]
    hidden = openpyxl.load_workbook(ours[1])
    hidden["fedqc"]["B1"] = "elsewhere"
    hidden.save(ours[1])
    assert refusal(here, [ours[1]]).code == "bad-label"


def test_every_problem_of_every_workbook_in_one_pass_and_nothing_written(tmp_path: Path) -> None:
    folder = site(tmp_path)
    sheets = hand_out(folder, readers=2, out=None, per="image", size=16)
    fill(
        sheets[0],
        lambda key, title, row: {"metal": "maybe" if row % 2 else 1, "metal_severity": 7}.get(title),
    )
    book = openpyxl.load_workbook(sheets[1])
    page = book.worksheets[0]
    titles = {str(cell.value).split("\n")[0]: cell.column for cell in page[1]}
    mr = next(row for row in range(2, 14) if page.cell(row, titles["modality"]).value == "MR")
    page.cell(mr, titles["metal"]).value = 1
    page.cell(mr, titles["motion"]).value = "=1+1"
    book.save(sheets[1])
    error = refusal(folder, sheets)
    assert isinstance(error, SheetProblems)
    found = Counter((one.sheet, one.title, one.code) for one in error.problems)
    assert found[1, "metal_severity", "bad-label"] == 6
    assert (
        found[1, "metal", "bad-label"]
        == sum(1 for one in error.problems if (one.sheet, one.title) == (1, "metal"))
        > 0
    )
    assert found[2, "metal", "wrong-modality"] == found[2, "motion", "bad-label"] == 1
    assert "maybe" not in str([*map(str, error.problems), error])
    assert sorted(path.name for path in folder.iterdir()) == ["images", "sheets", "site.yaml", "state"]


def test_a_sheet_and_a_panels_answers_are_never_overwritten(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").write_text("file,metal,part\nSECRETFOLDER0/0.dcm,1,test\n")
    sheets = hand_out(folder, readers=2, out=None, per="image", size=16)
    fill(sheets[0], lambda key, title, row: {"metal": 1}.get(title))
    fill(sheets[1], lambda key, title, row: {"metal": 0}.get(title))
    assert refusal(folder, sheets).code == "output-exists"
    assert (folder / "labels.csv").read_text().startswith("file,metal,part")
    with pytest.raises(ConfigError) as again:
        hand_out(folder, readers=2, out=None, per="image", size=16)
    assert again.value.code == "output-exists"
    elsewhere = merge(folder, sheets, out=tmp_path / "merged", force=False, size=16)
    assert elsewhere["written"] == [
        str(tmp_path / "merged/labels.csv"),
        str(tmp_path / "merged/disputes.xlsx"),
    ]
    (folder / "disputes.xlsx").write_bytes(b"the panel's work")
    forced = merge(folder, [folder / "labels.csv", *sheets], out=None, force=True, size=16)
    assert forced["written"] == [str(folder / "labels.csv"), str(folder / "disputes-2.xlsx")]
    assert (folder / "disputes.xlsx").read_bytes() == b"the panel's work"
    assert forced["split"] == "fixed list and keyed hash", "a fixed part of the merged sheet stays"
    assert len(forced["readers"]) == 3
    assert refusal(folder, [sheets[0], sheets[0]]).code == "output-exists"
    with pytest.raises(SheetProblems) as caught:
        merge(folder, [sheets[0], sheets[0]], out=None, force=True, size=16)
    assert {one.code for one in caught.value.problems} == {"duplicate-label"}


def test_arguments_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = site(tmp_path)
    with pytest.raises(ConfigError, match="--sheets = 0"):
        hand_out(folder, readers=0, out=None, per="image", size=16)
    with pytest.raises(ConfigError, match="inside the images"):
        hand_out(folder, readers=1, out=folder / "images/sheets", per="image", size=16)
    monkeypatch.setattr(client.reader_study.workbooks, "MAX_ROWS", 11)
    with pytest.raises(DataError) as caught:
        hand_out(folder, readers=1, out=None, per="image", size=16)
    assert caught.value.code == "too-many-rows"
    assert not (folder / "sheets").exists()
    (sheet,) = hand_out(folder, readers=1, out=None, per="series", size=16)
    assert refusal(folder, [sheet]).code == "labels-match-nothing", "nobody has filled it in"
    assert not (folder / "labels.csv").exists()


def test_another_seed_is_another_batch(tmp_path: Path) -> None:
    folder = site(tmp_path)

    def keys(out: str, seed: int) -> list[str]:
        (path,) = hand_out(folder, readers=1, out=tmp_path / out, per="image", seed=seed, size=16)
        page = openpyxl.load_workbook(path).worksheets[0]
        return [str(page.cell(row, 1).value) for row in range(2, page.max_row + 1)]

    assert keys("a", 1) == keys("b", 1)
    assert set(keys("c", 2)).isdisjoint(keys("d", 1))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def test_the_command_lists_every_problem_and_names_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = site(tmp_path)
    rows = ["文件,阅片人,金属伪影,运动伪影,斑马纹"]
    rows += [
        f"SECRETFOLDER{patient}/{n}.dcm,SECRETNAME{r},{(n + r) % 2},0,1"
        for patient in (0, 2)
        for n in range(3)
        for r in range(3)
    ]
    rows += [
        "SECRETFOLDER0/0.dcm,SECRETNAME1,1,,",
        "SECRETGONE.dcm,SECRETNAME1,1,,",
        "SECRETFOLDER1/0.dcm,SECRETNAME1,SECRETCELL,,",
    ]
    (folder / "labels.csv").write_text("\n".join(rows), encoding="gb18030")
    status, out, err = run(capsys, "data", "labels", folder, "--format", "json")
    assert status == 2
    assert err.startswith("fedqc: error [unknown-artifact]")
    report = json.loads(out)
    assert [(one["row"], one["column"], one["code"]) for one in report["problems"]] == [
        (1, "E", "unknown-artifact"),
        (20, None, "duplicate-label"),
        (22, "C", "bad-label"),
    ]
    assert report["rows_without_image"] == {"count": 1, "rows": [21]}
    assert len(report["disputes"]) == 6
    assert len(report["agreement"]["metal"]["cohen"]) == 3
    assert report["agreement"]["metal"]["fleiss"]["n"] == 6
    _, text, _ = run(capsys, "data", "labels", folder)
    assert "row 22, column C (metal): [bad-label]" in text
    assert "1 rows without an image: row 21" in text
    assert "in dispute: metal of file 1: reader-" in text
    status, checked, _ = run(capsys, "data", "check", folder, "--format", "json")
    assert status == 2
    assert json.loads(checked)["problems"] == report["problems"]
    for said in (out, text, checked, err.replace(str(folder), "")):
        assert "SECRET" not in said
    status, out, _ = run(
        capsys, "data", "labels", folder, "--sheets", 2, "--per", "series", "--format", "json"
    )
    assert (status, len(json.loads(out)["written"])) == (0, 2)
    assert run(capsys, "data", "labels", folder, "--sheets", 2, "--merge", "x.xlsx")[0] == 2


def test_a_good_sheet_of_one_reader_needs_no_reader(tmp_path: Path) -> None:
    folder = site(tmp_path)
    (folder / "labels.csv").write_text(
        "file,metal,part\nSECRETFOLDER0/0.dcm,1,test\nSECRETFOLDER0/1.dcm,0,test\n"
    )
    report, refused = check(folder, size=16)
    assert refused is None
    assert report["readers"] == [{"reader": "", "panel": False, "answers": 2}]
    assert report["agreement"] == {}
    assert (report["split"], report["fixed_images"]) == ("fixed list and keyed hash", 2)
    assert "answers of one reader: 2" in report_text(report)


@needs_real_data
def test_real_series_come_back_from_a_workbook(tmp_path: Path) -> None:
    images = Path(str(REAL)) / "site_ct_ge_lightspeed_qiicr"
    values = {
        "name": "site-a",
        "kind": "public",
        "cohort": "real",
        "nominal_patients": 50,
        "images": str(images),
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(values))
    (sheet,) = hand_out(tmp_path, readers=1, out=None, per="image")
    for content in members(sheet).values():
        for path in images.rglob("*.*"):
            assert path.name.encode() not in content
    fill(sheet, lambda key, title, row: {"metal": 0, "beam_hardening": 0}.get(title))
    report = merge(tmp_path, [sheet], out=None, force=False)
    assert report["labels"]["metal"]["absent"] == report["rows"] > 0
