"""Carry out the tasks of one site: describe it, train, evaluate.

Each task is checked against the site's policy and, where patients are touched, charged to the ledger first. A
failure leaves the site as a refusal (client/agent/failures.py).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from client.agent.consent import Consent, without_other_accounts
from client.agent.evaluation import (
    admit_edges,
    admit_models,
    admit_run_models,
    any_sums,
    exact_sums,
    given_any,
    given_edges,
    model_digests,
    noised_counts,
    patients_scored,
    public_digest,
    query_digest,
    score_patients,
    subgroup_sums,
)
from client.agent.failures import refusal_for
from client.agent.job import Job
from client.agent.lineage import admit_ancestor, admit_lineage
from client.agent.own_views import OwnViews, images_of, read_rows
from client.agent.trained_models import is_trained_without_noise, note_trained
from client.agent.training import (
    TRAIN,
    ReceivedModels,
    TrainingSlices,
    UpdateOwner,
    charge_name,
    site_update,
    train_without_noise,
    training_slices,
)
from client.data.cohort import Cohort, admit_assessed, data_digests, load_cohort
from client.data.studies import CohortSamples, cohort_samples
from client.data.subgroups import subgroups_of
from client.dicom.cache import is_prepared
from client.dp.sampler import rows_by_patient
from client.site.answer_store import AnswerKey, Outbox
from client.site.approvals import index_approved
from client.site.config import SiteConfig, read_site, site_key
from client.site.evaluations import (
    Evaluation,
    admit_question,
    admit_released,
    keep_question,
    patients_tested,
    question_of,
)
from client.site.kind import admit_kind, is_declared
from client.site.ledger import Ledger, Reservation
from client.site.policy import (
    SitePolicy,
    admit_noised_evaluation,
    admit_training,
    admit_void,
    default_policy,
    evaluation_mode,
    read_policy,
)
from client.site.releases import release, released
from client.site.run_data import (
    accept_changed_data,
    bind_data,
    check_data,
    data_of_run,
    index_of_run,
    runs_of_plan,
)
from client.site.site_ledger import has_ledger, open_ledger
from client.site.split import SiteSplit, fix_split, split_of_site
from common.any_artifact import possible
from common.arms import ARMS, HEAD, is_baseline, is_control
from common.devices import on_device
from common.errors import ConfigError, DataError, FedqcError, RefusedError
from common.estimability import nominal_tested
from common.learning import extract_features, keep_freed_memory, train_epochs
from common.leave_one_out import members_of, study_of
from common.measures import public_vectors
from common.models import as_classifier, network_of
from common.names import EvaluationMode
from common.plan import RunPlan
from common.pricing import EVALUATION, charges, plan_epsilon, training_steps
from common.privacy import GaussianSteps, epsilon_of
from common.series import Series
from common.studies import samples_of
from common.trainable import private_part, trainable_names, trained_part
from common.weights import (
    REACH,
    advance,
    digest,
    manifest_of,
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

if TYPE_CHECKING:
    from client.dp.dp_sgd import PrivateSteps

MINIMUM_CELL = 10
"""No score of hospital patients leaves that rests on fewer patients with, or without, the artifact."""


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
        self._is_frozen = False  # whether it was read as an earlier run left it
        self._is_declared = False  # whether the ledger has what the operator declared of the kind
        self._consent = Consent(site_yaml.parent, self.site)
        # of the frozen backbone with this digest: rows of the cohort, and their features
        self._features = _NO_FEATURES
        self._views = OwnViews(plan)
        self._models = ReceivedModels(plan)
        # of a simulation: (P, A) scores of the baselines that a task names, for the patients that it scores
        self.score_baselines: Callable[[EvaluateTask], list[np.ndarray]] | None = None

    @property
    def policy(self) -> SitePolicy:
        return policy_of(self.site, self._path.parent)

    @property
    def name(self) -> str:
        return self.site.name

    def describe(self, task: DescribeTask | None = None) -> WireMessage:
        """The site's description or, where the task asks for a rehearsal, its readiness; or a refusal."""
        if task is not None and task.rehearse:
            return self._guarded(task.run, lambda: self._readiness(task))
        return SiteDescription(
            site=self.name,
            kind=self.site.kind,
            nominal_patients=self.site.nominal_patients,
            stand_in=self.site.stand_in or "",
            unit=self.site.patients.unit,
            ethics=self._consent.hash_of(study_of(self._plan).sha256())
            if self.site.kind == "hospital"
            else "",
            version=version("fedqc"),
            ledger_head=self._ledger_head(),
            nominal_tested=self._nominal_tested(),
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
            self._note_finished(task)
            self._views.forget()  # all is trained
            return self._evaluate(task, job or Job())

        return self._guarded(task.run, checked)

    def renew_consent(self) -> None:
        """Read cohort.yaml again, and leave out who has opted out since: also of what is in memory.

        Raises: as `Consent.admit`; LedgerError, where a declaration cannot be recorded.
        """
        self._consent.admit()
        self._record_declaration()
        if self._cohort is None:
            return
        self._cohort = self._consent.subtracted(self._cohort)
        backbone, rows, features = self._features
        kept = self._samples().part[rows] >= 0
        if not kept.all():
            self._features = backbone, rows[kept], features[kept]
        self._views.leave_out(self._cohort)

    def _guarded(self, run: str, work: Callable[[], WireMessage]) -> WireMessage:
        try:
            return work()
        except Exception as failure:
            return refusal_for(failure, site=self.name, run=run, state=self.state, plan=self._plan)

    def _readiness(self, task: DescribeTask) -> SiteReadiness:
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
                arms[arm] = "accept"
                if ARMS[arm].private:
                    admit_lineage(self._plan.model, task.lineage)
                    affordable = self._rounds_affordable(task.run, arm)
            except RefusedError as refusal:
                arms[arm], reasons[arm] = refusal.code, refusal.public_reason
                continue
            if ARMS[arm].private and affordable is not None and affordable < self._plan.training.rounds:
                arms[arm] = "budget-exhausted"
                reasons[arm] = (
                    f"what is left of the budget covers {affordable} of {self._plan.training.rounds} rounds"
                )
        evaluation, scoring = "accept", None
        try:
            self._consent.admit()
            scoring = self.admit_scoring()
            if scoring == "dp":
                asked = charges(self._plan, trains=self._trains)
                self._check_budget({charge_name(task.run, name): steps for name, steps in asked.items()})
        except RefusedError as refusal:
            evaluation, reasons["evaluation"] = refusal.code, refusal.public_reason
        try:
            self._check_study(task.run, scoring)
        except RefusedError as refusal:
            priced = [arm for arm, code in arms.items() if code == "accept" and ARMS[arm].private]
            arms |= dict.fromkeys(priced, refusal.code)
            if evaluation == "accept" and scoring == "dp":
                evaluation, priced = refusal.code, [*priced, "evaluation"]
            reasons |= dict.fromkeys(priced, refusal.public_reason)
        return SiteReadiness(
            site=self.name,
            kind=self.site.kind,
            nominal_patients=self.site.nominal_patients,
            version=version("fedqc"),
            arms=arms,
            reasons=reasons,
            evaluation=evaluation,
            scoring=scoring,
            nominal_tested=self._nominal_tested(),
            data_prepared=is_prepared(self.state / "cache", self._plan.image_size),
            rounds_affordable=affordable,
            seconds_a_round=self._seconds_a_round() if self._plan.arms else None,
        )

    def admit(self, *, private: bool) -> None:
        """Check the plan's training against the site's policy, its split and what its readers assessed.

        Raises:
            RefusedError: the policy does not permit it; `split-differs`; `nothing-assessed`; `cohort-void`;
                of a private arm at a hospital without a ledger, `ledger-missing`; `alternatives`,
                `simulation-only`.
            ConfigError: `split-fixed`.
        """
        self._admit_simulated()
        if not self.site.assesses and self._plan.training.inject is None:
            raise RefusedError(
                f"{self.name}: site.yaml declares that no artifact was assessed, and the plan injects none",
                code="nothing-assessed",
                public_reason="no artifact was assessed at this site, so that it would teach nothing",
            )
        if self._plan.privacy.alternatives and self.site.kind == "hospital":
            raise RefusedError(
                f"{self.name}: privacy.alternatives = true is for simulations",
                code="alternatives",
                public_reason="the plan counts its private arms as alternatives, a hospital trains all",
            )
        split_of_site(self.site, self._path.parent, self._plan.split)
        admit_training(
            self.policy,
            private=private,
            epsilon=plan_epsilon(self._plan) if private else None,
            delta=self._plan.privacy.delta if private else None,
            clip_norm=self._plan.privacy.clip_norm if private else None,
            nominal_patients=self.site.nominal_patients,
            rounds=self._plan.training.rounds,
        )
        if private and self._is_void():
            admit_void(self.policy)

    def _admit_simulated(self) -> None:
        """Raises RefusedError (code `simulation-only`): a hospital is asked for the control of a private arm,
        or for a baseline; it refuses the whole plan.
        """
        if (arms := self._plan.simulated_arms) and self.site.kind == "hospital":
            what = "fits a baseline" if ARMS[arms[0]].baseline else "trains a private arm without its noise"
            raise RefusedError(
                f"{self.name}: arm {arms[0]} is for simulations",
                code="simulation-only",
                public_reason=f"the plan {what}, which is for simulations",
            )

    def check_ancestor(self, head: str) -> None:
        """Refuse unless the coordinator's note of this site's ledger is an ancestor of it.

        Raises:
            LedgerError: `ledger-rolled-back`; or the ledger cannot be used.
        """
        with self._ledger() as ledger:
            ledger.check_ancestor(head)

    def admit_data(self, run: str) -> bool:
        """Check the site's data before a round: something to learn from, and unchanged since the run's first.

        Returns:
            whether data changed during this run, and the operator accepted it.
        Raises:
            DataError: `nothing-assessed`, `assessed-differs`, `data-changed`; never sent anywhere.
        """
        with self._data_read_again_if_refused():
            admit_assessed(self.cohort(run), injects=self._plan.training.inject is not None)
        return self.bind_data(run)

    def bind_data(self, run: str) -> bool:
        """As `client.site.run_data.bind_data`, for the data of this site."""
        cohort = self.cohort(run)
        with self._data_read_again_if_refused():
            return bind_data(
                self.state,
                run,
                self._plan.sha256(),
                data_digests(cohort),
                opted_out=cohort.opted_out,
                took_part=self._trained_in(run),
            )

    def _trained_in(self, run: str) -> bool:
        """Whether the ledger has a row of this run. A site without a ledger has no such witness, nor has a
        run of an earlier version, which kept no record of its data: its rows were migrated.
        """
        if not has_ledger(self.state):
            return False
        with self._ledger() as ledger:
            requests = {row.request for row in ledger.rows() if not row.float_noise}
        return any(charge_name(run, arm) in requests for arm in self._plan.arms)

    @contextmanager
    def _data_read_again_if_refused(self) -> Iterator[None]:
        """Forget data that were refused: the operator corrects them while the agent runs."""
        try:
            yield
        except DataError:
            self._forget_data()
            raise

    def _forget_data(self) -> None:
        """Drop what is in memory of the site's images."""
        self._cohort, self._features, self._is_frozen = None, _NO_FEATURES, False
        self._views.forget()

    def training_slices(self, run: str, job: Job) -> TrainingSlices:
        """What arms without noise train on: slices or studies with a label of the sheet and, where the plan
        injects artifacts, views of slices.
        """
        inject, tick = self._plan.training.inject, job.ticker("epoch", self._plan.training.local_epochs)
        if inject is None:
            return training_slices(self._samples())
        return self._views.expanded(self.cohort(), run, inject, lambda: tick(0))

    def record_non_private(self, run: str, arm: str) -> None:
        """Record training without noise in the ledger, before it begins, of a site that may hold patients."""
        self._record_non_private(charge_name(run, arm), arm)

    def _record_non_private(self, request: str, purpose: str) -> None:
        if self._may_hold_patients:
            with self._ledger() as ledger:
                ledger.record_non_private(
                    request=request, purpose=purpose, fingerprint=self.cohort().fingerprint
                )

    def _record_declaration(self) -> None:
        """Record what an operator declared of a site of another kind, before it is first used."""
        declared = self.site.declared_not_hospital
        if self._is_declared or declared is None or not is_declared(self.site):
            return
        with self._ledger() as ledger:
            ledger.record_declaration(
                kind=self.site.kind, images=declared.images, why=declared.why, by=declared.by
            )
        self._is_declared = True

    @property
    def _may_hold_patients(self) -> bool:
        """Whether the site is a hospital, or only its operator's word says that it is none: should that word
        be corrected, what was done without noise stands in the ledger.
        """
        return self.site.kind == "hospital" or self.site.declared_not_hospital is not None

    def _ledger(self) -> Ledger:
        return open_ledger(self.site, self._path.parent)

    def _ledger_head(self) -> str:
        """Of the site's ledger; "" where there is none, or none that can be used: what needs it is refused
        then.
        """
        if has_ledger(self.state):
            with suppress(FedqcError), self._ledger() as ledger:
                return ledger.head()
        return ""

    def _is_void(self) -> bool:
        """Whether a hospital's patients trained without noise, or would in this plan."""
        if self.site.kind != "hospital":
            return False
        with self._ledger() as ledger:
            trained = ledger.has_non_private
        asked = any(ARMS[arm].at_hospitals and not ARMS[arm].private for arm in self._plan.arms)
        return trained or (asked and self.policy.allow_non_private)

    def _rounds_affordable(self, run: str, arm: str) -> int:
        """How many rounds of a private arm the budget covers; all where they were reserved before.

        Raises:
            RefusedError: it covers none, whatever is left of it: `filter-fixed`, `sampling-not-permitted`.
        """
        for rounds in range(self._plan.training.rounds, 0, -1):
            try:
                self._check_budget({charge_name(run, arm): training_steps(self._plan, rounds)})
            except RefusedError as refusal:
                if refusal.code != "budget-exhausted":
                    raise
            else:
                return rounds
        return 0

    def _check_budget(self, planned: Mapping[str, GaussianSteps]) -> None:
        """Refuse where the ledger would not admit these requests, one after another. Nothing is charged."""
        with self._ledger() as ledger:
            ledger.check(planned, max_epsilon=self.policy.max_epsilon, max_delta=self.policy.max_delta)

    def _check_study(self, run: str, scoring: EvaluationMode | None) -> None:
        """Refuse where what is left of the budget does not cover every run of a study; what a begun one
        reserved is covered. A plan that is no member of a study has nothing to check; one that is carried out
        a second time counts as begun, and only the reservation of each run decides.

        Args:
            run: of this plan; "" for a new one.
            scoring: how the site would be scored; None: not at all.
        Raises:
            RefusedError: as `Ledger.check`.
        """
        plan, planned = self._plan, dict[str, GaussianSteps]()
        for member in members_of(plan) if plan.leave_one_site_out else ():
            begun = runs_of_plan(self.state, member.sha256())
            name = begun[-1] if begun else f"member {member.sha256()}"
            if run and member.held_out == plan.held_out:
                name = run
            for what, steps in charges(member, trains=member.trains_at(self.name)).items():
                if what != EVALUATION or scoring == "dp":
                    planned[charge_name(name, what)] = steps
        if not planned:
            return
        try:
            self._check_budget(planned)
        except RefusedError as refusal:
            if refusal.code != "budget-exhausted":
                raise
            reason = (
                f"what is left of the budget does not cover the {len(members_of(plan))} runs of the study"
            )
            raise RefusedError(reason, code=refusal.code, public_reason=reason) from None

    def _seconds_a_round(self) -> float:
        """Training time of one non-private round, from two batches of random numbers and the nominal number
        of patients.
        """
        training, slices = (
            self._plan.training,
            self.site.nominal_patients * self._plan.privacy.max_slices_per_patient,
        )
        count, network = 2 * training.batch_size, network_of(self._plan.model)
        places = self._plan.model.study_slices or 1
        rng = np.random.default_rng(0)
        if self._plan.model.is_of_measures:
            images = public_vectors(count, 0)
        else:
            side = self._plan.image_size
            images = rng.integers(-1000, 1000, (count * places, side, side)).astype(np.int16)
        labels = np.zeros((len(images), len(self._plan.model.labels)), np.float32)
        samples = samples_of(
            self._plan.model,
            images,
            np.zeros(len(images), np.int8),
            labels,
            np.repeat(np.arange(count), places),
            lambda: Series(
                np.repeat(np.arange(count), places),
                np.arange(len(images)),
                np.repeat(np.arange(count), places),
            ),
        )
        began = time.monotonic()
        one = training.model_copy(update={"local_epochs": 1})
        train_epochs(
            network,
            samples.images,
            samples.modality,
            samples.labels,
            np.arange(count),
            training=one,
            seed=0,
            outputs=self._plan.model.labels,
        )
        return float(f"{(time.monotonic() - began) * slices / count * training.local_epochs:.2g}")

    def _train(self, task: TrainTask, job: Job) -> SiteUpdate:
        self.admit(private=False)
        base = self._models.receive(task)
        has_changed = self.admit_data(task.run)
        self.record_non_private(task.run, task.arm)
        part = trained_part(self._plan, task.arm)
        if is_control(task.arm):
            steps = self._clipped_steps(task, base, 0.0, job)
        else:
            slices = self.training_slices(task.run, job)
            steps = train_without_noise(self._plan, task, base, self.name, slices, job)
        if steps.any():
            after = base.copy()
            after[part] = advance(base[part], steps)
            self._note_trained([after] + [base] * (task.round > 1), task.arm)
        update = site_update(self._plan, task, base, steps, self._owner, data_changed=has_changed)
        return update.model_copy(update={"ledger_head": self._ledger_head()})

    @property
    def _head(self) -> slice:
        return manifest_of(network_of(self._plan.model).state_dict()).part(HEAD)

    def _note_trained(self, models: list[np.ndarray], arm: str) -> None:
        """Remember models of an arm that patients of this site shaped without noise; what a control leaves as
        it was they did not shape.
        """
        if not self._may_hold_patients:
            return
        head = self._head
        if arm in ARMS and ARMS[arm].trains_part and self._plan.privacy.trainable == "head":
            head = slice(head.stop, head.stop)
        note_trained(self.state, models, head)

    def _note_finished(self, task: EvaluateTask) -> None:
        """Remember the finished models of arms without noise that this site trained, by what the coordinator
        calls them, before they are scored.
        """
        size = manifest_of(network_of(self._plan.model).state_dict()).size
        networks = [name for name in task.models if not is_baseline(name)]
        if not self._plan.trained_at(self.name) or task.weights.shape != (len(networks), size):
            return
        for name, flat in zip(networks, task.weights, strict=True):
            if is_trained_without_noise(name, self.name):
                self._note_trained([flat], name.partition("/")[0])

    @property
    def _owner(self) -> UpdateOwner:
        return UpdateOwner(name=self.name, nominal_patients=self.site.nominal_patients)

    def _train_private(self, task: TrainTask, job: Job) -> SiteUpdate:
        outbox, question = Outbox(self.state / "outbox"), _question(task)
        part, steps = f"round {task.round}", self._plan.private_steps_per_round
        request = charge_name(task.run, task.arm)
        with self._ledger() as ledger:
            stored = released(outbox, ledger, question, request=request, part=part, steps_done=steps)
            if stored is None:
                self.admit(private=True)
                admit_lineage(self._plan.model, task.lineage)
                base = self._models.receive(task)
                admit_ancestor(self.state, self._plan.model, base, self._head)
                has_changed = self.admit_data(task.run)
                reservation = ledger.reserve(
                    request=request,
                    steps=training_steps(self._plan),
                    purpose=task.arm,
                    fingerprint=self.cohort().fingerprint,
                    max_epsilon=self.policy.max_epsilon,
                    max_delta=self.policy.max_delta,
                )
                update = self._train_charged(task, base, reservation.steps, job)
                answer = update.model_copy(
                    update={
                        "data_changed": has_changed,
                        "void": self._is_void(),
                        "ledger_head": ledger.head(),
                    }
                )
                stored = release(
                    outbox,
                    ledger,
                    question,
                    answer.to_bytes(),
                    reservation=reservation,
                    part=part,
                    steps_done=steps,
                )
        return SiteUpdate.from_bytes(stored)

    def _train_charged(self, task: TrainTask, base: np.ndarray, total: GaussianSteps, job: Job) -> SiteUpdate:
        """One round of a run that is reserved as `total`, whose noise it has."""
        plan, noise = self._plan, total.noise_multiplier
        return site_update(
            plan,
            task,
            base,
            self._clipped_steps(task, base, noise, job),
            self._owner,
            noise_multiplier=noise,
            epsilon=plan_epsilon(plan, noise=noise),
            delta=plan.privacy.delta,
        )

    def _clipped_steps(self, task: TrainTask, base: np.ndarray, noise: float, job: Job) -> np.ndarray:
        """One round of a private arm with this noise multiplier, of its control with 0: the update in whole
        grid steps, int32 (trainable parameters,).
        """
        plan = self._plan
        request = private_steps(plan, self.site.nominal_patients, noise)
        train = self._train_head if plan.privacy.trainable == "head" else self._train_network
        before = base[private_part(plan)].astype(np.float64)
        after = train(task.run, base, request, job.ticker("step", request.steps))
        # of a noised result: post-processing, costs nothing
        return to_grid(before + np.clip(after - before, -REACH, REACH), before)

    def _train_head(
        self, run: str, base: np.ndarray, request: PrivateSteps, tick: Callable[[int], None]
    ) -> np.ndarray:
        """The head after one round, weight then bias, flat, trained on cached features."""
        from client.dp.dp_sgd import train_private_head

        cohort, model, inject = self.cohort(), self._network(base), self._plan.training.inject
        samples = self._samples()
        rows = np.flatnonzero(samples.part == TRAIN) if inject is None else read_rows(cohort)
        backbone = base[: self._head.start]
        features = self._cached_features(model, backbone, rows)
        labels, patients, injected = samples.labels[rows], samples.patients[rows], None
        if inject is not None:
            features, labels, patients, injected = self._views.private(
                cohort, run, inject, model, digest(backbone), features, lambda: tick(0)
            )
        head = as_classifier(model).head
        trained = train_private_head(
            head.weight.detach().numpy(),
            head.bias.detach().numpy(),
            features,
            labels,
            patients,
            request,
            injected=injected,
            tick=tick,
        )
        return np.concatenate([trained.weight.ravel(), trained.bias.ravel()])

    def _train_network(
        self, run: str, base: np.ndarray, request: PrivateSteps, tick: Callable[[int], None]
    ) -> np.ndarray:
        """What the plan trains of the network after one round, flat, trained on images: features of a network
        that changes cannot be kept.
        """
        from client.dp.dp_sgd import train_private_network

        model, inject = self._network(base), self._plan.training.inject
        if inject is None:
            samples = self._samples()
            given = images_of(samples, np.flatnonzero(samples.part == TRAIN))
        else:
            given = self._views.private_images(self.cohort(), run, inject, lambda: tick(0))
        keep_freed_memory()
        return train_private_network(
            model,
            trainable_names(model, self._plan.privacy.trainable),
            given.inputs,
            given.labels,
            given.patients,
            request,
            injected=given.injected,
            tick=tick,
        )

    def _network(self, base: np.ndarray) -> nn.Module:
        """The plan's network with these weights."""
        model = network_of(self._plan.model)
        model.load_state_dict(unflatten(base, manifest_of(model.state_dict())))
        return model

    def admit_scoring(self) -> EvaluationMode:
        """Check the plan's evaluation against the site's policy.

        Returns:
            how the site is scored.
        Raises:
            RefusedError: the policy does not permit it; `nothing-assessed`, a hospital without a label sheet;
                `simulation-only`.
        """
        self._admit_simulated()
        policy, privacy = self.policy, self._plan.privacy
        mode = evaluation_mode(policy, self.site.kind, privacy.evaluation_noise_multiplier)
        if mode != "synthetic" and not self.site.has_sheet:
            raise RefusedError(
                f"{self.name}: site.yaml says labels: none, so that nothing can be scored",
                code="nothing-assessed",
                public_reason="this site has no labels, so that it cannot be scored",
            )
        if mode == "dp":
            admit_noised_evaluation(
                policy,
                epsilon=plan_epsilon(self._plan, trains=self._trains),
                delta=privacy.delta,
                nominal_patients=self.site.nominal_patients,
            )
        return mode

    @property
    def _artifacts(self) -> int:
        """How many outputs the plan's models have."""
        return len(self._plan.model.labels)

    @property
    def _trains(self) -> bool:
        return self._plan.trains_at(self.name)

    def _evaluate(self, task: EvaluateTask, job: Job) -> SiteEvaluation:
        test_only = self.site.kind == "hospital" or not self._plan.scores_everyone_at(self.name)
        if task.everyone and test_only:
            raise RefusedError(
                "scoring every patient is for held-out sites that are no hospital",
                code="evaluation-not-permitted",
                public_reason="this site is scored on its test patients only",
            )
        admit_models(self._plan, task)
        if self._plan.evaluate is not None:
            admit_released(self.state, self._plan.evaluate.run, model_digests(task))
        mode = self.admit_scoring()
        if mode != "synthetic":
            return self._evaluate_hospital(task, mode, job)
        has_changed = self.bind_data(task.run)
        self._record_non_private(charge_name(task.run, EVALUATION), "evaluate")
        edges = given_edges(task, self._artifacts)
        scores, truth = self._score(task, job)
        histograms, covariance = exact_sums(scores, truth, edges)
        return SiteEvaluation(
            site=self.name,
            run=task.run,
            models=task.models,
            mode=mode,
            histograms=histograms,
            covariance=covariance,
            any_histograms=self._any_sums(task, scores, truth),
            subgroups=self._subgroup_sums(task, scores, truth),
            data_changed=has_changed,
        )

    def _score(
        self, task: EvaluateTask, job: Job, *, alone: bool = False
    ) -> tuple[list[np.ndarray], np.ndarray]:
        samples = self._samples()
        scores, truth = score_patients(
            samples,
            self._plan.model,
            task.weights,
            patients_scored(samples, everyone=task.everyone),
            alone=alone,
            tick=job.ticker("model", len(task.weights)),
        )
        if len(task.weights) < len(task.models):
            if self.score_baselines is None:
                raise RefusedError(
                    f"{self.name}: the task names a baseline, which is for simulations",
                    code="simulation-only",
                    public_reason="the task names a baseline, which is for simulations",
                )
            scores += self.score_baselines(task)
        return scores, truth

    def _any_sums(
        self, task: EvaluateTask, scores: list[np.ndarray], truth: np.ndarray, **how: Any
    ) -> np.ndarray:
        """Patients with and without any artifact, where the task asks for them."""
        labels = self._plan.model.labels
        places = given_any(task, labels)
        if places is None:
            return np.zeros((0, 2, 0), np.int64)
        samples = self._samples()
        rows = patients_scored(samples, everyone=task.everyone)
        could = possible(samples.patients[rows], samples.modality[rows], labels)[:, places]
        of_each = [one[:, places] for one in scores[: len(task.weights)]]  # baselines have no such row
        edges = task.edges[: len(of_each), places]
        return any_sums(of_each, truth[:, places], could, edges, task.any_edges, **how)

    def _subgroup_sums(self, task: EvaluateTask, scores: list[np.ndarray], truth: np.ndarray) -> np.ndarray:
        """Patients by subgroup, where the task asks for them; of sites without patients to protect."""
        if not task.subgroups or not task.edges.size or not len(truth):
            return np.zeros((0, 2, 0, 0, 0), np.int32)
        cohort = self.cohort()
        rows = patients_scored(cohort, everyone=task.everyone)
        member = subgroups_of(cohort, rows, site_key(self.state))
        return subgroup_sums(scores, truth, member, task.edges)

    def _evaluate_hospital(self, task: EvaluateTask, mode: EvaluationMode, job: Job) -> SiteEvaluation:
        """The one answer of a run about a hospital's test patients: stored before it is sent, and the same
        whenever it is asked for again.
        """
        if mode == "dp":
            admit_edges(task, self._artifacts)
        else:
            given_edges(task, self._artifacts)
            given_any(task, self._plan.model.labels)
            admit_run_models(self._plan, task)
        outbox = Outbox(self.state / "outbox")
        if data_of_run(self.state, task.run) is not None:
            asked = self._question(task, mode)
            if (stored := self._released(outbox, asked)) is not None:
                return SiteEvaluation.from_bytes(stored)
        fix_split(self.site, self._path.parent, self._split(), always=True)
        has_changed = self.bind_data(task.run)
        asked = self._question(task, mode)
        answer = (self._noised if mode == "dp" else self._disclosed)(task, asked, job)
        answer = answer.model_copy(update={"data_changed": has_changed})
        return SiteEvaluation.from_bytes(self._release(outbox, asked, answer))

    def _released(self, outbox: Outbox, asked: Evaluation) -> bytes | None:
        """The answer that was given, or stored to be; None where it may be computed.

        Raises:
            RefusedError: `evaluation-repeated`, `answer-missing`.
        """
        if asked.mode != "dp":
            return outbox.get(_answer_key(asked))
        admit_question(self.state, asked)
        with self._ledger() as ledger:
            return released(
                outbox,
                ledger,
                _answer_key(asked),
                request=charge_name(asked.run, EVALUATION),
                part=EVALUATION,
                steps_done=1,
            )

    def _release(self, outbox: Outbox, asked: Evaluation, answer: SiteEvaluation) -> bytes:
        """Store an answer, and commit what it cost."""
        if asked.mode != "dp":
            return outbox.put(_answer_key(asked), answer.to_bytes())
        with self._ledger() as ledger:
            return release(
                outbox,
                ledger,
                _answer_key(asked),
                answer.to_bytes(),
                reservation=self._reserve(ledger, asked),
                part=EVALUATION,
                steps_done=1,
            )

    def _question(self, task: EvaluateTask, mode: EvaluationMode) -> Evaluation:
        """What is asked, once the run is bound to its data; without the patients."""
        noise = self._plan.privacy.evaluation_noise_multiplier if mode == "dp" else None
        query = query_digest(task.edges, noise)
        models, data = model_digests(task), data_of_run(self.state, task.run)
        assert data is not None
        question = question_of(run=task.run, mode=mode, models=models, query=query, data=data)
        study = study_of(self._plan).sha256() if self._plan.leave_one_site_out else ""
        return Evaluation(run=task.run, mode=mode, question=question, models=models, study=study)

    def _noised(self, task: EvaluateTask, asked: Evaluation, job: Job) -> SiteEvaluation:
        """Charge the ledger, then count the test patients, with noise."""
        admit_question(self.state, asked)
        self._released(Outbox(self.state / "outbox"), asked)  # a lost answer is not drawn again
        with self._ledger() as ledger:
            steps = self._reserve(ledger, asked).steps
        keep_question(self.state, asked)
        scores, truth = self._score(task, job, alone=True)
        delta = self._plan.privacy.delta
        return SiteEvaluation(
            site=self.name,
            run=task.run,
            models=task.models,
            mode="dp",
            noise_multiplier=steps.noise_multiplier,
            epsilon=epsilon_of([steps], delta),
            delta=delta,
            noised=noised_counts(scores, truth, task.edges, steps.noise_multiplier),
        )

    def _reserve(self, ledger: Ledger, asked: Evaluation) -> Reservation:
        return ledger.reserve(
            request=charge_name(asked.run, EVALUATION),
            steps=charges(self._plan)[EVALUATION],
            purpose="evaluate",
            fingerprint=self.cohort().fingerprint,
            max_epsilon=self.policy.max_epsilon,
            max_delta=self.policy.max_delta,
        )

    def _disclosed(self, task: EvaluateTask, asked: Evaluation, job: Job) -> SiteEvaluation:
        """Count the test patients exactly, if no earlier answer together with this one shows few of them."""
        patients = patients_tested(data_digests(self.cohort()), site_key(self.state))
        asked = replace(asked, patients=patients)
        admit_question(self.state, asked, public=public_digest(self._plan))
        keep_question(self.state, asked)
        scores, truth = self._score(task, job)
        histograms, covariance = exact_sums(
            scores, truth, given_edges(task, self._artifacts), minimum_cell=MINIMUM_CELL, coarse=True
        )
        return SiteEvaluation(
            site=self.name,
            run=task.run,
            models=task.models,
            mode="disclosed",
            histograms=histograms,
            covariance=covariance,
            any_histograms=self._any_sums(task, scores, truth, minimum_cell=MINIMUM_CELL, coarse=True),
        )

    def _nominal_tested(self) -> int:
        """The nominal number of test patients of a hospital; 0 where there is none, or no split."""
        if self.site.kind == "hospital":
            with suppress(FedqcError):
                train, _, test = self._split().shares
                return nominal_tested(self.site.nominal_patients, train, test)
        return 0

    def _split(self) -> SiteSplit:
        return split_of_site(self.site, self._path.parent, self._plan.split_at(self.name))

    def cohort(self, run: str = "") -> Cohort:
        """The site's data as the plan asks for it, read once.

        Args:
            run: the run that it is read for. One that has begun here goes on with the index that it began
                with, and one of a plan that was approved begins with the index that was frozen then: files
                that came, went or can no longer be read since do not show.
        Raises:
            DataError, ConfigError: the folder cannot be used; `data-changed` where the cache no longer holds
                the approved index. With local detail that is never sent.
            RefusedError: `kind-undeclared`, as the images are now.
        """
        begun = index_of_run(self.state, run) if run else ""
        approved = index_approved(self.state, study_of(self._plan).sha256()) if run and not begun else ""
        frozen = begun or approved
        if run and self._cohort is not None:
            # a run for which nothing is frozen begins with the folder as it is
            is_stale = self._cohort.fingerprint != frozen if frozen else self._is_frozen
            if is_stale:
                self._forget_data()
        if self._cohort is None:
            if not begun:
                admit_kind(self.site, self._path.parent, again=True)
            cohort = prepare(self._path, self._plan, frozen=frozen)
            if approved not in ("", cohort.fingerprint):
                raise DataError(
                    f"the images of this site changed since plan {self._plan.name} was approved, and the "
                    "cache does not hold the approved index any more",
                    code="data-changed",
                    hint="approve it with the present images: fedqc site approve PLAN",
                )
            if self._may_hold_patients or self.site.cohort_disjoint:
                with self._ledger() as ledger:
                    cohort = without_other_accounts(cohort, ledger)
            self._cohort = self._consent.subtracted(cohort)
            self._is_frozen = bool(frozen)
        return self._cohort

    def _samples(self) -> CohortSamples:
        """The site's data as the samples of the plan's network."""
        return cohort_samples(self.cohort(), self._plan.model)

    def _cached_features(self, model: nn.Module, backbone: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The frozen backbone does not change between private rounds, so its features are computed once."""
        fingerprint = digest(backbone)
        if self._features[0] != fingerprint or not np.array_equal(self._features[1], rows):
            self._features = fingerprint, rows, features_alone(model, self._samples(), rows)
        return self._features[2]


def private_steps(plan: RunPlan, nominal_patients: int, noise_multiplier: float) -> PrivateSteps:
    """One round of a plan's private training; with noise 0, of the control."""
    # brings Opacus: a second of CPU and 100 MiB that other arms do without
    from client.dp.dp_sgd import PrivateSteps

    privacy = plan.privacy
    return PrivateSteps(
        steps=plan.private_steps_per_round,
        learning_rate=privacy.learning_rate,
        clip_norm=privacy.clip_norm,
        noise_multiplier=noise_multiplier,
        sample_rate=privacy.sample_rate,
        nominal_patients=nominal_patients,
        max_slices_per_patient=privacy.max_slices_per_patient,
        engine=privacy.engine,
        keeps_grid=noise_multiplier == 0,
    )


def features_alone(model: nn.Module, cohort: Cohort | CohortSamples, rows: np.ndarray) -> np.ndarray:
    """What the head sees for each of `rows`, float32 (len(rows), F); each patient's by themselves, because in
    one batch with others the last bit may depend on who they are.
    """
    features = np.zeros((len(cohort.patients), as_classifier(model).head.in_features), np.float32)
    with on_device(model):
        for own in rows_by_patient(cohort.patients, rows):
            features[own] = extract_features(model, cohort.images, cohort.modality, own)
    return features[rows]


def _question(task: TrainTask) -> AnswerKey:
    return task.run, task.arm, task.round, "train"


def _answer_key(asked: Evaluation) -> AnswerKey:
    return asked.run, asked.question, 0, "evaluate"


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


def prepare(site_yaml: Path, plan: RunPlan, *, accept_quarantine: bool = False, frozen: str = "") -> Cohort:
    """Open a site's data as the plan asks for it, building the cache where there is none. The split of a site
    that trains is kept from then on.

    Args:
        frozen: the index version of a run that has begun, see `load_cohort`.

    Raises:
        DataError, ConfigError: what is wrong with the folder, with local detail; never sent anywhere.
        RefusedError: `split-differs`.
    """
    site = read_site(site_yaml)[0]
    name = site.name
    if plan.model.is_of_measures != (site.measures is not None):
        has = "metrics of scans" if site.measures is not None else "images"
        raise ConfigError(
            f"{name} has {has}, and model.name = {plan.model.name} is not for these",
            code="bad-site",
            hint="iqm_linear and iqm_mlp are for sites of fedqc data import mriqc, all others for images",
        )
    return load_cohort(
        site_yaml,
        size=plan.image_size,
        plan_split=plan.split_at(name),
        quarantine="accept" if accept_quarantine else "refuse",
        fix=plan.trains_at(name),
        frozen=frozen,
        labels=plan.model.labels,
    )
