"""An answer counts for the site whose key signed it, to the very question it was asked, or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import FedqcError, RunError
from common.signing import Statement, payload_sha256, sign, verify
from common.wire import DescribeTask, Envelope, Refusal, SiteDescription, SiteUpdate, TrainTask, WireMessage
from server.messaging.signatures import NODE_CODES, Question, Seal
from tests.helpers.consortium import tiny_plan

PLAN = tiny_plan()
COORDINATOR, A_KEY, B_KEY, STRANGER = (
    Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(1, 5)
)
SEAL = Seal(
    plan_sha256=PLAN.sha256(), key=COORDINATOR, sites={"a": A_KEY.public_key(), "b": B_KEY.public_key()}
)
TASK = TrainTask(
    run="r", arm="federated", round=2, private=False, base_sha256="0" * 64, base=np.ones(3, np.float32)
)
UPDATE = SiteUpdate(
    site="a",
    run="r",
    arm="federated",
    round=2,
    base_sha256="0" * 64,
    weight=50,
    private=False,
    update=np.arange(3, dtype=np.int32),
)


def train_question(site: str = "a", seal: Seal = SEAL) -> Question:
    payload = TASK.to_bytes()
    return seal.question(TASK, payload, site=site, run="r", arm="federated", round=2, base_sha256="0" * 64)


def answer(
    asked: Question,
    said: WireMessage = UPDATE,
    *,
    key: Ed25519PrivateKey = A_KEY,
    site: str = "a",
    **changes: Any,
) -> Envelope:
    """What an honest agent makes of a question, save for `changes` to its statement."""
    payload = said.to_bytes()
    honest = {"site": site, "kind": type(said).__name__, "payload_sha256": payload_sha256(payload)}
    text = asked.statement.model_copy(update=honest | changes).text()
    return Envelope(payload=payload, statement=text, signature=sign(text, key))


def refused(envelope: Envelope, asked: Question, code: str = "bad-signature", seal: Seal = SEAL) -> None:
    with pytest.raises(RunError) as caught:
        seal.open(envelope, asked)
    assert caught.value.code == code


def test_the_sites_own_answer_to_this_question_is_opened() -> None:
    asked = train_question()
    assert SEAL.open(answer(asked), asked) == UPDATE.to_bytes()


def test_a_question_is_signed_for_one_site_under_a_fresh_nonce() -> None:
    first, second = train_question(), train_question()
    envelope = SEAL.envelope(first)
    verify(envelope.statement, envelope.signature, COORDINATOR.public_key())
    said = Statement.parse(envelope.statement)
    assert (said.site, said.kind, said.run, said.arm, said.round) == ("a", "TrainTask", "r", "federated", 2)
    assert (said.plan_sha256, said.payload_sha256) == (PLAN.sha256(), payload_sha256(envelope.payload))
    assert len({first.statement.nonce, second.statement.nonce, train_question("b").statement.nonce}) == 3


def test_one_site_cannot_answer_in_the_name_of_another() -> None:
    asked = train_question("b")
    for site in ("a", "b"):
        refused(answer(asked, key=A_KEY, site=site), asked)
        refused(answer(asked, UPDATE.model_copy(update={"site": "b"}), key=A_KEY, site=site), asked)


def test_a_payload_in_the_name_of_another_site_is_refused_though_its_signature_holds() -> None:
    """A site that introduces itself is asked by no name: else a could enrol b's size, or answer b's
    rehearsal.
    """
    task = DescribeTask()
    asked = SEAL.question(task, task.to_bytes())
    mine = SiteDescription(site="a", kind="public", nominal_patients=50, version="0")
    assert SEAL.open(answer(asked, mine), asked) == mine.to_bytes()
    refused(answer(asked, mine.model_copy(update={"site": "b"})), asked)
    refused(answer(asked, Refusal(site="b", code="no", reason="no")), asked)
    asked = train_question()
    refused(answer(asked, UPDATE.model_copy(update={"site": "b"})), asked)


def test_an_answer_to_another_sites_question_is_refused() -> None:
    asked, other = train_question("a"), train_question("b")
    refused(answer(other), asked)
    refused(answer(other, key=B_KEY, site="b"), asked)


def test_a_replayed_answer_is_refused() -> None:
    """Same site, same task, same bytes: only the nonce says that it was given to an earlier question."""
    earlier, asked = train_question(), train_question()
    held = answer(earlier)
    assert SEAL.open(held, earlier)
    refused(held, asked)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": "f" * 32},
        {"nonce": ""},
        {"run": "other"},
        {"arm": "local"},
        {"round": 1},
        {"plan_sha256": "1" * 64},
        {"base_sha256": "1" * 64},
        {"payload_sha256": "1" * 64},
        {"kind": "Refusal"},
        {"kind": "TrainTask"},
        {"site": "b"},
        {"site": ""},
    ],
    ids=str,
)
def test_an_answer_that_vouches_for_something_else_is_refused(changes: dict[str, Any]) -> None:
    asked = train_question()
    refused(answer(asked, **changes), asked)


def test_the_bytes_that_were_signed_are_the_bytes_that_count() -> None:
    asked = train_question()
    honest = answer(asked)
    swapped = UPDATE.model_copy(update={"update": np.arange(3, dtype=np.int32)[::-1]}).to_bytes()
    refused(Envelope(payload=swapped, statement=honest.statement, signature=honest.signature), asked)
    refused(
        Envelope(payload=honest.payload, statement=honest.statement + " ", signature=honest.signature), asked
    )
    refused(Envelope(payload=honest.payload, statement="", signature=honest.signature), asked)


@given(st.binary(max_size=80), st.text(max_size=40), st.binary(max_size=70))
def test_any_envelope_is_refused_in_fedqcs_own_words(
    payload: bytes, statement: str, signature: bytes
) -> None:
    asked = train_question()
    for text in (statement, asked.statement.text()):
        with pytest.raises(FedqcError):
            SEAL.open(Envelope(payload=payload, statement=text, signature=signature), asked)


def test_a_coordinators_own_signature_is_no_answer() -> None:
    asked = train_question()
    refused(SEAL.envelope(asked), asked)
    refused(answer(asked, key=COORDINATOR), asked)


@pytest.mark.parametrize("code", NODE_CODES)
def test_a_node_says_why_it_has_no_answer_and_nothing_else(code: str) -> None:
    """It has no key of the site: its code is a failure of this question, whatever it claims to be."""
    asked = train_question()
    refused(Envelope(payload=Refusal(site="a", code=code, reason="x").to_bytes()), asked, code)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        UPDATE.to_bytes(),
        Refusal(code="not-approved", reason="x").to_bytes(),
        Refusal(code="budget-exhausted", reason="x").to_bytes(),
        Refusal(code="outside-hours", reason="x").to_bytes(),
    ],
    ids=["nothing", "an-update", "approval", "budget", "hours"],
)
def test_what_only_the_site_can_decide_is_nothing_unsigned(payload: bytes) -> None:
    asked = train_question()
    refused(Envelope(payload=payload), asked, "unsigned-answer")


def test_an_agent_that_could_not_believe_the_question_says_so_under_its_key() -> None:
    """It repeats no nonce, because it believed none; so the code fails this question and decides nothing."""
    asked = train_question()
    nothing: dict[str, Any] = {
        "run": "",
        "arm": "",
        "round": 0,
        "plan_sha256": "",
        "base_sha256": "",
        "nonce": "",
    }
    said = Refusal(site="a", code="replayed-task", reason="x")
    refused(answer(asked, said, **nothing), asked, "replayed-task")
    refused(answer(asked, said, key=B_KEY, **nothing), asked)
    refused(answer(asked, UPDATE, **nothing), asked)


@pytest.mark.parametrize("said", [UPDATE, Refusal(site="c", code="no", reason="no")])
def test_a_revoked_or_unknown_site_is_told_apart_from_a_forger(said: WireMessage) -> None:
    """Revoked: its key is no longer among those of the seal."""
    revoked = Seal(plan_sha256=PLAN.sha256(), key=COORDINATOR, sites={"b": B_KEY.public_key()})
    asked = train_question("a", revoked)
    refused(answer(asked, said), asked, "unknown-site", revoked)
    task = DescribeTask()
    asked = revoked.question(task, task.to_bytes())
    refused(answer(asked, said), asked, "unknown-site", revoked)
    refused(answer(asked, said, key=STRANGER, site="c"), asked, "unknown-site", revoked)


def test_without_keys_nothing_is_signed_and_nothing_is_verified() -> None:
    seal = Seal.none(PLAN)
    asked = train_question(seal=seal)
    sent = seal.envelope(asked)
    assert (sent.statement, sent.signature) == ("", b"")
    assert seal.open(Envelope(payload=b"x", statement="not a statement"), asked) == b"x"
