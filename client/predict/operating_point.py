"""Thresholds and calibration of a model, on patients whose labels are known.

Of each artifact there are two operating points: of an image, and of a patient's score
(`common.counts.patient_scores`), which decides about series and studies. They are found on this site's
labelled training patients where there are enough of both kinds, else on public phantoms.

Threshold and probability: `common.operating_point`. Both are found and their figures counted on the same
patients, so the figures are optimistic; and a probability holds at the share of positives there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.cohort import load_cohort
from client.dicom.index import PARTS
from client.predict.model import Model, score
from client.predict.severity import SeverityMap, maps_from, packaged_maps, severity_maps
from common.artifacts import DEFAULT_LABELS
from common.counts import per_patient
from common.errors import DataError
from common.files import write_bytes
from common.operating_point import platt, youden
from common.public_slices import Slices

MAX_ALARMS = 0.1
"""An artifact whose threshold for patients calls more of those without it positive is scored, not decided."""
LEAST_PATIENTS = 10
"""With and without an artifact each, below which a site's own patients decide nothing."""
PHANTOMS, PHANTOM_SEED = 300, 9009
SEVERITY_SEED, SEVERITY_RANGE = 9010, (0.05, 1.0)
"""Of other phantoms, for maps to severity: those that thresholds come from show no weak artifacts."""
FORMAT = 2
"""Raised when a threshold would be found in another way: kept ones are then found again."""

