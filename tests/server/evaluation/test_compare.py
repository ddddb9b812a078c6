"""Comparing runs: seeds are pooled with an honest interval, different plans are never called paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from common.plan import Privacy, RunPlan
from server.evaluation.compare import compare_runs, compare_table, pooled, pooled_scores
from server.run_folder import EVALUATION, RunFolder, write_json
from tests.helpers.evaluations import empty_evaluation

CLAIM = {
    "epsilon": 7.901,
    "epsilon_pld": 7.5,
    "delta": 1e-5,
    "noise_multiplier": 1.0,
    "unit": "patient",
    "adjacency": "add/remove",
    "refused": None,
}
T_TWO_DEGREES = 4.302652729911275  # t table, .975, 2 degrees of freedom
PLAN = RunPlan(name="demo", arms=("local", "federated"), held_out=("dune",))
NOTHING = {"value": None, "low": None, "high": None, "standard_error": None}
NO_SCORE = NOTHING | {"logit": None, "logit_standard_error": None}


def estimate(value: float, error: float) -> Any:
    return {
        "value": value,
        "low": value - 1.96 * error,
        "high": value + 1.96 * error,
        "standard_error": error,
    }


def score(value: float, error: float) -> Any:
    inside = value * (1 - value)
    return estimate(value, error) | {
        "logit": math.log(value / (1 - value)),
        "logit_standard_error": error / inside,
    }


def evaluation(
    seed: int,
    *,
    shift: float = 0.0,
    error: float = 0.02,
    patients: int = 20,
    held_out: str = "dune",
    **more: Any,
) -> dict[str, Any]:
    """Two training sites and one held out; federated beats local by 0.05 + shift except at birch, where it
    loses 0.01 - shift.
    """
    rows = {"metal": {"auroc": 0.8, "low": 0.7, "high": 0.9, "n_pos": patients, "n_neg": patients}}
    sites = ["alder", "birch", held_out]
    scores = {
        arm: {where: score(base + shift, error) for where in ("home", "elsewhere", "unseen", *sites)}
        for arm, base in (("local", 0.80), ("federated", 0.85))
    }
    scores["local"][held_out] = NO_SCORE  # type: ignore[assignment]
    gains = {"home": 0.05, "unseen": 0.05, "alder": 0.05, "birch": -0.01}
    return (
        empty_evaluation(sites, [held_out])
        | {
            "run": f"demo-{seed}",
            "plan": "demo",
            "seed": seed,
            "arms": list(scores),
            "matrix": {"federated": dict.fromkeys(sites, rows)},
            "scores": scores,
            "contrasts": [
                {"arm": "federated", "other": "local", "where": where, "family": family_of(where)}
                | estimate(gain + shift, error)
                | {"p": 0.5, "p_holm": 1.0}
                for where, gain in gains.items()
            ],
        }
        | more
    )


def family_of(where: str) -> str:
    return "overall" if where in ("home", "elsewhere", "unseen") else "sites"


def folder(tmp_path: Path, values: dict[str, Any] | None, plan: RunPlan = PLAN) -> RunFolder:
    number = len(list(tmp_path.iterdir()))
    made = RunFolder.create(tmp_path / f"run-{number}", plan, {"run": "x"})
    if values is not None:
        write_json(made.path / EVALUATION, values)
    return made


@pytest.fixture
def three_seeds(tmp_path: Path) -> list[RunFolder]:
    shifts = {1: -0.01, 2: 0.0, 3: 0.01}
    return [
        folder(tmp_path, evaluation(seed, shift=shift), PLAN.model_copy(update={"seed": seed}))
        for seed, shift in shifts.items()
    ]


def at(result: dict[str, Any], where: str) -> dict[str, Any]:
    return next(row for row in result["contrasts"] if row["where"] == where)


def test_pooled_interval_by_hand():
    """Values .04 .05 .06: sd .01, so the seeds' part is 4.3027 * .01 / sqrt(3) = .02484; the patients' is
    1.96 * mean(.01, .02, .03).
    """
    found = pooled([estimate(0.04, 0.01), estimate(0.05, 0.02), estimate(0.06, 0.03)])
    half = math.sqrt((1.959964 * 0.02) ** 2 + (T_TWO_DEGREES * 0.01 / math.sqrt(3)) ** 2)
    assert half == pytest.approx(0.046408, abs=1e-6)
    assert found["value"] == pytest.approx(0.05)
    assert found["high"] - found["value"] == pytest.approx(half, abs=1e-6)
    assert found["value"] - found["low"] == pytest.approx(half, abs=1e-6)


def test_seeds_never_shrink_the_error_of_the_patients():
    one = estimate(0.05, 0.02)
    found = pooled([one] * 10)
    assert found["high"] - found["value"] == pytest.approx(1.959964 * 0.02, abs=1e-6)


def test_seeds_of_one_plan_are_pooled(three_seeds):
    result = compare_runs(three_seeds)
    assert result["kind"] == "seeds"
    assert [run["seed"] for run in result["runs"]] == [1, 2, 3]
    home = at(result, "home")
    assert home["paired"] is True
    assert home["value"] == pytest.approx(0.05)
    assert home["per_seed"] == pytest.approx([0.04, 0.05, 0.06])
    assert result["scores"]["federated"]["unseen"]["value"] == pytest.approx(0.85)
    assert result["below_zero"] == [
        {"arm": "federated", "other": "local", "sites": ["birch"], "excluding_zero": [], "of": 2}
    ]


def test_a_seed_without_a_value_makes_the_pooled_one_null(tmp_path, three_seeds):
    values = evaluation(4)
    values["contrasts"][1].update(NOTHING)
    extra = folder(tmp_path, values, PLAN.model_copy(update={"seed": 4}))
    result = compare_runs([*three_seeds, extra])
    unseen = at(result, "unseen")
    assert unseen["value"] is None
    assert unseen["low"] is None
    assert unseen["per_seed"][3] is None
    assert json.dumps(result, allow_nan=False)
    line = next(
        line
        for line in compare_table(result).splitlines()
        if "unseen" in line and "federated - local" in line
    )
    assert "not estimable" in line
    assert "0.000" not in line


def test_only_contrasts_that_all_runs_have_are_pooled(tmp_path, three_seeds):
    values = evaluation(4)
    values["contrasts"] = [row for row in values["contrasts"] if row["where"] != "home"]
    result = compare_runs([*three_seeds, folder(tmp_path, values, PLAN.model_copy(update={"seed": 4}))])
    assert "home" not in [row["where"] for row in result["contrasts"]]


def test_different_plans_are_side_by_side_and_unpaired(tmp_path):
    longer = PLAN.model_copy(update={"training": PLAN.training.model_copy(update={"rounds": 20})})
    result = compare_runs(
        [
            folder(tmp_path, evaluation(1, error=0.03)),
            folder(tmp_path, evaluation(2, shift=0.02, error=0.04), longer),
        ]
    )
    assert result["kind"] == "plans"
    assert result["plan_differs"] == ["training.rounds"]
    row = next(row for row in result["contrasts"] if row["arm"] == "federated" and row["where"] == "unseen")
    assert row["paired"] is False
    assert row["runs"] == [1, 0]
    assert row["value"] == pytest.approx(0.02)
    assert row["high"] - row["value"] == pytest.approx(1.959964 * 0.05, abs=1e-6)  # 3-4-5
    table = compare_table(result)
    assert "NOT PAIRED" in table
    assert "training.rounds" in table


def test_places_are_compared_only_where_they_mean_the_same_sites(tmp_path):
    other = PLAN.model_copy(update={"held_out": ("elm",)})
    result = compare_runs(
        [folder(tmp_path, evaluation(1)), folder(tmp_path, evaluation(2, held_out="elm"), other)]
    )
    places = {row["where"] for row in result["contrasts"]}
    assert places == {"home", "elsewhere", "alder", "birch"}


def test_one_plan_on_other_patients_is_not_pooled(tmp_path):
    later = PLAN.model_copy(update={"seed": 2})
    result = compare_runs(
        [folder(tmp_path, evaluation(1)), folder(tmp_path, evaluation(2, patients=21), later)]
    )
    assert result["kind"] == "plans"
    assert result["same_test_patients"] is False
    assert "test patients differ" in compare_table(result)


def test_one_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare_runs([folder(tmp_path, evaluation(1))])
    assert caught.value.code == "too-few-runs"
    assert caught.value.hint


def test_the_same_run_or_seed_twice_is_refused(tmp_path):
    first = folder(tmp_path, evaluation(1))
    for second in (first, folder(tmp_path, evaluation(1, run="another"))):
        with pytest.raises(ConfigError) as caught:
            compare_runs([first, second])
        assert caught.value.code == "same-run"


def test_a_run_without_evaluation_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        compare_runs([folder(tmp_path, evaluation(1)), folder(tmp_path, None)])
    assert caught.value.code == "not-finished"


def test_the_table_says_not_private_or_epsilon(tmp_path, three_seeds):
    assert compare_table(compare_runs(three_seeds)).count("NOT PRIVATE") == 3
    claim = CLAIM
    private = [
        folder(
            tmp_path,
            evaluation(
                seed,
                private_arms=["federated_dp"],
                privacy={"alder": claim, "birch": claim | {"epsilon": 2.0}},
            ),
            PLAN.model_copy(update={"seed": seed}),
        )
        for seed in (5, 6)
    ]
    table = compare_table(compare_runs(private))
    assert (
        table.count("federated_dp: epsilon 2.00 to 7.91 by site, delta 1e-05, per patient, add/remove") == 2
    )
    assert "they add up" in table


def test_a_site_whose_unit_is_the_study_is_said_beside_every_epsilon(tmp_path):
    claim = CLAIM
    runs = []
    for seed in (5, 6):
        privacy = {"alder": claim, "birch": claim | {"unit": "study"}}
        values = evaluation(seed, private_arms=["federated_dp"], privacy=privacy)
        values["scores"]["federated_dp"] = values["scores"]["federated"]
        runs.append(folder(tmp_path, values, PLAN.model_copy(update={"seed": seed})))
    lines = [line for line in compare_table(compare_runs(runs)).splitlines() if "epsilon 7.91" in line]
    assert len(lines) >= 3
    assert all("per patient or study" in line for line in lines)


def test_epsilon_stands_beside_private_scores_in_the_table(tmp_path):
    claim = CLAIM
    runs = []
    for seed in (5, 6):
        values = evaluation(seed, private_arms=["federated_dp"], privacy={"alder": claim})
        values["scores"]["federated_dp"] = values["scores"]["federated"]
        values["contrasts"].append(
            {"arm": "federated_dp", "other": "federated", "where": "unseen", "family": "overall"}
            | estimate(-0.02, 0.01)
            | {"p": 0.05, "p_holm": 0.1}
        )
        runs.append(folder(tmp_path, values, PLAN.model_copy(update={"seed": seed})))
    result = compare_runs(runs)
    lines = [line for line in compare_table(result).splitlines() if line.startswith("federated_dp ")]
    scores_and_differences = [line for line in lines if "is below" not in line]
    assert len(scores_and_differences) == 2
    assert all(line.startswith("federated_dp (epsilon 7.91)") for line in scores_and_differences)


def test_an_arm_that_a_run_does_not_have_is_a_dash(tmp_path):
    values = evaluation(2)
    del values["scores"]["local"]
    other = PLAN.model_copy(update={"arms": ("federated",)})
    result = compare_runs([folder(tmp_path, evaluation(1)), folder(tmp_path, values, other)])
    assert result["scores"]["local"]["home"][1] is None
    line = next(
        line for line in compare_table(result).splitlines() if line.startswith("local") and " home " in line
    )
    assert line.endswith(" -")


def test_the_interval_of_a_pooled_score_is_on_the_logit_scale_and_stays_below_1() -> None:
    found = pooled_scores([score(0.99, 0.01), score(0.98, 0.01), score(0.97, 0.01)])
    assert found["value"] == pytest.approx(0.98)
    assert 0 < found["low"] < 0.98 < found["high"] < 1
    assert found["high"] - 0.98 < 0.98 - found["low"]


def test_the_p_value_is_the_level_at_which_the_interval_touches_zero() -> None:
    found = pooled([estimate(0.04, 0.01), estimate(0.05, 0.02), estimate(0.06, 0.03)])
    assert (found["p"] < 0.05) == (found["low"] > 0)
    half = found["value"] - found["low"]
    at_edge = pooled(
        [estimate(value - 0.05 + half, error) for value, error in ((0.04, 0.01), (0.05, 0.02), (0.06, 0.03))]
    )
    assert at_edge["p"] == pytest.approx(0.05, rel=1e-6)
    assert pooled([estimate(0.0, 0.0)] * 2)["p"] == 1.0


def test_one_of_many_differences_that_excludes_zero_alone_is_not_called_one(tmp_path: Path) -> None:
    """Twenty differences, one with p 0.03: without a correction the table said `excludes zero`."""
    runs = []
    for seed in (1, 2):
        values = evaluation(seed)
        row = values["contrasts"][0]
        values["contrasts"] = [row | {"arm": f"arm-{number}"} | estimate(0.0, 0.02) for number in range(19)]
        values["contrasts"].append(row | estimate(0.0435, 0.02))
        runs.append(folder(tmp_path, values, PLAN.model_copy(update={"seed": seed})))
    result = compare_runs(runs)
    found = at_pair(result, "federated", "home")
    assert found["low"] > 0
    assert 0.02 < found["p"] < 0.05 < found["p_holm"]
    assert result["looks"] == {"overall": 20, "sites": 0}
    text = compare_table(result)
    assert "excludes zero only alone" in text
    assert "20 differences overall" in text


def at_pair(result: dict[str, Any], arm: str, where: str) -> dict[str, Any]:
    return next(row for row in result["contrasts"] if (row["arm"], row["where"]) == (arm, where))


def test_macro_scores_of_other_artifacts_are_not_compared(tmp_path: Path) -> None:
    """The second run could estimate motion at birch too: its mean means something else."""
    longer = PLAN.model_copy(update={"training": PLAN.training.model_copy(update={"rounds": 20})})
    values = evaluation(2, shift=0.02)
    values["averaged"]["birch"] = ["metal", "motion"]
    result = compare_runs([folder(tmp_path, evaluation(1)), folder(tmp_path, values, longer)])
    found = {row["where"]: row["value"] for row in result["contrasts"] if row["arm"] == "federated"}
    assert (found["home"], found["birch"]) == (None, None)
    assert found["alder"] == found["unseen"] == pytest.approx(0.02)
    assert "averages other artifacts" in compare_table(result)


def test_settings_that_auto_found_for_each_seed_are_no_difference_of_plans(tmp_path: Path) -> None:
    """The first leaves out a key that the second states: a mean over one round is the default."""
    found: list[dict[str, Any]] = [
        {"learning_rate": 10.0, "average_rounds": 4, "noise_multiplier": 6.0},
        {"learning_rate": 30.0},
    ]
    for origin, differs in (
        ("auto: worst gain +0.02", []),
        ("", ["privacy.average_rounds", "privacy.learning_rate", "privacy.noise_multiplier"]),
    ):
        runs = [
            folder(
                tmp_path,
                evaluation(seed),
                PLAN.model_copy(
                    update={
                        "seed": seed,
                        "privacy": Privacy(**settings, origin=origin and f"{origin} {seed}"),
                    }
                ),
            )
            for seed, settings in enumerate(found)
        ]
        result = compare_runs(runs)
        assert sorted(result["plan_differs"]) == differs
        assert result["kind"] == ("plans" if differs else "seeds")
