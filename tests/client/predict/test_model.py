"""Which model is meant, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.predict.model import START, find_model, privacy_of
from client.site import model_in_use
from common.errors import ConfigError
from common.lineage import KEY, NO_DATA
from common.model_file import described, save_model
from common.models import build
from common.plan import RunPlan, parse_plan
from common.weights import Manifest, flatten, manifest_of


def plan(**model: object) -> RunPlan:
    return parse_plan({"name": "p", "model": model})


def saved(path: Path, name: str = "small_cnn", **metadata: str) -> Path:
    state = build(name).state_dict()
    save_model(path, flatten(state), manifest_of(state), metadata)
    return path


def test_without_a_model_of_a_run_the_public_start_is_used_and_says_so(tmp_path: Path) -> None:
    found = find_model(None, tmp_path)
    assert (found.origin, found.start) == ("start", "small_cnn_real")
    assert found.privacy.basis == "no hospital's patients"
    assert found.sha256 == find_model(START, None).sha256


def test_the_model_that_a_site_put_to_use_comes_before_the_start(tmp_path: Path) -> None:
    about = described(plan(), "federated_dp")
    path = saved(tmp_path / "a.safetensors", run="r1", arm="federated_dp", **about)
    model_in_use.note(tmp_path, "use", by="W", model=model_in_use.keep(tmp_path, path.read_bytes()))
    for wanted in (None, "latest"):
        found = find_model(wanted, tmp_path)
        assert (found.origin, found.run, found.arm) == ("in-use", "r1", "federated_dp")
        assert (found.privacy.epsilon, found.privacy.delta) == (2.0, 1e-5)


@pytest.mark.parametrize("state", [None, Path("nowhere")])
def test_a_latest_model_that_is_not_there_is_not_replaced_silently(state: Path | None) -> None:
    with pytest.raises(ConfigError) as caught:
        find_model("latest", state)
    assert caught.value.code == "no-model"


def test_a_run_means_its_released_model_and_a_network_is_known_by_its_tensors(tmp_path: Path) -> None:
    saved(tmp_path / "model.safetensors", "small_cnn_two_stems")
    found = find_model(str(tmp_path), None)
    assert (found.origin, found.name, found.privacy.basis) == ("run", "small_cnn_two_stems", "unknown")


def test_the_side_of_the_slices_is_that_of_the_run(tmp_path: Path) -> None:
    about = described(plan().model_copy(update={"image_size": 64}), "federated")
    assert find_model(str(saved(tmp_path / "m.safetensors", **about)), None).size == 64


def test_files_that_are_no_usable_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    strange = tmp_path / "strange.safetensors"
    save_model(strange, np.zeros(2, np.float32), Manifest(names=("a",), shapes=((2,),)), {})
    studies = saved(tmp_path / "study.safetensors", network='{"name": "study", "args": {}}')
    three = saved(
        tmp_path / "three.safetensors", network='{"name": "small_cnn", "args": {"neighbours": true}}'
    )
    unknown = saved(tmp_path / "unknown.safetensors", network='{"name": "magic", "args": {}}')
    for path, code in (
        (tmp_path / "text.safetensors", "wrong-model"),
        (strange, "wrong-model"),
        (studies, "study-model"),
        (three, "study-model"),
        (unknown, "wrong-model"),
        (tmp_path / "absent.safetensors", "no-model"),
    ):
        with pytest.raises(ConfigError) as caught:
            find_model(str(path), None)
        assert caught.value.code == code, path


def test_an_epsilon_counts_only_where_no_ancestor_saw_patients_without_noise() -> None:
    about = {"arm": "federated_dp", **described(plan(), "federated_dp")}
    assert privacy_of(about).epsilon == 2.0
    open_ancestor = NO_DATA.child("a run", weights="0" * 64, kinds=["hospital"], private=False)
    protected = NO_DATA.child("a run", weights="0" * 64, kinds=["hospital"], private=True)
    assert privacy_of(about | {KEY: open_ancestor.text()}).basis == "not private"
    assert privacy_of(about | {KEY: protected.text()}).epsilon == 2.0
    assert privacy_of({"arm": "federated", **described(plan(), "federated")}).basis == "not private"
    assert privacy_of({"arm": "federated"}).basis == "unknown", "a file of an earlier version"
