"""A private arm promises nothing about patients who shaped its starting weights without noise."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.agent.tasks import Agent
from client.agent.trained_models import is_trained_without_noise
from common.lineage import KEY, NO_DATA, Lineage, read_lineage
from common.model_file import load_model, save_model
from common.weights import GRID, resolve_initial
from common.wire import DescribeTask, EvaluateTask, Refusal, SiteReadiness, SiteUpdate, TrainTask
from server.public_model.pretrain import public_lineage
from server.run_folder import RunFolder
from tests.helpers.consortium import SITES, TRAINING, Consortium, settle, tiny_plan
from tests.helpers.site_agent import BASE, HEAD, MANIFEST, rows

A = TRAINING[0]
PUBLIC = NO_DATA.child("pretrain", weights="0" * 64, kinds=["public"], private=False)
HOSPITAL = PUBLIC.child("run r, arm federated", weights="1" * 64, kinds=["hospital"], private=False)
OWN = (BASE + np.float32(0.001)).astype(np.float32)  # weights that no installation brings


@pytest.fixture
def data(data: Path) -> Path:
    policy = {
        "allow_non_private": True,
        "evaluation": "disclosed",
        "max_epsilon": 100.0,
        "after_non_private": "void",
    }
    settle(data / A, policy, kind="hospital")
    return data


def plan_from(path: str, sha256: str | None) -> Any:
    model = {"initial": path} | ({"sha256": sha256} if sha256 else {})
    return tiny_plan(name="own", arms=["federated", "federated_dp"], held_out=[], model=model)


FROM_FILE = plan_from("/coordinator/own.safetensors", "5" * 64)


def private(base: np.ndarray, lineage: Lineage | None, **changes: Any) -> TrainTask:
    values: dict[str, Any] = {"run": "dp", "arm": "federated_dp", "round": 1, "private": True, "base": base}
    return TrainTask(**values | {"lineage": lineage.text() if lineage else ""} | changes)


def train(base: np.ndarray, round: int = 1) -> TrainTask:
    return TrainTask(run="r", arm="federated", round=round, private=False, base=base)


def code_of(answer: Any) -> str:
    return answer.code if isinstance(answer, Refusal) else type(answer).__name__


@pytest.mark.parametrize(
    ("sha256", "lineage", "code"),
    [
        ("5" * 64, PUBLIC, "SiteUpdate"),
        ("5" * 64, None, "unknown-ancestor"),
        (None, PUBLIC, "unknown-ancestor"),
        ("5" * 64, HOSPITAL, "non-private-ancestor"),
    ],
    ids=["public", "silent", "no-hash", "trained-without-noise"],
)
def test_the_lineage_decides_before_anything_is_charged(
    sha256: str | None, lineage: Lineage | None, code: str, data: Path
) -> None:
    plan = plan_from("/coordinator/own.safetensors", sha256)
    ready = Agent(data / A / "site.yaml", plan).describe(
        DescribeTask(rehearse=True, lineage=lineage.text() if lineage else "")
    )
    assert isinstance(ready, SiteReadiness)
    assert ready.arms["federated_dp"] == ("accept" if code == "SiteUpdate" else code)
    assert ready.arms["federated"] == "accept"
    assert code_of(Agent(data / A / "site.yaml", plan).train(private(OWN, lineage))) == code
    assert bool(rows(data)) == (code == "SiteUpdate")


def test_the_weights_of_the_installation_need_no_lineage_and_are_compared_by_name_or_hash(data: Path) -> None:
    path = resolve_initial("package:small_cnn_real.safetensors", None)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    for initial in ("package:small_cnn_real.safetensors", "/elsewhere/small_cnn_real.safetensors"):
        agent = Agent(data / A / "site.yaml", plan_from(initial, sha256))
        assert code_of(agent.train(private(OWN, PUBLIC, run=initial))) == "crafted-model"
        moved = BASE.copy()
        moved[HEAD.start] += np.float32(GRID)
        assert code_of(agent.train(private(moved, None, run=initial))) == "crafted-model", "before any round"
        assert code_of(agent.train(private(BASE, None, run=initial))) == "SiteUpdate"


def test_a_private_arm_may_start_from_the_start_that_has_seen_phantoms_only(data: Path) -> None:
    path = resolve_initial("package:small_cnn_phantoms.safetensors", None)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = load_model(path, MANIFEST)
    for initial in (
        "package:small_cnn_phantoms.safetensors",
        "package:small_cnn.safetensors",
        "/elsewhere/start.safetensors",
    ):
        agent = Agent(data / A / "site.yaml", plan_from(initial, sha256))
        assert code_of(agent.train(private(BASE, PUBLIC, run=initial))) == "crafted-model", "another start"
        assert code_of(agent.train(private(weights, None, run=initial))) == "SiteUpdate"


def test_a_model_this_site_trained_without_noise_is_no_base_whatever_is_said_of_it(data: Path) -> None:
    agent = Agent(data / A / "site.yaml", FROM_FILE)
    update = agent.train(train(OWN))
    assert isinstance(update, SiteUpdate)
    alone = (OWN + GRID * update.update).astype(np.float32)  # what the site's own update makes of it
    agent.train(train(BASE * np.float32(1.01), round=2))
    finished = (OWN + np.float32(0.5)).astype(np.float32)
    models = ("public", "federated", "federated_dp", "local/another")
    others = np.stack([OWN, finished, OWN + np.float32(0.25), OWN + np.float32(0.75)]).astype(np.float32)
    agent.evaluate(EvaluateTask(run="r", models=models, everyone=False, weights=others))
    other_head = finished.copy()
    other_head[HEAD] = 0.125
    again = Agent(data / A / "site.yaml", FROM_FILE)  # the agent was restarted
    for base in (alone, BASE * np.float32(1.01), finished, other_head):
        said = again.train(private(base.astype(np.float32), PUBLIC))
        assert code_of(said) == "non-private-ancestor"
    assert all(kind != "reserve" for kind, _, _ in rows(data))
    assert code_of(again.train(private(OWN, PUBLIC))) == "SiteUpdate", "where the arms began"
    assert (data / A / "state" / "trained-without-noise").stat().st_mode & 0o077 == 0


def test_a_site_of_phantoms_remembers_nothing(data: Path) -> None:
    settle(data / A, kind="synthetic")
    Agent(data / A / "site.yaml", FROM_FILE).train(train(OWN))
    assert not (data / A / "state" / "trained-without-noise").exists()


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("public", False),
        ("federated_dp", False),
        ("federated", True),
        ("pooled", True),
        (f"local/{A}", True),
        ("local/another", False),
        ("zebra", True),
    ],
)
def test_which_finished_models_a_site_trained(name: str, trained: bool) -> None:
    assert is_trained_without_noise(name, A) == trained


def test_the_models_of_a_run_say_what_they_were_trained_on(consortium: Consortium, tmp_path: Path) -> None:
    settle(
        consortium.data / A,
        {"allow_non_private": True, "evaluation": "disclosed", "after_non_private": "void"},
        kind="hospital",
    )
    plan = tiny_plan(name="lines", arms=["federated", "federated_dp"], training={"rounds": 1})
    folder = consortium.conduct(plan, tmp_path / "run")
    shared = read_lineage(folder.arm("federated").model_path)
    noised = read_lineage(folder.arm("federated_dp").model_path)
    assert shared is not None
    assert noised is not None
    assert (shared.kinds, shared.private) == (("hospital", "public", "synthetic"), False)
    assert noised.private
    assert shared.ancestors == noised.ancestors
    assert read_lineage(folder.path / "model.safetensors") == noised
    # as the start of another run: the site that trained without noise is asked to protect, and refuses
    path = folder.arm("federated").model_path
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = plan_from(str(path), sha256).model_copy(update={"arms": ("public", "federated_dp")})
    found = consortium.conduct(wanted, tmp_path / "second").evaluation
    assert {claim["refused"]["code"] for claim in found["privacy"].values()} == {"non-private-ancestor"}
    assert set(found["privacy"]) == set(SITES)


def test_a_public_model_is_made_of_public_data_only(consortium: Consortium, tmp_path: Path) -> None:
    settle(consortium.data / A, kind="synthetic")
    plan = tiny_plan(name="pre", arms=["federated"], training={"rounds": 1}, model={"initial": "random"})
    folder = RunFolder.open(consortium.conduct(plan, tmp_path / "run").path)
    flat = load_model(folder.path / "model.safetensors", MANIFEST)
    line = public_lineage(folder, flat)
    assert (line.kinds, line.private, len(line.ancestors)) == (("synthetic",), True, 2)
    save_model(folder.path / "model.safetensors", flat, MANIFEST, {KEY: HOSPITAL.text()})
    with pytest.raises(Exception, match="hospitals took part") as caught:
        public_lineage(folder, flat)
    assert caught.value.code == "non-private-ancestor"  # type: ignore[attr-defined]
