"""Asking sites and hearing them, on Flower's Message API: deadlines, nodes that come back, answers that are really theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import FedqcError, RunError
from common.wire import DescribeTask, Envelope, Refusal, SiteDescription, SiteReadiness, type_of
from server.seal import Question, Seal

POLL_S = 0.25
MOST_QUESTIONS = 5
"""How often one site is asked one thing: the second time and later because it was away, or lacked the model to build on."""
RETRY_S = 5.0
ANSWER_S = 60.0
"""How long a connected site may take to introduce itself, or to rehearse."""


@dataclass(frozen=True, kw_only=True)
class Site:
    node: int
    description: SiteDescription

    @property
    def name(self) -> str:
        return self.description.site


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back from one node: a payload that is known to be the site's, or why there is none."""

    node: int
    seconds: float  # since the first question
    question: Question
    payload: bytes = b""
    failure: str = ""  # code

    @property
    def kind(self) -> str:
        return type_of(self.payload) if self.payload else ""


AWAY = ("unavailable", "agent-unreachable", "agent-busy", "agent-failed")
"""Failures that pass: a node or agent that is being restarted."""


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

    A node is known by the message it answers, not by what it claims: an error reply carries the SuperLink's id, and a hostile one any.

    Args:
        question: makes the question for (node, attempt from 0): asked again, it is signed anew.
        patience_s: how long a node that went away during the work may take to come back, to be asked again.
        again: whether an answer asks for another question at once, for instance with the whole model.
    """
    started = time.monotonic()
    attempts = dict.fromkeys(nodes, 0)
    waiting: dict[str, tuple[int, Question]] = {}
    away: dict[int, Answer] = {}
    due: dict[int, float] = {}
    doubted: set[int] = set()  # answered once what was not theirs to say: asked once more

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
                away[node] = Answer(node=node, seconds=time.monotonic() - started, question=put, failure="unavailable")
                due[node] = time.monotonic() + min(RETRY_S, patience_s)
            else:
                waiting[message_id] = node, put

    send(nodes)
    while (waiting or away) and time.monotonic() - started < deadline_s:
        pulled = list(grid.pull_messages(list(waiting))) if waiting else []
        for message in pulled:
            node, asked = waiting.pop(message.metadata.reply_to_message_id, (0, None))
            if asked is None:
                continue
            answer = _opened(message, seal, node, asked, time.monotonic() - started)
            more = attempts[node] < MOST_QUESTIONS
            if more and answer.failure in AWAY and patience_s > 0:
                away[node], due[node] = answer, time.monotonic() + min(RETRY_S, patience_s)
            elif more and answer.failure in ("bad-signature", "replayed-task") and node not in doubted:
                doubted.add(node)
                send([node])
            elif more and again(answer):
                send([node])
            else:
                yield answer
        for node in [node for node in away if time.monotonic() >= due[node]]:
            if attempts[node] < MOST_QUESTIONS and node in list(grid.get_node_ids()):
                del away[node]
                send([node])
            elif time.monotonic() - started - away[node].seconds > patience_s:
                yield away.pop(node)
            else:
                due[node] = time.monotonic() + min(RETRY_S, patience_s)
        if not pulled:
            time.sleep(min(POLL_S, deadline_s))
    yield from away.values()


def _opened(message: Message, seal: Seal, node: int, asked: Question, seconds: float) -> Answer:
    if message.has_error():
        return Answer(node=node, seconds=seconds, question=asked, failure="unavailable")
    try:
        payload = seal.open(Envelope.from_record(message.content), asked)
    except FedqcError as failure:
        return Answer(node=node, seconds=seconds, question=asked, failure=failure.code)
    return Answer(node=node, seconds=seconds, question=asked, payload=payload)


def describe_sites(grid: Grid, seal: Seal, *, expected: int, deadline_s: float) -> list[Site]:
    """Ask every connected node who it is, sorted by site name; wait for `expected` nodes to connect, until the deadline.

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


def rehearse(grid: Grid, seal: Seal, *, expected: int, deadline_s: float) -> dict[str, SiteReadiness | Refusal]:
    """Ask every connected node whether it would carry the plan, and how far. Nothing is trained; waits as `describe_sites`.

    Returns:
        site name -> its readiness or its refusal; a node that failed stands under "node-<id>" with the code.
    """
    found: dict[str, SiteReadiness | Refusal] = {}
    for answer in _introductions(grid, seal, DescribeTask(rehearse=True), expected=expected, deadline_s=deadline_s):
        try:
            said: SiteReadiness | Refusal
            said = SiteReadiness.from_bytes(answer.payload) if answer.kind == "SiteReadiness" else Refusal.from_bytes(answer.payload)
        except RunError as failure:
            code = answer.failure or failure.code
            found[f"node-{answer.node}"] = Refusal(code=code, reason="no valid answer")
        else:
            found[said.site] = said
    return dict(sorted(found.items()))


def _introductions(grid: Grid, seal: Seal, task: DescribeTask, *, expected: int, deadline_s: float) -> Iterator[Answer]:
    until = time.monotonic() + deadline_s
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < until:
        time.sleep(POLL_S)
    payload = task.to_bytes()
    return ask(grid, seal, nodes, lambda node, attempt: seal.question(task, payload), "query.describe", deadline_s=ANSWER_S)
