from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.artifacts import DEFAULT_LABELS, INDEX
from common.errors import ConfigError, PlanError
from common.losses import (
    LOSSES,
    batch_dice,
    bce_dice,
    cross_entropy,
    cross_entropy_dice,
    focal,
    loss_named,
    loss_of,
    masked_bce,
    soft_dice,
)
from common.plan import Training, parse_plan


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


def test_cross_entropy_by_hand() -> None:
    """Of classes none, a and c, as b was not assessed: softmax of 0, ln 2 and ln 3 is 1/6, 2/6 and 3/6."""
    logits = torch.tensor([[math.log(2), 9.0, math.log(3)]]).repeat(4, 1)
    nan = math.nan
    labels = torch.tensor([[1.0, nan, 0.0], [0.0, nan, 0.0], [1.0, nan, 1.0], [0.0, nan, 0.5]])
    by_hand = [
        -math.log(2 / 6),
        -math.log(1 / 6),
        -(math.log(2 / 6) + math.log(3 / 6)) / 2,
        -(math.log(3 / 6) + math.log(1 / 6)) / 2,
    ]
    torch.testing.assert_close(cross_entropy()(logits, labels), torch.tensor(by_hand))
    weighted = cross_entropy(class_weights=torch.tensor([4.0, 1.0, 1.0]))(logits, labels)
    torch.testing.assert_close(weighted[:2], torch.tensor([4 * by_hand[0], by_hand[1]]))


def test_cross_entropy_of_a_single_artifact_is_binary() -> None:
    """The binary mode of a publication: one artifact is assessed."""
    logits, labels = some_batch(5)
    labels[:, 1:] = math.nan
    torch.testing.assert_close(cross_entropy()(logits, labels), masked_bce(logits, labels))
    ours = cross_entropy_dice(alpha=0.7, beta=0.3)(logits, labels)
    torch.testing.assert_close(ours, bce_dice(alpha=0.7, beta=0.3)(logits, labels))


def test_soft_dice_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0]])
    assert soft_dice(logits, labels).item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 1 + 1))
    sure = torch.tensor([[60.0, -60.0]])
    assert soft_dice(sure, labels).item() == pytest.approx(0, abs=1e-6)


def test_bce_dice_is_the_weighted_sum() -> None:
    logits, labels = some_batch(5)
    mixed = bce_dice(alpha=0.3, beta=2.0)(logits, labels)
    np.testing.assert_allclose(
        mixed, 0.3 * masked_bce(logits, labels) + 2 * soft_dice(logits, labels), rtol=1e-6
    )


@pytest.mark.parametrize(("alpha", "beta"), [(-1, 1), (0, 0), (math.nan, 1), (math.inf, 1)])
def test_weights_that_make_no_loss_are_refused(alpha: float, beta: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        bce_dice(alpha=alpha, beta=beta)


def test_an_unknown_loss_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        loss_named("hinge")
    assert "bce_dice" in caught.value.hint
    assert "batch_dice" in caught.value.hint
    assert loss_named("bce") is masked_bce


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="samples"):
        masked_bce(torch.zeros(3, 5), torch.zeros(3, 1))


def test_focal_by_hand() -> None:
    logits, labels = torch.tensor([[0.0, 2.0, -1.0]]), torch.tensor([[1.0, math.nan, 0.0]])
    wrong = 1 / (1 + math.exp(1))  # the probability that the second assessed artifact is there
    by_hand = (0.25 * math.log(2) - wrong**2 * math.log(1 - wrong)) / 2
    assert focal()(logits, labels).item() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(focal(gamma=0)(logits, labels), masked_bce(logits, labels))
    with pytest.raises(ConfigError, match="gamma"):
        focal(gamma=0.5)


@pytest.mark.parametrize("name", ["bce", "focal", "bce_dice"])
def test_a_class_weight_counts_present_artifacts_only_and_by_its_number(name: str) -> None:
    logits, labels = some_batch(4)
    plain, weighted = loss_named(name), loss_named(name, {}, {"motion": 3.0})
    present = labels[:, INDEX["motion"]] == 1
    assert present.any()
    assert torch.equal(plain(logits, labels)[~present], weighted(logits, labels)[~present])
    assert (plain(logits, labels)[present] < weighted(logits, labels)[present]).all()
    same = loss_named(name, {}, {"metal": 1.0})
    np.testing.assert_allclose(same(logits, labels), plain(logits, labels), rtol=1e-6)


