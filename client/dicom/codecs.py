"""Decode one stored frame to an array of integers, and check it before a codec may read it.

A codec allocates what the codestream asks for, so the size in the codestream is compared with the header
first. libjpeg-turbo fills what is missing at the end of a stream with grey; a stream without its end marker
is therefore refused here.

References: DICOM PS3.5 8.2 and A.4; ITU T.81 B.2.2 (JPEG), T.87 C.2.2 (JPEG-LS), T.800 A.5.1 (JPEG 2000).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from client.dicom.refusals import refusal

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
NATIVE = frozenset({IMPLICIT, EXPLICIT, DEFLATED, BIG_ENDIAN})
_RLE = "1.2.840.10008.1.2.5"
_JPEG = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (50, 51, 53, 55, 57, 70))
_JPEG_LS = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (80, 81))
_JPEG_2000 = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (90, 91, 201, 202, 203))
_LOSSLESS_JPEG = frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (57, 70, 80))

# OpenJPEG without Pillow: faster, and it handles signed values
_PLUGINS: dict[str, tuple[str, ...]] = {
    _RLE: ("imagecodecs", "pydicom"),  # the second is Python, and takes 25 times as long
    **dict.fromkeys(_JPEG | _JPEG_LS, ("imagecodecs", "pylibjpeg")),  # the second is GPL, an extra
    **dict.fromkeys(_JPEG_2000, ("pylibjpeg",)),
}
"""For each compressed transfer syntax the codecs to ask, in this order; RLE asks the first that is there.
Left out on purpose: GDCM, which parses files by itself in C++; `imagecodecs.dicomrle`, which trusts the
offsets of a segment; pylibjpeg-rle, which panics on damage.
"""

_GPL = _JPEG_LS | frozenset(f"1.2.840.10008.1.2.4.{last}" for last in (50, 51, 57, 70))
_GPL_HINT = "pip install 'fedqc[gpl]' adds another decoder (GPL) for JPEG and JPEG-LS"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How pixels are stored."""

    allocated: int
    stored: int
    high_bit: int
    signed: bool
    padding: tuple[int, int] | None  # lowest and highest stored value that stands for "no data"


def supported_syntaxes() -> tuple[str, ...]:
    """Names of the transfer syntaxes that the installed codecs decode."""
    return tuple(
        sorted(UID(syntax).name for syntax in (*NATIVE, *_PLUGINS) if syntax in NATIVE or _available(syntax))
    )


def check_syntax(syntax: str) -> None:
    """Refuse a transfer syntax that no installed codec decodes.

    Raises:
        ImagingError: `unsupported-syntax`; the hint says what would help.
    """
    if syntax not in NATIVE and not _available(syntax):
        hint = _GPL_HINT if syntax in _GPL else f"can read: {', '.join(supported_syntaxes())}"
        raise refusal("unsupported-syntax", "no installed codec decodes this transfer syntax", hint=hint)


