"""Choose the settings of the private arms on public rehearsal hospitals, with the noise on.

`fedqc run tune PLAN` and `privacy.settings: auto`, which is resolved before a plan is signed, come here. Each
shift of `server.public_model.rehearsals` is a consortium of phantoms that look other than what the starting
weights were trained on. A setting is tried on all of them, with the noise that the plan's epsilon, expected
sites and expected patients lead to, in `DRAWS` draws. What counts is its worst gain over the starting
weights, so that no shift pays for another. Nothing here has seen a hospital, and nothing is charged.

The rehearsal trains what sites and coordinator train together: with all patients in every step, the mean over
sites of clipped gradients is the clipped mean gradient of all their patients, with noise of deviation
z C sqrt(sites) / patients of all sites. Two things are left out: that sites average only at the end of a
round, and the grid of the release.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import rankdata

from common.arms import ARMS
from common.artifacts import DEFAULT_LABELS
from common.counts import rank_weights
from common.errors import PlanError
from common.models import as_classifier, network_of
from common.physics.threads import one_thread
from common.plan import Model, RunPlan
from common.pricing import training_steps, with_noise
from common.progress_bar import Progress, silent
from common.weights import digest, manifest_of, unflatten
from server.public_model.rehearsals import CLEAN, FOLDS, Rehearsal, rehearsals_of
from server.run.workers import Workers
from server.run_folder import tuning_digest

DRAWS = 8
CLIPS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
CLIP = 0.1  # rates and steps are tried with this one
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Learning rate times clip: how far a step carries the head at most, before noise."""
STEPS_PER_ROUND = (1, 2, 4, 8, 16, 32)
MAX_STEPS = 200  # of a run
STAGE = "rehearsing"
SHOWN = 8  # settings in the table
TOLERANCE = 0.001
SHARE = 0.1
"""Gains are as good as the best if they lie within `TOLERANCE`, about the error of a mean of `DRAWS` draws,
or within this share of it. The one that depends least on the noise is taken; many small steps depend on it
least, so one inside the grid is preferred to one at its end.
"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen; see `common.plan.Privacy`."""

    clip_norm: float
    learning_rate: float
    steps_per_round: int
    average_rounds: int

    @property
    def rate(self) -> float:
        """Learning rate times clip: how far a step goes at most, before noise."""
        return float(f"{self.learning_rate * self.clip_norm:.6g}")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A setting and its gain, macro AUROC minus that of the starting weights: shift -> mean over draws."""

    setting: Setting
    gains: Mapping[str, float]
    spread: float  # standard deviation over draws of one training, root mean square over shifts and folds

    @property
    def worst(self) -> float:
        """The gain on the shift where it is least."""
        return min(self.gains.values())


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was tried, and the choice."""

    chosen: Tried
    tried: Sequence[Tried]
    public: Mapping[str, float]  # shift -> macro AUROC of the starting weights
    start: str  # digest of the starting weights
    epsilon: float
    sites: int
    patients: int

    def to_json(self) -> dict[str, Any]:
        """As tuning.json of the run folder keeps it."""
        return {
            "epsilon": self.epsilon,
            "sites": self.sites,
            "patients": self.patients,
            "start": self.start,
            "public": dict(self.public),
            "chosen": _one_to_json(self.chosen),
            "tried": [_one_to_json(one) for one in self.tried],
        }

    @property
    def origin(self) -> str:
        """One line for the plan."""
        curve = tuning_digest(self.to_json())
        return (
            f"auto: worst gain {self.chosen.worst:+.3f} over {len(self.public)} public rehearsals at epsilon "
            f"{self.epsilon:g}, {self.sites} sites of {self.patients}; start {self.start[:16]}, curve "
            f"{curve[:16]}"
        )


