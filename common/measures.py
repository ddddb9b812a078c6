"""Image-quality metrics of whole scans, as MRIQC writes them: a vector a scan in place of an image.

`measures.json` holds the names of the metrics that a vector has, in its order, and the mean and standard
deviation of each over a public table, from `python -m server.public_model.measures TABLE.tsv NAME`. A site's
values are scaled by these numbers, never by its own, which would be computed from its patients.
Reference: Esteban et al., PLOS ONE 12:e0184661 (2017); the metrics are those of the no-reference group table.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from pydantic import Field

from common.strict import StrictModel

LIMIT = 5.0
"""Standard deviations beyond which a scaled value is cut: a broken scan must not decide a step."""


class Scaling(StrictModel):
    """What is known of each metric from a public table."""

    source: str = Field(min_length=1)  # the table, with its licence
    scans: int = Field(ge=2)
    names: tuple[str, ...] = Field(min_length=1)
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


@functools.cache
def scaling() -> Scaling:
    """The packaged scaling."""
    return Scaling.model_validate_json(Path(__file__).with_name("measures.json").read_bytes())


def scaled(values: np.ndarray) -> np.ndarray:
    """Metrics in public standard deviations from the public mean, float32 within ±`LIMIT`, same shape.

    Args:
        values: (n, metrics), finite, in the order of `scaling().names`.
    """
    known = scaling()
    distance = (values - np.array(known.mean)) / np.array(known.deviation)
    return np.clip(distance, -LIMIT, LIMIT).astype(np.float32)


def public_vectors(count: int, seed: int) -> np.ndarray:
    """Scaled vectors of nobody, float32 (count, metrics): independent normal draws, as scaled ones would be
    if metrics were independent. The coordinator finds its bins on them; they have no label.
    """
    drawn = np.random.default_rng(seed).standard_normal((count, len(scaling().names)))
    return np.clip(drawn, -LIMIT, LIMIT).astype(np.float32)
