"""ResNet-18 and ResNet-50 (He et al., CVPR 2016), and ResNet-18 with squeeze and excitation.

The stride of a bottleneck is that of its 3×3 convolution, as in the usual public versions.
"""

from __future__ import annotations

from torch import nn

from common.models.blocks import (
    ChannelGate,
    PooledClassifier,
    basic_block,
    bottleneck_block,
    residual_layers,
    residual_stem,
)

RESNET18, RESNET50 = (2, 2, 2, 2), (3, 4, 6, 3)
"""Blocks of the four layers."""


def resnet18(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Basic blocks, 512 features."""
    stages = {"stem": residual_stem(neighbours), **residual_layers(basic_block, RESNET18, 1)}
    return PooledClassifier(stages, 512, artifacts)


def resnet50(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Bottleneck blocks, 2048 features."""
    stages = {"stem": residual_stem(neighbours), **residual_layers(bottleneck_block, RESNET50, 4)}
    return PooledClassifier(stages, 2048, artifacts)


def se_resnet18(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """ResNet-18 whose blocks gate their channels (Hu et al., CVPR 2018)."""
    stages = {"stem": residual_stem(neighbours), **residual_layers(basic_block, RESNET18, 1, ChannelGate)}
    return PooledClassifier(stages, 512, artifacts)
