"""A site has one split, from its first run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.site.config import read_site
from client.site.split import SPLIT, SiteSplit, fix_split, split_of_site
from common.errors import ConfigError, RefusedError
from common.plan import DEFAULT_SPLIT, Split

OWN, OTHER = Split(train=0.6, test=0.4), Split(train=0.5, test=0.5)


def site(folder: Path, split: str = "", *, joined: bool = False) -> Path:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    text = "name: a\nkind: hospital\ncohort: c\nnominal_patients: 50\n"
    (folder / "site.yaml").write_text(text + (f"split: {split}\n" if split else ""))
    if joined:
        (folder / "state" / "coordinator.json").write_text("{}")
    return folder


def of(folder: Path, plan: Split | None = None, *, run: bool = False) -> SiteSplit:
    config, where = read_site(folder)
    split = split_of_site(config, where, plan)
    if run:
        fix_split(config, where, split)
    return split


def test_the_site_decides_and_a_plan_that_names_none_follows(tmp_path: Path) -> None:
    folder = site(tmp_path, "{train: 0.6, test: 0.4}")
    for plan in (None, Split(), OWN):
        assert of(folder, plan) == SiteSplit(shares=(0.6, 0.0, 0.4), origin="site.yaml")
    with pytest.raises(RefusedError) as caught:
        of(folder, OTHER)
    assert (caught.value.code, caught.value.exit_status) == ("split-differs", 4)
    assert caught.value.public_reason == "the plan's split is not this site's (train 0.6, test 0.4)"


def test_without_a_split_of_its_own_a_simulation_may_try_several(tmp_path: Path) -> None:
    folder = site(tmp_path)
    assert of(folder).shares == DEFAULT_SPLIT
    for plan in (OWN, OTHER, Split(train=0.7, validation=0.2, test=0.1)):
        assert of(folder, plan, run=True) == SiteSplit(
            shares=(plan.train, plan.validation, plan.test), origin="plan"
        )
    assert not (folder / "state" / SPLIT).exists()


def test_an_edit_after_the_first_run_is_refused_and_the_remedy_named(tmp_path: Path) -> None:
    folder = site(tmp_path, "{train: 0.6, test: 0.4}")
    of(folder)
    site(folder, "{train: 0.5, test: 0.5}")
    of(folder, run=True)  # nothing had been run with the first
    site(folder, "{train: 0.6, test: 0.4}")
    with pytest.raises(ConfigError) as caught:
        of(folder)
    assert caught.value.code == "split-fixed"
    assert "{train: 0.5, test: 0.5}" in caught.value.hint
    site(folder)  # the key removed: the first run's split stays
    assert of(folder) == SiteSplit(shares=(0.5, 0.0, 0.5), origin="first run")
    with pytest.raises(RefusedError):
        of(folder, OWN)


def test_a_site_of_an_earlier_version_keeps_the_split_of_its_next_run(tmp_path: Path) -> None:
    folder = site(tmp_path, joined=True)
    assert of(folder, OWN, run=True).origin == "plan"
    assert of(folder, Split()) == SiteSplit(shares=(0.6, 0.0, 0.4), origin="first run")
    with pytest.raises(RefusedError):
        of(folder, OTHER)


def test_a_damaged_record_stops_the_site(tmp_path: Path) -> None:
    folder = site(tmp_path)
    for text in ("", "[]", '{"train": 2, "validation": 0, "test": 0}', "\x00"):
        (folder / "state" / SPLIT).write_text(text)
        with pytest.raises(ConfigError) as caught:
            of(folder)
        assert caught.value.code == "bad-split"


@pytest.mark.parametrize(
    "split", ["{train: 0.6}", "{train: 0.6, test: 0.5}", "0.7", "{train: 1.2, test: -0.2}"]
)
def test_shares_in_site_yaml_are_checked(tmp_path: Path, split: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_site(site(tmp_path, split))
    assert caught.value.code == "bad-site"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[metal, motion]", ("metal", "motion")),
        ("[motion, metal]", ("metal", "motion")),
        ("[金属伪影, ghosting]", ("metal", "motion")),
        ("[]", ()),
        ("", None),
    ],
)
def test_what_was_assessed_is_declared_by_known_names(
    tmp_path: Path, text: str, names: tuple[str, ...] | None
) -> None:
    with (site(tmp_path) / "site.yaml").open("a", encoding="utf-8") as file:
        file.write(f"assessed: {text}\n")
    assert read_site(tmp_path)[0].assessed == names


@pytest.mark.parametrize("text", ["metal", "[zebra]", "[metal, metal]", "[1]", "{metal: 1}"])
def test_an_unknown_artifact_is_not_assessed(tmp_path: Path, text: str) -> None:
    with (site(tmp_path) / "site.yaml").open("a", encoding="utf-8") as file:
        file.write(f"assessed: {text}\n")
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path)
    assert (caught.value.code, "assessed" in caught.value.message) == ("bad-site", True)
