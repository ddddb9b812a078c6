"""A site trains on views of its own slices, with or without a sheet; no patient changes another's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.own_views import draw_views
from client.dp import dp_sgd
from client.site.config import read_site
from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.learning import get_threads
from common.plan import Inject, RunPlan
from common.preprocess import to_channels
from common.pricing import with_noise
from server.run_folder import RunFolder
from tests.helpers.consortium import SITES, TRAINING, settle, tiny_plan
from tests.helpers.site_agent import (
    A,
    agent,
    evaluate_task,
    non_private,
    refusal_of,
    rows,
    train_task,
    update_of,
)

INJECT = Inject(views=3)


def plan_with(inject: dict[str, Any] | None = None, **changes: Any) -> RunPlan:
    training = {"rounds": 1} | ({} if inject is None else {"inject": inject})
    values: dict[str, Any] = {"name": "views", "arms": ["federated", "federated_dp"], "image_size": 32}
    return tiny_plan(**values | {"training": training} | changes)


PLAN = plan_with({"views": 3})


def without_sheet(data: Path, *names: str) -> None:
    for name in names:
        (data / name / "labels.csv").unlink()
        settle(data / name, labels="none")


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each private training was given."""
    seen: list[dict[str, Any]] = []
    real = dp_sgd.train_private_head

    def spy(
        weight: Any, bias: Any, features: Any, labels: Any, patients: Any, *rest: Any, **named: Any
    ) -> Any:
        seen.append({"features": features, "labels": labels, "patients": patients} | named)
        return real(weight, bias, features, labels, patients, *rest, **named)

    monkeypatch.setattr(dp_sgd, "train_private_head", spy)
    return seen


def test_both_arms_train_on_the_same_rows(data: Path, arguments: list[dict[str, Any]]) -> None:
    one = agent(data, plan=PLAN)
    update_of(one.train(train_task()))
    (given,) = arguments
    injected = given["injected"]
    slices = one.training_slices("r", _job())
    assert slices.weights is not None
    assert len(slices.images) == len(given["features"]) == len(injected.weights)
    assert np.array_equal(slices.labels, given["labels"], equal_nan=True)
    for number in np.unique(given["patients"]):
        own = np.flatnonzero(given["patients"] == number)
        assert slices.weights[own] / len(own) == pytest.approx(injected.mean_weights(own), rel=1e-6)
    update_of(one.train(non_private()))


