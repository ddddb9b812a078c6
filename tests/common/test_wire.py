"""What leaves a hospital is this list, and nothing else does."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunError
from common.wire import (
    OUTGOING,
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
    crossings,
    message_type,
)
from tests.helpers.wire import LEAVES_A_HOSPITAL, record

MESSAGES: tuple[WireMessage, ...] = (
    TrainTask(run="r", arm="federated", round=3, private=False, base=np.linspace(-1, 1, 7, dtype=np.float32)),
    EvaluateTask(
        run="r",
        models=("public", "local/a"),
        everyone=True,
        final="public",
        weights=np.ones((2, 7), np.float32),
        edges=np.linspace(-1, 1, 2 * 5 * 7, dtype=np.float32).reshape(2, 5, 7),
    ),
    EvaluateTask(run="r", models=("public",), everyone=True, weights=np.ones((1, 7), np.float32)),
    EvaluateTask(
        run="r",
        models=("public",),
        everyone=True,
        weights=np.ones((1, 7), np.float32),
        any_edges=np.linspace(-1, 4, 39, dtype=np.float32)[None],
        subgroups=True,
    ),
    DescribeTask(run="r", rehearse=True),
    SiteDescription(
        site="hospital-a",
        kind="hospital",
        nominal_patients=50,
        version="0.1.0",
        stand_in="体模",
        unit="study",
        ethics="ab" * 32,
        members=("a", "b"),
    ),
    SiteUpdate(
        site="hospital-a",
        run="r",
        arm="federated_dp",
        round=3,
        base_sha256="0" * 64,
        weight=50,
        private=True,
        noise_multiplier=1.25,
        epsilon=8.0,
        delta=1e-5,
        update=np.array([-(2**30), 0, 7], np.int32),
    ),
    SiteEvaluation(
        site="hospital-a",
        run="r",
        models=("public",),
        mode="synthetic",
        histograms=np.arange(2 * 5 * 4).reshape(1, 2, 5, 4),
        covariance=np.full((5, 5), np.nan),
    ),
    SiteEvaluation(
        site="hospital-a",
        run="r",
        models=("public",),
        mode="disclosed",
        histograms=np.arange(2 * 5 * 4).reshape(1, 2, 5, 4),
        covariance=np.full((5, 5), np.nan),
        any_histograms=np.arange(8).reshape(1, 2, 4),
    ),
    SiteEvaluation(
        site="hospital-a",
        run="r",
        models=("public",),
        mode="dp",
        noise_multiplier=4.5,
        epsilon=0.8,
        delta=1e-5,
        noised=np.arange(-40, 40).reshape(1, 2, 5, 8),
    ),
    Refusal(site="hospital-a", run="r", code="too-few-patients", reason="the policy says so"),
    SiteReadiness(
        site="hospital-a",
        kind="hospital",
        nominal_patients=50,
        version="0.1.0",
        arms={"federated": "non-private-not-permitted", "federated_dp": "accept"},
        reasons={"federated": "the policy says so"},
        evaluation="accept",
        data_prepared=True,
        rounds_affordable=6,
        seconds_a_round=1.5,
    ),
)
UPDATE_MESSAGE = next(message for message in MESSAGES if isinstance(message, SiteUpdate))


def same(first: WireMessage, second: WireMessage) -> bool:
    return all(
        np.array_equal(value, other, equal_nan=value.dtype.kind == "f") and value.dtype == other.dtype
        if isinstance(value := getattr(first, name), np.ndarray)
        else value == other
        for name in type(first).model_fields
        if (other := getattr(second, name)) is not None or getattr(first, name) is None
    )


def test_what_leaves_a_hospital_is_exactly_this_list() -> None:
    """A new field is a privacy decision: whoever adds it says here which class it has."""
    assert {message.__name__: crossings(message) for message in OUTGOING} == LEAVES_A_HOSPITAL


def test_every_outgoing_field_has_a_class() -> None:
    unclassified = [
        f"{message.__name__}.{name}"
        for message in OUTGOING
        for name, found in crossings(message).items()
        if found is None
    ]
    assert not unclassified


def test_every_message_of_the_wall_is_a_task_or_in_the_list() -> None:
    assert set(WireMessage.__subclasses__()) == {DescribeTask, TrainTask, EvaluateTask, *OUTGOING}


def test_an_array_that_came_later_travels_only_where_it_says_something() -> None:
    """So that messages without it are, byte for byte, those of an earlier version, and those are read."""
    task, answer = (
        next(one for one in MESSAGES if type(one) is kind) for kind in (EvaluateTask, SiteEvaluation)
    )
    assert not [name for name in (b"any_edges", b"subgroups") if name in task.to_bytes()]
    assert not [name for name in (b"any_histograms", b"subgroups") if name in answer.to_bytes()]
    text, arrays = answer._parts()
    for lacks in ("histograms", "covariance"):
        with pytest.raises(RunError):
            SiteEvaluation._join(text, {name: one for name, one in arrays.items() if name != lacks})
    with pytest.raises(RunError):
        SiteEvaluation._join(text, arrays | {"scores": np.zeros(2)})


def test_an_unclassified_field_would_be_seen() -> None:
    class Forgetful(Refusal):
        patients: int = 0

    assert crossings(Forgetful)["patients"] is None


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_record_and_bytes_give_the_same_message_back(message: WireMessage) -> None:
    assert same(type(message).from_record(message.to_record()), message)
    assert same(type(message).from_bytes(message.to_bytes()), message)
    assert message_type(message.to_record()) == type(message).__name__


def test_a_round_trip_through_bytes_is_stable() -> None:
    for message in MESSAGES:
        assert type(message).from_bytes(message.to_bytes()).to_bytes() == message.to_bytes()


@pytest.mark.parametrize("expected", [type(message) for message in MESSAGES], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_another_message_is_refused(message: WireMessage, expected: type[WireMessage]) -> None:
    if isinstance(message, expected):
        return
    for attempt in (
        lambda: expected.from_record(message.to_record()),
        lambda: expected.from_bytes(message.to_bytes()),
    ):
        with pytest.raises(RunError) as caught:
            attempt()
        assert caught.value.code == "bad-message"


FIELDS: dict[str, Any] = {"type": "Refusal", "code": "c", "reason": "r"}
UPDATE = {"type": "SiteUpdate"} | UPDATE_MESSAGE.model_dump(mode="json", exclude={"update"})
HUGE = {
    "__metadata__": {"json": json.dumps(UPDATE)},
    "update": {"dtype": "I32", "shape": [2**52], "data_offsets": [0, 2**54]},
}


def sealed(seal: dict[str, Any], raw: Array) -> RecordDict:
    return RecordDict({"seal": ConfigRecord(seal), "payload": ArrayRecord({"payload": raw})})


FOREIGN: dict[str, tuple[type[WireMessage], RecordDict]] = {
    "nothing": (Refusal, RecordDict()),
    "no payload": (Refusal, RecordDict({"seal": ConfigRecord({"statement": "", "signature": b""})})),
    "no seal around a small payload": (Refusal, RecordDict({"seal": ConfigRecord({"payload": b"x"})})),
    "a small payload of another kind": (
        Refusal,
        RecordDict({"seal": ConfigRecord({"statement": "", "signature": b"", "payload": "x"})}),
    ),
    "no seal": (
        Refusal,
        RecordDict({"payload": ArrayRecord({"payload": Array("uint8", (1,), "bytes", b"x")})}),
    ),
    "a seal of numbers": (
        Refusal,
        sealed({"statement": 1, "signature": 2}, Array("uint8", (1,), "bytes", b"x")),
    ),
    "half a seal": (Refusal, sealed({"statement": ""}, Array("uint8", (1,), "bytes", b"x"))),
    "not JSON": (Refusal, record("{")),
    "a number": (Refusal, record(7)),
    "a list for an object": (Refusal, record("[]")),
    "deep nesting": (Refusal, record("[" * 100_000)),
    "a field more": (Refusal, record(json.dumps(FIELDS | {"patients": 12}))),
    "a field less": (Refusal, record(json.dumps({"type": "Refusal", "code": "c"}))),
    "no type": (Refusal, record(json.dumps({"code": "c", "reason": "r"}))),
    "an array more": (Refusal, record(json.dumps(FIELDS), {"image": np.zeros((64, 64))})),
    "an array less": (SiteUpdate, record(json.dumps(UPDATE))),
    "a pickle": (
        SiteUpdate,
        sealed({"statement": "", "signature": b""}, Array("uint8", (4,), "numpy.ndarray", b"\x80\x04K\x01.")),
    ),
    "an array that claims to be huge": (
        SiteUpdate,
        Envelope(
            payload=len(json.dumps(HUGE)).to_bytes(8, "little") + json.dumps(HUGE).encode() + bytes(4)
        ).to_record(),
    ),
    "a header that claims to be huge": (
        SiteUpdate,
        Envelope(payload=(2**62).to_bytes(8, "little") + b"{}").to_record(),
    ),
    "a wrong word": (
        SiteDescription,
        record(json.dumps({"type": "SiteDescription", "site": "../x", "kind": "hospital"})),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_malformed_record_is_refused(name: str) -> None:
    kind, foreign = FOREIGN[name]
    with pytest.raises(RunError) as caught:
        kind.from_record(foreign)
    assert caught.value.code == "bad-message"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with pytest.raises(RunError) as caught:
        SiteUpdate.from_bytes(data)
    assert caught.value.code == "bad-message"


@given(st.data())
def test_damaged_bytes_are_a_message_or_refused(data: st.DataObject) -> None:
    whole = bytearray(UPDATE_MESSAGE.to_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    with suppress(RunError):
        SiteUpdate.from_bytes(bytes(whole))


@pytest.mark.parametrize("name", FOREIGN)
def test_message_type_never_raises(name: str) -> None:
    message_type(FOREIGN[name][1])


def test_a_record_that_is_no_message_has_no_type() -> None:
    for foreign in (RecordDict(), record("{"), record("[]"), record("{}")):
        assert message_type(foreign) == ""


@given(st.text(max_size=50), st.binary(max_size=70), st.binary(max_size=200))
def test_an_envelope_is_the_same_after_record_and_bytes(
    statement: str, signature: bytes, content: bytes
) -> None:
    envelope = Envelope(
        payload=content, statement=statement.encode("utf-8", "ignore").decode(), signature=signature
    )
    assert Envelope.from_bytes(envelope.to_bytes()) == envelope
    assert Envelope.from_record(envelope.to_record()) == envelope


@given(st.binary(max_size=40))
def test_any_bytes_are_an_envelope_or_refused(data: bytes) -> None:
    with suppress(RunError):
        assert Envelope.from_bytes(data).to_bytes() == data
