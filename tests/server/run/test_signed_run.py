"""A whole run among enrolled sites, every message signed: the same bits as without, and nobody speaks for
another.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from client.agent.tasks import agent_for
from client.agent.verification import guard_for
from client.dp.coins import Coins
from common.cli import Format
from common.errors import PlanError, RefusedError, RunError
from common.model_file import load_model
from common.models import build
from common.plan import RunPlan
from common.signing import Statement, load_key, payload_sha256, sign
from common.weights import manifest_of
from common.wire import Envelope, Refusal, SiteDescription, SiteUpdate, message_type, type_of
from server.cli.following import follow
from server.federation.notify import Notify
from server.messaging.signatures import Seal
from server.run.conduct import conduct
from server.run.control_files import Order, read_outcome, write_order
from server.run.order import serve_order
from server.run_folder import RunFolder
from tests.helpers.consortium import HELD_OUT, SITES, TRAINING, Consortium, settle, tiny_plan
from tests.helpers.hospital import fill, read_only, small_disk
from tests.helpers.site_agent import COORDINATOR, OTHER, enrol, rows

A, B, C = TRAINING
MANIFEST = manifest_of(build("small_cnn").state_dict())
Turn = Callable[[Message, Envelope], Envelope | None]


@pytest.fixture
def enrolled(consortium: Consortium) -> Consortium:
    for name in SITES:
        enrol(consortium.data / name)
    return consortium


def seal_of(consortium: Consortium, plan: RunPlan, names: tuple[str, ...] = SITES) -> Seal:
    keys = {name: load_key(consortium.data / name / "state" / "signing.key").public_key() for name in names}
    return Seal(plan_sha256=plan.sha256(), key=COORDINATOR, sites=keys)


def run(consortium: Consortium, plan: RunPlan, out: Path, **seal: Any) -> RunFolder:
    return conduct(
        consortium.grid(plan, out), plan, out, seal=dataclasses.replace(seal_of(consortium, plan), **seal)
    )


def models(folder: RunFolder) -> dict[str, bytes]:
    """Every checkpoint and model of a run by its place."""
    return {
        str(path.relative_to(folder.path)): load_model(path, MANIFEST).tobytes()
        for path in folder.path.rglob("*.safetensors")
    }


def turning(turn: Turn, kind: str = "train") -> Callable[[Message, Message], Message | None]:
    """What a hostile node does to envelopes of one kind of message on their way to the coordinator."""

    def tamper(question: Message, answer: Message) -> Message | None:
        if answer.has_error() or question.metadata.message_type != kind:
            return None
        turned = turn(question, Envelope.from_record(answer.content))
        return turned and Message(content=turned.to_record(), reply_to=question)  # type: ignore[return-value]

    return tamper


def resigned(
    envelope: Envelope, key: Ed25519PrivateKey, payload: bytes | None = None, **changes: Any
) -> Envelope:
    payload = payload or envelope.payload
    said = {"payload_sha256": payload_sha256(payload), "kind": type_of(payload)} | changes
    text = Statement.parse(envelope.statement).model_copy(update=said).text()
    return Envelope(payload=payload, statement=text, signature=sign(text, key))


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give each run the same noise, so that private arms can be compared; a call starts over."""

    def start() -> None:
        numbers = itertools.count()
        monkeypatch.setattr("client.dp.dp_sgd.Coins", lambda: Coins(next(numbers).to_bytes(32)))

    return start


# --- the same bits


def test_a_signed_run_is_the_unsigned_run_in_every_weight(
    consortium: Consortium, tmp_path: Path, same_noise: Callable[[], None]
) -> None:
    plan = tiny_plan(arms=["public", "local", "federated", "federated_dp"])
    same_noise()
    unsigned = consortium.conduct(plan, tmp_path / "unsigned")
    copied = Consortium(data=consortium.data.with_name("copied"))
    consortium.data.rename(copied.data)
    for name in SITES:
        enrol(copied.data / name)
        shutil.rmtree(copied.data / name / "state" / "outbox", ignore_errors=True)
    same_noise()
    signed = run(copied, plan, tmp_path / "signed")
    assert models(signed) == models(unsigned)
    assert len(models(signed)) == 2 * 5 + 5 + 1
    for part in ("status", "matrix", "counts", "headline", "curves", "incomplete"):
        assert json.dumps(signed.evaluation[part]) == json.dumps(unsigned.evaluation[part])


