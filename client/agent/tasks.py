"""Carry out the tasks of one site: describe it, train, evaluate.

Each task is checked against the site's policy and, where patients are touched, charged to the ledger first. A
failure leaves the site as a refusal (client/agent/failures.py).
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from client.agent.consent import Consent
from client.agent.evaluation import evaluate
from client.agent.failures import refusal_for
from client.agent.model_check import check_base, decode_base
from client.data.cohort import Cohort, admit_assessed, data_digests, load_cohort
from client.dicom.cache import is_prepared
from client.site.answer_store import AnswerKey, Outbox
from client.site.config import SiteConfig, read_site, site_key
from client.site.ledger import Ledger, ledger_file_name
from client.site.policy import (
    SitePolicy,
    admit_evaluation,
    admit_training,
    default_policy,
    private_schedule,
    read_policy,
)
from client.site.run_data import accept_changed_data, bind_data, check_data
from client.site.split import split_of_site
from common.arms import ARMS, HEAD
from common.artifacts import NAMES
from common.errors import DataError, RefusedError, RunError
from common.learning import extract_features, seed_for, train_epochs
from common.model_file import load_model
from common.models import as_classifier, build
from common.plan import RunPlan
from common.privacy import GaussianSteps, filter_admits, rdp_epsilon
from common.weights import (
    REACH,
    digest,
    encode_steps,
    flatten,
    manifest_of,
    quantize_int8,
    resolve_initial,
    to_grid,
    unflatten,
)
from common.wire import (
    DescribeTask,
    EvaluateTask,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    TrainTask,
    WireMessage,
)

TRAIN = 0
MINIMUM_CELL = 10
"""No score of hospital patients leaves that rests on fewer patients with, or without, the artifact."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work in progress: who is notified of its public steps, and whether its answer is still awaited."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def ticker(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for loops: reports each new step number once, and ends the loop by a RunError (code
        `cancelled`) when the caller has gone.
        """
        reported = -1

        def tick(done: int) -> None:
            nonlocal reported
            if self.cancelled.is_set():
                raise RunError("the caller no longer waits for this answer", code="cancelled")
            if done != reported:
                reported = done
                self.progress(stage, done, total)

        return tick


@functools.lru_cache(maxsize=64)
def agent_for(site_yaml: str, plan: RunPlan) -> Agent:
    """One agent a site and plan, kept warm: cohort, features and ledger stay open between messages.

    Args:
        site_yaml: absolute path of a site.yaml.
    """
    return Agent(Path(site_yaml), plan)


# digest of the backbone, rows of the cohort, features of these rows
_NO_FEATURES: tuple[str, np.ndarray, np.ndarray] = ("", np.zeros(0, np.int64), np.zeros(0))


class Agent:
    """What one site does for one plan."""

    def __init__(self, site_yaml: Path, plan: RunPlan) -> None:
        self._path, self._plan = site_yaml, plan
        self.site = read_site(site_yaml)[0]
        self.state = site_yaml.parent / self.site.state
        self._cohort: Cohort | None = None
        self._consent = Consent(site_yaml.parent, self.site)
        # of the frozen backbone with this digest: rows of the cohort, and their features
        self._features = _NO_FEATURES
        self._models = ReceivedModels(plan)

    @property
    def policy(self) -> SitePolicy:
        return policy_of(self.site, self._path.parent)

    @property
    def name(self) -> str:
        return self.site.name

    def describe(self, task: DescribeTask | None = None) -> WireMessage:
        """The site's description or, where the task asks for a rehearsal, its readiness; or a refusal."""
        if task is not None and task.rehearse:
            return self._guarded(task.run, self._readiness)
        return SiteDescription(
            site=self.name,
            kind=self.site.kind,
            nominal_patients=self.site.nominal_patients,
            stand_in=self.site.stand_in or "",
            unit=self.site.patients.unit,
            ethics=self._consent.hash_of(self._plan.sha256()) if self.site.kind == "hospital" else "",
            version=version("fedqc"),
        )

    def train(self, task: TrainTask, job: Job | None = None) -> WireMessage:
        """The site's update of one round, or a refusal."""
        work = self._train_private if task.private else self._train

        def checked() -> WireMessage:
            self.renew_consent()
            return work(task, job or Job())

        return self._guarded(task.run, checked)

    def evaluate(self, task: EvaluateTask, job: Job | None = None) -> WireMessage:
        """The site's scores of the task's models, or a refusal."""

        def checked() -> WireMessage:
            self.renew_consent()
            return self._evaluate(task, job or Job())

        return self._guarded(task.run, checked)

    def renew_consent(self) -> None:
        """Read cohort.yaml again, and leave out who has opted out since: also of what is in memory.

        Raises: as `Consent.admit`.
        """
        self._consent.admit()
        if self._cohort is None:
            return
        self._cohort = self._consent.subtracted(self._cohort)
        backbone, rows, features = self._features
        kept = self._cohort.part[rows] >= 0
        if not kept.all():
            self._features = backbone, rows[kept], features[kept]

    def _guarded(self, run: str, work: Callable[[], WireMessage]) -> WireMessage:
        try:
            return work()
        except Exception as failure:
            return refusal_for(failure, site=self.name, run=run, state=self.state, plan=self._plan)

    def _readiness(self) -> SiteReadiness:
        """How this site would answer a run of the plan, from policy, ledger, folder and machine; reads no
        patient.
        """
        arms: dict[str, str] = {}
        reasons: dict[str, str] = {}
        affordable = None
        for arm in self._plan.arms:
            if not ARMS[arm].at_hospitals:
                continue
            try:
                self._consent.admit()
                self.admit(private=ARMS[arm].private)
            except RefusedError as refusal:
                arms[arm], reasons[arm] = refusal.code, refusal.public_reason
                continue
            arms[arm] = "accept"
            if ARMS[arm].private:
                affordable = self._rounds_affordable()
                if affordable < self._plan.training.rounds:
                    arms[arm] = "budget-exhausted"
                    reasons[arm] = (
                        f"what is left of the budget covers {affordable} of "
                        f"{self._plan.training.rounds} rounds"
                    )
        try:
            self._consent.admit()
            admit_evaluation(self.policy, self._evaluation_mode(), kind=self.site.kind)
            evaluation = "accept"
        except RefusedError as refusal:
            evaluation = refusal.code
        return SiteReadiness(
            site=self.name,
            kind=self.site.kind,
            nominal_patients=self.site.nominal_patients,
            version=version("fedqc"),
            arms=arms,
            reasons=reasons,
            evaluation=evaluation,
            data_prepared=is_prepared(self.state / "cache", self._plan.image_size),
            rounds_affordable=affordable,
            seconds_a_round=self._seconds_a_round(),
        )

    def admit(self, *, private: bool) -> None:
        """Check the plan's training against the site's policy, its split and what its readers assessed.

        Raises:
            RefusedError: the policy does not permit it; `split-differs`; `nothing-assessed`.
            ConfigError: `split-fixed`.
        """
        if self.site.assessed == ():
            raise RefusedError(
                f"{self.name}: site.yaml declares that no artifact was assessed",
                code="nothing-assessed",
                public_reason="no artifact was assessed at this site, so that it would teach nothing",
            )
        split_of_site(self.site, self._path.parent, self._plan.split)
        admit_training(
            self.policy,
            private=private,
            epsilon=rdp_epsilon([self._schedule()], self._plan.privacy.delta) if private else None,
            delta=self._plan.privacy.delta if private else None,
            clip_norm=self._plan.privacy.clip_norm if private else None,
            nominal_patients=self.site.nominal_patients,
            rounds=self._plan.training.rounds,
        )

    def admit_data(self, run: str) -> bool:
        """Check the site's data before a round: something to learn from, and unchanged since the run's first.

        Returns:
            whether data changed during this run, and the operator accepted it.
        Raises:
            DataError: `nothing-assessed`, `assessed-differs`, `data-changed`; never sent anywhere.
        """
        with self._data_read_again_if_refused():
            admit_assessed(self.cohort())
        return self.bind_data(run)

    def bind_data(self, run: str) -> bool:
        """As `client.site.run_data.bind_data`, for the data of this site."""
        cohort = self.cohort()
        with self._data_read_again_if_refused():
            return bind_data(
                self.state, run, self._plan.sha256(), data_digests(cohort), opted_out=cohort.opted_out
            )

    @contextmanager
    def _data_read_again_if_refused(self) -> Iterator[None]:
        """Forget data that were refused: the operator corrects them while the agent runs."""
        try:
            yield
        except DataError:
            self._cohort, self._features = None, _NO_FEATURES
            raise

    def record_non_private(self, task: TrainTask) -> None:
        """Record training without noise in the ledger of a hospital, before it begins."""
        if self.site.kind == "hospital":
            with _ledger(self.site, self._path.parent) as ledger:
                ledger.record_non_private(
                    request=_charge(task), purpose=task.arm, fingerprint=self.cohort().fingerprint
                )

    def _rounds_affordable(self) -> int:
        with _ledger(self.site, self._path.parent) as ledger:
            history = ledger.history()
        fitting = (
            rounds
            for rounds in range(self._plan.training.rounds, 0, -1)
            if filter_admits(
                history,
                private_schedule(self._plan, rounds),
                epsilon=self.policy.max_epsilon,
                delta=self._plan.privacy.delta,
            )
        )
        return next(fitting, 0)

    def _seconds_a_round(self) -> float:
        """Training time of one non-private round, from two batches of random numbers and the nominal number
        of patients.
        """
        training, slices = (
            self._plan.training,
            self.site.nominal_patients * self._plan.privacy.max_slices_per_patient,
        )
        count = 2 * training.batch_size
        rng = np.random.default_rng(0)
        images = rng.integers(-1000, 1000, (count, self._plan.image_size, self._plan.image_size)).astype(
            np.int16
        )
        labels = np.zeros((count, len(NAMES)), np.float32)
        began = time.monotonic()
        one = training.model_copy(update={"local_epochs": 1})
        train_epochs(
            build(self._plan.model.name),
            images,
            np.zeros(count, np.int8),
            labels,
            np.arange(count),
            training=one,
            seed=0,
        )
        return float(f"{(time.monotonic() - began) * slices / count * training.local_epochs:.2g}")

    def _train(self, task: TrainTask, job: Job) -> SiteUpdate:
        self.admit(private=False)
        base = self._models.receive(task)
        has_changed = self.admit_data(task.run)
        self.record_non_private(task)
        cohort = self.cohort()
        steps = train_without_noise(self._plan, task, base, self.name, training_slices(cohort), job)
        return site_update(self._plan, task, base, steps, self._owner, data_changed=has_changed)

    @property
    def _owner(self) -> UpdateOwner:
        return UpdateOwner(name=self.name, nominal_patients=self.site.nominal_patients)

    def _train_private(self, task: TrainTask, job: Job) -> SiteUpdate:
        outbox = Outbox(self.state / "outbox")
        stored = outbox.get(_question(task))
        if stored is not None:
            return SiteUpdate.from_bytes(stored)
        self.admit(private=True)
        base = self._models.receive(task)
        has_changed = self.admit_data(task.run)
        with _ledger(self.site, self._path.parent) as ledger:
            update = self._train_charged(task, base, ledger, job)
            answer = update.model_copy(update={"data_changed": has_changed})
            return SiteUpdate.from_bytes(outbox.put(_question(task), answer.to_bytes()))

    def _train_charged(self, task: TrainTask, base: np.ndarray, ledger: Ledger, job: Job) -> SiteUpdate:
        """Reserve, train and commit; the caller stores the update, and only then answers: in this order a
        crash can over-count, never under-count.
        """
        # brings Opacus: a second of CPU and 100 MiB that other arms do without
        from client.dp.dp_sgd import PrivateSteps, train_private_head

        plan, privacy, total = self._plan, self._plan.privacy, self._schedule()
        reservation = ledger.reserve(
            request=_charge(task),
            steps=total,
            purpose=task.arm,
            fingerprint=self.cohort().fingerprint,
            max_epsilon=self.policy.max_epsilon,
            delta=privacy.delta,
        )
        cohort = self.cohort()
        rows = np.flatnonzero(cohort.part == TRAIN)
        model = build(plan.model.name)
        manifest = manifest_of(model.state_dict())
        model.load_state_dict(unflatten(base, manifest))
        head = as_classifier(model).head
        trained = train_private_head(
            head.weight.detach().numpy(),
            head.bias.detach().numpy(),
            self._cached_features(model, base[: manifest.part(HEAD).start], rows),
            cohort.labels[rows],
            cohort.patients[rows],
            PrivateSteps(
                steps=plan.private_steps_per_round,
                learning_rate=privacy.learning_rate,
                clip_norm=privacy.clip_norm,
                noise_multiplier=total.noise_multiplier,
                sample_rate=privacy.sample_rate,
                nominal_patients=self.site.nominal_patients,
                max_slices_per_patient=privacy.max_slices_per_patient,
            ),
            tick=job.ticker("step", plan.private_steps_per_round),
        )
        ledger.commit(reservation, steps_done=trained.steps_done, part=f"round {task.round}")
        before = base[manifest.part(HEAD)].astype(np.float64)
        after = np.concatenate([trained.weight.ravel(), trained.bias.ravel()])
        # of a noised result: post-processing, costs nothing
        return site_update(
            plan,
            task,
            base,
            to_grid(before + np.clip(after - before, -REACH, REACH), before),
            self._owner,
            noise_multiplier=total.noise_multiplier,
            epsilon=rdp_epsilon([total], privacy.delta),
            delta=privacy.delta,
        )

    def _evaluate(self, task: EvaluateTask, job: Job) -> SiteEvaluation:
        if task.everyone and self.name not in self._plan.held_out:
            raise RefusedError(
                "scoring every patient is for held-out sites",
                code="evaluation-not-permitted",
                public_reason="this site trains: only test patients",
            )
        size = manifest_of(build(self._plan.model.name).state_dict()).size
        if task.weights.shape != (len(task.models), size) or not np.isfinite(task.weights).all():
            raise RefusedError(
                "models of another shape",
                code="crafted-model",
                public_reason="the models are not of the plan's network",
            )
        mode = self._evaluation_mode()
        admit_evaluation(self.policy, mode, kind=self.site.kind)
        has_changed = self.bind_data(task.run)
        histograms, covariance = evaluate(
            self.cohort(),
            self._plan.model.name,
            task.weights,
            everyone=task.everyone,
            minimum_cell=MINIMUM_CELL if self.site.kind == "hospital" else 0,
            tick=job.ticker("model", len(task.models)),
        )
        return SiteEvaluation(
            site=self.name,
            run=task.run,
            models=task.models,
            mode=mode,
            histograms=histograms,
            covariance=covariance,
            data_changed=has_changed,
        )

    def _evaluation_mode(self) -> Literal["disclosed", "synthetic"]:
        return "disclosed" if self.site.kind == "hospital" else "synthetic"

    def cohort(self) -> Cohort:
        """The site's data as the plan asks for it, read once.

        Raises:
            DataError, ConfigError: the folder cannot be used; with local detail that is never sent.
        """
        if self._cohort is None:
            self._cohort = self._consent.subtracted(prepare(self._path, self._plan))
        return self._cohort

    def _cached_features(self, model: object, backbone: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The frozen backbone does not change between private rounds, so its features are computed once."""
        fingerprint = digest(backbone)
        if self._features[0] != fingerprint or not np.array_equal(self._features[1], rows):
            cohort = self.cohort()
            features = extract_features(model, cohort.images, cohort.modality, rows)  # type: ignore[arg-type]
            self._features = fingerprint, rows, features
        return self._features[2]

    @functools.cache  # noqa: B019 - agents live as long as the process
    def _schedule(self) -> GaussianSteps:
        return private_schedule(self._plan)


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
        manifest = manifest_of(build(model.name).state_dict())
        trainable = manifest.part(HEAD) if task.private else slice(0, manifest.size)
        held = self._held.setdefault(_charge(task), {})
        base = decode_base(task, manifest.size, trainable, held)
        if model.initial.startswith("package:"):
            initial = load_model(resolve_initial(model.initial, model.sha256), manifest)
            check_base(base, initial, manifest, frozen=slice(0, trainable.start) if task.private else None)
        else:  # the starting weights lie at the coordinator: only what needs no comparison can be checked
            check_base(base, None, manifest, frozen=None)
        held.clear()
        held[digest(base)] = base
        return base


@dataclass(frozen=True, kw_only=True)
class TrainingSlices:
    """Slices of a site and the rows that it may train on."""

    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A), nan where not assessed
    rows: np.ndarray  # int64 (training slices,)


def training_slices(cohort: Cohort) -> TrainingSlices:
    """The slices of a cohort with the rows of its training patients."""
    return TrainingSlices(
        images=cohort.images,
        modality=cohort.modality,
        labels=cohort.labels,
        rows=np.flatnonzero(cohort.part == TRAIN),
    )


def train_without_noise(
    plan: RunPlan, task: TrainTask, base: np.ndarray, name: str, slices: TrainingSlices, job: Job
) -> np.ndarray:
    """Train the whole network for one round.

    Args:
        base: float32 (parameters,).
        name: of the site; with the plan's seed and the round it decides the shuffles.
    Returns:
        the update in whole grid steps, int32 (parameters,).
    """
    model = build(plan.model.name)
    model.load_state_dict(unflatten(base, manifest_of(model.state_dict())))
    train_epochs(
        model,
        slices.images,
        slices.modality,
        slices.labels,
        slices.rows,
        training=plan.training.in_round(task.round),
        seed=seed_for(plan.seed, name, task.round),
        tick=job.ticker("epoch", plan.training.local_epochs),
    )
    return to_grid(flatten(model.state_dict()), base)


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
    **claim: float,
) -> SiteUpdate:
    """The answer to a training task.

    Args:
        base: float32 (parameters,), what the update starts from.
        steps: int32 (trainable parameters,), whole grid steps; noised already in a private arm.
        data_changed: whether the site's data changed during the run, and its operator accepted that.
        claim: noise multiplier, epsilon and delta of a private update.
    """
    codec, added = plan.federation.codec, 0.0
    if codec == "int8":  # it rounds at random what has been noised already, or what was never private
        seed = seed_for(plan.seed, f"{owner.name}/{task.arm}", task.round)
        steps, added = quantize_int8(steps, np.random.default_rng(seed))
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
        data_changed=data_changed,
        update=steps,
        **claim,
    )


def _charge(task: TrainTask) -> str:
    """What one reservation covers: an arm of a run, written so that no two arms of any runs read alike."""
    return json.dumps([task.run, task.arm])


def _question(task: TrainTask) -> AnswerKey:
    return task.run, task.arm, task.round, "train"


def _ledger(site: SiteConfig, folder: Path) -> Ledger:
    state = folder / site.state
    return Ledger.open(state / ledger_file_name(site.cohort), cohort=site.cohort, key=site_key(state))


def policy_of(site: SiteConfig, folder: Path) -> SitePolicy:
    """The policy file that site.yaml names, else the default of the site's kind."""
    return read_policy(folder / site.policy) if site.policy else default_policy(site.kind)


def check_run_data(cohort: Cohort, run: str, plan: RunPlan, *, accept: bool) -> tuple[str, ...]:
    """Compare a site's data with those of the run's first round, before a simulation continues.

    Args:
        accept: accept other data, as an operator does by `fedqc site approve --changed-data`.
    Returns:
        what was accepted; () where nothing changed.
    Raises:
        DataError: the data changed, and nobody accepted that (code `data-changed`).
    """
    state = cohort.folder / cohort.site.state
    try:
        check_data(state, run, data_digests(cohort), opted_out=cohort.opted_out)
    except DataError as refusal:
        if accept:
            return accept_changed_data(state, run, plan.sha256())
        refusal.hint = "restore the data, or continue with these: fedqc run resume RUN --accept-changed-data"
        raise
    return ()


def prepare(site_yaml: Path, plan: RunPlan, *, accept_quarantine: bool = False) -> Cohort:
    """Open a site's data as the plan asks for it, building the cache where there is none. The split of a site
    that trains is kept from then on.

    Raises:
        DataError, ConfigError: what is wrong with the folder, with local detail; never sent anywhere.
        RefusedError: `split-differs`.
    """
    trains = read_site(site_yaml)[0].name not in plan.held_out
    return load_cohort(
        site_yaml,
        size=plan.image_size,
        plan_split=plan.split if trains else None,
        quarantine="accept" if accept_quarantine else "refuse",
        fix=trains,
    )
