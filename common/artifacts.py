"""The vocabulary of artifacts. The order of `ARTIFACTS` is the order of a model's outputs, which are those
that its plan names (`model.labels`, by default `DEFAULT_LABELS`).

To add one: a row here, at the end, and a file in `common/physics/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    modalities: tuple[Modality, ...]  # in which it can occur
    definition: str


ARTIFACTS: tuple[Artifact, ...] = (
    Artifact(
        name="metal",
        chinese="金属伪影",
        synonyms=("metallic", "metal streak"),
        modalities=("CT",),
        definition=(
            "Streaks and dark bands from dense implants: beam hardening, photon starvation and "
            "noise of a few rays."
        ),
    ),
    Artifact(
        name="beam_hardening",
        chinese="射束硬化伪影",
        synonyms=("cupping", "bone streak", "beam hardening"),
        modalities=("CT",),
        definition=(
            "Dark bands between dense bones and cupping, because a polychromatic beam hardens along its path."
        ),
    ),
    Artifact(
        name="motion",
        chinese="运动伪影",
        synonyms=("ghosting", "patient motion"),
        modalities=("MR",),
        definition=(
            "Ghosts, ringing and smearing along the phase-encoding axis from movement between k-space lines."
        ),
    ),
    Artifact(
        name="susceptibility",
        chinese="磁敏感伪影",
        synonyms=("magnetic susceptibility", "signal void", "distortion"),
        modalities=("MR",),
        definition="Signal voids, pile-up and distortion where magnetic susceptibility changes abruptly.",
    ),
    Artifact(
        name="chemical_shift",
        chinese="化学位移伪影",
        synonyms=("chemical shift", "fat-water shift"),
        modalities=("MR",),
        definition=(
            "Dark and bright rims at fat-water borders along the readout axis, because fat "
            "precesses more slowly."
        ),
    ),
    Artifact(
        name="quality",
        chinese="整体质量不合格",
        synonyms=("unacceptable", "overall quality", "exclude"),
        modalities=("CT", "MR"),
        definition=(
            "Unacceptable overall, whatever the reason: a reader's verdict on the scan as a whole. 1 is "
            "unacceptable, 0 acceptable. It is a rating, which no simulator makes."
        ),
    ),
    Artifact(
        name="ct_motion",
        chinese="CT 运动伪影",
        synonyms=("CT motion", "patient movement in CT", "double contour"),
        modalities=("CT",),
        definition="Double contours and streaks, because later views of a CT scan see the body elsewhere.",
    ),
)

NAMES: tuple[str, ...] = tuple(artifact.name for artifact in ARTIFACTS)
INDEX: dict[str, int] = {name: position for position, name in enumerate(NAMES)}

DEFAULT_LABELS: tuple[str, ...] = NAMES[:5]
"""What a plan trains that names nothing else, and what a model file holds that does not say. Frozen: earlier
plans keep their hash and results, and earlier files their meaning.
"""


def applies_to(modality: str, names: Sequence[str] = NAMES) -> tuple[bool, ...]:
    """Which of `names` can occur in `modality` ("CT" or "MR"), in their order: the modality mask."""
    return tuple(can_occur(name, modality) for name in names)


def can_occur(name: str, modality: str) -> bool:
    """Whether an artifact of the vocabulary can occur in a modality."""
    return name in INDEX and modality in ARTIFACTS[INDEX[name]].modalities


def modality_text(name: str) -> str:
    """`CT`, `MR` or `CT, MR`: where an artifact can occur."""
    return ", ".join(ARTIFACTS[INDEX[name]].modalities)


def columns_of(names: Iterable[str]) -> list[int]:
    """The positions of artifacts in the vocabulary, which are the columns of an array of all its labels."""
    return [INDEX[name] for name in names]


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
