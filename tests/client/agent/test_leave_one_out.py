"""A hospital in a study that leaves out each site once: it holds to what it approved, pays for each run, and
never trains where it is held out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.agent.verification import Guard
from client.site.approvals import approve
from common.leave_one_out import members_of, study_plan, together_epsilon
from common.plan import RunPlan
from common.pricing import plan_epsilon, with_noise
from common.wire import DescribeTask, EvaluateTask, Refusal, SiteEvaluation, SiteReadiness, SiteUpdate
from common.wire import WireMessage as Message
from tests.helpers.consortium import SITES, settle, tiny_plan
from tests.helpers.signed_site import PRIVATE, REHEARSE, TRAIN, ask
from tests.helpers.site_agent import BASE, A, agent, enrol, ledger, rows, train_task, update_of

STUDY = study_plan(with_noise(tiny_plan(name="study", arms=["federated", "federated_dp"])), SITES)
ALL, WITHOUT_A, WITHOUT_B = members_of(STUDY)[:3]
OPEN = {"max_epsilon": 1000.0, "allow_non_private": True, "evaluation": "synthetic"}


def member_asked(site: Path, task: Message, member: RunPlan, guard: Guard) -> Message:
    return ask(site, task, member.canonical_json(), guard=guard, plan_sha256=member.sha256())


def code(answer: Message) -> str:
    return answer.code if isinstance(answer, Refusal) else type(answer).__name__


def test_the_study_that_was_approved_is_carried_member_by_member(data: Path) -> None:
    site = data / A
    enrol(site)
    settle(site, policy=OPEN | {"require_approval": True})
    guard = Guard(str(site))
    assert code(member_asked(site, TRAIN, WITHOUT_B, guard)) == "not-approved"
    approve(site, STUDY)
    for run, member in (("all", ALL), ("without-b", WITHOUT_B)):
        for task in (REHEARSE, TRAIN, PRIVATE):
            answer = member_asked(site, task.model_copy(update={"run": run}), member, guard)
            assert isinstance(answer, SiteReadiness if task is REHEARSE else SiteUpdate), answer
        again = TRAIN.model_copy(update={"run": "again"})
        assert code(member_asked(site, again, member, guard)) == "approval-used"


@pytest.mark.parametrize("task", [TRAIN, PRIVATE])
def test_a_site_does_not_train_in_a_run_that_holds_it_out(data: Path, task: Message) -> None:
    """Whatever the coordinator signs: in a study, and in any other run."""
    site = data / A
    enrol(site)
    settle(site, policy=OPEN)
    guard = Guard(str(site))
    held_out = with_noise(tiny_plan(arms=["federated", "federated_dp"], held_out=[A]))
    for plan in (WITHOUT_A, held_out):
        assert code(member_asked(site, task, plan, guard)) == "wrong-plan"
    assert isinstance(member_asked(site, task, WITHOUT_B, guard), SiteUpdate)


def test_a_budget_that_covers_a_run_but_not_the_study_is_said_in_the_rehearsal(data: Path) -> None:
    study = study_plan(with_noise(tiny_plan(arms=["federated_dp"])), SITES)
    members = members_of(study)
    together = together_epsilon(members, SITES)
    assert together is not None

    def ready(plan: RunPlan, max_epsilon: float, run: str = "") -> SiteReadiness:
        settle(
            data / A,
            kind="hospital",
            nominal_patients=500,
            policy={"max_epsilon": max_epsilon, "min_nominal_patients": 1},
        )
        found = agent(data, plan=plan).describe(DescribeTask(run=run, rehearse=True))
        assert isinstance(found, SiteReadiness), found
        return found

    short, enough = plan_epsilon(study) + 0.3, together + 0.05
    assert ready(with_noise(tiny_plan(arms=["federated_dp"])), short).arms == {"federated_dp": "accept"}
    found = ready(study, short)
    assert (found.arms, found.evaluation) == ({"federated_dp": "budget-exhausted"}, "budget-exhausted")
    assert found.reasons["evaluation"] == "what is left of the budget does not cover the 5 runs of the study"
    assert ready(study, enough).arms == {"federated_dp": "accept"}
    assert ready(members[1], enough).evaluation == "accept"
    assert not [row for row in rows(data) if row[0] == "reserve"], "a rehearsal charges nothing"

    update_of(agent(data, plan=study).train(train_task(run="all")))
    assert ready(study, enough, "all").arms == {"federated_dp": "accept"}, "it is charged already"
    assert ready(members[2], enough, "without-b").arms == {"federated_dp": "accept"}
    with ledger(data) as opened:  # another study meanwhile takes what the next runs need
        steps = opened.reservation('["all", "federated_dp"]').steps
        opened.reserve(
            request="x", steps=steps, purpose="y", fingerprint="", max_epsilon=enough, max_delta=1e-5
        )
    assert ready(members[2], enough, "without-b").arms == {"federated_dp": "budget-exhausted"}


def test_a_hospitals_own_model_is_scored_exactly_in_each_run_of_the_study(data: Path) -> None:
    """It is the same in each, and so is the answer. In a run of another plan it is refused as before."""
    settle(
        data / A,
        kind="hospital",
        policy={"allow_non_private": True, "evaluation": "disclosed", "min_nominal_patients": 1},
        split={"train": 0.6, "test": 0.4},
    )
    base = study_plan(with_noise(tiny_plan(arms=["local"])), SITES)
    own = BASE.copy()
    own[-1] += np.float32(0.1)

    def scored(plan: RunPlan, run: str) -> Message:
        task = EvaluateTask(run=run, models=(f"local/{A}",), everyone=False, weights=own[None])
        return agent(data, plan=plan).evaluate(task)

    answers = [scored(plan, f"run-{number}") for number, plan in enumerate(members_of(base))]
    assert {type(answer) for answer in answers} == {SiteEvaluation}
    first = answers[0]
    assert isinstance(first, SiteEvaluation)
    for answer in answers[1:]:
        assert isinstance(answer, SiteEvaluation)
        assert np.array_equal(answer.histograms, first.histograms)
    other = study_plan(with_noise(tiny_plan(arms=["local"], seed=4)), SITES)
    for plan in (with_noise(tiny_plan(arms=["local"])), other):
        assert code(scored(plan, f"other-{plan.seed}")) == "evaluation-repeated"
