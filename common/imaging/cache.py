"""Decoded slices on disk, so that a site decodes its DICOM files once.

A cache is two files in `cache_dir`, named by the image size and a fingerprint of the folder: `slices-128-<fingerprint>.npy` (int16, memory
mapped) and `.json` (the index, without an absolute path). The JSON is written last and is the commit: a build that is killed leaves nothing
that a later one would open. The folder holds image content and pseudonyms: it is readable by its owner only, and never leaves the hospital.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, ImagingError
from common.imaging.dicom import find_files, read_pixels
from common.imaging.index import Intake, Problem, SliceRecord, build_index, problem_of
from common.imaging.preprocess import PREPROCESS_VERSION, prepare, to_stored
from common.imaging.refusals import CODES

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Slices:
    """A site's usable slices: `images[i]` is the stored form (see `preprocess.to_stored`) of `intake.records[i]`."""

    intake: Intake
    images: np.ndarray  # int16, shape (records, size, size), read-only memory map
    fingerprint: str
    built: bool  # False when an existing cache was opened


def load_or_build(images_root: Path, key: bytes, cache_dir: Path, size: int) -> Slices:
    """Open the cache of `images_root`, or index and decode it and write one.

    The cache is used if nothing changed: relative paths, sizes, modification times, the key, `size` and `PREPROCESS_VERSION`. A file that
    cannot be decoded moves from the records to quarantine. Two processes that build at once build one after the other.
    Raises:
        DataError: `no-such-folder`, or `cache-not-writable`.
    """
    if not images_root.is_dir():
        build_index(images_root, key)  # raises, with its message
    cache_dir, images_root = cache_dir.absolute(), images_root.absolute()
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        stem = f"slices-{size}-{(fingerprint := fingerprint_of(images_root, key, size))}"
        if (opened := _open(cache_dir, stem, images_root)) is not None:
            return Slices(intake=opened[0], images=opened[1], fingerprint=fingerprint, built=False)
        with _alone(cache_dir):
            if (opened := _open(cache_dir, stem, images_root)) is not None:
                return Slices(intake=opened[0], images=opened[1], fingerprint=fingerprint, built=False)
            for leftover in cache_dir.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
            _build(images_root, key, cache_dir, stem, size)
            opened = _open(cache_dir, stem, images_root)
            if opened is None:
                raise DataError(f"{cache_dir}: the cache cannot be read back", code="cache-not-writable")
            _remove_stale(cache_dir, size, keep=stem)
        return Slices(intake=opened[0], images=opened[1], fingerprint=fingerprint, built=True)
    except OSError as error:
        raise DataError(
            f"{cache_dir}: cannot keep the image cache: {error.strerror}",
            code="cache-not-writable",
            hint="the state folder of site.yaml must be writable and have room",
        ) from error


def fingerprint_of(images_root: Path, key: bytes, size: int) -> str:
    """Keyed hash over every file's relative path, size and modification time, and the format; 32 hex digits. No header is read."""
    mac = hmac.new(key, f"{FORMAT}:{PREPROCESS_VERSION}:{size}".encode(), hashlib.sha256)
    for path in find_files(images_root):
        try:
            status = path.stat()
            state = f"{status.st_size}:{status.st_mtime_ns}"
        except OSError:
            state = "gone"
        mac.update(os.fsencode(path.relative_to(images_root)) + b"\0" + state.encode() + b"\n")
    return mac.hexdigest()[:32]


