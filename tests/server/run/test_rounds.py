"""Rounds with the real doors of both sides, four tiny hospitals, and what can go wrong between them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from common.cli import Format
from common.errors import PlanError, RefusedError, RunError
from common.i18n import speaker
from common.model_file import load_model
from common.models import build
from common.weights import LIMIT, manifest_of
from common.wire import Refusal, SiteDescription, SiteUpdate, TrainTask, message_type
from server.evaluation.compare import about, privacy_line
from server.evaluation.report.findings import privacy_banner
from server.evaluation.report.page import claim_rows, write_report
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation.tables import table
from server.run_folder import RunFolder
from server.simulation.simulate import shown
from tests.helpers.consortium import HELD_OUT, TRAINING, Consortium, settle, tiny_plan

A, B, C = TRAINING
PRIVATE = tiny_plan(name="private", arms=["federated", "federated_dp"])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def evaluation(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "evaluation.json").read_text(encoding="utf-8"))


def weights(folder: RunFolder, arm: str = "federated") -> np.ndarray:
    return load_model(folder.arm(arm).model_path, manifest_of(build("small_cnn").state_dict()))


def changed(**changes: Any) -> Callable[[Message, Message], Message | None]:
    """Another SiteUpdate from hospital-b, as a broken or hostile site would send it."""

    def tamper(question: Message, answer: Message) -> Message | None:
        if answer.has_error() or message_type(answer.content) != "SiteUpdate":
            return None
        update = SiteUpdate.from_record(answer.content)
        if update.site != B:
            return None
        values = update.model_dump() | {
            key: value(update) if callable(value) else value for key, value in changes.items()
        }
        return Message(content=SiteUpdate(**values).to_record(), reply_to=question)

    return tamper


def test_every_site_answers_every_round(consortium: Consortium, out: Path) -> None:
    folder = consortium.conduct(tiny_plan(), out)
    rounds = folder.arm("federated").rounds()
    assert [record["round"] for record in rounds] == [1, 2]
    for record in rounds:
        assert record["invited"] == record["answered"] == list(TRAINING)
        assert record["refused"] == record["failed"] == record["claims"] == {}
        assert record["weights"] == dict.fromkeys(TRAINING, 50)
        assert set(record["seconds"]) == set(TRAINING)
    found = evaluation(folder)
    assert (found["status"], found["incomplete"], found["refusals"]) == ("completed", [], [])
    assert (HELD_OUT, "train") not in consortium.asked
    assert found["sites"][3]["role"] == "held_out"


def test_the_server_app_runs_the_plan_of_its_run_config(consortium: Consortium, out: Path) -> None:
    """The door that Flower calls, with nothing but the two keys of the run config."""
    from server.app import app

    plan = tiny_plan(training={"rounds": 1})
    config = {"plan": plan.canonical_json(), "run-dir": str(out)}
    app(consortium.grid(plan, out), Context(1, 0, {}, RecordDict(), config))  # type: ignore[arg-type]
    assert evaluation(RunFolder.open(out))["status"] == "completed"


@pytest.mark.parametrize("config", [{}, {"plan": ""}, {"plan": "{}"}, {"run-dir": "/r"}])
def test_the_server_app_asks_for_both_keys(config: dict[str, str], consortium: Consortium, out: Path) -> None:
    from server.app import main

    with pytest.raises(PlanError, match="run-dir"):
        main(consortium.grid(tiny_plan(), out), Context(1, 0, {}, RecordDict(), config))  # type: ignore[arg-type]


def test_the_order_of_the_nodes_changes_no_bit(consortium: Consortium, out: Path) -> None:
    backwards = dataclasses.replace(consortium, names=consortium.names[::-1], asked=[])
    first, second = (
        consortium.conduct(tiny_plan(), out),
        backwards.conduct(tiny_plan(), out.with_name("backwards")),
    )
    assert backwards.asked != consortium.asked
    assert weights(first).tobytes() == weights(second).tobytes()
    assert evaluation(first)["matrix"] == evaluation(second)["matrix"]


def test_a_lost_site_leaves_the_run_partial_and_is_named(consortium: Consortium, out: Path) -> None:
    consortium.lost = {B}
    folder = consortium.conduct(tiny_plan(), out)
    found = evaluation(folder)
    assert found["status"] == folder.manifest["status"] == "partial"
    assert found["incomplete"] == [
        f"evaluation: {B} gave no score (unavailable)",
        f"federated: {B} failed (unavailable)",
    ]
    for record in folder.arm("federated").rounds():
        assert record["failed"] == {B: "unavailable"}
        assert record["answered"] == [A, C]
    assert B not in found["metrics"]["federated"]
    assert set(found["counts"]) == {A, C, HELD_OUT}


def test_a_lost_site_is_asked_again_the_next_round(consortium: Consortium, out: Path) -> None:
    consortium.lost = {B}

    def back_later(question: Message, answer: Message) -> None:
        consortium.lost = set() if consortium.asked.count((B, "train")) else consortium.lost

    consortium.tamper = back_later
    folder = consortium.conduct(tiny_plan(), out)
    assert [B in record["answered"] for record in folder.arm("federated").rounds()] == [False, True]
    assert evaluation(folder)["status"] == "partial"


def test_a_lost_site_does_not_move_the_model(consortium: Consortium, out: Path) -> None:
    """The others' mean is theirs alone: the same bits as a consortium without it."""
    consortium.lost = {B}
    without = dataclasses.replace(consortium, names=(A, C, HELD_OUT), lost=set())
    first, second = (
        consortium.conduct(tiny_plan(), out),
        without.conduct(tiny_plan(), out.with_name("without")),
    )
    assert weights(first).tobytes() == weights(second).tobytes()


