"""`fedqc predict`: what it reads, what it says of images, series and studies, and what it never shows."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import socket
import stat
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import yaml

from client.data_check.profile import Acquisition
from client.predict.files import csv_text, public
from client.predict.model import START, Model, find_model
from client.predict.operating_point import NONE, OperatingPoints
from client.predict.outside import MIN_BODY, MIN_BODY_OF_RUN, body_share, outside
from client.predict.page import render
from client.predict.predict import Predictions, predict
from client.predict.text import columns_of, next_steps, report_text, wrapped
from client.predict.words import LANGUAGES
from client.views import acquisition
from common.artifacts import DEFAULT_LABELS
from common.counts import patient_scores
from common.i18n import speaker
from common.preprocess import to_stored
from tests.helpers.command_line import typed
from tests.helpers.predicted import ALARMS, write
from tests.helpers.slice_record import RECORD
from tests.helpers.translations import assert_same_sentences

REAL, PEOPLE = os.environ.get("FEDQC_REAL_DATA"), os.environ.get("FEDQC_REAL_PEOPLE")
needs_real_data = pytest.mark.skipif(REAL is None, reason="FEDQC_REAL_DATA is not set")


EN = speaker("en", LANGUAGES)


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model(START, None)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("FEDQC_SITE", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two patients: one with four slices of CT and two of MR, one with a CT slice of air."""
    root = tmp_path / "images"
    for number in range(4):
        write(root / f"mueller/ct{number}.dcm", number + 1, CTDIvol=12.5)
    for number in range(2):
        write(root / f"mueller/mr{number}.dcm", number + 11, modality="MR")
    write(root / "weber/air.dcm", 21, patient="WEBER", body=False)
    (root / "letter.txt").write_text("dear colleague")
    return root


def test_images_series_and_studies_are_judged_and_every_other_file_has_a_reason(
    folder: Path, model: Model
) -> None:
    found = predict(folder, model, ALARMS)
    assert [(len(one.series), len(one.findings)) for one in found.studies] == [(2, 6), (1, 0)]
    ct, mr = found.studies[0].series
    assert [(one.modality, len(one.images), one.judged) for one in (ct, mr)] == [("CT", 4, 4), ("MR", 2, 2)]
    assert [finding.artifact for finding in ct.findings] == ["metal", "beam_hardening", "ct_motion"]
    assert [finding.artifact for finding in mr.images[0].findings] == list(DEFAULT_LABELS[2:])
    assert [image.outside for image in found.studies[1].series[0].images] == ["little-body"]
    assert {one.code for one in found.skipped} == {"foreign-file"}
    assert (found.files, found.images, found.judged) == (8, 7, 6)
    assert ct.positive_images("metal") == 4


def test_a_series_is_scored_as_a_patient_is_whatever_its_length(folder: Path, model: Model) -> None:
    found = predict(folder, model, NONE)
    series = found.studies[0].series[0]
    logits = np.array([[finding.logit for finding in image.findings] for image in series.images])
    expected = patient_scores(logits, np.zeros_like(logits), np.zeros(4, int))[0]
    assert [finding.logit for finding in series.findings] == pytest.approx(expected.tolist())
    assert expected[0] < logits[:, 0].max(), "four slices: not their maximum"


def test_the_order_of_images_is_that_of_the_body(tmp_path: Path, model: Model) -> None:
    for name, position in (("a", 3), ("b", 1), ("c", 2)):
        write(tmp_path / "images" / f"{name}.dcm", position)
    (study,) = predict(tmp_path / "images", model, NONE).studies
    assert [image.file for image in study.series[0].images] == ["b.dcm", "c.dcm", "a.dcm"]


def logits_of(found: Predictions) -> list[float]:
    return [
        finding.logit
        for study in found.studies
        for series in study.series
        for image in series.images
        for finding in image.findings
    ]


