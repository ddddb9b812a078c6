"""A label sheet is right, or every problem is listed by row, column, code and what is allowed, without a word
of the sheet's content.
"""

from __future__ import annotations

import datetime
import io
import math
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import openpyxl
import pytest

import client.labels.spreadsheet
from client.dicom.index import identifier
from client.labels.label_sheet import (
    ImageName,
    LabelTable,
    RowKey,
    inspect_labels,
    inspect_match,
    match_labels,
    read_labels,
    to_csv,
)
from client.labels.spreadsheet import SheetProblems, letters
from common.artifacts import INDEX, MODALITIES, NAMES, applies_to
from common.errors import DataError

KEY = bytes(range(32))
METAL, MOTION = INDEX["metal"], INDEX["motion"]


def sheet(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def workbook(folder: Path, rows: list[list[object]]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(folder / "labels.xlsx")
    return folder / "labels.xlsx"


def refusal(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_labels(path)
    assert caught.value.hint
    return caught.value


def problems(path: Path) -> list[tuple[int, str | None, str]]:
    return [
        (one.row, one.column and letters(one.column), one.code)  # type: ignore[misc]
        for one in SheetProblems(inspect_labels(path)[1], [path]).problems
    ]


def may_occur(*modalities: str) -> np.ndarray:
    return np.array([applies_to(name) for name in modalities]).reshape(-1, len(NAMES))


def test_blank_is_not_assessed_and_zero_is_absent(tmp_path: Path) -> None:
    table = read_labels(
        sheet(tmp_path, "file,metal,motion,metal_severity,part\na/1.dcm,1,,0.5,train\na/2.dcm,0,1.0,,\n\n")
    )
    first, second = table.rows
    assert (first.row, first.key, first.part) == (2, RowKey(file="a/1.dcm"), "train")
    assert first.present[METAL] == 1
    assert first.severity[METAL] == 0.5
    assert math.isnan(first.present[MOTION])
    assert math.isnan(first.present[INDEX["beam_hardening"]])
    assert second.present[METAL] == 0
    assert second.present[MOTION] == 1
    assert second.part is None
    assert table.artifacts == ("metal", "motion")
    assert table.readers == (("", False),)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_chinese_names_synonyms_and_spreadsheets_of_china(tmp_path: Path, encoding: str) -> None:
    header = "文件路径,金属伪影,Cupping,ghosting,chemical shift,金属伪影严重程度,阅片人,级别,划分,备注"
    rows = "肺/1.dcm,有,否,,,１,王医生,仲裁,test,随便\n肺/1.dcm,是,无,,,０.５,李医生,一级,,\n"
    table = read_labels(sheet(tmp_path, f"{header}\n{rows}", encoding))
    assert table.artifacts == ("metal", "beam_hardening", "motion", "chemical_shift")
    panel, first = table.rows
    assert [row.key.file for row in table.rows] == ["肺/1.dcm"] * 2
    assert (panel.is_panel, panel.part, first.is_panel, first.part) == (True, "test", False, None)
    assert (panel.present[METAL], panel.present[INDEX["beam_hardening"]], panel.severity[METAL]) == (1, 0, 1)
    assert (first.present[METAL], first.severity[METAL]) == (1, 0.5)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_separators_of_other_countries(tmp_path: Path, delimiter: str) -> None:
    table = read_labels(sheet(tmp_path, "file,metal,motion\na b.dcm,1,0\n".replace(",", delimiter)))
    assert (table.rows[0].key.file, table.rows[0].present[METAL], table.rows[0].present[MOTION]) == (
        "a b.dcm",
        1,
        0,
    )


def test_windows_paths_are_read(tmp_path: Path) -> None:
    assert read_labels(sheet(tmp_path, "file,metal\r\n.\\a\\1.dcm,1\r\n")).rows[0].key.file == "a/1.dcm"


@pytest.mark.parametrize(
    "text",
    ["", "\n", "image,metal\n", "file\na,\n", "file,part\na,train\n", "file,metal\n", "series,metal\n3,1\n"],
)
def test_labels_missing(tmp_path: Path, text: str) -> None:
    path = sheet(tmp_path, text)
    refusal(path)
    assert "labels-missing" in {code for _, _, code in problems(path)}
    assert refusal(tmp_path / "absent.csv").code == "labels-missing"


def test_an_unknown_column_lists_the_known_ones_and_is_named_by_its_letter(tmp_path: Path) -> None:
    error = refusal(sheet(tmp_path, "file,metal,zebra\na,1,0\n"))
    assert error.code == "unknown-artifact"
    assert "row 1, column C" in error.message
    assert "zebra" not in error.message, "a sheet without a header has patients there"
    assert all(name in error.message for name in NAMES)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.dcm,2,,", ("row 2, column B (metal)", "1, 0 or blank")),
        ("a.dcm,yes,,", ("row 2, column B (metal)",)),
        ("a.dcm,nan,,", ("row 2, column B (metal)",)),
        ("a.dcm,0.5,,", ("row 2, column B (metal)",)),
        ("a.dcm,1,1.5,", ("column C (metal_severity)", "0 to 1")),
        ("a.dcm,1,nan,", ("column C (metal_severity)",)),
        ("a.dcm,1,-0.1,", ("column C (metal_severity)",)),
        ("a.dcm,0,0.5,", ("column C (metal_severity)", "metal is not 1")),
        ("a.dcm,1,,training", ("column D (part)", "train, validation, test")),
        (",1,,", ("row 2", "file")),
        ("/abs/a.dcm,1,,", ("column A (file)", "relative")),
        ("../a.dcm,1,,", ("column A (file)",)),
        ("C:\\a.dcm,1,,", ("column A (file)",)),
        (".,1,,", ("column A (file)",)),
        ("a.dcm,1,,,1", ("row 2", "as many cells as the header")),
        ('"a.dcm,1,,', ("row 2", "CSV")),
    ],
)
def test_bad_label_names_row_column_and_bound_but_no_value(
    tmp_path: Path, row: str, words: tuple[str, ...]
) -> None:
    error = refusal(sheet(tmp_path, f"file,metal,metal_severity,part\n{row}\n"))
    assert error.code == "bad-label"
    for word in ("labels.csv", *words):
        assert word in error.message
    for value in ("a.dcm", "yes", "nan", "1.5", "training", "abs"):
        assert value not in error.message.removeprefix(str(tmp_path))


def test_two_columns_for_one_artifact(tmp_path: Path) -> None:
    assert problems(sheet(tmp_path, "file,metal,metallic\na,1,0\n")) == [(1, "C", "bad-label")]


def test_a_column_without_a_title_is_not_passed_over(tmp_path: Path) -> None:
    path = sheet(tmp_path, "file,,metal,\na,,1,\nb,x,1,\nc,y,1,\n")
    assert problems(path) == [(3, "B", "bad-label")]


def test_duplicate_label_names_both_rows(tmp_path: Path) -> None:
    error = refusal(sheet(tmp_path, "file,metal\na.dcm,1\nb.dcm,1\n./a.dcm,0\n"))
    assert error.code == "duplicate-label"
    assert "row 4" in error.message
    assert "row 2 is the other" in error.message


def test_every_problem_is_listed_in_one_pass(tmp_path: Path) -> None:
    """Three readers, disputes, unknown names, duplicates, rows without images, GB 18030 with Chinese
    headers.
    """
    path = sheet(
        tmp_path,
        "文件,阅片人,金属伪影,斑马纹,射束硬化伪影\n"  # row 1: nobody knows column D
        "一.dcm,甲,1,1,0\n"
        "一.dcm,乙,0,,0\n"  # row 3: metal in dispute with row 2
        "一.dcm,丙,1,,0\n"
        "二.dcm,甲,也许,,0\n"  # row 5, column C
        "二.dcm,甲,1,,0\n"  # row 6: row 5 again
        "二.dcm,,1,,0\n"  # row 7: no reader
        "三.dcm,乙,1,,0\n"  # row 8: no such image
        "../四.dcm,乙,1,,7\n",  # row 9, columns A and E
        "gb18030",
    )
    table, found = inspect_labels(path, key=KEY)
    assert [(one.row, one.column, one.code) for one in SheetProblems(found, [path]).problems] == [
        (1, 4, "unknown-artifact"),
        (5, 3, "bad-label"),
        (6, None, "duplicate-label"),
        (7, 2, "bad-label"),
        (9, 1, "bad-label"),
        (9, 5, "bad-label"),
    ]
    error = refusal(path)
    assert isinstance(error, SheetProblems)
    assert len(error.problems) == 6
    assert error.message.endswith("and 5 more problems")
    matched, more = inspect_match(
        table, [ImageName(file="一.dcm"), ImageName(file="二.dcm")], may_occur("CT", "CT")
    )
    assert more == ()
    assert matched.rows_without_image == (8,)
    assert matched.disputed[0].tolist() == [True, *[False] * (len(NAMES) - 1)]
    assert matched.present[0, INDEX["beam_hardening"]] == 0
    shown = (
        error.message
        + " ".join(map(str, found))
        + repr([one.public() for one in found])
        + repr(matched.readers)
    )
    for secret in "一二三四甲乙丙也":
        assert secret not in shown.removeprefix(str(tmp_path))


def test_readers_become_keyed_pseudonyms_and_stay_them(tmp_path: Path) -> None:
    path = sheet(tmp_path, "file,reader,metal\na,Dr. Wang,1\nb, dr.  WANG ,1\na,Li,1\n")
    named = read_labels(path, key=KEY)
    (first, _), (second, _) = named.readers
    assert first.startswith("reader-")
    assert len({first, second}) == 2
    assert named.rows[1].reader == first, "case and blanks do not make another reader"
    assert read_labels(path, key=bytes(32)).readers[0][0] != first
    assert [name for name, _ in read_labels(path).readers] == ["reader-1", "reader-2"]
    again = read_labels(sheet(tmp_path, to_csv(named.rows)), key=KEY)
    assert again.rows == named.rows


def test_a_row_names_every_image_that_fits_all_of_its_keys(tmp_path: Path) -> None:
    images = [
        ImageName(
            file="a/1", sop_uid="1.2.1", series_uid="1.2", study_uid="1.9", accession="A1", series_number=3
        ),
        ImageName(
            file="a/2", sop_uid="1.2.2", series_uid="1.2", study_uid="1.9", accession="A1", series_number=3
        ),
        ImageName(
            file="b/1", sop_uid="1.3.1", series_uid="1.3", study_uid="1.9", accession="A1", series_number=4
        ),
        ImageName(
            file="multi",
            sop_uid="1.4.1",
            series_uid="1.4",
            study_uid="1.8",
            accession="A2",
            series_number=3,
            frame=1,
        ),
        ImageName(
            file="multi",
            sop_uid="1.4.1",
            series_uid="1.4",
            study_uid="1.8",
            accession="A2",
            series_number=3,
            frame=2,
        ),
    ]

    def labelled(header: str, row: str) -> list[int]:
        table = read_labels(sheet(tmp_path, f"{header},metal\n{row},1\n"))
        matched, _ = inspect_match(table, images, may_occur(*["CT"] * 5))
        return np.flatnonzero(matched.present[:, METAL] == 1).tolist()

    assert labelled("file", "a/2") == [1]
    assert labelled("path", "multi") == [3, 4]
    assert labelled("file,帧", "multi,2") == [4]
    assert labelled("SOPInstanceUID", "1.3.1") == [2]
    assert labelled("影像UID,frame", "1.4.1,1") == [3]
    assert labelled("Series Instance UID", "1.2") == [0, 1]
    assert labelled("检查UID", "1.9") == [0, 1, 2]
    assert labelled("accession", "A1") == [0, 1, 2]
    assert labelled("检查号,序列号", "A1,3.0") == [0, 1]
    assert labelled("accession,series", "Ａ1,４") == [2]
    assert labelled("study_uid,series", "1.9,4") == [2]
    assert labelled("file,series_uid", "a/1,1.3") == [], "keys that contradict one another name nothing"


def test_the_most_specific_row_of_a_reader_that_assessed_an_artifact_counts(tmp_path: Path) -> None:
    text = (
        "file,series_uid,study_uid,metal,beam_hardening\n"
        "one,,,0,\n"  # an image of the series: no metal here; beam hardening is left to the series
        ",1.2,,1,1\n"
        ",,1.9,0,0\n"
    )
    images = [
        ImageName(file=name, series_uid=uid, study_uid="1.9")
        for name, uid in (("one", "1.2"), ("two", "1.2"), ("three", "1.3"))
    ]
    matched = match_labels(read_labels(sheet(tmp_path, text)), images, may_occur("CT", "CT", "CT"))
    assert matched.present[:, :2].tolist() == [[0, 1], [1, 1], [0, 0]]


def test_one_reader_twice_about_one_image_by_different_keys(tmp_path: Path) -> None:
    images = [ImageName(file="one", sop_uid="1.2.3"), ImageName(file="two", sop_uid="1.2.4")]
    text = "file,sop_uid,reader,metal\none,,A,1\n,1.2.3,A,0\n,1.2.4,A,1\n,1.2.3,B,1\n"
    with pytest.raises(SheetProblems) as caught:
        match_labels(read_labels(sheet(tmp_path, text)), images, may_occur("CT", "CT"))
    assert [(one.row, one.code) for one in caught.value.problems] == [(3, "duplicate-label")]
    assert "row 2 names it" in caught.value.message


def test_one_image_in_two_parts_is_a_leak(tmp_path: Path) -> None:
    images = [ImageName(file="one", series_uid="1.2"), ImageName(file="two", series_uid="1.2")]
    table = read_labels(sheet(tmp_path, "file,series_uid,metal,part\none,,1,test\n,1.2,1,train\n"))
    with pytest.raises(SheetProblems) as caught:
        match_labels(table, images, may_occur("CT", "CT"))
    assert caught.value.code == "leak"


def test_a_fixed_list_is_told_from_the_hash(tmp_path: Path) -> None:
    def matched(rows: str) -> tuple[str, int]:
        found = match_labels(
            read_labels(sheet(tmp_path, "file,metal,part\n" + rows)), ["a", "b"], may_occur("CT", "CT")
        )
        return found.split, found.fixed_images

    assert matched("a,1,\nb,1,\n") == ("keyed hash", 0)
    assert matched("a,1,test\nb,1,\n") == ("fixed list and keyed hash", 1)
    assert matched("a,1,test\nb,1,train\n") == ("fixed list", 2)


def test_the_one_column_of_severity_is_about_what_is_present(tmp_path: Path) -> None:
    path = sheet(
        tmp_path, "file,metal,beam_hardening,metal_severity,严重程度\na,1,1,0.9,0.3\nb,1,0,,0.3\nc,0,0,,\n"
    )
    a, b, c = read_labels(path).rows
    assert a.severity[:2] == (0.9, 0.3), "an artifact's own column says more"
    assert b.severity[METAL] == 0.3
    assert all(math.isnan(value) for value in (b.severity[1], *c.severity))
    assert problems(sheet(tmp_path, "file,metal,severity\na,0,0.3\n")) == [(2, "C", "bad-label")]


def test_everything_is_counted_when_labels_meet_images(tmp_path: Path) -> None:
    table = read_labels(
        sheet(tmp_path, "file,metal,motion\nct.dcm,1,0\nmr.dcm,,1\nwrong.dcm,1,1\ngone.dcm,1,\n")
    )
    matched = match_labels(
        table, ["ct.dcm", "mr.dcm", "new.dcm", "wrong.dcm"], may_occur("CT", "MR", "CT", "MR")
    )
    assert matched.rows_without_image == (5,)
    assert matched.images_without_label == 1
    assert matched.wrong_modality == (4,)
    assert matched.present.dtype == matched.severity.dtype == np.float32
    assert matched.present[0, METAL] == 1
    assert np.isnan(matched.present[0, MOTION])  # absent, but it cannot occur in CT
    assert np.isnan(matched.present[2]).all()
    assert np.isnan(matched.present[3, METAL])
    assert matched.present[3, MOTION] == 1


def test_a_study_of_two_modalities_may_claim_what_one_of_them_shows(tmp_path: Path) -> None:
    images = [ImageName(file="ct", study_uid="1.9"), ImageName(file="mr", study_uid="1.9")]
    matched = match_labels(
        read_labels(sheet(tmp_path, "study_uid,metal\n1.9,1\n")), images, may_occur("CT", "MR")
    )
    assert matched.wrong_modality == ()
    assert matched.present[0, METAL] == 1
    assert np.isnan(matched.present[1, METAL])


def test_labels_that_match_nothing(tmp_path: Path) -> None:
    table = read_labels(sheet(tmp_path, "file,metal\nimages/ct.dcm,1\n"))
    with pytest.raises(DataError) as caught:
        match_labels(table, ["ct.dcm"], may_occur("CT"))
    assert caught.value.code == "labels-match-nothing"
    assert "images/ct.dcm" not in caught.value.message
    assert MODALITIES == ("CT", "MR")


def test_a_workbook_reads_as_the_csv_does(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["文件", "检查号", "序列", "阅片人", "metal", "motion", "metal_severity", "备注"],
        ["a.dcm", "1234", 3.0, "王", 1, None, 0.25, datetime.date(2026, 1, 2)],
        [None] * 8,
        ["b.dcm", "0012", 4, "王", 0.0, "１", None, None],
    ]
    table = read_labels(workbook(tmp_path, rows), key=KEY)
    text = (
        "文件,检查号,序列,阅片人,metal,motion,metal_severity\n"
        "a.dcm,1234,3,王,1,,0.25\n\nb.dcm,0012,4,王,0,1,\n"
    )
    assert table.rows == read_labels(sheet(tmp_path, text), key=KEY).rows
    assert table.rows[1].row == 4


def test_what_a_spreadsheet_spoils_is_named(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        ["sop_uid", "accession", "metal"],
        [1.2e30, None, 1],  # a UID that became a number
        ["1.2.2", 12345, 1],  # a number may have lost leading zeros
        [None, 12345678901234567890.0, 1],
        [None, datetime.datetime(2026, 1, 2), 1],
        ["1.2.3", None, "=1+0"],
        ["1.2.4", None, "#DIV/0!"],
        ["1.2.5", None, datetime.date(1900, 1, 1)],
        ["1.2.6", None, True],
    ]
    assert problems(workbook(tmp_path, rows)) == [
        (2, "A", "not-text"),
        (3, "B", "not-text"),
        (4, "B", "not-text"),
        (5, "B", "not-text"),
        (6, "C", "bad-label"),
        (7, "C", "bad-label"),
        (8, "C", "not-text"),
        (9, "C", "bad-label"),
    ]
    assert "as text" in refusal(workbook(tmp_path, rows)).message


def test_opening_a_workbook_says_nothing_of_its_cells(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    book = openpyxl.Workbook()
    book.active.append(["file", "accession", "metal"])
    book.active.append([None, 98765432109, 1])
    book.active["B2"].number_format = "yyyy-mm-dd"  # no such day: openpyxl would warn, with the number
    book.save(tmp_path / "labels.xlsx")
    assert problems(tmp_path / "labels.xlsx")[0] == (2, "B", "bad-label")
    assert not [one for one in recwarn.list if "98765432109" in str(one.message)]


def repacked(path: Path, **members: bytes) -> Path:
    """The workbook with some members replaced."""
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (kept | members).items():
            archive.writestr(name, content)
    return path


def test_a_hostile_workbook_is_refused_before_it_unpacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def good() -> Path:
        return workbook(tmp_path, [["file", "metal"], ["a", 1]])

    page = "xl/worksheets/sheet1.xml"
    head = b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
    tail = b"</sheetData></worksheet>"
    monkeypatch.setattr(client.labels.spreadsheet, "MAX_UNPACKED_BYTES", 1 << 20)
    assert "unpacks" in refusal(repacked(good(), **{page: bytes(2 << 20)})).message
    assert (
        "entities"
        in refusal(repacked(good(), **{page: b'<!DOCTYPE a [<!ENTITY b "c">]>' + head + tail})).message
    )
    assert "entities" in refusal(repacked(good(), **{page: (head + tail).decode().encode("utf-16")})).message
    assert (
        "rows"
        in refusal(
            repacked(good(), **{page: head + b'<row r="99999999"><c r="A99999999"><v>1</v></c></row>' + tail})
        ).message
    )
    wide = b"".join(b'<row r="%d"><c r="XFD%d"><v>1</v></c></row>' % (n, n) for n in range(1, 4000))
    assert "cells" in refusal(repacked(good(), **{page: head + wide + tail})).message
    assert "workbook" in refusal(repacked(good(), **{page: b"<worksheet"})).message
    cut = good()
    cut.write_bytes(cut.read_bytes()[:-100])
    assert refusal(cut).code == "bad-label"


def test_a_workbook_of_one_huge_cell_or_of_endless_tags_is_refused_in_little_memory(tmp_path: Path) -> None:
    page, strings = "xl/worksheets/sheet1.xml", "xl/sharedStrings.xml"
    cell, many = b"<row><c t='inlineStr'><is><t>", 9 << 20
    hostile = {
        "KiB": {page: cell + b"x" * (100 << 20)},
        "cell": {strings: b"<sst><si a='" + b"x" * (64 << 20) + b"'/></sst>"},
        "tags": {strings: b"<sst>" + b"<si/>" * many},
        "styles": {"xl/styles.xml": b"<styleSheet><cellXfs>" + b"<xf/>" * 300_000},
        "names": {"xl/workbook.xml": b"<workbook>" + b"<definedName/>" * 300_000},
    }
    for name, members in hostile.items():
        path = repacked(workbook(tmp_path, [["file", "metal"], ["a", 1]]), **members)
        members.clear()
        tracemalloc.start()
        try:
            assert refusal(path).code == "bad-label", name
            assert tracemalloc.get_traced_memory()[1] < 32 << 20, name
        finally:
            tracemalloc.stop()


def test_cells_that_share_one_long_text_are_refused_in_little_memory(tmp_path: Path) -> None:
    """Two kilobytes of a workbook: each cell without its blank was a quarter of a megabyte of its own."""
    space = b"xmlns='http://schemas.openxmlformats.org/spreadsheetml/2006/main'"
    text = b"x" * 250_000
    shared = b"<sst %s><si><t>file</t></si><si><t xml:space='preserve'>%s </t></si></sst>" % (space, text)
    cells = b"<row><c t='s'><v>1</v></c></row>" * 2000
    page = b"<worksheet %s><sheetData>%s</sheetData></worksheet>" % (space, cells)
    path = workbook(tmp_path, [["file", "metal"], ["a", 1]])
    with zipfile.ZipFile(path) as archive:
        types = archive.read("[Content_Types].xml")
    declared = (
        b'<Override PartName="/xl/sharedStrings.xml" ContentType="application/'
        b'vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"/></Types>'
    )
    members = {
        "xl/sharedStrings.xml": shared,
        "xl/worksheets/sheet1.xml": page,
        "[Content_Types].xml": types.replace(b"</Types>", declared),
    }
    path = repacked(path, **members)
    tracemalloc.start()
    try:
        assert "characters" in refusal(path).message
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"\n" * (5 << 20), b"\r" * (5 << 20), b"," * (21 << 20)])
def test_a_csv_of_nothing_but_rows_or_cells_is_refused_in_little_memory(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"file,metal\n" + content)
    tracemalloc.start()
    try:
        assert "cells" in refusal(path).message
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_a_long_note_in_a_cell_is_read(tmp_path: Path) -> None:
    note = "&<ε" * 10_000  # Excel's own limit is 32 767 characters
    rows = client.labels.spreadsheet.read_grid(
        workbook(tmp_path, [["file", "note"], ["a", note]]), client.labels.spreadsheet.Found()
    )
    assert rows[1] == ["a", note]


