from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from client.site.approvals import approve, is_approved
from common.errors import ConfigError
from common.plan import parse_plan

PLAN = parse_plan({"name": "demo"})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    text = "name: hospital-a\nkind: hospital\ncohort: c\nnominal_patients: 200\n"
    (tmp_path / "site.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "state").mkdir()
    return tmp_path


def test_exactly_the_approved_plan_is_approved(site: Path) -> None:
    assert not is_approved(site / "state", PLAN.sha256())
    approve(site, PLAN)
    assert is_approved(site / "state", PLAN.sha256())
    assert not is_approved(site / "state", parse_plan({"name": "demo", "seed": 8}).sha256())


def test_an_approval_says_when_and_who_and_the_first_one_stays(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUDO_USER", "dr-li")
    path = approve(site, PLAN)
    note = json.loads(path.read_text(encoding="utf-8"))
    assert (note["by"], note["plan"], note["plan_sha256"]) == ("dr-li", "demo", PLAN.sha256())
    assert note["at"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.setenv("SUDO_USER", "somebody-else")
    assert json.loads(approve(site, PLAN).read_text(encoding="utf-8")) == note


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan_sha256": "0"}', "null"])
def test_a_damaged_note_approves_nothing(text: str, site: Path) -> None:
    path = approve(site, PLAN)
    path.write_text(text, encoding="utf-8")
    assert not is_approved(site / "state", PLAN.sha256())


def test_a_note_of_another_plan_approves_nothing(site: Path) -> None:
    other = parse_plan({"name": "other"})
    approve(site, PLAN).rename(site / "state" / "approvals" / f"{other.sha256()}.json")
    assert not is_approved(site / "state", other.sha256())


@pytest.mark.parametrize("asked", ["", "../site", "0" * 63, "A" * 64, "0" * 64 + "/..", "0" * 64 + "\n"])
def test_what_is_no_hash_is_not_looked_up(asked: str, site: Path) -> None:
    assert not is_approved(site / "state", asked)


def test_a_folder_that_is_no_site_approves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        approve(tmp_path, PLAN)
    assert caught.value.code == "no-such-site"
