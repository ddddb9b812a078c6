"""Whether two runs made the same models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.helpers.consortium import TRAINING

NOT_PRIVATE = (*(f"local/{site}" for site in TRAINING), "federated", "pooled")


def assert_same_models(first: Path, second: Path, names: tuple[str, ...] = NOT_PRIVATE) -> None:
    for name in names:
        mine, theirs = (
            safetensors.numpy.load_file(run / "arms" / name / "model.safetensors") for run in (first, second)
        )
        assert mine.keys() == theirs.keys()
        for tensor, value in mine.items():
            assert np.array_equal(value, theirs[tensor]), f"{name}: {tensor}"