def resolved(plan: RunPlan, *, jobs: int = 1, progress: Progress = silent) -> tuple[RunPlan, Tuning | None]:
    """The plan as it is signed: settings chosen where it leaves them to `auto`, and its noise stated.

    Args:
        jobs: as `tune`.
    Returns:
        the plan, and how its settings were chosen; None where it states them itself.
    Raises:
        PlanError: as `tune` and `with_auto`. ConfigError: no noise makes the plan cost its epsilon.
        RunError: as `tune`.
    """
    if plan.privacy.settings != "auto":
        return with_noise(plan), None
    found = tune(with_auto(plan), jobs=jobs, progress=progress)
    chosen = asdict(found.chosen.setting) | {"settings": "stated", "origin": found.origin}
    return with_noise(_with(plan, chosen)), found


def tune(plan: RunPlan, *, jobs: int = 1, progress: Progress = silent) -> Tuning:
    """Try the settings of a plan on every rehearsal.

    Args:
        jobs: processes that try them; the choice is the same for any number.
    Raises:
        PlanError: a rehearsal cannot stand for the plan (`auto-not-possible`), no setting gains on every
            shift (`nothing-to-gain`), or the best lies at an end of its grid (`optimum-at-edge`).
        RunError: a process ended by itself (`worker-ended`).
    """
    from server.run.conduct import initial_weights

    privacy = plan.privacy
    impossible = {
        "privacy.sample_rate below 1": privacy.sample_rate != 1,
        "a stated privacy.noise_multiplier, which follows from the settings": privacy.noise_multiplier
        is not None,
        "model.initial = random": plan.model.initial == "random",
        "model.labels, as rehearsals have the five by default": plan.model.labels != DEFAULT_LABELS,
        f"privacy.trainable = {privacy.trainable}, as only the head is rehearsed": privacy.trainable
        != "head",
    }
    if what := next((words for words, is_so in impossible.items() if is_so), ""):
        raise PlanError(
            f"privacy.settings = auto: not with {what}",
            code="auto-not-possible",
            hint="leave it out, or state clip_norm, learning_rate and steps_per_round",
        )
    initial = initial_weights(plan, manifest_of(network_of(plan.model).state_dict()))
    rehearsals = rehearsals_of(plan.model, initial, progress=progress)
    chosen, tried, public = _try_all(plan, head_of(plan.model, initial), rehearsals, progress, jobs)
    return Tuning(
        chosen=chosen,
        tried=tried,
        public=public,
        start=digest(initial),
        epsilon=privacy.epsilon,
        sites=privacy.expected_sites,
        patients=privacy.expected_patients,
    )


def with_auto(plan: RunPlan, *, sites: int | None = None, patients: int | None = None) -> RunPlan:
    """The plan with its settings left to `auto`, and other expectations where they are given.

    Raises:
        PlanError: no arm is private (code `nothing-to-tune`).
    """
    if not any(ARMS[arm].private for arm in plan.arms):
        raise PlanError(
            f"{plan.name}: no arm of this plan is private",
            code="nothing-to-tune",
            hint="arms: [public, federated_dp]",
        )
    privacy: dict[str, Any] = {"settings": "auto"}
    if sites is not None:
        privacy["expected_sites"] = sites
    if patients is not None:
        privacy["expected_patients"] = patients
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=privacy)})


def tuning_table(found: Tuning) -> str:
    """The choice and what came near it, for a terminal."""
    lines = [
        f"{len(found.public)} public rehearsals, epsilon {found.epsilon:g}, {found.sites} sites of "
        f"{found.patients} patients; gain of macro AUROC over the starting weights",
        "",
        f"{'clip':>6s}{'rate':>8s}{'steps':>7s}{'mean of':>9s}"
        + "".join(f"{shift:>12s}" for shift in found.public)
        + f"{'worst':>9s}{'spread':>8s}",
        f"{'starting weights':>30s}" + "".join(f"{value:>12.3f}" for value in found.public.values()),
    ]
    best = sorted(found.tried, key=lambda one: -one.worst)[:SHOWN]
    for one in [found.chosen, *(each for each in best if each is not found.chosen)]:
        setting = one.setting
        lines.append(
            f"{setting.clip_norm:>6g}{setting.rate:>8g}{setting.steps_per_round:>7d}"
            f"{setting.average_rounds:>9d}"
            + "".join(f"{one.gains[shift]:>+12.3f}" for shift in found.public)
            + f"{one.worst:>+9.3f}{one.spread:>8.3f}"
            + (" chosen" if one is found.chosen else "")
        )
    chosen = found.chosen.setting
    lines += [
        "",
        "rate: learning rate times clip; steps: in a round; mean of: rounds whose models are averaged",
        f"privacy: {{clip_norm: {chosen.clip_norm:g}, learning_rate: {chosen.learning_rate:.6g}, "
        f"steps_per_round: {chosen.steps_per_round}, average_rounds: {chosen.average_rounds}}}",
    ]
    return "\n".join(lines)


