"""Apply a network in torch: as it is, or in bf16 where that is worth it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from common.learning import batches
from common.learning import score as score_fp32


@torch.no_grad()
def score(
    network: nn.Module, images: np.ndarray, modality: np.ndarray, rows: np.ndarray, *, bf16: bool = False
) -> np.ndarray:
    """Logits of `rows`, float32 (len(rows), A).

    Args:
        bf16: convolutions in bfloat16 with channels last, on a CPU; logits move by some tenths.
    """
    if not bf16:
        return score_fp32(network, images, modality, rows)
    network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = []
    with torch.autocast("cpu", torch.bfloat16):
        for _, x in batches(images, modality, rows, BATCH):
            parts.append(network(x.to(memory_format=torch.channels_last)).float().numpy())
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


BATCH = 32
"""Slices of a batch in bf16."""
