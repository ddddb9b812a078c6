"""Does the demo show what README claims? Three seeds, and controls that must fail every claim.

    python benchmarks/claims.py --data data/demo --out runs/claims

1. `federated_dp` beats `public` at the hospital that took no part, which neither model saw.
2. `federated` beats `local` there; the local arm at its best epoch on public data.
3. `federated_dp` beats `public` at the training hospitals, which trained the first and not the second: what
   private training gives where it is done, and no answer about another hospital.

Each claim holds where its difference, paired over test patients and seeds, is above zero after Holm's
correction for three looks. That 1 or 3 is the merit of federation is claimed only where `federated_dp` also
beats `local_dp`, each hospital alone in private, at the same place; that difference is printed beside them.
Controls, which fail where their own interval is not above zero: a hundred times the noise (1 and 3; claim 2
is not private), labels permuted over the training patients of each hospital and modality, and nothing trained
(learning rate as good as 0). Settings of the private arms are chosen once,
by `auto` with the first seed. Exit status 1 if a claim does not hold or a control does. Runs that exist
already under --out are taken as they are.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from client.data.cohort import load_cohort
from common.artifacts import DEFAULT_LABELS, MODALITIES
from common.plan import Split
from server.evaluation.compare import compare_runs
from server.evaluation.inference import LEVEL, holm
from server.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
SEEDS = (7, 8, 9)
NOTHING = 1e-12
CLAIMS = (
    ("federated_dp", "public", "unseen"),
    ("federated", "local", "unseen"),
    ("federated_dp", "public", "home"),
)
ALONE = {"federated_dp": "local_dp"}
"""The arm of each hospital alone that a claim about an arm needs beside it."""


def simulate(plan: dict[str, Any], data: Path, out: Path, jobs: int) -> RunFolder:
    """One run in a process of its own, as a user would start it."""
    if not (out / "evaluation.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        path = out.parent / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(plan), encoding="utf-8")
        command = [sys.executable, "-m", "common.cli", "simulate", str(path), "--data", str(data)]
        subprocess.run(
            [*command, "--out", str(out), "--jobs", str(jobs)], check=True, stdout=subprocess.DEVNULL
        )
    return RunFolder.open(out)


def permuted(data: Path, out: Path, split: Split, seed: int = 0) -> Path:
    """A copy of the sites whose training patients have the labels of another of their modality."""
    if out.exists():
        return out
    for site in sorted(data.glob("*/site.yaml")):
        cohort = load_cohort(site, plan_split=split)
        folder = out / site.parent.name
        shutil.copytree(site.parent, folder, ignore=shutil.ignore_patterns("state"))
        (folder / "state").mkdir(mode=0o700)
        shutil.copy(site.parent / "state" / "site.key", folder / "state" / "site.key")
        labels = _permuted_labels(cohort.labels, cohort.patients, cohort.modality, cohort.part == 0, seed)
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *DEFAULT_LABELS])
            for record, row in zip(cohort.records, labels, strict=True):
                writer.writerow([record.file, *("" if np.isnan(value) else int(value) for value in row)])
    return out


def _permuted_labels(
    labels: np.ndarray, patients: np.ndarray, modality: np.ndarray, trains: np.ndarray, seed: int
) -> np.ndarray:
    """Each training patient gets the labels of another one of the modality, slice by slice, the last again
    where that one has fewer.
    """
    rng, changed = np.random.default_rng(seed), labels.copy()
    for kind in range(len(MODALITIES)):
        members = np.unique(patients[trains & (modality == kind)])
        for patient, other in zip(members, rng.permutation(members), strict=True):
            own, theirs = np.flatnonzero(patients == patient), np.flatnonzero(patients == other)
            changed[own] = labels[theirs[np.minimum(np.arange(len(own)), len(theirs) - 1)]]
    return changed


def contrast(folders: list[RunFolder], arm: str, other: str, where: str) -> dict[str, Any]:
    found = compare_runs(folders)["contrasts"]
    return next(row for row in found if (row["arm"], row["other"], row["where"]) == (arm, other, where))


def verdicts(rows: Sequence[dict[str, Any]], *, corrected: bool) -> list[bool]:
    """Whether each difference is above zero: after Holm's correction, or by its own interval."""
    values = [float("nan") if row["p"] is None else row["p"] for row in rows]
    return [
        row["low"] is not None and row["low"] > 0 and (p < 1 - LEVEL or not corrected)
        for row, p in zip(rows, holm(values), strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=ROOT / "configs/plans/demo.yaml")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.plan.read_text(encoding="utf-8"))

    def series(name: str, data: Path = arguments.data, **changes: Any) -> list[RunFolder]:
        found = []
        for seed in SEEDS:
            changed = plan | changes | {"seed": seed, "name": name}
            found.append(simulate(changed, data, arguments.out / f"{name}-{seed}", arguments.jobs))
            if plan["privacy"].get("settings") == "auto":
                plan["privacy"] = found[0].plan.model_dump(mode="json")["privacy"]
        return found

    arms = ["public", "local", "federated", "federated_dp"]
    real = series("claims")
    training, privacy = dict(plan.get("training", {})), dict(plan["privacy"])
    still = privacy | {"learning_rate": NOTHING}
    noisy = privacy | {"noise_multiplier": 100 * privacy["noise_multiplier"]}
    shuffled = permuted(arguments.data, arguments.out / "permuted", real[0].plan.split)
    runs = {
        "": real,
        "noise x 100": series("noisy", arms=["public", "federated_dp"], privacy=noisy),
        "labels permuted": series("permuted-labels", data=shuffled, arms=arms),
        "nothing trained": series(
            "untrained", arms=arms, training=training | {"learning_rate": NOTHING}, privacy=still
        ),
    }
    failures = 0
    for name, folders in runs.items():
        told = [claim for claim in CLAIMS if {claim[0], claim[1]} <= set(folders[0].plan.arms)]
        rows = [contrast(folders, *claim) for claim in told]
        held = verdicts(rows, corrected=name == "")
        for (arm, other, where), row, holds in zip(told, rows, held, strict=True):
            as_expected = holds == (name == "")
            failures += not as_expected
            print(
                f"{name or 'claim':16s} {arm} - {other}, {where:8s} {row['value']:+.3f} "
                f"[{row['low']:+.3f}, {row['high']:+.3f}]  {'holds' if holds else 'fails'}, "
                f"{'as it should' if as_expected else 'NOT AS IT SHOULD'}"
            )
            alone = ALONE.get(arm)
            if name == "" and alone in folders[0].plan.arms:
                beside = contrast(folders, arm, alone, where)
                merit = "the merit of federation" if verdicts([beside], corrected=True)[0] else "not shown"
                print(
                    f"{'':16s} {arm} - {alone}, {where:8s} {beside['value']:+.3f} "
                    f"[{beside['low']:+.3f}, {beside['high']:+.3f}]  {merit}"
                )
    for row in compare_runs(real)["contrasts"]:
        interval = f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        print(f"  {row['arm']} - {row['other']}, {row['where']}: {interval}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
