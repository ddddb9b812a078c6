"""Table 1 and flow of the cohorts on the report: side by side where the run has them, else where they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.cohort_table import CohortTable, checked_tables
from common.errors import ConfigError
from server.cli.evaluate import report
from server.evaluation.report.page import render
from server.run_folder import COHORTS, EVALUATION, RunFolder, write_json
from tests.helpers.report_page import MANIFEST, PLAN, evaluation_of, section, text_of


def quartiles(n: int, median: float) -> dict[str, Any]:
    return {"n": n, "median": median, "q1": median - 10, "q3": median + 10}


def column(patients: int, age: float) -> dict[str, Any]:
    return {
        "patients": patients,
        "studies": patients + 1,
        "slices": 3 * patients,
        "age_years": quartiles(patients, age),
        "sex": {"female": patients},
        "modality": {"CT": patients + 1},
        "vendor": {"Siemens": patients + 1},
        "field_strength_t": {},
        "kvp": {"120": patients + 1},
        "body_part": {"HEAD": patients + 1},
        "artifacts": {
            "metal": {
                "assessed": patients,
                "present": 2,
                "severity": {"n": 0, "median": None, "q1": None, "q3": None},
            }
        },
    }


def cohort(site: str, *, train: int, test: int, scored: str = "test") -> dict[str, Any]:
    step = {"files": 99, "slices": 99, "patients": train + test, "lost_slices": {}}
    flow = {"slices": 9, "unlabelled": 1, "disputed": 0}
    return {
        "site": site,
        "columns": {"all": column(train + test, 50), "train": column(train, 41), "test": column(test, 62)},
        "files": [
            step | {"step": "found", "files": 104, "lost": {}},
            step | {"step": "used", "lost": {"truncated": 5}},
        ],
        "left_out": 0,
        "parts": {
            "train": flow | {"patients": train, "labelled": train - 1},
            "test": flow | {"patients": test, "labelled": test - 1},
        },
        "scored": scored,
    }


@pytest.fixture(scope="module")
def cohorts() -> dict[str, CohortTable]:
    values = {
        "alder": cohort("alder", train=70, test=31),
        "dune": cohort("dune", train=20, test=13, scored="all"),
    }
    return checked_tables(values, COHORTS)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return evaluation_of()


def test_cohorts_stand_side_by_side(cohorts: dict[str, CohortTable], whole: dict[str, Any]) -> None:
    part = section(render(whole, MANIFEST, PLAN, cohorts=cohorts), "cohorts")
    text = text_of(part)
    assert "41 [31–51]" in text
    assert "50 [40–60]" in text, "of a held-out site all who are scored"
    assert 'data-label="alder †: training">70</td>' in part
    assert 'data-label="dune †: all">33</td>' in part
    assert "left out: truncated −5 −5" in text
    assert "scored 30 31" in text
    assert "Not here: birch † and cedar †" in text
    assert "fedqc data check" in text


def test_of_a_deployed_run_it_says_where_they_are(whole: dict[str, Any]) -> None:
    for language, words in (("en", "Nothing that describes the patients"), ("zh", "不会离开站点")):
        part = section(render(whole, MANIFEST, PLAN, language=language), "cohorts")
        assert words in text_of(part)
        assert "<table" not in part


def test_every_format_has_them(
    tmp_path: Path, cohorts: dict[str, CohortTable], whole: dict[str, Any]
) -> None:
    run = RunFolder.create(tmp_path / "run", PLAN, MANIFEST).path
    write_json(run / EVALUATION, whole)
    write_json(run / COHORTS, cohorts)
    found = CliRunner().invoke(report, [str(run), "--format", "json"])
    assert json.loads(found.stdout)["cohorts"] == cohorts
    found = CliRunner().invoke(report, [str(run), "--format", "md", "--lang", "zh"])
    assert "射束硬化" not in found.stdout.split("表 1")[1].split("##")[0]
    assert "41 \\[31–51\\]" in found.stdout or "41 [31–51]" in found.stdout
    assert CliRunner().invoke(report, [str(run)]).exit_code == 0
    assert "41 [31–51]" in (run / "report.html").read_text(encoding="utf-8")
    (run / COHORTS).write_text('{"alder": 1}')
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(run).cohorts  # noqa: B018
    assert caught.value.code == "damaged-run"
