"""DICOM files to headers and arrays, and back. The only module that imports pydicom.

Everything a file can do wrong ends in one `ImagingError` with a code of `CODES`; nothing else is ever raised (`_boundary`). A header
value is never put into a message: pydicom's own warnings quote values, so they are silenced here, in the one place that reads files.

References: DICOM PS3.3 (C.7.6.2 Image Plane, C.7.6.3 Image Pixel, C.8.2 CT, C.8.3 MR, C.11.1 Modality LUT), PS3.5 (A.4 encapsulation).
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import struct
import uuid
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.pixels.decoders.base import get_decoder
from pydicom.tag import BaseTag
from pydicom.uid import UID
from pydicom.valuerep import format_number_as_ds

from common.artifacts import Modality
from common.errors import ImagingError

CODES: dict[str, str] = {
    "not-dicom": "no DICOM preamble: not a DICOM file, or one without its file meta information",
    "truncated": "the file ends before its pixel data does",
    "too-large": "above the limit for a file, an image or the number of frames",
    "too-nested": "sequences nested deeper than any scanner writes",
    "bad-geometry": "rows, columns, bits or frames are missing, impossible or do not fit the pixel data",
    "bad-rescale": "the rescale slope or intercept is not one finite, usable number",
    "unsupported-syntax": "no installed codec decodes this transfer syntax",
    "unsupported-object": "not a single-frame CT or MR image (enhanced multi-frame, report, plan, segmentation, secondary capture)",
    "mosaic": "many slices tiled in one image (Siemens MOSAIC, UIH VFRAME)",
    "no-modality": "neither the SOP class nor the modality says CT or MR",
    "colour": "a colour image",
    "non-finite": "the image holds values that are not finite",
    "changed": "the file changed while it was read",
    "conflict": "one SOP instance UID on files with different pixels",
    "unreadable": "damaged in another way, or not readable by this user",
}
EXCLUSIONS: dict[str, str] = {
    "burned-in": "the header says that text is burned into the pixels",
    "localizer": "a localizer (scout), not a diagnostic slice",
    "secondary": "a secondary image: screenshot, reformat or dose screen",
    "dicomdir": "a DICOMDIR, the table of contents of a medium",
}

MAX_FILE_BYTES = 512 << 20
MAX_INFLATED_BYTES = 64 << 20
MAX_SIDE = 4096
PLAUSIBLE_FRAMES = 100_000

SOP_CLASSES: dict[str, Modality] = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}
_SOP_CLASS_OF: dict[Modality, str] = {modality: uid for uid, modality in SOP_CLASSES.items()}
_DICOMDIR = "1.2.840.10008.1.3.10"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT = "1.2.840.10008.1.2.1"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_NATIVE = frozenset({"1.2.840.10008.1.2", _EXPLICIT, _BIG_ENDIAN, _DEFLATED})
_RLE = "1.2.840.10008.1.2.5"
_JPEG_2000 = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203))
_PIXEL_DATA = 0x7FE00010
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, _PIXEL_DATA})
_UNDEFINED = 0xFFFFFFFF
_UID = re.compile(r"[0-9A-Za-z._-]{1,64}")  # wider than the standard: some anonymizers write hashes

_KEYWORDS = (
    "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer", "ManufacturerModelName", "PatientID",
    "KVP", "MagneticFieldStrength", "SliceThickness", "InPlanePhaseEncodingDirection", "StudyInstanceUID", "SeriesInstanceUID",
    "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient", "SliceLocation", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PlanarConfiguration", "PixelPaddingValue", "PixelPaddingRangeLimit", "BurnedInAnnotation",
    "RescaleIntercept", "RescaleSlope", "ModalityLUTSequence",
)  # fmt: skip
_TAGS: list[BaseTag | int] = [pydicom.tag.Tag(keyword) for keyword in _KEYWORDS]

# pydicom warns with the offending value in the text; such a value may be a patient's. It must not reach a terminal or a log.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


@dataclass(frozen=True, kw_only=True)
class SliceHeader:
    """What fedqc reads of one CT or MR header. `patient_key`, the UIDs and free text stay in the memory of the hospital's process.

    `None` means that the header does not say, or says something unusable, about a thing that is not needed to read the image.
    """

    modality: Modality
    rows: int
    columns: int
    bits: int  # bits stored
    photometric: str
    number_of_frames: int
    sop_class: str
    sop_uid: str  # "" where the header has none
    patient_key: str  # PatientID; else the study, the series; "" where nothing tells patients apart
    series_uid: str
    instance_number: int | None
    pixel_spacing_mm: tuple[float, float] | None  # between rows, between columns
    slice_thickness_mm: float | None
    slice_position_mm: float | None  # along the slice normal
    manufacturer: str
    model: str
    field_strength_t: float | None
    kvp: float | None
    transfer_syntax: str
    phase_encoding: str | None  # "ROW" or "COL"
    slope: float
    intercept: float
    image_type: tuple[str, ...]
    burned_in: bool


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the pixels are stored."""

    allocated: int
    stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None  # lowest and highest stored value that stands for "no data"


