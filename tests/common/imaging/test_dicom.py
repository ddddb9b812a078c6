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
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from common.errors import ImagingError
from common.imaging.dicom import CODES, EXCLUSIONS, exclusion, find_files, make_uid, read_header, read_pixels, write_slice

REAL = os.environ.get("FEDQC_REAL_DATA")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")


def write(path: Path, image: np.ndarray | None = None, modality: str = "CT", **changes: object) -> Path:
    """A good slice, then header changes; a change to None deletes the element."""
    if image is None:
        image = np.random.default_rng(0).integers(-900, 1200, (24, 20)).astype(np.float32)
    write_slice(
        path,
        image,
        modality=modality,  # type: ignore[arg-type]
        pixel_spacing_mm=0.7,
        patient_id="P1",
        study_uid=make_uid(b"study"),
        series_uid=make_uid(b"series"),
        sop_uid=make_uid(path.name.encode()),
        instance_number=3,
        slice_position_mm=12.5,
        slice_thickness_mm=5.0,
    )
    if changes:
        dataset = pydicom.dcmread(path)
        for keyword, value in changes.items():
            if value is None:
                delattr(dataset, keyword)
            elif keyword == "PixelPaddingValue":
                dataset.add_new(keyword, "SS", value)
            else:
                setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


def replace_element(path: Path, keyword: str, vr: bytes, value: bytes) -> Path:
    """Put a raw explicit-VR element in the place of a short one, as no library would write it."""
    content = path.read_bytes()
    tag = pydicom.tag.Tag(keyword)
    at = content.index(struct.pack("<HH", tag.group, tag.element), 132)
    length = struct.unpack("<H", content[at + 6 : at + 8])[0]
    element = struct.pack("<HH", tag.group, tag.element) + vr + struct.pack("<H", len(value)) + value
    path.write_bytes(content[:at] + element + content[at + 8 + length :])
    return path


def insert_before_pixels(path: Path, raw: bytes) -> Path:
    content = path.read_bytes()
    at = content.rindex(struct.pack("<HH", 0x7FE0, 0x0010) + b"OW")
    path.write_bytes(content[:at] + raw + content[at:])
    return path


def code_of(path: Path) -> str:
    with pytest.raises(ImagingError) as caught:
        read_pixels(path)
    assert caught.value.code in CODES | EXCLUSIONS
    assert caught.value.hint
    return caught.value.code


@pytest.mark.parametrize(
    ("modality", "storage"),
    [
        ("CT", (12, False, 1.0, -1024.0)),
        ("CT", (16, True, 1.0, 0.0)),
        ("CT", (16, True, 0.5, -3.25)),
        ("MR", (12, False, 1.0, 0.0)),
        ("MR", (16, False, 0.1, 0.0)),
    ],
)
def test_written_slice_reads_back_to_within_half_a_step(tmp_path: Path, modality: str, storage: tuple[int, bool, float, float]) -> None:
    bits, signed, slope, intercept = storage
    image = np.random.default_rng(1).uniform(0, 1000, (31, 17)).astype(np.float32)
    path = tmp_path / "a.dcm"
    write_slice(
        path,
        image,
        modality=modality,  # type: ignore[arg-type]
        pixel_spacing_mm=(0.7, 0.9),
        patient_id="P1",
        study_uid=make_uid(b"a"),
        series_uid=make_uid(b"b"),
        sop_uid=make_uid(b"c"),
        instance_number=2,
        slice_position_mm=-7.5,
        slope=slope,
        intercept=intercept,
        bits_stored=bits,
        signed=signed,
        phase_encoding="ROW" if modality == "MR" else None,
        field_strength_t=1.5 if modality == "MR" else None,
        kvp=120 if modality == "CT" else None,
    )
    back, header = read_pixels(path), read_header(path)
    assert back.dtype == np.float32
    assert np.abs(back - image).max() <= slope / 2 + 1e-3
    assert (header.modality, header.rows, header.columns, header.bits) == (modality, 31, 17, bits)
    assert header.pixel_spacing_mm == (0.7, 0.9)
    assert header.slice_position_mm == -7.5
    assert (header.phase_encoding, header.field_strength_t, header.kvp) == (("ROW", 1.5, None) if modality == "MR" else (None, None, 120.0))
    assert exclusion(header) is None
    assert list(tmp_path.iterdir()) == [path]


def test_writing_clips_to_what_the_bits_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    ids = {"patient_id": "P", "study_uid": make_uid(b"a"), "series_uid": make_uid(b"b"), "sop_uid": make_uid(b"c")}
    write_slice(path, np.array([[-5000.0, 9000.0]]), modality="CT", pixel_spacing_mm=1, instance_number=1, intercept=-1024, bits_stored=12,
                signed=False, **ids)  # type: ignore[arg-type]  # fmt: skip
    assert read_pixels(path).tolist() == [[-1024.0, 3071.0]]


