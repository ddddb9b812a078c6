"""Load a site folder as the arrays that training and evaluation use.

    site.yaml     name, kind, cohort, nominal_patients; where images, labels and state are
    images/       DICOM files, in any order and depth
    labels.csv    see client/labels/label_sheet.py
    state/        site.key, cache/; written by fedqc

A patient is in one part only. Nothing here leaves the hospital; `check_site` gives counts, file numbers and
codes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from client.data.inclusion import Admission, read_admission
from client.data.measured import read_measures
from client.dicom.cache import Slices, load_or_build, open_current, open_index
from client.dicom.index import MAX_QUARANTINED, PARTS, Intake, Part, SliceRecord, split_of
from client.dicom.patients import without_id
from client.labels.label_sheet import ImageName, LabelTable, MatchedLabels, match_labels, read_labels
from client.site.config import SiteConfig, read_site, site_key
from client.site.run_data import DataDigests
from client.site.site_ledger import found_elsewhere
from client.site.split import Shares, fix_split, split_of_site
from common.artifacts import DEFAULT_LABELS, MODALITIES, NAMES, applies_to, columns_of
from common.errors import ConfigError, DataError
from common.files import write_bytes
from common.plan import Split
from common.preprocess import DEFAULT_SIZE


@dataclass(frozen=True, kw_only=True)
class IntakeReport:
    """What was found at the site, as counts, file numbers and codes. Local; `public()` has no path,
    identifier or date.
    """

    intake: Intake
    labels: MatchedLabels
    patients: int
    patients_by_part: dict[str, int]
    slices_by_modality: dict[str, int]
    # artifact → present, absent, not_assessed; over slices in which it can occur
    label_counts: dict[str, dict[str, int]]
    left_out: int = 0  # of `patients`, those whom the ledger found in a cohort of another budget before

    def summary(self) -> str:
        """One line for a terminal."""
        intake = self.intake
        return (
            f"{len(intake.records)} of {intake.found} files used, {self.patients} patients, "
            f"{len(intake.quarantined)} quarantined"
        )

    def public(self) -> dict[str, Any]:
        return {
            **self.intake.public(),
            "patients": self.patients,
            "patients_left_out": self.left_out,
            "patients_by_part": self.patients_by_part,
            "slices_by_modality": self.slices_by_modality,
            "labels": self.label_counts,
            "label_problems": {
                "rows_without_image": {
                    "count": len(self.labels.rows_without_image),
                    "rows": list(self.labels.rows_without_image),
                },
                "images_without_label": self.labels.images_without_label,
                "wrong-modality": {
                    "count": len(self.labels.wrong_modality),
                    "rows": list(self.labels.wrong_modality),
                },
                "disputed": int(self.labels.disputed.sum()),
                "incomplete": int(self.labels.incomplete.sum()),
            },
            "split": self.labels.split,
            "warnings": {"uid_under_two_patients": self.intake.shared_uids},
        }


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A site's usable slices, n of them; everything in the same order."""

    site: SiteConfig
    folder: Path
    images: np.ndarray  # int16 (n, S, S), read-only memory map; see common/preprocess.py
    modality: np.ndarray  # int8 (n,), position in MODALITIES
    artifacts: tuple[str, ...]  # the columns of `labels` and `severities`
    labels: np.ndarray  # float32 (n, artifacts): 1, 0, or nan = not assessed or cannot occur
    severities: np.ndarray  # float32 (n, artifacts), nan where unknown
    patients: np.ndarray  # int64 (n,), 0 .. number of patients - 1
    part: np.ndarray  # int8 (n,), position in PARTS: 0 train, 1 validation, 2 test; -1: opted out since
    numbers: np.ndarray  # int64 (n,), file numbers
    vendors: tuple[str, ...]  # manufacturer of each slice, as its header says; local
    records: tuple[SliceRecord, ...]
    fingerprint: str  # of the images folder, keyed; local
    opted_out: frozenset[str]  # patients whose images are left out because they opted out
    report: IntakeReport


