"""Severity from a logit: the map by hand, what it must beat, where it comes from, where it is said."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.predict import operating_point, severity
from client.predict.files import csv_text, public
from client.predict.model import START, Model, find_model
from client.predict.operating_point import OperatingPoints, Point, operating_points
from client.predict.page import render
from client.predict.predict import Finding, Predictions, predict
from client.predict.severity import (
    GRADES,
    LEAST_PEOPLE,
    LEAST_SLICES,
    PACKAGED,
    SeverityMap,
    grade_of,
    maps_from,
    packaged_maps,
    rising,
    severity_map,
    severity_maps,
)
from client.predict.text import report_text
from client.predict.words import LANGUAGES
from client.simulation.phantom_sites import write_site
from common.artifacts import DEFAULT_LABELS, MODALITIES, NAMES
from common.errors import ConfigError
from common.i18n import speaker
from common.physics.appearance import PUBLIC_APPEARANCES, SITE_APPEARANCES
from common.public_phantoms import draw
from common.public_slices import Slices

MAP = SeverityMap(
    origin="phantoms",
    logits=(-60.0, 0.0, 60.0),
    severities=(0.0, 0.5, 1.0),
    slices=120,
    people=50,
    error=0.12,
    mean_error=0.25,
    right=0.7,
    usual_right=0.4,
    grades=True,
)
POINT = Point(
    origin="phantoms",
    threshold=-50.0,
    sensitivity=0.9,
    specificity=0.95,
    positives=20,
    negatives=30,
    slope=1.0,
    offset=0.0,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model(START, None)


def test_the_map_rises_and_pools_what_does_not_by_hand() -> None:
    logits, severities = rising(np.array([4.0, 1, 3, 2, 1]), np.array([0.9, 0.0, 0.3, 0.5, 0.2]))
    assert logits.tolist() == [1, 2, 3, 4]
    assert severities.tolist() == pytest.approx([0.1, 0.4, 0.4, 0.9])
    flat = rising(np.arange(9.0), np.full(9, 0.5))
    assert flat[0].tolist() == [0, 8], "of a step only its ends are kept"


def test_grades_are_thirds() -> None:
    assert [grade_of(one) for one in (0, 0.33, 0.34, 0.66, 0.67, 1)] == [
        name for name in GRADES for _ in range(2)
    ]


def people_of(people: int, slices: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that rise with severity but for noise of each slice, severities, people."""
    rng = np.random.default_rng(3)
    severities = rng.uniform(0, 1, people * slices)
    logits = 8 * severities - 3 + rng.normal(0, 8 * noise, people * slices)
    return logits, severities, np.repeat(np.arange(people), slices)


def test_a_logit_that_rises_with_severity_grades_and_states_its_error() -> None:
    found = severity_map(*people_of(100, 4, 0.1), "people")
    assert found is not None
    assert found.grades
    assert found.error == pytest.approx(0.08, abs=0.02), "the mean size of the noise"
    assert found.mean_error == pytest.approx(0.25, abs=0.02)
    assert (found.slices, found.people, found.origin) == (400, 100, "people")
    # 0.16 of the slices cross one of the two bounds
    assert (found.right, found.usual_right) == pytest.approx((0.84, 0.35), abs=0.05)
    assert found.severity(8 * 0.5 - 3) == pytest.approx(0.5, abs=0.1)
    assert found.severity(-99.0) == pytest.approx(0, abs=0.1)
    assert found.severity(float("nan")) is None


def test_a_logit_that_says_nothing_of_severity_gives_no_grade() -> None:
    """The control: the same numbers, shuffled."""
    logits, severities, people = people_of(100, 4, 0.1)
    found = severity_map(np.random.default_rng(4).permutation(logits), severities, people, "people")
    assert found is not None
    assert not found.grades
    assert found.severity(0.0) is None


def test_the_most_common_grade_is_taken_from_all_slices_so_that_it_is_hard_to_beat() -> None:
    """As many of each grade: found on other people, the most common one would be that which is rare here."""
    logits = np.random.default_rng(6).normal(size=60)
    found = severity_map(logits, np.tile([0.1, 0.5, 0.9], 20), np.arange(60), "people")
    assert found is not None
    assert found.usual_right == pytest.approx(1 / 3)


def test_the_error_is_that_of_people_whom_the_map_has_not_seen() -> None:
    """Each person has a logit and a severity of their own, unrelated: slices left out one by one would be
    found again.
    """
    rng = np.random.default_rng(5)
    logits, severities = (np.repeat(rng.permutation(40) / 40, 10) for _ in range(2))
    found = severity_map(logits, severities, np.repeat(np.arange(40), 10), "people")
    assert found is not None
    assert found.error > 0.2
    assert not found.grades


