"""Read DICOM files into headers and arrays.

A file is a seekable stream, so that the member of an archive is read like a file on disk. One file holds one
slice, or several: the frames of an enhanced CT or MR image, or the tiles of a mosaic. Slices of a file are
numbered from 0; the number is called the frame of either.

Everything a file can do wrong ends in one `ImagingError` with a code of `CODES` or `EXCLUSIONS`; nothing else
is ever raised (`_boundary`). A header value is never put into a message: pydicom's own warnings quote values,
so they are silenced here, where files are read.

What is used:
- CT and MR by their SOP class, also where the header has it in its meta information only; the modality
  decides only where there is no SOP class. `no-modality` where neither says, `unsupported-object` for any
  other class.
- Grey images of one sample. `colour` otherwise.
- Enhanced and legacy converted enhanced CT and MR: each frame is a slice. Its geometry, rescale and frame
  type are those of its own functional groups, else of the shared ones, else of the top level. A classic image
  of several frames is `multi-frame`.
- Mosaics whose header states the number of tiles (`mosaic.py`); others are left out as `mosaic`.
- What `exclusion` lets pass.

Limits, all checked on the header, before an image takes memory: a file `MAX_FILE_BYTES`, its deflated form
`MAX_INFLATED_BYTES`, an element `MAX_ELEMENT_BYTES`, a side `MAX_SIDE`, frames `MAX_FRAMES`, all frames
decoded `MAX_DECODED_BYTES`. One frame is in memory at a time.

References: DICOM PS3.3 (C.7.6.2 Image Plane, C.7.6.3 Image Pixel, C.7.6.16 Multi-frame Functional Groups,
    C.8.2 CT, C.8.3 MR, C.11.1
Modality LUT), PS3.5 (A.4 encapsulation).
"""

from __future__ import annotations

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_partial, read_preamble
from pydicom.tag import BaseTag, Tag

from client.dicom.codecs import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    NATIVE,
    Layout,
    check_syntax,
    decode_frame,
    is_lossy,
    starts_codestream,
)
from client.dicom.content import Content, is_localizer, is_reformat, is_screen, not_anatomy
from client.dicom.elements import (
    Elements,
    age_years,
    date,
    elements_of,
    holds,
    integer,
    is_empty,
    items_of,
    numbers,
    positive,
    printable,
    raw_bytes,
    text,
    texts,
    value_of,
    whole,
    words,
)
from client.dicom.frame_items import FrameItems, read_frame_items
from client.dicom.mosaic import (
    MOSAIC_TYPES,
    PRIVATE_TAGS,
    Grid,
    grid_of,
    private_count,
    private_tags,
    tile_positions_mm,
)
from client.dicom.refusals import CODES, EXCLUSIONS, refusal
from common.artifacts import Modality
from common.errors import ImagingError

MAX_FILE_BYTES = 512 << 20
MAX_INFLATED_BYTES = 64 << 20
MAX_ELEMENT_BYTES = 64 << 20
MAX_SIDE = 4096
MAX_FRAMES = 65_535  # PS3.5: an implementation limit of many scanners, whose frame counters have 16 bits
MAX_DECODED_BYTES = 2 << 30
MAX_FRAGMENTS = 1 << 18
_CODESTREAM_HEAD = 4096
PLAUSIBLE_FRAMES = 100_000
MIN_HU = -1500.0
"""Nothing is less dense than air; what lies this far below it is a scanner's filling outside the round field
of view (-2000, -3024).
"""
AIR_HU = -1024.0

SOP_CLASSES: dict[str, Modality] = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.4": "MR"}
ENHANCED_CLASSES: dict[str, Modality] = {
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",  # legacy converted
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",  # legacy converted
}
_ALL_CLASSES = SOP_CLASSES | ENHANCED_CLASSES
NO_PIXELS = "the header ends without pixel data"
WRITER = "FEDQC"
"""ImplementationVersionName of the files that `dicom_write` makes."""
IMPORTER = "FEDQC_IMPORT"
"""The same, of public images that `fedqc data import` converted: no scanner and no hospital wrote them."""
_DICOMDIR = "1.2.840.10008.1.3.10"
_PIXEL_DATA = 0x7FE00010
_PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, _PIXEL_DATA})
_PER_FRAME = 0x52009230
_STOPS = _PIXEL_TAGS | {_PER_FRAME}
_UNDEFINED = 0xFFFFFFFF
_LOSSY_DERIVATION = "113040"  # DCM, Lossy Compression
_CODE_STRING = re.compile(r"[A-Z0-9_ ]{1,16}")
_UID = re.compile(r"[0-9A-Za-z._-]{1,64}")  # wider than the standard: some anonymizers write hashes

