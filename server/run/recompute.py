"""Recompute a finished run from the answers that its sites signed, and compare with what the run folder says.

Nothing in the run folder is believed but the answers: the weights of each round are aggregated again from
the sites' updates, from the plan's starting weights on, and compared bit for bit. With the sites' public keys
it is also checked that each answer is the site's, to this round of this run, from this model. That the
numbers in an answer are honest cannot be checked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.arms import ARMS, Arm
from common.errors import FedqcError, RunError
from common.model_file import load_model
from common.models import network_of
from common.names import SiteKind
from common.plan import ReleasedModel
from common.signing import Statement, parse_public, payload_sha256, verify
from common.trainable import trained_part
from common.weights import Manifest, Part, advance, digest, manifest_of, part_size
from common.wire import Envelope, EvaluateTask, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask
from server.evaluation.estimates import report_numbers
from server.evaluation_file import LATER_KEYS
from server.messaging.answer_checks import check_evaluation, check_update
from server.run.choice import choice_of
from server.run.conduct import initial_weights
from server.run.rounds import expected_of, scores_of, study_of
from server.run_folder import EVALUATION, ArmFolder, RunFolder, mean_of, without_nan
from server.strategies import strategy_named


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check: what was looked at, whether it holds, and what does not."""

    check: str
    holds: bool | None  # None: it could not be looked at
    detail: str = ""


def recompute(folder: RunFolder) -> list[Finding]:
    """Every check of a run, in the order of its arms.

    Raises:
        ConfigError: the plan's starting weights are missing or others than the plan says.
    """
    plan = folder.plan
    manifest = manifest_of(network_of(plan.model).state_dict())
    initial = initial_weights(plan, manifest)
    found = [_plan_of(folder)]
    keys = {name: parse_public(text) for name, text in folder.manifest.get("keys", {}).items()}
    about = {site["site"]: site for site in folder.manifest["sites"]}
    if not keys:
        found.append(
            Finding(
                check="signatures", holds=None, detail="a simulation: no site has a key, nothing is signed"
            )
        )
    for stage in _stages(folder, about):
        stage_found = _Recomputed(folder, stage, about, keys, manifest, initial).finding()
        found.append(stage_found)
        if stage_found.holds is not None and stage.folder.model_path.is_file():
            found.append(_model_of(folder, stage, manifest))
    if plan.evaluate is not None:
        found += [_released(folder, model, manifest) for model in plan.evaluate.models]
    if (folder.path / EVALUATION).is_file():
        found.append(_scores_of(folder, about, keys))
    return found


def _released(folder: RunFolder, model: ReleasedModel, manifest: Manifest) -> Finding:
    """Whether a model of an evaluation by itself is the one that its plan names."""
    arm, _, site = model.name.partition("/")
    try:
        holds = digest(load_model(folder.arm(arm, site or None).model_path, manifest)) == model.sha256
    except FedqcError as failure:
        return Finding(check=f"{model.name}, model", holds=False, detail=failure.message)
    detail = "by its digest the one that the plan names" if holds else "has another digest than in the plan"
    return Finding(check=f"{model.name}, model", holds=holds, detail=detail)


def _scores_of(
    folder: RunFolder, about: Mapping[str, Mapping[str, Any]], keys: Mapping[str, Ed25519PublicKey]
) -> Finding:
    """Whether the numbers of evaluation.json follow from the scores that the sites signed."""
    noted, kept = folder.evaluation, folder.kept_scores()
    if missing := sorted(set(noted["counts"]) - set(kept)):
        detail = f"the scores of {', '.join(missing)} were not kept"
        return Finding(check="evaluation", holds=None, detail=detail)
    scored, models = {}, tuple(noted["matrix"])
    asked = EvaluateTask(
        run=folder.manifest["run"], models=models, everyone=False, weights=np.zeros((0, 0), np.float32)
    )
    for site in noted["counts"]:
        try:
            envelope = Envelope.from_bytes(kept[site])
            if keys:
                expected = {"kind": SiteEvaluation.__name__, "run": folder.manifest["run"]}
                _check_signature(envelope, site, keys, expected | {"plan_sha256": folder.plan.sha256()})
            answer = SiteEvaluation.from_bytes(envelope.payload)
            check_evaluation(answer, asked, _description(about.get(site), site), folder.plan)
            could = expected_of(answer, about.get(site, {}).get("nominal_tested", 0))
            scored[site] = scores_of(answer, could)
        except FedqcError as failure:
            return Finding(check="evaluation", holds=False, detail=failure.message)
    numbers = without_nan(
        report_numbers(study_of(folder.plan, list(about), scored, models), folder.plan.scored_arms)
    )
    known = {name: value for name, value in numbers.items() if name in noted or name not in LATER_KEYS}
    if wrong := [name for name, value in known.items() if json.dumps(value) != json.dumps(noted.get(name))]:
        detail = f"not what the sites' scores give: {', '.join(wrong)}"
        return Finding(check="evaluation", holds=False, detail=detail)
    return Finding(
        check="evaluation", holds=True, detail=f"recomputed from the scores of {len(scored)} sites"
    )


