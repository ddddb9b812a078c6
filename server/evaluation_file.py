"""The content of evaluation.json, key by key, and how it is checked when it is written and read.

A number that could not be computed is null. `schema` changes where a key changes its meaning or goes; a new
key does not change it.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.strict import describe_validation, hidden_text

SCHEMA = 2
"""1, unwritten, was without `schema`: macro scores of whatever artifacts had an AUROC, with Wald intervals.
"""

_STRICT = with_config(ConfigDict(strict=True, extra="allow", allow_inf_nan=False))
Number = float | None


@_STRICT
class Interval(TypedDict):
    """A number and its 95 % interval."""

    value: Number
    low: Number
    high: Number
    standard_error: Number


@_STRICT
class Score(Interval):
    """A macro AUROC, or a mean of such; the interval is symmetric on the logit scale."""

    logit: Number
    logit_standard_error: Number


@_STRICT
class Contrast(Interval):
    """`arm` less `other`, paired over patients; the interval is symmetric."""

    arm: str
    other: str
    where: str
    family: Literal["overall", "sites"]  # of the differences that Holm's correction counts
    p: Number  # two-sided
    p_holm: Number  # over the family


@_STRICT
class Worst(Score):
    """The training site with the lowest score, over the artifacts that all of them can estimate."""

    site: str | None
    of: int  # training sites with a score
    artifacts: list[str]
    if_equal: Number  # what the lowest of `of` equal sites with these standard errors would show on average


@_STRICT
class Common(TypedDict):
    """Scores over the artifacts that every site can estimate: comparable between places."""

    artifacts: list[str]
    scores: dict[str, dict[str, Score]]


@_STRICT
class Gap(TypedDict):
    """An artifact that is in no macro score of a site."""

    site: str
    artifact: str
    reason: Literal["n0", "one_class", "one_patient", "noise"]
    n_pos: int | None
    n_neg: int | None


@_STRICT
class BelowChance(TypedDict):
    """An AUROC significantly below 0.5 (one-sided, Holm over all AUROCs of the run)."""

    site: str
    model: str
    artifact: str
    auroc: float
    p: float
    p_holm: float


@_STRICT
class GeneralizationGap(Interval):
    """An arm at the held-out sites less at its training sites, over the artifacts that all of them estimate.

    Patients of both are others, so the interval is that of two independent means, given these hospitals.
    """

    artifacts: list[str]
    home: Number
    unseen: Number
    held_out: int  # sites with a score
    next_low: Number  # prediction interval of the next hospital's observed score; null of fewer than three
    next_high: Number


@_STRICT
class Looks(TypedDict):
    """How many tests each family of Holm's correction counts."""

    overall: int
    sites: int
    below_chance: int


@_STRICT
class ArtifactRow(TypedDict):
    """The AUROC of one artifact for one model at one site; `n_*_estimate` where noise hides the numbers."""

    auroc: Number
    low: Number
    high: Number
    n_pos: int | None
    n_neg: int | None
    n_pos_estimate: NotRequired[int]
    n_neg_estimate: NotRequired[int]
    n_deviation: NotRequired[float]
    crowded: NotRequired[bool]  # one coarse bin holds more than a fifth of a class
    reason: NotRequired[str]


@_STRICT
class SiteRow(TypedDict):
    site: str
    kind: str
    role: Literal["training", "held_out"]
    nominal_patients: int
    stand_in: str
    unit: NotRequired[str]  # of what is scored: a patient or a study
    nominal_tested: NotRequired[int]  # of a hospital: the nominal number of its test patients
    version: str


@_STRICT
class Refusal(TypedDict):
    code: str
    reason: str


@_STRICT
class Claim(TypedDict):
    """What a site was promised, or why it refused."""

    unit: str
    adjacency: str
    epsilon: Number
    epsilon_pld: Number
    delta: Number
    noise_multiplier: Number
    refused: Refusal | None
    void: NotRequired[str]


@_STRICT
class CurvePoint(TypedDict):
    round: int
    loss: Number
    auroc: Number


@_STRICT
class AnyArtifact(TypedDict):
    """Patients with any of some artifacts, see common/any_artifact.py; sites that did not count them are
    missing.
    """

    artifacts: list[str]  # that are combined; none: fewer than two
    counts: dict[str, dict[str, Any]]  # site -> model
    matrix: dict[str, dict[str, ArtifactRow]]  # model -> site


@_STRICT
class SubgroupRow(TypedDict):
    """An AUROC in one level of a subgroup."""

    place: str  # home or unseen: `sites` together; else the site
    sites: list[str]
    artifact: str
    subgroup: str
    level: str
    n_pos: int
    n_neg: int
    auroc: Number
    low: Number
    high: Number
    reason: NotRequired[str]


