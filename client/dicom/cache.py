"""Keep decoded slices on disk, so that a site decodes each of its images once.

A cache is a folder of its own, readable by its owner only, which never leaves the hospital:

    store.sqlite3      header facts of each file, and the row of each slice; no path outside the
                       images folder, no raw identifier, no day of a study unless a rule divides its
                       month, no free text but the words that a rule names
    slices-128-1.i16   the slices one after the other, int16, memory mapped; named by size and generation
    indexes.jsonl      each index ever made: when, how many slices and patients, how many came and went

Slices are addressed by the digest of the bytes of the file they come from, so that a file that moved, or was
touched, is not decoded again. They are written in the order of the index, and the database says so only after
they are on the disk: a build that is killed resumes where it stopped and ends with the same bytes. A folder
whose listing (names, sizes, times) is the one that was read needs no file to be opened. What no index refers
to any more is taken out of the cache: the slices of a patient who opted out do not stay.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import mmap
import os
import shutil
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from client.dicom.codecs import supported_syntaxes
from client.dicom.dicom import MAX_FRAMES
from client.dicom.index import (
    QUARANTINE_CODES,
    FileFacts,
    Intake,
    SliceRecord,
    account,
    identifier,
    pseudonym,
)
from client.dicom.patients import AS_WRITTEN, PatientRule, named_by, under_key
from client.dicom.reading import (
    DIGEST_CHARACTERS,
    HEADERS_AT_ONCE,
    MEASURES,
    item_of,
    measures,
    read,
)
from client.dicom.sources import Source, expand_archives, find_files
from client.dicom.workers import WORKER_CODES, Outcome, Workers
from common.errors import DataError
from common.files import append_line, locked, make_private, sync_folder
from common.preprocess import PREPROCESS_VERSION
from common.progress_bar import Progress

FORMAT = 3
HEADERS_FORMAT = 4
"""Raised when other facts are read from a header, or other rules exclude. Every header is then read again;
slices that were decoded stay.
"""
RETRIED_CODES = frozenset({"unreadable", "changed", "too-slow", "out-of-memory", "decoder-crashed"})
"""Problems that may be gone the next time, though the file is the same: it is read again whenever the cache
is brought up to date.
"""

# of one file: a worker's limit on time and memory is for about one image. More where frames are small, as the
# file is searched for its frames each time
_FRAMES_AT_ONCE = 64
_MAX_FRAMES_AT_ONCE = 1024
_PIXELS_AT_ONCE = _FRAMES_AT_ONCE << 18  # of 512 x 512
_SPARED_BYTES = 8 << 20
_IN_VAIN = 64  # slices decoded and not used, above which headers are read first
_COMMIT_S = 1.0  # between two points from which a killed build goes on
_ABOUT_BYTES = 4 << 10  # in the database, of one slice
_CHECK_BYTES = 16  # of a slice's own digest
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (
    file TEXT PRIMARY KEY, number INTEGER, path BLOB NOT NULL, member TEXT NOT NULL,
    size_bytes INTEGER, mtime_ns INTEGER, code TEXT NOT NULL, slices TEXT NOT NULL, content TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_by_number ON files (number);
CREATE TABLE IF NOT EXISTS slices (
    size INTEGER, content TEXT, frame INTEGER, row INTEGER NOT NULL, pixels BLOB NOT NULL,
    check_sum BLOB NOT NULL, measures TEXT NOT NULL,
    PRIMARY KEY (size, content, frame)
) WITHOUT ROWID;
"""


class Criteria(Protocol):
    """A cohort's inclusion criteria, and who a patient is. They see a slice's header, never another's."""

    @property
    def patients(self) -> PatientRule:
        """How the site names its patients."""

    def has_opted_out(self, record: SliceRecord, /) -> bool:
        """Whether the patient of a slice is on the opt-out list."""

    def __call__(self, record: SliceRecord, /) -> str:
        """The code by which a slice is left out, or ""."""

    def digest(self) -> str:
        """Equal digests admit the same slices."""

    def kept_text(self, header: dict[str, Any], /) -> dict[str, str]:
        """What the criteria need of `series_description` and `study_date`: as little as gives the same
        answer.
        """

    def text_digest(self) -> str:
        """Equal digests keep the same of every header."""


class _AdmitAll:
    """The criteria where there is no cohort.yaml."""

    patients = AS_WRITTEN

    def has_opted_out(self, record: SliceRecord, /) -> bool:
        return False

    def __call__(self, record: SliceRecord, /) -> str:
        return "lossy" if record.lossy else ""

    def digest(self) -> str:
        return ""

    def kept_text(self, header: dict[str, Any], /) -> dict[str, str]:
        date = str(header["study_date"])
        return {"series_description": "", "study_date": date[:6] + "01" if date else ""}

    def text_digest(self) -> str:
        return ""


ADMIT_ALL: Criteria = _AdmitAll()


