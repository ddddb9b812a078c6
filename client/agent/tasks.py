"""What a hospital does when asked: describe itself, train, evaluate. It trusts nothing it is told.

Every request is checked against the site's policy and, where patients are touched, charged to the ledger
first. What goes wrong inside leaves as one code; the details stay in `<state>/site.log`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import secrets
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from client.agent.evaluation import evaluate
from client.agent.model_check import check_base, decode_base
from client.data.cohort import Cohort, load_cohort
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
from common.artifacts import NAMES
from common.errors import FedqcError, RefusedError, RunError
from common.learning import extract_features, seed_for, train_epochs
from common.model_file import load_model
from common.models import as_classifier, build
from common.plan import RunPlan, parse_plan
from common.privacy import GaussianSteps, filter_admits, rdp_epsilon
from common.weights import (
    REACH,
    Manifest,
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
    Refusal,
    SiteDescription,
    SiteEvaluation,
    SiteReadiness,
    SiteUpdate,
    TrainTask,
    WireMessage,
)

SITE_FAILURE = "site-failure"
DISK_FULL = "disk-full"
OF_THE_QUESTION = {
    "bad-plan": "the plan cannot be read, or is not written as it is hashed",
    "bad-message": "the task cannot be read",
    "bad-frame": "the model in the task cannot be decoded",
    "bad-privacy-parameters": "the plan's noise, sampling rate or number of steps is out of range",
    "unknown-model": "the plan's network is not known here",
    "no-initial-weights": "the plan's starting weights are not installed here",
    "wrong-initial-weights": "the plan's starting weights are not those installed here",
    "wrong-model": "the plan's starting weights are of another network",
}
"""Failures that nothing but the question can lead to, and what is said of them outside."""
TRAIN = 0
MINIMUM_CELL = 10
"""Of hospital patients, no score is told that rests on fewer with or without the artifact."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work that is being done for somebody: who hears of its public steps, and whether it is still wanted."""

    progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def ticker(self, stage: str, total: int) -> Callable[[int], None]:
        """A callback for loops: passes each new step number on once, and ends the loop when nobody waits for
        the work any more.
        """
        told = -1

        def tick(done: int) -> None:
            nonlocal told
            if self.cancelled.is_set():
                raise RunError("nobody waits for this answer any more", code="cancelled")
            if done != told:
                told = done
                self.progress(stage, done, total)

        return tick


@functools.lru_cache(maxsize=64)
def agent_for(site_config: str, plan_json: str) -> Agent:
    """One agent a site and plan, kept warm: cohort, features and ledger stay open between messages.

    Args:
        site_config: absolute path of a site.yaml; several, joined by the path separator, make the pooled
            baseline.
    """
    plan = parse_plan(json.loads(plan_json))
    paths = [Path(part) for part in site_config.split(os.pathsep)]
    return Agent(paths, plan)


