"""Runs that hold out another hospital each are one family, and say what to expect at the next hospital."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import t

from common.counts import hanley_mcneil
from common.errors import ConfigError, DataError
from common.leave_one_out import together_epsilon
from common.plan import RunPlan
from server.evaluation.leave_one_out import (
    GIVEN,
    JACKKNIFE,
    compare_hospitals,
    family_of,
    hospitals_table,
)
from server.run_folder import EVALUATION, RunFolder, write_json
from tests.helpers.command_line import typed
from tests.helpers.evaluations import empty_evaluation

SITES = ("alder", "birch", "cedar", "dune", "elm")
ARTIFACTS = ("metal", "motion")
ARMS = ("public", "local", "federated")
PLAN = RunPlan(name="study", arms=ARMS, held_out_patients="test")
ERROR = 0.03
TESTED = dict(zip(SITES, (0.05, 0.0, -0.04, 0.02, -0.01), strict=True))  # how easy a hospital is
TRAINED = dict(zip(SITES, (0.03, -0.02, 0.0, 0.04, -0.05), strict=True))  # how good a trainer


def auroc(model: str, site: str, trainers: Sequence[str], seed: int) -> float:
    arm, _, owner = model.partition("/")
    base = {"public": 0.70, "local": 0.75, "federated": 0.80}[arm] + TESTED[site] + 0.01 * (seed - 7)
    good = {"public": [], "local": [owner], "federated": list(trainers)}[arm]
    home = 0.05 if site in good else 0.0
    return base + home + (sum(TRAINED[one] for one in good) / len(good) if good else 0.0)


def evaluation(
    held_out: tuple[str, ...], seed: int = 7, *, patients: int = 20, **more: Any
) -> dict[str, Any]:
    trainers = [site for site in SITES if site not in held_out]
    models = ["public", *(f"local/{site}" for site in trainers), "federated"]
    cells = len(models) * len(ARTIFACTS)
    of_a_place = {"value": 0.1, "low": 0.0, "high": 0.2, "standard_error": 0.05, "p": 0.1, "p_holm": 0.1}
    return (
        empty_evaluation(SITES, held_out)
        | {
            "run": f"study-{'-'.join(held_out)}-{seed}",
            "plan": "study",
            "seed": seed,
            "arms": list(ARMS),
            "matrix": {
                model: {
                    site: {
                        name: {
                            "auroc": auroc(model, site, trainers, seed),
                            "low": None,
                            "high": None,
                            "n_pos": patients,
                            "n_neg": 30,
                        }
                        for name in ARTIFACTS
                    }
                    for site in SITES
                }
                for model in models
            },
            "covariance": {
                site: {
                    "models": models,
                    "artifacts": list(ARTIFACTS),
                    "matrix": (2 * ERROR**2 * np.eye(cells)).tolist(),  # of the mean of two: ERROR**2
                }
                for site in SITES
            },
            "contrasts": [
                {"arm": "federated", "other": "local", "where": "unseen", "family": "overall"} | of_a_place
            ],
        }
        | more
    )


def run(tmp_path: Path, *held_out: str, seed: int = 7, plan: RunPlan = PLAN, **more: Any) -> RunFolder:
    asked = plan.model_copy(update={"held_out": held_out, "seed": seed})
    folder = RunFolder.create(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", asked, {"run": "x"})
    write_json(folder.path / EVALUATION, evaluation(held_out, seed, **more))
    trainers = [site for site in SITES if site not in held_out]
    folder.arm("federated").append_round({"round": 1, "answered": trainers})
    return folder


def family(tmp_path: Path, sites: Sequence[str] = SITES, **how: Any) -> list[RunFolder]:
    return [run(tmp_path, site, **how) for site in sites]


def compared(folders: Sequence[RunFolder]) -> dict[str, Any]:
    found = family_of(folders)
    assert found is not None
    return compare_hospitals(found)


def left_out(site: str) -> float:
    others = [one for one in SITES if one != site]
    return auroc("federated", site, others, 7)


def around(mean: float, half: float) -> tuple[float, float]:
    slope = mean * (1 - mean)
    return expit(logit(mean) - half / slope), expit(logit(mean) + half / slope)


def test_the_prediction_interval_of_left_out_hospitals_by_hand(tmp_path: Path) -> None:
    result = compared(family(tmp_path))
    row = result["scores"]["federated"]["unseen"]
    values = np.array([left_out(site) for site in SITES])
    assert row["per_hospital"] == pytest.approx(values)
    assert row["standard_errors"] == pytest.approx([ERROR] * 5)
    assert row["value"] == pytest.approx(values.mean())
    y = logit(values)
    half = t.ppf(0.975, 4) * y.std(ddof=1) * math.sqrt(1 + 1 / 5)
    assert (row["next"]["low"], row["next"]["high"]) == pytest.approx(
        (expit(y.mean() - half), expit(y.mean() + half))
    )
    assert row["worst"] == {"site": "cedar", "value": pytest.approx(values.min())}
    assert row["next"]["random_effects"]["q"] > 0
    half = t.ppf(0.975, 4) * values.std(ddof=1) / math.sqrt(5)
    assert (row["low"], row["high"]) == pytest.approx(around(values.mean(), half))
    assert row["basis"] == GIVEN
    assert json.dumps(result, allow_nan=False)


def test_differences_are_paired_at_each_hospital(tmp_path: Path) -> None:
    row = compared(family(tmp_path))["contrasts"][0]
    local = [np.mean([auroc(f"local/{one}", site, [], 7) for one in SITES if one != site]) for site in SITES]
    values = np.array([left_out(site) for site in SITES]) - local
    assert (row["arm"], row["other"], row["where"], row["paired"]) == ("federated", "local", "unseen", True)
    assert row["per_hospital"] == pytest.approx(values)
    half = t.ppf(0.975, 4) * values.std(ddof=1) * math.sqrt(1 + 1 / 5)
    assert (row["next"]["low"], row["next"]["high"]) == pytest.approx(
        (values.mean() - half, values.mean() + half)
    )


def test_the_error_at_a_hospital_of_few_patients_is_raised_as_in_the_report(tmp_path: Path) -> None:
    """DeLong's variance of 3 patients is far too small, and random effects would take it for precision."""
    found = compared(family(tmp_path, patients=3))
    values = [auroc("federated", site, [one for one in SITES if one != site], 7) for site in SITES]
    expected = [math.sqrt(hanley_mcneil(value, 3, 30) / 2) for value in values]
    row = found["scores"]["federated"]["unseen"]
    assert row["standard_errors"] == pytest.approx(expected)
    (other := tmp_path / "many").mkdir()
    many = compared(family(other))["scores"]["federated"]["unseen"]
    assert row["next"]["random_effects"]["q"] < many["next"]["random_effects"]["q"] / 3
    assert row["next"]["low"] == many["next"]["low"]