_FRAME_KEYWORDS = (
    "FrameType",
    "PixelSpacing",
    "SliceThickness",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceLocation",
    "RescaleIntercept",
    "RescaleSlope",
    "InPlanePhaseEncodingDirection",
    "EffectiveEchoTime",
    "EchoTime",
    "RepetitionTime",
    "KVP",
    "ConvolutionKernel",
    "InstanceNumber",
    "ScanningSequence",
    "SequenceVariant",
    "SequenceName",
    "MagneticFieldStrength",
    "CTDIvol",
    "PixelBandwidth",
    "RescaleType",
    "ComplexImageComponent",
    "PixelPresentation",
    "AcquisitionContrast",
    "VolumetricProperties",
    "VolumeBasedCalculationTechnique",
)
"""What a functional group may say about a frame; everything else is taken from the top level."""
_GROUPS = (
    "UnassignedSharedConvertedAttributesSequence",
    "UnassignedPerFrameConvertedAttributesSequence",
    "PixelMeasuresSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelValueTransformationSequence",
    "CTImageFrameTypeSequence",
    "MRImageFrameTypeSequence",
    "MRFOVGeometrySequence",
    "MREchoSequence",
    "MRImagingModifierSequence",
    "MRTimingAndRelatedParametersSequence",
    "CTXRayDetailsSequence",
    "CTReconstructionSequence",
    "CTExposureSequence",
)
_KEYWORDS = (
    *_FRAME_KEYWORDS,
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "Manufacturer",
    "ManufacturerModelName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "SpecificCharacterSet",
    "PatientAge",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "StudyDate",
    "AccessionNumber",
    "SeriesNumber",
    "SeriesDescription",
    "BodyPartExamined",
    "DeviceSerialNumber",
    "StationName",
    "PulseSequenceName",
    "EchoPulseSequence",
    "SpacingBetweenSlices",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "ImagerPixelSpacing",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "BurnedInAnnotation",
    "ModalityLUTSequence",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "DerivationCodeSequence",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable",
)
# plain integers: pydicom's tags compare slowly
_FRAME_TAGS = frozenset(int(Tag(keyword)) for keyword in _FRAME_KEYWORDS)
_GE_KIND = (0x0043, "GEMS_PARM_01", 0x2F)
_WANTED = (
    frozenset(int(Tag(keyword)) for keyword in _KEYWORDS)
    | frozenset(PRIVATE_TAGS)
    | frozenset(private_tags(_GE_KIND))
)
_TAGS: list[BaseTag | int] = list(_WANTED)

# pydicom warns with the offending value in the text; such a value may be a patient's. It must not reach a
# terminal or a log.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


@dataclass(frozen=True, kw_only=True)
class SliceHeader:
    """What fedqc reads of one CT or MR slice. `patient_key`, the UIDs, the accession number, the scanner, the
    date, the age and free text stay in the memory of the hospital's process.

    `None` (for text "") means that the header does not say, or says something unusable, about a thing that is
    not needed to read the image.
    """

    frame: int  # number of the slice in its file; 0 for the only one
    number_of_frames: int  # slices in the file
    modality: Modality
    rows: int  # of the slice: of one tile of a mosaic
    columns: int
    bits: int  # bits stored
    photometric: str
    sop_class: str
    sop_uid: str  # of the file: all its slices share it
    patient_key: str  # PatientID; else the study, the series; "" where nothing tells patients apart
    patient_id: str  # bytes of PatientID, each as one character of Latin-1; see `patients.readings`
    patient_name: str  # likewise
    charset: str  # of both, as declared
    birth_date: str  # YYYYMMDD
    sex: str
    issuer: str  # IssuerOfPatientID
    study_uid: str
    series_uid: str
    accession: str
    study_date: str  # YYYYMMDD
    series_number: int | None
    series_description: str
    instance_number: int | None
    body_part: str
    age_years: float | None
    pixel_spacing_mm: tuple[float, float] | None  # between rows, between columns
    slice_thickness_mm: float | None
    slice_position_mm: float | None  # along the slice normal
    manufacturer: str
    model: str
    scanner: str  # serial number, else station name, as written
    field_strength_t: float | None
    kvp: float | None
    kernel: str
    sequence: str  # MR: scanning sequence, its variant, its name
    echo_time_ms: float | None
    repetition_time_ms: float | None
    transfer_syntax: str
    phase_encoding: str | None  # "ROW" or "COL"
    slope: float
    intercept: float
    image_type: tuple[str, ...]  # the frame type, where frames have one
    burned_in: bool
    simulated: bool  # written by fedqc itself
    scanning_sequence: tuple[str, ...] = ()  # MR: SE, IR, GR, EP, RM
    sequence_variant: tuple[str, ...] = ()
    pixel_bandwidth_hz: float | None = None  # MR, of one pixel
    lossy: bool = False  # compressed with loss at any time, as the header or the codestream says
    derived_otherwise: bool = False  # the header names a derivation that is no compression
    not_anatomy: str = ""  # the code by which it is no magnitude image of anatomy; see `content.py`
    imported: bool = False  # converted from a public collection by fedqc
    ctdi_vol_mgy: float | None = None  # CT: dose index of the acquisition, (0018,9345)


