"""Decode the model that a coordinator sends; refuse one that no honest round leads to, before data is read.

A crafted model can turn a plain update into a copy of an image: rows that select single images, or weights
that amplify one gradient (Boenisch et al., IEEE EuroS&P 2023; Fowl et al., ICLR 2022). In the private arm
the guarantee does not rest on these checks: whatever the model, a patient moves the update by the clip and no
more. They are for arms without noise, and to notice a coordinator gone wrong.
"""

from __future__ import annotations

import math

import numpy as np

from common.errors import RefusedError
from common.weights import REACH, Manifest, Part, advance, decode_floats, decode_steps, digest, part_size
from common.wire import TrainTask

MAX_GROWTH = 16.0
"""A tensor's largest weight may be this many times what it was at the start, or `SMALL`, whichever is
more.
"""
SMALL = 0.25
MAX_ZEROS = 0.9
MAX_TWINS = 0.5


def decode_base(task: TrainTask, size: int, trainable: Part, held: dict[str, np.ndarray]) -> np.ndarray:
    """The float32 weights (size,) of a task.

    Args:
        trainable: the part that a frame of steps covers.
        held: models that this site has seen, by digest.
    Raises:
        RefusedError: `base-not-held` (the coordinator then sends the whole model), `crafted-model` for a
            wrong size or digest.
        RunError: a damaged frame (code `bad-frame`).
    """
    if task.base.dtype == np.float32:
        flat = task.base
    elif task.held_sha256:
        before = held.get(task.held_sha256)
        if before is None:
            raise _refusal("base-not-held", "the site does not hold the model that this round builds on")
        flat = before.copy()
        flat[trainable] = advance(before[trainable], decode_steps(task.base, part_size(trainable)))
    else:
        flat = decode_floats(task.base, size)
    if flat.shape != (size,):
        raise _refusal(
            "crafted-model", f"the model has shape {flat.shape}, the plan's network needs ({size},)"
        )
    if task.base_sha256 and digest(flat) != task.base_sha256:
        raise _refusal("crafted-model", "the model's digest is not the one that was signed")
    return flat


def check_base(
    flat: np.ndarray,
    initial: np.ndarray | None,
    manifest: Manifest,
    *,
    frozen: Part | None,
    rounds_done: int = 0,
) -> None:
    """Refuse a model that training from `initial` does not lead to.

    Args:
        initial: the plan's public starting weights, float32 (parameters,); None where they lie at the
            coordinator alone.
        frozen: the part that no round changes (of the private arm, all but what the plan trains there), or
            None. The rest is moved by noise, as far as the plan's epsilon asks for: by up to `REACH` in each
            round, where every site cuts its update off.
        rounds_done: how many rounds lie between `initial` and `flat`.
    Raises:
        RefusedError: `crafted-model`, naming the tensor.
    """
    if not np.isfinite(flat).all():
        raise _refusal("crafted-model", "the model holds values that are not finite")
    if frozen is not None and initial is not None and not np.array_equal(flat[frozen], initial[frozen]):
        raise _refusal(
            "crafted-model",
            "a part of the model that the private arm does not train is not the plan's",
        )
    moves = np.zeros(flat.size, bool)  # by noise
    if frozen is not None:
        moves[:] = True
        moves[frozen] = False
    start = 0
    for position, (name, shape) in enumerate(zip(manifest.names, manifest.shapes, strict=True)):
        count = int(np.prod(shape, dtype=np.int64))
        part, before = (
            flat[start : start + count],
            None if initial is None else initial[start : start + count],
        )
        is_noised = moves[start]
        start += count
        bound = math.inf if before is None else _bound(before, rounds_done if is_noised else None)
        if np.abs(part).max(initial=0) > bound:
            raise _refusal(
                "crafted-model",
                f"`{name}` holds a value beyond {bound:.4g}, more than {rounds_done} rounds lead to",
            )
        if position == 0:
            _check_first_layer(
                name, part.reshape(shape[0], -1), None if before is None else before.reshape(shape[0], -1)
            )


def _bound(before: np.ndarray, noised_rounds: int | None) -> float:
    """How large a weight of the tensor that began as `before` may be.

    Args:
        noised_rounds: of a tensor that is trained with noise, the rounds done; None for any other.
    """
    largest = float(np.abs(before).max(initial=0))
    if noised_rounds is not None:
        return (largest + REACH * noised_rounds) * (1 + 1e-6)  # float32
    return MAX_GROWTH * max(largest, SMALL)


def _check_first_layer(name: str, rows: np.ndarray, before: np.ndarray | None) -> None:
    """Rows that pick single images are mostly zero, or copies of one row with different thresholds."""
    zeros, twins = (0.0, 0.0) if before is None else (float(np.mean(before == 0)), _twins(before))
    if np.mean(rows == 0) > max(MAX_ZEROS, zeros):
        raise _refusal("crafted-model", f"`{name}` is nearly all zero")
    if _twins(rows) > max(MAX_TWINS, twins):
        raise _refusal("crafted-model", f"`{name}` holds the same filter many times")


def _twins(rows: np.ndarray) -> float:
    """Share of rows that point the way another row does."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(lengths > 0, lengths, 1)
    alike = np.abs(unit @ unit.T) > 0.9999
    np.fill_diagonal(alike, False)
    return float(alike.any(axis=1).mean()) if len(rows) > 1 else 0.0


def _refusal(code: str, reason: str) -> RefusedError:
    return RefusedError(reason, code=code, public_reason=reason)
