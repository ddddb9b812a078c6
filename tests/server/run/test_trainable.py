"""Runs whose private arm trains more than the head: what moves, what leaves, and that they are recomputed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from client.agent.tasks import Agent
from common.errors import PlanError
from common.model_file import load_model
from common.trainable import private_part
from common.weights import digest, encode_steps, outside, part_size
from common.wire import Refusal, SiteUpdate
from server.run.recompute import recompute
from server.run.tune import tune
from server.run_folder import RunFolder
from tests.helpers.consortium import TRAINING, Consortium, tiny_plan
from tests.helpers.site_agent import BASE, MANIFEST, A, train_task

CASES = [
    ("norms", "opacus", "lossless"),
    ("norms", "patient_loop", "plain"),
    ("all", "opacus", "int8"),
    ("all", "patient_loop", "lossless"),
]


def plan_of(trainable: str, engine: str = "patient_loop", codec: str = "lossless"):
    return tiny_plan(
        name="deep",
        arms=["public", "federated_dp"],
        privacy={"trainable": trainable, "engine": engine, "learning_rate": 0.1, "sample_rate": 0.5},
        federation={"codec": codec, "patience_s": 0.0},
    )


@pytest.mark.parametrize(("trainable", "engine", "codec"), CASES)
def test_a_run_trains_what_its_plan_says_and_is_recomputed_bit_for_bit(
    trainable: str, engine: str, codec: str, consortium: Consortium, tmp_path: Path
) -> None:
    plan = plan_of(trainable, engine, codec)
    folder = consortium.conduct(plan, tmp_path / "run")
    assert folder.evaluation["status"] == "completed", folder.evaluation["incomplete"]
    part = private_part(folder.plan)
    for number in (1, 2):
        model = load_model(folder.arm("federated_dp").checkpoint_path(number), MANIFEST)
        frozen = outside(part, MANIFEST.size)
        np.testing.assert_array_equal(model[frozen], BASE[frozen])
        assert (model[part] != BASE[part]).mean() > 0.95
    found = {finding.check: finding for finding in recompute(RunFolder.open(folder.path))}
    assert found["federated_dp"].holds is True, found
    assert found["federated_dp, model"].holds is True
    claims = folder.evaluation["privacy"]
    assert all(1.9 < claims[site]["epsilon"] <= 2 for site in TRAINING)


def test_a_run_of_another_part_is_not_recomputed(consortium: Consortium, tmp_path: Path) -> None:
    """The control: of an update for the head the rest of the network does not follow."""
    folder = consortium.conduct(plan_of("norms"), tmp_path / "run")
    text = (folder.path / "plan.yaml").read_text(encoding="utf-8")
    assert "trainable: norms" in text
    (folder.path / "plan.yaml").write_text(text.replace("trainable: norms", "trainable: all"))
    found = {finding.check: finding for finding in recompute(RunFolder.open(folder.path))}
    assert found["federated_dp"].holds is False


def test_settings_of_more_than_the_head_are_not_chosen_by_rehearsals_of_the_head() -> None:
    plan = tiny_plan(name="deep", arms=["federated_dp"], privacy={"settings": "auto", "trainable": "norms"})
    with pytest.raises(PlanError, match="only the head is rehearsed") as refused:
        tune(plan)
    assert refused.value.code == "auto-not-possible"


@pytest.fixture
def data(tiny_consortium: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


def test_a_frozen_weight_that_moved_is_refused_and_a_trained_one_may_move(data: Path) -> None:
    plan = plan_of("norms")
    part = private_part(plan)
    agent = Agent(data / A / "site.yaml", plan)
    assert isinstance(agent.train(train_task()), SiteUpdate)
    for position, refused in (
        (int(outside(part, MANIFEST.size)[7]), True),
        (int(np.arange(MANIFEST.size)[part][7]), False),
    ):
        base = BASE.copy()
        base[position] += np.float32(0.5)
        said = agent.train(train_task(base=base, round=2, base_sha256=digest(base)))
        assert isinstance(said, Refusal) == refused, said
        assert not refused or said.code == "crafted-model"


def test_a_site_follows_by_the_steps_of_the_trained_part(data: Path) -> None:
    plan = plan_of("norms")
    agent = Agent(data / A / "site.yaml", plan)
    assert isinstance(agent.train(train_task()), SiteUpdate)
    steps = np.arange(part_size(private_part(plan)), dtype=np.int32)
    after = BASE.copy()
    after[private_part(plan)] += (steps * 2.0**-24).astype(np.float32)
    said = agent.train(
        train_task(base=encode_steps(steps), held_sha256=digest(BASE), base_sha256=digest(after), round=2)
    )
    assert isinstance(said, SiteUpdate), said
    short = encode_steps(steps[:-1])
    refusal = agent.train(train_task(base=short, held_sha256=said.base_sha256, round=2, run="other"))
    assert isinstance(refusal, Refusal)
