"""A cross-stage-partial network (Wang et al., CVPR workshops 2020) as a classifier: the layout of the
backbone of YOLOv5 in its small size, without the detector.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from common.models.blocks import ConvUnit, PooledClassifier, channels_in

WIDTHS, COUNTS = (64, 128, 256, 512), (1, 2, 3, 1)

_Unit = partial(ConvUnit, activation=nn.SiLU)


class _Added(nn.Module):
    """1×1 and 3×3 convolution, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_Unit(width, width, 1), _Unit(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Partial(nn.Module):
    """Half of the channels through `count` blocks, half past them; then both together."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        half = width // 2
        self.through = nn.Sequential(_Unit(width, half, 1), *(_Added(half) for _ in range(count)))
        self.past = _Unit(width, half, 1)
        self.join = _Unit(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.through(x), self.past(x)], 1))


class _Maxima(nn.Module):
    """The map beside its maxima over 5, 9 and 13 pixels (spatial pyramid pooling)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = _Unit(width, width // 2, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.join = _Unit(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.narrow(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.join(torch.cat(maps, 1))


def csp(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Four partial stages and the pooling of maxima, 512 features."""
    stages: dict[str, nn.Module] = {"stem": _Unit(channels_in(neighbours), 32, 6, 2)}
    inputs = 32
    for number, (width, count) in enumerate(zip(WIDTHS, COUNTS, strict=True)):
        stages[f"stage{number + 1}"] = nn.Sequential(_Unit(inputs, width, 3, 2), _Partial(width, count))
        inputs = width
    stages["maxima"] = _Maxima(inputs)
    return PooledClassifier(stages, inputs, artifacts)
