"""TODO."""

from __future__ import annotations

import resource
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from common.errors import ConfigError, FedqcError, PlanError, RefusedError, RunError
from common.files import write_bytes
from common.learning import get_threads
from common.losses import loss_named
from common.model_file import load_model, save_model
from common.models import build, fresh
from common.plan import RunPlan
from common.weights import Manifest, flatten, manifest_of, resolve_initial, unflatten
from server.evaluation.estimates import report_numbers
from server.evaluation.model_card import model_card
from server.messaging.requests import Site, describe_sites
from server.messaging.signatures import Seal
from server.public_model.public_set import measure, public_set
from server.run.privacy_claims import all_refused, privacy_claims
from server.run.progress import Live, Progress
from server.run.rounds import ArmResult, run_rounds, score_sites
from server.run_folder import CARD, EVALUATION, MODEL, ArmFolder, RunFolder, write_json

TellOf = Callable[..., None]


HEAD = "head."


FINAL_MODEL = ("federated_dp", "federated", "pooled")
"""Which arm's model the run hands on: the first of these that there is."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every arm of a run has in common."""

    grid: Grid
    seal: Seal
    plan: RunPlan
    run: str
    folder: RunFolder
    manifest: Manifest
    initial: np.ndarray
    score_public: Callable[[np.ndarray], dict[str, float]]
    progress: Progress
    live: Live
    tell_of: TellOf


@dataclass(kw_only=True)
class Trained:
    """What the arms came to. A model is named after its arm; a local one after its arm and site."""

    models: dict[str, np.ndarray] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    chosen_rounds: dict[str, int] = field(default_factory=dict)
    privacy: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)  # arms that nobody would run: a result, not a failure
    incomplete: set[str] = field(default_factory=set)  # what makes the run partial


