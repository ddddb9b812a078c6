"""Send requests to sites and collect answers, on Flower's Message API: deadlines, retries, authentication."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FedqcError, RunError
from common.retries import keep_trying
from common.wire import PULLING, DescribeTask, Envelope, Refusal, SiteDescription, SiteReadiness, type_of
from server.messaging.signatures import Question, Seal

POLL_S = 0.25
MAX_ATTEMPTS = 20
"""How often a request is sent to one site at most. Retries, because the site was away, are spread over the
patience.
"""
MAX_LOST = 3
"""A site whose answers to one request were lost so often counts as failed."""
STALL_S = 120.0
"""An answer whose next part, at most 5 MiB, has not come for so long is lost: its node broke off."""
RETRY_S = 5.0
ANSWER_S = 60.0
"""How long a connected site may take to describe itself, or to rehearse."""


@dataclass(frozen=True, kw_only=True)
class Site:
    node: int
    description: SiteDescription

    @property
    def name(self) -> str:
        return self.description.site


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of one node: an authenticated payload, or the code of the failure."""

    node: int
    seconds: float  # since the first question
    question: Question
    payload: bytes = b""
    envelope: bytes = b""  # payload, statement and signature, as the site sent them
    failure: str = ""  # code

    @property
    def kind(self) -> str:
        return type_of(self.payload) if self.payload else ""


AWAY = ("unavailable", "agent-unreachable", "agent-busy", "agent-failed")
"""Failures that are retried: a node or agent that is being restarted."""


def ask(
    grid: Grid,
    seal: Seal,
    nodes: Sequence[int],
    question: Callable[[int, int], Question],
    kind: str,
    *,
    deadline_s: float,
    patience_s: float = 0.0,
    again: Callable[[Answer], bool] = lambda answer: False,
) -> Iterator[Answer]:
    """Ask every node and yield its answer as it comes, until the deadline.

    A node is known by the message it answers, not by what it claims: an error reply carries the SuperLink's
    id, and a hostile one any.

    Args:
        question: makes the question for (node, attempt from 0): asked again, it is signed anew.
        patience_s: how long, since it first went away during the work, a node may take to come back, to be
            asked again.
        again: whether an answer asks for another question at once, for instance with the whole model.
    """
    started = time.monotonic()
    pause_s = max(min(RETRY_S, patience_s), patience_s / MAX_ATTEMPTS)
    attempts = dict.fromkeys(nodes, 0)
    waiting: dict[str, tuple[int, Question]] = {}
    away: dict[int, Answer] = {}
    due: dict[int, float] = {}
    left: dict[int, float] = {}  # when each node first went away
    doubted: set[int] = set()  # answered once what was not theirs to say: asked once more
    losses = Counter[int]()  # answers that nobody can read, or that came by halves

    def wait_for(node: int, answer: Answer) -> None:
        now = time.monotonic()
        away[node], due[node] = answer, now + (pause_s if seal.counts(answer.question.statement.site) else 0)
        left.setdefault(node, now)

    def is_awaited(answer: Answer) -> bool:
        node, now = answer.node, time.monotonic()
        is_enrolled = seal.counts(answer.question.statement.site)
        return is_enrolled and attempts[node] < MAX_ATTEMPTS and now - left.get(node, now) < patience_s

    def send(chosen: Sequence[int]) -> None:
        asked = [question(node, attempts[node]) for node in chosen]
        messages = [
            Message(content=seal.envelope(put).to_record(), dst_node_id=node, message_type=kind)
            for node, put in zip(chosen, asked, strict=True)
        ]
        ids: list[str | None] = list(grid.push_messages(messages)) or [None] * len(chosen)
        for node, put, message_id in zip(chosen, asked, ids, strict=True):
            attempts[node] += 1
            if not message_id:  # Flower would not take it: the node has just gone, or is registered no longer
                wait_for(
                    node,
                    Answer(
                        node=node, seconds=time.monotonic() - started, question=put, failure="unavailable"
                    ),
                )
            else:
                waiting[message_id] = node, put

    post = _Post(grid, patient_s=deadline_s / 4 if seal.key else None)
    send(nodes)
    while (waiting or away) and time.monotonic() - started < deadline_s:
        pulled, lost = post.pull(list(waiting), until=started + deadline_s)
        for message_id in lost if len(lost) > 1 else ():  # one of them is no answer, and nobody knows which
            send([waiting.pop(message_id)[0]])
        for message_id in lost if len(lost) == 1 else ():
            node, put = waiting.pop(message_id)
            losses[node] += 1
            if losses[node] >= MAX_LOST:
                yield Answer(
                    node=node, seconds=time.monotonic() - started, question=put, failure="bad-message"
                )
            else:  # a node whose connection broke while it handed in does not know
                send([node])
        for message in pulled:
            node, asked = waiting.pop(message.metadata.reply_to_message_id, (0, None))
            if asked is None:
                continue
            answer = _opened(message, seal, node, asked, time.monotonic() - started)
            if answer.failure in AWAY and is_awaited(answer):
                wait_for(node, answer)
            elif answer.failure in ("bad-signature", "replayed-task") and node not in doubted:
                doubted.add(node)
                send([node])
            elif attempts[node] == 1 and again(answer):
                send([node])
            else:
                yield answer
        for node in [node for node in away if time.monotonic() >= due[node]]:
            if not is_awaited(away[node]):
                yield away.pop(node)
            elif node in list(grid.get_node_ids()):
                del away[node]
                send([node])
            else:
                due[node] = time.monotonic() + pause_s
        if not pulled:
            time.sleep(min(POLL_S, deadline_s))
    yield from away.values()


