"""The benchmark on real hospitals: its estimators against values computed by hand, who trains and who is
scored, and that its training is the product's.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from client.dp.coins import Coins
from client.dp.dp_sgd import PrivateSteps, train_private_head

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def real_sites(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # the benchmark sets them
    return importlib.import_module("real_sites")


@pytest.fixture
def choose(real_sites: ModuleType) -> ModuleType:
    return importlib.import_module("choose_real_sites")


def hospital(module: ModuleType, name: str, people: int, seed: int) -> object:
    """A hospital of three features of which the first tells who is bad."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(people, 3))
    bad = features[:, 0] + 0.5 * generator.normal(size=people) > 0.3
    return module.Site(name, np.column_stack([features, np.ones(people)]), bad)


def hospitals(module: ModuleType) -> list[object]:
    sizes = {"A": 120, "B": 90, "C": 60, "D": 55, "E": 30, "F": 25}
    return [hospital(module, name, size, seed) for seed, (name, size) in enumerate(sizes.items())]


def test_jackknife_error_by_hand(real_sites: ModuleType) -> None:
    # mean 2.5, squares about it 2.25 + .25 + .25 + 2.25 = 5; 3 / 4 * 5 = 3.75
    assert real_sites.jackknife_error([1, 2, 3, 4]) == pytest.approx(math.sqrt(3.75))
    assert real_sites.jackknife_error([2, 2, 2]) == 0
    assert math.isnan(real_sites.jackknife_error([1]))


def test_jackknife_of_a_mean_is_its_standard_error(real_sites: ModuleType) -> None:
    values = np.array([0.1, 0.4, -0.2, 0.05, 0.3])
    without = [(values.sum() - each) / 4 for each in values]
    assert real_sites.jackknife_error(without) == pytest.approx(values.std(ddof=1) / math.sqrt(5))


@pytest.mark.parametrize(
    ("hospitals_", "factor"), [(3, 4.968), (4, 3.558), (5, 3.041), (10, 2.373), (20, 2.145)]
)
def test_prediction_interval_factors(real_sites: ModuleType, hospitals_: int, factor: float) -> None:
    assert real_sites.next_hospital(1.0, hospitals_) == pytest.approx(factor, abs=5e-4)
    assert real_sites.next_hospital(0.25, hospitals_) == pytest.approx(factor / 2, abs=5e-4)


def test_prediction_interval_needs_two_hospitals(real_sites: ModuleType) -> None:
    assert math.isnan(real_sites.next_hospital(1.0, 1))


def test_variance_of_single_trainings_is_not_that_of_their_mean(real_sites: ModuleType) -> None:
    # each seed has variance 2 over the two hospitals; their means over seeds do not differ at all
    assert real_sites.single_seed_variance(np.array([[0.0, 2.0], [2.0, 0.0]])) == pytest.approx(2.0)


def test_intervals_by_hand(real_sites: ModuleType) -> None:
    differences = np.array([[0.0, 0.2], [0.2, 0.4], [0.4, 0.6]])  # by hospital .1 .3 .5; each seed s = .2
    found = real_sites.intervals(differences, [0.4, 0.3, 0.2])
    assert found.mean == pytest.approx(0.3)
    assert found.s == pytest.approx(0.2)
    assert found.given == pytest.approx(4.302653 * 0.2 / math.sqrt(3), rel=1e-6)
    assert found.next == pytest.approx(4.968 * 0.2, abs=1e-3)
    assert found.jackknife == pytest.approx(4.302653 * math.sqrt(2 / 3 * 0.02), rel=1e-6)
    assert found.seeds == pytest.approx(0.2 / math.sqrt(2))
    assert (found.above, found.hospitals) == (3, 3)


def test_the_aim_needs_size_and_an_interval_above_zero(real_sites: ModuleType) -> None:
    found = real_sites.intervals(np.full((3, 2), 0.06), [0.06, 0.06, 0.06])
    assert real_sites.meets(found)
    assert not real_sites.meets(found._replace(mean=0.04))
    assert not real_sites.meets(found._replace(jackknife=0.07))


def test_auroc_counts_ties_half(real_sites: ModuleType) -> None:
    bad = np.array([True, True, False, False])
    assert real_sites.auroc(np.array([2.0, 1.0, 1.0, 0.0]), bad) == pytest.approx(3.5 / 4)


