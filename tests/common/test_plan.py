"""A plan says what it asks, or says which key is wrong, with what value, and what was expected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.errors import PlanError
from common.plan import RunPlan, parse_plan, read_plan
from tests.helpers.command_line import ROOT
from tests.helpers.consortium import HELD_OUT, tiny_plan, tiny_values

PLANS = sorted((ROOT / "configs" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_every_plan_we_ship_is_valid_and_says_what_it_asks(path: Path) -> None:
    plan = read_plan(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    question = " ".join(
        line.lstrip("# ")
        for line in lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    )
    assert "?" in question
    assert plan.name == path.stem.replace("_", "-")


def test_the_demo_asks_the_question_of_the_readme() -> None:
    plan = read_plan(ROOT / "configs" / "plans" / "demo.yaml")
    assert plan.arms == (
        *("public", "local", "local_dp", "federated", "federated_clipped", "federated_dp", "pooled"),
    )
    assert plan.held_out == ("hospital-d",)
    assert (plan.privacy.epsilon, plan.privacy.settings, plan.privacy.alternatives) == (2, "auto", True)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"epochs": 3}, ["unknown key `epochs`"]),
    "unknown nested key": ({"training": {"round": 3}}, ["unknown key `training.round`"]),
    "text for a number": ({"training": {"rounds": "six"}}, ["`training.rounds`", "'six'", "integer"]),
    "a number in quotes": ({"seed": "7"}, ["`seed`", "'7'", "integer"]),
    "a fraction for a count": ({"training": {"rounds": 1.5}}, ["`training.rounds`", "1.5", "int"]),
    "yes for a number": ({"seed": True}, ["`seed`", "True", "integer"]),
    "too small": ({"image_size": 16}, ["`image_size`", "16", "32"]),
    "too large": ({"training": {"rounds": 1001}}, ["`training.rounds`", "1001", "1000"]),
    "no noise at all": ({"privacy": {"epsilon": 0}}, ["`privacy.epsilon`", "0", "greater than 0"]),
    "a delta that protects nobody": ({"privacy": {"delta": 0.5}}, ["`privacy.delta`", "0.5", "0.001"]),
    "not a number": ({"privacy": {"epsilon": float("nan")}}, ["`privacy.epsilon`", "nan"]),
    "an unknown arm": ({"arms": ["federatd"]}, ["`arms.0`", "federatd", "'federated'"]),
    "an arm twice": ({"arms": ["local", "local"]}, ["arms names one twice"]),
    "no arm": ({"arms": []}, ["arms is empty"]),
    "shares beyond one": ({"split": {"train": 0.9, "test": 0.4}}, ["`split`", "1.3", "must be 1"]),
    "a name for a path": ({"name": "../x"}, ["`name`", "../x"]),
    "no name": ({"name": None}, ["`name`", "None"]),
    "a negative seed": ({"seed": -1}, ["`seed`", "-1", "0"]),
    "an upper-case hash": ({"model": {"sha256": "A" * 64}}, ["`model.sha256`", "AAAA"]),
    "a mapping for a list": ({"held_out": {"a": 1}}, ["`held_out`", "array"]),
    "a number for a mapping": ({"training": 6}, ["`training`", "6"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_named_with_its_bound(name: str) -> None:
    values, words = BAD[name]
    with pytest.raises(PlanError) as caught:
        parse_plan({"name": "x"} | values, where="x.yaml")
    assert caught.value.message.startswith("x.yaml: ")
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_the_hint_lists_the_keys_and_counts_the_other_problems() -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan({"name": "x", "epochs": 3, "sede": 4})
    assert caught.value.hint.startswith("and 1 more; keys: name, question, seed")


@pytest.mark.parametrize("values", [None, [], "demo", 7])
def test_a_plan_is_a_mapping(values: object) -> None:
    with pytest.raises(PlanError, match="expected a mapping"):
        parse_plan(values)


BAD_FILES = {
    "not YAML": (b"name: [x", "not YAML"),
    "a tab": (b"name: x\ntraining:\n\trounds: 3\n", "not YAML"),
    "empty": (b"", "expected a mapping"),
    "a list": (b"- name: x\n", "expected a mapping"),
    "code": (b"name: !!python/object/apply:os.system ['true']\n", "not YAML"),
    "a date": (b"name: x\nseed: 2020-01-01\n", "date"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name: str, tmp_path: Path) -> None:
    content, words = BAD_FILES[name]
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert str(path) in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / name)
    assert caught.value.code == "no-such-plan"
    assert str(tmp_path / name) in caught.value.message


def test_scientific_notation_without_a_dot_is_a_number_or_named(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as text: whoever writes it gets the number, or is told the key and what stands
    there.
    """
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nprivacy: {delta: 1e-5}\n", encoding="utf-8")
    try:
        found: object = read_plan(path).privacy.delta
    except PlanError as error:
        found = error.message
    assert found == 1e-5 or re.search(r"`privacy\.delta` = '1e-5': .*number", str(found))


