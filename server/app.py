"""The Flower door of the coordinator, and what a run is: plan, model, arms, evaluation, run folder."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.artifacts import NAMES
from common.counts import Counts
from common.errors import ConfigError, PlanError, RefusedError, RunError
from common.learning import get_threads
from common.models import build
from common.plan import RunPlan, parse_plan
from common.privacy import GaussianSteps, pld_epsilon
from common.weights import Manifest, manifest_of, resolve_initial, unflatten
from common.wire import EvaluateTask, SiteEvaluation, message_type
from server.evaluate import SiteScores, Study, report_numbers
from server.progress import Progress
from server.public_set import measure, public_set
from server.rounds import ArmResult, Site, ask, describe_sites, run_rounds
from server.runs import EVALUATION, MODEL, ArmFolder, RunFolder, load_model, save_model, write_json

app = ServerApp()
HEAD = "head."
PRIVACY_UNIT: dict[str, Any] = {"unit": "patient", "adjacency": "add/remove"}
NO_CLAIM: dict[str, Any] = {"epsilon": None, "epsilon_pld": None, "delta": None, "noise_multiplier": None}


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    if not config.get("plan") or not config.get("run-dir"):
        raise PlanError("the run config needs `plan` (canonical JSON) and `run-dir` (absolute path)", hint="see docs/architecture.md")
    plan = parse_plan(json.loads(str(config["plan"])))
    conduct(grid, plan, Path(str(config["run-dir"])))


def conduct(grid: Grid, plan: RunPlan, path: Path, *, simulation: dict[str, str] | None = None) -> RunFolder:
    """Run every arm of `plan` on the sites behind `grid`, or go on where an earlier attempt stopped.

    Raises:
        FedqcError: what the errors module says; the run folder then says `failed` and can be resumed.
    """
    started, cpu_before = time.monotonic(), cpu_seconds()
    network = build(plan.model.name)
    manifest = manifest_of(network.state_dict())
    initial = load_model(resolve_initial(plan.model.initial, plan.model.sha256), manifest)
    training_names = [*plan.held_out]
    sites = describe_sites(grid, expected=plan.federation.quorum, deadline_s=min(60.0, plan.federation.deadline_s))
    hospitals = [site for site in sites if not site.description.members]
    pooled = [site for site in sites if site.description.members]
    check_sites(plan, [site.name for site in hospitals])
    training = [site for site in hospitals if site.name not in training_names]
    folder = open_or_create(path, plan, hospitals, simulation)
    run = str(folder.manifest["run"])
    public = public_set(plan.public_set, plan.image_size)

    def score_public(flat: np.ndarray) -> dict[str, float]:
        network.load_state_dict(unflatten(flat, manifest))
        return measure(network, public, plan.training.loss)

    units = {arm: _groups(arm, training, pooled) for arm in plan.arms if arm != "public"}
    rounds = plan.training.rounds
    progress = Progress(rounds * sum(len(groups) for groups in units.values()) + 1)
    progress.say(f"run {run}: {len(training)} training sites, held out: {', '.join(plan.held_out) or 'none'}")

    models: dict[str, np.ndarray] = {"public": initial} if "public" in plan.arms else {}
    curves: dict[str, list[dict[str, Any]]] = {}
    results: dict[str, ArmResult] = {}
    privacy: dict[str, dict[str, Any]] = {}
    refusals: list[str] = []
    failures: list[str] = []
    start_score = score_public(initial)
    for arm, groups in units.items():
        for model_name, group in groups:
            arm_folder = folder.arm(arm, model_name.partition("/")[2] or None)
            progress.skip(arm_folder.last_round())
            try:
                result = run_rounds(
                    grid,
                    plan=plan,
                    run=run,
                    arm=arm,
                    sites=group,
                    initial=initial,
                    manifest=manifest,
                    trainable=trainable_part(arm, manifest),
                    quorum=min(plan.federation.quorum, len(group)),
                    folder=arm_folder,
                    score_public=score_public,
                    on_round=lambda number, record, name=model_name: progress.advance(  # type: ignore[misc]
                        f"{name}: round {number} of {rounds}, public AUROC {record['public']['auroc']:.3f}"
                    ),
                )
            except RefusedError as refusal:
                if arm == "federated_dp":
                    said = {"refused": {"code": refusal.code, "reason": refusal.public_reason}}
                    privacy = {site.name: PRIVACY_UNIT | NO_CLAIM | said for site in group}
                refusals.append(f"{model_name}: refused: {refusal.public_reason}")
                progress.say(refusals[-1])
                continue
            except RunError as failure:
                if arm != "local":
                    raise
                failures.append(f"{model_name}: failed ({failure.code})")
                progress.say(failures[-1])
                continue
            results[model_name] = result
            models[model_name] = _chosen(arm, arm_folder, result, manifest, progress)
            curves[model_name] = [{"round": 0, **start_score}] + [
                {"round": record["round"], **record["public"]} for record in arm_folder.rounds()
            ]
            save_model(arm_folder.model_path, models[model_name], manifest, {"arm": arm, "run": run})
            if arm == "federated_dp":
                privacy = _privacy_claims(plan, result, group)
    if not models:
        raise RefusedError(f"no arm could run: {refusals[0]}", public_reason=refusals[0], hint="the sites' policies say why")

    study, absent = score_sites(grid, plan, run, hospitals, models)
    incomplete = sorted(
        set(failures)
        | {f"{name}: {site} refused" for name, result in results.items() for site in result.refused}
        | {f"{name}: {site} failed ({code})" for name, result in results.items() for site, code in result.failed.items()}
        | {f"evaluation: {site} did not answer" for site in absent}
    )
    status = "partial" if incomplete else "completed"
    numbers = report_numbers(study, plan.arms)
    write_json(
        folder.path / EVALUATION,
        {
            "run": run,
            "plan": plan.name,
            "question": plan.question,
            "seed": plan.seed,
            "status": status,
            "rounds": rounds,
            "epochs": plan.epochs,
            "arms": list(plan.arms),
            "private_arms": [arm for arm in plan.arms if arm == "federated_dp" and arm in models],
            "sites": [_about(site, plan) for site in hospitals],
            "privacy": privacy,
            "curves": curves,
            "refusals": refusals,
            "incomplete": incomplete,
            **numbers,
            "cpu_seconds": round(cpu_seconds() - cpu_before, 1),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    final = next((name for name in ("federated_dp", "federated", "pooled", "public") if name in models), next(iter(models)))
    save_model(folder.path / MODEL, models[final], manifest, {"arm": final, "run": run})
    folder.update_manifest(status=status)
    progress.advance(f"evaluation of {len(models)} models at {len(study.sites)} sites")
    return folder


def check_sites(plan: RunPlan, names: Sequence[str]) -> None:
    """Refuse a plan that the connected sites cannot carry.

    Raises:
        PlanError: a held-out site is unknown, or too few sites remain for the quorum.
    """
    unknown = [name for name in plan.held_out if name not in names]
    if unknown:
        raise PlanError(f"held_out = {unknown[0]!r}: no such site", code="unknown-site", hint=f"sites: {', '.join(names)}")
    remaining = len(names) - len(plan.held_out)
    if remaining < plan.federation.quorum:
        raise PlanError(
            f"federation.quorum = {plan.federation.quorum}, but only {remaining} sites may train",
            code="too-few-sites",
            hint="lower the quorum or hold out fewer sites",
        )


def open_or_create(path: Path, plan: RunPlan, sites: Sequence[Site], simulation: dict[str, str] | None) -> RunFolder:
    """The run folder to go on with, or a new one.

    Raises:
        ConfigError: the folder belongs to another plan (code `other-plan`) or ran with other threads (`other-threads`).
    """
    if not (path / "plan.yaml").exists():
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        manifest = {
            "run": f"{plan.name}-{plan.seed}-{stamp}",
            "status": "running",
            "plan_sha256": plan.sha256(),
            "initial_sha256": plan.model.sha256,
            "seed": plan.seed,
            "threads": get_threads(),
            "versions": {name: version(name) for name in ("fedqc", "flwr", "torch", "opacus", "numpy", "pydicom")}
            | {"python": ".".join(map(str, sys.version_info[:3]))},
            "sites": [_about(site, plan) for site in sites],
        }
        return RunFolder.create(path, plan, manifest, simulation)
    folder = RunFolder.open(path)
    if folder.plan.sha256() != plan.sha256():
        raise ConfigError(f"{path}: belongs to another plan", code="other-plan", hint="choose another run folder")
    if folder.manifest["threads"] != get_threads():
        raise ConfigError(
            f"{path}: ran with {folder.manifest['threads']} threads, this process has {get_threads()}",
            code="other-threads",
            hint=f"--threads {folder.manifest['threads']} gives the same bits",
        )
    return folder


def trainable_part(arm: str, manifest: Manifest) -> slice:
    """The private arm trains the head alone; every other arm all of the model."""
    return manifest.part(HEAD) if arm == "federated_dp" else slice(0, manifest.size)


def score_sites(
    grid: Grid, plan: RunPlan, run: str, hospitals: Sequence[Site], models: dict[str, np.ndarray]
) -> tuple[Study, list[str]]:
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
            evaluation = SiteEvaluation.from_record(answer.content)
            if evaluation.models != names or evaluation.histograms.shape[:3] != (len(names), 2, len(NAMES)):
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


def cpu_seconds() -> float:
    """User and system time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _groups(arm: str, training: Sequence[Site], pooled: Sequence[Site]) -> list[tuple[str, list[Site]]]:
    """Model name and the sites that train it together."""
    if arm == "local":
        return [(f"local/{site.name}", [site]) for site in training]
    if arm == "pooled":
        if not pooled:
            raise PlanError("arm `pooled` exists in simulation only: real hospitals do not pool images", code="no-pooled-arm")
        return [("pooled", list(pooled))]
    return [(arm, list(training))]


