"""The interface of a strategy: how the coordinator turns the updates of a round into a step of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from common.wire import Crossing

SiteStep = Literal["sgd"]
"""What a site does with a batch: a plain step of its optimizer."""


class Accumulator(Protocol):
    """The valid updates of one round, combined as they arrive, in the memory of one model."""

    def add(self, update: np.ndarray, weight: int) -> None:
        """Add int32 `update`, shape (size,), of a site with `weight` nominal patients."""

    def steps(self) -> np.ndarray:
        """The combined update in whole grid steps, int32 (size,)."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A strategy as functions; it holds no state itself.

    Sites follow the model by whole steps of `common.weights.GRID`, so `aggregate` returns int32 steps. The
    result must not depend on the order in which answers arrive.
    """

    accumulate: Callable[[int], Accumulator]
    """(size) -> a new accumulator; called once a round."""
    initial_state: Callable[[int], Any]
    """(size) -> what the coordinator carries from round to round, before the first."""
    aggregate: Callable[[Any, Accumulator], tuple[np.ndarray, Any]]
    """(state, updates of the round) -> (int32 steps (size,), next state)."""
    state_to_checkpoint: Callable[[Any], dict[str, np.ndarray]]
    """The state as named arrays; empty: there is nothing to store."""
    state_from_checkpoint: Callable[[Mapping[str, np.ndarray]], Any]
    """The inverse of `state_to_checkpoint`."""
    site_step: SiteStep = "sgd"
    extra_down: Mapping[str, Crossing] = field(default_factory=dict)
    """Further vectors that the coordinator sends with the model, each with its class on the wire."""
    extra_up: Mapping[str, Crossing] = field(default_factory=dict)
    """Further vectors that a site returns with its update, each with its class on the wire."""
    not_sent: tuple[str, ...] = ()
    """Prefixes of the names of tensors that stay at each site."""
