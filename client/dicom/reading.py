"""Read one file in a child process (see `workers.Workers`): its headers, or its slices in stored form.

An item names a source; with "frames" it asks for these slices, without for a part of the headers. What a
header says comes back as it stands there: the child has no key to make pseudonyms with.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from client.dicom.dicom import NO_PIXELS, exclusion, read_file, read_slices
from client.dicom.foreign import HEAD_BYTES, foreign_code, is_uuid
from client.dicom.refusals import refusal
from client.dicom.sources import Source, open_source
from client.dicom.workers import failure_of
from common.artifacts import Modality
from common.errors import ImagingError
from common.preprocess import normalize_image, to_stored

HASH_SIDE = 8
"""A slice's difference hash has this many bits a side."""
DIGEST_CHARACTERS = 32
"""Of a SHA-256 in hexadecimal, which processors have instructions for: half the time of BLAKE2."""
HEADERS_AT_ONCE = 2000  # of one file: a header takes a millisecond, and an answer stays below 4 MiB
KNOWN_POINTS_HU = {"air": (-1100, -850), "tissue": (-150, 150), "shifted": (850, 1250), "dense": (2000, 3072)}
"""Ranges of which `measures` gives the shares: air; soft tissue; soft tissue in an image whose offset of 1024
was not subtracted; what is denser than bone.
"""
MR_POINTS = ("negative", "bright", "", "")
"""What stands there for MR: the shares of pixels below zero, and above nine tenths of the highest value while
the lowest lies below a tenth of it. Noise about zero that is stored with a sign and read without has both.
"""
MEASURES = 4 + len(KNOWN_POINTS_HU)
_BLOCK = 1 << 20
_IN_MEMORY_BYTES = 16 << 20  # of a file that is read as a whole


def item_of(source: Source, **wanted: Any) -> dict[str, Any]:
    """The item for `read`: `HEADERS_AT_ONCE` of a source's headers from `first` on, with `size` also the
    slice of a file of one; its slices with `frames`, `size` and `modality`; the digest of its bytes with
    `digest`.
    """
    about = {
        "path": str(source.path),
        "name": source.file,
        "member": source.member,
        "size_bytes": source.size_bytes,
        "mtime_ns": source.mtime_ns,
    }
    return about | {"problem": source.problem} | wanted


def read(item: dict[str, Any]) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    """The headers of a file, or some of its slices.

    Returns:
        for slices: {"pixels": [digest of each image in physical units], "measures": [of each, see
        `measures`], "content"}, and one int16 array (slices, size, size). for headers: {"headers": [[fields
        of SliceHeader, code of its exclusion or ""], ...], "slices" (of the whole file), "content"}; no
        array. for headers with `size`, of a file of one slice that is not excluded: both; or without array,
        and {"failure": code} where the image cannot be decoded.
        "content" is the digest of the file's bytes, "" where it was not asked for.
    Raises:
        ImagingError: the file cannot be used.
    """
    source = Source(
        number=0,
        file=item["name"],
        path=Path(item["path"]),
        member=item["member"],
        size_bytes=item["size_bytes"],
        mtime_ns=item["mtime_ns"],
        problem=item["problem"],
    )
    with open_source(source) as (stream, size):
        if "frames" in item:
            content = _digest(stream) if item.get("digest") else ""
            value, stored = _prepared(
                read_slices(stream, size, item["frames"]), len(item["frames"]), item["size"], item["modality"]
            )
            return value | {"content": content}, (stored,)
        if "size" in item and size <= _IN_MEMORY_BYTES:
            stream = io.BytesIO(stream.read())  # once, for its header, its pixels and its digest
        content = _digest(stream) if item.get("digest") else ""
        first = item.get("first", 0)
        headers, slices = _headers(stream, size, item["name"], slice(first, first + HEADERS_AT_ONCE))
        # loss is for the cohort to judge: see `client.data.inclusion`
        found = [[vars(header), exclusion(header, lossy="use") or ""] for header in headers]
        value = {
            "headers": found,
            "slices": headers[0].number_of_frames if headers else 0,
            "content": content,
        }
        if "size" not in item or value["slices"] != 1 or found[0][1]:
            return value, ()
        try:
            prepared, stored = _prepared(slices([0]), 1, item["size"], headers[0].modality)
            return value | prepared | {"content": _digest(stream)}, (stored,)
        except BaseException as error:  # the header stands: it says whose image it is that cannot be decoded
            return value | {"failure": failure_of(error)}, ()