@pytest.mark.parametrize("trainable", ["norms", "all"])
def test_a_network_trains_on_the_same_rows_as_the_head(
    trainable: str, data: Path, arguments: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    real = dp_sgd.train_private_network

    def spy(net: Any, trained: Any, inputs: Any, labels: Any, patients: Any, *rest: Any, **named: Any) -> Any:
        seen.append({"inputs": inputs, "labels": labels, "patients": patients} | named)
        return real(net, trained, inputs, labels, patients, *rest, **named)

    monkeypatch.setattr(dp_sgd, "train_private_network", spy)
    again = Path(shutil.copytree(data, data.parent / "again"))  # another ledger, the same key
    update_of(agent(again, plan=PLAN).train(train_task()))
    deep = plan_with({"views": 3}, privacy={"trainable": trainable, "engine": "patient_loop"})
    one = agent(data, plan=deep)
    update_of(one.train(train_task()))
    (head,), (network,) = arguments, seen
    for name in ("labels", "patients"):
        assert np.array_equal(head[name], network[name], equal_nan=True)
    injected = network["injected"]
    assert np.array_equal(injected.weights, head["injected"].weights)
    assert (injected.weights > 0).any()
    assert (injected.weights == 0).any()
    slices = one.training_slices("r", _job())
    assert isinstance(slices.images, np.ndarray)
    mixed = np.array([len(injected.weights) - 1, 0, len(injected.weights) - 2, 1])  # views and slices in turn
    expected = to_channels(slices.images[mixed], slices.modality[mixed])
    assert np.array_equal(network["inputs"](mixed).numpy(), expected)


def _job() -> Any:
    from client.agent.job import Job

    return Job()


def test_a_patient_who_leaves_changes_no_bit_of_the_others(
    data: Path, arguments: list[dict[str, Any]]
) -> None:
    plan = plan_with({"views": 3}, training={"rounds": 3, "inject": {"views": 3}})
    one = agent(data, plan=plan)
    update_of(one.train(train_task()))
    gone = int(one.cohort().patients[one.cohort().part == 0][0])
    file = one.cohort().records[int(np.flatnonzero(one.cohort().patients == gone)[0])].file
    (data / A / "out.csv").write_text(f"PatientID;Date\nPHANTOM-{int(file[1:5]):04d};2026\n")
    (data / A / "cohort.yaml").write_text("opt_out_file: out.csv\n")
    update_of(one.train(train_task(round=2)))  # left out of what is in memory
    update_of(agent(data, plan=plan).train(train_task(round=3)))  # and of what is read again
    everyone, *others = arguments
    for after in others:
        assert len(after["patients"]) < len(everyone["patients"])
        for number in np.unique(everyone["patients"]):
            rows_before = everyone["patients"] == number
            wanted = _bytes(everyone, rows_before)
            found = [_bytes(after, after["patients"] == other) for other in np.unique(after["patients"])]
            assert (wanted in found) == (number != gone)
    assert one._views._views is not None
    assert gone not in one._views._views.patients


def _bytes(given: dict[str, Any], of: np.ndarray) -> bytes:
    return b"".join(
        np.ascontiguousarray(one).tobytes()
        for one in (given["features"][of], given["labels"][of], given["injected"].weights[of])
    )


def test_what_one_patients_pixels_break_stops_nobody(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from client.agent import own_views

    real, calls = own_views.views_of_patient, []

    def fragile(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("one patient")
        return real(*arguments, **named)

    cohort = agent(data, plan=PLAN).cohort()
    everyone = draw_views(cohort, PLAN, "r", INJECT)
    monkeypatch.setattr(own_views, "views_of_patient", fragile)
    others = draw_views(cohort, PLAN, "r", INJECT)
    assert len(np.unique(others.patients)) == len(np.unique(everyone.patients)) - 1


def test_augmented_views_of_a_patient_are_the_same_in_any_company(data: Path) -> None:
    """A private arm averages them before it clips: what is drawn for one patient is no other's."""
    augment = ["flip", "rotation", "scale", "crop", "shift", "elastic", "contrast"]
    plan = plan_with(training={"rounds": 1, "inject": {"views": 3}, "augment": augment})
    cohort = agent(data, plan=plan).cohort()
    everyone, plain = draw_views(cohort, plan, "r", INJECT), draw_views(cohort, PLAN, "r", INJECT)
    assert everyone.images.tobytes() != plain.images.tobytes()
    gone = int(everyone.patients[0])
    fewer = replace(cohort, part=np.where(cohort.patients == gone, -1, cohort.part).astype(np.int8))
    others = draw_views(fewer, plan, "r", INJECT)
    expected = everyone.of(everyone.patients != gone)
    assert len(others.images) < len(everyone.images)
    for name in ("images", "labels", "weights", "patients"):
        assert getattr(others, name).tobytes() == getattr(expected, name).tobytes()


def test_both_arms_train_on_the_augmented_views(data: Path, arguments: list[dict[str, Any]]) -> None:
    plan = plan_with(training={"rounds": 1, "inject": {"views": 3}, "augment": ["rotation", "elastic"]})
    one = agent(data, plan=plan)
    update_of(one.train(train_task()))
    again = Path(shutil.copytree(data, data.parent / "again"))
    update_of(agent(again, plan=PLAN).train(train_task(run="s")))
    changed, plain = arguments
    read = changed["injected"].weights == 0
    count = int(read.sum())
    assert changed["features"][:count].tobytes() == plain["features"][:count].tobytes()  # slices as read
    assert changed["features"][count:].tobytes() != plain["features"][count:].tobytes()
    update_of(one.train(non_private()))


def test_without_inject_nothing_changes(data: Path, arguments: list[dict[str, Any]]) -> None:
    plan = plan_with()
    assert "inject" not in plan.canonical_json()
    update_of(agent(data, plan=plan).train(train_task()))
    assert arguments[0]["injected"] is None


def test_labels_none_is_refused_without_inject_before_the_data_are_read(data: Path) -> None:
    without_sheet(data, A)
    (data / A / "images").rename(data / A / "gone")
    for task in (non_private(), train_task()):
        answer = refusal_of(agent(data, plan=plan_with()).train(task))
        assert answer.code == "nothing-assessed"


def test_a_hospital_without_a_sheet_trains_and_is_not_scored(
    data: Path, arguments: list[dict[str, Any]]
) -> None:
    without_sheet(data, A)
    settle(data / A, kind="hospital", policy={"max_epsilon": 8.0})
    one = agent(data, plan=with_noise(PLAN))
    update = update_of(one.train(train_task()))
    assert update.private
    labels = arguments[0]["labels"]
    assert not np.isnan(labels).all(axis=1).any(), "no row without a label"
    assert (arguments[0]["injected"].weights > 0).all(), "views alone"
    answer = refusal_of(one.evaluate(evaluate_task()))
    assert answer.code == "nothing-assessed"
    assert [kind for kind, part, _ in rows(data) if part == "evaluation"] == []


def test_labels_none_with_an_assessed_artifact_is_a_contradiction(data: Path) -> None:
    settle(data / A, labels="none", assessed=["motion"])
    with pytest.raises(ConfigError, match="labels: none"):
        read_site(data / A)


@pytest.mark.usefixtures("_public_sets_drawn_once")
def test_sites_without_any_label_train_together(data: Path, tmp_path: Path) -> None:
    from common.cli import Format
    from server.simulation.simulate import run_simulation

    without_sheet(data, *TRAINING)
    plan = plan_with({"views": 3}, arms=["local", "federated", "federated_dp", "pooled"])
    assert run_simulation(plan, data, tmp_path / "run", get_threads(), Format.json) == 0
    folder = RunFolder.open(tmp_path / "run")
    assert folder.evaluation["status"] == "completed"
    for arm in ("federated", "federated_dp"):
        (record,) = folder.arm(arm).rounds()
        assert sorted(record["weights"]) == sorted(TRAINING)
    cells = folder.evaluation["metrics"]["federated"][TRAINING[0]]
    assert {cells[name]["n_pos"] for name in DEFAULT_LABELS} == {0}
    assert SITES[3] in folder.evaluation["metrics"]["federated"]
    assert folder.evaluation["labels"] == "sheet and injected views"
    assert "- Labels: sheet and injected views." in (tmp_path / "run" / "model_card.md").read_text("utf-8")
