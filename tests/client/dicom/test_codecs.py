"""Compressed pixels: lossless ones come back bit by bit, and no codec allocates what the header did not
say.
"""

from __future__ import annotations

import resource
import struct
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from client.dicom import codecs
from client.dicom.codecs import Layout, decode_frame, supported_syntaxes
from client.dicom.dicom import read_pixels
from common.errors import ImagingError
from tests.helpers.codestreams import COLUMNS, JPEG, LOSSLESS, ROWS, stored
from tests.helpers.dicom_files import REAL, code_of, encapsulated, header_code, needs_real_data, write


def layout(stored_bits: int = 12, *, allocated: int = 16, signed: bool = False) -> Layout:
    return Layout(
        allocated=allocated, stored=stored_bits, high_bit=stored_bits - 1, signed=signed, padding=None
    )


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_codestreams_come_back_bit_by_bit(name: str) -> None:
    syntax, encode = LOSSLESS[name]
    np.testing.assert_array_equal(
        decode_frame(bytes(encode(stored())), syntax, ROWS, COLUMNS, layout()), stored()
    )


@pytest.mark.parametrize("name", ["JPEG 70", "JPEG-LS"])
@pytest.mark.parametrize("bits", [16, 12])
def test_signed_values_keep_their_sign_in_codecs_that_know_none(name: str, bits: int) -> None:
    """Stored with 16 bits a sample; those beyond the stored ones repeat the sign, or hold zeros."""
    syntax, encode = LOSSLESS[name]
    image = stored("i2", bits)
    for sample in (image.view("u2"), image.view("u2") & ((1 << bits) - 1)):
        np.testing.assert_array_equal(
            decode_frame(bytes(encode(sample)), syntax, ROWS, COLUMNS, layout(bits, signed=True)), image
        )


def test_signed_values_in_a_codestream_of_just_their_bits() -> None:
    image = stored("i2", 12)
    encoded = imagecodecs.ljpeg_encode(image.view("u2") & 4095, bitspersample=12)
    np.testing.assert_array_equal(
        decode_frame(bytes(encoded), JPEG + "70", ROWS, COLUMNS, layout(12, signed=True)), image
    )


@pytest.mark.parametrize(("last", "bits"), [("50", 8), ("51", 8), ("51", 12), ("53", 12), ("55", 12)])
def test_lossy_jpeg_of_8_and_12_bits_is_close(last: str, bits: int) -> None:
    smooth = np.add.outer(np.arange(ROWS) * 3, np.arange(COLUMNS) * 4).astype("u1" if bits == 8 else "u2")
    encoded = bytes(imagecodecs.jpeg8_encode(smooth, level=95, bitspersample=bits))
    found = decode_frame(encoded, JPEG + last, ROWS, COLUMNS, layout(bits, allocated=8 if bits == 8 else 16))
    assert np.abs(found.astype(int) - smooth).max() <= 6


