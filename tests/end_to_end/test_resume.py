"""A run that was killed goes on to the same bits, and says why when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from client.site.config import read_site
from client.site.site_ledger import open_ledger
from tests.helpers.command_line import FEDQC, fedqc, simulate_words
from tests.helpers.consortium import TRAINING, Finished, write_plan
from tests.helpers.same_models import NOT_PRIVATE, assert_same_models


@pytest.fixture
def data(finished: Finished, tiny_consortium: Path, tmp_path: Path) -> Path:
    assert finished.said.returncode == 0, finished.said.stderr
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


def stopped(plan: Path, data: Path, out: Path, *, once: str, number: int) -> subprocess.CompletedProcess[str]:
    """Start a simulation and send it `number` as soon as the file `once` of the run folder exists."""
    command = [str(FEDQC), *map(str, simulate_words(plan, data, out))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 600
    while not (out / once).exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process.pid, number)
    said = process.communicate(timeout=600)
    assert (out / once).exists(), said[1]
    assert not (out / "evaluation.json").exists(), "it was finished before it was stopped"
    return subprocess.CompletedProcess(command, process.returncode, *said)


def test_a_killed_run_resumes_to_the_same_bits(finished: Finished, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed = stopped(
        finished.plan,
        data,
        out,
        once="arms/federated/checkpoints/round-0001.safetensors",
        number=signal.SIGKILL,
    )
    assert killed.returncode == -signal.SIGKILL
    said = fedqc("run", "resume", out, "--format", "json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["status"] == "completed"
    assert_same_models(out, finished.out)
    mine, theirs = (
        json.loads((run / "evaluation.json").read_text(encoding="utf-8")) for run in (out, finished.out)
    )
    for arm in ("public", "local", "federated", "pooled"):
        assert mine["metrics"][arm] == theirs["metrics"][arm]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")], "half-written files were left"


def test_a_run_killed_in_its_private_arm_is_charged_once(data: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "run", write_plan(tmp_path / "plan.yaml", arms=["federated_dp"])
    stopped(plan, data, out, once="checkpoints/round-0001.safetensors", number=signal.SIGKILL)
    said = fedqc("run", "resume", out)
    assert said.returncode == 0, said.stderr
    for name in TRAINING:
        with open_ledger(*read_site(data / name)) as ledger:
            assert [(row.kind, row.steps) for row in ledger.rows()] == [
                ("open", 0),
                ("filter", 0),
                ("reserve", 2),
                ("commit", 1),
                ("commit", 1),
            ]


def test_ctrl_c_shows_no_traceback_and_resumes_to_the_same_bits(
    finished: Finished, data: Path, tmp_path: Path
) -> None:
    out, plan = tmp_path / "run", write_plan(tmp_path / "plan.yaml", arms=["local", "federated"])
    interrupted = stopped(
        plan,
        data,
        out,
        once="arms/local/hospital-a/checkpoints/round-0001.safetensors",
        number=signal.SIGINT,
    )
    assert interrupted.returncode == 130
    assert "Traceback" not in interrupted.stderr
    last = [line for line in interrupted.stderr.splitlines() if line][-2:]
    assert last[0].startswith("fedqc: error [interrupted]: ")
    assert "fedqc run resume" in last[1]
    said = fedqc("run", "resume", out)
    assert said.returncode == 0, said.stderr
    assert_same_models(out, finished.out, NOT_PRIVATE[:-1])  # all of the plan's arms


def test_sigterm_stops_with_143(finished: Finished, data: Path, tmp_path: Path) -> None:
    said = stopped(
        finished.plan,
        data,
        tmp_path / "run",
        once="arms/local/hospital-a/checkpoints/round-0001.safetensors",
        number=signal.SIGTERM,
    )
    assert said.returncode == 143
    assert "Traceback" not in said.stderr


def test_a_finished_run_is_not_trained_again(finished: Finished, tmp_path: Path) -> None:
    """A copy whose data have moved: every model, the private one too, is as it was."""
    out = Path(shutil.copytree(finished.out, tmp_path / "run"))
    said = fedqc("run", "resume", out, "--data", finished.data)
    assert said.returncode == 0, said.stderr
    assert_same_models(out, finished.out, (*NOT_PRIVATE, "federated_dp"))
    assert ": round " not in said.stderr


@pytest.mark.parametrize("what", ["missing", "no-data"])
def test_what_cannot_be_resumed_says_why(what: str, finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if what == "no-data":
        shutil.copytree(finished.out, out, ignore=shutil.ignore_patterns("simulation.json", "arms"))
    said = fedqc("run", "resume", out)
    assert said.returncode == 2
    expected = {"missing": f"fedqc: error [no-such-run]: {out}", "no-data": f"fedqc: error [no-data]: {out}"}
    assert said.stderr.startswith(expected[what])
