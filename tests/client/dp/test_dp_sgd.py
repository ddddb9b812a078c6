from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.dp.dp_sgd import (
    PrivateSteps,
    TrainedHead,
    draw_slices,
    head_gradient_sum,
    opacus_gradients,
    train_private_head,
)
from client.dp.noise import fresh_generator
from common.errors import ConfigError
from common.losses import LOSSES, masked_bce
from common.privacy import rdp_epsilon

ARTIFACTS, FEATURES = 5, 12


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


def clipped(site: dict[str, np.ndarray], clip_norm: float = 1.0, loss: str = "bce") -> np.ndarray:
    rows = [np.flatnonzero(site["patients"] == patient) for patient in np.unique(site["patients"])]
    head = start()
    return head_gradient_sum(
        np.concatenate([head["weight"].ravel(), head["bias"]]).astype(np.float64),
        head["weight"].shape,
        torch.as_tensor(site["features"]),
        torch.as_tensor(site["labels"]),
        rows,
        clip_norm=clip_norm,
        loss=LOSSES[loss],
    )


def moved(head: TrainedHead) -> np.ndarray:
    begin = start()
    return np.concatenate([(head.weight - begin["weight"]).ravel(), head.bias - begin["bias"]])


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e30, math.inf])
def test_removing_a_patient_moves_the_clipped_sum_by_at_most_the_clip(scale: float) -> None:
    site = cohort()
    for clip_norm in (0.01, 1.0, 50.0):
        for patient in ("patient-0", "patient-7"):
            outlier = {**site, "features": site["features"].copy()}
            outlier["features"][site["patients"] == patient] *= scale
            gone = clipped(outlier, clip_norm) - clipped(without(site, patient), clip_norm)
            assert np.linalg.norm(gone) <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_patient_never_changes_the_part_of_another(loss: str) -> None:
    """The sum is the sum of what each patient gives alone, whoever else is there."""
    site = cohort()
    alone = [
        clipped({name: array[site["patients"] == patient] for name, array in site.items()}, 0.1, loss=loss)
        for patient in np.unique(site["patients"])
    ]
    np.testing.assert_allclose(clipped(site, 0.1, loss=loss), np.sum(alone, axis=0), atol=1e-7)


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
    actual = opacus_gradients(layer, features, labels, LOSSES[loss])
    np.testing.assert_allclose(actual.detach(), expected, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clipped(cohort(20))
    monkeypatch.setattr("client.dp.dp_sgd.PATIENTS_PER_CHUNK", 3)
    np.testing.assert_allclose(clipped(cohort(20)), whole, atol=1e-7)


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


def test_two_trainings_share_no_randomness() -> None:
    site = cohort()
    noisy = {"steps": 3, "noise_multiplier": 1.0, "sample_rate": 0.5, "max_slices_per_patient": 2}
    assert not np.array_equal(trained(site, **noisy).weight, trained(site, **noisy).weight)


def test_at_most_so_many_slices_of_a_patient_are_used() -> None:
    rows = np.arange(10, 30)
    drawn = draw_slices(rows, 4, fresh_generator())
    assert len(set(drawn.tolist())) == 4
    assert set(drawn.tolist()) <= set(rows.tolist())
    np.testing.assert_array_equal(draw_slices(rows, 20, fresh_generator()), rows)
    seen = np.concatenate([draw_slices(rows, 4, fresh_generator()) for _ in range(500)])
    assert len(np.unique(seen)) == 20


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
    from common.privacy import GaussianSteps, noise_multiplier_for

    seeded = np.random.default_rng(4)
    monkeypatch.setattr("client.dp.dp_sgd.fresh_generator", lambda: seeded)
    noise = noise_multiplier_for(3.0, 1e-5, 1.0, 40)
    assert rdp_epsilon([GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=40)], 1e-5) <= 3.0
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
        {"learning_rate": math.inf},
        {"nominal_patients": 0},
        {"max_slices_per_patient": 0},
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
