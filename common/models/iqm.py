"""Networks of scans that are known by their image-quality metrics alone (common/measures.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.measures import scaling

HIDDEN = 32


class IqmLinear(nn.Module):
    """(B, metrics) scaled metrics to (B, artifacts) logits: logistic regression. Its features are the
    metrics, so that nothing has to be learned before a private head.
    """

    def __init__(self, artifacts: int) -> None:
        super().__init__()
        self.head = nn.Linear(len(scaling().names), artifacts)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, shape (B, metrics)."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class IqmMlp(nn.Module):
    """The same with one hidden layer of `HIDDEN` units."""

    def __init__(self, artifacts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(len(scaling().names), HIDDEN)
        self.head = nn.Linear(HIDDEN, artifacts)

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, shape (B, HIDDEN)."""
        return torch.relu(self.hidden(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
