"""`fedqc evaluate`: models that a run released are scored by a run of its own, once, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from client.agent.tasks import Agent
from client.site.budget import budgets
from common.errors import ConfigError, PlanError
from common.model_file import load_model, save_model
from common.plan import RunPlan, parse_plan
from common.pricing import EVALUATION, charges, plan_epsilon
from common.weights import digest
from common.wire import Envelope, EvaluateTask, Refusal, SiteEvaluation
from server.evaluation.report.page import render
from server.evaluation.tables import table
from server.run.conduct import run_name
from server.run.recompute import recompute
from server.run.released import evaluation_plan, released_models, run_of
from server.run_folder import RunFolder, plan_text
from tests.helpers.command_line import fedqc
from tests.helpers.consortium import HELD_OUT, SITES, TRAINING, Consortium, settle, tiny_plan
from tests.helpers.site_agent import MANIFEST

DP, DISCLOSED = "hospital-c", "hospital-d"


@pytest.fixture(scope="module")
def run(tiny_consortium: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two sites train; the others are not there. Read only."""
    plan = tiny_plan(arms=["public", "local", "federated"], held_out=[], training={"rounds": 1})
    room = tmp_path_factory.mktemp("released")
    data = Path(shutil.copytree(tiny_consortium, room / "data"))
    folder: RunFolder = Consortium(data=data, names=SITES[:2]).conduct(plan, room / "run")
    return folder