def head_of(model: Model, flat: np.ndarray) -> np.ndarray:
    """The head of a network with these weights, bias last: float32 (artifacts, features + 1)."""
    network = network_of(model)
    network.load_state_dict(unflatten(flat, manifest_of(network.state_dict())))
    head = as_classifier(network).head
    return np.concatenate([head.weight.detach().numpy(), head.bias.detach().numpy()[:, None]], axis=1)


@one_thread()
def _try_all(
    plan: RunPlan, head: np.ndarray, rehearsals: Mapping[str, Rehearsal], progress: Progress, jobs: int
) -> tuple[Tried, list[Tried], dict[str, float]]:
    """Rates and steps at one clip, then other clips at the choice; what was chosen, what was tried, and the
    scores of the starting weights.
    """
    views = plan.training.inject is not None
    sites = {shift: folds_of(one, views=views) for shift, one in rehearsals.items()}
    public = {
        shift: float(np.mean([macro_auroc(head[None], fold.test)[0] for fold in folds]))
        for shift, folds in sites.items()
    }
    steps = steps_grid(plan.training.rounds)
    total = len(RATES) * len(steps) + len(CLIPS) - 1
    shared = _Shared(head=head, sites=sites, public=public, rounds=plan.training.rounds, seed=plan.seed)

    def attempt(clip: float, rate: float, count: int) -> _Attempt:
        setting = Setting(clip_norm=clip, learning_rate=rate / clip, steps_per_round=count, average_rounds=1)
        return _Attempt(setting=setting, deviation=noise_of_mean(_with(plan, asdict(setting))))

    with Workers(_try, shared, jobs=jobs) as workers:

        def attempted(attempts: Sequence[_Attempt], before: int) -> list[Tried]:
            longest_first = sorted(attempts, key=lambda one: -one.setting.steps_per_round)
            found = workers.map(longest_first, tell=lambda done: progress(STAGE, before + done, total))
            by_attempt = dict(zip(longest_first, found, strict=True))
            return [tried for one in attempts for tried in by_attempt[one]]

        progress(STAGE, 0, total)
        tried = attempted([attempt(CLIP, rate, count) for rate, count in itertools.product(RATES, steps)], 0)
        chosen = choose(tried, steps)
        rate, count = chosen.setting.rate, chosen.setting.steps_per_round
        others = [attempt(clip, rate, count) for clip in CLIPS if clip != CLIP]
        clips = attempted(others, total - len(others))
    averaged = chosen.setting.average_rounds
    chosen = choose_clip(chosen, [one for one in clips if one.setting.average_rounds == averaged])
    refuse_edge(chosen, steps)
    return chosen, [*tried, *clips], public


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all attempts share."""

    head: np.ndarray  # of the starting weights
    sites: Mapping[str, Sequence[Fold]]  # by shift
    public: Mapping[str, float]  # scores of the starting weights, by shift
    rounds: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """A setting to be tried."""

    setting: Setting
    deviation: float  # of the noise, see `rehearse_training`


def _try(shared: _Shared, attempt: _Attempt) -> list[Tried]:
    """One schedule on every shift: its last model, and the mean of those of the second half of rounds."""
    # averaged rounds -> shift -> (folds, draws)
    scores: dict[int, dict[str, list[np.ndarray]]] = {1: {}, max(1, shared.rounds // 2): {}}
    for number, (shift, folds) in enumerate(shared.sites.items()):
        for place, fold in enumerate(folds):
            heads = rehearse_training(
                shared.head,
                fold.training,
                attempt.setting,
                rounds=shared.rounds,
                deviation=attempt.deviation,
                seed=shared.seed + FOLDS * number + place,
            )
            for averaged, found in scores.items():
                found.setdefault(shift, []).append(macro_auroc(heads[-averaged:].mean(axis=0), fold.test))
    return [
        Tried(
            setting=replace(attempt.setting, average_rounds=averaged),
            gains={shift: float(np.mean(values)) - shared.public[shift] for shift, values in found.items()},
            spread=float(np.sqrt(np.mean([np.var(values, axis=1, ddof=1) for values in found.values()]))),
        )
        for averaged, found in scores.items()
    ]


def noise_of_mean(plan: RunPlan) -> float:
    """Standard deviation of the noise in the mean gradient over all expected patients, for one step."""
    privacy = plan.privacy
    z = training_steps(with_noise(plan)).noise_multiplier
    return z * privacy.clip_norm / (math.sqrt(privacy.expected_sites) * privacy.expected_patients)


@dataclass(frozen=True, kw_only=True)
class Patients:
    """Slices by patient, filled up with slices of weight zero."""

    x: np.ndarray  # float32 (P, K, F + 1), the last feature is 1
    labels: np.ndarray  # float32 (P, K, A), nan where not assessed
    weight: np.ndarray  # float32 (P, K, A): what each label weighs in its patient's loss

    @functools.cached_property
    def truth(self) -> np.ndarray:
        """Labels, 0 where not assessed: float32 (P, K, A)."""
        return np.nan_to_num(self.labels)

    @functools.cached_property
    def products(self) -> np.ndarray:
        """Of a patient's slices with one another: float32 (P, K, K)."""
        found: np.ndarray = self.x @ self.x.transpose(0, 2, 1)
        return found


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Patients of a rehearsal who train, and others who are tested."""

    training: Patients
    test: Patients


def folds_of(rehearsal: Rehearsal, *, views: bool = False) -> list[Fold]:
    """Training patients in one version each, and test patients in all versions, each a patient of its own.

    Args:
        views: training patients in all versions, a slice that shows each, as where sites inject artifacts.
    """
    patients = np.unique(rehearsal.patient)
    drawn = np.random.default_rng(0).random(len(patients))
    used = np.zeros(len(rehearsal.patient), bool)
    for place, patient in enumerate(patients):
        own = np.flatnonzero(rehearsal.patient == patient)
        versions = np.unique(rehearsal.version[own])
        if views:
            for version in versions:
                of = own[rehearsal.version[own] == version]
                shows = of if version == CLEAN else of[rehearsal.labels[of, version] == 1]
                used[shows[0]] = True
        else:
            used[own] = rehearsal.version[own] == versions[int(drawn[place] * len(versions))]
    person = rehearsal.patient * (rehearsal.version.max() - CLEAN + 1) + rehearsal.version - CLEAN
    folds = []
    for number in range(FOLDS):
        is_test = rehearsal.patient % FOLDS == number
        training, test = used & ~is_test, is_test
        folds.append(
            Fold(
                training=grouped(rehearsal.features, rehearsal.labels, rehearsal.patient, training),
                test=grouped(rehearsal.features, rehearsal.labels, person, test),
            )
        )
    return folds


def grouped(features: np.ndarray, labels: np.ndarray, owner: np.ndarray, chosen: np.ndarray) -> Patients:
    """Gather the chosen slices by owner; the loss of a patient is the mean over slices of the mean over
    assessed artifacts, as in training (client/dp/dp_sgd.py).

    Args:
        features: (n, F). labels: (n, A). owner: (n,). chosen: bool (n,).
    """
    rows = [np.flatnonzero(chosen & (owner == each)) for each in np.unique(owner[chosen])]
    most = max(len(own) for own in rows)
    x = np.zeros((len(rows), most, features.shape[1] + 1), np.float32)
    y = np.full((len(rows), most, labels.shape[1]), np.nan, np.float32)
    weight = np.zeros(y.shape, np.float32)
    for place, own in enumerate(rows):
        x[place, : len(own), :-1], x[place, : len(own), -1] = features[own], 1
        y[place, : len(own)] = labels[own]
        assessed = ~np.isnan(labels[own])
        weight[place, : len(own)] = assessed / np.maximum(assessed.sum(axis=1, keepdims=True), 1) / len(own)
    return Patients(x=x, labels=y, weight=weight)


def rehearse_training(
    head: np.ndarray, patients: Patients, setting: Setting, *, rounds: int, deviation: float, seed: int
) -> np.ndarray:
    """Train the head `DRAWS` times, with other noise each time.

    Args:
        head: float32 (A, F + 1).
        deviation: of the noise in each value of the mean gradient of a step.
    Returns:
        the heads after each round, float32 (rounds, DRAWS, A, F + 1).
    """
    rng = np.random.default_rng(seed)
    heads = np.repeat(head[None], DRAWS, axis=0)
    after = []
    for _ in range(rounds):
        for _ in range(setting.steps_per_round):
            mean = clipped_mean(heads, patients, setting.clip_norm)
            noise = rng.standard_normal(heads.shape, dtype=np.float32) * deviation
            heads = heads - np.float32(setting.learning_rate) * (mean + noise).astype(np.float32)
        after.append(heads)
    return np.stack(after)


def clipped_mean(heads: np.ndarray, patients: Patients, clip_norm: float) -> np.ndarray:
    """The mean over patients of their clipped gradients, for each of some heads.

    The length of a gradient follows from the products of a patient's slices with one another, so that none is
    made: sum_k r_k x_k, with residuals r and slices x, has the square sum_kl (r_k . r_l)(x_k . x_l).

    Args:
        heads: float32 (n, A, F + 1).
    Returns:
        float32, as `heads`.
    """
    count, slices, width = patients.x.shape
    flat = patients.x.reshape(count * slices, width)
    logits = _product(flat, heads.reshape(-1, width).T).reshape(count, slices, len(heads), -1)
    residual = expit(logits, out=logits)
    residual -= patients.truth[:, :, None]
    residual *= patients.weight[:, :, None]
    across = (patients.products @ residual.reshape(count, slices, -1)).reshape(residual.shape)
    squares = np.einsum("pkna,pkna->pn", residual, across)
    residual *= np.minimum(1, clip_norm / np.sqrt(np.maximum(squares, 1e-24)))[:, None, :, None]
    return _product(residual.reshape(count * slices, -1).T, flat).reshape(heads.shape) / np.float32(count)


def _product(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The product of two matrices by torch, which keeps to its number of threads: NumPy's library takes all
    cores for products that are too small for two, and four times the CPU.
    """
    product: np.ndarray = torch.mm(torch.from_numpy(one), torch.from_numpy(other)).numpy()
    return product


