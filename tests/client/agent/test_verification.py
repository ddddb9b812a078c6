"""The agent's last door: nothing is done unless the coordinator signed for it, nothing leaves unless the site
signed and noted it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.agent import verification as guard_module
from client.agent.failures import disk_is_full
from client.agent.tasks import agent_for
from client.agent.verification import Guard, guard_for
from client.data.cohort import load_cohort
from client.site.approvals import approvals, approve, withdraw
from client.site.ledger import _sqlite_errors
from common.errors import ConfigError
from common.model_file import load_model
from common.models import build
from common.signing import Statement, sign
from common.weights import manifest_of
from common.wire import (
    DescribeTask,
    Envelope,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    TrainTask,
    WireMessage,
    type_of,
)
from tests.helpers.consortium import settle, tiny_plan
from tests.helpers.signed_site import (
    EVALUATE,
    JSON,
    METHODS,
    PLAN,
    PRIVATE,
    REHEARSE,
    TRAIN,
    A,
    B,
    ask,
    code_of,
    decoded,
    question,
    sealed,
    statement,
)
from tests.helpers.site_agent import BASE, COORDINATOR, MARKER, OTHER, enrol, ledger, rows, spellings


@pytest.fixture
def site(data: Path) -> Path:
    enrol(data / A)
    return data / A


def noted(site: Path) -> list[dict[str, Any]]:
    path = site / "state" / "sent.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the site's data now fails the test, past every `except Exception`."""
    monkeypatch.setattr("client.agent.tasks.load_cohort", lambda *_, **__: pytest.fail("data was read"))


# --- what comes in

ZEROS = TRAIN.model_copy(update={"base": np.zeros_like(BASE)})
OTHER_PLAN = tiny_plan(name="guarded", arms=["federated"], training={"rounds": 9})

UNBELIEVED: dict[str, tuple[str, str, str, Callable[[], bytes]]] = {
    "unsigned": ("unsigned-task", "Train", JSON, lambda: Envelope(payload=TRAIN.to_bytes()).to_bytes()),
    "statement without signature": (
        "unsigned-task",
        "Train",
        JSON,
        lambda: Envelope(payload=TRAIN.to_bytes(), statement=statement(TRAIN).text()).to_bytes(),
    ),
    "signature of zeros": (
        "bad-signature",
        "Train",
        JSON,
        lambda: Envelope(
            payload=TRAIN.to_bytes(), statement=statement(TRAIN).text(), signature=bytes(64)
        ).to_bytes(),
    ),
    "another coordinator": ("bad-signature", "Train", JSON, lambda: question(TRAIN, key=OTHER)),
    "a signature that is no statement's": (
        "bad-signature",
        "Train",
        JSON,
        lambda: Envelope(
            payload=TRAIN.to_bytes(), statement="{}", signature=sign("{}", COORDINATOR)
        ).to_bytes(),
    ),
    "a signature in another domain": (
        "bad-signature",
        "Train",
        JSON,
        lambda: Envelope(
            payload=TRAIN.to_bytes(),
            statement=(text := statement(TRAIN).text()),
            signature=sign(text, COORDINATOR, b"fedqc kit v1\0"),
        ).to_bytes(),
    ),
    "another site": ("wrong-site", "Train", JSON, lambda: question(TRAIN, site=B)),
    "no site in particular": ("wrong-site", "Train", JSON, lambda: question(TRAIN, site="")),
    "another site, asked to introduce itself": (
        "wrong-site",
        "Describe",
        JSON,
        lambda: question(REHEARSE, site=B),
    ),
    "swapped plan": ("wrong-plan", "Train", OTHER_PLAN.canonical_json(), lambda: question(TRAIN)),
    "plan with a space more": ("wrong-plan", "Train", JSON.replace(":", ": ", 1), lambda: question(TRAIN)),
    "swapped payload": ("bad-signature", "Train", JSON, lambda: question(TRAIN, payload=ZEROS.to_bytes())),
    "private task turned into one that is not": (
        "bad-signature",
        "Train",
        JSON,
        lambda: question(PRIVATE, payload=TRAIN.to_bytes()),
    ),
    "training sent to evaluation": ("bad-signature", "Evaluate", JSON, lambda: question(TRAIN)),
    "evaluation sent to training": ("bad-signature", "Train", JSON, lambda: question(EVALUATE)),
    "an unknown method": ("bad-signature", "Export", JSON, lambda: question(TRAIN)),
    "kind that is not the payload's": (
        "bad-signature",
        "Evaluate",
        JSON,
        lambda: question(TRAIN, kind="DescribeTask"),
    ),
    "no nonce": ("replayed-task", "Train", JSON, lambda: question(TRAIN, nonce="")),
    "a nonce of several lines": ("bad-signature", "Train", JSON, lambda: question(TRAIN, nonce="a\nb")),
    "a run whose name hides its line": (
        "bad-signature",
        "Train",
        JSON,
        lambda: question(TRAIN, run="r\x1b[1A\x1b[2K"),
    ),
}


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("case", UNBELIEVED)
def test_what_the_coordinator_did_not_sign_for_is_refused_before_data_is_read(case: str, site: Path) -> None:
    code, method, plan, make = UNBELIEVED[case]
    opened = sealed(site, Guard(str(site)).answer(method, plan, make()))
    refusal = Refusal.from_bytes(opened.payload)
    assert (refusal.code, refusal.site, refusal.run) == (code, A, "")
    assert Statement.parse(opened.statement).nonce == "", "a question that was not believed is not repeated"
    assert [note["purpose"] for note in noted(site)] == [f"refusal: {code}"]
    assert rows(site.parent) == []