def _prepared(
    images: Iterator[tuple[int, np.ndarray]], count: int, side: int, modality: Modality
) -> tuple[dict[str, Any], np.ndarray]:
    """Digests and measures of slices, and these as they are stored, int16 (count, side, side)."""
    stored = np.empty((count, side, side), np.int16)
    pixels, measured = [], []
    for place, (_, image) in enumerate(images):
        digest = hashlib.sha256(f"{image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
        pixels.append(digest.hexdigest()[:DIGEST_CHARACTERS])
        stored[place] = to_stored(normalize_image(image, modality, side), modality)
        measured.append(measures(stored[place], modality, image))
    return {"pixels": pixels, "measures": measured}, stored


def _headers(stream: BinaryIO, size: int, name: str, frames: slice) -> tuple[tuple[Any, ...], Any]:
    """What `read_file` gives; a file that is recognised as no DICOM image is excluded, not damaged."""
    try:
        return read_file(stream, size, frames)
    except ImagingError as error:
        code = None
        if error.code == "not-dicom":
            stream.seek(0)
            code = foreign_code(name, stream.read(HEAD_BYTES))
        elif error.message.endswith(NO_PIXELS) and is_uuid(name):
            code = "foreign-file"  # Orthanc keeps the header of each file a second time, up to its pixels
        if code is None:
            raise
        raise refusal(code, "recognised as no DICOM image") from None


def measures(stored: np.ndarray, modality: Modality, physical: np.ndarray | None = None) -> list[float | str]:
    """Image statistics of one slice as it is stored: mean and standard deviation (stored units), detail,
    difference hash; of CT the shares of pixels within each range of `KNOWN_POINTS_HU`, of MR `MR_POINTS`.

    Detail is the standard deviation of the discrete Laplacian over that of the image: low in blurred slices,
    high in noisy ones. The hash (64 bits, hexadecimal) compares neighbours in an 8 x 9 thumbnail;
    near-duplicates differ in a few bits.

    Args:
        stored: int16 (size, size). physical: float32 (rows, columns), the MR signal; None: not at hand, and
            `MR_POINTS` are zeros.
    """
    image = stored.astype(np.float32)
    spread = float(image.std())
    laplacian = image[:-2, 1:-1] + image[2:, 1:-1]
    laplacian += image[1:-1, :-2]
    laplacian += image[1:-1, 2:]
    laplacian -= 4 * image[1:-1, 1:-1]
    rows, columns, counts = _thumbnail_of(image.shape)
    thumbnail = np.add.reduceat(np.add.reduceat(image, rows, axis=0), columns, axis=1) / counts
    bits = np.packbits(thumbnail[:, 1:] > thumbnail[:, :-1])
    return [
        float(image.mean()),
        spread,
        float(laplacian.std()) / spread if spread > 0 else 0.0,
        bits.tobytes().hex(),
        *(_shares_hu(stored) if modality == "CT" else _shares_mr(physical)),
    ]


@lru_cache(maxsize=8)
def _thumbnail_of(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the rows and columns of the thumbnail begin, and how many pixels each of its pixels sums."""
    rows = np.linspace(0, shape[0], HASH_SIDE + 1).astype(int)
    columns = np.linspace(0, shape[1], HASH_SIDE + 2).astype(int)
    return rows[:-1], columns[:-1], np.maximum(np.outer(np.diff(rows), np.diff(columns)), 1)


def _share(chosen: np.ndarray) -> float:
    return np.count_nonzero(chosen) / chosen.size


def _shares_hu(stored: np.ndarray) -> list[float]:
    return [_share((stored >= low) & (stored <= high)) for low, high in KNOWN_POINTS_HU.values()]


def _shares_mr(physical: np.ndarray | None) -> list[float]:
    if physical is None:
        return [0.0] * len(MR_POINTS)
    low, high = float(physical.min()), float(physical.max())
    bright = _share(physical > 0.9 * high) if 0 <= low < 0.1 * high else 0.0
    return [_share(physical < 0) if low < 0 else 0.0, bright, 0.0, 0.0]


def _digest(stream: BinaryIO) -> str:
    stream.seek(0)
    found = hashlib.sha256()
    while block := stream.read(_BLOCK):
        found.update(block)
    stream.seek(0)
    return found.hexdigest()[:DIGEST_CHARACTERS]
