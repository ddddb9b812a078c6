"""The packaged maps are what the command makes of a site whose label sheet has severities."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from client.predict import make_severity, severity
from client.predict.severity import maps_from
from client.simulation.phantom_sites import write_site
from common.artifacts import NAMES
from common.errors import DataError
from common.physics.appearance import SITE_APPEARANCES


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "site"
    write_site(folder, "site", SITE_APPEARANCES[0], patients=16, seed=3)
    return folder


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(severity, "LEAST_PEOPLE", 2)
    monkeypatch.setattr(severity, "LEAST_SLICES", 4)


def test_the_same_views_give_the_same_file_and_others_are_told_apart(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packaged = tmp_path / "maps.json"
    monkeypatch.setattr(make_severity, "PACKAGED", packaged)

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["make_severity", str(site), *more])
        return make_severity.main()

    assert run() == 0
    assert "sha256" in capsys.readouterr().out
    maps = maps_from(json.loads(packaged.read_text(encoding="ascii"))["maps"])
    assert maps
    assert set(maps) <= set(NAMES)
    for one in maps.values():
        assert one.origin == "people"
        assert len(one.logits) == len(one.severities)
        assert (np.diff(one.logits) > 0).all()
        assert (np.diff(one.severities) >= 0).all()
    assert run("--check") == 0
    packaged.write_text(packaged.read_text(encoding="ascii").replace("people", "persons"), encoding="ascii")
    assert run("--check") == 1
    assert "differs" in capsys.readouterr().out


def test_a_sheet_without_severities_is_refused(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    write_site(plain, "plain", SITE_APPEARANCES[0], patients=4, seed=3)
    sheet = (plain / "labels.csv").read_text(encoding="utf-8").splitlines()
    (plain / "labels.csv").write_text(
        "".join(",".join(line.split(",")[: len(NAMES) + 1]) + "\n" for line in sheet), encoding="utf-8"
    )
    with pytest.raises(DataError, match="no artifact of known severity"):
        make_severity.maps_of(plain)
