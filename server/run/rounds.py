"""The rounds of an arm: send the model, validate answers, aggregate, save; then the evaluation of all models.

Flower's `Strategy.start` has no checkpoint, no resume, no quorum, and a wholly failed run ends "completed";
so this loop is ours, on Flower's Message API.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.any_artifact import ANY
from common.arms import ARMS, Arm
from common.counts import BINS, DISCLOSED_BINS, PROBABILITY_EDGES, Counts, noise_deviation
from common.errors import FedqcError, RefusedError, RunError
from common.estimability import Estimability, estimability
from common.lineage import Lineage
from common.model_file import load_model
from common.plan import RunPlan
from common.trainable import trained_part
from common.weights import Manifest, Part, advance, digest, encode_floats, encode_steps, part_size
from common.wire import EvaluateTask, Refusal, SiteEvaluation, SiteUpdate, TrainTask
from server.evaluation.estimates import SiteScores, Study
from server.evaluation.noised import NoisedCounts, covariance, sampling_deviations
from server.messaging.answer_checks import check_evaluation, check_update
from server.messaging.flower import Grid
from server.messaging.requests import Answer, Site, ask
from server.messaging.signatures import Question, Seal
from server.public_model.public_set import PublicBins
from server.run.choice import MEAN, choice_of
from server.run.observers import (
    Observer,
    RoundClosed,
    ScoresTurnedAway,
    SiteAnswered,
    StageBegan,
    StageEndedEarly,
)
from server.run_folder import ArmFolder, mean_of
from server.strategies.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What all stages of a run share."""

    grid: Grid
    seal: Seal
    plan: RunPlan
    run: str  # name of the run, as it stands in every message
    manifest: Manifest
    initial: np.ndarray  # float32 (parameters,): where every arm starts
    strategy: Strategy
    score_public: Callable[[np.ndarray], dict[str, float]]  # the coordinator's own measurement of a model
    # between which scores of a model patients are counted
    public_bins: Callable[[np.ndarray], PublicBins]
    observe: Observer
    lineage: Lineage | None = None  # of `initial`; None: unknown


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arm at one group of sites: what is trained by rounds."""

    arm: str  # a name in ARMS
    name: str  # of its model: the arm, or arm/site
    sites: Sequence[Site]
    folder: ArmFolder

    @property
    def kind(self) -> Arm:
        return ARMS[self.arm]


@dataclass(kw_only=True)
class StageResult:
    """Outcome of the rounds of one stage."""

    weights: np.ndarray  # float32 (parameters,), after the last round
    refused: dict[str, Refusal] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # site -> code of its last failure
    # site -> what its private updates guarantee
    claims: dict[str, dict[str, Any]] = field(default_factory=dict)
    # sites whose data changed during the run, which their operators accepted
    data_changed: set[str] = field(default_factory=set)


class StageRefused(RefusedError):
    """Every site refused a stage. Carries what its earlier rounds did: what was spent stays spent."""

    def __init__(self, message: str, *, code: str, public_reason: str, result: StageResult) -> None:
        super().__init__(message, code=code, public_reason=public_reason)
        self.result = result


def run_rounds(context: RunContext, stage: Stage) -> StageResult:
    """Run the rounds of a stage, from its last checkpoint or from `context.initial`, to the plan's last, or
    to where it ends early.

    Raises:
        StageRefused: every site refused, before or at this round; carries the reason that decided, the last.
        RunError: fewer valid answers than the quorum, which is the plan's or all sites of a smaller stage
            (code `no-quorum`).
    """
    plan, folder, rounds = context.plan, stage.folder, context.plan.training.rounds
    start = folder.last_round()
    folder.forget_rounds_after(start)
    result = result_so_far(context, stage)
    trainable = trained_part(plan, stage.arm)
    size = part_size(trainable)
    strategy = context.strategy
    state = (
        strategy.state_from_checkpoint(folder.load_state(start)) if start else strategy.initial_state(size)
    )
    context.observe(
        StageBegan(
            stage=stage.name,
            sites=tuple(site.name for site in stage.sites),
            rounds=rounds,
            rounds_done=start,
        )
    )
    outgoing = _Model(plan.federation.codec, trainable, result.weights)
    choice, mean = choice_of(plan, stage.arm), mean_of(plan, stage.arm)
    for number in range(start + 1, rounds + 1):
        if choice.has_ended(folder.rounds()):
            best = choice.best(folder.rounds())
            reason = f"{stage.name}: ended after round {number - 1}, none better in public since round {best}"
            context.observe(StageEndedEarly(reason=reason, rounds_left=rounds - number + 1))
            break
        began = time.monotonic()
        invited = {site.node: site for site in stage.sites if site.name not in result.refused}
        this = _Round(context, stage, number, invited=invited, model=outgoing)
        answers = ask(
            context.grid,
            context.seal,
            list(invited),
            functools.partial(this.question, context.seal),
            "train",
            deadline_s=plan.federation.deadline_s,
            patience_s=plan.federation.patience_s,
            again=_lacks_base,
        )
        for answer in answers:
            context.observe(
                SiteAnswered(stage=stage.name, round=number, rounds=rounds, site=invited[answer.node].name)
            )
            this.take(answer)
        this.close()
        result.refused |= this.refused
        result.failed |= this.failed
        result.claims |= this.claims
        result.data_changed |= this.data_changed
        _check_quorum(context, stage, this, result)
        steps, state = strategy.aggregate(state, this.updates)
        result.weights = outgoing.advance(steps, held_by=this.weights)
        record = this.record() | {
            "round_seconds": round(time.monotonic() - began, 3),
            "model_sha256": digest(result.weights),
            "public": context.score_public(result.weights),
        }
        if choice.needs_scores and mean.is_mean:
            model = folder.model_of(number, context.manifest, mean, newest=result.weights)
            record[MEAN] = context.score_public(model)
        folder.append_round(record)
        folder.save_state(number, strategy.state_to_checkpoint(state))
        folder.save_checkpoint(number, result.weights, context.manifest)
        context.observe(RoundClosed(stage=stage.name, round=number, rounds=rounds, record=record))
    return result


def result_so_far(context: RunContext, stage: Stage) -> StageResult:
    """The outcome of the finished rounds of a stage, from its folder."""
    folder = stage.folder
    start = folder.last_round()
    result = StageResult(
        weights=load_model(folder.checkpoint_path(start), context.manifest)
        if start
        else context.initial.copy()
    )
    for record in folder.rounds():
        result.refused |= {
            site: Refusal.model_validate(refusal) for site, refusal in record["refused"].items()
        }
        result.failed |= record["failed"]
        result.claims |= record["claims"]
        result.data_changed |= set(record.get("data_changed", ()))
    return result


def _check_quorum(context: RunContext, stage: Stage, this: _Round, result: StageResult) -> None:
    quorum = min(context.plan.federation.quorum, len(stage.sites))
    if len(this.weights) >= quorum:
        return
    if not this.weights and len(result.refused) == len(stage.sites):
        # who refused before left enough sites behind; without an answer in this round, the last one decided
        site, last = list((this.refused or result.refused).items())[-1]
        when = f"round {this.number}: " if this.number > 1 else ""
        raise StageRefused(
            f"{stage.arm}: every site refused: {when}{last.reason}",
            code=last.code,
            public_reason=f"{when}{last.reason} [{last.code}, {site}]",
            result=result,
        )
    missing = {name: refusal.code for name, refusal in result.refused.items()} | this.failed
    sites = ", ".join(f"{name} {code}" for name, code in sorted(missing.items()))
    raise RunError(
        f"{stage.arm}, round {this.number}: {len(this.weights)} valid answers, the quorum is {quorum} "
        f"({sites})",
        code="no-quorum",
        hint="fedqc run resume continues once the sites are back",
    )


class _Round:
    """One round: the task for each site, and the answers."""

    def __init__(
        self, context: RunContext, stage: Stage, number: int, *, invited: dict[int, Site], model: _Model
    ) -> None:
        self._folder = stage.folder
        self._plan, self._invited, self._model = context.plan, invited, model
        self.number = number
        self._task = TrainTask(
            run=context.run,
            arm=stage.arm,
            round=number,
            private=stage.kind.private,
            base_sha256=model.sha256,
            lineage=context.lineage.text() if context.lineage and stage.kind.private else "",
            base=np.zeros(0, np.float32),
        )
        self.updates = context.strategy.accumulate(model.num_trainable)
        self.weights: dict[str, int] = {}
        self.refused: dict[str, Refusal] = {}
        self.failed: dict[str, str] = {}
        self.claims: dict[str, dict[str, Any]] = {}
        self.data_changed: set[str] = set()
        self._seconds: dict[str, float] = {}
        self._variances: dict[str, float] = {}
        self._moved = {"down": 0, "up": 0}

    def question(self, seal: Seal, node: int, attempt: int) -> Question:
        site, task = self._invited[node].name, self._task
        payload = self._model.payload(task, whole=attempt > 0 or not self._model.is_held_by(site))
        self._moved["down"] += len(payload)
        return seal.question(
            task,
            payload,
            site=site,
            run=task.run,
            arm=task.arm,
            round=task.round,
            base_sha256=task.base_sha256,
        )

    def take(self, answer: Answer) -> None:
        site = self._invited[answer.node]
        self._seconds[site.name] = round(answer.seconds, 3)
        try:
            update = _accept(answer)
            steps = check_update(
                update,
                self._task,
                self._task.base_sha256,
                site.description,
                self._model.num_trainable,
                self._plan,
            )
        except RefusedError as refusal:
            if refusal.code in PASSING:
                self.failed[site.name] = refusal.code
            else:
                self.refused[site.name] = Refusal(
                    site=site.name, run=self._task.run, code=refusal.code, reason=refusal.public_reason
                )
        except FedqcError as failure:
            self.failed[site.name] = failure.code
        else:
            self._folder.keep_answer(self.number, site.name, answer.envelope)
            self.updates.add(steps, update.weight)
            self.weights[site.name] = update.weight
            self._moved["up"] += len(answer.payload)
            if update.data_changed:
                self.data_changed.add(site.name)
            if update.added_variance:
                self._variances[site.name] = update.added_variance
            if update.epsilon is not None and update.delta is not None:
                self.claims[site.name] = {
                    "noise_multiplier": update.noise_multiplier,
                    "epsilon": update.epsilon,
                    "delta": update.delta,
                    "unit": site.description.unit,
                    **({"void": True} if update.void else {}),
                }

    def close(self) -> None:
        self.failed |= {
            site.name: "no-answer" for site in self._invited.values() if site.name not in self._seconds
        }

    def record(self) -> dict[str, Any]:
        """What rounds.jsonl keeps."""
        return {
            "round": self._task.round,
            "invited": [site.name for site in self._invited.values()],
            "answered": sorted(self.weights),
            "refused": {name: refusal.model_dump(mode="json") for name, refusal in self.refused.items()},
            "failed": self.failed,
            "claims": self.claims,
            "weights": self.weights,
            "bytes": self._moved,
            "added_variance": self._variances,
            "seconds": self._seconds,
            **({"data_changed": sorted(self.data_changed)} if self.data_changed else {}),
        }


PASSING = ("outside-hours", "base-not-held", "approval-expired")
"""Refusals that may hold for one round only: the site is asked again in the next."""


class _Model:
    """The model of an arm on its way to the sites, as small as what each of them holds allows."""

    def __init__(self, codec: str, trainable: Part, weights: np.ndarray) -> None:
        self._codec, self._trainable, self._weights = codec, trainable, weights
        self._step: np.ndarray | None = None
        self._before = ""
        self._holders: set[str] = set()
        self._payloads: dict[bool, bytes] = {}

    @property
    def sha256(self) -> str:
        return digest(self._weights)

    @property
    def num_trainable(self) -> int:
        return part_size(self._trainable)

    def is_held_by(self, site: str) -> bool:
        """Whether `site` trained from the model before this one, so that the step from there is enough."""
        return self._step is not None and site in self._holders

    def payload(self, task: TrainTask, *, whole: bool) -> bytes:
        """The bytes of `task` with the model as a frame; made once a round for all sites."""
        if self._codec == "plain":
            whole = True
        if whole not in self._payloads:
            if self._codec == "plain":
                put: dict[str, Any] = {"base": self._weights}
            elif whole:
                put = {"base": encode_floats(self._weights)}
            else:
                assert self._step is not None
                put = {"base": encode_steps(self._step), "held_sha256": self._before}
            self._payloads[whole] = task.model_copy(update=put).to_bytes()
        return self._payloads[whole]

    def advance(self, steps: np.ndarray, *, held_by: Iterable[str]) -> np.ndarray:
        """Move on by whole grid steps, which every site that holds the model before can do too, bit for
        bit.
        """
        after = self._weights.copy()
        after[self._trainable] = advance(self._weights[self._trainable], steps)
        self._before, self._step, self._holders = digest(self._weights), steps, set(held_by)
        self._weights, self._payloads = after, {}
        return after


def _to_each(seal: Seal, task: EvaluateTask, sites: dict[int, Site]) -> Callable[[int, int], Question]:
    payload, base_sha256 = task.to_bytes(), digest(task.weights)
    return lambda node, attempt: seal.question(
        task, payload, site=sites[node].name, run=task.run, base_sha256=base_sha256
    )


def _lacks_base(answer: Answer) -> bool:
    return answer.kind == "Refusal" and Refusal.from_bytes(answer.payload).code == "base-not-held"


def _accept(answer: Answer) -> SiteUpdate:
    """Raises RefusedError for a site's refusal, RunError for its failure or no valid answer."""
    if answer.failure:
        raise RunError("no valid answer", code=answer.failure)
    if answer.kind == "Refusal":
        refusal = Refusal.from_bytes(answer.payload)
        if refusal.code in FAILURES:
            raise RunError(refusal.reason, code=refusal.code)
        raise RefusedError(refusal.reason, code=refusal.code, public_reason=refusal.reason)
    return SiteUpdate.from_bytes(answer.payload)


