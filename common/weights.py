"""A model as ONE flat float32 array plus a manifest, and updates as integers on a public grid.

One array crosses Flower in a third of the time of one array a layer; integers make sums exact in any order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import ConfigError, RunError

if TYPE_CHECKING:
    import torch

GRID = 2.0**-24
"""Spacing of update values: finer than the last bit of a float32 of magnitude 1/2."""

LIMIT = 2**30
"""Largest magnitude of one update value in grid steps: larger is refused, never wrapped."""

REACH = LIMIT * GRID
"""The same in weight units: 64."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Names, shapes and order of the tensors in a flat array."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    def part(self, prefix: str) -> slice:
        """The stretch of the flat array whose tensor names begin with `prefix`; they must lie side by side."""
        ends = np.cumsum([0] + [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes])
        inside = [position for position, name in enumerate(self.names) if name.startswith(prefix)]
        if not inside or inside != list(range(inside[0], inside[-1] + 1)):
            raise RunError(f"the model has no contiguous `{prefix}*`", code="wrong-model")
        return slice(int(ends[inside[0]]), int(ends[inside[-1] + 1]))

    def sha256(self) -> str:
        text = json.dumps([[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def manifest_of(state: Mapping[str, torch.Tensor]) -> Manifest:
    return Manifest(names=tuple(state), shapes=tuple(tuple(tensor.shape) for tensor in state.values()))


def flatten(state: Mapping[str, torch.Tensor]) -> np.ndarray:
    """All tensors of a state dict, in its order, as one float32 array of shape (manifest.size,)."""
    return np.concatenate([tensor.detach().cpu().numpy().astype(np.float32, copy=False).ravel() for tensor in state.values()])


def unflatten(flat: np.ndarray, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The state dict that `flatten` came from.

    Raises:
        RunError: the array's length is not the manifest's.
    """
    import torch

    if flat.shape != (manifest.size,):
        raise RunError(f"model array has shape {flat.shape}, the manifest needs ({manifest.size},)", code="wrong-model")
    state, start = {}, 0
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        count = int(np.prod(shape, dtype=np.int64))
        state[name] = torch.from_numpy(flat[start : start + count].reshape(shape).astype(np.float32, copy=True))
        start += count
    return state


def digest(flat: np.ndarray) -> str:
    """SHA-256 of a flat array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(flat).tobytes()).hexdigest()


def to_grid(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The update `after - before` in whole grid steps, int32, same shape.

    Raises:
        RunError: a value is not finite or lies beyond LIMIT.
    """
    steps = np.rint((after.astype(np.float64) - before.astype(np.float64)) / GRID)
    if not np.all(np.isfinite(steps)) or np.abs(steps).max(initial=0) > LIMIT:
        raise RunError("the update is not finite or too large for the grid", code="diverged", hint="lower training.learning_rate")
    return steps.astype(np.int32)


def apply_update(base: np.ndarray, total: np.ndarray, weight: int) -> np.ndarray:
    """`base + GRID * total / weight` as float32; `total` is the integer sum of weighted updates, int64."""
    return (base.astype(np.float64) + GRID * (total.astype(np.float64) / weight)).astype(np.float32)


def resolve_initial(reference: str, sha256: str | None) -> Path:
    """The file that a plan's `model.initial` means.

    Raises:
        ConfigError: it is missing, or its hash is not the plan's.
    """
    path = Path(__file__).parent / "models" / reference.removeprefix("package:") if reference.startswith("package:") else Path(reference)
    if not path.is_file():
        raise ConfigError(
            f"model.initial = {reference!r}: no such file",
            code="no-initial-weights",
            hint="use package:small_cnn.safetensors or an absolute path",
        )
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ConfigError(f"model.initial = {reference!r} has sha256 {found}, the plan says {sha256}", code="wrong-initial-weights")
    return path
