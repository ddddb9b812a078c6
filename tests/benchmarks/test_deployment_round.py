"""The benchmark of a deployed round counts what it says it counts. No claim about speed is tested, and no
deployment is started.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from server.federation.flower_app import bundle_files

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BURN = "import time\nwhile time.process_time() < 0.3: pass\n"


@pytest.fixture
def deployment_round(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("deployment_round")


def test_the_model_is_a_resnet18(deployment_round: ModuleType) -> None:
    layers = deployment_round.resnet18_layers()
    assert (len(layers), deployment_round.count(layers)) == (62, 11_689_512)
    assert len({name for name, _ in layers}) == 62


def test_cpu_of_a_tree_counts_the_living_and_the_dead(deployment_round: ModuleType) -> None:
    """A grandchild that was waited for, and the child itself, which still lives."""
    child = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}], "
        f"check=True)\n{BURN}print(flush=True)\nsys.stdin.read()"
    )
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as root:
        try:
            assert root.stdout is not None
            root.stdout.readline()
            assert deployment_round.tree_cpu_s(root.pid) >= 0.58  # two of them, in ticks of 10 ms
        finally:
            root.kill()


def test_the_first_round_is_not_counted(deployment_round: ModuleType, tmp_path: Path) -> None:
    marks = tmp_path / "marks.jsonl"
    marks.write_text(
        "".join(
            json.dumps({"round": n, "at": at, "bytes": {"down": n, "up": n}}) + "\n"
            for n, at in enumerate((0, 90, 91, 93))
        )
    )
    found = deployment_round.measure_rounds(marks, 2, lambda: None)
    assert found["wall_s"] == [1, 2]
    assert len(found["cpu_s"]) == 2
    assert found["bytes"] == {"down": 3, "up": 3}


def test_a_dead_process_ends_the_measurement(deployment_round: ModuleType, tmp_path: Path) -> None:
    with deployment_round.Processes(tmp_path) as processes:
        processes.start("one", [sys.executable, "-c", "raise SystemExit('no such thing')"])
        with pytest.raises(deployment_round.BenchmarkError, match="no such thing"):
            deployment_round.measure_rounds(tmp_path / "marks.jsonl", 1, processes.alive)


def test_what_a_deployment_is_started_with_is_as_shipped(
    deployment_round: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    found = deployment_round.as_shipped({"FLWR_HOME": "home"})
    assert not [name for name in found if name.startswith("MALLOC_")]
    assert (found["FLWR_HOME"], found["FLWR_TELEMETRY_ENABLED"]) == ("home", "0")


def test_the_bundle_differs_in_its_server_app_alone(deployment_round: ModuleType) -> None:
    app = deployment_round.APPS / "fedqc_rounds.py"
    before = bundle_files()
    after = deployment_round.bundle_with(before, app, ("marks",))
    assert {name for name in after if after[name] != before.get(name)} == {
        deployment_round.COORDINATOR,
        "pyproject.toml",
    }
    assert after["pyproject.toml"].endswith(b'run-dir = ""\nmarks = ""\n')
    with pytest.raises(deployment_round.BenchmarkError):
        deployment_round.bundle_with({"pyproject.toml": b""}, app, ())


def test_flower_is_given_the_objects_that_it_looks_for(deployment_round: ModuleType) -> None:
    """`flwr run` reads them from the source: a plain assignment each."""
    for app, names in (("flower_default.py", {"server", "client"}), ("fedqc_rounds.py", {"app"})):
        tree = ast.parse((deployment_round.APPS / app).read_text(encoding="utf-8"))
        found = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        assert names <= found


def test_floor_moves_what_a_deployment_moves(deployment_round: ModuleType) -> None:
    found = deployment_round.floor_side([("only", [1000])], 2)
    assert len(found["wall_s"]) == len(found["cpu_s"]) == 2
    assert 0 < found["bytes"]["up"] < 3 * 4 * 1000


def test_table_gives_seconds_bytes_and_ratios_beside_their_aims(deployment_round: ModuleType) -> None:
    moved = {"down": 2_000_000, "up": 1_000_000}
    sides = {
        "default": ([20.0, 22.0], [30.0, 30.0]),
        "fedqc": ([5.0, 5.0], [10.0, 10.0]),
        "floor": ([2.0, 2.0], [2.0, 2.0]),
    }
    turn = {name: {"wall_s": wall, "cpu_s": cpu, "bytes": moved} for name, (wall, cpu) in sides.items()}
    small = {
        name: {"wall_s": 9.0, "cpu_s": cpu}
        for name, cpu in (("running", 8.0), ("from nothing", 20.0), ("floor", 4.0))
    }
    result: dict[str, Any] = {
        "work": {"sites": 3, "weights": 11_689_512, "arrays": 62, "rounds": 2, "turns": 1, "proxy": True},
        "summary": deployment_round.summary([turn]),
        "small": deployment_round.small_summary([small]),
        "environment": {
            **{"versions": {"flwr": "1"}, "date": "today", "cores": 2, "machine": "one"},
            **{"load_1min": 0, "load_1min_after": 0, "python": "3"},
        },
    }
    page = deployment_round.table(result)
    assert "| fedqc | 5.00 | 10.00 | 2.0 | 1.0 |" in page
    assert "| fedqc / default | 0.238 (0.238–0.238) | 0.333 (0.333–0.333) | wall ≤ 0.3: met |" in page
    assert (
        "| small run, running / its floor | 1.000 (1.000–1.000) | 2.000 (2.000–2.000) | CPU ≤ 4: met |"
        in page
    )
    assert "CPU ≤ 4: missed" in page
    result["work"]["weights"] = 1000
    assert "wall ≤" not in deployment_round.table(result)  # the aim is for a model of ResNet18's size


@pytest.mark.parametrize("name", ["deployment_round", "update_codecs"])
def test_the_page_has_a_place_for_the_table(name: str) -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"<!-- {name} -->" in page
    assert f"<!-- /{name} -->" in page
