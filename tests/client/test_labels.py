"""A label sheet is right, or the error names file, row, column, value and what is allowed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from client.labels import match_labels, read_labels
from common.artifacts import INDEX, MODALITIES, NAMES, applies_to
from common.errors import DataError


def sheet(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return path


def refusal(folder: Path, text: str) -> DataError:
    with pytest.raises(DataError) as caught:
        read_labels(sheet(folder, text))
    return caught.value


def test_blank_is_not_assessed_and_zero_is_absent(tmp_path: Path) -> None:
    table = read_labels(sheet(tmp_path, "file,metal,motion,metal_severity,part\na/1.dcm,1,,0.5,train\na/2.dcm,0,1.0,,\n\n"))
    first, second = table.rows.values()
    assert (first.row, first.file, first.part) == (2, "a/1.dcm", "train")
    assert first.present[INDEX["metal"]] == 1
    assert first.severity[INDEX["metal"]] == 0.5
    assert math.isnan(first.present[INDEX["motion"]])
    assert math.isnan(first.present[INDEX["beam_hardening"]])
    assert second.present[INDEX["metal"]] == 0
    assert second.present[INDEX["motion"]] == 1
    assert second.part is None
    assert table.artifacts == ("metal", "motion")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_chinese_names_synonyms_and_spreadsheets_of_china(tmp_path: Path, encoding: str) -> None:
    table = read_labels(sheet(tmp_path, "file,金属伪影,Cupping,ghosting,chemical shift,金属伪影_severity\n肺/1.dcm,1,0,,,1\n", encoding))
    assert table.artifacts == ("metal", "beam_hardening", "motion", "chemical_shift")
    assert table.rows["肺/1.dcm"].severity[INDEX["metal"]] == 1


def test_windows_paths_are_read(tmp_path: Path) -> None:
    assert list(read_labels(sheet(tmp_path, "file,metal\r\n.\\a\\1.dcm,1\r\n")).rows) == ["a/1.dcm"]


@pytest.mark.parametrize("text", ["", "\n", "image,metal\n", "file\na,\n", "file,part\na,train\n", "file,metal\n"])
def test_labels_missing(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, text).code in {"labels-missing", "unknown-artifact"}
    with pytest.raises(DataError) as caught:
        read_labels(tmp_path / "absent.csv")
    assert caught.value.code == "labels-missing"


def test_an_unknown_column_lists_the_known_ones(tmp_path: Path) -> None:
    error = refusal(tmp_path, "file,metal,zebra\na,1,0\n")
    assert error.code == "unknown-artifact"
    assert "'zebra'" in error.message
    assert all(name in error.hint for name in NAMES)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a.dcm,2,,", ("row 2", "metal", "'2'", "1, 0 or blank")),
        ("a.dcm,yes,,", ("metal", "'yes'")),
        ("a.dcm,nan,,", ("metal", "'nan'")),
        ("a.dcm,1,1.5,", ("metal_severity", "'1.5'", "0 to 1")),
        ("a.dcm,1,nan,", ("metal_severity", "'nan'")),
        ("a.dcm,1,bad,", ("metal_severity", "'bad'")),
        ("a.dcm,0,0.5,", ("metal_severity", "metal is not 1")),
        ("a.dcm,1,,training", ("part", "'training'", "train, validation, test")),
        (",1,,", ("file", "relative")),
        ("/abs/a.dcm,1,,", ("file",)),
        ("../a.dcm,1,,", ("file",)),
        ("C:\\a.dcm,1,,", ("file",)),
        ("a.dcm,1,,,1", ("row 2", "5 cells", "4")),
        ('"a.dcm,1,,', ("CSV",)),
    ],
)
def test_bad_label_names_row_column_value_and_bound(tmp_path: Path, row: str, words: tuple[str, ...]) -> None:
    error = refusal(tmp_path, f"file,metal,metal_severity,part\n{row}\n")
    assert error.code == "bad-label"
    for word in ("labels.csv", *words):
        assert word in error.message


def test_two_columns_for_one_artifact(tmp_path: Path) -> None:
    assert refusal(tmp_path, "file,metal,metallic\na,1,0\n").code == "bad-label"


def test_duplicate_label_names_both_rows(tmp_path: Path) -> None:
    error = refusal(tmp_path, "file,metal\na.dcm,1\nb.dcm,1\n./a.dcm,0\n")
    assert error.code == "duplicate-label"
    assert "rows 2 and 4" in error.message


def may_occur(*modalities: str) -> np.ndarray:
    return np.array([applies_to(name) for name in modalities]).reshape(-1, len(NAMES))


def test_everything_is_counted_when_labels_meet_images(tmp_path: Path) -> None:
    table = read_labels(sheet(tmp_path, "file,metal,motion\nct.dcm,1,0\nmr.dcm,,1\nwrong.dcm,1,1\ngone.dcm,1,\n"))
    matched = match_labels(table, ["ct.dcm", "mr.dcm", "new.dcm", "wrong.dcm"], may_occur("CT", "MR", "CT", "MR"))
    assert matched.rows_without_image == (5,)
    assert matched.images_without_label == 1
    assert matched.wrong_modality == (4,)
    assert matched.present.dtype == np.float32
    assert matched.present[0, INDEX["metal"]] == 1
    assert np.isnan(matched.present[0, INDEX["motion"]])  # absent, but it cannot occur in CT
    assert np.isnan(matched.present[2]).all()
    assert np.isnan(matched.present[3, INDEX["metal"]])
    assert matched.present[3, INDEX["motion"]] == 1


def test_labels_that_match_nothing(tmp_path: Path) -> None:
    table = read_labels(sheet(tmp_path, "file,metal\nimages/ct.dcm,1\n"))
    with pytest.raises(DataError) as caught:
        match_labels(table, ["ct.dcm"], may_occur("CT"))
    assert caught.value.code == "labels-match-nothing"
    assert "images/ct.dcm" in caught.value.message
    assert MODALITIES == ("CT", "MR")
