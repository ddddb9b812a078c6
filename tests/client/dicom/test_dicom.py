"""What a DICOM file may do to us: give an image, or one code."""

from __future__ import annotations

import io
import os
import resource
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from client.dicom.dicom import (
    MAX_ELEMENT_BYTES,
    MAX_FILE_BYTES,
    exclusion,
    read_header,
    read_headers,
    read_pixels,
)
from client.dicom.dicom_write import make_uid
from client.dicom.sources import find_files
from common.errors import ImagingError
from tests.helpers.dicom_files import (
    REAL,
    code_of,
    encapsulated,
    header_code,
    headers_of,
    insert_before_pixels,
    needs_real_data,
    replace_element,
    slices_of,
    write,
)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless]
)
def test_every_encoding_gives_the_same_pixels(tmp_path: Path, syntax: pydicom.uid.UID) -> None:
    path = write(tmp_path / "a.dcm")
    expected = read_pixels(path)
    dataset = pydicom.dcmread(path)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    else:
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<i2").astype(">i2").tobytes()
        dataset.file_meta.TransferSyntaxUID = syntax
    other, copy = tmp_path / "b.dcm", Dataset()
    copy.update({element.tag: element for element in dataset})  # without the memory of its first encoding
    copy.file_meta = dataset.file_meta
    copy.save_as(
        other,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax != ExplicitVRBigEndian,
        enforce_file_format=True,
    )
    np.testing.assert_array_equal(read_pixels(other), expected)
    assert read_header(other).patient_key == read_header(path).patient_key


def test_bits_beyond_those_stored_are_dropped(tmp_path: Path) -> None:
    """Old scanners hide overlays there."""
    path = write(
        tmp_path / "a.dcm",
        np.full((2, 2), 5.0),
        modality="MR",
        BitsStored=12,
        HighBit=11,
        PixelRepresentation=0,
    )
    content = path.read_bytes()
    path.write_bytes(
        content.replace(struct.pack("<4h", 5, 5, 5, 5), struct.pack("<4H", 0x5005, 5, 0x8005, 5))
    )
    assert read_pixels(path).tolist() == [[5, 5], [5, 5]]
    write(tmp_path / "b.dcm", np.full((2, 2), -3.0), modality="MR", BitsStored=12, HighBit=11)
    path = tmp_path / "b.dcm"
    path.write_bytes(
        path.read_bytes().replace(
            struct.pack("<4h", -3, -3, -3, -3), struct.pack("<4H", 0x0FFD, 0xFFFD, 0x0FFD, 0xFFFD)
        )
    )
    assert read_pixels(path).tolist() == [[-3, -3], [-3, -3]]


def test_padding_is_air_in_ct_and_the_lowest_signal_in_mr(tmp_path: Path) -> None:
    image = np.array([[-2000.0, 40.0], [7.0, -2000.0]])
    assert read_pixels(write(tmp_path / "ct", image, PixelPaddingValue=-2000)).tolist() == [
        [-1024, 40],
        [7, -1024],
    ]
    assert read_pixels(write(tmp_path / "mr", image, modality="MR", PixelPaddingValue=-2000)).tolist() == [
        [7, 40],
        [7, 7],
    ]


def test_monochrome1_inverts_mr_and_leaves_hounsfield_units_alone(tmp_path: Path) -> None:
    image = np.array([[0.0, 10.0], [30.0, 100.0]])
    mr = read_pixels(write(tmp_path / "mr", image, modality="MR", PhotometricInterpretation="MONOCHROME1"))
    assert mr.tolist() == [[100, 90], [70, 0]]
    assert (
        read_pixels(write(tmp_path / "ct", image, PhotometricInterpretation="MONOCHROME1")).tolist()
        == image.tolist()
    )


def test_missing_modality_follows_the_sop_class_and_missing_patient_the_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", Modality=None, PatientID="", RescaleSlope=None, RescaleIntercept=None)
    header = read_header(path)
    assert header.modality == "CT"
    assert (header.slope, header.intercept) == (1.0, 0.0)
    assert header.patient_key == f"StudyInstanceUID:{make_uid(b'study')}"


