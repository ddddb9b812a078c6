from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from torch import nn

from client.dp import dp_sgd
from client.dp.clipping import clipped_sum
from client.dp.coins import Coins
from client.dp.dp_sgd import (
    PrivateSteps,
    TrainedHead,
    head_gradients,
    train_private_head,
)
from client.dp.engines import ENGINES
from client.dp.engines.opacus import opacus_gradients
from client.dp.release import clipped_integer_sum, grid_of
from common.errors import ConfigError
from common.losses import LOSSES, masked_bce
from common.privacy import GaussianSteps, epsilon_of, noise_multiplier_for, rdp_epsilon

ARTIFACTS, FEATURES = 5, 12
SIZE = ARTIFACTS * FEATURES + ARTIFACTS


def cohort(num_patients: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Slices of `num_patients` patients, 1 to 6 of each, shuffled; about a third of the labels not
    assessed.
    """
    generator = np.random.default_rng(seed)
    patients = np.repeat(
        [f"patient-{number}" for number in range(num_patients)], generator.integers(1, 7, num_patients)
    )
    patients = generator.permutation(patients)
    labels = generator.integers(0, 2, (len(patients), ARTIFACTS)).astype(np.float32)
    labels[generator.random(labels.shape) < 0.3] = np.nan
    return {
        "features": generator.standard_normal((len(patients), FEATURES)).astype(np.float32),
        "labels": labels,
        "patients": patients,
    }


def start(seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "weight": generator.standard_normal((ARTIFACTS, FEATURES)).astype(np.float32) / 4,
        "bias": generator.standard_normal(ARTIFACTS).astype(np.float32) / 4,
    }


def without(site: dict[str, np.ndarray], patient: str) -> dict[str, np.ndarray]:
    kept = site["patients"] != patient
    return {name: array[kept] for name, array in site.items()}


def trained(site: dict[str, np.ndarray], **changes: Any) -> TrainedHead:
    settings: dict[str, Any] = {
        "steps": 1,
        "learning_rate": 0.5,
        "clip_norm": 1.0,
        "noise_multiplier": 0.0,
        "sample_rate": 1.0,
        "nominal_patients": 50,
        "max_slices_per_patient": 100,
    }
    return train_private_head(**start(), **site, request=PrivateSteps(**{**settings, **changes}))


def gradients(site: dict[str, np.ndarray], loss: str = "bce", engine: str = "opacus") -> np.ndarray:
    """The gradient of each patient, shape (patients, SIZE), in the order of their names."""
    rows = [np.flatnonzero(site["patients"] == patient) for patient in np.unique(site["patients"])]
    head = start()
    chunks = head_gradients(
        np.concatenate([head["weight"].ravel(), head["bias"]]).astype(np.float64),
        head["weight"].shape,
        torch.as_tensor(site["features"]),
        torch.as_tensor(site["labels"]),
        rows,
        max_slices=100,
        engine=engine,
        loss=LOSSES[loss],
    )
    return np.concatenate([np.zeros((0, SIZE), dtype=np.float32), *chunks])


def clipped(site: dict[str, np.ndarray], clip_norm: float = 1.0, loss: str = "bce") -> np.ndarray:
    """The sum of a step without noise and without grid."""
    return clipped_sum(gradients(site, loss), clip_norm)


def steps_of(site: dict[str, np.ndarray], clip_norm: float = 1.0, loss: str = "bce") -> np.ndarray:
    """The sum of a private step before its noise, in grid steps."""
    return clipped_integer_sum([gradients(site, loss)], SIZE, clip_norm, grid_of(clip_norm, SIZE))


def moved(head: TrainedHead) -> np.ndarray:
    begin = start()
    return np.concatenate([(head.weight - begin["weight"]).ravel(), head.bias - begin["bias"]])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e30, math.inf])
def test_removing_a_patient_moves_the_sum_by_at_most_the_clip(scale: float) -> None:
    """In whole steps exactly; without the grid up to rounding."""
    site = cohort()
    for clip_norm in (0.01, 1.0, 50.0):
        for patient in ("patient-0", "patient-7"):
            outlier = {**site, "features": site["features"].copy()}
            outlier["features"][site["patients"] == patient] *= scale
            gone = steps_of(outlier, clip_norm) - steps_of(without(site, patient), clip_norm)
            bound = Fraction(clip_norm / grid_of(clip_norm, SIZE)) ** 2
            assert sum(int(step) ** 2 for step in gone) <= bound
            gone = clipped(outlier, clip_norm) - clipped(without(site, patient), clip_norm)
            assert np.linalg.norm(gone) <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_patient_never_changes_the_part_of_another(loss: str) -> None:
    """The sum is the sum of what each patient gives alone, whoever else is there: exactly, in whole steps."""
    site = cohort()
    each = [
        {name: array[site["patients"] == patient] for name, array in site.items()}
        for patient in np.unique(site["patients"])
    ]
    alone = np.sum([steps_of(one, 0.1, loss) for one in each], axis=0)
    np.testing.assert_array_equal(steps_of(site, 0.1, loss), alone)
    alone = np.sum([clipped(one, 0.1, loss=loss) for one in each], axis=0)
    np.testing.assert_allclose(clipped(site, 0.1, loss=loss), alone, atol=1e-7)


MANY = cohort(300, seed=3)
NAMES = np.unique(MANY["patients"])


@given(
    kept=st.lists(st.sampled_from(NAMES.tolist()), min_size=1, max_size=40, unique=True),
    loss=st.sampled_from(sorted(LOSSES)),
    engine=st.sampled_from(sorted(ENGINES)),
)
@settings(max_examples=60, deadline=None)
def test_a_gradient_has_the_same_bits_whatever_its_place_and_its_company(
    kept: list[str], loss: str, engine: str
) -> None:
    """Matrix products and vectorized functions round a row differently in batches of other shapes."""
    everyone = gradients(MANY, loss, engine)
    subset = {name: array[np.isin(MANY["patients"], kept)] for name, array in MANY.items()}
    np.testing.assert_array_equal(gradients(subset, loss, engine), everyone[np.isin(NAMES, kept)])


def test_both_engines_give_a_head_the_same_gradients() -> None:
    np.testing.assert_allclose(gradients(MANY, engine="patient_loop"), gradients(MANY), atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_gradient_has_the_same_bits_with_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        everyone = gradients(MANY)
        for first in (1, 2, 3, 150, 299):
            subset = {name: array[np.isin(MANY["patients"], NAMES[first:])] for name, array in MANY.items()}
            np.testing.assert_array_equal(gradients(subset), everyone[first:])
    finally:
        torch.set_num_threads(before)


def test_every_batch_has_the_same_public_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def spy(layer: Any, features: torch.Tensor, *others: Any) -> list[torch.Tensor]:
        shapes.append(tuple(features.shape))
        return opacus_gradients(layer, features, *others)

    monkeypatch.setattr("client.dp.engines.opacus.opacus_gradients", spy)
    for patients in (1, 7, 300):
        trained(cohort(patients))
    trained(cohort(3), max_slices_per_patient=1025)
    assert len(shapes) == 1 + 1 + 2 + 1
    assert set(shapes[:-1]) == {(1024, FEATURES)}
    assert shapes[-1] == (2048, FEATURES)


def test_zero_noise_and_a_huge_clip_are_plain_gradient_descent_on_patient_means() -> None:
    site = cohort()
    layer = nn.Linear(FEATURES, ARTIFACTS)
    begin = start()
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(begin["weight"]))
        layer.bias.copy_(torch.as_tensor(begin["bias"]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        losses = masked_bce(layer(torch.as_tensor(site["features"])), torch.as_tensor(site["labels"]))
        by_patient = [
            losses[torch.as_tensor(site["patients"] == patient)].mean()
            for patient in np.unique(site["patients"])
        ]
        (torch.stack(by_patient).sum() / 50).backward()
        optimizer.step()
    ours = trained(site, steps=20, clip_norm=1e6)
    np.testing.assert_allclose(ours.weight, layer.weight.detach(), atol=2e-6)
    np.testing.assert_allclose(ours.bias, layer.bias.detach(), atol=2e-6)
    assert ours.steps_done == 20


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_per_slice_are_the_outer_product_of_logit_gradient_and_features(loss: str) -> None:
    """The closed form of a linear layer, without hooks."""
    site = cohort(300)
    features, labels = torch.as_tensor(site["features"]), torch.as_tensor(site["labels"])
    layer = nn.Linear(FEATURES, ARTIFACTS)
    logits = layer(features).detach().requires_grad_(True)
    (at_logits,) = torch.autograd.grad(LOSSES[loss](logits, labels).sum(), logits)
    expected = torch.cat([torch.einsum("ba,bf->baf", at_logits, features).flatten(1), at_logits], dim=1)
    actual = torch.cat([one.flatten(1) for one in opacus_gradients(layer, features, labels, LOSSES[loss])], 1)
    np.testing.assert_allclose(actual.detach(), expected, atol=1e-6)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(cohort(20))
    monkeypatch.setattr(
        "client.dp.engines.opacus.whole_patients", lambda slices, num_rows: [[one] for one in slices]
    )
    np.testing.assert_array_equal(gradients(cohort(20)), whole)


def test_a_patient_with_five_equal_slices_counts_as_one() -> None:
    site = cohort()
    five = {name: np.concatenate([array[:1]] * 5) for name, array in site.items()}
    one = {name: array[:1] for name, array in site.items()}
    for clip_norm in (0.01, 1e6):
        np.testing.assert_allclose(clipped(five, clip_norm), clipped(one, clip_norm), rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_patient_whose_gradient_is_not_finite_is_as_if_absent(value: float) -> None:
    site = cohort()
    broken = {**site, "features": site["features"].copy()}
    broken["features"][site["patients"] == "patient-3"] *= value
    np.testing.assert_allclose(
        clipped(broken, 0.5), clipped(without(site, "patient-3"), 0.5), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        trained(broken, steps=5).weight, trained(without(site, "patient-3"), steps=5).weight, atol=1e-7
    )


def test_a_patient_with_nothing_assessed_adds_nothing() -> None:
    site = cohort()
    blank = {**site, "labels": site["labels"].copy()}
    blank["labels"][site["patients"] == "patient-3"] = np.nan
    np.testing.assert_allclose(clipped(blank), clipped(without(site, "patient-3")), atol=1e-8)


def test_the_noise_of_an_empty_batch_has_the_promised_deviation() -> None:
    """Nobody there: the step is noise alone, of deviation noise_multiplier * clip_norm / (rate * nominal
    patients).
    """
    nobody = {
        "features": np.zeros((0, 40_000), dtype=np.float32),
        "labels": np.zeros((0, ARTIFACTS), dtype=np.float32),
        "patients": np.zeros(0, dtype=str),
    }
    zero = {
        "weight": np.zeros((ARTIFACTS, 40_000), dtype=np.float32),
        "bias": np.zeros(ARTIFACTS, dtype=np.float32),
    }
    head = train_private_head(
        **zero,
        **nobody,
        request=PrivateSteps(
            steps=1,
            learning_rate=0.5,
            clip_norm=0.7,
            noise_multiplier=2.5,
            sample_rate=0.2,
            nominal_patients=50,
            max_slices_per_patient=4,
        ),
    )
    assert head.weight.std() == pytest.approx(0.5 * 2.5 * 0.7 / (0.2 * 50), rel=0.01)
    assert head.steps_done == 1


def test_a_private_step_is_the_integer_sum_and_the_noise_of_its_coins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In double precision: what a step adds is a whole number of grid steps, of the promised deviation."""
    site = cohort()
    seen: dict[str, Any] = {}

    def spy(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        seen.update(total=total, deviation=deviation)
        return total

    monkeypatch.setattr(dp_sgd, "release", spy)
    step = moved(trained(site, clip_norm=0.01, noise_multiplier=2.5))
    grid = grid_of(0.01, SIZE)
    np.testing.assert_array_equal(seen["total"], steps_of(site, 0.01))
    assert seen["deviation"] == pytest.approx(2.5 * 0.01 / grid)
    np.testing.assert_allclose(step, -0.5 * seen["total"] * grid / 50, atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_opacus_accounts_for_the_executed_steps_as_we_do(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second witness: what each step really did, in Opacus' accountant."""
    accountant = RDPAccountant()
    rates: list[float] = []
    sampling, releasing = dp_sgd.sample_patients, dp_sgd.release

    def sample(num_patients: int, sample_rate: float, coins: Coins) -> np.ndarray:
        rates.append(sample_rate)
        return sampling(num_patients, sample_rate, coins)

    def noised(total: np.ndarray, deviation: float, coins: Coins) -> np.ndarray:
        executed = deviation * grid_of(0.3, total.size) / 0.3
        accountant.step(noise_multiplier=executed, sample_rate=rates[-1])
        return releasing(total, deviation, coins)

    monkeypatch.setattr(dp_sgd, "sample_patients", sample)
    monkeypatch.setattr(dp_sgd, "release", noised)
    private = {"steps": 25, "sample_rate": 0.4, "noise_multiplier": 1.3, "clip_norm": 0.3}
    done = trained(cohort(), **private, engine=engine).steps_done
    planned = GaussianSteps(noise_multiplier=1.3, sample_rate=0.4, steps=done)
    assert sum(steps for *_, steps in accountant.history) == done == 25
    assert accountant.get_epsilon(delta=1e-5) == pytest.approx(rdp_epsilon([planned], 1e-5), abs=2e-3)


def test_empty_batches_count_as_steps() -> None:
    head = trained(cohort(), steps=7, sample_rate=1e-9, noise_multiplier=1.0)
    assert head.steps_done == 7
    assert np.abs(moved(head)).min() > 0


def test_the_divisor_is_public() -> None:
    """Two cohorts of different size, same nominal number: each patient weighs the same."""
    site = cohort()
    step = moved(trained(site, clip_norm=0.01))
    np.testing.assert_allclose(step, -0.5 * clipped(site, 0.01) / 50, atol=1e-7)
    np.testing.assert_allclose(
        moved(trained(site, clip_norm=0.01, nominal_patients=100)), step / 2, atol=1e-7
    )


def test_two_trainings_share_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    site = cohort()
    noisy = {"steps": 3, "noise_multiplier": 1.0, "sample_rate": 0.5, "max_slices_per_patient": 2}
    assert not np.array_equal(trained(site, **noisy).weight, trained(site, **noisy).weight)
    monkeypatch.setattr(dp_sgd, "Coins", lambda: Coins(bytes(32)))
    assert np.array_equal(trained(site, **noisy).weight, trained(site, **noisy).weight)


def test_the_noise_of_two_steps_is_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = {
        "features": np.zeros((0, FEATURES)),
        "labels": np.zeros((0, ARTIFACTS)),
        "patients": np.zeros(0),
    }
    steps: list[np.ndarray] = []
    releasing = dp_sgd.release

    def spy(*arguments: Any) -> np.ndarray:
        steps.append(releasing(*arguments))
        return steps[-1]

    monkeypatch.setattr(dp_sgd, "release", spy)
    trained(nobody, steps=400, noise_multiplier=1.0)
    first, second = np.concatenate(steps[:-1]), np.concatenate(steps[1:])
    assert len({step.tobytes() for step in steps}) == 400
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)


def test_training_works_inside_no_grad_and_leaves_the_start_alone() -> None:
    begin = start()
    with torch.no_grad():
        train_private_head(
            **begin,
            **cohort(),
            request=PrivateSteps(
                steps=2,
                learning_rate=0.1,
                clip_norm=1.0,
                noise_multiplier=1.0,
                sample_rate=1.0,
                nominal_patients=50,
                max_slices_per_patient=4,
            ),
        )
    np.testing.assert_array_equal(begin["weight"], start()["weight"])


def test_privacy_and_learning_can_both_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A separable task, 400 patients, epsilon 3: the head learns."""
    generator = np.random.default_rng(0)
    direction = generator.standard_normal((ARTIFACTS, FEATURES))
    features = generator.standard_normal((1200, FEATURES)).astype(np.float32)
    labels = (features @ direction.T > 0).astype(np.float32)
    monkeypatch.setattr(dp_sgd, "Coins", lambda: Coins(bytes(32)))
    noise = noise_multiplier_for(3.0, 1e-5, 1.0, 40)
    assert epsilon_of([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=40)], 1e-5) <= 3.0
    head = train_private_head(
        np.zeros((ARTIFACTS, FEATURES), dtype=np.float32),
        np.zeros(ARTIFACTS, dtype=np.float32),
        features,
        labels,
        np.repeat(np.arange(400), 3),
        PrivateSteps(
            steps=40,
            learning_rate=1.0,
            clip_norm=0.5,
            noise_multiplier=noise,
            sample_rate=1.0,
            nominal_patients=400,
            max_slices_per_patient=3,
        ),
    )
    right = ((features @ head.weight.T + head.bias > 0) == (labels > 0)).mean()
    assert right > 0.85


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"sample_rate": 0.0},
        {"steps": 0},
        {"clip_norm": 0.0},
        {"clip_norm": 1e-306, "noise_multiplier": 1.0},
        {"learning_rate": math.inf},
        {"nominal_patients": 0},
        {"max_slices_per_patient": 0},
        {"engine": "ghost"},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        trained(cohort(), **wrong)


def test_arrays_that_do_not_fit_are_refused() -> None:
    site = cohort()
    for name in site:
        with pytest.raises(ConfigError, match="shape"):
            trained({**site, name: site[name][:-1]})


def test_a_loss_that_mixes_samples_is_refused() -> None:
    site = cohort()
    with pytest.raises(ConfigError, match="per-sample"):
        opacus_gradients(
            nn.Linear(FEATURES, ARTIFACTS),
            torch.as_tensor(site["features"]),
            torch.as_tensor(site["labels"]),
            lambda logits, labels: masked_bce(logits, labels).mean(),
        )