@pytest.mark.parametrize("allocated", [8, 16, 32])
@pytest.mark.parametrize("signed", [False, True])
def test_rle_of_every_width_comes_back(allocated: int, signed: bool) -> None:
    image = (
        np.random.default_rng(0)
        .integers(0, 100, (ROWS, COLUMNS))
        .astype(f"<{'i' if signed else 'u'}{allocated // 8}")
    )
    image[3:9] = -7 if signed else 99  # runs
    planes = image.view("u1").reshape(ROWS, COLUMNS, -1)
    segments = [
        bytes(imagecodecs.packbits_encode(planes[..., byte].tobytes()))
        for byte in reversed(range(allocated // 8))
    ]
    segments = [segment + b"\0" * (len(segment) % 2) for segment in segments]
    starts = [64 + sum(map(len, segments[:number])) for number in range(len(segments))]
    frame = struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)
    found = decode_frame(
        frame, codecs._RLE, ROWS, COLUMNS, layout(allocated, allocated=allocated, signed=signed)
    )
    np.testing.assert_array_equal(found, image)


def test_rle_without_the_fast_codec_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    expected = read_pixels(path)
    monkeypatch.setattr(codecs, "_available", lambda _syntax: ("pydicom",))
    np.testing.assert_array_equal(read_pixels(path), expected)


@pytest.mark.parametrize(
    "header",
    [(1, 64), (3, 64, 70, 80), (2, 64, 64), (2, 70, 64), (2, 0, 64), (2, 64, 0xFFFFFFFF), (2, 64, 0)],
    ids=["one segment", "three", "empty", "backwards", "inside the header", "beyond the end", "no second"],
)
def test_rle_headers_that_point_elsewhere_are_refused(header: tuple[int, ...]) -> None:
    frame = struct.pack("<16L", *header, *[0] * (16 - len(header))) + bytes(200)
    with pytest.raises(ImagingError) as caught:
        decode_frame(frame, codecs._RLE, ROWS, COLUMNS, layout())
    assert caught.value.code == "unreadable"


def test_an_rle_bomb_takes_no_more_than_the_image() -> None:
    """Every two bytes would become 128."""
    bomb = struct.pack("<16L", 2, 64, 64 + 40_000, *[0] * 13) + b"\x81\0" * 40_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImagingError) as caught:
        decode_frame(bomb, codecs._RLE, 200, 200, layout())
    assert caught.value.code == "unreadable"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 10


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("shape", [(ROWS + 1, COLUMNS), (ROWS, 4096), (COLUMNS, ROWS)])
def test_d10_a_codestream_of_another_size_is_refused_before_it_is_decoded(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    syntax, encode = LOSSLESS[name]
    monkeypatch.setattr(codecs, "_codec_of", lambda _syntax: pytest.fail("a codec was asked"))
    monkeypatch.setattr(codecs, "_decode_with_pydicom", lambda *_: pytest.fail("a codec was asked"))
    monkeypatch.setattr(codecs, "_available", lambda _syntax: ("imagecodecs",))
    with pytest.raises(ImagingError) as caught:
        decode_frame(bytes(encode(stored())), syntax, *shape, layout())
    assert caught.value.code == "bad-geometry"


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_codestream_cut_short_is_truncated(name: str) -> None:
    """libjpeg-turbo would fill the rest with grey, and say nothing."""
    syntax, encode = LOSSLESS[name]
    encoded = bytes(encode(stored()))
    assert encoded.endswith(b"\xff\xd9")
    for end in (len(encoded) // 2, len(encoded) - 2):
        with pytest.raises(ImagingError) as caught:
            decode_frame(encoded[:end], syntax, ROWS, COLUMNS, layout())
        assert caught.value.code in {"truncated", "unsupported-syntax"}
    padded = decode_frame(encoded + b"\0", syntax, ROWS, COLUMNS, layout())
    np.testing.assert_array_equal(padded, stored())


@pytest.mark.parametrize("last", ["50", "57", "70", "80", "90"])
def test_d10_garbage_in_the_place_of_a_codestream(tmp_path: Path, last: str) -> None:
    starts = (b"", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xc0\0\x0b", b"\xff\x4f\xff\x51\0\x29")
    for number, garbage in enumerate((starts[2], *(start + bytes(200) for start in starts))):
        assert code_of(encapsulated(write(tmp_path / f"{number}"), [garbage], JPEG + last)) in {
            "unsupported-syntax",
            "bad-geometry",
        }


def test_compressed_pixels_must_be_in_items_and_native_ones_must_not(tmp_path: Path) -> None:
    path = encapsulated(write(tmp_path / "a"), [bytes(imagecodecs.jpegls_encode(stored()))], JPEG + "80")
    path.write_bytes(path.read_bytes().replace(f"{JPEG}80".encode(), b"1.2.840.10008.1.2.1\0\0\0", 1))
    assert header_code(path) == "unreadable"
    path = write(tmp_path / "b")
    path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0", 1))
    assert header_code(path) == "unreadable"


def test_without_a_codec_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encapsulated(
        write(tmp_path / "a"),
        [bytes(imagecodecs.jpeg8_encode(stored(), lossless=True, bitspersample=16))],
        JPEG + "70",
    )
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    codecs._available.cache_clear()
    try:
        with pytest.raises(ImagingError) as caught:
            read_pixels(path)
        assert caught.value.code == "unsupported-syntax"
        assert "pip install 'fedqc[gpl]'" in caught.value.hint or codecs._available(JPEG + "70") == (
            "pylibjpeg",
        )
        assert "JPEG Lossless" not in " ".join(supported_syntaxes())
    finally:
        codecs._available.cache_clear()


def test_every_syntax_of_the_standard_that_ct_and_mr_use_is_read() -> None:
    assert len(supported_syntaxes()) == 4 + 1 + 6 + 2 + 5


CORNERSTONE_LOSSLESS = (
    "BigEndianExplicit",
    "Deflated",
    "JPEG2000LosslessOnly",
    "JPEGLSLossless",
    "JPEGProcess14SV1",
    "JPEGProcess14T",
    "LittleEndianExplicit",
    "LittleEndianImplicit",
    "RLELossless",
)
CORNERSTONE_LOSSY = {
    "JPEG2000T": 6,
    "JPEGLSLossy": 2,
    "JPEGProcess1T": 65,
    "JPEGProcess2_4": 36,
    "JPEGProcess6_8": 36,
    "JPEGProcess10_12": 36,
}


@needs_real_data
@pytest.mark.parametrize("kind", CORNERSTONE_LOSSLESS)
def test_lossless_encodings_of_one_ct_are_bit_identical(kind: str) -> None:
    folder = Path(str(REAL)) / "awkward" / "cornerstone"
    (path,) = folder.glob(f"CTImage.dcm_{kind}*")
    np.testing.assert_array_equal(read_pixels(path), read_pixels(folder / "CTImage.dcm"))


@needs_real_data
@pytest.mark.parametrize("kind", CORNERSTONE_LOSSY)
def test_lossy_encodings_of_one_ct_are_close(kind: str) -> None:
    """The bound is in Hounsfield units; the 8-bit one has steps of 32."""
    folder = Path(str(REAL)) / "awkward" / "cornerstone"
    (path,) = folder.glob(f"CTImage.dcm_{kind}*")
    assert np.abs(read_pixels(path) - read_pixels(folder / "CTImage.dcm")).max() <= CORNERSTONE_LOSSY[kind]
