"""The arms of a run: who trains each, who owns its model, what part is trained, whether it is private."""

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

ArmName = Literal["public", "local", "federated", "federated_dp", "pooled"]
PUBLIC, LOCAL, FEDERATED, FEDERATED_DP, POOLED = get_args(ArmName)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to obtain a model from a consortium."""

    trainer: Trainer
    owner: Owner
    private: bool = False  # trained under differential privacy
    trainable: str = ""  # prefix of the names of the tensors that are trained; "": all

    @property
    def is_trained(self) -> bool:
        return self.trainer != "none"

    @property
    def at_hospitals(self) -> bool:
        """Whether a hospital is asked to train it."""
        return self.trainer in ("each site", "all sites")


ARMS: dict[str, Arm] = {
    PUBLIC: Arm(trainer="none", owner="public"),
    LOCAL: Arm(trainer="each site", owner="site"),
    FEDERATED: Arm(trainer="all sites", owner="federation"),
    FEDERATED_DP: Arm(trainer="all sites", owner="federation", private=True, trainable=HEAD),
    POOLED: Arm(trainer="pooled site", owner="federation"),
}

FINAL_ARMS = (FEDERATED_DP, FEDERATED, POOLED)
"""Which arm's model a run hands on: the first of these that was trained."""


def is_private(arm: str) -> bool:
    """Whether `arm` is known and trained under differential privacy."""
    return arm in ARMS and ARMS[arm].private