def decode_frame(stored: bytes, syntax: str, rows: int, columns: int, layout: Layout) -> np.ndarray:
    """The stored integers of one frame, shape (rows, columns), signed where the header says so, without what
    other elements hid in the unused bits (overlays).

    Args:
        stored: native pixels or one codestream.
        syntax: transfer syntax UID; "" is taken for little endian, as in files whose meta information does
            not say.
    Raises:
        ImagingError: `truncated`, `bad-geometry`, `unsupported-syntax` or `unreadable`.
    """
    if syntax in NATIVE or not syntax:
        return _image_bits(_native(stored, syntax, rows, columns, layout), layout)
    if len(stored) > 4 * (rows * columns * layout.allocated // 8) + 65536:
        raise refusal("bad-geometry", "far more compressed data than rows x columns")
    check_syntax(syntax)
    if syntax == _RLE:
        return _image_bits(_decode_rle(stored, rows, columns, layout), layout)
    stored, precision = _checked(stored, syntax, rows, columns, layout)
    failed = ""
    for plugin in _available(syntax):
        try:
            if plugin == "imagecodecs":
                pixels = _codec_of(syntax)(stored)
            else:
                pixels = _decode_with_pydicom(stored, syntax, rows, columns, layout, plugin)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            failed = type(error).__name__
            continue
        if pixels.shape != (rows, columns) or pixels.dtype.kind not in "iu":
            raise refusal("bad-geometry", "the decoded image is not rows x columns")
        if (
            syntax in _LOSSLESS_JPEG
            and precision > layout.stored
            and pixels.dtype.itemsize * 8 == layout.allocated
        ):
            return _image_bits(pixels.view(f"{'i' if layout.signed else 'u'}{pixels.dtype.itemsize}"), layout)
        return _extend_sign(pixels, precision) if plugin == "imagecodecs" and layout.signed else pixels
    more = syntax in _GPL and "pylibjpeg" not in _available(syntax)
    hint = _GPL_HINT if more else "the pixel data is damaged, or written in a rare variant"
    raise refusal(
        "unsupported-syntax", f"no installed codec could decode the pixel data ({failed})", hint=hint
    )


def is_lossy(head: bytes, syntax: str) -> bool:
    """Whether a codestream loses something: JPEG but for its lossless processes, JPEG-LS with a bound above 0
    on its error, JPEG 2000 and HTJ2K with the irreversible wavelet. A reversible one may have been cut short;
    only the header knows.

    Args:
        head: the first bytes, up to the data.
    Reference: ITU T.81 B.2.2 (SOF3), T.87 C.2.3 (NEAR), T.800 A.6.1 (SGcod, transformation).
    """
    if syntax in _JPEG_2000:
        at = head.find(b"\xff\x52")  # COD: length, style, progression, layers, component transform, levels …
        return at >= 0 and head[at + 13 : at + 14] == b"\0"
    if syntax in _JPEG_LS:
        at = head.find(b"\xff\xda")  # SOS: length, components, two bytes for each, NEAR
        components = head[at + 4] if 0 <= at < len(head) - 4 else 0
        return at >= 0 and head[at + 5 + 2 * components : at + 6 + 2 * components] not in {b"\0", b""}
    return syntax in _JPEG and syntax not in _LOSSLESS_JPEG


def starts_codestream(fragment: bytes) -> bool:
    """Whether a codestream (JPEG, JPEG-LS, JPEG 2000 or its JP2 wrapping) begins with this fragment."""
    return fragment[:3] == b"\xff\xd8\xff" or fragment[:4] in {b"\xff\x4f\xff\x51", b"\0\0\0\x0c"}


def _native(stored: bytes, syntax: str, rows: int, columns: int, layout: Layout) -> np.ndarray:
    count = rows * columns
    if len(stored) * 8 < count * layout.allocated:
        raise refusal("truncated", "less pixel data than rows x columns")
    kind = "i" if layout.signed else "u"
    order = ">" if syntax == BIG_ENDIAN else "<"
    size = layout.allocated // 8
    return (
        np.frombuffer(stored, f"{order}{kind}{size}", count=count)
        .astype(f"<{kind}{size}", copy=False)
        .reshape(rows, columns)
    )


def _decode_rle(stored: bytes, rows: int, columns: int, layout: Layout) -> np.ndarray:
    """The pixels of one RLE frame: a segment of PackBits for each byte of a pixel, the highest byte first
    (PS3.5 annex G).
    """
    size, count = layout.allocated // 8, rows * columns
    kind = f"<{'i' if layout.signed else 'u'}{size}"
    if _available(_RLE)[0] == "pydicom":
        try:
            return _decode_with_pydicom(stored, _RLE, rows, columns, layout, "pydicom")
        except Exception as error:
            raise refusal("unreadable", f"the RLE segments are damaged ({type(error).__name__})") from None
    import imagecodecs

    segments, *offsets = struct.unpack("<16L", stored[:64])
    bounds = [*offsets[:size], len(stored)]
    if segments != size or bounds[0] < 64 or any(first >= last for first, last in itertools.pairwise(bounds)):
        raise refusal("unreadable", "the RLE header does not point to a segment for each byte of a pixel")
    pixels = np.empty((count, size), np.uint8)
    for number, (first, last) in enumerate(itertools.pairwise(bounds)):
        try:
            # some writers add a few bytes; never more memory
            plane = imagecodecs.packbits_decode(stored[first:last], out=count + 64)
        except Exception as error:
            raise refusal("unreadable", f"an RLE segment is damaged ({type(error).__name__})") from None
        if len(plane) < count:
            raise refusal("unreadable", "an RLE segment holds less than rows x columns")
        pixels[:, size - 1 - number] = np.frombuffer(plane, np.uint8, count=count)
    return pixels.reshape(-1).view(kind).reshape(rows, columns)


def _decode_with_pydicom(
    stored: bytes, syntax: str, rows: int, columns: int, layout: Layout, plugin: str
) -> np.ndarray:
    options: dict[str, Any] = {
        "rows": rows,
        "columns": columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "pixel_keyword": "PixelData",
    }
    decoder = get_decoder(UID(syntax))
    return decoder.as_array(
        encapsulate([stored], has_bot=False), index=0, raw=True, decoding_plugin=plugin, **options
    )[0]


@lru_cache(maxsize=32)
def _available(syntax: str) -> tuple[str, ...]:
    """The installed codecs of a compressed transfer syntax, in the order of `_PLUGINS`."""
    found = []
    for plugin in _PLUGINS.get(syntax, ()):
        try:
            if plugin == "imagecodecs":
                _codec_of(syntax)
                found.append(plugin)
            elif plugin in get_decoder(UID(syntax)).available_plugins:
                found.append(plugin)
        except (ImportError, NotImplementedError):
            continue
    return tuple(found)


def _codec_of(syntax: str) -> Callable[[bytes], np.ndarray]:
    import imagecodecs  # 35 MB of libraries, loaded only where a site has such files

    codec: Any = (
        imagecodecs.PACKBITS
        if syntax == _RLE
        else imagecodecs.JPEGLS
        if syntax in _JPEG_LS
        else imagecodecs.JPEG8
    )
    if not codec.available:
        raise ImportError
    decode: Callable[[bytes], np.ndarray] = (
        imagecodecs.jpegls_decode if syntax in _JPEG_LS else imagecodecs.jpeg8_decode
    )
    return decode


def _image_bits(pixels: np.ndarray, layout: Layout) -> np.ndarray:
    """Drop what lies outside the stored bits, and extend the sign."""
    if layout.stored == layout.allocated:
        return pixels
    left = layout.allocated - 1 - layout.high_bit
    shifted = pixels << left
    shifted >>= layout.allocated - layout.stored
    return shifted


def _extend_sign(pixels: np.ndarray, precision: int) -> np.ndarray:
    """JPEG and JPEG-LS know no sign: the top bit of the precision is one."""
    size = pixels.dtype.itemsize
    unused = size * 8 - precision
    return (pixels.view(f"i{size}") << unused) >> unused


def _checked(stored: bytes, syntax: str, rows: int, columns: int, layout: Layout) -> tuple[bytes, int]:
    """The bare codestream and its bits a sample, once its size is the header's."""
    if syntax in _JPEG_2000:
        stored, (height, width, components, precision) = _jpeg_2000_size(stored)
    else:
        height, width, components, precision = _jpeg_size(stored)
    if (height, width, components) != (rows, columns, 1) or not 1 <= precision <= layout.allocated:
        raise refusal(
            "bad-geometry",
            "the codestream is not rows x columns of one component that fits the bits allocated",
        )
    if not stored.rstrip(b"\0\xff").endswith(b"\xd9"):
        raise refusal("truncated", "the codestream has no end marker")
    return stored, precision


def _jpeg_2000_size(stored: bytes) -> tuple[bytes, tuple[int, int, int, int]]:
    """The codestream without a JP2 wrapping, so that what is decoded is what was checked; height, width,
    components, bits.
    """
    at = stored.find(b"\xff\x4f\xff\x51", 0, 4096)
    if at < 0 or len(stored) < at + 43:
        raise refusal("unsupported-syntax", "no JPEG 2000 codestream in the pixel data")
    width, height, left, top = struct.unpack(">4L", stored[at + 8 : at + 24])
    components, precision = struct.unpack(">HB", stored[at + 40 : at + 43])
    return stored[at:] if at else stored, (height - top, width - left, components, (precision & 127) + 1)


def _jpeg_size(stored: bytes) -> tuple[int, int, int, int]:
    """Height, width, components and bits of a JPEG or JPEG-LS codestream: its first start-of-frame
    segment.
    """
    at = 2
    while stored[:2] == b"\xff\xd8" and at + 4 <= len(stored) and stored[at] == 0xFF:
        marker = stored[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}) or marker == 0xF7:
            if at + 10 > len(stored):
                break
            precision, height, width, components = struct.unpack(">BHHB", stored[at + 4 : at + 10])
            return height, width, components, precision
        if marker in {0xD8, 0xD9, 0xDA}:
            break
        at += 2 + int.from_bytes(stored[at + 2 : at + 4], "big")
    raise refusal("unsupported-syntax", "no JPEG codestream in the pixel data")
