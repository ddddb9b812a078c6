"""What a run claims of a site is accounted by the coordinator, not only repeated from the site's answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.pricing import plan_epsilon, with_noise
from common.wire import SiteDescription
from server.messaging.requests import Site
from server.run.privacy_claims import privacy_claims
from server.run.rounds import StageResult
from tests.helpers.consortium import tiny_plan

PLAN = with_noise(tiny_plan(arms=["federated_dp"]))
SITE = Site(
    node=1, description=SiteDescription(site="hospital-a", kind="hospital", nominal_patients=500, version="")
)


def claimed(**stated: Any) -> dict[str, Any]:
    claim = {"noise_multiplier": PLAN.privacy.noise_multiplier, "epsilon": plan_epsilon(PLAN), "delta": 1e-5}
    result = StageResult(weights=np.zeros(1, np.float32), claims={"hospital-a": claim | stated})
    return privacy_claims(PLAN, result, [SITE])["hospital-a"]


def test_an_honest_claim_stays_and_agrees_with_the_numerical_account() -> None:
    found = claimed()
    assert found["epsilon"] == plan_epsilon(PLAN)
    assert found["epsilon_pld"] == pytest.approx(found["epsilon"], abs=0.005)


def test_a_site_that_states_less_than_its_releases_cost_is_corrected() -> None:
    assert claimed(epsilon=0.01)["epsilon"] == plan_epsilon(PLAN)


def test_less_noise_than_the_plan_asks_for_costs_more_in_both_accounts() -> None:
    found = claimed(noise_multiplier=1.0)
    assert found["epsilon"] == plan_epsilon(PLAN, noise=1.0) > 2 * plan_epsilon(PLAN)
    assert found["epsilon_pld"] == pytest.approx(found["epsilon"], abs=0.02)