def _model_of(folder: RunFolder, stage: _Stage, manifest: Manifest) -> Finding:
    """Whether the rounds of a stage ended, and the model is that of the round, where the public scores in its
    records say.
    """
    check = f"{stage.name}, model"
    noted = (
        folder.evaluation["chosen_rounds"].get(stage.name) if (folder.path / EVALUATION).is_file() else None
    )
    if noted is None:
        return Finding(check=check, holds=None, detail="the run is not finished")
    records, choice = stage.folder.rounds(), choice_of(folder.plan, stage.arm)
    ends = [number for number in range(1, len(records) + 1) if choice.has_ended(records[:number])]
    if ends != [len(records)]:
        ended = f"after round {ends[0]}" if ends else "later"
        detail = f"{len(records)} rounds, but by plan and public scores it ends {ended}"
        return Finding(check=check, holds=False, detail=detail)
    chosen, mean = choice.chosen(records), mean_of(folder.plan, stage.arm)
    what = mean.words(chosen)
    if noted != chosen:
        detail = f"of {mean.words(noted)}, but the public scores choose {what}"
        return Finding(check=check, holds=False, detail=detail)
    model = load_model(stage.folder.model_path, manifest)
    holds = bool(np.array_equal(model, stage.folder.model_of(chosen, manifest, mean)))
    detail = f"of {what}" if holds else f"is not the checkpoint of {what}"
    return Finding(check=check, holds=holds, detail=detail)


def _plan_of(folder: RunFolder) -> Finding:
    noted = folder.manifest.get("plan_sha256")
    return Finding(
        check="plan",
        holds=noted == folder.plan.sha256(),
        detail="" if noted == folder.plan.sha256() else "plan.yaml is not the plan that the manifest names",
    )


@dataclass(frozen=True, kw_only=True)
class _Stage:
    arm: str
    name: str
    folder: ArmFolder

    @property
    def kind(self) -> Arm:
        return ARMS[self.arm]


def _stages(folder: RunFolder, about: Mapping[str, Mapping[str, Any]]) -> Iterator[_Stage]:
    for arm in (arm for arm in folder.plan.arms if ARMS[arm].by_rounds):
        if ARMS[arm].trainer == "each site":
            for site in sorted(name for name, one in about.items() if one["role"] == "training"):
                yield _Stage(arm=arm, name=f"{arm}/{site}", folder=folder.arm(arm, site))
        else:
            yield _Stage(arm=arm, name=arm, folder=folder.arm(arm))


