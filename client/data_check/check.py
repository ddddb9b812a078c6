"""Compute the findings of `fedqc data check`, once for terminal, JSON and page.

A folder with a site.yaml is a site: its images, labels and split are looked at, and what is written goes
below its state folder. Any other folder is looked at as images only; its cache and its key then lie in the
user's cache directory, and nothing is written into the folder.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.data.cohort import (
    IntakeReport,
    SiteSlices,
    admit_quarantine,
    assign_parts,
    image_names,
    intake_report,
    open_slices,
    patient_forms,
)
from client.data.inclusion import OptOuts, has_old_age_keys
from client.data_check import screening
from client.data_check.cohort_table import cohort_table
from client.data_check.profile import (
    Acquisition,
    Move,
    Profile,
    acquisition_table,
    keep_profile,
    moves,
    profile_path,
    read_profile,
)
from client.data_check.vocabulary import OTHER, WORDS, said
from client.dicom.cache import Slices, load_or_build
from client.dicom.index import MAX_QUARANTINED, PARTS, Intake, SliceRecord, pseudonym
from client.dicom.patients import AS_WRITTEN, alike, of_several_issuers, of_several_people, without_id
from client.dicom.provenance import sample, with_real_ids
from client.dicom.reading import KNOWN_POINTS_HU
from client.labels.label_sheet import LabelTable, MatchedLabels, inspect_labels, inspect_match
from client.labels.spreadsheet import SheetProblem
from client.site.config import SiteConfig, next_bucket, right_bucket, site_key
from client.site.kind import admit_kind
from client.site.ledger_rows import LedgerError
from client.site.policy import missing_ethics
from client.site.site_ledger import found_elsewhere
from client.site.split import SiteSplit, split_of_site
from common.artifacts import MODALITIES, NAMES, Modality, applies_to
from common.cohort_table import CohortTable
from common.errors import ConfigError, DataError, FedqcError, RefusedError
from common.plan import Split
from common.preprocess import DEFAULT_SIZE
from common.progress_bar import Progress

Level = Literal["stop", "warning", "note"]
ProfileOrigin = Literal["file", "ledger", "earlier index", "this index"]
Verdict = Literal["ready", "ready with warnings", "not ready"]

FEW_PATIENTS = 50  # the smallest nominal number of patients under which noise leaves something to learn
MANY_DUPLICATES = 0.01
MANY_EXCLUDED = 0.2
_OTHER_FORMATS = frozenset({"picture-file", "volume-file"})
_WITHOUT_WARNING = _OTHER_FORMATS | {"lossy", "foreign-file"}  # or with a finding of their own
KEPT_PROFILES = 20
SHOWN_NUMBERS = 200  # file numbers in JSON, of each list
_PLAUSIBLE: dict[str, tuple[float, float]] = {
    "slice_thickness_mm": (0.05, 50.0),
    "pixel_spacing_mm": (0.02, 20.0),
    "field_strength_t": (0.01, 15.0),
    "kvp": (20.0, 200.0),
    "echo_time_ms": (0.01, 1000.0),
    "repetition_time_ms": (0.5, 60_000.0),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is looked at."""

    path: Path  # as it was given
    state: Path  # where cache and key are
    key: bytes
    slices: Slices
    found: SiteSlices | None  # None: a folder without site.yaml

    @property
    def site(self) -> SiteConfig | None:
        return self.found.site if self.found else None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason for the verdict. Its words are in `words.py`, by code; `values` are counts and words of
    ours.
    """

    code: str
    level: Level
    values: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """The comparison with the profile that a model was trained on."""

    source: ProfileOrigin
    trained_patients: int
    compared: Literal["patients not trained on", "all patients"]
    patients: int
    moves: tuple[Move, ...]


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """All that was found. Arrays are over the usable slices."""

    subject: Subject
    intake: IntakeReport
    has_labels: bool  # whether there is a sheet that could be read
    split: SiteSplit | None  # what a run would use; None: a folder without site.yaml, or it cannot be used
    problems: tuple[SheetProblem, ...]
    findings: tuple[Finding, ...]
    profile: Profile
    patients: np.ndarray  # int64 (n,)
    parts: np.ndarray  # int8 (n,); -1: in no part
    artifact_patients: dict[str, dict[str, dict[str, int]]]  # artifact -> part -> present, absent
    # artifact -> present, absent -> assessed slices of such a patient: least, median, most
    artifact_slices: dict[str, dict[str, tuple[int, float, int]]]
    measures: np.ndarray  # float64 (n, 3)
    outliers: screening.Outliers
    duplicates: screening.Duplicates
    scanners: np.ndarray  # int64 (n,)
    trends: tuple[screening.Trend, ...]
    drift: Drift | None

    @property
    def verdict(self) -> Verdict:
        levels = {finding.level for finding in self.findings}
        return "not ready" if "stop" in levels else "ready with warnings" if "warning" in levels else "ready"

    @property
    def opt_outs(self) -> OptOuts | None:
        """The opt-out list against this folder; None without a site.yaml."""
        found = self.subject.found
        return found.admission.opt_outs(found.slices) if found else None

    @cached_property
    def numbers(self) -> np.ndarray:
        """File number of each slice, int64."""
        return np.array([record.number for record in self.subject.slices.intake.records], np.int64)

    @cached_property
    def table(self) -> CohortTable:
        """Table 1 and the flow; of a folder without site.yaml one column and no parts."""
        site = self.subject.site
        return cohort_table(
            site.name if site else "folder",
            self.subject.slices.intake.records,
            self.intake,
            self.parts if self.intake.patients_by_part else None,
            self.subject.key,
            NAMES,
            scored="test",
        )

    @property
    def months(self) -> tuple[str, str] | None:
        """The first and the last month of which there are studies."""
        dates = [
            month
            for record in self.subject.slices.intake.records
            if (month := screening.month_of(record.study_date))
        ]
        return (min(dates), max(dates)) if dates else None

    @property
    def next_bucket(self) -> tuple[int, int] | None:
        """How many more training patients reach the next bucket, and that bucket."""
        parts = self.intake.patients_by_part
        return next_bucket(parts["train"]) if self.subject.site is not None and parts else None

    def scanner_rows(self) -> list[dict[str, Any]]:
        """Each scanner by number: maker and model in words that may be shown, slices, patients."""
        records, rows = self.subject.slices.intake.records, []
        for number in range(int(self.scanners.max(initial=-1)) + 1):
            own = np.flatnonzero(self.scanners == number)
            first = records[int(own[0])]
            words = {field: said(field, first, self.subject.key) for field in ("vendor", "model")}
            rows.append(
                {"scanner": number + 1}
                | words
                | {"slices": len(own), "patients": len(set(self.patients[own].tolist()))}
            )
        return rows

    def public(self) -> dict[str, Any]:
        """The report for programs: counts, file and row numbers, codes and words of ours. It stays in the
        hospital all the same.
        """
        found = self.intake.public()
        if self.subject.site is None:
            found |= {"patients_by_part": {}, "labels": {}, "label_problems": {}, "split": None}
            found |= {"opt_out": None, "unit": "patient"}
        else:
            found |= {
                "opt_out": asdict(self.opt_outs) if self.opt_outs else None,
                "unit": self.subject.site.patients.unit,
            }
        found |= {"split_shares": None, "next_bucket": None}
        if self.split is not None:
            shares = dict(zip(PARTS, self.split.shares, strict=True))
            found["split_shares"] = shares | {"from": self.split.origin}
        if (missing := self.next_bucket) is not None:
            found["next_bucket"] = {"patients": missing[0], "bucket": missing[1]}
        duplicates = self.duplicates
        return found | {
            "verdict": self.verdict,
            "findings": [{"code": one.code, "level": one.level, **one.values} for one in self.findings],
            "problems": [problem.public() for problem in self.problems],
            "artifact_patients": self.artifact_patients,
            "artifact_slices": self.artifact_slices,
            "acquisition": acquisition_table(self.profile),
            "scanners": self.scanner_rows(),
            "months": list(self.months) if self.months else None,
            "outliers": {"slices": len(self.outliers.slices), "files": self._files(self.outliers.slices)},
            "near_duplicates": {
                "slices": int(duplicates.across_patients.sum()),
                "slices_across_split": int(duplicates.across_split.sum()),
                "pairs_of_files": [[int(self.numbers[place]) for place in pair] for pair in duplicates.pairs],
                "is_complete": duplicates.is_complete,
            },
            "trends": [_trend(trend) for trend in self.trends],
            "cohort": self.table,
            "against_training": None if self.drift is None else _drift(self.drift),
        }

    def _files(self, slices: np.ndarray) -> list[int]:
        return list(dict.fromkeys(self.numbers[slices].tolist()))[:SHOWN_NUMBERS]


def look(
    path: Path, *, size: int = DEFAULT_SIZE, progress: Progress = lambda stage, done, total: None
) -> Subject:
    """Read a site's images, or those of any folder, or open the cache.

    Raises:
        ConfigError: site.yaml or cohort.yaml; `no-such-site` (no such folder, or a folder of sites),
            `bad-cache-folder`.
        DataError: `no-such-folder`, or about the cache.
    """
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{path}: a file, not a folder", code="no-such-site", hint="name the folder that it lies in"
        )
    if path.is_file() or (path / "site.yaml").exists():
        found = open_slices(path, size=size, progress=progress)
        return Subject(
            path=path, state=found.folder / found.site.state, key=found.key, slices=found.slices, found=found
        )
    if not path.is_dir():
        raise ConfigError(
            f"{path}: no such folder",
            code="no-such-site",
            hint="a site folder with a site.yaml, or any folder with images",
        )
    below = sorted(
        {found.parent for pattern in ("*/site.yaml", "*/*/site.yaml") for found in path.glob(pattern)}
    )
    if below:
        raise ConfigError(
            f"{path}/site.yaml: is not there, but {len(below)} folders below hold one",
            code="no-such-site",
            hint="check them one by one",
        )
    state = state_of_folder(path)
    key = site_key(state)
    slices = load_or_build(path, key, state / "cache", size, progress=progress)
    return Subject(path=path, state=state, key=key, slices=slices, found=None)


def state_of_folder(path: Path) -> Path:
    """Where the cache and the key of a folder without site.yaml are kept: private, and named by the digest of
    the folder's path.

    Raises:
        ConfigError: `bad-cache-folder`, it would lie among the images, or cannot be made.
    """
    real = path.resolve()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    state = base.absolute() / "fedqc" / hashlib.sha256(os.fsencode(real)).hexdigest()[:16]
    hint = "XDG_CACHE_HOME names another folder for caches"
    if state.resolve().is_relative_to(real):
        raise ConfigError(
            f"{state}: the cache would lie inside the folder to check",
            code="bad-cache-folder",
            hint=hint,
        )
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        state.parent.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"{state}: cannot be made: {error.strerror}", code="bad-cache-folder", hint=hint
        ) from None
    return state


def examine(
    subject: Subject,
    *,
    plan_split: Split | None = None,
    against: Literal["nothing", "own"] | Path = "nothing",
) -> Readiness:
    """All findings on what was read. Of the pixels nothing is read.

    Args:
        plan_split: the shares that a plan asks for; see client/site/split.py for those that are used.
        against: a profile to compare with: the site's own training patients', or that of a file.
    Raises:
        DataError: `no-profile`, `bad-profile`.
    """
    slices = subject.slices
    records, key = slices.intake.records, subject.key
    names, patients = np.unique(
        np.array([record.patient for record in records], dtype=np.str_), return_inverse=True
    )
    modality = np.array([MODALITIES.index(record.modality) for record in records], np.int8)
    may_occur = np.array([applies_to(name) for name in MODALITIES])[modality].reshape(
        len(records), len(NAMES)
    )
    table, problems, findings = _sheet(subject)
    rule = subject.site.consensus if subject.site else "agree"
    matched, more = inspect_match(table, image_names(records), may_occur, rule, key=key)
    problems = (*problems, *more)
    if records and table.rows and len(matched.rows_without_image) == len(table.rows):
        findings.append(Finding(code="labels-match-nothing", level="stop", values={"rows": len(table.rows)}))
    if problems:
        codes = dict(Counter(problem.code for problem in problems))
        findings.append(
            Finding(
                code="label-problems",
                level="stop",
                values={"problems": len(problems), "codes": _listed(codes)},
            )
        )
    of_patients: np.ndarray | None = None
    split: SiteSplit | None = None
    if subject.found is not None:
        try:
            split = split_of_site(subject.found.site, subject.found.folder, plan_split)
            of_patients = assign_parts(
                patients, names.tolist(), records=records, labels=matched, key=key, split=split.shares
            )
        except (ConfigError, RefusedError) as error:
            findings.append(Finding(code=error.code, level="stop", values={"problem": error.message}))
        except DataError as error:
            findings.append(Finding(code=error.code, level="stop", values={}))
    left_out, unusable = _elsewhere(subject)
    findings += unusable
    if of_patients is not None and left_out:
        of_patients = np.where(np.isin(names, sorted(left_out)), np.int8(-1), of_patients)
    intake = intake_report(
        slices.intake,
        matched,
        modality=modality,
        patients=len(names),
        parts=of_patients,
        left_out=len(left_out),
    )
    parts = np.full(len(records), -1, np.int8) if of_patients is None else of_patients[patients]
    measures = np.array([measured[:3] for measured in slices.measures], np.float64).reshape(-1, 3)
    hashes = np.array([int(measured[3], 16) for measured in slices.measures], np.uint64)
    series = np.unique([record.series or f"file {record.number}" for record in records], return_inverse=True)[
        1
    ]
    outliers = screening.outliers(measures, screening.protocols(records))
    duplicates = screening.near_duplicates(hashes, measures, modality, series, patients, parts)
    scanners, _ = screening.scanners_of(records)
    trends = tuple(screening.trends(records, outliers.z, scanners))
    acquisition = Acquisition(records, slices.measures, key)
    if subject.found is not None and of_patients is not None:
        _keep(subject, acquisition, parts == PARTS.index("train"))
    drift = None if against == "nothing" or not records else _compared(subject, acquisition, against)
    counts = {} if of_patients is None else _artifact_patients(matched, patients, parts)
    has_labels = bool(table.rows)
    is_readable = has_labels and not any(finding.level == "stop" for finding in findings)
    findings += [
        *_on_files(subject),
        *_on_patients(subject, intake, names.tolist(), of_patients),
        *_on_consent(subject),
        *_on_labels(intake, counts, has_labels=has_labels),
        *_on_intensities(subject, series),
        *(_on_assessed(subject.site, matched.present, parts) if subject.site and is_readable else ()),
        *_on_images(subject, scanners, duplicates, outliers),
        *_on_time(trends, drift),
    ]
    order = ("stop", "warning", "note")
    return Readiness(
        subject=subject,
        intake=intake,
        has_labels=has_labels,
        split=split,
        problems=tuple(sorted(problems, key=lambda problem: (problem.row, problem.column or 0))),
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.level))),
        profile=acquisition.profile(),
        patients=patients,
        parts=parts,
        artifact_patients=counts,
        artifact_slices={} if of_patients is None else _artifact_slices(matched, patients, parts),
        measures=measures,
        outliers=outliers,
        duplicates=duplicates,
        scanners=scanners,
        trends=trends,
        drift=drift,
    )


def paths_text(subject: Subject) -> list[str]:
    """Lines for the operator's own terminal, never for a file or log: quarantined files by path, and the
    texts behind `other-3f2a`.
    """
    lines = [
        f"file {problem.number} [{problem.code}] {problem.detail}"
        for problem in subject.slices.intake.quarantined
    ]
    behind = {
        f"{field} {word}": getattr(record, WORDS[field][1])
        for record in subject.slices.intake.records
        for field in WORDS
        if (word := said(field, record, subject.key)).startswith(f"{OTHER}-")
    }
    return [
        *lines,
        *(f"{word} = {text!r}" for word, text in sorted(behind.items())),
        *_patients_text(subject),
    ]


def _patients_text(subject: Subject) -> list[str]:
    """Of each patient whose ID needs a look, one file: the IDs themselves are not kept."""
    records = subject.slices.intake.records
    first = {record.patient: record.path for record in reversed(records)}
    lines = [
        f"patient-ids-alike, group {number}: {first[patient]}"
        for number, group in enumerate(alike(records), start=1)
        for patient in group
    ]
    lines += [f"patient-id-of-several: {first[patient]}" for patient in sorted(of_several_people(records))]
    lines += [f"patient-id-of-issuers: {first[patient]}" for patient in sorted(of_several_issuers(records))]
    if subject.found is not None:
        close = {record.patient for record in records if subject.found.admission.is_near(record)}
        lines += [f"opt-out-alike: {first[patient]}" for patient in sorted(close)]
    return lines


def _sheet(subject: Subject) -> tuple[LabelTable, tuple[SheetProblem, ...], list[Finding]]:
    """The label sheet as far as it can be understood; without one, an empty sheet and a finding."""
    empty = LabelTable(path=subject.path, rows=(), artifacts=())
    if subject.found is None or subject.site is None:
        return empty, (), [Finding(code="no-site", level="warning", values={})]
    if not subject.site.has_sheet:
        return empty, (), [Finding(code="no-sheet", level="note", values={})]
    path = subject.found.folder / subject.site.labels
    if not path.exists():
        return empty, (), [Finding(code="labels-missing", level="stop", values={})]
    try:
        table, problems = inspect_labels(path, key=subject.key)
    except DataError as error:
        return empty, (), [Finding(code="labels-unreadable", level="stop", values={"problem": error.code})]
    return table, problems, []


def _elsewhere(subject: Subject) -> tuple[set[str], list[Finding]]:
    """The patients whom a run leaves out because they are in a cohort of another budget, and a finding where
    the ledger cannot say who.
    """
    if subject.found is None:
        return set(), []
    site, folder = subject.found.site, subject.found.folder
    try:
        return found_elsewhere(site, folder, patient_forms(subject.slices.intake.records)), []
    except (ConfigError, LedgerError) as error:
        return set(), [Finding(code="ledger-unusable", level="stop", values={"problem": error.code})]


def _on_files(subject: Subject) -> list[Finding]:
    intake = subject.slices.intake
    found: list[Finding] = []
    if subject.found is not None and has_old_age_keys(subject.found.folder):
        found.append(Finding(code="old-age-keys", level="note", values={}))
    codes = _listed(Counter(problem.code for problem in intake.quarantined))
    if not intake.found:
        return [*found, Finding(code="no-files", level="stop", values={})]
    if not intake.records:
        every = _listed(Counter(problem.code for problem in (*intake.quarantined, *intake.excluded)))
        found.append(
            Finding(code="no-usable-images", level="stop", values={"files": intake.found, "codes": every})
        )
    if intake.share_quarantined > MAX_QUARANTINED:
        values = {
            "files": len(intake.quarantined),
            "of": intake.found,
            "share": f"{intake.share_quarantined:.0%}",
            "codes": codes,
            "limit": f"{MAX_QUARANTINED:.0%}",
        }
        found.append(
            Finding(
                code="too-many-quarantined", level="note" if _is_accepted(subject) else "stop", values=values
            )
        )
    elif intake.quarantined:
        found.append(
            Finding(
                code="quarantined", level="note", values={"files": len(intake.quarantined), "codes": codes}
            )
        )
    for code, count in Counter(problem.code for problem in intake.excluded).items():
        if intake.records and count > MANY_EXCLUDED * intake.found and code not in _WITHOUT_WARNING:
            values = {"files": count, "of": intake.found, "rule": code}
            found.append(Finding(code="many-excluded", level="warning", values=values))
    found += _on_lossy(intake)
    others = Counter(problem.code for problem in intake.excluded if problem.code in _OTHER_FORMATS)
    if others:
        level: Level = "note" if intake.records else "warning"
        found.append(Finding(code="other-formats", level=level, values={"codes": _listed(others)}))
    if intake.shared_uids:
        found.append(
            Finding(code="uid-under-two-patients", level="warning", values={"images": intake.shared_uids})
        )
    return found


def _on_lossy(intake: Intake) -> list[Finding]:
    """Images that were compressed with loss, whether cohort.yaml takes them or not."""
    left_out = sum(problem.code == "lossy" for problem in intake.excluded)
    left_out += intake.excluded_slices.get("lossy", 0)
    used = sum(record.lossy for record in intake.records)
    found = []
    if left_out:
        many = left_out > MANY_EXCLUDED * (left_out + len(intake.records))
        found.append(
            Finding(code="lossy-excluded", level="warning" if many else "note", values={"images": left_out})
        )
    if used:
        values = {"slices": used, "of": len(intake.records)}
        found.append(Finding(code="lossy-used", level="note", values=values))
    return found


def _on_intensities(subject: Subject, series: np.ndarray) -> list[Finding]:
    """CT series whose values cannot be Hounsfield units, by the shares of air and soft tissue; MR series
    whose values cannot be magnitudes; blank slices.

    A series counts as a whole, because the first or the last slice may show air alone. It is named where the
    values fit a known mistake, and nowhere else: a small field of view has no air, a lung little tissue.
    Args:
        series: int (slices,).
    """
    slices = subject.slices
    rows = np.array([[measured[1], *measured[4:]] for measured in slices.measures], np.float64).reshape(
        -1, 1 + len(KNOWN_POINTS_HU)
    )
    is_ct = np.array([record.modality == "CT" for record in slices.intake.records], bool)
    wrong: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for of_modality, cause_of in ((is_ct, _cause_of_wrong_units), (~is_ct, _cause_of_wrong_signal)):
        shown = of_modality & (rows[:, 0] > 0)
        for one in np.unique(series[shown]):
            own = rows[(series == one) & shown, 1:]
            if cause := cause_of(own):
                wrong[cause] += len(own)
                number[cause] += 1
    found = [
        Finding(code=cause, level="warning", values={"slices": count, "series": number[cause]})
        for cause, count in wrong.items()
    ]
    if blank := int((rows[:, 0] == 0).sum()):
        found.append(Finding(code="blank-slices", level="warning", values={"slices": blank}))
    return found


def cause_of_wrong_values(modality: Modality, shares: np.ndarray) -> str:
    """The code of the mistake that the values of a series fit, such as `hu-too-low`, or "".

    Args:
        shares: float (slices, 4) of its slices that are not blank, from `client.dicom.reading.measures`.
    """
    if not len(shares):
        return ""
    return (_cause_of_wrong_units if modality == "CT" else _cause_of_wrong_signal)(shares)


def _cause_of_wrong_units(shares: np.ndarray) -> str:
    """The code of the mistake that the values of a CT series fit, or "".

    Args:
        shares: float (slices, 4), of air, tissue, shifted and dense; see `KNOWN_POINTS_HU`.
    """
    air, tissue, shifted, dense = shares.mean(0)
    # too low, soft tissue counts as air, and bone is all that may seem soft. A small body in a wide field is
    # nine tenths air, too, but a fiftieth and more of it is soft tissue.
    most = shares[:, 1].max()
    if (most < 0.02 and air > 0.9) or (most < 0.08 and air > 0.96):
        return "hu-too-low"
    if dense > 0.15 and air < 0.02 and tissue > 0.05:
        return "hu-wrong-sign"
    if max(shifted, dense) > 0.15 and air < 0.02:
        return "hu-too-high"
    return ""


def _cause_of_wrong_signal(shares: np.ndarray) -> str:
    """The code of the mistake that the values of an MR series fit, or "": a magnitude is not below zero, and
    few of its pixels are nearly as bright as the brightest.

    Args:
        shares: float (slices, 4), of negative and of bright; see `MR_POINTS`.
    """
    negative, bright = shares.mean(0)[:2]
    if negative > 0.05:
        return "mr-negative"
    return "mr-wrong-sign" if bright > 0.15 else ""


def _is_accepted(subject: Subject) -> bool:
    """Whether somebody has looked at the quarantined files and accepted to go on without them."""
    if subject.found is None:
        return False
    try:
        admit_quarantine(subject.found, accept=False)
    except DataError:
        return False
    return True


def _on_patients(
    subject: Subject, intake: IntakeReport, names: list[str], parts: np.ndarray | None
) -> list[Finding]:
    """Who is one patient, and whether there are enough.

    Args:
        names: pseudonyms.
        parts: int8 (names,), positions in PARTS; None where patients are in no part.
    """
    found = []
    records = subject.slices.intake.records
    rule = subject.site.patients if subject.site else AS_WRITTEN
    if missing := without_id(records, rule):
        is_hospital = subject.site is not None and subject.site.kind == "hospital"
        values: dict[str, Any] = {"slices": missing, "of": len(records)}
        level: Level = "stop" if is_hospital else "warning"
        found.append(Finding(code="patient-id-missing", level=level, values=values))
    elif stand_ins := without_id(records, AS_WRITTEN):
        values = {"slices": stand_ins, "of": len(records), "fallback": rule.fallback, "unit": rule.unit}
        found.append(Finding(code="patient-fallback", level="note", values=values))
    nobody = pseudonym("", subject.key)
    if nobody in names:
        unknown = sum(record.patient == nobody for record in records)
        found.append(Finding(code="no-patient-id", level="warning", values={"slices": unknown}))
    if groups := alike(records):
        part_of = dict(zip(names, parts.tolist(), strict=True)) if parts is not None else {}
        values = {
            "groups": len(groups),
            "patients": sum(map(len, groups)),
            "across_split": sum(
                len({part_of.get(patient) for patient in group} - {-1}) > 1 for group in groups
            ),
        }
        found.append(Finding(code="patient-ids-alike", level="warning", values=values))
    if several := of_several_people(records):
        found.append(
            Finding(code="patient-id-of-several", level="warning", values={"patients": len(several)})
        )
    if (issued := of_several_issuers(records)) and "issuer" not in rule.join:
        found.append(Finding(code="patient-id-of-issuers", level="warning", values={"patients": len(issued)}))
    if subject.site is None or not records or not intake.patients_by_part:
        return found
    if (used := intake.patients - intake.left_out) < FEW_PATIENTS:
        values = {"patients": used, "least": FEW_PATIENTS}
        found.append(Finding(code="few-patients", level="warning", values=values))
    nominal, train = subject.site.nominal_patients, intake.patients_by_part["train"]
    if (right := right_bucket(nominal, train)) is not None:
        values = {"patients": train, "nominal": nominal, "right": right}
        found.append(Finding(code="nominal-patients", level="warning", values=values))
    return found


def _on_consent(subject: Subject) -> list[Finding]:
    """The opt-out list against the folder, and the approval to use the images."""
    if subject.found is None:
        return []
    found = []
    rules, opt_outs = subject.found.admission.rules, subject.found.admission.opt_outs(subject.slices)
    if missing := missing_ethics(subject.found.site.kind, rules.ethics):
        found.append(Finding(code="ethics-missing", level="warning", values={"fields": ", ".join(missing)}))
    site, folder = subject.found.site, subject.found.folder
    if site.kind != "hospital":
        try:
            admit_kind(site, folder, again=True)
        except RefusedError as refusal:
            found.append(Finding(code=refusal.code, level="warning", values={"kind": site.kind}))
        if real := with_real_ids(subject.found.images_root):
            values = {"files": real, "of": len(sample(subject.found.images_root)), "kind": site.kind}
            found.append(Finding(code="ids-look-real", level="warning", values=values))
    if opt_outs.near:
        found.append(Finding(code="opt-out-alike", level="warning", values={"patients": opt_outs.near}))
    if opt_outs.without_id:
        values = {"slices": opt_outs.without_id}
        found.append(Finding(code="opt-out-without-id", level="warning", values=values))
    if opt_outs.listed and not opt_outs.found:
        found.append(Finding(code="opt-out-not-found", level="note", values={"listed": opt_outs.listed}))
    return found


def _on_labels(
    intake: IntakeReport, counts: dict[str, dict[str, dict[str, int]]], *, has_labels: bool
) -> list[Finding]:
    if not has_labels:
        return []
    found = []
    one_sided = [
        (
            f"{artifact} ({part}: "
            + " and ".join(f"0 {side}" for side in ("present", "absent") if not sides[side])
            + ")"
        )
        for artifact, parts in counts.items()
        for part, sides in parts.items()
        if not (sides["present"] and sides["absent"])
        and (part != "validation" or intake.patients_by_part["validation"])
    ]
    if one_sided:
        found.append(Finding(code="one-sided", level="warning", values={"where": "; ".join(one_sided)}))
    labels = intake.labels
    if disputed := int(labels.disputed.sum()):
        found.append(Finding(code="disputed", level="warning", values={"labels": disputed}))
    if labels.images_without_label:
        values = {"slices": labels.images_without_label, "of": len(intake.intake.records)}
        found.append(Finding(code="without-label", level="note", values=values))
    if lost := len(labels.rows_without_image):
        found.append(Finding(code="rows-without-image", level="warning", values={"rows": lost}))
    if zeros := len(labels.lost_zeros):
        found.append(Finding(code="lost-zeros", level="warning", values={"rows": zeros}))
    if wrong := len(labels.wrong_modality):
        found.append(Finding(code="wrong-modality", level="warning", values={"rows": wrong}))
    return found


def _on_assessed(site: SiteConfig, present: np.ndarray, parts: np.ndarray) -> list[Finding]:
    """What `assessed` of site.yaml declares against the labels of the sheet."""
    if site.assessed == ():
        return [Finding(code="none-assessed", level="warning", values={})]
    found = []
    labelled = {name for place, name in enumerate(NAMES) if not np.isnan(present[:, place]).all()}
    if missing := [name for name in site.assessed or () if name not in labelled]:
        found.append(Finding(code="assessed-differs", level="stop", values={"artifacts": ", ".join(missing)}))
    if np.isnan(present[parts == PARTS.index("train")]).all() and (parts >= 0).any():
        found.append(Finding(code="nothing-assessed", level="stop", values={}))
    if site.assessed and (more := [name for name in NAMES if name in labelled - set(site.assessed)]):
        found.append(Finding(code="assessed-more", level="warning", values={"artifacts": ", ".join(more)}))
    return found


def _on_images(
    subject: Subject, scanners: np.ndarray, duplicates: screening.Duplicates, outliers: screening.Outliers
) -> list[Finding]:
    records = subject.slices.intake.records
    if not records:
        return []
    found = []
    if scanners.max() == 0:
        found.append(Finding(code="one-scanner", level="warning", values={}))
    strange = {field: _implausible(records, field, limits) for field, limits in _PLAUSIBLE.items()}
    if any(strange.values()):
        fields = _listed({field: count for field, count in strange.items() if count})
        found.append(Finding(code="implausible-units", level="warning", values={"fields": fields}))
    count = int(duplicates.across_patients.sum())
    if count > MANY_DUPLICATES * len(records):
        found.append(
            Finding(code="near-duplicates", level="warning", values={"slices": count, "of": len(records)})
        )
    if across := int(duplicates.across_split.sum()):
        found.append(Finding(code="near-duplicates-across-split", level="warning", values={"slices": across}))
    if not duplicates.is_complete:
        found.append(Finding(code="near-duplicates-incomplete", level="note", values={}))
    if len(outliers.slices):
        found.append(
            Finding(
                code="outliers",
                level="note",
                values={"slices": len(outliers.slices), "z": f"{screening.OUTLYING_Z:g}"},
            )
        )
    if undated := sum(not screening.month_of(record.study_date) for record in records):
        found.append(
            Finding(code="dates-missing", level="note", values={"slices": undated, "of": len(records)})
        )
    return found


def _implausible(records: Sequence[SliceRecord], field: str, limits: tuple[float, float]) -> int:
    """Slices whose value lies outside the limits; one that is not stated does not."""
    stated = [value for record in records if (value := getattr(record, field)) is not None]
    if not stated:
        return 0
    values = np.array(stated, np.float64).reshape(len(stated), -1)
    return int(((values < limits[0]) | (values > limits[1])).any(1).sum())


def _on_time(trends: Sequence[screening.Trend], drift: Drift | None) -> list[Finding]:
    found = [
        Finding(
            code="step-over-time",
            level="warning",
            values={
                "scanner": trend.scanner + 1,
                "modality": trend.modality,
                "measure": trend.measure,
                "step": f"{trend.step:+.1f}",
            },
        )
        for trend in trends
        if trend.is_alarming
    ]
    alarming = [move for move in drift.moves if move.verdict == "alarming"] if drift else []
    if alarming:
        fields = ", ".join(f"{move.modality} {move.field}".strip() for move in alarming)
        found.append(Finding(code="drift", level="warning", values={"fields": fields}))
    return found


def _artifact_patients(
    matched: MatchedLabels, patients: np.ndarray, parts: np.ndarray
) -> dict[str, dict[str, dict[str, int]]]:
    """Of each artifact that was assessed, patients of each part that have it in a slice, and that have it in
    none.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for place, artifact in enumerate(NAMES):
        present = matched.present[:, place]
        if np.isnan(present).all():
            continue
        found[artifact] = {}
        for position, part in enumerate(PARTS):
            own = parts == position
            ill = set(patients[own & (present == 1)].tolist())
            well = set(patients[own & (present == 0)].tolist()) - ill
            found[artifact][part] = {"present": len(ill), "absent": len(well)}
    return found