def test_uids_are_deterministic_and_valid() -> None:
    assert make_uid(b"x") == make_uid(b"x") != make_uid(b"y")
    assert pydicom.uid.UID(make_uid(b"x")).is_valid


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless])
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
    copy.save_as(other, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian, enforce_file_format=True)
    np.testing.assert_array_equal(read_pixels(other), expected)
    assert read_header(other).patient_key == read_header(path).patient_key


def test_bits_beyond_those_stored_are_dropped(tmp_path: Path) -> None:
    """Old scanners hide overlays there."""
    path = write(tmp_path / "a.dcm", np.full((2, 2), 5.0), modality="MR", BitsStored=12, HighBit=11, PixelRepresentation=0)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<4h", 5, 5, 5, 5), struct.pack("<4H", 0x5005, 5, 0x8005, 5)))
    assert read_pixels(path).tolist() == [[5, 5], [5, 5]]
    write(tmp_path / "b.dcm", np.full((2, 2), -3.0), modality="MR", BitsStored=12, HighBit=11)
    path = tmp_path / "b.dcm"
    path.write_bytes(path.read_bytes().replace(struct.pack("<4h", -3, -3, -3, -3), struct.pack("<4H", 0x0FFD, 0xFFFD, 0x0FFD, 0xFFFD)))
    assert read_pixels(path).tolist() == [[-3, -3], [-3, -3]]


def test_padding_is_air_in_ct_and_the_lowest_signal_in_mr(tmp_path: Path) -> None:
    image = np.array([[-2000.0, 40.0], [7.0, -2000.0]])
    assert read_pixels(write(tmp_path / "ct", image, PixelPaddingValue=-2000)).tolist() == [[-1024, 40], [7, -1024]]
    assert read_pixels(write(tmp_path / "mr", image, modality="MR", PixelPaddingValue=-2000)).tolist() == [[7, 40], [7, 7]]


def test_monochrome1_inverts_mr_and_leaves_hounsfield_units_alone(tmp_path: Path) -> None:
    image = np.array([[0.0, 10.0], [30.0, 100.0]])
    mr = read_pixels(write(tmp_path / "mr", image, modality="MR", PhotometricInterpretation="MONOCHROME1"))
    assert mr.tolist() == [[100, 90], [70, 0]]
    assert read_pixels(write(tmp_path / "ct", image, PhotometricInterpretation="MONOCHROME1")).tolist() == image.tolist()


def test_missing_modality_follows_the_sop_class_and_missing_patient_the_study(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", Modality=None, PatientID="", RescaleSlope=None, RescaleIntercept=None)
    header = read_header(path)
    assert header.modality == "CT"
    assert (header.slope, header.intercept) == (1.0, 0.0)
    assert header.patient_key == f"StudyInstanceUID:{make_uid(b'study')}"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned-in"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER"]}, "secondary"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, None),
    ],
)
def test_exclusions_are_rules_not_errors(tmp_path: Path, changes: dict[str, object], code: str | None) -> None:
    path = write(tmp_path / "a.dcm", **changes)
    assert exclusion(read_header(path)) == code
    assert read_pixels(path).shape == (24, 20)


@pytest.mark.parametrize("content", [b"", bytes(200), os.urandom(4096)], ids=["empty", "zeros", "random"])
def test_d1_not_dicom(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.dcm").write_bytes(content)
    assert code_of(tmp_path / "a.dcm") == "not-dicom"


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
    body = b"".join([deflater.compress(raw), *(deflater.compress(bytes(1 << 20)) for _ in range(80)), deflater.flush()])
    path.write_bytes(content[: 144 + struct.unpack("<L", content[140:144])[0]] + body)
    assert path.stat().st_size < 1 << 20
    assert code_of(path) == "too-large"
    path.write_bytes(content[:-20])
    assert code_of(path) == "truncated"


@pytest.mark.parametrize("depth", [300, 50_000])
def test_d7_nesting_ends_in_a_code(tmp_path: Path, depth: int) -> None:
    opening = struct.pack("<HH2sHL", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closing = struct.pack("<HHLHHL", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    assert code_of(insert_before_pixels(write(tmp_path / "a.dcm"), opening * depth + closing * depth)) == "too-nested"


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
    ids=["huge frames", "negative frames", "no rows", "rows missing", "7 bits", "17 of 16 bits", "rows as text", "columns as text"],
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


def test_d10_syntaxes_without_a_decoder(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(100)])
    for syntax in ("1.2.3.4", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.80"):
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
        dataset["PixelData"].is_undefined_length = True
        with pydicom.config.disable_value_validation():
            dataset.save_as(path, implicit_vr=False, little_endian=True)
        assert code_of(path) == "unsupported-syntax"
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(path)
    assert code_of(path) == "bad-geometry"  # the codestream claims another size than the header
    size = struct.pack(">HH8LH", 41, 0, 20, 24, 0, 0, 20, 24, 0, 0, 1)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + size + os.urandom(200)])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    assert code_of(path) == "unsupported-syntax"


def test_d11_names_in_any_character_set_are_accepted_and_never_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
    assert code_of(insert_before_pixels(write(tmp_path / "open.dcm"), open_ended)) in {"truncated", "unreadable"}


@pytest.mark.parametrize("uid", [b"../../x ", b"1." * 150, b"1.2/3.4 ", b"1.2\x003.4 "])
def test_d13_uids_that_are_not(tmp_path: Path, uid: bytes) -> None:
    path = replace_element(write(tmp_path / "a.dcm"), "SOPInstanceUID", b"UI", uid)
    assert code_of(path) == "unreadable"


def test_d14_only_regular_files_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    outside = write(tmp_path / "outside.dcm")
    for name in ("b.dcm", "a.dcm", "deep/c", ".hidden"):
        write(root / name)
    os.mkfifo(root / "pipe")
    (root / "out.dcm").symlink_to(outside)
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "same.dcm").symlink_to(root / "a.dcm")
    assert [path.relative_to(root).as_posix() for path in find_files(root)] == ["a.dcm", "b.dcm", "deep/c", "same.dcm"]