@pytest.mark.parametrize("quorum", [2, 3])
def test_too_few_answers_stop_the_run(quorum: int, consortium: Consortium, out: Path) -> None:
    consortium.lost = set(TRAINING[: 4 - quorum])
    with pytest.raises(RunError) as caught:
        consortium.conduct(tiny_plan(federation={"quorum": quorum}), out)
    assert (caught.value.code, caught.value.exit_status) == ("no-quorum", 1)
    assert f"{quorum - 1} valid answers, the quorum is {quorum}" in caught.value.message
    assert RunFolder.open(out).manifest["status"] == "failed"
    assert not (out / "evaluation.json").exists()
    assert not list(out.glob("checkpoints/*"))


def test_a_run_without_quorum_goes_on_when_the_sites_are_back(consortium: Consortium, out: Path) -> None:
    plan = tiny_plan(federation={"quorum": 3})

    def lose_after_the_first_round(question: Message, answer: Message) -> None:
        consortium.lost = {B} if consortium.asked.count((C, "train")) == 1 else set()

    consortium.tamper = lose_after_the_first_round
    with pytest.raises(RunError):
        consortium.conduct(plan, out)
    assert RunFolder.open(out).arm("federated").last_round() == 1
    consortium.tamper, consortium.lost = None, set()
    resumed = consortium.conduct(plan, out)
    assert evaluation(resumed)["status"] == "completed"
    assert weights(resumed).tobytes() == weights(consortium.conduct(plan, out.with_name("whole"))).tobytes()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"update": np.zeros(3, np.int32)}, "bad-update"),
        ({"update": lambda update: update.update.astype(np.int64)}, "bad-update"),
        ({"update": lambda update: np.full_like(update.update, LIMIT + 1)}, "bad-update"),
        ({"round": 7}, "bad-update"),
        ({"run": "another"}, "bad-update"),
        ({"base_sha256": "0" * 64}, "bad-update"),
        ({"weight": 10_000}, "bad-update"),
        ({"site": C}, "bad-update"),
        ({"private": True, "noise_multiplier": 1.0, "epsilon": 1.0, "delta": 1e-5}, "bad-update"),
    ],
    ids=["shape", "dtype", "beyond-the-grid", "round", "run", "base", "weight", "site", "private"],
)
def test_a_bad_update_costs_its_site_only(
    changes: dict[str, Any], code: str, consortium: Consortium, out: Path
) -> None:
    consortium.tamper = changed(**changes)
    folder = consortium.conduct(tiny_plan(training={"rounds": 1}), out)
    (record,) = folder.arm("federated").rounds()
    assert record["failed"] == {B: code}
    assert record["answered"] == [A, C]
    assert evaluation(folder)["status"] == "partial"
    assert np.isfinite(weights(folder)).all()


