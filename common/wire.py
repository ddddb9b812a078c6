"""The messages between coordinator and hospital: each field with its class, and their bytes.

PUBLIC     a function of plan, policy and ledger only.
DP         computed from patients, clipped, noised, charged to the ledger. In a run without privacy the same
           field is outside any guarantee; such a run needs `allow_non_private`, and all it makes is marked
           *not private*.
DISCLOSED  computed from patients without noise; leaves only if the operator's policy says so.

Adding a field is a privacy decision: tests/common/test_wire.py spells the list out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar, Self, get_args, get_type_hints

import numpy as np
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError

from common.errors import RunError
from common.names import (
    MAX_PATIENTS,
    MAX_RUN,
    MAX_WORDS,
    ONE_LINE,
    SITE_NAME,
    EvaluationMode,
    SiteKind,
    Unit,
)


class Crossing(Enum):
    PUBLIC = "public"
    DP = "dp"
    DISCLOSED = "disclosed"


PUBLIC, DP, DISCLOSED = Crossing.PUBLIC, Crossing.DP, Crossing.DISCLOSED


Words = Annotated[str, Field(max_length=MAX_WORDS, pattern=ONE_LINE)]
RunName = Annotated[str, Field(max_length=MAX_RUN, pattern=ONE_LINE)]
Name = Annotated[str, Field(max_length=100, pattern=ONE_LINE)]
"""Of an arm, a model (an arm, or one of a site), a digest."""
Lineage = Annotated[str, Field(max_length=16_000, pattern=ONE_LINE)]
"""`common.lineage.Lineage` as one line of JSON."""
LEDGER_HEAD = r"^([1-9][0-9]{0,8}:[0-9a-f]{64})?$"
LedgerHead = Annotated[str, Field(pattern=LEDGER_HEAD)]
"""Length and last HMAC of a site's ledger; "" where there is none."""


class WireMessage(BaseModel):
    """Scalars travel as one JSON string, arrays as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    LATER_FLAGS: ClassVar[tuple[str, ...]] = ()
    """Fields that came later and are sent only where they say something: other messages stay as they
    were.
    """

    @classmethod
    def array_fields(cls) -> tuple[str, ...]:
        return tuple(
            name
            for name, hint in get_type_hints(cls).items()
            if hint is np.ndarray and name in cls.model_fields
        )

    def _parts(self) -> tuple[str, dict[str, np.ndarray]]:
        every = {name: np.ascontiguousarray(getattr(self, name)) for name in self.array_fields()}
        arrays = {name: one for name, one in every.items() if one.size or name not in self.LATER_FLAGS}
        absent = {name for name in self.LATER_FLAGS if name not in every and not getattr(self, name)}
        scalars = self.model_dump(mode="json", exclude=set(every) | absent)
        return json.dumps({"type": type(self).__name__, **scalars}, sort_keys=True), arrays

    @classmethod
    def _join(cls, text: str, arrays: dict[str, np.ndarray]) -> Self:
        try:
            values: Any = json.loads(text)
            if (
                not isinstance(values, dict)
                or values.pop("type", None) != cls.__name__
                or not set(arrays) <= set(cls.array_fields()) <= {*arrays, *cls.LATER_FLAGS}
            ):
                raise RunError(f"expected a {cls.__name__}", code="bad-message")
            return cls.model_validate(values | arrays)
        except (ValidationError, ValueError, RecursionError) as error:
            raise RunError(
                f"malformed {cls.__name__}: {str(error).splitlines()[0]}", code="bad-message"
            ) from None

    def to_record(self) -> RecordDict:
        """In an unsigned envelope: for a simulation, which has no keys."""
        return Envelope(payload=self.to_bytes()).to_record()

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        """Raises RunError (code bad-message) unless the record holds exactly this message. Whose it is, the
        caller has checked.
        """
        return cls.from_bytes(Envelope.from_record(record).payload)

    def to_bytes(self) -> bytes:
        """The message as one byte string: what travels, is signed, and lies in a site's outbox."""
        text, arrays = self._parts()
        return safetensors.numpy.save(arrays | {"_": np.zeros(0, np.uint8)}, metadata={"json": text})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        try:
            text = _header(data)
            arrays = safetensors.numpy.load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, MemoryError, OverflowError):
            raise RunError(f"expected the bytes of a {cls.__name__}", code="bad-message") from None
        arrays.pop("_", None)
        return cls._join(text, arrays)


