"""A plan's epsilon covers all that it asks of one patient, and its noise is a function of the plan alone."""

from __future__ import annotations

from typing import Any

import pytest

from common.plan import RunPlan, parse_plan
from common.pricing import EVALUATION, charges, plan_epsilon, training_steps, with_noise
from common.privacy import epsilon_of, gdp_mu, noise_multiplier_for, pld_epsilon, rdp_epsilon


def plan(**privacy: Any) -> RunPlan:
    return parse_plan({"name": "priced", "arms": ["public", "federated_dp"], "privacy": privacy})


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_training_and_evaluation_together_cost_what_the_plan_states(
    epsilon: float, sample_rate: float
) -> None:
    priced = with_noise(plan(epsilon=epsilon, delta=1e-6, sample_rate=sample_rate))
    asked = charges(priced)
    assert set(asked) == {"federated_dp", EVALUATION}
    assert asked[EVALUATION].sample_rate == 1
    assert plan_epsilon(priced) <= epsilon
    assert plan_epsilon(priced) > 0.995 * epsilon
    assert pld_epsilon(list(asked.values()), 1e-6) <= epsilon * 1.001
    assert plan_epsilon(priced, trains=False) < epsilon  # a held-out site is only scored
    assert set(charges(priced, trains=False)) == {EVALUATION}


def test_the_evaluation_gets_its_share_and_the_share_can_be_nothing() -> None:
    asked = charges(with_noise(plan(evaluation_share=0.5)))
    assert gdp_mu([asked[EVALUATION]]) == pytest.approx(gdp_mu([asked["federated_dp"]]), rel=2e-3)
    none = with_noise(plan(evaluation_share=0.0))
    assert set(charges(none)) == {"federated_dp"}
    assert training_steps(none).noise_multiplier < training_steps(with_noise(plan())).noise_multiplier


def test_a_plan_without_a_private_arm_spends_its_epsilon_on_the_evaluation() -> None:
    priced = with_noise(parse_plan({"name": "scored", "arms": ["public"], "privacy": {"epsilon": 1.0}}))
    assert set(charges(priced)) == {EVALUATION}
    assert 0.99 < plan_epsilon(priced) <= 1.0


def test_pricing_twice_changes_nothing_and_stated_noise_stays() -> None:
    priced = with_noise(plan())
    assert with_noise(priced) == priced
    assert with_noise(parse_plan(priced.model_dump(mode="json"))).sha256() == priced.sha256()
    stated = with_noise(plan(noise_multiplier=50.0, evaluation_noise_multiplier=60.0))
    assert (stated.privacy.noise_multiplier, stated.privacy.evaluation_noise_multiplier) == (50.0, 60.0)
    assert plan_epsilon(stated) == epsilon_of(list(charges(stated).values()), 1e-5) < 2.0


def test_a_plan_of_the_earlier_version_keeps_its_hash_and_its_noise() -> None:
    """An interrupted run was charged by it: its rows in the ledger must still fit."""
    earlier = plan(epsilon=8.0)
    assert "evaluation" not in earlier.canonical_json().partition('"privacy"')[2].partition("}")[0]
    assert training_steps(earlier).noise_multiplier == noise_multiplier_for(
        8.0, 1e-5, 1.0, 6, cost=rdp_epsilon
    )
    assert EVALUATION not in charges(earlier)


def test_rounds_divide_the_steps() -> None:
    priced = with_noise(plan(sample_rate=0.25))
    assert training_steps(priced, 1).steps == 4
    assert training_steps(priced).steps == 24


def test_extreme_epsilons_are_priced_or_refused_not_wrong() -> None:
    for epsilon in (0.01, 900.0):
        assert plan_epsilon(with_noise(plan(epsilon=epsilon))) <= epsilon


def test_what_was_reserved_before_costs_what_its_own_noise_costs() -> None:
    priced = with_noise(plan())
    louder = charges(priced, noise=1.0)
    assert louder["federated_dp"].noise_multiplier == 1.0
    assert louder["federated_dp"].steps == charges(priced)["federated_dp"].steps
    assert louder[EVALUATION] == charges(priced)[EVALUATION]
    assert plan_epsilon(priced, noise=1.0) == epsilon_of(list(louder.values()), 1e-5) > plan_epsilon(priced)