@dataclass(frozen=True, kw_only=True)
class SiteSlices:
    """A site's usable slices, without labels."""

    site: SiteConfig
    folder: Path
    key: bytes
    slices: Slices
    admission: Admission
    is_frozen: bool = False  # the index that was asked for, whatever became of the folder since

    @property
    def images_root(self) -> Path:
        return self.folder / self.site.images


def site_slices(site_yaml: Path, *, size: int = DEFAULT_SIZE, frozen: str = "", **how: Any) -> SiteSlices:
    """Index and decode a site's images, or open the cache; cohort.yaml says which of them are the cohort's.

    Args:
        site_yaml: the file, or the folder that holds it.
        size: side of the stored slices in pixels.
        frozen: an index version; where the cache still holds it, the folder is not looked at.
        how: `build` of `open_slices`; `progress`, `again` and `verify` of
            `client.dicom.cache.load_or_build`.
    Raises:
        ConfigError: site.yaml or cohort.yaml.
        DataError: `no-such-folder`, `empty-site`, `no-usable-images`, `not-prepared`, or about the cache.
    """
    found = open_slices(site_yaml, size=size, frozen=frozen, **how)
    intake, images_root = found.slices.intake, found.images_root
    if not intake.found:
        raise DataError(f"{images_root}: no files", code="empty-site", hint="hidden files are not counted")
    if not intake.records:
        codes = ", ".join(sorted({problem.code for problem in (*intake.quarantined, *intake.excluded)}))
        raise DataError(
            f"{images_root}: none of the {intake.found} files can be used ({codes})",
            code="no-usable-images",
            hint="fedqc explain CODE explains each code",
        )
    return found


def open_slices(
    site_yaml: Path, *, size: int = DEFAULT_SIZE, frozen: str = "", build: bool = True, **how: Any
) -> SiteSlices:
    """As `site_slices`, for a report: a site of which nothing can be used is not refused.

    Args:
        build: bring the cache up to date; else one that is not is refused, and nothing is written.
    Raises:
        DataError: `not-prepared`.
    """
    site, folder, key = _opened(site_yaml)
    if site.measures is not None:
        return measured_slices(site, folder, key)
    admission = read_admission(folder, key, site.patients, kind=site.kind)
    where = folder / site.images, key, folder / site.state / "cache", size
    slices = open_index(*where, frozen, admit=admission) if frozen else None
    is_frozen = slices is not None
    if slices is None and not build:
        slices = open_current(*where, admit=admission)
        if slices is None:
            raise not_prepared(site_yaml)
    if slices is None:
        slices = load_or_build(*where, admit=admission, **how)
    return SiteSlices(
        site=site, folder=folder, key=key, slices=slices, admission=admission, is_frozen=is_frozen
    )


def measured_slices(site: SiteConfig, folder: Path, key: bytes) -> SiteSlices:
    """The scans of a site that has metrics in place of images; those of patients who opted out are left out.

    Raises:
        DataError, ConfigError: as `client.data.measured.read_measures`, `read_admission`.
    """
    assert site.measures is not None
    admission = read_admission(folder, key, site.patients, kind=site.kind)
    slices = read_measures(folder / site.measures, key, opted_out=admission.opted_out)
    return SiteSlices(site=site, folder=folder, key=key, slices=slices, admission=admission)


def holds_index(site_yaml: Path, size: int, index: str) -> bool:
    """Whether the cache still holds an index version: a run can use it whatever became of the folder."""
    site, folder, key = _opened(site_yaml)
    where = folder / site.images, key, folder / site.state / "cache", size
    admission = read_admission(folder, key, site.patients, kind=site.kind)
    return open_index(*where, index, admit=admission) is not None


def not_prepared(site_yaml: Path) -> DataError:
    """The refusal to read a site without writing, where its cache is not that of its images and criteria."""
    return DataError(
        f"{site_yaml}: the images are not prepared, or the folder, cohort.yaml or the opt-outs changed since",
        code="not-prepared",
        hint="fedqc data prepare SITE --plan PLAN",
    )


