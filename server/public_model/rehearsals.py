"""Rehearsal hospitals: public phantoms that look other than what the starting weights were trained on.

Each shift moves one kind of appearance beyond the ranges of the public appearances, so that the starting
weights err as they do at a hospital, and there is something to gain. A patient is drawn in every version:
without artifact, and with each artifact of the modality alone. What private settings need of a rehearsal is
what the head sees, so only features are kept. Those of the shipped starting weights come with the package
(`python -m server.public_model.rehearsals [START ...]` makes them again); for other weights they are
computed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

from common.artifacts import DEFAULT_LABELS, INDEX, MODALITIES, can_occur
from common.files import write_bytes
from common.learning import extract_features, set_threads
from common.model_file import load_model
from common.models import build, network_of
from common.physics.appearance import PUBLIC_APPEARANCES, Appearance
from common.physics.phantom import PhantomSlice, draw_patient
from common.plan import Model
from common.preprocess import normalize_image, to_stored
from common.progress_bar import Progress, silent
from common.terminal import print
from common.weights import digest, manifest_of, resolve_initial, unflatten

_POSTURE: dict[str, Any] = {
    "mr_zoom": (0.4, 0.6),
    "ct_zoom": (0.4, 0.6),
    "oriented": (0.5, 0.5, 0.4),
    "dense_spots": 6,
}
SHIFTS: dict[str, dict[str, Any]] = {
    "contrast": {
        **_POSTURE,
        "gamma": (1.6, 2.2),
        "mr_contrasts": ("ANY",),
        "bias": (0.4, 0.6),
        "kernel": (0.45, 0.8),
        "enhanced": 1.0,
        "ct_noise_hu": (20.0, 35.0),
    },
    "texture": {
        **_POSTURE,
        "detail": (0.5, 0.9),
        "detail_hu": (60.0, 100.0),
        "gamma": (1.3, 1.7),
        "mr_contrasts": ("ANY",),
    },
    "resolution": {
        **_POSTURE,
        "truncation": (0.4, 0.5),
        "rolloff": (1.0, 2.0),
        "kernel": (-1.4, -1.1),
        "noise_percent": (3.0, 5.0),
        "outline": (0.4, 0.8),
        "ct_noise_hu": (15.0, 25.0),
    },
    "anatomy": {
        **_POSTURE,
        "mr_zoom": (0.35, 0.5),
        "ct_zoom": (0.35, 0.5),
        "outline": (0.5, 0.9),
        "gamma": (1.3, 1.8),
        "detail": (0.3, 0.5),
        "shading_hu": (20.0, 40.0),
    },
    "noise": {
        **_POSTURE,
        "noise_percent": (5.0, 8.0),
        "ct_noise_hu": (35.0, 60.0),
        "gamma": (0.5, 0.65),
        "bias": (0.4, 0.55),
        "shading_hu": (25.0, 45.0),
    },
}
"""Shift -> what it changes of a public appearance."""

PATIENTS = 240
FOLDS = 3
"""Each third of a rehearsal's patients is tested once, by what the others train."""
SIZE = 128  # pixels
SEED = 4711
CLEAN = -1
STARTS = ("small_cnn_phantoms", "small_cnn_real")
"""Shipped starting weights in common/models, each with its rehearsals beside this file."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The slices of one shift as the head sees them."""

    features: np.ndarray  # float32 (n, F)
    labels: np.ndarray  # float32 (n, DEFAULT_LABELS), nan where the artifact cannot occur
    patient: np.ndarray  # int64 (n,), 0 .. PATIENTS - 1
    version: np.ndarray  # int64 (n,), CLEAN or the artifact's place in DEFAULT_LABELS


def rehearsals_of(model: Model, initial: np.ndarray, *, progress: Progress = silent) -> dict[str, Rehearsal]:
    """Shift -> its rehearsal, for such a network with these weights.

    Args:
        initial: float32 (parameters,), the starting weights.
    """
    wanted = digest(initial)
    for start in STARTS:
        if rehearsed(start) == wanted:
            arrays = safetensors.numpy.load_file(shipped(start))
            return {shift: _rehearsal(arrays, shift) for shift in SHIFTS}
    found = {}
    for number, shift in enumerate(SHIFTS):
        progress("drawing rehearsals", number, len(SHIFTS))
        found[shift] = rehearse(shift, model, initial)
    progress("drawing rehearsals", len(SHIFTS), len(SHIFTS))
    return found


