"""The vocabulary of artifacts. The order of `ARTIFACTS` is the order of the model's outputs.

To add one: a row here and a file in `common/physics/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError

Modality = Literal["CT", "MR"]
MODALITIES: tuple[Modality, ...] = ("CT", "MR")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    name: str
    chinese: str
    synonyms: tuple[str, ...]
    modality: Modality
    definition: str


ARTIFACTS: tuple[Artifact, ...] = (
    Artifact(
        name="metal",
        chinese="金属伪影",
        synonyms=("metallic", "metal streak"),
        modality="CT",
        definition=(
            "Streaks and dark bands from dense implants: beam hardening, photon starvation and "
            "noise of a few rays."
        ),
    ),
    Artifact(
        name="beam_hardening",
        chinese="射束硬化伪影",
        synonyms=("cupping", "bone streak", "beam hardening"),
        modality="CT",
        definition=(
            "Dark bands between dense bones and cupping, because a polychromatic beam hardens along its path."
        ),
    ),
    Artifact(
        name="motion",
        chinese="运动伪影",
        synonyms=("ghosting", "patient motion"),
        modality="MR",
        definition=(
            "Ghosts, ringing and smearing along the phase-encoding axis from movement between k-space lines."
        ),
    ),
    Artifact(
        name="susceptibility",
        chinese="磁敏感伪影",
        synonyms=("magnetic susceptibility", "signal void", "distortion"),
        modality="MR",
        definition="Signal voids, pile-up and distortion where magnetic susceptibility changes abruptly.",
    ),
    Artifact(
        name="chemical_shift",
        chinese="化学位移伪影",
        synonyms=("chemical shift", "fat-water shift"),
        modality="MR",
        definition=(
            "Dark and bright rims at fat-water borders along the readout axis, because fat "
            "precesses more slowly."
        ),
    ),
)

NAMES: tuple[str, ...] = tuple(artifact.name for artifact in ARTIFACTS)
INDEX: dict[str, int] = {name: position for position, name in enumerate(NAMES)}


def applies_to(modality: str) -> tuple[bool, ...]:
    """Which outputs can occur in `modality` ("CT" or "MR"), in output order: the modality mask."""
    return tuple(artifact.modality == modality for artifact in ARTIFACTS)


def parse_name(text: str) -> str:
    """The canonical name for a name, Chinese name or synonym, case-insensitively.

    Raises:
        ConfigError: the word is unknown; the message lists the known names.
    """
    wanted = _spelled(text)
    for artifact in ARTIFACTS:
        if wanted in map(_spelled, (artifact.name, artifact.chinese, *artifact.synonyms)):
            return artifact.name
    raise ConfigError(
        f"unknown artifact {text!r}", code="unknown-artifact", hint=f"known: {', '.join(NAMES)}"
    )


def _spelled(text: str) -> str:
    return text.strip().lower().replace("-", "_").replace(" ", "_")
