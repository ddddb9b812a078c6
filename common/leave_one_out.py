"""A study that leaves out each site once: one plan that is signed and approved, and its member plans.

The study names its sites (`leave_one_site_out`). A member is the study with one of them held out; one more
holds out none, and its plan is the study's. So a member's text holds all of the study's, and a site derives
from it what it approved. Members differ in `held_out` alone; each is priced and run by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.arms import ARMS
from common.errors import PlanError
from common.plan import MIN_LEFT_OUT, RunPlan, parse_plan
from common.pricing import EVALUATION, charges, schedule
from common.privacy import epsilon_of, epsilon_text


def check_sites(sites: Sequence[str], quorum: int) -> None:
    """Raises PlanError (`too-few-sites`): fewer than three sites, or fewer would train than the quorum."""
    if len(sites) < MIN_LEFT_OUT or len(sites) - 1 < quorum:
        raise PlanError(
            f"{len(sites)} sites: with one left out, {len(sites) - 1} would train",
            code="too-few-sites",
            hint=f"at least {max(MIN_LEFT_OUT, quorum + 1)} sites, or lower federation.quorum",
        )


def study_plan(plan: RunPlan, sites: Sequence[str]) -> RunPlan:
    """The study of a plan over these sites; its `held_out` is replaced.

    Raises:
        PlanError: as `check_sites`; or a name is no site's, or stands twice (`bad-plan`).
    """
    check_sites(sites, plan.federation.quorum)
    own = {"leave_one_site_out": list(sites), "held_out": [], "held_out_patients": "test"}
    return parse_plan(plan.model_dump(mode="json") | own)


def study_of(plan: RunPlan) -> RunPlan:
    """What a site approves for a plan: of a member of a study the study, of any other the plan itself."""
    return plan.model_copy(update={"held_out": ()}) if plan.leave_one_site_out else plan


def members_of(plan: RunPlan) -> tuple[RunPlan, ...]:
    """The plans that are carried out where this one is approved: of a study the one with all sites, then one
    without each; of any other the plan itself.
    """
    left_out = [plan.model_copy(update={"held_out": (site,)}) for site in plan.leave_one_site_out]
    return (study_of(plan), *left_out)


def together_epsilon(plans: Sequence[RunPlan], hospitals: Sequence[str]) -> float | None:
    """Epsilon of a patient of any of these hospitals in all runs together, at the first plan's delta; None
    where no arm is private.

    Runs of one seed and of another are separate looks at the same patients, and add up.
    """
    if not any(ARMS[arm].private for arm in plans[0].arms):
        return None
    return max(
        epsilon_of(
            [steps for plan in plans for steps in schedule(plan, trains=plan.trains_at(hospital))],
            plans[0].privacy.delta,
        )
        for hospital in hospitals
    )


def price_text(members: Sequence[RunPlan], sites: Sequence[str]) -> str:
    """What the runs of a study cost a patient, in a line, before any site is asked.

    Args:
        members: its plans, with their noise.
    """
    first = members[0]
    delta, epsilon = first.privacy.delta, together_epsilon(members, sites)
    said = f"{len(members)} runs: {len(sites)} sites, each left out once, and none. "
    if epsilon is not None:
        return said + (
            f"A run asks epsilon {epsilon_text(first.privacy.epsilon)} of a patient; all together "
            f"{epsilon_text(epsilon)}, delta {delta:g}"
        )
    said += "No arm is private."
    if (scored := charges(first).get(EVALUATION)) is None:
        return said
    once, always = (epsilon_text(epsilon_of([scored] * runs, delta)) for runs in (1, len(members)))
    return said + (
        f" A hospital that is scored with noise is charged epsilon {once} a patient in each run; all "
        f"together {always}, delta {delta:g}"
    )
