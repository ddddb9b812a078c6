"""Which model is meant, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from client.predict.model import START, Model, Privacy, ensemble, find_model, in_precision, privacy_of, score
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


# --- several models together


def members(tmp_path: Path, **second: str) -> tuple[Model, Model]:
    """Two networks of other weights."""
    paths = []
    for number, about in enumerate(({}, second)):
        torch.manual_seed(number)
        paths.append(saved(tmp_path / f"{number}.safetensors", **about))
    return find_model(str(paths[0]), None), find_model(str(paths[1]), None)


def test_an_ensemble_scores_the_mean_logit_of_its_members_in_any_order(tmp_path: Path) -> None:
    one, other = members(tmp_path)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 900, (3, 128, 128)).astype(np.int16)
    modality, rows = np.array([0, 1, 1], np.int8), np.arange(3)
    apart = [score(model, images, modality, rows) for model in (one, other)]
    together = score(ensemble([one, other]), images, modality, rows)
    assert np.abs(apart[0] - apart[1]).max() > 0.001
    np.testing.assert_allclose(together, (apart[0] + apart[1]) / 2, rtol=1e-6)
    assert ensemble([one, other]) == ensemble([other, one])
    assert set(ensemble([one, other]).hashes) == {one.sha256, other.sha256}
    assert ensemble([one, other]).sha256 not in {one.sha256, other.sha256}, "it has thresholds of its own"
    assert {model.precision for model in in_precision(ensemble([one, other]), "bf16").members} == {"bf16"}


def test_an_ensemble_knows_what_all_of_its_members_know(tmp_path: Path) -> None:
    start, (other, _) = find_model(START, None), members(tmp_path)
    fewer = replace(other, labels=other.labels, unlearned=("metal",))
    found = ensemble([start, fewer])
    assert found.learned == tuple(name for name in start.learned if name in fewer.learned)
    assert "metal" not in found.learned
    rows = np.arange(1)
    images, modality = np.zeros((1, 128, 128), np.int16), np.zeros(1, np.int8)
    logits = score(found, images, modality, rows)
    place = found.labels.index("motion")
    expected = [score(one, images, modality, rows)[0, one.labels.index("motion")] for one in (start, fewer)]
    assert logits[0, place] == pytest.approx(np.mean(expected))


def test_models_that_cannot_judge_together_are_refused(tmp_path: Path) -> None:
    one, other = members(tmp_path)
    for wrong in (
        [one, one],
        [one, replace(other, size=64)],
        [one, replace(other, unlearned=other.labels)],
    ):
        with pytest.raises(ConfigError) as caught:
            ensemble(wrong)
        assert caught.value.code == "wrong-ensemble"


def test_the_epsilons_of_an_ensemble_add_up_and_an_open_member_voids_them(tmp_path: Path) -> None:
    private = Privacy(basis="asked by its plan", epsilon=2.0, delta=1e-5)
    public = Privacy(basis="no hospital's patients")
    one, other = members(tmp_path)

    def of(*two: Privacy) -> Privacy:
        return ensemble([replace(one, privacy=two[0]), replace(other, privacy=two[1])]).privacy

    assert of(private, private) == Privacy(basis="asked by their plans together", epsilon=4.0, delta=2e-5)
    assert of(private, public) == private
    assert of(public, public) == public
    assert of(private, Privacy(basis="unknown")).basis == "unknown"
    assert of(Privacy(basis="unknown"), Privacy(basis="not private")).basis == "not private"