def test_a_file_and_archives_give_what_the_folder_gives(folder: Path, tmp_path: Path, model: Model) -> None:
    expected = logits_of(predict(folder, model, NONE))
    packed = Path(shutil.make_archive(str(tmp_path / "study"), "zip", folder))
    with tarfile.open(tmp_path / "study.tgz", "w:gz") as archive:
        archive.add(folder, arcname="study")
    (tmp_path / "broken.dcm").write_text("beside the file that is asked for")
    for path in (packed, tmp_path / "study.tgz"):
        found = predict(path, model, NONE)
        assert logits_of(found) == expected, path
        assert found.files == 8, "nothing beside the archive is read"
    one = predict(folder / "mueller" / "ct2.dcm", model, NONE)
    assert (one.files, one.images) == (1, 1)
    assert logits_of(one) == pytest.approx(expected[6:9], abs=1e-4)
    link = tmp_path / "link.dcm"
    link.symlink_to(folder / "mueller" / "ct2.dcm")
    assert logits_of(predict(link, model, NONE)) == pytest.approx(expected[6:9], abs=1e-4)


def test_nothing_names_a_file_or_a_patient_unless_asked(folder: Path, model: Model) -> None:
    found = predict(folder, model, ALARMS)
    uid = pydicom.dcmread(folder / "mueller" / "ct0.dcm").SeriesInstanceUID
    said = {
        names: [
            report_text(found, speaker("en", LANGUAGES), names=names),
            csv_text(found, names=names),
            json.dumps(public(found, names=names)),
            render(found, "zh", names=names),
        ]
        for names in (False, True)
    }
    for text in said[False]:
        assert not re.search("mueller|weber|letter|images/", text, re.IGNORECASE)
        assert uid not in text
    assert all("mueller/ct0.dcm" in text for text in said[True][1:])
    assert "letter.txt" in said[True][0]
    assert not any(uid in text for text in said[True])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_asks_nobody_for_anything_and_says_what_it_is(
    folder: Path, model: Model, language: str
) -> None:
    page = render(predict(folder, model, ALARMS), language)
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    assert set(re.findall(r'src="([^,"]*)', page)) == {"data:image/png;base64"}
    assert LANGUAGES[language]["not-a-device"] in page
    assert page.count("<img") == 5 * 2, "two images of each artifact"


def test_every_reason_why_a_file_is_not_used_is_said_in_words(folder: Path, model: Model) -> None:
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    found = predict(folder, model, ALARMS)
    for language, words in LANGUAGES.items():
        page, text = render(found, language), report_text(found, speaker(language, LANGUAGES))
        for code in ("foreign-file", "picture-file"):
            assert words[f"why {code}"] in page
            assert words[f"why {code}"].replace(" ", "") in "".join(text.split())
    odd = replace(found, skipped=(replace(found.skipped[0], code="of-a-worker"),))
    assert "of-a-worker" in render(odd, "en"), "a code that is not ours"


def test_a_series_and_an_image_have_the_numbers_that_the_scanner_gave_them(
    folder: Path, model: Model
) -> None:
    for number, path in enumerate(sorted((folder / "mueller").glob("ct*.dcm"))):
        header = pydicom.dcmread(path)
        header.SeriesNumber, header.InstanceNumber = 301, 40 + number
        header.save_as(path)
    found = predict(folder, model, ALARMS)
    ct, mr = found.studies[0].series
    assert (ct.at_scanner, mr.at_scanner) == (301, 1)
    assert sorted(image.at_scanner or 0 for image in ct.images) == [40, 41, 42, 43]
    assert re.search(r"study 1, series 1, image \d \(at the scanner 301 / 4\d\): metal", render(found, "en"))
    assert "1 (301)" in report_text(found, speaker("en", LANGUAGES))
    rows = list(csv.DictReader(io.StringIO(csv_text(found, names=False))))
    assert {(row["modality"], row["series_number"]) for row in rows if row["study"] == "1"} == {
        ("CT", "301"),
        ("MR", "1"),
    }


def test_no_line_begins_with_a_closing_sign() -> None:
    lines = wrapped("在八十列的终端上换行，标点（右括号）不在行首。" * 20, "  ")
    assert max(map(columns_of, lines)) <= 80
    assert not [line for line in lines if line.strip()[0] in "，。）"]


