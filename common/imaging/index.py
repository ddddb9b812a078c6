"""From a folder of DICOM files to a list of usable slices, and an account of every other file.

    found = used + quarantined + duplicates + excluded

always holds. A file is named by its number, its place in the sorted list of files, starting at 1: numbers and codes may be shown, paths
and details stay in the site's own log. What happens to a patient's files depends on that patient's files alone.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from common.artifacts import Modality
from common.errors import DataError, ImagingError
from common.imaging.dicom import SliceHeader, exclusion, find_files, read_header, read_pixels
from common.imaging.refusals import CODES, EXCLUSIONS

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One file that is not used. `number` and `code` may be shown; `detail` names a path and stays at the site."""

    number: int
    code: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class SliceRecord:
    """One usable slice. `file`, `path`, `patient` and `series` never leave the hospital."""

    number: int
    file: str  # relative to the images folder, with forward slashes
    path: Path
    size_bytes: int
    mtime_ns: int
    patient: str  # keyed pseudonym
    series: str  # keyed pseudonym
    modality: Modality
    rows: int
    columns: int
    bits: int
    instance_number: int | None
    pixel_spacing_mm: tuple[float, float] | None
    slice_thickness_mm: float | None
    slice_position_mm: float | None
    phase_encoding: str | None
    manufacturer: str
    model: str
    field_strength_t: float | None
    kvp: float | None


@dataclass(frozen=True, kw_only=True)
class Intake:
    """Every file of the images folder, in exactly one of four places."""

    root: Path
    found: int
    records: tuple[SliceRecord, ...]
    quarantined: tuple[Problem, ...]
    excluded: tuple[Problem, ...]
    duplicates: tuple[int, ...]  # file numbers
    shared_uids: int  # SOP instance UIDs that occur under two patients: a warning for a person to look at, nothing is removed

    def __post_init__(self) -> None:
        total = len(self.records) + len(self.quarantined) + len(self.duplicates) + len(self.excluded)
        assert self.found == total, f"{self.found} files found, {total} accounted for"

    def quarantine(self, failures: Sequence[Problem]) -> Intake:
        """The same intake after some of its records turned out not to be usable."""
        numbers = {failure.number for failure in failures}
        return replace(
            self,
            records=tuple(record for record in self.records if record.number not in numbers),
            quarantined=tuple(sorted((*self.quarantined, *failures), key=lambda problem: problem.number)),
        )

    def public(self) -> dict[str, object]:
        """The account without a path or an identifier."""
        return {
            "found": self.found,
            "used": len(self.records),
            "quarantined": [{"file": problem.number, "code": problem.code} for problem in self.quarantined],
            "duplicates": len(self.duplicates),
            "excluded": dict(sorted(Counter(problem.code for problem in self.excluded).items())),
        }


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    record: SliceRecord
    sop_uid: str


