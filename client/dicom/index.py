"""Build the list of usable slices from the headers of all files, and account for every file.

    found = used + quarantined + duplicates + excluded

always holds, in files: the members of an archive count, the archive does not; slices are counted apart. A
file is named by its number, its place in the sorted list, starting at 1: numbers and codes may be shown,
paths stay in the site's own log. What happens to a patient's files depends on that patient's files alone.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from client.dicom.patients import AS_WRITTEN, Origin, PatientRule, joined_key, keyed, normalised, readings
from client.dicom.refusals import CODES, EXCLUSIONS
from client.dicom.sources import ARCHIVE_CODES, Source
from client.dicom.workers import WORKER_CODES
from common.artifacts import Modality
from common.errors import DataError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")

QUARANTINE_CODES: dict[str, str] = CODES | ARCHIVE_CODES | WORKER_CODES
"""Why a file is quarantined: a person should look. `EXCLUSIONS` and a cohort's own rules are the other
reasons not to use one.
"""
MAX_QUARANTINED = 0.05
"""The share of quarantined slices above which a person must have looked before the rest is used."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One file that is not used. `number` and `code` may be shown; `detail` names a path and stays at the
    site.
    """

    number: int
    code: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceRecord:
    """One slice. `file`, `path`, every pseudonym and free text never leave the hospital."""

    number: int  # of its file
    file: str  # relative to the images folder, with forward slashes; see `sources.Source`
    root: Path  # the images folder
    place: str  # below `root`, or absolute: the file on the disk; of a member, its archive
    frame: int  # which slice of the file, from 0
    row: int  # where the cache keeps its pixels; -1: nowhere
    content: str  # digest of the file's bytes, unkeyed; "" before they were read as a whole
    patient: str  # keyed pseudonyms, this one and those that follow; "" where the header says nothing
    study: str
    series: str
    image: str  # of the SOP instance UID
    accession: str
    scanner: str
    series_number: int | None
    instance_number: int | None
    modality: Modality
    rows: int
    columns: int
    bits: int
    pixel_spacing_mm: tuple[float, float] | None
    slice_thickness_mm: float | None
    slice_position_mm: float | None
    phase_encoding: str | None
    manufacturer: str
    model: str
    field_strength_t: float | None
    kvp: float | None
    kernel: str
    sequence: str
    echo_time_ms: float | None
    repetition_time_ms: float | None
    # YYYYMMDD, or "": the cache keeps the month, and the side of a bound of cohort.yaml, not the day
    study_date: str
    series_description: str  # of it, the words that cohort.yaml names
    body_part: str
    age_years: float | None
    lossy: bool = False  # compressed with loss
    imported: bool = False  # converted from a public collection by fedqc
    ctdi_vol_mgy: float | None = None  # CT
    # of the patient, see `patients`; keyed digests, which never leave the hospital
    patient_origin: Origin = "id"
    patient_forms: tuple[str, ...] = ()
    patient_near: tuple[str, ...] = ()
    birth: str = ""
    sex: str = ""
    issuer: str = ""

    @property
    def path(self) -> Path:
        return self.root / self.place  # made when asked for: a path is as large as all the rest


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of one file: why it cannot be used, or its slices, each with the code by which it is left
    out, or "".
    """

    source: Source
    code: str = ""
    slices: tuple[tuple[SliceRecord, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One box of the flow diagram: what was left after a step."""

    name: str
    files: int
    slices: int
    patients: int


@dataclass(frozen=True, kw_only=True)
class Intake:
    """Every file of the images folder, in exactly one of four places."""

    root: Path
    found: int
    used: int
    records: tuple[SliceRecord, ...]
    quarantined: tuple[Problem, ...]
    excluded: tuple[Problem, ...]
    duplicates: tuple[int, ...]  # file numbers
    # SOP instance UIDs that occur under two patients: a warning for a person to look at, nothing is removed
    shared_uids: int
    excluded_slices: dict[str, int]  # code -> slices left out of files of which others are used, too
    flow: tuple[Step, ...]
    quarantined_slices: int = 0  # a file whose header cannot be read counts as one
    image_slices: int = 0  # of all CT and MR images, used or not, and of quarantined files

    def __post_init__(self) -> None:
        total = self.used + len(self.quarantined) + len(self.duplicates) + len(self.excluded)
        assert self.found == total, f"{self.found} files found, {total} accounted for"
        assert self.used == len({record.number for record in self.records})

    @property
    def share_quarantined(self) -> float:
        """Of the slices; 0 where there are none. A file of 4,500 frames counts 4,500 times, and a file that
        is no image (a report, a viewer's program) does not count.
        """
        return self.quarantined_slices / self.image_slices if self.image_slices else 0.0

    def public(self) -> dict[str, object]:
        """The account without a path or an identifier."""
        return {
            "found": self.found,
            "used": self.used,
            "quarantined": [{"file": problem.number, "code": problem.code} for problem in self.quarantined],
            "duplicates": len(self.duplicates),
            "excluded": dict(sorted(Counter(problem.code for problem in self.excluded).items())),
            "slices": {"used": len(self.records), "excluded": dict(sorted(self.excluded_slices.items()))},
            "flow": [
                {"step": step.name, "files": step.files, "slices": step.slices, "patients": step.patients}
                for step in self.flow
            ],
        }


def account(
    root: Path, files: Iterable[FileFacts], pixels: Callable[[SliceRecord], tuple[int, bytes] | None]
) -> Intake:
    """Put every file into one of four places.

    Args:
        files: all of them, in the order of their numbers.
        pixels: where a slice's pixels are kept and the digest of the decoded image; None: nowhere, which
            makes its file `unreadable`.
    """
    quarantined: list[Problem] = []
    excluded: list[Problem] = []
    partly: Counter[str] = Counter()
    candidates: list[list[SliceRecord]] = []
    digests: dict[int, tuple[bytes, ...]] = {}
    steps = {
        name: _Tally()
        for name in ("found", "readable", "CT and MR, original and primary", "in the cohort", "used")
    }
    found = bad_slices = slices = 0
    for facts in files:
        found += 1
        slices += len(facts.slices) or (bool(facts.code) and facts.code not in EXCLUSIONS)
        number, code = facts.source.number, facts.code
        everything = [record for record, _ in facts.slices]
        steps["found"].add(everything)
        if code and code not in EXCLUSIONS:
            quarantined.append(_problem(facts.source, code))
            bad_slices += len(facts.slices) or 1
            continue
        steps["readable"].add(everything)
        diagnostic = [(record, left_out) for record, left_out in facts.slices if left_out not in EXCLUSIONS]
        if diagnostic:
            steps["CT and MR, original and primary"].add([record for record, _ in diagnostic])
        used = [record for record, left_out in facts.slices if not left_out]
        if not used:
            excluded.append(_problem(facts.source, code or facts.slices[0][1]))
            continue
        steps["in the cohort"].add(used)
        kept = [(record, pixels(record)) for record in used]
        if any(at is None for _, at in kept):
            quarantined.append(_problem(facts.source, "unreadable"))
            bad_slices += len(facts.slices)
            continue
        partly.update(left_out for _, left_out in facts.slices if left_out)
        candidates.append([replace(record, row=at[0]) for record, at in kept if at is not None])
        digests[number] = tuple(at[1] for _, at in kept if at is not None)
    files_kept, conflicts, duplicates = _settle_same_uid(candidates, digests)
    in_conflict = {problem.number for problem in conflicts}
    bad_slices += sum(len(records) for records in candidates if records[0].number in in_conflict)
    for records in files_kept:
        steps["used"].add(records)
    owners: dict[str, set[str]] = defaultdict(set)
    for records in candidates:
        owners[records[0].image].add(records[0].patient)
    owners.pop("", None)
    return Intake(
        root=root,
        found=found,
        used=len(files_kept),
        records=tuple(record for records in files_kept for record in records),
        quarantined=tuple(sorted((*quarantined, *conflicts), key=lambda problem: problem.number)),
        excluded=tuple(excluded),
        duplicates=tuple(duplicates),
        shared_uids=sum(len(patients) > 1 for patients in owners.values()),
        excluded_slices=dict(partly),
        quarantined_slices=bad_slices,
        image_slices=slices,
        flow=tuple(
            Step(name=name, files=tally.files, slices=tally.slices, patients=len(tally.patients))
            for name, tally in steps.items()
        ),
    )


class _Tally:
    def __init__(self) -> None:
        self.files = self.slices = 0
        self.patients: set[str] = set()

    def add(self, records: Sequence[SliceRecord]) -> None:
        """One more file, with these slices."""
        self.files += 1
        self.slices += len(records)
        self.patients.update(record.patient for record in records)


def _problem(source: Source, code: str) -> Problem:
    return Problem(
        number=source.number,
        code=code,
        detail=f"{source.path}{' (inside)' if source.member else ''}: {meaning(code)}",
    )


def meaning(code: str) -> str:
    """One line on a code of the intake report."""
    return QUARANTINE_CODES.get(code) or EXCLUSIONS.get(code) or "a rule of cohort.yaml"


def _settle_same_uid(
    candidates: list[list[SliceRecord]], digests: dict[int, tuple[bytes, ...]]
) -> tuple[list[list[SliceRecord]], list[Problem], list[int]]:
    """Files kept, conflicts and duplicates. Per patient and UID: the same decoded pixels, one is kept;
    different ones, none is.
    """
    groups: dict[tuple[str, str], list[list[SliceRecord]]] = defaultdict(list)
    for records in candidates:
        first = records[0]
        groups[first.patient, first.image or f"file {first.number}"].append(records)
    kept: list[list[SliceRecord]] = []
    problems: list[Problem] = []
    duplicates: list[int] = []
    for group in groups.values():
        if len({digests[records[0].number] for records in group}) > 1:
            problems += [
                Problem(
                    number=records[0].number,
                    code="conflict",
                    detail=f"{records[0].path}: {CODES['conflict']}",
                )
                for records in group
            ]
        else:
            kept.append(group[0])
            duplicates += [records[0].number for records in group[1:]]
    return sorted(kept, key=lambda records: records[0].number), problems, sorted(duplicates)


def pseudonym(identifier: str, key: bytes) -> str:
    """The site's own name for a patient or series: 16 hex digits of HMAC-SHA-256. Without the key a guess
    cannot be tested.
    """
    return hmac.new(key, identifier.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:16]


def identifier(kind: str, value: str, key: bytes) -> str:
    """How the cache names an identifier of a header (`image`, `series`, `study`, `accession`, `scanner`);
    nothing stays nothing.
    """
    plain = unicodedata.normalize("NFKC", value).strip()
    return pseudonym(f"{kind}:{plain}", key) if plain else ""


def patient_pseudonyms(patient_id: str, key: bytes, rule: PatientRule = AS_WRITTEN) -> frozenset[str]:
    """The pseudonyms of the patient whose headers carry this PatientID, in whichever character set they were
    written, and the digest of its normalised form.

    Args:
        rule: the site's; IDs that it joins have the pseudonym of the joined one.
    """
    found = {keyed("patient-normalised", normalised(patient_id), key)}
    for charset in ("utf-8", "gb18030", "latin-1"):
        try:
            raw = patient_id.strip().encode(charset).decode("latin-1")
        except UnicodeEncodeError:
            continue
        joined = joined_key(raw, readings(raw)[0], rule)
        found |= {pseudonym(f"PatientID:{raw}", key), pseudonym(joined or f"PatientID:{raw}", key)}
    return frozenset(found)


def split_of(patient: str, key: bytes, train: float, validation: float, test: float) -> Part:
    """The part of a patient: a keyed hash, uniform in [0, 1), against the thresholds.

    No quota: the answer depends on this patient and the key only, so it stays when patients are added or
    removed. The share of each part holds on average, not exactly.
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