class StoredSlices:
    """Slices of a cache in the order of an index: an int16 array (slices, size, size) of which only what is
    asked for is read.

    Args:
        spare: keep no more than `_SPARED_BYTES` of what was read in the memory of this process.
    """

    def __init__(self, pack: np.ndarray, rows: np.ndarray, *, spare: bool = False) -> None:
        self.pack, self.rows = pack, rows
        self.shape = (len(rows), *pack.shape[1:])
        self.dtype = pack.dtype
        self._map, self._read_bytes = getattr(pack, "_mmap", None) if spare else None, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Any) -> np.ndarray:
        if self._map is None:
            return np.asarray(self.pack[self.rows[chosen]])
        found = np.array(self.pack[self.rows[chosen]])
        self._read_bytes += found.nbytes
        if self._read_bytes > _SPARED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)  # the system keeps them, and gives them back when asked
            self._read_bytes = 0
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def spared(images: np.ndarray | StoredSlices) -> np.ndarray:
    """The same slices (`Slices.images`), to be read once: what was read of a memory map counts as memory of
    this process, though it is only a copy of a file.
    """
    kept = images if isinstance(images, StoredSlices) else StoredSlices(images, np.arange(len(images)))
    return StoredSlices(kept.pack, kept.rows, spare=True)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Slices:
    """A site's usable slices: `images[i]` is the stored form (see `preprocess.to_stored`) of
    `intake.records[i]`.
    """

    intake: Intake
    # int16 (records, size, size), read-only; a memory map, or `StoredSlices`, which is asked in the same way
    images: np.ndarray
    measures: list[list[Any]]  # of each slice, see `reading.measures`
    # the index version: keyed digest of which slices of which patients these are. Patients who opted out of
    # an index are subtracted from it; it stays the same index
    fingerprint: str
    opted_out: frozenset[str]  # patients of the folder who are on the opt-out list
    built: bool  # whether anything was read now


def load_or_build(
    images_root: Path,
    key: bytes,
    cache_dir: Path,
    size: int,
    *,
    admit: Criteria = ADMIT_ALL,
    progress: Progress = lambda stage, done, total: None,
    again: bool = False,
    verify: bool = False,
    only: str = "",
) -> Slices:
    """Open the cache of `images_root`, bringing it up to date first where the folder changed.

    A file that cannot be read or decoded is quarantined and stops nothing. Two processes that build at once
    build one after the other.
    Args:
        size: side of the stored slices in pixels.
        admit: the cohort's inclusion criteria.
        again: read again what could not be read before and may be readable now (`RETRIED_CODES`).
        verify: compare every stored slice with its digest, and decode again what does not match.
        only: the name of one file or folder in `images_root`; nothing else there is read.
    Raises:
        DataError: `no-such-folder`; `cache-not-writable`; `disk-full`, before anything is decoded, if the
            slices would not fit.
    """
    if not images_root.is_dir():
        raise DataError(
            f"{images_root}: no such folder of images",
            code="no-such-folder",
            hint="site.yaml: images = the folder with the DICOM files",
        )
    cache_dir, images_root = cache_dir.absolute(), images_root.absolute()
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        rules = admit.digest()
        state = _state_of(find_files(images_root, only=only), key, rules, size)
        wanted = _Wanted(
            root=images_root, key=key, size=size, admit=admit, rules=rules, state=state, only=only
        )
        if not (again or verify):
            opened = _open(cache_dir, wanted, built=False)
            if opened is not None:
                return opened
        with locked(cache_dir / "lock"):
            try:
                return _brought_up_to_date(cache_dir, wanted, progress, verify)
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError) and not _is_damaged(error):
                    raise
                for path in (*cache_dir.glob("store.sqlite3*"), *cache_dir.glob("slices-*")):
                    path.unlink(missing_ok=True)
                return _brought_up_to_date(cache_dir, wanted, progress, verify)
    except (OSError, sqlite3.OperationalError) as error:
        raise DataError(
            f"{cache_dir}: cannot keep the image cache: {getattr(error, 'strerror', None) or error}",
            code="cache-not-writable",
            hint="the state folder of site.yaml must be writable and have room",
        ) from error


def is_prepared(cache_dir: Path, size: int) -> bool:
    """Whether an index with slices of this size was ever made here. Looks at no image, and does not say that
    nothing changed since.
    """
    path = cache_dir / "store.sqlite3"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return (
                database.execute("SELECT 1 FROM meta WHERE name = ?", (f"index:{size}",)).fetchone()
                is not None
            )
    except sqlite3.Error:
        return False


def open_index(
    images_root: Path,
    key: bytes,
    cache_dir: Path,
    size: int,
    fingerprint: str,
    *,
    admit: Criteria = ADMIT_ALL,
) -> Slices | None:
    """The cache as it is, if it still holds the index `fingerprint`; what became of the folder since does not
    matter. None where it holds another, or none.

    Nothing of the folder is listed or read, so that a file that can no longer be read changes nothing.
    Args: as `load_or_build`.
    """
    wanted = _Wanted(
        root=images_root.absolute(), key=key, size=size, admit=admit, rules=admit.digest(), state=""
    )
    found = _open(cache_dir.absolute(), wanted, built=False, as_it_is=True)
    return found if found is not None and found.fingerprint == fingerprint else None


