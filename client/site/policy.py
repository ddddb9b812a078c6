"""Read a hospital's policy (a YAML file that never leaves it), and admit or refuse plans by it.

A plan looser than the policy is refused with the reason; a stricter one is used, and charged as used. No plan
is altered: these functions admit or raise, and return no changed plan.

A refusal's `public_reason` is a function of plan and policy only (the nominal number of patients is a public
bucket, not a count).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from datetime import datetime, time
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from common.errors import ConfigError, RefusedError
from common.names import SITE_KINDS, EvaluationMode, SiteKind, Unit
from common.privacy import epsilon_text
from common.strict import StrictModel, describe_all, describe_yaml, read_yaml

Evaluation = EvaluationMode | Literal["none"]

ETHICS_FIELDS = ("ethics_approval", "consent_basis")
_NOTHING = frozenset({"none", "na", "tbd", "todo", "pending", "unknown", "null", "xxx", "无", "待定", "未知"})
_HOURS = re.compile(r"((?:[01][0-9]|2[0-3]):[0-5][0-9])-((?:[01][0-9]|2[0-3]):[0-5][0-9])")


class SitePolicy(StrictModel):
    """What one site permits. Unknown keys, wrong types and values out of range are refused when it is read.

    Every number is a cap on what a plan may request; none replaces what the plan says.
    """

    # over the lifetime of the installation, per patient, all runs and evaluations together
    max_epsilon: float = Field(default=8.0, gt=0, le=1000)
    max_epsilon_per_run: float | None = Field(default=None, gt=0, le=1000)
    max_delta: float = Field(default=1e-5, gt=0, lt=1e-3)
    # fewer: a private arm would learn nothing and protect badly
    min_nominal_patients: int = Field(default=50, ge=1)
    allow_non_private: bool = False  # whether an arm without noise may train on this site's patients
    # private arms once patients trained without noise, or in a plan that does both: refuse them, or take part
    # and send that no claim holds
    after_non_private: Literal["refuse", "void"] = "refuse"
    evaluation: Evaluation = "dp"
    max_clip_norm: float | None = Field(default=None, gt=0)
    max_rounds: int | None = Field(default=None, ge=1)
    hours: str | None = None  # local time in which work may begin, "22:00-06:00": the end is not part of it
    # a hospital's answers to private and evaluation tasks leave at multiples of it, in seconds; 0: at once
    answer_grid_s: float = Field(default=10.0, ge=0, le=3600)
    require_approval: bool = (
        False  # whether somebody here must have said yes to each plan, `fedqc site approve`
    )

    @field_validator("hours")
    @classmethod
    def _are_hours(cls, hours: str | None) -> str | None:
        if hours is not None and ((found := _HOURS.fullmatch(hours)) is None or found[1] == found[2]):
            raise ValueError("must be two different times of day, such as 22:00-06:00")
        return hours

    @model_validator(mode="after")
    def _run_within_lifetime(self) -> SitePolicy:
        if self.max_epsilon_per_run is not None and self.max_epsilon_per_run > self.max_epsilon:
            raise ValueError(
                f"max_epsilon_per_run = {self.max_epsilon_per_run} must be at most max_epsilon = "
                f"{self.max_epsilon}"
            )
        return self

    @property
    def epsilon_per_run(self) -> float:
        """The largest epsilon one run may request."""
        return self.max_epsilon if self.max_epsilon_per_run is None else self.max_epsilon_per_run


def default_policy(kind: SiteKind) -> SitePolicy:
    """The policy of a site that has not written one: the numbers of the level `usual` for patients, open for
    public and generated images.

    The smallest cohort is the same everywhere, so that a rehearsal on synthetic sites refuses what a hospital
    would.
    """
    if kind == "hospital":
        return SitePolicy(max_epsilon_per_run=2.0)
    if kind in ("public", "synthetic"):
        return SitePolicy(max_epsilon=1000.0, allow_non_private=True, evaluation="synthetic")
    raise ConfigError(
        f"unknown kind of site {kind!r}", code="unknown-site-kind", hint=f"known: {', '.join(SITE_KINDS)}"
    )


def read_policy(path: Path | str) -> SitePolicy:
    """Read `policy.yaml`. An empty file is the default of a hospital.

    Raises:
        ConfigError: the file cannot be read, is not a mapping, repeats a key, or a field is unknown or out of
            range; all of the fields that are wrong are named, each with its value and its bound.
    """
    path = Path(path)
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}", code="policy-unreadable") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {describe_yaml(error)}", code="bad-policy") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must be a mapping of names to values, found {type(content).__name__}", code="bad-policy"
        )
    try:
        return SitePolicy.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {describe_all(error)}",
            code="bad-policy",
            hint=f"known fields: {', '.join(SitePolicy.model_fields)}",
        ) from error


def missing_ethics(kind: SiteKind, stated: Mapping[str, str]) -> tuple[str, ...]:
    """The fields of cohort.yaml without which a hospital takes part in nothing; () for other kinds of site.

    Args:
        stated: `ETHICS_FIELDS` and their values.
    """
    if kind != "hospital":
        return ()
    return tuple(name for name in ETHICS_FIELDS if not _says_something(stated.get(name, "")))


def admit_ethics(kind: SiteKind, stated: Mapping[str, str]) -> None:
    """Admit the work of a site that states its ethics approval and consent basis, or of one that is no
    hospital.

    Raises:
        RefusedError: `ethics-missing`; the public reason is a function of cohort.yaml only.
    """
    if missing := missing_ethics(kind, stated):
        raise RefusedError(
            f"cohort.yaml: {' and '.join(missing)} must be stated at a hospital",
            code="ethics-missing",
            public_reason="this hospital has not stated its ethics approval and consent basis",
            hint="fill in ethics_approval and consent_basis of cohort.yaml",
        )


def _says_something(text: str) -> bool:
    """Whether a text is more than blanks, punctuation or a word for nothing."""
    word = "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())
    return bool(word) and word not in _NOTHING


def admit_training(
    policy: SitePolicy,
    *,
    private: bool,
    epsilon: float | None = None,
    delta: float | None = None,
    clip_norm: float | None = None,
    nominal_patients: int,
    rounds: int,
) -> None:
    """Admit one arm of a run, or refuse it. What is left of the lifetime budget is the ledger's to decide,
    not checked here.

    Args:
        private: whether the arm clips and adds noise. If not, epsilon, delta and clip_norm are not looked at.
        epsilon, delta: what the whole plan asks of one patient (`common.pricing.plan_epsilon`).
        clip_norm: L2 bound of one patient's contribution to one step.
        nominal_patients: the public bucket the operator picked, not a count of patients.
        rounds: how many rounds the arm has.
    Raises:
        RefusedError: codes `too-many-rounds`, `non-private-not-permitted`, `too-few-patients`,
            `epsilon-over-policy`, `delta-over-policy`, `clip-norm-over-policy`; `public_reason` may be sent.
        ConfigError: a private arm without a positive finite epsilon, delta or clip norm.
    """
    if policy.max_rounds is not None and rounds > policy.max_rounds:
        raise _refusal(
            "too-many-rounds",
            f"the plan has {rounds} rounds, this site's policy permits at most {policy.max_rounds}",
        )
    if not private:
        if not policy.allow_non_private:
            raise _refusal(
                "non-private-not-permitted",
                "this site's policy does not permit an arm without differential privacy",
            )
        return
    epsilon = _positive("epsilon", epsilon)
    delta = _positive("delta", delta)
    clip_norm = _positive("clip_norm", clip_norm)
    _admit_private(policy, epsilon, delta, nominal_patients)
    if policy.max_clip_norm is not None and clip_norm > policy.max_clip_norm:
        raise _refusal(
            "clip-norm-over-policy",
            f"the plan clips at {clip_norm:g}, this site's policy permits at most {policy.max_clip_norm:g}",
        )


def _admit_private(policy: SitePolicy, epsilon: float, delta: float, nominal_patients: int) -> None:
    if nominal_patients < policy.min_nominal_patients:
        raise _refusal(
            "too-few-patients",
            (
                f"the site's nominal number of patients is {nominal_patients}, its policy requires at least "
                f"{policy.min_nominal_patients}"
            ),
        )
    if epsilon > policy.epsilon_per_run:
        most = policy.epsilon_per_run
        raise _refusal(
            "epsilon-over-policy",
            (
                f"the plan costs epsilon {epsilon_text(epsilon)}, this site's policy permits at most "
                f"{most:.4g} per run"
            ),
        )
    if delta > policy.max_delta:
        raise _refusal(
            "delta-over-policy",
            f"the plan asks for delta {delta:g}, this site's policy permits at most {policy.max_delta:g}",
        )


def admit_void(policy: SitePolicy) -> None:
    """Admit a private arm although these patients train, or trained, without noise: for an observer of both
    models no epsilon holds.

    Raises:
        RefusedError: code `cohort-void`.
    """
    if policy.after_non_private == "refuse":
        reason = "this site's patients trained without noise, or do so in this plan: no epsilon would hold"
        raise RefusedError(
            reason,
            code="cohort-void",
            public_reason=reason,
            hint="leave out the arms without noise; or policy.yaml: after_non_private: void",
        )


def admit_hours(policy: SitePolicy, now: datetime) -> None:
    """Admit work that begins at `now`, in the hospital's local time, or refuse it. Work that has begun is
    finished.

    Raises:
        RefusedError: code `outside-hours`; the public reason repeats the rule, and tells neither the time
            here nor the place.
    """
    if policy.hours is None:
        return
    start, end = (time.fromisoformat(part) for part in policy.hours.split("-"))
    moment = now.time().replace(tzinfo=None)
    within = start <= moment < end if start < end else moment >= start or moment < end
    if not within:
        raise _refusal("outside-hours", f"this site's policy permits work at {policy.hours} local time only")


def in_plain_words(epsilon: float, delta: float, unit: Unit = "patient") -> str:
    """What (epsilon, delta) per patient, or per study, means to somebody who has never met the letters.

    A guesser who knows everything else and tosses a fair coin for whether the patient took part is right with
    probability at most (exp(epsilon) + delta) / (1 + exp(epsilon)).
    Reference: Kairouz, Oh, Viswanath 2015 (arXiv 1311.0776), the trade-off region of (epsilon, delta).
    """
    if not math.isfinite(epsilon):
        return f"no limit: whether one {unit} took part may become certain"
    right = 100 * (1 - (1 - delta) / (1 + math.exp(min(epsilon, 700.0))))
    shown = f"{math.ceil(right)}" if right <= 99 else f"{math.ceil(right * 100) / 100:g}"
    text = (
        f"who sees all that is sent and guesses whether one {unit} took part is right at most {shown} "
        "times in 100 (a coin: 50)"
    )
    if right > 99:
        text += "; so the promise alone says little, although known attacks do far worse than it allows"
    return text


def evaluation_mode(policy: SitePolicy, kind: SiteKind, noise_multiplier: float | None) -> EvaluationMode:
    """How this site is scored: as loosely as its policy permits, and no looser; or refuse.

    A public or synthetic site has no patients to protect: it is scored exactly unless its policy says
    none. A hospital is scored exactly only where its policy says `disclosed`, and with noise where it says
    `dp`.

    Args:
        noise_multiplier: of the plan's evaluation; None where the plan asks for none with noise.
    Raises:
        RefusedError: code `evaluation-not-permitted`.
    """
    if kind != "hospital" and policy.evaluation != "none":
        return "synthetic"
    if policy.evaluation == "disclosed":
        return "disclosed"
    if policy.evaluation != "dp":
        raise _refusal(
            "evaluation-not-permitted",
            f"this site's policy permits evaluation '{policy.evaluation}': its patients are not scored",
        )
    if noise_multiplier is None:
        raise _refusal(
            "evaluation-not-permitted",
            "this site is scored only with noise, and the plan has no privacy.evaluation_noise_multiplier",
        )
    return "dp"


def admit_noised_evaluation(
    policy: SitePolicy, *, epsilon: float, delta: float, nominal_patients: int
) -> None:
    """Admit an evaluation with noise, or refuse it. What is left of the lifetime budget is the ledger's to
    decide.

    Args:
        epsilon, delta: what the whole run costs a patient of this site.
        nominal_patients: the public bucket the operator picked.
    Raises:
        RefusedError: codes `too-few-patients`, `epsilon-over-policy`, `delta-over-policy`.
    """
    _admit_private(policy, _positive("epsilon", epsilon), _positive("delta", delta), nominal_patients)


def _refusal(code: str, reason: str) -> RefusedError:
    return RefusedError(
        reason,
        code=code,
        public_reason=reason,
        hint="make the plan stricter, or let the hospital change policy.yaml",
    )


def _positive(name: str, value: float | None) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(
            f"a private arm needs {name} to be a finite number above 0, found {value!r}",
            code="bad-privacy-parameters",
        )
    return float(value)