VOUCHED: dict[str, tuple[str, WireMessage, dict[str, Any]]] = {
    "swapped base": ("bad-signature", TRAIN, {"base_sha256": "0" * 64}),
    "another run": ("bad-signature", TRAIN, {"run": "other"}),
    "another arm": ("bad-signature", TRAIN, {"arm": "federated_dp"}),
    "another round": ("bad-signature", TRAIN, {"round": 2}),
    "another run's evaluation": ("bad-signature", EVALUATE, {"run": "other"}),
    "a base that has not its digest": ("crafted-model", ZEROS, {}),
    "an arm that the plan does not have": ("wrong-plan", TRAIN.model_copy(update={"arm": "local"}), {}),
    "a round beyond the plan": ("wrong-plan", TRAIN.model_copy(update={"round": 3}), {}),
    "the private arm without privacy": ("wrong-plan", PRIVATE.model_copy(update={"private": False}), {}),
}


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("case", VOUCHED)
def test_a_task_that_is_not_what_was_signed_or_planned_is_refused_before_data_is_read(
    case: str, site: Path
) -> None:
    code, task, changes = VOUCHED[case]
    assert code_of(ask(site, task, **changes)) == code
    assert rows(site.parent) == []


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("task", [TRAIN, PRIVATE, EVALUATE])
def test_the_honest_task_does_read_data(task: WireMessage, site: Path) -> None:
    """The control of the tests above: it is there that they would fail."""
    with pytest.raises(pytest.fail.Exception, match="data was read"):
        ask(site, task)


@pytest.mark.usefixtures("no_data")
def test_introduction_and_rehearsal_read_no_data(site: Path) -> None:
    assert isinstance(ask(site, DescribeTask(), site=""), SiteDescription)
    assert isinstance(ask(site, REHEARSE), SiteReadiness)


def test_the_files_are_not_needed_for_a_refusal_either(site: Path) -> None:
    for name in ("images", "labels.csv", "state/cache"):
        (site / name).rename(site / f"{name}-gone")
    guard = Guard(str(site))
    for code, method, plan, make in UNBELIEVED.values():
        assert Refusal.from_bytes(sealed(site, guard.answer(method, plan, make())).payload).code == code
    assert code_of(ask(site, TRAIN)) == "site-failure"


