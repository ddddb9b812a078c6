"""Describe a site's cohort: Table 1 by part, and the flow from the files found to the patients scored.

It is computed of patients without noise and stays at the hospital: `fedqc data check` shows it. A simulation
keeps it of sites of kind public or synthetic, whose scores are exact, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from client.data.cohort import Cohort, IntakeReport
from client.data_check.profile import word
from client.data_check.vocabulary import MISSING, OTHER, body_part
from client.dicom.index import PARTS, Intake, SliceRecord
from client.dicom.patients import words_of_sex
from client.site.config import site_key
from client.site.kind import admit_kind
from common.artifacts import columns_of
from common.cohort_table import (
    NOT_STATED,
    ArtifactCounts,
    CohortTable,
    Column,
    FileStep,
    PartFlow,
    Quartiles,
)
from common.errors import RefusedError


def table_of_cohort(cohort: Cohort, *, everyone: bool) -> dict[str, Any] | None:
    """The cohort of a simulated site as a run folder may keep it; None of a hospital, whose stays there, and
    of a site that only says it is none.

    Args:
        everyone: whether all its patients are scored, not those of the test part.
    """
    try:
        admit_kind(cohort.site, cohort.folder)
    except RefusedError:
        return None
    if cohort.site.kind == "hospital":
        return None
    table = cohort_table(
        cohort.site.name,
        cohort.records,
        cohort.report,
        cohort.part,
        site_key(cohort.folder / cohort.site.state),
        cohort.artifacts,
        scored="all" if everyone else "test",
    )
    return dict(table)


def cohort_table(
    site: str,
    records: Sequence[SliceRecord],
    report: IntakeReport,
    parts: np.ndarray | None,
    key: bytes,
    artifacts: Sequence[str],
    *,
    scored: str,
) -> CohortTable:
    """The cohort of n slices.

    Args:
        site: its name, or that of a folder.
        parts: int8 (n,), positions in PARTS, -1: in none; None where the site has no parts.
        key: the site's, under which the cache keeps the sex of a patient.
        artifacts: of the labels that count.
        scored: the part whose patients are scored, or "all".
    """
    names = np.array([record.patient for record in records], dtype=np.str_)
    places = columns_of(artifacts)
    present, severity = report.labels.present[:, places], report.labels.severity[:, places]
    disputed = np.asarray(report.labels.disputed[:, places].any(1))
    sexes = words_of_sex(key)

    def column(chosen: np.ndarray) -> Column:
        return _column(
            [records[row] for row in np.flatnonzero(chosen).tolist()],
            present[chosen],
            severity[chosen],
            artifacts,
            key,
            sexes,
        )

    in_part = np.zeros(len(records), np.int8) if parts is None else parts
    used = in_part >= 0
    flows: dict[str, PartFlow] = {}
    columns = {"all": column(used)}
    for place, part in enumerate(PARTS if parts is not None else ()):
        own = in_part == place
        if own.any():
            columns[part] = column(own)
            flows[part] = _part_flow(names[own], present[own], disputed[own])
    return CohortTable(
        site=site,
        columns=columns,
        files=_files(report.intake),
        left_out=len(set(names[~used].tolist()) - set(names[used].tolist())),
        parts=flows,
        scored=scored,
    )


def _column(
    records: Sequence[SliceRecord],
    present: np.ndarray,
    severity: np.ndarray,
    artifacts: Sequence[str],
    key: bytes,
    sexes: dict[str, str],
) -> Column:
    """One column; `present` and `severity` are (slices, artifacts)."""
    age: dict[str, float] = {}
    sex: dict[str, set[str]] = defaultdict(set)
    fields: dict[str, set[tuple[str, str]]] = {
        name: set() for name in ("modality", "vendor", "field_strength_t", "kvp", "body_part")
    }
    studies: set[str] = set()
    for record in records:
        study = f"{record.patient} {record.study}"
        studies.add(study)
        sex[record.patient].update(filter(None, [sexes.get(record.sex)]))
        if record.age_years is not None:
            age[record.patient] = min(record.age_years, age.get(record.patient, record.age_years))
        own = {"modality": record.modality, "vendor": word("vendor", record, key)}
        own["body_part"] = body_part(record.body_part) or (OTHER if record.body_part.strip() else MISSING)
        own |= {
            name: word(name, record, key)
            for name in (("kvp",) if record.modality == "CT" else ("field_strength_t",))
        }
        for name, value in own.items():
            fields[name].add((study, OTHER if value.startswith(f"{OTHER}-") else value))
    patients = np.array([record.patient for record in records], dtype=np.str_)
    return Column(
        patients=len(sex),
        studies=len(studies),
        slices=len(records),
        age_years=quartiles(age.values()),
        sex=dict(Counter(next(iter(one)) if len(one) == 1 else NOT_STATED for one in sex.values())),
        **{name: dict(Counter(value for _, value in pairs)) for name, pairs in fields.items()},  # type: ignore[typeddict-item]
        artifacts={
            name: found
            for place, name in enumerate(artifacts)
            if (found := _artifact(patients, present[:, place], severity[:, place]))["assessed"]
        },
    )


def _artifact(patients: np.ndarray, present: np.ndarray, severity: np.ndarray) -> ArtifactCounts:
    """Of the slices (n,) of a part."""
    worst: dict[str, float] = {}
    for row in np.flatnonzero((present == 1) & ~np.isnan(severity)):
        worst[patients[row]] = max(float(severity[row]), worst.get(patients[row], 0.0))
    return ArtifactCounts(
        assessed=len(np.unique(patients[~np.isnan(present)])),
        present=len(np.unique(patients[present == 1])),
        severity=quartiles(worst.values()),
    )


def quartiles(values: Iterable[float]) -> Quartiles:
    """Median and quartiles, by linear interpolation."""
    found = sorted(values)
    if not found:
        return Quartiles(n=0, median=None, q1=None, q3=None)
    q1, median, q3 = (round(float(value), 4) for value in np.quantile(found, (0.25, 0.5, 0.75)))
    return Quartiles(n=len(found), median=median, q1=q1, q3=q3)


def _part_flow(names: np.ndarray, present: np.ndarray, disputed: np.ndarray) -> PartFlow:
    """Of the slices (n,) of a part. A patient is disputed who has no label but one that readers dispute."""
    patients = set(names.tolist())
    labelled = set(names[~np.isnan(present).all(1)].tolist())
    undecided = set(names[disputed].tolist()) - labelled
    return PartFlow(
        patients=len(patients),
        slices=len(names),
        unlabelled=len(patients - labelled - undecided),
        disputed=len(undecided),
        labelled=len(labelled),
    )


def _files(intake: Intake) -> list[FileStep]:
    """The steps of the intake, each with the files that were lost in it by code.

    Files are lost in reading, by a rule, and, after their pixels were decoded, as duplicates, as conflicts of
    one UID or because the pixels cannot be read.
    """
    steps = {step.name: step for step in intake.flow}
    before = steps.get("in the cohort", steps["used"])  # metrics of scans are found and used, nothing else
    quarantined = Counter(problem.code for problem in intake.quarantined)
    late = {"conflict": quarantined.pop("conflict", 0), "duplicate": len(intake.duplicates)}
    late["unreadable"] = before.files - steps["used"].files - sum(late.values())
    quarantined["unreadable"] -= late["unreadable"]
    lost: dict[str, dict[str, int]] = {
        "found": {},
        "readable": quarantined,
        "in the cohort": Counter(problem.code for problem in intake.excluded),
        "used": late,
    }
    return [
        FileStep(
            step=name,
            files=steps[name].files,
            slices=steps[name].slices,
            patients=steps[name].patients,
            lost={code: count for code, count in sorted(codes.items()) if count},
            lost_slices=dict(sorted(intake.excluded_slices.items())) if name == "in the cohort" else {},
        )
        for name, codes in lost.items()
        if name in steps
    ]
