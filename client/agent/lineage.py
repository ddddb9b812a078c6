"""Admit the starting weights of a private arm: no hospital's patients may have shaped them without noise."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import numpy as np

import common.models
from client.agent.trained_models import was_trained
from common.errors import RefusedError
from common.lineage import Lineage
from common.plan import Model
from common.weights import resolve_initial


def admit_lineage(model: Model, lineage: str) -> None:
    """Admit fedqc's own weights, or those whose lineage, signed by the coordinator, protects patients.

    Args:
        lineage: `Lineage.text()` of the task.
    Raises:
        RefusedError: `unknown-ancestor`, `non-private-ancestor`; the public reason is a function of plan and
            task.
    """
    if packaged_weights(model) is not None:
        return
    if model.initial == "random":  # numbers from the plan's seed: nobody's
        return
    if model.sha256 is None:
        raise _refusal(
            "unknown-ancestor", "the plan names starting weights of its own, and not their model.sha256"
        )
    known = Lineage.parse(lineage)
    if known is None:
        raise _refusal("unknown-ancestor", "nothing says what the plan's starting weights were trained on")
    if not known.private:
        raise _refusal(
            "non-private-ancestor",
            "patients of a hospital shaped the plan's starting weights without noise",
        )


def admit_ancestor(state: Path, model: Model, flat: np.ndarray, head: slice) -> None:
    """Refuse a base that this site helped to train without noise, whatever plan and task say of it.

    Args:
        flat: the base, float32 (parameters,).
        head: where the head lies in it.
    Raises:
        RefusedError: `non-private-ancestor`.
    """
    if packaged_weights(model) is None and was_trained(state, flat, head):
        raise _refusal("non-private-ancestor", "this site helped to train the model without noise")


def packaged_weights(model: Model) -> Path | None:
    """The file of this installation that a plan starts from, named in it or known by its hash; None where the
    weights lie at the coordinator alone.

    Raises:
        ConfigError: the plan names a file that is not installed (`no-initial-weights`), or with another hash
            (`wrong-initial-weights`).
    """
    if model.initial.startswith("package:"):
        return resolve_initial(model.initial, model.sha256)
    return _packaged().get(model.sha256 or "")


@functools.cache
def _packaged() -> dict[str, Path]:
    """SHA-256 of each model file of the package, and the file."""
    folder = Path(common.models.__file__).parent
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.glob("*.safetensors")}


def _refusal(code: str, reason: str) -> RefusedError:
    return RefusedError(
        reason,
        code=code,
        public_reason=reason,
        hint="start private arms from package:small_cnn_real.safetensors, or from a model of public data",
    )
