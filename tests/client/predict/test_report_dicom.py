"""DICOM SR: written for each study, valid for highdicom's reader, and saying what the page says."""

from __future__ import annotations

import warnings
from pathlib import Path

import pydicom
import pytest

from client.predict.model import START, ensemble, find_model
from client.predict.predict import predict
from client.predict.report_dicom import write_reports
from tests.helpers.command_line import typed
from tests.helpers.predicted import ALARMS, write

highdicom_sr = pytest.importorskip("highdicom.sr")


def test_a_report_is_read_back_with_every_artifact_of_every_series(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for number in range(2):
        write(folder / f"ct{number}.dcm", number + 1)
        write(folder / f"mr{number}.dcm", number + 11, modality="MR")
    write(folder / "air.dcm", 21, patient="WEBER", body=False)
    bare = pydicom.dcmread(folder / "ct0.dcm")
    for keyword in ("PatientName", "PatientBirthDate", "StudyID", "AccessionNumber"):
        if keyword in bare:
            delattr(bare, keyword)
    bare.save_as(folder / "ct0.dcm")
    found = predict(folder, find_model(START, None), ALARMS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # highdicom would warn of the patient's name, by printing it
        written, impossible = write_reports(found, folder, tmp_path / "sr")
    assert (len(written), impossible) == (1, []), "of the study of air nothing was judged"
    source = pydicom.dcmread(folder / "ct0.dcm")
    document = highdicom_sr.srread(written[0])
    assert document.SOPClassUID == "1.2.840.10008.5.1.4.1.1.88.33"
    assert (document.StudyInstanceUID, document.PatientID) == (source.StudyInstanceUID, source.PatientID)
    groups = document.content.get_image_measurement_groups()
    for group, series in zip(groups, found.studies[1].series, strict=True):
        said = {one.name.meaning: one.value.meaning for one in group.get_qualitative_evaluations()}
        assert said == {
            one.artifact.replace("_", " "): "Present" if one.point else "Indeterminate"
            for one in series.findings
        }
        values = {one.name.meaning: one.value for one in group.get_measurements()}
        for one in (finding for finding in series.findings if finding.point):
            assert values[f"probability of {one.artifact}"] == pytest.approx(one.probability, abs=1e-4)
    assert found.model.sha256 in written[0].read_bytes().decode("latin-1")
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    assert {one.SeriesInstanceUID for one in evidence} == {
        pydicom.dcmread(folder / name).SeriesInstanceUID for name in ("ct0.dcm", "mr0.dcm")
    }


def test_a_report_of_an_ensemble_names_each_model(tmp_path: Path) -> None:
    write(tmp_path / "images" / "ct.dcm", 1)
    names = (START, "package:small_cnn_phantoms.safetensors")
    found = predict(tmp_path / "images", ensemble([find_model(name, None) for name in names]), ALARMS)
    written, _ = write_reports(found, tmp_path / "images", tmp_path / "sr")
    assert len(highdicom_sr.srread(written[0]).content.get_image_measurement_groups()) == 1
    said = written[0].read_bytes().decode("latin-1")
    assert all(f"sha256 {find_model(name, None).sha256}" in said for name in names)


def test_a_report_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "images" / "ct.dcm", 1)
    how = ("predict", tmp_path / "images", "--thresholds", "none", "--sr")
    assert typed(capsys, *how)[0] == 2
    status, _, err = typed(capsys, *how, "--out", tmp_path / "out")
    assert (status, "1 DICOM SR" in err) == (0, True)
    assert [one.name for one in (tmp_path / "out" / "sr").iterdir()] == ["study-1.dcm"]
