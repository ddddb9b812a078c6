"""Remember the models that this site helped to train without noise, by digest: none of them becomes the base
of a private arm, whatever a plan says of it.

Two digests a model: of all weights, and of all but the head, which a private arm trains anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.arms import ARMS
from common.files import append_line
from common.weights import digest

TRAINED = "trained-without-noise"


def note_trained(state: Path, models: list[np.ndarray], head: slice) -> None:
    """Note models that this site's patients shaped without noise; durable when this returns.

    Args:
        models: float32 (parameters,) each.
        head: where the head lies in them; it is the last part.
    Raises:
        OSError: the file cannot be written.
    """
    known = _known(state)
    found = [name for flat in models for name in _digests(flat, head)]
    for name in dict.fromkeys(found):
        if name not in known:
            append_line(state / TRAINED, name)


def is_trained_without_noise(name: str, site: str) -> bool:
    """Whether a model of this name, at the end of a run in which `site` trained, is one that its patients
    shaped without noise. A name that is not known is taken for one.
    """
    arm, _, owner = name.partition("/")
    if arm not in ARMS:
        return True
    return ARMS[arm].is_trained and not ARMS[arm].private and owner in ("", site)


def was_trained(state: Path, flat: np.ndarray, head: slice) -> bool:
    """Whether this site's patients shaped a model, or all of it but its head, without noise."""
    return not _known(state).isdisjoint(_digests(flat, head))


def _digests(flat: np.ndarray, head: slice) -> tuple[str, ...]:
    """Of the model and of its backbone; a network that is all head has none, which says nothing."""
    backbone = flat[: head.start]
    return (digest(flat), digest(backbone)) if backbone.size else (digest(flat),)


def _known(state: Path) -> set[str]:
    try:
        return set((state / TRAINED).read_text(encoding="ascii").split())
    except FileNotFoundError:
        return set()