def from_elsewhere(path: Path) -> Path:
    """The same file as another program would have written it: without the mark of our own derived slices."""
    dataset = pydicom.dcmread(path)
    dataset.file_meta.ImplementationVersionName = "SCANNER"
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned-in"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER"]}, "secondary"),
        ({"ImageType": ["ORIGINAL", "SECONDARY", "AXIAL"]}, "secondary"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, "derived"),
        ({"ImageType": ["DERIVED ", "PRIMARY", "MPR"]}, "derived"),
        ({"ImageType": ["MIXED", "PRIMARY"]}, "derived"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}, None),
        ({"ImageType": ["ORIGINAL"]}, None),
        ({"ImageType": None}, None),
    ],
)
def test_exclusions_are_rules_not_errors(
    tmp_path: Path, changes: dict[str, object], code: str | None
) -> None:
    path = from_elsewhere(write(tmp_path / "a.dcm", **changes))
    assert exclusion(read_header(path)) == code
    assert read_pixels(path).shape == (24, 20)


@pytest.mark.parametrize("content", [b"", bytes(200), os.urandom(4096)], ids=["empty", "zeros", "random"])
def test_d1_not_dicom(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    assert code_of(tmp_path / "a.dcm") == "not-dicom"


def test_d2_a_file_without_its_preamble_is_not_guessed_at(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    path.write_bytes(path.read_bytes()[132:])
    assert code_of(path) == "not-dicom"


@pytest.mark.parametrize("compressed", [False, True])
def test_d3_every_cut_is_found(tmp_path: Path, compressed: bool) -> None:
    path = write(tmp_path / "a.dcm")
    if compressed:
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless)
        dataset.save_as(path)
    content = path.read_bytes()
    for end in (*range(140, len(content), 37), len(content) - 1):
        path.write_bytes(content[:end])
        assert code_of(path) == "truncated", end
        with pytest.raises(ImagingError):
            read_header(path)


def grow(path: Path, side: int = 60000) -> Path:
    for keyword in ("Rows", "Columns"):
        replace_element(path, keyword, b"US", struct.pack("<H", side))
    return path


def test_d4_d5_too_large_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(grow(write(tmp_path / "native.dcm"))) == "too-large"
    dataset = pydicom.dcmread(write(tmp_path / "rle.dcm", np.zeros((4, 4))))
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    assert code_of(grow(tmp_path / "rle.dcm")) == "too-large"
    with (tmp_path / "big").open("wb") as stream:
        stream.write(bytes(128) + b"DICM")
        stream.truncate((512 << 20) + 1)
    assert code_of(tmp_path / "big") == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_d6_a_deflate_bomb_stops_at_its_cap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    content = path.read_bytes()
    head = content[: content.index(DeflatedExplicitVRLittleEndian.encode()) + 22]
    start = io.BytesIO(content)
    start.seek(144 + struct.unpack("<L", content[140:144])[0])
    deflater = zlib.compressobj(9, wbits=-15)
    raw = zlib.decompress(start.read(), -15)
    assert head in content
    body = b"".join(
        [deflater.compress(raw), *(deflater.compress(bytes(1 << 20)) for _ in range(80)), deflater.flush()]
    )
    path.write_bytes(content[: 144 + struct.unpack("<L", content[140:144])[0]] + body)
    assert path.stat().st_size < 1 << 20
    assert code_of(path) == "too-large"
    path.write_bytes(content[:-20])
    assert code_of(path) == "truncated"


@pytest.mark.parametrize("depth", [300, 50_000])
def test_d7_nesting_ends_in_a_code(tmp_path: Path, depth: int) -> None:
    opening = struct.pack("<HH2sHL", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closing = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    assert (
        code_of(insert_before_pixels(write(tmp_path / "a.dcm"), opening * depth + closing * depth))
        == "too-nested"
    )


def test_d7_skipped_sequences_of_known_length_are_not_descended(tmp_path: Path) -> None:
    nested = b""
    for _ in range(300):
        item = struct.pack("<HHL", 0xFFFE, 0xE000, len(nested)) + nested
        nested = struct.pack("<HH2sHL", 0x0040, 0x0275, b"SQ", 0, len(item)) + item
    assert read_pixels(insert_before_pixels(write(tmp_path / "a.dcm"), nested)).shape == (24, 20)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: write(path, NumberOfFrames=2**31 - 1),
        lambda path: write(path, NumberOfFrames=-3),
        lambda path: write(path, Rows=0),
        lambda path: write(path, Rows=None),
        lambda path: write(path, BitsAllocated=7),
        lambda path: write(path, BitsStored=17),
        lambda path: replace_element(write(path), "Rows", b"DS", b"24.5"),
        lambda path: replace_element(write(path), "Columns", b"DS", b"20"),
    ],
    ids=[
        "huge frames",
        "negative frames",
        "no rows",
        "rows missing",
        "7 bits",
        "17 of 16 bits",
        "rows as text",
        "columns as text",
    ],
)
def test_d8_impossible_geometry(tmp_path: Path, change: Callable[[Path], Path]) -> None:
    assert code_of(change(tmp_path / "a.dcm")) == "bad-geometry"


