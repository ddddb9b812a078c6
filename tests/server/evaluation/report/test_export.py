"""The report as Markdown, JSON, CSV, the tables of a paper and figures: every table passes verify --table."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from common.any_artifact import ANY
from common.errors import ConfigError
from common.verify import verify_command
from server.cli.evaluate import report
from server.evaluation.report import paper
from server.evaluation.report.export import reading_of, report_json, report_markdown
from server.evaluation.report.figure_files import write_figures
from server.evaluation.table_check import check_table, read_table
from server.run_folder import EVALUATION, RunFolder, write_json
from tests.helpers.report_page import HELD_OUT, HOSTILE, MANIFEST, PLAN, TRAINING, evaluation_of

COMMAND = "=cmd|' /C calc'!A0"
ESCAPE = "\x1b[31mred\x1b]0;title\x07"


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return evaluation_of()


@pytest.fixture
def run(tmp_path: Path, whole: dict[str, Any]) -> Path:
    folder = RunFolder.create(tmp_path / "run", PLAN, MANIFEST)
    write_json(folder.path / EVALUATION, whole)
    return folder.path


def invoked(*words: object) -> Any:
    found = CliRunner().invoke(report, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def wrong_rows(text: str, path: Path) -> list[str]:
    path.write_text(text, encoding="utf-8")
    rows = read_table(path)
    assert rows
    return [
        f"{found.where} {found.check} {found.detail}" for found in check_table(rows) if found.holds is False
    ]


def seconds_file(path: Path, seed: int = 0, n: int = 12) -> Path:
    rng = np.random.default_rng(seed)
    lines = [f"human,{value:.1f}" for value in rng.normal(60, 10, n)]
    lines += [f"machine,{value:.2f}" for value in rng.normal(1.2, 0.1, n)]
    path.write_text("\n".join(["reader,seconds", *lines]))
    return path


@pytest.mark.parametrize("words", [["--format", "csv"], ["--paper", "--format", "csv"]])
def test_every_table_of_scores_passes_verify_table(run: Path, tmp_path: Path, words: list[str]) -> None:
    text = invoked(run, *words).stdout
    assert wrong_rows(text, tmp_path / "t.csv") == []
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) > 60
    assert all(int(row["tp"]) + int(row["fn"]) == int(row["positives"]) for row in rows)
    assert not (run / "report.html").exists()


def test_the_tables_of_a_paper_pass_verify_table_by_the_command(run: Path, tmp_path: Path) -> None:
    seconds = seconds_file(tmp_path / "seconds.csv")
    text = invoked(
        run, "--paper", "--format", "csv", "--rescans", "37/150", "22/148", "--seconds", seconds
    ).stdout
    path = tmp_path / "paper.csv"
    path.write_text(text)
    assert verify_command(table=path) == 0
    broken = text.replace(text.splitlines()[1].split(",")[10], "0.1234", 1)
    path.write_text(broken)
    assert verify_command(table=path) == 1


@pytest.mark.parametrize("seed", range(20))
def test_rescans_and_seconds_of_any_size_pass(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n1, n2 = (int(n) for n in rng.integers(2, 400, 2))
    x1, x2 = int(rng.integers(0, n1 + 1)), int(rng.integers(0, n2 + 1))
    seconds = paper.seconds_table(seconds_file(tmp_path / "s.csv", seed, int(rng.integers(2, 40))))
    tables = [paper.rescans_table(f"{x1}/{n1}", f"{x2}/{n2}"), seconds]
    assert wrong_rows(paper.as_csv(tables), tmp_path / "t.csv") == []


def test_rescans_by_hand() -> None:
    """Fisher's tea tasting, 3 of 4 against 1 of 4: p .486."""
    rows = paper.rescans_table("3/4", "1/4")
    assert [row["p"] for row in rows] == ["0.157", "0.480", "0.486"]
    assert [row["chi2"] for row in rows] == ["2.00", "0.50", ""]


@pytest.mark.parametrize("text", ["3", "5/4", "a/b", "-1/4", "0/0", "3/4/5", "=1/2"])
def test_what_is_no_pair_of_counts_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        paper.rescans_table(text, "1/4")
    assert caught.value.code == "bad-argument"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "reader,seconds\nhuman,1\n",
        "reader,seconds\nrobot,1\n",
        "a,b\n1,2\n",
        "reader,seconds\nhuman,nan\n",
    ],
)
def test_what_is_no_table_of_seconds_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    for path in (tmp_path / "s.csv", tmp_path / "missing.csv"):
        with pytest.raises(ConfigError) as caught:
            paper.seconds_table(path)
        assert caught.value.code == "bad-argument"
        assert "\n" not in caught.value.message


