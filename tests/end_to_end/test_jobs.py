"""A simulation gives the same models for any number of jobs, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.command_line import FEDQC, fedqc, simulate_words
from tests.helpers.consortium import Finished
from tests.helpers.rig import born, descendants, wait_until
from tests.helpers.same_models import assert_same_models


@pytest.fixture
def data(finished: Finished, tiny_consortium: Path, tmp_path: Path) -> Path:
    assert finished.said.returncode == 0, finished.said.stderr
    return Path(shutil.copytree(tiny_consortium, tmp_path / "data"))


def begun(finished: Finished, data: Path, out: Path, jobs: int) -> subprocess.Popen[str]:
    command = [str(FEDQC), *map(str, simulate_words(finished.plan, data, out, "--jobs", jobs))]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("jobs", [2, 4])
def test_more_jobs_give_the_models_of_one(jobs: int, finished: Finished, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = fedqc(*simulate_words(finished.plan, data, out, "--jobs", jobs, "--format", "json"))
    assert said.returncode == 0, said.stderr
    assert_same_models(out, finished.out)
    one, two = (json.loads((run / "evaluation.json").read_text()) for run in (finished.out, out))
    assert two["curves"]["pooled"] == one["curves"]["pooled"]
    assert list(two["privacy"]) == list(one["privacy"])
    assert two["counts"].keys() == one["counts"].keys()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_what_was_stopped_leaves_no_process_and_goes_on(
    number: int, status: int, finished: Finished, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    running = begun(finished, data, out, 2)
    wait_until(
        lambda: running.poll() is not None or (out / "arms/federated/checkpoints").is_dir(), 600, "it trains"
    )
    others = {pid: born(pid) for pid in descendants(running.pid)}
    assert len(others) >= 4
    os.kill(running.pid, number)
    _, talk = running.communicate(timeout=600)
    assert running.returncode == status, talk
    assert not (out / "evaluation.json").exists(), "it was finished before it was stopped"
    wait_until(lambda: not any(began and born(pid) == began for pid, began in others.items()), 60, "all end")
    said = fedqc("run", "resume", out, "--jobs", 2)
    assert said.returncode == 0, said.stderr
    assert_same_models(out, finished.out)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_choice_of_settings_that_is_stopped_leaves_no_process(
    number: int, status: int, tmp_path: Path
) -> None:
    running = tuning(tmp_path)
    others = {pid: born(pid) for pid in descendants(running.pid)}
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # as a terminal does
    else:
        os.kill(running.pid, number)
    said, talk = running.communicate(timeout=600)
    assert (running.returncode, said) == (status, ""), talk
    assert "Traceback" not in talk
    wait_until(lambda: not any(began and born(pid) == began for pid, began in others.items()), 60, "all end")


def test_a_choice_of_settings_whose_process_is_killed_is_one_line(tmp_path: Path) -> None:
    running = tuning(tmp_path)
    os.kill(descendants(running.pid)[-1], signal.SIGKILL)
    _, talk = running.communicate(timeout=600)
    error, hint = talk.splitlines()[-2:]
    assert running.returncode == 1, talk
    assert error == "fedqc: error [worker-ended]: a worker process ended (status -9)"
    assert hint == "fedqc: hint: out of memory? --jobs 1 of simulate or run tune needs less"


def tuning(folder: Path) -> subprocess.Popen[str]:
    """A `fedqc run tune` that has begun two processes beside its own."""
    (folder / "plan.yaml").write_text("{name: stopped, arms: [federated_dp]}\n", encoding="utf-8")
    running = subprocess.Popen(
        [str(FEDQC), "run", "tune", str(folder / "plan.yaml"), "--jobs", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: running.poll() is not None or len(descendants(running.pid)) >= 3, 600, "it works")
    return running
