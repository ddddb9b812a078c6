"""Predictions as CSV and JSON. Local: with `names` they hold file names, which may name patients."""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

from client.predict.model import Model
from client.predict.predict import Finding, Image, Predictions, Series, Study
from client.predict.text import next_steps

COLUMNS = (
    "study",
    "series",
    "image",
    "modality",
    "series_number",
    "instance_number",
    "artifact",
    "logit",
    "probability",
    "present",
    "severity",
    "grade",
    "threshold",
    "origin",
    "not_judged",
    "model_sha256",
    "epsilon",
    "seconds",
)
_CELLS = COLUMNS[COLUMNS.index("artifact") : COLUMNS.index("not_judged")]
FORMAT = 1


def csv_text(found: Predictions, *, names: bool) -> str:
    """One row an image and artifact that can occur in it; an image that is not judged has one row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS, *(("file", "frame") if names else ())])
    seconds = f"{_seconds_an_image(found):.4f}"
    tail = ("+".join(found.model.hashes), found.model.privacy.text, seconds)
    for study in found.studies:
        for series in study.series:
            for image in series.images:
                at_scanner = ("" if one is None else one for one in (series.at_scanner, image.at_scanner))
                head = (study.number, series.number, image.number, series.modality, *at_scanner)
                named = (_safe(image.file), image.frame) if names else ()
                if image.outside:
                    writer.writerow([*head, *[""] * len(_CELLS), image.outside, *tail, *named])
                for finding in image.findings:
                    writer.writerow([*head, *_cells(finding), "", *tail, *named])
    return stream.getvalue()


def _cells(finding: Finding) -> tuple[str, ...]:
    probability, positive, point = finding.probability, finding.positive, finding.point
    severity = finding.severity
    return (
        finding.artifact,
        f"{finding.logit:.4f}",
        "" if probability is None else f"{probability:.4f}",
        "" if positive is None else str(int(positive)),
        "" if severity is None else f"{severity:.2f}",
        finding.grade or "",
        "" if point is None else f"{point.threshold:.4f}",
        "" if point is None else point.origin,
    )


def _safe(file: str) -> str:
    """A file name that a spreadsheet does not take for a formula."""
    return f"'{file}" if file[:1] in "=+-@" else file


def _seconds_an_image(found: Predictions) -> float:
    return (found.seconds.read + found.seconds.score) / max(1, found.images)


def public(found: Predictions, *, names: bool) -> dict[str, Any]:
    """All of it for programs.

    Args:
        names: also file names.
    """
    model = found.model
    return {
        "format": FORMAT,
        "local_only": True,
        "medical_device": False,
        "model": model_public(model) | {"members": [model_public(one) for one in model.members]},
        "operating_points": {
            level: {name: vars(point) for name, point in points.items()}
            for level, points in (("images", found.points.images), ("patients", found.points.patients))
        },
        "severity": {
            name: {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in vars(one).items()
                if key not in ("logits", "severities")
            }
            for name, one in found.points.severities.items()
        },
        "acquisition_compared": found.has_profile,
        "seconds": {
            "read": round(found.seconds.read, 3),
            "score": round(found.seconds.score, 3),
            "an_image": round(_seconds_an_image(found), 4),
        },
        "files": {
            "found": found.files,
            "duplicates": found.duplicates,
            "skipped": [
                {"number": one.number, "code": one.code} | ({"detail": one.detail} if names else {})
                for one in found.skipped
            ],
            "skipped_codes": dict(sorted(Counter(one.code for one in found.skipped).items())),
            "skipped_slices": found.skipped_slices,
        },
        "studies": [_study(study, names) for study in found.studies],
        "next_steps": [
            {
                "artifact": step.artifact,
                "studies": list(step.studies),
                "repeat_can_cure": step.remedy.repeat,
                "ctdi_vol_mgy": step.doses,
                "steps": {"en": list(step.remedy.en), "zh": list(step.remedy.zh)},
                "sources": list(step.remedy.sources),
            }
            for step in next_steps(found.studies)
        ],
    }


def model_public(model: Model) -> dict[str, Any]:
    """Which model it is, for programs."""
    return {
        "sha256": model.sha256,
        "network": model.name,
        "image_size": model.size,
        "origin": model.origin,
        "start": model.start,
        "run": model.run,
        "arm": model.arm,
        "privacy": vars(model.privacy),
    }


def _study(study: Study, names: bool) -> dict[str, Any]:
    return {
        "study": study.number,
        "findings": [_finding(finding) for finding in study.findings],
        "ctdi_vol_mgy": study.ctdi_vol_mgy,
        "series": [_series(series, names) for series in study.series],
    }


def _series(series: Series, names: bool) -> dict[str, Any]:
    return {
        "series": series.number,
        "series_number": series.at_scanner,
        "modality": series.modality,
        "findings": [
            _finding(finding) | {"images_above": series.positive_images(finding.artifact)}
            for finding in series.findings
        ],
        "ctdi_vol_mgy": series.ctdi_vol_mgy,
        "images": [_image(image, names) for image in series.images],
    }


def _image(image: Image, names: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "image": image.number,
        "instance_number": image.at_scanner,
        "not_judged": image.outside or None,
        "findings": [_finding(finding) for finding in image.findings],
    }
    return found | ({"file": image.file, "frame": image.frame} if names else {})


def _finding(finding: Finding) -> dict[str, Any]:
    probability, point, severity = finding.probability, finding.point, finding.severity
    return {
        "artifact": finding.artifact,
        "logit": round(finding.logit, 4),
        "probability": None if probability is None else round(probability, 4),
        "present": finding.positive,
        "severity": None if severity is None else round(severity, 2),
        "grade": finding.grade,
        "threshold": None if point is None else round(point.threshold, 4),
    }