def test_a_damaged_workbook_is_read_or_refused_but_never_breaks(tmp_path: Path) -> None:
    path = workbook(tmp_path, [["file", "metal", "reader"], *([f"{n}.dcm", n % 2, "A"] for n in range(20))])
    with zipfile.ZipFile(path) as archive:
        good = {name: archive.read(name) for name in archive.namelist()}
    generator = np.random.default_rng(3)
    codes = []
    for _ in range(150):
        name = generator.choice([name for name in good if name.endswith(".xml")])
        content = bytearray(good[name])
        for place in generator.integers(0, len(content), 4):
            content[place] = generator.integers(0, 256)
        repacked(path, **(good | {name: bytes(content)}))
        try:
            inspect_labels(path)
        except DataError as error:
            codes.append(error.code)
    assert len(codes) > 50
    assert set(codes) == {"bad-label"}


def test_other_files_are_not_taken_for_sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (
        b"\xd0\xcf\x11\xe0" + bytes(600),
        b"file,metal\n\xff\x81\x01,1\n",
    ):
        (tmp_path / "labels.csv").write_bytes(content)
        assert refusal(tmp_path / "labels.csv").code == "bad-label"
    monkeypatch.setattr(client.labels.spreadsheet, "MAX_BYTES", 10)
    assert "larger" in refusal(sheet(tmp_path, "file,metal\na,1\n")).message
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    monkeypatch.setattr(client.labels.spreadsheet, "MAX_BYTES", 1 << 20)
    (tmp_path / "labels.csv").write_bytes(b"PK\x03\x04" + stream.getvalue())
    assert refusal(tmp_path / "labels.csv").code == "bad-label"


