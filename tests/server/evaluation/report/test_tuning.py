"""The report shows how the settings of the private arms were chosen, where `auto` chose them."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.i18n import speaker
from common.plan import RunPlan
from server.evaluation.report.page import render, write_report
from server.evaluation.report.tuning import tuning_view
from server.evaluation.report.words import LANGUAGES
from server.run.tune import Setting, Tried, Tuning
from server.run_folder import EVALUATION, TUNING, RunFolder, tuning_digest, write_json
from tests.helpers.report_page import (
    HOSTILE,
    MANIFEST,
    PLAN,
    Texts,
    evaluation_of,
    section,
    tables,
    text_of,
)

SAY = speaker("en", LANGUAGES)
WHOLE = evaluation_of(("public", "federated_dp"))


def tried(rate: float, steps: int, worst: float, *, clip: float = 0.1, averaged: int = 1) -> Tried:
    setting = Setting(
        clip_norm=clip, learning_rate=rate / clip, steps_per_round=steps, average_rounds=averaged
    )
    return Tried(setting=setting, gains={"contrast": worst, "noise": worst + 0.04}, spread=0.0123)


CHOSEN = tried(3.0, 4, 0.0512)
FOUND = Tuning(
    chosen=CHOSEN,
    tried=[
        *(tried(rate, 1, gain) for rate, gain in ((1.0, 0.01), (3.0, 0.02), (10.0, 0.03))),
        *(tried(rate, 4, gain, averaged=3) for rate, gain in ((1.0, 0.011), (3.0, 0.012))),
        tried(1.0, 4, 0.041),
        CHOSEN,
        tried(10.0, 4, -7.0),
        tried(3.0, 4, 0.0498, clip=0.3),
    ],
    public={"contrast": 0.791, "noise": 0.803},
    start="ab" * 32,
    epsilon=2.0,
    sites=4,
    patients=200,
)
VALUES: dict[str, Any] = json.loads(json.dumps(FOUND.to_json()))


def plan_with(origin: str) -> RunPlan:
    return PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"origin": origin})})


OWN = plan_with(FOUND.origin)


@pytest.fixture(scope="module")
def shown() -> str:
    return section(render(WHOLE, MANIFEST, OWN, VALUES), "tuning")


def test_the_choice_is_shown_with_its_gains_settings_and_digests(shown: str) -> None:
    gains, settings, digests = tables(shown)
    assert gains[1:] == [
        ["contrast", "0.791", "+0.051 the smallest: it decided"],
        ["noise", "0.803", "+0.091"],
    ]
    assert ["Rate", "3"] in settings
    assert ["Steps per round", "4"] in settings
    assert [row[1] for row in digests] == ["ab" * 32, tuning_digest(VALUES), FOUND.origin]
    words = text_of(shown)
    assert "2 public rehearsals" in words
    assert "ε 2 at 4 sites of 200 patients each" in words
    assert "Not the choice of this plan" not in words


def test_a_line_a_number_of_steps_and_the_choice_in_a_ring(shown: str) -> None:
    lines = re.findall(r'<polyline points="([^"]*)".*?>(?:<title>(.*?)</title>)?</polyline>', shown)
    named = {title: points.split() for points, title in lines if title}
    assert {title: len(points) for title, points in named.items()} == {
        "1 step per round": 3,
        "4 steps per round": 3,  # other clips and averages are not on it
    }
    ring = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="9.5" fill="none"', shown)
    assert ring
    assert f"{ring[1]},{ring[2]}" in named["4 steps per round"]
    assert min(named["4 steps per round"], key=lambda point: float(point.split(",")[1])) == (
        f"{ring[1]},{ring[2]}"  # the largest gain is the highest
    )


def test_a_large_loss_stays_inside_the_figure(shown: str) -> None:
    height = float(re.search(r'viewBox="0 0 420 ([\d.]+)"', shown)[1])  # type: ignore[index]
    places = re.findall(r"[\d.]+,([\d.]+)", " ".join(re.findall(r'points="([^"]*)"', shown)))
    assert all(0 < float(y) < height - 40 for y in places)


def test_a_run_that_stated_its_settings_shows_nothing() -> None:
    page = render(WHOLE, MANIFEST, PLAN)
    assert 'id="tuning"' not in page
    assert "#tuning" not in page
    assert "rehearsal" not in page
    assert 'href="#tuning"' in render(WHOLE, MANIFEST, OWN, VALUES)


@pytest.mark.parametrize("origin", ["", "auto: start 0000, curve 0000000000000000"])
def test_a_choice_that_the_plan_does_not_name_is_said_to_be_foreign(origin: str) -> None:
    page = render(WHOLE, MANIFEST, plan_with(origin), VALUES)
    assert "Not the choice of this plan" in page
    changed = copy.deepcopy(VALUES)
    changed["tried"][0]["worst"] = 0.9
    assert not tuning_view(changed, OWN, SAY)["belongs"]


def test_hostile_words_are_shown_and_do_nothing() -> None:
    hostile = copy.deepcopy(VALUES)
    hostile["start"] = HOSTILE
    for owner in (hostile["public"], hostile["chosen"]["gains"]):
        owner[HOSTILE] = 0.02
    page = render(WHOLE, MANIFEST, plan_with(HOSTILE), hostile)
    assert "<script" not in page.lower()
    assert page.count("&lt;script&gt;") >= 3
    assert not any(name.startswith("on") for _, attributes in Texts(page).tags for name in attributes)


@pytest.mark.parametrize(
    "change",
    [
        {"tried": []},
        {"chosen": None},
        {"public": {}},
        {"public": {"contrast": 0.7}},
        {"epsilon": math.nan},
        {"sites": "four"},
        {"surprise": 1},
        {"chosen": VALUES["chosen"] | {"learning_rate": 0.0}},
        {"chosen": VALUES["chosen"] | {"learning_rate": 1e308, "clip_norm": 1e308}},
        {"chosen": VALUES["chosen"] | {"learning_rate": 1e-300, "clip_norm": 1e-300}},
    ],
)
def test_another_content_is_an_error_that_names_the_file(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tuning\.json") as caught:
        render(WHOLE, MANIFEST, OWN, VALUES | change)
    assert caught.value.code == "bad-tuning"


@pytest.mark.parametrize("tried_once", [1, 2])
def test_one_setting_and_equal_gains_are_drawn(tried_once: int) -> None:
    values = copy.deepcopy(VALUES | {"tried": [VALUES["chosen"]] * tried_once})
    values["chosen"]["worst"] = 0.0512
    assert "nan" not in tuning_view(values, OWN, SAY)["figure"]
    for one in (values["chosen"], *values["tried"]):
        one["worst"] = 0.0
    assert "nan" not in tuning_view(values, OWN, SAY)["figure"]


def test_the_report_of_a_folder_reads_its_file(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", OWN, MANIFEST, None, VALUES)
    write_json(folder.path / EVALUATION, WHOLE)
    assert tuning_digest(folder.tuning or {})[:16] in OWN.privacy.origin  # writing and reading keep each bit
    assert 'id="tuning"' in write_report(folder).read_text(encoding="utf-8")
    (folder.path / TUNING).write_text("[1, 2", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        write_report(folder)
    assert caught.value.code == "bad-tuning"
    (folder.path / TUNING).unlink()
    assert 'id="tuning"' not in write_report(folder).read_text(encoding="utf-8")