def _chosen(arm: str, folder: ArmFolder, result: ArmResult, manifest: Manifest, progress: Progress) -> np.ndarray:
    """The last round's model; for `local` its best epoch on the public set, so that it is not beaten for want of stopping."""
    if arm != "local":
        return result.weights
    best = max(folder.rounds(), key=lambda record: record["public"]["auroc"])["round"]
    progress.say(f"{folder.path.name}: local model of round {best} (best on the public set)")
    return load_model(folder.checkpoint_path(best), manifest)


def _privacy_claims(plan: RunPlan, result: ArmResult, group: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Per site: what its updates guarantee, or why it refused."""
    claims: dict[str, dict[str, Any]] = {}
    steps = plan.training.rounds * plan.private_steps_per_round
    for site in group:
        refusal, claim = result.refused.get(site.name), result.claims.get(site.name)
        said = {"refused": {"code": refusal.code, "reason": refusal.reason} if refusal else None}
        if claim is not None:  # it took part, perhaps in some rounds only: what it spent holds whatever it said later
            schedule = GaussianSteps(noise_multiplier=claim["noise_multiplier"], sample_rate=plan.privacy.sample_rate, steps=steps)
            claims[site.name] = PRIVACY_UNIT | claim | {"epsilon_pld": pld_epsilon([schedule], claim["delta"])} | said
        elif refusal is not None:
            claims[site.name] = PRIVACY_UNIT | NO_CLAIM | said
    return claims


def _about(site: Site, plan: RunPlan) -> dict[str, Any]:
    description = site.description
    return {
        "site": description.site,
        "kind": description.kind,
        "role": "held_out" if description.site in plan.held_out else "training",
        "nominal_patients": description.nominal_patients,
        "stand_in": description.stand_in,
        "version": description.version,
    }