SMALL_BYTES = 64 << 10
"""A payload up to here lies beside its seal: a message is then three of Flower's objects, each a request at
every hop, and not six.
"""

PULLING: dict[str, Any] = {"initial_backoff": 0.05, "backoff_cap": 1.0, "max_tries_per_object": None}
"""How Flower is made to look again for an object that is still on its way. Its own way, after 1, 2, 4, 8 and
then every 10 s, 500 times, costs a round more time than anything else in it."""


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A message's bytes, and who vouches for them: a `common.signing.Statement` as text and its signature, or
    neither.
    """

    payload: bytes
    statement: str = ""
    signature: bytes = b""

    def to_record(self) -> RecordDict:
        seal: dict[str, Any] = {"statement": self.statement, "signature": self.signature}
        if len(self.payload) <= SMALL_BYTES:
            return RecordDict({"seal": ConfigRecord(seal | {"payload": self.payload})})
        raw = Array(dtype="uint8", shape=(len(self.payload),), stype="bytes", data=self.payload)
        return RecordDict({"seal": ConfigRecord(seal), "payload": ArrayRecord({"payload": raw})})

    @staticmethod
    def from_record(record: RecordDict) -> Envelope:
        """Raises RunError (code bad-message) for a record of another form. The bytes stay bytes: nothing is
        decoded here.
        """
        try:
            seal = record.config_records["seal"]
            statement, signature = seal["statement"], seal["signature"]
            payload = (
                seal["payload"] if "payload" in seal else record.array_records["payload"]["payload"].data
            )
        except (KeyError, TypeError, AttributeError):
            raise RunError("expected an envelope", code="bad-message") from None
        if (
            not isinstance(statement, str)
            or not isinstance(signature, bytes)
            or not isinstance(payload, bytes)
        ):
            raise RunError("expected an envelope", code="bad-message")
        return Envelope(payload=payload, statement=statement, signature=signature)

    def to_bytes(self) -> bytes:
        """For the socket between a hospital's two processes."""
        text = self.statement.encode()
        return b"".join(
            (
                len(text).to_bytes(4, "little"),
                text,
                len(self.signature).to_bytes(4, "little"),
                self.signature,
                self.payload,
            )
        )

    @staticmethod
    def from_bytes(data: bytes) -> Envelope:
        """Raises RunError (code bad-message)."""
        text_end = 4 + int.from_bytes(data[:4], "little")
        signature_end = text_end + 4 + int.from_bytes(data[text_end : text_end + 4], "little")
        if len(data) < signature_end or signature_end < 8:
            raise RunError("expected the bytes of an envelope", code="bad-message")
        try:
            statement = data[4:text_end].decode()
        except UnicodeDecodeError:
            raise RunError("expected the bytes of an envelope", code="bad-message") from None
        return Envelope(
            payload=data[signature_end:], statement=statement, signature=data[text_end + 4 : signature_end]
        )


def _header(data: bytes) -> str:
    """The JSON text in the header of a message's bytes (the metadata of a safetensors file)."""
    length = int.from_bytes(data[:8], "little")
    text = json.loads(data[8 : 8 + length])["__metadata__"]["json"]
    if not isinstance(text, str):
        raise ValueError("not a text")
    return text


def type_of(payload: bytes) -> str:
    """The name of the message in these bytes, or "" where there is none."""
    return _claimed(payload, "type")