class _Recomputed:
    """The rounds of one stage, aggregated again."""

    def __init__(
        self,
        folder: RunFolder,
        stage: _Stage,
        about: Mapping[str, Mapping[str, Any]],
        keys: Mapping[str, Ed25519PublicKey],
        manifest: Manifest,
        initial: np.ndarray,
    ) -> None:
        self._run, self._plan, self._stage = str(folder.manifest["run"]), folder.plan, stage
        self._about, self._keys, self._manifest, self._weights = about, keys, manifest, initial

    def finding(self) -> Finding:
        """The first thing that does not hold, or that all rounds do."""
        stage, records = self._stage, self._stage.folder.rounds()
        if not records:
            return Finding(check=stage.name, holds=None, detail="not trained")
        strategy = strategy_named(self._plan.training.strategy)
        trainable = trained_part(self._plan, stage.arm)
        state = strategy.initial_state(part_size(trainable))
        for number, record in enumerate(records, start=1):
            if record["round"] != number:
                return Finding(check=stage.name, holds=False, detail=f"round {number} is missing")
            updates = strategy.accumulate(part_size(trainable))
            try:
                self._take(record, updates, trainable)
            except FedqcError as failure:
                return Finding(check=stage.name, holds=False, detail=f"round {number}: {failure.message}")
            except _NotKept as absent:
                return Finding(check=stage.name, holds=None, detail=f"round {number}: {absent}")
            steps, state = strategy.aggregate(state, updates)
            after = self._weights.copy()
            after[trainable] = advance(self._weights[trainable], steps)
            self._weights = after
            if problem := self._differs(number, record):
                return Finding(check=stage.name, holds=False, detail=f"round {number}: {problem}")
        return Finding(
            check=stage.name, holds=True, detail=f"{len(records)} rounds recomputed, bit for bit the same"
        )

    def _take(self, record: Mapping[str, Any], updates: Any, trainable: Part) -> None:
        """Add every counted answer of a round.

        Raises:
            FedqcError: an answer is not what the record says. _NotKept: there is no answer.
        """
        task = TrainTask(
            run=self._run,
            arm=self._stage.arm,
            round=record["round"],
            private=self._stage.kind.private,
            base_sha256=digest(self._weights),
            base=np.zeros(0, np.float32),
        )
        kept = self._stage.folder.kept_answers(record["round"])
        for site, weight in record["weights"].items():
            if not self._plan.trains_at(site):
                raise RunError(f"{site} was held out, and trained", code="held-out-trained")
            if site not in kept:
                raise _NotKept(f"the answer of {site} was not kept")
            envelope = Envelope.from_bytes(kept[site])
            if self._keys:
                expected = {
                    "kind": SiteUpdate.__name__,
                    "run": task.run,
                    "arm": task.arm,
                    "round": task.round,
                    "plan_sha256": self._plan.sha256(),
                    "base_sha256": task.base_sha256,
                }
                _check_signature(envelope, site, self._keys, expected)
            update = SiteUpdate.from_bytes(envelope.payload)
            steps = check_update(
                update,
                task,
                task.base_sha256,
                _description(self._about.get(site), site, weight),
                part_size(trainable),
                self._plan,
            )
            claim = record["claims"].get(site)
            stated = ("epsilon", "delta", "noise_multiplier")
            if claim and any(getattr(update, name) != claim[name] for name in stated):
                raise RunError(f"the guarantee of {site} is not what rounds.jsonl says", code="bad-update")
            if record.get("added_variance", {}).get(site, 0.0) != update.added_variance:
                raise RunError(
                    f"the added variance of {site} is not what rounds.jsonl says", code="bad-update"
                )
            updates.add(steps, update.weight)

    def _differs(self, number: int, record: Mapping[str, Any]) -> str:
        """What of a round is not as recomputed; "" where all is."""
        if digest(self._weights) != record["model_sha256"]:
            return "the model that the answers give is not the one in rounds.jsonl"
        path = self._stage.folder.checkpoint_path(number)
        if not path.is_file() or digest(load_model(path, self._manifest)) != record["model_sha256"]:
            return "the checkpoint is not the model of this round"
        return ""


def _description(about: Mapping[str, Any] | None, site: str, weight: int = 1) -> SiteDescription:
    """What the site said of itself; of the pooled node, which is no hospital, only its weight counts."""
    kind: SiteKind = about["kind"] if about else "synthetic"
    nominal = about["nominal_patients"] if about else weight
    return SiteDescription(site=site, kind=kind, nominal_patients=nominal, version="")


def _check_signature(
    envelope: Envelope, site: str, keys: Mapping[str, Ed25519PublicKey], expected: Mapping[str, Any]
) -> None:
    """Raises RunError (code `bad-signature`) unless the site signed exactly this answer."""
    if site not in keys:
        raise RunError(f"no key of {site}", code="bad-signature")
    verify(envelope.statement, envelope.signature, keys[site])
    said = Statement.parse(envelope.statement)
    signed = {"site": site, "payload_sha256": payload_sha256(envelope.payload), **expected}
    if said != said.model_copy(update=signed):
        raise RunError(f"{site} signed another answer", code="bad-signature")


class _NotKept(Exception):
    """An answer is not in the run folder, as in runs of an earlier version."""
