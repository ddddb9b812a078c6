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
    DISCLOSED,
    DP,
    OUTGOING,
    PUBLIC,
    EvaluateTask,
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteUpdate,
    TrainTask,
    WireMessage,
    crossings,
    message_type,
)

LEAVES_A_HOSPITAL = {
    "SiteDescription": {
        "site": PUBLIC,
        "kind": PUBLIC,
        "members": PUBLIC,
        "nominal_patients": PUBLIC,
        "stand_in": PUBLIC,
        "version": PUBLIC,
    },
    "SiteUpdate": {
        "site": PUBLIC,
        "run": PUBLIC,
        "arm": PUBLIC,
        "round": PUBLIC,
        "base_sha256": PUBLIC,
        "weight": PUBLIC,
        "private": PUBLIC,
        "noise_multiplier": PUBLIC,
        "epsilon": PUBLIC,
        "delta": PUBLIC,
        "update": DP,
    },
    "SiteEvaluation": {
        "site": PUBLIC,
        "run": PUBLIC,
        "models": PUBLIC,
        "mode": PUBLIC,
        "histograms": DISCLOSED,
        "covariance": DISCLOSED,
    },
    "Refusal": {"site": PUBLIC, "run": PUBLIC, "code": PUBLIC, "reason": PUBLIC, "incident": PUBLIC},
}

MESSAGES: tuple[WireMessage, ...] = (
    TrainTask(run="r", arm="federated", round=3, private=False, base=np.linspace(-1, 1, 7, dtype=np.float32)),
    EvaluateTask(run="r", models=("public", "local/a"), everyone=True, weights=np.ones((2, 7), np.float32)),
    SiteDescription(site="hospital-a", kind="hospital", nominal_patients=50, version="0.1.0", stand_in="体模", members=("a", "b")),
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
    Refusal(site="hospital-a", run="r", code="too-few-patients", reason="the policy says so"),
)


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
    unclassified = [f"{message.__name__}.{name}" for message in OUTGOING for name, found in crossings(message).items() if found is None]
    assert not unclassified


def test_every_message_of_the_wall_is_a_task_or_in_the_list() -> None:
    assert set(WireMessage.__subclasses__()) == {TrainTask, EvaluateTask, *OUTGOING}


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
    for attempt in (lambda: expected.from_record(message.to_record()), lambda: expected.from_bytes(message.to_bytes())):
        with pytest.raises(RunError) as caught:
            attempt()
        assert caught.value.code == "bad-message"


def record(text: Any, arrays: dict[str, Array] | None = None) -> RecordDict:
    return RecordDict({"fields": ConfigRecord({"json": text}), "arrays": ArrayRecord(arrays or {})})


FIELDS: dict[str, Any] = {"type": "Refusal", "code": "c", "reason": "r"}
UPDATE = json.loads(str(MESSAGES[3].to_record().config_records["fields"]["json"]))

FOREIGN: dict[str, tuple[type[WireMessage], RecordDict]] = {
    "nothing": (Refusal, RecordDict()),
    "no arrays": (Refusal, RecordDict({"fields": ConfigRecord({"json": json.dumps(FIELDS)})})),
    "no fields": (Refusal, RecordDict({"arrays": ArrayRecord({})})),
    "not JSON": (Refusal, record("{")),
    "a field more": (Refusal, record(json.dumps(FIELDS | {"patients": 12}))),
    "a field less": (Refusal, record(json.dumps({"type": "Refusal", "code": "c"}))),
    "no type": (Refusal, record(json.dumps({"code": "c", "reason": "r"}))),
    "an array more": (Refusal, record(json.dumps(FIELDS), {"image": Array(np.zeros((64, 64)))})),
    "an array less": (SiteUpdate, record(json.dumps(UPDATE))),
    "a pickle": (SiteUpdate, record(json.dumps(UPDATE), {"update": Array("int32", (1,), "numpy.ndarray", b"\x80\x04K\x01.")})),
    "another serializer": (SiteUpdate, record(json.dumps(UPDATE), {"update": Array("int32", (1,), "pickle", b"\x80\x04K\x01.")})),
    "a wrong word": (SiteDescription, record(json.dumps({"type": "SiteDescription", "site": "../x", "kind": "hospital"}))),
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
    whole = bytearray(MESSAGES[3].to_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    whole[position] ^= data.draw(st.integers(1, 255))
    with suppress(RunError):
        SiteUpdate.from_bytes(bytes(whole))


def test_a_record_that_is_no_message_has_no_type() -> None:
    for foreign in (RecordDict(), record("{"), record("[]"), record("{}")):
        assert message_type(foreign) == ""
