"""A study is one sample: what is no slice of it changes nothing, and what is one may."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.models import MODELS, as_classifier, build, fresh
from common.models.study import GRU, GatedAttention, GatedRecurrence
from common.weights import manifest_of

POOLINGS = ("mean", "max", "attention", "gru")
SIDE = 32


def studies(count: int, slices: int, seed: int = 0) -> Tensor:
    return torch.rand(count, slices, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def padded(x: Tensor, slices: int) -> Tensor:
    """With nan in the places up to `slices`."""
    return torch.cat([x, x.new_full((len(x), slices - x.shape[1], *x.shape[2:]), torch.nan)], 1)


def network(pooling: str, **more: Any) -> nn.Module:
    return fresh("study", 0, {"pooling": pooling, **more}).eval()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_places_without_a_slice_change_no_logit(pooling: str) -> None:
    one, x = network(pooling), studies(3, 3)
    with torch.no_grad():
        torch.testing.assert_close(one(padded(x, 8)), one(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_places_without_a_slice_change_no_gradient(pooling: str) -> None:
    one, x = network(pooling), studies(3, 3)

    def gradients(given: Tensor) -> Tensor:
        found = torch.autograd.grad(one(given).square().sum(), list(one.parameters()))
        return torch.cat([part.flatten() for part in found])

    torch.testing.assert_close(gradients(padded(x, 8)), gradients(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_slice_counts_and_only_the_recurrence_knows_their_order(pooling: str) -> None:
    one, x = network(pooling), studies(2, 4)
    with torch.no_grad():
        before, turned = one(x), one(x.flip(1))
        for place in range(4):
            other = x.clone()
            other[:, place] = 3 * studies(2, 1, seed=9)[:, 0]
            assert not torch.equal(one(other), before), place
    assert torch.allclose(turned, before, atol=1e-6) == (pooling != "gru")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_study_does_not_see_its_company(pooling: str) -> None:
    one, x = network(pooling), studies(4, 3)
    other = x.clone()
    other[1:] = 5 * studies(3, 3, seed=2)
    with torch.no_grad():
        assert torch.equal(one(other)[0], one(x)[0])


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
def test_a_study_of_one_slice_is_that_slice(pooling: str) -> None:
    of_slices, one = fresh("small_cnn", 3).eval(), network(pooling)
    missing, unexpected = one.load_state_dict(of_slices.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("pooling.") for name in missing)
    x = studies(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(one(x), of_slices(x[:, 0]), rtol=0, atol=1e-6)
        assert torch.equal(one(x[:, 0]), one(x))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "study"])
def test_weights_of_any_slice_network_are_a_start_for_mean_and_maximum(name: str) -> None:
    expected = manifest_of(build(name).state_dict())
    for pooling in ("mean", "max"):
        args = {"slice_network": name, "pooling": pooling, "slices": 4}
        assert manifest_of(build("study", args).state_dict()) == expected


def test_the_head_is_the_last_of_all_tensors() -> None:
    """What a private arm keeps of the features is keyed by all that comes before."""
    for pooling in POOLINGS:
        assert list(network(pooling).state_dict())[-2:] == ["head.weight", "head.bias"]


def test_the_recurrence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = GatedRecurrence(7), nn.GRU(7, GRU, batch_first=True)
    with torch.no_grad():
        for part, layer in (("ih", ours.of_input), ("hh", ours.of_state)):
            getattr(theirs, f"weight_{part}_l0").copy_(layer.weight)
            getattr(theirs, f"bias_{part}_l0").copy_(layer.bias)
        x = torch.randn(5, 6, 7)
        expected = theirs(x)[1][0]
        torch.testing.assert_close(ours(x, torch.ones(5, 6, dtype=torch.bool)), expected, rtol=0, atol=1e-6)


def test_attention_is_a_mean_by_weights_of_the_slices_that_are_there() -> None:
    torch.manual_seed(0)
    pool, h = GatedAttention(6), torch.randn(2, 3, 6)
    is_slice = torch.tensor([[True, True, True], [True, False, True]])
    with torch.no_grad():
        found = pool(h, is_slice)
        for number, there in enumerate(is_slice):
            own = h[number, there]
            score = (torch.tanh(pool.tanh(own)) * torch.sigmoid(pool.gate(own))) @ pool.weight.weight[0]
            expected = (score.exp() / score.exp().sum()) @ own
            torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-6)


def test_a_part_that_is_replaced_is_replaced_in_what_computes() -> None:
    one = network("mean")
    other, x = copy.deepcopy(one), studies(2, 2)
    other.add_module("neck", nn.Linear(320, as_classifier(other).head.in_features))
    with torch.no_grad():
        assert not torch.equal(other(x), one(x))


FUSIONS = ("mean_features", "max_features")


def several(count: int, slices: int, series: int, seed: int = 0) -> Tensor:
    """Studies of `series` series of `slices` slices, in the places that the networks below have for four of
    eight.
    """
    parts = [padded(studies(count, slices, seed + number), 8) for number in range(series)]
    return padded(torch.cat(parts, 1), 32)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_of_series_are_pooled_and_those_that_are_not_there_change_nothing(
    pooling: str, fusion: str
) -> None:
    one, fused = network(pooling), network(pooling, fusion=fusion)
    fused.load_state_dict(one.state_dict())
    with torch.no_grad():
        first, second = (as_classifier(one).features(studies(2, 3, seed)) for seed in (0, 1))
        both = torch.stack([first, second], 1)
        expected = both.mean(1) if fusion == "mean_features" else both.amax(1)
        found = as_classifier(fused).features(several(2, 3, 2))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(fused(several(2, 3, 1)), one(studies(2, 3)), rtol=0, atol=1e-5)
        torch.testing.assert_close(fused(studies(2, 1)[:, 0]), one(studies(2, 1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_series_that_are_not_there_change_no_gradient(pooling: str, fusion: str) -> None:
    one, fused = network(pooling), network(pooling, fusion=fusion)
    fused.load_state_dict(one.state_dict())

    def gradients(given: nn.Module, x: Tensor) -> Tensor:
        found = torch.autograd.grad(given(x).square().sum(), list(given.parameters()))
        return torch.cat([part.flatten() for part in found])

    found, expected = gradients(fused, several(3, 3, 1)), gradients(one, studies(3, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_fusion_adds_no_tensor() -> None:
    state = manifest_of(build("study", {"pooling": "max"}).state_dict())
    for fusion in ("mean", "noisy_or", *FUSIONS):
        assert manifest_of(build("study", {"pooling": "max", "fusion": fusion}).state_dict()) == state
