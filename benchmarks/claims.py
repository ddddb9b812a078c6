"""Does the demo show what it claims? Three seeds with equal budgets, and two controls that must fail.

    python benchmarks/claims.py --data data/demo --out runs/claims

1. `federated` beats `local` elsewhere, interval without zero, the local arm taken at its best public epoch.
2. `federated_dp` is not worse than `public` at the training hospitals: its interval ends above -.01. (The
public model leaves a private
   head next to nothing to learn from these phantoms. From the weaker start of fedqc's first weeks it gained
   .05.)
Control for 1: nobody trains (learning rate 0). Control for 2: a hundred times the noise. Exit status 1 if a
claim does not hold or a control does. Runs that exist already under --out are taken as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from common.privacy import noise_multiplier_for
from server.evaluation.compare import compare_runs
from server.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
SEEDS = (7, 8, 9)


def simulate(plan: dict[str, Any], data: Path, out: Path, threads: int) -> RunFolder:
    """One run in a process of its own, as a user would start it."""
    if not (out / "evaluation.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.parent / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(plan), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "common.cli",
            "simulate",
            str(path),
            "--data",
            str(data),
            "--out",
            str(out),
        ]
        subprocess.run([*command, "--threads", str(threads)], check=True, stdout=subprocess.DEVNULL)
    return RunFolder.open(out)


def contrast(folders: list[RunFolder], arm: str, other: str, where: str) -> dict[str, Any]:
    found = compare_runs(folders)["contrasts"]
    return next(row for row in found if (row["arm"], row["other"], row["where"]) == (arm, other, where))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=ROOT / "configs/plans/demo.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.plan.read_text(encoding="utf-8"))

    def series(name: str, **changes: Any) -> list[RunFolder]:
        folders = []
        for seed in SEEDS:
            changed = plan | changes | {"seed": seed, "name": name}
            folders.append(
                simulate(changed, arguments.data, arguments.out / f"{name}-{seed}", arguments.threads)
            )
        return folders

    training, privacy = dict(plan.get("training", {})), dict(plan.get("privacy", {}))
    steps = training.get("rounds", 6) * training.get("local_epochs", 1)
    noise = noise_multiplier_for(
        privacy.get("epsilon", 8.0), privacy.get("delta", 1e-5), privacy.get("sample_rate", 1.0), steps
    )
    real = series("claims")
    untrained = series("untrained", arms=["local", "federated"], training=training | {"learning_rate": 0.0})
    noisy = series(
        "noisy", arms=["public", "federated_dp"], privacy=privacy | {"noise_multiplier": 100 * noise}
    )

    failures = 0
    for title, folders, arm, other, where, bound, should_hold in (
        ("claim 1: federated - local, elsewhere", real, "federated", "local", "elsewhere", 0.0, True),
        ("claim 2: federated_dp - public, home", real, "federated_dp", "public", "home", -0.01, True),
        ("control 1, nobody trains", untrained, "federated", "local", "elsewhere", 0.0, False),
        ("control 2, noise x 100", noisy, "federated_dp", "public", "home", -0.01, False),
    ):
        row = contrast(folders, arm, other, where)
        holds = row["low"] is not None and row["low"] > bound
        failures += holds != should_hold
        expected = "as it should" if holds == should_hold else "NOT AS IT SHOULD"
        print(
            f"{title:40s} {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]  "
            f"{'holds' if holds else 'fails'}, {expected}"
        )
    training_sites = [site["site"] for site in real[0].evaluation["sites"] if site["role"] == "training"]
    for site in training_sites:
        row = contrast(real, "federated_dp", "public", site)
        print(
            f"  federated_dp - public at {site}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