def test_a_question_is_answered_once_even_after_a_restart(site: Path) -> None:
    sent = question(DescribeTask(), nonce="ab" * 16)
    guard = Guard(str(site))
    answers = [
        guard.answer("Describe", JSON, sent),
        guard.answer("Describe", JSON, sent),
        Guard(str(site)).answer("Describe", JSON, sent),
    ]
    first, *others = (decoded(sealed(site, answer).payload) for answer in answers)
    assert isinstance(first, SiteDescription)
    assert [code_of(answer) for answer in others] == ["replayed-task"] * 2
    assert stat.S_IMODE((site / "state" / "nonces").stat().st_mode) == 0o600


def test_one_nonce_serves_one_question_of_any_kind(site: Path) -> None:
    assert isinstance(ask(site, DescribeTask(), nonce="c0" * 16), SiteDescription)
    answer = Guard(str(site)).answer("Train", JSON, question(TRAIN, nonce="c0" * 16))
    assert code_of(decoded(sealed(site, answer).payload)) == "replayed-task"


def test_a_task_that_was_not_believed_uses_up_no_nonce(site: Path) -> None:
    """Else whoever stands between could spend the coordinator's nonces before it does."""
    guard = Guard(str(site))
    for changes in ({"key": OTHER}, {"site": B}):
        guard.answer("Describe", JSON, question(DescribeTask(), nonce="d0" * 16, **changes))
    assert isinstance(ask(site, DescribeTask(), guard=guard, nonce="d0" * 16), SiteDescription)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 65))
def test_a_nonce_survives_a_line_that_a_crash_tore(cut: int, tmp_path: Path) -> None:
    """Glued to half a line it would be forgotten at the next start, and its task could be replayed."""
    path = tmp_path / "nonces"
    path.unlink(missing_ok=True)
    for nonce in ("a" * 32, "b" * 32):
        assert guard_module._Nonces(path).is_new(nonce)
    path.write_bytes(path.read_bytes()[:cut])
    assert guard_module._Nonces(path).is_new("c" * 32)
    assert not guard_module._Nonces(path).is_new("c" * 32)


def test_nonces_take_bounded_room_and_the_last_are_never_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "KEPT_NONCES", 10)
    nonces, path = guard_module._Nonces(tmp_path / "nonces"), tmp_path / "nonces"
    drawn = [f"{number:032x}" for number in range(95)]
    for at, nonce in enumerate(drawn):
        assert nonces.is_new(nonce)
        assert path.stat().st_size <= 20 * 33
        recent = drawn[max(0, at - 9) : at + 1]
        assert not any(guard_module._Nonces(path).is_new(one) for one in recent)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_site_that_joined_another_coordinator_no_longer_believes_the_first(site: Path) -> None:
    (site / "state" / "signing.key").unlink()
    enrol(site, OTHER)
    assert (
        code_of(decoded(sealed(site, Guard(str(site)).answer("Train", JSON, question(TRAIN))).payload))
        == "bad-signature"
    )
    assert isinstance(ask(site, DescribeTask(), key=OTHER), SiteDescription)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["Describe", "Train", "Evaluate", ""]), st.text(max_size=20), st.binary(max_size=80))
def test_whatever_comes_in_a_signed_refusal_goes_out(site: Path, method: str, plan: str, sent: bytes) -> None:
    assert code_of(decoded(sealed(site, guard_for(str(site)).answer(method, plan, sent)).payload)) in {
        "unsigned-task",
        "bad-signature",
        "bad-message",
    }


# --- policy

OPEN = {"allow_non_private": True, "evaluation": "synthetic", "max_epsilon": 1000.0}


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("task", [TRAIN, PRIVATE, EVALUATE])
def test_outside_the_hours_of_the_policy_no_work_begins(task: WireMessage, site: Path) -> None:
    now = datetime.now().hour
    settle(site, policy=OPEN | {"hours": f"{(now + 2) % 24:02}:00-{(now + 3) % 24:02}:00"})
    assert code_of(ask(site, task)) == "outside-hours"
    assert isinstance(ask(site, DescribeTask()), SiteDescription)
    assert isinstance(ask(site, REHEARSE), SiteReadiness), (
        "a rehearsal is of the run, which may be at another hour"
    )


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("task", [TRAIN, PRIVATE, EVALUATE, REHEARSE])
def test_a_plan_that_nobody_here_approved_is_not_carried(task: WireMessage, site: Path) -> None:
    settle(site, policy=OPEN | {"require_approval": True})
    assert code_of(ask(site, task)) == "not-approved"
    assert isinstance(ask(site, DescribeTask()), SiteDescription)
    approve(site, tiny_plan(name="guarded", arms=["federated"]))
    assert code_of(ask(site, task)) == "not-approved", "another plan of that name"
    approve(site, PLAN)
    if task is REHEARSE:
        assert isinstance(ask(site, task), SiteReadiness)
        return
    with pytest.raises(pytest.fail.Exception, match="data was read"):
        ask(site, task)


