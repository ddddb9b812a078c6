"""What do coarse bins take from an AUROC, by how far a site's scores lie off the public ones?

python benchmarks/coarse_bins.py [--quick] [--format json] [--update docs/performance.md]

The bins lie between quantiles of public scores: 480 at exact sites, 20 where a hospital discloses counts, 8
where it adds noise. Scores are drawn from two normal classes of equal variance, the public ones likewise, so
that the AUROC of all pairs is known; `bias` is what the bins show less that, without noise, and `computed`
what `common.counts.coarse_bias` puts into the interval. Shifts are in standard deviations of a class.
"""

from __future__ import annotations

import sys
from statistics import NormalDist
from typing import Any

import numpy as np
from measuring import command_line, environment, reported

from common.counts import (
    BINS,
    CROWDED,
    DISCLOSED_BINS,
    NOISED_BINS,
    Counts,
    auroc,
    quantile_edges,
)

SHIFTS = (-2.0, -1.0, 0.0, 1.0, 2.0)
TRUTHS = (0.7, 0.85, 0.95)
PUBLIC_AUROC, PREVALENCE = 0.9, 0.3


def drawn(patients: int, truth: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores around 0 and labels, (patients, 1) each."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((patients, 1)) < PREVALENCE).astype(float)
    distance = 2**0.5 * NormalDist().inv_cdf(truth)
    return rng.normal(distance * (labels - PREVALENCE)), labels


def measure_all(patients: int) -> dict[str, Any]:
    """A row for each AUROC, number of bins and shift."""
    edges = quantile_edges(drawn(patients, PUBLIC_AUROC, 1)[0])
    rows = []
    for truth in TRUTHS:
        scores, labels = drawn(patients, truth, 2)
        exact = float(auroc(scores, labels)[0])
        for bins in (BINS, DISCLOSED_BINS, NOISED_BINS):
            for shift in SHIFTS:
                counts = Counts.of(scores + shift, labels, edges, bins=bins)
                rows.append(
                    {
                        "auroc": truth,
                        "bins": bins,
                        "shift": shift,
                        "bias": float(counts.auroc()[0]) - exact,
                        "computed": -float(counts.bias()[0]),
                        "crowded": bool(counts.crowded()[0]),
                    }
                )
    return {
        "benchmark": "coarse_bins",
        "environment": environment(("fedqc", "numpy")),
        "patients": patients,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: bias, in brackets what is computed; * where more than a fifth of a class is in one bin."""
    lines = [
        "| AUROC | bins | " + " | ".join(f"{shift:+g} SD" for shift in SHIFTS) + " |",
        "|---" * (2 + len(SHIFTS)) + "|",
    ]
    for start in range(0, len(result["rows"]), len(SHIFTS)):
        rows = result["rows"][start : start + len(SHIFTS)]
        cells = [
            f"{one['bias']:+.3f} ({one['computed']:+.3f}){' *' if one['crowded'] else ''}" for one in rows
        ]
        lines.append(f"| {rows[0]['auroc']:g} | {rows[0]['bins']} | " + " | ".join(cells) + " |")
    env = result["environment"]
    lines += [
        "",
        f"{result['patients']} patients, {PREVALENCE:.0%} with the artifact; public scores of AUROC "
        f"{PUBLIC_AUROC}. In brackets what enters the interval. *: more than {CROWDED:.0%} of a class in one "
        "coarse bin.",
        "",
        f"{env['date']}, fedqc {env['versions']['fedqc']}, numpy {env['versions']['numpy']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="20,000 patients instead of 400,000", usual=1).parse_args()
    return reported(
        "coarse_bins", arguments, lambda: measure_all(20_000 if arguments.quick else 400_000), table
    )


if __name__ == "__main__":
    sys.exit(main())