def test_a_pipe_or_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert code_of(tmp_path / "absent") == "unreadable"
    assert code_of(tmp_path) == "unreadable"
    os.mkfifo(tmp_path / "pipe")
    assert code_of(tmp_path / "pipe") in {"unreadable", "not-dicom"}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "unsupported-object"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1"}, "unsupported-object"),
        ({"SOPClassUID": "1.2.840.10008.1.3.10"}, "dicomdir"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}, "mosaic"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"NumberOfFrames": 10}, "too-large"),
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

    monkeypatch.setattr("common.imaging.dicom.read_partial", parse_slowly)
    assert code_of(path) == "changed"


def test_mutated_files_raise_nothing_else(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    path = write(tmp_path / "a.dcm", np.zeros((8, 8)))
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(tmp_path / "b.dcm")
    for source in (path, tmp_path / "b.dcm"):
        content = np.frombuffer(source.read_bytes(), np.uint8)
        for _ in range(600):
            mutated = content.copy()
            mutated[generator.integers(132, len(content), 4)] = generator.integers(0, 256, 4)
            (tmp_path / "m.dcm").write_bytes(mutated.tobytes())
            try:
                assert np.isfinite(read_pixels(tmp_path / "m.dcm")).all()
            except ImagingError as error:
                assert error.code in CODES | EXCLUSIONS  # noqa: PT017


def test_messages_do_not_quote_the_header(tmp_path: Path) -> None:
    path = replace_element(write(tmp_path / "a.dcm"), "RescaleSlope", b"DS", b"SECRET")
    with pytest.raises(ImagingError) as caught:
        read_pixels(path)
    assert "SECRET" not in caught.value.message + caught.value.hint
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@needs_real_data
def test_every_awkward_file_gives_an_image_or_a_code() -> None:
    files = find_files(Path(str(REAL)) / "awkward")
    assert len(files) > 50
    images = 0
    for path in files:
        try:
            image = read_pixels(path)
            assert np.isfinite(image).all()
            images += 1
        except ImagingError as error:
            assert error.code in CODES  # noqa: PT017
    assert images >= 20


@needs_real_data
def test_lossless_encodings_of_one_ct_are_bit_identical() -> None:
    folder = Path(str(REAL)) / "awkward" / "cornerstone"
    expected = read_pixels(folder / "CTImage.dcm")
    for kind in ("BigEndianExplicit", "Deflated", "JPEG2000LosslessOnly", "LittleEndianExplicit", "LittleEndianImplicit", "RLELossless"):
        (path,) = folder.glob(f"CTImage.dcm_{kind}*")
        np.testing.assert_array_equal(read_pixels(path), expected)


@needs_real_data
def test_jpeg_2000_of_basel_is_in_hounsfield_units() -> None:
    for path in find_files(Path(str(REAL)) / "site_ct_siemens_basel")[:3]:
        image, header = read_pixels(path), read_header(path)
        assert image.shape == (512, 512)
        assert header.pixel_spacing_mm is not None
        assert image.min() == -1024
        assert 500 < image.max() < 3072
        soft_tissue = ((image > -150) & (image < 250)).mean()
        assert 0.15 < soft_tissue < 0.8


@needs_real_data
def test_mosaics_are_refused_and_other_sites_are_read() -> None:
    for folder, codes in (("mr_siemens_trio_usc", {"mosaic"}), ("ct_ge_lightspeed_qiicr", set()), ("ct_unknown_lungmask", set())):
        seen = set()
        for path in find_files(Path(str(REAL)) / f"site_{folder}"):
            try:
                read_header(path)
            except ImagingError as error:
                seen.add(error.code)
        assert seen == codes
