"""Optimizers by name: functions that move parameters in place along gradients.

Ours because torch.optim imports torch._dynamo when the first optimizer is built: a second of CPU in every
process. A test holds each to the one of torch.optim. The state of an optimizer (means, momentum) begins anew
in each round, as the model that a site gets is not the one that it sent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import PlanError
from common.plan import Training
from common.strict import checked_arguments

Tensors = list[Tensor] | tuple[Tensor, ...]
Step = Callable[[Tensors], None]
"""Takes the gradients, in the order of the parameters, and moves these by one step."""


def adamw(
    parameters: list[Tensor],
    learning_rate: float,
    weight_decay: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> Step:
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)."""
    move = _adam_steps(parameters, learning_rate, beta1, beta2)

    @torch.no_grad()
    def step(gradients: Tensors) -> None:
        means, denominators, scale = move(gradients)
        torch._foreach_mul_(parameters, 1 - learning_rate * weight_decay)
        torch._foreach_addcdiv_(parameters, means, denominators, -scale)

    return step


def adam(
    parameters: list[Tensor],
    learning_rate: float,
    weight_decay: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
) -> Step:
    """Adam (Kingma & Ba, ICLR 2015); weight decay as a term of the gradient, as in most publications."""
    move = _adam_steps(parameters, learning_rate, beta1, beta2)

    @torch.no_grad()
    def step(gradients: Tensors) -> None:
        means, denominators, scale = move(_decayed(gradients, parameters, weight_decay))
        torch._foreach_addcdiv_(parameters, means, denominators, -scale)

    return step


def sgd(
    parameters: list[Tensor],
    learning_rate: float,
    weight_decay: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> Step:
    """Gradient descent with momentum (Sutskever et al., ICML 2013, as torch.optim writes it); weight decay as
    a term of the gradient.
    """
    velocity = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(gradients: Tensors) -> None:
        ways = _decayed(gradients, parameters, weight_decay)
        if momentum:
            torch._foreach_mul_(velocity, momentum)
            torch._foreach_add_(velocity, ways)
            ways = torch._foreach_add(ways, velocity, alpha=momentum) if nesterov else velocity
        torch._foreach_add_(parameters, ways, alpha=-learning_rate)

    return step


def rmsprop(
    parameters: list[Tensor],
    learning_rate: float,
    weight_decay: float,
    *,
    alpha: float = 0.99,
    momentum: float = 0.0,
) -> Step:
    """RMSProp (Hinton, 2012), not centred; weight decay as a term of the gradient."""
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def step(gradients: Tensors) -> None:
        ways = _decayed(gradients, parameters, weight_decay)
        torch._foreach_mul_(squares, alpha)
        torch._foreach_addcmul_(squares, ways, ways, 1 - alpha)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_add_(denominators, EPSILON)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_addcdiv_(velocity, ways, denominators, 1.0)
        torch._foreach_add_(parameters, velocity, alpha=-learning_rate)

    return step


OPTIMIZERS: dict[str, Callable[..., Step]] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "rmsprop": rmsprop,
}
"""Those that `training.optimizer` may name; their keyword arguments are `training.optimizer_args`."""

EPSILON = 1e-8
"""Added to the root of the mean square."""


def check_optimizer(training: Training) -> None:
    """Check the arguments of a plan's optimizer.

    Raises:
        PlanError: one is unknown to it or out of range (code `bad-optimizer-args`).
    """
    _keywords(training)


def optimizer_of(training: Training, parameters: list[Tensor]) -> Step:
    """The optimizer that a plan asks for, on these parameters.

    Raises:
        PlanError: as `check_optimizer`.
    """
    make, keywords = OPTIMIZERS[training.optimizer], _keywords(training)
    return make(parameters, training.learning_rate, training.weight_decay, **keywords)


def _keywords(training: Training) -> dict[str, float | bool]:
    name, where, code = training.optimizer, "training.optimizer_args", "bad-optimizer-args"
    keywords = checked_arguments(training.optimizer_args, OPTIMIZERS[name], where=where, of=name, code=code)
    for word, value in keywords.items():
        if not 0 <= value < 1 and not isinstance(value, bool):
            raise PlanError(f"{where}.{word} = {value!r}: must be at least 0 and below 1", code=code)
    if keywords.get("nesterov") and not keywords.get("momentum"):
        raise PlanError(f"{where}.nesterov needs a momentum above 0", code=code)
    return keywords


def _decayed(gradients: Tensors, parameters: list[Tensor], weight_decay: float) -> Tensors:
    """The gradients of the loss with half the squared weights times `weight_decay` added."""
    if not weight_decay:
        return gradients
    return torch._foreach_add(gradients, parameters, alpha=weight_decay)


def _adam_steps(
    parameters: list[Tensor], learning_rate: float, beta1: float, beta2: float
) -> Callable[[Tensors], tuple[list[Tensor], Tensors, float]]:
    """Means, denominators and length of the steps of Adam, without weight decay."""
    means = [torch.zeros_like(parameter) for parameter in parameters]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    count = 0

    def move(gradients: Tensors) -> tuple[list[Tensor], Tensors, float]:
        nonlocal count
        count += 1
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(torch._foreach_div(squares, 1 - beta2**count))
        torch._foreach_add_(denominators, EPSILON)
        return means, denominators, learning_rate / (1 - beta1**count)

    return move
