"""Attack the next update of a site, before anything is released: is one patient in it or not?

The attacker knows the model, the plan, and everything about all patients but one, and sees every noisy sum of
the run. So the sum over the others is subtracted, and what is left is that patient's clipped gradient, or
nothing, plus noise. The guess is the likelier of the two; no other guess is right more often.

Gradients are those of the site's real patients in the first private step, by the functions that train, and
the noise is drawn afresh by the function that releases. The attack on a whole run takes every step for a
first one: later gradients may be longer, but none is longer than the clip. What is measured is compared with
`common.privacy.guess_bounds`, which holds for the longest gradient there can be.

Nothing is written, spent or released. What is printed depends on patients without noise, and must stay at
the site.

References: Nasr et al. 2021 (arXiv 2101.04535), the strongest attacker of DP-SGD; Dong, Roth, Su 2022 (arXiv
    1905.02383).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from client.agent.own_views import OwnViews, read_rows
from client.agent.tasks import features_alone, private_steps
from client.agent.training import TRAIN
from client.data.cohort import Cohort
from client.data.studies import cohort_samples
from client.dp import dp_sgd
from client.dp.clipping import clipped
from client.dp.coins import Coins
from client.dp.sampler import rows_by_patient, sample_patients
from client.privacy_checks.guessing import Estimate, auc, right_guesses
from client.privacy_checks.mechanism import releases
from client.privacy_checks.own_patients import labelled_rows
from common.errors import ConfigError, DataError
from common.model_file import load_model
from common.models import as_classifier, network_of
from common.plan import RunPlan
from common.pricing import training_steps
from common.privacy import GaussianSteps, GuessBounds, guess_bounds
from common.weights import manifest_of, resolve_initial, unflatten

STEPS_DRAWN = 24_000  # noisy sums in all, a quarter of a millisecond each
LEAST_DRAWS, MOST_DRAWS = 100, 2000  # of a whole run, with the patient and without
ATTACKED = 48  # patients at random, beside the two that are named
LIKENESS_DRAWS = 20
ATTACK = "attack"
SURE = 4.0  # standard errors: chance puts a sound installation above the bound once in 30,000 attacks


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The gradients of the first private step, of all training patients who have one. Private."""

    gradients: np.ndarray  # float32 (patients, n), not clipped
    lengths: np.ndarray  # (patients,), after clipping, of the clip
    request: dp_sgd.PrivateSteps
    run: GaussianSteps  # all steps of the run
    patients: int  # all training patients


@dataclass(frozen=True, kw_only=True)
class Guessed:
    """How often the attacker is right about some patients."""

    patients: str
    number: int
    length: float  # of the clipped gradient, of the clip; mean
    without_noise: float
    with_noise: Estimate
    auc: Estimate
    expected: GuessBounds  # for gradients of this mean length


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Median cosine between an update of one step and a patient's clipped gradient."""

    update: float
    update_noised: float
    others_subtracted: float
    others_subtracted_noised: float


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the attack on a site's next update found. Private."""

    patients: int
    without_gradient: int  # whose gradient is zero: nothing of them is in the update
    draws: int
    groups: tuple[Guessed, ...]
    likeness: Likeness
    bounds: GuessBounds

    @property
    def holds(self) -> bool:
        """Whether the attacker does no better than the noise permits."""
        pairs = [
            pair
            for one in self.groups
            for pair in ((one.with_noise, self.bounds.accuracy), (one.auc, self.bounds.auc))
        ]
        return all(found.value - SURE * found.error <= bound for found, bound in pairs)


def attack(cohort: Cohort, plan: RunPlan) -> Attack:
    """Attack the first private update of a plan at a site.

    Args:
        cohort: of the site, see `own_patients`.
        plan: with its noise, see `common.pricing.with_noise`.
    Raises:
        DataError: `nothing-assessed`, no training patient has a gradient.
        ConfigError: `bad-argument`, the plan trains more than the head: the noise of as many runs on a whole
            network takes hours; the plan's starting weights are not here (`no-initial-weights`), or wrong.
    """
    return attacked(first_step(cohort, plan))