def shipped(start: str) -> Path:
    """The file of a start's rehearsals."""
    return Path(__file__).parent / f"rehearsals_{start}.safetensors"


def weights_of(start: str) -> np.ndarray:
    """Shipped starting weights of the default network, float32 (parameters,)."""
    path = resolve_initial(f"package:{start}.safetensors", None)
    return load_model(path, manifest_of(build(Model().name).state_dict()), DEFAULT_LABELS)


def rehearsed(start: str) -> str:
    """The digest of the weights that a start's shipped rehearsals were made with."""
    with safe_open(shipped(start), framework="numpy") as file:
        found: str = file.metadata()["start"]
    return found


def rehearse(shift: str, model: Model, initial: np.ndarray, patients: int = PATIENTS) -> Rehearsal:
    """Draw the patients of a shift and compute their features.

    Args:
        initial: float32 (parameters,).
    """
    network = network_of(model)
    network.load_state_dict(unflatten(initial, manifest_of(network.state_dict())))
    images, modality, labels, owners, versions = [], [], [], [], []
    for patient in range(patients):
        for version, item in _versions(shift, patient):
            images.append(to_stored(normalize_image(item.image, item.modality, SIZE), item.modality))
            modality.append(MODALITIES.index(item.modality))
            labels.append([item.labels.get(name, np.nan) for name in DEFAULT_LABELS])
            owners.append(patient)
            versions.append(version)
    return Rehearsal(
        features=extract_features(
            network, np.stack(images), np.array(modality, np.int8), np.arange(len(images))
        ),
        labels=np.array(labels, np.float32),
        patient=np.array(owners, np.int64),
        version=np.array(versions, np.int64),
    )


def _versions(shift: str, patient: int) -> Iterator[tuple[int, PhantomSlice]]:
    """The slices of a patient without artifact, then with each artifact that can occur alone: one anatomy."""
    look = replace(
        PUBLIC_APPEARANCES[patient % 3],
        name=f"rehearsal-{shift}",
        nuisances={},
        severity_range=(0.35, 0.9),
        **SHIFTS[shift],
    )
    clean = draw_patient(_showing(look, ""), patient, SEED)
    yield from ((CLEAN, item) for item in clean)
    for name in DEFAULT_LABELS:
        if can_occur(name, clean[0].modality):
            shown = draw_patient(_showing(look, name), patient, SEED)
            yield from ((INDEX[name], item) for item in shown)


def _showing(look: Appearance, name: str) -> Appearance:
    return replace(look, prevalence={each: float(each == name) for each in DEFAULT_LABELS})


def _rehearsal(arrays: Mapping[str, np.ndarray], shift: str) -> Rehearsal:
    return Rehearsal(
        features=arrays[f"{shift}.features"].astype(np.float32),
        labels=arrays[f"{shift}.labels"].astype(np.float32),
        patient=arrays[f"{shift}.patient"].astype(np.int64),
        version=arrays[f"{shift}.version"].astype(np.int64),
    )


def _to_arrays(shift: str, found: Rehearsal) -> dict[str, np.ndarray]:
    """Features rounded to half precision, which moves no score that is read."""
    return {
        f"{shift}.features": found.features.astype(np.float16),
        f"{shift}.labels": found.labels.astype(np.float16),
        f"{shift}.patient": found.patient.astype(np.int16),
        f"{shift}.version": found.version.astype(np.int8),
    }


def main() -> int:
    """Write the rehearsals of the shipped starting weights, or of those named; with --check only say whether
    they are theirs.
    """
    set_threads(1)
    names = [word for word in sys.argv[1:] if word != "--check"] or STARTS
    for start in names:
        weights = weights_of(start)
        if "--check" in sys.argv:
            if rehearsed(start) != digest(weights):
                print(
                    f"common/models/{start}.safetensors has changed: settings were rehearsed with other "
                    f"weights; run python -m server.public_model.rehearsals {start}",
                    file=sys.stderr,
                )
                return 1
            continue
        arrays: dict[str, np.ndarray] = {}
        for shift in SHIFTS:
            print(f"{start}: {shift}", file=sys.stderr)
            arrays |= _to_arrays(shift, rehearse(shift, Model(), weights))
        write_bytes(shipped(start), safetensors.numpy.save(arrays, {"start": digest(weights)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
