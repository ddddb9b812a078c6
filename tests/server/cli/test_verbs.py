"""Every verb in every state of a run: what docs/deploy.md says is what the command does."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import FedqcError, NetworkError, RefusedError, RunError
from server.cli import following
from server.cli import run as module
from server.cli.following import run_state
from server.cli.run import run as runs
from server.federation import registry, services
from server.federation.registry import Federation, approve
from server.run.control_files import Order, being_run, failure_of, write_outcome
from server.run.verbs import ANSWERS, STATES, VERBS, Refused, State, Verb, table
from server.run_folder import RunFolder, write_json
from tests.helpers.consortium import tiny_plan, write_plan
from tests.helpers.enrolment import a_request
from tests.helpers.quick_federation import quick_federation
from tests.helpers.spies import slow_until_spoken

DOCS = Path(__file__).parents[3] / "docs" / "deploy.md"
RUN = "first"


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    return quick_federation(tmp_path / "fed", monkeypatch)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def put_into(state: State, federation: Federation, held: ExitStack) -> None:
    """The files, and the lock, that such a run has."""
    if state == "unknown":
        return
    write_json(federation.state / "orders" / f"{RUN}.flower.json", {"run-id": "7"})
    if state in ("ordered", "running"):
        held.enter_context(being_run(federation.folder, RUN))
    if state == "ordered":
        return
    manifest: dict[str, Any] = {"sites": [], "run": RUN, "status": "running"}
    folder = RunFolder.create(federation.runs / RUN, tiny_plan(), manifest, None, None)
    write_outcome(federation.folder, RUN, "check", {"sites": {}})
    if state not in ("running", "interrupted"):
        folder.update_manifest(status=state, models={"public": "0" * 64})
    if state == "failed":
        failure = RunError("no quorum", code="no-quorum")
        write_outcome(federation.folder, RUN, "failure", failure_of(failure))


def typed(federation: Federation, verb: Verb, folder: Path) -> tuple[FedqcError | None, str]:
    plan = write_plan(folder / "plan.yaml", arms=["federated"])
    words: dict[Verb, list[str]] = {
        "start": ["start", str(plan), "--name", RUN, "--wait", "0"],
        "resume": ["resume", RUN, "--wait", "0"],
        "stop": ["stop", RUN],
        "watch": ["watch", RUN],
    }
    result = CliRunner().invoke(runs, [*words[verb], "--federation", str(federation.folder)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, FedqcError), repr(result.exception)
        return result.exception, result.output
    return None, result.output


@pytest.mark.parametrize("state", STATES)
def test_a_run_is_in_the_state_that_its_files_show(
    state: State, federation: Federation, held: ExitStack
) -> None:
    put_into(state, federation, held)
    assert run_state(federation, RUN) == state


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verb", ["start", "resume"])
def test_what_continues_a_run_is_admitted_or_says_what_to_do(
    verb: Verb, state: State, federation: Federation, held: ExitStack, tmp_path: Path
) -> None:
    put_into(state, federation, held)
    error, _ = typed(federation, verb, tmp_path)
    assert error is not None
    answer = ANSWERS[verb][state]
    # admitted: the next thing that is missing here is a SuperLink
    assert error.code == (answer.code if isinstance(answer, Refused) else "no-superlink")
    if isinstance(answer, Refused):
        assert RUN in error.message
        assert error.hint


@pytest.mark.parametrize("state", STATES)
def test_stop_ends_what_runs_and_says_of_the_rest_that_it_does_not(
    state: State, federation: Federation, held: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into(state, federation, held)
    asked: list[str] = []

    def flower(federation: Federation, *words: str) -> dict[str, Any]:
        asked.append(words[0])
        held.close()  # the ServerApp notices
        if state == "interrupted":
            raise RunError("Flower: Run ID `7` is already finished", code="flower")
        return {}

    monkeypatch.setattr(services, "flower", flower)
    error, said = typed(federation, "stop", tmp_path)
    answer = ANSWERS["stop"][state]
    if isinstance(answer, Refused):
        assert error is not None
        assert (error.code, asked) == (answer.code, [])
        assert "Flower" not in error.message
        return
    assert error is None
    assert asked == ["stop"]
    assert f"fedqc run resume {RUN}" in said
    assert run_state(federation, RUN) == ("unknown" if state == "ordered" else "stopped")


def test_stop_says_that_it_waits(
    federation: Federation, held: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into("interrupted", federation, held)
    told = slow_until_spoken(monkeypatch, services, "flower", {})
    typed(federation, "stop", tmp_path)
    assert sum(line.startswith(f"{RUN}: stopping") for line in told) >= 3


def test_handing_over_a_plan_says_that_it_waits(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "superlink_answers", lambda federation: True)
    monkeypatch.setattr(module, "follow_start", lambda *words, **more: 0)
    told = slow_until_spoken(monkeypatch, services, "flower", {"run-id": 7})
    typed(federation, "start", tmp_path)
    assert sum(line.startswith(f"{RUN}: handing over the plan") for line in told) >= 3


def test_a_run_begins_with_a_word_on_enrolments_that_have_expired(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run may go on without such a site, and it is nobody's refusal."""
    approve(federation, a_request("hospital-a"), days=100)
    _, before = typed(federation, "start", tmp_path)
    monkeypatch.setattr(registry, "today", lambda: date.today() + timedelta(days=101))
    _, after = typed(federation, "start", tmp_path)
    assert "enrolment" not in before
    assert "hospital-a: its enrolment has expired" in after
    assert "fedqc federation renew hospital-a" in after