def test_rows_survive_a_csv(tmp_path: Path) -> None:
    header = "file,frame,sop_uid,accession,series,reader,role,part,metal,motion,motion_severity"
    path = sheet(
        tmp_path, f'{header}\n"=1,x.dcm",2,,,,A,panel,,1,,\n,,1.2.3,,,A,,test,0,1,0.5\n,,,-7,-1,B,,,,,\n'
    )
    table = read_labels(path, key=KEY)
    written = to_csv(table.rows)
    assert "./=1,x.dcm" in written, "a spreadsheet must not take a path for a formula"
    again = read_labels(sheet(tmp_path, written), key=KEY)

    def essence(one: LabelTable) -> list[str]:
        return [
            repr((row.key, row.reader, row.is_panel, row.present, row.severity, row.part)) for row in one.rows
        ]

    assert essence(again) == essence(table)


def named(*images: ImageName) -> list[ImageName]:
    """The images as the cache holds them: identifiers as pseudonyms, each of a patient of its own."""
    return [
        replace(
            image,
            sop_uid=identifier("image", image.sop_uid, KEY),
            study_uid=identifier("study", image.study_uid, KEY),
            accession=identifier("accession", image.accession, KEY),
            patient=image.patient or f"p{place}",
        )
        for place, image in enumerate(images)
    ]


