"""The coordinator's public images in one file: slices as a cache holds them, labels, whose slice each is.

    images    int16 (n, S, S)       see common/preprocess.py
    modality  int8 (n,)             position in MODALITIES
    labels    float32 (n, A)        1, 0, or nan = not assessed; columns as `artifacts` in the metadata
    patients  int64 (n,)            any numbers; equal ones are one patient
    series    int64 (n,)            likewise, of one patient and modality, its slices in their order; files of
                                    earlier versions have none

`fedqc data prepare SITE --public-set FILE` writes it from a site of public images; a plan names it by path
and hash. The coordinator so measures on real images without reading DICOM.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors
import safetensors.numpy

from common.artifacts import MODALITIES, NAMES
from common.counts import patient_labels
from common.errors import ConfigError
from common.files import write_bytes
from common.preprocess import PREPROCESS_VERSION

FORMAT = "fedqc public set 1"


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Preprocessed slices in memory, as a site's cache holds them."""

    images: np.ndarray  # int16 (n, S, S)
    modality: np.ndarray  # int8 (n,)
    labels: np.ndarray  # float32 (n, A), nan where not applicable
    patients: np.ndarray  # int64 (n,)
    # int64 (n,), of one patient and modality each, in the order of their slices; None where nothing is known
    series: np.ndarray | None = None
    # float32 (n, A), 0 to 1, nan where absent or not known; None: nowhere known. In memory alone, in no file
    severities: np.ndarray | None = None


def save_slices(path: Path, slices: Slices) -> str:
    """Write slices as one file; gives its SHA-256."""
    about = {"format": FORMAT, "preprocess": str(PREPROCESS_VERSION), "artifacts": json.dumps(NAMES)}
    tensors: dict[str, np.ndarray] = {
        "images": np.ascontiguousarray(slices.images, np.int16),
        "modality": np.ascontiguousarray(slices.modality, np.int8),
        "labels": np.ascontiguousarray(slices.labels, np.float32),
        "patients": np.ascontiguousarray(slices.patients, np.int64),
    }
    if slices.series is not None:
        tensors["series"] = np.ascontiguousarray(slices.series, np.int64)
    content = safetensors.numpy.save(tensors, metadata=about)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def load_slices(path: Path, sha256: str, size: int) -> Slices:
    """Read what `save_slices` wrote.

    Args:
        size: side of the slices in pixels that is expected.
    Raises:
        ConfigError: there is no such file (`no-public-set`); its hash is another (`wrong-public-set`); it is
            no such file, of another size or version, or no artifact is present in some of its patients and
            absent in others (`bad-public-set`).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"public_set.file = {str(path)!r}: cannot be read ({error.strerror})",
            code="no-public-set",
            hint="fedqc data prepare SITE --public-set FILE writes it; a plan names its absolute path",
        ) from None
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ConfigError(
            f"public_set.file = {str(path)!r} has sha256 {found}, the plan says {sha256}",
            code="wrong-public-set",
        )
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = file.metadata() or {}
        arrays = safetensors.numpy.load(content)
        names = json.loads(about.get("artifacts", "null"))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        _refuse(path, f"not a public set ({error})")
    if about.get("format") != FORMAT or not isinstance(names, list):
        _refuse(path, "not a public set")
    if about.get("preprocess") != str(PREPROCESS_VERSION):
        _refuse(path, "made by a version that prepared images in another way")
    if unknown := [name for name in names if name not in NAMES]:
        _refuse(path, f"the artifact {unknown[0]!r} is unknown")
    _check(path, arrays, len(names), size)
    labels = np.full((len(arrays["labels"]), len(NAMES)), np.nan, np.float32)
    labels[:, [NAMES.index(name) for name in names]] = arrays["labels"]
    slices = Slices(
        images=arrays["images"],
        modality=arrays["modality"],
        labels=labels,
        patients=arrays["patients"],
        series=arrays.get("series"),
    )
    truth = patient_labels(labels, slices.patients)
    if not ((truth == 1).any(axis=0) & (truth == 0).any(axis=0)).any():
        _refuse(
            path, "no artifact is present in some patients and absent in others, so nothing can be scored"
        )
    return slices


def _check(path: Path, arrays: dict[str, np.ndarray], artifacts: int, size: int) -> None:
    count = len(arrays.get("images", ()))
    expected = {
        "images": (np.int16, (count, size, size)),
        "modality": (np.int8, (count,)),
        "labels": (np.float32, (count, artifacts)),
        "patients": (np.int64, (count,)),
    } | ({"series": (np.int64, (count,))} if "series" in arrays else {})
    for name, (dtype, shape) in expected.items():
        array = arrays.get(name)
        if array is None or array.dtype != dtype or array.shape != shape:
            have = "missing" if array is None else f"{array.dtype} {array.shape}"
            _refuse(path, f"`{name}` is {have}, expected {np.dtype(dtype)} {shape}")
    if not np.isin(arrays["modality"], range(len(MODALITIES))).all():
        _refuse(path, "`modality` holds unknown codes")
    if "series" in arrays:
        series, owners = arrays["series"], np.column_stack([arrays["patients"], arrays["modality"]])
        if len(np.unique(np.column_stack([series, owners]), axis=0)) > len(np.unique(series)):
            _refuse(path, "`series` has one of several patients or modalities")
    labels = arrays["labels"]
    if not (np.isnan(labels) | (labels == 0) | (labels == 1)).all():
        _refuse(path, "`labels` holds other values than 1, 0 and nan")


def _refuse(path: Path, what: str) -> NoReturn:
    raise ConfigError(
        f"public_set.file = {str(path)!r}: {what}",
        code="bad-public-set",
        hint="write it again: fedqc data prepare SITE --public-set FILE [--plan PLAN]",
    )
