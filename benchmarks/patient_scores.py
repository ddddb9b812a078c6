"""Which score of a patient, from the scores of slices, does not depend on how many slices there are?

python benchmarks/patient_scores.py [--quick] [--format json] [--update docs/performance.md]

maximum        over all slices
mean           over all slices
expected k     the expected maximum of k slices drawn without replacement (`common.counts.patient_scores`,
               which takes k = 3)
spread 10      the maximum of the middles of ten equal parts of the series

`lengths`: patients with more slices against others with fewer, in whom nothing is to be seen; what is not at
.5 is told by length alone. `seen`: an artifact in one slice, or in a fifth of them, of series of one length.
Slice scores are normal; `alike` is the share of their variance that the slices of a patient have in common.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
from measuring import command_line, environment, reported

from common import counts

LENGTHS = ((40, 20), (60, 10), (10, 3), (10, 2), (3, 2))
SEEN = ((3, 1), (20, 1), (20, 4), (60, 1), (60, 12))
STRENGTH = 4.0
ALIKE = 0.3


def expected(k: int) -> Callable[[np.ndarray], np.ndarray]:
    """The product's score with another k."""

    def scores(slices: np.ndarray) -> np.ndarray:
        owners = np.repeat(np.arange(len(slices)), slices.shape[1])
        flat = slices.reshape(-1, 1)
        with patch.object(counts, "SLICES_OF_A_SCORE", k):
            return counts.patient_scores(flat, np.zeros_like(flat), owners)[:, 0]

    return scores


def spread(slices: np.ndarray) -> np.ndarray:
    number = slices.shape[1]
    kept = np.unique((2 * np.arange(10) + 1) * number // 20)
    return np.asarray(slices[:, kept].max(axis=1))


SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "maximum": lambda slices: slices.max(axis=1),
    "mean": lambda slices: slices.mean(axis=1),
    "expected 2": expected(2),
    "expected 3": expected(3),
    "expected 5": expected(5),
    "expected 8": expected(8),
    "spread 10": spread,
}


def measure_all(patients: int) -> dict[str, Any]:
    """AUROC of every score in every case."""
    rng = np.random.default_rng(0)

    def drawn(number: int) -> np.ndarray:
        common = rng.normal(size=(patients, 1)) * ALIKE**0.5
        return common + rng.normal(size=(patients, number)) * (1 - ALIKE) ** 0.5

    cases: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for one, other in LENGTHS:
        cases[f"{one} / {other}"] = drawn(one), drawn(other)
    for number, ill in SEEN:
        positive, start = drawn(number), rng.integers(0, number - ill + 1, patients)
        for place in range(ill):
            positive[np.arange(patients), start + place] += STRENGTH
        cases[f"{ill} of {number}"] = positive, drawn(number)
    truth = np.repeat([1.0, 0.0], patients)[:, None]
    return {
        "benchmark": "patient_scores",
        "environment": environment(("fedqc", "numpy")),
        "patients": patients,
        "cases": list(cases),
        "scores": {
            name: [
                float(counts.auroc(np.concatenate([score(one), score(other)])[:, None], truth)[0])
                for one, other in cases.values()
            ]
            for name, score in SCORES.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: a row a score."""
    lines = ["| | " + " | ".join(result["cases"]) + " |", "|---" * (1 + len(result["cases"])) + "|"]
    for name, values in result["scores"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    env = result["environment"]
    lines += [
        "",
        f"AUROC of {result['patients']} against as many patients. First columns: more slices against fewer, "
        "nothing to see. Last: the artifact in so many slices of so many, "
        f"{STRENGTH:g} deviations of a slice higher. {ALIKE:.0%} of the variance is common to a patient.",
        "",
        f"{env['date']}, fedqc {env['versions']['fedqc']}, numpy {env['versions']['numpy']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    arguments = command_line(__doc__, quick="2,000 patients instead of 20,000", usual=1).parse_args()
    return reported(
        "patient_scores", arguments, lambda: measure_all(2_000 if arguments.quick else 20_000), table
    )


if __name__ == "__main__":
    sys.exit(main())