def macro_auroc(heads: np.ndarray, patients: Patients) -> np.ndarray:
    """Mean over artifacts of the AUROC of patients, scored as `common.counts.patient_scores` does.

    Args:
        heads: (n, A, F + 1).
    Returns:
        (n,).
    """
    count, slices, width = patients.x.shape
    flat = _product(patients.x.reshape(-1, width), heads.reshape(-1, width).T)
    logits = flat.reshape(count, slices, len(heads), -1).transpose(2, 0, 1, 3)
    is_slice = patients.x[..., -1] > 0
    logits = np.sort(np.where(is_slice[None, :, :, None], logits, -np.inf), axis=2)
    number = is_slice.sum(axis=1, keepdims=True)
    weights = rank_weights(np.arange(slices) - (slices - number), np.repeat(number, slices, axis=1))
    weights = weights.astype(np.float32)[None, :, :, None]
    scores = (np.where(weights > 0, logits, 0) * weights).sum(axis=2)
    truth = np.where(np.isnan(patients.labels), -1, patients.labels).max(axis=1)
    found = []
    for artifact in range(truth.shape[1]):
        assessed = truth[:, artifact] >= 0
        positive = truth[assessed, artifact] > 0.5
        m, n = int(positive.sum()), int((~positive).sum())
        if m and n:
            ranks = rankdata(scores[:, assessed, artifact], axis=1)
            found.append((ranks[:, positive].sum(axis=1) - m * (m + 1) / 2) / (m * n))
    return np.mean(found, axis=0)


