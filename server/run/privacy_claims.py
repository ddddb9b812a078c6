"""The privacy claims of a run, by site: the guarantee with its unit, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.plan import RunPlan
from common.pricing import schedule
from common.privacy import ADJACENCY, epsilon_of, pld_epsilon
from server.messaging.requests import Site
from server.run.rounds import StageResult

VOID = "no claim: this cohort also trained without noise"
NO_CLAIM: dict[str, Any] = {"epsilon": None, "epsilon_pld": None, "delta": None, "noise_multiplier": None}


def privacy_claims(plan: RunPlan, result: StageResult, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Per site: what its updates guarantee, or why it refused; a site that did neither is left out. A cohort
    that also trained without noise has no claim, and `void` says so.

    Epsilon is accounted here again, from the noise that the site states: a site that states less than its
    releases cost is corrected. A site that took part in some rounds and then refused keeps its claim: what it
    spent holds whatever it answered later.
    """
    claims: dict[str, dict[str, Any]] = {}
    for site in sites:
        refusal, claim = result.refused.get(site.name), result.claims.get(site.name)
        refused = {"code": refusal.code, "reason": refusal.reason} if refusal else None
        if claim is not None and claim.get("void"):
            claims[site.name] = _claim(site, NO_CLAIM, refused) | {"void": VOID}
        elif claim is not None:
            spent = schedule(plan, noise=claim["noise_multiplier"])
            accounted = {
                "epsilon": max(claim["epsilon"], epsilon_of(spent, claim["delta"])),
                "epsilon_pld": pld_epsilon(spent, claim["delta"]),
            }
            claims[site.name] = _claim(site, claim | accounted, refused)
        elif refusal is not None:
            claims[site.name] = _claim(site, NO_CLAIM, refused)
    return claims


def merged(before: dict[str, dict[str, Any]], later: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The claims of a run after another private arm. What an arm spent stays, though the site refused the
    next; a cohort that is void in one is void in all.
    """
    found = before | later
    for site in before.keys() & later.keys():
        old, new = before[site], later[site]
        keeps = "void" in old or (new["epsilon"] is None and "void" not in new and old["epsilon"] is not None)
        found[site] = (old if keeps else new) | {"refused": new["refused"] or old["refused"]}
    return found


def _claim(site: Site, numbers: dict[str, Any], refused: dict[str, str] | None) -> dict[str, Any]:
    return {"unit": site.description.unit, "adjacency": ADJACENCY, **numbers, "refused": refused}