def conduct(
    grid: Grid,
    plan: RunPlan,
    path: Path,
    *,
    simulation: dict[str, str] | None = None,
    seal: Seal | None = None,
    tell_of: TellOf = lambda event, site="", detail="": None,
) -> RunFolder:
    """Run every arm of `plan` on the sites behind `grid`, or go on where an earlier attempt stopped.

    Args:
        simulation: where a simulation's data lie.
        seal: the federation's keys; None signs and verifies nothing.
        tell_of: told (event, site, code) of silence and refusals.

    Raises:
        FedqcError: what the errors module says; the run can be resumed.
    """
    started = time.monotonic()
    seal = seal or Seal.none(plan)
    network = build(plan.model.name)
    loss_named(plan.training.loss)  # unknown: said before anybody is asked
    manifest = manifest_of(network.state_dict())
    initial = _initial_weights(plan, manifest)
    wanted = plan.federation.quorum + len(plan.held_out)
    connected = describe_sites(grid, seal, expected=wanted, deadline_s=min(60.0, plan.federation.deadline_s))
    hospitals = [site for site in connected if not site.description.members]
    pooled = [site for site in connected if site.description.members]
    check_sites(plan, [site.name for site in hospitals])
    folder = open_or_create(path, plan, hospitals, simulation, signed=seal.key is not None)
    public = public_set(plan.public_set, plan.image_size)

    def score_public(flat: np.ndarray) -> dict[str, float]:
        network.load_state_dict(unflatten(flat, manifest))
        return measure(network, public, plan.training.loss)

    training = [site for site in hospitals if site.name not in plan.held_out]
    groups = [
        (arm, name, sites)
        for arm in plan.arms
        if arm != "public"
        for name, sites in _groups(arm, training, pooled)
    ]
    shared = Shared(
        grid=grid,
        seal=seal,
        plan=plan,
        run=str(folder.manifest["run"]),
        folder=folder,
        manifest=manifest,
        initial=initial,
        score_public=score_public,
        progress=Progress(plan.training.rounds * len(groups) + 1),
        live=Live(folder.path if seal.key else None, units=plan.training.rounds * len(groups) + 1),
        tell_of=tell_of,
    )
    shared.progress.say(
        f"run {shared.run}: {len(training)} training sites, held out: {', '.join(plan.held_out) or 'none'}"
    )
    try:
        trained = train_arms(shared, groups)
        final = next(name for name in (*FINAL_MODEL, *trained.models) if name in trained.models)
        shared.live.update(stage="evaluation", waiting=[site.name for site in hospitals])
        study, absent = score_sites(grid, seal, plan, shared.run, hospitals, trained.models, final)
    except FedqcError:
        folder.update_manifest(status="failed")
        raise
    trained.incomplete |= {f"evaluation: {site} gave no score ({code})" for site, code in absent.items()}
    status = "partial" if trained.incomplete else "completed"
    evaluation = {
        "run": shared.run,
        "plan": plan.name,
        "question": plan.question,
        "seed": plan.seed,
        "status": status,
        "rounds": plan.training.rounds,
        "epochs": plan.epochs,
        "arms": list(plan.arms),
        "private_arms": [arm for arm in plan.arms if arm == "federated_dp" and arm in trained.models],
        "sites": [_about(site, plan) for site in hospitals],
        "privacy": trained.privacy,
        "curves": trained.curves,
        "chosen_rounds": trained.chosen_rounds,
        "refusals": trained.refusals,
        "incomplete": sorted(trained.incomplete),
        **report_numbers(study, plan.arms),
        "cpu_seconds": round(cpu_seconds(), 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    save_model(folder.path / MODEL, trained.models[final], manifest, {"arm": final, "run": shared.run})
    write_bytes(
        folder.path / CARD, model_card(evaluation, final.partition("/")[0], plan.model.model_dump()).encode()
    )
    write_json(folder.path / EVALUATION, evaluation)
    folder.update_manifest(status=status)
    shared.live.update(stage=status, waiting=[], done=1)
    shared.progress.advance(f"evaluation of {len(trained.models)} models at {len(study.sites)} sites")
    return folder


def _initial_weights(plan: RunPlan, manifest: Manifest) -> np.ndarray:
    """Where every arm starts: the plan's file, or fresh weights that follow from its seed.

    Raises:
        ConfigError: the file is missing, is no such model, or its hash is not the plan's.
    """
    if plan.model.initial != "random":
        return load_model(resolve_initial(plan.model.initial, plan.model.sha256), manifest)
    return flatten(fresh(plan.model.name, plan.seed).state_dict())


def train_arms(shared: Shared, groups: Sequence[tuple[str, str, list[Site]]]) -> Trained:
    """Run the rounds of every group of sites: (arm, name of its model, its sites).

    Raises:
        RefusedError: nobody would run any arm.
        RunError: a shared arm missed its quorum. A local arm that fails makes the run partial instead.
    """
    trained = Trained(models={"public": shared.initial} if "public" in shared.plan.arms else {})
    at_start = shared.score_public(shared.initial)
    for arm, name, sites in groups:
        folder = shared.folder.arm(arm, name.partition("/")[2] or None)
        shared.progress.skip(folder.last_round())
        try:
            result = _train(shared, arm, name, sites, folder)
        except RefusedError as refusal:
            trained.refusals.append(f"{name}: every site refused: {refusal.public_reason}")
            shared.progress.say(trained.refusals[-1])
            shared.progress.skip(shared.plan.training.rounds - folder.last_round())
            if arm == "federated_dp":
                trained.privacy = all_refused(sites, refusal.code, refusal.public_reason)
            continue
        except RunError as failure:
            if arm != "local":
                raise
            trained.incomplete.add(f"{name}: failed ({failure.code})")
            shared.progress.say(f"{name}: failed ({failure.code})")
            shared.progress.skip(shared.plan.training.rounds - folder.last_round())
            continue
        records = folder.rounds()
        chosen = (
            max(records, key=lambda record: record["public"]["auroc"] or 0.0)["round"]
            if arm == "local"
            else records[-1]["round"]
        )
        trained.models[name] = load_model(folder.checkpoint_path(chosen), shared.manifest)
        trained.chosen_rounds[name] = chosen
        trained.curves[name] = [{"round": 0, **at_start}] + [
            {"round": record["round"], **record["public"]} for record in records
        ]
        trained.incomplete |= {f"{name}: {site} refused" for site in result.refused}
        trained.incomplete |= {f"{name}: {site} failed ({code})" for site, code in result.failed.items()}
        save_model(folder.model_path, trained.models[name], shared.manifest, {"arm": arm, "run": shared.run})
        if arm == "federated_dp":
            trained.privacy = privacy_claims(shared.plan, result, sites)
    if not trained.models:
        if not trained.refusals:
            raise RunError(
                f"no arm finished: {'; '.join(sorted(trained.incomplete))}",
                code="no-quorum",
                hint="fedqc run resume goes on",
            )
        reason = trained.refusals[0]
        raise RefusedError(
            f"no arm could run: {reason}", public_reason=reason, hint="the sites' policies say why"
        )
    return trained


def _train(shared: Shared, arm: str, name: str, sites: Sequence[Site], folder: ArmFolder) -> ArmResult:
    rounds = shared.plan.training.rounds
    waiting = {site.name for site in sites}
    told: set[str] = set()
    shared.live.update(
        stage=name,
        round=folder.last_round() + 1,
        rounds=rounds,
        waiting=sorted(waiting),
        done=folder.last_round(),
    )

    def on_answer(number: int, site: str) -> None:
        waiting.discard(site)
        shared.progress.note(f"{name}: round {number} of {rounds}, {site} answered")
        shared.live.update(stage=name, round=number, waiting=sorted(waiting))

    def on_round(number: int, record: dict[str, Any]) -> None:
        waiting.update(record["invited"])
        waiting.difference_update(record["refused"])
        shared.live.update(
            stage=name,
            round=min(number + 1, rounds),
            waiting=sorted(waiting),
            done=1,
            public=record["public"],
            claims=record["claims"],
        )
        for event, codes in (
            ("silence", record["failed"]),
            ("refusal", {site: said["code"] for site, said in record["refused"].items()}),
        ):
            for site, code in codes.items():
                if site not in told:
                    told.add(site)
                    shared.tell_of(event, site, code)
        sites = f"{len(record['answered'])} of {len(record['invited'])} sites"
        shared.progress.advance(
            f"{name}: round {number} of {rounds}, {sites}, public AUROC {record['public']['auroc']:.3f}"
        )

    return run_rounds(
        shared.grid,
        shared.seal,
        plan=shared.plan,
        run=shared.run,
        arm=arm,
        sites=sites,
        initial=shared.initial,
        manifest=shared.manifest,
        trainable=trainable_part(arm, shared.manifest),
        quorum=min(shared.plan.federation.quorum, len(sites)),
        folder=folder,
        score_public=shared.score_public,
        on_answer=on_answer,
        on_round=on_round,
    )


def check_sites(plan: RunPlan, names: Sequence[str]) -> None:
    """Refuse a plan that the connected sites cannot carry.

    Raises:
        PlanError: a held-out site is unknown, or too few sites remain for the quorum.
    """
    unknown = [name for name in plan.held_out if name not in names]
    if unknown:
        raise PlanError(
            f"held_out = {unknown[0]!r}: no such site", code="unknown-site", hint=f"sites: {', '.join(names)}"
        )
    remaining = len(names) - len(plan.held_out)
    if remaining < plan.federation.quorum:
        raise PlanError(
            f"federation.quorum = {plan.federation.quorum}, but only {remaining} sites may train",
            code="too-few-sites",
            hint="lower the quorum or hold out fewer sites",
        )


def open_or_create(
    path: Path,
    plan: RunPlan,
    sites: Sequence[Site],
    simulation: dict[str, str] | None,
    *,
    signed: bool = False,
) -> RunFolder:
    """The run folder to go on with, or a new one.

    Args:
        signed: the run belongs to a federation, where coordinator and hospitals know it by the name of its
            folder.

    Raises:
        ConfigError: the folder belongs to another plan (code `other-plan`) or ran with other threads
            (`other-threads`).
    """
    if not (path / "plan.yaml").exists():
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        manifest = {
            "run": f"{path.name if signed else f'{plan.name}-{plan.seed}'}-{stamp}-{secrets.token_hex(3)}",
            "status": "running",
            "plan_sha256": plan.sha256(),
            "initial_sha256": plan.model.sha256,
            "seed": plan.seed,
            "threads": get_threads(),
            "versions": {
                name: version(name) for name in ("fedqc", "flwr", "torch", "opacus", "numpy", "pydicom")
            }
            | {"python": ".".join(map(str, sys.version_info[:3]))},
            "sites": [_about(site, plan) for site in sites],
        }
        return RunFolder.create(path, plan, manifest, simulation)
    folder = RunFolder.open(path)
    if folder.plan.sha256() != plan.sha256():
        raise ConfigError(
            f"{path}: belongs to another plan", code="other-plan", hint="choose another run folder"
        )
    if folder.manifest["threads"] != get_threads():
        raise ConfigError(
            f"{path}: ran with {folder.manifest['threads']} threads, this process has {get_threads()}",
            code="other-threads",
            hint=f"--threads {folder.manifest['threads']} gives the same bits",
        )
    folder.update_manifest(status="running")
    return folder


def trainable_part(arm: str, manifest: Manifest) -> slice:
    """The private arm trains the head alone; every other arm all of the model."""
    return manifest.part(HEAD) if arm == "federated_dp" else slice(0, manifest.size)


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
            raise PlanError(
                "arm `pooled` exists in simulation only: real hospitals do not pool images",
                code="no-pooled-arm",
            )
        return [("pooled", list(pooled))]
    return [(arm, list(training))]


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
