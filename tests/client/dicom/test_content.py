"""What an image shows, in which unit, and whether it lost something: one rule for each fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from client.dicom.content import Content, not_anatomy
from client.dicom.dicom import exclusion, read_header, read_pixels
from client.dicom.refusals import EXCLUSIONS
from tests.helpers.dicom_files import code_of, encapsulated, group, headers_of, items, write, write_frames


def code(*values: str, modality: str = "MR", **facts: object) -> str | None:
    """The code of an original, primary image with these further values of ImageType."""
    image_type = ("ORIGINAL", "PRIMARY", *values)
    found = not_anatomy(Content(modality=modality, image_type=image_type, **facts))  # type: ignore[arg-type]
    assert found is None or found in EXCLUSIONS
    return found


def scanned(path: Path, **changes: object) -> Path:
    """A slice that fedqc did not write: what it writes itself may be DERIVED."""
    dataset = pydicom.dcmread(write(path, **changes))  # type: ignore[arg-type]
    dataset.file_meta.ImplementationVersionName = "ACME"
    dataset.save_as(path)
    return path


def typed(text: str) -> tuple[str, ...]:
    return tuple(text.split("\\"))


@pytest.mark.parametrize(
    "values",
    [
        "M", r"M\ND", r"M\NORM\DIS2D", r"M\ND\MOSAIC", r"M\UCA\IF", r"M\VFRAME", "MPR", "OTHER", "",
        r"M_SE\M\SE", r"M_FFE\M\FFE", r"M_IR\M\IR", r"M_PCA\M\PCA", r"M_B0\M\B0",
        r"M\SWI\NORM", r"M\RETRO\NORM\DIS2D", r"T1\NONE", r"DIFFUSION\NONE", r"T2_STAR\NONE", r"FMRI\NONE",
        r"M\DIXON\WATER", r"W\W\DERIVED", r"F\F\DERIVED", r"IP\IP\DERIVED", r"OP\OP\DERIVED", r"M\IN_PHASE",
        r"M\OPP_PHASE", r"PROTON_DENSITY\NONE", r"PERFUSION\NONE", r"M\FM3_2\FIL", r"ANGIO\TOF", r"CINE\NONE",
        r"M\OUT_OF_PHASE", r"M\ARTERIAL_PHASE", r"M\REAL_TIME", r"PHASE CONTRAST M\M\PCA", r"M\T2_MAPIT",
        r"M\MASK", r"M\PHASED_ARRAY",
    ],
)  # fmt: skip
def test_magnitude_images_of_anatomy_stay(values: str) -> None:
    assert code(*typed(values), is_frame=values.endswith("NONE")) is None


@pytest.mark.parametrize(
    "values",
    [
        r"P\ND", "P", "R", r"I\ND", r"PHASE MAP\P\FFE",
        r"P_FFE", "R_IR", r"I_SE\I\SE", r"M_FFE\P\FFE", "PHASE",
        r"PHASE\UCA", "PHASE_SUBTRACT", "REAL", "IMAGINARY", r"VELOCITY MAP\P\PCA", r"P\RETRO\NORM\DIS2D",
        "SWI_PHASE", "QFLOW_PHASE", "PHASECORR", "PHASE_CORR", "CR_IR", r"M\NORM\PSIR", "PHASE(RAD)",
    ],
)  # fmt: skip
def test_phase_real_and_imaginary_images_are_no_magnitude(values: str) -> None:
    assert code(*typed(values)) == "not-magnitude"


@pytest.mark.parametrize(
    "values",
    [
        r"DIFFUSION\ADC\ND", r"DIFFUSION\FA\ND", r"DIFFUSION\TRACEW\ND", r"ADC_UNSPECIFIED\ADC\UNSPECIFIED",
        r"EADC\EADC", r"DIFFUSION\COLFA", r"T2 MAP\T2", "T2MAP", r"T1_MAP", "T2_STAR_MAP", r"R2_STAR\NONE",
        r"DENSITY MAP", "DIFFUSION MAP", r"FAT_FRACTION", r"FF\FF\DERIVED", "WATER_FRACTION", r"B0 MAP\B0",
        r"B0\B0\UNSPECIFIED", "FIELD_MAP", "B1_MAP", "VELOCITY_MAP", r"PERFUSION\TTP", r"PERFUSION\RELCBF",
        r"PERFUSION\MTT", "METABOLITE_MAP", "TEMPERATURE",
        "QSM", r"ECV MAP", r"MTR", r"DIFFUSION\CALC_BVALUE",
        r"DIFFUSION\ADC_SS\ND", "SYNTHETIC DWI", "CDWI", r"T2_UNSPECIFIED\T2\UNSPECIFIED", "T2MAP_RSQ",
        "FAMAP", "PROTON_DENSITY_FAT_FRACTION", "HEPATIC FAT FRACTION", "FAT_PERCENTAGE", r"M\WFF",
        r"PERFUSION\RCBV_CORR",
        "TIME_TO_PEAK", "MEAN_TRANSIT_TIME", "CEREBRAL BLOOD VOLUME", "WASH_IN", "MAX_SLOPE", "SHEAR_MODULUS",
        r"MRE\WAVE", "COIL_SENSITIVITY", "G-FACTOR", "TTP[S]",
    ],
)  # fmt: skip
def test_maps_of_a_quantity_are_named(values: str) -> None:
    assert code(*typed(values)) == "parameter-map"


def test_a_contrast_in_value_3_is_a_quantity_in_value_4_of_a_frame() -> None:
    assert code("T1", "NONE", is_frame=True) is None
    assert code("T1", "T1", is_frame=True) == "parameter-map"
    assert code("M", "T1") is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (r"M\MNIP", "projection"),
        (r"MIP_SAG", "projection"),
        (r"SWI\MINIMUM_IP", "projection"),
        (r"PROJECTION IMAGE", "projection"),
        (r"ANGIO\MAX_IP", "projection"),
        (r"M\SUB", "combined"),
        (r"DYNAMIC\SUBTRACTION", "combined"),
        (r"M\NORM\MEAN", "combined"),
    ],
)
def test_projections_and_sums_are_no_single_images(values: str, expected: str) -> None:
    assert code(*typed(values)) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"component": "MAGNITUDE"}, None),
        ({"component": "PHASE"}, "not-magnitude"),
        ({"component": "MIXED"}, "not-magnitude"),
        ({"ge_kind": 0}, None),
        ({"ge_kind": 1}, "not-magnitude"),
        ({"ge_kind": 3}, "not-magnitude"),
        ({"contrast": "VELOCITY"}, "parameter-map"),
        ({"contrast": "T2"}, None),
        ({"calculation": "MIN_IP"}, "projection"),
        ({"calculation": "NONE", "volumetric": "VOLUME"}, None),
        ({"volumetric": "DISTORTED"}, "projection"),
        ({"presentation": "TRUE_COLOR"}, "colour"),
        ({"presentation": "MONOCHROME"}, None),
        ({"rescale_type": "US"}, None),
        ({"rescale_type": "normalized"}, None),
        ({"rescale_type": "SIGNAL INTENSITY (UNITLESS)"}, None),
        ({"rescale_type": "milliradials"}, "not-magnitude"),
        ({"rescale_type": "ms"}, "parameter-map"),
        ({"rescale_type": "cm/s"}, "parameter-map"),
        ({"rescale_type": "10^-6 mm2/s"}, "parameter-map"),
        ({"rescale_type": "Hz"}, "parameter-map"),
        ({"rescale_type": "Hz*10"}, "parameter-map"),
        ({"rescale_type": "0.1%"}, "parameter-map"),
        ({"rescale_type": "T2*[ms]"}, "parameter-map"),
        ({"rescale_type": "ADC [10^-6mm2/s]"}, "parameter-map"),
        ({"rescale_type": "fat fraction"}, "parameter-map"),
        ({"rescale_type": "10"}, None),
        ({"rescale_type": "arbitrary units"}, None),
    ],
)
def test_other_facts_about_an_mr_image(facts: dict[str, object], expected: str | None) -> None:
    assert code("M", **facts) == expected


@pytest.mark.parametrize(
    ("values", "rescale_type", "expected"),
    [
        ("AXIAL", "HU", None),
        (r"AXIAL\CT_SOM5 SPI", "", None),
        (r"AXIAL\HELIX", "hu", None),
        ("VOLUME", "Hounsfield Unit", None),
        ("AXIAL", "US", "not-hounsfield"),
        ("AXIAL", "MGML", "not-hounsfield"),
        ("AXIAL", "Z_EFF", "not-hounsfield"),
        ("AXIAL", "HU_MOD", "not-hounsfield"),
        ("AXIAL", "PCT", "not-hounsfield"),
        (r"AXIAL\VMI", "HU", "spectral-map"),
        (r"AXIAL\MAT_SPECIFIC", "MGML", "spectral-map"),
        (r"AXIAL\EFF_ATOMIC_NUM", "Z_EFF", "spectral-map"),
        (r"AXIAL\ELECTRON_DENSITY", "ED", "spectral-map"),
        (r"AXIAL\VNC", "HU", "spectral-map"),
        (r"AXIAL\IODINE", "", "spectral-map"),
        (r"VOLUME\RCBF", "", "parameter-map"),
        (r"AXIAL\MIP", "HU", "projection"),
        (r"AXIAL\MPR", "HU", "projection"),
        (r"AXIAL\CT_SOM7 SPI DUAL\MIX", "HU", None),
        (r"AXIAL\LOW_DOSE", "HU", None),
        (r"AXIAL\MONO_70KEV", "HU", "spectral-map"),
        (r"AXIAL\CT_VMI_40", "HU", "spectral-map"),
        (r"AXIAL\MD_IODINE", "", "spectral-map"),
        (r"AXIAL\WATER(IODINE)", "", "spectral-map"),
        (r"AXIAL\CT_SOM7 SPI DUAL\DE_MONO", "HU", "spectral-map"),
        (r"PERFUSION_MTT", "", "parameter-map"),
        (r"AXIAL\CT_SOM5 4D MIP", "HU", "projection"),
        (r"CSAPARALLEL", "HU", "projection"),
    ],
)
def test_ct_images_are_axial_and_in_hounsfield_units(
    values: str, rescale_type: str, expected: str | None
) -> None:
    assert code(*typed(values), modality="CT", rescale_type=rescale_type) == expected


def test_the_facts_come_from_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", modality="MR", ImageType=["ORIGINAL", "PRIMARY", "P", "ND"])
    assert exclusion(read_header(path)) == "not-magnitude"
    path = write(tmp_path / "b.dcm", RescaleType="MGML")
    assert exclusion(read_header(path)) == "not-hounsfield"
    assert exclusion(read_header(write(tmp_path / "c.dcm", RescaleType=""))) is None
    for name in ("SCOUT", "TOPOGRAM", "LOCALIZER"):
        path = write(tmp_path / name, ImageType=["ORIGINAL", "PRIMARY", name])
        assert exclusion(read_header(path)) == "localizer"
    path = write(tmp_path / "top", ImageType=["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 TOP"])
    assert exclusion(read_header(path)) == "localizer"
    for values in (["DOSE"], ["AXIAL", "CT_SOM5 PROT"], ["SCREEN SAVE"]):
        path = write(tmp_path / values[-1].strip(), ImageType=["ORIGINAL", "PRIMARY", *values])
        assert exclusion(read_header(path)) == "secondary"


def test_ge_names_the_kind_of_an_image_in_a_private_element(tmp_path: Path) -> None:
    for kind, expected in ((0, None), (1, "not-magnitude"), (2, "not-magnitude"), (3, "not-magnitude")):
        path = write(tmp_path / str(kind), modality="MR", ImageType=["ORIGINAL", "PRIMARY", "OTHER"])
        dataset = pydicom.dcmread(path)
        dataset.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", kind)
        dataset.save_as(path)
        assert exclusion(read_header(path)) == expected


def test_each_frame_of_a_field_map_is_judged_by_itself(tmp_path: Path) -> None:
    """As Philips writes it: magnitude and phase frames of the same positions in one file."""
    own = [
        group(
            MRImageFrameTypeSequence=items(
                FrameType=["ORIGINAL", "PRIMARY", "FIELD_MAP" if phase else "M", "NONE"],
                ComplexImageComponent="PHASE" if phase else "MAGNITUDE",
            )
        )
        for phase in (0, 1, 0, 1)
    ]
    images = np.random.default_rng(0).integers(0, 900, (4, 8, 8)).astype(np.float32)
    path = write_frames(tmp_path / "a.dcm", images, own=own, ComplexImageComponent="MIXED")
    assert [exclusion(header) for header in headers_of(path)] == [None, "not-magnitude"] * 2


def test_an_enhanced_ct_says_its_unit_in_the_functional_group(tmp_path: Path) -> None:
    own = [
        group(
            PixelValueTransformationSequence=items(RescaleSlope=1, RescaleIntercept=-1024, RescaleType=unit)
        )
        for unit in ("HU", "MGML", "US")
    ]
    path = write_frames(tmp_path / "a.dcm", np.zeros((3, 8, 8), np.float32), "CT", own=own, RescaleType=None)
    assert [exclusion(header) for header in headers_of(path)] == [None, "not-hounsfield", "not-hounsfield"]


# compression with loss


@pytest.mark.parametrize("value_1", ["ORIGINAL", "DERIVED"])
@pytest.mark.parametrize(
    "facts",
    [
        {"LossyImageCompression": "01"},
        {"LossyImageCompression": "01", "LossyImageCompressionRatio": "20"},
        {"LossyImageCompressionMethod": "ISO_10918_1"},
        {"LossyImageCompressionRatio": ["1", "8.5"]},
    ],
)
def test_loss_is_one_fact_whatever_the_image_type_says(
    tmp_path: Path, value_1: str, facts: dict[str, object]
) -> None:
    header = read_header(scanned(tmp_path / "a.dcm", ImageType=[value_1, "PRIMARY", "AXIAL"], **facts))
    assert header.lossy
    assert exclusion(header) == "lossy"
    assert exclusion(header, lossy="use") is None


@pytest.mark.parametrize(
    "facts",
    [
        {"LossyImageCompression": "00"},
        {"LossyImageCompression": "00", "LossyImageCompressionRatio": "2.3"},
        {"LossyImageCompressionRatio": "1"},
        {"LossyImageCompression": ""},
    ],
)
def test_what_lost_nothing_is_used(tmp_path: Path, facts: dict[str, object]) -> None:
    assert exclusion(read_header(scanned(tmp_path / "a.dcm", **facts))) is None


def test_a_derived_image_that_is_more_than_compressed_is_never_used(tmp_path: Path) -> None:
    for number, changes in enumerate(
        (
            {"ImageType": ["DERIVED", "PRIMARY", "MPR"]},
            {"ImageType": ["DERIVED", "PRIMARY", "AXIAL", "RCBF"]},
            {
                "ImageType": ["DERIVED", "PRIMARY", "AXIAL"],
                "DerivationCodeSequence": items(CodeValue="113072", CodingSchemeDesignator="DCM"),
            },
        )
    ):
        path = scanned(tmp_path / str(number), LossyImageCompression="01", **changes)
        assert exclusion(read_header(path), lossy="use") == "derived"
    compressed = items(CodeValue="113040", CodingSchemeDesignator="DCM")
    path = scanned(
        tmp_path / "c",
        LossyImageCompression="01",
        ImageType=["DERIVED", "PRIMARY", "AXIAL"],
        DerivationCodeSequence=compressed,
    )
    assert exclusion(read_header(path), lossy="use") is None


def jpeg(image: np.ndarray) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.jpeg8_encode(image, level=80))


def jpeg_ls(level: int) -> Callable[[np.ndarray], bytes]:
    import imagecodecs

    return lambda image: bytes(imagecodecs.jpegls_encode(image, level=level))


def jpeg_2000(reversible: bool) -> Callable[[np.ndarray], bytes]:
    import imagecodecs

    return lambda image: bytes(
        imagecodecs.jpeg2k_encode(
            image, level=0 if reversible else 30, reversible=reversible, codecformat="J2K"
        )
    )


@pytest.mark.parametrize(
    ("encode", "syntax", "lossy"),
    [
        (jpeg, "1.2.840.10008.1.2.4.50", True),
        (jpeg_ls(0), "1.2.840.10008.1.2.4.80", False),
        (jpeg_ls(0), "1.2.840.10008.1.2.4.81", False),
        (jpeg_ls(3), "1.2.840.10008.1.2.4.81", True),
        (jpeg_2000(True), "1.2.840.10008.1.2.4.91", False),
        (jpeg_2000(False), "1.2.840.10008.1.2.4.91", True),
    ],
    ids=["JPEG", "JPEG-LS", "near-lossless 0", "near-lossless 3", "reversible", "irreversible"],
)
def test_the_codestream_tells_what_the_header_does_not(
    tmp_path: Path, encode: Callable[[np.ndarray], bytes], syntax: str, lossy: bool
) -> None:
    image = np.random.default_rng(3).integers(0, 255, (24, 24)).astype(np.uint8)
    path = write(
        tmp_path / "a.dcm",
        image.astype(np.float32),
        "MR",
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelRepresentation=0,
        PixelData=image.tobytes(),
    )
    encapsulated(path, [encode(image)], syntax)
    assert exclusion(read_header(path)) == ("lossy" if lossy else None)


# an element without a value


@pytest.mark.parametrize(
    "changes",
    [
        {"NumberOfFrames": ""},
        {"NumberOfFrames": 0},
        {"SamplesPerPixel": None},
        {"PhotometricInterpretation": ""},
        {"BitsStored": ""},
        {"BitsStored": "", "HighBit": ""},
        {"HighBit": ""},
        {"PixelSpacing": ""},
        {"ImageType": ""},
        {"BurnedInAnnotation": ""},
        {"WindowCenter": "", "WindowWidth": ""},
        {"RescaleType": ""},
        {"ModalityLUTSequence": pydicom.Sequence([])},
        {"SOPClassUID": ""},
        {"StudyDate": "", "PatientAge": "", "SliceThickness": "", "SliceLocation": ""},
    ],
)
@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_an_element_without_a_value_is_absent(
    tmp_path: Path, modality: str, changes: dict[str, object]
) -> None:
    image = np.random.default_rng(1).integers(0, 900, (12, 10)).astype(np.float32)
    path = write(tmp_path / "a.dcm", image, modality)
    dataset = pydicom.dcmread(path)
    for keyword, value in changes.items():
        if value == "":
            dataset[pydicom.tag.Tag(keyword)] = pydicom.DataElement(
                keyword, pydicom.datadict.dictionary_VR(keyword), None
            )
        elif value is not None:
            setattr(dataset, keyword, value)
    dataset.save_as(path)
    np.testing.assert_array_equal(read_pixels(path), image)
    assert exclusion(read_header(path)) is None


def test_an_empty_rescale_is_the_identity_in_mr_and_refused_in_ct(tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 900, (12, 10)).astype(np.float32)
    for empty in (
        {"RescaleSlope": ""},
        {"RescaleIntercept": ""},
        {"RescaleSlope": "", "RescaleIntercept": ""},
    ):
        path = write(tmp_path / "a.dcm", image, "MR", **empty)
        np.testing.assert_array_equal(read_pixels(path), image)
        assert code_of(write(tmp_path / "b.dcm", image, "CT", **empty)) == "bad-rescale"


def test_an_empty_element_of_a_frame_does_not_hide_the_shared_one(tmp_path: Path) -> None:
    shared = group(
        PixelValueTransformationSequence=items(RescaleSlope=2, RescaleIntercept=5, RescaleType="US"),
        PixelMeasuresSequence=items(PixelSpacing=[0.5, 0.25]),
    )
    own = [
        group(
            PixelValueTransformationSequence=items(RescaleSlope=None, RescaleIntercept=None),
            PixelMeasuresSequence=items(PixelSpacing=None),
            MRImageFrameTypeSequence=items(FrameType=None),
        )
    ] * 2
    images = np.random.default_rng(0).integers(0, 900, (2, 8, 8)).astype(np.float32)
    for header in headers_of(write_frames(tmp_path / "a.dcm", images, shared=shared, own=own)):
        assert (header.slope, header.intercept, header.pixel_spacing_mm) == (2.0, 5.0, (0.5, 0.25))
        assert header.image_type[:2] == ("ORIGINAL", "PRIMARY")