@dataclass(frozen=True, kw_only=True)
class _Parsed:
    """A header, and where its pixel data lies."""

    source: BinaryIO  # the stream, or its inflated form
    top: Elements
    meta: Elements
    sop_class: str
    start: int  # of the pixel data
    length: int  # bytes; `_UNDEFINED` where encapsulated
    words: bool  # pixel data of VR OW
    # start and length of the encapsulated items; the first is the offset table
    items: tuple[tuple[int, int], ...]
    frame_items: FrameItems | None


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A checked header: how every slice of the file is stored, and what describes it."""

    parsed: _Parsed
    syntax: str
    rows: int  # of a stored frame
    columns: int
    layout: Layout
    photometric: str
    grid: Grid | None
    slices: int
    shared: Elements  # what holds for all frames
    own: FrameItems | None  # functional groups of each frame, if any
    fragments: tuple[tuple[tuple[int, int], ...], ...]  # of each compressed frame
    lossy_stream: bool  # the first codestream loses something


def read_headers(stream: BinaryIO, size: int, frames: slice = slice(None)) -> tuple[SliceHeader, ...]:
    """The header of each slice of a file, in order, without its pixels; checks that the file is long enough
    to hold them.

    A header that says something impossible of one of its slices refuses the file as a whole.
    Args:
        stream: seekable, read from its beginning.
        size: its length in bytes.
        frames: which slices, all by default; `number_of_frames` of each header is the count of the file. Of
            the others nothing but their places is read (about half a millisecond each is saved).
    Raises:
        ImagingError: the file cannot be used, `code` says why (`CODES`, `EXCLUSIONS`).
    """
    return read_file(stream, size, frames)[0]


def read_file(
    stream: BinaryIO, size: int, frames: slice = slice(None)
) -> tuple[tuple[SliceHeader, ...], Callable[[Sequence[int]], Iterator[tuple[int, np.ndarray]]]]:
    """The headers of a file as `read_headers` gives them, and a function from numbers of slices to these as
    `read_slices` gives them, for as long as the stream is open. The file is parsed once.

    Raises:
        ImagingError: as `read_headers`; the function, as `read_slices`.
    """
    with _boundary():
        image = _describe(_parse(stream, size))
        return tuple(_headers_of(image, frames)), partial(_slices_of, image)


def read_slices(
    stream: BinaryIO, size: int, frames: Sequence[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The slices of a file in physical units, one after the other: number and float32 of shape (rows,
    columns); Hounsfield units for CT.

    Modality rescale is applied: slope 1 and intercept 0 where the header has none, which for CT needs signed
    values (`bad-rescale` otherwise, as unsigned ones cannot be Hounsfield units). Padding becomes air (-1024
    HU) in CT, as does everything at or below `MIN_HU`, and the lowest real value in MR. A MONOCHROME1 MR
    image is inverted; CT is not, because the rescale alone defines its Hounsfield units.
    Args:
        stream, size: as in `read_headers`.
        frames: numbers of the slices to decode, in any order; all by default. Nothing else is decoded. The
            file is searched for its frames at each call (some microseconds a frame), so ask for many at once.
    Raises:
        ImagingError: the file, or the slice that comes next, cannot be used; the others may be asked for
            again. `changed` if there is no slice of that number.
    Reference: DICOM PS3.3 C.11.1 (Modality LUT), C.7.5.1.1.2 (pixel padding).
    """
    with _boundary():
        image = _describe(_parse(stream, size))
    yield from _slices_of(image, range(image.slices) if frames is None else frames)