FAILURES = (
    *(
        "site-failure",
        "disk-full",
        "bad-signature",
        "wrong-site",
        "wrong-plan",
        "replayed-task",
        "unsigned-task",
    ),
    *("bad-plan", "bad-message", "bad-frame"),
)
"""Codes of a refusal that report a failure, not a decision of the site's policy."""


def _scores_everyone(site: Site, plan: RunPlan) -> bool:
    """Whether a site is scored on all its patients: one that never trains, in this run or a sister, and is no
    hospital.
    """
    return plan.scores_everyone_at(site.name) and site.description.kind != "hospital"


def expected_of(evaluation: SiteEvaluation, nominal_tested: int) -> Estimability | None:
    """What an answer with noise could tell, from the public numbers of its site; None of an exact one.

    Args:
        nominal_tested: 0 where the site, of an earlier version, does not say it: None then, too.
    """
    if evaluation.mode != "dp" or not nominal_tested:
        return None
    models, _, artifacts, _ = evaluation.noised.shape
    return estimability(nominal_tested, evaluation.noise_multiplier, models, artifacts)


def scores_of(evaluation: SiteEvaluation, expected: Estimability | None = None) -> SiteScores:
    """What a checked answer says, by model.

    Args:
        expected: as `expected_of`; where nothing can be told, no AUROC is given. None: it is not asked.
    """
    scoring: dict[str, Any] = {"mode": evaluation.mode}
    if evaluation.mode != "dp":
        bins = DISCLOSED_BINS if evaluation.mode == "disclosed" else BINS
        exact = zip(evaluation.models, evaluation.histograms, strict=True)
        counts = {name: Counts(positives=h[0], negatives=h[1], bins=bins) for name, h in exact}
        return SiteScores(
            counts=counts,
            covariance=_with_bias(evaluation.covariance, list(counts.values())),
            scoring=scoring,
            any_counts={
                name: Counts(positives=h[:1], negatives=h[1:], bins=bins)
                for name, h in zip(evaluation.models, evaluation.any_histograms, strict=False)
            },
            subgroups=dict(zip(evaluation.models, evaluation.subgroups, strict=False)),
        )
    models, _, artifacts, _ = evaluation.noised.shape
    deviation = noise_deviation(evaluation.noise_multiplier, models, artifacts)
    scoring |= {
        "epsilon": evaluation.epsilon,
        "delta": evaluation.delta,
        "noise_multiplier": evaluation.noise_multiplier,
        "deviation": deviation,
    }
    if expected is not None:
        scoring |= {
            "nominal_tested": expected.patients,
            "expected_error": round(expected.error, 4),
            "estimable": expected.is_so,
        }
    is_so = expected is None or expected.is_so
    noised = {
        name: NoisedCounts(positives=h[0], negatives=h[1], deviation=deviation, expected=is_so)
        for name, h in zip(evaluation.models, evaluation.noised, strict=True)
    }
    models = list(noised.values())
    return SiteScores(
        counts=noised,
        covariance=_with_bias(covariance(models), models),
        sampling=sampling_deviations(models),
        scoring=scoring,
    )


