"""Rehearse a run: each site's answer to the plan, and whether enough sites would take part.

`fedqc run check` reports this and trains nothing; `fedqc run start` asks again, and starts without a site
only if `--accept-missing` permits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import PlanError, RefusedError
from common.plan import RunPlan
from common.wire import Refusal, SiteReadiness

ACCEPT = "accept"


def rehearsed(
    plan: RunPlan, found: Mapping[str, SiteReadiness | Refusal], enrolled: Sequence[str]
) -> dict[str, Any]:
    """What `run check` prints and keeps: one entry a site, those that did not answer included, and the
    verdict.
    """
    sites = {name: _entry(plan, name, found.get(name)) for name in sorted({*enrolled, *found})}
    missing = sorted(name for name, site in sites.items() if not site["takes_part"])
    training = [name for name, site in sites.items() if site["takes_part"] and name not in plan.held_out]
    return {
        "plan": plan.name,
        "plan_sha256": plan.sha256(),
        "question": plan.question,
        "arms": list(plan.arms),
        "rounds": plan.training.rounds,
        "quorum": plan.federation.quorum,
        "sites": sites,
        "missing": missing,
        "training": training,
        "enough": len(training) >= plan.federation.quorum
        and all(name in sites and sites[name]["takes_part"] for name in plan.held_out),
    }


def admit(plan: RunPlan, check: Mapping[str, Any], *, accept_missing: bool) -> None:
    """Permit a run to start.

    Raises:
        PlanError: too few sites for the quorum, or a held-out site is away (code `too-few-sites`), whatever
            was accepted.
        RefusedError: sites are missing or refuse and nobody accepted that (code `sites-missing`).
    """
    sites = check["sites"]
    why = ", ".join(f"{name}: {sites[name]['answer']}" for name in check["missing"])
    if not check["enough"]:
        raise PlanError(
            f"{len(check['training'])} sites would train, the quorum is {plan.federation.quorum}"
            + (f" ({why})" if why else ""),
            code="too-few-sites",
            hint="fedqc run check shows each site's answer",
        )
    if check["missing"] and not accept_missing:
        raise RefusedError(
            f"not every site would take part ({why})",
            code="sites-missing",
            hint="--accept-missing starts without them",
        )


def check_table(check: Mapping[str, Any]) -> str:
    """The rehearsal for a terminal."""
    lines = [f"{'site':20s}{'answer':28s}{'version':10s}{'data':10s}{'rounds':>8s}{'s/round':>10s}"]
    for name, site in check["sites"].items():
        rounds = (
            "-" if site["rounds_affordable"] is None else f"{site['rounds_affordable']}/{check['rounds']}"
        )
        seconds = "-" if site["seconds_a_round"] is None else f"{site['seconds_a_round']:g}"
        data = {True: "prepared", False: "not yet", None: "-"}[site["data_prepared"]]
        lines.append(
            f"{name:20s}{site['answer']:28s}{site['version'] or '-':10s}{data:10s}{rounds:>8s}{seconds:>10s}"
        )
        lines += [f"  {arm}: {why}" for arm, why in site["reasons"].items()]
        if "too-few-patients" in site["arms"].values():  # the number itself stays at the hospital
            lines.append("  the hospital sees how many patients the next bucket needs: fedqc site check PLAN")
    if check["missing"]:
        lines.append(f"would not take part: {', '.join(check['missing'])}")
    lines.append(
        "enough sites to start" if check["enough"] else f"NOT enough sites: the quorum is {check['quorum']}"
    )
    return "\n".join(lines)


def _entry(plan: RunPlan, name: str, said: SiteReadiness | Refusal | None) -> dict[str, Any]:
    """A site takes part if it would train at least one arm of those that are trained, or is held out and may
    be scored.
    """
    entry: dict[str, Any] = {
        "answer": "no answer",
        "takes_part": False,
        "reasons": {},
        "arms": {},
        "version": "",
        "data_prepared": None,
        "rounds_affordable": None,
        "seconds_a_round": None,
    }
    if isinstance(said, Refusal):
        return entry | {"answer": said.code, "reasons": {"all": said.reason}}
    if said is None:
        return entry
    refusals = [code for code in said.arms.values() if code != ACCEPT]
    held_out = name in plan.held_out
    takes_part = said.evaluation == ACCEPT if held_out else not said.arms or len(refusals) < len(said.arms)
    if held_out:
        answer = said.evaluation
    elif refusals and takes_part:
        answer = f"accept {len(said.arms) - len(refusals)} of {len(said.arms)} arms"
    else:
        answer = refusals[0] if refusals else ACCEPT
    shown = said.model_dump(
        mode="json", include={"arms", "version", "data_prepared", "rounds_affordable", "seconds_a_round"}
    )
    reasons = {} if held_out else dict(said.reasons)
    if said.evaluation != ACCEPT:
        reasons["evaluation"] = said.evaluation
    return entry | shown | {"answer": answer, "takes_part": takes_part, "reasons": reasons}
