"""The run plan: what a coordinator asks for, read from YAML, validated, hashed as canonical JSON.

A plan *requests*; each hospital's policy (client/site/policy.py) *caps*. A plan file names only what differs
from the defaults below.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from common.arms import ARMS, ArmName
from common.errors import PlanError
from common.names import SITE_NAME
from common.strict import StrictModel, describe_validation, strict_yaml

DEFAULT_STRATEGY = "fedavg"


DEFAULT_SPLIT = (0.7, 0.0, 0.3)
"""Shares of patients for training, validation and test."""


class Split(StrictModel):
    """Shares of patients; a site's own key decides who falls where."""

    train: float = Field(default=DEFAULT_SPLIT[0], ge=0, le=1)
    validation: float = Field(default=DEFAULT_SPLIT[1], ge=0, le=1)
    test: float = Field(default=DEFAULT_SPLIT[2], ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Split:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test = {total:g}, must be 1")
        return self


class Model(StrictModel):
    """Which network, and the public weights that every arm starts from."""

    name: str = "small_cnn"
    # `package:NAME` in common/models/, an absolute path, or `random`: from the seed
    initial: str = "package:small_cnn.safetensors"
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class Training(StrictModel):
    """`rounds` times `local_epochs` passes over each site's training patients, in every arm.

    Batch size, learning rate, weight decay, schedule and loss are those of the arms without noise; the
    private arm takes its step from `Privacy`, and its loss is binary cross-entropy.
    """

    rounds: int = Field(default=6, ge=1, le=1000)
    local_epochs: int = Field(default=1, ge=1, le=100)
    batch_size: int = Field(default=16, ge=1, le=4096)  # slices
    learning_rate: float = Field(default=1e-3, ge=0, le=10)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = (
        "constant"  # cosine: the learning rate falls to nothing over the rounds
    )
    loss: str = "bce"
    # how the coordinator combines updates: a name of server/strategies/, known to the coordinator alone
    strategy: str = Field(default=DEFAULT_STRATEGY, pattern=r"^[a-z][a-z0-9_]{0,31}$")

    @model_serializer(mode="wrap")
    def _without_default_strategy(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the default strategy out: plans written before the key existed keep their hash."""
        values: dict[str, Any] = serialize(self)
        if values.get("strategy") == DEFAULT_STRATEGY:
            del values["strategy"]
        return values

    def in_round(self, number: int) -> Training:
        """These settings with the learning rate of round `number`, 1..rounds."""
        if self.schedule == "constant":
            return self
        share = 0.5 * (1 + math.cos(math.pi * (number - 1) / self.rounds))
        return self.model_copy(update={"learning_rate": self.learning_rate * share})


class Privacy(StrictModel):
    """The private arm: a linear head on frozen public features, trained under patient-level differential
    privacy.

    The noise multiplier is derived from `epsilon` over the whole run, unless it is stated.
    """

    epsilon: float = Field(default=8.0, gt=0, le=1000)  # over the whole run, per patient, add/remove
    delta: float = Field(default=1e-5, gt=0, lt=1e-3)  # probability of failure, well below 1 / patients
    clip_norm: float = Field(default=1.0, gt=0, le=1000)  # L2 bound on one patient's gradient
    sample_rate: float = Field(default=1.0, ge=1e-9, le=1)  # q: chance that a patient takes part in a step
    # overrides the one derived from epsilon
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e7)
    learning_rate: float = Field(default=3.0, gt=0, le=1000)
    max_slices_per_patient: int = Field(default=4, ge=1, le=64)


class Federation(StrictModel):
    quorum: int = Field(default=2, ge=1)  # valid answers without which a round is not averaged
    deadline_s: float = Field(default=3600, gt=0, le=1e7)  # how long a round waits for an answer
    # how long a site that went away during a round may take to come back
    patience_s: float = Field(default=120, ge=0, le=1e7)
    codec: Literal["plain", "lossless", "int8"] = (
        "lossless"  # of models and updates on the way; int8 rounds updates at random
    )


class PublicSet(StrictModel):
    """The coordinator's own phantoms: curves over rounds and every choice come from here, never from a
    site.
    """

    patients: int = Field(default=60, ge=2, le=5000)
    seed: int = 20261


class RunPlan(StrictModel):
    name: str = Field(pattern=SITE_NAME)
    question: str = ""  # what the run is to answer, shown to those who approve it
    seed: int = Field(default=7, ge=0, lt=2**31)
    arms: tuple[ArmName, ...] = ("public", "federated")
    held_out: tuple[str, ...] = ()  # sites that never train, scored at the end as `unseen`
    image_size: int = Field(default=128, ge=32, le=512)  # pixels
    split: Split = Split()
    model: Model = Model()
    training: Training = Training()
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    public_set: PublicSet = PublicSet()

    @model_validator(mode="after")
    def _consistent(self) -> RunPlan:
        if not self.arms:
            raise ValueError("arms is empty")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms names one twice")
        private = [arm for arm in self.arms if ARMS[arm].private]
        if self.model.initial == "random" and private:
            raise ValueError(
                f"arms: {private[0]} trains a head on public features, and model.initial = random has none"
            )
        return self

    @property
    def epochs(self) -> int:
        return self.training.rounds * self.training.local_epochs

    @property
    def private_steps_per_round(self) -> int:
        """Steps of the private arm that make `local_epochs` expected passes at the plan's sampling rate."""
        return max(1, round(self.training.local_epochs / self.privacy.sample_rate))

    def canonical_json(self) -> str:
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
        )

    def sha256(self) -> str:
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()


def parse_plan(values: object, *, where: str = "plan") -> RunPlan:
    """Validate a decoded plan.

    Raises:
        PlanError: names the first offending field, its value and the bound; the hint counts the others.
    """
    if not isinstance(values, dict):
        raise PlanError(
            f"{where}: expected a mapping of plan keys, found {type(values).__name__}",
            hint="start from configs/plans/demo.yaml",
        )
    try:
        # JSON rules: lists become tuples, still strict
        return RunPlan.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise PlanError(f"{where}: {describe_validation(error)}", hint=_more(error)) from None
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where}: {error}") from None


def _more(error: ValidationError) -> str:
    others = len(error.errors()) - 1
    keys = "keys: " + ", ".join(RunPlan.model_fields)
    return f"and {others} more; {keys}" if others else keys


def read_plan(path: Path) -> RunPlan:
    """Read a plan file.

    Raises:
        PlanError: the file is missing, is not YAML, or does not validate.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror})",
            code="no-such-plan",
            hint="plans lie in configs/plans/",
        ) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        values: Any = strict_yaml(text)
    except yaml.YAMLError as error:
        raise PlanError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise PlanError(f"{path}: not YAML: nested too deeply") from None
    return parse_plan(values, where=str(path))
