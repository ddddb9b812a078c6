"""The models that a run released, and the plan that scores them: an evaluation as a run of its own.

A finished run keeps the digest of each of its models in its manifest. Only weights with that digest are
scored, under the name that they have there. The plan of an evaluation is that of the run with no arms, so
that hospitals approve and price it like any other. It names the models by digest and who trained them, and
not who is asked: one text for all hospitals, and the same one whoever is asked later. Its run is named after
its hash, so that a hospital knows a question that it has answered, and gives the stored answer again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.arms import PUBLIC, is_private
from common.errors import ConfigError
from common.model_file import load_model
from common.models import network_of
from common.plan import Evaluate, ReleasedModel, RunPlan
from common.pricing import EVALUATION, charges, plan_epsilon, with_noise
from common.privacy import epsilon_text
from common.weights import Manifest, digest, manifest_of
from server.run.conduct import Released, initial_weights
from server.run_folder import MANIFEST, PLAN, RunFolder

PREFIX, MAX_NAME = "evaluate-", 32


def evaluation_plan_refused(plan: str) -> ConfigError:
    """The plan of an evaluation was given to a command that trains."""
    return ConfigError(
        f"{plan}: the plan of an evaluation, which trains nothing",
        code="evaluation-plan",
        hint="fedqc evaluate MODEL|RUN --sites SITE carries it out",
    )


def kept_model(folder: RunFolder, name: str, manifest: Manifest) -> np.ndarray:
    """The weights of a model in a run folder, float32 (parameters,), whatever they are.

    Raises:
        ConfigError: the file is missing or of another network (`wrong-model`).
    """
    arm, _, site = name.partition("/")
    path = folder.arm(arm, site or None).model_path
    if arm == PUBLIC and not path.is_file():
        return initial_weights(folder.plan, manifest)
    return load_model(path, manifest)


def noted_models(folder: RunFolder) -> dict[str, str]:
    """Name -> digest of the models that a run released.

    Raises:
        ConfigError: `not-finished`; `not-released`: the manifest of an earlier version says nothing.
    """
    noted: dict[str, str] = folder.manifest.get("models", {})
    if not noted:
        _ = folder.evaluation  # raises where the run has not ended
        raise ConfigError(
            f"{folder.path}: its manifest does not say which models it released",
            code="not-released",
            hint=f"fedqc run resume {folder.path} notes it, and trains nothing again",
        )
    return noted


def released_models(folder: RunFolder, names: Sequence[str] = ()) -> Released:
    """Models of a finished run, each as the run released it, and what it promised those who trained them.

    Args:
        names: of models, or of arms, which mean all models of the arm; () means every model.
    Raises:
        ConfigError: as `noted_models`; `not-released`: the run has no such model, or its file has other
            weights than the manifest says.
    """
    noted = noted_models(folder)
    wanted = [name for name in noted if not names or {name, name.partition("/")[0]} & set(names)]
    for name in names:
        if not any(name in (one, one.partition("/")[0]) for one in wanted):
            raise ConfigError(
                f"{folder.path}: released no model {name!r}",
                code="not-released",
                hint=f"it released: {', '.join(noted)}",
            )
    manifest = _manifest(folder.plan)
    models = {name: kept_model(folder, name, manifest) for name in wanted}
    for name, flat in models.items():
        if digest(flat) != noted[name]:
            raise ConfigError(
                f"{folder.path}: the file of model {name} has other weights than the run released",
                code="not-released",
                hint=f"restore it; fedqc verify {folder.path} names what else does not hold",
            )
    promised = dict(folder.evaluation["privacy"])
    private = any(is_private(name.partition("/")[0]) for name in models)
    return Released(models=models, privacy=promised if private else {})


def run_of(model: Path, runs: Sequence[Path] = ()) -> tuple[RunFolder, tuple[str, ...]]:
    """The run of a model file or of a run folder, and the names in it that are meant: () for all.

    Args:
        model: a run folder, or a model file: in its run folder, or a copy elsewhere of one under `runs`.
        runs: folders with run folders below them.
    Raises:
        ConfigError: `no-such-run` (neither a run folder nor a file), `wrong-model`, `not-released` (no run is
            found that says it released the file).
    """
    if model.is_dir() or not model.exists():
        return RunFolder.open(model), ()
    parents = model.absolute().parents
    around = [path for path in parents if (path / PLAN).is_file() and (path / MANIFEST).is_file()]
    below = [path.parent for above in runs for path in sorted(above.glob(f"*/{MANIFEST}"))]
    for folder in (RunFolder.open(path) for path in (*around, *below)):
        try:
            weights = load_model(model, _manifest(folder.plan))
        except ConfigError:
            if folder.path in around:
                raise
            continue
        if folder.path in around:
            noted_models(folder)
        for name, noted in folder.manifest.get("models", {}).items():
            if noted == digest(weights):
                return folder, (name,)
    raise ConfigError(
        f"{model}: no run is known that released these weights",
        code="not-released",
        hint="name the model in its run folder, or the run folder itself",
    )


def evaluation_plan(folder: RunFolder, released: Released, *, epsilon: float | None = None) -> RunPlan:
    """The plan that scores released models of a run, with its noise.

    Args:
        released: as `released_models`.
        epsilon: of a patient of a hospital that is scored with noise; None: what the run's plan asks.
    Raises:
        ConfigError: no noise gives that epsilon; or the run is an evaluation itself (`not-released`).
    """
    plan, manifest = folder.plan, folder.manifest
    if plan.evaluate is not None:
        raise ConfigError(
            f"{folder.path}: an evaluation, which releases no model",
            code="not-released",
            hint=f"name the run that did: {plan.evaluate.run}",
        )
    noise = {"noise_multiplier": None, "evaluation_noise_multiplier": None, "alternatives": False}
    privacy = plan.privacy.model_copy(
        update=noise | {"epsilon": plan.privacy.epsilon if epsilon is None else epsilon}
    )
    evaluate = Evaluate(
        run=str(manifest["run"]),
        models=tuple(ReleasedModel(name=name, sha256=digest(flat)) for name, flat in released.models.items()),
        trained=tuple(sorted(site["site"] for site in manifest["sites"] if site["role"] == "training")),
    )
    return with_noise(
        plan.model_copy(
            update={
                "name": f"{PREFIX}{plan.name}"[:MAX_NAME].rstrip("-"),
                "question": f"How good are the models of run {manifest['run']} here?",
                "arms": (),
                "held_out": (),
                "leave_one_site_out": (),
                "privacy": privacy,
                "evaluate": evaluate,
            }
        )
    )


def price_text(plan: RunPlan, sites: Sequence[str]) -> str:
    """What an evaluation will do, and what it costs, in a line, before anybody is asked."""
    assert plan.evaluate is not None
    names = [model.name for model in plan.evaluate.models]
    asked = ", ".join(
        f"{site} ({'trained' if plan.trained_at(site) else 'not trained'} there)" for site in sites
    )
    price = f"epsilon {epsilon_text(plan_epsilon(plan))}, delta {plan.privacy.delta:g}"
    noise = charges(plan)[EVALUATION].noise_multiplier
    return (
        f"scores {', '.join(names)} of run {plan.evaluate.run} at {asked}. A hospital that is scored with "
        f"noise is charged {price} a patient, once (noise multiplier {noise:g}); asked again, nothing"
    )


def _manifest(plan: RunPlan) -> Manifest:
    return manifest_of(network_of(plan.model).state_dict())
