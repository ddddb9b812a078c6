"""A plan is run once for each site, which is held out, and scored on the patients that it never trains on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from common.errors import PlanError
from server.run_folder import RunFolder
from server.simulation.leave_one_site_out import member_plans
from tests.helpers.command_line import typed
from tests.helpers.consortium import PATIENTS, SITES, tiny_plan, write_plan


def test_member_plans_differ_in_the_held_out_site_alone() -> None:
    study = tiny_plan(held_out=["hospital-d"], seed=9)
    plans = member_plans(study, SITES)
    assert [plan.held_out for plan in plans] == [*((site,) for site in SITES), ()]
    assert {plan.held_out_patients for plan in plans} == {"test"}
    assert len({plan.model_copy(update={"held_out": ()}).sha256() for plan in plans}) == 1


@pytest.mark.parametrize(("sites", "quorum"), [(2, 1), (3, 3)])
def test_too_few_sites_are_refused_before_a_run(sites: int, quorum: int) -> None:
    with pytest.raises(PlanError) as caught:
        member_plans(tiny_plan(federation={"quorum": quorum}), SITES[:sites])
    assert caught.value.code == "too-few-sites"


def test_each_site_is_left_out_once_and_the_study_is_continued(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path / "plan.yaml", training={"rounds": 1}, arms=["public", "federated"])
    out = tmp_path / "study"
    words = ("simulate", plan, "--leave-one-site-out", "--data", data, "--out", out, "--jobs", 1)
    status, said, talk = typed(capsys, *words, "--format", "json")
    assert status == 0, talk
    assert "5 runs: 4 sites, each left out once, and none. No arm is private." in talk
    results = json.loads(said)
    assert results["hospitals"] == list(SITES)
    assert set(results["scored_on"].values()) == {"test"}
    members = {tuple(member["held_out"]): member["trained"] for member in results["members"]}
    assert members == {(site,): [one for one in SITES if one != site] for site in SITES} | {(): list(SITES)}

    cells = sorted((out / "cells").iterdir())
    assert [cell.name for cell in cells] == [
        *(f"{number:03d}-{site}-seed-3" for number, site in enumerate(SITES)), "004-none-seed-3",
    ]  # fmt: skip
    runs = [RunFolder.open(cell) for cell in cells]
    for site, folder in zip(SITES, runs, strict=False):
        roles = {one["site"]: one["role"] for one in folder.manifest["sites"]}
        assert roles == {one: "held_out" if one == site else "training" for one in SITES}
        left_out = folder.evaluation["matrix"]["public"][site]
        at_home = runs[-1].evaluation["matrix"]["public"][site]
        assert left_out == at_home  # the same test patients, by a model that nobody trains
        assert (left_out["metal"]["n_pos"] or 0) + (left_out["metal"]["n_neg"] or 0) < PATIENTS

    before = {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("*")}
    (out / "results.json").unlink()
    status, said, talk = typed(capsys, *words)
    assert (status, "run 1 of 5" in talk) == (0, False)
    assert said.startswith("4 hospitals, each left out once")
    assert (out / "table.txt").read_text(encoding="utf-8").splitlines()[0] == said.splitlines()[0]
    assert json.loads((out / "results.json").read_text())["scores"] == results["scores"]
    assert {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("*")} == before

    status, _, talk = typed(capsys, *words, "--seed", 4)
    assert (status, "[other-sweep]" in talk) == (2, True)
    rounds = cells[0] / "arms" / "federated" / "rounds.jsonl"
    record = json.loads(rounds.read_text(encoding="utf-8"))
    rounds.write_text(json.dumps(record | {"answered": list(SITES)}) + "\n", encoding="utf-8")
    status, _, talk = typed(capsys, *words)
    assert (status, "[held-out-trained]" in talk) == (1, True)


def test_a_sweep_is_no_plan(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(tmp_path / "base.yaml")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        yaml.safe_dump({"name": "x", "plan": "base.yaml", "grid": {"image_size": [32]}, "seeds": [1]})
    )
    words = ("simulate", sweep, "--leave-one-site-out", "--data", data, "--out", tmp_path / "out")
    status, _, talk = typed(capsys, *words)
    assert (status, "[bad-argument]" in talk) == (2, True)
