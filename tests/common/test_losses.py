from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.errors import ConfigError
from common.losses import LOSSES, bce_dice, loss_named, masked_bce, soft_dice


def some_batch(seed: int, samples: int = 6, artifacts: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(samples, artifacts, generator=generator)
    labels = torch.rand(samples, artifacts, generator=generator).round()
    labels[torch.rand(samples, artifacts, generator=generator) < 0.4] = math.nan
    return logits, labels


def losses_and_gradients(name: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_(True)
    losses = LOSSES[name](leaf, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


@pytest.mark.parametrize("name", LOSSES)
@given(
    seed=st.integers(0, 2**31),
    changed=st.integers(0, 5),
    scale=st.sampled_from([0.0, 1.0, 1e6, math.inf, math.nan]),
)
@settings(max_examples=40, deadline=None)
def test_one_sample_never_changes_another(name: str, seed: int, changed: int, scale: float) -> None:
    logits, labels = some_batch(seed)
    other_logits, other_labels = logits.clone(), labels.clone()
    other_logits[changed] = scale * some_batch(seed + 1)[0][changed]
    other_labels[changed] = some_batch(seed + 1)[1][changed]
    others = [sample for sample in range(len(logits)) if sample != changed]
    losses, gradient = losses_and_gradients(name, logits, labels)
    changed_losses, changed_gradient = losses_and_gradients(name, other_logits, other_labels)
    assert torch.equal(losses[others], changed_losses[others])
    assert torch.equal(gradient[others], changed_gradient[others])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_one_number_per_sample_and_ignores_what_was_not_assessed(name: str) -> None:
    logits, labels = some_batch(3)
    labels[2] = math.nan
    losses, gradient = losses_and_gradients(name, logits, labels)
    assert losses.shape == (6,)
    assert losses[2] == 0
    assert (gradient[labels.isnan()] == 0).all()
    moved = torch.where(labels.isnan(), logits + 5, logits)
    assert torch.equal(losses, LOSSES[name](moved, labels))


def test_masked_bce_is_the_mean_over_the_assessed_artifacts() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    labels = torch.tensor([[1.0, math.nan, 0.0]])
    by_hand = (math.log(2) + math.log(1 + math.exp(-1))) / 2
    assert masked_bce(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)


def test_a_severity_is_a_soft_label() -> None:
    logits = torch.tensor([[0.3]])
    gradient = losses_and_gradients("bce", logits, torch.tensor([[0.7]]))[1]
    assert gradient.item() == pytest.approx(1 / (1 + math.exp(-0.3)) - 0.7, rel=1e-5)


def test_soft_dice_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0]])
    assert soft_dice(logits, labels).item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 1 + 1))
    sure = torch.tensor([[60.0, -60.0]])
    assert soft_dice(sure, labels).item() == pytest.approx(0, abs=1e-6)


def test_bce_dice_is_the_weighted_sum() -> None:
    logits, labels = some_batch(5)
    mixed = bce_dice(0.3, 2.0)(logits, labels)
    np.testing.assert_allclose(
        mixed, 0.3 * masked_bce(logits, labels) + 2 * soft_dice(logits, labels), rtol=1e-6
    )


@pytest.mark.parametrize(("alpha", "beta"), [(-1, 1), (0, 0), (math.nan, 1), (math.inf, 1)])
def test_weights_that_make_no_loss_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        bce_dice(alpha, beta)


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        loss_named("batch_dice")
    assert "bce_dice" in caught.value.hint
    assert loss_named("bce") is masked_bce


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        masked_bce(torch.zeros(3, 5), torch.zeros(3, 1))