def test_models_of_single_hospitals_give_the_jackknife(tmp_path: Path) -> None:
    """Additive scores: leaving hospital i out changes the mean by what i adds as tester and as trainer."""
    row = compared(family(tmp_path))["scores"]["local"]["unseen"]
    assert row["basis"] == JACKKNIFE
    means = []
    for i in SITES:
        rest = [site for site in SITES if site != i]
        means.append(np.mean([auroc(f"local/{j}", h, [], 7) for h in rest for j in rest if j != h]))
    half = t.ppf(0.975, 4) * math.sqrt(4 / 5 * ((np.array(means) - np.mean(means)) ** 2).sum())
    assert (row["low"], row["high"]) == pytest.approx(around(row["value"], half))


def test_leave_two_out_gives_the_jackknife_of_shared_models(tmp_path: Path) -> None:
    sites = SITES[:4]
    singles = family(tmp_path, sites)
    alone = compared(singles)
    assert (alone["leave_two_out"], alone["contrasts"][0]["basis"]) == (False, GIVEN)
    pairs = [run(tmp_path, a, b) for n, a in enumerate(sites) for b in sites[n + 1 :]]
    result = compared([*singles, *pairs])
    assert (result["leave_two_out"], result["contrasts"][0]["basis"]) == (True, JACKKNIFE)
    row = result["scores"]["federated"]["unseen"]
    means = []
    for i in sites:
        tested = [site for site in sites if site != i]
        means.append(
            np.mean([auroc("federated", h, [j for j in SITES if j not in (h, i)], 7) for h in tested])
        )
    half = t.ppf(0.975, 3) * math.sqrt(3 / 4 * ((np.array(means) - np.mean(means)) ** 2).sum())
    assert (row["low"], row["high"]) == pytest.approx(around(row["value"], half))
    assert row["per_hospital"] == alone["scores"]["federated"]["unseen"]["per_hospital"]


