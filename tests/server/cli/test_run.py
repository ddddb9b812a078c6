"""What `fedqc run` says and finds, where no SuperLink is needed."""

from __future__ import annotations

import errno
import io
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cli import Format
from common.errors import ConfigError, RefusedError, RunError
from server.cli import following
from server.cli.following import toml_string, watch_line
from server.messaging.flower import as_fedqc_error
from server.run.control_files import (
    Order,
    being_run,
    failure_of,
    forget_outcomes,
    is_being_run,
    order_path,
    read_order,
    read_outcome,
    write_order,
    write_outcome,
)
from server.run.observers import (
    EvaluationBegan,
    Live,
    Notices,
    Progress,
    RoundClosed,
    RunFinished,
    SiteAnswered,
    StageBegan,
    StageEndedEarly,
    compose,
    read_live,
)
from server.run_folder import RunFolder
from tests.helpers.command_line import fedqc
from tests.helpers.consortium import tiny_plan


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_plan_reaches_the_run_config_as_it_was_written(text: str) -> None:
    """Its digest is signed: one changed character would be refused by every site."""
    assert tomllib.loads(f"plan = {toml_string(text)}")["plan"] == text


def test_an_order_is_read_as_it_was_written(tmp_path: Path) -> None:
    order = Order(mode="check", accept_missing=True, wait_s=3.0)
    write_order(tmp_path, "r", order)
    assert read_order(tmp_path, "r") == order


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b'{"mode": "other"}'])
def test_a_damaged_order_is_named(tmp_path: Path, content: bytes) -> None:
    write_order(tmp_path, "r", Order())
    order_path(tmp_path, "r").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_order(tmp_path, "r")
    assert caught.value.code == "no-order"


def test_a_run_that_nobody_ordered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_order(tmp_path, "r")
    assert caught.value.code == "no-order"


def test_a_failure_is_kept_until_the_next_order(tmp_path: Path) -> None:
    write_outcome(tmp_path, "r", "failure", failure_of(RefusedError("m", code="sites-missing", hint="h")))
    assert read_outcome(tmp_path, "r", "failure") == {
        "code": "sites-missing",
        "message": "m",
        "hint": "h",
        "exit_status": 4,
    }
    forget_outcomes(tmp_path, "r")
    assert read_outcome(tmp_path, "r", "failure") is None


def record(**changes: Any) -> dict[str, Any]:
    """A line of rounds.jsonl, as far as observers read it."""
    return {
        "invited": ["hospital-a", "hospital-b"],
        "answered": ["hospital-a", "hospital-b"],
        "refused": {},
        "failed": {},
        "public": {"auroc": 0.75},
        "claims": {},
    } | changes


def began(**changes: Any) -> StageBegan:
    values: dict[str, Any] = {"stage": "federated_dp", "sites": ("hospital-a", "hospital-b"), "rounds": 6}
    return StageBegan(**(values | {"rounds_done": 0} | changes))


def closed(number: int, **changes: Any) -> RoundClosed:
    return RoundClosed(stage="federated_dp", round=number, rounds=6, record=record(**changes))


def test_watch_says_who_is_waited_for_and_what_is_spent(tmp_path: Path) -> None:
    live = Live(tmp_path, units=7)
    live(began())
    live(closed(1, claims={"hospital-a": {"epsilon": 7.5}}))
    live(SiteAnswered(stage="federated_dp", round=2, rounds=6, site="hospital-a"))
    line = watch_line(read_live(tmp_path) | {"status": "running"})
    for part in (
        "1/7",
        "federated_dp",
        "round 2 of 6",
        "waiting for hospital-b",
        "0.750",
        "epsilon 7.50 per patient for the whole run",
    ):
        assert part in line
    live(EvaluationBegan(sites=("hospital-a",)))
    assert read_live(tmp_path)["stage"] == "evaluation"
    live(RunFinished(status="completed", models=1, sites=2))
    assert (read_live(tmp_path)["done"], read_live(tmp_path)["waiting"]) == (2, [])


def test_a_site_is_reported_once_a_stage(tmp_path: Path) -> None:
    sent: list[tuple[str, str, str]] = []
    notices = Notices(lambda *notice: sent.append(notice))
    failing = {"failed": {"hospital-a": "no-answer"}, "refused": {"hospital-b": {"code": "budget"}}}
    for event in (began(), closed(1, **failing), closed(2, **failing)):
        notices(event)
    assert sent == [("silence", "hospital-a", "no-answer"), ("refusal", "hospital-b", "budget")]
    notices(began())
    notices(closed(1, **failing))
    assert len(sent) == 4


