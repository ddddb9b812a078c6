"""The attack on a site's next update is certain without noise, as good as theory with it, and read-only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.tasks import prepare
from client.dp import dp_sgd
from client.dp.release import noise_deviation, to_grid_steps
from client.privacy_checks.attack import FirstStep, attack, attacked
from client.privacy_checks.own_patients import own_patients
from client.site.budget import budgets
from common.cli import Format
from common.errors import ConfigError, DataError
from common.plan import RunPlan
from common.pricing import with_noise
from common.privacy import GaussianSteps, guess_bounds
from common.verify import verify_command
from tests.helpers.consortium import HELD_OUT, TRAINING, settle, tiny_plan, write_plan

CLIP, SIZE, PATIENTS, DRAWS = 0.5, 40, 12, 500


def step_of(*, noise: float = 1.5, steps: int = 2, rate: float = 1.0, longest: float = 3.0) -> FirstStep:
    """Gradients of all lengths up to `longest` clips, before clipping."""
    generator = np.random.default_rng(3)
    directions = generator.standard_normal((PATIENTS, SIZE))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    before = np.linspace(0.05, longest, PATIENTS)
    request = dp_sgd.PrivateSteps(
        steps=1,
        learning_rate=1.0,
        clip_norm=CLIP,
        noise_multiplier=noise,
        sample_rate=rate,
        nominal_patients=10,
        max_slices_per_patient=4,
    )
    return FirstStep(
        gradients=(directions * before[:, None] * CLIP).astype(np.float32),
        lengths=np.minimum(before, 1.0),
        request=request,
        run=GaussianSteps(noise_multiplier=noise, sample_rate=rate, steps=steps),
        patients=PATIENTS + 1,
    )


def test_without_noise_the_attacker_is_certain_and_with_noise_as_good_as_theory() -> None:
    found = attacked(step_of(), draws=DRAWS)
    assert [one.without_noise for one in found.groups] == [1.0, 1.0, 1.0]
    longest = found.groups[0]
    assert longest.length == pytest.approx(1.0)
    assert longest.expected == pytest.approx(found.bounds)
    for measured, theory in zip(
        (longest.with_noise, longest.auc), guess_bounds([step_of().run]), strict=True
    ):
        assert abs(measured.value - theory) < 4.5 * measured.error
    assert found.holds
    assert found.without_gradient == 1


def test_a_shorter_gradient_gives_less_away() -> None:
    found = attacked(step_of(noise=0.6, longest=1.0), draws=DRAWS)
    longest, median = found.groups[:2]
    assert median.length < 0.7
    assert median.with_noise.value < longest.with_noise.value - 0.05
    assert abs(median.with_noise.value - median.expected.accuracy) < 4.5 * median.with_noise.error


@pytest.mark.parametrize("noise", [1.5, 6.0])
def test_half_the_noise_is_above_the_bound(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "noise_deviation", lambda *asked: noise_deviation(*asked) / 2)
    assert not attacked(step_of(noise=noise), draws=2000).holds


def test_noise_that_is_left_out_is_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "release", lambda total, deviation, coins: total)
    found = attacked(step_of(), draws=100)
    assert found.groups[0].with_noise.value == 1.0
    assert not found.holds


def test_a_patient_who_moves_the_sum_by_more_than_the_clip_is_above_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_groups(chunks: Iterator[np.ndarray], size: int, clip_norm: float, grid: float) -> np.ndarray:
        parts = [
            to_grid_steps(chunk[:, group], clip_norm, grid).sum(axis=0)
            for chunk in chunks
            for group in np.array_split(np.arange(size), 8)
        ]
        return np.concatenate(parts) if parts else np.zeros(size, np.int64)

    monkeypatch.setattr(dp_sgd, "clipped_integer_sum", in_groups)
    assert not attacked(step_of(noise=3.0, longest=20.0), draws=1000).holds


def test_coins_that_the_attacker_does_not_know_protect() -> None:
    all_take_part, some = (attacked(step_of(rate=rate, steps=4), draws=DRAWS) for rate in (1.0, 0.25))
    assert some.holds
    assert some.groups[0].with_noise.value < all_take_part.groups[0].with_noise.value - 0.05
    assert 0.5 < some.bounds.accuracy < all_take_part.bounds.accuracy


def test_likeness_falls_with_the_noise() -> None:
    loud, quiet = (attacked(step_of(noise=noise), draws=100).likeness for noise in (5.0, 0.2))
    assert loud.others_subtracted == pytest.approx(1.0)
    assert loud.update == pytest.approx(quiet.update)
    assert loud.others_subtracted_noised < 0.15 < quiet.others_subtracted_noised
    assert abs(loud.update_noised) < quiet.update


# at a site


A = TRAINING[0]


def private_plan(**changes: Any) -> RunPlan:
    return with_noise(tiny_plan(**({"arms": ["federated_dp"], "held_out": [HELD_OUT]} | changes)))


def contents(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Of every file: digest, size, time of the last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for path in files
    }


@pytest.fixture
def hospital(data: Path) -> Path:
    """A hospital with a ledger, whose images are prepared."""
    settle(data / A, {"max_epsilon": 8.0}, kind="hospital")
    prepare(data / A / "site.yaml", tiny_plan())
    return data / A


def test_the_command_says_what_an_attacker_learns_and_writes_nothing(
    hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    spent = budgets(hospital)
    before = contents(hospital)
    assert verify_command(attack=True, site=hospital, plan=plan) == 0
    assert contents(hospital) == before
    assert budgets(hospital) == spent
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing was spent, written or released." in said
    assert "do not send it" in said
    assert "without noise, in 100. A coin: 50." in said
    assert "ε 2.00 at δ 1e-05 per patient" in said


def test_json_holds_every_figure(hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    package = Path(dp_sgd.__file__).parents[2] / "common/models/small_cnn_real.safetensors"
    assert verify_command(attack=True, site=hospital, plan=plan, model=[package], format=Format.json) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] is True
    assert said["steps"] == 2
    assert [one["without_noise"] for one in said["groups"]] == [1.0, 1.0, 1.0]
    assert all(
        one["advantage"] == pytest.approx(2 * one["with_noise"]["value"] - 1) for one in said["groups"]
    )
    assert said["likeness"]["others_subtracted"] == pytest.approx(1.0)
    assert said["membership"][str(package)]["auc"] == 0.5  # the public model, less itself
    assert "do not send" in said["note"]


@pytest.mark.parametrize(
    ("engine", "training"),
    [("opacus", {}), ("patient_loop", {}), ("opacus", {"inject": {"views": 2}})],
    ids=["opacus", "patient loop", "views"],
)
def test_the_gradients_are_those_that_training_clips(
    engine: str, training: dict[str, Any], hospital: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum that an agent's first step adds noise to is that of the attack, bit for bit."""
    from client.agent.tasks import Agent
    from client.privacy_checks import attack as module
    from client.privacy_checks.mechanism import releases
    from tests.helpers.site_agent import train_task, update_of

    # all slices of everybody, so that no draw of slices differs
    plan = private_plan(
        held_out=[HELD_OUT], privacy={"max_slices_per_patient": 64, "engine": engine}, training=training
    )
    if "inject" in training:  # of the same run, so that the coins of the views are the same
        monkeypatch.setattr(module, "ATTACK", "r")
    step = module.first_step(own_patients(hospital, plan), plan)
    with releases() as attacked_sum:
        dp_sgd.noised_sum(iter([step.gradients]), step.gradients.shape[1], step.request, dp_sgd.Coins())
    with releases() as trained:
        update_of(Agent(hospital / "site.yaml", plan).train(train_task()))
    assert np.array_equal(attacked_sum[0].total, trained[0].total)
    assert attacked_sum[0].deviation == trained[0].deviation