def _artifact_slices(
    matched: MatchedLabels, patients: np.ndarray, parts: np.ndarray
) -> dict[str, dict[str, tuple[int, float, int]]]:
    """Of each artifact that was assessed, how many assessed slices patients have who show it in a slice, and
    who show it in none: least, median, most.
    """
    found: dict[str, dict[str, tuple[int, float, int]]] = {}
    for place, artifact in enumerate(NAMES):
        present = matched.present[:, place]
        used = (parts >= 0) & ~np.isnan(present)
        if not used.any():
            continue
        _, where, numbers = np.unique(patients[used], return_inverse=True, return_counts=True)
        is_ill = np.bincount(where, present[used] == 1) > 0
        found[artifact] = {
            name: (int(own.min()), float(np.median(own)), int(own.max()))
            for name, own in (("present", numbers[is_ill]), ("absent", numbers[~is_ill]))
            if len(own)
        }
    return found


def _keep(subject: Subject, acquisition: Acquisition, train: np.ndarray) -> None:
    """Keep the profile of the training patients of this index, for a later comparison; of the old ones those
    that were trained on.
    """
    if not train.any():
        return
    path = profile_path(subject.state, subject.slices.fingerprint)
    keep_profile(path, acquisition.profile(train), acquisition.patients[train].tolist())
    if old := [other for other in _newest(subject.state)[KEPT_PROFILES:] if other != path]:
        trained = {profile_path(subject.state, index) for index in _indexes_trained_on(subject)}
        for other in old:
            if other not in trained:
                other.unlink(missing_ok=True)


