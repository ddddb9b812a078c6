"""Tables that commands print fit a terminal of 80 columns, whatever names they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.terminal import COLUMNS, table_row
from server.cli.federation import sites_table
from server.cli.run import run as group
from server.evaluation.tables import table
from server.run.rehearsal import check_table
from server.run_folder import RunFolder
from tests.helpers.consortium import tiny_plan
from tests.helpers.report_page import evaluation_of

LONG_SITE, LONG_RUN = "h" * 32, "r" * 64


def fits(text: str) -> list[str]:
    lines = text.splitlines()
    assert max(map(len, lines)) <= COLUMNS, max(lines, key=len)
    return lines


def test_a_row_keeps_its_columns_and_a_long_cell_ends_its_line() -> None:
    widths = (6, 8, -5)
    assert table_row(("site", "answer", "days"), widths) == "site  answer   days"
    assert table_row(("longer-name", "yes", "3"), widths) == "longer-name\n      yes         3"
    assert (
        table_row(("a", "agent-unreachable", "3"), widths) == "a     agent-unreachable\n                  3"
    )
    assert table_row(("a", "", ""), widths) == "a"


def test_the_list_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.cli import run as commands

    monkeypatch.setenv("COLUMNS", "80")
    states = [
        {"run": name, "status": status, "stage": "federated_dp", "round": 100, "rounds": 100, "sites": 12}
        for name in ("first", LONG_RUN)
        for status in ("running", "interrupted", "completed")
    ]
    monkeypatch.setattr(commands, "open_federation", lambda _: type("F", (), {"runs": tmp_path})())
    for number, _ in enumerate(states):
        RunFolder.create(tmp_path / str(number), tiny_plan(), {"run": "x"})
    found = iter(states)
    monkeypatch.setattr(commands, "state_of", lambda *_: next(found))
    said = CliRunner().invoke(group, ["list"])
    assert said.exception is None, said.output
    lines = fits(said.output)
    assert lines[0].split() == ["run", "state", "stage", "sites"]
    assert LONG_RUN in lines


def rehearsed(answer: str) -> dict[str, Any]:
    one = {
        "answer": answer,
        "version": "0.1.0",
        "data_prepared": False,
        "rounds_affordable": 100,
        "seconds_a_round": 1234.5,
        "reasons": {},
        "evaluation": "evaluation-not-permitted",
        "scoring": None,
        "arms": {},
    }
    return {
        "sites": {"hospital-a": one, LONG_SITE: one},
        "rounds": 100,
        "missing": {},
        "beyond_reach": [],
        "unscored": [],
        "enough": True,
        "scored": True,
        "quorum": 2,
    }


@pytest.mark.parametrize("answer", ["accept", "accept 1 of 2 arms", "c" * 40])
def test_the_rehearsal(answer: str) -> None:
    lines = fits(check_table(rehearsed(answer)))
    assert lines[0].split() == ["site", "answer", "version", "data", "rounds", "s/round"]
    assert any(answer in line for line in lines)
    assert LONG_SITE in lines


def test_the_sites_of_a_federation() -> None:
    row = {
        "status": "revoked",
        "connection": "not registered",
        "last_contact": "2026-01-02 03:04:05Z",
        "version": "0.1.0",
        "enrolment_days": -100,
        "readiness": {"answer": "accept 1 of 2 arms", "plan": "p" * 64},
    }
    fits(sites_table([{"site": site} | row for site in ("a", LONG_SITE)]))


def test_scores_of_more_places_than_fit_stand_in_tables_below() -> None:
    evaluation = evaluation_of()
    lines = table(evaluation).splitlines()
    heads = [number for number, line in enumerate(lines) if line.startswith("macro AUROC")]
    training = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    places = [place for number in heads for place in lines[number].split()[2:]]
    assert places == ["home", "elsewhere", "unseen", *training]
    assert len(heads) > 1
    for number in heads:
        block = lines[number : number + 1 + len(evaluation["arms"])]
        assert [line.split()[0] for line in block[1:]] == list(evaluation["arms"])
        fits("\n".join(block))