@pytest.mark.parametrize(
    ("people", "slices"), [(LEAST_PEOPLE - 1, LEAST_SLICES), (LEAST_SLICES - 1, 1), (0, 0)]
)
def test_too_few_severities_give_no_map(people: int, slices: int) -> None:
    assert severity_map(*people_of(people, slices, 0.1), "site") is None


def test_slices_of_unknown_severity_and_without_the_artifact_take_no_part() -> None:
    logits, severities, people = people_of(60, 2, 0.1)
    labels = np.full((120, len(DEFAULT_LABELS)), np.nan, np.float32)
    labels[:, 0] = 1
    labels[::10, 0] = 0
    told = np.full((120, len(DEFAULT_LABELS)), np.nan, np.float32)
    told[:, 0] = severities
    told[1::10, 0] = np.nan
    slices = Slices(
        images=np.zeros((120, 1, 1), np.int16),
        modality=np.zeros(120, np.int8),
        labels=labels,
        patients=people,
        severities=told,
    )
    maps = severity_maps(np.tile(logits[:, None], len(DEFAULT_LABELS)), slices, "site")
    assert list(maps) == [NAMES[0]]
    assert maps[NAMES[0]].slices == 120 - 24
    assert severity_maps(logits, replace(slices, severities=None), "site") == {}


def test_phantoms_know_how_severe_they_are() -> None:
    drawn = draw(PUBLIC_APPEARANCES, 12, 5, 32)
    assert drawn.severities is not None
    present = drawn.labels == 1
    assert present.any()
    assert np.isnan(drawn.severities[~present]).all()
    assert ((drawn.severities[present] > 0) & (drawn.severities[present] <= 1)).all()


