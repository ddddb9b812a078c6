"""`fedqc site report`: a cohort, figures of a model at its test patients, and the worst mistakes there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.data.cohort import Cohort, load_cohort
from client.dicom.index import PARTS
from client.predict import operating_point
from client.predict.mistakes import WORST, worst_mistakes
from client.predict.model import START, find_model
from client.predict.operating_point import OperatingPoints
from client.predict.predict import Predictions, predict
from client.predict.site_report import SiteReport, site_report
from client.predict.text import columns_of
from client.simulation.phantom_sites import write_site
from common.artifacts import INDEX, NAMES
from common.counts import patient_scores
from common.physics.appearance import SITE_APPEARANCES
from tests.helpers.command_line import typed
from tests.helpers.predicted import POINT

HALF = replace(POINT, threshold=0.5)
POINTS = OperatingPoints(images=dict.fromkeys(NAMES, HALF), patients=dict.fromkeys(NAMES, HALF))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "site"
    write_site(folder, "site", SITE_APPEARANCES[0], patients=40, seed=5)
    return folder


@pytest.fixture(scope="module")
def report(site: Path) -> SiteReport:
    return site_report(site, find_model(START, None), lambda: POINTS)


@pytest.fixture(scope="module")
def everyone(site: Path) -> Predictions:
    """What `fedqc predict SITE` says, of all patients."""
    return predict(site, find_model(START, None), POINTS, site=site)


@pytest.fixture(scope="module")
def cohort(site: Path) -> Cohort:
    return load_cohort(site, labels=NAMES)


@pytest.fixture(autouse=True)
def _known_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDQC_SITE", raising=False)
    monkeypatch.setattr(operating_point, "operating_points", lambda *how, **more: POINTS)


def test_figures_are_those_of_the_test_patients(
    report: SiteReport, everyone: Predictions, cohort: Cohort
) -> None:
    logits = np.full(cohort.labels.shape, np.nan)
    at = {(record.file, record.frame): row for row, record in enumerate(cohort.records)}
    for image in (image for study in everyone.studies for series in study.series for image in series.images):
        for one in image.findings:
            logits[at[image.file, image.frame], INDEX[one.artifact]] = one.logit
    test = cohort.part == PARTS.index("test")
    checked = 0
    for score in report.scores:
        place = INDEX[score.artifact]
        rows = np.flatnonzero(test & ~np.isnan(logits[:, place]) & ~np.isnan(cohort.labels[:, place]))
        names = sorted(set(cohort.patients[rows].tolist()))
        own = [rows[cohort.patients[rows] == name] for name in names]
        truth = np.array([cohort.labels[of, place].max() for of in own])
        values = np.array(
            [
                patient_scores(
                    logits[of, place, None], cohort.labels[of, place, None], np.zeros(len(of), int)
                )
                for of in own
            ]
        ).ravel()
        assert (score.positives, score.negatives) == ((truth == 1).sum(), (truth == 0).sum())
        if len(set(truth.tolist())) == 2:
            checked += 1
            assert score.auroc == pytest.approx(roc_auc_score(truth, values))
            assert score.low < score.auroc < score.high or score.auroc in (score.low, score.high)
            assert score.sensitivity.value == pytest.approx((values[truth == 1] >= 0.5).mean())
            assert score.specificity.value == pytest.approx((values[truth == 0] < 0.5).mean())
            assert score.alarms_per_100 == pytest.approx(100 * (values >= 0.5).mean())
    assert checked >= 2


def test_a_training_patients_mistake_is_not_listed(
    report: SiteReport, everyone: Predictions, cohort: Cohort, site: Path
) -> None:
    of_all = worst_mistakes(everyone, site)
    parts = {PARTS[cohort.part[one.position]] for one in of_all}
    assert "train" in parts, "the control: training patients have mistakes among the worst"
    assert report.mistakes
    assert {PARTS[cohort.part[one.position]] for one in report.mistakes} == {"test"}
    at = {(record.file, record.frame): row for row, record in enumerate(cohort.records)}
    scored = {
        PARTS[cohort.part[at[image.file, image.frame]]]
        for study in report.found.studies
        for series in study.series
        for image in series.images
        if image.findings
    }
    assert scored == {"test"}
    # study, series and image are numbered as `fedqc predict SITE` numbers them, so that they are found there
    of_test = [one for one in of_all if PARTS[cohort.part[one.position]] == "test"]
    assert of_test
    assert set(of_test) <= set(report.mistakes)
    for kind in ("miss", "false alarm"):
        beyond = [one.beyond for one in report.mistakes if one.kind == kind]
        assert len(beyond) <= WORST
        assert beyond == sorted(beyond, reverse=True)
    assert report.not_scored()["train"] == len(set(cohort.patients[cohort.part == 0].tolist()))
    assert report.patients + report.unjudged + report.not_scored()["train"] == 40


def test_each_picture_is_that_of_its_mistake(report: SiteReport, cohort: Cohort) -> None:
    for one, picture in zip(report.mistakes, report.pictures, strict=True):
        assert np.array_equal(picture.pixels, cohort.images[one.position])
        assert (picture.finding.artifact, picture.finding.positive) == (one.artifact, one.kind != "miss")


def test_an_artifact_that_is_not_decided_has_an_auroc_and_no_mistake(site: Path) -> None:
    weak = replace(HALF, decides=False)
    points = OperatingPoints(
        images=POINTS.images | {"motion": weak}, patients=POINTS.patients | {"motion": weak}
    )
    found = site_report(site, find_model(START, None), lambda: points)
    score = next(one for one in found.scores if one.artifact == "motion")
    assert 0 <= score.auroc <= 1
    assert (score.point, score.sensitivity, score.specificity, score.alarms_per_100) == (None,) * 4
    assert "motion" not in {one.artifact for one in found.mistakes}


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_folder_is_private_and_names_nobody(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lang: str
) -> None:
    out = tmp_path / "out"
    status, said, _ = typed(capsys, "site", "report", site / "site.yaml", "--out", out, "--lang", lang)
    assert status == 0
    assert max(map(columns_of, said.splitlines())) <= 80
    assert out.stat().st_mode & 0o777 == 0o700
    assert {one.name: one.stat().st_mode & 0o777 for one in out.iterdir()} == {
        "report.html": 0o600,
        "report.json": 0o600,
    }
    page, content = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert all(source.startswith("data:image/png") for source in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img ") == len(content["mistakes"]) > 0
    for text in (page, json.dumps(content), said):
        assert ".dcm" not in text
        assert str(site) not in text
    assert content["patients"]["train"] == 27
    assert f"{content['patients']['train']}" in page
    figures = {one["artifact"]: one["threshold_of"] for one in content["scores"]}
    assert set(figures.values()) == {"phantoms"}


def test_file_names_are_shown_when_asked_for(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--out", out, "--show-identifiers", "--format", "json")
    status, said, _ = typed(capsys, "site", "report", "--site", site, *words)
    assert status == 0
    mistakes = json.loads(said)["mistakes"]
    page = (out / "report.html").read_text()
    assert all((site / "images" / one["file"]).is_file() and one["file"] in page for one in mistakes)


def test_what_is_wrong_is_said_in_a_line(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(*words: Any) -> tuple[object, str]:
        status, said, err = typed(capsys, "site", "report", *words)
        assert said == ""
        lines = [line for line in err.splitlines() if line.startswith("fedqc: error [")]
        assert len(lines) == 1
        assert "fedqc: hint: " in err
        return status, lines[0]

    assert refused()[0] == 2, "no site here"
    for words, code in (
        ((tmp_path / "nowhere",), "no-such-site"),
        ((site, "--model", "latest"), "no-model"),
        ((site, "--model", tmp_path / "none.safetensors"), "no-model"),
        ((site, "--site", site), "bad-argument"),
        ((site, "--out", site / "images" / "out"), "bad-argument"),
        ((site, "--lang", "xx"), "bad-argument"),
    ):
        status, line = refused(*words)
        assert (status, code in line) == (2, True), line
    assert not (site / "images" / "out").exists()


def test_without_labelled_test_patients_nothing_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    write_site(site, "site", SITE_APPEARANCES[0], patients=10, seed=5)
    head, *rows = (site / "labels.csv").read_text().splitlines()
    (site / "labels.csv").write_text(
        "\n".join([f"{head},part", *(f"{row},train" for row in rows)]) + "\n", encoding="ascii"
    )
    monkeypatch.setattr(operating_point, "operating_points", lambda *how, **more: pytest.fail("too early"))
    status, said, err = typed(capsys, "site", "report", site, "--out", tmp_path / "out")
    assert (status != 0, said) == (True, "")
    assert "labels-missing" in err
    assert not (tmp_path / "out").exists()
