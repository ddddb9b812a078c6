"""A crafted model is refused before data is read; a model that honest rounds made never is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.agent.model_check import MAX_GROWTH, SMALL, check_base, decode_base
from client.agent.tasks import Agent
from common.artifacts import DEFAULT_LABELS
from common.errors import RefusedError, RunError
from common.model_file import load_model, save_model
from common.models import build
from common.plan import Model
from common.weights import (
    GRID,
    LIMIT,
    REACH,
    advance,
    digest,
    encode_floats,
    encode_steps,
    manifest_of,
    resolve_initial,
)
from common.wire import Refusal, SiteUpdate, TrainTask
from tests.helpers.consortium import TRAINING, Consortium, tiny_plan

A = TRAINING[0]
PLAN = tiny_plan(name="crafted", arms=["federated", "federated_dp"])
MANIFEST = manifest_of(build("small_cnn").state_dict())
INITIAL = load_model(resolve_initial(Model().initial, None), MANIFEST, DEFAULT_LABELS)
HEAD, WHOLE = MANIFEST.part("head."), slice(0, MANIFEST.size)
STEM = MANIFEST.part("stem.")
FROZEN = slice(0, HEAD.start)


def stem(rows: np.ndarray) -> np.ndarray:
    return with_part("stem.", rows.reshape(16, -1))


def with_part(prefix: str, values: Any) -> np.ndarray:
    flat = INITIAL.copy()
    part = MANIFEST.part(prefix)
    flat[part] = np.broadcast_to(np.asarray(values, np.float32).ravel(), (part.stop - part.start,))
    return flat


def one_value(prefix: str, value: float) -> np.ndarray:
    flat = INITIAL.copy()
    flat[MANIFEST.part(prefix).start] = value
    return flat


def traps() -> np.ndarray:
    """Weights of one stage a thousand times what they were: one image's gradient drowns all others (Boenisch
    et al.).
    """
    return with_part("stage3.", INITIAL[MANIFEST.part("stage3.")] * 1000)


def imprint(rng: np.random.Generator) -> np.ndarray:
    """All first filters measure one thing, at different gains; thresholds then sort images into bins (Fowl et
    al.).
    """
    return stem(
        np.outer(
            rng.uniform(0.05, 0.2, 16),
            rng.standard_normal(STEM.stop - STEM.start)[: (STEM.stop - STEM.start) // 16],
        )
    )


def some_twins(rng: np.random.Generator) -> np.ndarray:
    rows = INITIAL[STEM].reshape(16, -1).copy()
    rows[:10] = -0.7 * rows[0]
    return stem(rows)


def sparse() -> np.ndarray:
    """Each filter looks at one pixel."""
    return stem(np.eye(16, (STEM.stop - STEM.start) // 16) * 0.5)


CRAFTED: dict[str, np.ndarray] = {
    "nan": one_value("stage2.", np.nan),
    "infinite": one_value("neck.", -np.inf),
    "huge bias": with_part("head.bias", 60.0),
    "beyond any grid": one_value("stem.", 3e38),
    "trap weights": traps(),
    "imprint block": imprint(np.random.default_rng(1)),
    "twin filters": some_twins(np.random.default_rng(2)),
    "sparse first layer": sparse(),
    "all zero": np.zeros_like(INITIAL),
    "too short": INITIAL[:-1],
    "too long": np.append(INITIAL, np.float32(0)),
    "a matrix": INITIAL[None],
}


FAR = "huge bias", True  # noise may lead a private head as far; what it trains is clipped all the same


def train_task(base: np.ndarray, *, private: bool = False, **changes: Any) -> TrainTask:
    arm = "federated_dp" if private else "federated"
    return TrainTask(**({"run": "r", "arm": arm, "round": 1, "private": private, "base": base} | changes))


@pytest.fixture(scope="module")
def crafted_for(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hospitals that crafted models are sent to: an agent opens its ledger, so they are a copy."""
    return Path(shutil.copytree(tiny_consortium, tmp_path_factory.mktemp("crafted-for") / "data"))


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.agent.tasks.load_cohort", lambda *_, **__: pytest.fail("data was read"))


