"""The control of a private arm is that arm with noise 0, in a simulation: no claim, and no price."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from client.agent.trained_models import was_trained
from common.arms import FINAL_ARMS, is_control
from common.errors import PlanError, RefusedError
from common.i18n import speaker
from common.lineage import KEY, Lineage
from common.model_file import load_model
from common.plan import RunPlan, parse_plan
from common.pricing import charges, plan_epsilon, with_noise
from common.trainable import trained_part
from common.weights import part_size
from common.wire import DescribeTask, SiteReadiness
from server.cli.run import _read_known_plan
from server.evaluation.compare import about, privacy_line
from server.evaluation.model_card import model_card
from server.evaluation.report.page import render
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation.tables import table
from server.run.conduct import conduct
from server.run.recompute import recompute
from server.run_folder import RunFolder
from tests.helpers.consortium import TRAINING, Consortium, settle, tiny_plan, write_plan
from tests.helpers.site_agent import (
    BASE,
    HEAD,
    MANIFEST,
    A,
    agent,
    evaluate_task,
    refusal_of,
    rows,
    train_task,
    update_of,
)

PERMITS = {"allow_non_private": True, "evaluation": "synthetic"}
PAIRS = (("federated_dp", "federated_clipped"), ("local_dp", "local_clipped"))
ALL = ["public", *(arm for pair in PAIRS for arm in pair)]


def plan_of(arms: list[str], **changes: Any) -> RunPlan:
    privacy = {"epsilon": 8.0, "average_rounds": 2, "clip_norm": 0.1, "alternatives": True}
    values: dict[str, Any] = {"name": "controlled", "arms": arms, "training": {"rounds": 3}}
    privacy |= changes.pop("privacy", {})
    return with_noise(tiny_plan(**values | changes, privacy=privacy))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def _no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dp.dp_sgd.release", lambda total, deviation, coins: total)


def both(data: Path, plan: RunPlan) -> tuple[Any, Any]:
    """The first update of the private arm and of its control, at one site in one run."""
    asked = agent(data, plan=plan)
    return (
        update_of(asked.train(train_task())),
        update_of(asked.train(train_task(arm="federated_clipped", private=False))),
    )


@pytest.mark.usefixtures("_no_noise")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy": {"steps_per_round": 3}},
        {"privacy": {"trainable": "norms"}},
        {"training": {"rounds": 1, "inject": {"views": 3}}},
    ],
)
def test_a_control_is_the_private_arm_with_its_noise_removed_bit_for_bit(
    data: Path, changes: dict[str, Any]
) -> None:
    private, control = both(data, plan_of(["federated_dp", "federated_clipped"], **changes))
    assert private.update.any()
    assert np.array_equal(private.update, control.update)
    assert (control.private, control.epsilon, control.delta, control.noise_multiplier) == (
        False,
        None,
        None,
        0.0,
    )


def test_with_its_noise_the_private_arm_is_another(data: Path) -> None:
    private, control = both(data, plan_of(["federated_dp", "federated_clipped"]))
    assert (private.update != control.update).mean() > 0.99


@pytest.mark.usefixtures("_no_noise")
def test_a_whole_run_hands_the_same_models_on(consortium: Consortium, tmp_path: Path) -> None:
    folder = consortium.conduct(plan_of(ALL), tmp_path / "run")
    for private, control in PAIRS:
        sites: tuple[str | None, ...] = TRAINING if private == "local_dp" else (None,)
        for site in sites:
            one, other = (
                load_model(folder.arm(arm, site).model_path, MANIFEST) for arm in (private, control)
            )
            assert np.array_equal(one, other)
            assert not np.array_equal(one, BASE)
    chosen = folder.evaluation["chosen_rounds"]
    assert {chosen[name] for name in chosen} == {3}
    rows = folder.evaluation["contrasts"]
    cost = [row for row in rows if (row["arm"], row["other"]) in PAIRS and row["value"] is not None]
    assert {(row["arm"], row["other"]) for row in cost} == set(PAIRS)
    assert [row["value"] for row in cost] == pytest.approx([0.0] * len(cost), abs=1e-12)  # means are rounded


@pytest.fixture
def run(consortium: Consortium, tmp_path: Path) -> RunFolder:
    found: RunFolder = consortium.conduct(plan_of(ALL), tmp_path / "run")
    return found


def test_no_claim_stands_beside_a_control(run: RunFolder) -> None:
    evaluation = run.evaluation
    assert evaluation["private_arms"] == ["federated_dp", "local_dp"]
    assert all(claim["epsilon"] for claim in evaluation["privacy"].values())
    for arm, site in (("federated_clipped", None), ("local_clipped", A)):
        assert [record["claims"] for record in run.arm(arm, site).rounds()] == [{}, {}, {}]
    reading = Reading(evaluation, speaker("en", LANGUAGES))
    for name in ("federated_clipped", "local_clipped"):
        assert reading.privacy_tag(name) == "not private"
        assert reading.label(name) == name
        assert f"{name}: noise 0, NOT PRIVATE" in table(evaluation)
        unknown = {"value": None, "low": None, "high": None}
        shown = evaluation | {"scores": {name: {"home": unknown, "unseen": unknown}}}
        assert "NOT PRIVATE" in model_card(shown, name, run.plan.model.model_dump())
    page = render(evaluation, run.manifest, run.plan)
    for private, control in PAIRS:
        assert f">{private} − {control}</td>" in page
        assert f"{control} is the same training with noise 0, and is not private." in page
    assert "federated_clipped (ε" not in page
    assert "clipped" not in privacy_line(about(evaluation))
    lines = table(evaluation).splitlines()
    places = [line.rstrip() for line in lines[: 1 + len(ALL)]]
    assert len({len(line) for line in places}) == 1  # no name of an arm moves its row


def test_its_model_and_what_is_trained_from_it_are_not_the_ones_handed_on(run: RunFolder) -> None:
    with safetensors.safe_open(run.path / "model.safetensors", framework="np") as file:
        assert file.metadata()["arm"] == "federated_dp"
    assert not any(is_control(arm) for arm in FINAL_ARMS)
    with safetensors.safe_open(run.arm("federated_clipped").model_path, framework="np") as file:
        assert file.metadata()["arm"] == "federated_clipped"
        assert Lineage.parse(file.metadata()[KEY]) is not None


def test_a_run_with_controls_is_recomputed(run: RunFolder) -> None:
    found = {finding.check: finding.holds for finding in recompute(run)}
    assert all(holds is not False for holds in found.values())
    assert found["federated_clipped"] is True
    assert found["federated_clipped, model"] is True
    size = part_size(trained_part(run.plan, "federated_clipped"))
    assert size == HEAD.stop - HEAD.start


def test_a_run_stopped_in_a_control_resumes_to_the_same_bits(
    consortium: Consortium, data: Path, tmp_path: Path
) -> None:
    plan = plan_of(["public", "federated_clipped"])
    whole = Consortium(data=data).conduct(plan, tmp_path / "whole")
    consortium.stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        consortium.conduct(plan, tmp_path / "stopped")
    consortium.stop_at = None
    resumed = consortium.conduct(plan, tmp_path / "stopped")
    one, other = (
        load_model(folder.arm("federated_clipped").model_path, MANIFEST) for folder in (whole, resumed)
    )
    assert np.array_equal(one, other)


def test_where_the_private_arm_is_refused_the_control_is_not_handed_on(
    consortium: Consortium, tmp_path: Path
) -> None:
    for name in TRAINING:
        settle(consortium.data / name, policy={"max_epsilon_per_run": 1.0} | PERMITS)
    folder = consortium.conduct(plan_of(["public", "federated_dp", "federated_clipped"]), tmp_path / "run")
    assert folder.evaluation["private_arms"] == []
    assert "federated_clipped" in folder.evaluation["matrix"]
    with safetensors.safe_open(folder.path / "model.safetensors", framework="np") as file:
        assert file.metadata()["arm"] == "public"
    with pytest.raises(RefusedError, match="no arm could run"):
        consortium.conduct(plan_of(["federated_dp", "federated_clipped"]), tmp_path / "nothing")


def test_a_hospital_refuses_the_whole_plan_and_nothing_is_charged(consortium: Consortium, out: Path) -> None:
    data = consortium.data
    settle(data / A, kind="hospital", policy={"allow_non_private": True, "after_non_private": "void"})
    plan = plan_of(["federated_dp", "federated_clipped"], privacy={"alternatives": False})
    asked = agent(data, plan=plan)
    said = asked.describe(DescribeTask(run="r", rehearse=True))
    assert isinstance(said, SiteReadiness)
    assert set(said.arms.values()) == {said.evaluation} == {"simulation-only"}
    for answer in (
        asked.train(train_task()),
        asked.train(train_task(arm="federated_clipped", private=False)),
        asked.evaluate(evaluate_task()),
    ):
        assert refusal_of(answer).code == "simulation-only"
    assert rows(data) == []
    with pytest.raises(PlanError, match=f"{A} is a hospital") as caught:
        consortium.conduct(plan, out)
    assert caught.value.code == "simulation-only"
    assert not out.exists()


def test_a_deployed_run_refuses_a_control_before_a_site_is_asked(
    consortium: Consortium, tmp_path: Path, out: Path
) -> None:
    plan = plan_of(["public", "federated_clipped"])
    with pytest.raises(PlanError) as caught:
        conduct(consortium.grid(plan, out), plan, out)
    assert caught.value.code == "simulation-only"
    assert not out.exists()
    assert {kind for _, kind in consortium.asked} == {"query.describe"}
    with pytest.raises(PlanError) as caught:
        _read_known_plan(write_plan(tmp_path / "plan.yaml", arms=["public", "local_clipped"]))
    assert caught.value.code == "simulation-only"


def test_a_declared_site_treats_it_as_trained_without_noise(data: Path) -> None:
    declared = {"by": "me", "at": "2026-01-01", "why": "phantoms", "images": "images"}
    settle(data / A, declared_not_hospital=declared)
    asked = agent(data, plan=plan_of(["federated_dp", "federated_clipped"]))
    update_of(asked.train(train_task(arm="federated_clipped", private=False)))
    assert rows(data) == [("non-private", "", 0)]
    state = data / A / "state"
    assert not was_trained(state, BASE, HEAD)  # the public part, which it left as it was
    finished = BASE.copy()
    finished[HEAD] += 1
    asked.evaluate(
        evaluate_task().model_copy(update={"models": ("federated_clipped",), "weights": finished[None]})
    )
    assert was_trained(state, finished, HEAD)
    assert not was_trained(state, BASE, HEAD)


@pytest.mark.parametrize("alternatives", [False, True])
def test_the_price_of_a_plan_does_not_know_of_controls(alternatives: bool) -> None:
    private = ["public", *(arm for arm, _ in PAIRS)]
    without, beside = (plan_of(arms, privacy={"alternatives": alternatives}) for arms in (private, ALL))
    assert charges(beside) == charges(without)
    assert beside.privacy == without.privacy
    assert plan_epsilon(beside) == plan_epsilon(without)
    assert "evaluation" in charges(plan_of(["public", "federated_clipped"]))


def test_a_plan_of_controls_alone_has_no_model_to_hand_on() -> None:
    with pytest.raises(PlanError, match="names only controls"):
        parse_plan({"name": "x", "arms": ["federated_clipped", "local_clipped"]})
    with pytest.raises(PlanError, match="random has none"):
        parse_plan({"name": "x", "arms": ["public", "local_clipped"], "model": {"initial": "random"}})
    assert "clipped" not in json.dumps(parse_plan({"name": "x"}).model_dump(mode="json"))