def test_a_class_weight_by_hand() -> None:
    logits, labels = torch.zeros(1, len(DEFAULT_LABELS)), torch.full((1, len(DEFAULT_LABELS)), math.nan)
    labels[0, INDEX["motion"]], labels[0, INDEX["metal"]] = 1, 0
    weighted = loss_named("bce", {}, {"motion": 3.0})
    assert weighted(logits, labels).item() == pytest.approx(2 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "args", "weights"), [("bce", {}, {"motion": 9.0}), ("focal", {"gamma": 1}, {"metal": 0.5})]
)
def test_arguments_let_no_sample_change_another(
    name: str, args: dict[str, float], weights: dict[str, float]
) -> None:
    logits, labels = some_batch(1)
    other = logits.clone()
    other[2] = 7.0
    loss = loss_named(name, args, weights)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(loss(logits, labels)[others], loss(other, labels)[others])


def test_the_loss_of_a_plan_takes_its_arguments() -> None:
    logits, labels = some_batch(5)
    asked = Training(loss="bce_dice", loss_args={"alpha": 0.7, "beta": 0.3})
    assert torch.equal(loss_of(asked)(logits, labels), bce_dice(alpha=0.7, beta=0.3)(logits, labels))
    assert loss_of(Training()) is masked_bce


@pytest.mark.parametrize(
    ("name", "args", "weights", "said"),
    [
        ("bce_dice", {"gamma": 2}, {}, "training.loss_args.gamma is unknown to bce_dice"),
        ("focal", {"gamma": True}, {}, "training.loss_args.gamma = True: must be a number"),
        ("focal", {"class_weights": 2}, {}, "class_weights is unknown"),
        ("bce", {"gamma": 2}, {}, "gamma is unknown to bce"),
        ("dice", {}, {"motion": 2.0}, "dice takes no loss_args and no class_weights"),
        ("batch_dice", {"beta": 2}, {}, "batch_dice takes no loss_args"),
    ],
)
def test_arguments_that_a_loss_does_not_take_are_refused(
    name: str, args: dict[str, float], weights: dict[str, float], said: str
) -> None:
    with pytest.raises(PlanError) as caught:
        loss_named(name, args, weights)
    assert caught.value.code == "bad-loss-args"
    assert said in caught.value.message


def test_arguments_of_a_loss_are_part_of_the_hash_where_there_are_some() -> None:
    def text(**training: Any) -> str:
        return parse_plan({"name": "x", "training": training}).canonical_json()

    assert text() == text(loss_args={}, class_weights={})
    assert text(loss="focal") != text(loss="focal", loss_args={"gamma": 3})
    assert text(class_weights={"motion": 2}) == text(class_weights={"motion": 2.0}) != text()
    assert hash(parse_plan({"name": "x", "training": {"class_weights": {"motion": 2}}}))


@pytest.mark.parametrize(
    "weights", [{"zebra": 2}, {"motion": 0}, {"motion": -1}, {"motion": 1e9}, {"motion": "2"}]
)
def test_class_weights_are_positive_numbers_of_artifacts(weights: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="class_weights"):
        parse_plan({"name": "x", "training": {"class_weights": weights}})


def test_batch_dice_is_that_of_publications_and_mixes_samples() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [60.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, math.nan]])
    losses = batch_dice(logits, labels)
    assert losses.shape == (2,)
    assert losses[0] == losses[1]
    assert losses[0].item() == pytest.approx(1 - 2 * 1.5 / (2 + 2), rel=1e-5)
    moved = torch.where(torch.tensor([[False], [True]]), logits - 50, logits)
    assert batch_dice(moved, labels)[0] != losses[0]


def test_batch_dice_is_refused_beside_private_arms_and_serves_others() -> None:
    with pytest.raises(ConfigError) as caught:
        loss_named("batch_dice", private=True)
    assert caught.value.code == "loss-not-private"
    assert "\n" not in caught.value.message
    assert loss_named("batch_dice") is batch_dice
    assert all(loss_named(name, private=True) is LOSSES[name] for name in LOSSES)