def choose(tried: Sequence[Tried], steps: Sequence[int]) -> Tried:
    """Of the settings whose worst gain is as good as the best, the one that moves least from one draw of
    noise to the next; one inside the grid where there is such a one.

    Args:
        steps: the steps a round that were tried.
    Raises:
        PlanError: as `tune`.
    """
    best = max(one.worst for one in tried)
    if best <= 0:
        raise PlanError(
            f"privacy.settings = auto: no setting gains on every rehearsal (the best {best:+.4f})",
            code="nothing-to-gain",
            hint="a larger privacy.epsilon, more sites or more patients; the public model is as good",
        )
    near = [one for one in tried if one.worst >= best - max(TOLERANCE, SHARE * best)]
    inside = [one for one in near if not at_edge(one.setting, steps)]
    return min(inside or near, key=lambda one: one.spread)


def choose_clip(before: Tried, others: Sequence[Tried]) -> Tried:
    """The setting with another clip where that is clearly better: most gradients are longer than any clip,
    and then it changes nothing. Of clips as good as the best, the largest.
    """
    best = max((before, *others), key=lambda one: one.worst).worst
    if best <= before.worst + max(TOLERANCE, SHARE * before.worst):
        return before
    near = best - max(TOLERANCE, SHARE * best)
    return max((one for one in others if one.worst >= near), key=lambda one: one.setting.clip_norm)