def _build(images_root: Path, key: bytes, cache_dir: Path, stem: str, size: int) -> None:
    intake = build_index(images_root, key)
    failures: list[Problem] = []
    part = cache_dir / f"{stem}.npy.tmp"
    part.touch(mode=0o600)
    shape = (max(len(intake.records), 1), size, size)
    with part.open("wb") as stream:  # not a memory map: a full disk must be an error, not a signal
        np.lib.format.write_array_header_1_0(stream, {"descr": "<i2", "fortran_order": False, "shape": shape})
        # One row per record is reserved; those of records that fail stay unused at the end. The JSON says how many are used.
        end = stream.tell() + int(np.prod(shape)) * 2
        for record in intake.records:
            try:
                image = _decode(record, size)
            except (ImagingError, OSError) as error:
                failures.append(problem_of(record.number, record.path, error))
                continue
            stream.write(image.astype("<i2", copy=False).tobytes())
        stream.truncate(end)
    _commit(part, cache_dir / f"{stem}.npy")
    part = cache_dir / f"{stem}.json.tmp"
    part.touch(mode=0o600)
    part.write_text(json.dumps(_to_json(intake.quarantine(failures))), encoding="ascii")
    _commit(part, cache_dir / f"{stem}.json")


def _decode(record: SliceRecord, size: int) -> np.ndarray:
    status = record.path.stat()
    if (status.st_size, status.st_mtime_ns) != (record.size_bytes, record.mtime_ns):
        raise ImagingError(f"{record.path}: {CODES['changed']}", code="changed")
    return to_stored(prepare(read_pixels(record.path), record.modality, size), record.modality)


def _commit(part: Path, target: Path) -> None:
    """Make `part` durable under its final name."""
    _sync(part)
    os.replace(part, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(cache_dir: Path, stem: str, images_root: Path) -> tuple[Intake, np.ndarray] | None:
    """The committed cache, None where there is none or it is damaged."""
    try:
        intake = _from_json(json.loads((cache_dir / f"{stem}.json").read_text(encoding="ascii")), images_root)
        images = np.load(cache_dir / f"{stem}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, KeyError, AssertionError):
        return None
    if images.dtype != np.int16 or images.ndim != 3 or len(images) < len(intake.records):
        return None
    return intake, images[: len(intake.records)]


def _to_json(intake: Intake) -> dict[str, Any]:
    def problems(items: tuple[Problem, ...]) -> list[list[Any]]:
        return [[problem.number, problem.code] for problem in items]

    return {
        "found": intake.found,
        "columns": _COLUMNS,
        "records": [[getattr(record, name) for name in _COLUMNS] for record in intake.records],
        "quarantined": problems(intake.quarantined),
        "excluded": problems(intake.excluded),
        "duplicates": intake.duplicates,
        "shared_uids": intake.shared_uids,
    }


def _from_json(value: dict[str, Any], images_root: Path) -> Intake:
    if value["columns"] != _COLUMNS:
        raise ValueError("another version wrote this cache")

    def problems(items: list[list[Any]]) -> tuple[Problem, ...]:
        return tuple(Problem(number=number, code=code, detail=f"file {number}: {CODES.get(code, code)}") for number, code in items)

    def record(items: list[Any]) -> SliceRecord:
        named = dict(zip(_COLUMNS, items, strict=True))
        spacing = named["pixel_spacing_mm"]
        named["pixel_spacing_mm"] = None if spacing is None else (spacing[0], spacing[1])
        return SliceRecord(path=images_root / named["file"], **named)

    return Intake(
        root=images_root,
        found=value["found"],
        records=tuple(record(items) for items in value["records"]),
        quarantined=problems(value["quarantined"]),
        excluded=problems(value["excluded"]),
        duplicates=tuple(value["duplicates"]),
        shared_uids=value["shared_uids"],
    )


_COLUMNS = [field.name for field in fields(SliceRecord) if field.name != "path"]


@contextmanager
def _alone(cache_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; it is released when the process ends, however it ends."""
    descriptor = os.open(cache_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_stale(cache_dir: Path, size: int, *, keep: str) -> None:
    """Caches of an earlier state of the folder. A process that has one open keeps its mapping."""
    for path in cache_dir.glob(f"slices-{size}-*"):
        if path.stem != keep:
            path.unlink(missing_ok=True)