def _opened(site_yaml: Path) -> tuple[SiteConfig, Path, bytes]:
    """A site, its folder and its key; refused where its images are not there, or its state lies among
    them.
    """
    site, folder = read_site(site_yaml)
    if site.measures is not None:
        return site, folder, site_key(folder / site.state)
    images_root, state = folder / site.images, folder / site.state
    if not images_root.is_dir():
        raise DataError(
            f"{images_root}: no such folder",
            code="no-such-folder",
            hint="site.yaml: images = the folder with the DICOM files",
        )
    if state.resolve().is_relative_to(images_root.resolve()):
        raise ConfigError(
            f"{state}: the state folder lies inside the images folder {images_root}",
            code="bad-site",
            hint="site.yaml: move one of the two",
        )
    return site, folder, site_key(state)


def admit_patients(found: SiteSlices) -> None:
    """Refuse a hospital of whose patients some have no PatientID, unless site.yaml says what stands for one.

    Raises:
        DataError: `patient-id-missing`.
    """
    if found.site.kind != "hospital":
        return
    slices = without_id(found.slices.intake.records, found.site.patients)
    if slices:
        raise DataError(
            f"{found.site.name}: {slices} of {len(found.slices.intake.records)} slices have no PatientID, or "
            "a placeholder in its place: who is one patient is not known",
            code="patient-id-missing",
            hint="export with pseudonyms, or name a fallback in site.yaml: docs/data.md#patients",
        )


def admit_quarantine(found: SiteSlices, *, accept: bool) -> None:
    """Refuse a site with more than `MAX_QUARANTINED` unreadable slices, unless a person accepts that.

    What was accepted is remembered for this index, and for no more quarantined files than there were then.
    Raises:
        DataError: `too-many-quarantined`.
    """
    intake, path = found.slices.intake, found.folder / found.site.state / "accepted-quarantine.json"
    if intake.share_quarantined <= MAX_QUARANTINED:
        return
    try:
        known = json.loads(path.read_text(encoding="ascii"))
        if known["index"] == found.slices.fingerprint and len(intake.quarantined) <= known["quarantined"]:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if not accept:
        codes = ", ".join(
            f"{count} × {code}"
            for code, count in Counter(problem.code for problem in intake.quarantined).most_common()
        )
        raise DataError(
            f"{found.site.name}: {len(intake.quarantined)} of {intake.found} files are quarantined "
            f"({codes}),"
            f" {intake.share_quarantined:.0%} of the slices; above {MAX_QUARANTINED:.0%} "
            "a person must review them",
            code="too-many-quarantined",
            hint="--show-paths of fedqc data prepare lists them; --accept-quarantine continues without",
        )
    write_bytes(
        path,
        json.dumps({"index": found.slices.fingerprint, "quarantined": len(intake.quarantined)}).encode(),
        0o600,
    )


