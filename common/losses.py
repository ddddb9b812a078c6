"""Losses by name, one number per sample, so that clipping bounds one patient.

Every loss takes logits (B, A) and labels (B, A) and gives shape (B,). Sample i's loss is a function of sample
i alone, so that its gradient is too. A loss that sums over the batch before a ratio (batch Dice, a divisor
that counts the batch's valid labels) would let one patient change another's gradient and void the guarantee;
a property test holds every entry of `LOSSES` to this.

A label is 1 (present), 0 (absent), a severity between, or nan: not assessed, or the artifact cannot occur in
this modality. Outputs that are nan in the labels take no part in the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from common.errors import ConfigError

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]

DICE_SMOOTHING = 1.0


def masked_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy per sample: the mean over that sample's assessed artifacts, 0 where none is.

    Args:
        logits: shape (B, A).
        labels: shape (B, A), in [0, 1], nan = not assessed.
    Returns:
        shape (B,).
    """
    assessed, targets = _assessed(logits, labels)
    terms = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.where(assessed, terms, 0.0).sum(dim=1) / assessed.sum(dim=1).clamp(min=1)


def soft_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Soft Dice loss per sample over the artifact axis, 0 where no artifact is assessed.

    1 - (2 sum p t + s) / (sum p^2 + sum t^2 + s), p = sigmoid(logits), sums over that sample's assessed
    artifacts, s = 1.

    Args, Returns: as `masked_bce`.
    """
    assessed, targets = _assessed(logits, labels)
    probabilities = torch.where(assessed, logits.sigmoid(), 0.0)
    overlap = (probabilities * targets).sum(dim=1)
    size = probabilities.square().sum(dim=1) + targets.square().sum(dim=1)
    return 1 - (2 * overlap + DICE_SMOOTHING) / (size + DICE_SMOOTHING)


def bce_dice(alpha: float = 1.0, beta: float = 1.0) -> PerSampleLoss:
    """The loss alpha * `masked_bce` + beta * `soft_dice`; alpha and beta are public numbers, at least 0, not
    both 0.
    """
    if not (alpha >= 0 and beta >= 0 and 0 < alpha + beta < float("inf")):
        raise ConfigError(
            f"bce_dice: alpha = {alpha}, beta = {beta} must be at least 0, finite, and not both 0",
            code="bad-loss",
        )

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return alpha * masked_bce(logits, labels) + beta * soft_dice(logits, labels)

    return loss


LOSSES: dict[str, PerSampleLoss] = {
    "bce": masked_bce,
    "dice": soft_dice,
    "bce_dice": bce_dice(),
}


def loss_named(name: str) -> PerSampleLoss:
    """The loss of that name.

    Raises:
        ConfigError: there is none; the hint lists those there are.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown loss {name!r}", code="unknown-loss", hint=f"known: {', '.join(LOSSES)}")
    return LOSSES[name]


def _assessed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which outputs count, and targets with 0 where they do not."""
    if logits.ndim != 2 or logits.shape != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must both be (samples, artifacts)"
        )
    assessed = ~labels.isnan()
    return assessed, torch.where(assessed, labels, 0.0).to(logits.dtype)