def test_canonical_json_gives_the_same_plan_back() -> None:
    plan = tiny_plan(question="Wie gut? 多好?", privacy={"noise_multiplier": 1.5})
    assert parse_plan(json.loads(plan.canonical_json())) == plan
    assert parse_plan(yaml.safe_load(yaml.safe_dump(plan.model_dump(mode="json")))) == plan


def test_canonical_json_is_one_line_with_sorted_keys() -> None:
    text = tiny_plan().canonical_json()
    assert "\n" not in text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def reordered(values: Any, order: st.DataObject) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: reordered(values[key], order) for key in order.draw(st.permutations(list(values)))}


@given(st.data())
def test_the_hash_does_not_depend_on_the_order_of_keys(order: st.DataObject) -> None:
    plan = tiny_plan()
    assert parse_plan(reordered(plan.model_dump(mode="json"), order)).sha256() == plan.sha256()


def test_stating_a_default_does_not_change_the_hash() -> None:
    assert (
        parse_plan({"name": "x", "training": {"batch_size": 16}}).sha256()
        == parse_plan({"name": "x"}).sha256()
    )


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"question": "?"}, {"training": {"rounds": 3}}, {"held_out": []}]
)
def test_any_change_changes_the_hash(changes: dict[str, Any]) -> None:
    assert tiny_plan(**changes).sha256() != tiny_plan().sha256()


def test_a_plan_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_plan().seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 2), (0.5, 4), (0.3, 7), (0.9, 2)])
def test_private_steps_make_the_epochs_in_expectation(rate: float, steps: int) -> None:
    plan = RunPlan(name="x", training={"local_epochs": 2}, privacy={"sample_rate": rate})  # type: ignore[arg-type]
    assert plan.private_steps_per_round == steps


REFUSED_FILES = {
    "latin": b"name: x\nquestion: \xe4h\n",
    "a key twice": b"name: x\nseed: 1\nseed: 2\n",
    "a nested key twice": b"name: x\ntraining: {rounds: 1, rounds: 2}\n",
    "endless": b"name: x\nfederation: {deadline_s: .inf}\n",
    "deep": b"[" * 5000,
    "a list for a key": b"? [a]\n: 1\n",
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_file_that_yaml_or_the_plan_refuses_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(REFUSED_FILES[name])
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert str(path) in caught.value.message


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nprivacy: {delta: 1e-5}\n", encoding="utf-8")
    assert read_plan(path).privacy.delta == 1e-5


def test_a_cosine_schedule_falls_from_the_learning_rate_to_nothing() -> None:
    training = parse_plan(
        tiny_values(training={"rounds": 4, "learning_rate": 0.004, "schedule": "cosine"})
    ).training
    rates = [training.in_round(number).learning_rate for number in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.004, 0.004 * (0.5 + 0.5**1.5), 0.002, 0.004 * (0.5 - 0.5**1.5)])
    constant = parse_plan(tiny_values(training={"rounds": 4})).training
    assert constant.in_round(3) == constant