@pytest.mark.parametrize("state", STATES)
def test_watch_ends_with_what_became_of_it(
    state: State, federation: Federation, held: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into(state, federation, held)
    monkeypatch.setattr(module, "follow_start", lambda *words, **more: 0)
    if state == "running":
        monkeypatch.setattr(module, "follow", lambda *words: 0)
    error, _ = typed(federation, "watch", tmp_path)
    answer = ANSWERS["watch"][state]
    expected = "no-quorum" if state == "failed" else answer.code if isinstance(answer, Refused) else None
    assert (error.code if error else None) == expected


def test_a_run_that_was_refused_at_its_rehearsal_may_be_started_again(
    federation: Federation, held: ExitStack, tmp_path: Path
) -> None:
    put_into("ordered", federation, held)
    held.close()
    write_outcome(federation.folder, RUN, "failure", failure_of(RefusedError("no", code="sites-missing")))
    assert run_state(federation, RUN) == "unknown"
    error, _ = typed(federation, "start", tmp_path)
    assert error is not None
    assert error.code == "no-superlink"


def test_the_page_shows_the_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert table() in text, "docs/deploy.md: paste what `server.run.verbs.table()` gives:\n" + table()
    assert set(ANSWERS) == set(VERBS)
    assert all(set(answers) == set(STATES) for answers in ANSWERS.values())


def test_a_superlink_that_restarts_is_waited_for(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([False, False, True])
    monkeypatch.setattr(services, "superlink_answers", lambda federation: next(looks))
    monkeypatch.setattr(following, "POLL_S", 0.0)
    following.await_superlink(federation, 90)
    assert "waiting for the SuperLink, for at most 90 s" in capsys.readouterr().err


def test_a_wait_speaks(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "SPEAK_S", 0.3)
    looks = iter(range(100))

    def look() -> bool | None:
        number = next(looks)
        if number == 3:
            write_outcome(federation.folder, RUN, "asking", {"text": "answered: a; enrolled: 2"})
        return True if number > 8 else None

    following.await_outcome(federation, RUN, look, limit_s=60)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("waiting for the ServerApp")
    assert any(line.startswith("answered: a; enrolled: 2") for line in lines)
    assert len(lines) >= 3


def test_a_start_after_a_kill_waits_for_the_ports(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, said = [2], list[str]()

    def port_error(address: str, port: int) -> OSError | None:
        held[0] -= 1
        return OSError(98, "in use") if held[0] >= 0 else None

    monkeypatch.setattr(services, "port_error", port_error)
    services._await_ports([("127.0.0.1", 1)], said.append)
    assert held[0] < 0
    assert len(said) == 1
    services._await_ports([("127.0.0.1", 1)], said.append)
    assert len(said) == 1, "nothing is said where nothing is waited for"


def test_a_superlink_that_hangs_is_no_bug(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "flwr"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(services, "superlink_answers", lambda federation: True)
    monkeypatch.setattr(services, "find_program", lambda name: str(program))
    monkeypatch.setattr(services, "FLOWER_S", 0.1)
    with pytest.raises(NetworkError) as caught:
        services.flower_nodes(federation)
    assert caught.value.code == "no-superlink"


@pytest.fixture
def _full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.cli.following.tempfile.TemporaryFile", full)


@pytest.mark.usefixtures("_full_disk")
def test_a_disk_that_is_full_while_the_sites_are_asked_ends_the_wait(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp can neither write an answer down nor say why."""
    monkeypatch.setattr(following, "SPEAK_S", 0.1)
    with pytest.raises(RunError) as caught:
        following.await_outcome(federation, RUN, lambda: None, limit_s=60)
    assert caught.value.code == "disk-full"
    assert "resume" not in str(caught.value.hint)  # there is no run yet


@pytest.mark.usefixtures("_full_disk")
def test_nothing_is_handed_over_on_a_full_disk(
    federation: Federation, held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into("failed", federation, held)
    handed = list[tuple[object, ...]]()
    monkeypatch.setattr(services, "superlink_answers", lambda federation: True)
    monkeypatch.setattr(services, "flower", lambda federation, verb, *words: handed.append((verb, *words)))
    with pytest.raises(RunError) as caught:
        following.submit(federation, tiny_plan(), RUN, Order(mode="check"))
    assert (caught.value.code, handed) == ("disk-full", [])
    assert f"fedqc run resume {RUN}" in str(caught.value.hint)