def test_options_of_a_paper_need_it(run: Path) -> None:
    with pytest.raises(ConfigError, match="--paper"):
        invoked(run, "--rescans", "1/2", "1/2")


def test_json_holds_the_counts_behind_every_rate(run: Path, whole: dict[str, Any]) -> None:
    found = json.loads(invoked(run, "--format", "json").stdout)
    assert [answer["question"] for answer in found["answers"]][
        1
    ] == "How good is it at a hospital it never saw?"
    assert found["generalization_gap"] == whole["generalization_gap"]
    assert len(found["operating"]) > 60
    for row in found["operating"]:
        if row["tp"] is not None and row["positives"]:
            assert row["sensitivity"]["value"] == pytest.approx(row["tp"] / row["positives"])


def test_any_artifact_stands_in_every_format(run: Path, whole: dict[str, Any]) -> None:
    lines = json.loads(invoked(run, "--format", "json").stdout)
    assert lines["any_artifact"]["matrix"] == whole["any_artifact"]["matrix"]
    assert {line["site"] for line in lines["operating"] if line["artifact"] == ANY} == {*TRAINING, *HELD_OUT}
    for words in (["--format", "csv"], ["--paper", "--format", "csv"]):
        rows = list(csv.DictReader(io.StringIO(invoked(run, *words).stdout)))
        assert sum(row["row"] == f"federated {ANY} dune" for row in rows) == 1
    assert "任一伪影" in invoked(run, "--format", "md", "--lang", "zh").stdout


def test_markdown_has_the_answers_and_is_chinese_on_demand(run: Path) -> None:
    text = invoked(run, "--format", "md").stdout
    assert "## How good is it at my hospital?" in text
    assert re.search(r"\| federated \| not private \| 0\.\d{3}", text)
    chinese = invoked(run, "--format", "md", "--lang", "zh").stdout
    assert "## 在从未见过的医院效果如何？" in chinese
    assert "运动伪影" in chinese


def test_an_unknown_language_is_refused_in_one_line(run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        invoked(run, "--lang", "xx")
    assert caught.value.code == "bad-argument"
    assert not (run / "report.html").exists()


def test_what_is_planted_is_inert_in_every_format(whole: dict[str, Any], tmp_path: Path) -> None:
    text = json.dumps(whole)
    for name, planted in (("birch", COMMAND), ("cedar", ESCAPE), ("dune", HOSTILE)):
        text = text.replace(name, json.dumps(planted)[1:-1])
    values = json.loads(text)
    values["plan"] = COMMAND
    values["question"] = HOSTILE + ESCAPE
    reading = reading_of(values, "en")
    table = paper.scores_table(reading)
    for cells in csv.reader(io.StringIO(paper.as_csv([table]))):
        assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
        assert not [cell for cell in cells if re.search(r"[\x00-\x1f\x7f]", cell)]
    markdown = report_markdown(reading, {}, trainable="head")
    assert "\x1b" not in markdown
    assert "\x07" not in markdown
    assert "<script" not in markdown
    files = write_figures(values, tmp_path)
    assert all(ET.fromstring(path.read_bytes()) is not None for path in files if path.suffix == ".svg")
    found = json.dumps(report_json(reading, {}, trainable="head"))
    assert "\x1b" not in found  # escaped by JSON


@pytest.mark.parametrize("language", ["en", "zh"])
def test_figures_are_written_as_svg_and_png(tmp_path: Path, whole: dict[str, Any], language: str) -> None:
    files = write_figures(whole, tmp_path / "figures", language)
    names = {path.stem for path in files}
    assert {
        "forest",
        "roc-held-out-motion",
        "calibration-training-metal",
        "decision-held-out-motion",
    } <= names
    assert {"curve-auroc", "interval-width"} <= names
    assert {path.suffix for path in files} == {".svg", ".png"}
    for path in files:
        if path.suffix == ".svg":
            root = ET.fromstring(path.read_text(encoding="utf-8"))
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            assert not [child for child in root.iter() if child.tag.endswith(("script", "image", "use"))]
        else:
            with Image.open(path) as image:
                colours = image.convert("RGB").getcolors(1 << 24)
                assert colours is not None
                assert len(colours) > 10, path  # something is drawn
    forest = (tmp_path / "figures" / "forest.svg").read_text(encoding="utf-8")
    assert ("宏平均" in forest) == (language == "zh")


def test_the_same_figures_are_drawn_twice(tmp_path: Path, whole: dict[str, Any]) -> None:
    one, other = (write_figures(whole, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
