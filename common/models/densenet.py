"""DenseNet-121 (Huang et al., CVPR 2017), GroupNorm for BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.blocks import PooledClassifier, group_norm, residual_stem

GROWTH = 32
"""Channels that each layer adds."""
COUNTS = (6, 12, 24, 16)


class _NormConv(nn.Module):
    """GroupNorm, ReLU, convolution: the order of this network."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.norm = group_norm(inputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.relu(self.norm(x)))


class _DenseLayer(nn.Module):
    """Adds `GROWTH` channels to those it gets."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.narrow = _NormConv(inputs, 4 * GROWTH, 1)
        self.grow = _NormConv(4 * GROWTH, GROWTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.narrow(x))], 1)


def densenet121(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Four blocks of 58 layers together, 1024 features."""
    stages: dict[str, nn.Module] = {"stem": residual_stem(neighbours)}
    width = 64
    for number, count in enumerate(COUNTS):
        if number:
            stages[f"transition{number}"] = nn.Sequential(_NormConv(width, width // 2, 1), nn.AvgPool2d(2))
            width //= 2
        stages[f"block{number + 1}"] = nn.Sequential(
            *(_DenseLayer(width + place * GROWTH) for place in range(count))
        )
        width += count * GROWTH
    stages["last"] = nn.Sequential(group_norm(width), nn.ReLU())
    return PooledClassifier(stages, width, artifacts)
