"""Which studies to read first: unread ones of training patients, unsure and different."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openpyxl
import pytest

from client.data.cohort import load_cohort
from client.reader_study.labelling import site_images
from client.reader_study.next_reads import farthest_first, next_reads
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from tests.helpers.command_line import typed
from tests.helpers.consortium import settle
from tests.helpers.site_agent import A


@pytest.fixture
def site(data: Path) -> Path:
    """A hospital of which nothing is read."""
    (data / A / "labels.csv").unlink()
    settle(data / A, labels="none")
    return data / A


def test_only_unread_studies_of_training_patients_are_proposed(data: Path) -> None:
    settle(data / A, labels="labels.csv")
    sheet = data / A / "labels.csv"
    header, *lines = sheet.read_text(encoding="utf-8").splitlines()
    assert header.startswith(f"file,{DEFAULT_LABELS[0]}")
    read = {line.split(",")[0] for line in lines[:8]}
    sheet.write_text("\n".join([header, *lines[:8]]) + "\n", encoding="utf-8")
    cohort = load_cohort(data / A)
    found = next_reads(data / A, count=100)
    chosen = {found.ours.records[at].file for at in found.positions}
    read_studies = {one.study for one in cohort.records if one.file in read}
    wanted = {
        record.file
        for record, part in zip(cohort.records, cohort.part, strict=True)
        if part == 0 and record.study not in read_studies
    }
    assert chosen == wanted
    assert found.unread == len(found.studies) > 0


def test_the_first_is_the_least_sure_and_the_next_ones_are_far_apart(site: Path) -> None:
    everything = next_reads(site, count=100)
    few = next_reads(site, count=2)
    assert len(few.studies) == 2
    assert few.uncertainty[0] == max(everything.uncertainty)
    assert all(0 <= bits <= 1 for bits in everything.uncertainty)
    assert next_reads(site, count=2).studies == few.studies, "the same again"


def test_farthest_first_by_hand() -> None:
    points = np.array([[0.0], [1.0], [10.0], [6.0], [10.0]])
    assert farthest_first(points, 3) == [0, 2, 3]
    assert farthest_first(points, 9) == [0, 2, 3, 1, 4]
    assert farthest_first(points[:0], 3) == []


def test_the_list_and_the_workbooks(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "labels", site, "--next", "2"]
    status, out, _ = typed(capsys, *words, "--sheets", "1", "--out", tmp_path / "s", "--format", "json")
    listed = json.loads(out)
    assert (status, len(listed["next"])) == (0, 2)
    (book,) = listed["written"]
    rows = openpyxl.load_workbook(book).worksheets[0].max_row - 1
    studies = {one["study"] for one in listed["next"]}
    assert rows == sum(record.study in studies for record in site_images(site).records)
    status, out, _ = typed(capsys, *words)
    assert (status, listed["next"][0]["first_file"] in out) == (0, True)


@pytest.mark.parametrize("words", [["--next", "0"], ["--model", "x"], ["--next", "2", "--merge", "x.csv"]])
def test_options_that_do_not_fit_are_refused(
    site: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, said = typed(capsys, "data", "labels", site, *words)
    assert (status, out, "bad-argument" in said) == (2, "", True)


def test_a_number_of_studies_below_one(site: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        next_reads(site, count=0)
