"""Nodes that go away, come back, lie or stay silent: how often each is asked, and that every question is a
new one.

The clock is the test's own, so that patience and deadline are counted in questions and never waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message

from common.errors import RunError
from common.signing import Statement, payload_sha256, sign
from common.wire import DescribeTask, Envelope, Refusal, SiteDescription, SiteReadiness, WireMessage
from server.messaging import requests
from server.messaging.requests import AWAY, MAX_ATTEMPTS, MAX_LOST, Answer, ask, describe_sites, rehearse
from server.messaging.signatures import Question, Seal
from server.simulation.local_grid import NODE_UNAVAILABLE, LocalGrid
from tests.helpers.consortium import tiny_plan

COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)
SITES = {1: "a", 2: "b", 3: "c"}
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([node]) * 32) for node, name in SITES.items()}
SEAL = Seal(
    plan_sha256=tiny_plan().sha256(),
    key=COORDINATOR,
    sites={name: key.public_key() for name, key in KEYS.items()},
)
TASK = DescribeTask(run="r")

Reply = Callable[[str, Statement], WireMessage | Envelope | Error | None]


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1e6, "waits for ever"


@dataclass
class Room:
    """Three nodes whose answers a test decides by site, what was asked and heard, and a clock."""

    clock: Clock
    replies: dict[str, Reply] = field(default_factory=dict)
    asked: list[tuple[str, Statement]] = field(default_factory=list)
    mute: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)  # whose messages the SuperLink does not take
    too_large: bool = False
    seal: Seal = SEAL

    def grid(self) -> LocalGrid:
        room = self

        class Grid(LocalGrid):
            def push_messages(self, messages: Iterable[Message]) -> list[str]:
                messages = list(messages)
                if room.too_large:
                    return []
                ids = super().push_messages(messages)
                return [
                    "" if SITES[put.metadata.dst_node_id] in room.rejected else pushed
                    for put, pushed in zip(messages, ids, strict=True)
                ]

            def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
                waiting = {key: self._waiting[key] for key in message_ids if key in self._waiting}
                return super().pull_messages(
                    [k for k, put in waiting.items() if SITES[put.metadata.dst_node_id] not in room.mute]
                )

        def node(message: Message, context: Any) -> Message:
            site = SITES[context.node_id]
            asked = Statement.parse(Envelope.from_record(message.content).statement)
            self.asked.append((site, asked))
            said = self.replies.get(site, introduction)(site, asked)
            if isinstance(said, Error):
                return Message(said, reply_to=message)
            if isinstance(said, WireMessage):
                said = signed(site, asked, said)
            assert said is not None
            return Message(content=said.to_record(), reply_to=message)

        self.net = Grid(node, {number: {} for number in SITES}, {})  # type: ignore[arg-type]
        self.net.down = {number for number, name in SITES.items() if name in self.rejected}
        return self.net

    def hear(self, **options: Any) -> list[Answer]:
        def question(node: int, attempt: int) -> Question:
            self.attempts.append((SITES[node], attempt))
            return self.seal.question(TASK, TASK.to_bytes(), site=SITES[node], run="r")

        self.attempts: list[tuple[str, int]] = []
        return list(
            ask(
                self.grid(),
                self.seal,
                list(SITES),
                question,
                "query.describe",
                **{"deadline_s": 1000.0} | options,
            )
        )

    def times(self, site: str) -> int:
        nonces = [asked.nonce for name, asked in self.asked if name == site]
        assert len(set(nonces)) == len(nonces), "a question was asked twice under one nonce"
        return len(nonces)


def introduction(site: str, asked: Statement) -> WireMessage:
    return SiteDescription(site=site, kind="public", nominal_patients=50, version="0")


def signed(site: str, asked: Statement, said: WireMessage, key: Ed25519PrivateKey | None = None) -> Envelope:
    payload = said.to_bytes()
    changes = {"site": site, "kind": type(said).__name__, "payload_sha256": payload_sha256(payload)}
    text = asked.model_copy(update=changes).text()
    return Envelope(payload=payload, statement=text, signature=sign(text, key or KEYS[site]))


def at_first(
    times: int, said: Callable[[str, Statement], Any], then: Callable[[str, Statement], Any] | None = None
) -> Reply:
    """`said` for so many requests, an honest introduction, or `then`, from then on."""
    left = [times]

    def reply(site: str, asked: Statement) -> Any:
        left[0] -= 1
        return said(site, asked) if left[0] >= 0 else (then or introduction)(site, asked)

    return reply


def gone(site: str, asked: Statement) -> Error:
    return Error(NODE_UNAVAILABLE, "Node unavailable")


def unsigned(code: str) -> Reply:
    return lambda site, asked: Envelope(payload=Refusal(code=code, reason="x").to_bytes())


def forged(site: str, asked: Statement) -> Envelope:
    return signed(site, asked, introduction(site, asked), KEYS["a"])


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    clock = Clock()
    monkeypatch.setattr(requests, "time", clock)
    return Room(clock)


def outcome(answers: list[Answer]) -> dict[str, str]:
    assert len({answer.node for answer in answers}) == len(answers), "a node was heard twice"
    return {SITES[answer.node]: answer.failure or answer.kind for answer in answers}


ALL = dict.fromkeys("abc", "SiteDescription")


def test_every_node_is_asked_once_and_heard_once(room: Room) -> None:
    assert outcome(room.hear()) == ALL
    assert [room.times(site) for site in "abc"] == [1, 1, 1]
    assert room.clock.now == 0


@pytest.mark.parametrize("away", [gone, *(unsigned(code) for code in AWAY if code != "unavailable")])
def test_a_node_that_went_away_and_came_back_is_asked_again(away: Reply, room: Room) -> None:
    room.replies["b"] = at_first(1, away)
    assert outcome(room.hear(patience_s=60.0)) == ALL
    assert room.times("b") == 2
    assert room.attempts == [("a", 0), ("b", 0), ("c", 0), ("b", 1)]
    assert room.clock.now < 60


def test_a_node_is_asked_again_only_once_it_is_back(room: Room) -> None:
    came_back = 40.0
    waits = room.clock.sleep

    def sleep(seconds: float) -> None:
        waits(seconds)
        if room.clock.now >= came_back:
            room.net.down.clear()

    room.clock.sleep = sleep  # type: ignore[method-assign]

    def leaves(site: str, asked: Statement) -> Error:
        room.net.down.add(2)
        return gone(site, asked)

    room.replies["b"] = at_first(1, leaves)
    assert outcome(room.hear(patience_s=60.0)) == ALL
    assert room.times("b") == 2
    assert came_back <= room.clock.now < 60


def test_an_agent_may_take_as_long_as_the_patience_to_come_back(room: Room) -> None:
    """Its node is there all the time, and says each time that the agent is not."""

    def back_after(seconds: float) -> Reply:
        lost = unsigned("agent-unreachable")
        return lambda site, asked: (
            introduction(site, asked) if room.clock.now >= seconds else lost(site, asked)
        )

    room.replies["b"] = back_after(110.0)
    assert outcome(room.hear(patience_s=120.0)) == ALL
    assert 110 <= room.clock.now < 120
    room.clock.now = 0.0
    room.replies["b"] = back_after(1000.0)
    assert outcome(room.hear(patience_s=120.0)) == ALL | {"b": "agent-unreachable"}
    assert 110 <= room.clock.now < 130


def test_a_node_that_stays_away_is_given_up_after_the_patience_not_the_deadline(room: Room) -> None:
    def leaves(site: str, asked: Statement) -> Error:
        room.net.down.add(2)
        return gone(site, asked)

    room.replies["b"] = leaves
    assert outcome(room.hear(patience_s=60.0, deadline_s=100_000.0)) == ALL | {"b": "unavailable"}
    assert room.times("b") == 1
    assert 60 <= room.clock.now < 90


def test_without_patience_a_node_that_went_away_is_given_up_at_once(room: Room) -> None:
    room.replies["b"] = gone
    assert outcome(room.hear()) == ALL | {"b": "unavailable"}
    assert room.times("b") == 1
    assert room.clock.now == 0


def test_a_node_that_is_there_and_never_answers_well_is_asked_a_bounded_number_of_times(room: Room) -> None:
    for away in (gone, unsigned("agent-busy")):
        room.replies["b"] = away
        room.asked.clear()
        outcome(room.hear(patience_s=1e5, deadline_s=5e5))
        assert room.times("b") == MAX_ATTEMPTS


def test_the_deadline_ends_the_waiting_and_who_is_away_by_then_is_named(room: Room) -> None:
    def leaves(site: str, asked: Statement) -> Error:
        room.net.down.add(2)
        return gone(site, asked)

    room.replies["b"] = leaves
    room.mute = {"c"}
    assert outcome(room.hear(patience_s=1e5, deadline_s=30.0)) == {"a": "SiteDescription", "b": "unavailable"}
    assert [room.times(site) for site in "abc"] == [1, 1, 0]
    assert 30 <= room.clock.now <= 30 + requests.POLL_S


def test_a_node_that_is_registered_no_longer_does_not_hold_up_the_others(room: Room) -> None:
    """Flower gives an empty id for a message that it does not take: a site revoked while the run goes on."""
    room.rejected = {"b"}
    assert outcome(room.hear(patience_s=10.0, deadline_s=1e5)) == ALL | {"b": "unavailable"}
    assert room.times("b") == 0
    assert room.clock.now < 30
    assert outcome(room.hear(deadline_s=1e5)) == ALL | {"b": "unavailable"}


def test_messages_that_are_too_large_for_the_superlink_are_a_failure_of_each(room: Room) -> None:
    """Flower then gives no ids at all."""
    room.too_large = True
    assert outcome(room.hear(deadline_s=100.0)) == dict.fromkeys("abc", "unavailable")
    assert not room.asked


def test_a_signature_that_does_not_hold_is_asked_about_once_more(room: Room) -> None:
    room.replies["b"] = at_first(1, forged)
    assert outcome(room.hear()) == ALL
    assert room.times("b") == 2
    room.asked.clear()
    room.replies["b"] = forged
    assert outcome(room.hear()) == ALL | {"b": "bad-signature"}
    assert room.times("b") == 2


@pytest.mark.parametrize("failure", ["unsigned-answer", "agent-deadline", "wrong-bundle", "site-failure"])
def test_other_failures_are_not_asked_about(failure: str, room: Room) -> None:
    room.replies["b"] = unsigned("invented" if failure == "unsigned-answer" else failure)
    assert outcome(room.hear(patience_s=60.0)) == ALL | {"b": failure}
    assert room.times("b") == 1


def test_a_refusal_is_an_answer_and_is_not_asked_about(room: Room) -> None:
    room.replies["b"] = lambda site, asked: Refusal(site=site, code="agent-busy", reason="x")
    assert outcome(room.hear(patience_s=60.0)) == ALL | {"b": "Refusal"}
    assert room.times("b") == 1


def lacks_base(answer: Answer) -> bool:
    return answer.kind == "Refusal" and Refusal.from_bytes(answer.payload).code == "base-not-held"


def test_a_site_that_lacks_the_model_to_build_on_is_asked_again_at_once_and_not_for_ever(room: Room) -> None:
    def refusal(site: str, asked: Statement) -> Refusal:
        return Refusal(site=site, code="base-not-held", reason="x")

    room.replies["b"] = at_first(1, refusal)
    assert outcome(room.hear(again=lacks_base)) == ALL
    assert [attempt for site, attempt in room.attempts if site == "b"] == [0, 1]
    assert room.clock.now == 0
    room.asked.clear()
    room.replies["b"] = refusal
    assert outcome(room.hear(again=lacks_base)) == ALL | {"b": "Refusal"}
    assert room.times("b") == 2


def test_an_answer_to_no_question_of_ours_is_not_heard(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = room.grid()
    stray = Message(content=Envelope(payload=b"x").to_record(), dst_node_id=1, message_type="query.describe")
    pull = type(grid).pull_messages
    monkeypatch.setattr(type(grid), "pull_messages", lambda self, ids: [*pull(self, ids), stray])
    monkeypatch.setattr(Room, "grid", lambda self: grid)
    assert outcome(room.hear()) == ALL


def test_without_keys_answers_are_taken_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan()
    task = DescribeTask()

    def node(message: Message, context: Any) -> Message:
        return Message(
            content=introduction(SITES[context.node_id], Statement.parse("")).to_record(), reply_to=message
        )

    monkeypatch.setattr(Statement, "parse", staticmethod(lambda text: None))
    grid = LocalGrid(node, {1: {}}, {})  # type: ignore[arg-type]
    seal = Seal.none(plan)
    (answer,) = ask(
        grid, seal, [1], lambda node, attempt: seal.question(task, b"x"), "query.describe", deadline_s=9.0
    )
    assert SiteDescription.from_bytes(answer.payload).site == "a"


# --- introductions and rehearsals
# -------------------------------------------------------------------------------------------------------


def test_sites_introduce_themselves_in_the_order_of_their_names(room: Room) -> None:
    sites = describe_sites(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert [(site.node, site.name) for site in sites] == [(1, "a"), (2, "b"), (3, "c")]


@pytest.mark.parametrize(("lost", "heard"), [(MAX_LOST - 1, "SiteDescription"), (MAX_LOST, "bad-message")])
def test_an_answer_that_was_lost_on_the_way_is_asked_for_again(
    room: Room, monkeypatch: pytest.MonkeyPatch, lost: int, heard: str
) -> None:
    """Flower's call raises where an answer came by halves, and does not say which of several it was."""
    grid, left = room.grid(), [lost]
    pull = type(grid).pull_messages

    def broken(self: Any, ids: Sequence[str]) -> list[Message]:
        if left[0] and any(SITES[self._waiting[one].metadata.dst_node_id] == "b" for one in ids):
            left[0] -= len(ids) == 1
            raise ValueError("an object is missing")
        return pull(self, ids)

    monkeypatch.setattr(type(grid), "pull_messages", broken)
    monkeypatch.setattr(Room, "grid", lambda self: grid)
    assert outcome(room.hear()) == ALL | {"b": heard}


