"""Tell a hospital of itself: its cohort, a model's figures at its test patients, and the worst mistakes.

Only labelled test patients are scored. Those who trained a model, or chose its threshold, would flatter it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.data.cohort import Cohort, load_cohort
from client.data_check.cohort_table import cohort_table
from client.dicom.index import PARTS
from client.labels.reader_agreement import wilson
from client.predict.files import model_public
from client.predict.mistakes import Mistake, worst_of
from client.predict.mistakes import public as public_mistakes
from client.predict.model import Model
from client.predict.operating_point import OperatingPoints, Point
from client.predict.predict import Picture, Predictions, predict
from client.site.config import site_key
from common.artifacts import INDEX, MODALITIES, NAMES
from common.cohort_table import CohortTable
from common.counts import Counts, per_patient
from common.errors import DataError
from common.progress_bar import Progress, silent

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Share:
    """A proportion of patients with its 95 % interval (Wilson)."""

    count: int
    of: int

    @property
    def value(self) -> float:
        """Not a number of nobody."""
        return self.count / self.of if self.of else np.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Not a number of nobody."""
        return wilson(self.count, self.of)


@dataclass(frozen=True, kw_only=True)
class ArtifactScore:
    """How good the model is at one artifact of the test patients who were assessed for it."""

    artifact: str
    positives: int
    negatives: int
    auroc: float  # with its 95 % interval (`Counts.interval`); nan without both classes
    low: float
    high: float
    point: Point | None  # of patients, as predict uses it; None: none, or one with which nothing is decided
    found: int = 0  # positives who are called positive; of no point 0
    alarms: int = 0  # negatives who are

    @property
    def sensitivity(self) -> Share | None:
        """None where nothing is decided."""
        return Share(count=self.found, of=self.positives) if self.point else None

    @property
    def specificity(self) -> Share | None:
        """None where nothing is decided."""
        return Share(count=self.negatives - self.alarms, of=self.negatives) if self.point else None

    @property
    def alarms_per_100(self) -> float | None:
        """Patients who are called positive, rightly or not, of 100; None where nothing is decided."""
        return 100 * (self.found + self.alarms) / (self.positives + self.negatives) if self.point else None


@dataclass(frozen=True, kw_only=True)
class SiteReport:
    table: CohortTable
    found: Predictions  # of the labelled test patients; the other images are not judged
    patients: int  # labelled test patients of whom an image was judged
    unjudged: int  # and those of whom none was
    scores: tuple[ArtifactScore, ...]  # of artifacts that the model knows and a test patient was assessed for
    mistakes: tuple[Mistake, ...]
    pictures: tuple[Picture, ...]  # one a mistake, in the same order

    def not_scored(self) -> dict[str, int]:
        """Patients who are not scored: by part; `unlabelled`: of the test part; `none`: in no part."""
        parts = self.table["parts"]
        test = parts["test"]
        return {
            **{part: parts[part]["patients"] if part in parts else 0 for part in PARTS if part != "test"},
            "unlabelled": test["unlabelled"] + test["disputed"],
            "none": self.table["left_out"],
        }


def site_report(
    site: Path,
    model: Model,
    find_points: Callable[[], OperatingPoints],
    *,
    progress: Progress = silent,
) -> SiteReport:
    """Score the labelled test patients of a site, each image as `predict` does.

    Args:
        find_points: gives the thresholds; asked for once there is something to score.
    Raises:
        ConfigError: site.yaml.
        DataError: `labels-missing`, no test patient has a label; or as `load_cohort`.
    """
    cohort = load_cohort(site, size=model.size, quarantine="ignore", labels=NAMES)
    test = (cohort.part == PARTS.index("test")) & ~np.isnan(cohort.labels).all(axis=1)
    if not test.any():
        raise DataError(
            f"{cohort.folder}: no test patient has a label",
            code="labels-missing",
            hint="fedqc data labels SITE --sheets 2",
        )
    chosen = set(cohort.patients[test].tolist())
    points = find_points()
    found = predict(
        site,
        model,
        points,
        site=site,
        only={
            (record.file, record.frame)
            for record, patient in zip(cohort.records, cohort.patients.tolist(), strict=True)
            if patient in chosen
        },
        progress=progress,
    )
    logits = _logits(found, cohort)
    judged = set(cohort.patients[~np.isnan(logits).all(axis=1)].tolist())
    mistakes = worst_of(found, cohort)
    return SiteReport(
        table=cohort_table(
            cohort.site.name,
            cohort.records,
            cohort.report,
            cohort.part,
            site_key(cohort.folder / cohort.site.state),
            NAMES,
            scored="test",
        ),
        found=found,
        patients=len(judged),
        unjudged=len(chosen - judged),
        scores=_scores(logits, cohort, points),
        mistakes=mistakes,
        pictures=tuple(_picture(one, found, cohort) for one in mistakes),
    )