def test_progress_counts_what_an_earlier_attempt_did(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[object] = []
    observe = compose(Progress(7), seen.append)
    for event in (
        began(rounds_done=2),
        closed(3),
        StageEndedEarly(reason="federated_dp: failed", rounds_left=3),
    ):
        observe(event)
    observe(RunFinished(status="partial", models=1, sites=2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[3/7] federated_dp: round 3 of 6, 2 of 2 sites, public AUROC 0.750")
    assert lines[1:] == ["federated_dp: failed", "[7/7] evaluation of 1 models at 2 sites"]
    assert len(seen) == 4


def test_rounds_that_an_early_end_leaves_out_count_as_done(tmp_path: Path) -> None:
    live = Live(tmp_path, units=7)
    for event in (began(), closed(1), closed(2), StageEndedEarly(reason="no better", rounds_left=4)):
        live(event)
    live(RunFinished(status="completed", models=1, sites=2))
    assert read_live(tmp_path)["done"] == 7


def test_a_run_without_a_state_has_just_started(tmp_path: Path) -> None:
    assert read_live(tmp_path)["stage"] == "start"


@pytest.fixture
def one(tmp_path: Path) -> Any:
    """A federation, as far as `run` looks at it, with a run that says it is running."""
    RunFolder.create(tmp_path / "runs" / "one", tiny_plan(), {"run": "one", "status": "running", "sites": []})
    write_order(tmp_path, "one", Order())
    return SimpleNamespace(folder=tmp_path, runs=tmp_path / "runs")


def test_a_run_whose_serverapp_was_killed_is_not_watched_for_ever(one: Any) -> None:
    assert (
        following.state_of(one, one.runs / "one" / "plan.yaml")["status"] == "running"
    )  # ordered, not begun
    write_outcome(one.folder, "one", "check", {})
    with being_run(one.folder, "one"):
        assert following.state_of(one, one.runs / "one" / "plan.yaml")["status"] == "running"
    with pytest.raises(RunError) as caught:
        following.follow(one, "one", Format.text)
    assert caught.value.code == "run-interrupted"
    assert "resume one" in caught.value.hint


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "disk-full"), (errno.EROFS, "not-writable")])
def test_a_serverapp_that_could_not_even_report_its_end_is_explained_by_the_disk(
    number: int, code: str, one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_outcome(one.folder, "one", "check", {})

    def denied(**where: Any) -> Any:
        raise OSError(number, "denied")

    monkeypatch.setattr("server.cli.following.tempfile.TemporaryFile", denied)
    with pytest.raises(RunError) as caught:
        following.follow(one, "one", Format.text)
    assert caught.value.code == code
    assert "fedqc run resume one" in caught.value.hint


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "disk-full"), (errno.EROFS, "not-writable"), (errno.EMFILE, "too-many-files")],
)
def test_what_the_coordinators_machine_denies_ends_a_run_with_its_name(number: int, code: str) -> None:
    error = as_fedqc_error(OSError(number, "denied"), "one")
    assert isinstance(error, RunError)
    assert error.code == code
    assert "fedqc run resume one" in error.hint
    assert as_fedqc_error(ValueError("ours"), "one").code == "internal"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_wait_without_news_counts_its_seconds_on_a_terminal(
    one: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A round of real training takes minutes; who watches must see that it goes on. A log gets no line."""
    begun = following.state_of(one, one.runs / "one" / "plan.yaml") | {"units": 4, "stage": "federated_dp"}
    for kind in (Terminal, io.StringIO):
        states = iter([begun, begun, begun, begun | {"status": "completed", "done": 4}])
        monkeypatch.setattr(following, "state_of", lambda *_: next(states))  # noqa: B023
        monkeypatch.setattr(following, "SPEAK_S", 0.01)
        monkeypatch.setattr(following, "POLL_S", 0.02)
        monkeypatch.setattr("sys.stderr", kind())
        assert following.follow(one, "one", Format.text) == 0
        noted = sys.stderr.getvalue()  # type: ignore[attr-defined]
        assert noted.count("without news") == (2 if kind is Terminal else 0)
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_has_one_serverapp_at_a_time(one: Any) -> None:
    with being_run(one.folder, "one"), pytest.raises(ConfigError) as caught, being_run(one.folder, "one"):
        pass
    assert caught.value.code == "run-running"
    with being_run(one.folder, "one"):
        assert is_being_run(one.folder, "one")
    assert not is_being_run(one.folder, "one")


@pytest.mark.parametrize(("signal", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_signal_ends_the_watching_and_says_that_the_run_goes_on(
    signal: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left, following.run_goes_on("one"):
        raise signal
    assert left.value.code == status
    assert "fedqc run watch one" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("watch", "nothing"), ("stop", "nothing"), ("resume", "nothing")])
def test_an_unknown_run_is_one_line_and_a_hint(words: tuple[str, str], tmp_path: Path) -> None:
    said = fedqc("run", *words, cwd=tmp_path)
    assert said.returncode == 2
    assert said.stderr.startswith("fedqc: error [no-such-run]")
    assert "hint" in said.stderr
