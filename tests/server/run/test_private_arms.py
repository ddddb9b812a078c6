"""Private arms of one run: each hospital alone and all together, and the mean over rounds as the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.agent.job import Job
from client.agent.tasks import Agent
from common.errors import DataError, RefusedError
from common.model_file import load_model, save_model
from common.models import build
from common.plan import RunPlan, parse_plan
from common.pricing import charges, plan_epsilon, with_noise
from common.privacy import epsilon_of
from common.weights import manifest_of
from common.wire import DescribeTask, SiteReadiness, SiteUpdate, TrainTask
from server.evaluation.report.page import write_report
from server.evaluation.report.words import ENGLISH
from server.evaluation.tables import ALTERNATIVES, table
from server.run.privacy_claims import merged
from server.run.recompute import recompute
from server.run_folder import RunFolder
from tests.helpers.consortium import TRAINING, Consortium, settle, tiny_plan

MANIFEST = manifest_of(build("small_cnn").state_dict())
BOTH = ["public", "local_dp", "federated_dp"]


def private_plan(**privacy: object) -> RunPlan:
    values = {"epsilon": 8.0, "average_rounds": 2, "alternatives": True, "clip_norm": 0.1} | privacy
    return with_noise(tiny_plan(name="private", arms=BOTH, training={"rounds": 3}, privacy=values))


@pytest.fixture
def run(consortium: Consortium, tmp_path: Path) -> RunFolder:
    found: RunFolder = consortium.conduct(private_plan(), tmp_path / "run")
    return found


def test_each_hospital_alone_and_all_together_have_private_models_and_claims(run: RunFolder) -> None:
    evaluation = run.evaluation
    assert evaluation["private_arms"] == ["local_dp", "federated_dp"]
    alone = {f"local_dp/{name}" for name in TRAINING}
    assert set(evaluation["matrix"]) == {"public", "federated_dp", *alone}
    assert set(evaluation["privacy"]) == set(TRAINING)
    assert all((claim["epsilon"] or 99) <= 8 for claim in evaluation["privacy"].values())
    own, shared = (
        load_model(run.arm(*words).model_path, MANIFEST)
        for words in (("local_dp", TRAINING[0]), ("federated_dp",))
    )
    head = MANIFEST.part("head.")
    assert np.array_equal(own[: head.start], shared[: head.start])
    assert not np.array_equal(own[head], shared[head])


def test_alternatives_are_named_wherever_their_epsilon_stands(
    run: RunFolder, consortium: Consortium, tmp_path: Path
) -> None:
    sentence = ENGLISH["privacy.alternatives"]
    assert ALTERNATIVES in table(run.evaluation)
    assert sentence in write_report(run).read_text(encoding="utf-8")
    plan = tiny_plan(arms=["public", "federated_dp"], privacy={"epsilon": 8.0, "alternatives": True})
    alone = consortium.conduct(with_noise(plan), tmp_path / "alone")
    assert ALTERNATIVES not in table(alone.evaluation)
    assert sentence not in write_report(alone).read_text(encoding="utf-8")


def test_the_model_of_a_private_arm_is_the_mean_of_its_last_rounds(run: RunFolder) -> None:
    for folder in (run.arm("federated_dp"), run.arm("local_dp", TRAINING[0])):
        second, third = (load_model(folder.checkpoint_path(number), MANIFEST) for number in (2, 3))
        model = load_model(folder.model_path, MANIFEST)
        np.testing.assert_allclose(model, (second.astype(np.float64) + third) / 2, rtol=1e-6)
        assert not np.array_equal(model, third)


def test_a_recomputed_mean_holds_and_another_model_does_not(run: RunFolder) -> None:
    assert all(finding.holds is not False for finding in recompute(run))
    folder = run.arm("federated_dp")
    save_model(folder.model_path, load_model(folder.checkpoint_path(3), MANIFEST), MANIFEST, {})
    wrong = [finding for finding in recompute(run) if finding.holds is False]
    assert [finding.check for finding in wrong] == ["federated_dp, model"]
    assert "mean of 2 rounds up to 3" in wrong[0].detail


def train_until(arm: str, number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first site refuses an arm from this round on, or fails."""
    train = Agent._train_private

    def refusing(agent: Agent, task: TrainTask, job: Job) -> SiteUpdate:
        if agent.name == TRAINING[0] and task.arm == arm and task.round >= number:
            raise (DataError("gone", code=code) if code == "no-data" else RefusedError("no", code=code))
        return train(agent, task, job)

    monkeypatch.setattr(Agent, "_train_private", refusing)


