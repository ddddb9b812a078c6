"""The coordinator's public images in one file: what was written comes back, and no other file does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.preprocess import PREPROCESS_VERSION
from common.public_slices import FORMAT, Slices, load_slices, save_slices

SIDE = 8


def slices() -> Slices:
    labels = np.full((4, len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:, 2] = [1, 0, 0, np.nan]
    return Slices(
        images=np.arange(4 * SIDE * SIDE, dtype=np.int16).reshape(4, SIDE, SIDE),
        modality=np.array([1, 1, 1, 0], np.int8),
        labels=labels,
        patients=np.array([0, 0, 1, 2]),
    )


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path, given = tmp_path / "x.safetensors", slices()
    found = load_slices(path, save_slices(path, given), SIDE)
    assert found.series is None
    for name in ("images", "modality", "labels", "patients"):
        one, other = getattr(found, name), getattr(given, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other, equal_nan=True)


def test_series_come_back(tmp_path: Path) -> None:
    series = np.array([4, 2, 9, 3])
    found = load_slices(tmp_path / "x", save_slices(tmp_path / "x", replace(slices(), series=series)), SIDE)
    assert found.series is not None
    assert np.array_equal(found.series, series)


def test_columns_of_a_version_with_other_artifacts_are_found_by_name(tmp_path: Path) -> None:
    names = [DEFAULT_LABELS[3], DEFAULT_LABELS[1]]
    labels = np.array([[1, 0], [0, 1], [0, 1], [0, 0]], np.float32)
    sha256 = written(tmp_path / "x", labels=labels, artifacts=names)
    found = load_slices(tmp_path / "x", sha256, SIDE).labels
    assert found[:, 3].tolist() == [1, 0, 0, 0]
    assert found[:, 1].tolist() == [0, 1, 1, 0]
    assert np.isnan(np.delete(found, [1, 3], axis=1)).all()


def written(path: Path, **changes: Any) -> str:
    """A file that `save_slices` might have written, but for the changes; its SHA-256."""
    about = {
        "format": FORMAT,
        "preprocess": str(PREPROCESS_VERSION),
        "artifacts": json.dumps(changes.pop("artifacts", DEFAULT_LABELS)),
    } | changes.pop("about", {})
    given = slices()
    arrays = {name: getattr(given, name) for name in ("images", "modality", "labels", "patients")}
    content = safetensors.numpy.save(arrays | changes, metadata=about)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


ONE_PATIENT = np.zeros(4, np.int64)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a model": ({"about": {"format": "none"}}, "not a public set"),
    "another preparation": ({"about": {"preprocess": "0"}}, "prepared images in another way"),
    "an unknown artifact": ({"artifacts": ["zipper", *DEFAULT_LABELS[1:]]}, "'zipper' is unknown"),
    "artifacts that are no list": ({"about": {"artifacts": "7"}}, "not a public set"),
    "floats for images": ({"images": np.zeros((4, SIDE, SIDE), np.float32)}, "`images` is float32"),
    "labels of another length": ({"labels": slices().labels[:3]}, "`labels` is float32 (3, "),
    "an unknown modality": ({"modality": np.full(4, 9, np.int8)}, "`modality` holds unknown codes"),
    "a severity for a label": (
        {"labels": np.full((4, len(DEFAULT_LABELS)), 0.5, np.float32)},
        "other values than",
    ),
    "a series of two patients": ({"series": np.array([1, 1, 1, 2])}, "`series` has one of several patients"),
    "series of another length": ({"series": np.zeros(3, np.int64)}, "`series` is int64 (3,)"),
    "one patient": ({"patients": ONE_PATIENT}, "nothing can be scored"),
}


@pytest.mark.parametrize("case", BAD)
def test_another_file_is_refused_by_its_fault(case: str, tmp_path: Path) -> None:
    changes, words = BAD[case]
    path = tmp_path / "x"
    sha256 = written(path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_slices(path, sha256, SIDE)
    assert caught.value.code == "bad-public-set"
    assert words in caught.value.message


def test_a_file_of_another_hash_size_or_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    sha256 = save_slices(path, slices())
    for where, digest, size, code in (
        (path, "0" * 64, SIDE, "wrong-public-set"),
        (path, sha256, 16, "bad-public-set"),
        (tmp_path / "y", sha256, SIDE, "no-public-set"),
        (tmp_path, sha256, SIDE, "no-public-set"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_slices(where, digest, size)
        assert caught.value.code == code
    path.write_bytes(b"no safetensors")
    with pytest.raises(ConfigError) as caught:
        load_slices(path, hashlib.sha256(b"no safetensors").hexdigest(), SIDE)
    assert caught.value.code == "bad-public-set"
