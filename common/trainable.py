"""What part of the network an arm trains and sends: all of it, or what the plan's `privacy.trainable` names.

Coordinator, hospitals and `fedqc verify` must find the same part, so it follows from plan and arm alone.
"""

from __future__ import annotations

import functools

from torch import nn

from common.arms import ARMS, HEAD
from common.models import network_of
from common.plan import Model, RunPlan
from common.weights import Part, manifest_of

NORMS = (nn.GroupNorm, nn.LayerNorm)


def trainable_names(network: nn.Module, trainable: str) -> tuple[str, ...]:
    """The names of the parameters that a private arm trains, in the order of the network's state dict.

    Args:
        trainable: `privacy.trainable`. `head`: the last layer; `norms`: that, and scale and shift of every
            GroupNorm and LayerNorm; `all`: every parameter.
    """
    norms = {
        f"{place}.{name}"
        for place, module in network.named_modules()
        if isinstance(module, NORMS)
        for name, _ in module.named_parameters()
    }
    return tuple(
        name
        for name, _ in network.named_parameters()
        if trainable == "all" or name.startswith(HEAD) or (trainable == "norms" and name in norms)
    )


def private_part(plan: RunPlan) -> Part:
    """The part of the flat array that a private arm of the plan, or a control of it, trains and sends."""
    return _part(plan.model, plan.privacy.trainable)


def trained_part(plan: RunPlan, arm: str) -> Part:
    """The part of the flat array that `arm` of the plan trains and sends: everything, but for private arms
    and their controls.
    """
    if ARMS[arm].trains_part:
        return private_part(plan)
    return slice(0, manifest_of(network_of(plan.model).state_dict()).size)


@functools.lru_cache(maxsize=16)
def _part(model: Model, trainable: str) -> Part:
    network = network_of(model)
    return manifest_of(network.state_dict()).places(trainable_names(network, trainable))
