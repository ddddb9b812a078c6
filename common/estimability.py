"""Whether an evaluation with noise can tell anything, known before a patient is scored.

From public numbers alone: the nominal number of test patients, the noise of the plan and how many models it
scores. Decided afterwards, from the counts, those results would be reported in which noise happened to look
like a result. The table is of one artifact that 30 % of the patients have, with an AUROC of .85 and scores
that lie where the public ones do: with a rarer artifact, or scores elsewhere, less can be told.
`python benchmarks/estimability.py --write` makes it again.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.arms import ARMS
from common.artifacts import DEFAULT_LABELS
from common.counts import noise_deviation
from common.plan import DEFAULT_SPLIT, RunPlan

TABLE = Path(__file__).parent / "estimability.json"
LIMIT = 0.35
"""An AUROC of .85 that may be off by this much may as well be .5: nothing is told from it."""


@dataclass(frozen=True, kw_only=True)
class Estimability:
    """What a hospital's evaluation with noise could tell."""

    patients: int  # nominal number of test patients
    models: int
    deviation: float  # of the noise on a count
    error: float  # 95 % quantile of |error| of an AUROC

    @property
    def is_so(self) -> bool:
        """Whether an AUROC of .85 could be told from chance."""
        return self.error < LIMIT

    def words(self, epsilon: str) -> str:
        """For a person.

        Args:
            epsilon: of the evaluation, as it is printed.
        """
        models = f"{self.models} model{'' if self.models == 1 else 's'}"
        where = f"at this n and epsilon ({self.patients} test patients by the bucket, {epsilon}, {models})"
        off = f"an AUROC of .85 comes out off by up to {self.error:.2f} in 95 of 100 cases"
        return f"{'' if self.is_so else 'not '}estimable {where}: {off}"


def nominal_tested(
    nominal_patients: int, train: float = DEFAULT_SPLIT[0], test: float = DEFAULT_SPLIT[2]
) -> int:
    """The nominal number of test patients: the public bucket, which stands for those that train, times the
    shares of the split; of a site that never trains, the bucket.
    """
    return round(nominal_patients * test / train) if train > 0 else nominal_patients


def models_scored(plan: RunPlan, training_sites: int = 1) -> int:
    """How many models a run of a plan scores.

    Args:
        training_sites: that train a model each in arms of single sites.
    """
    if plan.evaluate is not None:
        return len(plan.evaluate.models)
    return sum(training_sites if ARMS[arm].owner == "site" else 1 for arm in plan.arms)


def estimability(
    patients: int, noise_multiplier: float, models: int, artifacts: int = len(DEFAULT_LABELS)
) -> Estimability:
    """What an evaluation of a hospital could tell.

    Args:
        patients: nominal number of test patients.
        noise_multiplier: of the plan's evaluation.
        models: how many are scored in one message.
        artifacts: their outputs.
    """
    deviation = noise_deviation(noise_multiplier, models, artifacts)
    return Estimability(
        patients=patients, models=models, deviation=deviation, error=error_95(patients, deviation)
    )


def smallest_estimable(
    noise_multiplier: float, models: int, artifacts: int = len(DEFAULT_LABELS)
) -> int | None:
    """The smallest number of test patients in the table at which something can be told; None: none."""
    sizes = (int(n) for n in _table()[0])
    return next((n for n in sizes if estimability(n, noise_multiplier, models, artifacts).is_so), None)


def error_95(patients: int, deviation: float) -> float:
    """95 % quantile of |error| of an AUROC of .85, between the table's rows and columns in proportion to the
    logarithms; 1 where there are no patients.

    Args:
        deviation: standard deviation of the noise on a count.
    """
    if patients < 1:
        return 1.0
    sizes, deviations, errors = _table()
    at = np.log(np.clip(deviation, deviations[0], deviations[-1]))
    by_size = [float(np.interp(at, np.log(deviations), row)) for row in errors]
    return float(np.interp(np.log(np.clip(patients, sizes[0], sizes[-1])), np.log(sizes), by_size))


@functools.cache
def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    return (
        np.array(found["patients"], float),
        np.array(found["deviations"], float),
        np.array(found["error_95"]),
    )
