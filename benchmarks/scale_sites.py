"""What does the evaluation of a run cost as the number of hospitals grows?

    python benchmarks/scale_sites.py [--quick] [--format json] [--update docs/performance.md]

At 4, 16, 64 and 256 sites with random scores, one of them held out, three shared models (`public`,
`federated`, `federated_dp`) are evaluated: CPU seconds of `report_numbers`, and how often it computes the
AUROCs of a model at a site; models x sites would be enough. A second table has every arm at few sites, whose
local arms make one model a site, and the page.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
from measuring import command_line, environment, repetitions_of, reported, say

from common.arms import ARMS, FEDERATED, FEDERATED_DP, LOCAL, PUBLIC
from common.artifacts import DEFAULT_LABELS, can_occur
from common.counts import Counts, auroc_covariance
from server.evaluation.estimates import SiteScores, Study, report_numbers

SHARED = (PUBLIC, FEDERATED, FEDERATED_DP)
SITES = (4, 16, 64, 256)
PATIENTS = 60


def study_of(arms: Sequence[str], sites: int, seed: int = 0) -> Study:
    """Random patients at each site, half CT and half MR, and one site held out.

    Args:
        arms: a local arm makes one model a training site.
    """
    names = [f"site-{number:03d}" for number in range(sites)]
    models = [
        model
        for arm in arms
        for model in ([f"{arm}/{site}" for site in names[:-1]] if arm.startswith(LOCAL) else [arm])
    ]
    rng = np.random.default_rng(seed)
    return Study(
        sites={name: _site(rng, models) for name in names},
        training=names[:-1],
        held_out=names[-1:],
        models=models,
    )


def _site(rng: np.random.Generator, models: Sequence[str]) -> SiteScores:
    labels = (rng.random((PATIENTS, len(DEFAULT_LABELS))) < 0.4).astype(float)
    is_ct = np.arange(PATIENTS) % 2 == 0
    for number, artifact in enumerate(DEFAULT_LABELS):
        labels[is_ct != can_occur(artifact, "CT"), number] = np.nan
    shared = np.nan_to_num(labels) + rng.normal(0, 0.9, labels.shape)
    logits = [shared + rng.normal(0, 0.5, labels.shape) for _ in models]
    counts = {model: Counts.of(scores, labels) for model, scores in zip(models, logits, strict=True)}
    return SiteScores(counts=counts, covariance=auroc_covariance(logits, labels))


def measured(arms: Sequence[str], sites: int, repetitions: int) -> dict[str, Any]:
    """CPU seconds of `report_numbers`, the least of all repetitions, and calls of `Counts.auroc`."""
    study = study_of(arms, sites)
    seconds = []
    for _ in range(repetitions):
        fresh = Study(
            sites=study.sites, training=study.training, held_out=study.held_out, models=study.models
        )
        began = time.process_time()
        report_numbers(fresh, arms)
        seconds.append(time.process_time() - began)
    with mock.patch.object(Counts, "auroc", autospec=True, side_effect=Counts.auroc) as spied:
        report_numbers(fresh_of(study), arms)
    say(f"{sites} sites, {len(study.models)} models: {min(seconds):.2f} CPU-s")
    return {
        "sites": sites,
        "models": len(study.models),
        "cells": sites * len(study.models),
        "cpu_s": min(seconds),
        "auroc_calls": spied.call_count,
    }


def fresh_of(study: Study) -> Study:
    """The same study, with nothing computed yet."""
    return Study(sites=study.sites, training=study.training, held_out=study.held_out, models=study.models)


def measure_all(sites: Sequence[int], few: int, repetitions: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "numpy"))
    return {
        "benchmark": "scale_sites",
        "environment": started_with,
        "repetitions": repetitions,
        "shared": [measured(SHARED, count, repetitions) for count in sites],
        "every_arm": measured(tuple(ARMS), few, repetitions),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a number of sites."""
    lines = [
        "| sites | models | models × sites | AUROCs computed | CPU-s | CPU-ms a model and site |",
        "|---|---|---|---|---|---|",
    ]
    for row in [*result["shared"], result["every_arm"]]:
        per_cell = f"{1000 * row['cpu_s'] / row['cells']:.2f}"
        lines.append(
            f"| {row['sites']} | {row['models']} | {row['cells']} | {row['auroc_calls']} "
            f"| {row['cpu_s']:.2f} | {per_cell} |"
        )
    env = result["environment"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"Least of n = {result['repetitions']}; the last row has every arm. {env['date']}, "
        f"{env['cores']} cores, "
        f"{env['machine']}, Python {env['python']}, {versions}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="up to 64 sites", usual=3).parse_args()
    sites = SITES[:3] if arguments.quick else SITES
    return reported("scale_sites", arguments, lambda: measure_all(sites, 8, repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
