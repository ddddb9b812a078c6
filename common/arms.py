"""The arms of a run: who trains each, who owns its model, what part is trained, whether it is private.

A *control* is trained as the private arm of the same trainer, with noise 0: the same part, steps, clip, grid,
sampling, divisor and mean over rounds. What the private arm does worse, the noise cost. It is not private,
and exists in simulations only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Trainer = Literal["none", "each site", "all sites", "pooled site"]
"""Who trains an arm: no site, each training site by itself, all training sites together, or one site that
holds the images of all of them (simulation only).
"""
Owner = Literal["public", "site", "federation"]

HEAD = "head."
"""Prefix of the tensors of a network's last layer."""

ArmName = Literal[
    "public",
    "local",
    "local_dp",
    "local_clipped",
    "federated",
    "federated_dp",
    "federated_clipped",
    "pooled",
]
PUBLIC, LOCAL, LOCAL_DP, LOCAL_CLIPPED, FEDERATED, FEDERATED_DP, FEDERATED_CLIPPED, POOLED = get_args(ArmName)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to obtain a model from a consortium."""

    trainer: Trainer
    owner: Owner
    private: bool = False  # trained under differential privacy; what part, says `common.trainable`
    control: bool = False  # trained as the private arm of this trainer, with noise 0; simulations only

    @property
    def is_trained(self) -> bool:
        return self.trainer != "none"

    @property
    def clips(self) -> bool:
        """Whether it takes the steps of a private arm, with its noise or without."""
        return self.private or self.control

    @property
    def at_hospitals(self) -> bool:
        """Whether the sites are asked to train it, each its own images."""
        return self.trainer in ("each site", "all sites")


ARMS: dict[str, Arm] = {
    PUBLIC: Arm(trainer="none", owner="public"),
    LOCAL: Arm(trainer="each site", owner="site"),
    LOCAL_DP: Arm(trainer="each site", owner="site", private=True),
    LOCAL_CLIPPED: Arm(trainer="each site", owner="site", control=True),
    FEDERATED: Arm(trainer="all sites", owner="federation"),
    FEDERATED_DP: Arm(trainer="all sites", owner="federation", private=True),
    FEDERATED_CLIPPED: Arm(trainer="all sites", owner="federation", control=True),
    POOLED: Arm(trainer="pooled site", owner="federation"),
}

FINAL_ARMS = (FEDERATED_DP, FEDERATED, POOLED)
"""Which arm's model a run hands on: the first of these that was trained. A control is none of them."""


def is_private(arm: str) -> bool:
    """Whether `arm` is known and trained under differential privacy."""
    return arm in ARMS and ARMS[arm].private


def is_control(arm: str) -> bool:
    """Whether `arm` is known and the control of a private arm."""
    return arm in ARMS and ARMS[arm].control


def clips(arm: str) -> bool:
    """Whether `arm` is known and takes the steps of a private arm, with its noise or without."""
    return arm in ARMS and ARMS[arm].clips
