"""Networks by name. To add one: a file here, a line in `MODELS`, a plan that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from common.artifacts import NAMES
from common.errors import PlanError
from common.models.small_cnn import SmallCNN


class Classifier(Protocol):
    """What training and evaluation need of a network: frozen features and a linear head on top of them."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor: ...


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": SmallCNN,
}


def build(name: str) -> nn.Module:
    """A freshly initialised network with one output an artifact.

    Raises:
        PlanError: the name is unknown; the hint lists the known ones.
    """
    if name not in MODELS:
        raise PlanError(
            f"model.name = {name!r} is unknown", code="unknown-model", hint=f"known: {', '.join(MODELS)}"
        )
    return MODELS[name](len(NAMES))


def fresh(name: str, seed: int) -> nn.Module:
    """A network whose first weights follow from the seed alone.

    Raises:
        PlanError: the name is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name)


def as_classifier(model: nn.Module) -> Classifier:
    return cast(Classifier, model)