def find_files(root: Path) -> list[Path]:
    """Every regular, visible file below `root`, sorted by its path relative to `root`.

    Hidden files and folders, pipes, sockets and devices are left out. Linked folders are not entered; a linked file counts only if it
    lies below `root`.
    Raises:
        ImagingError: the folder cannot be listed.
    """
    found: list[tuple[str, str]] = []
    real_root = os.path.realpath(root)
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise ImagingError(
                f"{folder}: cannot list the folder ({type(error).__name__})", code="unreadable", hint="give this user read permission"
            ) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
                if not (os.path.isfile(target) and target.startswith(real_root + os.sep)):
                    continue
                found.append((prefix + entry.name, entry.path))
            elif entry.is_dir(follow_symlinks=False):
                pending.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_file(follow_symlinks=False):
                found.append((prefix + entry.name, entry.path))
    return [Path(path) for _, path in sorted(found)]


def read_header(path: Path) -> SliceHeader:
    """The header of one CT or MR slice, without its pixels; also checks that the file is long enough to hold them.

    Raises:
        ImagingError: the file cannot be used, `code` says why (`CODES`).
    """
    with _boundary(path), _opened(path) as stream:
        dataset, _ = _parse(stream, with_pixels=False)
        return _header_of(dataset)[0]


def exclusion(header: SliceHeader) -> str | None:
    """The code of `EXCLUSIONS` by which this readable slice is left out, or None."""
    if header.burned_in:
        return "burned-in"
    if "LOCALIZER" in header.image_type:
        return "localizer"
    if "SECONDARY" in header.image_type[1:2]:
        return "secondary"
    return None


def read_pixels(path: Path) -> np.ndarray:
    """The slice in physical units: float32, shape (rows, columns); Hounsfield units for CT.

    Modality rescale is applied (slope 1, intercept 0 where the header has none). Padding becomes air (-1024 HU) in CT and the lowest
    real value in MR. A MONOCHROME1 MR image is inverted; CT is not, because the rescale alone defines its Hounsfield units.
    Raises:
        ImagingError: the file cannot be used, `code` says why (`CODES`).
    Reference: DICOM PS3.3 C.11.1 (Modality LUT), C.7.5.1.1.2 (pixel padding).
    """
    with _boundary(path), _opened(path) as stream:
        dataset, length = _parse(stream, with_pixels=True)
        header, layout = _header_of(dataset)
        stored = _decode(dataset, header, layout, length)
        return _physical(stored, header, layout)