Origin = Literal["phantoms", "site"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where one artifact is called present: of an image's logit, or of a patient's score."""

    origin: Origin
    threshold: float  # logit; present from here on
    sensitivity: float  # on the patients, or their images, it was found on
    specificity: float
    positives: int
    negatives: int
    slope: float  # probability = 1 / (1 + exp(-(slope * logit + offset))); slope 0: not calibrated
    offset: float
    decides: bool = True  # False: too many alarms, see `MAX_ALARMS`

    def probability(self, logit: float) -> float | None:
        """None where there is no score, or no calibration."""
        if not self.slope > 0 or not np.isfinite(logit):
            return None
        return float(1 / (1 + np.exp(-np.clip(self.slope * logit + self.offset, -500, 500))))


@dataclass(frozen=True, kw_only=True)
class OperatingPoints:
    """Artifact -> point. What is missing has none: its logits are printed as they are."""

    images: dict[str, Point]
    patients: dict[str, Point]
    severities: dict[str, SeverityMap] = field(default_factory=dict)  # of images, series and studies alike

    @property
    def origins(self) -> dict[str, tuple[str, ...]]:
        """Origin -> artifacts."""
        return {
            origin: own
            for origin in ("site", "phantoms")
            if (own := tuple(name for name, point in self.patients.items() if point.origin == origin))
        }


NONE = OperatingPoints(images={}, patients={})


def operating_points(
    model: Model,
    *,
    site: Path | None = None,
    cache: Path,
    say: Callable[[str], None] = lambda text: None,
) -> OperatingPoints:
    """The points of a model, found once and kept by the model's hash.

    Args:
        site: a site folder; its labelled training patients are used where its images are prepared.
        cache: folder for what was found; private, as points of a site follow from patients.
    """
    found = _kept(cache, f"phantoms-{model.sha256[:16]}-{model.size}", lambda: _on_phantoms(model, say))
    if site is None:
        return found
    labelled = _labelled(site, model)
    if labelled is None:
        return found
    own, index = labelled
    key = hashlib.sha256(index.encode())
    for array in (own.labels, own.patients, own.severities):
        key.update(np.ascontiguousarray(array).tobytes())
    name = f"site-{model.sha256[:16]}-{model.size}-{key.hexdigest()[:16]}"
    mine = _kept(cache, name, lambda: points_of(model, own, "site"))
    return OperatingPoints(
        images=found.images | mine.images,
        patients=found.patients | mine.patients,
        severities=found.severities | mine.severities,
    )


def points_of(model: Model, slices: Slices, origin: Origin) -> OperatingPoints:
    """The points on slices with labels of the model's outputs; none of an output that was never learned, or
    of an artifact of which too few patients have it, or have not.
    """
    logits = score(model, slices.images, slices.modality, np.arange(len(slices.images)))
    scores, truth = per_patient(logits, slices.labels, slices.patients)
    images, patients = {}, {}
    for place, name in enumerate(model.labels):
        if name in model.unlearned:
            continue
        of_patient = point_of(scores[:, place], truth[:, place], origin)
        of_image = point_of(logits[:, place], slices.labels[:, place], origin)
        if of_patient is None or of_image is None:
            continue
        if min(of_patient.positives, of_patient.negatives) >= LEAST_PATIENTS:
            decides = 1 - of_patient.specificity <= MAX_ALARMS
            patients[name] = replace(of_patient, decides=decides)
            images[name] = replace(of_image, decides=decides)
    return OperatingPoints(
        images=images, patients=patients, severities=severity_maps(logits, slices, origin, model.labels)
    )


def point_of(scores: np.ndarray, labels: np.ndarray, origin: Origin) -> Point | None:
    """The operating point on scores (n,) with labels (n,), 1, 0 or nan; None without both classes."""
    known = ~np.isnan(labels) & np.isfinite(scores)
    values, present = scores[known].astype(np.float64), labels[known] == 1
    if not present.any() or present.all():
        return None
    distinct = np.unique(values)
    thresholds = np.concatenate([distinct[:1], (distinct[1:] + distinct[:-1]) / 2])
    positives, negatives = np.sort(values[present]), np.sort(values[~present])
    sensitivity = 1 - np.searchsorted(positives, thresholds) / len(positives)
    specificity = np.searchsorted(negatives, thresholds) / len(negatives)
    best = youden(sensitivity, specificity)
    slope, offset = platt(values, present)
    return Point(
        origin=origin,
        threshold=float(thresholds[best]),
        sensitivity=float(sensitivity[best]),
        specificity=float(specificity[best]),
        positives=len(positives),
        negatives=len(negatives),
        slope=slope,
        offset=offset,
    )


def user_cache() -> Path:
    """Where points are kept without a site: `$XDG_CACHE_HOME/fedqc/operating-points`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "fedqc" / "operating-points"


def _on_phantoms(model: Model, say: Callable[[str], None]) -> OperatingPoints:
    say(f"finding the operating point of this model on {PHANTOMS} phantoms; done once")
    points = points_of(model, draw(PHANTOMS, PHANTOM_SEED, model.size, model.labels), "phantoms")
    maps = packaged_maps(model.sha256)
    if not maps:
        slices = draw(PHANTOMS, SEVERITY_SEED, model.size, model.labels, SEVERITY_RANGE)
        logits = score(model, slices.images, slices.modality, np.arange(len(slices.images)))
        maps = severity_maps(logits, slices, "phantoms", model.labels)
    return replace(points, severities=maps)


def draw(
    patients: int,
    seed: int,
    size: int,
    artifacts: Sequence[str] = DEFAULT_LABELS,
    severity_range: tuple[float, float] | None = None,
) -> Slices:
    """So many public phantoms, of the severities of their looks or of others. What draws them loads torch:
    only when points are to be found.
    """
    from common.physics.appearance import PUBLIC_APPEARANCES
    from common.physics.ct import projector
    from common.public_phantoms import draw as phantoms

    looks = PUBLIC_APPEARANCES
    if severity_range is not None:
        looks = tuple(replace(one, severity_range=severity_range) for one in looks)
    slices = phantoms(looks, patients, seed, size, artifacts)
    projector.cache_clear()
    return slices


def _labelled(site: Path, model: Model) -> tuple[Slices, str] | None:
    """This site's labelled training slices and the version of its index; None where its images are not
    prepared, or nothing is labelled.
    """
    try:
        cohort = load_cohort(site, size=model.size, quarantine="ignore", build=False, labels=model.labels)
    except DataError:
        return None
    rows = np.flatnonzero((cohort.part == PARTS.index("train")) & ~np.isnan(cohort.labels).all(axis=1))
    if not len(rows):
        return None
    slices = Slices(
        images=cohort.images[rows],
        modality=cohort.modality[rows],
        labels=cohort.labels[rows],
        patients=cohort.patients[rows],
        severities=cohort.severities[rows],
    )
    return slices, cohort.fingerprint


def _kept(cache: Path, name: str, find: Callable[[], OperatingPoints]) -> OperatingPoints:
    path = cache / f"{name}-{FORMAT}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        value = json.loads(path.read_text(encoding="ascii"))
        return OperatingPoints(
            images={name: Point(**point) for name, point in value["images"].items()},
            patients={name: Point(**point) for name, point in value["patients"].items()},
            severities=maps_from(value["severities"]),
        )
    found = find()
    with suppress(OSError):  # a site that cannot be written is judged all the same
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(path, json.dumps(asdict(found), sort_keys=True).encode("ascii"), 0o600)
    return found
