"""Thresholds and calibration of a model, on patients whose labels are known.

Of each artifact there are two operating points: of an image, and of a patient's score
(`common.counts.patient_scores`), which decides about series and studies. They are found on this site's
labelled training patients where there are enough of both kinds, else on public phantoms.

Threshold: of those that find at least `LEAST_FOUND` of the positives, the one with the largest sensitivity
plus specificity (Youden, Cancer 3:32, 1950). Probability: Platt's two parameters (Platt 1999, with the
targets and Newton's method of Lin, Lin and Weng, Mach Learn 68:267, 2007). Both are found and their figures
counted on the same patients, so the figures are optimistic; and a probability holds at the share of positives
there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.cohort import load_cohort
from client.dicom.index import PARTS
from client.predict.model import Model, score
from common.artifacts import NAMES
from common.counts import per_patient
from common.errors import DataError
from common.files import write_bytes
from common.public_slices import Slices

LEAST_FOUND = 0.8
MAX_ALARMS = 0.1
"""An artifact whose threshold for patients calls more of those without it positive is scored, not decided."""
LEAST_PATIENTS = 10
"""With and without an artifact each, below which a site's own patients decide nothing."""
PHANTOMS, PHANTOM_SEED = 300, 9009
FORMAT = 1
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
    labelled = _labelled(site, model.size)
    if labelled is None:
        return found
    own, index = labelled
    key = hashlib.sha256(index.encode())
    for array in (own.labels, own.patients):
        key.update(np.ascontiguousarray(array).tobytes())
    name = f"site-{model.sha256[:16]}-{model.size}-{key.hexdigest()[:16]}"
    mine = _kept(cache, name, lambda: points_of(model, own, "site"))
    return OperatingPoints(images=found.images | mine.images, patients=found.patients | mine.patients)


def points_of(model: Model, slices: Slices, origin: Origin) -> OperatingPoints:
    """The points on labelled slices; none of an artifact of which too few patients have it, or have not."""
    logits = score(model, slices.images, slices.modality, np.arange(len(slices.images)))
    scores, truth = per_patient(logits, slices.labels, slices.patients)
    images, patients = {}, {}
    for place, name in enumerate(NAMES):
        of_patient = point_of(scores[:, place], truth[:, place], origin)
        of_image = point_of(logits[:, place], slices.labels[:, place], origin)
        if of_patient is None or of_image is None:
            continue
        if min(of_patient.positives, of_patient.negatives) >= LEAST_PATIENTS:
            decides = 1 - of_patient.specificity <= MAX_ALARMS
            patients[name] = replace(of_patient, decides=decides)
            images[name] = replace(of_image, decides=decides)
    return OperatingPoints(images=images, patients=patients)


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
    allowed = np.flatnonzero(sensitivity >= LEAST_FOUND - 1e-12)
    best = allowed[len(allowed) - 1 - int(np.argmax((sensitivity + specificity)[allowed][::-1]))]
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


def platt(values: np.ndarray, present: np.ndarray) -> tuple[float, float]:
    """Slope and offset that maximise the likelihood of Platt's targets; slope 0 where larger scores do not
    make presence likelier, which no probability can be made of.
    """
    n_pos, n_neg = int(present.sum()), int((~present).sum())
    target = np.where(present, (n_pos + 1) / (n_pos + 2), 1 / (n_neg + 2))
    scale = float(values.std()) or 1.0
    design = np.column_stack([values / scale, np.ones(len(values))])
    beta = np.array([0.0, np.log((n_pos + 1) / (n_neg + 1))])

    def loss(at: np.ndarray) -> float:
        z = design @ at
        return float(np.logaddexp(0, z).sum() - target @ z)

    now = loss(beta)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ beta, -500, 500)))
        gradient = design.T @ (p - target)
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-9 * np.eye(2)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while length > 1e-6 and loss(beta - length * step) > now:
            length /= 2
        beta = beta - length * step
        before, now = now, loss(beta)
        if before - now < 1e-10 * max(1.0, abs(now)):
            break
    slope = float(beta[0] / scale)
    return (slope, float(beta[1])) if slope > 0 else (0.0, 0.0)


def user_cache() -> Path:
    """Where points are kept without a site: `$XDG_CACHE_HOME/fedqc/operating-points`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "fedqc" / "operating-points"


def _on_phantoms(model: Model, say: Callable[[str], None]) -> OperatingPoints:
    say(f"finding the operating point of this model on {PHANTOMS} phantoms; done once")
    return points_of(model, draw(PHANTOMS, PHANTOM_SEED, model.size), "phantoms")


def draw(patients: int, seed: int, size: int) -> Slices:
    """So many public phantoms. What draws them loads torch: only when points are to be found."""
    from common.physics.appearance import PUBLIC_APPEARANCES
    from common.physics.ct import projector
    from common.public_phantoms import draw as phantoms

    slices = phantoms(PUBLIC_APPEARANCES, patients, seed, size)
    projector.cache_clear()
    return slices


def _labelled(site: Path, size: int) -> tuple[Slices, str] | None:
    """This site's labelled training slices and the version of its index; None where its images are not
    prepared, or nothing is labelled.
    """
    try:
        cohort = load_cohort(site, size=size, quarantine="ignore", build=False)
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
    )
    return slices, cohort.fingerprint


def _kept(cache: Path, name: str, find: Callable[[], OperatingPoints]) -> OperatingPoints:
    path = cache / f"{name}-{FORMAT}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        value = json.loads(path.read_text(encoding="ascii"))
        return OperatingPoints(
            images={name: Point(**point) for name, point in value["images"].items()},
            patients={name: Point(**point) for name, point in value["patients"].items()},
        )
    found = find()
    with suppress(OSError):  # a site that cannot be written is judged all the same
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(path, json.dumps(asdict(found), sort_keys=True).encode("ascii"), 0o600)
    return found
