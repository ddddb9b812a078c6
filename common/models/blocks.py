"""What the networks of this room are put together from.

GroupNorm (Wu & He, ECCV 2018) takes the place of BatchNorm everywhere, and nothing else looks beyond one
sample: no statistics of a batch, no axis folded into the batch. Activations never work in place, because the
engines of the private arm need what a layer got. Weights are drawn as torch draws them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.preprocess import CHANNELS

GROUPS = 8
"""Of a GroupNorm, as in the default network; fewer where they do not divide the channels."""

MakeLayer = Callable[[int], nn.Module]
"""Channels -> a layer that keeps them."""


def channels_in(neighbours: bool) -> int:
    """Channels of what a network sees: of a slice, or of it, the slice before and the slice after it."""
    return 3 * CHANNELS if neighbours else CHANNELS


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with `GROUPS` groups, or the most that divide both numbers."""
    return nn.GroupNorm(math.gcd(channels, GROUPS), channels)


class ConvUnit(nn.Module):
    """Convolution, GroupNorm, activation; a stride of 1 keeps the size."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.norm = group_norm(outputs)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ChannelGate(nn.Module):
    """Squeeze and excitation (Hu et al., CVPR 2018): each channel times a number of 0 to 1 from all means."""

    def __init__(
        self,
        channels: int,
        hidden: int | None = None,
        activation: Callable[[Tensor], Tensor] = functional.relu,
    ) -> None:
        super().__init__()
        hidden = channels // 16 if hidden is None else hidden
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        self.between = activation

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.excite(self.between(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Residual(nn.Module):
    """`body`, a gate on its channels, plus the input or its projection; then ReLU (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, body: nn.Module, gate: MakeLayer) -> None:
        super().__init__()
        self.body = body
        self.gate = gate(outputs)
        is_same = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if is_same else ConvUnit(inputs, outputs, 1, stride, activation=nn.Identity)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.gate(self.body(x)) + self.shortcut(x))


def basic_block(inputs: int, width: int, stride: int, gate: MakeLayer) -> Residual:
    """Two 3×3 convolutions, to `width` channels."""
    body = nn.Sequential(
        ConvUnit(inputs, width, 3, stride), ConvUnit(width, width, 3, activation=nn.Identity)
    )
    return Residual(inputs, width, stride, body, gate)


def bottleneck_block(inputs: int, width: int, stride: int, gate: MakeLayer) -> Residual:
    """1×1, 3×3 with the stride, 1×1, to 4 * `width` channels."""
    body = nn.Sequential(
        ConvUnit(inputs, width, 1),
        ConvUnit(width, width, 3, stride),
        ConvUnit(width, 4 * width, 1, activation=nn.Identity),
    )
    return Residual(inputs, 4 * width, stride, body, gate)


def residual_layers(
    block: Callable[[int, int, int, MakeLayer], Residual],
    counts: tuple[int, int, int, int],
    expansion: int,
    gate: MakeLayer = nn.Identity,
) -> dict[str, nn.Module]:
    """`layer1` to `layer4` of a ResNet: 64 channels in, 512 * `expansion` out, each but the first at half the
    size of the one before.
    """
    layers: dict[str, nn.Module] = {}
    inputs = 64
    for number, count in enumerate(counts):
        width = 64 << number
        blocks = []
        for place in range(count):
            blocks.append(block(inputs, width, 2 if number and not place else 1, gate))
            inputs = expansion * width
        layers[f"layer{number + 1}"] = nn.Sequential(*blocks)
    return layers


def residual_stem(neighbours: bool = False) -> nn.Sequential:
    """7×7 convolution and maximum, each with stride 2: 64 channels out, at a quarter of the size."""
    return nn.Sequential(ConvUnit(channels_in(neighbours), 64, 7, 2), nn.MaxPool2d(3, 2, 1))


class PooledClassifier(nn.Module):
    """Stages one after the other, the mean over places, a linear head.

    Args:
        stages: (B, channels, S, S) slices to (B, width, ., .), by name.
        width: channels of the last stage.
        artifacts: outputs.
    """

    def __init__(self, stages: Mapping[str, nn.Module], width: int, artifacts: int) -> None:
        super().__init__()
        self.stages = nn.Sequential(OrderedDict(stages))
        self.head = nn.Linear(width, artifacts)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, shape (B, width)."""
        return self.stages(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