def refusal(data: Path, task: TrainTask, plan: Any = PLAN) -> Refusal:
    answer = Agent(data / A / "site.yaml", plan).train(task)
    assert isinstance(answer, Refusal), answer
    return answer


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("name", "private"),
    [(name, private) for name in CRAFTED for private in (False, True) if (name, private) != FAR],
)
def test_a_crafted_model_is_refused_before_data_is_read(name: str, private: bool, crafted_for: Path) -> None:
    said = refusal(crafted_for, train_task(CRAFTED[name], private=private))
    assert said.code == "crafted-model"
    assert "\n" not in said.reason


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("private", [False, True], ids=["not-private", "private"])
def test_the_public_model_is_not_refused(private: bool, crafted_for: Path) -> None:
    """The control: with it the agent goes on to the data."""
    with pytest.raises(pytest.fail.Exception, match="data was read"):
        Agent(crafted_for / A / "site.yaml", PLAN).train(train_task(INITIAL, private=private, run="control"))


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("position", [0, HEAD.start - 1])
def test_an_altered_backbone_is_refused_in_the_private_arm(position: int, crafted_for: Path) -> None:
    """The smallest change there is; the other arms train the backbone, so there it is an honest model."""
    altered = INITIAL.copy()
    altered[position] = np.nextafter(altered[position], np.float32(9))
    assert refusal(crafted_for, train_task(altered, private=True)).code == "crafted-model"
    check_base(altered, INITIAL, MANIFEST, frozen=None)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("name", ["nan", "imprint block", "twin filters", "sparse first layer", "too short"])
def test_without_public_starting_weights_a_crafted_first_layer_is_seen_all_the_same(
    name: str, data: Path
) -> None:
    save_model(data / "own.safetensors", INITIAL, MANIFEST, {})
    plan = tiny_plan(name="own", arms=["federated"], model={"initial": str(data / "own.safetensors")})
    assert refusal(data, train_task(CRAFTED[name]), plan).code == "crafted-model"
    with pytest.raises(pytest.fail.Exception, match="data was read"):
        Agent(data / A / "site.yaml", plan).train(train_task(INITIAL))


@given(st.integers(0, MANIFEST.size - 1), st.floats(1.001, 1e6), st.sampled_from([-1, 1]))
def test_a_value_beyond_what_its_tensor_grows_to_is_refused_and_the_tensor_named(
    position: int, times: float, sign: int
) -> None:
    name = next(name for name in MANIFEST.names if MANIFEST.part(name).stop > position)
    bound = MAX_GROWTH * max(np.abs(INITIAL[MANIFEST.part(name)]).max(), SMALL)
    flat = INITIAL.copy()
    flat[position] = sign * times * bound
    with pytest.raises(RefusedError, match=name) as caught:
        check_base(flat, INITIAL, MANIFEST, frozen=None)
    assert caught.value.code == "crafted-model"
    flat[position] = sign * bound / times
    check_base(flat, INITIAL, MANIFEST, frozen=None)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0, 0.5))