def _logits(found: Predictions, cohort: Cohort) -> np.ndarray:
    """What the model said of each slice of the cohort, (n, artifacts); nan: not judged, or not known."""
    at = {(record.file, record.frame): row for row, record in enumerate(cohort.records)}
    logits = np.full(cohort.labels.shape, np.nan)
    for study in found.studies:
        for series in study.series:
            for image in series.images:
                for finding in image.findings:
                    logits[at[image.file, image.frame], INDEX[finding.artifact]] = finding.logit
    return logits


def _scores(logits: np.ndarray, cohort: Cohort, points: OperatingPoints) -> tuple[ArtifactScore, ...]:
    """By patient, as a federation scores its test patients: of the slices that were judged and assessed."""
    labels = np.where(np.isnan(logits), np.nan, cohort.labels)
    values, truth = per_patient(logits, labels, cohort.patients)
    scores = []
    for place, name in enumerate(NAMES):
        positives = values[truth[:, place] == 1, place]
        negatives = values[truth[:, place] == 0, place]
        if not len(positives) + len(negatives):
            continue
        edges, where = np.unique(np.concatenate([positives, negatives]), return_inverse=True)
        # one bin for each value: exact
        counts = Counts(
            positives=np.bincount(where[: len(positives)], minlength=len(edges))[None],
            negatives=np.bincount(where[len(positives) :], minlength=len(edges))[None],
        )
        low, high = counts.interval()
        point = points.patients.get(name)
        point = point if point is not None and point.decides else None
        scores.append(
            ArtifactScore(
                artifact=name,
                positives=len(positives),
                negatives=len(negatives),
                auroc=float(counts.auroc()[0]),
                low=float(low[0]),
                high=float(high[0]),
                point=point,
                found=int((positives >= point.threshold).sum()) if point else 0,
                alarms=int((negatives >= point.threshold).sum()) if point else 0,
            )
        )
    return tuple(scores)


def _picture(one: Mistake, found: Predictions, cohort: Cohort) -> Picture:
    image = found.studies[one.study - 1].series[one.series - 1].images[one.image - 1]
    return Picture(
        study=one.study,
        series=one.series,
        image=one.image,
        modality=MODALITIES[cohort.modality[one.position]],
        finding=next(finding for finding in image.findings if finding.artifact == one.artifact),
        pixels=np.array(cohort.images[one.position]),
    )


def public(report: SiteReport, *, names: bool = False) -> dict[str, Any]:
    """All of it for programs, without pictures.

    Args:
        names: also the file of each mistake.
    """
    return {
        "format": FORMAT,
        "local_only": True,
        "medical_device": False,
        "cohort": report.table,
        "model": model_public(report.found.model),
        "patients": {"scored": report.patients, "not_judged": report.unjudged} | report.not_scored(),
        "scores": [_public(score) for score in report.scores],
        "mistakes": [
            said | ({"file": file_of(one, report)} if names else {})
            for one, said in zip(report.mistakes, public_mistakes(report.mistakes), strict=True)
        ],
    }


def file_of(one: Mistake, report: SiteReport) -> str:
    """The file of a mistake, which may name a patient."""
    return report.found.studies[one.study - 1].series[one.series - 1].images[one.image - 1].file


def _public(score: ArtifactScore) -> dict[str, Any]:
    said: dict[str, Any] = {
        "artifact": score.artifact,
        "positives": score.positives,
        "negatives": score.negatives,
        "auroc": _number(score.auroc),
        "auroc_interval": [_number(score.low), _number(score.high)],
        "threshold": None if score.point is None else round(score.point.threshold, 4),
        "threshold_of": None if score.point is None else score.point.origin,
    }
    for name, share in (("sensitivity", score.sensitivity), ("specificity", score.specificity)):
        said[name] = None if share is None else _number(share.value)
        said[f"{name}_interval"] = None if share is None else [_number(end) for end in share.interval]
    alarms = score.alarms_per_100
    return said | {"alarms_per_100": None if alarms is None else round(alarms, 2)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
