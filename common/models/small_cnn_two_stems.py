"""The default network with two stems, one for each modality, and everything after them shared.

No flag of the modality goes with a slice, and none is needed: both channels of a CT slice are windows of the
same numbers, so that the wide one tells the other; of an MR slice the second is its spectrum, which does not.
Each sample is asked for itself. Both stems compute for every sample and one is kept, so that neither shapes
nor the path of the code depend on whose slices share a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.models.blocks import channels_in
from common.models.small_cnn import CHANNELS, SmallCNN
from common.preprocess import SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU

TOLERANCE = 1e-3
"""Of a soft-tissue value: a hundred times what float32 rounds, and far below what a spectrum misses by."""


def is_ct(x: Tensor) -> Tensor:
    """Which samples are CT, by their own channels: bool (B,).

    Args:
        x: (B, channels, S, S), the first two those of `common.preprocess.to_channels`. A black MR slice,
            which has no spectrum, counts as CT.
    """
    (low, high), (wide_low, wide_high) = SOFT_TISSUE_WINDOW_HU, WIDE_WINDOW_HU
    x = x.detach()
    hu = wide_low + (wide_high - wide_low) * x[:, 1]
    told = ((hu - low) / (high - low)).clamp(0, 1)
    return (x[:, 0] - told).abs().amax((1, 2)) < TOLERANCE


class TwoStems(nn.Module):
    """(B, channels, S, S) slices to (B, c1, S/2, S/2): a convolution of its own for each modality."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ct = nn.Conv2d(channels, CHANNELS[0], 5, 2, 2, bias=False)
        self.mr = nn.Conv2d(channels, CHANNELS[0], 5, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(is_ct(x)[:, None, None, None], self.ct(x), self.mr(x))


def small_cnn_two_stems(artifacts: int, *, neighbours: bool = False) -> SmallCNN:
    """`SmallCNN` with `TwoStems` in the place of its stem."""
    network = SmallCNN(artifacts, neighbours=neighbours)
    network.stem = TwoStems(channels_in(neighbours))
    return network
