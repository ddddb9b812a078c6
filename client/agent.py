"""What a hospital does when asked: describe itself, train, evaluate. It trusts nothing it is told.

Every request is checked against the site's policy and, where patients are touched, charged to the ledger first. What goes
wrong inside leaves as one code; the details stay in `<state>/site.log`.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from client.cohort import Cohort, SiteConfig, load_cohort, read_site, site_key
from client.evaluate import evaluate
from client.ledger import Ledger, ledger_file_name
from client.outbox import AnswerKey, Outbox
from client.policy import SitePolicy, admit_evaluation, admit_training, default_policy, read_policy
from common.errors import RefusedError, RunError
from common.learning import extract_features, seed_for, train_epochs
from common.models import as_classifier, build
from common.plan import RunPlan, parse_plan
from common.privacy import GaussianSteps, noise_multiplier_for, rdp_epsilon
from common.weights import REACH, digest, flatten, manifest_of, to_grid, unflatten
from common.wire import EvaluateTask, Refusal, SiteDescription, SiteEvaluation, SiteUpdate, TrainTask, WireMessage

SITE_FAILURE = "site-failure"
TRAIN = 0
MINIMUM_CELL = 10
"""Of hospital patients, no score is told that rests on fewer with or without the artifact."""


@functools.lru_cache(maxsize=64)
def agent_for(site_config: str, plan_json: str) -> Agent:
    """One agent a site and plan, kept warm: cohort, features and ledger stay open between messages.

    Args:
        site_config: absolute path of a site.yaml; several, joined by the path separator, make the pooled baseline.
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

    @property
    def site(self) -> SiteConfig:
        return self._sites[0]

    @property
    def policy(self) -> SitePolicy:
        return policy_of(self.site, self._paths[0].parent)

    @property
    def name(self) -> str:
        return self.site.name if len(self._sites) == 1 else "pooled"

    def describe(self) -> WireMessage:
        return SiteDescription(
            site=self.name,
            kind=self.site.kind,
            members=tuple(site.name for site in self._sites) if len(self._sites) > 1 else (),
            nominal_patients=sum(site.nominal_patients for site in self._sites),
            stand_in=self.site.stand_in or "",
            version=version("fedqc"),
        )

    def train(self, task: TrainTask) -> WireMessage:
        return self._guarded(task.run, lambda: self._train_private(task) if task.private else self._train(task))

    def evaluate(self, task: EvaluateTask) -> WireMessage:
        return self._guarded(task.run, lambda: self._evaluate(task))

    def _guarded(self, run: str, work: Callable[[], WireMessage]) -> WireMessage:
        try:
            return work()
        except RefusedError as refusal:
            return Refusal(site=self.name, run=run, code=refusal.code, reason=refusal.public_reason)
        except Exception:
            incident = secrets.token_hex(6)
            self._log(f"incident {incident}\n{traceback.format_exc()}")
            return Refusal(site=self.name, run=run, code=SITE_FAILURE, reason="the site failed; see its log", incident=incident)

    def _train(self, task: TrainTask) -> SiteUpdate:
        plan = self._plan
        for site, path in zip(self._sites, self._paths, strict=True):
            policy = policy_of(site, path.parent)
            admit_training(
                policy,
                private=False,
                epsilon=None,
                delta=None,
                clip_norm=None,
                nominal_patients=site.nominal_patients,
                rounds=plan.training.rounds,
            )
            if site.kind == "hospital":
                with _ledger(site, path.parent) as ledger:
                    ledger.record_non_private(request=_charge(task), purpose=task.arm, fingerprint=self._fingerprint())
        images, modality, labels, rows = self._training_slices()
        model = build(plan.model.name)
        manifest = manifest_of(model.state_dict())
        model.load_state_dict(unflatten(task.base, manifest))
        seed = seed_for(plan.seed, self.name, task.round)
        train_epochs(model, images, modality, labels, rows, training=plan.training, seed=seed)
        return self._update(task, to_grid(flatten(model.state_dict()), task.base))

    def _train_private(self, task: TrainTask) -> SiteUpdate:
        plan, wanted = self._plan, self._plan.privacy
        if len(self._sites) > 1:
            raise RunError("the pooled baseline is not private", code="bad-message")
        outbox = Outbox(self._state / "outbox")
        stored = outbox.get(_question(task))
        if stored is not None:
            return SiteUpdate.from_bytes(stored)
        total = GaussianSteps(
            noise_multiplier=wanted.noise_multiplier or self._noise_multiplier(),
            sample_rate=wanted.sample_rate,
            steps=plan.private_steps_per_round * plan.training.rounds,
        )
        epsilon = rdp_epsilon([total], wanted.delta)
        admit_training(
            self.policy,
            private=True,
            epsilon=epsilon,
            delta=wanted.delta,
            clip_norm=wanted.clip_norm,
            nominal_patients=self.site.nominal_patients,
            rounds=plan.training.rounds,
        )
        with _ledger(self.site, self._paths[0].parent) as ledger:
            return self._train_charged(task, total, epsilon, ledger, outbox)

    def _train_charged(self, task: TrainTask, total: GaussianSteps, epsilon: float, ledger: Ledger, outbox: Outbox) -> SiteUpdate:
        """Reserve, train, commit, store, and only then answer: in this order a crash can over-count, never under-count."""
        from client.dp.head import train_private_head  # brings Opacus: a second of CPU and 100 MiB that other arms do without

        plan, wanted = self._plan, self._plan.privacy
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
        model.load_state_dict(unflatten(task.base, manifest))
        head = as_classifier(model).head
        trained = train_private_head(
            head.weight.detach().numpy(),
            head.bias.detach().numpy(),
            self._cached_features(model, task.base[: manifest.part("head.").start], rows),
            cohort.labels[rows],
            cohort.patients[rows],
            steps=plan.private_steps_per_round,
            learning_rate=wanted.learning_rate,
            clip_norm=wanted.clip_norm,
            noise_multiplier=total.noise_multiplier,
            sample_rate=wanted.sample_rate,
            nominal_patients=self.site.nominal_patients,
            max_slices_per_patient=wanted.max_slices_per_patient,
        )
        ledger.commit(reservation, steps_done=trained.steps_done, part=f"round {task.round}")
        before = task.base[manifest.part("head.")].astype(np.float64)
        after = np.concatenate([trained.weight.ravel(), trained.bias.ravel()])
        update = self._update(
            task,
            to_grid(before + np.clip(after - before, -REACH, REACH), before),  # of a noised result: post-processing, costs nothing
            noise_multiplier=total.noise_multiplier,
            epsilon=epsilon,
            delta=wanted.delta,
        )
        return SiteUpdate.from_bytes(outbox.put(_question(task), update.to_bytes()))

    def _evaluate(self, task: EvaluateTask) -> SiteEvaluation:
        if task.everyone and self.name not in self._plan.held_out:
            raise RefusedError(
                "scoring every patient is for held-out sites",
                code="evaluation-not-permitted",
                public_reason="this site trains: only test patients",
            )
        mode: Literal["disclosed", "synthetic"] = "disclosed" if self.site.kind == "hospital" else "synthetic"
        admit_evaluation(self.policy, mode, kind=self.site.kind)
        histograms, covariance = evaluate(
            self._cohort(),
            self._plan.model.name,
            task.weights,
            everyone=task.everyone,
            minimum_cell=MINIMUM_CELL if self.site.kind == "hospital" else 0,
        )
        return SiteEvaluation(site=self.name, run=task.run, models=task.models, mode=mode, histograms=histograms, covariance=covariance)

    def _update(self, task: TrainTask, steps: np.ndarray, **claim: float) -> SiteUpdate:
        return SiteUpdate(
            site=self.name,
            run=task.run,
            arm=task.arm,
            round=task.round,
            base_sha256=digest(task.base),
            weight=sum(site.nominal_patients for site in self._sites),
            private=task.private,
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
            np.concatenate([getattr(cohort, name)[chosen] for cohort, chosen in zip(cohorts, rows, strict=True)])
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
    def _noise_multiplier(self) -> float:
        wanted = self._plan.privacy
        steps = self._plan.private_steps_per_round * self._plan.training.rounds
        return noise_multiplier_for(wanted.epsilon, wanted.delta, wanted.sample_rate, steps)

    def _fingerprint(self) -> str:
        return self._cohort().fingerprint

    def _log(self, text: str) -> None:
        self._state.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with (self._state / "site.log").open("a", encoding="utf-8") as file:
            file.write(f"{stamp} {text}\n")


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


def prepare(site_yaml: Path, plan: RunPlan) -> Cohort:
    """Open a site's data as the plan wants it, building the cache where there is none.

    Raises:
        DataError, ConfigError: what is wrong with the folder, with local detail; never sent anywhere.
    """
    split = (plan.split.train, plan.split.validation, plan.split.test)
    return load_cohort(site_yaml, size=plan.image_size, split=split)
