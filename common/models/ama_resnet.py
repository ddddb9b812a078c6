"""AMAResNet: ResNet-18 on patches, with squeeze and excitation and a pyramid of its four layers, rebuilt from
the description of its publication for comparison.

Patches never become samples. Folded into the batch, a slice would have many rows, and clipping by row would
bound no patient; so a patch is a place of a smaller map with more channels. The publication states neither
the size of a patch nor how the pyramid is added up: patches are 4×4 pixels, which is the reduction of the
stem that they replace, and the pyramid is that of Lin et al. (CVPR 2017), read at its finest map.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from common.models.blocks import (
    ChannelGate,
    ConvUnit,
    basic_block,
    channels_in,
    group_norm,
    residual_layers,
    residual_stem,
)
from common.models.resnet import RESNET18

PATCH_PX = 4
PYRAMID = 128
"""Channels of the pyramid."""


class Patches(nn.Module):
    """(B, channels, S, S) to (B, 64, S/4, S/4): one place a patch. A size that 4 does not divide is filled up
    with zeros.

    Args:
        how: `unshuffle` makes the pixels of a patch its channels and looks at 3×3 patches; `conv` is one
            convolution that strides from patch to patch.
    """

    def __init__(self, how: Literal["unshuffle", "conv"], channels: int) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(PATCH_PX) if how == "unshuffle" else nn.Identity()
        self.conv = (
            nn.Conv2d(channels * PATCH_PX**2, 64, 3, padding=1, bias=False)
            if how == "unshuffle"
            else nn.Conv2d(channels, 64, PATCH_PX, PATCH_PX, bias=False)
        )
        self.norm = group_norm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, -x.shape[-1] % PATCH_PX, 0, -x.shape[-2] % PATCH_PX))
        return functional.relu(self.norm(self.conv(self.unshuffle(x))))


class Pyramid(nn.Module):
    """Adds four maps from the coarsest to the finest, each brought to `PYRAMID` channels and enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(64 << number, PYRAMID, 1) for number in range(4))
        self.fuse = ConvUnit(PYRAMID, PYRAMID)

    def forward(self, maps: list[Tensor]) -> Tensor:
        *finer, total = [lateral(one) for lateral, one in zip(self.lateral, maps, strict=True)]
        for one in reversed(finer):
            total = one + functional.interpolate(total, size=one.shape[-2:], mode="nearest")
        return self.fuse(total)


class AMAResNet(nn.Module):
    """(B, 2, S, S) float32 slices to (B, artifacts) logits.

    Args:
        patch: how patches are made; `none`: the stem of a ResNet instead.
        se: gate the channels of every block.
        pyramid: pool the pyramid; otherwise layer4 alone.
    """

    def __init__(
        self,
        artifacts: int,
        *,
        patch: Literal["unshuffle", "conv", "none"] = "unshuffle",
        se: bool = True,
        pyramid: bool = True,
        neighbours: bool = False,
    ) -> None:
        super().__init__()
        self.stem = residual_stem(neighbours) if patch == "none" else Patches(patch, channels_in(neighbours))
        gate = ChannelGate if se else nn.Identity
        self.layers = nn.ModuleDict(residual_layers(basic_block, RESNET18, 1, gate))
        self.pyramid = Pyramid() if pyramid else None
        self.head = nn.Linear(PYRAMID if pyramid else 512, artifacts)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees: the mean over places, shape (B, 128), or (B, 512) without the pyramid."""
        maps = [self.stem(x)]
        for layer in self.layers.values():
            maps.append(layer(maps[-1]))
        last = maps[-1] if self.pyramid is None else self.pyramid(maps[1:])
        return last.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
