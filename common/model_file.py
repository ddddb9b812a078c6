"""Read and write models: named float32 tensors as safetensors, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from common.arms import is_private
from common.errors import ConfigError
from common.files import write_bytes
from common.plan import RunPlan
from common.weights import Manifest


def described(plan: RunPlan, arm: str) -> dict[str, str]:
    """What the file of a run's model says so that it can be used without the plan: network, side of its
    slices in pixels and, of a private arm, the epsilon and delta that its plan asks for.
    """
    said = {
        "network": json.dumps({"name": plan.model.name, "args": dict(plan.model.args)}, sort_keys=True),
        "image_size": str(plan.image_size),
    }
    if is_private(arm.partition("/")[0]):
        said |= {"epsilon": repr(plan.privacy.epsilon), "delta": repr(plan.privacy.delta)}
    return said


def save_model(path: Path, flat: np.ndarray, manifest: Manifest, metadata: Mapping[str, str]) -> None:
    """Named float32 tensors as safetensors."""
    tensors, start = {}, 0
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        tensors[name] = np.ascontiguousarray(flat[start : start + count].reshape(shape))
        start += count
    write_bytes(path, safetensors.numpy.save(tensors, metadata=dict(metadata)))


def load_model(path: Path, manifest: Manifest) -> np.ndarray:
    """The flat float32 array of a safetensors file.

    Where the manifest is that of a network with neighbours and the file holds the same network without, the
    weights of the neighbours are 0: it starts as the network that it was.

    Raises:
        ConfigError: it is not one, or its tensors are not the manifest's (code `wrong-model`).
    """
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path}: not a model file ({error})", code="wrong-model") from None
    expected = dict(zip(manifest.names, manifest.shapes, strict=True))
    tensors = {name: _with_neighbours(one, expected.get(name, ())) for name, one in tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ConfigError(f"{path}: tensor `{wrong}` is not what model.name describes", code="wrong-model")
    return np.concatenate([tensors[name].astype(np.float32, copy=False).ravel() for name in manifest.names])


def _with_neighbours(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A first convolution as one of three times as many channels, those of the slice itself first."""
    if tensor.ndim != 4 or shape != (tensor.shape[0], 3 * tensor.shape[1], *tensor.shape[2:]):
        return tensor
    return np.concatenate([tensor, np.zeros_like(tensor), np.zeros_like(tensor)], axis=1)