def test_home_is_the_run_that_holds_out_none_else_the_sister_runs(tmp_path: Path) -> None:
    singles = family(tmp_path)
    found = compared(singles)["unseen_less_home"]
    assert set(found) == {"local", "federated"}  # public is trained nowhere
    expected = []
    for site in SITES:
        homes = [
            auroc("federated", site, [one for one in SITES if one != out], 7) for out in SITES if out != site
        ]
        expected.append(left_out(site) - np.mean(homes))
    assert found["federated"]["per_hospital"] == pytest.approx(expected)
    found = compared([*singles, run(tmp_path)])["unseen_less_home"]["federated"]["per_hospital"]
    assert found == pytest.approx([left_out(site) - auroc("federated", site, SITES, 7) for site in SITES])


def test_hospitals_scored_on_everybody_have_no_home_to_compare_with(tmp_path: Path) -> None:
    result = compared(family(tmp_path, plan=PLAN.model_copy(update={"held_out_patients": "all"})))
    assert result["unseen_less_home"] == {}
    assert set(result["scored_on"].values()) == {"all"}
    assert "alder (all patients)" in hospitals_table(result)


def test_seeds_are_averaged_and_are_no_hospitals(tmp_path: Path) -> None:
    folders = [run(tmp_path, site, seed=seed) for site in SITES for seed in (7, 8, 9)]
    row = compared(folders)["scores"]["federated"]["unseen"]
    assert row["hospitals"] == 5
    assert row["per_hospital"] == pytest.approx([left_out(site) + 0.01 for site in SITES])
    with pytest.raises(ConfigError) as caught:
        family_of([*folders, run(tmp_path, "elm", seed=9)])
    assert caught.value.code == "same-run"


def test_means_over_different_artifacts_are_not_mixed(tmp_path: Path) -> None:
    folders = family(tmp_path)
    for folder in folders:
        stored = folder.evaluation
        for at in stored["matrix"].values():
            at["cedar"]["motion"] |= {"auroc": None, "n_pos": 0}
            at["alder"]["motion"]["auroc"] = 0.99  # in no mean
        write_json(folder.path / EVALUATION, stored)
    result = compared(folders)
    assert result["artifacts"] == ["metal"]
    assert result["other_artifacts"]["alder"] == ["motion"]
    row = result["scores"]["federated"]["unseen"]
    assert row["per_hospital"] == pytest.approx([left_out(site) for site in SITES])
    assert row["standard_errors"] == pytest.approx([ERROR * math.sqrt(2)] * 5)
    assert "macro AUROC over metal" in hospitals_table(result)


def test_a_hospital_that_cannot_be_scored_is_no_hospital_of_the_interval(tmp_path: Path) -> None:
    folders = family(tmp_path)
    stored = folders[0].evaluation
    for name in ARTIFACTS:
        stored["matrix"]["federated"]["alder"][name]["auroc"] = None  # hidden by noise
    write_json(folders[0].path / EVALUATION, stored)
    result = compared(folders)
    row = result["scores"]["federated"]["unseen"]
    assert (row["hospitals"], row["per_hospital"][0], row["next"]["too_few"]) == (4, None, True)
    assert result["scores"]["local"]["unseen"]["hospitals"] == 5
    assert "not estimable" in hospitals_table(result)