def test_one_approval_serves_one_run(site: Path) -> None:
    settle(site, policy=OPEN | {"require_approval": True})
    approve(site, PLAN)
    guard = Guard(str(site))
    assert isinstance(ask(site, REHEARSE, guard=guard), SiteReadiness), "a rehearsal begins no run"
    for task in (TRAIN, TRAIN.model_copy(update={"round": 2})):
        assert isinstance(ask(site, task, guard=guard), SiteUpdate)
    assert isinstance(ask(site, EVALUATE, guard=guard), SiteEvaluation)
    for other in (TRAIN, EVALUATE):
        again = other.model_copy(update={"run": "r2"})
        assert code_of(ask(site, again, guard=guard)) == "approval-used"
    assert code_of(ask(site, DescribeTask(rehearse=True), guard=guard)) == "approval-used"
    assert isinstance(ask(site, REHEARSE, guard=guard), SiteReadiness), "this run may be resumed"
    withdraw(site / "state", PLAN.sha256())
    assert code_of(ask(site, TRAIN, guard=guard)) == "not-approved"


def test_outside_the_hours_no_run_begins(site: Path) -> None:
    now = datetime.now().hour
    hours = f"{(now + 2) % 24:02}:00-{(now + 3) % 24:02}:00"
    settle(site, policy=OPEN | {"require_approval": True, "hours": hours})
    approve(site, PLAN)
    assert code_of(ask(site, TRAIN)) == "outside-hours"
    assert [one.begun for one in approvals(site / "state")] == [()]


def test_a_change_of_policy_counts_from_the_next_question(site: Path) -> None:
    settle(site, policy=OPEN)
    guard = Guard(str(site))
    assert isinstance(ask(site, TRAIN, guard=guard), SiteUpdate)
    (site / "policy.yaml").write_text("allow_non_private: false\n", encoding="utf-8")
    settle(site, kind="hospital")
    assert (
        code_of(ask(site, TRAIN.model_copy(update={"round": 2}), guard=guard)) == "non-private-not-permitted"
    )


# --- what goes out


def test_every_answer_is_signed_over_its_final_bytes_and_noted_before_it_leaves(site: Path) -> None:
    guard = Guard(str(site))
    tasks: list[WireMessage] = [DescribeTask(), REHEARSE, TRAIN, PRIVATE, EVALUATE]
    answers = [guard.answer(METHODS[type(task).__name__], JSON, question(task)) for task in tasks]
    answers.append(guard.answer("Train", JSON, question(TRAIN, key=OTHER)))
    answers.append(guard.answer("Train", JSON, b"\xff"))
    opened = [sealed(site, answer) for answer in answers]
    assert [type_of(envelope.payload) for envelope in opened] == [
        "SiteDescription",
        "SiteReadiness",
        "SiteUpdate",
        "SiteUpdate",
        "SiteEvaluation",
        "Refusal",
        "Refusal",
    ]
    notes = noted(site)
    assert [note["class"] for note in notes] == [
        "public",
        "public",
        "not private",
        "dp",
        "synthetic",
        "public",
        "public",
    ]
    assert [note["purpose"] for note in notes] == [
        "introduce",
        "introduce",
        "train federated",
        "train federated_dp",
        "evaluate",
        "refusal: bad-signature",
        "refusal: bad-message",
    ]
    for note, answer, envelope in zip(notes, answers, opened, strict=True):
        assert note["kind"] == type_of(envelope.payload)
        assert (note["bytes"], note["sha256"]) == (len(answer), hashlib.sha256(envelope.payload).hexdigest())
        assert datetime.fromisoformat(note["at"]).tzinfo is not None
    assert [(note["run"], note["round"]) for note in notes[2:5]] == [("r", 1), ("r", 1), ("r", 0)]
    assert stat.S_IMODE((site / "state" / "sent.jsonl").stat().st_mode) == 0o600


