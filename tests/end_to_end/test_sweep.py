"""A sweep that was killed goes on: finished runs are kept, the one that was cut ends with the same bits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers.command_line import FEDQC, fedqc
from tests.helpers.consortium import write_plan
from tests.helpers.rig import wait_until

CELLS = ("000-0.001-seed-1", "000-0.001-seed-2", "001-0.01-seed-1", "001-0.01-seed-2")


@pytest.fixture
def words(data: Path, tmp_path: Path) -> list[str]:
    write_plan(tmp_path / "base.yaml", training={"rounds": 3})
    sweep = {
        "name": "rates",
        "plan": "base.yaml",
        "grid": {"training.learning_rate": [0.001, 0.01]},
        "seeds": [1, 2],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    return ["simulate", str(tmp_path / "sweep.yaml"), "--data", str(data), "--jobs", "1"]


def test_a_killed_sweep_goes_on_to_the_same_models(words: list[str], tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    running = subprocess.Popen(
        [str(FEDQC), *words, "--out", str(cut)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begun = cut / "cells" / CELLS[1] / "checkpoints" / "round-0001.safetensors"
    wait_until(lambda: running.poll() is not None or begun.exists(), 600, "the second run trains")
    os.kill(running.pid, signal.SIGKILL)
    _, talk = running.communicate(timeout=600)
    assert running.returncode == -signal.SIGKILL, talk
    assert not (cut / "cells" / CELLS[1] / "evaluation.json").exists(), "it was finished before it was killed"
    assert not (cut / "table.md").exists()
    torn = cut / "cells" / f".{CELLS[2]}.torn"  # a run folder that was begun, and not yet whole
    torn.mkdir()
    finished = (cut / "cells" / CELLS[0] / "evaluation.json").stat().st_mtime_ns

    said = fedqc(*words, "--out", cut)
    assert said.returncode == 0, said.stderr
    assert "run 1 of 4" not in said.stderr
    assert "run 2 of 4" in said.stderr
    assert "round 1 of 3" not in said.stderr.partition("run 3 of 4")[0], "its first round was done again"
    assert (cut / "cells" / CELLS[0] / "evaluation.json").stat().st_mtime_ns == finished
    assert not torn.exists()

    shutil.copytree(cut / "cells" / CELLS[0], whole / "cells" / CELLS[0])
    shutil.copy(cut / "sweep.json", whole / "sweep.json")
    again = fedqc(*words, "--out", whole)
    assert again.returncode == 0, again.stderr
    for cell in CELLS:
        models = [(out / "cells" / cell / "model.safetensors").read_bytes() for out in (cut, whole)]
        assert model_bits(models[0]) == model_bits(models[1]), cell
    tables = [(out / "table.csv").read_text(encoding="utf-8") for out in (cut, whole)]
    assert tables[0] == tables[1]


def model_bits(file: bytes) -> bytes:
    """The weights of a safetensors file; its header names the run."""
    size = int.from_bytes(file[:8], "little")
    return file[8 + size :]