@pytest.fixture
def data(tiny_consortium: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


def evaluated(
    run: RunFolder,
    data: Path,
    out: Path,
    asked: Sequence[str],
    *names: str,
    epsilon: float | None = None,
    source: RunFolder | None = None,
) -> RunFolder:
    from server.run.conduct import conduct

    released = released_models(source or run, names)
    plan = evaluation_plan(run, released, epsilon=epsilon)
    consortium = Consortium(data=data, names=tuple(asked))
    return conduct(consortium.grid(plan, out), plan, out, released=released, asked=asked)


def payload(folder: RunFolder, site: str) -> bytes:
    return Envelope.from_bytes(folder.kept_scores()[site]).payload


def entries(data: Path, site: str) -> list[Any]:
    (account,) = budgets(data / site)
    return list(account["entries"])


def test_a_site_that_never_trained_gives_the_unseen_column_and_nothing_is_trained(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    found = evaluated(run, data, tmp_path / "out", [HELD_OUT])
    evaluation = found.evaluation
    assert evaluation["arms"] == ["public", "local", "federated"]
    assert set(evaluation["matrix"]) == {"public", "local/hospital-a", "local/hospital-b", "federated"}
    (site,) = evaluation["sites"]
    assert (site["site"], site["role"]) == (HELD_OUT, "held_out")
    for arm in evaluation["arms"]:
        found_for = evaluation["headline"][arm]
        assert found_for is not None
        assert found_for["unseen"] is not None
        assert found_for["home"] is None
    contrast = next(
        one for one in evaluation["contrasts"] if (one["arm"], one["where"]) == ("federated", "unseen")
    )
    assert contrast["value"] is not None
    assert not list(found.path.rglob("rounds.jsonl"))
    assert not (found.path / "model.safetensors").exists()
    assert f"models of run {run.manifest['run']}, not trained here: {HELD_OUT}" in table(evaluation)
    assert f"those of run {run.manifest['run']}" in render(evaluation, found.manifest, found.plan)


def test_the_scores_are_those_that_a_run_with_the_site_held_out_gives(data: Path, tmp_path: Path) -> None:
    """The same patients: all of a site that never trains and is no hospital, test patients of one that
    did.
    """
    plan = tiny_plan(arms=["federated"], training={"rounds": 1})
    together = Consortium(data=data).conduct(plan, tmp_path / "run")
    apart = evaluated(together, data, tmp_path / "apart", SITES)
    for key in ("matrix", "headline", "scores", "averaged", "counts"):
        assert apart.evaluation[key] == together.evaluation[key], key
    roles = {site["site"]: site["role"] for site in apart.evaluation["sites"]}
    assert roles == {site["site"]: site["role"] for site in together.evaluation["sites"]}


def test_an_evaluation_is_recomputed_and_a_swapped_model_is_found(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    found = evaluated(run, data, tmp_path / "out", [HELD_OUT], "federated")
    assert {one.check: one.holds for one in recompute(found)} == {
        "plan": True,
        "signatures": None,
        "federated, model": True,
        "evaluation": True,
    }
    path = found.path / "arms" / "federated" / "model.safetensors"
    save_model(path, load_model(path, MANIFEST) + np.float32(1), MANIFEST, {})
    assert {one.check: one.holds for one in recompute(found)}["federated, model"] is False


def test_only_weights_that_the_run_released_are_scored(run: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder.open(Path(shutil.copytree(run.path, tmp_path / "copy")))
    model = copy.path / "arms" / "federated" / "model.safetensors"
    assert run_of(model) == (copy, ("federated",))
    assert run_of(copy.path / "arms" / "local" / "hospital-a" / "model.safetensors")[1] == (
        "local/hospital-a",
    )
    elsewhere = Path(shutil.copy(model, tmp_path / "mine.safetensors"))
    assert run_of(elsewhere, [tmp_path]) == (copy, ("federated",))
    with pytest.raises(ConfigError, match="no run is known that released") as refused:
        run_of(elsewhere)
    assert refused.value.code == "not-released"

    save_model(
        model, load_model(model, MANIFEST) + np.float32(0.5), MANIFEST, {"run": "x", "arm": "federated"}
    )
    for name in ("federated", "pooled"):
        with pytest.raises(ConfigError) as refused:
            released_models(copy, [name])
        assert refused.value.code == "not-released"
    with pytest.raises(ConfigError) as refused:
        run_of(model)
    assert refused.value.code == "not-released"
    copy.update_manifest(models={})  # as of an earlier version
    with pytest.raises(ConfigError, match="does not say which models") as refused:
        released_models(copy)


def test_a_hospital_answers_once_is_charged_once_and_gives_its_stored_bytes_again(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    settle(data / DP, kind="hospital", nominal_patients=500, policy={"evaluation": "dp"})
    settle(data / DISCLOSED, kind="hospital", nominal_patients=500, policy={"evaluation": "disclosed"})
    names = (DP, DISCLOSED)
    first = evaluated(run, data, tmp_path / "first", names, "federated", epsilon=1.0)
    plan = first.plan
    assert first.evaluation["status"] == "completed"
    assert {site: found["mode"] for site, found in first.evaluation["scoring"].items()} == {
        DP: "dp",
        DISCLOSED: "disclosed",
    }
    assert 0.99 < plan_epsilon(plan) <= 1.0
    assert [*charges(plan)] == [EVALUATION]
    charged = entries(data, DP)
    assert [entry["purpose"] for entry in charged] == ["evaluate"]

    again = evaluated(run, data, tmp_path / "again", names, "federated", epsilon=1.0)
    alone = evaluated(run, data, tmp_path / "alone", [DP], "federated", epsilon=1.0)
    assert first.manifest["run"] == again.manifest["run"] == run_name(plan)
    for site in names:
        assert payload(first, site) == payload(again, site)
    assert payload(first, DP) == payload(alone, DP)  # whoever else is asked
    assert entries(data, DP) == charged


def test_another_question_is_another_charge_with_noise_and_refused_where_scores_are_exact(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    settle(data / DP, kind="hospital", nominal_patients=500, policy={"evaluation": "dp"})
    settle(data / DISCLOSED, kind="hospital", nominal_patients=500, policy={"evaluation": "disclosed"})
    evaluated(run, data, tmp_path / "one", [DP, DISCLOSED], "federated")
    two = evaluated(run, data, tmp_path / "two", [DP, DISCLOSED], "public", "federated")
    assert len(entries(data, DP)) == 2
    assert two.evaluation["incomplete"] == [f"evaluation: {DISCLOSED} gave no score (evaluation-repeated)"]
    assert two.evaluation["status"] == "partial"


def test_a_site_refuses_models_that_the_plan_does_not_name(run: RunFolder, data: Path) -> None:
    """Whoever sends them, and whatever the site's kind."""
    released = released_models(run, ["federated"])
    plan = evaluation_plan(run, released)
    flat = released.models["federated"]
    for name, weights in (("federated", flat + np.float32(0.1)), ("public", flat)):
        task = EvaluateTask(run="r", models=(name,), everyone=True, weights=weights[None])
        answer = Agent(data / HELD_OUT / "site.yaml", plan).evaluate(task)
        assert isinstance(answer, Refusal)
        assert answer.code == "foreign-model"
    task = EvaluateTask(run="r", models=("federated",), everyone=True, weights=flat[None])
    assert isinstance(Agent(data / HELD_OUT / "site.yaml", plan).evaluate(task), SiteEvaluation)
    trained = Agent(data / TRAINING[0] / "site.yaml", plan).evaluate(task)
    assert isinstance(trained, Refusal)  # test patients only, where it trained
    assert trained.code == "evaluation-not-permitted"


def test_a_hospital_of_the_run_knows_which_models_it_scored_there(data: Path, tmp_path: Path) -> None:
    settle(data / DISCLOSED, kind="hospital", nominal_patients=500, policy={"evaluation": "disclosed"})
    plan = tiny_plan(arms=["federated"], training={"rounds": 1})
    run = Consortium(data=data).conduct(plan, tmp_path / "run")
    other = RunFolder.open(Path(shutil.copytree(run.path, tmp_path / "other")))
    moved = load_model(other.path / "model.safetensors", MANIFEST) + np.float32(0.01)
    save_model(other.path / "model.safetensors", moved, MANIFEST, {})
    other.update_manifest(models={"federated": digest(moved)})  # the coordinator lies
    plan = evaluation_plan(other, released_models(other))
    task = EvaluateTask(run="r", models=("federated",), everyone=False, weights=moved[None])
    answer = Agent(data / DISCLOSED / "site.yaml", plan).evaluate(task)
    assert isinstance(answer, Refusal)
    assert (answer.code, answer.reason) == (
        "foreign-model",
        f"run {run.manifest['run']} scored other models at this site",
    )


def test_a_hospital_scores_test_patients_only_whatever_is_asked(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    """Patients that it scores must never train: which they are is its own split."""
    settle(data / DISCLOSED, kind="hospital", nominal_patients=500, policy={"evaluation": "disclosed"})
    released = released_models(run, ["federated"])
    plan = evaluation_plan(run, released)
    task = EvaluateTask(
        run="r", models=("federated",), everyone=True, weights=released.models["federated"][None]
    )
    answer = Agent(data / DISCLOSED / "site.yaml", plan).evaluate(task)
    assert isinstance(answer, Refusal)
    assert answer.code == "evaluation-not-permitted"


def test_sites_that_are_asked_later_join_those_that_answered(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    words = (
        "evaluate",
        run.path,
        "--arm",
        "federated",
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--jobs",
        1,
    )
    for site in ("hospital-c", "hospital-d"):
        said = fedqc(*map(str, words), "--sites", site)
        assert said.returncode == 0, said.stderr
    found = RunFolder.open(tmp_path / "out")
    assert [site["site"] for site in found.manifest["sites"]] == ["hospital-c", "hospital-d"]
    assert set(found.evaluation["counts"]) == {"hospital-c", "hospital-d"}
    said = fedqc(*map(str, words), "--epsilon", "1")
    assert "error [other-plan]" in said.stderr


def test_the_plan_of_an_evaluation_is_checked_and_older_plans_keep_their_hash(run: RunFolder) -> None:
    plan = evaluation_plan(run, released_models(run))
    values = yaml.safe_load(plan_text(plan))
    assert parse_plan(values) == plan
    assert "evaluate" not in json.loads(tiny_plan().canonical_json())
    wrong: dict[str, Any] = {
        "leave arms and held_out empty": {"arms": ["federated"]},
        "is no arm": {"evaluate": values["evaluate"] | {"models": [{"name": "mine", "sha256": "0" * 64}]}},
        "names one twice": {
            "evaluate": values["evaluate"] | {"models": values["evaluate"]["models"][:1] * 2}
        },
    }
    for said, change in wrong.items():
        with pytest.raises(PlanError, match=said):
            parse_plan(values | change)
    with pytest.raises(PlanError, match="arms is empty"):
        parse_plan({**values, "evaluate": None})


def test_the_command_names_what_is_wrong_in_one_line(run: RunFolder, data: Path, tmp_path: Path) -> None:
    plan = evaluation_plan(run, released_models(run))
    (tmp_path / "plan.yaml").write_text(plan_text(plan), encoding="utf-8")
    to = ("--data", data, "--out", tmp_path / "out")
    for code, words in {
        "unknown-site": ("evaluate", run.path, "--sites", "nobody", *to),
        "not-released": ("evaluate", run.path, "--arm", "pooled", *to),
        "no-such-run": ("evaluate", tmp_path / "nothing", *to),
        "evaluation-plan": ("simulate", tmp_path / "plan.yaml", *to),
        "no-such-federation": ("evaluate", run.path),
    }.items():
        said = fedqc(*map(str, words))
        assert said.returncode == 2, said.stderr
        first, hint = said.stderr.strip().splitlines()[-2:]
        assert first.startswith(f"fedqc: error [{code}]: "), said.stderr
        assert hint.startswith("fedqc: hint: ")
    assert not (tmp_path / "out").exists()


def test_the_price_is_shown_before_anybody_is_asked_and_the_plan_is_written_for_approval(
    run: RunFolder, data: Path, tmp_path: Path
) -> None:
    words = (
        "evaluate",
        run.path,
        "--sites",
        HELD_OUT,
        "--arm",
        "federated",
        "--epsilon",
        "1.5",
        "--data",
        data,
    )
    said = fedqc(*map(str, words), "--write-plan", str(tmp_path / "plan.yaml"))
    assert said.returncode == 0, said.stderr
    assert "charged epsilon 1.50, delta 1e-05 a patient" in said.stderr
    written = parse_plan(yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8")))
    assert isinstance(written, RunPlan)
    assert written.sha256() == evaluation_plan(run, released_models(run, ["federated"]), epsilon=1.5).sha256()
    said = fedqc("site", "approve", str(tmp_path / "plan.yaml"), "--site", str(data / HELD_OUT), "--yes")
    assert said.returncode == 0, said.stderr
    assert f"evaluates  models that run {run.manifest['run']} released" in said.stdout + said.stderr
