"""A training task and honest answers to it, for tests that change one field."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.pricing import plan_epsilon
from common.weights import LIMIT
from common.wire import SiteDescription, SiteUpdate, TrainTask
from tests.helpers.consortium import tiny_plan

SIZE = 5
BASE_SHA256 = "ab" * 32
SITE = SiteDescription(site="hospital-a", kind="hospital", nominal_patients=50, version="0.1.0")
PLAN = tiny_plan(arms=["federated", "federated_dp"])
CLAIM: dict[str, Any] = {
    "noise_multiplier": 1.2,
    "epsilon": plan_epsilon(PLAN, noise=1.2),
    "delta": PLAN.privacy.delta,
}


def task(private: bool = False) -> TrainTask:
    return TrainTask(
        run="r",
        arm="federated_dp" if private else "federated",
        round=3,
        private=private,
        base=np.zeros(SIZE, np.float32),
    )


def update(answers_private: bool = False, **changes: Any) -> SiteUpdate:
    values: dict[str, Any] = {
        "site": "hospital-a",
        "run": "r",
        "arm": "federated_dp" if answers_private else "federated",
        "round": 3,
        "base_sha256": BASE_SHA256,
        "weight": 50,
        "private": answers_private,
        "update": np.array([1, -2, 0, LIMIT, -LIMIT], np.int32),
    }
    return SiteUpdate(**(values | (CLAIM if answers_private else {}) | changes))
