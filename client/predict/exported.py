"""Apply a model that `fedqc export` wrote, by ONNX Runtime and without torch."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError
from common.preprocess import to_channels

BATCH = 32
"""Slices: larger batches take memory, and no less time a slice on one core."""
SUFFIX = ".onnx"


def available() -> bool:
    """Whether ONNX Runtime is installed."""
    return find_spec("onnxruntime") is not None


def folder(state: Path | None) -> Path:
    """Where exported models are kept by the SHA-256 of the model: of a site, or of this user."""
    if state is not None:
        return state / "exported"
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "fedqc" / "exported"


@functools.lru_cache(maxsize=4)
def _session(path: Path, changed: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def session(path: Path) -> Any:
    """An ONNX Runtime session of a file, opened once.

    Raises:
        ConfigError: `missing-extra`, ONNX Runtime is not installed; `wrong-model`, it is no such file.
    """
    if not available():
        raise ConfigError(
            f"{path}: ONNX Runtime is not installed", code="missing-extra", hint="pip install 'fedqc[onnx]'"
        )
    try:
        return _session(path, path.stat().st_mtime_ns)
    except Exception as error:  # its exceptions have no common class
        raise ConfigError(f"{path}: not an exported model ({str(error)[:80]})", code="wrong-model") from None


def about(path: Path) -> dict[str, str]:
    """What an exported file says of itself: the metadata of the model's file, and `network`, `image_size`,
    `sha256` (of that file), `precision`, `unlearned` outputs and `largest_difference`.

    Raises:
        ConfigError: as `session`; `wrong-model`, fedqc did not export it.
    """
    found: dict[str, str] = session(path).get_modelmeta().custom_metadata_map
    if not {"network", "image_size", "sha256", "precision", "unlearned"} <= set(found):
        raise ConfigError(
            f"{path}: fedqc did not export it", code="wrong-model", hint="fedqc export writes such a file"
        )
    return dict(found)


def score(path: Path, images: np.ndarray, modality: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Logits of `rows` of slices as cached, float32 (len(rows), A); as `common.learning.score`."""
    run = session(path).run
    parts = []
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        x = to_channels(np.asarray(images[chosen]), modality[chosen], rfft2=np.fft.rfft2)
        (logits,) = run(None, {"x": x})
        parts.append(logits)
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
