"""Every real file is accounted for, each for a reason that was looked at."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from client.dicom.cache import load_or_build

REAL = os.environ.get("FEDQC_REAL_DATA")
pytestmark = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")
KEY = bytes(range(32))

SITES = {  # files, slices: all of them are used; mosaics become 35 or 36, and 20 slices
    "site_ct_ge_lightspeed_qiicr": (3, 3),
    "site_ct_philips_nottingham_phantom": (14, 14),
    "site_ct_siemens_basel": (20, 20),
    "site_ct_unknown_lungmask": (2, 2),
    "site_mr_ge_signa_uthscsa": (20, 20),
    "site_mr_philips_bangalore": (180, 180),
    "site_mr_siemens_trio_usc": (14, 498),
    "site_mr_siemens_verio_utah": (11, 11),
    "site_mr_uih_umr770": (20, 96),
}
CT_IMAGE = "cornerstone/CTImage.dcm"
AWKWARD = {
    "cornerstone/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm": "derived",  # a perfusion map
    "cornerstone/CT1_J2KR": "derived",
    CT_IMAGE: "used",
    f"{CT_IMAGE}_BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2.dcm": "duplicate",  # lossless
    f"{CT_IMAGE}_DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99.dcm": "duplicate",
    f"{CT_IMAGE}_JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90.dcm": "duplicate",
    f"{CT_IMAGE}_JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91.dcm": "lossy",
    f"{CT_IMAGE}_JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80.dcm": "duplicate",
    f"{CT_IMAGE}_JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81.dcm": "lossy",
    f"{CT_IMAGE}_JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55.dcm": "lossy",
    f"{CT_IMAGE}_JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70.dcm": "duplicate",
    f"{CT_IMAGE}_JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57.dcm": "duplicate",
    f"{CT_IMAGE}_JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50.dcm": "lossy",
    f"{CT_IMAGE}_JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51.dcm": "lossy",
    f"{CT_IMAGE}_JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53.dcm": "lossy",
    f"{CT_IMAGE}_LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1.dcm": "duplicate",
    f"{CT_IMAGE}_LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2.dcm": "duplicate",
    f"{CT_IMAGE}_RLELosslessTransferSyntax_1.2.840.10008.1.2.5.dcm": "duplicate",
    "cornerstone/no-pixel-data.dcm": "unsupported-object",  # a structured report
    "pydicom_data/HTJ2KLossless_08_RGB.dcm": "unsupported-object",  # secondary captures
    "pydicom_data/MR2_J2KR.dcm": "derived",
    "pydicom_data/OT-PAL-8-face.dcm": "not-dicom",  # no preamble
    "pydicom_data/SC_rgb.dcm": "unsupported-object",
    "pydicom_data/SC_rgb_16bit.dcm": "unsupported-object",
    "pydicom_data/bad_sequence.dcm": "used",  # a private sequence without its end; JPEG lossless of 12 bits
    "pydicom_data/eCT_Supplemental.dcm": "derived",
    "pydicom_data/emri_small.dcm": "used",  # ten frames
    "pydicom_data/emri_small_RLE.dcm": "duplicate",
    "pydicom_data/emri_small_big_endian.dcm": "duplicate",
    "pydicom_data/emri_small_jpeg_2k_lossless.dcm": "duplicate",
    "pydicom_data/emri_small_jpeg_2k_lossless_too_short.dcm": "truncated",
    "pydicom_data/emri_small_jpeg_ls_lossless.dcm": "duplicate",
    "pydicom_data/explicit_VR-UN.dcm": "used",
    "pydicom_data/mlut_18.dcm": "unsupported-object",
    "pydicom_data/parametric_map_double_float.dcm": "unsupported-object",
    "pydicom_data/parametric_map_float.dcm": "unsupported-object",
    "pydicom_wheel/CT_small.dcm": "used",
    "pydicom_wheel/ExplVR_BigEndNoMeta.dcm": "not-dicom",
    "pydicom_wheel/ExplVR_LitEndNoMeta.dcm": "not-dicom",
    "pydicom_wheel/JPEG-lossy.dcm": "unsupported-object",
    "pydicom_wheel/JPEG2000.dcm": "unsupported-object",
    **dict.fromkeys(
        (f"pydicom_wheel/MR_small{name}.dcm" for name in (
            "", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded",
        )),
        "secondary",  # ImageType DERIVED\SECONDARY
    ),
    "pydicom_wheel/MR_truncated.dcm": "truncated",
    "pydicom_wheel/badVR.dcm": "unsupported-object",  # a dose
    "pydicom_wheel/empty_charset_LEI.dcm": "truncated",  # a header without pixels
    "pydicom_wheel/image_dfl.dcm": "unsupported-object",
    "pydicom_wheel/liver_1frame.dcm": "unsupported-object",  # a segmentation
    "pydicom_wheel/meta_missing_tsyntax.dcm": "no-modality",
    "pydicom_wheel/no_meta.dcm": "not-dicom",
    "pydicom_wheel/no_meta_group_length.dcm": "unsupported-object",
    "pydicom_wheel/reportsi.dcm": "unsupported-object",
    "pydicom_wheel/rtplan.dcm": "unsupported-object",
    "pydicom_wheel/rtplan_truncated.dcm": "truncated",
    "pydicom_wheel/test-SR.dcm": "unsupported-object",
}  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_every_file_of_a_real_site_is_used(tmp_path: Path, site: str) -> None:
    intake = load_or_build(Path(str(REAL)) / site, KEY, tmp_path, 64).intake
    assert (intake.found, intake.used, len(intake.records)) == (SITES[site][0], *SITES[site])
    assert {record.modality for record in intake.records} == {site[5:7].upper()}


def test_each_awkward_file_has_its_place(tmp_path: Path) -> None:
    folder = Path(str(REAL)) / "awkward"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    intake = load_or_build(folder, KEY, tmp_path, 64).intake
    places = {problem.number: problem.code for problem in (*intake.quarantined, *intake.excluded)}
    places |= dict.fromkeys(intake.duplicates, "duplicate") | {
        record.number: "used" for record in intake.records
    }
    assert {files[number - 1]: place for number, place in sorted(places.items())} == AWKWARD
    assert len(AWKWARD) == intake.found == 61
    assert Counter(AWKWARD.values())["used"] == intake.used == 5
