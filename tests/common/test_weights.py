"""One flat array, exact integers: what arrives is what was sent, and nothing wraps around."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError, RunError
from common.model_file import load_model
from common.models import MODELS, build
from common.weights import (
    GRID,
    LIMIT,
    advance,
    digest,
    flatten,
    manifest_of,
    mean_steps,
    resolve_initial,
    to_grid,
    unflatten,
)

STARTS = {
    "small_cnn_phantoms": "276d0fb38868a0751d5d6e47fc6e7344748fc0fc86c114c5f4c7a33e3ce2eda6",
    "small_cnn_real": "94d299e104ec4c8a4d43d0063ca36b091bc034d21b8b80de1fb7482240aeb0bb",
}
WEIGHTS = arrays(np.float32, 5, elements=st.floats(-8, 8, width=32))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_survives_the_flat_array(name: str) -> None:
    model = build(name)
    state = model.state_dict()
    manifest = manifest_of(state)
    flat = flatten(state)
    assert (flat.dtype, flat.shape) == (np.float32, (manifest.size,))
    again = unflatten(flat, manifest)
    assert list(again) == list(state)
    for key, tensor in state.items():
        assert torch.equal(again[key], tensor)


def test_unflatten_copies() -> None:
    state = build("small_cnn").state_dict()
    flat = flatten(state)
    before = flat.copy()
    for tensor in unflatten(flat, manifest_of(state)).values():
        tensor.zero_()
    assert np.array_equal(flat, before)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((1, 4), np.float32)])
def test_an_array_of_another_model_is_refused(wrong: np.ndarray) -> None:
    manifest = manifest_of({"w": torch.zeros(2, 2)})
    with pytest.raises(RunError) as caught:
        unflatten(wrong, manifest)
    assert caught.value.code == "wrong-model"


def test_the_head_is_a_stretch_of_the_flat_array() -> None:
    state = build("small_cnn").state_dict()
    part = manifest_of(state).part("head.")
    assert np.array_equal(
        flatten(state)[part], np.concatenate([state["head.weight"].ravel(), state["head.bias"]])
    )


def test_parts_that_are_not_side_by_side_are_refused() -> None:
    manifest = manifest_of({"head.a": torch.zeros(1), "body": torch.zeros(1), "head.b": torch.zeros(1)})
    for prefix in ("head.", "neck."):
        with pytest.raises(RunError) as caught:
            manifest.part(prefix)
        assert caught.value.code == "wrong-model"


def test_the_manifest_hash_sees_names_shapes_and_order() -> None:
    first, second = torch.zeros(2, 3), torch.zeros(6)
    hashes = {
        manifest_of(state).sha256()
        for state in (
            {"a": first, "b": second},
            {"b": second, "a": first},
            {"a": second, "b": second},
            {"a": first},
        )
    }
    assert len(hashes) == 4


@given(WEIGHTS, WEIGHTS)
def test_an_update_comes_back_to_half_a_grid_step(before: np.ndarray, after: np.ndarray) -> None:
    steps = to_grid(after, before)
    assert steps.dtype == np.int32
    exact = before.astype(np.float64) + GRID * steps.astype(np.float64)
    assert np.all(np.abs(exact - after.astype(np.float64)) <= GRID / 2)
    arrived = advance(before, steps)
    assert np.all(np.abs(arrived - exact) <= np.spacing(np.abs(exact).astype(np.float32)))


@given(arrays(np.int32, 5, elements=st.integers(-LIMIT, LIMIT)), st.integers(1, 8 * 10**9))
def test_the_mean_of_one_site_is_its_update_whatever_its_weight(steps: np.ndarray, weight: int) -> None:
    mean = mean_steps(steps.astype(np.int64) * weight, weight)
    assert mean.dtype == np.int32
    assert np.array_equal(mean, steps)


@given(
    st.integers(1, 8 * 10**9).flatmap(
        lambda weight: st.tuples(st.integers(-LIMIT * weight, LIMIT * weight), st.just(weight))
    )
)
def test_a_mean_is_the_nearest_whole_step(sum_and_weight: tuple[int, int]) -> None:
    """Python's fractions are exact, and round ties to even."""
    total, weight = sum_and_weight
    assert mean_steps(np.array([total]), weight).tolist() == [round(Fraction(total, weight))]