class _Post:
    """Fetches answers as Flower does, and outlives what a hostile node hands in.

    Flower fetches all answers there are in one call. One that is no message ends the call with an exception,
    and one whose content never comes holds it up for minutes; either way the others in that call are lost.
    From then on each question has a call of its own.
    """

    def __init__(self, grid: Grid, *, patient_s: float | None) -> None:
        """`patient_s` is how long a call may take; None: it may take for ever, and is made in this thread (a
        simulation).
        """
        self._grid, self._patient_s = grid, patient_s
        if patient_s is not None:
            from flwr.superlink.grid import http_grid

            vars(http_grid)["pull_objects"] = self._parts
            if retries := getattr(grid, "_retry_invoker", None):
                keep_trying(retries)
        self._alone = False
        self._here = threading.local()  # .ids: of the questions whose answers this thread fetches
        self._came: dict[tuple[str, ...], float] = {}  # when the last part of an answer to them came
        self._calls: dict[
            tuple[str, ...], tuple[float, queue.SimpleQueue[list[Message] | BaseException]]
        ] = {}

    def _parts(
        self, object_ids: list[str], pull_object_fn: Callable[[str], bytes], **others: Any
    ) -> dict[str, bytes]:
        """Flower's `pull_objects`; notes when a part comes."""
        from flwr.supercore.inflatable.inflatable_utils import pull_objects

        ids = getattr(self._here, "ids", ())

        def noted(name: str) -> bytes:
            part = pull_object_fn(name)
            self._came[ids] = time.monotonic()
            return part

        return pull_objects(object_ids, noted, **others, **PULLING)

    def pull(self, ids: list[str], *, until: float) -> tuple[list[Message], list[str]]:
        """The answers that have come, and the questions whose answers are lost: several of which one is to
        blame, or that one.

        Args:
            until: on the monotonic clock.
        """
        if self._patient_s is None or not ids:
            return (list(self._grid.pull_messages(ids)) if ids else []), []
        if not self._alone and len(ids) > 1:
            found = self._fetched(tuple(ids), until)
            self._alone = found is None
            return (found or []), (ids if found is None else [])
        came: list[Message] = []
        for message_id in ids:
            found = self._fetched((message_id,), time.monotonic() + POLL_S)
            if found is None:
                return came, [message_id]
            came += found
        return came, []

    def _fetched(self, ids: tuple[str, ...], until: float) -> list[Message] | None:
        """What came; None where it cannot be read, or has not come in time. A call that is under way is
        waited for, until then or later.
        """
        assert self._patient_s is not None
        if ids not in self._calls:
            self._calls[ids] = time.monotonic(), queue.SimpleQueue()
            threading.Thread(target=self._call, args=(ids,), name="post", daemon=True).start()
        box = self._calls[ids][1]
        found: list[Message] | BaseException
        while True:
            try:
                found = box.get(timeout=max(0.0, min(self._ends(ids), until) - time.monotonic()))
            except queue.Empty:
                if (now := time.monotonic()) >= self._ends(ids):
                    found = TimeoutError()
                elif now < until:  # a part came meanwhile
                    continue
                else:
                    return []
            break
        self._came.pop(ids, None)
        del self._calls[ids]
        if isinstance(found, list):
            return found
        # the SuperLink is gone; Ctrl-C
        if isinstance(found, httpx.HTTPError) or not isinstance(found, Exception):
            raise found
        return None

    def _ends(self, ids: tuple[str, ...]) -> float:
        """When the call for these answers has taken too long."""
        assert self._patient_s is not None
        began = self._calls[ids][0]
        return min(began + self._patient_s, self._came.get(ids, began) + STALL_S)

    def _call(self, ids: tuple[str, ...]) -> None:
        box = self._calls[ids][1]
        self._here.ids, self._came[ids] = ids, time.monotonic()
        try:
            box.put(list(self._grid.pull_messages(list(ids))))
        except BaseException as error:
            box.put(error)