def test_a_failure_is_signed_and_noted_too(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError(MARKER)

    monkeypatch.setattr("client.agent.tasks.load_cohort", fail)
    for task in (TRAIN, PRIVATE, EVALUATE):
        assert code_of(ask(site, task)) == "site-failure"
    monkeypatch.setattr("client.agent.tasks.agent_for", fail)
    for task in (DescribeTask(), REHEARSE, TRAIN):  # type: ignore[assignment]
        assert code_of(ask(site, task)) == "site-failure"
    assert len(noted(site)) == 6
    assert MARKER in (site / "state" / "site.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "task", [DescribeTask(), TRAIN, PRIVATE, EVALUATE], ids=lambda task: type(task).__name__
)
def test_what_cannot_be_noted_does_not_leave(task: WireMessage, site: Path) -> None:
    (site / "state" / "sent.jsonl").mkdir()
    answer = ask(site, task)
    assert code_of(answer) == "site-failure"
    (site / "state" / "sent.jsonl").rmdir()
    assert not isinstance(ask(site, task), Refusal)


def test_a_private_update_that_could_not_be_noted_is_the_same_one_later(site: Path) -> None:
    (site / "state" / "sent.jsonl").mkdir()
    assert code_of(ask(site, PRIVATE)) == "site-failure"
    spent = rows(site.parent)
    assert [kind for kind, _, _ in spent] == ["reserve", "commit"]
    (site / "state" / "sent.jsonl").rmdir()
    assert isinstance(ask(site, PRIVATE), SiteUpdate)
    assert rows(site.parent) == spent


def test_a_torn_note_does_not_swallow_the_next(site: Path) -> None:
    ask(site, DescribeTask())
    path = site / "state" / "sent.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    ask(site, DescribeTask())
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[-1])["purpose"] == "introduce"


