"""ResNet-50 whose blocks attend to channels and to places, for comparison with publications that use one.

The attention is CBAM (Woo et al., "Convolutional Block Attention Module", ECCV 2018, equations 2 and 3),
without the BatchNorm that its authors' code puts behind the convolution over places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.blocks import PooledClassifier, bottleneck_block, residual_layers, residual_stem
from common.models.resnet import RESNET50


class ChannelAttention(nn.Module):
    """Each channel times a number of 0 to 1 from all means and all maxima, by the same two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 16)
        self.excite = nn.Linear(channels // 16, channels)

    def forward(self, x: Tensor) -> Tensor:
        # on an axis of their own, never of the batch: a sample stays one row of one call
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))], 1)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(pooled))).sum(1))
        return x * gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """Each place times a number of 0 to 1 from the mean and the maximum over channels around it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(seen))


def resnet50_attention(
    artifacts: int, *, channels: bool = True, places: bool = True, neighbours: bool = False
) -> nn.Module:
    """ResNet-50 with attention in every block; each of the two kinds can be left out."""

    def attention(width: int) -> nn.Module:
        chosen = [ChannelAttention(width)] if channels else []
        return nn.Sequential(*chosen, *([SpatialAttention()] if places else []))

    layers = residual_layers(bottleneck_block, RESNET50, 4, attention)
    return PooledClassifier({"stem": residual_stem(neighbours), **layers}, 2048, artifacts)
