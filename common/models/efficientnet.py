"""EfficientNet-B0 (Tan & Le, ICML 2019), GroupNorm for BatchNorm.

Without its dropout and without dropping blocks: training draws nothing but shuffles.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from common.models.blocks import ChannelGate, ConvUnit, PooledClassifier, channels_in

STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
"""Expansion, channels, blocks, stride of the first, kernel."""
LAST = 1280

_Unit = partial(ConvUnit, activation=nn.SiLU)


class _Inverted(nn.Module):
    """1×1 to more channels, one filter a channel, gate, 1×1 to few; added to the input where that fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.body = nn.Sequential(
            *([_Unit(inputs, hidden, 1)] if expansion > 1 else []),
            _Unit(hidden, hidden, kernel, stride, groups=hidden),
            ChannelGate(hidden, max(1, inputs // 4), functional.silu),
            ConvUnit(hidden, outputs, 1, activation=nn.Identity),
        )
        self.is_added = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_added else self.body(x)


def efficientnet_b0(artifacts: int, *, neighbours: bool = False) -> nn.Module:
    """Sixteen inverted blocks, 1280 features."""
    stages: dict[str, nn.Module] = {"stem": _Unit(channels_in(neighbours), 32, 3, 2)}
    inputs = 32
    for number, (expansion, width, count, stride, kernel) in enumerate(STAGES):
        blocks = []
        for place in range(count):
            blocks.append(_Inverted(inputs, width, expansion, 1 if place else stride, kernel))
            inputs = width
        stages[f"stage{number + 1}"] = nn.Sequential(*blocks)
    stages["last"] = _Unit(inputs, LAST, 1)
    return PooledClassifier(stages, LAST, artifacts)