def _physical(stored: np.ndarray, header: SliceHeader, layout: _Layout) -> np.ndarray:
    """Stored integers to float32 in physical units; see `read_pixels`."""
    image = stored.astype(np.float32)
    if header.slope != 1:
        image *= np.float32(header.slope)
    if header.intercept != 0:
        image += np.float32(header.intercept)
    padded = None
    if layout.padding is not None:
        padded = (stored >= layout.padding[0]) & (stored <= layout.padding[1])
        padded = None if padded.all() or not padded.any() else padded
    if not np.isfinite(image).all():
        raise _refuse("non-finite", "the image holds values that are not finite")
    if header.modality == "CT":
        if padded is not None:
            image[padded] = -1024.0
        if image.min() < -32768 or image.max() > 65535:
            raise _refuse("bad-rescale", "Hounsfield units outside -32768..65535 after the rescale")
        return image
    real = image if padded is None else image[~padded]
    low, high = real.min(), real.max()
    if header.photometric == "MONOCHROME1":
        np.subtract(low + high, image, out=image)
    if padded is not None:
        image[padded] = low
    return image


def make_uid(seed: bytes) -> str:
    """A UID that is always the same for the same seed: `2.25.` and a UUID as an integer (PS3.5 B.2). Not reversible without the seed."""
    return f"2.25.{uuid.UUID(bytes=hashlib.sha256(seed).digest()[:16], version=5).int}"


