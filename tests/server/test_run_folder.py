"""The run folder: whole files or none, and a run that was stopped anywhere ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.files import write_bytes
from common.learning import get_threads, set_threads
from common.model_file import load_model, save_model
from common.models import build
from common.weights import flatten, manifest_of
from server.run.conduct import conduct
from server.run.recompute import recompute
from server.run_folder import (
    ArmFolder,
    RoundMean,
    RunFolder,
    mean_of,
    refuse_existing,
    without_nan,
    write_json,
)
from tests.helpers.consortium import SITES, TRAINING, Consortium, tiny_plan

MANIFEST = {"run": "r", "status": "running", "threads": 1}
ARMS = ["public", "local", "federated", "federated_dp", "pooled"]


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return build("small_cnn").state_dict()


def files(folder: Path) -> dict[str, bytes]:
    """Every file by its path, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_single_arm_run_has_no_arms_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", tiny_plan(arms=["federated"]), MANIFEST)
    assert folder.arm("federated").path == folder.path


def test_several_arms_have_a_folder_each_and_local_one_a_site(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", tiny_plan(arms=ARMS), MANIFEST)
    assert folder.arm("federated").path == folder.path / "arms" / "federated"
    assert folder.arm("local", "hospital-a").path == folder.path / "arms" / "local" / "hospital-a"


def test_a_new_run_folder_is_whole_and_can_be_opened(tmp_path: Path) -> None:
    plan = tiny_plan(question="多好?")
    RunFolder.create(tmp_path / "deep" / "r", plan, MANIFEST, {"data": "/d"})
    folder = RunFolder.open(tmp_path / "deep" / "r")
    assert (folder.plan, folder.manifest, folder.simulation) == (plan, MANIFEST, {"data": "/d"})
    assert set(files(folder.path)) == {"plan.yaml", "manifest.json", "simulation.json"}
    assert os.listdir(folder.path.parent) == ["r"]


def test_an_empty_folder_becomes_the_run_folder(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    RunFolder.create(tmp_path / "r", tiny_plan(), MANIFEST)
    assert (tmp_path / "r" / "plan.yaml").is_file()


@pytest.mark.parametrize("name", ["plan.yaml", "notes.txt"])
def test_what_lies_there_is_never_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / name).write_text("mine", encoding="utf-8")
    for attempt in (
        lambda: refuse_existing(tmp_path / "r"),
        lambda: RunFolder.create(tmp_path / "r", tiny_plan(), MANIFEST),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert caught.value.code == "run-exists"
    assert files(tmp_path) == {f"r/{name}": b"mine"}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path / "r", tiny_plan(), MANIFEST)
    assert caught.value.code == "run-exists"
    with pytest.raises(ConfigError) as caught:
        RunFolder.create(tmp_path / "r" / "below", tiny_plan(), MANIFEST)
    assert caught.value.code == "not-writable"


@pytest.mark.parametrize("missing", ["plan.yaml", "manifest.json"])
def test_half_a_run_folder_is_not_one(missing: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "r", tiny_plan(), MANIFEST)
    (folder.path / missing).unlink()
    with pytest.raises(ConfigError) as caught:
        RunFolder.open(folder.path)
    assert caught.value.code == "no-such-run"


def test_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _ = RunFolder.create(tmp_path / "r", tiny_plan(), MANIFEST).evaluation
    assert caught.value.code == "not-finished"
    assert "resume" in caught.value.hint


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(tmp_path / "x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(tmp_path / "x", b"new")
    assert files(tmp_path) == {"x": b"old"}


NUMBERS = st.floats() | st.integers()


@given(st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_what_is_not_a_number_becomes_null_and_the_rest_stays(values: Any) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, list):
            return [expected(inner) for inner in value]
        return value if np.isfinite(float(value)) else None

    assert json.loads(json.dumps(without_nan(values), allow_nan=False)) == expected(values)


def test_numpy_values_become_plain_json(tmp_path: Path) -> None:
    write_json(
        tmp_path / "x.json",
        {"a": np.float32(np.nan), "b": np.array([[1.0, np.inf]]), "c": np.int64(3), 4: (np.bool_(True),)},
    )
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {
        "a": None,
        "b": [[1.0, None]],
        "c": 3,
        "4": [True],
    }


def test_a_model_survives_the_disk_and_anybody_can_read_it(tmp_path: Path) -> None:
    named, manifest = state(), manifest_of(state())
    save_model(tmp_path / "m.safetensors", flatten(named), manifest, {"arm": "federated"})
    assert load_model(tmp_path / "m.safetensors", manifest).tobytes() == flatten(named).tobytes()
    for name, tensor in safetensors.numpy.load_file(tmp_path / "m.safetensors").items():
        assert np.array_equal(tensor, named[name].numpy())


def test_a_file_that_is_not_this_model_is_refused(tmp_path: Path) -> None:
    manifest = manifest_of(state())
    (tmp_path / "text").write_text("no", encoding="utf-8")
    safetensors.numpy.save_file({"stem.weight": np.zeros(3, np.float32)}, tmp_path / "other")
    for name in ("missing", "text", "other", "."):
        with pytest.raises(ConfigError) as caught:
            load_model(tmp_path / name, manifest)
        assert caught.value.code == "wrong-model"


def test_a_torn_line_is_left_out_and_rounds_without_checkpoint_are_forgotten(tmp_path: Path) -> None:
    arm = ArmFolder(path=tmp_path)
    for number in (1, 2, 3):
        arm.append_round({"round": number, "score": np.nan})
    with (tmp_path / "rounds.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 4, "sco')
    assert [record["round"] for record in arm.rounds()] == [1, 2, 3]
    arm.forget_rounds_after(2)
    assert arm.rounds() == [{"round": 1, "score": None}, {"round": 2, "score": None}]
    assert "sco" not in (tmp_path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()[-1][15:]


def test_the_last_round_is_the_newest_checkpoint(tmp_path: Path) -> None:
    arm = ArmFolder(path=tmp_path)
    assert arm.last_round() == 0
    for number in (9, 10):
        arm.save_checkpoint(number, flatten(state()), manifest_of(state()))
    assert arm.checkpoint_path(10).name == "round-0010.safetensors"
    assert arm.last_round() == 10


RESUMED = {"name": "resumed", "arms": ["local", "federated", "pooled"]}
ANSWERS = len(TRAINING) * 2 + len(TRAINING) * 2 + 2  # local, federated and pooled, two rounds each


@pytest.fixture(scope="module")
def asked_often(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hospitals that several runs without noise ask: a copy, since agents open their ledgers."""
    return Path(shutil.copytree(tiny_consortium, tmp_path_factory.mktemp("asked-often") / "data"))


@pytest.fixture(scope="module")
def whole(asked_often: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return Consortium(data=asked_often).conduct(
        tiny_plan(**RESUMED), tmp_path_factory.mktemp("whole") / "run"
    )


def models(folder: RunFolder) -> dict[str, bytes]:
    manifest = manifest_of(state())
    found = {path.relative_to(folder.path): path for path in folder.path.rglob("*.safetensors")}
    return {str(name): load_model(path, manifest).tobytes() for name, path in found.items()}


@pytest.mark.parametrize(("stop_at", "left"), [(1, ANSWERS), (8, ANSWERS - 6), (ANSWERS, 1)])
def test_a_run_stopped_at_any_answer_resumes_to_the_same_bits(
    stop_at: int, left: int, whole: RunFolder, asked_often: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(**RESUMED)
    with pytest.raises(KeyboardInterrupt):
        Consortium(data=asked_often, stop_at=stop_at).conduct(plan, tmp_path / "run")
    assert not (tmp_path / "run" / "evaluation.json").exists()
    again = Consortium(data=asked_often)
    folder = again.conduct(plan, tmp_path / "run")
    assert models(folder) == models(whole)
    assert sum(kind == "train" for _, kind in again.asked) == left, "a finished round is not repeated"
    mine, theirs = folder.evaluation, whole.evaluation
    for part in ("counts", "metrics", "matrix", "headline", "contrasts", "curves"):
        assert mine[part] == theirs[part]


def test_a_crash_between_a_record_and_its_checkpoint_repeats_the_round(
    whole: RunFolder, asked_often: Path, tmp_path: Path
) -> None:
    plan = tiny_plan(**RESUMED)
    with pytest.raises(KeyboardInterrupt):
        Consortium(data=asked_often, stop_at=11).conduct(plan, tmp_path / "run")
    arm = RunFolder.open(tmp_path / "run").arm("federated")
    assert arm.last_round() == 1
    arm.checkpoint_path(1).unlink()
    folder = Consortium(data=asked_often).conduct(plan, tmp_path / "run")
    assert models(folder) == models(whole)
    assert [record["round"] for record in folder.arm("federated").rounds()] == [1, 2]


def test_a_finished_run_is_evaluated_again_but_not_trained_again(
    consortium: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(name="twice", arms=["federated", "federated_dp"])
    before = models(consortium.conduct(plan, tmp_path / "run"))
    consortium.asked.clear()
    folder = consortium.conduct(plan, tmp_path / "run")
    assert {kind for _, kind in consortium.asked} == {"query.describe", "evaluate"}
    assert models(folder) == before
    assert set(folder.evaluation["privacy"]) == set(TRAINING)


def test_a_folder_of_another_plan_is_refused(consortium: Consortium, tmp_path: Path) -> None:
    consortium.conduct(tiny_plan(training={"rounds": 1}), tmp_path / "run")
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        consortium.conduct(tiny_plan(training={"rounds": 1}, seed=4), tmp_path / "run")
    assert caught.value.code == "other-plan"
    assert files(tmp_path / "run") == before


def test_the_cpu_of_other_processes_is_counted(consortium: Consortium, tmp_path: Path) -> None:
    plan = tiny_plan(arms=["public"])
    grid = consortium.grid(plan, tmp_path / "run")
    run = conduct(grid, plan, tmp_path / "run", simulation={"data": "/d"}, others_cpu=lambda: 1e6)
    assert run.evaluation["cpu_seconds"] >= 1e6


def test_a_run_goes_on_with_its_number_of_threads(consortium: Consortium, tmp_path: Path) -> None:
    plan = tiny_plan(training={"rounds": 1})
    consortium.conduct(plan, tmp_path / "run")
    RunFolder.open(tmp_path / "run").update_manifest(threads=2)  # as an earlier version may have begun it
    try:
        consortium.conduct(plan, tmp_path / "run")
        assert get_threads() == 2
    finally:
        set_threads(1)


def test_a_public_only_run_trains_nobody(asked_often: Path, tmp_path: Path) -> None:
    consortium = Consortium(data=asked_often)
    folder = consortium.conduct(tiny_plan(arms=["public"]), tmp_path / "run")
    assert {kind for _, kind in consortium.asked} == {"query.describe", "evaluate"}
    assert set(folder.evaluation["metrics"]["public"]) == set(SITES)
    assert not (folder.path / "arms").exists()


def test_the_exponential_mean_weighs_the_last_round_most(tmp_path: Path) -> None:
    manifest = manifest_of(state())
    arm, flats = ArmFolder(path=tmp_path), [flatten(state()) * scale for scale in (1.0, 3.0, 5.0)]
    for number, flat in enumerate(flats, start=1):
        arm.save_checkpoint(number, flat.astype(np.float32), manifest)
    mean = RoundMean(ema=0.5)
    found = arm.model_of(3, manifest, mean)
    np.testing.assert_allclose(found, (flats[0] / 4 + flats[1] / 2 + flats[2]) / 1.75, rtol=1e-6)
    assert arm.model_of(1, manifest, mean).tobytes() == flats[0].astype(np.float32).tobytes()
    assert arm.model_of(3, manifest).tobytes() == flats[2].astype(np.float32).tobytes()


def test_private_arms_have_a_mean_of_their_own() -> None:
    plan = tiny_plan(training={"rounds": 2, "ema": 0.9}, privacy={"average_rounds": 2})
    assert mean_of(plan, "federated") == mean_of(plan, "local") == RoundMean(ema=0.9)
    assert mean_of(plan, "federated_dp") == mean_of(plan, "federated_clipped") == RoundMean(last=2)


def test_a_run_hands_on_the_exponential_mean_and_it_is_recomputed(
    consortium: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(arms=["public", "federated"], training={"rounds": 3, "ema": 0.5})
    run = consortium.conduct(plan, tmp_path / "run")
    manifest = manifest_of(build("small_cnn").state_dict())
    arm = run.arm("federated")
    first, second, last = (load_model(arm.checkpoint_path(number), manifest) for number in (1, 2, 3))
    expected = (first / 4 + second / 2 + last) / 1.75
    np.testing.assert_allclose(load_model(arm.model_path, manifest), expected, rtol=1e-5, atol=1e-7)
    found = {finding.check: finding for finding in recompute(run)}
    assert found["federated, model"].holds is True
    assert "exponential mean (0.5)" in found["federated, model"].detail
    save_model(arm.model_path, last, manifest, {})
    assert {one.check for one in recompute(run) if one.holds is False} == {"federated, model"}
