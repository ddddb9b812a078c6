"""The privacy claims of a run, by site: the guarantee with its unit, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common.plan import RunPlan
from common.privacy import ADJACENCY, GaussianSteps, pld_epsilon
from server.messaging.requests import Site
from server.run.rounds import StageResult

NO_CLAIM: dict[str, Any] = {"epsilon": None, "epsilon_pld": None, "delta": None, "noise_multiplier": None}


def all_refused(sites: Sequence[Site], code: str, reason: str) -> dict[str, dict[str, Any]]:
    """The claims of an arm that every site refused."""
    return {site.name: _claim(site, NO_CLAIM, {"code": code, "reason": reason}) for site in sites}


def privacy_claims(plan: RunPlan, result: StageResult, sites: Sequence[Site]) -> dict[str, dict[str, Any]]:
    """Per site: what its updates guarantee, or why it refused; a site that did neither is left out.

    A site that took part in some rounds and then refused keeps its claim: what it spent holds whatever it
    said later.
    """
    steps = plan.training.rounds * plan.private_steps_per_round
    claims: dict[str, dict[str, Any]] = {}
    for site in sites:
        refusal, claim = result.refused.get(site.name), result.claims.get(site.name)
        refused = {"code": refusal.code, "reason": refusal.reason} if refusal else None
        if claim is not None:
            schedule = GaussianSteps(
                noise_multiplier=claim["noise_multiplier"], sample_rate=plan.privacy.sample_rate, steps=steps
            )
            claims[site.name] = _claim(
                site, claim | {"epsilon_pld": pld_epsilon([schedule], claim["delta"])}, refused
            )
        elif refusal is not None:
            claims[site.name] = _claim(site, NO_CLAIM, refused)
    return claims


def _claim(site: Site, numbers: dict[str, Any], refused: dict[str, str] | None) -> dict[str, Any]:
    return {"unit": site.description.unit, "adjacency": ADJACENCY, **numbers, "refused": refused}
