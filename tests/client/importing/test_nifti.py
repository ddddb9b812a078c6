"""BIDS and other NIfTI: names, JSON, participants and scores go where DICOM has a place for them; slices lie
as the affine says.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest

from client.data.cohort import load_cohort
from client.dicom.dicom import read_header, read_pixels
from client.importing.nifti import acquisition_facts
from client.simulation.real_slices import find_slices
from tests.helpers.command_line import typed
from tests.helpers.public_collections import SIDECAR, about, head, ixi, mr_art, rows_of, save_nifti, write_csv

Capture = pytest.CaptureFixture[str]
SCORE = ("--label", "motion", "--label-column", "score", "--present-from", 2)


def words(src: Path, out: Path, *more: object) -> list[object]:
    return ["data", "import", "nifti", src, out, "--collection", "tiny, CC0", *more]


def imported(capsys: Capture, src: Path, out: Path, *more: object) -> dict[str, Any]:
    code, said, talk = typed(capsys, *words(src, out, "--format", "json", *more))
    assert code == 0, talk
    report: dict[str, Any] = json.loads(said)
    return report


def refused(capsys: Capture, src: Path, out: Path, *more: object) -> tuple[str, str]:
    code, said, talk = typed(capsys, *words(src, out, *more))
    assert (code, said) == (2, ""), talk
    assert len(talk.splitlines()) == 2, talk
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))
    return talk.partition("[")[2].partition("]")[0], talk


def test_mr_art_with_its_scores(tmp_path: Path, capsys: Capture) -> None:
    src = mr_art(tmp_path / "src")
    report = imported(capsys, src, tmp_path / "out", *SCORE, "--slices", 2, "--site", "Budapest")
    (site,) = report["sites"]
    assert (site["site"], site["patients"], site["images"]) == ("budapest", 3, 18)
    assert site["labels"] == {"motion": {"present": 12, "absent": 6}}
    assert report["not_imported"] == []
    assert report["left_out"]["other-suffix"] == 1  # the T1 map; the mask lies in derivatives/
    lines = about(tmp_path / "out" / "budapest")
    assert not any("derivatives" in source for source in lines)
    rows = {row["file"]: row["motion"] for row in rows_of(tmp_path / "out" / "budapest")}
    line = lines["sub-000001/anat/sub-000001_acq-standard_T1w.nii.gz"]
    assert (line["patient"], rows[line["file"]]) == ("sub-000001", "0")
    path = tmp_path / "out" / "budapest" / "images" / line["file"]
    header, dataset = read_header(path), pydicom.dcmread(path)
    assert (header.manufacturer, header.model, header.field_strength_t) == ("Siemens", "Prisma", 3.0)
    assert (header.echo_time_ms, header.repetition_time_ms, header.pixel_bandwidth_hz) == (
        3.03,
        2300.0,
        130.0,
    )
    assert (header.scanning_sequence, header.sequence_variant) == (("GR", "IR"), ("SK", "SP", "MP"))
    assert (header.body_part, header.sex, header.age_years) == ("HEAD", "M", 24.0)
    assert (dataset.FlipAngle, dataset.InversionTime, dataset.MRAcquisitionType) == (9, 900, "3D")
    assert header.slice_thickness_mm == 1.0
    cohort = load_cohort(tmp_path / "out" / "budapest")
    assert (len(cohort.records), int(cohort.patients.max()) + 1) == (18, 3)
    assert len({record.series for record in cohort.records}) == 9


def test_a_person_in_several_scans_is_in_one_part(tmp_path: Path, capsys: Capture) -> None:
    src = mr_art(tmp_path / "src", people=8)
    imported(capsys, src, tmp_path / "out", *SCORE, "--slices", 1)
    cohort = load_cohort(tmp_path / "out" / "src")
    parts: dict[int, set[int]] = {}
    for patient, part in zip(cohort.patients, cohort.part, strict=True):
        parts.setdefault(int(patient), set()).add(int(part))
    assert len(parts) == 8
    assert all(len(of) == 1 for of in parts.values())


def test_the_scores_are_not_labels_until_somebody_says_so(tmp_path: Path, capsys: Capture) -> None:
    report = imported(capsys, mr_art(tmp_path / "src", 1), tmp_path / "out", "--slices", 1)
    assert report["columns_not_used"] == ["score"]
    assert report["sites"][0]["labels"] == {}
    line = about(tmp_path / "out" / "src")["sub-000000/anat/sub-000000_acq-headmotion2_T1w.nii.gz"]
    assert line["about"] == {"score": "3"}
    assert not (tmp_path / "out" / "src" / "labels.csv").exists()


def test_a_sheet_may_take_the_place_of_scans_tsv(tmp_path: Path, capsys: Capture) -> None:
    """As derivatives/scores.tsv of MR-ART: names without ending; only what it lists is imported."""
    rows = [["bids_name", "score"], ["sub-000000_acq-headmotion2_T1w", 3], ["sub-000001_acq-standard_T1w", 1]]
    sheet = write_csv(tmp_path / "scores.tsv", rows, "\t")
    src = mr_art(tmp_path / "src")
    report = imported(capsys, src, tmp_path / "out", "--labels", sheet, *SCORE, "--slices", 1)
    assert report["sites"][0]["labels"] == {"motion": {"present": 1, "absent": 1}}
    assert report["left_out"]["not-in-sheet"] == 8


def test_ixi_knows_its_hospitals(tmp_path: Path, capsys: Capture) -> None:
    src = ixi(tmp_path / "IXI-T1")
    assert refused(capsys, src, tmp_path / "out")[0] == "bad-argument"  # CT or MR?
    report = imported(capsys, src, tmp_path / "out", "--modality", "MR")
    assert [site["site"] for site in report["sites"]] == ["guys", "hh", "iop"]
    site = tmp_path / "out" / "guys"
    # artifacts can be simulated on them: `data inject` passes over other derived images
    assert len(find_slices(site / "images").places["MR"]) == report["sites"][0]["images"]
    header = read_header(next((site / "images").iterdir()))
    assert (header.patient_id, header.pixel_spacing_mm) == ("IXI002", (0.9, 1.2))  # axial
    assert (header.manufacturer, header.field_strength_t, header.echo_time_ms) == ("", None, None)


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_voxel_lies_where_the_affine_says(tmp_path: Path, capsys: Capture, plane: str) -> None:
    """By ImageOrientationPatient and ImagePositionPatient every pixel is found in the volume again, whatever
    the order of the file's axes.
    """
    volume = head()
    turned = np.transpose(volume, (2, 0, 1))[:, ::-1, :]
    zooms = np.array([0.9, 1.1, 1.3])
    affine = np.eye(4)
    affine[:3, :3] = 0
    affine[2, 0], affine[0, 1], affine[1, 2] = zooms[2], -zooms[0], zooms[1]
    affine[:3, 3] = [5 + zooms[0] * (volume.shape[0] - 1), -7, 11]
    (tmp_path / "src").mkdir()
    nibabel.save(nibabel.Nifti1Image(turned, affine), tmp_path / "src" / "a.nii")
    more = ("--modality", "MR", "--every-image-a-patient", "--plane", plane)
    imported(capsys, tmp_path / "src", tmp_path / "out", *more)
    paths = sorted((tmp_path / "out" / "src" / "images").iterdir())
    checked = 0
    for path in paths[::5]:
        dataset, pixels = pydicom.dcmread(path), read_pixels(path)
        corner = np.array(dataset.ImagePositionPatient, float)
        along_row, along_column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
        between_rows, between_columns = map(float, dataset.PixelSpacing)
        for row, column in ((3, 5), (12, 9), (pixels.shape[0] - 2, pixels.shape[1] - 4)):
            lps = corner + along_row * between_columns * column + along_column * between_rows * row
            place = np.rint((lps * [-1, -1, 1] - [5, -7, 11]) / zooms).astype(int)
            assert pixels[row, column] == volume[tuple(place)]
            checked += 1
        if plane != "sagittal":
            assert along_row[0] > 0.99  # the patient's left is on the right
        assert along_column[2 if plane != "axial" else 1] * (-1 if plane != "axial" else 1) > 0.99
    assert checked >= 9
    positions = [read_header(path).slice_position_mm for path in paths]
    step = zooms[{"sagittal": 0, "coronal": 1, "axial": 2}[plane]]
    assert np.allclose(np.abs(np.diff(positions)), step, atol=1e-3)


def test_slices_are_those_of_the_scanner(tmp_path: Path, capsys: Capture) -> None:
    """The JSON of MR-ART says sagittal, and that phase is encoded along a row; without a JSON thick slices
    tell; else axial.
    """
    src = mr_art(tmp_path / "bids", 1)
    imported(capsys, src, tmp_path / "out", "--slices", 1)
    header = read_header(next((tmp_path / "out" / "bids" / "images").iterdir()))
    assert (header.rows, header.columns) == (32, 28)  # z by y
    assert header.phase_encoding == "ROW"
    imported(capsys, src, tmp_path / "out2", "--slices", 1, "--plane", "axial")
    header = read_header(next((tmp_path / "out2" / "bids" / "images").iterdir()))
    assert (header.rows, header.columns, header.phase_encoding) == (28, 24, "COL")
    imported(capsys, src, tmp_path / "out3", "--slices", 1, "--plane", "coronal")
    header = read_header(next((tmp_path / "out3" / "bids" / "images").iterdir()))
    assert header.phase_encoding is None  # across the slice
    save_nifti(tmp_path / "thick" / "a.nii.gz", head(), (1, 5, 1))
    stored = np.transpose(head(), (1, 2, 0))  # as IXI: sagittal slices one after the other
    affine = np.zeros((4, 4))
    affine[1, 0] = affine[2, 1] = affine[0, 2] = affine[3, 3] = 1
    image = nibabel.Nifti1Image(stored, affine)
    (tmp_path / "stored").mkdir()
    nibabel.save(image, tmp_path / "stored" / "a.nii.gz")
    image.header.set_dim_info(freq=0, phase=2, slice=1)
    (tmp_path / "stated").mkdir()
    nibabel.save(image, tmp_path / "stated" / "a.nii.gz")
    more = ("--modality", "MR", "--every-image-a-patient")
    for name, expected in (("stored", (32, 28, None)), ("stated", (28, 24, "ROW"))):
        imported(capsys, tmp_path / name, tmp_path / f"out-{name}", *more)
        header = read_header(next((tmp_path / f"out-{name}" / name / "images").iterdir()))
        assert (header.rows, header.columns, header.phase_encoding) == expected
    imported(capsys, tmp_path / "thick", tmp_path / "out4", *more)
    header = read_header(next((tmp_path / "out4" / "thick" / "images").iterdir()))
    assert (header.rows, header.columns, header.slice_thickness_mm) == (32, 24, 5.0)


def test_values_are_kept(tmp_path: Path, capsys: Capture) -> None:
    """Integers exactly; other numbers to a 65,535th of the range of the volume; HU to 1."""
    src, more = tmp_path / "src", ("--every-image-a-patient", "--plane", "axial")
    volume = head()
    save_nifti(src / "i.nii.gz", volume)
    save_nifti(src / "n.nii.gz", volume - np.int16(300))
    save_nifti(src / "f.nii.gz", (volume * 0.001).astype(np.float32))
    imported(capsys, src, tmp_path / "out", "--modality", "MR", *more)
    lines = (tmp_path / "out" / "src" / "imported.jsonl").read_text().splitlines()
    seen = set()
    for line in map(json.loads, lines):
        path = tmp_path / "out" / "src" / "images" / line["file"]
        z = int(pydicom.dcmread(path).InstanceNumber) - 1
        expected = volume[::-1, ::-1, z].T.astype(float)
        expected = {"i": expected, "n": expected - 300, "f": expected * 0.001}[line["source"][0]]
        assert np.abs(read_pixels(path) - expected).max() < (2e-5 if line["source"][0] == "f" else 1e-9)
        seen.add(line["source"])
    assert len(seen) == 3
    save_nifti(tmp_path / "ct" / "a.nii.gz", np.where(volume > 0, volume / 20, -1000).astype(np.float32))
    imported(capsys, tmp_path / "ct", tmp_path / "out2", "--modality", "CT", *more)
    pixels = read_pixels(next((tmp_path / "out2" / "ct" / "images").iterdir()))
    assert (pixels.min(), 30 < pixels.max() < 110) == (-1000.0, True)


def test_what_is_no_image_of_anatomy(tmp_path: Path, capsys: Capture) -> None:
    src, volume = tmp_path / "src", head()
    save_nifti(src / "good.nii.gz", volume)
    save_nifti(src / "one.nii.gz", volume[..., None])  # a fourth axis of length one
    save_nifti(src / "series.nii.gz", np.stack([volume, volume], axis=-1))
    nan = volume.astype(np.float32)
    nan[3, 3, 3] = np.nan
    save_nifti(src / "nan.nii.gz", nan)
    colour = np.zeros(volume.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), src / "colour.nii.gz")
    nibabel.save(nibabel.Nifti1Image(volume.astype(np.complex64), np.eye(4)), src / "complex.nii.gz")
    save_nifti(src / "empty.nii.gz", np.zeros_like(volume))
    (src / "cut.nii").write_bytes(nibabel.load(src / "good.nii.gz").to_bytes()[:900])
    (src / "cut.nii.gz").write_bytes((src / "good.nii.gz").read_bytes()[:700])
    (src / "text.nii").write_text("no volume")
    more = ("--modality", "MR", "--every-image-a-patient")
    assert refused(capsys, src, tmp_path / "out", *more)[0] == "too-many-quarantined"
    report = imported(capsys, src, tmp_path / "out", *more, "--accept-quarantine")
    assert report["sites"][0]["patients"] == 2
    codes = {one["file"]: one["code"] for one in report["not_imported"]}
    assert codes["series.nii.gz"] == "four-dimensional"
    assert codes["nan.nii.gz"] == "non-finite"
    assert (codes["colour.nii.gz"], codes["complex.nii.gz"]) == ("colour", "not-magnitude")
    assert {codes[name] for name in ("cut.nii", "cut.nii.gz", "text.nii")} <= {"truncated", "unreadable"}
    assert "empty.nii.gz" not in codes
    assert report["left_out"]["too-little-body"] >= len(volume)
    save_nifti(tmp_path / "ct" / "a.nii.gz", volume)
    ct = ("--modality", "CT", "--every-image-a-patient", "--accept-quarantine")
    assert "not-hounsfield" in refused(capsys, tmp_path / "ct", tmp_path / "o", *ct)[1]


def test_phase_images_of_bids_are_left_out(tmp_path: Path, capsys: Capture) -> None:
    src = mr_art(tmp_path / "src", 1)
    save_nifti(src / "sub-000000" / "anat" / "sub-000000_part-phase_T2w.nii.gz", head())
    stem = src / "sub-000000" / "anat" / "sub-000000_acq-headmotion2_T1w"
    stem.with_suffix(".json").write_text(json.dumps(SIDECAR | {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}))
    report = imported(capsys, src, tmp_path / "out", "--slices", 1)
    assert report["left_out"]["not-magnitude"] == 2
    assert report["sites"][0]["images"] == 2


def test_files_that_were_not_downloaded(tmp_path: Path, capsys: Capture) -> None:
    """OpenNeuro's repository has links into git-annex; a link to nothing is a file that cannot be read."""
    src = mr_art(tmp_path / "src", 3)
    scan = src / "sub-000000" / "anat" / "sub-000000_acq-standard_T1w.nii.gz"
    scan.unlink()
    scan.symlink_to(src / ".git" / "annex" / "objects" / "x.nii.gz")
    code, line = refused(capsys, src, tmp_path / "out", *SCORE, "--slices", 1)
    assert (code, "1 × unsafe-path" in line) == ("too-many-quarantined", True)
    scan.unlink()
    assert "1 × missing-file" in refused(capsys, src, tmp_path / "out", *SCORE, "--slices", 1)[1]