def test_training_is_that_of_the_product(real_sites: ModuleType) -> None:
    """One site without noise, on a clip that binds: `train_private_head` gives the same head."""
    site = hospital(real_sites, "A", 64, 5)
    settings = real_sites.Settings(steps=6, clip_norm=0.3, step_length=0.5)
    found = real_sites.train([site], np.array([0.1, 0.0, -0.2, 0.3]), settings, Coins(bytes(32)))
    request = PrivateSteps(
        steps=6,
        learning_rate=0.5 / 0.3,
        clip_norm=0.3,
        noise_multiplier=0.0,
        sample_rate=1.0,
        nominal_patients=site.nominal,
        max_slices_per_patient=1,
    )
    expected = train_private_head(
        np.array([[0.1, 0.0, -0.2]]),
        np.array([0.3]),
        site.features[:, :3],
        site.bad[:, None].astype(float),
        np.arange(64),
        request,
    )
    assert site.nominal == 50
    np.testing.assert_allclose(found, [*expected.weight[0], *expected.bias], atol=1e-5)


def test_two_sites_are_averaged_by_their_public_sizes(real_sites: ModuleType) -> None:
    first, second = hospital(real_sites, "A", 120, 1), hospital(real_sites, "B", 60, 2)
    settings = real_sites.Settings(steps=1, clip_norm=1.0, step_length=1.0)
    alone = [real_sites.train([site], np.zeros(4), settings, Coins(bytes(32))) for site in (first, second)]
    both = real_sites.train([first, second], np.zeros(4), settings, Coins(bytes(32)))
    np.testing.assert_allclose(both, (100 * alone[0] + 50 * alone[1]) / 150, atol=1e-6)


def test_the_noise_reaches_the_release(real_sites: ModuleType) -> None:
    """A person who moves nothing: what is left is the noise, of its deviation over the public size."""
    site = real_sites.Site("A", np.zeros((50, 400)), np.zeros(50, dtype=bool))
    settings = real_sites.Settings(steps=1, clip_norm=0.5, step_length=1.0, noise_multiplier=2.0)
    found = real_sites.train([site], np.zeros(400), settings, Coins(bytes(32)))
    assert found.std() == pytest.approx(1.0 * 2.0 / 50, rel=0.15)


def test_noise_beyond_an_update_is_cut(real_sites: ModuleType) -> None:
    settings = real_sites.Settings(steps=4, clip_norm=0.1, step_length=1.0, noise_multiplier=1e5)
    found = real_sites.train([hospital(real_sites, "A", 60, 1)], np.zeros(4), settings, Coins(bytes(32)))
    assert np.isfinite(found).all()


def test_small_hospitals_sit_out_or_train_as_one(real_sites: ModuleType) -> None:
    sites, start = hospitals(real_sites), np.zeros(4)
    out, pool = (real_sites.Trial(sites, start, small=small) for small in ("out", "pool"))
    assert [site.name for site in out.sites([])] == ["A", "B", "C", "D"]
    assert [(site.name, site.nominal) for site in pool.sites([])][-1] == ("E+F", 50)
    assert [site.name for site in pool.sites(["A", "E"])] == ["B", "C", "D"]  # 25 people are no pool
    assert {site.name for site in out.testers} == set("ABCDEF")