def _with_bias(covariance: np.ndarray, models: Sequence[Counts] | Sequence[NoisedCounts]) -> np.ndarray:
    """The covariance of AUROCs plus b b' with the bias b of coarse bins: the variance of a difference of
    models so grows by the square of the difference of their biases.
    """
    bias = np.nan_to_num(np.concatenate([counts.bias() for counts in models]))
    return covariance + np.outer(bias, bias)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the sites of a run said about its models."""

    study: Study
    absent: dict[str, str]  # the sites without a score -> the code of the refusal or failure
    data_changed: set[str]  # the sites whose data changed during the run, which their operators accepted
    edges: dict[str, dict[str, list[float]]]  # model -> artifact -> the public quantiles between the bins
    public_counts: dict[str, dict[str, Any]]  # model -> the coordinator's public patients in fine bins
    any_public: dict[str, dict[str, Any]]  # model -> edges and counts of the same for any artifact


def score_sites(
    context: RunContext,
    hospitals: Sequence[Site],
    models: dict[str, np.ndarray],
    *,
    final: str,
    keep: Callable[[str, bytes], None],
) -> Scored:
    """Have every site score all models in one message, so that comparisons are paired.

    Args:
        models: float32 (parameters,) by name.
        final: the name of the model that each site keeps for its own use; "" for none.
        keep: called with each site and its counted answer, as it was signed.
    Raises:
        RunError: no site answered.
    """
    plan = context.plan
    training = [site.name for site in hospitals if plan.trains_at(site.name)]
    baselines = [f"{arm}/{site}" for arm in plan.arms if ARMS[arm].baseline for site in training]
    names = (*models, *baselines)
    weights = np.stack(list(models.values()))
    scored: dict[str, SiteScores] = {}
    data_changed: set[str] = set()
    absent = {site.name: "no-answer" for site in hospitals}
    bins = [context.public_bins(flat) for flat in weights]
    probabilities = np.tile(PROBABILITY_EDGES, (len(plan.model.labels), 1))
    edges = np.stack([*(one.edges for one in bins), *(probabilities for _ in baselines)])
    any_edges = np.stack([one.any_edges for one in bins])
    for everyone in (False, True):
        asked = {site.node: site for site in hospitals if _scores_everyone(site, plan) == everyone}
        if not asked:
            continue
        task = EvaluateTask(
            run=context.run,
            models=names,
            everyone=everyone,
            final=final,
            weights=weights,
            edges=edges,
            any_edges=any_edges,
            subgroups=True,
        )
        answers = ask(
            context.grid,
            context.seal,
            list(asked),
            _to_each(context.seal, task, asked),
            "evaluate",
            deadline_s=plan.federation.deadline_s,
            patience_s=plan.federation.patience_s,
        )
        for answer in answers:
            site = asked[answer.node]
            try:
                if answer.kind == "Refusal":
                    absent[site.name] = Refusal.from_bytes(answer.payload).code
                    continue
                evaluation = SiteEvaluation.from_bytes(answer.payload)
                check_evaluation(evaluation, task, site.description, plan)
            except RunError as failure:
                absent[site.name] = answer.failure or failure.code
                if not answer.failure:
                    context.observe(ScoresTurnedAway(code=failure.code, reason=failure.message))
                continue
            keep(site.name, answer.envelope)
            could = expected_of(evaluation, site.description.nominal_tested)
            scored[site.name] = scores_of(evaluation, could)
            if evaluation.data_changed:
                data_changed.add(site.name)
    if not scored:
        raise RunError(
            "no site could be scored", code="no-evaluation", hint="the sites' logs and policies say why"
        )
    study = study_of(plan, [site.name for site in hospitals], scored, names)
    return Scored(
        study=study,
        absent={site: code for site, code in absent.items() if site not in scored},
        data_changed=data_changed,
        edges={
            model: dict(zip(plan.model.labels, rows.astype(float).tolist(), strict=True))
            for model, rows in zip(names, edges, strict=True)
        },
        public_counts={
            model: one.counts.to_json(plan.model.labels) for model, one in zip(models, bins, strict=True)
        },
        any_public={
            model: {
                "edges": one.any_edges.astype(float).tolist(),
                "counts": one.any_counts.to_json([ANY])[ANY],
            }
            for model, one in zip(models, bins, strict=True)
            if one.any_edges.size
        },
    )


def study_of(
    plan: RunPlan, sites: Sequence[str], scored: Mapping[str, SiteScores], models: Sequence[str]
) -> Study:
    """What the sites' scores say together.

    Args:
        sites: every hospital of the run, in its order; those without a score are left out.
    """
    return Study(
        sites={site: scored[site] for site in sites if site in scored},
        training=[site for site in sites if plan.trained_at(site)],
        held_out=list(plan.held_out) or [site for site in sites if not plan.trained_at(site)],
        models=list(models),
        artifacts=plan.model.labels,
    )