class Agent:
    def __init__(self, site_yamls: list[Path], plan: RunPlan) -> None:
        self._paths, self._plan = site_yamls, plan
        self._sites = [read_site(path)[0] for path in site_yamls]
        self._state = site_yamls[0].parent / self._sites[0].state
        self._cohorts: list[Cohort] = []
        self._features: tuple[str, np.ndarray] = ("", np.zeros(0))
        self._held: dict[str, dict[str, np.ndarray]] = {}  # run and arm -> the model last sent, by digest

    @property
    def site(self) -> SiteConfig:
        return self._sites[0]

    @property
    def policy(self) -> SitePolicy:
        return policy_of(self.site, self._paths[0].parent)

    @property
    def name(self) -> str:
        return self.site.name if len(self._sites) == 1 else "pooled"

    def describe(self, task: DescribeTask | None = None) -> WireMessage:
        if task is not None and task.rehearse:
            return self._guarded(task.run, self._readiness)
        return SiteDescription(
            site=self.name,
            kind=self.site.kind,
            members=tuple(site.name for site in self._sites) if len(self._sites) > 1 else (),
            nominal_patients=sum(site.nominal_patients for site in self._sites),
            stand_in=self.site.stand_in or "",
            version=version("fedqc"),
        )

    def train(self, task: TrainTask, job: Job | None = None) -> WireMessage:
        work = self._train_private if task.private else self._train
        return self._guarded(task.run, lambda: work(task, job or Job()))

    def evaluate(self, task: EvaluateTask, job: Job | None = None) -> WireMessage:
        return self._guarded(task.run, lambda: self._evaluate(task, job or Job()))

    def _guarded(self, run: str, work: Callable[[], WireMessage]) -> WireMessage:
        try:
            return work()
        except Exception as failure:
            if isinstance(failure, RefusedError) and not disk_is_full(failure):
                return Refusal(site=self.name, run=run, code=failure.code, reason=failure.public_reason)
            if isinstance(failure, FedqcError) and failure.code in OF_THE_QUESTION:
                return Refusal(
                    site=self.name, run=run, code=failure.code, reason=OF_THE_QUESTION[failure.code]
                )
            incident = secrets.token_hex(6)
            with suppress(OSError):  # on a full disk there is no log either
                self._log(f"incident {incident}: {advice(failure, self._plan)}\n{traceback.format_exc()}")
            # met by ledger or outbox: says nothing of a patient
            if disk_is_full(failure) and isinstance(failure, RefusedError | RunError):
                return Refusal(
                    site=self.name,
                    run=run,
                    code=DISK_FULL,
                    reason="the site's disk is full",
                    incident=incident,
                )
            return Refusal(
                site=self.name,
                run=run,
                code=SITE_FAILURE,
                reason="the site failed; see its log",
                incident=incident,
            )

    def _readiness(self) -> SiteReadiness:
        """What a run of this plan would meet here. Looks at policy, ledger, folder and machine; at no
        patient.
        """
        arms: dict[str, str] = {}
        reasons: dict[str, str] = {}
        for arm in self._plan.arms:
            if arm in ("public", "pooled"):
                continue
            try:
                self._admit(private=arm == "federated_dp")
            except RefusedError as refusal:
                arms[arm], reasons[arm] = refusal.code, refusal.public_reason
            else:
                arms[arm] = "accept"
        try:
            admit_evaluation(self.policy, self._evaluation_mode(), kind=self.site.kind)
            evaluation = "accept"
        except RefusedError as refusal:
            evaluation = refusal.code
        affordable = self._rounds_affordable() if arms.get("federated_dp") == "accept" else None
        if affordable is not None and affordable < self._plan.training.rounds:
            arms["federated_dp"] = "budget-exhausted"
            reasons["federated_dp"] = (
                f"what is left of the budget covers {affordable} of {self._plan.training.rounds} rounds"
            )
        return SiteReadiness(
            site=self.name,
            kind=self.site.kind,
            nominal_patients=self.site.nominal_patients,
            version=version("fedqc"),
            arms=arms,
            reasons=reasons,
            evaluation=evaluation,
            data_prepared=is_prepared(self._state / "cache", self._plan.image_size),
            rounds_affordable=affordable,
            seconds_a_round=self._seconds_a_round(),
        )

    def _admit(self, *, private: bool) -> None:
        for site, path in zip(self._sites, self._paths, strict=True):
            admit_training(
                policy_of(site, path.parent),
                private=private,
                epsilon=rdp_epsilon([self._schedule()], self._plan.privacy.delta) if private else None,
                delta=self._plan.privacy.delta if private else None,
                clip_norm=self._plan.privacy.clip_norm if private else None,
                nominal_patients=site.nominal_patients,
                rounds=self._plan.training.rounds,
            )

    def _rounds_affordable(self) -> int:
        wanted = self._plan.privacy
        with _ledger(self.site, self._paths[0].parent) as ledger:
            history = ledger.history()
        fitting = (
            rounds
            for rounds in range(self._plan.training.rounds, 0, -1)
            if filter_admits(
                history,
                private_schedule(self._plan, rounds),
                epsilon=self.policy.max_epsilon,
                delta=wanted.delta,
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

    def _trainable(self, manifest: Manifest, *, private: bool) -> slice:
        return manifest.part("head.") if private else slice(0, manifest.size)

    def _base(self, task: TrainTask, manifest: Manifest) -> np.ndarray:
        """The task's weights, decoded and found to be what honest rounds lead to. No data has been read
        before this.
        """
        trainable = self._trainable(manifest, private=task.private)
        held = self._held.setdefault(_charge(task), {})
        base = decode_base(task, manifest.size, trainable, held)
        if self._plan.model.initial.startswith("package:"):
            initial = load_model(resolve_initial(self._plan.model.initial, self._plan.model.sha256), manifest)
            check_base(base, initial, manifest, frozen=slice(0, trainable.start) if task.private else None)
        else:  # the starting weights lie at the coordinator: only what needs no comparison can be checked
            check_base(base, None, manifest, frozen=None)
        held.clear()
        held[digest(base)] = base
        return base

    def _train(self, task: TrainTask, job: Job) -> SiteUpdate:
        plan = self._plan
        self._admit(private=False)
        model = build(plan.model.name)
        manifest = manifest_of(model.state_dict())
        base = self._base(task, manifest)
        for site, path in zip(self._sites, self._paths, strict=True):
            if site.kind == "hospital":
                with _ledger(site, path.parent) as ledger:
                    ledger.record_non_private(
                        request=_charge(task), purpose=task.arm, fingerprint=self._fingerprint()
                    )
        images, modality, labels, rows = self._training_slices()
        model.load_state_dict(unflatten(base, manifest))
        seed = seed_for(plan.seed, self.name, task.round)
        tick = job.ticker("epoch", plan.training.local_epochs)
        train_epochs(
            model,
            images,
            modality,
            labels,
            rows,
            training=plan.training.in_round(task.round),
            seed=seed,
            tick=tick,
        )
        return self._update(task, base, to_grid(flatten(model.state_dict()), base))

    def _train_private(self, task: TrainTask, job: Job) -> SiteUpdate:
        if len(self._sites) > 1:
            raise RunError("the pooled baseline is not private", code="bad-message")
        outbox = Outbox(self._state / "outbox")
        stored = outbox.get(_question(task))
        if stored is not None:
            return SiteUpdate.from_bytes(stored)
        self._admit(private=True)
        base = self._base(task, manifest_of(build(self._plan.model.name).state_dict()))
        with _ledger(self.site, self._paths[0].parent) as ledger:
            return self._train_charged(task, base, ledger, outbox, job)

    def _train_charged(
        self, task: TrainTask, base: np.ndarray, ledger: Ledger, outbox: Outbox, job: Job
    ) -> SiteUpdate:
        """Reserve, train, commit, store, and only then answer: in this order a crash can over-count, never
        under-count.
        """
        # brings Opacus: a second of CPU and 100 MiB that other arms do without
        from client.dp.dp_sgd import PrivateSteps, train_private_head

        plan, wanted, total = self._plan, self._plan.privacy, self._schedule()
        reservation = ledger.reserve(
            request=_charge(task),
            steps=total,
            purpose=task.arm,
            fingerprint=self._fingerprint(),
            max_epsilon=self.policy.max_epsilon,
            delta=wanted.delta,
        )
        cohort = self._cohort()
        rows = np.flatnonzero(cohort.part == TRAIN)
        model = build(plan.model.name)
        manifest = manifest_of(model.state_dict())
        model.load_state_dict(unflatten(base, manifest))
        head = as_classifier(model).head
        trained = train_private_head(
            head.weight.detach().numpy(),
            head.bias.detach().numpy(),
            self._cached_features(model, base[: manifest.part("head.").start], rows),
            cohort.labels[rows],
            cohort.patients[rows],
            PrivateSteps(
                steps=plan.private_steps_per_round,
                learning_rate=wanted.learning_rate,
                clip_norm=wanted.clip_norm,
                noise_multiplier=total.noise_multiplier,
                sample_rate=wanted.sample_rate,
                nominal_patients=self.site.nominal_patients,
                max_slices_per_patient=wanted.max_slices_per_patient,
            ),
            tick=job.ticker("step", plan.private_steps_per_round),
        )
        ledger.commit(reservation, steps_done=trained.steps_done, part=f"round {task.round}")
        before = base[manifest.part("head.")].astype(np.float64)
        after = np.concatenate([trained.weight.ravel(), trained.bias.ravel()])
        # of a noised result: post-processing, costs nothing
        update = self._update(
            task,
            base,
            to_grid(before + np.clip(after - before, -REACH, REACH), before),
            noise_multiplier=total.noise_multiplier,
            epsilon=rdp_epsilon([total], wanted.delta),
            delta=wanted.delta,
        )
        return SiteUpdate.from_bytes(outbox.put(_question(task), update.to_bytes()))

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
        histograms, covariance = evaluate(
            self._cohort(),
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
        )

    def _evaluation_mode(self) -> Literal["disclosed", "synthetic"]:
        return "disclosed" if self.site.kind == "hospital" else "synthetic"

    def _update(self, task: TrainTask, base: np.ndarray, steps: np.ndarray, **claim: float) -> SiteUpdate:
        codec, added = self._plan.federation.codec, 0.0
        if codec == "int8":  # its coins touch what has been noised already, or what was never private
            seed = seed_for(self._plan.seed, f"{self.name}/{task.arm}", task.round)
            steps, added = quantize_int8(steps, np.random.default_rng(seed))
        elif codec == "lossless":
            steps = encode_steps(steps)
        return SiteUpdate(
            site=self.name,
            run=task.run,
            arm=task.arm,
            round=task.round,
            base_sha256=digest(base),
            weight=sum(site.nominal_patients for site in self._sites),
            private=task.private,
            added_variance=added,
            update=steps,
            **claim,
        )

    def _cohort(self) -> Cohort:
        return self._all_cohorts()[0]

    def _all_cohorts(self) -> list[Cohort]:
        if not self._cohorts:
            self._cohorts = [prepare(path, self._plan) for path in self._paths]
        return self._cohorts

    def _training_slices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """images, modality, labels and the rows of training patients, of all the agent's sites."""
        cohorts = self._all_cohorts()
        if len(cohorts) == 1:
            only = cohorts[0]
            return only.images, only.modality, only.labels, np.flatnonzero(only.part == TRAIN)
        rows = [np.flatnonzero(cohort.part == TRAIN) for cohort in cohorts]
        images, modality, labels = (
            np.concatenate(
                [getattr(cohort, name)[chosen] for cohort, chosen in zip(cohorts, rows, strict=True)]
            )
            for name in ("images", "modality", "labels")
        )
        return images, modality, labels, np.arange(len(images))

    def _cached_features(self, model: object, backbone: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The frozen backbone does not change between private rounds, so its features are computed once."""
        fingerprint = digest(backbone)
        if self._features[0] != fingerprint:
            cohort = self._cohort()
            self._features = fingerprint, extract_features(model, cohort.images, cohort.modality, rows)  # type: ignore[arg-type]
        return self._features[1]

    @functools.cache  # noqa: B019 - agents live as long as the process
    def _schedule(self) -> GaussianSteps:
        return private_schedule(self._plan)

    def _fingerprint(self) -> str:
        return self._cohort().fingerprint

    def _log(self, text: str) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with (self._state / "site.log").open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")


def advice(failure: BaseException, plan: RunPlan | None = None) -> str:
    """What the operator can do about it, for the site log."""
    if memory_is_short(failure):
        below = f" below {plan.training.batch_size}" if plan else ", smaller than the plan's"
        return f"out-of-memory: a batch size{below}, or a larger machine; ask the coordinator for the former"
    if disk_is_full(failure):
        return f"{DISK_FULL}: free some space; nothing was sent"
    return getattr(failure, "hint", "") or "see below"


_SHORT = ("out of memory", "allocate memory", "bad_alloc", "can't start new thread", "failed to map segment")
"""In what torch, the loader and Python say where there is none left."""


def memory_is_short(failure: BaseException) -> bool:
    """Whether a lack of memory is what `failure` came of."""
    return isinstance(failure, MemoryError) or any(sign in str(failure).lower() for sign in _SHORT)


# the second: no room for the index of the write-ahead log
_SQLITE_FULL = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)


def disk_is_full(failure: BaseException | None) -> bool:
    """Whether a full disk is what `failure` came of, in a file or in the ledger."""
    while failure is not None:
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(failure, sqlite3.Error) and getattr(failure, "sqlite_errorcode", None) in _SQLITE_FULL:
            return True
        failure = failure.__cause__ or failure.__context__
    return False


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


def prepare(site_yaml: Path, plan: RunPlan, *, accept_quarantine: bool = False) -> Cohort:
    """Open a site's data as the plan wants it, building the cache where there is none.

    Raises:
        DataError, ConfigError: what is wrong with the folder, with local detail; never sent anywhere.
    """
    split = (plan.split.train, plan.split.validation, plan.split.test)
    return load_cohort(
        site_yaml, size=plan.image_size, split=split, quarantine="accept" if accept_quarantine else "refuse"
    )
