"""The default network: a small residual CNN for two-channel slices, about 0.25 M parameters.

GroupNorm because Opacus forbids BatchNorm and averaging dislikes it; squeeze-and-excitation (Hu et al., CVPR
2018) because an artifact changes the statistics of whole channels; mean *and* maximum pooling of the last two
stages because some artifacts fill the slice and others are a void of a few pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.blocks import channels_in

CHANNELS = (16, 32, 64, 96)
FEATURES = 48
"""Width of the layer under the head: a private head pays noise for every one of these."""


class _Block(nn.Module):
    """Two 3×3 convolutions with GroupNorm, channel gating, and a strided shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.squeeze = nn.Linear(outputs, outputs // 4)
        self.excite = nn.Linear(outputs // 4, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(out.mean((2, 3))))))
        return functional.relu(out * gate[:, :, None, None] + self.shortcut(x))


def pooled(early: Tensor, late: Tensor) -> Tensor:
    """Mean and maximum of two stages' maps, side by side: shape (B, 2 * (channels of both))."""
    return torch.cat([early.mean((2, 3)), early.amax((2, 3)), late.mean((2, 3)), late.amax((2, 3))], 1)


class SmallCNN(nn.Module):
    """(B, 2, S, S) float32 slices to (B, artifacts) logits.

    `neck` is linear: after pre-training it holds a whitening of the pooled features by public statistics, so
    that a head trained on few patients faces a well-conditioned problem.
    """

    def __init__(self, artifacts: int, *, neighbours: bool = False) -> None:
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.stem: nn.Module = nn.Conv2d(channels_in(neighbours), c1, 5, 2, 2, bias=False)
        self.norm = nn.GroupNorm(8, c1)
        self.stage2 = _Block(c1, c2, 2)
        self.stage3 = _Block(c2, c3, 2)
        self.stage4 = _Block(c3, c4, 2)
        self.neck = nn.Linear(2 * (c3 + c4), FEATURES)
        self.head = nn.Linear(FEATURES, artifacts)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the last two stages see at each place: (B, c3, S/8, S/8), (B, c4, S/16, S/16), rounded up."""
        x = functional.relu(self.norm(self.stem(x)))
        early = self.stage3(self.stage2(x))
        return early, self.stage4(early)

    def features_of(self, early: Tensor, late: Tensor) -> Tensor:
        """`features` of what `maps` gave."""
        return self.neck(pooled(early, late))

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, shape (B, FEATURES)."""
        return self.features_of(*self.maps(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