def _opened(message: Message, seal: Seal, node: int, asked: Question, seconds: float) -> Answer:
    if message.has_error():
        return Answer(node=node, seconds=seconds, question=asked, failure="unavailable")
    try:
        envelope = Envelope.from_record(message.content)
        payload = seal.open(envelope, asked)
    except FedqcError as failure:
        return Answer(node=node, seconds=seconds, question=asked, failure=failure.code)
    return Answer(node=node, seconds=seconds, question=asked, payload=payload, envelope=envelope.to_bytes())


def describe_sites(grid: Grid, seal: Seal, *, expected: int, deadline_s: float) -> list[Site]:
    """Ask every connected node who it is, sorted by site name; wait for `expected` nodes to connect, until
    the deadline.

    Raises:
        RunError: nobody answered, or two nodes claim one name.
    """
    sites = []
    for answer in _introductions(grid, seal, DescribeTask(), expected=expected, deadline_s=deadline_s):
        with suppress(RunError):
            sites.append(Site(node=answer.node, description=SiteDescription.from_bytes(answer.payload)))
    names = [site.name for site in sites]
    if not sites:
        raise RunError("no site answered", code="no-sites", hint="are the nodes started and connected?")
    if len(set(names)) < len(names):
        raise RunError("two nodes claim the same site name", code="duplicate-site")
    return sorted(sites, key=lambda site: site.name)


def rehearse(
    grid: Grid,
    seal: Seal,
    *,
    expected: int,
    deadline_s: float,
    run: str = "",
    lineage: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, SiteReadiness | Refusal]:
    """Ask every connected node whether it would carry the plan, and how far. Nothing is trained; waits as
    `describe_sites`.

    Args:
        run: the run that is to go on, by which a hospital knows what it approved; "" for a new one.
        lineage: of the starting weights; "" where it is unknown.
        say: called with one line when the sites are asked, and when one answers.
    Returns:
        site name -> its readiness or its refusal; a node that failed stands under "node-<id>" with the code.
    """
    found: dict[str, SiteReadiness | Refusal] = {}
    for answer in _introductions(
        grid,
        seal,
        DescribeTask(run=run, rehearse=True, lineage=lineage),
        expected=expected,
        deadline_s=deadline_s,
        say=say,
    ):
        try:
            said: SiteReadiness | Refusal
            said = (
                SiteReadiness.from_bytes(answer.payload)
                if answer.kind == "SiteReadiness"
                else Refusal.from_bytes(answer.payload)
            )
        except RunError as failure:
            code = answer.failure or failure.code
            found[f"node-{answer.node}"] = Refusal(code=code, reason="no valid answer")
        else:
            found[said.site] = said
        say(f"answered: {', '.join(sorted(found))}; enrolled: {expected}")
    return dict(sorted(found.items()))


def _introductions(
    grid: Grid,
    seal: Seal,
    task: DescribeTask,
    *,
    expected: int,
    deadline_s: float,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Answer]:
    """Ask who is connected. Who is away, because its agent restarts, is awaited until the deadline, too."""
    until = time.monotonic() + deadline_s
    connected = -1
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < until:
        if len(nodes) != connected:
            connected = len(nodes)
            say(f"{connected} of {expected} sites are connected; waiting for the others")
        time.sleep(POLL_S)
    payload = task.to_bytes()
    say(f"asked {len(nodes)} sites")
    left_s = max(0.0, until - time.monotonic())
    return ask(
        grid,
        seal,
        nodes,
        lambda node, attempt: seal.question(task, payload, node=node),
        "query.describe",
        deadline_s=max(ANSWER_S, left_s),
        patience_s=left_s,
    )