@pytest.mark.parametrize("value", [b"nan ", b"inf ", b"1e400 ", b"abc ", b"1\\2 ", b"", b"0 "])
def test_d9_unusable_rescale(tmp_path: Path, value: bytes) -> None:
    path = replace_element(write(tmp_path / "a.dcm"), "RescaleSlope", b"DS", value)
    assert code_of(path) == "bad-rescale"
    if value != b"0 ":
        path = replace_element(write(tmp_path / "b.dcm"), "RescaleIntercept", b"DS", value)
        assert code_of(path) == "bad-rescale"


def test_d9_hounsfield_units_out_of_range(tmp_path: Path) -> None:
    assert code_of(write(tmp_path / "a.dcm", RescaleSlope="500")) == "bad-rescale"


@pytest.mark.parametrize("syntax", ["1.2.3.4", "1.2.840.10008.1.2.4.92", "1.2.840.10008.1.2.4.100"])
def test_d10_syntaxes_without_a_decoder_are_known_from_the_header(tmp_path: Path, syntax: str) -> None:
    path = encapsulated(write(tmp_path / "a.dcm"), [bytes(100)], syntax)
    assert header_code(path) == code_of(path) == "unsupported-syntax"
    with pytest.raises(ImagingError) as caught:
        headers_of(path)
    assert "JPEG 2000 Image Compression (Lossless Only)" in caught.value.hint


def test_d11_names_in_any_character_set_are_accepted_and_never_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, charset in enumerate((b"ISO_IR 999", b"GB18030 ", b"\xff\xfe")):
        path = write(tmp_path / f"{number}.dcm")
        replace_element(path, "SpecificCharacterSet", b"CS", charset)
        replace_element(path, "PatientID", b"LO", "王小明".encode("gb18030"))
        assert read_pixels(path).shape == (24, 20)
        assert read_header(path).patient_key.startswith("PatientID:")
    name = struct.pack("<HH2sH", 0x7FDF, 0x0010, b"PN", 10_000) + b"SECRET^NAME" * 909 + b"X"
    assert read_pixels(insert_before_pixels(write(tmp_path / "long.dcm"), name)).shape == (24, 20)
    out = capfd.readouterr()
    assert out.out + out.err == ""


def test_d12_lengths_beyond_the_end(tmp_path: Path) -> None:
    for number, length in enumerate((0xFFFFFFFE, 0x7FFFFFFF, 100_001)):
        raw = struct.pack("<HH2sHL", 0x0041, 0x1001, b"UN", 0, length) + b"abcd"
        assert code_of(insert_before_pixels(write(tmp_path / f"{number}.dcm"), raw)) == "truncated"
    open_ended = struct.pack("<HH2sHL", 0x0041, 0x1001, b"OB", 0, 0xFFFFFFFF) + b"abcd"
    assert code_of(insert_before_pixels(write(tmp_path / "open.dcm"), open_ended)) in {
        "truncated",
        "unreadable",
    }


@pytest.mark.parametrize("uid", [b"../../x ", b"1." * 150, b"1.2/3.4 ", b"1.2\x003.4 "])
def test_d13_uids_that_are_not(tmp_path: Path, uid: bytes) -> None:
    path = replace_element(write(tmp_path / "a.dcm"), "SOPInstanceUID", b"UI", uid)
    assert code_of(path) == "unreadable"


def test_a_pipe_or_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert code_of(tmp_path / "absent") == "unreadable"
    assert code_of(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe")
    assert code_of(tmp_path / "pipe") in {"unreadable", "not-dicom"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "unsupported-object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.128"}, "unsupported-object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.3"}, "unsupported-object"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "dicomdir"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "mosaic"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"NumberOfFrames": 10}, "multi-frame"),
        ({"Rows": 4097}, "too-large"),
        ({"Rows": 4000}, "truncated"),
    ],
)
def test_objects_that_are_not_one_grey_slice(tmp_path: Path, changes: dict[str, object], code: str) -> None:
    assert code_of(write(tmp_path / "a.dcm", **changes)) == code