def first_step(cohort: Cohort, plan: RunPlan) -> FirstStep:
    """The gradients of the first private step, by the functions of the agent and of the training.

    Raises:
        DataError, ConfigError: as `attack`.
    """
    if plan.privacy.trainable != "head":
        raise ConfigError(
            f"privacy.trainable = {plan.privacy.trainable}: the attack knows plans that train the head alone",
            code="bad-argument",
            hint="fedqc verify --privacy --plan PLAN checks the training of this plan",
        )
    run, inject = training_steps(plan), plan.training.inject
    request = private_steps(plan, cohort.site.nominal_patients, run.noise_multiplier)
    model = network_of(plan.model)
    manifest = manifest_of(model.state_dict())
    initial = load_model(resolve_initial(plan.model.initial, plan.model.sha256), manifest, plan.model.labels)
    model.load_state_dict(unflatten(initial, manifest))
    samples = cohort_samples(cohort, plan.model)
    rows = np.flatnonzero(samples.part == TRAIN) if inject is None else read_rows(cohort)
    if inject is None and not len(labelled_rows(samples, "train")):
        raise _nothing(cohort)
    features = features_alone(model, samples, rows)
    labels, patients, injected = samples.labels[rows], samples.patients[rows], None
    if inject is not None:  # of a run that will not be: coins of its own
        features, labels, patients, injected = OwnViews(plan).private(
            cohort, ATTACK, inject, model, ATTACK, features
        )
        if not len(patients):
            raise _nothing(cohort)
    head = as_classifier(model).head
    slices = rows_by_patient(patients, np.arange(len(patients)))
    drawn = dp_sgd.drawn_rows(slices, request.max_slices_per_patient, injected, Coins())
    weight, bias = (part.detach().numpy().astype(np.float64) for part in (head.weight, head.bias))
    gradients = np.concatenate(
        list(
            dp_sgd.head_gradients(
                np.concatenate([weight.ravel(), bias]),
                weight.shape,
                torch.from_numpy(features),
                torch.from_numpy(labels),
                drawn.rows,
                max_slices=drawn.most,
                weights=drawn.weights,
                engine=request.engine,
            )
        )
    )
    lengths = np.linalg.norm(clipped(gradients, request.clip_norm), axis=1) / request.clip_norm
    if not lengths.any():
        raise _nothing(cohort)
    return FirstStep(
        gradients=gradients[lengths > 0],
        lengths=lengths[lengths > 0],
        request=request,
        run=run,
        patients=len(lengths),
    )


