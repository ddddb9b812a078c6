"""A sweep runs each plan of its grid with each seed once; its table says what would decide a difference."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from scipy.stats import norm

from common.errors import FedqcError
from common.plan import changed_values, plan_values, read_plan
from server.evaluation.sweep_table import POWER, against, to_decide
from server.run_folder import RunFolder
from server.simulation.sweep import Sweep, is_sweep, parse_sweep
from tests.helpers.command_line import ROOT, typed
from tests.helpers.consortium import HELD_OUT, TRAINING, write_plan
from tests.helpers.evaluations import empty_evaluation

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def sweep_file(folder: Path, **changes: Any) -> Path:
    write_plan(folder / "base.yaml", training={"rounds": 1})
    values = {
        "name": "rates",
        "question": "Which rate?",
        "plan": "base.yaml",
        "grid": {"training.learning_rate": [0.001, 0.01]},
        "seeds": [1, 2],
    } | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def parsed(path: Path, **how: Any) -> Sweep:
    return parse_sweep(plan_values(path), path, **how)


def test_a_grid_has_a_plan_for_every_combination_and_seed(tmp_path: Path) -> None:
    grid = {
        "training.loss_args": {"little": {"alpha": 0.9, "beta": 0.1}, "much": {"alpha": 0.1, "beta": 0.9}},
        "model.name": ["small_cnn", "cnn_2d"],
    }
    path = sweep_file(tmp_path, grid=grid, set={"training.loss": "bce_dice", "model.initial": "random"})
    cells = parsed(path, changes={"training.rounds": 4}).cells
    assert [(cell.setting, *cell.labels.values(), cell.plan.seed) for cell in cells] == [
        (number, loss, network, seed)
        for number, (loss, network) in enumerate(
            [("little", "small_cnn"), ("little", "cnn_2d"), ("much", "small_cnn"), ("much", "cnn_2d")]
        )
        for seed in (1, 2)
    ]
    last = cells[-1].plan
    assert (last.training.loss_args, last.training.rounds) == ({"alpha": 0.1, "beta": 0.9}, 4)
    assert (last.model.name, last.model.initial, last.held_out) == ("cnn_2d", "random", (HELD_OUT,))
    assert len({cell.folder for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("changes", "how", "code", "says"),
    [
        ({"grid": {"training.rate": [1]}}, {}, "bad-plan", "unknown key `training.rate`"),
        ({"grid": {"training.rounds": [1, 0]}}, {}, "bad-plan", "training.rounds = 0"),
        ({"grid": {}}, {}, "bad-sweep", "grid"),
        ({"grid": {"training.rounds": []}}, {}, "bad-sweep", "grid.training.rounds has no values"),
        ({"grid": {"seed": [1]}}, {}, "bad-sweep", "seed is no key of a grid"),
        ({"grid": {"name.first": ["x"]}}, {}, "bad-plan", "name is no mapping"),
        ({"seeds": []}, {}, "bad-sweep", "seeds"),
        ({"seeds": [1, 1]}, {}, "bad-sweep", "seeds names one twice"),
        ({"jobs": 3}, {}, "bad-sweep", "unknown key `jobs`"),
        ({"plan": "nowhere.yaml"}, {}, "no-such-plan", "nowhere.yaml"),
        ({"seeds": list(range(51))}, {}, "too-many-cells", "102 runs"),
        ({}, {"max_cells": 3}, "too-many-cells", "4 runs, at most 3"),
        ({}, {"changes": {"training.learning_rate": 1.0}}, "bad-sweep", "the grid gives its values"),
    ],
)
def test_a_sweep_is_refused_before_anything_is_run(
    changes: dict[str, Any], how: dict[str, Any], code: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(FedqcError) as caught:
        parsed(sweep_file(tmp_path, **changes), **how)
    assert caught.value.code == code
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_many_cells_may_be_asked_for(tmp_path: Path) -> None:
    assert len(parsed(sweep_file(tmp_path, seeds=list(range(51))), max_cells=102).cells) == 102


def test_changed_values_leave_the_original_as_it_was() -> None:
    values = {"name": "x", "training": {"rounds": 2}}
    changed = changed_values(values, {"training.rounds": 3, "model.name": "cnn_2d"})
    assert changed == {"name": "x", "training": {"rounds": 3}, "model": {"name": "cnn_2d"}}
    assert values == {"name": "x", "training": {"rounds": 2}}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_shipped_sweep_is_one(path: Path) -> None:
    from server.run.conduct import check_names

    assert is_sweep(plan_values(path))
    sweep = parsed(path)
    assert len({cell.plan.seed for cell in sweep.cells}) >= 3
    for setting in {cell.setting: cell.plan for cell in sweep.cells}.values():
        check_names(setting)


def test_a_sweep_is_run_once_and_makes_one_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweep_file(tmp_path), tmp_path / "out"
    words = ("simulate", path, "--data", data, "--out", out, "--jobs", 1)
    status, said, talk = typed(capsys, *words, "--format", "json")
    assert status == 0, talk
    results = json.loads(said)
    assert (results["runs"], results["seeds"], results["private_arms"]) == (4, [1, 2], [])
    cells = sorted((out / "cells").iterdir())
    assert [cell.name for cell in cells] == [
        "000-0.001-seed-1", "000-0.001-seed-2", "001-0.01-seed-1", "001-0.01-seed-2",
    ]  # fmt: skip
    scores: list[Any] = [RunFolder.open(cell).evaluation["scores"]["federated"]["unseen"] for cell in cells]
    first, second = [row for row in results["rows"] if row["where"] == "unseen"]
    assert first["per_seed"] == [scores[0]["value"], scores[1]["value"]]
    assert first["value"] == pytest.approx((scores[0]["value"] + scores[1]["value"]) / 2)
    assert first["against_first"] is None
    differences = [scores[2]["value"] - scores[0]["value"], scores[3]["value"] - scores[1]["value"]]
    assert second["against_first"]["per_seed"] == pytest.approx(differences)
    assert second["against_first"]["value"] == pytest.approx(sum(differences) / 2)
    evaluation = RunFolder.open(cells[0]).evaluation
    patients: Any = evaluation["metrics"]["federated"][HELD_OUT]
    assert first["patients"] == sum(
        patients[name]["n_pos"] + patients[name]["n_neg"] for name in ("metal", "motion")
    )
    assert all(not list(cell.rglob("checkpoints")) for cell in cells)
    rows = csv.DictReader(io.StringIO((out / "table.csv").read_text(encoding="utf-8")))
    assert {(row["learning_rate"], row["where"]) for row in rows} >= {("0.001", "unseen"), ("0.01", "unseen")}
    assert "| 0.01 | federated | unseen |" in (out / "table.md").read_text(encoding="utf-8")
    for name in ("plot.png", "roc.png"):
        assert Image.open(out / name).size[0] == 2000
    assert "data:image/png;base64," in (out / "report.html").read_text(encoding="utf-8")

    before = {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("*")}
    status, said, talk = typed(capsys, *words, "--format", "json")
    assert (status, json.loads(said)["rows"]) == (0, results["rows"])
    assert {file: file.stat().st_mtime_ns for cell in cells for file in cell.rglob("*")} == before
    assert "run 1 of 4" not in talk

    status, _, talk = typed(capsys, *words, "--set", "training.local_epochs=2")
    assert (status, "[other-sweep]" in talk) == (2, True)
    status, _, talk = typed(capsys, "simulate", path, "--data", data, "--out", cells[0])
    assert (status, "[run-exists]" in talk) == (2, True)


def test_a_sweep_on_data_that_changed_makes_no_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = sweep_file(tmp_path, grid={"training.learning_rate": [0.001]}), tmp_path / "out"
    words = ("simulate", path, "--data", data, "--out", out, "--jobs", 1)
    assert typed(capsys, *words)[0] == 0
    (out / "cells" / "000-0.001-seed-2" / "evaluation.json").unlink()
    site = data / TRAINING[0] / "site.yaml"
    values = yaml.safe_load(site.read_text(encoding="utf-8")) | {"split": {"train": 0.5, "test": 0.5}}
    site.write_text(yaml.safe_dump(values), encoding="utf-8")
    status, _, talk = typed(capsys, *words)
    assert (status, "error [" in talk) != (0, False)
    assert not (out / "cells" / "000-0.001-seed-2" / "evaluation.json").exists()


def test_a_key_of_a_plan_is_set_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = write_plan(tmp_path / "plan.yaml"), tmp_path / "run"
    words = ("simulate", plan, "--data", data, "--out", out, "--jobs", 1)
    status, _, talk = typed(capsys, *words, "--set", "training.rounds=1", "--set", "arms=[public, federated]")
    assert status == 0, talk
    made = read_plan(out / "plan.yaml")
    assert (made.training.rounds, made.arms) == (1, ("public", "federated"))
    for bad, code in (("rounds", "bad-argument"), ("training.turns=1", "bad-plan"), ("a=[", "bad-argument")):
        status, _, talk = typed(capsys, *words[:-4], "--out", tmp_path / "no", "--set", bad)
        assert (status, f"[{code}]" in talk) == (2, True), talk
    status, _, talk = typed(
        capsys, "simulate", sweep_file(tmp_path), "--data", data, "--out", tmp_path / "no", "--seed", 3
    )
    assert (status, "[bad-argument]" in talk) == (2, True)
    assert not (tmp_path / "no").exists()


def test_what_would_decide_a_difference() -> None:
    """With the stated patients and seeds, the variance is what power 0.8 at level 0.05 asks for."""
    difference, error, deviation, patients = 0.04, 0.03, 0.05, 90
    found = to_decide(difference, error, deviation, patients=patients)
    assert found is not None
    variance = error**2 * patients / found[0] + deviation**2 / found[1]
    power = norm.cdf(difference / math.sqrt(variance) - norm.ppf(0.975))
    assert power == pytest.approx(POWER, abs=0.01)
    assert to_decide(-difference, error, deviation, patients=patients) == found
    twice = to_decide(2 * difference, error, 0.0, patients=patients)
    assert twice == (pytest.approx(found[0] / 4, abs=1), 2)
    assert to_decide(0.0, error, deviation, patients=patients) is None
    assert to_decide(difference, math.nan, deviation, patients=patients) is None


@pytest.mark.parametrize(
    ("shift", "error", "verdict"), [(0.1, 0.01, "better"), (-0.1, 0.01, "worse"), (0.1, 0.2, "undecided")]
)
def test_a_verdict_needs_an_interval_without_zero(shift: float, error: float, verdict: str) -> None:
    """By hand: three seeds that differ by shift - .01, shift and shift + .01."""
    first, own = (
        [
            empty_evaluation(["alder"], [])
            | {"scores": {"federated": {"home": {"value": 0.7 + more, "standard_error": error}}}}
            for more in (of - 0.01 * spread, of, of + 0.01 * spread)
        ]
        for of, spread in ((0.0, 0), (shift, 1))
    )
    found = against(own, first, "federated", "home", patients=50)
    assert found is not None
    half = math.hypot(1.959964 * error * math.sqrt(2), 4.302653 * 0.01 / math.sqrt(3))
    assert (found["value"], found["deviation"]) == (pytest.approx(shift), pytest.approx(0.01))
    assert (found["low"], found["high"]) == (pytest.approx(shift - half), pytest.approx(shift + half))
    assert found["verdict"] == verdict
    assert found["on_these_patients"] == ("worse" if shift < 0 else "better")
    assert found["decided_by"] == to_decide(shift, error * math.sqrt(2), found["deviation"], patients=50)


def test_a_sweep_of_other_plans_is_another(tmp_path: Path) -> None:
    one, other = parsed(sweep_file(tmp_path)), parsed(sweep_file(tmp_path), changes={"image_size": 64})
    assert one.sha256() == parsed(sweep_file(tmp_path)).sha256() != other.sha256()