def open_current(
    images_root: Path, key: bytes, cache_dir: Path, size: int, *, admit: Criteria = ADMIT_ALL
) -> Slices | None:
    """The cache, if it is complete for the folder as it is now; None where something would have to be read
    first. Changes nothing.

    Args: as `load_or_build`.
    """
    images_root, rules = images_root.absolute(), admit.digest()
    state = _state_of(find_files(images_root), key, rules, size)
    wanted = _Wanted(root=images_root, key=key, size=size, admit=admit, rules=rules, state=state)
    return _open(cache_dir.absolute(), wanted, built=False)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    root: Path
    key: bytes
    size: int
    admit: Criteria
    rules: str
    state: str  # digest of the folder's listing, the rules and the versions
    only: str = ""  # the one entry of the folder that is read; "": all


def _state_of(listing: Sequence[Source], key: bytes, rules: str, size: int) -> str:
    state = hmac.new(
        key,
        f"{FORMAT}:{HEADERS_FORMAT}:{PREPROCESS_VERSION}:{size}:{supported_syntaxes()}:{rules}\n".encode(),
        hashlib.sha256,
    )
    for source in listing:
        state.update(
            os.fsencode(source.file) + f"\0{source.size_bytes}:{source.mtime_ns}:{source.problem}\n".encode()
        )
    return state.hexdigest()


def _open(cache_dir: Path, wanted: _Wanted, *, built: bool, as_it_is: bool = False) -> Slices | None:
    """The cache as it is, if it is complete for this state of the folder, or for any, and not damaged."""
    if not (cache_dir / "store.sqlite3").exists():
        return None
    try:
        with closing(_Store(cache_dir, wanted)) as store:
            state = store.meta(f"state:{wanted.size}")
            if store.meta("versions") != store.versions or not (as_it_is or state == wanted.state):
                return None
            if store.meta("patients") != wanted.admit.patients.digest():
                return None  # its headers were read under another rule, or by an earlier version
            return _slices(store, wanted, built=built)
    except (sqlite3.DatabaseError, OSError, ValueError, TypeError, KeyError):
        return None


def _slices(store: _Store, wanted: _Wanted, *, built: bool) -> Slices:
    pack = store.pack(wanted.size)
    opted_out: set[str] = set()

    def watched() -> Iterator[FileFacts]:
        for facts in store.files(wanted):
            opted_out.update(one.patient for one, _ in facts.slices if wanted.admit.has_opted_out(one))
            yield facts

    intake = account(wanted.root, watched(), lambda record: store.where(wanted.size, record))
    rows = np.array([record.row for record in intake.records], np.int64)
    if len(rows) and rows.max() >= len(pack):
        raise ValueError("fewer slices in the cache than its database says")
    in_order = np.array_equal(rows, np.arange(len(rows)))
    return Slices(
        intake=intake,
        images=pack[: len(rows)] if in_order else StoredSlices(pack, rows),  # type: ignore[arg-type]
        measures=store.measures(wanted.size, intake.records),
        fingerprint=_index_of(store, intake.records, wanted, opted_out),
        opted_out=frozenset(opted_out),
        built=built,
    )


def _index_of(store: _Store, records: Sequence[SliceRecord], wanted: _Wanted, opted_out: Set[str]) -> str:
    """The index version: that of the last index where nothing but opt-outs came since, else a new one."""
    if not opted_out:
        return _fingerprint(records, wanted)
    before: dict[str, str] = json.loads(store.meta(f"members:{wanted.size}") or "{}")
    now = _members(records, wanted.key)
    gone = before.keys() - now.keys()
    if gone and gone <= opted_out and all(before.get(patient) == digest for patient, digest in now.items()):
        return store.meta(f"index:{wanted.size}")
    return _fingerprint(records, wanted)


def _members(records: Iterable[SliceRecord], key: bytes) -> dict[str, str]:
    """For each patient a keyed digest of which slices these are."""
    lines: dict[str, list[str]] = defaultdict(list)
    for record in records:
        lines[record.patient].append(f"{record.content}:{record.frame}\n")
    return {
        patient: hmac.digest(key, "".join(sorted(own)).encode(), "sha256").hex()[:16]
        for patient, own in lines.items()
    }


def _fingerprint(records: Iterable[SliceRecord], wanted: _Wanted) -> str:
    found = hmac.new(
        wanted.key, f"index:{FORMAT}:{PREPROCESS_VERSION}:{wanted.size}\n".encode(), hashlib.sha256
    )
    for line in sorted(f"{record.content}:{record.frame}:{record.patient}\n" for record in records):
        found.update(line.encode())
    return found.hexdigest()[:32]


