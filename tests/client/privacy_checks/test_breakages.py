"""Each fault is found by the check that is named for it, and sound plans pass every check.

A fault is a wrong implementation put in the place of the real one, of the kind that people write.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.agent import evaluation, own_views, tasks
from client.dp import dp_sgd, release
from client.dp.coins import Coins
from client.dp.engines import opacus
from client.dp.injected import InjectedRows
from client.dp.release import grid_of, noise_deviation, rounded_gaussian, to_grid_steps
from client.privacy_checks.audit import audit, audited
from client.privacy_checks.checks import CHECKS, run_check
from client.privacy_checks.finding import Scene
from client.privacy_checks.hospital import TEMPLATE, hospital
from client.site import site_ledger
from client.site.answer_store import Outbox
from client.site.config import site_key
from client.site.ledger import Ledger
from common.cli import Format
from common.errors import ConfigError
from common.models.small_cnn import SmallCNN
from common.plan import RunPlan, parse_plan
from common.verify import verify_command

Patch = pytest.MonkeyPatch
REAL_TRAIN, REAL_RELEASE, REAL_OPACUS = dp_sgd.train_private_head, release.release, opacus.opacus_gradients


def plan_of(**privacy: Any) -> RunPlan:
    return parse_plan({"name": "checked", "arms": ["federated_dp"], "privacy": privacy})


SAMPLED = plan_of(epsilon=3.0, sample_rate=0.25, clip_norm=0.5)
FULL = plan_of(epsilon=2.0)
NETWORK_VIEWS = parse_plan(
    {
        "name": "checked",
        "arms": ["federated_dp"],
        "privacy": {"trainable": "norms"},
        "training": {"inject": {"views": 3}},
    }
)
VIEWS = parse_plan({"name": "checked", "arms": ["federated_dp"], "training": {"inject": {"views": 3}}})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms, drawn and decoded once."""
    folder = tmp_path_factory.mktemp("phantoms")
    hospital(Scene(plan=FULL, folder=folder), "first")
    return folder / TEMPLATE


@pytest.fixture
def scene_of(template: Path, tmp_path: Path) -> Iterator[Callable[[RunPlan], Scene]]:
    scenes: list[Scene] = []

    def make(plan: RunPlan) -> Scene:
        folder = tmp_path / f"scene-{len(scenes)}"
        folder.mkdir()
        shutil.copytree(template, folder / TEMPLATE)
        scenes.append(Scene(plan=plan, folder=folder))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.close()


# faults of the step


def clip_after_sum(patch: Patch) -> None:
    def broken(chunks: Iterator[np.ndarray], size: int, clip_norm: float, grid: float) -> np.ndarray:
        total = sum(
            (np.nan_to_num(chunk, posinf=0, neginf=0).sum(axis=0) for chunk in chunks), np.zeros(size)
        )
        return to_grid_steps(total[None], clip_norm, grid)[0]

    patch.setattr(dp_sgd, "clipped_integer_sum", broken)


def views_weighed_across_patients(patch: Patch) -> None:
    """The weight of a patient's views follows how many views the site has."""
    real = InjectedRows.mean_weights
    patch.setattr(
        InjectedRows,
        "mean_weights",
        lambda self, rows: real(self, rows) / (1 + 1e-3 * np.count_nonzero(self.weights)),
    )


def views_by_number(patch: Patch) -> None:
    """The coins of a patient's views follow the number of the patients before."""
    real, before = own_views.views_of_patient, itertools.count()

    def numbered(images: Any, records: Any, labels: Any, coins: Any, *rest: Any, **named: Any) -> Any:
        coins = dataclasses.replace(coins, patient=str(next(before) % 7))
        return real(images, records, labels, coins, *rest, **named)

    patch.setattr(own_views, "views_of_patient", numbered)


def slice_sold_as_patient(patch: Patch) -> None:
    real = dp_sgd.head_gradients

    def broken(parameters: Any, shape: Any, x: Any, y: Any, slices: list[np.ndarray], **how: Any) -> Any:
        split = [row[None] for rows in slices for row in rows]
        return real(parameters, shape, x, y, split, **how | {"max_slices": 1, "weights": None})

    patch.setattr(dp_sgd, "head_gradients", broken)