def test_a_step_schedule_falls_by_a_factor() -> None:
    values = {"rounds": 5, "learning_rate": 0.1, "schedule": "step", "decay_rounds": 2, "decay_factor": 0.5}
    training = parse_plan(tiny_values(training=values)).training
    rates = [training.in_round(number).learning_rate for number in range(1, 6)]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


@pytest.mark.parametrize(
    ("schedule", "after"), [("constant", [1, 1, 1]), ("cosine", [1, 0.75, 0.25]), ("step", [1, 0.1, 0.01])]
)
def test_a_schedule_begins_after_the_warm_up(schedule: str, after: list[float]) -> None:
    values = {"rounds": 5, "learning_rate": 0.3, "schedule": schedule, "decay_rounds": 1, "warmup_rounds": 2}
    training = parse_plan(tiny_values(training=values)).training
    rates = [training.in_round(number).learning_rate / 0.3 for number in range(1, 6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, *after])


def test_a_warm_up_ends_before_the_last_round() -> None:
    with pytest.raises(PlanError, match="warmup_rounds = 2, must be below rounds = 2"):
        parse_plan(tiny_values(training={"rounds": 2, "warmup_rounds": 2}))


LATER: dict[str, tuple[object, object]] = {
    "optimizer": ("adamw", "sgd"),
    "optimizer_args": ({}, {"beta1": 0.8}),
    "warmup_rounds": (0, 1),
    "decay_rounds": (10, 3),
    "decay_factor": (0.1, 0.2),
    "ema": (0.0, 0.9),
    "choose_round": (None, "last"),
    "early_stopping": (None, 3),
    "sampler": ("uniform", "balanced"),
    "augment": ([], ["flip", "shift"]),
    "precision": ("fp32", "bf16"),
    "memory_format": ("contiguous", "channels_last"),
    "dropout": (0.0, 0.1),
}


@pytest.mark.parametrize("key", LATER)
def test_a_later_key_of_training_is_hashed_where_it_is_not_the_default(key: str) -> None:
    """Plans that were approved before the key existed keep their hash."""
    default, other = LATER[key]
    silent = parse_plan(tiny_values())
    stated = parse_plan(tiny_values(training={"rounds": 2, key: default}))
    assert stated.sha256() == silent.sha256()
    changed = parse_plan(tiny_values(training={"rounds": 2, key: other}))
    assert changed.sha256() != silent.sha256()
    assert parse_plan(json.loads(changed.canonical_json())) == changed


def test_a_private_head_needs_public_features() -> None:
    with pytest.raises(PlanError, match="federated_dp"):
        parse_plan(tiny_values(arms=["federated_dp"], model={"initial": "random"}))


def test_the_default_strategy_changes_no_hash() -> None:
    """Plans that were approved before the key existed keep their hash."""
    stated = parse_plan(tiny_values(training={"rounds": 4, "strategy": "fedavg"}))
    silent = parse_plan(tiny_values(training={"rounds": 4}))
    assert stated == silent
    assert stated.canonical_json() == silent.canonical_json()
    assert "strategy" not in stated.canonical_json()
    other = parse_plan(tiny_values(training={"rounds": 4, "strategy": "other"}))
    assert parse_plan(json.loads(other.canonical_json())).training.strategy == "other"
    with pytest.raises(PlanError, match="strategy"):
        parse_plan(tiny_values(training={"strategy": "os:system"}))


def test_whom_a_held_out_site_is_scored_on_is_hashed_where_it_is_not_everybody() -> None:
    silent, stated = parse_plan(tiny_values()), parse_plan(tiny_values(held_out_patients="all"))
    changed = parse_plan(tiny_values(held_out_patients="test"))
    assert stated.sha256() == silent.sha256() != changed.sha256()
    assert parse_plan(json.loads(changed.canonical_json())) == changed
    assert (silent.split_at(HELD_OUT), changed.split_at(HELD_OUT)) == (None, changed.split)
    assert silent.split_at("hospital-a") == silent.split