def site_of(payload: bytes) -> str:
    """The site that the message in these bytes says it comes from, or "" where it says nothing."""
    return _claimed(payload, "site")


def ledger_head_of(payload: bytes) -> str:
    """The head of its ledger that a site reports in these bytes, or "" where there is none."""
    found = _claimed(payload, "ledger_head")
    return found if re.fullmatch(LEDGER_HEAD, found) else ""


def _claimed(payload: bytes, name: str) -> str:
    try:
        return str(json.loads(_header(payload))[name])
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""


def message_type(record: RecordDict) -> str:
    """The name of the message in a record, or "" where there is none."""
    try:
        return type_of(Envelope.from_record(record).payload)
    except RunError:
        return ""


def crossings(message: type[WireMessage]) -> dict[str, Crossing | None]:
    """Field name to class; None marks a field that was never classified, which a test refuses."""
    found: dict[str, Crossing | None] = {}
    for name, hint in get_type_hints(message, include_extras=True).items():
        if name in message.model_fields:
            found[name] = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Crossing)), None)
    return found


class DescribeTask(WireMessage):
    """Coordinator to hospital: who are you? With `rehearse`: would you carry this plan, and how far?"""

    LATER_FLAGS = ("lineage",)

    run: RunName = ""
    rehearse: bool = False
    lineage: Lineage = ""  # `common.lineage.Lineage` of the starting weights, of a plan with a private arm


class TrainTask(WireMessage):
    """Coordinator to hospital: train from these weights. Holds nothing of any patient.

    `base` is float32 (parameters,) in a plan with the plain codec. Else it is a frame, uint8 (bytes,), of
    `common.weights`: of the whole model, or, where `held_sha256` names a model that the site has seen, of the
        whole steps from there in the part that is trained.
    """

    LATER_FLAGS = ("lineage",)

    run: RunName
    arm: Name
    round: int = Field(ge=1)
    private: bool
    base_sha256: Name = ""  # of the decoded weights; empty in a plain frame that nobody signed
    held_sha256: Name = ""
    lineage: Lineage = ""  # `common.lineage.Lineage` of the starting weights, in a private arm
    base: np.ndarray


def _none(dtype: type, *shape: int) -> Any:
    """An array field that is empty where the message has no such part."""
    return Field(default_factory=lambda: np.zeros((0, *shape), dtype))


class EvaluateTask(WireMessage):
    """Coordinator to site: score these models on your test patients. Holds nothing of any patient.

    Baselines (`common.arms`), which a simulation alone asks for, come last and have no weights.
    """

    LATER_FLAGS = ("any_edges", "subgroups")

    run: RunName
    models: tuple[Name, ...]
    # on all patients instead: for a public or synthetic site that never trains; a hospital refuses it
    everyone: bool
    final: Name = ""  # which of them the run hands on; a hospital keeps it for its own use
    weights: np.ndarray  # float32 (models with weights, parameters)
    # float32 (models, artifacts, common.counts.EDGES): quantiles of each model's scores of the coordinator's
    # public images, between which patients are counted; a site that answers with noise needs them
    edges: np.ndarray = _none(np.float32, 0, 0)
    # float32 (models, common.counts.EDGES): the same of `common.any_artifact.any_score`; asks sites that are
    # scored exactly for one more row, and sites that answer with noise for nothing
    any_edges: np.ndarray = _none(np.float32, 0)
    # asks public and synthetic sites for the same counts by subgroup, and hospitals for nothing
    subgroups: bool = False