def test_a_site_that_refuses_the_next_private_arm_keeps_what_it_spent(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until("federated_dp", 1, "budget-exhausted", monkeypatch)
    found = consortium.conduct(private_plan(), tmp_path / "run").evaluation["privacy"]
    assert 7 < found[TRAINING[0]]["epsilon"] <= 8
    assert found[TRAINING[0]]["refused"]["code"] == "budget-exhausted"
    assert found[TRAINING[1]]["refused"] is None


def test_an_arm_of_one_site_that_fails_keeps_what_its_rounds_spent(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until("local_dp", 2, "no-data", monkeypatch)
    plan = private_plan().model_copy(update={"arms": ("public", "local_dp")})
    evaluation = consortium.conduct(plan, tmp_path / "run").evaluation
    assert any("local_dp/hospital-a: failed" in line for line in evaluation["incomplete"])
    assert 7 < evaluation["privacy"][TRAINING[0]]["epsilon"] <= 8


def test_void_in_one_arm_is_void_in_all() -> None:
    void = {"a": {"epsilon": None, "void": "no claim", "refused": None}}
    claim = {"a": {"epsilon": 2.0, "refused": None}}
    refused = {"a": {"epsilon": None, "refused": {"code": "x"}}}
    assert merged(void, claim) == merged(claim, void) == void
    assert merged(claim, refused)["a"] == {"epsilon": 2.0, "refused": {"code": "x"}}
    assert merged(refused, claim)["a"] == {"epsilon": 2.0, "refused": {"code": "x"}}
    assert merged(claim, {"b": claim["a"]}) == claim | {"b": claim["a"]}


def test_one_epsilon_covers_both_private_arms_and_alternatives_cost_it_each() -> None:
    together = private_plan(alternatives=False)
    apart = private_plan()
    one = with_noise(
        tiny_plan(name="one", arms=["federated_dp"], training={"rounds": 3}, privacy={"epsilon": 8.0})
    )
    assert apart.privacy.noise_multiplier == one.privacy.noise_multiplier
    assert together.privacy.noise_multiplier is not None
    assert one.privacy.noise_multiplier is not None
    assert together.privacy.noise_multiplier == pytest.approx(one.privacy.noise_multiplier * 2**0.5, rel=2e-3)
    assert plan_epsilon(together) <= 8
    assert plan_epsilon(apart) <= 8
    # what alternatives would cost one hospital that trained both: more than the plan says
    sums = list(charges(apart).values())
    assert epsilon_of(sums, apart.privacy.delta) > 8.5


def test_a_hospital_refuses_alternatives(consortium: Consortium, tmp_path: Path) -> None:
    for name in TRAINING:
        settle(consortium.data / name, kind="hospital", nominal_patients=50)
    agent = Agent(consortium.data / TRAINING[0] / "site.yaml", private_plan())
    said = agent.describe(DescribeTask(run="r", rehearse=True))
    assert isinstance(said, SiteReadiness)
    assert said.arms["federated_dp"] == said.arms["local_dp"] == "alternatives"


def test_steps_of_a_round_are_as_stated_and_priced() -> None:
    few, many = (
        with_noise(
            parse_plan(
                {"name": "steps", "arms": ["federated_dp"], "privacy": {"epsilon": 2.0, "steps_per_round": n}}
            )
        )
        for n in (1, 4)
    )
    assert (few.private_steps_per_round, many.private_steps_per_round) == (1, 4)
    assert few.privacy.noise_multiplier is not None
    assert many.privacy.noise_multiplier is not None
    assert many.privacy.noise_multiplier == pytest.approx(2 * few.privacy.noise_multiplier, rel=2e-3)
