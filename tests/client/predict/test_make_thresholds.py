"""The packaged thresholds are what the command makes of labelled views, and hold for their model alone."""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from client.predict import make_thresholds, operating_point
from client.predict.model import START, find_model
from client.predict.operating_point import NONE, OperatingPoints, operating_points, packaged_points
from client.simulation.phantom_sites import write_site
from common.errors import ConfigError
from common.physics.appearance import SITE_APPEARANCES


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(operating_point, "LEAST_PATIENTS", 2)
    for module in (make_thresholds, operating_point):
        monkeypatch.setattr(module, "PACKAGED", tmp_path / "thresholds.json")
    packaged_points.cache_clear()
    return tmp_path / "thresholds.json"


def test_the_same_views_give_the_same_thresholds_and_they_come_before_those_of_phantoms(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_site(tmp_path / "site", "site", SITE_APPEARANCES[0], patients=16, seed=3)

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["make_thresholds", str(tmp_path / "site"), *more])
        return make_thresholds.main()

    assert run("--check") == 1
    assert run() == 0
    digest = sha256(packaged.read_bytes()).hexdigest()
    assert digest in capsys.readouterr().out
    assert run("--check") == 0
    model = find_model(START, None)
    assert packaged_points(model.sha256) is NONE, "no hash is pinned"
    packaged_points.cache_clear()
    monkeypatch.setattr(operating_point, "PACKAGED_SHA256", digest)
    made = packaged_points(model.sha256)
    assert made.patients
    assert {point.origin for point in (*made.images.values(), *made.patients.values())} == {"people"}

    drawn = OperatingPoints(
        images=dict.fromkeys(model.learned, "of phantoms"),
        patients=dict.fromkeys(model.learned, "of phantoms"),
    )
    monkeypatch.setattr(operating_point, "_kept", lambda *_: drawn)
    found = operating_points(model, cache=tmp_path / "points")
    assert found.patients == drawn.patients | made.patients
    assert found.severities == made.severities
    assert operating_points(model, people=False, cache=tmp_path / "points") == drawn

    assert packaged_points("0" * 64) is NONE
    packaged.write_text(json.dumps(json.loads(packaged.read_text()) | {"more": 1}))
    packaged_points.cache_clear()
    with pytest.raises(ConfigError) as caught:
        packaged_points(model.sha256)
    assert caught.value.code == "damaged-installation"
    packaged_points.cache_clear()