def test_nobody_can_introduce_itself_as_another_site(room: Room) -> None:
    room.replies["a"] = lambda site, asked: introduction("b", asked)
    sites = describe_sites(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert [(site.node, site.name) for site in sites] == [(2, "b"), (3, "c")]
    room.replies["a"] = lambda site, asked: signed("b", asked, introduction("b", asked), KEYS["a"])
    assert [site.name for site in describe_sites(room.grid(), SEAL, expected=3, deadline_s=10.0)] == [
        "b",
        "c",
    ]


def test_one_site_on_two_nodes_is_refused(room: Room) -> None:
    room.replies["c"] = lambda site, asked: signed("a", asked, introduction("a", asked))
    with pytest.raises(RunError) as caught:
        describe_sites(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert caught.value.code == "duplicate-site"


def test_no_site_at_all_is_said(room: Room) -> None:
    for site in SITES.values():
        room.replies[site] = gone
    with pytest.raises(RunError) as caught:
        describe_sites(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert caught.value.code == "no-sites"


def readiness(site: str, asked: Statement) -> SiteReadiness:
    return SiteReadiness(
        site=site,
        kind="public",
        nominal_patients=50,
        version="0",
        arms={"federated": "accept"},
        reasons={},
        evaluation="accept",
        data_prepared=True,
    )


def test_a_rehearsal_hears_acceptance_refusal_and_failure(room: Room) -> None:
    room.replies = {
        "a": readiness,
        "b": lambda site, asked: Refusal(site=site, code="not-approved", reason="not yet"),
        "c": unsigned("agent-unreachable"),
    }
    found = rehearse(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert list(found) == ["a", "b", "node-3"]
    assert isinstance(found["a"], SiteReadiness)
    assert {name: said.code for name, said in found.items() if isinstance(said, Refusal)} == {
        "b": "not-approved",
        "node-3": "agent-unreachable",
    }


def test_a_rehearsal_awaits_an_agent_that_restarts_and_says_what_it_waits_for(room: Room) -> None:
    room.replies = {
        "a": readiness,
        "b": at_first(2, unsigned("agent-unreachable"), readiness),
        "c": readiness,
    }
    said: list[str] = []
    found = rehearse(room.grid(), SEAL, expected=3, deadline_s=90.0, say=said.append)
    assert list(found) == ["a", "b", "c"]
    assert all(isinstance(answer, SiteReadiness) for answer in found.values())
    assert 0 < room.clock.now < 90
    assert said[0] == "asked 3 sites"
    assert said[-1] == "answered: a, b, c; enrolled: 3"


def test_nobody_can_rehearse_for_another_site(room: Room) -> None:
    room.replies = {
        "a": lambda site, asked: readiness("b", asked),
        "b": lambda site, asked: Refusal(site="b", code="not-approved", reason="not yet"),
        "c": introduction,
    }
    found = rehearse(room.grid(), SEAL, expected=3, deadline_s=10.0)
    assert {name: said.code for name, said in found.items() if isinstance(said, Refusal)} == {
        "b": "not-approved",
        "node-1": "bad-signature",
        "node-3": "bad-message",
    }


def test_a_rehearsal_waits_for_nodes_to_connect_and_then_asks_those_that_did(room: Room) -> None:
    grid = room.grid()
    grid.down = {3}
    room.replies = dict.fromkeys("abc", readiness)
    assert list(rehearse(grid, SEAL, expected=3, deadline_s=20.0)) == ["a", "b"]
    assert room.clock.now >= 20


def test_a_rehearsal_without_waiting_still_hears_who_is_there(room: Room) -> None:
    """`fedqc run check --wait 0`: no waiting for nodes to connect; those that are connected get time to
    answer.
    """
    room.replies = dict.fromkeys("abc", readiness)
    assert list(rehearse(room.grid(), SEAL, expected=3, deadline_s=0.0)) == ["a", "b", "c"]