def test_sites_of_participants_tsv_and_the_inheritance_principle(tmp_path: Path, capsys: Capture) -> None:
    src = mr_art(tmp_path / "src", 2)
    rows = [["participant_id", "site"], ["sub-000000", "Alpha"], ["sub-000001", "Beta"]]
    write_csv(src / "participants.tsv", rows, "\t")
    for path in src.rglob("*_T1w.json"):
        path.unlink()
    (src / "T1w.json").write_text(json.dumps({"EchoTime": 0.005, "MagneticFieldStrength": 1.5}))
    own = src / "sub-000001" / "anat" / "sub-000001_acq-standard_T1w.json"
    own.write_text(json.dumps({"EchoTime": 0.007}))
    (src / "T2w.json").write_text(json.dumps({"EchoTime": 0.1}))
    report = imported(capsys, src, tmp_path / "out", "--slices", 1)
    assert [site["site"] for site in report["sites"]] == ["alpha", "beta"]
    echo = set()
    for path in (tmp_path / "out").glob("*/images/*.dcm"):
        header = read_header(path)
        echo.add(header.echo_time_ms)
        assert header.field_strength_t == 1.5
    assert echo == {5.0, 7.0}


def test_nothing_says_whose(tmp_path: Path, capsys: Capture) -> None:
    save_nifti(tmp_path / "src" / "a.nii.gz", head())
    assert refused(capsys, tmp_path / "src", tmp_path / "out", "--modality", "MR")[0] == "bad-argument"
    assert refused(capsys, tmp_path / "src", tmp_path / "out", *SCORE)[0] == "bad-argument"


def test_a_json_invents_nothing() -> None:
    bad = {"EchoTime": "soon", "RepetitionTime": -1, "MagneticFieldStrength": True, "FlipAngle": float("nan")}
    facts = acquisition_facts("MR", bad | {"Manufacturer": "A\\B\n" + "x" * 99, "ScanningSequence": 3}, {})
    assert {facts[name] for name in ("echo_time_ms", "repetition_time_ms", "field_strength_t")} == {None}
    assert facts["manufacturer"] == ("AB" + "x" * 99)[:64]
    assert (facts["scanning_sequence"], facts["elements"]) == ((), {})


def test_without_the_library_the_command_that_installs_it(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_nifti(tmp_path / "src" / "a.nii.gz", head())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    code, line = refused(capsys, tmp_path / "src", tmp_path / "out", "--modality", "MR")
    assert code == "missing-extra"
    assert "pip install 'fedqc[import]'" in line
