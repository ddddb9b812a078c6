"""Judge every slice, series and study below a path with one model.

Nothing here leaves the hospital. Slices are decoded into a private temporary folder, which is removed at the
end (a site's own images are read from its cache); what is kept of an image are its logits, and the pixels of
the few that a report shows.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from client.data.cohort import open_slices
from client.data.series import series_of_records
from client.dicom.cache import Slices, load_or_build, spared
from client.dicom.index import Problem, SliceRecord
from client.predict.model import Model, score
from client.predict.operating_point import OperatingPoints, Point
from client.predict.outside import MIN_BODY, MIN_BODY_OF_RUN, newest_profile, outside
from client.predict.severity import Grade, SeverityMap, grade_of
from client.site.config import read_site, site_key
from common.artifacts import MODALITIES, NAMES, Modality, applies_to, columns_of
from common.counts import patient_scores
from common.errors import ConfigError
from common.progress_bar import Progress, silent

MAX_PICTURES = 24
PICTURES_OF_A_FINDING = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What a model says about one artifact in an image, a series or a study."""

    artifact: str
    logit: float  # of a series or study: `common.counts.patient_scores`
    point: Point | None  # None: there is no threshold
    severity_map: SeverityMap | None = None  # None: severity is not known

    @property
    def probability(self) -> float | None:
        """None where it is not calibrated."""
        return None if self.point is None else self.point.probability(self.logit)

    @property
    def positive(self) -> bool | None:
        """None where there is no threshold, or one that raises too many alarms."""
        if self.point is None or not self.point.decides:
            return None
        return self.logit >= self.point.threshold

    @property
    def severity(self) -> float | None:
        """0 to 1 where it is called present, if severity is known."""
        return self.severity_map.severity(self.logit) if self.positive and self.severity_map else None

    @property
    def grade(self) -> Grade | None:
        """Of the severity."""
        return None if self.severity is None else grade_of(self.severity)


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """One slice."""

    number: int  # in its series, from 1
    file: str  # relative, local: an identifier
    frame: int
    at_scanner: int | None  # its number in the header
    outside: str  # why it is not judged, or ""
    findings: tuple[Finding, ...]  # none where it is not judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    number: int  # in its study, from 1
    at_scanner: int | None  # its number in the header
    modality: Modality
    images: tuple[Image, ...]  # in their order
    findings: tuple[Finding, ...]  # none where no image is judged
    ctdi_vol_mgy: float | None  # the largest of its headers

    @property
    def judged(self) -> int:
        """How many images are."""
        return sum(not image.outside for image in self.images)

    def positive_images(self, artifact: str) -> int:
        """How many images are called positive for it."""
        return sum(
            bool(finding.positive)
            for image in self.images
            for finding in image.findings
            if finding.artifact == artifact
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    number: int
    series: tuple[Series, ...]
    findings: tuple[Finding, ...]

    @property
    def positive(self) -> tuple[str, ...]:
        """Artifacts that the study or one of its series is called positive for."""
        found = {
            finding.artifact
            for one in (self.findings, *(series.findings for series in self.series))
            for finding in one
            if finding.positive
        }
        return tuple(name for name in NAMES if name in found)

    @property
    def ctdi_vol_mgy(self) -> float | None:
        """The largest of its series."""
        return max((one.ctdi_vol_mgy for one in self.series if one.ctdi_vol_mgy is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A slice that a report shows, int16 (S, S) as cached, and what for."""

    study: int
    series: int
    image: int
    modality: Modality
    finding: Finding
    pixels: np.ndarray
    where: np.ndarray | None = None  # float32 (S, S), at least 0; None: not asked for, or not tested


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall time."""

    read: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Predictions:
    model: Model
    points: OperatingPoints
    studies: tuple[Study, ...]
    pictures: tuple[Picture, ...]  # the most suspicious ones first
    files: int
    skipped: tuple[Problem, ...]  # files that are not used, with their codes
    skipped_slices: dict[str, int]  # code -> slices of files of which others are used
    duplicates: int
    has_profile: bool  # whether acquisitions were compared with those of this site's training patients
    seconds: Seconds

    @property
    def decides(self) -> bool:
        """Whether anything is called present or absent."""
        return any(finding.positive is not None for study in self.studies for finding in study.findings)

    @property
    def images(self) -> int:
        return sum(len(series.images) for study in self.studies for series in study.series)

    @property
    def judged(self) -> int:
        """Images that are."""
        return sum(series.judged for study in self.studies for series in study.series)


def predict(
    path: Path,
    model: Model,
    points: OperatingPoints,
    *,
    site: Path | None = None,
    only: Collection[tuple[str, int]] | None = None,
    explain: bool = False,
    progress: Progress = silent,
) -> Predictions:
    """Judge what lies at `path`: a DICOM file, a folder, a zip or tar archive, or a site folder.

    Args:
        site: the site whose training patients say which acquisitions are known.
        only: file and frame of the slices that are scored; None: all. The others keep their numbers and are
            outside, as `not-asked`.
        explain: say of each picture where the model sees the artifact, if such maps passed their test.
    Raises:
        ConfigError: `no-such-folder`, nothing is there; site.yaml.
        DataError: the temporary folder has no room (`disk-full`), or the site's cache cannot be written.
    """
    started = time.monotonic()
    key, profile = secrets.token_bytes(32), None
    if site is not None:
        config, folder = read_site(site)
        key, profile = site_key(folder / config.state), newest_profile(folder / config.state)
    with opened(path, key, model.size, progress) as slices:
        read_at = time.monotonic()
        records = slices.intake.records
        modality = np.array([MODALITIES.index(record.modality) for record in records], np.int8)
        found = series_of_records(records)
        series, order = found.series, found.order
        images = spared(slices.images)
        min_body = MIN_BODY if model.has_start else MIN_BODY_OF_RUN
        why = outside(records, images, slices.measures, series, profile=profile, key=key, min_body=min_body)
        if only is not None:
            why = [
                reason if (record.file, record.frame) in only else "not-asked"
                for record, reason in zip(records, why, strict=True)
            ]
        judged = np.flatnonzero([not reason for reason in why])
        logits = np.full((len(records), len(NAMES)), np.nan)
        if len(judged):
            own = score(model, images, modality, judged)
            known = [model.labels.index(name) for name in model.learned]
            logits[np.ix_(judged, np.array(columns_of(model.learned), int))] = own[:, known]
        may_occur = np.array([applies_to(name) for name in MODALITIES])[modality].reshape(logits.shape)
        logits[~may_occur] = np.nan
        studies, where = _studies(records, logits, why, series, order, points)
        pictures = _pictures(images, records, studies, where)
        if explain:
            from client.predict.explanation import map_of  # what only judges does not need it

            pictures = tuple(
                replace(one, where=map_of(model, one.pixels, one.modality, one.finding.artifact))
                for one in pictures
            )
        return Predictions(
            model=model,
            points=points,
            studies=studies,
            pictures=pictures,
            files=slices.intake.found,
            skipped=tuple(
                sorted(
                    (*slices.intake.quarantined, *slices.intake.excluded),
                    key=lambda problem: problem.number,
                )
            ),
            skipped_slices=slices.intake.excluded_slices,
            duplicates=len(slices.intake.duplicates),
            has_profile=profile is not None,
            seconds=Seconds(read=read_at - started, score=time.monotonic() - read_at),
        )


@contextmanager
def opened(path: Path, key: bytes, size: int, progress: Progress) -> Iterator[Slices]:
    """The slices at a path, for as long as they are needed."""
    if (path.is_file() and path.name == "site.yaml") or (path / "site.yaml").is_file():
        yield open_slices(path, size=size, progress=progress).slices
        return
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file or folder",
            code="no-such-folder",
            hint="PATH = a DICOM file, a folder, or a zip or tar archive",
        )
    real = path.resolve()
    with tempfile.TemporaryDirectory(prefix="fedqc-predict-") as folder:
        root, only = (real, "") if real.is_dir() else (real.parent, real.name)
        yield load_or_build(root, key, Path(folder), size, progress=progress, only=only)


def _studies(
    records: Sequence[SliceRecord],
    logits: np.ndarray,
    why: Sequence[str],
    series: np.ndarray,
    order: np.ndarray,
    points: OperatingPoints,
) -> tuple[tuple[Study, ...], dict[tuple[int, int, int], int]]:
    """Studies with their series and images, and the position of each image by its numbers."""
    members: dict[int, list[int]] = defaultdict(list)
    for at in order.tolist():
        members[int(series[at])].append(at)
    of_study: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, own in sorted(members.items(), key=lambda item: min(item[1])):
        first = records[own[0]]
        of_study[first.patient, first.study or f"series {number}"].append(number)
    studies, where = [], {}
    for study_number, numbers in enumerate(of_study.values(), start=1):
        found = []
        for series_number, number in enumerate(numbers, start=1):
            own = members[number]
            images = []
            for image_number, at in enumerate(own, start=1):
                where[study_number, series_number, image_number] = at
                images.append(
                    Image(
                        number=image_number,
                        file=records[at].file,
                        frame=records[at].frame,
                        at_scanner=records[at].instance_number,
                        outside=why[at],
                        findings=_findings(logits[at], points.images, points.severities),
                    )
                )
            doses = [dose for at in own if (dose := records[at].ctdi_vol_mgy) is not None]
            found.append(
                Series(
                    number=series_number,
                    at_scanner=records[own[0]].series_number,
                    modality=records[own[0]].modality,
                    images=tuple(images),
                    findings=_findings(_joined(logits[own]), points.patients, points.severities),
                    ctdi_vol_mgy=max(doses, default=None),
                )
            )
        together = [at for number in numbers for at in members[number]]
        studies.append(
            Study(
                number=study_number,
                series=tuple(found),
                findings=_findings(_joined(logits[together]), points.patients, points.severities),
            )
        )
    return tuple(studies), where


def _joined(logits: np.ndarray) -> np.ndarray:
    """The score of slices (n, A) as of one patient, (A,); nan: not judged or impossible."""
    return patient_scores(logits, np.where(np.isnan(logits), np.nan, 0.0), np.zeros(len(logits), int))[0]


def _findings(
    logits: np.ndarray, points: dict[str, Point], severities: dict[str, SeverityMap]
) -> tuple[Finding, ...]:
    return tuple(
        Finding(artifact=name, logit=float(logit), point=points.get(name), severity_map=severities.get(name))
        for name, logit in zip(NAMES, logits, strict=True)
        if not np.isnan(logit)
    )


def _pictures(
    images: np.ndarray,
    records: Sequence[SliceRecord],
    studies: Sequence[Study],
    where: dict[tuple[int, int, int], int],
) -> tuple[Picture, ...]:
    """The slices farthest above their thresholds, a few of each series and artifact."""
    candidates = []
    for study in studies:
        for series in study.series:
            of_artifact: dict[str, list[tuple[float, int, Finding]]] = defaultdict(list)
            for image in series.images:
                for finding in image.findings:
                    if finding.positive and finding.point is not None:
                        above = finding.logit - finding.point.threshold
                        of_artifact[finding.artifact].append((above, image.number, finding))
            for own in of_artifact.values():
                own.sort(key=lambda item: (-item[0], item[1]))
                candidates += [
                    (above, study.number, series.number, image, finding)
                    for above, image, finding in own[:PICTURES_OF_A_FINDING]
                ]
    candidates.sort(key=lambda item: (-item[0], item[1:4]))
    return tuple(
        Picture(
            study=study,
            series=series,
            image=image,
            modality=records[where[study, series, image]].modality,
            finding=finding,
            pixels=np.array(images[where[study, series, image]]),
        )
        for _, study, series, image, finding in candidates[:MAX_PICTURES]
    )