def test_the_maps_of_the_public_start_come_with_fedqc(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = packaged_maps(model.sha256)
    value = json.loads(PACKAGED.read_text(encoding="ascii"))
    assert value["model_sha256"] == model.sha256, "made for another start: see docs/predict.md"
    assert maps == maps_from(value["maps"])
    assert set(maps) <= set(NAMES)
    assert {one.origin for one in maps.values()} == {"people"}
    assert all(one.error < one.mean_error for one in maps.values() if one.grades)
    assert any(one.grades for one in maps.values())
    for one in maps.values():
        assert (np.diff(one.logits) > 0).all()
        assert (np.diff(one.severities) >= 0).all()
    assert packaged_maps("0" * 64) == {}
    monkeypatch.setattr(severity, "PACKAGED_SHA256", "0" * 64)
    packaged_maps.cache_clear()
    with pytest.raises(ConfigError, match="not the file that this version"):
        packaged_maps(model.sha256)
    packaged_maps.cache_clear()


def labelled(patients: int, size: int, noise: float = 0.0) -> Slices:
    """MR noise; motion in every second patient, more severe from patient to patient."""
    rng = np.random.default_rng(5)
    outputs = len(find_model(START, None).labels)
    labels, severities = (np.full((patients, outputs), np.nan, np.float32) for _ in range(2))
    motion = NAMES.index("motion")
    labels[:, motion] = np.arange(patients) % 2
    severities[1::2, motion] = np.linspace(0.05, 1, patients // 2)
    return Slices(
        images=rng.integers(0, 4096, (patients, size, size)).astype(np.int16),
        modality=np.full(patients, MODALITIES.index("MR"), np.int8),
        labels=labels,
        patients=np.arange(patients),
        severities=severities,
    )


def test_a_model_of_a_run_gets_its_map_from_phantoms_of_all_severities_and_keeps_it(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[float, float] | None] = []

    def fake(
        patients: int, seed: int, size: int, artifacts: object, severities: tuple[float, float] | None = None
    ) -> Slices:
        drawn.append(severities)
        return labelled(120, size)

    def rises(network: object, images: np.ndarray, *rest: object) -> np.ndarray:
        told = labelled(len(images), 1).severities
        assert told is not None
        return np.nan_to_num(told, nan=-9.0)

    monkeypatch.setattr(operating_point, "draw", fake)
    monkeypatch.setattr(operating_point, "score", rises)
    other = replace(model, sha256="1" * 64)
    found = operating_points(other, cache=tmp_path)
    assert found.severities["motion"].origin == "phantoms"
    assert found.severities["motion"].grades
    assert drawn == [None, (0.05, 1.0)], "the phantoms of the thresholds show nothing weak"
    assert operating_points(other, cache=tmp_path) == found
    assert len(drawn) == 2
    start = operating_points(model, cache=tmp_path)
    assert len(drawn) == 3, "the public start brings its maps"
    assert start.severities == packaged_maps(model.sha256)


def test_a_sites_own_severities_come_first(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: the label sheet of a site, its split and cache."""
    monkeypatch.setattr(operating_point, "draw", lambda patients, seed, size, *how: labelled(24, size))
    monkeypatch.setattr(operating_point, "LEAST_PATIENTS", 2)
    monkeypatch.setattr(severity, "LEAST_PEOPLE", 2)
    monkeypatch.setattr(severity, "LEAST_SLICES", 4)
    site = tmp_path / "site"
    write_site(site, "site", SITE_APPEARANCES[0], patients=24, seed=3)
    operating_point.load_cohort(site / "site.yaml", size=model.size)
    found = operating_points(model, site=site, cache=tmp_path / "points")
    own = {name for name, one in found.severities.items() if one.origin == "site"}
    assert own
    assert own <= set(found.origins["site"])
    (site / "labels.csv").write_text(
        "".join(
            ",".join(line.split(",")[: len(DEFAULT_LABELS) + 1]) + "\n"
            for line in (site / "labels.csv").read_text().splitlines()
        )
    )
    told = operating_points(model, site=site, cache=tmp_path / "points")
    assert not any(one.origin == "site" for one in told.severities.values()), "the sheet has none any more"


def test_only_what_is_called_present_has_a_severity() -> None:
    found = Finding(artifact="motion", logit=20.0, point=POINT, severity_map=MAP)
    assert found.severity == pytest.approx(0.5 + 1 / 6)
    assert found.grade == "severe"
    assert replace(found, logit=-55.0).severity is None, "absent"
    assert replace(found, point=replace(POINT, decides=False)).grade is None, "open"
    assert replace(found, severity_map=replace(MAP, grades=False)).grade is None
    assert replace(found, severity_map=None).grade is None


@pytest.fixture(scope="module")
def judged(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Predictions:
    folder = tmp_path_factory.mktemp("phantoms")
    write_site(folder, "site", SITE_APPEARANCES[0], patients=4, seed=3)
    points = dict.fromkeys(NAMES, POINT)
    none = replace(MAP, grades=False)
    maps = {name: none if name == "motion" else MAP for name in NAMES if name != "chemical_shift"}
    return predict(folder / "images", model, OperatingPoints(images=points, patients=points, severities=maps))


def test_csv_and_json_give_severity_and_grade(judged: Predictions) -> None:
    rows = [row for row in csv.DictReader(io.StringIO(csv_text(judged, names=False))) if row["artifact"]]
    graded = [row for row in rows if row["grade"]]
    assert {row["artifact"] for row in rows} - {row["artifact"] for row in graded} >= {
        "motion",
        "chemical_shift",
    }
    assert graded
    for row in graded:
        expected = float(np.interp(float(row["logit"]), MAP.logits, MAP.severities))
        assert float(row["severity"]) == pytest.approx(expected, abs=0.006)
        assert row["grade"] == grade_of(expected)
    content = public(judged, names=False)
    assert content["severity"]["metal"] == {
        "origin": "phantoms",
        "slices": 120,
        "people": 50,
        "error": 0.12,
        "mean_error": 0.25,
        "right": 0.7,
        "usual_right": 0.4,
        "grades": True,
    }
    found = [one for study in content["studies"] for one in study["findings"]]
    assert {one["grade"] for one in found if one["artifact"] == "motion"} <= {None}
    assert any(one["grade"] in GRADES for one in found)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_table_and_page_say_the_grade_and_what_it_rests_on(judged: Predictions, language: str) -> None:
    say = speaker(language, LANGUAGES)
    text, page = report_text(judged, say), render(judged, language)
    grade = next(
        finding.grade for study in judged.studies for finding in study.findings if finding.grade is not None
    )
    figures = {"error": "0.12", "mean": "0.25", "right": "70", "usual": "40"}
    sentences = [
        say("severity.error", artifact="*", where="*", **figures).split("*")[1],
        say("severity.phantoms", slices=120, people=50),
        say("severity.thirds").split(".")[0].split("。")[0],
        say("severity.unknown", artifact="*").split("*")[1],
        say("severity.none", artifact="*", where="*", **figures).split("*")[1],
    ]
    for shown in (text, page):
        for sentence in (say(grade), *sentences):
            assert "".join(sentence.split()) in "".join(shown.replace("&#39;", "'").split())
    assert f"<td>{say(grade)}</td>" in page
    assert page.count('class="positive"') == sum(
        bool(one.positive) for study in judged.studies for series in study.series for one in series.findings
    )