def lookup(
    path: Path, images: list[ImageName]
) -> tuple[list[float | None], tuple[int, ...], list[tuple[int, str]]]:
    """Metal label of each image, rows without an image, and problems (row, code)."""
    table, found = inspect_labels(path, key=KEY)
    matched, more = inspect_match(table, images, may_occur(*["CT"] * len(images)), key=KEY)
    metal = [None if math.isnan(value) else value for value in matched.present[:, METAL].tolist()]
    return metal, matched.rows_without_image, [(one.row, one.code) for one in (*found, *more)]


@pytest.mark.parametrize(
    ("text", "accession"),
    [
        ("2024030100000012", "2024030100000012"),  # looks like the site's own pseudonym
        ("00000000deadbeef", "00000000DEADBEEF"),
        ("24E00123", "24E00123"),  # looks like a number with an exponent
        ("1E+15", "1E+15"),
        ("12345.0", "12345.0"),
        ("12345.0", "12345"),  # as data frames write a column with gaps
        ("\uff11\uff12\uff13", "123"),
        ("ab-12", "AB-12"),
        ("'0012345", "0012345"),
        ('"=""0012345"""', "0012345"),
        ("24\u2013123", "24-123"),  # a spreadsheet's long dash
        ("\u200b123\u200b", "123"),
    ],
)
def test_an_accession_number_is_looked_up_before_it_is_interpreted(
    tmp_path: Path, text: str, accession: str
) -> None:
    images = named(ImageName(file="a", accession=accession), ImageName(file="b", accession="77"))
    assert lookup(sheet(tmp_path, f"accession,metal\n{text},1\n"), images) == ([1, None], (), [])


