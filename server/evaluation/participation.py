"""Who took part in a run: the rounds that each site was invited to and counted in, from rounds.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.arms import ARMS
from server.run_folder import ArmFolder, RunFolder


@dataclass(kw_only=True)
class Presence:
    """A site in an arm."""

    rounds: int = 0  # that the arm closed
    invited: int = 0
    counted: int = 0  # rounds whose sum holds an update of the site
    codes: set[str] = field(default_factory=set)  # of its refusals and failures


Participation = Mapping[str, Mapping[str, Presence]]
"""Arm -> training site -> presence."""


def participation_of(folder: RunFolder) -> Participation:
    """Of every arm that hospitals train; an arm without a closed round is left out."""
    training = [site["site"] for site in folder.manifest["sites"] if site.get("role") == "training"]
    found: dict[str, dict[str, Presence]] = {}
    for arm in folder.plan.arms:
        if not ARMS[arm].at_hospitals:
            continue
        if ARMS[arm].owner == "site":
            one = {site: _presence(folder.arm(arm, site), [site]) for site in training}
            rows = {site: presences[site] for site, presences in one.items()}
        else:
            rows = _presence(folder.arm(arm), training)
        if any(presence.rounds for presence in rows.values()):
            found[arm] = rows
    return found


def _presence(folder: ArmFolder, sites: list[str]) -> dict[str, Presence]:
    found = {site: Presence() for site in sites}
    for record in folder.rounds():
        for site, presence in found.items():
            presence.rounds += 1
            presence.invited += site in record["invited"]
            presence.counted += site in record["weights"]
            if (refusal := record["refused"].get(site)) is not None:
                presence.codes.add(str(refusal["code"]))
            if (failure := record["failed"].get(site)) is not None:
                presence.codes.add(str(failure))
    return found