def test_no_modality(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", SOPClassUID=None, Modality="OT")
    content = path.read_bytes()
    meta = struct.pack("<HH2sH", 2, 2, b"UI", 26)
    assert meta in content
    path.write_bytes(content.replace(meta + content[content.index(meta) + 8 :][:26], meta + bytes(26)))
    assert code_of(path) == "no-modality"


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.dcm")
    parse = pydicom.filereader.read_partial

    def parse_slowly(*args: object, **kwargs: object) -> Dataset:
        os.utime(path, ns=(1, 1))
        return parse(*args, **kwargs)

    monkeypatch.setattr("client.dicom.dicom.read_partial", parse_slowly)
    assert code_of(path) == "changed"


def test_messages_do_not_quote_the_header(tmp_path: Path) -> None:
    path = replace_element(write(tmp_path / "a.dcm"), "RescaleSlope", b"DS", b"SECRET")
    with pytest.raises(ImagingError) as caught:
        read_pixels(path)
    assert "SECRET" not in caught.value.message + caught.value.hint
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


AWKWARD = {
    "cornerstone/no-pixel-data.dcm": "unsupported-object",  # a structured report
    "pydicom_data/OT-PAL-8-face.dcm": "not-dicom",  # no preamble
    "pydicom_data/SC_rgb.dcm": "unsupported-object",  # secondary capture
    "pydicom_data/eCT_Supplemental.dcm": "derived",  # a perfusion map
    "pydicom_data/emri_small.dcm": "used",
    "pydicom_data/emri_small_jpeg_2k_lossless_too_short.dcm": "truncated",
    "pydicom_data/explicit_VR-UN.dcm": "used",  # elements of unknown VR
    "pydicom_data/bad_sequence.dcm": "used",  # a private sequence that does not end; JPEG lossless
    "pydicom_data/parametric_map_float.dcm": "unsupported-object",
    "pydicom_wheel/CT_small.dcm": "used",
    "pydicom_wheel/MR_small.dcm": "secondary",
    "pydicom_wheel/MR_truncated.dcm": "truncated",
    "pydicom_wheel/badVR.dcm": "unsupported-object",  # a dose
    "pydicom_wheel/liver_1frame.dcm": "unsupported-object",  # a segmentation
    "pydicom_wheel/meta_missing_tsyntax.dcm": "no-modality",
    "pydicom_wheel/no_meta.dcm": "not-dicom",
    "pydicom_wheel/rtplan_truncated.dcm": "truncated",
}


@needs_real_data
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_files_end_where_they_should(name: str) -> None:
    path = Path(str(REAL)) / "awkward" / name
    try:
        headers = headers_of(path)
        assert len(slices_of(path)) == len(headers)
        found = {exclusion(header) or "used" for header in headers}
    except ImagingError as error:
        found = {error.code}
    assert found == {AWKWARD[name]}


@needs_real_data
def test_every_site_is_read_without_loss() -> None:
    """Also the site whose headers name no modality, and the one whose SOP class is in the file meta
    information only.
    """
    for folder in sorted(Path(str(REAL)).glob("site_*")):
        files = [source.path for source in find_files(folder)]
        assert files
        for path in files[:: max(1, len(files) // 5)]:
            assert {exclusion(header) for header in headers_of(path)} == {None}, folder.name


@needs_real_data
def test_jpeg_2000_of_basel_is_in_hounsfield_units() -> None:
    for path in [source.path for source in find_files(Path(str(REAL)) / "site_ct_siemens_basel")][:3]:
        image, header = read_pixels(path), read_header(path)
        assert image.shape == (512, 512)
        assert header.pixel_spacing_mm is not None
        assert image.min() == -1024
        assert 500 < image.max() < 3072
        soft_tissue = ((image > -150) & (image < 250)).mean()
        assert 0.15 < soft_tissue < 0.8


def test_a_stream_is_read_like_a_file(tmp_path: Path) -> None:
    """Members of archives have no path, and may have been read before."""
    path = write(tmp_path / "a.dcm")
    stream = io.BytesIO(path.read_bytes())
    stream.seek(77)
    assert read_headers(stream, len(stream.getvalue())) == (read_header(path),)
    np.testing.assert_array_equal(slices_of(path)[0], read_pixels(path))


def test_a_slice_that_the_file_does_not_hold_is_a_change(tmp_path: Path) -> None:
    """An index was made of another file."""
    path = write(tmp_path / "a.dcm")
    for number in (1, -1):
        with pytest.raises(ImagingError) as caught:
            slices_of(path, [number])
        assert caught.value.code == "changed"


def test_a_size_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with pytest.raises(ImagingError) as caught:
        read_headers(io.BytesIO(b""), MAX_FILE_BYTES + 1)
    assert caught.value.code == "too-large"


def test_a_long_element_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    content = path.read_bytes()
    at = content.index(struct.pack("<HH2s", 0x0010, 0x0020, b"LO"))
    element = struct.pack("<HH2sHL", 0x0010, 0x0020, b"UN", 0, MAX_ELEMENT_BYTES + 2)
    with path.open("wb") as stream:
        stream.write(content[:at] + element)
        stream.truncate(at + len(element) + MAX_ELEMENT_BYTES + 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(path) == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


def test_the_sop_class_of_the_meta_information_counts_where_the_data_set_has_none(tmp_path: Path) -> None:
    assert (
        read_header(write(tmp_path / "a.dcm", modality="MR", SOPClassUID=None, Modality=None)).modality
        == "MR"
    )
    assert read_header(write(tmp_path / "b.dcm", SOPClassUID="", Modality=None)).modality == "CT"


def test_hounsfield_units_far_below_air_are_air(tmp_path: Path) -> None:
    """Scanners fill the square around the round field of view with -2000 or -3024, often without saying
    so.
    """
    image = np.array([[-3024.0, -2000.0, -1500.0], [-1499.0, 0.0, 1000.0]])
    assert read_pixels(write(tmp_path / "ct", image)).tolist() == [[-1024, -1024, -1024], [-1499, 0, 1000]]
    assert read_pixels(write(tmp_path / "mr", image, modality="MR")).tolist() == image.tolist()


def test_ct_without_rescale_needs_signed_values(tmp_path: Path) -> None:
    """Unsigned values cannot be Hounsfield units: air is negative."""
    changes = {"RescaleSlope": None, "RescaleIntercept": None}
    assert read_pixels(write(tmp_path / "signed", np.full((2, 2), -900.0), **changes)).min() == -900
    assert (
        header_code(write(tmp_path / "unsigned", np.full((2, 2), 90.0), PixelRepresentation=0, **changes))
        == "bad-rescale"
    )
    assert (
        read_header(write(tmp_path / "mr", np.ones((2, 2)), modality="MR", PixelRepresentation=0)).slope == 1
    )


def test_an_excluded_image_without_rescale_is_excluded_not_quarantined(tmp_path: Path) -> None:
    changes = {
        "PixelRepresentation": 0,
        "RescaleIntercept": None,
        "ImageType": ["DERIVED", "PRIMARY", "PERFUSION"],
    }
    path = write(tmp_path / "a", np.ones((2, 2)), **changes)
    assert header_code(from_elsewhere(path)) == "derived"


def test_a_header_tells_what_a_site_needs_to_know_of_its_slices(tmp_path: Path) -> None:
    header = read_header(
        write(
            tmp_path / "a.dcm",
            modality="MR",
            StudyDate="2024.03.10",
            AccessionNumber="A 17",
            SeriesNumber=7,
            SeriesDescription="t2 tse",
            BodyPartExamined="Head",
            PatientAge="006M",
            DeviceSerialNumber="35131",
            StationName="MR1",
            ScanningSequence=["GR", "IR"],
            SequenceVariant="SK",
            SequenceName="tfl3d1",
            EchoTime="1.42",
            RepetitionTime="470.01",
        )
    )
    assert (header.frame, header.number_of_frames) == (0, 1)
    assert (header.study_uid, header.series_uid) == (make_uid(b"study"), make_uid(b"series"))
    assert (header.study_date, header.accession, header.series_number) == ("20240310", "A 17", 7)
    assert (header.series_description, header.body_part, header.scanner) == ("t2 tse", "HEAD", "35131")
    assert (header.sequence, header.echo_time_ms, header.repetition_time_ms) == (
        r"GR\IR SK tfl3d1",
        1.42,
        470.01,
    )
    assert header.age_years == 0.5
    ct = read_header(
        write(
            tmp_path / "b.dcm",
            ConvolutionKernel=["Br38f", "3"],
            StationName="CT1",
            PatientAge="***",
            StudyDate="unknown",
        )
    )
    assert (ct.kernel, ct.scanner, ct.age_years, ct.study_date) == (r"Br38f\3", "CT1", None, "")


@pytest.mark.parametrize(
    ("age", "years"),
    [
        ("034Y", 34),
        ("18M", 1.5),
        ("002W", 2 / 52.1775),
        ("010D", 10 / 365.2425),
        ("000Y", None),
        ("34", None),
    ],
)
def test_ages_are_in_years(tmp_path: Path, age: str, years: float | None) -> None:
    with pydicom.config.disable_value_validation():
        assert read_header(write(tmp_path / "a.dcm", PatientAge=age)).age_years == years