@pytest.mark.parametrize("uid", ["20240301.17", "12345", "1.2.E+15", "2024030100000012", "1." * 33 + "1"])
def test_a_uid_in_an_unusual_form_is_good_if_an_image_has_it(tmp_path: Path, uid: str) -> None:
    path = sheet(tmp_path, f"sop_uid,metal\n{uid},1\n")
    assert lookup(path, named(ImageName(file="a", sop_uid=uid)))[0] == [1]
    _, lost, found = lookup(path, named(ImageName(file="a", sop_uid="1.2.3")))
    assert lost == (2,)
    assert found == ([] if uid in ("20240301.17", "2024030100000012") else [(2, "bad-label")])


def test_what_stands_in_the_header_comes_before_a_pseudonym(tmp_path: Path) -> None:
    pseudonym = identifier("accession", "other", KEY)
    images = named(ImageName(file="a", accession=pseudonym), ImageName(file="b", accession="other"))
    path = sheet(tmp_path, f"accession,metal\n{pseudonym},1\n")
    assert lookup(path, images)[0] == [1, None]
    assert lookup(path, images[1:])[0] == [1]


@pytest.mark.parametrize("column", ["accession", "file", "sop_uid", "study_uid"])
@pytest.mark.parametrize("cell", [12345, 12345.5, True, datetime.date(2024, 3, 1)])
def test_a_number_or_a_date_is_no_identifier(tmp_path: Path, column: str, cell: object) -> None:
    images = named(ImageName(file="12345", accession="12345"), ImageName(file="0012345", accession="0012345"))
    metal, _, found = lookup(workbook(tmp_path, [[column, "metal"], [cell, 1]]), images)
    assert metal == [None, None]
    assert found[0] == (2, "not-text")