def steps_grid(rounds: int) -> Sequence[int]:
    """Steps a round to try in a run of so many rounds."""
    return [each for each in STEPS_PER_ROUND if each * rounds <= MAX_STEPS] or [1]


def at_edge(setting: Setting, steps: Sequence[int]) -> str:
    """Which value lies at the end of its grid, in words; "" where none does.

    Args:
        steps: the steps a round that were tried; fewer than one there is not.
    """
    grids: dict[str, tuple[float, Sequence[float]]] = {
        "clip_norm": (setting.clip_norm, CLIPS),
        "rate": (setting.rate, RATES),
        "steps_per_round": (setting.steps_per_round, (0, *steps) if len(steps) > 1 else (0, math.inf)),
    }
    found = ((name, value) for name, (value, grid) in grids.items() if value in (grid[0], grid[-1]))
    return next((f"{name}, {value:g}" for name, value in found), "")


def refuse_edge(chosen: Tried, steps: Sequence[int]) -> None:
    """Refuse a choice at the end of a grid: a better one may lie beyond.

    Args:
        steps: as `at_edge`.
    Raises:
        PlanError: a value lies at the end of its grid (code `optimum-at-edge`).
    """
    if what := at_edge(chosen.setting, steps):
        raise PlanError(
            f"privacy.settings = auto: the best {what}, lies at the end of its grid",
            code="optimum-at-edge",
            hint="state clip_norm, learning_rate and steps_per_round, or another number of rounds",
        )


def _with(plan: RunPlan, values: Mapping[str, Any]) -> RunPlan:
    """The plan with other values of `privacy`, its noise left open."""
    privacy = plan.privacy.model_copy(update={"settings": "stated", "noise_multiplier": None, **values})
    return plan.model_copy(update={"privacy": privacy})


def _one_to_json(one: Tried) -> dict[str, Any]:
    return asdict(one.setting) | {
        "gains": {shift: round(gain, 5) for shift, gain in one.gains.items()},
        "worst": round(one.worst, 5),
        "spread": round(one.spread, 5),
    }
