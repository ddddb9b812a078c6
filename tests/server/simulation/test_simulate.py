"""A simulation tells which site taught nothing, and does not continue with other data unasked."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.site.config import read_site
from client.site.enrolment import LEVELS
from client.site.site_ledger import open_ledger
from common.cli import Format
from common.errors import DataError, RefusedError
from common.strict import dump_yaml
from server.cli.run import run as run_commands
from server.run_folder import RunFolder
from server.simulation.parallel_grid import places
from server.simulation.simulate import loads, node_configs, resume_simulation, run_simulation
from tests.helpers.command_line import typed
from tests.helpers.consortium import HELD_OUT, TRAINING, Consortium, settle, tiny_plan, tiny_values

A, B, C = TRAINING


def rewrite(sheet: Path, cells: dict[str, str]) -> None:
    head, *lines = list(csv.reader(sheet.open(encoding="utf-8")))
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [head[:6], *([line[0], *(cells.get(cell, cell) for cell in line[1:6])] for line in lines)]
        )


BLANK, INVERTED = {"1": "", "0": ""}, {"1": "0", "0": "1"}


def test_a_site_without_labels_takes_no_weight_and_the_run_is_partial(data: Path, tmp_path: Path) -> None:
    rewrite(data / B / "labels.csv", BLANK)
    plan = tiny_plan(training={"rounds": 1})
    assert run_simulation(plan, data, tmp_path / "run", 1, Format.json) == 6
    folder = RunFolder.open(tmp_path / "run")
    (record,) = folder.arm("federated").rounds()
    assert (sorted(record["weights"]), record["failed"]) == ([A, C], {B: "site-failure"})
    assert f"federated: {B} failed (site-failure)" in folder.evaluation["incomplete"]


def test_a_site_that_declares_nothing_assessed_says_so(data: Path, tmp_path: Path) -> None:
    settle(data / B, assessed=[])
    plan = tiny_plan(training={"rounds": 1})
    assert run_simulation(plan, data, tmp_path / "run", 1, Format.json) == 6
    (record,) = RunFolder.open(tmp_path / "run").arm("federated").rounds()
    assert record["refused"][B]["code"] == "nothing-assessed"
    assert sorted(record["weights"]) == [A, C]


def test_a_plan_with_another_split_than_a_site_does_not_start(data: Path, tmp_path: Path) -> None:
    settle(data / B, split={"train": 0.5, "test": 0.5})
    with pytest.raises(RefusedError) as caught:
        run_simulation(tiny_plan(), data, tmp_path / "run", 1, Format.json)
    assert (caught.value.code, caught.value.exit_status) == ("split-differs", 4)
    plan = tiny_plan(split={}, training={"rounds": 1})
    assert run_simulation(plan, data, tmp_path / "run", 1, Format.json) == 0


def test_a_hospital_that_only_evaluates_is_scored_and_spends_nothing(data: Path, tmp_path: Path) -> None:
    """The steps of docs/deploy.md: privacy level usual with `evaluation: disclosed`, and held out."""
    policy = LEVELS["usual"].policy.model_dump(exclude_none=True) | {"evaluation": "disclosed"}
    settle(data / HELD_OUT, kind="hospital", policy=policy)
    plan = tiny_plan(training={"rounds": 1})
    assert run_simulation(plan, data, tmp_path / "run", 1, Format.json) == 0
    evaluation = RunFolder.open(tmp_path / "run").evaluation
    assert (evaluation["status"], evaluation["incomplete"]) == ("completed", [])
    assert evaluation["scoring"][HELD_OUT] == {"mode": "disclosed"}
    kept = json.loads((data / HELD_OUT / "state" / "split.json").read_text(encoding="ascii"))
    assert (kept["train"], kept["test"]) == (0.7, 0.3), (
        "its own split, not the plan's, in every run from now on"
    )
    with open_ledger(*read_site(data / HELD_OUT)) as ledger:
        assert [row.kind for row in ledger.rows()] == ["open"]
    assert list((data / B / "state").glob("ledger*")) == []


@pytest.fixture
def interrupted(consortium: Consortium, tmp_path: Path) -> RunFolder:
    consortium.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        consortium.conduct(tiny_plan(), tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def test_a_run_does_not_resume_with_other_labels_unless_that_is_accepted(
    interrupted: RunFolder, consortium: Consortium
) -> None:
    from client.agent.tasks import agent_for

    agent_for.cache_clear()  # as a new process
    rewrite(consortium.data / B / "labels.csv", INVERTED)
    with pytest.raises(DataError) as caught:
        resume_simulation(interrupted, None, None, Format.json)
    assert (caught.value.code, "labels" in caught.value.message) == ("data-changed", True)
    assert "--accept-changed-data" in caught.value.hint
    assert [record["round"] for record in interrupted.arm("federated").rounds()] == [1]
    words = ["resume", str(interrupted.path), "--accept-changed-data", "--format", "json"]
    result = CliRunner().invoke(run_commands, words, catch_exceptions=False, standalone_mode=False)
    assert result.return_value == 0
    assert json.loads(result.stdout)["status"] == "completed"
    folder = RunFolder.open(interrupted.path)
    assert folder.manifest["data_changed"] == folder.evaluation["data_changed"] == [B]
    assert folder.arm("federated").rounds()[1]["data_changed"] == [B]


def test_a_run_resumes_with_the_same_data_and_says_nothing_of_them(
    interrupted: RunFolder, consortium: Consortium
) -> None:
    assert resume_simulation(interrupted, None, None, Format.json) == 0
    assert "data_changed" not in RunFolder.open(interrupted.path).evaluation


def test_a_simulation_keeps_how_its_settings_were_chosen_from_its_start(data: Path, tmp_path: Path) -> None:
    """Also one that ends at once: its resumption does not choose again."""
    for name in TRAINING:
        settle(data / name, policy={"allow_non_private": False})
    with pytest.raises(RefusedError):
        run_simulation(tiny_plan(), data, tmp_path / "run", 1, Format.json, tuning={"epsilon": 2.0})
    assert RunFolder.open(tmp_path / "run").tuning == {"epsilon": 2.0}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ({"--data": "elsewhere"}, "no-such-folder"),
        ({"--out": "taken"}, "run-exists"),
        ({"--device": "cuda:99"}, "no-such-device"),
        ({"--device": "\x1b[2J"}, "no-such-device"),
        ({"--set": "held_out=[hospital-z]"}, "unknown-site"),
    ],
)
def test_wrong_words_are_refused_before_settings_are_rehearsed(
    words: dict[str, str],
    code: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`privacy.settings: auto` takes minutes."""
    monkeypatch.setattr("server.run.tune.resolved", lambda *_, **__: pytest.fail("rehearsed"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    values = tiny_values() | {"held_out": [HELD_OUT]}
    (tmp_path / "plan.yaml").write_text(dump_yaml(values), encoding="utf-8")
    given = {"--data": str(data), "--out": "run"} | words
    status, _, said = typed(
        capsys, "simulate", "plan.yaml", *(word for pair in given.items() for word in pair)
    )
    assert status == 2
    assert f"error [{code}]" in said


def test_what_pools_has_a_process_that_no_training_site_waits_for() -> None:
    names = {f"/{name}/site.yaml": name for name in (*TRAINING, HELD_OUT)}
    plan = tiny_plan(arms=["public", "local", "federated", "federated_dp", "pooled"])
    nodes = node_configs(plan, [Path(path) for path in names], names=list(names.values()))
    load = loads(plan, nodes, names=names)
    assert load == {1: 2, 2: 2, 3: 2, 4: 0, 5: 3}
    place = places(load, 4)
    assert len({place[node] for node in (1, 2, 3, 5)}) == 4