def _compared(subject: Subject, acquisition: Acquisition, against: Literal["own"] | Path) -> Drift:
    source: ProfileOrigin = "file"
    if isinstance(against, Path):
        path = _in_folder(against)
    else:
        path, source = _own_profile(subject)
    trained, members = read_profile(path)
    new = np.array([name not in members for name in acquisition.patients.tolist()], bool)
    only_new = bool(new.any())
    now = acquisition.profile(new if only_new else None, like=trained)
    return Drift(
        source=source,
        trained_patients=trained.patients,
        compared="patients not trained on" if only_new else "all patients",
        patients=now.patients,
        moves=tuple(moves(trained, now)),
    )


def _in_folder(path: Path) -> Path:
    """The profile itself, or the newest one of a site folder."""
    if not path.is_dir():
        return path
    held = _newest(path / "state") or _newest(path)
    return held[0] if held else path / "state" / "profile-….json"


def _newest(state: Path) -> list[Path]:
    return sorted(state.glob("profile-*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _own_profile(subject: Subject) -> tuple[Path, ProfileOrigin]:
    """The profile of the index that the site last trained on, as its ledger says; else of the newest earlier
    index; else of this one.
    """
    if subject.site is None:
        raise ConfigError(
            f"{subject.path}: no site, so no training of its own to compare with",
            code="no-profile",
            hint=(
                "--training-profile SITE, the folder of the site that trained, or one of its "
                "state/profile-*.json"
            ),
        )
    for index in reversed(_indexes_trained_on(subject)):
        if (path := profile_path(subject.state, index)).exists():
            return path, "ledger"
    current = profile_path(subject.state, subject.slices.fingerprint)
    earlier = [path for path in _newest(subject.state) if path != current]
    return (earlier[0], "earlier index") if earlier else (current, "this index")


def _indexes_trained_on(subject: Subject) -> list[str]:
    """Indexes in the order in which the ledger says they were used; none where there is no ledger, or it is
    damaged: that is not ours to say here."""
    from client.site.ledger import Ledger
    from client.site.site_ledger import LEDGER

    assert subject.site is not None
    try:
        with Ledger.open(subject.state / LEDGER, cohort=subject.site.cohort, key=subject.key) as ledger:
            return [
                row.fingerprint
                for row in ledger.rows()
                if row.fingerprint and row.cohort == subject.site.cohort
            ]
    except FedqcError:
        return []


def _listed(counts: Mapping[str, int]) -> str:
    """`3 × truncated, 1 × not-dicom`."""
    return (
        ", ".join(
            f"{count} × {name}" for name, count in sorted(counts.items(), key=lambda one: (-one[1], one[0]))
        )
        or "–"
    )


def _trend(trend: screening.Trend) -> dict[str, Any]:
    return {
        "scanner": trend.scanner + 1,
        "modality": trend.modality,
        "measure": trend.measure,
        "months": list(trend.months),
        "medians": [round(value, 3) for value in trend.medians],
        "studies": trend.studies,
        "step": round(trend.step, 3),
        "z": round(trend.z, 2),
        "is_alarming": trend.is_alarming,
    }


def _drift(drift: Drift) -> dict[str, Any]:
    return {
        "source": drift.source,
        "trained_patients": drift.trained_patients,
        "compared": drift.compared,
        "patients": drift.patients,
        "fields": [
            {
                "modality": move.modality or None,
                "field": move.field,
                "verdict": move.verdict,
                "psi": round(move.psi, 4),
                "shifted": round(move.shifted, 4),
                "before": move.before,
                "now": move.now,
                "new": {name: round(share, 4) for name, share in move.new},
            }
            for move in drift.moves
        ],
    }