def groups_clipped_apart(patch: Patch) -> None:
    def broken(chunks: Iterator[np.ndarray], size: int, clip_norm: float, grid: float) -> np.ndarray:
        total = np.zeros(size, np.int64)
        for chunk in chunks:
            for group in np.array_split(np.arange(size), 3):
                total[group] += to_grid_steps(chunk[:, group], clip_norm, grid).sum(axis=0)
        return total

    patch.setattr(dp_sgd, "clipped_integer_sum", broken)


def noise_times(factor: Callable[[Any], float]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def broken(gradients: Any, size: int, request: Any, coins: Coins) -> np.ndarray:
            grid = grid_of(request.clip_norm, size)
            deviation = noise_deviation(request.noise_multiplier, Fraction(request.clip_norm / grid) ** 2)
            total = dp_sgd.clipped_integer_sum(gradients, size, request.clip_norm, grid)
            return dp_sgd.release(total, deviation * factor(request), coins) * grid

        patch.setattr(dp_sgd, "noised_sum", broken)

    return apply


def quiet_draw(patch: Patch) -> None:
    """The deviation is right and the draw is not."""
    patch.setattr(release, "rounded_gaussian", lambda n, d, coins: rounded_gaussian(n, 0.98 * d, coins))


def noise_missing_on_a_tensor(patch: Patch) -> None:
    def broken(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        bare = total.size // 9
        return np.concatenate([REAL_RELEASE(total[:-bare], deviation, coins), total[-bare:]])

    patch.setattr(dp_sgd, "release", broken)


def exact_bias(patch: Patch) -> None:
    """The bias is trained beside the private weight, without noise."""

    def broken(weight: Any, bias: Any, x: Any, y: Any, patients: Any, request: Any, **how: Any) -> Any:
        private = REAL_TRAIN(weight, bias, x, y, patients, request, **how)
        rates = np.nan_to_num(np.nanmean(y, axis=0)) if len(y) else np.zeros(len(bias))
        return private._replace(bias=(bias + 0.01 * rates).astype(np.float32))

    patch.setattr(dp_sgd, "train_private_head", broken)


def one_draw_a_call(patch: Patch) -> None:
    drawn: list[tuple[Coins, np.ndarray]] = []

    def broken(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        if not drawn or drawn[-1][0] is not coins:
            drawn.append((coins, rounded_gaussian(total.size, deviation, coins)))
        return total + drawn[-1][1]

    patch.setattr(dp_sgd, "release", broken)


def noise_beside_release(patch: Patch) -> None:
    """One draw for the whole training, at its end, for what would need one a step."""

    def broken(weight: Any, bias: Any, x: Any, y: Any, patients: Any, request: Any, **how: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(dp_sgd, "release", lambda total, deviation, coins: total)
            bare = REAL_TRAIN(weight, bias, x, y, patients, request, **how)
        once = dataclasses.replace(request, steps=1)
        noise = REAL_TRAIN(weight * 0, bias * 0, x[:0], y[:0], patients[:0], once)
        return bare._replace(weight=bare.weight + noise.weight, bias=bare.bias + noise.bias)

    patch.setattr(dp_sgd, "train_private_head", broken)


def same_draw_in_two_calls(patch: Patch) -> None:
    patch.setattr(dp_sgd, "Coins", lambda: Coins(bytes(32)))


def seed_of_the_process(patch: Patch) -> None:
    patch.setattr(dp_sgd, "Coins", lambda: Coins(np.random.bytes(32)))  # noqa: NPY002


def stored_seed(patch: Patch) -> None:
    count = itertools.count()
    patch.setattr(dp_sgd, "Coins", lambda: Coins(hashlib.sha256(b"stored %d" % next(count)).digest()))


# faults of the sampler


def sampler(make: Callable[[int, float, Coins, list[Any]], np.ndarray]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        memory: list[Any] = []

        def broken(num_patients: int, rate: float, coins: Coins) -> np.ndarray:
            if memory and memory[0] is not coins:
                memory.clear()
            if not memory:
                memory.append(coins)
            return make(num_patients, rate, coins, memory)

        patch.setattr(dp_sgd, "sample_patients", broken)

    return apply


def fixed_size(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    return np.sort(coins.choose(np.arange(n), round(rate * n)))


def shuffled(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    if len(memory) == 1:
        memory += np.array_split(coins.choose(np.arange(n), n), round(1 / rate))
    return memory.pop()


def first_batch_again(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    if len(memory) == 1:
        memory.append(np.flatnonzero(coins.bernoulli(n, rate)))
    return memory[1]


def every_seventh_again(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    fresh = np.flatnonzero(coins.bernoulli(n, rate))
    memory.append(memory[-7] if len(memory) > 7 and len(memory) % 2 else fresh)
    return memory[-1]


def in_pairs(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    return np.flatnonzero(np.repeat(coins.bernoulli((n + 1) // 2, rate), 2)[:n])


def more_often(n: int, rate: float, coins: Coins, memory: list[Any]) -> np.ndarray:
    return np.flatnonzero(coins.bernoulli(n, min(1.0, 1.1 * rate)))


def lower_rate_reserved(patch: Patch) -> None:
    real = tasks.training_steps
    patch.setattr(
        tasks,
        "training_steps",
        lambda *asked: dataclasses.replace(real(*asked), sample_rate=real(*asked).sample_rate / 2),
    )


# faults of numbers that must be public


def training_with(change: Callable[[Any, int], dict[str, Any]]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def broken(weight: Any, bias: Any, x: Any, y: Any, patients: Any, request: Any, **how: Any) -> Any:
            changed = dataclasses.replace(request, **change(request, len(np.unique(patients))))
            done = REAL_TRAIN(weight, bias, x, y, patients, changed, **how)
            return done._replace(steps_done=request.steps)

        patch.setattr(dp_sgd, "train_private_head", broken)

    return apply


def private_weight(patch: Patch) -> None:
    owner = tasks.Agent._owner.fget  # type: ignore[attr-defined]
    patch.setattr(
        tasks.Agent,
        "_owner",
        property(
            lambda self: dataclasses.replace(
                owner(self), nominal_patients=len(np.unique(self.cohort().patients[self.cohort().part == 0]))
            )
        ),
    )


def half_the_noise_of_the_ledger(patch: Patch) -> None:
    real = dp_sgd.PrivateSteps
    patch.setattr(
        dp_sgd,
        "PrivateSteps",
        lambda **values: real(**values | {"noise_multiplier": values["noise_multiplier"] / 2}),
    )


# faults of features and layers


def standardized_features(patch: Patch) -> None:
    real = tasks.Agent._cached_features

    def broken(self: tasks.Agent, *asked: Any) -> np.ndarray:
        features = real(self, *asked)
        return (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)

    patch.setattr(tasks.Agent, "_cached_features", broken)


def batch_norm(patch: Patch) -> None:
    """The features of all patients in one batch, by a network that normalizes over it."""
    real = SmallCNN.maps

    def together(self: tasks.Agent, model: nn.Module, backbone: Any, rows: np.ndarray) -> np.ndarray:
        return tasks.extract_features(model, self.cohort().images, self.cohort().modality, rows)

    def broken(self: SmallCNN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return real(self, nn.functional.batch_norm(x, None, None, training=True))

    patch.setattr(SmallCNN, "maps", broken)
    patch.setattr(tasks.Agent, "_cached_features", together)


def batch_dice(patch: Patch) -> None:
    def dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        truth = torch.nan_to_num(labels)
        likely = torch.sigmoid(logits) * ~torch.isnan(labels)
        score = (2 * likely * truth).sum() / (likely.sum() + truth.sum() + 1e-6)
        return (1 - score).expand(len(logits)) / len(logits) * 50

    patch.setattr(opacus, "opacus_gradients", lambda layer, x, y, loss: REAL_OPACUS(layer, x, y, dice))


def uncovered_layer(patch: Patch) -> None:
    real = tasks.site_update

    def broken(plan: Any, task: Any, base: Any, steps: np.ndarray, *rest: Any, **claim: Any) -> Any:
        neck = np.arange(48, dtype=np.int32)  # trained on the same patients, without noise
        return real(plan, task, base, np.concatenate([neck, steps]), *rest, **claim)

    patch.setattr(tasks, "site_update", broken)


def norm_over_patients(patch: Patch) -> None:
    """A network that normalizes over the batch, whose patients are computed together."""
    real = SmallCNN.maps

    def broken(self: SmallCNN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return real(self, nn.functional.batch_norm(x, None, None, training=True))

    patch.setattr(SmallCNN, "maps", broken)


def slices_of_a_network(patch: Patch) -> None:
    """Every slice is clipped by itself: a patient of several moves the sum by several clips."""
    real = dp_sgd.ENGINES["patient_loop"]

    def broken(network: Any, examples: Any, slices: list[np.ndarray], **how: Any) -> Any:
        split = [row[None] for rows in slices for row in rows]
        return real(network, examples, split, **how | {"weights": None})

    patch.setitem(dp_sgd.ENGINES, "patient_loop", broken)


def exact_layer_of_a_network(patch: Patch) -> None:
    """The first layer is trained beside the private rest, without noise."""
    real = dp_sgd.train_private_network

    def broken(network: Any, trained: Any, inputs: Any, labels: Any, *rest: Any, **how: Any) -> Any:
        after = real(network, trained, inputs, labels, *rest, **how)
        after[:10] += 0.01 * np.nan_to_num(labels).sum()
        return after

    patch.setattr(dp_sgd, "train_private_network", broken)


# faults of messages and records


def metric_in_a_field(patch: Patch) -> None:
    real = tasks.Agent._train_charged

    def broken(self: tasks.Agent, *asked: Any) -> Any:
        prevalence = float(np.nanmean(self.cohort().labels[self.cohort().part == 0]))
        return real(self, *asked).model_copy(update={"added_variance": prevalence})

    patch.setattr(tasks.Agent, "_train_charged", broken)


def metric_in_the_update(patch: Patch) -> None:
    real = tasks.site_update

    def broken(plan: Any, task: Any, base: Any, steps: np.ndarray, *rest: Any, **claim: Any) -> Any:
        steps = steps.copy()
        steps[-1] = 4711  # a count of patients, say
        return real(plan, task, base, steps, *rest, **claim)

    patch.setattr(tasks, "site_update", broken)


def patients_in_a_refusal(patch: Patch) -> None:
    real = tasks.refusal_for

    def broken(failure: Exception, **how: Any) -> Any:
        return real(failure, **how).model_copy(update={"reason": " ".join(str(failure).split())[:900]})

    patch.setattr(tasks, "refusal_for", broken)


def answers_lost(patch: Patch) -> None:
    patch.setattr(Outbox, "put", lambda self, key, payload: payload)


# faults that were thought of when all those above were found


def noise_without_tails(patch: Patch) -> None:
    """Values beyond four deviations are drawn in, so that a head never jumps."""

    def broken(size: int, deviation: float, coins: Coins) -> np.ndarray:
        most = int(4 * deviation)
        return np.clip(rounded_gaussian(size, deviation, coins), -most, most)

    patch.setattr(release, "rounded_gaussian", broken)


def one_draw_an_output(patch: Patch) -> None:
    """The noise has the shape of the bias and is broadcast over the features."""
    shapes: list[tuple[int, int]] = []

    def train(weight: Any, bias: Any, x: Any, y: Any, patients: Any, request: Any, **how: Any) -> Any:
        shapes.append(weight.shape)
        return REAL_TRAIN(weight, bias, x, y, patients, request, **how)

    def broken(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        outputs, width = shapes[-1]
        drawn = rounded_gaussian(2 * outputs, deviation, coins)
        return total + np.concatenate([np.repeat(drawn[:outputs], width), drawn[outputs:]])

    patch.setattr(dp_sgd, "train_private_head", train)
    patch.setattr(dp_sgd, "release", broken)


def noise_where_gradients_are(patch: Patch) -> None:
    """Values that no patient's gradient touches get no noise."""

    def broken(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        drawn = rounded_gaussian(total.size, deviation, coins)
        return total + (drawn * (total != 0) if total.any() else drawn)

    patch.setattr(dp_sgd, "release", broken)


def refund_of_failed_work(patch: Patch) -> None:
    """A training that fails gives its budget back."""
    real = tasks.Agent._train_private

    def broken(self: tasks.Agent, *asked: Any) -> Any:
        before = {path: path.read_bytes() for path in self.state.glob("ledger*")}
        try:
            return real(self, *asked)
        except Exception:
            for path in self.state.glob("ledger*"):
                path.unlink()
            for path, content in before.items():
                path.write_bytes(content)
            raise

    patch.setattr(tasks.Agent, "_train_private", broken)


def clip_of_the_cohort(patch: Patch) -> None:
    """Patients are clipped to the median length, and the noise follows it."""
    real = dp_sgd.noised_sum

    def broken(gradients: Any, size: int, request: Any, coins: Coins) -> np.ndarray:
        chunks = list(gradients)
        lengths = [length for chunk in chunks for length in np.linalg.norm(chunk.astype(float), axis=1)]
        finite = [length for length in lengths if 0 < length < np.inf]
        clip = min(request.clip_norm, float(np.median(finite))) if finite else request.clip_norm
        return real(iter(chunks), size, dataclasses.replace(request, clip_norm=clip), coins)

    patch.setattr(dp_sgd, "noised_sum", broken)


# faults of what a site keeps, and of scores


def ledger_a_cohort(patch: Patch) -> None:
    """A ledger for each cohort, in whatever state folder, made where there is none."""

    def broken(site: Any, folder: Path) -> Any:
        key = site_key(folder / site.state)
        path = folder / site.state / f"ledger-{site.cohort}.sqlite3"
        return Ledger.open(path, key=key, cohort=site.cohort, disjoint=False, create=True)

    patch.setattr(tasks, "open_ledger", broken)


def ledger_made_again(patch: Patch) -> None:
    """A ledger that is gone is made anew."""

    def broken(site: Any, folder: Path) -> Any:
        return site_ledger._opened(site, folder / site.state, create=True)

    patch.setattr(tasks, "open_ledger", broken)


def delta_of_the_plan(patch: Patch) -> None:
    real = tasks.Agent.policy.fget  # type: ignore[attr-defined]
    patch.setattr(
        tasks.Agent,
        "policy",
        property(
            lambda self: real(self).model_copy(update={"max_delta": min(1e-4, self._plan.privacy.delta)})
        ),
    )


def any_ancestor(patch: Patch) -> None:
    patch.setattr(tasks, "admit_lineage", lambda *asked: None)


def evaluations_unlimited(patch: Patch) -> None:
    patch.setattr(tasks, "admit_question", lambda *asked, **how: None)


def quiet_scores(patch: Patch) -> None:
    real = evaluation.noise_deviation
    patch.setattr(
        evaluation, "noise_deviation", lambda noise, models: real(noise, models) / np.sqrt(models * 5)
    )


def slices_counted(patch: Patch) -> None:
    """Every slice of a test patient is counted."""
    patch.setattr(evaluation, "per_patient", lambda logits, labels, patients: (logits, labels))


def scores_charged_less(patch: Patch) -> None:
    real = tasks.charges
    patch.setattr(
        tasks,
        "charges",
        lambda *asked, **how: {
            name: dataclasses.replace(steps, noise_multiplier=2 * steps.noise_multiplier)
            for name, steps in real(*asked, **how).items()
        },
    )
    release_scores = evaluation.noise_deviation
    patch.setattr(evaluation, "noise_deviation", lambda noise, cells: release_scores(noise / 2, cells))


class _Everyone:
    """Equal to every part of a cohort."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True


def everyone_trains(patch: Patch) -> None:
    for module in (tasks, own_views):
        patch.setattr(module, "TRAIN", _Everyone())


FAULTS: dict[str, tuple[str, RunPlan, Callable[[Patch], None]]] = {
    "clip after sum": ("sensitivity", FULL, clip_after_sum),
    "slice sold as patient": ("sensitivity", FULL, slice_sold_as_patient),
    "views weighed across patients": ("sensitivity", FULL, views_weighed_across_patients),
    "views by number": ("leave one out", VIEWS, views_by_number),
    "views of a network weighed across patients": ("network", FULL, views_weighed_across_patients),
    "views of a network by number": ("leave one out", NETWORK_VIEWS, views_by_number),
    "groups clipped apart": ("sensitivity", FULL, groups_clipped_apart),
    "noise without C": ("noise", FULL, noise_times(lambda request: 1 / request.clip_norm)),
    "noise halved": ("noise", SAMPLED, noise_times(lambda request: 0.5)),
    "noise 2 % low": ("noise", SAMPLED, noise_times(lambda request: 0.98)),
    "noise 2 % low in the draw": ("noise", FULL, quiet_draw),
    "half the noise of the ledger": ("arguments", SAMPLED, half_the_noise_of_the_ledger),
    "noise missing on a tensor": ("noise", FULL, noise_missing_on_a_tensor),
    "noise missing on the bias": ("noise", FULL, exact_bias),
    "one draw for a whole call": ("noise between steps", FULL, one_draw_a_call),
    "one draw, which adds up": ("noise", FULL, one_draw_a_call),
    "one draw after the steps": ("noise", FULL, noise_beside_release),
    "same draw in two calls": ("noise between calls", FULL, same_draw_in_two_calls),
    "seed of the process": ("noise between calls", FULL, seed_of_the_process),
    "stored seed": ("noise between calls", FULL, stored_seed),
    "fixed-size sampler": ("participation", SAMPLED, sampler(fixed_size)),
    "shuffled sampler": ("participation", SAMPLED, sampler(shuffled)),
    "first batch in every step": ("participation", SAMPLED, sampler(first_batch_again)),
    "batches repeated after seven": ("participation", SAMPLED, sampler(every_seventh_again)),
    "patients in pairs": ("participation", SAMPLED, sampler(in_pairs)),
    "rate below the real one, sampler": ("participation", SAMPLED, sampler(more_often)),
    "rate below the real one, ledger": ("arguments", SAMPLED, lower_rate_reserved),
    "more steps than reserved": (
        "arguments",
        SAMPLED,
        training_with(lambda request, patients: {"steps": 2 * request.steps}),
    ),
    "private N in the divisor": (
        "public divisor",
        SAMPLED,
        training_with(lambda request, patients: {"nominal_patients": max(1, patients)}),
    ),
    "private N in the steps": (
        "public divisor",
        SAMPLED,
        training_with(lambda request, patients: {"steps": request.steps + patients // 10}),
    ),
    "private N in the weight": ("arguments", FULL, private_weight),
    "cohort statistics in features": ("leave one out", FULL, standardized_features),
    "BatchNorm": ("leave one out", FULL, batch_norm),
    "batch Dice": ("sensitivity", FULL, batch_dice),
    "norm over patients": ("network", FULL, norm_over_patients),
    "slices of a network sold as patients": ("network", SAMPLED, slices_of_a_network),
    "uncovered layer of a network": ("network", FULL, exact_layer_of_a_network),
    "uncovered layer": ("coverage", FULL, uncovered_layer),
    "uncovered bias": ("coverage", FULL, exact_bias),
    "exact metric in a field": ("wire", FULL, metric_in_a_field),
    "exact metric in the update": ("coverage", FULL, metric_in_the_update),
    "a patient in a refusal": ("wire", FULL, patients_in_a_refusal),
    "answers lost": ("stored answers", FULL, answers_lost),
    "cohort renamed, state moved": ("one budget", FULL, ledger_a_cohort),
    "ledger deleted": ("one budget", FULL, ledger_made_again),
    "plan's delta moves the order": ("filter", FULL, delta_of_the_plan),
    "non-private ancestor": ("lineage", FULL, any_ancestor),
    "two evaluations a few patients apart": ("evaluations apart", FULL, evaluations_unlimited),
    "less noise on scores": ("evaluations apart", FULL, quiet_scores),
    "slices counted in scores": ("scores", FULL, slices_counted),
    "scores with less noise than charged": ("scores", FULL, scores_charged_less),
    "test patients in training": ("test patients", FULL, everyone_trains),
    "noise without tails": ("noise", FULL, noise_without_tails),
    "one draw an output": ("noise", FULL, one_draw_an_output),
    "noise where gradients are": ("noise", FULL, noise_where_gradients_are),
    "refund of failed work": ("one budget", FULL, refund_of_failed_work),
    "clip of the cohort": ("sensitivity", FULL, clip_of_the_cohort),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_check(
    fault: str, scene_of: Callable[[RunPlan], Scene], monkeypatch: Patch
) -> None:
    check, plan, apply = FAULTS[fault]
    scene = scene_of(plan)
    apply(monkeypatch)
    finding = run_check(check, scene)
    assert finding.holds is False
    assert "stopped by" not in finding.measured, finding


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patient_loop": ({"engine": "patient_loop"}, {}),
    "views": ({}, {"inject": {"views": 3}}),
    "views, patient_loop": ({"engine": "patient_loop"}, {"inject": {"views": 3}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_with_the_other_engine_and_with_views(
    fault: str, otherwise: str, scene_of: Callable[[RunPlan], Scene], monkeypatch: Patch
) -> None:
    check, plan, apply = FAULTS[fault]
    values = plan.model_dump(mode="json", exclude_defaults=True)
    privacy, training = OTHERWISE[otherwise]
    for section, more in (("privacy", privacy), ("training", training)):
        values[section] = values.get(section, {}) | more
    scene = scene_of(parse_plan(values))
    apply(monkeypatch)
    finding = run_check(check, scene)
    assert finding.holds is False
    assert "stopped by" not in finding.measured, finding


@pytest.mark.parametrize(
    "plan",
    [
        FULL,
        SAMPLED,
        plan_of(epsilon=8.0, clip_norm=2.5),
        plan_of(engine="patient_loop", trainable="all"),
        plan_of(trainable="norms", sample_rate=0.5),
        VIEWS,
        NETWORK_VIEWS,
    ],
    ids=["full", "sampled", "wide clip", "all, patient loop", "norms, opacus", "views", "norms, views"],
)
def test_a_sound_plan_passes(plan: RunPlan, scene_of: Callable[[RunPlan], Scene]) -> None:
    scene = scene_of(plan)
    findings = [run_check(name, scene) for name in CHECKS]
    assert not [finding for finding in findings if finding.holds is not True]


# 12 clips, noises and rates with an accountant of each kind, and the defaults of the plans that fedqc brings
SOUND = [
    plan_of(**values)
    for values in (
        *({"clip_norm": clip} for clip in (0.01, 0.1, 0.7, 3.0, 100.0)),
        *({"epsilon": epsilon} for epsilon in (0.3, 1.0, 8.0, 40.0)),
        *({"sample_rate": rate, "epsilon": 4.0} for rate in (0.02, 0.1, 0.37, 0.9)),
        *({"sample_rate": 0.5, "clip_norm": clip, "delta": 1e-6} for clip in (0.05, 1.0, 9.0)),
        {"noise_multiplier": 0.7},
        {"noise_multiplier": 20.0, "evaluation_share": 0.5},
        {"max_slices_per_patient": 1},
        {"max_slices_per_patient": 16, "sample_rate": 0.2},
        {"engine": "patient_loop"},
        {"trainable": "all"},
        {"trainable": "norms", "engine": "patient_loop", "clip_norm": 0.05},
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SOUND)))
def test_no_false_alarm(number: int, scene_of: Callable[[RunPlan], Scene]) -> None:
    scene = scene_of(SOUND[number])
    findings = [run_check(name, scene) for name in CHECKS]
    assert not [finding for finding in findings if finding.holds is not True]


@pytest.mark.slow
def test_the_audit_agrees_with_the_accountant(scene_of: Callable[[RunPlan], Scene]) -> None:
    scene = scene_of(FULL)
    assert all(finding.holds for finding in audit(scene))
    for epsilon, mu in ((8.0, 1.666), (3.0, 0.719), (1.0, 0.268)):
        found = audited(scene, epsilon)
        assert found.mu == pytest.approx(mu, abs=0.002)
        assert found.estimate == pytest.approx(mu, abs=0.15)  # five standard errors


def test_the_audit_finds_half_the_noise(
    scene_of: Callable[[RunPlan], Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_sgd, "noise_deviation", lambda *asked: noise_deviation(*asked) / 2)
    found = audited(scene_of(FULL), 8.0, runs=8)
    assert found.lower > 1.5 * found.mu


def test_the_command_prints_a_line_a_check_and_fails_where_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = {name: CHECKS[name] for name in ("sensitivity", "public divisor")}
    monkeypatch.setattr("client.privacy_checks.checks.CHECKS", few)
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: checked\narms: [federated_dp]\nprivacy: {clip_norm: 0.3}\n", encoding="utf-8")
    assert verify_command(privacy=True, plan=plan) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["ok", "ok"]
    assert "no proof" in last
    clip_after_sum(monkeypatch)
    assert verify_command(privacy=True, format=Format.json) == 1
    said = json.loads(capsys.readouterr().out)
    assert [one["holds"] for one in said["checks"]] == [False, True]
    assert "no proof" in said["note"]


@pytest.mark.parametrize(
    "asked", [{}, {"run": Path("r"), "privacy": True}, {"run": Path("r"), "audit": True}, {"audit": True}]
)
def test_verify_answers_one_question(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either a run folder"):
        verify_command(**asked)


def test_a_plan_without_a_private_arm_is_refused(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("name: open\narms: [federated]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no arm of this plan is private"):
        verify_command(privacy=True, plan=plan)
