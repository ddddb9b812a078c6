"""One file, several slices: the frames of enhanced images and the tiles of mosaics."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from client.dicom import codecs
from client.dicom.dicom import MAX_DECODED_BYTES, MAX_FRAMES, exclusion, read_header, read_pixels, read_slices
from client.dicom.sources import find_files
from common.errors import ImagingError
from tests.helpers.dicom_files import (
    REAL,
    code_of,
    encapsulated,
    group,
    header_code,
    headers_of,
    insert_before_pixels,
    items,
    needs_real_data,
    slices_of,
    write_frames,
)
from tests.helpers.mosaics import csa, siemens, write_mosaic


def frames(count: int = 4, rows: int = 6, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 1000, (count, rows, columns)).astype(np.float64)


def test_every_frame_of_an_enhanced_image_is_a_slice(tmp_path: Path) -> None:
    images = frames()
    path = write_frames(tmp_path / "a.dcm", images)
    headers = headers_of(path)
    assert [header.frame for header in headers] == [0, 1, 2, 3]
    assert {
        (header.number_of_frames, header.rows, header.columns, header.modality) for header in headers
    } == {(4, 6, 5, "MR")}
    assert len({header.sop_uid for header in headers}) == 1
    found = slices_of(path)
    np.testing.assert_array_equal(np.stack([found[number] for number in range(4)]), images)
    np.testing.assert_array_equal(read_pixels(path, 2), images[2])
    with pytest.raises(ImagingError) as caught:
        read_header(path)
    assert caught.value.code == "multi-frame"


def test_only_the_frames_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_frames(tmp_path / "a.dcm", frames(8))
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    decoded = []
    real = codecs.decode_frame
    monkeypatch.setattr("client.dicom.dicom.decode_frame", lambda *args: decoded.append(1) or real(*args))  # type: ignore[func-returns-value]
    assert list(slices_of(path, [5, 1])) == [5, 1]
    assert len(decoded) == 2


def test_a_frame_takes_its_own_groups_then_the_shared_then_the_top_level(tmp_path: Path) -> None:
    shared = group(
        PixelMeasuresSequence=items(PixelSpacing=[0.5, 0.6], SliceThickness=3),
        PlaneOrientationSequence=items(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelValueTransformationSequence=items(RescaleSlope=2, RescaleIntercept=0),
        MRFOVGeometrySequence=items(InPlanePhaseEncodingDirection="COLUMN"),
        MRTimingAndRelatedParametersSequence=items(RepetitionTime=800),
        MREchoSequence=items(EffectiveEchoTime=90.5),
    )
    own = [
        group(PlanePositionSequence=items(ImagePositionPatient=[0, 0, 10.0 * number])) for number in range(4)
    ]
    own[3].PixelValueTransformationSequence = items(RescaleSlope=5, RescaleIntercept=1)
    own[3].MRImageFrameTypeSequence = items(FrameType=["DERIVED", "PRIMARY", "DIFFUSION", "ADC"])
    images = frames()
    top = {"PulseSequenceName": "T1TFE", "ScanningSequence": None, "SequenceVariant": None}
    path = write_frames(tmp_path / "a.dcm", images, shared=shared, own=own, **top)
    headers = headers_of(path)
    assert [header.slice_position_mm for header in headers] == [0, 10, 20, 30]
    assert {(header.pixel_spacing_mm, header.slice_thickness_mm) for header in headers} == {((0.5, 0.6), 3.0)}
    assert {
        (header.phase_encoding, header.echo_time_ms, header.repetition_time_ms) for header in headers
    } == {("COL", 90.5, 800.0)}
    assert {header.sequence for header in headers} == {"T1TFE"}
    assert [header.slope for header in headers] == [2, 2, 2, 5]
    found = slices_of(path)
    np.testing.assert_array_equal(found[0], images[0] * 2)
    np.testing.assert_array_equal(found[3], images[3] * 5 + 1)
    assert headers[0].image_type[0] == "ORIGINAL"
    assert headers[3].image_type == ("DERIVED", "PRIMARY", "DIFFUSION", "ADC")


def test_a_frame_may_be_excluded_and_its_neighbours_used(tmp_path: Path) -> None:
    own = [
        group(CTImageFrameTypeSequence=items(FrameType=[kind, "PRIMARY", "VOLUME", "NONE"]))
        for kind in ("ORIGINAL", "DERIVED")
    ]
    path = write_frames(tmp_path / "a.dcm", frames(2), "CT", own=own)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.ImplementationVersionName = "SCANNER"
    dataset.save_as(path)
    assert [exclusion(header) for header in headers_of(path)] == [None, "derived"]


@pytest.mark.parametrize(
    ("sop_class", "modality"), [("2.1", "CT"), ("2.2", "CT"), ("4.1", "MR"), ("4.4", "MR")]
)
def test_enhanced_and_legacy_converted_classes_say_the_modality(
    tmp_path: Path, sop_class: str, modality: str
) -> None:
    path = write_frames(
        tmp_path / "a.dcm", frames(2), "CT", SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{sop_class}", Modality=None
    )
    assert {header.modality for header in headers_of(path)} == {modality}


def test_legacy_converted_frames_keep_what_their_slices_said(tmp_path: Path) -> None:
    own = [
        group(
            UnassignedPerFrameConvertedAttributesSequence=items(
                InstanceNumber=number, SliceLocation=number * 2.5, PatientID="other"
            )
        )
        for number in (8, 9)
    ]
    shared = group(UnassignedSharedConvertedAttributesSequence=items(EchoTime="12.5", ScanningSequence="EP"))
    top = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.4", "ImageOrientationPatient": None}
    headers = headers_of(write_frames(tmp_path / "a.dcm", frames(2), shared=shared, own=own, **top))
    assert [(header.instance_number, header.slice_position_mm) for header in headers] == [
        (8, 20.0),
        (9, 22.5),
    ]
    assert {header.echo_time_ms for header in headers} == {12.5}
    assert {header.sequence for header in headers} == {"EP NONE"}
    # of the file, whatever a frame says
    assert {header.patient_key for header in headers} == {"PatientID:P1"}


def test_an_enhanced_image_of_mosaics_is_excluded(tmp_path: Path) -> None:
    """Its tiles would be lost behind those of the first frame."""
    path = write_frames(tmp_path / "a.dcm", frames(2, 6, 6), ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    content = path.read_bytes()
    at = content.index(struct.pack("<HH", 0x0020, 0x000D))
    path.write_bytes(content[:at] + siemens(4) + content[at:])
    assert header_code(path) == "mosaic"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"NumberOfFrames": 5}, "truncated"),
        ({"NumberOfFrames": MAX_FRAMES + 1}, "too-large"),
        ({"NumberOfFrames": MAX_FRAMES, "Rows": 4096, "Columns": 4096}, "too-large"),
        ({"NumberOfFrames": 2**31 - 1}, "bad-geometry"),
        ({"NumberOfFrames": 0}, "bad-geometry"),
        ({"PerFrameFunctionalGroupsSequence": items(FrameContentSequence=items())}, "bad-geometry"),
    ],
)
def test_impossible_frames_are_refused_by_the_header(
    tmp_path: Path, changes: dict[str, object], code: str
) -> None:
    assert MAX_FRAMES * 4096 * 4096 * 2 > MAX_DECODED_BYTES
    assert header_code(write_frames(tmp_path / "a.dcm", frames(), **changes)) == code


def test_a_bad_rescale_of_one_frame_refuses_the_file(tmp_path: Path) -> None:
    own = [
        group(PixelValueTransformationSequence=items(RescaleSlope=slope, RescaleIntercept=0))
        for slope in (1, 0)
    ]
    assert header_code(write_frames(tmp_path / "a.dcm", frames(2), own=own)) == "bad-rescale"


@pytest.mark.parametrize(("table", "pieces"), [(True, 1), (False, 1), (True, 3), (False, 3)])
def test_compressed_frames_are_found_with_and_without_an_offset_table(
    tmp_path: Path, table: bool, pieces: int
) -> None:
    import imagecodecs

    images = frames(3, 32, 32)
    codestreams = [imagecodecs.jpegls_encode(image.astype(np.uint16)) for image in images]
    path = write_frames(tmp_path / "a.dcm", images, PixelRepresentation=0)
    encapsulated(path, [bytes(one) for one in codestreams], JPEGLSLossless, table=table, pieces=pieces)
    found = slices_of(path)
    np.testing.assert_array_equal(np.stack([found[number] for number in range(3)]), images)


def test_an_extended_offset_table_finds_frames_in_pieces(tmp_path: Path) -> None:
    """RLE has no start marker, so pieces are told apart by a table only."""
    path = write_frames(tmp_path / "a.dcm", frames(2, 32, 32))
    expected = slices_of(path)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    streams = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=2))
    pieces = [part for one in streams for part in (one[:100], one[100:])]
    value = pydicom.encaps.encapsulate(pieces, has_bot=False)
    dataset.PixelData = value
    offsets = (0, sum(8 + len(piece) + len(piece) % 2 for piece in pieces[:2]))
    dataset.ExtendedOffsetTable = struct.pack("<2Q", *offsets)
    dataset.ExtendedOffsetTableLengths = struct.pack("<2Q", *map(len, streams))
    dataset.save_as(path)
    found = slices_of(path)
    for number in range(2):
        np.testing.assert_array_equal(found[number], expected[number])
    del dataset.ExtendedOffsetTable
    dataset.save_as(path)
    assert header_code(path) == "bad-geometry"


def test_a_damaged_frame_is_refused_and_the_others_can_be_read(tmp_path: Path) -> None:
    images = frames(3)
    path = write_frames(tmp_path / "a.dcm", images)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    content = path.read_bytes()
    second = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=3))[1]
    content = content.replace(second, bytes(len(second)))
    stream = read_slices(io.BytesIO(content), len(content))
    assert next(stream)[0] == 0
    with pytest.raises(ImagingError) as caught:
        next(stream)
    assert caught.value.code == "unreadable"
    np.testing.assert_array_equal(slices_of(content, [2])[2], images[2])


@pytest.mark.parametrize("columns", [5, 4])
def test_eight_bit_big_endian_words_are_put_in_order(tmp_path: Path, columns: int) -> None:
    """PS3.5 8.1.1: two pixels make a word, whose bytes are swapped. Frames of an odd number of pixels begin
    within one.
    """
    images = np.random.default_rng(0).integers(0, 255, (3, 3, columns))
    path = write_frames(
        tmp_path / "a.dcm",
        images.astype(float),
        PixelRepresentation=0,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
    )
    dataset = pydicom.dcmread(path)
    content = images.astype(np.uint8).tobytes()
    content += b"\0" * (len(content) % 2)
    dataset.PixelData = np.frombuffer(content, "<u2").byteswap().tobytes()
    dataset["PixelData"].VR = "OW"
    copy = pydicom.Dataset()
    copy.update({element.tag: element for element in dataset})
    copy.file_meta = dataset.file_meta
    copy.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    copy.save_as(path, implicit_vr=False, little_endian=False, enforce_file_format=True)
    found = slices_of(path)
    np.testing.assert_array_equal(np.stack([found[number] for number in range(3)]), images)


@pytest.mark.parametrize("private", [siemens(8), csa(8)], ids=["element", "CSA header"])
def test_a_siemens_mosaic_is_cut_into_the_slices_that_the_header_counts(
    tmp_path: Path, private: bytes
) -> None:
    path = write_mosaic(tmp_path / "a.dcm", private)
    whole = np.arange(144.0).reshape(12, 12)
    headers, found = headers_of(path), slices_of(path)
    assert [header.frame for header in headers] == list(range(8)) == list(found)
    assert {(header.rows, header.columns, header.number_of_frames) for header in headers} == {(4, 4, 8)}
    np.testing.assert_array_equal(found[0], whole[:4, :4])
    np.testing.assert_array_equal(found[2], whole[:4, 8:])
    np.testing.assert_array_equal(found[7], whole[8:, 4:8])
    assert [header.slice_position_mm for header in headers[:3]] == [12.5, 16, 19.5]
    np.testing.assert_array_equal(slices_of(path, [5])[5], found[5])


def test_a_uih_grid_has_only_the_rows_it_needs_and_says_where_its_tiles_lie(tmp_path: Path) -> None:
    path = write_mosaic(tmp_path / "a.dcm", b"", rows=8, columns=12, kind="VFRAME")
    dataset = pydicom.dcmread(path)
    block = dataset.private_block(0x65, "Image Private Header", create=True)
    block.add_new(0x50, "DS", "6")
    tiles = [items(ImagePositionPatient=[0, 0, 100.0 - number])[0] for number in range(6)]
    block.add_new(0x51, "SQ", pydicom.Sequence(tiles))
    dataset.save_as(path)
    headers, found = headers_of(path), slices_of(path)
    assert {(header.rows, header.columns) for header in headers} == {(4, 4)}
    assert [header.slice_position_mm for header in headers] == [100, 99, 98, 97, 96, 95]
    np.testing.assert_array_equal(found[5], np.arange(96.0).reshape(8, 12)[4:, 8:])


@pytest.mark.parametrize(
    "private",
    [b"", siemens(0), siemens(40), siemens(2000)],
    ids=["no count", "zero", "grid does not fit", "absurd"],
)
def test_a_mosaic_that_cannot_be_cut_is_excluded(tmp_path: Path, private: bytes) -> None:
    assert code_of(write_mosaic(tmp_path / "a.dcm", private)) == "mosaic"


def test_a_count_of_another_private_creator_is_not_believed(tmp_path: Path) -> None:
    private = siemens(8).replace(b"SIEMENS MR HEADER ", b"SOMEBODY ELSE'S   ")
    assert code_of(write_mosaic(tmp_path / "a.dcm", private)) == "mosaic"


@pytest.mark.parametrize("open_ended", [False, True])
def test_d7_nesting_inside_functional_groups(tmp_path: Path, open_ended: bool) -> None:
    """They are the only sequences that are looked into: to a known depth where lengths are stated, else
    `too-nested`.
    """
    path = write_frames(tmp_path / "a.dcm", frames(2))
    nested = struct.pack("<HH2sH", 0x0018, 0x0050, b"DS", 2) + b"7 "
    for _ in range(2000):
        size = 0xFFFFFFFF if open_ended else len(nested)
        item = (
            struct.pack("<HHL", 0xFFFE, 0xE000, size)
            + nested
            + (struct.pack("<HHL", 0xFFFE, 0xE00D, 0) if open_ended else b"")
        )
        size = 0xFFFFFFFF if open_ended else len(item)
        nested = struct.pack("<HH2sHL", 0x0028, 0x9110, b"SQ", 0, size) + item
        nested += struct.pack("<HHL", 0xFFFE, 0xE0DD, 0) if open_ended else b""
    item = struct.pack("<HHL", 0xFFFE, 0xE000, len(nested)) + nested
    insert_before_pixels(path, struct.pack("<HH2sHL", 0x5200, 0x9229, b"SQ", 0, len(item)) + item)
    if open_ended:
        assert header_code(path) == "too-nested"
    else:
        assert [header.slice_thickness_mm for header in headers_of(path)] == [5.0, 5.0]


@needs_real_data
@pytest.mark.parametrize("name", ["", "_RLE", "_big_endian", "_jpeg_2k_lossless", "_jpeg_ls_lossless"])
def test_enhanced_mr_in_every_encoding_gives_the_same_frames(name: str) -> None:
    folder = Path(str(REAL)) / "awkward" / "pydicom_data"
    expected, found = slices_of(folder / "emri_small.dcm"), slices_of(folder / f"emri_small{name}.dcm")
    assert len(found) == 10
    for number, image in found.items():
        np.testing.assert_array_equal(image, expected[number])


@needs_real_data
def test_fragmented_enhanced_ct_without_an_offset_table_has_two_frames() -> None:
    found = slices_of(
        Path(str(REAL)) / "awkward" / "cornerstone" / "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm"
    )
    assert [image.shape for image in found.values()] == [(512, 512)] * 2
    assert not np.array_equal(found[0], found[1])


@needs_real_data
@pytest.mark.parametrize(
    ("site", "name", "counts"), [("mr_siemens_trio_usc", "", {35, 36}), ("mr_uih_umr770", "dti", {20})]
)
def test_real_mosaics_become_slices_of_64_by_64(site: str, name: str, counts: set[int]) -> None:
    files = [
        found.path
        for found in find_files(Path(str(REAL)) / f"site_{site}")
        if found.path.name.startswith(name)
    ]
    seen = set()
    for path in files:
        headers = headers_of(path)
        seen.add(len(headers))
        positions = [header.slice_position_mm or 0.0 for header in headers]
        assert {(header.rows, header.columns) for header in headers} == {(64, 64)}
        assert np.ptp(np.diff(positions)) < 0.01  # equal steps
    assert seen == counts
    whole = pydicom.dcmread(files[0]).pixel_array
    found = slices_of(files[0])
    across = whole.shape[1] // 64
    for number in (0, across, len(found) - 1):
        down, right = divmod(number, across)
        np.testing.assert_array_equal(found[number], whole[down * 64 :, right * 64 :][:64, :64])