def test_a_dropped_hospital_neither_trains_nor_is_scored(
    real_sites: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = real_sites.Trial(hospitals(real_sites), np.zeros(4), small="out")
    asked = []

    def spy(arm: str, sites: list, tester: object, seed: int) -> float:
        asked.append(({site.name for site in sites}, tester.name))
        return 0.5

    monkeypatch.setattr(trial, "_score", spy)
    for arm in ("federated", "local"):
        trial.score(arm, trial.testers[0], "B", 0)
    assert {name for names, _ in asked for name in names} == {"C", "D"}
    asked.clear()
    real_sites.compare((trial, "federated"), (trial, "local"), 1)
    assert all(tester not in names for names, tester in asked)


def test_a_seed_repeats_its_training_and_another_does_not(real_sites: ModuleType) -> None:
    def score(seed: int, **options: object) -> float:
        trial = real_sites.Trial(hospitals(real_sites), np.zeros(4), small="out", **options)
        return trial.score("federated_dp 1", trial.testers[0], "", seed)

    assert score(3) == score(3)
    assert len({score(seed) for seed in range(4)}) > 1
    assert score(3) != score(3, shuffled=True)


def test_everything_is_measured_and_nothing_trained_cannot_gain(
    real_sites: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHOSEN", "CHOSEN_FROM_ZERO"):
        monkeypatch.setattr(real_sites, name, dict.fromkeys(getattr(real_sites, name), (3, 1.0, 1.0)))
    result = real_sites.measure_all(hospitals(real_sites), np.zeros(4), 2, (2.0,))
    assert json.loads(real_sites.to_json(result))["benchmark"] == "real_sites"
    assert set(result["controls"]) == {"noise × 100", "labels shuffled", "nothing trained"}
    assert result["controls"]["nothing trained"]["fails"]
    assert result["hospitals"]["A"]["auroc"]["public"] == 0.5
    page = real_sites.table(result)
    assert "| out | federated_dp 2 − local |" in page
    assert "| pool | federated_dp 2 − local_dp 2 |" in page
    assert "| zero | federated − local |" in page


def test_the_page_has_a_place_for_the_table() -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "<!-- real_sites -->" in page
    assert "<!-- /real_sites -->" in page


def test_a_missing_package_is_one_line(
    real_sites: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_sites, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["real_sites.py"])
    assert real_sites.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install -e '.[bench]'" in error


def test_a_rater_who_excludes_makes_an_image_bad(real_sites: ModuleType, tmp_path: Path) -> None:
    rows = ["n/a\t1.0\t-1", "0.0\t-1.0\t1", "-1.0\tn/a\t1", "1.0\t0.0\t1"]
    lines = [f"{number}\tA\t{ratings}\t{number}.5\t256" for number, ratings in enumerate(rows)]
    header = "subject_id\tsite\trater_1\trater_2\trater_3\tcjv\tsize_x"
    table = tmp_path / "table.tsv"
    table.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    people, names = real_sites.read_people(table)
    assert names == ["cjv"]
    assert people.bad.tolist() == [False, True, True, False]
    assert people.metrics[:, 0].tolist() == [0.5, 1.5, 2.5, 3.5]


def test_settings_come_from_the_grid_that_was_searched(choose: ModuleType, real_sites: ModuleType) -> None:
    assert set(real_sites.CHOSEN) == set(real_sites.arms_of(real_sites.EPSILONS)) - {"public"}
    for steps, clip, length in [*real_sites.CHOSEN.values(), *real_sites.CHOSEN_FROM_ZERO.values()]:
        assert steps in choose.STEPS
        assert clip in choose.CLIPS
        assert length in choose.LENGTHS


def test_the_choice_has_the_smallest_worst_regret(choose: ModuleType) -> None:
    """Two settings are each the best under one shift; a third is far from the best under neither."""
    shape = (len(choose.STEPS), len(choose.CLIPS) * len(choose.LENGTHS), 2, choose.REPETITIONS)
    found = np.full(shape, 0.4)
    found[1, 0] = np.array([0.9, 0.5])[:, None]
    found[3, 1] = np.array([0.5, 0.8])[:, None]
    found[2, len(choose.LENGTHS) - 1] = np.array([0.78, 0.68])[:, None]
    setting, by_shift, regret, ends = choose.choose(found.reshape(*shape[:2], -1))
    assert setting == (choose.STEPS[2], choose.CLIPS[0], choose.LENGTHS[-1])
    assert by_shift.tolist() == pytest.approx([0.78, 0.68])
    assert regret == pytest.approx(0.12)
    assert ends == "clip, length"


def test_of_equal_regrets_the_fewest_steps_are_taken(choose: ModuleType) -> None:
    shape = (len(choose.STEPS), len(choose.CLIPS) * len(choose.LENGTHS), 2 * choose.REPETITIONS)
    found = np.full(shape, 0.4)
    found[1, 8], found[2, 9], found[4, 9] = 0.795, 0.798, 0.8
    setting, _, regret, ends = choose.choose(found)
    assert setting[0] == choose.STEPS[2]
    assert regret == pytest.approx(0.002)
    assert ends == ""


@pytest.mark.skipif(find_spec("mriqc_learn") is None, reason="mriqc-learn is not installed (extra bench)")
def test_quick_run_on_the_real_table(
    real_sites: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["real_sites.py", "--quick", "--format", "json"])
    assert real_sites.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["hospitals"]) == 7
    assert result["hospitals"]["NYU"]["people"] == 184
    assert 0.5 < result["hospitals"]["NYU"]["auroc"]["federated"] < 1
