"""A plan asks for outputs beyond the default: through sites, messages, the run folder, report and predict."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from client.agent.tasks import Agent
from client.predict.model import find_model
from client.simulation.phantom_sites import write_consortium
from common.artifacts import DEFAULT_LABELS, NAMES
from common.counts import noise_deviation
from common.errors import DataError
from common.wire import DescribeTask
from server.evaluation.report.page import render
from server.evaluation_file import artifacts_of
from server.run_folder import RunFolder
from tests.helpers.consortium import PATIENTS, SITES, Consortium, tiny_plan

LABELS = [*DEFAULT_LABELS, "quality", "ct_motion"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moving") / "data"
    write_consortium(out, sites=4, patients=PATIENTS, seed=7, say=lambda text: None, ct_motion=True)
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    plan = tiny_plan(arms=["public", "federated"], model={"labels": LABELS}, training={"rounds": 1})
    folder: RunFolder = Consortium(data=data).conduct(plan, tmp_path_factory.mktemp("labels") / "run")
    return folder


def test_a_new_output_is_scored_and_one_without_a_label_is_not(run: RunFolder) -> None:
    found = run.evaluation
    assert artifacts_of(found) == NAMES
    cells = [found["matrix"]["federated"][site]["ct_motion"] for site in SITES]
    assert any(cell["auroc"] is not None for cell in cells)
    assert all(found["matrix"]["federated"][site]["quality"]["n_pos"] == 0 for site in SITES)
    assert {"quality"} <= {gap["artifact"] for gap in found["missing"] if gap["reason"] == "n0"}


def test_what_a_model_never_learned_is_said(run: RunFolder) -> None:
    """The start has six outputs; no site has a label of `quality`, so that nobody teaches it either."""
    assert run.evaluation["unlearned"] == {"public": ["quality"], "federated": ["quality"]}
    page = render(run.evaluation, run.manifest, run.plan)
    assert "public never learned quality" in page
    assert "Never learned, and says nothing: quality." in (run.path / "model_card.md").read_text(
        encoding="utf-8"
    )


def test_predict_shows_only_what_the_model_learned(run: RunFolder) -> None:
    with safe_open(run.path / "model.safetensors", framework="np") as file:
        assert json.loads(file.metadata()["labels"]) == LABELS
        assert file.get_tensor("head.weight").shape[0] == len(LABELS)
    model = find_model(str(run.path), None)
    assert model.labels == NAMES
    assert model.learned == (*DEFAULT_LABELS, "ct_motion")
    assert find_model("package:small_cnn_real.safetensors", None).learned == (*DEFAULT_LABELS, "ct_motion")


def test_the_same_site_serves_a_plan_without_labels_as_before(data: Path) -> None:
    """Columns that a plan does not ask for are not even in what it is bound to."""
    cohorts = [
        Agent(data / "hospital-a" / "site.yaml", tiny_plan(**more)).cohort()
        for more in ({}, {"model": {"labels": ["metal", "ct_motion"]}})
    ]
    assert [one.artifacts for one in cohorts] == [DEFAULT_LABELS, ("metal", "ct_motion")]
    assert np.array_equal(cohorts[0].labels[:, 0], cohorts[1].labels[:, 0], equal_nan=True)
    assert {0.0, 1.0} <= set(cohorts[1].labels[:, 1].tolist())


def test_a_site_without_a_label_that_the_plan_asks_for_has_nothing_to_teach(data: Path) -> None:
    agent = Agent(data / "hospital-a" / "site.yaml", tiny_plan(model={"labels": ["quality"]}))
    with pytest.raises(DataError) as caught:
        agent.admit_data("run")
    assert caught.value.code == "nothing-assessed"
    assert agent.describe(DescribeTask(run="run")) is not None


def test_noise_follows_from_the_outputs_that_the_plan_asks_for() -> None:
    """A plan that asks for no new output is not scored with more noise than before."""
    assert noise_deviation(1.0, 2, len(DEFAULT_LABELS)) == pytest.approx(np.sqrt(10))
    assert noise_deviation(1.0, 2, len(NAMES)) == pytest.approx(np.sqrt(2 * len(NAMES)))