def test_the_hash_of_a_plan_of_the_first_version_is_what_it_was() -> None:
    values = {
        "name": "demo",
        "privacy": {"epsilon": 8.0},
        "model": {"initial": "package:small_cnn.safetensors"},
    }
    assert parse_plan(values).sha256() == "c356194172d90553f3e1edcef59396d21bfb6a4613c793e7703279e06a10811e"


def test_a_new_plan_starts_from_weights_that_have_seen_people() -> None:
    model = parse_plan({"name": "new"}).model
    assert (model.name, model.initial) == ("small_cnn", "package:small_cnn_real.safetensors")


FILE = {"file": "/public.safetensors", "sha256": "a" * 64}


def test_a_public_set_is_phantoms_or_a_file() -> None:
    phantoms, named = parse_plan({"name": "x"}), parse_plan({"name": "x", "public_set": FILE})
    assert json.loads(phantoms.canonical_json())["public_set"] == {"patients": 60, "seed": 20261}
    assert json.loads(named.canonical_json())["public_set"] == FILE
    assert parse_plan(json.loads(named.canonical_json())) == named
    for values, words in (
        (FILE | {"patients": 60}, "patients is of phantoms"),
        ({"file": FILE["file"]}, "file and sha256 belong together"),
        (FILE | {"file": "public.safetensors"}, "must be an absolute path"),
    ):
        with pytest.raises(PlanError, match=words):
            parse_plan({"name": "x", "public_set": values})


@pytest.mark.parametrize("arm", ["federated_dp", "local_dp", "federated_clipped"])
def test_a_private_plan_refuses_a_sampler_that_counts_patients(arm: str) -> None:
    balanced = {"rounds": 2, "sampler": "balanced"}
    assert (
        parse_plan(tiny_values(arms=["local", "federated"], training=balanced)).training.sampler == "balanced"
    )
    with pytest.raises(PlanError, match=f"counts labels over patients.*leave out {arm}.*class_weights"):
        parse_plan(tiny_values(arms=["federated", arm], training=balanced))


def test_slices_are_bent_before_an_artifact_only() -> None:
    bent = {"rounds": 2, "augment": ["elastic", "flip"]}
    with pytest.raises(PlanError, match="elastic bends ghosts and streaks"):
        parse_plan(tiny_values(training=bent))
    assert parse_plan(tiny_values(training=bent | {"inject": {}})).training.augment == ("elastic", "flip")
    with pytest.raises(PlanError, match="augment names one twice"):
        parse_plan(tiny_values(training={"rounds": 2, "augment": ["flip", "flip"]}))
    with pytest.raises(PlanError, match="blur"):
        parse_plan(tiny_values(training={"rounds": 2, "augment": ["blur"]}))


@pytest.mark.parametrize("arm", ["federated_dp", "local_clipped"])
def test_a_private_arm_augments_views_only(arm: str) -> None:
    flip = {"rounds": 2, "augment": ["flip"]}
    with pytest.raises(PlanError, match=f"{arm} takes the slices of a patient as they are"):
        parse_plan(tiny_values(arms=["federated", arm], training=flip))
    plan = parse_plan(tiny_values(arms=["federated", arm], training=flip | {"inject": {"views": 2}}))
    assert plan.training.augment == ("flip",)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"training": {"inject": {}}}, "views of single slices"),
        ({"privacy": {"settings": "auto"}}, "rehearses on single slices"),
    ],
)
def test_a_network_of_studies_is_refused_what_is_made_of_single_slices(
    more: dict[str, object], said: str
) -> None:
    study = {"name": "study", "initial": "random"}
    assert parse_plan({"name": "x", "model": study}).model.study_slices == 8
    assert parse_plan({"name": "x", "model": study | {"args": {"slices": 4}}}).model.study_slices == 4
    assert parse_plan({"name": "x"} | more).model.study_slices is None
    beside = {"initial": "random", "args": {"neighbours": True}}
    assert parse_plan({"name": "x", "model": beside}).model.neighbours
    for model in (study, beside):
        with pytest.raises(PlanError, match=said):
            parse_plan({"name": "x", "model": model} | more)
