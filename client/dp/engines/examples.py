"""What engines compute with, and what they check alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Slices of patients by row.

    Args:
        inputs: rows (n,) -> what the network takes, (n, ...). Called for the rows of one patient at a time,
            because in a batch with others the last bit may depend on who they are.
        labels: shape (rows, A), in [0, 1], nan = not assessed.
    """

    inputs: Callable[[np.ndarray], Tensor]
    labels: Tensor


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that are trained, in the network's order."""
    return {name: one for name, one in network.named_parameters() if one.requires_grad}


def check_coverage(trained: Collection[str], covered: Collection[str]) -> None:
    """Refuse a pass that gave gradients to other parameters than those that are trained.

    Raises:
        ConfigError: `uncovered-parameter`.
    """
    if wrong := sorted(set(trained) ^ set(covered)):
        raise ConfigError(
            f"{len(wrong)} parameters are trained without a gradient, or have one untrained, such as "
            f"`{wrong[0]}`",
            code="uncovered-parameter",
            hint="every layer that is trained must take part in the network's output",
        )


def check_losses(losses: Tensor, num_slices: int) -> Tensor:
    """`losses`, if there is one a slice.

    Raises:
        ConfigError: `bad-loss`.
    """
    if losses.shape != (num_slices,):
        raise ConfigError(
            f"the loss gave shape {tuple(losses.shape)}, per-sample clipping needs ({num_slices},)",
            code="bad-loss",
        )
    return losses
