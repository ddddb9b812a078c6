"""Rehearse a run: each site's answer to the plan, and whether enough sites would take part.

`fedqc run check` reports this and trains nothing; `fedqc run start` asks again, and starts without a site
only if `--accept-missing` permits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.arms import is_private
from common.errors import PlanError, RefusedError
from common.estimability import estimability, models_scored, nominal_tested
from common.excursion import update_excursion
from common.plan import RunPlan
from common.pricing import EVALUATION, charges, with_noise
from common.privacy import epsilon_of, epsilon_text
from common.terminal import table_row, wrapped
from common.weights import REACH
from common.wire import Refusal, SiteReadiness

ACCEPT = "accept"
_NO_HOSPITAL = "the private arm would be charged, and no hospital could be scored"
_NOBODY = "no site could be scored"


def _nobody(check: Mapping[str, Any]) -> str:
    return _NOBODY if check.get("evaluates") else f"{_NOBODY}: the run would train, and end without a result"


def rehearsed(
    plan: RunPlan, found: Mapping[str, SiteReadiness | Refusal], enrolled: Sequence[str]
) -> dict[str, Any]:
    """What `run check` prints and keeps: one entry a site, those that did not answer included, and the
    verdict.
    """
    sites = {name: _entry(plan, name, found.get(name)) for name in sorted({*enrolled, *found})}
    missing = sorted(name for name, site in sites.items() if not site["takes_part"])
    training = [name for name, site in sites.items() if site["takes_part"] and plan.trains_at(name)]
    buckets = {
        name: said.nominal_patients
        for name, said in found.items()
        if isinstance(said, SiteReadiness) and name in training and _trains_privately(said)
    }
    beyond = noise_beyond_reach(plan, buckets)
    scored = [name for name, site in sites.items() if site["evaluation"] == ACCEPT]
    for site in sites.values():
        site["expected"] = _expected(plan, site, max(1, len(training)))
    return {
        "plan": plan.name,
        "plan_sha256": plan.sha256(),
        "question": plan.question,
        "arms": list(plan.arms),
        "evaluates": plan.evaluate is not None,
        "rounds": plan.training.rounds,
        "quorum": plan.federation.quorum,
        "sites": sites,
        "missing": missing,
        "training": training,
        "beyond_reach": beyond,
        "unscored": _unscored(plan, sites),
        "scored": scored,
        "enough": (plan.evaluate is not None or len(training) >= plan.federation.quorum)
        and not beyond
        and all(name in sites and sites[name]["takes_part"] for name in plan.held_out),
    }


def noise_beyond_reach(plan: RunPlan, nominal_patients: Mapping[str, int]) -> dict[str, float]:
    """Sites whose noise alone could carry a weight beyond what one update holds (`REACH`), and how far.

    There every update is cut off: it would be paid for, and wrong.
    Args:
        nominal_patients: the public bucket of each site that would train a private arm.
    """
    reached = {name: update_excursion(plan, patients) for name, patients in nominal_patients.items()}
    return {name: float(f"{far:.3g}") for name, far in reached.items() if far > REACH}


def admit(plan: RunPlan, check: Mapping[str, Any], *, accept_missing: bool) -> None:
    """Permit a run to start.

    Raises:
        PlanError: too few sites for the quorum, or a held-out site is away (code `too-few-sites`), or the
            noise leaves the range of an update (`noise-too-large`), whatever was accepted.
        RefusedError: no site could be scored (`no-evaluation`), whatever was accepted; or nobody accepted
            that sites are missing or refuse (`sites-missing`), or that a private arm would be charged and
            no hospital be scored (`no-hospital-scored`).
    """
    sites = check["sites"]
    why = ", ".join(f"{name}: {sites[name]['answer']}" for name in check["missing"])
    if check["beyond_reach"]:
        raise PlanError(f"{_beyond_text(check)}", code="noise-too-large", hint=_LESS_NOISE)
    if not check["enough"]:
        raise PlanError(
            f"{len(check['training'])} sites would train, the quorum is {plan.federation.quorum}"
            + (f" ({why})" if why else ""),
            code="too-few-sites",
            hint="fedqc run check shows each site's answer",
        )
    if not check["scored"]:
        said = {name: site["evaluation"] or site["answer"] for name, site in sites.items()}
        raise RefusedError(f"{_nobody(check)} ({_listed(said)})", code="no-evaluation", hint=_hint(check))
    if check["missing"] and not accept_missing:
        raise RefusedError(
            f"not every site would take part ({why})",
            code="sites-missing",
            hint="--accept-missing starts without them",
        )
    if check["unscored"] and not accept_missing:
        raise RefusedError(
            f"{_NO_HOSPITAL}: {_listed(check['unscored'])}",
            code="no-hospital-scored",
            hint=f"{_TO_BE_SCORED}; --accept-missing trains all the same",
        )


def check_table(check: Mapping[str, Any]) -> str:
    """The rehearsal for a terminal."""
    widths = (18, 27, 9, 9, -8, -9)
    lines = [table_row(("site", "answer", "version", "data", "rounds", "s/round"), widths)]
    for name, site in check["sites"].items():
        rounds = (
            "-" if site["rounds_affordable"] is None else f"{site['rounds_affordable']}/{check['rounds']}"
        )
        seconds = "-" if site["seconds_a_round"] is None else f"{site['seconds_a_round']:g}"
        data = {True: "prepared", False: "not yet", None: "-"}[site["data_prepared"]]
        lines.append(table_row((name, site["answer"], site["version"] or "-", data, rounds, seconds), widths))
        lines += [wrapped(f"{arm}: {why}", start="  ") for arm, why in site["reasons"].items()]
        if site["evaluation"] == ACCEPT:
            lines.append(f"  evaluation: {ACCEPT}{_how_scored(site)}")
        if "too-few-patients" in site["arms"].values():  # the number itself stays at the hospital
            lines.append("  the hospital sees how many patients the next bucket needs: fedqc site check PLAN")
    if check["missing"]:
        lines.append(f"would not take part: {', '.join(check['missing'])}")
    if check["beyond_reach"]:
        lines += [f"NOT to be started: {_beyond_text(check)}", f"  {_LESS_NOISE}"]
        return "\n".join(lines)
    if check["enough"] and not check["scored"]:
        lines += [f"NOT to be started: {_nobody(check)}", f"  {_hint(check)}"]
        return "\n".join(lines)
    if check["unscored"]:
        lines.append(f"NOT worth its price: {_NO_HOSPITAL}")
    lines.append(
        "enough sites to start" if check["enough"] else f"NOT enough sites: the quorum is {check['quorum']}"
    )
    return "\n".join(lines)


def _expected(plan: RunPlan, site: Mapping[str, Any], training_sites: int) -> dict[str, Any] | None:
    """What scores with noise could tell of a site, and their price; None where it is not scored so."""
    if site["scoring"] != "dp":
        return None
    asked = with_noise(plan)
    noise = asked.privacy.evaluation_noise_multiplier
    assert noise is not None  # else the site would not be scored with noise
    tested = site["nominal_tested"] or nominal_tested(site["nominal_patients"])
    found = estimability(tested, noise, models_scored(plan, training_sites), len(plan.model.labels))
    epsilon = epsilon_of([charges(asked)[EVALUATION]], plan.privacy.delta)
    return {
        "epsilon": epsilon,
        "error": round(found.error, 4),
        "estimable": found.is_so,
        "words": found.words(f"epsilon {epsilon_text(epsilon)}"),
    }


def _how_scored(site: Mapping[str, Any]) -> str:
    if expected := site.get("expected"):
        return f", with noise, charged epsilon {epsilon_text(expected['epsilon'])}; {expected['words']}"
    return ", exact and outside the guarantee, not charged" if site.get("scoring") == "disclosed" else ""


def _trains_privately(said: SiteReadiness) -> bool:
    return any(is_private(arm) and code == ACCEPT for arm, code in said.arms.items())


_TO_BE_SCORED = "privacy.evaluation_share above 0, or other policies"


def _hint(check: Mapping[str, Any]) -> str:
    approve = (
        "fedqc evaluate … --write-plan FILE writes the plan that hospitals approve; else see their reasons"
    )
    return approve if check.get("evaluates") else _TO_BE_SCORED


_LESS_NOISE = "lower privacy.learning_rate, or raise privacy.epsilon, or leave out small sites"


def _listed(codes: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {code}" for name, code in codes.items())


def _beyond_text(check: Mapping[str, Any]) -> str:
    sites = ", ".join(f"{name} {far:g}" for name, far in check["beyond_reach"].items())
    return f"noise could carry a weight beyond {REACH:g}, the most that an update holds ({sites})"


def _entry(plan: RunPlan, name: str, said: SiteReadiness | Refusal | None) -> dict[str, Any]:
    """A site takes part if it would train at least one arm of those that are trained, or is held out and may
    be scored.
    """
    entry: dict[str, Any] = {
        "answer": "no answer",
        "takes_part": False,
        "reasons": {},
        "arms": {},
        "kind": None,
        "evaluation": None,
        "version": "",
        "scoring": None,
        "nominal_patients": 0,
        "nominal_tested": 0,
        "data_prepared": None,
        "rounds_affordable": None,
        "seconds_a_round": None,
    }
    if isinstance(said, Refusal):
        return entry | {"answer": said.code, "reasons": {"all": said.reason}}
    if said is None:
        return entry
    refusals = [code for code in said.arms.values() if code != ACCEPT]
    held_out = not plan.trains_at(name)
    takes_part = said.evaluation == ACCEPT if held_out else not said.arms or len(refusals) < len(said.arms)
    if held_out:
        answer = said.evaluation
    elif refusals and takes_part:
        answer = f"accept {len(said.arms) - len(refusals)} of {len(said.arms)} arms"
    else:
        answer = refusals[0] if refusals else ACCEPT
    shown = said.model_dump(mode="json", include=set(entry))
    reasons = {name: why for name, why in said.reasons.items() if not held_out or name == "evaluation"}
    if said.evaluation != ACCEPT:
        reasons.setdefault("evaluation", said.evaluation)
    return entry | shown | {"answer": answer, "takes_part": takes_part, "reasons": reasons}


def _unscored(plan: RunPlan, sites: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Site -> why it could not be scored, where a private arm would be charged and that is so at every
    hospital that takes part; where no hospital takes part, at every site.
    """
    if not any(is_private(arm) for arm in plan.arms):
        return {}
    present = {name: site for name, site in sites.items() if site["takes_part"]}
    hospitals = {name: site for name, site in present.items() if site["kind"] == "hospital"} or present
    if any(site["evaluation"] == ACCEPT for site in hospitals.values()):
        return {}
    return {name: site["evaluation"] for name, site in hospitals.items()}
