"""Conduct a run: describe the sites, train each arm, evaluate all models, write the run folder."""

from __future__ import annotations

import resource
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from common.arms import ARMS, FINAL_ARMS, PUBLIC
from common.errors import ConfigError, FedqcError, PlanError, RefusedError, RunError
from common.files import write_bytes
from common.learning import get_threads, set_threads
from common.lineage import KEY as LINEAGE
from common.lineage import Lineage, lineage_of_plan
from common.losses import loss_of
from common.model_file import described, load_model, save_model, unlearned_labels
from common.models import fresh, network_of
from common.optimizers import check_optimizer
from common.plan import RunPlan
from common.public_slices import Slices
from common.signing import public_text
from common.weights import Manifest, digest, flatten, manifest_of, resolve_initial, unflatten
from server.evaluation.estimates import report_numbers
from server.evaluation.model_card import INJECTED_LABELS, model_card
from server.evaluation_file import SCHEMA, checked
from server.messaging.flower import Grid
from server.messaging.requests import Site, describe_sites
from server.messaging.signatures import Seal
from server.public_model.public_set import (
    PublicBins,
    measure,
    public_bins,
    public_measures,
    public_samples,
    public_set,
)
from server.run.choice import choice_of
from server.run.observers import (
    EvaluationBegan,
    Live,
    Observer,
    Progress,
    RunBegan,
    RunFinished,
    StageEndedEarly,
    compose,
)
from server.run.privacy_claims import merged, privacy_claims
from server.run.rounds import (
    RunContext,
    Scored,
    Stage,
    StageRefused,
    StageResult,
    result_so_far,
    score_sites,
)
from server.run.side_by_side import run_stages
from server.run_folder import CARD, EVALUATION, MODEL, RunFolder, mean_of, without_nan, write_json
from server.strategies import strategy_named


@dataclass(kw_only=True)
class Trained:
    """The trained arms of a run. A model is named after its arm, that of a single site after arm and site."""

    models: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    chosen_rounds: dict[str, int] = field(default_factory=dict)
    privacy: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)  # arms that every site refused: the run is partial
    incomplete: set[str] = field(default_factory=set)  # what makes the run partial
    data_changed: set[str] = field(default_factory=set)  # sites whose operators accepted other data


@dataclass(frozen=True, kw_only=True)
class Released:
    """What an evaluation by itself scores: models that a run released."""

    models: Mapping[str, np.ndarray]  # float32 (parameters,), by name
    privacy: dict[str, Any]  # site -> what that run promised it, or why it refused