def _slices_of(image: _Image, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Slices of a file that was parsed; see `read_slices`."""
    with _boundary():
        if not all(0 <= number < image.slices for number in wanted):
            raise refusal("changed", "the file no longer holds the requested slice")
    tiled: np.ndarray | None = None  # a mosaic is decoded once
    for number in wanted:
        with _boundary():
            if image.grid is None:
                stored = _decode(image, number)
            else:
                tiled = _decode(image, 0) if tiled is None else tiled
                stored = image.grid.tile(tiled, number)
            physical = _physical(stored, _view(image, number), image)
        yield number, physical


def read_header(path: Path) -> SliceHeader:
    """The header of the only slice of a file on disk.

    Raises:
        ImagingError: as `read_headers`; `changed` if the file changes meanwhile, `multi-frame` if it holds
            several slices.
    """
    with _boundary(path), _opened(path) as (stream, size):
        headers = read_headers(stream, size)
        if len(headers) != 1:
            raise refusal("multi-frame", "several slices in the file, where one is expected")
        return headers[0]


def read_pixels(path: Path, frame: int = 0) -> np.ndarray:
    """One slice of a file on disk in physical units, float32, shape (rows, columns); see `read_slices`.

    Raises:
        ImagingError: as `read_slices`; `changed` if the file changes meanwhile.
    """
    with _boundary(path), _opened(path) as (stream, size):
        return next(image for _, image in read_slices(stream, size, [frame]))


def exclusion(header: SliceHeader, *, lossy: Literal["exclude", "use"] = "exclude") -> str | None:
    """The code of `EXCLUSIONS` by which this readable slice is left out, or None.

    Only originals (value 1 of ImageType) and primary images (value 2) of anatomy (`content.py`) enter; a
    value that is absent excludes nothing. DERIVED are multiplanar and projection images, maps and averages:
    their artifacts are not the scanner's. The standard also makes an image DERIVED when it is compressed with
    loss; `lossy` decides about those, and about images that say ORIGINAL and are compressed with loss, alike.
    The derived slices that fedqc writes itself (real images with simulated artifacts) are made to be used. So
    are the secondary ones that it imported; at a hospital `client.data.inclusion` leaves them out.
    Reference: DICOM PS3.3 C.7.6.1.1.2, C.7.6.1.1.5.
    """
    if code := _never_used(header.image_type, burned_in=header.burned_in, imported=header.imported):
        return code
    by_fedqc = header.simulated or header.imported
    derived = header.image_type[:1] not in {(), ("",), ("ORIGINAL",)} and not by_fedqc
    only_compressed = (
        header.lossy
        and not header.derived_otherwise
        and not header.not_anatomy
        and not is_reformat(header.image_type)
    )
    if derived and not only_compressed:
        return "derived"
    if header.not_anatomy:
        return header.not_anatomy
    return "lossy" if header.lossy and lossy == "exclude" else None


def _never_used(image_type: tuple[str, ...], *, burned_in: bool, imported: bool) -> str | None:
    if burned_in:
        return "burned-in"
    if is_localizer(image_type):
        return "localizer"
    if (image_type[1:2] not in {(), ("",), ("PRIMARY",)} and not imported) or is_screen(image_type):
        return "secondary"
    return None


def _physical(stored: np.ndarray, view: Elements, described: _Image) -> np.ndarray:
    """Stored integers to float32 in physical units; see `read_slices`."""
    layout, modality = described.layout, _modality_of(view, described.parsed.sop_class)
    slope, intercept = _rescale(view, modality, layout)
    image = stored.astype(np.float32)
    if slope != 1:
        image *= np.float32(slope)
    if intercept != 0:
        image += np.float32(intercept)
    padded = None
    if layout.padding is not None:
        padded = (stored >= layout.padding[0]) & (stored <= layout.padding[1])
        padded = None if padded.all() or not padded.any() else padded
    if modality == "CT" and padded is not None:
        image[padded] = AIR_HU
    real = image if padded is None or modality == "CT" else image[~padded]
    low, high = real.min(), real.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise refusal("non-finite", "the image holds values that are not finite")
    if modality == "CT":
        if low < -32768 or high > 65535:
            raise refusal("bad-rescale", "Hounsfield units outside -32768..65535 after the rescale")
        if low <= MIN_HU:
            image[image <= MIN_HU] = AIR_HU
        return image
    if described.photometric == "MONOCHROME1":
        np.subtract(low + high, image, out=image)
    if padded is not None:
        image[padded] = low
    return image


@contextmanager
def _boundary(path: Path | None = None) -> Iterator[None]:
    """Whatever goes wrong inside becomes an `ImagingError`. The original exception is dropped: its text may
    quote the header.
    """
    where = "" if path is None else f"{path}: "
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImagingError as error:
        raise ImagingError(f"{where}{error.message}", code=error.code, hint=error.hint) from None
    except Exception as error:  # RecursionError and MemoryError are Exceptions too
        code = next(code for kinds, code in _CODE_OF if isinstance(error, kinds))
        raise ImagingError(
            f"{where}{CODES[code]} ({type(error).__name__})", code=code, hint=CODES[code]
        ) from None


_CODE_OF: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (InvalidDicomError, "not-dicom"),
    (RecursionError, "too-nested"),
    (MemoryError, "too-large"),
    ((EOFError, struct.error), "truncated"),
    (Exception, "unreadable"),
)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size; `changed` if its size or time moves while it is open."""
    # a pipe must not block us
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        before = os.fstat(stream.fileno())
        yield stream, before.st_size
        after = os.fstat(stream.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise refusal("changed", CODES["changed"])


def _parse(stream: BinaryIO, size: int) -> _Parsed:
    """The elements fedqc needs, and where the pixel data lies inside the file."""
    if size > MAX_FILE_BYTES:
        raise refusal("too-large", f"{size} bytes; the limit is {MAX_FILE_BYTES}")
    source, size = _inflated(stream, size)
    seen: list[tuple[int, str | None, int, int]] = []  # tag, VR, length, where the value begins

    def at_pixels(tag: BaseTag, vr: str | None, length: int) -> bool:
        if tag in _STOPS:
            seen.append((int(tag), vr, length, source.tell()))
            return True
        if length != _UNDEFINED and source.tell() + length > size:
            raise refusal("truncated", "an element is longer than the rest of the file")
        if length != _UNDEFINED and length > MAX_ELEMENT_BYTES and tag in _WANTED:
            raise refusal("too-large", f"an element of the header is longer than {MAX_ELEMENT_BYTES} bytes")
        return False

    dataset = read_partial(source, stop_when=at_pixels, specific_tags=_TAGS)
    top, meta = elements_of(dataset), elements_of(dataset.file_meta)
    big_endian = text(meta, "TransferSyntaxUID") == BIG_ENDIAN
    frame_items = None
    if seen and seen[0][0] == _PER_FRAME:
        _, vr, length, start = seen.pop()
        frame_items = read_frame_items(
            source, start, size, length=length, implicit=vr is None, big_endian=big_endian
        )
        source.seek(frame_items.end)
        rest = read_dataset(source, vr is None, not big_endian, stop_when=at_pixels, specific_tags=_TAGS)
        top |= elements_of(rest)
        if seen and seen[0][0] == _PER_FRAME:
            raise refusal("unreadable", "two sequences of functional groups")
    sop_class = _check_object(top, meta, has_pixels=bool(seen))
    tag, vr, length, start = seen[0]
    if tag != _PIXEL_DATA:
        raise refusal("bad-geometry", "floating point pixel data in a CT or MR image")
    items: tuple[tuple[int, int], ...] = ()
    if length == _UNDEFINED:
        items = _walk_items(source, start, size, big_endian=text(meta, "TransferSyntaxUID") == BIG_ENDIAN)
    elif start + length > size:
        raise refusal("truncated", "the pixel data is longer than the rest of the file")
    return _Parsed(
        source=source,
        top=top,
        meta=meta,
        sop_class=sop_class,
        start=start,
        length=length,
        words=vr != "OB",
        items=items,
        frame_items=frame_items,
    )


def _inflated(stream: BinaryIO, size: int) -> tuple[BinaryIO, int]:
    """The stream to parse and its size: the file itself, or a bounded inflation of a deflated one."""

    def after_meta(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if tag >> 16 == 2 and stream.tell() + length > size:
            raise refusal("truncated", "an element is longer than the rest of the file")
        return tag >> 16 != 2

    stream.seek(0)
    read_preamble(stream, False)
    meta = read_dataset(stream, False, True, stop_when=after_meta)
    head = stream.tell()
    stream.seek(0)
    if str(meta.get("TransferSyntaxUID", "")) != DEFLATED:
        return stream, size
    start = stream.read(head).replace(DEFLATED.encode(), EXPLICIT.encode().ljust(len(DEFLATED), b"\0"))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(stream.read(), MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise refusal("too-large", f"inflates to more than {MAX_INFLATED_BYTES} bytes")
    if not inflater.eof:
        raise refusal("truncated", "the deflated data has no end")
    return io.BytesIO(start + body), head + len(body)


def _walk_items(source: BinaryIO, start: int, size: int, *, big_endian: bool) -> tuple[tuple[int, int], ...]:
    """Start and length of each item of encapsulated pixel data; checks that all lie inside the file."""
    layout = struct.Struct(">HHL" if big_endian else "<HHL")
    position = start
    items: list[tuple[int, int]] = []
    while True:
        source.seek(position)
        # struct.error at the end of the file: truncated
        group, element, length = layout.unpack(source.read(8))
        if (group, element) == (0xFFFE, 0xE0DD):
            return tuple(items)
        if (group, element) != (0xFFFE, 0xE000) or length == _UNDEFINED:
            raise refusal("unreadable", "the encapsulated pixel data is not a chain of items")
        items.append((position + 8, length))
        position += 8 + length
        if position > size:
            raise refusal("truncated", "an item of the pixel data is longer than the rest of the file")
        if len(items) > MAX_FRAGMENTS:
            raise refusal("too-large", f"pixel data in more than {MAX_FRAGMENTS} pieces")


def _check_object(top: Elements, meta: Elements, *, has_pixels: bool) -> str:
    """The SOP class, "" where there is none; only CT and MR images pass."""
    sop_class = text(top, "SOPClassUID") or text(meta, "MediaStorageSOPClassUID")
    if sop_class == _DICOMDIR:
        raise refusal("dicomdir", EXCLUSIONS["dicomdir"])
    if sop_class and sop_class not in _ALL_CLASSES:
        raise refusal("unsupported-object", EXCLUSIONS["unsupported-object"])
    if not has_pixels:
        raise refusal("truncated", NO_PIXELS)
    if not sop_class and text(top, "Modality") not in SOP_CLASSES.values():
        raise refusal("no-modality", EXCLUSIONS["no-modality"])
    return sop_class


def _describe(parsed: _Parsed) -> _Image:
    """Check the elements, all of them, and give them types."""
    top, meta, sop_class = parsed.top, parsed.meta, parsed.sop_class
    enhanced = sop_class in ENHANCED_CLASSES
    is_mosaic = bool(MOSAIC_TYPES & set(_image_type(top)))
    photometric = text(top, "PhotometricInterpretation").upper() or "MONOCHROME2"
    samples = integer(top, "SamplesPerPixel", default=1)
    if samples == 3 or photometric.startswith(("RGB", "YBR", "PALETTE", "HSV", "ARGB", "CMYK")):
        raise refusal("colour", EXCLUSIONS["colour"])
    if samples != 1 or photometric not in {"MONOCHROME1", "MONOCHROME2"}:
        raise refusal(
            "bad-geometry", "SamplesPerPixel or PhotometricInterpretation is not one of a grey image"
        )
    rows, columns = integer(top, "Rows"), integer(top, "Columns")
    frames = integer(top, "NumberOfFrames", default=1) or 1  # 0: written for one, as empty is
    if not (rows >= 1 and columns >= 1 and 1 <= frames <= PLAUSIBLE_FRAMES):
        raise refusal("bad-geometry", "Rows, Columns or NumberOfFrames is impossible")
    if max(rows, columns) > MAX_SIDE or frames > MAX_FRAMES:
        raise refusal("too-large", f"larger than {MAX_SIDE} x {MAX_SIDE}, or more than {MAX_FRAMES} frames")
    if frames > 1 and not enhanced:
        raise refusal("multi-frame", CODES["multi-frame"])
    layout = _layout(top)
    if frames * rows * columns * layout.allocated // 8 > MAX_DECODED_BYTES:
        raise refusal("too-large", f"more than {MAX_DECODED_BYTES} bytes of pixels")
    grid = grid_of(top, rows, columns) if is_mosaic and not enhanced else None
    if is_mosaic and grid is None:
        raise refusal("mosaic", EXCLUSIONS["mosaic"])
    sop_uid = text(top, "SOPInstanceUID")
    if sop_uid and not _UID.fullmatch(sop_uid):
        raise refusal("unreadable", "SOPInstanceUID is not a UID")
    shared, own = _functional_groups(parsed, frames) if enhanced else (top, None)
    syntax = text(meta, "TransferSyntaxUID")
    fragments = _fragments_of_frames(parsed, syntax, frames, rows * columns * layout.allocated // 8)
    return _Image(
        parsed=parsed,
        syntax=syntax,
        rows=rows,
        columns=columns,
        layout=layout,
        photometric=photometric,
        grid=grid,
        slices=frames if grid is None else grid.count,
        shared=shared,
        own=own,
        fragments=fragments,
        lossy_stream=bool(fragments) and is_lossy(_first_bytes(parsed, fragments[0]), syntax),
    )


def _first_bytes(parsed: _Parsed, fragments: Sequence[tuple[int, int]]) -> bytes:
    """The beginning of a codestream, with all markers that come before its data."""
    start, length = fragments[0]
    return _read(parsed.source, start, min(length, _CODESTREAM_HEAD))


def _headers_of(image: _Image, frames: slice) -> Iterator[SliceHeader]:
    if image.grid is None:
        for number in range(image.slices)[frames]:
            yield _header_of(
                _view(image, number), image, rows=image.rows, columns=image.columns, frame=number
            )
        return
    one = _header_of(image.shared, image, rows=image.grid.rows, columns=image.grid.columns)
    places = tile_positions_mm(image.shared, image.grid, one.slice_position_mm)
    for number in range(image.slices)[frames]:
        yield replace(one, frame=number, slice_position_mm=places[number])


def _view(image: _Image, number: int) -> Elements:
    """What holds for a slice: the functional groups of its frame, else the shared ones, else the top
    level.
    """
    return {**image.shared, **_grouped(image.own[number])} if image.own is not None else image.shared


def _functional_groups(parsed: _Parsed, frames: int) -> tuple[Elements, FrameItems | None]:
    """The top level under what is shared by all frames, and the item of each frame, if they have any."""
    own = parsed.frame_items or None
    if own is not None and len(own) != frames:
        raise refusal("bad-geometry", "PerFrameFunctionalGroupsSequence does not have an item for each frame")
    shared = dict(parsed.top)
    for item in items_of(parsed.top, "SharedFunctionalGroupsSequence")[:1]:
        shared |= _grouped(item)
    return shared, own


def _grouped(groups: Dataset) -> dict[int, Any]:
    """The elements inside the functional groups of one item."""
    elements = elements_of(groups)
    found: dict[int, Any] = {}
    for keyword in _GROUPS:
        for item in items_of(elements, keyword)[:1]:
            inner = elements_of(item)
            found |= {tag: inner[tag] for tag in inner if tag in _FRAME_TAGS and not is_empty(inner, tag)}
    return found


def _fragments_of_frames(
    parsed: _Parsed, syntax: str, frames: int, frame_bytes: int
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Where the codestream of each compressed frame lies; nothing for native pixel data, whose length is
    checked.
    """
    if syntax in NATIVE or (not syntax and parsed.length != _UNDEFINED):
        if parsed.length == _UNDEFINED:
            raise refusal("unreadable", "uncompressed pixel data of undefined length")
        if parsed.length < frames * frame_bytes:
            raise refusal("truncated", "less pixel data than frames x rows x columns")
        return ()
    check_syntax(syntax)
    if parsed.length != _UNDEFINED:
        raise refusal("unreadable", "compressed pixel data that is not in items")
    table, *fragments = parsed.items or ((parsed.start, 0),)
    if not fragments:
        raise refusal("truncated", "no compressed pixel data")
    if frames == 1:
        return (tuple(fragments),)
    if len(fragments) == frames:
        return tuple((fragment,) for fragment in fragments)
    starts = {start for start, _ in fragments}
    first = fragments[0][0]
    offsets = _offsets(parsed, table)
    begins = {first + offset for offset in offsets}
    if len(offsets) != frames or first not in begins or not begins <= starts:
        begins = {
            start
            for start, length in fragments
            if starts_codestream(_read(parsed.source, start, min(length, 4)))
        }
    groups: list[list[tuple[int, int]]] = []
    for fragment in fragments:
        if fragment[0] in begins or not groups:
            groups.append([])
        groups[-1].append(fragment)
    if len(groups) != frames:
        raise refusal(
            "bad-geometry", "the pieces of the compressed pixel data do not make up the number of frames"
        )
    return tuple(map(tuple, groups))


def _offsets(parsed: _Parsed, table: tuple[int, int]) -> tuple[int, ...]:
    """The extended offset table, else the basic one."""
    extended = value_of(parsed.top, "ExtendedOffsetTable")
    if isinstance(extended, bytes) and extended:
        return tuple(np.frombuffer(extended[: len(extended) // 8 * 8], "<u8").tolist())
    start, length = table
    return tuple(
        np.frombuffer(_read(parsed.source, start, min(length, 4 * MAX_FRAMES) // 4 * 4), "<u4").tolist()
    )


def _read(source: BinaryIO, start: int, length: int) -> bytes:
    source.seek(start)
    found = source.read(length)
    if len(found) < length:
        raise refusal("changed", CODES["changed"])
    return found


def _decode(image: _Image, frame: int) -> np.ndarray:
    """The stored integers of one frame."""
    source = image.parsed.source
    if image.fragments:
        stored = b"".join(_read(source, start, length) for start, length in image.fragments[frame])
    else:
        length = image.rows * image.columns * image.layout.allocated // 8
        begin = frame * length
        if image.layout.allocated == 8 and image.syntax == BIG_ENDIAN and image.parsed.words:
            even = begin & ~1  # words of two pixels each, the second one first (PS3.5 8.1.1)
            found = _read(
                source,
                image.parsed.start + even,
                min(begin + length - even + 1 & ~1, image.parsed.length - even),
            )
            stored = (
                np.frombuffer(found[: len(found) & ~1], "<u2").byteswap().tobytes()[begin - even :][:length]
            )
        else:
            stored = _read(source, image.parsed.start + begin, length)
    return decode_frame(stored, image.syntax, image.rows, image.columns, image.layout)


def _image_type(elements: Elements) -> tuple[str, ...]:
    return tuple(value.upper() for value in texts(elements, "FrameType") or texts(elements, "ImageType"))


def _modality_of(elements: Elements, sop_class: str) -> Modality:
    return _ALL_CLASSES.get(sop_class) or ("CT" if text(elements, "Modality") == "CT" else "MR")


def _header_of(elements: Elements, image: _Image, *, rows: int, columns: int, frame: int = 0) -> SliceHeader:
    meta, sop_class, layout = image.parsed.meta, image.parsed.sop_class, image.layout
    modality = _modality_of(elements, sop_class)
    image_type = _image_type(elements)
    burned_in = text(elements, "BurnedInAnnotation").upper() == "YES"
    writer = text(meta, "ImplementationVersionName")
    simulated, imported = writer == WRITER, writer == IMPORTER
    lossy = _is_lossy(elements, image)
    other = _not_anatomy(elements, image, modality, image_type)
    try:
        slope, intercept = _rescale(elements, modality, layout)
    except ImagingError:
        # maps and projections often have no rescale
        code = _never_used(image_type, burned_in=burned_in, imported=imported)
        if code is None and image_type[:1] not in {(), ("",), ("ORIGINAL",)} and not (simulated or lossy):
            code = "derived"
        code = code or other
        if code is None:
            raise
        raise refusal(code, EXCLUSIONS[code]) from None
    spacing = numbers(elements, "PixelSpacing", 2) or numbers(elements, "ImagerPixelSpacing", 2)
    field = positive(elements, "MagneticFieldStrength")
    phase_encoding = {"ROW": "ROW", "COL": "COL", "COLUMN": "COL"}.get(
        text(elements, "InPlanePhaseEncodingDirection").upper()
    )
    sequence = " ".join(
        filter(
            None, (words(elements, name) for name in ("ScanningSequence", "SequenceVariant", "SequenceName"))
        )
    )
    return SliceHeader(
        frame=frame,
        number_of_frames=image.slices,
        modality=modality,
        rows=rows,
        columns=columns,
        bits=layout.stored,
        photometric=image.photometric,
        sop_class=sop_class or next(uid for uid, kind in SOP_CLASSES.items() if kind == modality),
        sop_uid=text(elements, "SOPInstanceUID"),
        patient_key=_patient_key(elements),
        patient_id=_stripped(elements, "PatientID"),
        patient_name=_stripped(elements, "PatientName"),
        charset="\\".join(texts(elements, "SpecificCharacterSet")),
        birth_date=date(elements, "PatientBirthDate"),
        sex=text(elements, "PatientSex").upper(),
        issuer=_stripped(elements, "IssuerOfPatientID"),
        study_uid=text(elements, "StudyInstanceUID"),
        series_uid=text(elements, "SeriesInstanceUID"),
        accession=printable(text(elements, "AccessionNumber")),
        study_date=date(elements, "StudyDate"),
        series_number=whole(elements, "SeriesNumber"),
        series_description=printable(text(elements, "SeriesDescription")),
        instance_number=whole(elements, "InstanceNumber"),
        body_part=printable(text(elements, "BodyPartExamined")).upper(),
        age_years=age_years(elements),
        pixel_spacing_mm=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
        slice_thickness_mm=positive(elements, "SliceThickness"),
        slice_position_mm=_slice_position(elements),
        manufacturer=printable(text(elements, "Manufacturer")),
        model=printable(text(elements, "ManufacturerModelName")),
        scanner=printable(text(elements, "DeviceSerialNumber") or text(elements, "StationName")),
        field_strength_t=field / 10_000 if field and field > 100 else field,  # some scanners write gauss
        kvp=positive(elements, "KVP"),
        kernel=words(elements, "ConvolutionKernel"),
        sequence=printable(
            sequence or words(elements, "PulseSequenceName") or words(elements, "EchoPulseSequence")
        ),
        echo_time_ms=positive(elements, "EffectiveEchoTime") or positive(elements, "EchoTime"),
        repetition_time_ms=positive(elements, "RepetitionTime"),
        transfer_syntax=image.syntax,
        phase_encoding=phase_encoding,
        slope=slope,
        intercept=intercept,
        image_type=image_type,
        burned_in=burned_in,
        simulated=simulated,
        scanning_sequence=_codes(elements, "ScanningSequence"),
        sequence_variant=_codes(elements, "SequenceVariant"),
        pixel_bandwidth_hz=positive(elements, "PixelBandwidth"),
        lossy=lossy,
        derived_otherwise=_is_derived_otherwise(elements),
        not_anatomy=other or "",
        imported=imported,
        ctdi_vol_mgy=positive(elements, "CTDIvol") if modality == "CT" else None,
    )


def _codes(elements: Elements, keyword: str) -> tuple[str, ...]:
    """The values of a coded text of several values, those that the standard allows in it."""
    values = (value.upper() for value in texts(elements, keyword))
    return tuple(value for value in values if _CODE_STRING.fullmatch(value))


def _not_anatomy(
    elements: Elements, image: _Image, modality: Modality, image_type: tuple[str, ...]
) -> str | None:
    return not_anatomy(
        Content(
            modality=modality,
            image_type=image_type,
            is_frame=image.parsed.sop_class in ENHANCED_CLASSES,
            component=text(elements, "ComplexImageComponent"),
            presentation=text(elements, "PixelPresentation"),
            contrast=text(elements, "AcquisitionContrast"),
            calculation=text(elements, "VolumeBasedCalculationTechnique"),
            volumetric=text(elements, "VolumetricProperties"),
            rescale_type=text(elements, "RescaleType"),
            ge_kind=private_count(elements, _GE_KIND),
        )
    )


def _is_lossy(elements: Elements, image: _Image) -> bool:
    """Whether the image was ever compressed with loss: LossyImageCompression says so; where it says nothing,
    a method or a ratio above 1 does; and the codestream, whatever the header says.

    Reference: DICOM PS3.3 C.7.6.1.1.5.
    """
    flag = text(elements, "LossyImageCompression")
    if flag in {"01", "1", "YES"} or image.lossy_stream:
        return True
    if flag in {"00", "0", "NO"}:
        return False
    methods = [method for method in texts(elements, "LossyImageCompressionMethod") if method]
    ratios = value_of(elements, "LossyImageCompressionRatio")
    many = ratios if isinstance(ratios, Sequence) and not isinstance(ratios, str | bytes) else [ratios]
    return bool(methods) or any(_above_one(ratio) for ratio in many)


def _above_one(value: Any) -> bool:
    try:
        return float(value) > 1
    except (TypeError, ValueError, OverflowError):
        return False


def _is_derived_otherwise(elements: Elements) -> bool:
    """Whether DerivationCodeSequence names derivations, and none of them is lossy compression."""
    codes = [text(elements_of(item), "CodeValue") for item in items_of(elements, "DerivationCodeSequence")]
    return bool(codes) and _LOSSY_DERIVATION not in codes


def _layout(elements: Elements) -> Layout:
    allocated = integer(elements, "BitsAllocated")
    stored = integer(elements, "BitsStored", default=allocated)
    high_bit = integer(elements, "HighBit", default=stored - 1)
    representation = integer(elements, "PixelRepresentation", default=0)
    if (
        allocated not in {8, 16, 32}
        or not (1 <= stored <= high_bit + 1 <= allocated)
        or representation not in {0, 1}
    ):
        raise refusal(
            "bad-geometry", "BitsAllocated, BitsStored, HighBit or PixelRepresentation is impossible"
        )
    signed = representation == 1
    first, last = (
        _stored_value(elements, keyword, allocated, signed)
        for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")
    )
    padding = (
        None if first is None else (first, first) if last is None else (min(first, last), max(first, last))
    )
    return Layout(allocated=allocated, stored=stored, high_bit=high_bit, signed=signed, padding=padding)


def _stored_value(elements: Elements, keyword: str, allocated: int, signed: bool) -> int | None:
    """A pixel value from the header, whose VR (US or SS) old writers get wrong."""
    value = value_of(elements, keyword)
    if not isinstance(value, int):
        return None
    span = 1 << allocated
    value = int(value) % span
    return value - span if signed and value >= span // 2 else value


def _rescale(elements: Elements, modality: Modality, layout: Layout) -> tuple[float, float]:
    """Slope and intercept. Where absent, 1 and 0, but not in CT of unsigned values; where empty, 1 and 0 in
    MR only: a CT image cannot be without (PS3.3 C.8.2.1 asks for both). `bad-rescale` otherwise, and where
    not one finite number or zero."""
    if holds(elements, "ModalityLUTSequence") and not holds(elements, "RescaleSlope"):
        raise refusal("bad-rescale", "a modality lookup table instead of a rescale slope")
    if modality == "CT" and not layout.signed and not holds(elements, "RescaleIntercept"):
        raise refusal(
            "bad-rescale",
            "a CT image of unsigned values without RescaleIntercept: they cannot be Hounsfield units",
        )
    values = {"RescaleSlope": 1.0, "RescaleIntercept": 0.0}
    for keyword in values:
        if holds(elements, keyword) and not (modality == "MR" and is_empty(elements, keyword)):
            found = numbers(elements, keyword, 1)
            if found is None:
                raise refusal("bad-rescale", f"{keyword} is not one finite number")
            values[keyword] = found[0]
    slope, intercept = values["RescaleSlope"], values["RescaleIntercept"]
    if slope == 0 or abs(slope) > 1e6 or abs(intercept) > 1e9:
        raise refusal("bad-rescale", "RescaleSlope is zero, or RescaleSlope or RescaleIntercept is absurd")
    return slope, intercept


def _patient_key(elements: Elements) -> str:
    """PatientID; without one, the study; without one, the series. "" pools all such slices into one patient,
    the careful choice.

    From the raw bytes, so that a wrong character set cannot make a patient unreadable.
    """
    for keyword in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID"):
        if identifier := _stripped(elements, keyword):
            return f"{keyword}:{identifier}"
    return ""


def _stripped(elements: Elements, keyword: str) -> str:
    """The bytes of a text, each as one character of Latin-1, without surrounding blanks."""
    raw = raw_bytes(elements, keyword) or ""
    return (raw.decode("latin-1") if isinstance(raw, bytes) else raw).strip(" \0\t\r\n")


def _slice_position(elements: Elements) -> float | None:
    position, axes = (
        numbers(elements, "ImagePositionPatient", 3),
        numbers(elements, "ImageOrientationPatient", 6),
    )
    if position and axes:
        (x, y, z), (a, b, c, d, e, f) = position, axes
        return x * (b * f - c * e) + y * (c * d - a * f) + z * (a * e - b * d)
    location = numbers(elements, "SliceLocation", 1)
    return location[0] if location else None
