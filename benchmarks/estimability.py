"""How far off is an AUROC or a sensitivity that a hospital sends with noise, by patients and epsilon?

python benchmarks/estimability.py [--quick] [--format json] [--update docs/performance.md] [--write]

Scores of one artifact are drawn from two normal classes of equal variance (AUROC .85), and counted in the 8
bins of an evaluation with noise. The edges are quantiles of public scores; the site's are alike, or lie off
by a shift (in standard deviations of a class). Each count gets Gaussian noise. AUROC and sensitivity (above
the edge with the sensitivity nearest .80) are computed from the noised counts and clipped to 0..1; where a
class seems to have no patient, nothing is estimable. Printed: the 95 % quantile of |error|, over the draws
that give a number.

`--write` makes common/estimability.json again, by which it is decided before anybody is asked whether a
hospital can be scored (common/estimability.py): the same quantile by patients and standard deviation of the
noise on a count, a draw without a number counting as an error of 1.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from measuring import command_line, environment, reported

from common.counts import NOISED_BINS
from common.privacy import gdp_max_mu

TRUTH, SENSITIVITY, PREVALENCE, DELTA = 0.85, 0.80, 0.3, 1e-5
PATIENTS, EPSILONS, ARTIFACTS = (50, 100, 200, 500, 1000), (0.5, 1.0, 2.0), 3
GRID_PATIENTS = (10, 20, 35, 50, 70, 100, 140, 200, 350, 500, 1000, 2000, 5000, 10000)
GRID_DEVIATIONS = tuple(float(2 ** (power / 2)) for power in range(-4, 20))
"""Standard deviations of the noise on a count, 0.25 to 724."""
TARGET = Path(__file__).parent.parent / "common" / "estimability.json"
NORMAL = NormalDist()


def bins_of(shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of patients with and without the artifact in each bin."""
    distance = math.sqrt(2) * NORMAL.inv_cdf(TRUTH)
    grid = np.linspace(-10, 10, 40001)
    cdf = np.array([PREVALENCE * NORMAL.cdf(x - distance) + (1 - PREVALENCE) * NORMAL.cdf(x) for x in grid])
    edges = np.interp(np.arange(1, NOISED_BINS) / NOISED_BINS, cdf, grid)
    return tuple(
        np.diff([0.0, *(NORMAL.cdf(edge - shift - at) for edge in edges), 1.0]) for at in (distance, 0.0)
    )  # type: ignore[return-value]


def errors(
    patients: int, deviation: float, draws: int, *, shift: float = 0.0, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """|error| of AUROC and sensitivity in each draw; nan where a class seems to have no patient."""
    rng = np.random.default_rng([seed, patients, round(1000 * deviation), round(10 * shift)])
    with_it = max(1, round(PREVALENCE * patients))
    shares, others = bins_of(shift)
    size = (draws, NOISED_BINS)
    pos = rng.multinomial(with_it, shares, draws) + np.rint(rng.normal(0, deviation, size))
    neg = rng.multinomial(patients - with_it, others, draws) + np.rint(rng.normal(0, deviation, size))
    places = np.arange(NOISED_BINS)
    ranks = 0.5 * (1 + np.sign(places[:, None] - places[None, :]))
    m, n = pos.sum(1), neg.sum(1)
    above = np.cumsum(shares[::-1])[::-1]
    cut = int(np.argmin(np.abs(above - SENSITIVITY)))
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = np.clip(np.einsum("di,ij,dj->d", pos, ranks, neg) / (m * n), 0, 1)
        sensitivity = np.clip(pos[:, cut:].sum(1) / m, 0, 1)
    return (
        np.where((m > 0) & (n > 0), np.abs(auroc - TRUTH), np.nan),
        np.where(m > 0, np.abs(sensitivity - above[cut]), np.nan),
    )


def deviation_of(epsilon: float, models: int, artifacts: int) -> float:
    """Standard deviation of the noise on a count where the whole epsilon is for the evaluation."""
    return math.sqrt(models * artifacts) / gdp_max_mu(epsilon, DELTA)


def measure_all(draws: int) -> dict[str, Any]:
    """The 95 % quantiles by patients, epsilon, models and shift."""
    rows = []
    for models, shift in ((1, 0.0), (1, 1.0), (1, 2.0), (5, 0.0)):
        for patients in PATIENTS:
            for epsilon in EPSILONS:
                found = errors(patients, deviation_of(epsilon, models, ARTIFACTS), draws, shift=shift)
                auroc, sensitivity = (float(np.nanquantile(one, 0.95)) for one in found)
                rows.append(
                    {
                        "models": models,
                        "shift": shift,
                        "patients": patients,
                        "epsilon": epsilon,
                        "auroc": auroc,
                        "sensitivity": sensitivity,
                        "no_number": float(np.isnan(found[0]).mean()),
                    }
                )
    return {
        "benchmark": "estimability",
        "environment": environment(("fedqc", "numpy")),
        "draws": draws,
        "sensitivity": float(np.cumsum(bins_of(0.0)[0][::-1])[::-1][_cut()]),
        "rows": rows,
    }


def _cut() -> int:
    above = np.cumsum(bins_of(0.0)[0][::-1])[::-1]
    return int(np.argmin(np.abs(above - SENSITIVITY)))


def packaged(draws: int) -> dict[str, Any]:
    """What common/estimability.json holds."""
    quantiles = [
        [
            round(float(np.quantile(np.nan_to_num(errors(patients, deviation, draws)[0], nan=1.0), 0.95)), 4)
            for deviation in GRID_DEVIATIONS
        ]
        for patients in GRID_PATIENTS
    ]
    return {
        "made_by": "python benchmarks/estimability.py --write",
        "auroc": TRUTH,
        "prevalence": PREVALENCE,
        "bins": NOISED_BINS,
        "draws": draws,
        "patients": GRID_PATIENTS,
        "deviations": GRID_DEVIATIONS,
        "error_95": quantiles,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: |error| of AUROC / sensitivity."""
    lines = [
        "| models, shift | n | " + " | ".join(f"ε {epsilon:g}" for epsilon in EPSILONS) + " |",
        "|---" * (2 + len(EPSILONS)) + "|",
    ]
    for start in range(0, len(result["rows"]), len(EPSILONS)):
        rows = result["rows"][start : start + len(EPSILONS)]
        cells = [f"{one['auroc']:.2f} / {one['sensitivity']:.2f}" for one in rows]
        first = rows[0]
        lines.append(
            f"| {first['models']}, {first['shift']:g} SD | {first['patients']} | {' | '.join(cells)} |"
        )
    env = result["environment"]
    lines += [
        "",
        f"95 % quantile of |error| of AUROC / sensitivity, {result['draws']} draws; truth {TRUTH} / "
        f"{result['sensitivity']:.2f}, {PREVALENCE:.0%} of n test patients with the artifact, {ARTIFACTS} "
        f"artifacts, {NOISED_BINS} bins, δ {DELTA:g}, all of ε for the evaluation.",
        "",
        f"{env['date']}, fedqc {env['versions']['fedqc']}, numpy {env['versions']['numpy']}.",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = command_line(__doc__, quick="2,000 draws instead of 40,000", usual=1)
    parser.add_argument("--write", action="store_true", help="make common/estimability.json again")
    arguments = parser.parse_args()
    draws = 2_000 if arguments.quick else 40_000
    if arguments.write:
        TARGET.write_text(json.dumps(packaged(draws), indent=1) + "\n", encoding="utf-8")
        print(TARGET)
        return 0
    return reported("estimability", arguments, lambda: measure_all(draws), table)


if __name__ == "__main__":
    sys.exit(main())
