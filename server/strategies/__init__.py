"""Strategies by name. To add one: a file here, a line in `STRATEGIES`, a plan that uses it."""

from __future__ import annotations

from common.errors import PlanError
from server.strategies.fedavg import fedavg
from server.strategies.strategy import Strategy

STRATEGIES: dict[str, Strategy] = {
    "fedavg": fedavg,
}


def strategy_named(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        PlanError: the name is unknown (the hint lists the known ones), or the strategy asks for what this
            version does not send.
    """
    if name not in STRATEGIES:
        raise PlanError(
            f"training.strategy = {name!r} is unknown",
            code="unknown-strategy",
            hint=f"known: {', '.join(STRATEGIES)}",
        )
    strategy = STRATEGIES[name]
    if strategy.extra_down or strategy.extra_up or strategy.not_sent:
        raise PlanError(
            f"training.strategy = {name!r} needs vectors that common/wire.py does not carry yet",
            code="unknown-strategy",
            hint="add them to TrainTask and SiteUpdate, with their class",
        )
    return strategy