def load_cohort(
    site_yaml: Path,
    *,
    size: int = DEFAULT_SIZE,
    plan_split: Split | None = None,
    quarantine: Literal["refuse", "accept", "ignore"] = "refuse",
    fix: bool = False,
    frozen: str = "",
    build: bool = True,
    labels: Sequence[str] = DEFAULT_LABELS,
) -> Cohort:
    """Index, decode (once, then from the cache), label and split a site.

    Args:
        site_yaml: the file, or the folder that holds it.
        size: side of the stored slices in pixels.
        plan_split: the shares that a plan asks for; `client/site/split.py` gives those that are used.
            Patients whose rows have a `part` follow the sheet.
        quarantine: what to do where many files cannot be read, see `admit_quarantine`. "ignore" accepts
            nothing: for a report.
        fix: keep the split as that of the site's first run.
        frozen: the index version that a run began with. Where the cache still holds it, the folder is not
            looked at, and what cannot be read there since is no reason to refuse.
        build: as `open_slices`.
        labels: the artifacts that are asked for, `model.labels` of a plan.
    Raises:
        ConfigError: site.yaml or cohort.yaml; `split-fixed`.
        RefusedError: `split-differs`.
        DataError: as `site_slices`; `patient-id-missing`; `too-many-quarantined`; `leak` (the sheet puts
            one patient in two parts); or one of `client.labels.label_sheet`.
    """
    site, folder, key = _opened(site_yaml)
    split = split_of_site(site, folder, plan_split)
    if fix:
        fix_split(site, folder, split)
    # first: decoding may take an hour
    table = read_labels(folder / site.labels, key=key) if site.has_sheet else LabelTable.empty()
    if site.measures is not None:
        found = measured_slices(site, folder, key)
    else:
        found = site_slices(site_yaml, size=size, frozen=frozen, build=build)
    slices = found.slices
    if quarantine != "ignore" and not found.is_frozen:
        admit_patients(found)
        admit_quarantine(found, accept=quarantine == "accept")
    intake, records = slices.intake, slices.intake.records
    modality = np.array([MODALITIES.index(record.modality) for record in records], np.int8)
    may_occur = np.array([applies_to(name) for name in MODALITIES])[modality]
    matched = match_labels(table, image_names(records), may_occur, site.consensus, key=key)
    names = sorted({record.patient for record in records})
    dense = {name: position for position, name in enumerate(names)}
    patients = np.array([dense[record.patient] for record in records], np.int64)
    parts_of_patients = assign_parts(
        patients, names, records=records, labels=matched, key=key, split=split.shares
    )
    report = intake_report(intake, matched, modality=modality, patients=len(names), parts=parts_of_patients)
    return Cohort(
        site=site,
        folder=folder,
        images=slices.images,
        modality=modality,
        artifacts=tuple(labels),
        labels=matched.present[:, columns_of(labels)],
        severities=matched.severity[:, columns_of(labels)],
        patients=patients,
        part=parts_of_patients[patients],
        numbers=np.array([record.number for record in records], np.int64),
        vendors=tuple(record.manufacturer for record in records),
        records=records,
        fingerprint=slices.fingerprint,
        opted_out=slices.opted_out,
        report=report,
    )


def intake_report(
    intake: Intake,
    labels: MatchedLabels,
    *,
    modality: np.ndarray,
    patients: int,
    parts: np.ndarray | None,
    left_out: int = 0,
) -> IntakeReport:
    """The account of a site.

    Args:
        modality: int8 (slices,), positions in MODALITIES.
        parts: int8 (patients,), positions in PARTS, -1 for those who are left out; None where patients are in
            no part.
        left_out: patients who are left out because they were found in an earlier cohort.
    """
    may_occur = np.array([applies_to(name) for name in MODALITIES])[modality].reshape(
        len(modality), len(NAMES)
    )
    return IntakeReport(
        intake=intake,
        labels=labels,
        patients=patients,
        patients_by_part={}
        if parts is None
        else {part: int((parts == position).sum()) for position, part in enumerate(PARTS)},
        slices_by_modality={
            name: int((modality == position).sum()) for position, name in enumerate(MODALITIES)
        },
        label_counts=_count_labels(labels.present, may_occur),
        left_out=left_out,
    )


def patient_forms(records: Sequence[SliceRecord]) -> dict[str, set[str]]:
    """Each patient with the keyed forms of the identifier, any of which names them."""
    forms: dict[str, set[str]] = defaultdict(set)
    for record in records:
        forms[record.patient].update(record.patient_forms, record.patient_near)
    return forms


def check_site(
    site_yaml: Path, *, size: int = DEFAULT_SIZE, plan_split: Split | None = None
) -> dict[str, Any]:
    """The intake report of a site for `fedqc data check --format json`: counts, file and row numbers and
    codes; no identifier.

    What it says is what `load_cohort` gets, because it is the same call, without patients whom a run leaves
    out because the ledger found them in an earlier cohort. It writes only below the site's state folder.
    Raises: as `load_cohort`; ConfigError, LedgerError as `Ledger.admit_patients`.
    """
    found = load_cohort(site_yaml, size=size, plan_split=plan_split, quarantine="ignore")
    report = found.report
    if left_out := found_elsewhere(found.site, found.folder, patient_forms(found.records)):
        part = {record.patient: found.part[at] for at, record in enumerate(found.records)}
        parts = np.array([-1 if patient in left_out else part[patient] for patient in sorted(part)], np.int8)
        report = intake_report(
            report.intake,
            report.labels,
            modality=found.modality,
            patients=report.patients,
            parts=parts,
            left_out=len(left_out),
        )
    return report.public()