class SiteDescription(WireMessage):
    """Who answers: all of it is a function of what the operator wrote into site.yaml and cohort.yaml, and of
    the approval of the plan; and the head of its ledger.
    """

    LATER_FLAGS = ("ledger_head", "nominal_tested")

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    kind: Annotated[SiteKind, PUBLIC]
    members: Annotated[tuple[Name, ...], PUBLIC] = ()  # the sites behind the pooled baseline of a simulation
    nominal_patients: Annotated[int, PUBLIC] = Field(ge=1, le=MAX_PATIENTS)
    stand_in: Annotated[Words, PUBLIC] = ""  # what a "patient" is here, when it is not a person
    # PUBLIC: the operator's choice in site.yaml; an epsilon without its unit says nothing
    unit: Annotated[Unit, PUBLIC] = "patient"
    # PUBLIC: a hospital's keyed hash of its ethics reference, its consent basis and who approved the plan
    # when. It commits the hospital to a record that only the hospital can read or guess; of no patient
    ethics: Annotated[str, PUBLIC] = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    version: Annotated[Words, PUBLIC]
    # PUBLIC: the coordinator keeps it as a witness against ledgers that are set back. Its length counts what
    # the site was ever asked, by whomever; no row is written because of a patient
    ledger_head: Annotated[LedgerHead, PUBLIC] = ""
    # PUBLIC: the bucket times the shares of the split, both the operator's. Whether scores with noise can
    # tell anything follows from it, and is to be known before patients are charged
    nominal_tested: Annotated[int, PUBLIC] = Field(default=0, ge=0, le=MAX_PATIENTS)


class SiteReadiness(WireMessage):
    """A rehearsal's answer: a function of plan, policy, ledger, ethics fields of cohort.yaml, installed
    software and machine; no patient is looked at.
    """

    LATER_FLAGS = ("nominal_tested", "scoring")

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    kind: Annotated[SiteKind, PUBLIC]
    nominal_patients: Annotated[int, PUBLIC] = Field(ge=1, le=MAX_PATIENTS)
    version: Annotated[str, PUBLIC] = Field(max_length=32, pattern=ONE_LINE)
    arms: Annotated[dict[Name, Words], PUBLIC]  # arm -> "accept", or the code of the refusal
    reasons: Annotated[dict[Name, Words], PUBLIC]  # arm, or "evaluation" -> why it is refused
    evaluation: Annotated[Words, PUBLIC]  # "accept", or the code of the refusal
    # PUBLIC: of policy and plan, and said by every answer later: who pays with privacy is to be known before
    scoring: Annotated[EvaluationMode | None, PUBLIC] = None
    nominal_tested: Annotated[int, PUBLIC] = Field(default=0, ge=0, le=MAX_PATIENTS)  # see SiteDescription
    data_prepared: Annotated[bool, PUBLIC]  # whether the operator has had the images prepared for this plan
    # of the private arm, within what is left of the budget; None: no such arm
    rounds_affordable: Annotated[int | None, PUBLIC] = Field(default=None, ge=0, le=10**6)
    # on random numbers, for the nominal number of patients
    seconds_a_round: Annotated[float | None, PUBLIC] = Field(default=None, ge=0, le=1e9)


class SiteUpdate(WireMessage):
    """What a hospital learned in one round, in whole steps of `common.weights.GRID`, plain or as a frame."""

    LATER_FLAGS = ("data_changed", "void", "ledger_head")

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    run: Annotated[RunName, PUBLIC]
    arm: Annotated[Name, PUBLIC]
    round: Annotated[int, PUBLIC] = Field(ge=1, le=10**6)
    base_sha256: Annotated[Name, PUBLIC]
    weight: Annotated[int, PUBLIC] = Field(ge=1, le=MAX_PATIENTS)  # the public nominal number of patients
    private: Annotated[bool, PUBLIC]
    noise_multiplier: Annotated[float, PUBLIC] = 0.0
    epsilon: Annotated[float | None, PUBLIC] = (
        None  # of the whole run's schedule at this site; None: not private
    )
    delta: Annotated[float | None, PUBLIC] = None
    # the site's data changed during the run, and its operator accepted that; what changed is not sent
    data_changed: Annotated[bool, PUBLIC] = False
    # PUBLIC: of ledger, plan and policy. These patients trained without noise, too: epsilon claims nothing
    void: Annotated[bool, PUBLIC] = False
    ledger_head: Annotated[LedgerHead, PUBLIC] = ""  # as in SiteDescription, before this answer's own entry
    # that an int8 codec put on each value, in weight units squared: of the frame alone (`int8_variance`), and
    # refused by the coordinator where it is not
    added_variance: Annotated[float, DP] = 0.0
    update: Annotated[np.ndarray, DP]  # int32 (trainable parameters,), or its frame, uint8 (bytes,)


