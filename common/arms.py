"""The arms of a run: who trains each, who owns its model, what part is trained, whether it is private.

A *control* is trained as the private arm of the same trainer, with noise 0: the same part, steps, clip, grid,
sampling, divisor and mean over rounds. What the private arm does worse, the noise cost. A *frozen* arm is
trained as the arm without privacy of the same trainer, but only the part that the private arm trains. What it
does worse, the frozen layers cost; what the control does worse than it, clipping and other steps. Neither is
private, and both exist in simulations only.

A *baseline* is what each site gets without a network, from the image-quality metrics of its own training
slices (common/iqm.py). It is fitted where it is scored, has no weights and no rounds, and exists in
simulations only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Trainer = Literal["none", "each site", "all sites", "pooled site"]
"""Who trains an arm: no site, each training site by itself, all training sites together, or one site that
holds the images of all of them (simulation only).
"""
Classifier = Literal["logistic regression", "random forest"]
Owner = Literal["public", "site", "federation"]

HEAD = "head."
"""Prefix of the tensors of a network's last layer."""

ArmName = Literal[
    "public",
    "local",
    "local_dp",
    "local_clipped",
    "local_frozen",
    "federated",
    "federated_dp",
    "federated_clipped",
    "federated_frozen",
    "pooled",
    "iqm_logistic",
    "iqm_forest",
]
_NAMES = get_args(ArmName)
PUBLIC, LOCAL, LOCAL_DP, LOCAL_CLIPPED, LOCAL_FROZEN = _NAMES[:5]
FEDERATED, FEDERATED_DP, FEDERATED_CLIPPED, FEDERATED_FROZEN, POOLED = _NAMES[5:10]
BASELINES = IQM_LOGISTIC, IQM_FOREST = _NAMES[10:]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to obtain a model from a consortium."""

    trainer: Trainer
    owner: Owner
    private: bool = False  # trained under differential privacy; what part, says `common.trainable`
    control: bool = False  # trained as the private arm of this trainer, with noise 0; simulations only
    frozen: bool = (
        False  # trains what the private arm of this trainer trains, in ordinary steps; simulations only
    )
    baseline: Classifier | None = None  # what is fitted to image-quality metrics in place of a network

    @property
    def is_trained(self) -> bool:
        return self.trainer != "none"

    @property
    def clips(self) -> bool:
        """Whether it takes the steps of a private arm, with its noise or without."""
        return self.private or self.control

    @property
    def trains_part(self) -> bool:
        """Whether it trains and sends no more than the private arm of its trainer."""
        return self.clips or self.frozen

    @property
    def by_rounds(self) -> bool:
        """Whether it is a network that is trained round by round."""
        return self.is_trained and self.baseline is None

    @property
    def at_hospitals(self) -> bool:
        """Whether the sites are asked to train it, each its own images."""
        return self.by_rounds and self.trainer in ("each site", "all sites")

    @property
    def simulated(self) -> bool:
        """Whether it exists only in simulations of sites that are no hospital."""
        return self.control or self.frozen or self.baseline is not None


ARMS: dict[str, Arm] = {
    PUBLIC: Arm(trainer="none", owner="public"),
    LOCAL: Arm(trainer="each site", owner="site"),
    LOCAL_DP: Arm(trainer="each site", owner="site", private=True),
    LOCAL_CLIPPED: Arm(trainer="each site", owner="site", control=True),
    LOCAL_FROZEN: Arm(trainer="each site", owner="site", frozen=True),
    FEDERATED: Arm(trainer="all sites", owner="federation"),
    FEDERATED_DP: Arm(trainer="all sites", owner="federation", private=True),
    FEDERATED_CLIPPED: Arm(trainer="all sites", owner="federation", control=True),
    FEDERATED_FROZEN: Arm(trainer="all sites", owner="federation", frozen=True),
    POOLED: Arm(trainer="pooled site", owner="federation"),
    IQM_LOGISTIC: Arm(trainer="each site", owner="site", baseline="logistic regression"),
    IQM_FOREST: Arm(trainer="each site", owner="site", baseline="random forest"),
}

FINAL_ARMS = (FEDERATED_DP, FEDERATED, POOLED)
"""Which arm's model a run hands on: the first of these that was trained. A control is none of them."""


def is_private(arm: str) -> bool:
    """Whether `arm` is known and trained under differential privacy."""
    return arm in ARMS and ARMS[arm].private


def is_control(arm: str) -> bool:
    """Whether `arm` is known and the control of a private arm."""
    return arm in ARMS and ARMS[arm].control


def is_baseline(model: str) -> bool:
    """Whether a model's name, `arm` or `arm/site`, is that of a baseline."""
    return model.partition("/")[0] in BASELINES


def clips(arm: str) -> bool:
    """Whether `arm` is known and takes the steps of a private arm, with its noise or without."""
    return arm in ARMS and ARMS[arm].clips