def test_a_hospital_whose_patients_are_of_one_class_takes_no_part(tmp_path: Path) -> None:
    """It has no artifact to share with the others, who would else have none in common either."""
    folders = family(tmp_path)
    for folder in folders:
        stored = folder.evaluation
        for at in stored["matrix"].values():
            for name in ARTIFACTS:
                at["cedar"][name] |= {"auroc": None, "n_pos": 0}
        write_json(folder.path / EVALUATION, stored)
    result = compared(folders)
    row = result["scores"]["federated"]["unseen"]
    place = result["hospitals"].index("cedar")
    assert result["artifacts"] == list(ARTIFACTS)
    assert (row["hospitals"], row["per_hospital"][place]) == (4, None)
    assert row["value"] == pytest.approx(np.mean([left_out(site) for site in SITES if site != "cedar"]))


@pytest.mark.parametrize(("count", "says"), [(2, "none from 2"), (3, "too few to say much"), (5, "[0.")])
def test_the_table_says_how_much_so_many_hospitals_say(count: int, says: str, tmp_path: Path) -> None:
    text = hospitals_table(compared(family(tmp_path, SITES[:count])))
    line = next(line for line in text.splitlines() if line.startswith("federated  ") and "at" in line)
    assert says in line
    assert ("too few" in line) == (count == 3)
    assert "similar size" in text


def test_what_is_no_family(tmp_path: Path) -> None:
    one, two = run(tmp_path, "alder"), run(tmp_path, "birch")
    assert family_of([one, two]) is not None
    assert family_of([one]) is None
    assert family_of([one, run(tmp_path, "alder", seed=8)]) is None  # seeds
    assert family_of([one, run(tmp_path, "birch", plan=PLAN.model_copy(update={"image_size": 64}))]) is None
    assert family_of([one, two, run(tmp_path, "cedar", "dune")]) is None  # neither is left out alone
    assert family_of([one, run(tmp_path, "alder", "birch")]) is None
    fewer = run(tmp_path, "birch", sites=empty_evaluation(("alder", "birch"), ["birch"])["sites"])
    assert family_of([one, fewer]) is None


def test_other_patients_in_one_run_are_found(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        family_of([run(tmp_path, "alder"), run(tmp_path, "birch", patients=21)])
    assert caught.value.code == "data-changed"


def test_each_run_names_who_trained(tmp_path: Path) -> None:
    for member in compared([*family(tmp_path), run(tmp_path)])["members"]:
        assert member["trained"] == [site for site in SITES if site not in member["held_out"]]


def test_epsilon_of_all_runs_together_adds_up() -> None:
    """Of Gaussian steps: a patient trains in k of k + 1 runs, mu grows by the square root."""
    private = RunPlan(
        name="x",
        arms=("federated_dp",),
        privacy={"noise_multiplier": 40.0, "evaluation_share": 0.0},
        held_out_patients="test",
    )
    plans = [private.model_copy(update={"held_out": held}) for held in (("a",), ("b",), ("c",), ("d",), ())]
    tighter = private.model_copy(
        update={"privacy": private.privacy.model_copy(update={"noise_multiplier": 40.0 / 2})}
    )
    assert together_epsilon(plans, "abcd") == pytest.approx(together_epsilon([tighter], "abcd"), rel=1e-6)
    assert together_epsilon([PLAN], "abcd") is None


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder.path for folder in family(tmp_path)]
    status, said, _ = typed(capsys, "compare", *paths, "--format", "json")
    assert (status, json.loads(said)["kind"]) == (0, "hospitals")
    status, said, _ = typed(capsys, "compare", *paths)
    assert said.startswith("5 hospitals, each left out once")
    assert "federated - local" in said