def test_a_site_that_is_not_prepared_is_refused_and_left_alone(hospital: Path) -> None:
    other = private_plan(image_size=48)
    before = contents(hospital)
    with pytest.raises(DataError) as refused:
        own_patients(hospital, other)
    assert refused.value.code == "not-prepared"
    image = next(path for path in (hospital / "images").rglob("*") if path.is_file())
    image.rename(image.with_name("renamed.dcm"))
    changed = contents(hospital)
    with pytest.raises(DataError, match="not prepared"):
        own_patients(hospital, private_plan())
    assert contents(hospital) == changed
    assert changed != before


def test_a_folder_without_a_key_gets_none(hospital: Path) -> None:
    (hospital / "state" / "site.key").unlink()
    with pytest.raises(DataError, match="not prepared"):
        own_patients(hospital, private_plan())
    assert not (hospital / "state" / "site.key").exists()


def test_a_site_without_labels_of_training_patients_has_nothing_to_attack(hospital: Path) -> None:
    lines = (hospital / "labels.csv").read_text(encoding="utf-8").splitlines()
    (hospital / "labels.csv").write_text(f"{lines[0]}\n", encoding="utf-8")
    with pytest.raises(DataError):
        attack(own_patients(hospital, private_plan()), private_plan())


def test_a_plan_that_trains_more_than_the_head_is_refused(hospital: Path) -> None:
    plan = private_plan(privacy={"trainable": "norms"})
    with pytest.raises(ConfigError, match="the head alone") as refused:
        attack(own_patients(hospital, plan), plan)
    assert refused.value.code == "bad-argument"


def test_a_site_that_the_plan_holds_out_is_refused(hospital: Path) -> None:
    with pytest.raises(ConfigError, match="holds this site out"):
        own_patients(hospital, private_plan(held_out=[A]))


@pytest.mark.parametrize(
    "asked",
    [
        {"attack": True, "privacy": True},
        {"attack": True, "run": Path("r")},
        {"attack": True, "audit": True},
        {"privacy": True, "site": Path("s")},
        {"run": Path("r"), "model": [Path("m")]},
    ],
)
def test_verify_answers_one_question(asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either a run folder"):
        verify_command(**asked)