def test_the_languages_have_the_same_sentences() -> None:
    assert_same_sentences(LANGUAGES)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("points", [NONE, ALARMS])
def test_the_terminal_needs_80_columns(
    folder: Path, model: Model, language: str, points: OperatingPoints
) -> None:
    text = report_text(predict(folder, model, points), speaker(language, LANGUAGES))
    assert max(map(columns_of, text.splitlines())) <= 80


def test_a_ct_scan_is_never_just_repeated_and_its_dose_stands_beside(folder: Path, model: Model) -> None:
    found = predict(folder, model, ALARMS)
    steps = {step.artifact: step for step in next_steps(found.studies)}
    say = speaker("en", LANGUAGES)
    assert not steps["metal"].remedy.repeat
    assert "Do not just repeat" in steps["metal"].advice(say)
    assert steps["metal"].doses == {1: 12.5}
    assert "12.5 mGy (study 1)" in steps["metal"].dose(say)
    assert steps["motion"].advice(say) == "Repeating can help."
    assert steps["motion"].dose(say) == ""
    many = replace(steps["metal"], studies=tuple(range(1, 41)))
    assert many.where(say) == "studies 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, … (40)"
    without = replace(steps["metal"], doses={})
    assert "no CTDIvol" in without.dose(say)


def test_every_result_carries_model_epsilon_threshold_and_seconds(folder: Path, model: Model) -> None:
    found = predict(folder, model, ALARMS)
    rows = list(csv.DictReader(io.StringIO(csv_text(found, names=False))))
    assert len(rows) == 4 * 3 + 2 * 3 + 1
    assert {row["model_sha256"] for row in rows} == {model.sha256}
    assert {row["epsilon"] for row in rows} == {"no hospital's patients"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    judged = [row for row in rows if not row["not_judged"]]
    assert {
        (row["artifact"] in DEFAULT_LABELS, row["present"], row["threshold"], row["origin"]) for row in judged
    } == {(True, "1", "-50.0000", "phantoms"), (False, "", "", "")}, "movement in CT has no threshold"
    assert [row["not_judged"] for row in rows if row["not_judged"]] == ["little-body"]


def test_without_thresholds_there_are_scores_and_no_decision(folder: Path, model: Model) -> None:
    found = predict(folder, model, NONE)
    rows = list(csv.DictReader(io.StringIO(csv_text(found, names=False))))
    assert {(row["present"], row["probability"]) for row in rows} == {("", "")}
    text = report_text(found, speaker("en", LANGUAGES))
    assert "no threshold and no calibration" in " ".join(text.split())
    assert "The model decides nothing" in text
    assert text.startswith("Studies scored: 2. Nothing is decided.")
    assert 'class="verdict none"' in render(found, "en"), "neither clear nor with an artifact"
    assert not next_steps(found.studies)


# --- outside of what the model was trained on

BODY = np.full((1, 16, 16), 100, np.int16)


def measured(spread: float = 1.0, shares: tuple[float, ...] = (0.3, 0.3, 0, 0)) -> list[Any]:
    return [0.0, spread, 0.0, "0" * 16, *shares]


def test_values_that_are_no_hounsfield_units_are_not_judged() -> None:
    record = replace(RECORD, modality="CT")
    shifted = measured(shares=(0.0, 0.1, 0.6, 0.0))
    how: dict[str, Any] = {"profile": None, "key": b"k"}
    assert outside([record], BODY, [shifted], np.zeros(1, int), **how) == ["hu-too-high"]
    assert outside([record], BODY, [measured()], np.zeros(1, int), **how) == [""]


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_body_is_that_of_the_views(modality: Any) -> None:
    rng = np.random.default_rng(4)
    for side in (33, 64):
        image = rng.normal(0, 40, (side, side)).astype(np.float32) + (-1000 if modality == "CT" else 60)
        image[side // 4 : side // 2, side // 5 : side // 2] += 1000
        share = float(acquisition.body_of(torch.from_numpy(image), modality).float().mean())
        assert body_share(image, modality) == pytest.approx(share, abs=1e-6)
        assert 0 < share < 1
    assert MIN_BODY == acquisition.MIN_BODY


def test_little_body_is_not_judged() -> None:
    record = replace(RECORD, modality="CT")
    image = np.full((16, 16), -1000.0, np.float32)
    image[:4, :4] = 40
    stored = to_stored(image, "CT")[None]
    how: dict[str, Any] = {"profile": None, "key": b"k"}
    assert outside([record], stored, [measured()], np.zeros(1, int), **how) == ["little-body"]
    of_run = outside([record], stored, [measured()], np.zeros(1, int), min_body=MIN_BODY_OF_RUN, **how)
    assert of_run == [""], "a run trains on such slices, too"


def test_a_model_of_a_run_judges_small_bodies_and_the_public_start_does_not(
    tmp_path: Path, model: Model
) -> None:
    path = write(tmp_path / "images" / "ct.dcm", 1)
    header = pydicom.dcmread(path)
    image = np.full_like(header.pixel_array, -1000 - int(header.RescaleIntercept))
    image[8:15, 8:15] += 1040
    header.PixelData = image.tobytes()
    header.save_as(path)
    of_run = replace(model, has_start=False)
    judged = {one.has_start: predict(tmp_path / "images", one, NONE).judged for one in (model, of_run)}
    assert judged == {True: 0, False: 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"kvp": 80.0}, "field kvp"),
        ({"slice_thickness_mm": 1.0}, "field slice_thickness_mm"),
        ({"slice_thickness_mm": None, "kvp": None}, ""),
        ({"modality": "MR"}, "field modality"),
    ],
)
def test_an_acquisition_that_no_training_patient_had_is_not_judged(
    change: dict[str, Any], reason: str
) -> None:
    trained = [
        replace(RECORD, modality="CT", kvp=120.0, patient=f"p{at}", slice_thickness_mm=5.0)
        for at in range(12)
    ]
    profile = Acquisition(trained, [measured()] * 12, b"k").profile()
    record = replace(trained[0], **change)
    shares = (0.0,) * 4 if record.modality == "MR" else (0.3, 0.3, 0.0, 0.0)
    found = outside([record], BODY, [measured(shares=shares)], np.zeros(1, int), profile=profile, key=b"k")
    assert found == [reason]


