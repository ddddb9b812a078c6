"""FedAvg: the mean of the updates, weighted by each site's public nominal number of patients.

Reference: McMahan et al., Communication-efficient learning of deep networks from decentralized data, AISTATS
2017.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from server.aggregation import FederatedMean
from server.strategies.strategy import Accumulator, Strategy


def _aggregate(state: None, updates: Accumulator) -> tuple[np.ndarray, None]:
    return updates.steps(), state


def _to_checkpoint(state: None) -> dict[str, np.ndarray]:
    return {}


def _from_checkpoint(arrays: Mapping[str, np.ndarray]) -> None:
    return None


fedavg = Strategy(
    accumulate=FederatedMean,
    initial_state=lambda size: None,
    aggregate=_aggregate,
    state_to_checkpoint=_to_checkpoint,
    state_from_checkpoint=_from_checkpoint,
)