def test_progress_is_told_in_public_steps(site: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plan = tiny_plan(
        name="steps",
        arms=["federated"],
        training={"rounds": 2, "local_epochs": 3},
        federation={"codec": "plain"},
    )
    sent = question(TRAIN, plan_sha256=plan.sha256())
    Guard(str(site)).answer("Train", plan.canonical_json(), sent, progress=lambda *step: told.append(step))
    assert told == [("epoch", 0, 3), ("epoch", 1, 3), ("epoch", 2, 3)]


@pytest.mark.parametrize("task", [TRAIN, PRIVATE, EVALUATE], ids=lambda task: type(task).__name__)
def test_work_that_nobody_waits_for_ends(task: WireMessage, site: Path) -> None:
    cancelled = threading.Event()
    cancelled.set()
    method = METHODS[type(task).__name__]
    answer = Guard(str(site)).answer(method, JSON, question(task), cancelled=cancelled)
    assert code_of(decoded(sealed(site, answer).payload)) == "site-failure"
    assert isinstance(ask(site, task), SiteUpdate | SiteEvaluation), "and may be asked for again"
    assert sum(kind == "reserve" for kind, _, _ in rows(site.parent)) == (task is PRIVATE)


def test_the_final_model_stays_at_the_site(site: Path) -> None:
    weights = np.stack([BASE, BASE * np.float32(0.5)])
    assert isinstance(ask(site, EVALUATE.model_copy(update={"weights": weights})), SiteEvaluation)
    models = site / "state" / "models"
    manifest = manifest_of(build("small_cnn").state_dict())
    assert np.array_equal(load_model(models / "latest.safetensors", manifest), weights[1])
    second = EVALUATE.model_copy(update={"run": "../../evil", "final": "public", "weights": weights})
    assert isinstance(ask(site, second), SiteEvaluation)
    assert np.array_equal(load_model(models / "latest.safetensors", manifest), weights[0])
    assert len(list(models.glob("*.safetensors"))) == 3
    assert stat.S_IMODE(models.stat().st_mode) == 0o700
    assert not list(site.parent.parent.rglob("evil*"))


def test_a_final_model_that_is_none_of_those_sent_is_not_kept(site: Path) -> None:
    assert code_of(ask(site, EVALUATE.model_copy(update={"final": "other"}))) == "bad-message"
    assert not (site / "state" / "models" / "latest.safetensors").exists()
    assert isinstance(ask(site, EVALUATE.model_copy(update={"final": ""})), SiteEvaluation)
    assert not (site / "state" / "models" / "latest.safetensors").exists()


def test_a_site_that_may_not_be_scored_still_gets_the_model(site: Path) -> None:
    settle(site, policy={"evaluation": "none"})
    assert code_of(ask(site, EVALUATE)) == "evaluation-not-permitted"
    assert (site / "state" / "models" / "latest.safetensors").is_file()


# --- nothing leaves beside the answer


def marked_labels(site: Path) -> None:
    (site / "labels.csv").write_text(f"file,metal\n{MARKER}.dcm,{MARKER}\n", encoding="utf-8")


def marked_policy(site: Path) -> None:
    settle(site, policy={MARKER: 1})


def marked_images(site: Path) -> None:
    settle(site, images=MARKER)


def marked_names(site: Path) -> None:
    """An honest site, all of whose files are named after somebody."""
    names = {path: path.with_name(f"{MARKER}-{path.name}") for path in (site / "images").rglob("*.dcm")}
    sheet = (site / "labels.csv").read_text(encoding="utf-8")
    for path, renamed in names.items():
        path.rename(renamed)
        sheet = sheet.replace(path.name, renamed.name)
    assert MARKER in sheet
    (site / "labels.csv").write_text(sheet, encoding="utf-8")


def marked_log(site: Path) -> None:
    (site / "state" / "site.log").write_text(MARKER, encoding="utf-8")
    (site / "state" / "sent.jsonl").write_text(f'{{"{MARKER}": 1}}\n', encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [marked_labels, marked_policy, marked_images, marked_names, marked_log],
    ids=lambda f: f.__name__,
)
def test_no_path_no_name_and_no_exception_text_is_in_any_answer(
    damage: Callable[[Path], None], data: Path
) -> None:
    site = data / f"site-{MARKER}"
    (data / A).rename(site)
    enrol(site)
    damage(site)
    guard = Guard(str(site))
    tasks: list[WireMessage] = [DescribeTask(), REHEARSE, TRAIN, PRIVATE, EVALUATE]
    answers = [guard.answer(METHODS[type(task).__name__], JSON, question(task)) for task in tasks]
    answers += [guard.answer(method, plan, make()) for _, method, plan, make in UNBELIEVED.values()]
    answers.append(
        guard.answer(
            "Train",
            f"{{{MARKER}",
            question(TRAIN, plan_sha256=hashlib.sha256(f"{{{MARKER}".encode()).hexdigest()),
        )
    )
    for answer in answers:
        sealed(site, answer)
        for hidden in (MARKER, "Traceback", str(site), "labels.csv", "site.yaml"):
            assert not [spelling for spelling in spellings(hidden) if spelling in answer]


# --- disk full


class FullDisk:
    """The `os` module of a machine whose disk takes nothing any more."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(28, f"No space left on device: {MARKER}")
        return os.open(path, flags, *more)


def no_space(*_: Any, **__: Any) -> bool:
    raise OSError(28, f"No space left on device: {MARKER}")


@pytest.mark.parametrize(
    ("where", "failing", "task"),
    [
        ("client.site.answer_store.write_new", no_space, PRIVATE),
        ("common.files.os", FullDisk(), PRIVATE),
        ("common.files.os", FullDisk(), TRAIN),
    ],
    ids=["outbox", "nonces-and-notes-private", "nonces-and-notes"],
)
def test_on_a_full_disk_no_update_leaves_and_the_work_goes_on_once_there_is_space(
    where: str, failing: object, task: TrainTask, site: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, failing)
        answer = Guard(str(site)).answer("Train", JSON, question(task))
        refusal = decoded(sealed(site, answer).payload)
        assert code_of(refusal) == "disk-full"
        assert not [spelling for spelling in spellings(MARKER) if spelling in answer]
    assert isinstance(ask(site, task), SiteUpdate)
    with ledger(site.parent) as opened:
        commits = [row for row in opened.rows() if row.kind == "commit"]
    assert len(commits) == (task is PRIVATE)


def test_a_full_disk_under_the_ledger_is_no_decision_of_the_site(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal would end the site's part in the run; this passes when there is space again."""
    with monkeypatch.context() as patch:
        patch.setattr("client.site.ledger.Ledger.reserve", full_database)
        assert code_of(ask(site, PRIVATE)) == "disk-full"
    assert rows(site.parent) == []
    assert isinstance(ask(site, PRIVATE), SiteUpdate)


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR_SHMMAP, sqlite3.SQLITE_IOERR_NOMEM, None])
def test_no_memory_under_the_ledger_is_said_as_any_other_failure(
    site: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    """How much memory is left depends on the images that were read."""

    def without_memory(*_: Any, **__: Any) -> None:
        with _sqlite_errors(Path("ledger")):
            if code is None:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            failure = sqlite3.OperationalError("disk I/O error")
            failure.sqlite_errorcode = code
            raise failure

    monkeypatch.setattr("client.site.ledger.Ledger.reserve", without_memory)
    assert code_of(ask(site, PRIVATE)) == "site-failure"
    assert "out-of-memory" in (site / "state" / "site.log").read_text(encoding="utf-8")


def full_database(*_: Any, **__: Any) -> None:
    with _sqlite_errors(Path("ledger")):
        connection = sqlite3.connect(":memory:")
        connection.execute("PRAGMA max_page_count = 2")
        connection.execute("CREATE TABLE t (content BLOB)")
        connection.execute("INSERT INTO t VALUES (zeroblob(1000000))")


def test_a_full_disk_that_takes_no_log_either_is_still_said(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def full(path: Path, mode: str = "r", *more: Any, **others: Any) -> Any:
        if "a" in mode:
            raise OSError(28, "No space left on device")
        return opened(path, mode, *more, **others)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr("client.site.answer_store.write_new", no_space)
    assert code_of(ask(site, PRIVATE)) == "disk-full"


@pytest.mark.parametrize(
    ("failure", "full"),
    [
        (OSError(28, "x"), True),
        (OSError(122, "quota"), True),
        (OSError(13, "x"), False),
        (MemoryError(), False),
        (None, False),
    ],
)
def test_only_a_full_disk_is_a_full_disk(failure: Exception | None, full: bool) -> None:
    assert disk_is_full(failure) == full
    wrapped = RuntimeError("x")
    wrapped.__cause__ = failure
    assert disk_is_full(wrapped) == full


# --- a folder that never joined


def test_a_folder_that_never_joined_has_nothing_to_verify_and_notes_nothing(data: Path) -> None:
    guard = Guard(str(data / A))
    assert not guard.enrolled
    opened = Envelope.from_bytes(guard.answer("Train", JSON, Envelope(payload=TRAIN.to_bytes()).to_bytes()))
    assert (opened.statement, opened.signature) == ("", b"")
    assert SiteUpdate.from_bytes(opened.payload).update.shape == BASE.shape
    assert not {"nonces", "sent.jsonl", "models"} & {path.name for path in (data / A / "state").iterdir()}


def test_signed_and_unsigned_sites_train_the_same_bits(site: Path, data: Path) -> None:
    signed = ask(site, TRAIN)
    (site / "state" / "coordinator.json").unlink()
    agent_for.cache_clear()
    opened = Envelope.from_bytes(
        Guard(str(site)).answer("Train", JSON, Envelope(payload=TRAIN.to_bytes()).to_bytes())
    )
    assert opened.payload == signed.to_bytes()


def test_a_joined_site_whose_key_others_may_read_does_not_start(site: Path) -> None:
    (site / "state" / "signing.key").chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        Guard(str(site))


def test_who_opts_out_between_two_rounds_is_gone_from_what_is_sent(site: Path, tmp_path: Path) -> None:
    """Through the agent's door: the second update is that of a site which never had the patient, and the
    answer that is stored for the first question stays the answer to it.
    """
    images = {path: pydicom.dcmread(path).PatientID for path in (site / "images").glob("*.dcm")}
    cohort = load_cohort(site, size=PLAN.image_size, plan_split=PLAN.split)
    row = int(np.flatnonzero(cohort.part == 0)[0])
    patient = images[site / "images" / cohort.records[row].file]
    guard = Guard(str(site))
    first = ask(site, PRIVATE, guard=guard)
    assert isinstance(first, SiteUpdate)
    second = TRAIN.model_copy(update={"round": 2})
    before = ask(site, second, guard=guard)
    (site / "cohort.yaml").write_text("opt_out_file: out.csv\n")
    (site / "out.csv").write_text(f"PatientID;Date\n{str(patient).lower()};2026-01-01\n")
    after = ask(site, second, guard=guard)
    never = tmp_path / "never" / A
    shutil.copytree(site, never)
    (never / "out.csv").write_text("PatientID\n")
    for path, one in images.items():
        if one == patient:
            (never / "images" / path.name).unlink()
    without = ask(never, second.model_copy(update={"run": "s"}))  # another run, as its data differ
    assert isinstance(before, SiteUpdate)
    assert isinstance(after, SiteUpdate)
    assert isinstance(without, SiteUpdate)
    np.testing.assert_array_equal(after.update, without.update)
    assert (before.update != after.update).any()
    assert ask(site, PRIVATE, guard=guard).to_bytes() == first.to_bytes()


def test_the_stated_unit_leaves_through_the_door(site: Path) -> None:
    settle(site, kind="hospital", patients={"fallback": "study"})
    described = ask(site, DescribeTask(run="r"))
    assert isinstance(described, SiteDescription)
    assert described.unit == "study"


# ---- the witness


def test_a_ledger_that_the_coordinator_knew_longer_does_nothing(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ledger and head file were set back together, as by a backup, or the folder was copied."""
    settle(site, kind="hospital", policy={"evaluation": "disclosed"})
    private = tiny_plan(name="guarded", arms=["federated_dp"])
    plan, how = private.canonical_json(), {"plan_sha256": private.sha256()}
    backup = {path.name: path.read_bytes() for path in (site / "state").glob("ledger*")}
    first = ask(site, DescribeTask(), plan, **how)
    assert isinstance(first, SiteDescription)
    assert isinstance(ask(site, PRIVATE, plan, ledger_head=first.ledger_head, **how), SiteUpdate)
    latest = ask(site, DescribeTask(), plan, ledger_head=first.ledger_head, **how)
    assert isinstance(latest, SiteDescription)
    for path in (site / "state").glob("ledger*"):
        path.unlink()
    for name, content in backup.items():
        (site / "state" / name).write_bytes(content)
    again = PRIVATE.model_copy(update={"run": "another"})
    assert isinstance(ask(site, DescribeTask(), plan, ledger_head=first.ledger_head, **how), SiteDescription)
    monkeypatch.setattr("client.agent.tasks.load_cohort", lambda *_, **__: pytest.fail("data was read"))
    for task in (DescribeTask(), REHEARSE, PRIVATE, again, EVALUATE):
        assert code_of(ask(site, task, plan, ledger_head=latest.ledger_head, **how)) == "ledger-rolled-back"


def test_a_head_that_is_none_is_no_ancestor(site: Path) -> None:
    settle(site, kind="hospital")
    for head in ("1:" + "0" * 64, "x", "-1:", "999999999:" + "f" * 64):
        assert code_of(ask(site, DescribeTask(), ledger_head=head)) == "ledger-rolled-back"


def test_the_terminal_says_what_the_site_works_on(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a run trains on patients' data; public steps, never what the data hold."""
    ask(site, DescribeTask())
    assert capsys.readouterr().err == ""
    assert isinstance(ask(site, TRAIN), SiteUpdate)
    began, ended = capsys.readouterr().err.splitlines()
    assert began == f"agent: training federated, round 1 of {PLAN.training.rounds} of run r"
    assert ended.startswith("agent: answered (train federated), ")