def test_every_site_notes_what_left_and_keeps_the_final_model(enrolled: Consortium, tmp_path: Path) -> None:
    folder = run(enrolled, tiny_plan(arms=["federated", "federated_dp"]), tmp_path / "run")
    final = load_model(folder.path / "model.safetensors", MANIFEST)
    for name in SITES:
        state = enrolled.data / name / "state"
        assert np.array_equal(load_model(state / "models" / "latest.safetensors", MANIFEST), final)
        notes = [json.loads(line) for line in (state / "sent.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(notes) == sum(site == name for site, _ in enrolled.asked)
        assert {note["kind"] for note in notes} == {"SiteDescription", "SiteEvaluation"} | (
            {"SiteUpdate"} if name != HELD_OUT else set()
        )
        assert {note["run"] for note in notes[1:]} == {folder.manifest["run"]}


def test_a_signed_run_that_was_stopped_goes_on_to_the_same_bits(enrolled: Consortium, tmp_path: Path) -> None:
    plan = tiny_plan(training={"rounds": 3})
    whole = run(enrolled, plan, tmp_path / "whole")
    enrolled.asked.clear()
    enrolled.stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(enrolled, plan, tmp_path / "run")
    enrolled.stop_at = None
    agent_for.cache_clear()
    guard_for.cache_clear()
    resumed = run(enrolled, plan, tmp_path / "run")
    assert resumed.evaluation["status"] == "completed"
    assert models(resumed) == models(whole)


# --- codecs


def test_plain_and_lossless_runs_give_the_same_bits_and_lossless_moves_fewer_bytes(
    consortium: Consortium, tmp_path: Path, same_noise: Callable[[], None]
) -> None:
    arms = ["public", "local", "federated", "federated_dp", "pooled"]
    made, moved = {}, {}
    for codec in ("plain", "lossless"):
        same_noise()
        folder = consortium.conduct(
            tiny_plan(arms=arms, training={"rounds": 3}, federation={"codec": codec}), tmp_path / codec
        )
        assert folder.evaluation["status"] == "completed"
        made[codec] = models(folder)
        moved[codec] = {
            arm: [record["bytes"] for record in folder.arm(arm).rounds()]
            for arm in ("federated", "federated_dp")
        }
    assert made["plain"] == made["lossless"]
    for arm in ("federated", "federated_dp"):
        for number in (1, 2):  # from the second round on, only the step goes down
            plain, lossless = moved["plain"][arm][number], moved["lossless"][arm][number]
            assert lossless["down"] < plain["down"]
            assert lossless["up"] < plain["up"]
    assert moved["lossless"]["federated"][1]["down"] < moved["lossless"]["federated"][0]["down"]


def test_int8_moves_a_quarter_up_and_says_what_it_added(consortium: Consortium, tmp_path: Path) -> None:
    folder = consortium.conduct(
        tiny_plan(arms=["federated", "federated_dp"], federation={"codec": "int8"}), tmp_path / "run"
    )
    assert folder.evaluation["status"] == "completed"
    for arm, size in (
        ("federated", MANIFEST.size),
        ("federated_dp", MANIFEST.part("head.").stop - MANIFEST.part("head.").start),
    ):
        for record in folder.arm(arm).rounds():
            assert record["bytes"]["up"] < 3 * (size * 1.2 + 2000)
            assert set(record["added_variance"]) == set(TRAINING)
            assert all(0 < added < 1 for added in record["added_variance"].values())


def test_a_site_that_restarted_between_rounds_gets_the_whole_model_and_the_bits_stay(
    enrolled: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(training={"rounds": 3}, federation={"codec": "lossless"})
    usual = run(enrolled, plan, tmp_path / "usual")
    before = enrolled.asked.count((B, "train"))

    def forget(question: Message, answer: Message) -> None:
        if question.metadata.dst_node_id == 2 and message_type(answer.content) == "SiteUpdate":
            agent_for.cache_clear()

    enrolled.tamper = forget
    restarted = run(enrolled, plan, tmp_path / "restarted")
    assert models(restarted) == models(usual)
    assert before == 3
    assert enrolled.asked.count((B, "train")) - before == 5, "rounds 2 and 3 were asked twice"
    assert [record["failed"] for record in restarted.arm("federated").rounds()] == [{}] * 3


def test_a_codec_of_another_plan_costs_its_site_only(consortium: Consortium, tmp_path: Path) -> None:
    from common.weights import encode_steps

    def tamper(question: Message, answer: Message) -> Message | None:
        if question.metadata.dst_node_id != 2 or message_type(answer.content) != "SiteUpdate":
            return None
        update = SiteUpdate.from_record(answer.content)
        framed = update.model_copy(update={"update": encode_steps(update.update)})
        return Message(content=framed.to_record(), reply_to=question)

    consortium.tamper = tamper
    (record,) = (
        consortium.conduct(tiny_plan(training={"rounds": 1}), tmp_path / "run").arm("federated").rounds()
    )
    assert record["failed"] == {B: "bad-update"}


# --- nobody speaks for another


def key_of(consortium: Consortium, name: str) -> Ed25519PrivateKey:
    return load_key(consortium.data / name / "state" / "signing.key")


def test_a_node_that_answers_in_the_name_of_another_gets_nothing_accepted(
    enrolled: Consortium, tmp_path: Path
) -> None:
    """Hospital a's node has b's place at the SuperLink, and a's key: everything it can forge is forged."""
    a = key_of(enrolled, A)

    def forgeries(question: Message, honest: Envelope) -> Envelope | None:
        if question.metadata.dst_node_id != 2:
            return None
        mine = SiteUpdate.from_bytes(honest.payload).model_copy(
            update={"update": np.full(MANIFEST.size, 10**6, np.int32)}
        )
        forged = [
            resigned(honest, a, mine.to_bytes()),
            resigned(honest, a, mine.model_copy(update={"site": A}).to_bytes(), site=A),
            Envelope(payload=mine.to_bytes(), statement=honest.statement, signature=honest.signature),
            Envelope(payload=mine.to_bytes()),
        ]
        return forged[enrolled.asked.count((B, "train")) % len(forged)]

    without = dataclasses.replace(enrolled, names=(A, C, HELD_OUT), asked=[])
    plan = tiny_plan()
    expected = run(without, plan, tmp_path / "without")
    enrolled.tamper = turning(forgeries)
    folder = run(enrolled, plan, tmp_path / "run")
    assert [record["answered"] for record in folder.arm("federated").rounds()] == [[A, C]] * 2
    assert {code for record in folder.arm("federated").rounds() for code in record["failed"].values()} <= {
        "bad-signature",
        "unsigned-answer",
    }
    assert folder.evaluation["status"] == "partial"
    assert models(folder) == models(expected)


def test_a_replayed_update_of_an_earlier_round_is_not_accepted(enrolled: Consortium, tmp_path: Path) -> None:
    held: list[Envelope] = []

    def replay(question: Message, honest: Envelope) -> Envelope | None:
        if question.metadata.dst_node_id != 2:
            return None
        held.append(honest)
        return held[0]

    enrolled.tamper = turning(replay)
    folder = run(enrolled, tiny_plan(), tmp_path / "run")
    assert [record["failed"] for record in folder.arm("federated").rounds()] == [{}, {B: "bad-signature"}]
    assert len(held) == 3, "asked once more, and no oftener"


def test_a_site_that_introduces_itself_as_another_is_not_taken_for_it(
    enrolled: Consortium, tmp_path: Path
) -> None:
    a = key_of(enrolled, A)

    def pose(question: Message, honest: Envelope) -> Envelope | None:
        if question.metadata.dst_node_id != 1:
            return None
        posing = SiteDescription.from_bytes(honest.payload).model_copy(
            update={"site": B, "nominal_patients": 9_000_000}
        )
        return resigned(honest, a, posing.to_bytes())

    enrolled.tamper = turning(pose, "query.describe")
    folder = run(enrolled, tiny_plan(training={"rounds": 1}), tmp_path / "run")
    (record,) = folder.arm("federated").rounds()
    assert record["weights"] == {B: 50, C: 50}
    assert [site["site"] for site in folder.evaluation["sites"]] == [B, C, HELD_OUT]


def test_a_score_in_the_name_of_another_is_not_counted(enrolled: Consortium, tmp_path: Path) -> None:
    enrolled.tamper = turning(
        lambda question, honest: (
            resigned(honest, key_of(enrolled, A)) if question.metadata.dst_node_id == 2 else None
        ),
        "evaluate",
    )
    folder = run(enrolled, tiny_plan(training={"rounds": 1}), tmp_path / "run")
    assert folder.evaluation["incomplete"] == [f"evaluation: {B} gave no score (bad-signature)"]
    assert B not in folder.evaluation["counts"]


def test_a_node_cannot_refuse_for_its_site(enrolled: Consortium, tmp_path: Path) -> None:
    """A refusal ends a site's part in an arm; only its agent may say that. What the node says costs it the
    round.
    """

    def refuse(question: Message, honest: Envelope) -> Envelope | None:
        if question.metadata.dst_node_id != 2 or enrolled.asked.count((B, "train")) > 1:
            return None
        return Envelope(payload=Refusal(site=B, code="budget-exhausted", reason="x").to_bytes())

    enrolled.tamper = turning(refuse)
    folder = run(enrolled, tiny_plan(), tmp_path / "run")
    first, second = folder.arm("federated").rounds()
    assert (first["failed"], first["refused"]) == ({B: "unsigned-answer"}, {})
    assert second["answered"] == [A, B, C]


def test_a_revoked_site_is_heard_no_more(enrolled: Consortium, tmp_path: Path) -> None:
    plan = tiny_plan(training={"rounds": 1})
    folder = run(enrolled, plan, tmp_path / "run", sites=seal_of(enrolled, plan, (A, C, HELD_OUT)).sites)
    (record,) = folder.arm("federated").rounds()
    assert record["invited"] == [A, C]


def test_sites_that_joined_another_coordinator_do_nothing_for_this_one(
    enrolled: Consortium, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as caught:
        run(enrolled, tiny_plan(), tmp_path / "run", key=OTHER)
    assert caught.value.code == "no-sites"
    for name in SITES:
        notes = (enrolled.data / name / "state" / "sent.jsonl").read_text(encoding="utf-8")
        assert "refusal: bad-signature" in notes


# --- what `fedqc run` asks for


@pytest.fixture
def federation(enrolled: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the ServerApp needs of a federation's folder."""
    monkeypatch.setattr(
        "server.federation.registry.site_keys", lambda _: seal_of(enrolled, tiny_plan()).sites
    )
    monkeypatch.setattr(
        "server.run.order.tell",
        lambda _, **event: told.append({key: value for key, value in event.items() if key != "run"}),
    )
    told: list[dict[str, str]] = []
    witness = Remembered()
    monkeypatch.setattr("server.federation.ledger_heads.LedgerHeads", lambda _: witness)
    return SimpleNamespace(
        folder=tmp_path / "fed",
        notify=Notify(),
        signing_key=lambda: COORDINATOR,
        told=told,
        witness=witness,
    )


@dataclasses.dataclass
class Remembered:
    """The coordinator's notes of the sites' ledgers, in memory; node numbers are places in `SITES`."""

    heads: dict[str, str] = dataclasses.field(default_factory=dict)

    def of_site(self, site: str) -> str:
        return self.heads.get(site, "")

    def of_node(self, node: int) -> str:
        return self.of_site(SITES[node - 1])

    def keep(self, site: str, head: str) -> None:
        self.heads[site] = head


def test_a_site_whose_ledger_was_set_back_takes_part_in_nothing(
    enrolled: Consortium, federation: Any
) -> None:
    """Ledger and head file were restored together from yesterday's backup."""
    settle(enrolled.data / A, kind="hospital", policy={"evaluation": "disclosed"})
    state = enrolled.data / A / "state"
    backup = {path: path.read_bytes() for path in state.glob("ledger*")}
    plan = tiny_plan(arms=["federated_dp"])
    serve(enrolled, federation, plan)
    shutil.rmtree(federation.folder / "runs")
    serve(enrolled, federation, plan, mode="check")  # the control: today's ledger, which has grown since
    check = read_outcome(federation.folder, "one", "check")
    assert check is not None
    assert check["sites"][A]["answer"] == "accept"
    for path in state.glob("ledger*"):
        path.unlink()
    for path, content in backup.items():
        path.write_bytes(content)
    serve(enrolled, federation, plan, mode="check")
    check = read_outcome(federation.folder, "one", "check")
    assert check is not None
    assert {name: site["answer"] for name, site in check["sites"].items()} == {
        name: "ledger-rolled-back" if name == A else "accept" for name in SITES
    }


def serve(enrolled: Consortium, federation: Any, plan: RunPlan, **order: Any) -> Path:
    path = federation.folder / "runs" / "one"
    write_order(federation.folder, "one", Order(**{"wait_s": 0.0} | order))
    serve_order(enrolled.grid(plan, path), plan, path, federation)
    return path


def test_a_rehearsal_asks_every_site_and_trains_nothing(enrolled: Consortium, federation: Any) -> None:
    settle(enrolled.data / B, policy={"require_approval": True})
    path = serve(enrolled, federation, tiny_plan(arms=["federated", "federated_dp"]), mode="check")
    found = read_outcome(federation.folder, "one", "check")
    assert found is not None
    assert {name: site["answer"] for name, site in found["sites"].items()} == {
        A: "accept",
        B: "not-approved",
        C: "accept",
        HELD_OUT: "accept",
    }
    assert found["sites"][A]["rounds_affordable"] == 2
    assert found["sites"][A]["seconds_a_round"] > 0
    assert not path.exists()
    assert {kind for _, kind in enrolled.asked} == {"query.describe"}
    assert federation.told == []


def test_a_run_keeps_how_its_settings_were_chosen_and_so_does_its_resumption(
    enrolled: Consortium, federation: Any
) -> None:
    plan, tuning = tiny_plan(training={"rounds": 1}), {"epsilon": 2.0, "tried": [{"worst": 0.1 + 0.2}]}
    path = serve(enrolled, federation, plan, tuning=tuning)
    assert RunFolder.open(path).tuning == tuning
    serve(enrolled, federation, plan)
    assert RunFolder.open(path).tuning == tuning


def test_a_run_starts_without_a_site_only_where_that_was_accepted(
    enrolled: Consortium, federation: Any
) -> None:
    settle(enrolled.data / B, policy={"require_approval": True})
    plan = tiny_plan(training={"rounds": 1})
    with pytest.raises(RefusedError):
        serve(enrolled, federation, plan)
    failure = read_outcome(federation.folder, "one", "failure")
    assert failure is not None
    assert (failure["code"], failure["exit_status"]) == ("sites-missing", 4)
    assert (B, "train") not in enrolled.asked
    path = serve(enrolled, federation, plan, accept_missing=True)
    assert RunFolder.open(path).evaluation["status"] == "partial"
    assert [(told["event"], told["detail"]) for told in federation.told] == [
        ("failed", "sites-missing"),
        ("refusal", "not-approved"),
        ("partial", ""),
    ]


def test_a_run_that_nobody_scores_charges_nothing_also_where_missing_sites_are_accepted(
    enrolled: Consortium, federation: Any
) -> None:
    for name in SITES:
        settle(enrolled.data / name, policy={"evaluation": "none"})
    plan = tiny_plan(arms=["federated_dp"], held_out=[], training={"rounds": 1})
    with pytest.raises(RefusedError) as caught:
        serve(enrolled, federation, plan, accept_missing=True)
    assert caught.value.code == "no-evaluation"
    assert {kind for _, kind in enrolled.asked} == {"query.describe"}
    assert [rows(enrolled.data, name) for name in SITES] == [[]] * len(SITES)


def test_a_run_that_is_complete_says_so_once(enrolled: Consortium, federation: Any) -> None:
    path = serve(enrolled, federation, tiny_plan(training={"rounds": 1}))
    assert RunFolder.open(path).evaluation["status"] == "completed"
    assert [told["event"] for told in federation.told] == ["completed"]


def test_a_site_that_falls_silent_is_told_of_once(enrolled: Consortium, federation: Any) -> None:
    def hush(question: Message, answer: Message) -> None:
        if question.metadata.message_type == "query.describe":
            return
        enrolled.lost = {B}

    enrolled.tamper = hush
    serve(enrolled, federation, tiny_plan(training={"rounds": 3}))
    assert [told for told in federation.told if told["event"] == "silence"] == [
        {"event": "silence", "site": B, "detail": "unavailable"}
    ]


def test_why_a_run_could_not_go_on_is_written_down_without_the_text_of_a_bug(
    enrolled: Consortium, federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.run.conduct.public_set", lambda *_: {}["/secret/path"])  # type: ignore[index]
    with pytest.raises(KeyError):
        serve(enrolled, federation, tiny_plan())
    failure = read_outcome(federation.folder, "one", "failure")
    assert failure is not None
    assert (failure["code"], failure["exit_status"]) == ("internal", 5)
    assert "secret" not in json.dumps(failure)


def in_round_two(enrolled: Consortium, happen: Callable[[], None]) -> None:
    """Have something happen once, while the answers of the second round come in."""
    left = [happen]

    def tamper(question: Message, answer: Message) -> None:
        if left and enrolled.asked.count((A, "train")) == 2:
            left.pop()()

    enrolled.asked.clear()
    enrolled.tamper = tamper


def watched(federation: Any) -> RunError:
    """What `fedqc run watch` says of the run's end."""
    opened: Any = SimpleNamespace(folder=federation.folder, runs=federation.folder / "runs")
    with pytest.raises(RunError) as caught:
        follow(opened, "one", Format.text)
    assert "fedqc run resume one" in caught.value.hint
    return caught.value


@pytest.mark.parametrize("leave_pages", [0, 16])
def test_a_disk_that_fills_up_under_the_coordinator_is_named_and_the_run_goes_on_to_the_same_bits(
    leave_pages: int, enrolled: Consortium, federation: Any, tmp_path: Path
) -> None:
    """With no page left, not even the failure can be written down."""
    plan = tiny_plan(training={"rounds": 3})
    whole = run(enrolled, plan, tmp_path / "whole")
    federation.folder.mkdir(exist_ok=True)
    with small_disk(federation.folder) as is_small:
        if not is_small:
            pytest.skip("no small disk: this system permits no mount of a tmpfs")
        in_round_two(enrolled, lambda: fill(federation.folder, leave_pages=leave_pages))
        with pytest.raises(OSError, match="No space left"):
            serve(enrolled, federation, plan)
        assert watched(federation).code == "disk-full"
        (federation.folder / "ballast").unlink()
        before = RunFolder.open(federation.folder / "runs" / "one").arm("federated").rounds()
        assert len(before) == 1
        resumed = RunFolder.open(serve(enrolled, federation, plan))
        assert resumed.arm("federated").rounds()[:1] == before
        assert models(resumed) == models(whole)


def test_a_run_folder_that_becomes_read_only_is_named_and_the_run_goes_on_to_the_same_bits(
    enrolled: Consortium, federation: Any, tmp_path: Path
) -> None:
    plan = tiny_plan(training={"rounds": 3})
    whole = run(enrolled, plan, tmp_path / "whole")
    path = federation.folder / "runs" / "one"
    with ExitStack() as mounted:
        in_round_two(enrolled, lambda: mounted.enter_context(read_only(path)))
        with pytest.raises(OSError, match="Read-only"):
            serve(enrolled, federation, plan)
        assert watched(federation).code == "not-writable"
        with pytest.raises(OSError, match="Read-only"):
            serve(enrolled, federation, plan)
        assert watched(federation).code == "not-writable"
    assert models(RunFolder.open(serve(enrolled, federation, plan))) == models(whole)


def test_a_plan_that_too_few_sites_can_carry_is_refused_before_a_run_folder_is_made(
    enrolled: Consortium, federation: Any
) -> None:
    with pytest.raises(PlanError):
        serve(enrolled, federation, tiny_plan(federation={"quorum": 4}), accept_missing=True)
    assert not (federation.folder / "runs").exists()


def test_a_run_that_goes_on_is_running_again(consortium: Consortium, tmp_path: Path) -> None:
    """Else who watches it would take how it ended before for how it ends now."""
    seen: list[str] = []

    def look(question: Message, answer: Message) -> None:
        if question.metadata.message_type == "train":
            seen.append(RunFolder.open(tmp_path / "run").manifest["status"])

    consortium.tamper, consortium.lost = look, set(TRAINING)
    with pytest.raises(RunError):
        consortium.conduct(tiny_plan(), tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "failed"
    seen.clear()
    consortium.lost = set()
    consortium.conduct(tiny_plan(), tmp_path / "run")
    assert set(seen) == {"running"}
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "completed"


def test_a_run_that_was_stopped_is_not_watched_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ServerApp was ended from outside, and can no longer write down that it has."""
    from server.cli import run

    folder = RunFolder.create(
        tmp_path / "fed" / "runs" / "one", tiny_plan(), {"run": "one", "status": "running", "sites": []}
    )
    opened = SimpleNamespace(folder=tmp_path / "fed", runs=tmp_path / "fed" / "runs")
    monkeypatch.setattr(run, "open_federation", lambda _: opened)
    monkeypatch.setattr(run, "flower_id", lambda *_: "7")
    monkeypatch.setattr("server.federation.services.flower", lambda *_: {})
    run.stop(str(folder.path))
    assert run.watch(str(folder.path)) == 0