# --- the command


def test_the_command_writes_private_files_and_opens_no_socket(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*how: object, **more: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", refuse)
    out = tmp_path / "out"
    status, said, err = typed(
        capsys, "predict", folder, "--thresholds", "none", "--out", out, "--format", "json", "--lang", "zh"
    )
    assert status == 0
    assert "using fedqc's public start small_cnn_real" in err
    assert json.loads(said) == json.loads((out / "predictions.json").read_text())
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == dict.fromkeys(
        ("predictions.csv", "predictions.json", "report.html"), 0o600
    )
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob("fedqc-predict-*/cache")), "nothing stays"


def test_several_models_judge_together_and_every_result_names_them_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (START, "package:small_cnn_phantoms.safetensors")
    how = [part for name in names for part in ("--model", name)]
    out = tmp_path / "out"
    status, said, _ = typed(capsys, "predict", folder, "--thresholds", "none", "--out", out, *how)
    assert status == 0
    hashes = {find_model(name, None).sha256 for name in names}
    rows = list(csv.DictReader(io.StringIO((out / "predictions.csv").read_text())))
    page, content = (out / "report.html").read_text(), json.loads((out / "predictions.json").read_text())
    assert all(set(row["model_sha256"].split("+")) == hashes for row in rows)
    assert all(one in page and one in said for one in hashes)
    assert {one["sha256"] for one in content["model"]["members"]} == hashes
    logits = {}
    for name in names:
        text = typed(capsys, "predict", folder, "--thresholds", "none", "--model", name, "--format", "json")[
            1
        ]
        logits[name] = json.loads(text)["studies"][0]["series"][0]["images"][0]["findings"][0]["logit"]
    together = content["studies"][0]["series"][0]["images"][0]["findings"][0]["logit"]
    assert together == pytest.approx(sum(logits.values()) / 2, abs=2e-4)
    twice = typed(capsys, "predict", folder, "--thresholds", "none", *how[:2], *how[:2])
    assert (twice[0], "[wrong-ensemble]" in twice[2]) == (2, True)


