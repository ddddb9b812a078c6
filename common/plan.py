"""The run plan: what a coordinator asks for, read from YAML, validated, hashed as canonical JSON.

A plan *requests*; each hospital's policy (client/site/policy.py) *caps*. A plan file names only what differs
from the defaults below.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from common.arms import ARMS, ArmName
from common.artifacts import DEFAULT_LABELS, NAMES
from common.errors import PlanError
from common.names import MAX_RUN, MAX_WORDS, ONE_LINE, ONE_PARAGRAPH, SITE_NAME
from common.strict import (
    NO_ARGUMENTS,
    PlanArguments,
    PlanWeights,
    StrictModel,
    describe_validation,
    describe_yaml,
    read_yaml,
)

DEFAULT_STRATEGY = "fedavg"
STUDY = "study"
"""The `model.name` whose samples are studies, not slices."""
OF_MEASURES = ("iqm_linear", "iqm_mlp")
"""Values of `model.name` whose samples are metrics of scans, not images."""
DEFAULT_STUDY_SLICES: Final = 8
DEFAULT_STUDY_SERIES: Final = 4
FEATURE_FUSIONS, DECISION_FUSIONS = ("mean_features", "max_features"), ("mean", "noisy_or")
"""Of the series of a study, values of `model.args.fusion`."""
DEFAULT_EVALUATION_SHARE = 0.2

CHOSEN = ("clip_norm", "learning_rate", "steps_per_round", "average_rounds")
"""Keys of `privacy` that `settings: auto` chooses."""

LATER_PRIVACY_KEYS = (
    "evaluation_share",
    "evaluation_noise_multiplier",
    "steps_per_round",
    "average_rounds",
    "settings",
    "expected_sites",
    "expected_patients",
    "origin",
    "alternatives",
    "engine",
    "trainable",
)

LATER_TRAINING_KEYS = (
    "strategy",
    "inject",
    "loss_args",
    "class_weights",
    "optimizer",
    "optimizer_args",
    "warmup_rounds",
    "decay_rounds",
    "decay_factor",
    "ema",
    "choose_round",
    "early_stopping",
    "sampler",
    "augment",
    "precision",
    "memory_format",
    "dropout",
)

Augmentation = Literal["flip", "rotation", "scale", "crop", "shift", "elastic", "contrast"]

MIN_LEFT_OUT = 3
"""Sites of a study that leaves out each once: fewer leave none to federate with."""

DEFAULT_SPLIT = (0.7, 0.0, 0.3)
"""Shares of patients for training, validation and test."""


def without_defaults(model: StrictModel, values: dict[str, Any], later: tuple[str, ...]) -> dict[str, Any]:
    """Leave the keys `later` out at their defaults: plans written before these existed keep their hash."""
    fields = type(model).model_fields
    return {
        name: value
        for name, value in values.items()
        if name not in later or getattr(model, name) != fields[name].default
    }


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

    name: str = Field(default="small_cnn", max_length=64, pattern=ONE_LINE)
    # `package:NAME` in common/models/, an absolute path, or `random`: from the seed
    initial: str = Field(default="package:small_cnn_real.safetensors", max_length=MAX_WORDS, pattern=ONE_LINE)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    args: PlanArguments = NO_ARGUMENTS  # of the network; which ones it takes stands in its file
    # its outputs: names of the vocabulary (common/artifacts.py), in its order
    labels: tuple[Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")], ...] = DEFAULT_LABELS

    @model_validator(mode="after")
    def _in_the_order_of_the_vocabulary(self) -> Model:
        if unknown := [name for name in self.labels if name not in NAMES]:
            raise ValueError(f"labels: {unknown[0]!r} is no artifact, known: {', '.join(NAMES)}")
        ordered = tuple(name for name in NAMES if name in self.labels)
        if not ordered or self.labels != ordered:
            raise ValueError(
                f"labels = [{', '.join(self.labels)}], must name artifacts once, in this order: "
                + ", ".join(ordered or NAMES)
            )
        return self

    @property
    def study_slices(self) -> int | None:
        """How many slices of a study the network looks at; None where its samples are slices. Of arguments
        that the network takes.
        """
        return int(self.args.get("slices", DEFAULT_STUDY_SLICES)) if self.name == STUDY else None

    @property
    def study_series(self) -> int | None:
        """How many series of a study are one sample; None where each is one."""
        fuses = self.name == STUDY and self.args.get("fusion") in FEATURE_FUSIONS
        return int(self.args.get("series", DEFAULT_STUDY_SERIES)) if fuses else None

    @property
    def decision_fusion(self) -> str | None:
        """How the decisions about the series of a study become one, of `DECISION_FUSIONS`; None: not at
        all.
        """
        fusion = str(self.args.get("fusion")) if self.name == STUDY else ""
        return fusion if fusion in DECISION_FUSIONS else None

    @property
    def is_of_measures(self) -> bool:
        """Whether its samples are metrics of scans (common/measures.py), not images."""
        return self.name in OF_MEASURES

    @property
    def neighbours(self) -> bool:
        """Whether a sample is a slice with the one before and the one after it in its series. Of arguments
        that the network takes.
        """
        return self.args.get("neighbours") is True

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ("args", "labels"))


class Inject(StrictModel):
    """Artifacts simulated on each site's own slices, so that training needs no label."""

    views: int = Field(default=4, ge=1, le=16)  # versions of a patient, the untouched one included
    # weight of the versions in the mean of a patient who also has labels of the sheet
    share: float = Field(default=0.5, gt=0, le=1)
    severity: tuple[float, float] = (0.6, 1.0)  # lowest and highest; above 0, at most 1

    @model_validator(mode="after")
    def _severities(self) -> Inject:
        low, high = self.severity
        if not 0 < low <= high <= 1:
            raise ValueError(f"severity = [{low:g}, {high:g}], must be 0 < lowest <= highest <= 1")
        return self