def write_slice(
    path: Path,
    image: np.ndarray,
    *,
    modality: Modality,
    pixel_spacing_mm: float | tuple[float, float],
    patient_id: str,
    study_uid: str,
    series_uid: str,
    sop_uid: str,
    instance_number: int,
    slice_position_mm: float = 0.0,
    slice_thickness_mm: float = 1.0,
    manufacturer: str = "fedqc",
    model: str = "phantom",
    slope: float = 1.0,
    intercept: float = 0.0,
    bits_stored: int = 16,
    signed: bool = True,
    phase_encoding: str | None = None,
    field_strength_t: float | None = None,
    kvp: float | None = None,
    description: str = "",
    derived: bool = False,
) -> None:
    """Write a synthetic slice as CT or MR Image Storage, Explicit VR Little Endian; the same arguments give the same bytes.

    Args:
        image: shape (rows, columns), physical units (HU for CT). Stored as round((image - intercept) / slope), clipped to what
            `bits_stored` and `signed` can hold, so `read_pixels` gives the image back to within slope / 2 where it was not clipped.
        pixel_spacing_mm: one number, or between rows and between columns.
        phase_encoding: "ROW" or "COL", MR only.
        derived: made from a real image: the header then says DERIVED, and nothing of the real header is copied.
    Raises:
        ImagingError: the image is not a finite 2-D array of at most 4096 x 4096, or the slope is not usable.
    """
    values = np.asarray(image, dtype=np.float64)
    if values.ndim != 2 or not 1 <= min(values.shape) <= max(values.shape) <= MAX_SIDE:
        raise _refuse("bad-geometry", f"image of shape {values.shape}; expected (rows, columns), each 1..{MAX_SIDE}")
    if not np.isfinite(values).all():
        raise _refuse("non-finite", "the image holds values that are not finite")
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0 and 1 <= bits_stored <= 16):
        raise _refuse("bad-rescale", f"slope {slope}, intercept {intercept}, bits_stored {bits_stored} cannot store an image")
    slope_text, intercept_text = format_number_as_ds(float(slope)), format_number_as_ds(float(intercept))
    low, high = (-(1 << bits_stored - 1), (1 << bits_stored - 1) - 1) if signed else (0, (1 << bits_stored) - 1)
    stored = np.clip(np.rint((values - float(intercept_text)) / float(slope_text)), low, high).astype("<i2" if signed else "<u2")
    rows, columns = stored.shape
    spacing = (pixel_spacing_mm, pixel_spacing_mm) if isinstance(pixel_spacing_mm, int | float) else pixel_spacing_mm

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(_SOP_CLASS_OF[modality])
    meta.MediaStorageSOPInstanceUID = UID(sop_uid)
    meta.TransferSyntaxUID = UID(_EXPLICIT)
    meta.ImplementationClassUID = UID(make_uid(b"fedqc"))
    meta.ImplementationVersionName = "FEDQC"  # not pydicom's version: the same arguments give the same bytes
    dataset = Dataset()
    dataset.file_meta = meta
    fields: dict[str, Any] = {
        "SpecificCharacterSet": "ISO_IR 192",
        "ImageType": ["DERIVED" if derived else "ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "M"],
        "SOPClassUID": UID(_SOP_CLASS_OF[modality]),
        "SOPInstanceUID": UID(sop_uid),
        "Modality": modality,
        "PatientName": "DERIVED^PUBLIC" if derived else "SYNTHETIC^PHANTOM",
        "PatientID": patient_id,
        "PatientBirthDate": "",
        "PatientSex": "O",
        "StudyInstanceUID": UID(study_uid),
        "StudyDate": "",
        "StudyTime": "",
        "StudyID": "",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "SeriesInstanceUID": UID(series_uid),
        "SeriesNumber": 1,
        "SeriesDescription": description,
        "PatientPosition": "HFS",
        "FrameOfReferenceUID": UID(make_uid(b"frame of reference of " + study_uid.encode())),
        "PositionReferenceIndicator": "",
        "Manufacturer": manufacturer,
        "ManufacturerModelName": model,
        "InstanceNumber": instance_number,
        "AcquisitionNumber": 1,
        "BurnedInAnnotation": "NO",
        "PixelSpacing": [format_number_as_ds(float(value)) for value in spacing],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [format_number_as_ds(float(value)) for value in _corner(rows, columns, spacing, slice_position_mm)],
        "SliceThickness": format_number_as_ds(float(slice_thickness_mm)),
        "SliceLocation": format_number_as_ds(float(slice_position_mm)),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": 16,
        "BitsStored": bits_stored,
        "HighBit": bits_stored - 1,
        "PixelRepresentation": int(signed),
    }
    if modality == "CT":
        fields |= {"KVP": "" if kvp is None else format_number_as_ds(float(kvp)), "RescaleType": "HU"}
    else:
        fields |= {"ScanningSequence": "GR", "SequenceVariant": "NONE", "ScanOptions": "", "MRAcquisitionType": "2D"}
        fields |= {"RepetitionTime": "", "EchoTime": "", "EchoTrainLength": ""}
        if phase_encoding is not None:
            fields["InPlanePhaseEncodingDirection"] = phase_encoding
        if field_strength_t is not None:
            fields["MagneticFieldStrength"] = format_number_as_ds(float(field_strength_t))
    if modality == "CT" or (slope, intercept) != (1, 0):
        fields |= {"RescaleSlope": slope_text, "RescaleIntercept": intercept_text}
    for keyword, value in fields.items():
        setattr(dataset, keyword, value)
    dataset.add_new(_PIXEL_DATA, "OW", stored.tobytes() + b"\0" * (stored.nbytes % 2))

    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(buffer.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _corner(rows: int, columns: int, spacing: tuple[float, float], position_mm: float) -> tuple[float, float, float]:
    """Centre of the first pixel, so that the image centre lies on the z axis."""
    return (-(columns - 1) / 2 * spacing[1], -(rows - 1) / 2 * spacing[0], position_mm)


def _refuse(code: str, message: str) -> ImagingError:
    return ImagingError(message, code=code, hint=CODES.get(code, EXCLUSIONS.get(code, "")))


@contextmanager
def _boundary(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes an `ImagingError`. The original exception is dropped: its text may quote the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImagingError as error:
        raise ImagingError(f"{path}: {error.message}", code=error.code, hint=error.hint) from None
    except Exception as error:  # RecursionError and MemoryError are Exceptions too
        code = next(code for kinds, code in _CODE_OF if isinstance(error, kinds))
        raise ImagingError(f"{path}: {CODES[code]} ({type(error).__name__})", code=code, hint=CODES[code]) from None


_CODE_OF: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (InvalidDicomError, "not-dicom"),
    (RecursionError, "too-nested"),
    (MemoryError, "too-large"),
    ((EOFError, struct.error), "truncated"),
    (Exception, "unreadable"),
)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The open file, at most `MAX_FILE_BYTES`; `changed` if its size or time moves while it is open."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:  # a pipe must not block us
        before = os.fstat(stream.fileno())
        if before.st_size > MAX_FILE_BYTES:
            raise _refuse("too-large", f"{before.st_size} bytes; the limit is {MAX_FILE_BYTES}")
        yield stream
        after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _refuse("changed", CODES["changed"])


def _parse(stream: BinaryIO, *, with_pixels: bool) -> tuple[Dataset, int]:
    """The elements fedqc needs, and the byte length of the pixel data (`_UNDEFINED` where encapsulated)."""
    source, size = _inflated(stream)
    seen: list[tuple[int, int, int]] = []  # tag, length, where the value begins

    def at_pixels(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if tag in _PIXEL_TAGS:
            seen.append((int(tag), length, source.tell()))
            return True
        if length != _UNDEFINED and source.tell() + length > size:
            raise _refuse("truncated", "an element is longer than the rest of the file")
        return False

    dataset = read_partial(source, stop_when=at_pixels, specific_tags=_TAGS)
    _check_object(dataset, has_pixels=bool(seen))
    if seen[0][0] != _PIXEL_DATA:
        raise _refuse("bad-geometry", "floating point pixel data in a CT or MR image")
    _, length, start = seen[0]
    if length != _UNDEFINED:
        if start + length > size:
            raise _refuse("truncated", "the pixel data is longer than the rest of the file")
    else:
        length_of_items = _walk_items(source, start, size, big_endian=dataset.file_meta.get("TransferSyntaxUID") == _BIG_ENDIAN)
    if with_pixels:
        source.seek(start)
        value = source.read(length if length != _UNDEFINED else length_of_items)
        dataset.add_new(_PIXEL_DATA, "OB" if length == _UNDEFINED else "OW", value)
        dataset[_PIXEL_DATA].is_undefined_length = length == _UNDEFINED
    return dataset, length


def _inflated(stream: BinaryIO) -> tuple[BinaryIO, int]:
    """The stream to parse and its size: the file itself, or a bounded inflation of a deflated one."""
    size = os.fstat(stream.fileno()).st_size

    def after_meta(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if tag >> 16 == 2 and stream.tell() + length > size:
            raise _refuse("truncated", "an element is longer than the rest of the file")
        return tag >> 16 != 2

    read_preamble(stream, False)
    meta = read_dataset(stream, False, True, stop_when=after_meta)
    head = stream.tell()
    stream.seek(0)
    if str(meta.get("TransferSyntaxUID", "")) != _DEFLATED:
        return stream, size
    start = stream.read(head).replace(_DEFLATED.encode(), _EXPLICIT.encode().ljust(len(_DEFLATED), b"\0"))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(stream.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise _refuse("too-large", f"inflates to more than {MAX_INFLATED_BYTES} bytes")
    if not inflater.eof:
        raise _refuse("truncated", "the deflated data has no end")
    return io.BytesIO(start + body), head + len(body)


def _walk_items(source: BinaryIO, start: int, size: int, *, big_endian: bool) -> int:
    """Length of the encapsulated pixel data without its delimiter; checks that every item lies inside the file."""
    layout = struct.Struct(">HHL" if big_endian else "<HHL")
    position = start
    while True:
        source.seek(position)
        group, element, length = layout.unpack(source.read(8))  # struct.error at the end of the file: truncated
        if (group, element) == (0xFFFE, 0xE0DD):
            return position - start
        if (group, element) != (0xFFFE, 0xE000) or length == _UNDEFINED:
            raise _refuse("unreadable", "the encapsulated pixel data is not a chain of items")
        position += 8 + length
        if position > size:
            raise _refuse("truncated", "an item of the pixel data is longer than the rest of the file")


def _check_object(dataset: Dataset, *, has_pixels: bool) -> None:
    """Only single-frame CT and MR images pass."""
    sop_class = _sop_class(dataset)
    if sop_class == _DICOMDIR:
        raise _refuse("dicomdir", EXCLUSIONS["dicomdir"])
    if sop_class and sop_class not in SOP_CLASSES:
        raise _refuse("unsupported-object", CODES["unsupported-object"])
    if not has_pixels:
        raise _refuse("truncated", "the header ends without pixel data")
    if not sop_class and _text(dataset, "Modality") not in _SOP_CLASS_OF:
        raise _refuse("no-modality", CODES["no-modality"])


def _sop_class(dataset: Dataset) -> str:
    return _text(dataset, "SOPClassUID") or _text(dataset.file_meta, "MediaStorageSOPClassUID")


def _header_of(dataset: Dataset) -> tuple[SliceHeader, _Layout]:
    """Check the elements, all of them, and give them types."""
    sop_class = _sop_class(dataset)
    modality = SOP_CLASSES.get(sop_class) or ("CT" if _text(dataset, "Modality") == "CT" else "MR")
    image_type = tuple(value.strip().upper() for value in _texts(dataset, "ImageType"))
    if {"MOSAIC", "VFRAME"} & set(image_type):
        raise _refuse("mosaic", CODES["mosaic"])
    photometric = _text(dataset, "PhotometricInterpretation").upper() or "MONOCHROME2"
    samples = _integer(dataset, "SamplesPerPixel", default=1)
    if samples == 3 or photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK")):
        raise _refuse("colour", CODES["colour"])
    if samples != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise _refuse("bad-geometry", "SamplesPerPixel or PhotometricInterpretation is not one of a grey image")
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    frames = _integer(dataset, "NumberOfFrames", default=1)
    if not (rows >= 1 and columns >= 1 and 1 <= frames <= PLAUSIBLE_FRAMES):
        raise _refuse("bad-geometry", "Rows, Columns or NumberOfFrames is impossible")
    if max(rows, columns) > MAX_SIDE or frames > 1:
        raise _refuse("too-large", f"larger than {MAX_SIDE} x {MAX_SIDE}, or more than one frame")
    layout = _layout(dataset)
    slope, intercept = _rescale(dataset)
    sop_uid = _text(dataset, "SOPInstanceUID")
    if sop_uid and not _UID.fullmatch(sop_uid):
        raise _refuse("unreadable", "SOPInstanceUID is not a UID")
    spacing = _numbers(dataset, "PixelSpacing", 2) or _numbers(dataset, "ImagerPixelSpacing", 2)
    field = _positive(_numbers(dataset, "MagneticFieldStrength", 1))
    series_uid = _text(dataset, "SeriesInstanceUID")
    phase_encoding = _text(dataset, "InPlanePhaseEncodingDirection").upper()
    header = SliceHeader(
        modality=modality,
        rows=rows,
        columns=columns,
        bits=layout.stored,
        photometric=photometric,
        number_of_frames=frames,
        sop_class=sop_class or _SOP_CLASS_OF[modality],
        sop_uid=sop_uid,
        patient_key=_patient_key(dataset),
        series_uid=series_uid,
        instance_number=_instance_number(dataset),
        pixel_spacing_mm=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        slice_thickness_mm=_positive(_numbers(dataset, "SliceThickness", 1)),
        slice_position_mm=_slice_position(dataset),
        manufacturer=_printable(_text(dataset, "Manufacturer")),
        model=_printable(_text(dataset, "ManufacturerModelName")),
        field_strength_t=field / 10_000 if field and field > 100 else field,  # some scanners write gauss
        kvp=_positive(_numbers(dataset, "KVP", 1)),
        transfer_syntax=_text(dataset.file_meta, "TransferSyntaxUID"),
        phase_encoding=phase_encoding if phase_encoding in {"ROW", "COL"} else None,
        slope=slope,
        intercept=intercept,
        image_type=image_type,
        burned_in=_text(dataset, "BurnedInAnnotation").upper() == "YES",
    )
    return header, layout


def _layout(dataset: Dataset) -> _Layout:
    allocated = _integer(dataset, "BitsAllocated")
    stored = _integer(dataset, "BitsStored", default=allocated)
    high_bit = _integer(dataset, "HighBit", default=stored - 1)
    representation = _integer(dataset, "PixelRepresentation", default=0)
    if allocated not in {8, 16, 32} or not (1 <= stored <= high_bit + 1 <= allocated) or representation not in {0, 1}:
        raise _refuse("bad-geometry", "BitsAllocated, BitsStored, HighBit or PixelRepresentation is impossible")
    signed = representation == 1
    first, last = (_stored_value(dataset, keyword, allocated, signed) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    padding = None if first is None else (first, first) if last is None else (min(first, last), max(first, last))
    return _Layout(allocated=allocated, stored=stored, high_bit=high_bit, signed=signed, padding=padding)


def _rescale(dataset: Dataset) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where absent. Present but empty, double, zero or not finite is `bad-rescale`."""
    if "ModalityLUTSequence" in dataset and "RescaleSlope" not in dataset:
        raise _refuse("bad-rescale", "a modality lookup table instead of a rescale slope")
    values = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}
    for keyword in values:
        if keyword in dataset:
            numbers = _numbers(dataset, keyword, 1)
            if numbers is None:
                raise _refuse("bad-rescale", f"{keyword} is not one finite number")
            values[keyword] = numbers[0]
    slope, intercept = values["RescaleSlope"], values["RescaleIntercept"]
    if slope == 0 or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise _refuse("bad-rescale", "RescaleSlope is zero, or RescaleSlope or RescaleIntercept is absurd")
    return slope, intercept


def _patient_key(dataset: Dataset) -> str:
    """PatientID; without one, the study; without one, the series. "" pools all such slices into one patient, the careful choice.

    From the raw bytes, so that a wrong character set cannot make a patient unreadable.
    """
    for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"):
        if keyword in dataset:
            raw = dataset.get_item(keyword).value
            text = (raw.decode("latin-1") if isinstance(raw, bytes) else str(raw or "")).strip(" \0\t\r\n")
            if text:
                return f"{keyword}:{text}"
    return ""


def _slice_position(dataset: Dataset) -> float | None:
    position, axes = _numbers(dataset, "ImagePositionPatient", 3), _numbers(dataset, "ImageOrientationPatient", 6)
    if position and axes:
        return float(np.dot(np.cross(axes[:3], axes[3:]), position))
    location = _numbers(dataset, "SliceLocation", 1)
    return location[0] if location else None


def _value(dataset: Dataset, keyword: str) -> Any:
    """The element's value, None where absent or not convertible."""
    try:
        return dataset.get(keyword)
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return None


def _texts(dataset: Dataset, keyword: str) -> list[str]:
    value = _value(dataset, keyword)
    if value is None or isinstance(value, bytes):
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value] if isinstance(value, Sequence) else [str(value)]


def _text(dataset: Dataset, keyword: str) -> str:
    values = _texts(dataset, keyword)
    return values[0].strip(" \0") if len(values) == 1 else ""


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:64]


def _numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, else None."""
    value = _value(dataset, keyword)
    if value is None or isinstance(value, bytes):
        return None
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        numbers = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _positive(numbers: tuple[float, ...] | None) -> float | None:
    return numbers[0] if numbers and numbers[0] > 0 else None


def _integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    """A whole number of a binary or IS element; `bad-geometry` names the attribute, not the value."""
    value = _value(dataset, keyword)
    if value is None and default is not None and keyword not in dataset:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse("bad-geometry", f"{keyword} is missing or not a whole number")
    return int(value)


def _instance_number(dataset: Dataset) -> int | None:
    value = _value(dataset, "InstanceNumber")
    return int(value) if isinstance(value, int) else None


def _stored_value(dataset: Dataset, keyword: str, allocated: int, signed: bool) -> int | None:
    """A pixel value from the header, whose VR (US or SS) old writers get wrong."""
    value = _value(dataset, keyword)
    if not isinstance(value, int):
        return None
    span = 1 << allocated
    value = int(value) % span
    return value - span if signed and value >= span // 2 else value


def _decode(dataset: Dataset, header: SliceHeader, layout: _Layout, length: int) -> np.ndarray:
    """The stored integers, shape (rows, columns), masked to the bits that are image."""
    syntax = header.transfer_syntax
    native = syntax in _NATIVE or (not syntax and length != _UNDEFINED)
    expected = header.rows * header.columns * layout.allocated // 8
    if native and length == _UNDEFINED:
        raise _refuse("unreadable", "uncompressed pixel data of undefined length")
    if native:
        if length < expected:
            raise _refuse("truncated", "less pixel data than rows x columns")
        if layout.allocated != 8 or syntax != _BIG_ENDIAN:
            kind = f"{'>' if syntax == _BIG_ENDIAN else '<'}{'i' if layout.signed else 'u'}{layout.allocated // 8}"
            pixels = np.frombuffer(dataset[_PIXEL_DATA].value, dtype=kind, count=header.rows * header.columns)
            return _image_bits(pixels.reshape(header.rows, header.columns).astype(kind.replace(">", "<"), copy=False), layout)
    if not native and len(dataset[_PIXEL_DATA].value) > 4 * expected + 65536:
        raise _refuse("bad-geometry", "far more compressed data than rows x columns")
    if syntax in _JPEG_2000:
        _check_jpeg_2000_size(dataset[_PIXEL_DATA].value, header)
    pixels = _decode_with_pydicom(dataset, header)
    if pixels.shape != (header.rows, header.columns):
        raise _refuse("bad-geometry", "the decoded image is not rows x columns")
    return _image_bits(pixels, layout) if native or syntax == _RLE else pixels


def _decode_with_pydicom(dataset: Dataset, header: SliceHeader) -> np.ndarray:
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel, dataset.NumberOfFrames = header.photometric, 1, 1
    for keyword, value in (("BitsStored", header.bits), ("PixelRepresentation", 0)):
        if keyword not in dataset:
            setattr(dataset, keyword, value)
    try:
        decoder = get_decoder(UID(header.transfer_syntax))
        available = decoder.is_available
    except NotImplementedError:
        available = False
    if not available:
        hint = f"can read: {', '.join(supported_syntaxes())}"
        raise ImagingError("no installed codec decodes this transfer syntax", code="unsupported-syntax", hint=hint)
    # pylibjpeg is asked first: its OpenJPEG is 1.45x as fast as the others pydicom would pick, and handles signed data.
    first = "pylibjpeg" if header.transfer_syntax in _JPEG_2000 and "pylibjpeg" in decoder.available_plugins else ""
    try:
        return decoder.as_array(dataset, index=0, raw=True, decoding_plugin=first)[0]
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        code = "unreadable" if header.transfer_syntax in _NATIVE | {_RLE} else "unsupported-syntax"
        raise _refuse(code, f"no installed codec could decode the pixel data ({type(error).__name__})") from None


@lru_cache(maxsize=1)
def supported_syntaxes() -> tuple[str, ...]:
    """Names of the transfer syntaxes that the installed codecs decode."""
    uids = [UID(f"1.2.840.10008.1.2{last}") for last in ("", ".1", ".1.99", ".2", ".5")]
    uids += [UID(f"1.2.840.10008.1.2.4.{last}") for last in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)]
    return tuple(sorted(uid.name for uid in uids if get_decoder(uid).is_available))


def _image_bits(pixels: np.ndarray, layout: _Layout) -> np.ndarray:
    """Drop what other elements hid in the unused bits (overlays), and extend the sign."""
    if layout.stored == layout.allocated:
        return pixels
    left = layout.allocated - 1 - layout.high_bit
    return (pixels << left) >> (layout.allocated - layout.stored)


def _check_jpeg_2000_size(encoded: bytes, header: SliceHeader) -> None:
    """The size inside the codestream must be the header's: it is what the codec will allocate (ISO 15444-1 A.5.1, SIZ)."""
    at = encoded.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(encoded) < at + 42:
        raise _refuse("unsupported-syntax", "no JPEG 2000 codestream in the pixel data")
    width, height, left, top = struct.unpack(">4L", encoded[at + 8 : at + 24])
    components = int.from_bytes(encoded[at + 40 : at + 42], "big")
    if (height - top, width - left, components) != (header.rows, header.columns, 1):
        raise _refuse("bad-geometry", "the JPEG 2000 codestream is not rows x columns of one component")