def _brought_up_to_date(cache_dir: Path, wanted: _Wanted, progress: Progress, verify: bool) -> Slices:
    # as it is now: another process may have held the lock for an hour
    listing = find_files(wanted.root, only=wanted.only)
    wanted = replace(wanted, state=_state_of(listing, wanted.key, wanted.rules, wanted.size))
    with closing(_Store(cache_dir, wanted)) as store, Workers(read) as workers:
        sources = expand_archives(listing)
        store.make_tables()
        store.keep(sources)
        if verify:
            store.verify(wanted.size, progress)
        _read_headers(store, workers, sources, wanted, progress)
        del listing, sources  # what comes next is in the database
        missing = list(_missing(store, wanted))
        _check_room(cache_dir, missing, wanted.size)
        _decode(store, workers, missing, wanted, progress)
        store.compact(wanted.size, {(record.content, record.frame) for record in _admitted(store, wanted)})
        store.complete_measures(wanted.size)
        slices = _slices(store, wanted, built=True)
        store.note(wanted, slices)
        return slices


def _read_headers(
    store: _Store, workers: Workers, sources: Sequence[Source], wanted: _Wanted, progress: Progress
) -> None:
    """Read the headers of the files that are new, changed, or had a problem that may have passed."""
    known = store.known()
    if store.meta("patients") != wanted.admit.patients.digest():
        known = {}  # who is a patient stands in the header only; decoded slices are kept
    todo = []
    for source in sources:
        state, code = known.get(_text(source.file), (None, ""))
        if source.problem:
            store.put_headers(source, Outcome(failure=source.problem))
        elif state != store.identity(source) or code in RETRIED_CODES:
            todo.append(source)
    digest = store.has_slices()  # then a file that is new here may be one that was decoded under another name
    needed, free = _room(store.folder, len(todo), wanted.size)
    first = _FirstPass(wanted=wanted, goes_on=not digest and needed <= free)
    if todo and first.goes_on:  # each file counts as a slice until it is opened
        progress("slices", 0, len(todo))
    outcomes = workers.map(first.item(source, digest=digest) for source in todo)
    again: list[Source] = []
    long: list[tuple[Source, Outcome]] = []  # of more slices than one answer holds
    for done, (source, outcome) in enumerate(zip(todo, outcomes, strict=True), start=1):
        if outcome.failure in WORKER_CODES and done <= first.asked:
            again.append(source)  # without its pixels its header may be readable
            first.goes_on = False
        elif _lacking(outcome):
            long.append((source, outcome))
            first.goes_on = False
        else:
            first.put(store, source, outcome)
        progress("headers", done, len(todo))
        if first.asked:
            progress("slices", first.decoded, len(todo))
    for source, outcome in zip(again, workers.map(item_of(source) for source in again), strict=True):
        store.put_headers(source, outcome)
    for source, outcome in long:
        store.put_headers(source, _all_headers(workers, source, outcome))
    store.read_under(wanted.admit.patients)
    store.commit()


@dataclass(kw_only=True)
class _FirstPass:
    """Asks for headers and slices at once where nothing is in the cache: of the files at the beginning of the
    folder, as long as each holds one slice and most are used. So slices are kept in the order of the index.
    """

    wanted: _Wanted
    goes_on: bool
    asked: int = 0  # files whose slice was asked for
    decoded: int = 0
    in_vain: int = 0

    def item(self, source: Source, *, digest: bool) -> dict[str, Any]:
        """What to ask a worker about a file."""
        if not self.goes_on:
            return item_of(source, digest=digest)
        self.asked += 1
        return item_of(source, size=self.wanted.size)

    def put(self, store: _Store, source: Source, outcome: Outcome) -> None:
        """Keep the headers, and the slice if it came with them and is used."""
        facts = store.put_headers(source, outcome)
        used = not facts.code and any(not left_out for _, left_out in facts.slices)
        if not used:
            self.in_vain += len(outcome.arrays)
            self.goes_on &= self.in_vain <= max(self.decoded, _IN_VAIN)
        if not used or not self.goes_on:
            return
        piece = _Piece(number=source.number, modality="", frames=(0,), is_first=True)
        if failure := outcome.value.get("failure"):
            known = isinstance(failure, str) and failure in QUARANTINE_CODES
            store.put_failure(source.number, failure if known else "decoder-crashed")
        elif not outcome.arrays:
            self.goes_on = False  # it holds several slices
        elif failure := _misfit(piece, outcome, self.wanted.size):
            store.put_failure(source.number, failure)
        else:
            store.put_slices(source.number, outcome.value["content"], (0,), outcome, self.wanted.size)
            self.decoded += 1


def _lacking(outcome: Outcome) -> int:
    """Headers of the file that the answer does not hold; 0 for a failure or an answer of another form."""
    value = outcome.value
    if outcome.failure or not isinstance(value, dict) or not isinstance(value.get("headers"), list):
        return 0
    count = value.get("slices")
    return max(count - len(value["headers"]), 0) if isinstance(count, int) and count <= MAX_FRAMES else 0


def _all_headers(workers: Workers, source: Source, start: Outcome) -> Outcome:
    """The headers of a file of many slices, asked for in pieces; the first failure where one fails."""
    count, headers = start.value["slices"], list(start.value["headers"])
    firsts = range(len(headers), count, HEADERS_AT_ONCE)
    for outcome in workers.map(item_of(source, first=first) for first in firsts):
        if outcome.failure:
            return outcome
        value = outcome.value
        if not isinstance(value, dict) or value.get("slices") != count or not value.get("headers"):
            return Outcome(failure="changed")
        headers += value["headers"]
    if len(headers) != count:
        return Outcome(failure="changed")
    return Outcome(value=start.value | {"headers": headers})