class Training(StrictModel):
    """`rounds` times `local_epochs` passes over each site's training patients, in every arm.

    Batch size, loss, optimizer, its learning rate and `ema` are those of the arms without noise; the private
    arm takes its step from `Privacy`, and its loss is binary cross-entropy.
    """

    rounds: int = Field(default=6, ge=1, le=1000)
    local_epochs: int = Field(default=1, ge=1, le=100)
    batch_size: int = Field(default=16, ge=1, le=4096)  # slices
    learning_rate: float = Field(default=1e-3, ge=0, le=10)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"  # common/optimizers.py
    optimizer_args: PlanArguments = NO_ARGUMENTS  # of the optimizer, such as momentum
    # of the learning rate over the rounds. cosine: it falls to nothing; step: times `decay_factor` after
    # every `decay_rounds`
    schedule: Literal["constant", "cosine", "step"] = "constant"
    decay_rounds: int = Field(default=10, ge=1, le=1000)
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    # first rounds in which the learning rate rises in equal steps; the schedule begins after them
    warmup_rounds: int = Field(default=0, ge=0, le=999)
    sampler: Literal["uniform", "balanced"] = "uniform"  # common/samplers.py
    # random changes of slices, anew in every pass, and of the anatomy of views: common/augmentation.py
    augment: tuple[Augmentation, ...] = ()
    # decay of the exponential mean over the models of the rounds, which is then an arm's model; 0: off
    ema: float = Field(default=0.0, ge=0, lt=1)
    # whose model every arm hands on, by the coordinator's public set; None: server/run/choice.py
    choose_round: Literal["last", "public"] | None = None
    # an arm ends after so many rounds without a better score on the public set
    early_stopping: int | None = Field(default=None, ge=1, le=1000)
    loss: str = Field(default="bce", max_length=64, pattern=ONE_LINE)
    loss_args: PlanArguments = NO_ARGUMENTS  # of the loss: common/losses.py
    # artifact: how much it counts where it is present; others 1
    class_weights: PlanWeights = Field(default=NO_ARGUMENTS)  # type: ignore[arg-type]
    # how the coordinator combines updates: a name of server/strategies/, known to the coordinator alone
    strategy: str = Field(default=DEFAULT_STRATEGY, pattern=r"^[a-z][a-z0-9_]{0,31}$")
    inject: Inject | None = None  # None: a site's label sheet alone
    # of arms without noise: share of what the head sees that is 0 in a step (Srivastava et al., JMLR 2014)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    # of arms without noise: bf16 computes products in bfloat16, sums and steps stay float32
    precision: Literal["fp32", "bf16"] = "fp32"
    # of arms without noise: channels_last lays out the channels of a pixel side by side, contiguous planes
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), LATER_TRAINING_KEYS)

    @model_validator(mode="after")
    def _weighs_artifacts(self) -> Training:
        if unknown := sorted(set(self.class_weights) - set(NAMES)):
            raise ValueError(f"class_weights: {unknown[0]!r} is no artifact, known: {', '.join(NAMES)}")
        return self

    @model_validator(mode="after")
    def _warms_up_before_the_last_round(self) -> Training:
        if self.warmup_rounds >= self.rounds:
            raise ValueError(f"warmup_rounds = {self.warmup_rounds}, must be below rounds = {self.rounds}")
        return self

    @model_validator(mode="after")
    def _bends_before_artifacts_only(self) -> Training:
        if len(set(self.augment)) < len(self.augment):
            raise ValueError("augment names one twice")
        if "elastic" in self.augment and self.inject is None:
            raise ValueError(
                "augment: elastic bends ghosts and streaks of slices that show them, which no scanner does: "
                "it is for the views of training.inject, before their artifact is added"
            )
        return self

    def in_round(self, number: int) -> Training:
        """These settings with the learning rate of round `number`, 1..rounds."""
        share = self._share_of_rate(number)
        return self if share == 1 else self.model_copy(update={"learning_rate": self.learning_rate * share})

    def _share_of_rate(self, number: int) -> float:
        """What of the learning rate is left in a round."""
        if number <= self.warmup_rounds:
            return number / (self.warmup_rounds + 1)
        done, rounds = number - 1 - self.warmup_rounds, self.rounds - self.warmup_rounds
        match self.schedule:
            case "constant":
                return 1.0
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * done / rounds))
            case "step":
                return self.decay_factor ** (done // self.decay_rounds)


class Privacy(StrictModel):
    """The private arm: a linear head on frozen public features, or more of the network (`trainable`), trained
    under patient-level differential privacy.

    `epsilon` covers all that the plan asks of one patient: every private arm, and the noised evaluation. The
    noise multipliers are derived from it (common/pricing.py), unless they are stated.
    """

    epsilon: float = Field(default=2.0, gt=0, le=1000)  # over the whole run, per patient, add/remove
    delta: float = Field(default=1e-5, gt=0, lt=1e-3)  # probability of failure, well below 1 / patients
    clip_norm: float = Field(default=1.0, gt=0, le=1000)  # L2 bound on one patient's gradient
    sample_rate: float = Field(default=1.0, ge=1e-9, le=1)  # q: chance that a patient takes part in a step
    # overrides the one derived from epsilon
    noise_multiplier: float | None = Field(default=None, gt=0, le=1e7)
    learning_rate: float = Field(default=3.0, gt=0, le=1000)
    max_slices_per_patient: int = Field(default=4, ge=1, le=64)
    # steps of a round; by default so many that `local_epochs` expected passes are made at the sampling rate
    steps_per_round: int | None = Field(default=None, ge=1, le=1000)
    # the arm's model is the mean of its models after the last so many rounds, which costs no privacy
    average_rounds: int = Field(default=1, ge=1, le=1000)
    # auto: the coordinator chooses CHOSEN on public rehearsal hospitals before it signs (`fedqc run tune`)
    settings: Literal["stated", "auto"] = "stated"
    expected_sites: int = Field(default=3, ge=1, le=1000)  # what `auto` rehearses: so many sites ...
    expected_patients: int = Field(default=100, ge=1, le=10**6)  # ... of so many nominal patients each
    origin: str = Field(default="", max_length=400, pattern=ONE_LINE)  # how `auto` chose
    # each private arm costs epsilon as if it were run alone: for comparisons in a simulation
    alternatives: bool = False
    # of mu^2, for the one noised evaluation of the finished models; 0: hospitals whose policy asks for noise
    # are not scored
    evaluation_share: float = Field(default=DEFAULT_EVALUATION_SHARE, ge=0, lt=1)
    evaluation_noise_multiplier: float | None = Field(default=None, gt=0, le=1e7)
    # what computes the gradient of each patient: a name of client/dp/engines/
    engine: Literal["opacus", "patient_loop"] = "opacus"
    # norms: the scales and shifts of all GroupNorm and LayerNorm layers, and the head
    trainable: Literal["head", "norms", "all"] = "head"

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = without_defaults(self, serialize(self), LATER_PRIVACY_KEYS)
        if self.settings == "auto":
            values = {name: value for name, value in values.items() if name not in CHOSEN}
        return values

    @model_validator(mode="after")
    def _auto_states_nothing(self) -> Privacy:
        if self.settings == "auto" and (stated := sorted({*CHOSEN, "origin"} & self.model_fields_set)):
            raise ValueError(f"settings = auto chooses {stated[0]}: leave it out, or leave settings out")
        return self


class Federation(StrictModel):
    quorum: int = Field(default=2, ge=1)  # valid answers without which a round is not averaged
    deadline_s: float = Field(default=3600, gt=0, le=1e7)  # how long a round waits for an answer
    # how long a site that went away during a round may take to come back
    patience_s: float = Field(default=120, ge=0, le=1e7)
    codec: Literal["plain", "lossless", "int8"] = (
        "lossless"  # of models and updates on the way; int8 rounds updates at random
    )


class PublicSet(StrictModel):
    """The coordinator's own images, phantoms or a file of real ones: curves over rounds and every choice come
    from here, never from a site.
    """

    patients: int = Field(default=60, ge=2, le=5000)  # phantoms
    seed: int = 20261
    # in place of phantoms: a file that `fedqc data prepare --public-set` wrote, an absolute path
    file: str | None = Field(default=None, max_length=1000, pattern=ONE_LINE)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = without_defaults(self, serialize(self), ("file", "sha256"))
        return values if self.file is None else {name: values[name] for name in ("file", "sha256")}

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> PublicSet:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("file and sha256 belong together")
        if self.file is not None and (stated := sorted({"patients", "seed"} & self.model_fields_set)):
            raise ValueError(f"{stated[0]} is of phantoms: leave it out, or leave file out")
        if self.file is not None and not self.file.startswith("/"):
            raise ValueError(f"file = {self.file!r}, must be an absolute path")
        return self


class ReleasedModel(StrictModel):
    """A model that a run released: its name there, and the digest of its weights."""

    # the arm, or arm/site of one that each site trains for itself
    name: str = Field(max_length=64, pattern=ONE_LINE)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def arm(self) -> str:
        return self.name.partition("/")[0]

    @model_validator(mode="after")
    def _is_of_an_arm(self) -> ReleasedModel:
        arm, slash, owner = self.name.partition("/")
        if arm not in ARMS or bool(slash) != (ARMS[arm].owner == "site"):
            raise ValueError(f"{self.name!r} is no arm, nor arm/site of one that each site trains for itself")
        if slash and not re.fullmatch(SITE_NAME, owner):
            raise ValueError(f"{self.name!r}: {owner!r} is no name of a site")
        return self


class Evaluate(StrictModel):
    """Score finished models of a run, and train nothing."""

    # the run that released the models, as messages name it
    run: str = Field(min_length=1, max_length=MAX_RUN, pattern=ONE_LINE)
    models: tuple[ReleasedModel, ...] = Field(min_length=1, max_length=1000)
    # the sites that trained in that run: scored on test patients only
    trained: tuple[Annotated[str, Field(pattern=SITE_NAME)], ...] = ()

    @model_validator(mode="after")
    def _names_each_once(self) -> Evaluate:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("models names one twice")
        return self


class RunPlan(StrictModel):
    name: str = Field(pattern=SITE_NAME)
    # what the run is to answer, shown to those who approve it
    question: str = Field(default="", max_length=MAX_WORDS, pattern=ONE_PARAGRAPH)
    seed: int = Field(default=7, ge=0, lt=2**31)
    arms: tuple[ArmName, ...] = ("public", "federated")
    # sites that never train, scored at the end as `unseen`
    held_out: tuple[Annotated[str, Field(pattern=SITE_NAME)], ...] = ()
    # whom a held-out site is scored on: of a study that holds out each site once, `test`, because its other
    # patients train in sister runs. A hospital is scored on its test patients in any case
    held_out_patients: Literal["all", "test"] = "all"
    # of a study, which `common/leave_one_out.py` makes: its sites. Each is held out in one run; approving the
    # study approves these runs and the one with all sites
    leave_one_site_out: tuple[Annotated[str, Field(pattern=SITE_NAME)], ...] = ()
    image_size: int = Field(default=128, ge=32, le=512)  # pixels
    split: Split = Split()
    model: Model = Model()
    training: Training = Training()
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    public_set: PublicSet = PublicSet()
    # of an evaluation by itself (`fedqc evaluate`), whose `arms` is empty: the models that are scored
    evaluate: Evaluate | None = None

    @model_serializer(mode="wrap")
    def _without_later_keys(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        later = ("held_out_patients", "leave_one_site_out", "evaluate")
        return without_defaults(self, serialize(self), later)

    @model_validator(mode="after")
    def _consistent(self) -> RunPlan:
        if self.evaluate is not None:
            if self.arms or self.held_out:
                raise ValueError("evaluate trains nothing: leave arms and held_out empty")
            if self.leave_one_site_out:
                raise ValueError("evaluate is one run: leave leave_one_site_out empty")
            return self
        if self.leave_one_site_out:
            self._is_a_member()
        if not self.arms:
            raise ValueError("arms is empty")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms names one twice")
        if all(ARMS[arm].simulated for arm in self.arms):
            what = "baselines" if ARMS[self.arms[0]].baseline else "controls"
            raise ValueError(f"arms names only {what}, such as {self.arms[0]}, whose model no run hands on")
        if unasked := sorted(set(self.training.class_weights) - set(self.model.labels)):
            raise ValueError(
                f"training.class_weights: {unasked[0]!r} is not among model.labels: "
                + ", ".join(self.model.labels)
            )
        clipped = [arm for arm in self.arms if ARMS[arm].clips]
        of_measures = self.model.is_of_measures
        if of_measures and (what := self._not_of_measures()):
            raise ValueError(f"{what} is of images, and model.name = {self.model.name} sees none")
        # the metrics themselves are what a linear network's head sees: no random weight lies between
        has_features = self.model.name == "iqm_linear" or (of_measures and self.privacy.trainable == "all")
        in_part = [arm for arm in self.arms if ARMS[arm].trains_part]
        if self.model.initial == "random" and in_part and not has_features:
            raise ValueError(
                f"arms: {in_part[0]} trains a head on public features, and model.initial = random has none"
            )
        frozen = [arm for arm in self.arms if ARMS[arm].frozen]
        if frozen and self.privacy.trainable == "all":
            raise ValueError(f"arms: privacy.trainable = all freezes nothing: leave out {frozen[0]}")
        if clipped and self.training.sampler != "uniform":
            raise ValueError(
                f"training.sampler = {self.training.sampler} counts labels over patients, so that one "
                f"changes how often another is drawn and no clip bounds it: leave out {clipped[0]}, or "
                "balance by training.class_weights, which are public"
            )
        if clipped and self.training.augment and self.training.inject is None:
            raise ValueError(
                f"training.augment: {clipped[0]} takes the slices of a patient as they are, once for all "
                "steps, and augments views of training.inject only: state inject, or leave augment out"
            )
        of_series = "model.name = study" if self.model.name == STUDY else "model.args.neighbours"
        baseline = next((arm for arm in self.arms if ARMS[arm].baseline), None)
        if baseline and (of_measures or self.model.name == STUDY or self.model.neighbours):
            seen = of_series if not of_measures else f"model.name = {self.model.name}"
            raise ValueError(
                f"arms: {baseline} takes the metrics of single slices, and {seen} sees others: "
                "leave it out, or name a network of slices"
            )
        if self.model.name == STUDY or self.model.neighbours:
            if self.training.inject is not None:
                raise ValueError(
                    f"training.inject makes views of single slices, and {of_series} is trained on series: "
                    "leave inject out, or name a network of slices"
                )
            if self.privacy.settings == "auto":
                raise ValueError(
                    f"privacy.settings = auto rehearses on single slices, and {of_series} is trained on "
                    "series: state the settings"
                )
        return self

    def _is_a_member(self) -> None:
        """Raises ValueError: it is neither a study that leaves out each site once, nor a run of one."""
        sites = self.leave_one_site_out
        if len(set(sites)) < max(MIN_LEFT_OUT, len(sites)):
            raise ValueError(f"leave_one_site_out: must name {MIN_LEFT_OUT} sites or more, each once")
        if len(self.held_out) > 1 or not set(self.held_out) <= set(sites):
            raise ValueError("held_out: a run of a study holds out none or one of leave_one_site_out")
        if self.held_out_patients != "test":
            raise ValueError(
                "held_out_patients: must be test where leave_one_site_out names sites: the other patients of "
                "a site train in its sister runs"
            )

    def _not_of_measures(self) -> str:
        """The key of a plan that asks a network of metrics for what only images have; "" if there is none."""
        training = self.training
        asked = {
            "training.inject": training.inject is not None,
            "training.augment": bool(training.augment),
            "training.choose_round = public": training.choose_round == "public",
            "training.early_stopping": training.early_stopping is not None,
            "public_set.file": self.public_set.file is not None,
            "model.initial other than random": self.model.initial != "random",
        }
        return next((key for key, is_asked in asked.items() if is_asked), "")

    @property
    def simulated_arms(self) -> tuple[str, ...]:
        """Its arms that exist only in simulations of sites that are no hospital."""
        return tuple(arm for arm in self.scored_arms if ARMS[arm].simulated)

    @property
    def scored_arms(self) -> tuple[str, ...]:
        """The arms whose models are scored in the end: its own, or those of the run that it evaluates."""
        if self.evaluate is None:
            return self.arms
        found = {model.arm for model in self.evaluate.models}
        return tuple(arm for arm in ARMS if arm in found)

    def trains_at(self, site: str) -> bool:
        """Whether a site that takes part trains in this run."""
        return self.evaluate is None and site not in self.held_out

    def trained_at(self, site: str) -> bool:
        """Whether a site that takes part trains the models, or trained them in the run that is evaluated."""
        return self.trains_at(site) if self.evaluate is None else site in self.evaluate.trained

    def scores_everyone_at(self, site: str) -> bool:
        """Whether all patients of a site may be scored: it never trains, in this run or a sister."""
        return not self.trained_at(site) and self.held_out_patients == "all"

    def split_at(self, site: str) -> Split | None:
        """The shares that the plan asks of a site; None of a held-out one that may score all its patients."""
        return None if self.scores_everyone_at(site) else self.split

    @property
    def epochs(self) -> int:
        return self.training.rounds * self.training.local_epochs

    @property
    def private_steps_per_round(self) -> int:
        """Steps of a private arm in a round: as stated, or so many that they make `local_epochs` expected
        passes at the plan's sampling rate.
        """
        if self.privacy.steps_per_round is not None:
            return self.privacy.steps_per_round
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
    return parse_plan(plan_values(path), where=str(path))


def plan_values(path: Path) -> Any:
    """What a plan file says, not yet validated.

    Raises:
        PlanError: the file is missing, or is not YAML.
    """
    try:
        return read_yaml(path)
    except OSError as error:
        raise PlanError(
            f"{path}: cannot be read ({error.strerror})",
            code="no-such-plan",
            hint="plans lie in configs/plans/",
        ) from None
    except yaml.YAMLError as error:
        raise PlanError(f"{path}: not YAML: {describe_yaml(error)}") from None


def changed_values(values: object, changes: Mapping[str, Any], *, where: str = "plan") -> dict[str, Any]:
    """A copy of a decoded plan with other values of some dotted keys, such as `training.rounds`.

    Raises:
        PlanError: a key lies below one that is no mapping.
    """
    changed: Any = copy.deepcopy(values)
    for key, value in changes.items():
        *above, last = key.split(".")
        inner: Any = changed
        for part in above:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise PlanError(f"{where}: {key}: {'.'.join(above) or 'the plan'} is no mapping of plan keys")
        inner[last] = copy.deepcopy(value)
    found: dict[str, Any] = changed
    return found
