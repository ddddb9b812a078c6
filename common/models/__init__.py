"""Networks by name. To add one: a file here, a line in `MODELS`, a plan that uses it.

Of a slice a network sees that slice alone, in training too: GroupNorm, nothing that the batch shares; `study`
sees the slices of one study, and with `neighbours`, which every network of slices takes, a slice is seen with
the one before and the one after it. The arguments that a plan may give are the keyword arguments of the
entry; where they are words or truth values, no plan can ask for a network of another size than those written
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from common.artifacts import DEFAULT_LABELS
from common.errors import PlanError
from common.models.ama_resnet import AMAResNet
from common.models.cnn_2d import cnn_2d
from common.models.csp import csp
from common.models.densenet import densenet121
from common.models.efficientnet import efficientnet_b0
from common.models.iqm import IqmLinear, IqmMlp
from common.models.resnet import resnet18, resnet50, se_resnet18
from common.models.resnet50_attention import resnet50_attention
from common.models.small_cnn import SmallCNN
from common.models.small_cnn_two_stems import small_cnn_two_stems
from common.models.study import study
from common.models.unet_encoder import unet_encoder
from common.models.vgg import vgg16, vgg19
from common.plan import STUDY, Model
from common.strict import NO_ARGUMENTS, Scalar, checked_arguments


class Classifier(Protocol):
    """What training and evaluation need of a network: frozen features and a linear head on top of them."""

    head: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """(B, 2, S, S) slices, (B, 6, S, S) with neighbours, or studies, to (B, F), what `head` takes."""
        ...


MODELS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": SmallCNN,
    "small_cnn_two_stems": small_cnn_two_stems,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "resnet50_attention": resnet50_attention,
    "ama_resnet": AMAResNet,
    "cnn_2d": cnn_2d,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "se_resnet18": se_resnet18,
    "densenet121": densenet121,
    "unet_encoder": unet_encoder,
    "csp": csp,
    "efficientnet_b0": efficientnet_b0,
}
MODELS[STUDY] = partial(study, dict(MODELS))


MEASURE_MODELS: dict[str, Callable[..., nn.Module]] = {"iqm_linear": IqmLinear, "iqm_mlp": IqmMlp}
"""Networks whose samples are metrics of scans, not images (common/measures.py)."""


def network_of(model: Model) -> nn.Module:
    """The network that a plan describes, freshly initialised; raises as `build`."""
    return build(model.name, model.args, model.labels)


def build(
    name: str, args: Mapping[str, Scalar] = NO_ARGUMENTS, labels: Sequence[str] = DEFAULT_LABELS
) -> nn.Module:
    """A freshly initialised network with one output an artifact.

    Args:
        args: `model.args` of a plan.
        labels: its outputs, `model.labels` of a plan.
    Raises:
        PlanError: the name is unknown, or an argument is or has a wrong value; the hint lists the known ones.
    """
    every = MODELS | MEASURE_MODELS
    if name not in every:
        raise PlanError(
            f"model.name = {name!r} is unknown", code="unknown-model", hint=f"known: {', '.join(every)}"
        )
    keywords = checked_arguments(args, every[name], where="model.args", of=name, code="bad-model-args")
    return every[name](len(labels), **keywords)


def fresh(
    name: str,
    seed: int,
    args: Mapping[str, Scalar] = NO_ARGUMENTS,
    labels: Sequence[str] = DEFAULT_LABELS,
) -> nn.Module:
    """A network whose first weights follow from the seed alone.

    Raises:
        PlanError: as `build`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name, args, labels)


def as_classifier(model: nn.Module) -> Classifier:
    """The same network, for type checkers: every entry of `MODELS` is one."""
    return cast(Classifier, model)
