"""A run folder that somebody else made, or damaged: one line, never an error of Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import MAX_MESSAGE, ConfigError
from server.cli.evaluate import report_command, verify_run
from server.run_folder import RunFolder, intact
from tests.helpers.consortium import Finished, tiny_plan

MANIFEST = {"run": "x", "status": "running", "sites": []}
DEEP = b"[" * 100_000


def damaged(call: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        call()
    assert refused.value.code == "damaged-run"
    assert "\n" not in refused.value.message
    assert len(refused.value.message) <= MAX_MESSAGE + 1
    return refused.value.message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        DEEP,
        b'{"threads": "1"}',
        b'{"sites": [{}]}',
        b'{"versions": 1}',
        b'{"keys": {"a": 1}}',
        b'{"run": "a\\nok    evaluation"}',
        b'{"versions": {"a\\u001b[2J": "1"}}',
        b'{"sites": [], "later": [{"words": "\\u202e"}]}',
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny_plan(), MANIFEST)
    assert folder.manifest == MANIFEST
    (folder.path / "manifest.json").write_bytes(content)
    assert "manifest.json" in damaged(lambda: folder.manifest)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"data": 1}', DEEP])
def test_a_damaged_note_of_a_simulation_is_named(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny_plan(), MANIFEST, {"data": "/d"})
    (folder.path / "simulation.json").write_bytes(content)
    assert "simulation.json" in damaged(lambda: folder.simulation)


def test_a_record_of_a_round_with_a_wrong_value_is_named_and_a_torn_line_left_out(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", tiny_plan(arms=["federated"]), MANIFEST).arm("federated")
    good = {"round": 1, "weights": {"a": 50}, "claims": {}}
    path = folder.path / "rounds.jsonl"
    for torn in (b'{"round": 2, "we', b"\xff\xfe", DEEP):
        path.write_bytes(json.dumps(good).encode() + b"\n" + torn)
        assert folder.rounds() == [good]
    wrongs: list[Any] = [
        [],
        7,
        {},
        {"round": "1"},
        good | {"weights": {"a": "50"}},
        good | {"claims": {"a": 1}},
        good | {"failed": {"a": "x\ny"}},
        good | {"claims": {"a": {"void": "\u2028"}}},
    ]
    for wrong in wrongs:
        path.write_bytes(json.dumps(good).encode() + b"\n" + json.dumps(wrong).encode())
        assert "line 2" in damaged(folder.rounds)


def test_files_that_contradict_one_another_are_damage_and_no_bug(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished.out, tmp_path / "run"))
    path = run / "evaluation.json"
    values = json.loads(path.read_bytes())
    values["counts"] = {site: {"federated": {"metal": 7}} for site in values["counts"]}
    path.write_text(json.dumps(values), encoding="utf-8")
    damaged(lambda: report_command(run))
    manifest = json.loads((run / "manifest.json").read_bytes())
    del manifest["run"]
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    damaged(lambda: verify_run(run, "text"))  # type: ignore[arg-type]


def test_our_own_errors_pass() -> None:
    with pytest.raises(ConfigError) as refused, intact(Path("run")):
        raise ConfigError("as it was", code="old-evaluation")
    assert refused.value.code == "old-evaluation"