@given(st.integers(-LIMIT, LIMIT - 1), st.integers(1, 4 * 10**9))
def test_a_tie_goes_to_the_even_step(below: int, half: int) -> None:
    total = 2 * half * below + half  # half a step above `below`
    even = below + (below & 1)
    assert mean_steps(np.array([total - 1, total, total + 1]), 2 * half)[1] == even
    if half > 1:
        assert mean_steps(np.array([total - 1, total + 1]), 2 * half).tolist() == [below, below + 1]


def test_ties_by_hand() -> None:
    assert mean_steps(np.array([-5, -3, -1, 0, 1, 3, 5]), 2).tolist() == [-2, -2, 0, 0, 0, 2, 2]


def test_the_sum_is_left_as_it_was() -> None:
    total = np.array([-7, 7, 2**40])
    mean_steps(total, 3000)
    assert total.tolist() == [-7, 7, 2**40]


@pytest.mark.parametrize(
    ("total", "weight"), [(LIMIT + 1, 1), (-LIMIT - 1, 1), (-(2**63), 1), (2**63 - 1, 7), (0, 0), (5, -1)]
)
def test_a_mean_beyond_the_grid_or_of_nothing_is_refused(total: int, weight: int) -> None:
    with pytest.raises(RunError) as caught:
        mean_steps(np.array([0, total]), weight)
    assert caught.value.code == "diverged"


def test_no_update_changes_no_bit() -> None:
    weights = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert advance(weights, np.zeros(1000, np.int32)).tobytes() == weights.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, GRID * LIMIT * 2, -GRID * LIMIT * 2, 3e38])
def test_what_is_not_finite_or_too_large_is_refused(value: float) -> None:
    with pytest.raises(RunError) as caught:
        to_grid(np.array([0, value], np.float32), np.zeros(2, np.float32))
    assert caught.value.code == "diverged"


@pytest.mark.parametrize("value", [GRID * LIMIT, -GRID * LIMIT])
def test_the_limit_itself_passes(value: float) -> None:
    assert abs(int(to_grid(np.array([value], np.float32), np.zeros(1, np.float32))[0])) == LIMIT


def test_the_digest_is_of_values_not_of_memory_layout() -> None:
    weights = np.arange(10, dtype=np.float32)
    assert (
        digest(weights) == digest(np.arange(20, dtype=np.float32)[:10]) == digest(np.repeat(weights, 2)[::2])
    )
    assert digest(weights) != digest(weights[::-1])


def test_the_packaged_start_exists_and_its_hash_can_be_pinned(tmp_path: Path) -> None:
    path = resolve_initial("package:small_cnn.safetensors", None)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    assert (
        resolve_initial("package:small_cnn.safetensors", found) == resolve_initial(str(path), found) == path
    )
    with pytest.raises(ConfigError) as caught:
        resolve_initial("package:small_cnn.safetensors", "0" * 64)
    assert caught.value.code == "wrong-initial-weights"
    with pytest.raises(ConfigError) as caught:
        resolve_initial(str(tmp_path / "none.safetensors"), None)
    assert caught.value.code == "no-initial-weights"


@pytest.mark.parametrize(("name", "sha256"), sorted(STARTS.items()))
def test_both_starts_are_the_files_of_their_cards_and_load(name: str, sha256: str) -> None:
    path = resolve_initial(f"package:{name}.safetensors", sha256)
    assert path.stat().st_size < 2**20
    assert sha256 in path.with_suffix(".md").read_text(encoding="utf-8")
    manifest = manifest_of(build("small_cnn").state_dict())
    flat = load_model(path, manifest, DEFAULT_LABELS)
    assert flat.shape == (manifest.size,)
    assert np.isfinite(flat).all()


def test_a_plan_that_names_the_old_file_and_its_hash_means_the_phantoms_start() -> None:
    old = resolve_initial("package:small_cnn.safetensors", STARTS["small_cnn_phantoms"])
    assert old == resolve_initial("package:small_cnn_phantoms.safetensors", None)
    assert old.name == "small_cnn_phantoms.safetensors"
    with pytest.raises(ConfigError) as caught:
        resolve_initial("package:small_cnn.safetensors", STARTS["small_cnn_real"])
    assert caught.value.code == "wrong-initial-weights"
