"""What does `fedqc report` cost at eight hospitals and eight arms?

    python benchmarks/report_page.py [--quick] [--format json] [--update docs/performance.md]

A run folder with random scores of 4, 8 and 16 hospitals, one held out, and every arm, whose local ones
make one model a hospital. CPU seconds of the whole command, with what it imports, and of the same with all
figures as files; the size of the page.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import command_line, environment, repetitions_of, reported, run, say
from scale_sites import study_of

from common.arms import ARMS, is_private
from common.plan import RunPlan
from server.evaluation.estimates import report_numbers
from server.evaluation_file import SCHEMA, checked
from server.run_folder import EVALUATION, REPORT, RunFolder, without_nan, write_json

SITES = (4, 8, 16)
CLAIM = {
    "unit": "patient",
    "adjacency": "add/remove",
    "epsilon": 2.0,
    "epsilon_pld": 1.9,
    "delta": 1e-5,
    "noise_multiplier": 1.3,
    "refused": None,
}
MANIFEST = {
    "run": "report-page",
    "plan_sha256": "0" * 64,
    "initial_sha256": None,
    "threads": 1,
    "versions": {},
    "sites": [],
}


def folder_of(path: Path, sites: int) -> RunFolder:
    """A finished run on random scores."""
    arms = tuple(ARMS)
    study = study_of(arms, sites)
    public = study_of(arms, sites, seed=1).sites["site-000"].counts
    curve = [{"round": step, "loss": 0.6 - 0.01 * step, "auroc": 0.7 + 0.01 * step} for step in range(21)]
    values = {
        "schema": SCHEMA,
        "run": "report-page",
        "plan": "report-page",
        "question": "",
        "seed": 0,
        "status": "completed",
        "rounds": 20,
        "epochs": 20,
        "arms": list(arms),
        "private_arms": [arm for arm in arms if is_private(arm)],
        "sites": [
            {
                "site": site,
                "kind": "synthetic",
                "role": "held_out" if site in study.held_out else "training",
                "nominal_patients": 50,
                "stand_in": "",
                "version": "0",
            }
            for site in study.sites
        ],
        "privacy": dict.fromkeys(study.training, CLAIM),
        "curves": dict.fromkeys((model for model in study.models if model != "public"), curve),
        "chosen_rounds": {},
        "refusals": [],
        "incomplete": [],
        "public_counts": {model: counts.to_json() for model, counts in public.items()},
        **report_numbers(study, arms),
        "cpu_seconds": 0.0,
        "seconds": 0.0,
    }
    folder = RunFolder.create(
        path, RunPlan(name="report-page", arms=arms, held_out=tuple(study.held_out)), MANIFEST
    )
    write_json(folder.path / EVALUATION, checked(without_nan(values), EVALUATION))
    return folder


def measured(path: Path, sites: int, repetitions: int) -> dict[str, Any]:
    """CPU seconds of the command, the least of all repetitions."""
    folder = folder_of(path / str(sites), sites)
    command = [sys.executable, "-m", "common.cli", "report", str(folder.path)]
    page = [run(command).cpu_s for _ in range(repetitions)]
    figures = [run([*command, "--figures", str(path / "figures")]).cpu_s for _ in range(repetitions)]
    size = (folder.path / REPORT).stat().st_size
    say(f"{sites} hospitals: {min(page):.2f} CPU-s, with figures {min(figures):.2f}")
    return {"sites": sites, "cpu_s": min(page), "figures_cpu_s": min(figures), "bytes": size}


def measure_all(sites: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    with tempfile.TemporaryDirectory() as path:
        return {
            "benchmark": "report_page",
            "environment": environment(("fedqc", "numpy")),
            "repetitions": repetitions,
            "rows": [measured(Path(path), count, repetitions) for count in sites],
        }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a number of hospitals."""
    lines = ["| hospitals | arms | CPU-s | with all figures | page, MB |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['sites']} | {len(ARMS)} | {row['cpu_s']:.1f} | {row['figures_cpu_s']:.1f} "
        f"| {row['bytes'] / 1e6:.1f} |"
        for row in result["rows"]
    ]
    env = result["environment"]
    lines += [
        "",
        f"Least of n = {result['repetitions']}. {env['date']}, {env['cores']} cores, {env['machine']}, "
        f"Python {env['python']}, fedqc {env['versions']['fedqc']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="8 hospitals alone", usual=3).parse_args()
    sites = SITES[1:2] if arguments.quick else SITES
    return reported("report_page", arguments, lambda: measure_all(sites, repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
