"""One plan is signed for a study that leaves out each site once, and its runs follow from it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.errors import PlanError
from common.leave_one_out import members_of, price_text, study_of, study_plan, together_epsilon
from common.plan import parse_plan
from common.pricing import plan_epsilon, with_noise
from common.privacy import epsilon_text
from tests.helpers.consortium import SITES, tiny_plan

PLAN = with_noise(tiny_plan(arms=["local", "federated_dp"]))
STUDY = study_plan(PLAN, SITES)


def test_members_differ_in_the_held_out_site_alone_and_each_gives_the_study() -> None:
    members = members_of(STUDY)
    assert [member.held_out for member in members] == [(), *((site,) for site in SITES)]
    assert members[0] == STUDY
    assert len({member.sha256() for member in members}) == len(SITES) + 1
    for member in members:
        read = parse_plan(json.loads(member.canonical_json()))  # as a hospital gets it
        assert (read, study_of(read), members_of(read)) == (member, STUDY, members)
        assert not any(member.scores_everyone_at(site) for site in SITES)
        assert [site for site in SITES if not member.trains_at(site)] == [*member.held_out]


def test_another_plan_is_approved_by_itself_and_keeps_its_hash() -> None:
    assert study_of(PLAN) is PLAN
    assert members_of(PLAN) == (PLAN,)
    assert "leave_one_site_out" not in json.loads(PLAN.canonical_json())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"leave_one_site_out": ["a", "b"]}, "3 sites or more"),
        ({"leave_one_site_out": ["a", "b", "b", "c"]}, "each once"),
        ({"held_out": ["e"]}, "none or one of leave_one_site_out"),
        ({"held_out": ["a", "b"]}, "none or one of leave_one_site_out"),
        ({"held_out_patients": "all"}, "train in its sister runs"),
    ],
)
def test_no_other_plan_is_a_member(changes: dict[str, Any], said: str) -> None:
    study = {"leave_one_site_out": ["a", "b", "c", "d"], "held_out_patients": "test", "held_out": []}
    assert members_of(tiny_plan(**study))
    with pytest.raises(PlanError, match=said):
        tiny_plan(**(study | changes))


def test_the_price_is_of_all_runs_at_the_site_that_pays_most() -> None:
    members, delta = members_of(STUDY), PLAN.privacy.delta
    together = together_epsilon(members, SITES)
    assert together is not None
    assert plan_epsilon(PLAN) < together < len(members) * plan_epsilon(PLAN)
    assert price_text(members, SITES) == (
        f"5 runs: 4 sites, each left out once, and none. A run asks epsilon {PLAN.privacy.epsilon:.2f} of a "
        f"patient; all together {epsilon_text(together)}, delta {delta:g}"
    )


def test_noised_scores_have_a_price_where_no_arm_is_private() -> None:
    study = study_plan(with_noise(tiny_plan()), SITES)
    said = price_text(members_of(study), SITES)
    assert "No arm is private." in said
    assert "is charged epsilon 2.00 a patient in each run; all together 5.0" in said
    unscored = study_plan(tiny_plan(privacy={"evaluation_share": 0.0}), SITES)
    assert price_text(members_of(unscored), SITES).endswith("No arm is private.")