def test_a_report_does_not_lie_among_the_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = typed(capsys, "predict", folder, "--thresholds", "none", "--out", folder / "out")
    assert status == 2
    assert "[bad-argument]" in err


def test_a_folder_without_an_image_that_can_be_judged_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.txt").write_text("x")
    status, said, _ = typed(capsys, "predict", tmp_path / "images", "--thresholds", "none")
    assert status == 2
    assert said.startswith("No image could be judged.")
    assert "there is no CT or MR image to judge" in said
    assert "The model decides nothing" not in said, "that is not why"
    assert "foreign-file, 1 (files 1): no image" in said
    status, _, err = typed(capsys, "predict", tmp_path / "nowhere")
    assert (status, "[no-such-folder]" in err) == (2, True)


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_judged(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("mine")
    monkeypatch.setattr("client.predict.model.find_model", lambda *a, **b: pytest.fail("too late"))
    status, _, err = typed(capsys, "predict", folder, "--out", tmp_path / "out")
    assert (status, "[output-exists]" in err) == (2, True)


def test_what_is_not_decided_stands_at_the_top(folder: Path, model: Model) -> None:
    found = predict(folder, model, ALARMS)
    said = "Not decided here, so neither found nor excluded: ct_motion"
    assert report_text(found, EN).splitlines()[1] == said
    assert f"<p>{said}</p>" in render(found, "en")


def test_a_logit_does_not_stand_among_probabilities(folder: Path, model: Model) -> None:
    rows = [line.split() for line in report_text(predict(folder, model, ALARMS), EN).splitlines()]
    assert [row[1] for row in rows if row[:1] == ["ct_motion"]] == ["–"] * 2, "no threshold"


def test_a_site_is_read_from_its_cache(folder: Path, tmp_path: Path, model: Model) -> None:
    site = tmp_path / "site"
    site.mkdir()
    shutil.copytree(folder, site / "images")
    (site / "site.yaml").write_text(
        yaml.safe_dump({"name": "a", "kind": "synthetic", "cohort": "c", "nominal_patients": 1})
    )
    found = predict(site, model, NONE, site=site)
    assert logits_of(found) == logits_of(predict(folder, model, NONE))
    assert (site / "state" / "cache" / "store.sqlite3").exists()


# --- real images


@needs_real_data
@pytest.mark.parametrize("name", ["site_ct_unknown_lungmask", "site_mr_siemens_verio_utah"])
def test_real_folders_are_judged(name: str, model: Model) -> None:
    found = predict(Path(REAL or "") / name, model, ALARMS)
    assert found.images == {"site_ct_unknown_lungmask": 2, "site_mr_siemens_verio_utah": 11}[name]
    assert found.judged
    for language in LANGUAGES:
        assert render(found, language)


@needs_real_data
@pytest.mark.slow
def test_every_real_folder_completes(model: Model) -> None:
    roots = [Path(REAL or ""), Path(REAL or "") / "awkward", *([Path(PEOPLE)] if PEOPLE else [])]
    folders = [one for root in roots for one in sorted(root.iterdir()) if one.is_dir()]
    for folder in folders:
        found = predict(folder, model, ALARMS)
        used = {image.file for study in found.studies for one in study.series for image in one.images}
        assert len(used) + len(found.skipped) + found.duplicates == found.files, folder
        assert all(problem.code for problem in found.skipped)
        assert render(found, "en")
        assert max(map(columns_of, report_text(found, speaker("zh", LANGUAGES)).splitlines())) <= 80