def _admitted(store: _Store, wanted: _Wanted) -> Iterator[SliceRecord]:
    """The slices that are to be in the cache, in the order of the index; those that turn out to be duplicates
    or conflicts, too.
    """
    for facts in store.files(wanted):
        if not facts.code:
            yield from (record for record, left_out in facts.slices if not left_out)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Some slices of one file that are not in the cache. All pieces of a folder are in memory at once."""

    number: int  # of its file
    modality: str
    frames: tuple[int, ...]
    is_first: bool  # of its file


def _missing(store: _Store, wanted: _Wanted) -> Iterator[_Piece]:
    """What is to be decoded, in the order of the index."""
    lacking = (
        record
        for record in _admitted(store, wanted)
        if not record.content or store.where(wanted.size, record) is None
    )
    for number, group in groupby(lacking, key=lambda record: record.number):
        records = list(group)
        at_once = _PIXELS_AT_ONCE // (records[0].rows * records[0].columns)
        at_once = min(max(at_once, _FRAMES_AT_ONCE), _MAX_FRAMES_AT_ONCE)
        for place in range(0, len(records), at_once):
            piece = records[place : place + at_once]
            yield _Piece(
                number=number,
                modality=piece[0].modality,
                frames=tuple(record.frame for record in piece),
                is_first=place == 0,
            )


def _room(cache_dir: Path, slices: int, size: int) -> tuple[int, int]:
    """Bytes that so many slices need, and that are free."""
    return slices * (size * size * 2 + _ABOUT_BYTES), shutil.disk_usage(cache_dir).free


def _check_room(cache_dir: Path, missing: Sequence[_Piece], size: int) -> None:
    needed, free = _room(cache_dir, sum(len(piece.frames) for piece in missing), size)
    if needed > free:
        raise DataError(
            f"{cache_dir}: the slices need {needed / (1 << 20):.1f} MiB, {free / (1 << 20):.1f} MiB are free",
            code="disk-full",
            hint="free some, or move the state folder of site.yaml to another disk",
        )


def _decode(
    store: _Store, workers: Workers, missing: Sequence[_Piece], wanted: _Wanted, progress: Progress
) -> None:
    total, done = sum(len(piece.frames) for piece in missing), 0
    if total:
        progress("slices", 0, total)  # what is ahead, before it begins
    items = (
        item_of(
            store.source(piece.number),
            frames=piece.frames,
            size=wanted.size,
            modality=piece.modality,
            digest=piece.is_first,
        )
        for piece in missing
    )
    outcomes = zip(missing, workers.map(items), strict=True)
    for number, group in groupby(outcomes, key=lambda pair: pair[0].number):
        content = ""
        for piece, outcome in group:
            failure = outcome.failure or _misfit(piece, outcome, wanted.size)
            if failure:
                store.put_failure(number, failure)
            else:
                content = outcome.value["content"] if piece.is_first else content
                store.put_slices(number, content, piece.frames, outcome, wanted.size)
            done += len(piece.frames)
            progress("slices", done, total)
    store.commit()


def _misfit(piece: _Piece, outcome: Outcome, size: int) -> str:
    """A worker may have been taken over by what it read: its answer is used only if it has the form that was
    asked for.
    """
    value, shapes = outcome.value, [(array.dtype.str, array.shape) for array in outcome.arrays]
    fits = (
        isinstance(value, dict)
        and shapes == [("<i2", (len(piece.frames), size, size))]
        and isinstance(value.get("content"), str)
        and all(
            isinstance(value.get(name), list) and len(value[name]) == len(piece.frames)
            for name in ("pixels", "measures")
        )
        and all(isinstance(text, str) and len(text) == DIGEST_CHARACTERS for text in value["pixels"])
    )
    return "" if fits else "decoder-crashed"


class _Store:
    """The database and the files of slices of one cache. To write, hold the folder's lock and call
    `make_tables` first.
    """

    def __init__(self, cache_dir: Path, wanted: _Wanted) -> None:
        self.folder, self._key, self._admit = cache_dir, wanted.key, wanted.admit
        self._roots = (wanted.root, Path(os.path.realpath(wanted.root)))
        path = cache_dir / "store.sqlite3"
        make_private(path)
        self._db = sqlite3.connect(path, timeout=30)
        self._packs: dict[int, Any] = {}
        self._rows: dict[int, int] = {}
        self._committed_at = time.monotonic()
        mark = hmac.digest(wanted.key, b"cache", "sha256").hex()
        self.versions = json.dumps([FORMAT, PREPROCESS_VERSION, mark, supported_syntaxes()])
        self.headers = json.dumps([HEADERS_FORMAT, wanted.admit.text_digest()])

    def make_tables(self) -> None:
        """Make the tables; throw away what another key, preprocessing or set of codecs made, and what the
        disk lost.
        """
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(_SCHEMA)
        if self.meta("versions") != self.versions:
            for table in ("meta", "files", "slices"):
                self._db.execute(f"DELETE FROM {table}")
            for path in self.folder.glob("slices-*"):
                path.unlink()
            self._set("versions", self.versions)
        if self.meta("headers") != self.headers:
            self._db.execute("DELETE FROM files")
            self._set("headers", self.headers)
            self._db.commit()
            self._db.execute("VACUUM")  # what was kept before does not stay in free pages
        for (size,) in self._db.execute("SELECT DISTINCT size FROM slices").fetchall():
            self._db.execute("DELETE FROM slices WHERE size = ? AND row >= ?", (size, len(self.pack(size))))
        self._db.commit()

    def complete_measures(self, size: int) -> None:
        """Measure again the slices of a cache of an earlier version, which kept fewer measures."""
        rows = self._db.execute(
            "SELECT content, frame, row, measures FROM slices WHERE size = ?", (size,)
        ).fetchall()
        short = [one for one in rows if len(json.loads(one[3])) < MEASURES]
        if not short:
            return
        pack = self.pack(size)
        modality: dict[str, Any] = {}
        for content, slices in self._db.execute("SELECT content, slices FROM files WHERE content != ''"):
            for values, _ in json.loads(slices)[:1]:
                modality[content] = values["modality"]
        done = []
        for content, frame, row, _ in short:
            if content in modality:
                measured = json.dumps(measures(np.asarray(pack[row]), modality[content]))
                done.append((measured, size, content, frame))
        self._db.executemany(
            "UPDATE slices SET measures = ? WHERE size = ? AND content = ? AND frame = ?", done
        )
        self._db.commit()

    def close(self) -> None:
        for stream in self._packs.values():
            stream.close()
        self._db.close()

    # ---- reading

    def meta(self, name: str) -> str:
        found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else ""

    def known(self) -> dict[str, tuple[tuple[bytes, str, int, int], str]]:
        """Of each file: what it was when it was read (see `identity`), and its code."""
        rows = self._db.execute("SELECT file, path, member, size_bytes, mtime_ns, code FROM files")
        return {
            file: ((path, member, size_bytes, mtime_ns), code)
            for file, path, member, size_bytes, mtime_ns, code in rows
        }

    def identity(self, source: Source) -> tuple[bytes, str, int, int]:
        """What tells that a file is another now: where it lies below the images folder, its size and time."""
        root = next((root for root in self._roots if source.path.is_relative_to(root)), None)
        path = source.path.relative_to(root) if root else source.path
        return os.fsencode(path), source.member, source.size_bytes, source.mtime_ns

    def source(self, number: int) -> Source:
        file, *identity = self._db.execute(
            "SELECT file, path, member, size_bytes, mtime_ns FROM files WHERE number = ?", (number,)
        ).fetchone()
        return self._source(number, file, *identity)

    def _source(
        self, number: int, file: str, path: bytes, member: str, size_bytes: int, mtime_ns: int
    ) -> Source:
        where = self._roots[0] / os.fsdecode(path)
        return Source(
            number=number, file=file, path=where, member=member, size_bytes=size_bytes, mtime_ns=mtime_ns
        )

    def read_under(self, rule: PatientRule) -> None:
        """All headers have been read under this rule."""
        self._set("patients", rule.digest())

    def has_slices(self) -> bool:
        return self._db.execute("SELECT 1 FROM slices LIMIT 1").fetchone() is not None

    def where(self, size: int, record: SliceRecord) -> tuple[int, bytes] | None:
        """Where the slice lies, and the digest of the image that it was made of."""
        wanted = (size, record.content, record.frame)
        found: tuple[int, bytes] | None = self._db.execute(
            "SELECT row, pixels FROM slices WHERE size = ? AND content = ? AND frame = ?", wanted
        ).fetchone()
        return found

    def measures(self, size: int, records: Sequence[SliceRecord]) -> list[list[Any]]:
        rows = self._db.execute("SELECT row, measures FROM slices WHERE size = ?", (size,))
        by_row = {row: json.loads(text) for row, text in rows}
        return [by_row[record.row] for record in records]

    def files(self, wanted: _Wanted) -> Iterator[FileFacts]:
        """Every file, in the order of its number."""
        rows = self._db.execute(
            "SELECT file, number, path, member, size_bytes, mtime_ns, code, slices, content FROM files "
            "ORDER BY number"
        )
        known: dict[Any, Any] = {}
        for file, number, path, member, size_bytes, mtime_ns, code, slices, content in rows:
            source = self._source(number, file, path, member, size_bytes, mtime_ns)
            yield self._facts(source, path, code, json.loads(slices), content, known)

    def _facts(
        self,
        source: Source,
        path: bytes,
        code: str,
        slices: list[Any],
        content: str,
        known: dict[Any, Any],
    ) -> FileFacts:
        place = os.fsdecode(path)
        found = []
        for values, left_out in slices:
            record = SliceRecord(
                number=source.number,
                file=source.file,
                root=self._roots[0],
                place=source.file if place == source.file else place,
                row=-1,
                content=content,
                **_shared(values, known),
            )
            found.append((record, left_out or self._admit(record)))
        return FileFacts(source=source, code=code, slices=tuple(found))

    def pack(self, size: int) -> np.ndarray:
        """All slices of a size, a read-only memory map of shape (slices, size, size)."""
        path = self._pack_path(size)
        count = path.stat().st_size // (size * size * 2) if path.exists() else 0
        if not count:
            return np.zeros((0, size, size), np.int16)
        return np.memmap(path, np.dtype("<i2"), "r", shape=(count, size, size))

    # ---- writing

    def keep(self, sources: Sequence[Source]) -> None:
        """Forget files that are gone, and number the others."""
        self._db.execute(
            "CREATE TEMP TABLE IF NOT EXISTS present (file TEXT PRIMARY KEY, number INTEGER) WITHOUT ROWID"
        )
        self._db.execute("DELETE FROM present")
        self._db.executemany(
            "INSERT INTO present VALUES (?, ?)", ((_text(source.file), source.number) for source in sources)
        )
        self._db.execute("DELETE FROM files WHERE file NOT IN (SELECT file FROM present)")
        self._db.execute(
            "UPDATE files SET number = (SELECT number FROM present WHERE present.file = files.file)"
        )
        self._db.commit()

    def put_headers(self, source: Source, outcome: Outcome) -> FileFacts:
        """Keep what the headers of a file say; the digest of the file's bytes only where no slice came with
        them, which will say whether it is used.
        """
        code, content, text = outcome.failure, "", "[]"
        identity = self.identity(source)
        facts = FileFacts(source=source, code=code)
        if not code:
            try:
                slices = [
                    [_under_key(header, self._key, self._admit), str(left_out)]
                    for header, left_out in outcome.value["headers"]
                ]
                content = "" if outcome.arrays else str(outcome.value["content"])
                text = json.dumps(slices)
                facts = self._facts(source, identity[0], code, slices, content, {})
            except (KeyError, TypeError, ValueError, AttributeError):
                code, content, text = "decoder-crashed", "", "[]"
                facts = FileFacts(source=source, code=code)
        self._db.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (_text(source.file), source.number, *identity, code, text, content),
        )
        self._commit_sometimes()
        return facts

    def put_failure(self, number: int, code: str) -> None:
        self._db.execute("UPDATE files SET code = ? WHERE number = ?", (code, number))

    def put_slices(
        self, number: int, content: str, frames: Sequence[int], outcome: Outcome, size: int
    ) -> None:
        self._db.execute("UPDATE files SET content = ? WHERE number = ?", (content, number))
        stream = self._writable(size)
        for place, frame in enumerate(frames):
            data, pixels = outcome.arrays[0][place].tobytes(), bytes.fromhex(outcome.value["pixels"][place])
            taken = self._db.execute(
                "INSERT OR IGNORE INTO slices VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    size,
                    content,
                    frame,
                    self._rows[size],
                    pixels,
                    _check(data),
                    json.dumps(outcome.value["measures"][place]),
                ),
            )
            if taken.rowcount:
                stream.write(data)
                self._rows[size] += 1
        self._commit_sometimes()

    def commit(self) -> None:
        """From here a killed build goes on: first the slices, then what says that they are there."""
        for stream in self._packs.values():
            stream.flush()
            os.fsync(stream.fileno())
        self._db.commit()
        self._committed_at = time.monotonic()

    def verify(self, size: int, progress: Progress) -> None:
        """Forget slices that are not what was written."""
        rows = self._db.execute(
            "SELECT row, check_sum FROM slices WHERE size = ? ORDER BY row", (size,)
        ).fetchall()
        bad = []
        path = self._pack_path(size)
        with open(path, "rb") if path.exists() else open(os.devnull, "rb") as stream:
            for done, (row, check) in enumerate(rows, start=1):
                stream.seek(row * size * size * 2)
                if _check(stream.read(size * size * 2)) != check:
                    bad.append((size, row))
                progress("verify", done, len(rows))
        self._db.executemany("DELETE FROM slices WHERE size = ? AND row = ?", bad)
        self._db.commit()

    def compact(self, size: int, referred: Set[tuple[str, int]]) -> None:
        """Take out the slices that are not among these (content, frame), if there are any. The others
        move.
        """
        kept = self._db.execute(
            "SELECT content, frame, row FROM slices WHERE size = ? ORDER BY row", (size,)
        ).fetchall()
        path = self._pack_path(size)
        used = [(content, frame, row) for content, frame, row in kept if (content, frame) in referred]
        if len(used) == len(kept) and (
            not path.exists() or path.stat().st_size == len(kept) * size * size * 2
        ):
            return
        self.commit()
        if stream := self._packs.pop(size, None):
            stream.close()
        generation = int(self.meta(f"generation:{size}") or 1) + 1
        new = self.folder / f"slices-{size}-{generation}.i16"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
            if used:
                with path.open("rb") as origin:
                    for _, _, row in used:
                        origin.seek(row * size * size * 2)
                        target.write(origin.read(size * size * 2))
            target.flush()
            os.fsync(target.fileno())
        sync_folder(self.folder)
        gone = [(size, content, frame) for content, frame, _ in kept if (content, frame) not in referred]
        self._db.executemany("DELETE FROM slices WHERE size = ? AND content = ? AND frame = ?", gone)
        moved = [(place, size, content, frame) for place, (content, frame, _) in enumerate(used)]
        self._db.executemany("UPDATE slices SET row = ? WHERE size = ? AND content = ? AND frame = ?", moved)
        self._set(f"generation:{size}", str(generation))
        self._db.commit()
        for old in self.folder.glob(f"slices-{size}-*"):
            if old != new:  # a process that has it open keeps its mapping
                old.unlink(missing_ok=True)

    def note(self, wanted: _Wanted, slices: Slices) -> None:
        """The cache is complete for this state of the folder; a new index is written down."""
        patients = sorted({record.patient for record in slices.intake.records})
        before = set(json.loads(self.meta(f"patients:{wanted.size}") or "[]"))
        is_new = self.meta(f"index:{wanted.size}") != slices.fingerprint
        if is_new or before != set(patients):  # in the second case patients opted out, or no longer do
            line = {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "index": slices.fingerprint,
                "size": wanted.size,
                "slices": len(slices.intake.records),
                "patients": len(patients),
                "patients_new": len(set(patients) - before),
                "patients_gone": len(before - set(patients)),
            }
            append_line(self.folder / "indexes.jsonl", json.dumps(line))
            self._set(f"patients:{wanted.size}", json.dumps(patients))
        if is_new or not self.meta(f"members:{wanted.size}"):  # an earlier version kept none
            self._set(f"index:{wanted.size}", slices.fingerprint)
            self._set(f"members:{wanted.size}", json.dumps(_members(slices.intake.records, wanted.key)))
        self._set(f"state:{wanted.size}", wanted.state)
        self.commit()

    def _set(self, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _commit_sometimes(self) -> None:
        if time.monotonic() - self._committed_at > _COMMIT_S:
            self.commit()

    def _pack_path(self, size: int) -> Path:
        return self.folder / f"slices-{size}-{self.meta(f'generation:{size}') or 1}.i16"

    def _writable(self, size: int) -> Any:
        """The file of slices, open behind its last slice that the database knows; what a killed build wrote
        after that is cut off.
        """
        if size not in self._packs:
            last = self._db.execute("SELECT max(row) FROM slices WHERE size = ?", (size,)).fetchone()[0]
            self._rows[size] = 0 if last is None else last + 1
            stream = os.fdopen(os.open(self._pack_path(size), os.O_RDWR | os.O_CREAT, 0o600), "r+b")
            stream.truncate(self._rows[size] * size * size * 2)
            stream.seek(0, os.SEEK_END)
            self._packs[size] = stream
        return self._packs[size]


_IDENTIFIERS = {
    "study_uid": "study",
    "series_uid": "series",
    "sop_uid": "image",
    "accession": "accession",
    "scanner": "scanner",
}
_OF_THE_CACHE = frozenset({"number", "file", "root", "place", "row", "content"})
_OF_THE_PATIENT = frozenset(
    {"patient", "patient_origin", "patient_forms", "patient_near", "birth", "sex", "issuer"}
)
_OWN = frozenset({"image", "frame", "instance_number", "slice_position_mm"})
"""Fields that every slice has for itself."""
_OF_THE_HEADER = tuple(
    field.name
    for field in fields(SliceRecord)
    if field.name not in _OF_THE_CACHE | _OF_THE_PATIENT | {*_IDENTIFIERS.values()}
)


def _under_key(header: dict[str, Any], key: bytes, admit: Criteria) -> dict[str, Any]:
    """What is kept of a header: identifiers as pseudonyms, of date and description what a rule needs."""
    kept = {name: header[name] for name in _OF_THE_HEADER} | admit.kept_text(header)
    kept["patient"] = pseudonym(named_by(header, admit.patients)[1], key)
    kept |= under_key(header, key, admit.patients)
    for name, short in _IDENTIFIERS.items():
        kept[short] = identifier(short, header[name], key)
    return kept


def _shared(values: dict[str, Any], known: dict[Any, Any]) -> dict[str, Any]:
    """The fields of a record; a value that many slices have, such as the patient or the thickness, is in
    memory once.

    Args:
        known: the values of the slices before, to which these are added.
    """
    spacing = values["pixel_spacing_mm"]
    for name in ("patient_forms", "patient_near"):
        values[name] = tuple(values[name])
    values["pixel_spacing_mm"] = None if spacing is None else (spacing[0], spacing[1])
    return {
        name: value if name in _OWN else known.setdefault((type(value), value), value)
        for name, value in values.items()
    }


def _text(path: str) -> str:
    """A path as SQLite takes it: bytes that are no UTF-8 stay as escapes."""
    return path.encode("utf-8", "backslashreplace").decode()


def _check(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_CHECK_BYTES]


def _is_damaged(error: sqlite3.OperationalError) -> bool:
    return getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