def test_weights_that_wandered_are_no_crafted_model(seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    moved = INITIAL + (spread * rng.standard_normal(MANIFEST.size)).astype(np.float32)
    check_base(moved, INITIAL, MANIFEST, frozen=None)
    check_base(moved, None, MANIFEST, frozen=None)


@given(st.floats(0, REACH), st.integers(1, 1000))
def test_noise_may_carry_the_private_head_as_far_as_every_round_can(value: float, rounds: int) -> None:
    """Each update is cut off at the grid's reach, so that a small epsilon never makes an honest model look
    crafted, after it was paid for.
    """
    check_base(with_part("head.", value * rounds), INITIAL, MANIFEST, frozen=FROZEN, rounds_done=rounds)
    far = REACH * (rounds + 1)
    with pytest.raises(RefusedError, match=f"more than {rounds} rounds"):
        check_base(with_part("head.", far), INITIAL, MANIFEST, frozen=FROZEN, rounds_done=rounds)


@pytest.mark.parametrize(
    "changes",
    [
        # of rounds as usual the agents of every other run in these tests refuse none
        pytest.param({"training": {"rounds": 5}}, marks=pytest.mark.slow, id="as-usual"),
        pytest.param(
            {"training": {"rounds": 2, "local_epochs": 4, "learning_rate": 0.01, "batch_size": 4}}, id="fast"
        ),
        pytest.param({"training": {"rounds": 4}, "privacy": {"epsilon": 0.2}}, id="much-noise"),
    ],
)
def test_honest_models_of_all_arms_are_never_refused(
    changes: dict[str, Any], consortium: Consortium, tmp_path: Path
) -> None:
    plan = tiny_plan(
        name="honest", arms=["public", "local", "federated", "federated_dp", "pooled"], **changes
    )
    folder = consortium.conduct(plan, tmp_path / "run")
    assert folder.evaluation["status"] == "completed", folder.evaluation["incomplete"]
    checkpoints = sorted(folder.path.rglob("round-*.safetensors"))
    assert len(checkpoints) == plan.training.rounds * 6
    for path in checkpoints:
        check_base(
            load_model(path, MANIFEST),
            INITIAL,
            MANIFEST,
            frozen=FROZEN if "federated_dp" in path.parts else None,
            rounds_done=int(path.stem.removeprefix("round-")),
        )


# --- frames

BEFORE = np.linspace(-1, 1, 40, dtype=np.float32)
STEPS = st.lists(st.integers(-LIMIT, LIMIT), min_size=10, max_size=10).map(
    lambda steps: np.array(steps, np.int32)
)
PART = slice(25, 35)


def held(*models: np.ndarray) -> dict[str, np.ndarray]:
    return {digest(model): model for model in models}


def moved(steps: np.ndarray) -> np.ndarray:
    after = BEFORE.copy()
    after[PART] = advance(BEFORE[PART], steps)
    return after


def decoded(base: np.ndarray, *, models: dict[str, np.ndarray] | None = None, **changes: Any) -> np.ndarray:
    return decode_base(
        train_task(base, **changes), len(BEFORE), PART, models if models is not None else held(BEFORE)
    )


def refused(code: str, base: np.ndarray, **changes: Any) -> None:
    with pytest.raises((RefusedError, RunError)) as caught:
        decoded(base, **changes)
    assert caught.value.code == code
    if isinstance(caught.value, RefusedError):
        assert caught.value.public_reason


def test_a_plain_model_is_taken_as_it_is() -> None:
    assert np.array_equal(decoded(BEFORE), BEFORE)
    assert np.array_equal(decoded(BEFORE, base_sha256=digest(BEFORE)), BEFORE)


@given(st.lists(st.floats(width=32), min_size=40, max_size=40))
def test_a_whole_model_in_a_frame_is_the_same_bits(values: list[float]) -> None:
    flat = np.array(values, np.float32)
    found = decoded(encode_floats(flat), base_sha256=digest(flat), models={})
    assert found.tobytes() == flat.tobytes()


@given(STEPS)
def test_steps_from_a_held_model_lead_to_the_coordinators_bits(steps: np.ndarray) -> None:
    before = BEFORE.copy()
    models = held(before)
    found = decoded(
        encode_steps(steps), held_sha256=digest(BEFORE), base_sha256=digest(moved(steps)), models=models
    )
    assert found.tobytes() == moved(steps).tobytes()
    assert before.tobytes() == BEFORE.tobytes(), "the held model itself is not moved"


def test_steps_from_a_model_that_is_not_held_are_refused_so_that_the_whole_model_comes() -> None:
    frame = encode_steps(np.ones(10, np.int32))
    refused("base-not-held", frame, held_sha256="0" * 64)
    refused("base-not-held", frame, held_sha256=digest(BEFORE), models={})


def test_a_model_that_has_not_the_digest_that_was_signed_is_refused() -> None:
    steps = np.ones(10, np.int32)
    for base, more in (
        (BEFORE + 1, {}),
        (encode_floats(BEFORE + 1), {}),
        (encode_steps(steps), {"held_sha256": digest(BEFORE)}),
    ):
        refused("crafted-model", base, base_sha256=digest(BEFORE), **more)


WRONG: dict[str, Callable[[], tuple[np.ndarray, dict[str, Any]]]] = {
    "nothing": lambda: (np.zeros(0, np.uint8), {}),
    "no frame": lambda: (np.arange(40, dtype=np.uint8), {}),
    "steps for a whole model": lambda: (encode_steps(np.ones(40, np.int32)), {}),
    "a whole model for steps": lambda: (encode_floats(BEFORE[PART]), {"held_sha256": digest(BEFORE)}),
    "too few steps": lambda: (encode_steps(np.ones(9, np.int32)), {"held_sha256": digest(BEFORE)}),
    "too many floats": lambda: (encode_floats(np.ones(41, np.float32)), {}),
    "wider numbers": lambda: (BEFORE.astype(np.float64), {}),
    "a frame of other numbers": lambda: (encode_floats(BEFORE).astype(np.int32), {}),
    "a frame in two dimensions": lambda: (encode_floats(BEFORE)[None], {}),
    "a damaged frame": lambda: (encode_floats(BEFORE) ^ np.uint8(1), {}),
    "half a frame": lambda: (encode_floats(BEFORE)[:-9], {}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_frame_that_is_not_one_of_this_model_is_refused(name: str) -> None:
    base, more = WRONG[name]()
    refused("bad-frame", base, **more)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("name", ["no frame", "a damaged frame"])
def test_a_damaged_frame_is_refused_before_data_is_read(name: str, crafted_for: Path) -> None:
    base, _ = WRONG[name]()
    assert refusal(crafted_for, train_task(base)).code == "bad-frame"


def test_an_agent_holds_the_model_it_was_last_sent_for_each_arm_and_no_other(data: Path) -> None:
    agent = Agent(data / A / "site.yaml", PLAN)
    steps = np.full(MANIFEST.size, 7, np.int32)
    after = advance(INITIAL, steps)

    def code(task: TrainTask) -> str:
        answer = agent.train(task)
        return answer.code if isinstance(answer, Refusal) else type(answer).__name__

    frame = train_task(encode_steps(steps), round=2, held_sha256=digest(INITIAL), base_sha256=digest(after))
    assert code(frame) == "base-not-held"
    assert code(train_task(encode_floats(INITIAL))) == "SiteUpdate"
    assert code(frame.model_copy(update={"run": "another"})) == "base-not-held"
    answer = agent.train(frame)
    assert isinstance(answer, SiteUpdate)
    assert answer.base_sha256 == digest(after)
    assert code(frame) == "base-not-held", "the model before is forgotten once there is a newer one"


def test_a_crafted_model_is_not_held(data: Path) -> None:
    """Else its steps could be built upon, step by step, into what is refused when sent whole."""
    agent = Agent(data / A / "site.yaml", PLAN)
    bad = CRAFTED["trap weights"]
    agent.train(train_task(bad))
    task = train_task(encode_steps(np.zeros(MANIFEST.size, np.int32)), held_sha256=digest(bad))
    answer = agent.train(task)
    assert isinstance(answer, Refusal)
    assert answer.code == "base-not-held"


@pytest.mark.usefixtures("no_data")
def test_a_model_reached_by_steps_is_checked_like_one_sent_whole(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = Agent(data / A / "site.yaml", PLAN)
    with pytest.raises(pytest.fail.Exception, match="data was read"):
        agent.train(train_task(INITIAL))
    steps = np.zeros(MANIFEST.size, np.int32)
    biases = float(np.abs(INITIAL[MANIFEST.part("head.bias")]).max())
    steps[-1] = int(2 * MAX_GROWTH * max(biases, SMALL) / GRID)
    answer = agent.train(train_task(encode_steps(steps), held_sha256=digest(INITIAL)))
    assert isinstance(answer, Refusal)
    assert answer.code == "crafted-model"
