"""Which patients trained a finished model? For each arm of a simulation: what it gives away by itself.

    python benchmarks/membership.py RUN --data DIR [--format json]

The attack is that of `client.privacy_checks.membership`, on the patients of all training sites together:
those who train, and those who are tested. A local arm is attacked at each site with its own model. `found` is
the share of the training patients who are found with 1 % false alarms.

Controls: `public` trained on nobody, and its score is the same for everyone; in `shuffled` rows the same
scores are dealt anew, so that there is nothing to find. Both must give .5.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from client.privacy_checks.membership import Membership, PatientLosses, membership, patient_losses
from client.privacy_checks.own_patients import own_patients
from client.site.config import read_site
from common.arms import ARMS
from common.learning import set_threads
from common.model_file import load_model
from common.models import network_of
from common.weights import manifest_of, resolve_initial
from server.run_folder import RunFolder, without_nan
from server.simulation.simulate import find_sites

SHUFFLED = ", shuffled"


def attack_run(folder: RunFolder, data: Path) -> dict[str, Membership]:
    """Arm -> what its finished model gives away; for each trained arm without noise a shuffled control."""
    plan = folder.plan
    manifest = manifest_of(network_of(plan.model).state_dict())
    initial = resolve_initial(plan.model.initial, plan.model.sha256)
    losses: dict[str, list[PatientLosses]] = {arm: [] for arm in ("", *plan.arms)}
    for site_yaml in find_sites(data):
        name = read_site(site_yaml)[0].name
        if name in plan.held_out:
            continue
        paths = {"": initial}
        for arm in plan.arms:
            owner = name if ARMS[arm].owner == "site" else None
            paths[arm] = folder.arm(arm, owner).model_path if ARMS[arm].is_trained else initial
        weights = [load_model(path, manifest, plan.model.labels) for path in paths.values()]
        found = patient_losses(own_patients(site_yaml, plan), plan.model, weights)
        for place, arm in enumerate(paths):
            one = PatientLosses(members=found.members[place][None], others=found.others[place][None])
            losses[arm].append(one)
    together = {arm: side_by_side(parts) for arm, parts in losses.items()}
    public = together.pop("")
    found = {}
    for arm, one in together.items():
        found[arm] = membership(public, one)
        if ARMS[arm].is_trained and not ARMS[arm].private:
            found[arm + SHUFFLED] = membership(*shuffled(public, one))
    return found


def side_by_side(parts: list[PatientLosses]) -> PatientLosses:
    """The patients of all sites."""
    return PatientLosses(
        members=np.concatenate([part.members for part in parts], axis=1),
        others=np.concatenate([part.others for part in parts], axis=1),
    )


def shuffled(public: PatientLosses, attacked: PatientLosses, seed: int = 0) -> list[PatientLosses]:
    """The same losses, with chance deciding who trained: both models with the same patients."""
    members = public.members.shape[1]
    order = np.random.default_rng(seed).permutation(members + public.others.shape[1])
    dealt = []
    for one in (public, attacked):
        everyone = np.concatenate([one.members, one.others], axis=1)[:, order]
        dealt.append(PatientLosses(members=everyone[:, :members], others=everyone[:, members:]))
    return dealt


def table(found: dict[str, Membership]) -> str:
    """Markdown."""
    lines = [
        "| arm | AUC [95 %] | found at 1 % false alarms [95 %] | AUC of loss difference, of loss alone |",
        "|---|---|---|---|",
    ]
    for arm, one in found.items():
        lines.append(
            f"| `{arm.removesuffix(SHUFFLED)}`{SHUFFLED if arm.endswith(SHUFFLED) else ''} | "
            f"{_short(one.auc, one.auc_interval)} | {_short(one.found, one.found_interval)} | "
            f"{one.auc_of_difference:.3f}, {one.auc_of_loss:.3f} |"
        )
    first = next(iter(found.values()))
    return "\n".join([*lines, "", f"{first.members} patients who train, {first.others} who do not."])


def _short(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished simulation")
    parser.add_argument("--data", type=Path, required=True, help="folder of its sites")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    arguments = parser.parse_args()
    set_threads(1)
    found = attack_run(RunFolder.open(arguments.run), arguments.data)
    if arguments.format == "json":
        values: Any = {arm: asdict(one) for arm, one in found.items()}
        print(json.dumps({"benchmark": "membership", "arms": without_nan(values)}))
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