class SiteEvaluation(WireMessage):
    """Patient-level sums for each model: with noise (`noised`), or exact, with the covariance of the AUROCs.

    An answer with noise has no exact sum: the arrays of the other kind are empty.
    """

    LATER_FLAGS = ("data_changed", "noise_multiplier", "epsilon", "delta", "any_histograms", "subgroups")

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    run: Annotated[RunName, PUBLIC]
    models: Annotated[tuple[Name, ...], PUBLIC]
    mode: Annotated[EvaluationMode, PUBLIC]
    # of this answer alone, in mode dp; charged to the site's ledger
    noise_multiplier: Annotated[float, PUBLIC] = 0.0
    epsilon: Annotated[float | None, PUBLIC] = None
    delta: Annotated[float | None, PUBLIC] = None
    # the site's data changed during the run, and its operator accepted that; what changed is not sent
    data_changed: Annotated[bool, PUBLIC] = False
    # int64 (models, 2: positive and negative, artifacts, common.counts.NOISED_BINS), below zero at times
    noised: Annotated[np.ndarray, DP] = _none(np.int64, 2, 0, 0)
    # int64 (models, 2, artifacts, common.counts.BINS)
    histograms: Annotated[np.ndarray, DISCLOSED] = _none(np.int64, 2, 0, 0)
    # float64 (models * artifacts, models * artifacts)
    covariance: Annotated[np.ndarray, DISCLOSED] = _none(np.float64, 0)
    # int64 (models, 2, common.counts.BINS), of the patients with and without any artifact. DISCLOSED, as the
    # artifacts' own, under the same policy: with noise it would be a further row that all others pay for
    any_histograms: Annotated[np.ndarray, DISCLOSED] = _none(np.int64, 2, 0)
    # int32 (models, 2, artifacts, len(common.subgroups.LEVELS), common.counts.DISCLOSED_BINS). Of public and
    # synthetic sites alone: a hospital sends none, whatever its policy
    subgroups: Annotated[np.ndarray, DISCLOSED] = _none(np.int32, 2, 0, 0, 0)

    @model_validator(mode="after")
    def _of_one_kind(self) -> SiteEvaluation:
        if self.mode == "dp" and (self.histograms.size or self.covariance.size or self.any_histograms.size):
            raise ValueError("exact sums beside those with noise")
        if self.mode != "synthetic" and self.subgroups.size:
            raise ValueError("subgroups of a hospital")
        if self.mode != "dp" and self.noised.size:
            raise ValueError("sums with noise beside exact ones")
        return self


class Refusal(WireMessage):
    """A hospital says no, or failed. The code of a failure is the same whatever went wrong; details stay in
    the site log.
    """

    site: Annotated[str, PUBLIC] = Field(default="", max_length=32, pattern=ONE_LINE)
    run: Annotated[RunName, PUBLIC] = ""
    code: Annotated[str, PUBLIC] = Field(pattern=r"^[a-z0-9-]{1,40}$")
    reason: Annotated[str, PUBLIC] = Field(max_length=MAX_WORDS, pattern=ONE_LINE)
    # random; finds the entry in the site log
    incident: Annotated[str, PUBLIC] = Field(default="", max_length=32, pattern=ONE_LINE)


OUTGOING: tuple[type[WireMessage], ...] = (
    SiteDescription,
    SiteReadiness,
    SiteUpdate,
    SiteEvaluation,
    Refusal,
)
