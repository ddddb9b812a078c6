"""Read and write models: named float32 tensors as safetensors, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from common.arms import HEAD, is_private
from common.artifacts import DEFAULT_LABELS, NAMES
from common.errors import ConfigError
from common.files import write_bytes
from common.plan import RunPlan
from common.weights import Manifest


def described(plan: RunPlan, arm: str) -> dict[str, str]:
    """What the file of a run's model says so that it can be used without the plan: network, side of its
    slices in pixels, its outputs where they are not `DEFAULT_LABELS` and, of a private arm, the epsilon and
    delta that its plan asks for.
    """
    said = {
        "network": json.dumps({"name": plan.model.name, "args": dict(plan.model.args)}, sort_keys=True),
        "image_size": str(plan.image_size),
    }
    if plan.model.labels != DEFAULT_LABELS:
        said |= labels_said(plan.model.labels)
    if is_private(arm.partition("/")[0]):
        said |= {"epsilon": repr(plan.privacy.epsilon), "delta": repr(plan.privacy.delta)}
    return said


def labels_said(labels: Sequence[str]) -> dict[str, str]:
    """How a model file names its outputs."""
    return {"labels": json.dumps(list(labels))}


def labels_of(path: Path, about: Mapping[str, str]) -> tuple[str, ...]:
    """The outputs of a model file, from its metadata: `DEFAULT_LABELS` where it names none.

    Raises:
        ConfigError: it names others than the vocabulary has (code `wrong-model`).
    """
    if (said := about.get("labels")) is None:
        return DEFAULT_LABELS
    try:
        labels = tuple(json.loads(said))
    except (ValueError, TypeError):
        labels = ()
    if not labels or len(set(labels)) < len(labels) or not set(labels) <= set(NAMES):
        raise ConfigError(
            f"{path}: its outputs are not known to this version",
            code="wrong-model",
            hint=f"known: {', '.join(NAMES)}",
        )
    return labels


def save_model(path: Path, flat: np.ndarray, manifest: Manifest, metadata: Mapping[str, str]) -> None:
    """Named float32 tensors as safetensors."""
    tensors, start = {}, 0
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        tensors[name] = np.ascontiguousarray(flat[start : start + count].reshape(shape))
        start += count
    write_bytes(path, safetensors.numpy.save(tensors, metadata=dict(metadata)))


def load_model(path: Path, manifest: Manifest, labels: Sequence[str] | None = None) -> np.ndarray:
    """The flat float32 array of a safetensors file.

    Where the manifest is that of a network with neighbours and the file holds the same network without, the
    weights of the neighbours are 0: it starts as the network that it was.

    Args:
        labels: the outputs of the network that is wanted. Each row of the head is the file's for the output
            of that name, and 0 where the file has no such output: one that was never learned
            (`unlearned_labels`). None: the file is of this very network.
    Raises:
        ConfigError: it is not one, or its tensors are not the manifest's (code `wrong-model`).
    """
    try:
        tensors = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, framework="np") as file:
            about: dict[str, str] = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: not a model file ({error})", code="wrong-model") from None
    if labels is not None:
        own = labels_of(path, about)
        tensors = {
            name: _with_labels(one, own, labels) if name in HEAD_TENSORS else one
            for name, one in tensors.items()
        }
    expected = dict(zip(manifest.names, manifest.shapes, strict=True))
    tensors = {name: _with_neighbours(one, expected.get(name, ())) for name, one in tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ConfigError(f"{path}: tensor `{wrong}` is not what model.name describes", code="wrong-model")
    return np.concatenate([tensors[name].astype(np.float32, copy=False).ravel() for name in manifest.names])


HEAD_TENSORS = tuple(f"{HEAD}{kind}" for kind in ("weight", "bias"))


def unlearned_labels(flat: np.ndarray, manifest: Manifest, labels: Sequence[str]) -> tuple[str, ...]:
    """The outputs of a network that were never learned: their weights and bias are 0, so that every score is.

    Args:
        flat: float32 (parameters,).
        labels: the network's outputs.
    """
    parts = [flat[manifest.part(name)].reshape(len(labels), -1) for name in HEAD_TENSORS]
    return _of_zeros(np.concatenate(parts, axis=1), labels)


def unlearned_in(path: Path, labels: Sequence[str]) -> tuple[str, ...]:
    """As `unlearned_labels`, of a file whose outputs are `labels`."""
    with safetensors.safe_open(path, framework="np") as file:
        parts = [file.get_tensor(name).reshape(len(labels), -1) for name in HEAD_TENSORS]
    return _of_zeros(np.concatenate(parts, axis=1), labels)


def _of_zeros(rows: np.ndarray, labels: Sequence[str]) -> tuple[str, ...]:
    learned: list[bool] = [bool(row.any()) for row in rows]
    return tuple(name for name, is_learned in zip(labels, learned, strict=True) if not is_learned)


def _with_labels(tensor: np.ndarray, own: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The rows of a head for other outputs, those it lacks 0."""
    if len(tensor) != len(own):
        return tensor  # refused for its shape
    found = np.zeros((len(labels), *tensor.shape[1:]), tensor.dtype)
    for row, name in enumerate(labels):
        if name in own:
            found[row] = tensor[own.index(name)]
    return found


def _with_neighbours(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A first convolution as one of three times as many channels, those of the slice itself first."""
    if tensor.ndim != 4 or shape != (tensor.shape[0], 3 * tensor.shape[1], *tensor.shape[2:]):
        return tensor
    return np.concatenate([tensor, np.zeros_like(tensor), np.zeros_like(tensor)], axis=1)
