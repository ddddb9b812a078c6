"""Every message that crosses a hospital's wall, field by field, with its class.

PUBLIC     a function of plan, policy and ledger only.
DP         computed from patients, clipped, noised, charged to the ledger. In a run without privacy the same field is
           outside any guarantee; such a run needs `allow_non_private` and says *not private* in everything it makes.
DISCLOSED  computed from patients without noise; leaves only if the operator's policy says so.

Adding a field is a privacy decision: tests/common/test_wire.py spells the list out.
"""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

import numpy as np
import safetensors.numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from common.errors import RunError
from common.plan import MOST_PATIENTS, SITE_NAME

Kind = Literal["hospital", "public", "synthetic"]


class Crossing(Enum):
    PUBLIC = "public"
    DP = "dp"
    DISCLOSED = "disclosed"


PUBLIC, DP, DISCLOSED = Crossing.PUBLIC, Crossing.DP, Crossing.DISCLOSED


class WireMessage(BaseModel):
    """Scalars travel as one JSON string, arrays as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def array_fields(cls) -> tuple[str, ...]:
        return tuple(name for name, hint in get_type_hints(cls).items() if hint is np.ndarray and name in cls.model_fields)

    def _parts(self) -> tuple[str, dict[str, np.ndarray]]:
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in self.array_fields()}
        scalars = self.model_dump(mode="json", exclude=set(arrays))
        return json.dumps({"type": type(self).__name__, **scalars}, sort_keys=True), arrays

    @classmethod
    def _join(cls, text: str, arrays: dict[str, np.ndarray]) -> Self:
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict) or values.pop("type", None) != cls.__name__ or set(arrays) != set(cls.array_fields()):
                raise RunError(f"expected a {cls.__name__}", code="bad-message")
            return cls.model_validate(values | arrays)
        except (ValidationError, ValueError, RecursionError) as error:
            raise RunError(f"malformed {cls.__name__}: {str(error).splitlines()[0]}", code="bad-message") from None

    def to_record(self) -> RecordDict:
        text, arrays = self._parts()
        return RecordDict(
            {
                "fields": ConfigRecord({"json": text}),
                "arrays": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Self:
        """Raises RunError (code bad-message) unless the record holds exactly this message."""
        try:
            text = str(record.config_records["fields"]["json"])
            arrays = {name: array.numpy() for name, array in record.array_records["arrays"].items()}
        except (KeyError, TypeError, AttributeError, ValueError, EOFError, OSError, MemoryError, OverflowError):
            raise RunError(f"expected a {cls.__name__}", code="bad-message") from None
        return cls._join(text, arrays)

    def to_bytes(self) -> bytes:
        """The same message as one byte string, for a site's outbox."""
        text, arrays = self._parts()
        return safetensors.numpy.save(arrays | {"_": np.zeros(0, np.uint8)}, metadata={"json": text})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        try:
            length = int.from_bytes(data[:8], "little")
            text = json.loads(data[8 : 8 + length])["__metadata__"]["json"]
            arrays = safetensors.numpy.load(data)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
            raise RunError(f"expected the bytes of a {cls.__name__}", code="bad-message") from None
        arrays.pop("_", None)
        return cls._join(text, arrays)


def message_type(record: RecordDict) -> str:
    """The name of the message in a record, or "" where there is none."""
    try:
        return str(json.loads(str(record.config_records["fields"]["json"]))["type"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""


def crossings(message: type[WireMessage]) -> dict[str, Crossing | None]:
    """Field name to class; None marks a field that was never classified, which a test refuses."""
    found: dict[str, Crossing | None] = {}
    for name, hint in get_type_hints(message, include_extras=True).items():
        if name in message.model_fields:
            found[name] = next((extra for extra in get_args(hint)[1:] if isinstance(extra, Crossing)), None)
    return found


class TrainTask(WireMessage):
    """Coordinator to hospital: train from these weights. Holds nothing of any patient."""

    run: str
    arm: str
    round: int = Field(ge=1)
    private: bool
    base: np.ndarray  # float32 (parameters,)


class EvaluateTask(WireMessage):
    """Coordinator to hospital: score these models on your test patients, or on all of them where you never train."""

    run: str
    models: tuple[str, ...]
    everyone: bool
    weights: np.ndarray  # float32 (models, parameters)


class SiteDescription(WireMessage):
    """Who answers: all of it is what the operator wrote into site.yaml."""

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    kind: Annotated[Kind, PUBLIC]
    members: Annotated[tuple[str, ...], PUBLIC] = ()  # the sites behind the pooled baseline of a simulation
    nominal_patients: Annotated[int, PUBLIC] = Field(ge=1, le=MOST_PATIENTS)
    stand_in: Annotated[str, PUBLIC] = ""  # what a "patient" is here, when it is not a person
    version: Annotated[str, PUBLIC]


class SiteUpdate(WireMessage):
    """What a hospital learned in one round, in whole steps of `common.weights.GRID`."""

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    run: Annotated[str, PUBLIC]
    arm: Annotated[str, PUBLIC]
    round: Annotated[int, PUBLIC]
    base_sha256: Annotated[str, PUBLIC]
    weight: Annotated[int, PUBLIC] = Field(ge=1, le=MOST_PATIENTS)  # the public nominal number of patients
    private: Annotated[bool, PUBLIC]
    noise_multiplier: Annotated[float, PUBLIC] = 0.0
    epsilon: Annotated[float | None, PUBLIC] = None  # of the whole run's schedule at this site; None: not private
    delta: Annotated[float | None, PUBLIC] = None
    update: Annotated[np.ndarray, DP]  # int32 (trainable parameters,)


class SiteEvaluation(WireMessage):
    """Patient-level sums for each model, and the covariance of their AUROCs on the same patients."""

    site: Annotated[str, PUBLIC] = Field(pattern=SITE_NAME)
    run: Annotated[str, PUBLIC]
    models: Annotated[tuple[str, ...], PUBLIC]
    mode: Annotated[Literal["disclosed", "synthetic"], PUBLIC]
    histograms: Annotated[np.ndarray, DISCLOSED]  # int64 (models, 2: positive and negative, artifacts, bins)
    covariance: Annotated[np.ndarray, DISCLOSED]  # float64 (models * artifacts, models * artifacts)


class Refusal(WireMessage):
    """A hospital says no, or failed. The code of a failure is the same whatever went wrong; details stay in the site log."""

    site: Annotated[str, PUBLIC] = ""
    run: Annotated[str, PUBLIC] = ""
    code: Annotated[str, PUBLIC]
    reason: Annotated[str, PUBLIC]
    incident: Annotated[str, PUBLIC] = ""  # random; finds the entry in the site log


OUTGOING: tuple[type[WireMessage], ...] = (SiteDescription, SiteUpdate, SiteEvaluation, Refusal)
