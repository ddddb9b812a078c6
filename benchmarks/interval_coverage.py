"""How often do the intervals of a report hold the true AUROC, where few patients have the artifact?

    python benchmarks/interval_coverage.py [--repetitions DRAWS] [--format json]
                                           [--update docs/performance.md]

Binormal scores of two models with a true AUROC of 0.85 and correlated mistakes; 10, 25 or 200 patients, of
whom exactly 1 to 5 have each artifact. `report`: the interval of the report, on the logit scale and with a
variance that is raised where a class has few patients. Beside it what it replaces: DeLong's variance with
Wald's interval on the logit scale and on that of AUROC. Scores are of one artifact and the macro score of all
five, whose labels are independent; the difference is of the two models, on one artifact. With one patient
there is no score, and the AUROC of the artifact alone has Newcombe's interval.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
from measuring import command_line, environment, repetitions_of, reported, say

from common.artifacts import DEFAULT_LABELS
from common.counts import Counts, auroc_covariance
from server.evaluation.estimates import Score, SiteScores, Study
from server.evaluation.inference import Z

TRUTH = 0.85
PATIENTS, POSITIVES = (10, 25, 200), (1, 2, 3, 4, 5)
MODELS = ("federated", "public")


def site(rng: np.random.Generator, patients: int, positives: int) -> SiteScores:
    """A site whose models have a true AUROC of `TRUTH` for each artifact."""
    shape = (patients, len(DEFAULT_LABELS))
    labels = np.argsort(np.argsort(rng.random(shape), axis=0), axis=0) < positives
    distance = math.sqrt(2) * NormalDist().inv_cdf(TRUTH)
    shared = rng.normal(0, math.sqrt(0.5), shape) + distance * labels
    logits = [shared + rng.normal(0, math.sqrt(0.5), shape) for _ in MODELS]
    counts = [Counts.of(scores, labels.astype(float)) for scores in logits]
    covariance = auroc_covariance(logits, labels.astype(float))
    return SiteScores(counts=dict(zip(MODELS, counts, strict=True)), covariance=covariance)


def as_sent(scores: SiteScores, artifacts: Sequence[int], score: Score) -> Score:
    """The same score of the first model with the variance that the site sent."""
    variance = scores.covariance[np.ix_(artifacts, artifacts)].sum() / len(artifacts) ** 2
    return replace(score, standard_error=math.sqrt(variance))


def holds(score: Score) -> bool:
    said = score.to_json()
    return said["low"] <= TRUTH <= said["high"]


def cell(patients: int, positives: int, draws: int) -> dict[str, Any]:
    """Coverage of each interval over `draws` sites."""
    rng = np.random.default_rng([patients, positives])
    hits: Counter[str] = Counter()
    for _ in range(draws):
        scores = site(rng, patients, positives)
        if positives == 1:
            low, high = scores.counts[MODELS[0]].interval()
            hits["newcombe"] += bool(low[0] <= TRUTH <= high[0])
            continue
        study = Study(sites={"a": scores}, training=["a"], held_out=[], models=MODELS)
        for name, artifacts in (("one", [0]), ("macro", list(range(len(DEFAULT_LABELS))))):
            score = study.combine({("a", MODELS[0]): 1.0}, artifacts)
            sent = as_sent(scores, artifacts, score)
            hits[f"{name}_report"] += holds(score)
            hits[f"{name}_logit"] += holds(sent)
            hits[f"{name}_wald"] += abs(sent.value - TRUTH) <= Z * sent.standard_error
        less = study.combine({("a", MODELS[0]): 1.0, ("a", MODELS[1]): -1.0}, [0])
        hits["difference"] += abs(less.value) <= Z * less.standard_error
    say(f"{patients} patients, {positives} positive: {dict(hits)} of {draws}")
    return {"patients": patients, "positives": positives} | {key: n / draws for key, n in hits.items()}


def measure_all(draws: int) -> dict[str, Any]:
    """Everything that is printed, as JSON would have it."""
    started_with = environment(("fedqc", "numpy", "scipy"))
    cells = [cell(patients, positives, draws) for patients in PATIENTS for positives in POSITIVES]
    return {"benchmark": "interval_coverage", "environment": started_with, "draws": draws, "cells": cells}


def table(result: dict[str, Any]) -> str:
    """Markdown: coverage in percent, a row a number of patients and of those with the artifact."""
    lines = [
        "| patients | with it | one artifact: report | logit, DeLong | Wald, DeLong | macro: report "
        "| logit, DeLong | Wald, DeLong | difference | Newcombe |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("one_report", "one_logit", "one_wald", "macro_report", "macro_logit", "macro_wald")
    columns = (*columns, "difference", "newcombe")
    for row in result["cells"]:
        shown = " | ".join(f"{100 * row[key]:.1f}" if key in row else "–" for key in columns)
        lines.append(f"| {row['patients']} | {row['positives']} | {shown} |")
    draws, env = result["draws"], result["environment"]
    versions = ", ".join(f"{package} {number}" for package, number in env["versions"].items())
    lines += [
        "",
        f"Percent of {draws} draws; Monte-Carlo standard error {100 * math.sqrt(0.95 * 0.05 / draws):.1f} at "
        f"95, {100 * math.sqrt(0.7 * 0.3 / draws):.1f} at 70. {env['date']}, Python {env['python']}, "
        f"{versions}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="", usual=1000).parse_args()
    return reported("interval_coverage", arguments, lambda: measure_all(repetitions_of(arguments)), table)


if __name__ == "__main__":
    sys.exit(main())
