"""Settings of the private arms: chosen on public rehearsals, with the noise on."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from client.dp.dp_sgd import PrivateSteps, train_private_head
from common.counts import auroc, per_patient
from common.errors import PlanError
from common.model_file import load_model
from common.models import build
from common.plan import Model, RunPlan, parse_plan, read_plan
from common.pricing import plan_epsilon, with_noise
from common.progress_bar import silent
from common.weights import digest, manifest_of
from server.public_model import rehearsals
from server.public_model.rehearsals import SHIFTS, Rehearsal, rehearsals_of, rehearse
from server.run import tune as tuning
from server.run.tune import (
    CLIPS,
    RATES,
    Setting,
    Tried,
    folds_of,
    grouped,
    head_of,
    macro_auroc,
    rehearse_training,
    resolved,
    tuning_table,
    with_auto,
)
from server.run_folder import tuning_digest
from tests.helpers.command_line import fedqc

MANIFEST = manifest_of(build("small_cnn").state_dict())
START = load_model(
    Path(rehearsals.__file__).parents[2] / "common/models/small_cnn_phantoms.safetensors", MANIFEST
)


def auto_plan(**privacy: Any) -> RunPlan:
    return parse_plan(
        {
            "name": "auto",
            "arms": ["public", "federated_dp"],
            "model": {"initial": "package:small_cnn_phantoms.safetensors"},  # whose rehearsals `fewer` has
            "privacy": {"epsilon": 2.0, "settings": "auto"} | privacy,
        }
    )


@pytest.fixture(scope="module")
def shipped() -> dict[str, Rehearsal]:
    return rehearsals_of(Model(), START)


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch, shipped: dict[str, Rehearsal]) -> None:
    """Two shifts and few draws, so that a choice takes a second or two."""
    some = {shift: shipped[shift] for shift in ("contrast", "noise")}
    monkeypatch.setattr(tuning, "rehearsals_of", lambda *_, **__: some)
    monkeypatch.setattr(tuning, "DRAWS", 3)


# ---- rehearsals


@pytest.mark.parametrize("start", rehearsals.STARTS)
def test_the_shipped_rehearsals_are_those_of_the_shipped_starting_weights(start: str) -> None:
    weights = rehearsals.weights_of(start)
    assert rehearsals.rehearsed(start) == digest(weights)
    (drawn, found) = rehearse("noise", Model(), weights, patients=1), rehearsals_of(Model(), weights)["noise"]
    count = len(drawn.patient)
    np.testing.assert_allclose(found.features[:count], drawn.features, atol=0.02, rtol=2e-3)


def test_the_shipped_features_are_what_drawing_gives(shipped: dict[str, Rehearsal]) -> None:
    drawn = rehearse("texture", Model(), START, patients=2)
    count = len(drawn.patient)
    assert np.array_equal(shipped["texture"].patient[:count], drawn.patient)
    assert np.array_equal(shipped["texture"].version[:count], drawn.version)
    assert np.array_equal(shipped["texture"].labels[:count], drawn.labels, equal_nan=True)
    np.testing.assert_allclose(shipped["texture"].features[:count], drawn.features, atol=0.02, rtol=2e-3)


def test_other_starting_weights_draw_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def stand_in(shift: str, model: Model, initial: np.ndarray) -> str:
        asked.append(shift)
        return shift

    monkeypatch.setattr(rehearsals, "rehearse", stand_in)
    assert list(rehearsals_of(Model(), START + 1)) == list(SHIFTS) == asked


def test_the_start_errs_on_every_shift_and_has_room_to_gain(shipped: dict[str, Rehearsal]) -> None:
    head = head_of(Model(), START)
    for shift, one in shipped.items():
        public = np.mean([macro_auroc(head[None], fold.test)[0] for fold in folds_of(one)])
        assert 0.75 < public < 0.93, shift


def test_a_rehearsal_scores_patients_as_sites_do() -> None:
    rng = np.random.default_rng(6)
    owner = np.repeat(np.arange(60), rng.integers(1, 7, 60))
    features = rng.normal(size=(len(owner), 5)).astype(np.float32)
    labels = np.round(rng.random((len(owner), 3))).astype(np.float32)
    heads = rng.normal(size=(4, 3, 6)).astype(np.float32)
    found = macro_auroc(heads, grouped(features, labels, owner, np.ones(len(owner), bool)))
    for head, value in zip(heads, found, strict=True):
        logits = features @ head[:, :-1].T + head[:, -1]
        assert value == pytest.approx(auroc(*per_patient(logits, labels, owner)).mean(), abs=1e-6)


def test_nobody_is_trained_on_and_tested(shipped: dict[str, Rehearsal]) -> None:
    one = shipped["noise"]
    for fold in folds_of(one):
        trained = {row.tobytes() for row in fold.training.x.reshape(-1, fold.training.x.shape[-1])}
        tested = {row.tobytes() for row in fold.test.x.reshape(-1, fold.test.x.shape[-1])}
        assert len(trained & tested) <= 1, "only the empty row that fills up"


def test_where_artifacts_are_injected_a_patient_trains_in_all_versions(shipped: dict[str, Rehearsal]) -> None:
    one = shipped["contrast"]
    for labelled, injected in zip(folds_of(one), folds_of(one, views=True), strict=True):
        assert len(labelled.training.x) == len(injected.training.x)
        np.testing.assert_array_equal(labelled.test.x, injected.test.x)
        truth = injected.training.labels
        can_occur = ~np.isnan(truth).all(axis=1)
        assert (np.nanmax(truth, axis=1)[can_occur] == 1).all(), "with and without, of every artifact"
        assert (np.nanmin(truth, axis=1)[can_occur] == 0).all()


# ---- what is rehearsed is what is trained


def test_a_rehearsal_without_noise_is_the_training_of_a_hospital() -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((60, 48)).astype(np.float32)
    labels = np.where(rng.random((60, 5)) < 0.2, np.nan, rng.integers(0, 2, (60, 5))).astype(np.float32)
    owner = np.repeat(np.arange(20), 3)
    head = rng.standard_normal((5, 49)).astype(np.float32) * 0.1
    setting = Setting(clip_norm=0.1, learning_rate=20.0, steps_per_round=3, average_rounds=1)
    found = rehearse_training(
        head, grouped(features, labels, owner, np.ones(60, bool)), setting, rounds=2, deviation=0.0, seed=1
    )
    trained = train_private_head(
        head[:, :-1],
        head[:, -1],
        features,
        labels,
        owner,
        PrivateSteps(
            steps=6,
            learning_rate=20.0,
            clip_norm=0.1,
            noise_multiplier=0.0,
            sample_rate=1.0,
            nominal_patients=20,
            max_slices_per_patient=4,
        ),
    )
    np.testing.assert_allclose(found[-1][0, :, :-1], trained.weight, atol=2e-5)
    np.testing.assert_allclose(found[-1][0, :, -1], trained.bias, atol=2e-5)


def test_each_patients_gradient_is_clipped_by_its_own_length() -> None:
    """Against the gradients made one by one, for a clip that is longer than some of them."""
    rng = np.random.default_rng(2)
    features = rng.standard_normal((40, 48)).astype(np.float32)
    labels = rng.integers(0, 2, (40, 5)).astype(np.float32)
    patients = grouped(features, labels, np.arange(40) // 3, np.ones(40, bool))
    heads = rng.standard_normal((4, 5, 49)).astype(np.float32)
    found = tuning.clipped_mean(heads, patients, 1.2)
    for head, mean in zip(heads, found, strict=True):
        residual = (1 / (1 + np.exp(-patients.x @ head.T)) - np.nan_to_num(patients.labels)) * patients.weight
        each = np.einsum("pka,pkf->paf", residual, patients.x)
        lengths = np.sqrt(np.square(each).sum(axis=(1, 2)))
        assert lengths.min() < 1.2 < lengths.max()
        expected = (each * np.minimum(1, 1.2 / lengths)[:, None, None]).mean(axis=0)
        np.testing.assert_allclose(mean, expected, atol=1e-6)


def test_the_noise_of_a_rehearsal_is_that_of_the_mean_over_sites() -> None:
    plan = auto_plan(expected_sites=4, expected_patients=100)
    stated = plan.model_copy(
        update={"privacy": plan.privacy.model_copy(update={"settings": "stated", "clip_norm": 0.5})}
    )
    z = with_noise(stated).privacy.noise_multiplier
    assert z is not None
    assert tuning.noise_of_mean(stated) == pytest.approx(z * 0.5 * 2 / 400)  # four sums add their noise
    empty = grouped(
        np.zeros((1, 3), np.float32), np.full((1, 2), np.nan, np.float32), np.zeros(1, int), np.ones(1, bool)
    )
    setting = Setting(clip_norm=0.5, learning_rate=2.0, steps_per_round=400, average_rounds=1)
    heads = rehearse_training(np.zeros((2, 4), np.float32), empty, setting, rounds=1, deviation=0.01, seed=3)[
        -1
    ]
    assert heads.std() == pytest.approx(2.0 * 0.01 * 20, rel=0.3)


# ---- the choice


def test_the_choice_is_the_same_for_any_number_of_jobs(
    monkeypatch: pytest.MonkeyPatch, shipped: dict[str, Rehearsal]
) -> None:
    monkeypatch.setattr(tuning, "rehearsals_of", lambda *_, **__: {"noise": shipped["noise"]})
    real, here = tuning.rehearse_training, Counter[int]()
    found = {}
    for jobs in (1, 2, 3):

        def slowly(*words: Any, jobs: int = jobs, **names: Any) -> np.ndarray:
            here[jobs] += 1
            time.sleep(0 if jobs == 1 else 0.3)  # so that the others have a share
            return real(*words, **names)

        monkeypatch.setattr(tuning, "rehearse_training", slowly)
        found[jobs] = tuning.tune(auto_plan(expected_patients=200), jobs=jobs)
    assert found[3] == found[2] == found[1]
    assert max(here[2], here[3]) < here[1], "another process took part"


@pytest.mark.usefixtures("fewer")
def test_auto_writes_what_it_chose_and_how_into_the_plan() -> None:
    plan = auto_plan()
    signed, found = resolved(plan)
    assert found is not None
    chosen, privacy = found.chosen.setting, signed.privacy
    assert privacy.settings == "stated"
    assert (privacy.clip_norm, privacy.learning_rate) == (chosen.clip_norm, chosen.learning_rate)
    assert (privacy.steps_per_round, privacy.average_rounds) == (
        chosen.steps_per_round,
        chosen.average_rounds,
    )
    assert found.chosen.worst > 0
    assert digest(START)[:16] in privacy.origin
    assert plan_epsilon(signed) <= 2
    assert resolved(plan)[0].canonical_json() == signed.canonical_json(), "the same plan, the same choice"
    assert resolved(signed) == (signed, None)
    assert parse_plan(json.loads(signed.canonical_json())) == signed


@pytest.mark.usefixtures("fewer")
def test_the_choice_is_as_good_as_the_best_and_inside_its_grids() -> None:
    found = tuning.tune(auto_plan(epsilon=8.0))
    best = max(one.worst for one in found.tried)
    assert found.chosen.worst >= best - max(tuning.TOLERANCE, tuning.SHARE * best) - 1e-9
    assert RATES[0] < found.chosen.setting.rate < RATES[-1]
    assert CLIPS[0] < found.chosen.setting.clip_norm < CLIPS[-1]
    assert "chosen" in tuning_table(found)
    assert set(found.chosen.gains) == {"contrast", "noise"}


@pytest.mark.usefixtures("fewer")
def test_more_noise_is_answered_by_a_shorter_way() -> None:
    far, near = (tuning.tune(auto_plan(epsilon=epsilon, expected_patients=200)) for epsilon in (8.0, 0.5))

    def way(found: Any) -> float:
        setting: Setting = found.chosen.setting
        return setting.rate * setting.steps_per_round

    assert way(near) < way(far)
    assert near.chosen.worst < far.chosen.worst


@pytest.mark.usefixtures("fewer")
def test_noise_beyond_all_use_is_an_error_and_no_setting() -> None:
    with pytest.raises(PlanError) as caught:
        tuning.tune(auto_plan(epsilon=0.02, expected_sites=1, expected_patients=50))
    assert caught.value.code in ("nothing-to-gain", "optimum-at-edge")


def tried(rate: float, clip: float, worst: float, steps: int = 1) -> Tried:
    setting = Setting(clip_norm=clip, learning_rate=rate / clip, steps_per_round=steps, average_rounds=1)
    return Tried(setting=setting, gains={"a": worst, "b": 1.0}, spread=0.0)


def test_an_optimum_at_the_end_of_its_grid_is_an_error() -> None:
    few, many = tuning.steps_grid(8), tuning.steps_grid(90)
    assert (few[-1], many) == (16, [1, 2])
    for rate, clip, steps, grid, name in (
        (RATES[-1], 0.1, 1, few, "rate, 100,"),
        (RATES[0], 0.1, 1, few, "rate"),
        (3.0, CLIPS[0], 1, few, "clip_norm"),
        (3.0, 0.1, 16, few, "steps_per_round"),
        (3.0, 0.1, 2, many, "steps_per_round"),
    ):
        with pytest.raises(PlanError, match=f"the best {name}") as caught:
            tuning.refuse_edge(tried(rate, clip, 0.02, steps), grid)
        assert caught.value.code == "optimum-at-edge"
    tuning.refuse_edge(tried(3.0, 0.1, 0.02, 1), few)
    tuning.refuse_edge(tried(3.0, 0.1, 0.02, 1), tuning.steps_grid(1000))  # nothing else could be tried


def test_of_equals_the_one_that_depends_least_on_the_noise_is_chosen() -> None:
    calm = replace(tried(1.0, 0.1, 0.0195, 4), spread=0.002)
    best, poor = replace(tried(3.0, 0.1, 0.02), spread=0.01), replace(tried(0.3, 0.1, 0.01), spread=0.0)
    assert tuning.choose([best, calm, poor], [1, 4, 16]) is calm
    calmer = replace(tried(1.0, 0.1, 0.02, 16), spread=0.001)
    assert tuning.choose([best, calm, calmer], [1, 4, 16]) is calm  # inside the grid
    assert tuning.choose([calmer, poor], [1, 4, 16]) is calmer  # and is refused


def test_another_clip_is_taken_only_where_it_is_clearly_better() -> None:
    before = tried(3.0, 0.1, 0.02)
    assert tuning.choose_clip(before, [tried(3.0, 0.03, 0.0205)]) is before
    better = tried(3.0, 0.3, 0.03)
    assert tuning.choose_clip(before, [better, tried(3.0, 0.03, 0.0205)]) is better
    # shorter than all gradients: they are equal but for the draws
    short = [tried(3.0, clip, worst) for clip, worst in ((0.003, 0.0303), (0.01, 0.0304), (0.03, 0.0299))]
    assert tuning.choose_clip(before, short) is short[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sites", "patients", "rounds"), [(2, 50, 6), (3, 100, 6), (4, 200, 6), (5, 500, 20)]
)
@pytest.mark.parametrize("epsilon", [1, 2, 8])
def test_auto_has_an_answer_for_plans_as_hospitals_would_have_them(
    epsilon: int, sites: int, patients: int, rounds: int
) -> None:
    plan = auto_plan(epsilon=epsilon, expected_sites=sites, expected_patients=patients)
    plan = plan.model_copy(update={"training": plan.training.model_copy(update={"rounds": rounds})})
    assert tuning.tune(plan).chosen.worst > 0


def test_the_worst_shift_decides() -> None:
    uneven = Tried(setting=tried(1.0, 0.1, 0).setting, gains={"a": -0.01, "b": 0.2}, spread=0.0)
    assert tuning.choose([uneven, tried(3.0, 0.1, 0.005)], [1, 16]).worst == 0.005
    with pytest.raises(PlanError) as caught:
        tuning.choose([uneven], [1, 16])
    assert caught.value.code == "nothing-to-gain"


@pytest.mark.parametrize(
    "privacy",
    [{"sample_rate": 0.5}, {"noise_multiplier": 5.0}, {"trainable": "all"}],
    ids=["sampled patients", "stated noise", "whole network"],
)
def test_what_cannot_be_rehearsed_is_said(privacy: dict[str, Any]) -> None:
    with pytest.raises(PlanError) as caught:
        tuning.tune(auto_plan(**privacy))
    assert caught.value.code == "auto-not-possible"


def test_a_plan_that_states_its_settings_keeps_them() -> None:
    plan = parse_plan({"name": "stated", "arms": ["federated_dp"]})
    assert resolved(plan, progress=silent) == (with_noise(plan), None)


def test_auto_and_a_stated_setting_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="settings = auto chooses learning_rate"):
        auto_plan(learning_rate=1.0)


def test_an_open_plan_is_not_priced() -> None:
    with pytest.raises(PlanError) as caught:
        with_noise(auto_plan())
    assert caught.value.code == "settings-open"


def test_an_open_plan_keeps_its_text() -> None:
    plan = auto_plan(expected_sites=5)
    assert parse_plan(json.loads(plan.canonical_json())) == plan


def test_a_plan_without_a_private_arm_has_nothing_to_tune() -> None:
    with pytest.raises(PlanError) as caught:
        with_auto(parse_plan({"name": "open"}))
    assert caught.value.code == "nothing-to-tune"
    with pytest.raises(PlanError) as caught:
        resolved(parse_plan({"name": "open", "privacy": {"settings": "auto"}}))
    assert caught.value.code == "nothing-to-tune"


def test_the_command_writes_a_plan_that_a_hospital_can_price(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "ours",
                "arms": ["public", "federated_dp"],
                "training": {"rounds": 2},
                "privacy": {"epsilon": 8.0},
            }
        )
    )
    words = ["run", "tune", "plan.yaml", "--sites", "4", "--patients", "200", "--out", "tuned.yaml"]
    said = fedqc(*words, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "4 sites of 200 patients" in said.stdout
    tuned = read_plan(tmp_path / "tuned.yaml")
    assert tuned.privacy.origin.startswith("auto: worst gain +")
    assert with_noise(tuned) == tuned


@pytest.mark.usefixtures("fewer")
def test_a_started_run_is_given_how_its_settings_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.cli import run as commands

    ordered: list[tuple[RunPlan, Any]] = []
    monkeypatch.setattr(
        commands,
        "open_federation",
        lambda _: SimpleNamespace(folder=tmp_path, state=tmp_path / "state", runs=tmp_path / "runs"),
    )
    monkeypatch.setattr(commands, "submit", lambda _, plan, name, order: ordered.append((plan, order)))
    monkeypatch.setattr(commands, "follow_start", lambda *_, **__: 0)
    monkeypatch.setattr(commands, "usable_cores", lambda: 1)  # `fewer` is known to this process alone
    for settings in ("auto", "stated"):
        plan = auto_plan(settings=settings)
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.model_dump(mode="json")), encoding="utf-8")
        assert commands.start(tmp_path / "plan.yaml", name="one") == 0
    (chosen, order), (_, without) = ordered
    assert order.tuning is not None
    assert tuning_digest(json.loads(order.model_dump_json())["tuning"])[:16] in chosen.privacy.origin
    assert without.tuning is None