@_STRICT
class SubgroupDifference(TypedDict):
    """`level` less `other` of a subgroup, at the sites of a place together."""

    place: str
    artifact: str
    subgroup: str
    level: str
    other: str
    value: float
    low: float
    high: float
    p: Number
    p_holm: Number  # over all of the arm


@_STRICT
class Subgroups(TypedDict):
    """Scores in subgroups of patients, see server/evaluation/subgroups.py. The sums that they follow from are
    in the answers of the sites.
    """

    sites: list[str]  # that counted them
    rows: dict[str, list[SubgroupRow]]  # arm ->
    differences: dict[str, list[SubgroupDifference]]  # arm ->


@_STRICT
class Evaluation(TypedDict):
    """All of evaluation.json."""

    schema: Literal[2]
    run: str
    plan: str
    question: str
    seed: int
    status: str
    rounds: int
    epochs: int
    arms: list[str]
    private_arms: list[str]
    sites: list[SiteRow]
    privacy: dict[str, Claim]
    curves: dict[str, list[CurvePoint]]  # model -> on the coordinator's public set
    chosen_rounds: dict[str, int]
    refusals: list[str]
    incomplete: list[str]
    cpu_seconds: float
    seconds: float
    scoring: dict[str, dict[str, Any]]  # site -> mode, price of the noise
    edges: NotRequired[dict[str, dict[str, list[float]]]]  # model -> artifact -> between the bins
    public_counts: NotRequired[dict[str, dict[str, Any]]]  # model -> of the public set, in fine bins
    counts: dict[str, dict[str, Any]]  # site -> model -> the sums as they were sent
    covariance: dict[str, dict[str, Any]]  # site -> of the AUROCs of all models
    averaged: dict[str, list[str]]  # site -> the artifacts in its macro AUROC
    missing: list[Gap]
    metrics: dict[str, dict[str, dict[str, ArtifactRow]]]  # arm -> site -> artifact
    matrix: dict[str, dict[str, dict[str, ArtifactRow]]]  # model -> site -> artifact
    model_scores: dict[str, dict[str, Score]]  # model -> site
    scores: dict[str, dict[str, Score]]  # arm -> home, elsewhere, unseen or a site
    headline: dict[str, dict[str, Number] | None]  # arm -> home, elsewhere, unseen, worst
    worst: dict[str, Worst]
    common: Common | None  # None: all sites average the same artifacts
    contrasts: list[Contrast]
    below_chance: list[BelowChance]
    generalization_gap: NotRequired[dict[str, GeneralizationGap]]  # arm ->
    any_artifact: NotRequired[AnyArtifact]
    subgroups: NotRequired[Subgroups]
    any_public: NotRequired[dict[str, dict[str, Any]]]  # model -> edges, counts of the public set
    looks: Looks
    labels: NotRequired[str]
    evaluates: NotRequired[dict[str, Any]]  # of an evaluation by itself: run, models by digest, who trained
    unlearned: NotRequired[dict[str, list[str]]]  # model -> outputs that no training touched: no score tells
    data_changed: NotRequired[list[str]]
    alternatives: NotRequired[bool]


LATER_KEYS = ("generalization_gap", "any_artifact", "subgroups")
"""Keys that follow from the counts, and that a file of an earlier version may lack."""


def artifacts_of(evaluation: Evaluation) -> tuple[str, ...]:
    """The outputs of a run's models, in the order of the vocabulary."""
    found = next(iter(evaluation["covariance"].values()), None)
    return tuple(found["artifacts"]) if found else DEFAULT_LABELS


_ADAPTER: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)


def checked(values: object, where: str) -> Evaluation:
    """The same values, once they are what evaluation.json holds.

    Args:
        values: read from JSON.
        where: the file, for the message.
    Raises:
        ConfigError: another schema (code `old-evaluation`), or a key is missing or has a wrong value
            (`wrong-evaluation`). One line.
    """
    schema = values.get("schema") if isinstance(values, dict) else None
    if isinstance(values, dict) and schema != SCHEMA:
        found = "has no `schema`: an earlier version wrote it" if schema is None else f"has schema {schema!r}"
        raise ConfigError(
            f"{where}: {found}; this version reads schema {SCHEMA}",
            code="old-evaluation",
            hint="read it with the version that wrote it (manifest.json names it), or run the plan again",
        )
    try:
        _ADAPTER.validate_python(values)
        wrong = hidden_text(values)
    except ValidationError as error:
        wrong = describe_validation(error)
    if wrong:
        raise ConfigError(
            f"{where}: {wrong}",
            code="wrong-evaluation",
            hint="restore the file as fedqc wrote it; fedqc verify RUN checks a run",
        )
    return cast(Evaluation, values)