def build_index(images_root: Path, key: bytes) -> Intake:
    """Read every header below `images_root`; pixels only where two files of a patient claim to be the same image.

    Args:
        images_root: folder of DICOM files.
        key: the site's secret; patients and series are named by HMAC-SHA-256 under it.
    Raises:
        DataError: `no-such-folder`. A file never raises; it is accounted for.
    """
    if not images_root.is_dir():
        raise DataError(
            f"{images_root}: no such folder of images", code="no-such-folder", hint="site.yaml: images = the folder with the DICOM files"
        )
    files = find_files(images_root)
    candidates: list[_Candidate] = []
    quarantined: list[Problem] = []
    excluded: list[Problem] = []
    for number, path in enumerate(files, start=1):
        try:
            status = path.stat()
            header = read_header(path)
        except (ImagingError, OSError) as error:
            problem = problem_of(number, path, error)
            (excluded if problem.code in EXCLUSIONS else quarantined).append(problem)
            continue
        code = exclusion(header)
        if code:
            excluded.append(Problem(number=number, code=code, detail=f"{path}: {EXCLUSIONS[code]}"))
            continue
        file = path.relative_to(images_root).as_posix()
        record = _record(header, number, file, path, key, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
        candidates.append(_Candidate(record=record, sop_uid=header.sop_uid))
    kept, conflicts, duplicates = _settle_same_uid(candidates)
    patients_of_uid: dict[str, set[str]] = defaultdict(set)
    for candidate in candidates:
        patients_of_uid[candidate.sop_uid].add(candidate.record.patient)
    patients_of_uid.pop("", None)
    return Intake(
        root=images_root,
        found=len(files),
        records=tuple(kept),
        quarantined=tuple(sorted((*quarantined, *conflicts), key=lambda problem: problem.number)),
        excluded=tuple(excluded),
        duplicates=tuple(duplicates),
        shared_uids=sum(len(patients) > 1 for patients in patients_of_uid.values()),
    )


def problem_of(number: int, path: Path, error: ImagingError | OSError) -> Problem:
    """The line of the intake report for a file that could not be read."""
    if isinstance(error, ImagingError):
        return Problem(number=number, code=error.code, detail=error.message)
    return Problem(number=number, code="unreadable", detail=f"{path}: {type(error).__name__}")


def _settle_same_uid(candidates: list[_Candidate]) -> tuple[list[SliceRecord], list[Problem], list[int]]:
    """Records kept, conflicts and duplicates. Per patient and UID: the same decoded pixels, one is kept; different ones, none is."""
    groups: dict[tuple[str, str], list[SliceRecord]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.record.patient, candidate.sop_uid or f"file {candidate.record.number}"].append(candidate.record)
    kept: list[SliceRecord] = []
    problems: list[Problem] = []
    duplicates: list[int] = []
    for group in groups.values():
        if len(group) == 1:
            kept += group
            continue
        readable: list[tuple[SliceRecord, bytes]] = []
        for record in group:
            try:
                image = read_pixels(record.path)
                readable.append((record, hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()))
            except ImagingError as error:
                problems.append(problem_of(record.number, record.path, error))
        if len({digest for _, digest in readable}) > 1:
            problems += [
                Problem(number=record.number, code="conflict", detail=f"{record.path}: {CODES['conflict']}") for record, _ in readable
            ]
        else:
            kept += [record for record, _ in readable[:1]]
            duplicates += [record.number for record, _ in readable[1:]]
    return sorted(kept, key=lambda record: record.number), problems, sorted(duplicates)


def _record(header: SliceHeader, number: int, file: str, path: Path, key: bytes, *, size_bytes: int, mtime_ns: int) -> SliceRecord:
    return SliceRecord(
        number=number,
        file=file,
        path=path,
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        patient=pseudonym(header.patient_key, key),
        series=pseudonym("series:" + header.series_uid, key),
        modality=header.modality,
        rows=header.rows,
        columns=header.columns,
        bits=header.bits,
        instance_number=header.instance_number,
        pixel_spacing_mm=header.pixel_spacing_mm,
        slice_thickness_mm=header.slice_thickness_mm,
        slice_position_mm=header.slice_position_mm,
        phase_encoding=header.phase_encoding,
        manufacturer=header.manufacturer,
        model=header.model,
        field_strength_t=header.field_strength_t,
        kvp=header.kvp,
    )


def pseudonym(identifier: str, key: bytes) -> str:
    """The site's own name for a patient or series: 16 hex digits of HMAC-SHA-256. Without the key a guess cannot be tested."""
    return hmac.new(key, identifier.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]


def split_of(patient: str, key: bytes, train: float, validation: float, test: float) -> Part:
    """The part of a patient: a keyed hash, uniform in [0, 1), against the thresholds.

    No quota: the answer depends on this patient and the key only, so it stays when patients are added or removed. The share of each part
    holds on average, not exactly.
    Raises:
        DataError: a share is negative, or all are zero.
    """
    shares = (train, validation, test)
    if min(shares) < 0 or not sum(shares) > 0:
        raise DataError(f"split = {shares}; expected three shares of at least 0, not all 0", code="bad-split")
    digest = hmac.new(key, b"split:" + patient.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(shares)
    if place < train:
        return "train"
    return "validation" if place < train + validation else "test"