def admit_assessed(cohort: Cohort, *, injects: bool = False) -> None:
    """Refuse a site that would teach nothing, or whose sheet contradicts what site.yaml declares.

    Args:
        injects: the plan simulates artifacts on the site's slices, so that no label is needed.
    Raises:
        DataError: `assessed-differs` (an artifact that `assessed` declares has no label), `nothing-assessed`
            (no training patient has a label).
    """
    missing = [
        name
        for name in cohort.site.assessed or ()
        if name in cohort.artifacts and np.isnan(cohort.labels[:, cohort.artifacts.index(name)]).all()
    ]
    if missing:
        raise DataError(
            f"{cohort.site.name}: site.yaml declares {', '.join(missing)} as assessed, and no image has such "
            "a label",
            code="assessed-differs",
            hint="fill in the label sheet, or remove it from assessed in site.yaml",
        )
    if not injects and np.isnan(cohort.labels[cohort.part == PARTS.index("train")]).all():
        raise DataError(
            f"{cohort.site.name}: no image of a training patient has a label: the site would teach nothing",
            code="nothing-assessed",
            hint="fill in the label sheet: fedqc data labels SITE",
        )


def data_digests(cohort: Cohort) -> DataDigests:
    """What a run depends on at this site, as keyed digests: index, labels and part of each patient."""
    key = site_key(cohort.folder / cohort.site.state)
    labels: dict[str, Any] = {}
    kept = [(at, record) for at, record in enumerate(cohort.records) if cohort.part[at] >= 0]
    for at, record in kept:
        digest = labels.setdefault(record.patient, hmac.new(key, b"labels:", hashlib.sha256))
        digest.update(f"{record.image}#{record.frame}:".encode("utf-8", "surrogatepass"))
        digest.update(cohort.labels[at].tobytes() + cohort.severities[at].tobytes())
    return DataDigests(
        images=cohort.fingerprint,
        labels={patient: digest.hexdigest()[:32] for patient, digest in labels.items()},
        split={record.patient: PARTS[cohort.part[at]] for at, record in kept},
    )


def image_names(records: Sequence[SliceRecord]) -> list[ImageName]:
    """How a label sheet may name each slice."""
    return [
        ImageName(
            file=record.file,
            sop_uid=record.image,
            series_uid=record.series,
            study_uid=record.study,
            accession=record.accession,
            series_number=record.series_number,
            frame=record.frame + 1,
            patient=record.patient,
        )
        for record in records
    ]


def assign_parts(
    patients: np.ndarray,
    names: list[str],
    *,
    records: Sequence[SliceRecord],
    labels: MatchedLabels,
    key: bytes,
    split: Shares,
) -> np.ndarray:
    """Part of each patient, int8 (patients,): the sheet's where it has one, else the keyed hash.

    Args:
        patients: int64 (records,), position in `names`.
    Raises:
        DataError: `leak`, the sheet puts one patient in two parts.
    """
    fixed: dict[int, tuple[Part, int]] = {}
    for patient, part, record in zip(patients.tolist(), labels.parts, records, strict=True):
        if part is None:
            continue
        first, number = fixed.setdefault(patient, (part, record.number))
        if first != part:
            raise DataError(
                (
                    f"the label sheet puts file {number} in {first} and file {record.number} of the same "
                    f"patient in {part}"
                ),
                code="leak",
                hint="a patient belongs to one part: give all rows of a patient the same 'part'",
            )
    return np.array(
        [
            PARTS.index(fixed[i][0] if i in fixed else split_of(name, key, *split))
            for i, name in enumerate(names)
        ],
        np.int8,
    )


def _count_labels(present: np.ndarray, may_occur: np.ndarray) -> dict[str, dict[str, int]]:
    """Of each artifact how many slices have it, have it not, and were not assessed; over slices in which it
    can occur. One that no plan asks for by default is there where somebody assessed it.
    """
    return {
        name: {
            "present": int((present[:, position] == 1).sum()),
            "absent": int((present[:, position] == 0).sum()),
            "not_assessed": int((np.isnan(present[:, position]) & may_occur[:, position]).sum()),
        }
        for position, name in enumerate(NAMES)
        if name in DEFAULT_LABELS or not np.isnan(present[:, position]).all()
    }
