"""The round loop in the open: ask, check, average, save; deadlines, quorum, resume.

Flower's `Strategy.start` has no checkpoint, no resume, no rule for how many must answer, and a wholly failed run ends
"completed"; so the loop is ours, on Flower's Message API.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.counts import Counts
from common.errors import FedqcError, RefusedError, RunError
from common.plan import RunPlan
from common.weights import Manifest, digest
from common.wire import EvaluateTask, Refusal, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask, message_type
from server.aggregate import FederatedMean
from server.evaluate import SiteScores, Study
from server.gate import check_evaluation, check_update
from server.runs import ArmFolder, load_model

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Site:
    node: int
    description: SiteDescription

    @property
    def name(self) -> str:
        return self.description.site


@dataclass(kw_only=True)
class ArmResult:
    """What one arm at one group of sites came to."""

    weights: np.ndarray  # float32 (parameters,), after the last round
    refused: dict[str, Refusal] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # site -> code of its last failure
    claims: dict[str, dict[str, float]] = field(default_factory=dict)  # site -> what its private updates guarantee


def ask(grid: Grid, nodes: Sequence[int], record: RecordDict, kind: str, deadline_s: float) -> Iterator[tuple[int, Message, float]]:
    """Send `record` to every node and yield (node, answer, seconds since sending) as answers come, until the deadline.

    A node is known by the message it answers, not by what it claims: an error reply carries the SuperLink's id.
    """
    started = time.monotonic()
    messages = [Message(content=record, dst_node_id=node, message_type=kind) for node in nodes]
    waiting = dict(zip(grid.push_messages(messages), nodes, strict=True))
    while waiting and time.monotonic() - started < deadline_s:
        answers = list(grid.pull_messages(list(waiting)))
        for answer in answers:
            node = waiting.pop(answer.metadata.reply_to_message_id, None)
            if node is not None:
                yield node, answer, time.monotonic() - started
        if not answers:
            time.sleep(min(POLL_S, deadline_s))


def describe_sites(grid: Grid, *, expected: int, deadline_s: float) -> list[Site]:
    """Ask every connected node who it is, sorted by site name; wait until `expected` nodes are connected or the deadline.

    Raises:
        RunError: nobody answered, or two nodes claim one name.
    """
    until = time.monotonic() + deadline_s
    while len(nodes := list(grid.get_node_ids())) < expected and time.monotonic() < until:
        time.sleep(POLL_S)
    sites = []
    for node, answer, _ in ask(grid, nodes, RecordDict(), "query.describe", deadline_s):
        try:
            if not answer.has_error() and message_type(answer.content) == "SiteDescription":
                sites.append(Site(node=node, description=SiteDescription.from_record(answer.content)))
        except RunError:
            continue
    names = [site.name for site in sites]
    if not sites:
        raise RunError("no site answered", code="no-sites", hint="are the nodes started and connected?")
    if len(set(names)) < len(names):
        raise RunError("two nodes claim the same site name", code="duplicate-site")
    return sorted(sites, key=lambda site: site.name)


def run_rounds(
    grid: Grid,
    *,
    plan: RunPlan,
    run: str,
    arm: str,
    sites: Sequence[Site],
    initial: np.ndarray,
    manifest: Manifest,
    trainable: slice,
    quorum: int,
    folder: ArmFolder,
    score_public: Callable[[np.ndarray], dict[str, float]],
    on_answer: Callable[[int, str], None],
    on_round: Callable[[int, dict[str, Any]], None],
) -> ArmResult:
    """Rounds from the last checkpoint, or from `initial`, to the plan's last.

    Args:
        trainable: the part of the flat model that sites send back.
        score_public: the coordinator's own measurement of a model, put into every round's record.
        on_answer: told each round and site whose answer has come.
        on_round: told each finished round and its record.
    Raises:
        RefusedError: every site refused, before or at this round; carries the first reason.
        RunError: fewer than `quorum` valid answers (code `no-quorum`).
    """
    private = arm == "federated_dp"
    start = folder.last_round()
    folder.forget_rounds_after(start)
    result = ArmResult(weights=load_model(folder.checkpoint_path(start), manifest) if start else initial.copy())
    for record in folder.rounds():
        result.refused |= {site: Refusal.model_validate(said) for site, said in record["refused"].items()}
        result.failed |= record["failed"]
        result.claims |= record["claims"]
    for number in range(start + 1, plan.training.rounds + 1):
        began = time.monotonic()
        base_sha256 = digest(result.weights)
        invited = {site.node: site for site in sites if site.name not in result.refused}
        task = TrainTask(run=run, arm=arm, round=number, private=private, base=result.weights)
        mean = FederatedMean(trainable.stop - trainable.start)
        seconds: dict[str, float] = {}
        weights: dict[str, int] = {}
        refused: dict[str, Refusal] = {}
        failed: dict[str, str] = {}
        claims: dict[str, dict[str, float]] = {}
        received = 0
        for node, answer, elapsed in ask(grid, list(invited), task.to_record(), "train", plan.federation.deadline_s):
            site = invited[node]
            seconds[site.name] = round(elapsed, 3)
            on_answer(number, site.name)
            try:
                update = _accept(answer, task, base_sha256, site, trainable)
            except RefusedError as refusal:
                refused[site.name] = Refusal(site=site.name, run=run, code=refusal.code, reason=refusal.public_reason)
            except FedqcError as failure:
                failed[site.name] = failure.code
            else:
                mean.add(update.update, update.weight)
                weights[site.name] = update.weight
                received += update.update.nbytes
                if update.epsilon is not None and update.delta is not None:
                    claims[site.name] = {"noise_multiplier": update.noise_multiplier, "epsilon": update.epsilon, "delta": update.delta}
        failed |= {site.name: "no-answer" for site in invited.values() if site.name not in seconds}
        result.refused |= refused
        result.failed |= failed
        result.claims |= claims
        if len(weights) < quorum:
            if not weights and len(result.refused) == len(sites):
                first = next(iter(result.refused.values()))
                raise RefusedError(f"{arm}: every site refused: {first.reason}", code=first.code, public_reason=first.reason)
            missing = {name: refusal.code for name, refusal in result.refused.items()} | failed
            who = ", ".join(f"{name} {code}" for name, code in sorted(missing.items()))
            raise RunError(
                f"{arm}, round {number}: {len(weights)} valid answers, the quorum is {quorum} ({who})",
                code="no-quorum",
                hint="fedqc run resume goes on once the sites are back",
            )
        after = result.weights.copy()
        after[trainable] = mean.result(result.weights[trainable])
        result.weights = after
        record = {
            "round": number,
            "invited": [site.name for site in invited.values()],
            "answered": sorted(weights),
            "refused": {name: refusal.model_dump(mode="json") for name, refusal in refused.items()},
            "failed": failed,
            "claims": claims,
            "weights": weights,
            "bytes": {"down": task.base.nbytes * len(invited), "up": received},
            "seconds": seconds,
            "round_seconds": round(time.monotonic() - began, 3),
            "model_sha256": digest(after),
            "public": score_public(after),
        }
        folder.append_round(record)
        folder.save_checkpoint(number, after, manifest)
        on_round(number, record)
    return result


def _accept(answer: Message, task: TrainTask, base_sha256: str, site: Site, trainable: slice) -> SiteUpdate:
    if answer.has_error():
        raise RunError(f"{site.name} is unavailable", code="unavailable")
    if message_type(answer.content) == "Refusal":
        refusal = Refusal.from_record(answer.content)
        if refusal.code == "site-failure":
            raise RunError(f"{site.name}: {refusal.reason}", code=refusal.code)
        raise RefusedError(f"{site.name} refuses: {refusal.reason}", code=refusal.code, public_reason=refusal.reason)
    update = SiteUpdate.from_record(answer.content)
    check_update(update, task, base_sha256, site.description, trainable.stop - trainable.start)
    return update


def score_sites(grid: Grid, plan: RunPlan, run: str, hospitals: Sequence[Site], models: dict[str, np.ndarray]) -> tuple[Study, list[str]]:
    """Have every site score all models in one message, so that comparisons are paired.

    Returns:
        the study, and the names of the sites that did not answer or refused.
    Raises:
        RunError: no site answered.
    """
    names = tuple(models)
    weights = np.stack([models[name] for name in names])
    scored: dict[str, SiteScores] = {}
    for everyone in (False, True):
        asked = {site.node: site for site in hospitals if (site.name in plan.held_out) == everyone}
        if not asked:
            continue
        task = EvaluateTask(run=run, models=names, everyone=everyone, weights=weights)
        for node, answer, _ in ask(grid, list(asked), task.to_record(), "evaluate", plan.federation.deadline_s):
            if answer.has_error() or message_type(answer.content) != "SiteEvaluation":
                continue
            try:
                evaluation = SiteEvaluation.from_record(answer.content)
                check_evaluation(evaluation, task, asked[node].description)
            except RunError:
                continue
            counts = {name: Counts(positives=h[0], negatives=h[1]) for name, h in zip(names, evaluation.histograms, strict=True)}
            scored[asked[node].name] = SiteScores(counts=counts, covariance=evaluation.covariance)
    if not scored:
        raise RunError("no site could be scored", code="no-evaluation", hint="the sites' logs and policies say why")
    study = Study(
        sites={site.name: scored[site.name] for site in hospitals if site.name in scored},
        training=[site.name for site in hospitals if site.name not in plan.held_out],
        held_out=list(plan.held_out),
        models=list(names),
    )
    return study, [site.name for site in hospitals if site.name not in scored]