@pytest.mark.parametrize(
    "record",
    [
        RecordDict(),
        RecordDict({"fields": ConfigRecord({"json": "{"})}),
        SiteDescription(site=B, kind="public", nominal_patients=50, version="0").to_record(),
        RecordDict({"fields": ConfigRecord({"json": '{"type": "Refusal"}'})}),
    ],
    ids=["empty", "not-json", "another-message", "half-a-refusal"],
)
def test_an_answer_that_is_no_message_costs_its_site_only(
    record: RecordDict, consortium: Consortium, out: Path
) -> None:
    def tamper(question: Message, answer: Message) -> Message | None:
        mine = question.metadata.dst_node_id == 2 and question.metadata.message_type == "train"
        return Message(content=RecordDict(dict(record)), reply_to=question) if mine else None

    consortium.tamper = tamper
    folder = consortium.conduct(tiny_plan(training={"rounds": 1}), out)
    (found,) = folder.arm("federated").rounds()
    assert found["answered"] == [A, C]
    assert evaluation(folder)["status"] == "partial"


def test_a_site_that_answers_nothing_before_the_deadline_is_left_out(
    consortium: Consortium, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.simulation.local_grid import LocalGrid

    pull = LocalGrid.pull_messages

    def silent(grid: LocalGrid, message_ids: Any) -> list[Message]:
        waiting = [
            i for i in message_ids if i in grid._waiting and grid._waiting[i].metadata.message_type == "train"
        ]
        if len(waiting) == 1 and grid._waiting[waiting[0]].metadata.dst_node_id == 3:
            return []
        return pull(grid, message_ids)

    monkeypatch.setattr(LocalGrid, "pull_messages", silent)
    monkeypatch.setattr("server.messaging.requests.POLL_S", 0.01)
    folder = consortium.conduct(tiny_plan(training={"rounds": 1}, federation={"deadline_s": 2.0}), out)
    (record,) = folder.arm("federated").rounds()
    assert record["failed"] == {C: "no-answer"}
    assert record["answered"] == [A, B]


def test_a_stricter_policy_refuses_and_the_others_go_on(consortium: Consortium, out: Path) -> None:
    settle(
        consortium.data / B, policy={"max_epsilon": 1.0, "allow_non_private": True, "evaluation": "synthetic"}
    )
    settle(consortium.data / C, patients={"fallback": "study"})
    folder = consortium.conduct(PRIVATE, out)
    found = evaluation(folder)
    units = {A: "patient", B: "patient", C: "study"}
    assert {site["site"]: site["unit"] for site in folder.manifest["sites"]}.items() >= units.items()
    assert found["status"] == "partial"
    assert found["incomplete"] == [f"federated_dp: {B} refused"]
    assert found["private_arms"] == ["federated_dp"]
    assert set(found["matrix"]["federated_dp"]) >= {A, B, C}
    refused = found["privacy"][B]
    assert refused["refused"]["code"] == "epsilon-over-policy"
    assert "at most 1" in refused["refused"]["reason"]
    assert (refused["epsilon"], refused["delta"]) == (None, None)
    for site in (A, C):
        claim = found["privacy"][site]
        assert claim["refused"] is None
        assert 1.8 < claim["epsilon"] <= 2
        # without sampling epsilon is exact, and PLD an upper bound by its grid
        assert 0 < claim["epsilon_pld"] <= claim["epsilon"] + 1e-6
        assert (claim["delta"], claim["unit"], claim["adjacency"]) == (1e-5, units[site], "add/remove")
    assert [record["answered"] for record in folder.arm("federated_dp").rounds()] == [[A, C], [A, C]]


def test_a_site_that_refused_is_not_asked_again(consortium: Consortium, out: Path) -> None:
    settle(
        consortium.data / B, policy={"max_epsilon": 1.0, "allow_non_private": True, "evaluation": "synthetic"}
    )
    consortium.conduct(tiny_plan(name="again", arms=["federated_dp"]), out)
    assert consortium.asked.count((B, "train")) == 1
    assert consortium.asked.count((A, "train")) == 2


def test_an_arm_that_every_site_refuses_has_no_numbers_and_the_run_is_partial(
    consortium: Consortium, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for site in TRAINING:
        settle(consortium.data / site, nominal_patients=20)
    folder = consortium.conduct(PRIVATE, out)
    found = evaluation(folder)
    assert (found["status"], found["incomplete"]) == ("partial", [])
    assert shown(folder, Format.text) == 6
    assert "partial: federated_dp: every site refused" in capsys.readouterr().out
    assert '<span class="status partial">' in write_report(folder).read_text(encoding="utf-8")
    assert found["headline"]["federated_dp"] is None
    assert found["headline"]["federated"] is not None
    assert found["private_arms"] == []
    (refusal,) = found["refusals"]
    assert refusal.startswith("federated_dp: ")
    assert "nominal number of patients is 20, its policy requires at least 50" in refusal
    assert {site: claim["refused"]["code"] for site, claim in found["privacy"].items()} == dict.fromkeys(
        TRAINING, "too-few-patients"
    )
    assert all(claim["epsilon"] is None for claim in found["privacy"].values())
    assert not folder.arm("federated_dp").model_path.exists()


def test_when_every_site_refuses_later_the_deciding_refusal_is_named_and_what_was_spent_stays(
    consortium: Consortium, out: Path
) -> None:
    settle(consortium.data / A, nominal_patients=20)

    def tamper(message: Message, answer: Message) -> Message | None:
        if message.metadata.message_type != "train":
            return None
        task = TrainTask.from_record(message.content)
        if not task.private or task.round == 1:
            return None
        site = SiteUpdate.from_record(answer.content).site
        said = Refusal(site=site, run=task.run, code="crafted-model", reason="beyond any grid")
        return Message(said.to_record(), reply_to=message)

    consortium.tamper = tamper
    found = evaluation(consortium.conduct(PRIVATE, out))
    (refusal,) = found["refusals"]
    assert "round 2: beyond any grid [crafted-model, " in refusal
    assert "nominal" not in refusal, "who refused in the first round did not decide"
    codes = {site: claim["refused"]["code"] for site, claim in found["privacy"].items()}
    assert codes == {A: "too-few-patients", B: "crafted-model", C: "crafted-model"}
    assert found["privacy"][A]["epsilon"] is None
    assert all(found["privacy"][site]["epsilon"] > 0 for site in (B, C))


def test_a_run_whose_only_arm_is_refused_ends_as_refused(consortium: Consortium, out: Path) -> None:
    for site in TRAINING:
        settle(consortium.data / site, nominal_patients=20)
    with pytest.raises(RefusedError) as caught:
        consortium.conduct(tiny_plan(arms=["federated_dp"]), out)
    assert caught.value.exit_status == 4
    assert "at least 50" in caught.value.message


def test_a_failing_site_says_one_code_and_keeps_the_details(consortium: Consortium, out: Path) -> None:
    (consortium.data / B / "labels.csv").write_text("file,metal\nx.dcm,maybe\n", encoding="utf-8")
    from client.agent.tasks import agent_for

    agent_for.cache_clear()
    folder = consortium.conduct(tiny_plan(training={"rounds": 1}), out)
    (record,) = folder.arm("federated").rounds()
    assert record["failed"] == {B: "site-failure"}
    written = "".join(path.read_text(encoding="utf-8") for path in out.rglob("*.json*"))
    assert "maybe" not in written
    assert "labels.csv" not in written
    log = (consortium.data / B / "state" / "site.log").read_text(encoding="utf-8")
    assert "labels.csv: row 2, column B (metal)" in log
    assert "maybe" not in log  # what is in a cell may name somebody


def test_a_local_model_that_fails_costs_its_own_arm_only(consortium: Consortium, out: Path) -> None:
    consortium.lost = {B}
    folder = consortium.conduct(tiny_plan(arms=["local", "federated"]), out)
    found = evaluation(folder)
    assert found["status"] == "partial"
    assert f"local/{B}: failed (no-quorum)" in found["incomplete"]
    assert set(found["matrix"]) == {f"local/{A}", f"local/{C}", "federated"}


def test_two_sites_of_one_name_are_refused(consortium: Consortium, out: Path) -> None:
    settle(consortium.data / B, name=A)
    with pytest.raises(RunError) as caught:
        consortium.conduct(tiny_plan(), out)
    assert caught.value.code == "duplicate-site"
    assert not out.exists()


def test_nobody_there_is_said(consortium: Consortium, out: Path) -> None:
    consortium.names = ()
    with pytest.raises(RunError) as caught:
        consortium.conduct(tiny_plan(federation={"deadline_s": 0.01}), out)
    assert caught.value.code == "no-sites"
    assert not out.exists()


def test_the_plan_is_checked_against_the_sites_before_anything_is_written(
    consortium: Consortium, out: Path
) -> None:
    for plan, code in (
        (tiny_plan(held_out=["hospital-x"], federation={"deadline_s": 1.0}), "unknown-site"),
        (tiny_plan(federation={"quorum": 4, "deadline_s": 1.0}), "too-few-sites"),
    ):
        with pytest.raises(PlanError) as caught:
            consortium.conduct(plan, out)
        assert caught.value.code == code
    assert not out.exists()


def test_the_pooled_arm_needs_a_simulation(consortium: Consortium, out: Path) -> None:
    plan = tiny_plan(arms=["pooled"])
    grid = consortium.grid(tiny_plan(), out)  # no pooled node, as among real hospitals
    from server.run.conduct import conduct

    with pytest.raises(PlanError) as caught:
        conduct(grid, plan, out)
    assert caught.value.code == "no-pooled-arm"


def test_a_cohort_that_also_trained_without_noise_has_no_claim_anywhere(
    consortium: Consortium, out: Path
) -> None:
    policy = {"allow_non_private": True, "after_non_private": "void", "evaluation": "disclosed"}
    settle(consortium.data / A, kind="hospital", policy=policy)
    folder = consortium.conduct(PRIVATE, out)
    found = evaluation(folder)
    why = "no claim: this cohort also trained without noise"
    assert (found["privacy"][A]["epsilon"], found["privacy"][A]["void"]) == (None, why)
    assert found["privacy"][B]["epsilon"] is not None
    assert "void" not in found["privacy"][B]
    card = (folder.path / "model_card.md").read_text(encoding="utf-8")
    assert "NOT PRIVATE" in card
    assert f"{A}: {why}" in card
    assert f"{A}: {why}" in table(found)
    assert f"NO GUARANTEE ({why})" in privacy_line(about(found))
    reading = Reading(found, speaker("en", LANGUAGES))
    assert reading.privacy_tag("federated_dp") == "NO GUARANTEE"
    assert [row["state"] for row in claim_rows(reading)].count(why) == 1
    assert any(f"{A}: no claim" in line for line in privacy_banner(reading).lines)
