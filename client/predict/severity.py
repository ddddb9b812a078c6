"""How severe an artifact is that a model calls present: a rising map of the logit that says so.

Severity is 0 to 1: what a simulator was asked for, or what a reader wrote into the label sheet. The map is an
isotonic regression (Barlow and Brunk, JASA 67:140, 1972) on slices that show the artifact, linear between its
points. It is found from public phantoms, for fedqc's public start from views of people (a packaged file), or
from this site's own labelled training patients where their sheet has severities; so nothing new is trained at
a hospital, and nothing new leaves one. A head of its own, trained on severities, is no better
(benchmarks/severity.py).

The figures of a map are those on people whom it was not fitted on. A map gives grades only if it is clearly
better than saying the same of all: its error than that of the mean, its grades than the most common one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.public_slices import Slices

Grade = Literal["mild", "moderate", "severe"]
GRADES: tuple[Grade, ...] = ("mild", "moderate", "severe")
"""Thirds of severity. At 1/3 an artifact of the simulators is just visible (common/physics)."""
LEAST_SLICES, LEAST_PEOPLE = 40, 10
"""With known severity, below which nothing is fitted."""
FOLDS = 10
CLEARLY = 2.0
"""Standard errors, over people, by which a map must be better than saying the same of all."""
PACKAGED = Path(__file__).with_name("severity_small_cnn_real.json")
PACKAGED_SHA256 = "bfc1b09685adc246afd0f77274a2b0f00b9163d50e837fcc144ac3de7436439c"


@dataclass(frozen=True, kw_only=True)
class SeverityMap:
    """Of one artifact and model."""

    origin: Literal["people", "phantoms", "site"]
    logits: tuple[float, ...]  # rising
    severities: tuple[float, ...]  # of these, not falling
    slices: int  # it was fitted on
    people: int
    error: float  # mean absolute one, at people whom it was not fitted on
    mean_error: float  # there, of always saying the mean
    right: float  # share of grades that are right there
    usual_right: float  # there, of always saying the grade that is the most common there
    grades: bool  # False: not clearly better than saying the same of all

    def severity(self, logit: float) -> float | None:
        """0 to 1; None where it is not known."""
        if not self.grades or not math.isfinite(logit):
            return None
        return float(np.interp(logit, self.logits, self.severities))


def grade_of(severity: float) -> Grade:
    """The third that a severity, 0 to 1, lies in."""
    return GRADES[int(_thirds(np.array(severity)))]


def _thirds(severities: np.ndarray) -> np.ndarray:
    """Positions in `GRADES`."""
    return np.minimum((severities * len(GRADES)).astype(np.int64), len(GRADES) - 1)


def rising(logits: np.ndarray, severities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of the isotonic regression of severities (n,) on logits (n,): where a step begins or ends.

    Returns:
        logits, rising, and severities, not falling; shapes (m,), m >= 1.
    """
    from scipy.optimize import isotonic_regression  # a fifth of a second

    x, of = np.unique(np.asarray(logits, np.float64), return_inverse=True)
    weights = np.bincount(of).astype(np.float64)
    y = isotonic_regression(np.bincount(of, severities) / weights, weights=weights).x
    inside = np.zeros(len(x), bool)
    inside[1:-1] = (y[1:-1] == y[:-2]) & (y[1:-1] == y[2:])
    return x[~inside], y[~inside]


def severity_map(
    logits: np.ndarray,
    severities: np.ndarray,
    people: np.ndarray,
    origin: Literal["people", "phantoms", "site"],
) -> SeverityMap | None:
    """The map of one artifact, and its error at people left out; None where too few severities are known.

    Args:
        logits, severities: shape (n,); nan: the slice does not show the artifact, or nobody knows how
            severely.
        people: (n,), whose slice each is.
    """
    known = np.isfinite(logits) & np.isfinite(severities)
    x, y = logits[known].astype(np.float64), severities[known].astype(np.float64)
    _, person = np.unique(people[known], return_inverse=True)
    count = int(person.max(initial=-1)) + 1
    if len(x) < LEAST_SLICES or count < LEAST_PEOPLE:
        return None
    fold = np.random.default_rng(0).permutation(count)[person] % FOLDS
    said, mean = np.empty(len(x)), np.empty(len(x))
    for one in range(FOLDS):
        out = fold == one
        said[out] = np.interp(x[out], *rising(x[~out], y[~out]))
        mean[out] = y[~out].mean()
    errors, mean_errors = np.abs(said - y), np.abs(mean - y)
    truth = _thirds(y)
    right, usual_right = _thirds(said) == truth, truth == np.bincount(truth).argmax()
    gains = (mean_errors - errors, right.astype(float) - usual_right)
    at, values = rising(x, y)
    return SeverityMap(
        origin=origin,
        logits=tuple(at.tolist()),
        severities=tuple(values.tolist()),
        slices=len(x),
        people=count,
        error=float(errors.mean()),
        mean_error=float(mean_errors.mean()),
        right=float(right.mean()),
        usual_right=float(usual_right.mean()),
        grades=all(_is_clear(gain, person) for gain in gains),
    )


def _is_clear(gain: np.ndarray, person: np.ndarray) -> bool:
    """Whether the mean of gains (n,) is above 0 by `CLEARLY` standard errors, slices of a person alike."""
    spread = np.bincount(person, gain - gain.mean())
    return bool(gain.mean() > CLEARLY * np.sqrt((spread**2).sum()) / len(gain))


def severity_maps(
    logits: np.ndarray,
    slices: Slices,
    origin: Literal["people", "phantoms", "site"],
    artifacts: Sequence[str] = DEFAULT_LABELS,
) -> dict[str, SeverityMap]:
    """Artifact -> map, of those whose severity is known often enough.

    Args:
        logits: of the slices, shape (n, A).
        artifacts: the names of the columns, A.
    """
    if slices.severities is None:
        return {}
    shown = np.where(slices.labels > 0, slices.severities, np.nan)
    maps = {
        name: severity_map(logits[:, place], shown[:, place], slices.patients, origin)
        for place, name in enumerate(artifacts)
    }
    return {name: one for name, one in maps.items() if one is not None}


def maps_from(values: Mapping[str, Mapping[str, Any]]) -> dict[str, SeverityMap]:
    """Artifact -> map, as JSON holds them; raises TypeError or KeyError where they are none."""
    return {
        name: SeverityMap(**{**one, "logits": tuple(one["logits"]), "severities": tuple(one["severities"])})
        for name, one in values.items()
    }


@functools.cache
def packaged_maps(model_sha256: str) -> dict[str, SeverityMap]:
    """The maps that fedqc brings for this model file; none where it brings none.

    Raises:
        ConfigError: the packaged file is damaged (`damaged-installation`).
    """
    content = PACKAGED.read_bytes()
    if hashlib.sha256(content).hexdigest() != PACKAGED_SHA256:
        raise ConfigError(
            f"{PACKAGED.name}: not the file that this version of fedqc brings",
            code="damaged-installation",
            hint="install fedqc again",
        )
    value = json.loads(content)
    return maps_from(value["maps"]) if value["model_sha256"] == model_sha256 else {}