def conduct(
    grid: Grid,
    plan: RunPlan,
    path: Path,
    *,
    simulation: dict[str, str] | None = None,
    tuning: Mapping[str, Any] | None = None,
    seal: Seal | None = None,
    observers: Sequence[Observer] = (),
    jobs: int = 1,
    others_cpu: Callable[[], float] = lambda: 0.0,
    released: Released | None = None,
    asked: Sequence[str] = (),
) -> RunFolder:
    """Run every arm of `plan` on the sites behind `grid`, or continue where an earlier attempt stopped.

    Args:
        path: the run folder.
        simulation: where a simulation's data lie.
        tuning: how the plan's settings were chosen, kept in a new run folder.
        seal: the federation's keys; None signs and verifies nothing.
        observers: notified of each event, after progress on stderr and, in a federation, live.json.
        jobs: with more than 1, stages that do not depend on each other are run side by side (a simulation).
        others_cpu: CPU seconds that processes of the grid have used.
        released: of an evaluation by itself, the models that its plan names.
        asked: of an evaluation by itself, the sites that are asked. A study that leaves out each site once
            asks those that its plan names.
    Raises:
        FedqcError: the run failed; it can be resumed.
    """
    started = time.monotonic()
    asked = asked or plan.leave_one_site_out
    seal = seal or Seal.none(plan)
    check_names(plan)
    manifest = manifest_of(network_of(plan.model).state_dict())
    initial = initial_weights(plan, manifest)
    sites = describe_sites(
        grid,
        seal,
        expected=len(asked) or plan.federation.quorum + len(plan.held_out),
        deadline_s=min(60.0, plan.federation.deadline_s),
    )
    if asked:
        sites = [site for site in sites if site.name in asked]
    hospitals = [site for site in sites if not site.description.members]
    if plan.evaluate is None:
        check_sites(plan, [site.name for site in hospitals])
    check_controls(plan, hospitals if simulation else None)
    keys = {name: public_text(key) for name, key in seal.sites.items()}
    folder = open_or_create(
        path, plan, hospitals, simulation, tuning=tuning, signed=seal.key is not None, keys=keys
    )
    stages = _stages(plan, sites, folder)
    units = plan.training.rounds * len(stages) + 1
    live = [Live(folder.path, units=units)] if seal.key else []
    score_public, bins_of = _on_public_set(plan, manifest)
    context = RunContext(
        grid=grid,
        seal=seal,
        plan=plan,
        run=str(folder.manifest["run"]),
        manifest=manifest,
        initial=initial,
        lineage=initial_lineage(plan),
        strategy=strategy_named(plan.training.strategy),
        score_public=score_public,
        public_bins=bins_of,
        observe=compose(Progress(units), *live, *observers),
    )
    training = tuple(site.name for site in hospitals if plan.trains_at(site.name))
    held_out = tuple(site.name for site in hospitals if not plan.trained_at(site.name))
    context.observe(RunBegan(run=context.run, training=training, held_out=held_out))
    try:
        if plan.evaluate is None:
            trained = train_arms(context, stages, jobs=jobs)
            final = next(name for name in (*FINAL_ARMS, *_to_hand_on(trained)) if name in trained.models)
        else:
            trained, final = _as_released(folder, plan, released, manifest), ""
        context.observe(EvaluationBegan(sites=tuple(site.name for site in hospitals)))
        scored = score_sites(context, hospitals, trained.models, final=final, keep=folder.keep_scores)
    except FedqcError:
        folder.update_manifest(status="failed")
        raise
    absent = {site: "no-answer" for site in asked if site not in scored.study.sites} | scored.absent
    trained.incomplete |= {f"evaluation: {site} gave no score ({code})" for site, code in absent.items()}
    evaluation = _evaluation(context, hospitals, trained, scored) | {
        "cpu_seconds": round(cpu_seconds() + others_cpu(), 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    if data_changed := sorted(
        trained.data_changed | scored.data_changed
    ):  # a bare fact: what changed stays at the site
        evaluation["data_changed"] = data_changed
        folder.update_manifest(data_changed=data_changed)
    if plan.privacy.alternatives and len(evaluation["private_arms"]) > 1:
        evaluation["alternatives"] = True
    status = evaluation["status"]
    found = checked(without_nan(evaluation), EVALUATION)
    if final:  # an evaluation by itself hands nothing on
        trainers = [site for site in sites if plan.trains_at(site.name)]
        save_model(folder.path / MODEL, trained.models[final], manifest, _metadata(context, final, trainers))
        card = model_card(found, final.partition("/")[0], plan.model.model_dump())
        write_bytes(folder.path / CARD, card.encode())
    write_json(folder.path / EVALUATION, found)
    folder.update_manifest(
        status=status, models={name: digest(flat) for name, flat in trained.models.items()}
    )
    context.observe(RunFinished(status=status, models=len(trained.models), sites=len(scored.study.sites)))
    return folder


def run_name(plan: RunPlan) -> str:
    """The name of the run that carries out the plan of an evaluation: of the plan alone, so that a site that
    is asked again gives its stored answer.
    """
    return f"{plan.name}-{plan.sha256()[:16]}"


def _as_released(folder: RunFolder, plan: RunPlan, released: Released | None, manifest: Manifest) -> Trained:
    """The models that the plan of an evaluation names, copied into its run folder.

    Raises:
        ConfigError: a model is missing or has another digest (code `not-released`).
    """
    assert plan.evaluate is not None
    trained = Trained(privacy=released.privacy if released else {})
    for model in plan.evaluate.models:
        flat = released.models.get(model.name) if released else None
        if flat is None or digest(flat) != model.sha256:
            raise ConfigError(f"model {model.name} is not the one that the plan names", code="not-released")
        arm, _, site = model.name.partition("/")
        about = {"arm": model.name, "run": plan.evaluate.run} | described(plan, model.name)
        save_model(folder.arm(arm, site or None).model_path, flat, manifest, about)
        trained.models[model.name] = flat
    return trained


def check_names(plan: RunPlan) -> None:
    """Check the words of a plan that name code or files of the coordinator, before a site is asked.

    Raises:
        PlanError: unknown model or strategy, or arguments of a model, a loss or an optimizer that it does
            not take.
        ConfigError: unknown loss, or one that mixes patients beside a private arm. The hint lists what is
            known. As `common.public_slices.load_slices`, of the public set.
    """
    network_of(plan.model)
    loss_of(plan.training, private=any(ARMS[arm].clips for arm in plan.arms), labels=plan.model.labels)
    check_optimizer(plan.training)
    strategy_named(plan.training.strategy)
    if plan.public_set.file is not None:
        _public_slices(plan)


def _evaluation(
    context: RunContext, hospitals: Sequence[Site], trained: Trained, scored: Scored
) -> dict[str, Any]:
    """The content of evaluation.json, without the times."""
    plan = context.plan
    return {
        "schema": SCHEMA,
        "run": context.run,
        "plan": plan.name,
        "question": plan.question,
        "seed": plan.seed,
        "status": "partial" if trained.incomplete or trained.refusals else "completed",
        "rounds": plan.training.rounds,
        "epochs": plan.epochs,
        "arms": list(plan.scored_arms),
        "private_arms": [
            arm
            for arm in plan.scored_arms
            if ARMS[arm].private and any(name.partition("/")[0] == arm for name in trained.models)
        ],
        "sites": [_about(site, plan) for site in hospitals],
        "privacy": trained.privacy,
        "curves": trained.curves,
        "chosen_rounds": trained.chosen_rounds,
        "refusals": trained.refusals,
        "incomplete": sorted(trained.incomplete),
        **({"labels": INJECTED_LABELS} if plan.training.inject is not None else {}),
        **({"evaluates": plan.evaluate.model_dump(mode="json")} if plan.evaluate else {}),
        **({"unlearned": unlearned} if (unlearned := _unlearned(context, trained)) else {}),
        "edges": scored.edges,
        "public_counts": scored.public_counts,
        **({"any_public": scored.any_public} if scored.any_public else {}),
        **report_numbers(scored.study, plan.scored_arms),
    }


def _unlearned(context: RunContext, trained: Trained) -> dict[str, list[str]]:
    """Of each model the outputs that its starting weights did not have and no site taught it."""
    labels = context.plan.model.labels
    found = {
        name: list(unlearned_labels(flat, context.manifest, labels)) for name, flat in trained.models.items()
    }
    return {name: names for name, names in found.items() if names}


def _public_slices(plan: RunPlan) -> Slices:
    """The coordinator's public set; raises as `public_set`."""
    if plan.model.is_of_measures:
        return public_measures(plan.public_set, plan.model.labels)
    return public_set(plan.public_set, plan.image_size, plan.model.labels)


def _on_public_set(
    plan: RunPlan, manifest: Manifest
) -> tuple[Callable[[np.ndarray], dict[str, float]], Callable[[np.ndarray], PublicBins]]:
    """The measurement of a flat model on the coordinator's public set, and the bins that follow from it."""
    network = network_of(plan.model)
    public = public_samples(_public_slices(plan), plan.model)

    def load(flat: np.ndarray) -> nn.Module:
        network.load_state_dict(unflatten(flat, manifest))
        return network

    def score_public(flat: np.ndarray) -> dict[str, float]:
        return measure(load(flat), public, loss_of(plan.training, labels=plan.model.labels))

    return score_public, lambda flat: public_bins(load(flat), public, plan.model.labels)


def initial_lineage(plan: RunPlan) -> Lineage | None:
    """What the plan's starting weights were trained on; None where nothing says it.

    Raises:
        ConfigError: as `resolve_initial`; the file is no model.
    """
    if plan.evaluate is not None:
        return None
    is_random = plan.model.initial == "random"
    path = None if is_random else resolve_initial(plan.model.initial, plan.model.sha256)
    return lineage_of_plan(plan.model.initial, path)


def _metadata(context: RunContext, arm: str, sites: Sequence[Site]) -> dict[str, str]:
    """What a model file of a run says of itself; its lineage only where that of the starting weights is
    known.
    """
    said = {"arm": arm, "run": context.run} | described(context.plan, arm)
    if context.lineage is None:
        return said
    name = arm.partition("/")[0]
    if name == PUBLIC:
        return said | {LINEAGE: context.lineage.text()}
    child = context.lineage.child(
        f"run {context.run}, arm {arm}",
        weights=digest(context.initial),
        kinds=[site.description.kind for site in sites],
        private=ARMS[name].private,
    )
    return said | {LINEAGE: child.text()}


def initial_weights(plan: RunPlan, manifest: Manifest) -> np.ndarray:
    """The weights that every arm starts from: the plan's file, or fresh ones drawn from its seed. Of a plan
    that trains nothing none: an empty array.

    Raises:
        ConfigError: the file is missing, is no such model, or its hash is not the plan's.
    """
    if plan.evaluate is not None:
        return np.zeros(0, np.float32)
    if plan.model.initial != "random":
        path = resolve_initial(plan.model.initial, plan.model.sha256)
        return load_model(path, manifest, plan.model.labels)
    return flatten(fresh(plan.model.name, plan.seed, plan.model.args, plan.model.labels).state_dict())


def train_arms(context: RunContext, stages: Sequence[Stage], *, jobs: int = 1) -> Trained:
    """Run the rounds of every stage.

    Args:
        jobs: as `conduct`.
    Raises:
        RefusedError: every site refused every arm.
        RunError: a shared arm missed its quorum. The arm of a single site that fails makes the run partial
            instead.
    """
    trained = Trained(models={PUBLIC: context.initial} if PUBLIC in context.plan.arms else {})
    at_start = context.score_public(context.initial)
    for stage, result_of in run_stages(context, stages, jobs=jobs):
        try:
            result = result_of()
        except StageRefused as refusal:
            reason = f"{stage.name}: every site refused: {refusal.public_reason}"
            trained.refusals.append(reason)
            _give_up(context, stage, reason)
            if stage.kind.private:
                _claim(context, stage, refusal.result, trained)
        except RunError as failure:
            if stage.kind.owner != "site":
                raise
            reason = f"{stage.name}: failed ({failure.code})"
            trained.incomplete.add(reason)
            _give_up(context, stage, reason)
            if stage.kind.private:  # what its earlier rounds spent stays spent
                _claim(context, stage, result_so_far(context, stage), trained)
        else:
            _keep(context, stage, result, at_start, trained)
    if not _to_hand_on(trained):
        if not trained.refusals:
            raise RunError(
                f"no arm finished: {'; '.join(sorted(trained.incomplete))}",
                code="no-quorum",
                hint="fedqc run resume continues it",
            )
        reason = "; ".join(trained.refusals)
        raise RefusedError(
            f"no arm could run: {reason}", public_reason=reason, hint="the sites' policies say why"
        )
    return trained


def _to_hand_on(trained: Trained) -> list[str]:
    """Models that a run may hand on: all but those of controls."""
    return [name for name in trained.models if not ARMS[name.partition("/")[0]].simulated]


def _give_up(context: RunContext, stage: Stage, reason: str) -> None:
    left = context.plan.training.rounds - stage.folder.last_round()
    context.observe(StageEndedEarly(reason=reason, rounds_left=left))


def _keep(
    context: RunContext, stage: Stage, result: StageResult, at_start: dict[str, float], trained: Trained
) -> None:
    """Add the outcome of a stage to `trained`: the model of the round that is chosen (server/run/choice.py),
    or the mean over the rounds up to it that the plan says.
    """
    name, folder, records = stage.name, stage.folder, stage.folder.rounds()
    chosen = choice_of(context.plan, stage.arm).chosen(records)
    trained.models[name] = folder.model_of(chosen, context.manifest, mean_of(context.plan, stage.arm))
    trained.chosen_rounds[name] = chosen
    trained.curves[name] = [{"round": 0, **at_start}] + [
        {"round": record["round"], **record["public"]} for record in records
    ]
    trained.incomplete |= {f"{name}: {site} refused" for site in result.refused}
    trained.incomplete |= {f"{name}: {site} failed ({code})" for site, code in result.failed.items()}
    save_model(
        folder.model_path,
        trained.models[name],
        context.manifest,
        _metadata(context, stage.arm, stage.sites),
    )
    trained.data_changed |= result.data_changed
    if stage.kind.private:
        _claim(context, stage, result, trained)


def _claim(context: RunContext, stage: Stage, result: StageResult, trained: Trained) -> None:
    """Add what a private stage guarantees to `trained`."""
    trained.privacy = merged(trained.privacy, privacy_claims(context.plan, result, stage.sites))


def check_sites(plan: RunPlan, names: Sequence[str]) -> None:
    """Refuse a plan that the connected sites cannot carry.

    Raises:
        PlanError: a held-out site, or one of a study, is unknown; or too few sites remain for the quorum.
    """
    for key, sites in (("held_out", plan.held_out), ("leave_one_site_out", plan.leave_one_site_out)):
        if unknown := [name for name in sites if name not in names]:
            raise PlanError(
                f"{key} = {unknown[0]!r}: no such site",
                code="unknown-site",
                hint=f"sites: {', '.join(names)}",
            )
    remaining = len(names) - len(plan.held_out)
    if remaining < plan.federation.quorum:
        raise PlanError(
            f"federation.quorum = {plan.federation.quorum}, but only {remaining} sites may train",
            code="too-few-sites",
            hint="lower the quorum or hold out fewer sites",
        )


def check_controls(plan: RunPlan, sites: Sequence[Site] | None = None) -> None:
    """Refuse the control of a private arm, or a baseline, where real patients could train it without noise.

    Args:
        sites: of a simulation; None: the run is deployed.
    Raises:
        PlanError: the run is deployed, or a simulated site is a hospital (code `simulation-only`).
    """
    hospitals = [site.name for site in sites or () if site.description.kind == "hospital"]
    if not plan.simulated_arms or (sites is not None and not hospitals):
        return
    why = f": {hospitals[0]} is a hospital" if hospitals else ""
    raise PlanError(
        f"arm `{plan.simulated_arms[0]}` exists in simulations of sites that are no hospital only{why}",
        code="simulation-only",
        hint=f"leave {', '.join(plan.simulated_arms)} out of arms",
    )


def open_or_create(
    path: Path,
    plan: RunPlan,
    sites: Sequence[Site],
    simulation: dict[str, str] | None,
    *,
    tuning: Mapping[str, Any] | None = None,
    signed: bool = False,
    keys: Mapping[str, str] | None = None,
) -> RunFolder:
    """The run folder to go on with, or a new one.

    Args:
        tuning: how the plan's settings were chosen.
        signed: the run belongs to a federation, where coordinator and hospitals know it by the name of its
            folder.
        keys: the sites' public keys, by which `fedqc verify` checks their answers.

    Raises:
        ConfigError: the folder belongs to another plan (code `other-plan`).
    """
    if not (path / "plan.yaml").exists():
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{path.name if signed else f'{plan.name}-{plan.seed}'}-{stamp}-{secrets.token_hex(3)}"
        manifest = {
            # an evaluation by itself is one question, by whatever folder: its sites give one answer
            "run": name if plan.evaluate is None else run_name(plan),
            "status": "running",
            "plan_sha256": plan.sha256(),
            "initial_sha256": plan.model.sha256,
            "seed": plan.seed,
            "threads": get_threads(),
            "versions": {
                name: version(name) for name in ("fedqc", "flwr", "torch", "opacus", "numpy", "pydicom")
            }
            | {"python": ".".join(map(str, sys.version_info[:3]))},
            "sites": [_about(site, plan) | {"ethics": site.description.ethics} for site in sites],
            **({"keys": keys} if keys else {}),
        }
        return RunFolder.create(path, plan, manifest, simulation, tuning)
    folder = RunFolder.open(path)
    if folder.plan.sha256() != plan.sha256():
        raise ConfigError(
            f"{path}: belongs to another plan", code="other-plan", hint="choose another run folder"
        )
    set_threads(folder.manifest["threads"])  # the same bits
    if plan.evaluate is not None:  # others may be asked than before
        about = [_about(site, plan) | {"ethics": site.description.ethics} for site in sites]
        folder.update_manifest(sites=about, **({"keys": keys} if keys else {}))
    folder.update_manifest(status="running")
    return folder


def cpu_seconds() -> float:
    """User and system time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _stages(plan: RunPlan, sites: Sequence[Site], folder: RunFolder) -> list[Stage]:
    """The stages of a run, in the order of the plan's arms.

    Raises:
        PlanError: an arm trains on pooled images, and no site holds them (code `no-pooled-arm`).
    """
    pooled = [site for site in sites if site.description.members]
    training = [site for site in sites if not site.description.members and plan.trains_at(site.name)]
    stages: list[Stage] = []
    groups: list[tuple[str, str | None, list[Site]]]
    for arm in plan.arms:
        if not ARMS[arm].by_rounds:
            continue
        match ARMS[arm].trainer:
            case "each site":
                groups = [(f"{arm}/{site.name}", site.name, [site]) for site in training]
            case "all sites":
                groups = [(arm, None, training)]
            case "pooled site":
                if not pooled:
                    raise PlanError(
                        f"arm `{arm}` exists in simulation only: real hospitals do not pool images",
                        code="no-pooled-arm",
                    )
                groups = [(arm, None, pooled)]
            case _:
                continue
        stages += [
            Stage(arm=arm, name=name, sites=members, folder=folder.arm(arm, site))
            for name, site, members in groups
        ]
    return stages


def _about(site: Site, plan: RunPlan) -> dict[str, Any]:
    description = site.description
    return {
        "site": description.site,
        "kind": description.kind,
        "role": "training" if plan.trained_at(description.site) else "held_out",
        "nominal_patients": description.nominal_patients,
        "stand_in": description.stand_in,
        "unit": description.unit,
        "version": description.version,
        **({"nominal_tested": description.nominal_tested} if description.nominal_tested else {}),
    }