def test_a_row_that_fits_two_patients_is_an_error_and_labels_neither(tmp_path: Path) -> None:
    twice = named(ImageName(file="a", accession="1"), ImageName(file="b", accession="1"))
    assert lookup(sheet(tmp_path, "accession,metal\n1,1\n"), twice) == (
        [None, None],
        (),
        [(2, "ambiguous-key")],
    )
    path = sheet(tmp_path, "accession,file,metal\n1,b,1\n")
    assert lookup(path, twice) == ([None, 1], (), [])
    same = [replace(image, patient="p") for image in twice]
    assert lookup(sheet(tmp_path, "accession,metal\n1,1\n"), same)[0] == [1, 1]


@pytest.mark.parametrize(
    ("text", "accessions"),
    [("Ab1", ("AB1", "ab1")), ("12345.0", ("12345", "0012345")), ("12345.00", ("12345", "012345"))],
)
def test_a_guess_with_two_results_is_an_error(tmp_path: Path, text: str, accessions: tuple[str, str]) -> None:
    images = named(*(ImageName(file=one, accession=one) for one in accessions))
    path = sheet(tmp_path, f"accession,metal\n{text},1\n")
    assert lookup(path, images) == ([None, None], (), [(2, "ambiguous-key")])


def test_lost_leading_zeros_are_never_guessed_but_reported(tmp_path: Path) -> None:
    images = named(ImageName(file="a", accession="12345"), ImageName(file="b", accession="0012345"))
    table = read_labels(sheet(tmp_path, "accession,metal\n12345,1\n"), key=KEY)
    for known, labels in ((images, [1, None]), (images[1:], [None])):
        matched, found = inspect_match(table, known, may_occur(*["CT"] * len(known)), key=KEY)
        assert [None if math.isnan(one) else one for one in matched.present[:, METAL]] == labels
        assert (matched.lost_zeros, found) == ((2,), ())
    both = read_labels(sheet(tmp_path, "accession,metal\n12345,1\n0012345,0\n"), key=KEY)
    assert inspect_match(both, images, may_occur("CT", "CT"), key=KEY)[0].lost_zeros == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_file_names_of_western_spreadsheets(tmp_path: Path, encoding: str) -> None:
    files = ["Müller Ångström.dcm", "Größe/ñandú.dcm", "plain.dcm"]
    rows = "".join(f"{file},{place % 2},Schädel\n" for place, file in enumerate(files))
    path = sheet(tmp_path, f"file,metal,note\n{rows}", encoding)
    images = [ImageName(file=file) for file in files]
    assert lookup(path, images) == ([0, 1, 0], (), [])
    other = [ImageName(file=f"x{file}") for file in files]
    assert lookup(path, other)[1] == (2, 3, 4)


