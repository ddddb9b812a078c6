"""Train for one round: receive the model, train without noise, and put the update on the grid."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from client.agent.job import Job
from client.agent.lineage import packaged_weights
from client.agent.model_check import check_base, decode_base
from client.data.studies import CohortSamples
from common.arms import ARMS
from common.learning import seed_for, train_epochs
from common.model_file import load_model
from common.models import fresh, network_of
from common.plan import RunPlan
from common.studies import Images
from common.trainable import private_part, trainable_names, trained_part
from common.weights import (
    Part,
    digest,
    encode_steps,
    flatten,
    int8_variance,
    manifest_of,
    outside,
    quantize_int8,
    to_grid,
    unflatten,
)
from common.wire import SiteUpdate, TrainTask

TRAIN = 0


class ReceivedModels:
    """The models that a coordinator sends for a plan: decoded, checked, and remembered as the base of the
    next round's steps.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan
        self._held: dict[str, dict[str, np.ndarray]] = {}  # run and arm -> the model last sent, by digest

    def receive(self, task: TrainTask) -> np.ndarray:
        """The weights of a task, float32 (parameters,). No data has been read before this.

        Raises:
            RefusedError: they are not what honest rounds lead to (client/agent/model_check.py).
            RunError: a damaged frame (code `bad-frame`).
        """
        model = self._plan.model
        manifest = manifest_of(network_of(model).state_dict())
        is_part = ARMS[task.arm].trains_part
        trainable: Part = private_part(self._plan) if is_part else slice(0, manifest.size)
        held = self._held.setdefault(charge_name(task.run, task.arm), {})
        base = decode_base(task, manifest.size, trainable, held)
        initial: np.ndarray | None = None
        if (path := packaged_weights(model)) is not None:
            initial = load_model(path, manifest, model.labels)
        elif is_part and model.initial == "random":  # they are nobody's if they are those of the plan's seed
            random = fresh(model.name, self._plan.seed, model.args, model.labels)
            initial = flatten(random.state_dict())
        if initial is not None:
            frozen: Part | None = None
            if is_part:  # before the first round nothing has moved
                frozen = outside(trainable, manifest.size) if task.round > 1 else slice(0, manifest.size)
            check_base(base, initial, manifest, frozen=frozen, rounds_done=task.round - 1)
        else:  # the starting weights lie at the coordinator: only what needs no comparison can be checked
            check_base(base, None, manifest, frozen=None)
        held.clear()
        held[digest(base)] = base
        return base


@dataclass(frozen=True, kw_only=True)
class TrainingSlices:
    """Slices of a site, or its studies, and the rows that it may train on."""

    images: Images  # int16 (n, S, S), or n studies
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A), nan where not assessed
    rows: np.ndarray  # int64 (training slices,)
    weights: np.ndarray | None = None  # float32 (n,), of each slice's loss; None: all 1


def training_slices(samples: CohortSamples) -> TrainingSlices:
    """The samples of a cohort with the rows of its training patients."""
    return TrainingSlices(
        images=samples.images,
        modality=samples.modality,
        labels=samples.labels,
        rows=np.flatnonzero(samples.part == TRAIN),
    )


def train_without_noise(
    plan: RunPlan, task: TrainTask, base: np.ndarray, name: str, slices: TrainingSlices, job: Job
) -> np.ndarray:
    """Train the network for one round: all of it, or what a frozen arm trains.

    Args:
        base: float32 (parameters,).
        name: of the site; with the plan's seed and the round it decides the shuffles.
    Returns:
        the update in whole grid steps, int32 (trained parameters,).
    """
    model = network_of(plan.model)
    model.load_state_dict(unflatten(base, manifest_of(model.state_dict())))
    if ARMS[task.arm].frozen:
        trained = trainable_names(model, plan.privacy.trainable)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
    train_epochs(
        model,
        slices.images,
        slices.modality,
        slices.labels,
        slices.rows,
        training=plan.training.in_round(task.round),
        seed=seed_for(plan.seed, name, task.round),
        weights=slices.weights,
        outputs=plan.model.labels,
        tick=job.ticker("epoch", plan.training.local_epochs),
    )
    part = trained_part(plan, task.arm)
    return to_grid(flatten(model.state_dict())[part], base[part])


@dataclass(frozen=True, kw_only=True)
class UpdateOwner:
    """In whose name an update is sent, and its weight in the mean."""

    name: str
    nominal_patients: int


def site_update(
    plan: RunPlan,
    task: TrainTask,
    base: np.ndarray,
    steps: np.ndarray,
    owner: UpdateOwner,
    *,
    data_changed: bool = False,
    noise_multiplier: float = 0.0,
    epsilon: float | None = None,
    delta: float | None = None,
) -> SiteUpdate:
    """The answer to a training task.

    Args:
        base: float32 (parameters,), what the update starts from.
        steps: int32 (trainable parameters,), whole grid steps; noised already in a private arm.
        data_changed: whether the site's data changed during the run, and its operator accepted that.
        noise_multiplier, epsilon, delta: of a private update.
    """
    codec, added = plan.federation.codec, 0.0
    if codec == "int8":  # it rounds at random what has been noised already, or what was never private
        seed = seed_for(plan.seed, f"{owner.name}/{task.arm}", task.round)
        frame, _ = quantize_int8(steps, np.random.default_rng(seed))
        steps, added = frame, int8_variance(frame, steps.size)
    elif codec == "lossless":
        steps = encode_steps(steps)
    return SiteUpdate(
        site=owner.name,
        run=task.run,
        arm=task.arm,
        round=task.round,
        base_sha256=digest(base),
        weight=owner.nominal_patients,
        private=task.private,
        added_variance=added,
        noise_multiplier=noise_multiplier,
        epsilon=epsilon,
        delta=delta,
        data_changed=data_changed,
        update=steps,
    )


def charge_name(run: str, arm: str) -> str:
    """What one reservation covers: an arm of a run, written so that no two arms of any runs read alike."""
    return json.dumps([run, arm])