def attacked(step: FirstStep, *, draws: int | None = None) -> Attack:
    """Play the game about the patient with the longest gradient, the one with the median length, and some at
    random.

    Args:
        draws: whole runs, with the patient and without; None: as many as take some seconds.
    """
    draws = draws or min(max(STEPS_DRAWN // (2 * step.run.steps), LEAST_DRAWS), MOST_DRAWS)
    groups = _chosen(step)
    chosen = np.unique(np.concatenate([members for _, members in groups]))
    own = _own_parts(step, chosen)
    inside, outside = _played(step, own, draws)
    certain = _without_noise(step, chosen)
    found = []
    for name, members in groups:
        columns = np.searchsorted(chosen, members)
        length = float(step.lengths[members].mean())
        found.append(
            Guessed(
                patients=name,
                number=len(members),
                length=length,
                without_noise=float(certain[columns].mean()),
                with_noise=right_guesses(inside[:, columns], outside[:, columns]),
                auc=auc(inside[:, columns], outside[:, columns]),
                expected=_bounds(step.run, length),
            )
        )
    return Attack(
        patients=step.patients,
        without_gradient=step.patients - len(step.lengths),
        draws=draws,
        groups=tuple(found),
        likeness=_likeness(step, own),
        bounds=guess_bounds([step.run]),
    )


def _chosen(step: FirstStep) -> list[tuple[str, np.ndarray]]:
    order = np.argsort(step.lengths, kind="stable")
    count = min(ATTACKED, len(order))
    some = np.random.default_rng(0).choice(len(order), count, replace=False)
    return [
        ("longest gradient", order[-1:]),
        ("median gradient", order[len(order) // 2][None]),
        (f"{count} at random, mean", np.sort(some)),
    ]


def _own_parts(step: FirstStep, chosen: np.ndarray) -> np.ndarray:
    """What is left of the sum when all others are subtracted, before noise: float64 (chosen, n), exact
    multiples of the grid.
    """
    everyone = _sum_before_noise(step, step.gradients)
    return np.stack(
        [everyone - _sum_before_noise(step, np.delete(step.gradients, one, axis=0)) for one in chosen]
    )


def _sum_before_noise(step: FirstStep, gradients: np.ndarray) -> np.ndarray:
    """The sum that the step would add noise to, from the step itself, float64 (n,)."""
    with releases(lambda total: total):
        return dp_sgd.noised_sum(iter([gradients]), gradients.shape[1], step.request, Coins())


def _played(step: FirstStep, own: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The log-likelihood ratios of *in* against *out*, over whole runs with each patient in and out.

    Sums are exact, so the update less the others is the patient's own steps, or nothing, plus the noise that
    the installed code adds; one draw serves all patients.

    Returns:
        (draws, chosen) each.
    """
    lengths = np.linalg.norm(own, axis=1)
    directions = (own / np.maximum(lengths, np.finfo(float).tiny)[:, None]).T
    deviation = step.request.noise_multiplier * step.request.clip_norm
    rate, coins = step.run.sample_rate, Coins()

    def ratios(present: bool) -> np.ndarray:
        taken = np.zeros((step.run.steps, len(own)))
        if present:
            for row in taken:
                row[sample_patients(len(own), rate, coins)] = 1
        noise = np.stack(list(_noises(step, step.run.steps, coins))) @ directions
        seen = taken * lengths + noise
        with np.errstate(divide="ignore"):  # log 0 where everybody takes part: the term drops out
            stays = np.log1p(-rate)
        ratio = lengths * (2 * seen - lengths) / (2 * deviation**2)
        return np.asarray(np.logaddexp(stays, np.log(rate) + ratio).sum(axis=0))

    inside = np.stack([ratios(True) for _ in range(draws)])
    outside = np.stack([ratios(False) for _ in range(draws)])
    return inside, outside


def _noises(step: FirstStep, count: int, coins: Coins) -> Iterator[np.ndarray]:
    """Steps that nobody takes part in: noise alone, float64 (n,) each."""
    for _ in range(count):
        yield dp_sgd.noised_sum(iter(()), step.gradients.shape[1], step.request, coins)


def _without_noise(step: FirstStep, chosen: np.ndarray) -> np.ndarray:
    """The share of right guesses about each patient where the same training adds no noise."""
    request, coins, size = replace(step.request, noise_multiplier=0.0), Coins(), step.gradients.shape[1]

    def total(gradients: np.ndarray) -> np.ndarray:
        return dp_sgd.noised_sum(iter([gradients]), size, request, coins)

    everyone, right = total(step.gradients), []
    for one in chosen:
        rest = np.delete(step.gradients, one, axis=0)
        others, own = total(rest), total(step.gradients[one][None])
        inside, outside = (
            bool((update - others) @ own > own @ own / 2) for update in (everyone, total(rest))
        )
        right.append((inside + (not outside)) / 2)
    return np.array(right)


def _likeness(step: FirstStep, own: np.ndarray) -> Likeness:
    update = _sum_before_noise(step, step.gradients)
    noises = list(_noises(step, LIKENESS_DRAWS, Coins()))
    return Likeness(
        update=float(np.median(_cosines(own, update))),
        update_noised=float(np.median([_cosines(own, update + noise) for noise in noises])),
        others_subtracted=float(np.median(_cosines(own, own))),
        others_subtracted_noised=float(np.median([_cosines(own, own + noise) for noise in noises])),
    )


def _cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each row with `others`, or with the same row of `others`; 0 where one is zero."""
    product = (rows * others).sum(axis=1)
    norms = np.sqrt(np.square(rows).sum(axis=1)) * np.sqrt(np.square(others).sum(axis=-1))
    return np.divide(product, norms, out=np.zeros_like(product), where=norms > 0)


def _bounds(run: GaussianSteps, length: float) -> GuessBounds:
    """As `guess_bounds`, for a patient whose gradients have this length, of the clip."""
    noise = min(run.noise_multiplier / min(length, 1.0), 1e6)
    return guess_bounds([replace(run, noise_multiplier=noise)])


def _nothing(cohort: Cohort) -> DataError:
    return DataError(
        f"{cohort.site.name}: no training patient has a label, so no update has anything of them",
        code="nothing-assessed",
    )