def test_bytes_that_are_western_and_chinese_are_read_as_the_images_say(tmp_path: Path) -> None:
    western, chinese = "Müller.dcm", "Müller.dcm".encode("cp1252").decode("gb18030")
    path = sheet(tmp_path, f"file,metal\n{western},1\nb.dcm,0\n", "cp1252")
    assert lookup(path, [ImageName(file=western)])[0] == [1]
    assert lookup(path, [ImageName(file=chinese)])[0] == [1]


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("CT/A.DCM", "ct/a.dcm"),
        ("'ct/a.dcm", "ct/a.dcm"),
        ("ｃｔ/ａ.dcm", "ct/a.dcm"),
        ("ct\\a.dcm", "ct\\a.dcm"),  # a backslash is a letter on this system
        ("a:b.dcm", "a:b.dcm"),
        ("Müller.dcm", b"M\xfcller.dcm".decode("utf-8", "surrogateescape")),
    ],
)
def test_a_file_is_found_in_another_spelling_only_if_none_has_this_one(
    tmp_path: Path, text: str, file: str
) -> None:
    path = sheet(tmp_path, f"file,metal\n{text},1\n")
    assert lookup(path, [ImageName(file=file), ImageName(file="other")])[0] == [1, None]
    if file == "ct/a.dcm":
        two = [ImageName(file=file, patient="1"), ImageName(file=file.upper(), patient="2")]
        exact = text == file.upper()
        assert lookup(path, two)[2] == ([] if exact else [(2, "ambiguous-key")])
