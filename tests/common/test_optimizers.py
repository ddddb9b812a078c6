"""Every optimizer is the one of torch.optim, without its import; the default keeps its bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch

from common.errors import PlanError
from common.optimizers import OPTIMIZERS, check_optimizer, optimizer_of
from common.plan import Training, parse_plan

RATE, DECAY, STEPS = 1e-2, 1e-1, 12
SHAPES = ((3, 4), (5,))

CASES: dict[str, tuple[str, dict[str, Any], Callable[..., Any], dict[str, Any]]] = {
    "adamw": ("adamw", {}, torch.optim.AdamW, {}),
    "adamw with betas": (
        "adamw",
        {"beta1": 0.8, "beta2": 0.99},
        torch.optim.AdamW,
        {"betas": (0.8, 0.99)},
    ),
    "adam": ("adam", {}, torch.optim.Adam, {}),
    "adam with betas": ("adam", {"beta1": 0.5}, torch.optim.Adam, {"betas": (0.5, 0.999)}),
    "sgd": ("sgd", {}, torch.optim.SGD, {}),
    "sgd with momentum": ("sgd", {"momentum": 0.9}, torch.optim.SGD, {"momentum": 0.9}),
    "sgd after Nesterov": (
        "sgd",
        {"momentum": 0.9, "nesterov": True},
        torch.optim.SGD,
        {"momentum": 0.9, "nesterov": True},
    ),
    "rmsprop": ("rmsprop", {}, torch.optim.RMSprop, {}),
    "rmsprop with momentum": (
        "rmsprop",
        {"alpha": 0.9, "momentum": 0.5},
        torch.optim.RMSprop,
        {"alpha": 0.9, "momentum": 0.5},
    ),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def gradients() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS)]


def training(name: str, args: dict[str, Any] | None = None, **changes: Any) -> Training:
    values = {"optimizer": name, "optimizer_args": args or {}, "learning_rate": RATE, "weight_decay": DECAY}
    return Training(**(values | changes))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_each_is_the_optimizer_of_torch(case: str, decay: float) -> None:
    name, args, theirs, their_args = CASES[case]
    ours, expected = parameters(torch.float64), parameters(torch.float64)
    step = optimizer_of(training(name, args, weight_decay=decay), ours)
    optimizer = theirs(expected, lr=RATE, weight_decay=decay, **their_args)
    before = [tensor.detach().clone() for tensor in ours]
    for given in gradients():
        doubles = [gradient.double() for gradient in given]
        kept = [gradient.clone() for gradient in doubles]
        step(doubles)
        assert all(torch.equal(one, other) for one, other in zip(doubles, kept, strict=True))
        for tensor, gradient in zip(expected, doubles, strict=True):
            tensor.grad = gradient.clone()
        optimizer.step()
    for tensor, other, start in zip(ours, expected, before, strict=True):
        assert not torch.equal(tensor, start)
        torch.testing.assert_close(tensor, other, rtol=1e-6, atol=1e-9)


def test_every_optimizer_is_compared_and_may_be_named() -> None:
    assert {name for name, *_ in CASES.values()} == set(OPTIMIZERS)
    assert set(get_args(Training.model_fields["optimizer"].annotation)) == set(OPTIMIZERS)


def test_the_default_gives_the_bits_of_the_versions_before() -> None:
    """The arithmetic of the optimizer that was the only one, as it was written there."""
    ours, expected = parameters(), parameters()
    step = optimizer_of(Training(learning_rate=RATE, weight_decay=DECAY), ours)
    means = [torch.zeros_like(tensor) for tensor in expected]
    squares = [torch.zeros_like(tensor) for tensor in expected]
    for count, given in enumerate(gradients(), start=1):
        step(given)
        with torch.no_grad():
            torch._foreach_lerp_(means, given, 0.1)
            torch._foreach_mul_(squares, 0.999)
            torch._foreach_addcmul_(squares, given, given, 0.001)
            scale = RATE / (1 - 0.9**count)
            denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - 0.999**count))
            torch._foreach_add_(denominators, 1e-8)
            torch._foreach_mul_(expected, 1 - RATE * DECAY)
            torch._foreach_addcdiv_(expected, means, denominators, -scale)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def test_the_default_follows_the_published_algorithm() -> None:
    """Loshchilov & Hutter (2019), algorithm 2, in float64 and one number at a time."""
    tensor = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    expected, mean, square = tensor.detach().double().numpy().copy(), np.zeros(3), np.zeros(3)
    step = optimizer_of(Training(learning_rate=RATE, weight_decay=DECAY), [tensor])
    for number, gradient in enumerate(np.random.default_rng(0).standard_normal((10, 3)), start=1):
        step([torch.from_numpy(gradient.astype(np.float32))])
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        expected -= RATE * DECAY * expected
        expected -= RATE * (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.999**number)) + 1e-8)
    np.testing.assert_allclose(tensor.detach().numpy(), expected, rtol=1e-5)


def test_no_optimizer_loads_the_compiler_of_torch() -> None:
    code = (
        "import sys, torch\n"
        "from common.optimizers import OPTIMIZERS\n"
        "for make in OPTIMIZERS.values():\n"
        "    make([torch.zeros(2, requires_grad=True)], .1, .1)([torch.ones(2)])\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WRONG = {
    "an argument of another": ("adamw", {"momentum": 0.9}, "optimizer_args.momentum is unknown to adamw"),
    "a momentum of one": ("sgd", {"momentum": 1}, "momentum = 1.0: must be at least 0 and below 1"),
    "a word": ("adam", {"beta1": "high"}, "beta1 = 'high': must be a number"),
    "Nesterov without momentum": ("sgd", {"nesterov": True}, "nesterov needs a momentum above 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(case: str) -> None:
    name, args, words = WRONG[case]
    with pytest.raises(PlanError) as caught:
        check_optimizer(training(name, args))
    assert caught.value.code == "bad-optimizer-args"
    assert words in caught.value.message


def test_a_plan_names_one_of_them() -> None:
    with pytest.raises(PlanError, match="adagrad"):
        parse_plan({"name": "x", "training": {"optimizer": "adagrad"}})
