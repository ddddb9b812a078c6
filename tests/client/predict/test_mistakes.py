"""`predict --mistakes`: the worst contradictions of the labels, handed to readers without either answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import openpyxl
import pytest

from client.data.cohort import load_cohort
from client.predict.mistakes import WORST, worst_mistakes
from client.predict.model import START, find_model
from client.predict.operating_point import OperatingPoints
from client.predict.predict import predict
from client.simulation.phantom_sites import write_site
from common.artifacts import INDEX, NAMES
from common.errors import DataError
from common.physics.appearance import SITE_APPEARANCES
from tests.helpers.command_line import typed
from tests.helpers.predicted import POINT


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_site(tmp_path / "site", "site", SITE_APPEARANCES[0], patients=10, seed=5)
    return tmp_path / "site"


def test_the_worst_come_first_and_are_those_that_contradict_their_label(site: Path) -> None:
    point = replace(POINT, threshold=0.5)
    points = OperatingPoints(images=dict.fromkeys(NAMES, point), patients=dict.fromkeys(NAMES, point))
    found = predict(site, find_model(START, None), points, site=site)
    mistakes = worst_mistakes(found, site)
    cohort = load_cohort(site, labels=NAMES)
    logits = {}
    for study in found.studies:
        for series in study.series:
            for image in series.images:
                for one in image.findings:
                    logits[image.file, one.artifact] = one.logit
    for kind, label in (("miss", 1), ("false alarm", 0)):
        expected = []
        for record, labels in zip(cohort.records, cohort.labels, strict=True):
            for name in NAMES:
                logit = logits.get((record.file, name))
                if logit is not None and labels[INDEX[name]] == label and (logit >= 0.5) != bool(label):
                    expected.append(abs(logit - 0.5))
        own = [one.beyond for one in mistakes if one.kind == kind]
        assert own == pytest.approx(sorted(expected, reverse=True)[:WORST])
        assert own, "the threshold is wrong on purpose"


def test_readers_get_the_images_and_no_answer(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.cli import predict as command  # noqa: F401
    from client.predict import operating_point

    monkeypatch.delenv("FEDQC_SITE", raising=False)
    point = replace(POINT, threshold=0.5)
    points = OperatingPoints(images=dict.fromkeys(NAMES, point), patients=dict.fromkeys(NAMES, point))
    monkeypatch.setattr(operating_point, "operating_points", lambda *how, **more: points)
    out = tmp_path / "out"
    status, said, _ = typed(capsys, "predict", site, "--mistakes", "--out", out, "--format", "json")
    assert status == 0
    mistakes = json.loads(said)["mistakes"]
    images = {(one["study"], one["series"], one["image"]) for one in mistakes}
    books = sorted((out / "adjudication").iterdir())
    assert len(books) == 2
    book = openpyxl.load_workbook(books[0])
    texts = [str(cell.value) for sheet in book for row in sheet.iter_rows() for cell in row if cell.value]
    assert not any(text == "miss" or "false alarm" in text or ".dcm" in text for text in texts)
    assert len(book.worksheets[0]._images) == len(images)


def test_without_labels_there_are_no_mistakes(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(site, find_model(START, None), OperatingPoints(images={}, patients={}), site=site)
    lines = (site / "labels.csv").read_text().splitlines()
    blank = [",".join([line.split(",")[0], *[""] * line.count(",")]) for line in lines[1:]]
    (site / "labels.csv").write_text("\n".join([lines[0], *blank]) + "\n")
    with pytest.raises(DataError) as caught:
        worst_mistakes(found, site)
    assert caught.value.code == "labels-missing"
    assert typed(capsys, "predict", tmp_path, "--mistakes")[0] == 2, "no site"
