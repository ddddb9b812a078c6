"""Questions that a coordinator signed for one site, and the answers, whose seals are checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.agent.verification import Guard
from common.pricing import with_noise
from common.signing import Statement, load_key, payload_sha256, sign, verify
from common.weights import digest
from common.wire import (
    DescribeTask,
    Envelope,
    EvaluateTask,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    TrainTask,
    WireMessage,
    type_of,
)
from tests.helpers.consortium import TRAINING, tiny_plan
from tests.helpers.site_agent import BASE, COORDINATOR

A, B, _ = TRAINING


PLAN = with_noise(
    tiny_plan(name="guarded", arms=["federated", "federated_dp"], federation={"codec": "plain"})
)


JSON = PLAN.canonical_json()


METHODS = {"DescribeTask": "Describe", "TrainTask": "Train", "EvaluateTask": "Evaluate"}


TRAIN = TrainTask(run="r", arm="federated", round=1, private=False, base_sha256=digest(BASE), base=BASE)


PRIVATE = TRAIN.model_copy(update={"arm": "federated_dp", "private": True})


EVALUATE = EvaluateTask(
    run="r", models=("public", "federated"), everyone=False, final="federated", weights=np.stack([BASE, BASE])
)


REHEARSE = DescribeTask(run="r", rehearse=True)


drawn = iter(range(10**9))


def statement(task: WireMessage, **changes: Any) -> Statement:
    values = {
        "site": A,
        "kind": type(task).__name__,
        "run": getattr(task, "run", ""),
        "arm": getattr(task, "arm", ""),
        "round": getattr(task, "round", 0),
        "plan_sha256": PLAN.sha256(),
        "base_sha256": getattr(task, "base_sha256", ""),
        "payload_sha256": payload_sha256(task.to_bytes()),
        "nonce": f"{next(drawn):032x}",
    }
    return Statement(**values).model_copy(update=changes)  # a dishonest coordinator keeps to no pattern


def question(
    task: WireMessage, *, key: Ed25519PrivateKey = COORDINATOR, payload: bytes | None = None, **changes: Any
) -> bytes:
    """A task as the coordinator would sign it, save for `changes` to the statement and a `payload` in its
    place.
    """
    text = statement(task, **changes).text()
    return Envelope(payload=payload or task.to_bytes(), statement=text, signature=sign(text, key)).to_bytes()


def ask(
    folder: Path, task: WireMessage, plan: str = JSON, *, guard: Guard | None = None, **changes: Any
) -> WireMessage:
    """The answer to an honest question, whose seal is checked."""
    sent = question(task, **changes)
    asked = Statement.parse(Envelope.from_bytes(sent).statement)
    opened = sealed(folder, (guard or Guard(str(folder))).answer(METHODS[type(task).__name__], plan, sent))
    said = Statement.parse(opened.statement)
    assert (said.nonce, said.run, said.arm, said.round) == (asked.nonce, asked.run, asked.arm, asked.round)
    assert (said.plan_sha256, said.base_sha256) == (asked.plan_sha256, asked.base_sha256)
    return decoded(opened.payload)


def sealed(site: Path, answer: bytes) -> Envelope:
    """An answer's envelope, found to be signed by the site over its final bytes."""
    opened = Envelope.from_bytes(answer)
    verify(opened.statement, opened.signature, load_key(site / "state" / "signing.key").public_key())
    said = Statement.parse(opened.statement)
    assert (said.site, said.kind) == (A, type_of(opened.payload))
    assert said.payload_sha256 == hashlib.sha256(opened.payload).hexdigest()
    return opened


def decoded(payload: bytes) -> WireMessage:
    kinds = {
        kind.__name__: kind for kind in (SiteDescription, SiteReadiness, SiteUpdate, SiteEvaluation, Refusal)
    }
    return kinds[type_of(payload)].from_bytes(payload)


def code_of(answer: WireMessage) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.code
