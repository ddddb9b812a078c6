"""How long a hospital worked on its patients shows in its answers only in whole steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent import verification
from client.agent.answer_grid import is_on_grid, left_s, wait_for_grid
from client.agent.job import NoAnswer
from client.agent.verification import Guard
from common.signing import Statement
from common.wire import DescribeTask
from tests.helpers.consortium import TRAINING, settle
from tests.helpers.signed_site import EVALUATE, PRIVATE, TRAIN, ask, code_of
from tests.helpers.site_agent import enrol

OPEN = {
    "allow_non_private": True,
    "evaluation": "disclosed",
    "max_epsilon": 1000.0,
    "after_non_private": "void",
}


@pytest.fixture
def site(data: Path) -> Path:
    enrol(data / TRAINING[0])
    return data / TRAINING[0]


def statement(kind: str, arm: str = "") -> Statement:
    return Statement(kind=kind, arm=arm, payload_sha256="", nonce="")


@given(st.floats(0, 1e5), st.floats(0.1, 3600))
def test_an_answer_leaves_at_the_next_multiple(elapsed: float, grid: float) -> None:
    left = left_s(elapsed, grid)
    assert 0 <= left <= grid * (1 + 1e-9)
    steps = (elapsed + left) / grid
    assert steps == pytest.approx(round(steps), abs=1e-6)


def test_without_a_grid_nothing_waits_and_a_caller_who_has_gone_ends_the_wait() -> None:
    assert left_s(3.2, 0) == 0
    gone = threading.Event()
    gone.set()
    wait_for_grid(time.monotonic() - 1, 3600, gone)


def test_which_answers_are_held_back() -> None:
    assert is_on_grid(statement("TrainTask", "federated_dp"))
    assert is_on_grid(statement("EvaluateTask"))
    assert not is_on_grid(statement("TrainTask", "federated"))
    assert not is_on_grid(statement("DescribeTask"))
    assert not is_on_grid(statement(""))


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    grids: list[float] = []
    monkeypatch.setattr(verification, "wait_for_grid", lambda began, grid_s, cancelled: grids.append(grid_s))
    return grids


@pytest.mark.parametrize("kind", ["hospital", "synthetic"])
def test_a_hospital_holds_back_what_it_says_of_patients(kind: str, site: Any, waited: list[float]) -> None:
    settle(site, policy=OPEN | {"answer_grid_s": 7.0}, kind=kind)
    guard = Guard(str(site))
    expected = {"hospital": [7.0], "synthetic": []}[kind]
    checks: list[tuple[Any, list[float]]] = [(DescribeTask(), []), (TRAIN, []), (PRIVATE, expected)]
    checks += [(EVALUATE, expected), (PRIVATE, expected)]
    for task, grids in checks:
        waited.clear()
        ask(site, task, guard=guard)
        assert waited == grids, type(task).__name__
    settle(site, policy={"answer_grid_s": 5.0, "max_rounds": 1}, kind=kind)
    waited.clear()
    ask(site, PRIVATE.model_copy(update={"run": "refused"}), guard=guard)
    assert waited == [grid - 2 for grid in expected], "a refusal, too"


@pytest.mark.parametrize("kind", ["hospital", "synthetic"])
def test_a_failure_of_a_hospitals_data_looks_like_absence(kind: str, site: Path, waited: list[float]) -> None:
    """Whether more than 5 % of the files can be read may depend on one patient."""
    settle(site, policy=OPEN, kind=kind)
    images = sorted((site / "images").glob("*.dcm"))
    for path in images[: len(images) // 4]:
        path.write_bytes(b"damaged")
    for task in (PRIVATE, TRAIN, EVALUATE):
        if kind == "hospital":
            with pytest.raises(NoAnswer):
                ask(site, task)
        else:
            assert code_of(ask(site, task)) == "site-failure"
    if kind == "hospital":
        assert len(waited) == 2, "it is away at a step of the grid, too"
        assert not (site / "state" / "sent.jsonl").exists(), "nothing was sent"
    assert "above 5%" in (site / "state" / "site.log").read_text()
    settle(site, policy={"evaluation": "none"})
    assert code_of(ask(site, TRAIN)) == "non-private-not-permitted", "a decision is one"


def test_what_is_logged_as_sent_is_written_when_it_leaves(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(site, policy=OPEN, kind="hospital")
    seen: list[int] = []
    log = site / "state" / "sent.jsonl"

    def wait(began: float, grid_s: float, cancelled: threading.Event) -> None:
        seen.append(len(log.read_text().splitlines()) if log.exists() else 0)

    hold: Callable[..., None] = wait
    monkeypatch.setattr(verification, "wait_for_grid", hold)
    ask(site, PRIVATE)
    assert seen == [0]
    assert len(log.read_text().splitlines()) == 1
