"""The benchmarks compare the same work, and count what they say they count. No claim about speed is
tested.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BURN = "import time\nwhile time.process_time() < {seconds}: pass"


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Another number of threads may change the last bit."""
    from common.learning import get_threads, set_threads

    threads = get_threads()
    set_threads(1)
    yield
    set_threads(threads)


@pytest.fixture
def loop_overhead(measuring: ModuleType) -> ModuleType:
    return importlib.import_module("loop_overhead")


@pytest.mark.usefixtures("one_thread")
def test_floor_ends_with_the_weights_of_the_simulation_bit_for_bit(
    loop_overhead: ModuleType, tmp_path: Path
) -> None:
    from client.app import app
    from common.plan import read_plan
    from server.run.conduct import conduct
    from server.simulation.local_grid import LocalGrid
    from server.simulation.simulate import find_sites

    plan_file, data, arrays = tmp_path / "plan.yaml", tmp_path / "data", tmp_path / "arrays"
    loop_overhead.write_plan(plan_file, rounds=2, image_size=32)
    loop_overhead.make_sites(data, arrays, plan_file, sites=2, images=7)
    plan = read_plan(plan_file)
    nodes = {number: {"site-config": str(path)} for number, path in enumerate(find_sites(data), start=1)}
    grid = LocalGrid(app, nodes, {"plan": plan.canonical_json(), "run-dir": str(tmp_path / "run")})
    folder = conduct(grid, plan, tmp_path / "run")
    simulated = safetensors.numpy.load_file(folder.path / "model.safetensors")
    floor, size = loop_overhead.floor(plan_file, data)
    assert size == sum(array.size for array in simulated.values())
    assert loop_overhead.difference(floor, simulated) == 0
    plain, _ = loop_overhead.plain(plan_file, arrays)
    assert 0 < loop_overhead.difference(plain, simulated) < loop_overhead.PLAIN_TOLERANCE


def test_difference_sees_one_bit_and_other_shapes(loop_overhead: ModuleType) -> None:
    weights = {"a": np.array([1.0, 2.0], np.float32), "b": np.zeros(1, np.float32)}
    signed = weights | {"b": -weights["b"]}
    assert loop_overhead.difference(weights, dict(reversed(weights.items()))) == 0
    assert loop_overhead.difference(signed, weights) > 0  # -0.0 is not the same bits
    assert loop_overhead.difference({"a": weights["a"]}, weights) == float("inf")


def test_ratio_is_taken_turn_by_turn(measuring: ModuleType) -> None:
    assert measuring.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == measuring.Ratio(min=1.0, median=2.0, max=3.0)
    assert str(measuring.ratio([1.5], [1.0])) == "1.500 (1.500–1.500)"


def test_turns_alternate_and_the_first_is_not_counted(measuring: ModuleType) -> None:
    calls: list[str] = []

    def side(name: str, wall_s: float) -> object:
        calls.append(name)
        return measuring.Cost(wall_s=wall_s, cpu_s=1.0, peak_mib=1.0)

    costs = measuring.interleave({"a": lambda turn: side("a", turn), "b": lambda turn: side("b", turn)}, 2)
    assert "".join(calls) == "abbaab"
    assert [cost.wall_s for cost in costs["a"]] == [1, 2]


def test_a_benchmark_prints_its_result_as_asked_and_a_failure_is_one_line(
    measuring: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parser = measuring.command_line("What does it cost?", quick="less", usual=5)
    asked = parser.parse_args(["--format", "json"])
    assert measuring.repetitions_of(asked) == 5
    assert measuring.repetitions_of(parser.parse_args(["--quick"])) == 3
    assert measuring.repetitions_of(parser.parse_args(["--quick", "--repetitions", "7"])) == 7
    assert measuring.reported("one", asked, lambda: {"a": 1}, lambda result: "| table |") == 0
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert measuring.reported("one", parser.parse_args([]), lambda: {"a": 1}, lambda result: "| table |") == 0
    assert capsys.readouterr().out == "| table |\n"

    def fails() -> None:
        raise measuring.BenchmarkError("no device")

    assert measuring.reported("one", asked, fails, str) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "one: no device\n")


def test_cpu_of_descendants_is_counted(measuring: ModuleType) -> None:
    grandchild = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        f"{BURN.format(seconds=0.3)!r}], check=True)"
    )
    assert measuring.run([sys.executable, "-c", grandchild]).cpu_s >= 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="orphans can be adopted on Linux only")
def test_daemons_are_ended_and_counted(measuring: ModuleType) -> None:
    daemon = f"import sys\n{BURN.format(seconds=0.3)}\nprint(flush=True)\ntime.sleep(600)"
    parent = (
        "import subprocess, sys\n"
        f"daemon = subprocess.Popen([sys.executable, '-c', {daemon!r}], start_new_session=True, "
        "stdout=subprocess.PIPE)\n"
        "daemon.stdout.readline()"
    )
    cost = measuring.run([sys.executable, "-c", parent])
    assert cost.cpu_s >= 0.3
    assert cost.wall_s < 600


def test_a_failed_side_is_an_error_with_its_output(measuring: ModuleType) -> None:
    with pytest.raises(measuring.BenchmarkError, match="wrong weights"):
        measuring.run([sys.executable, "-c", "raise SystemExit('wrong weights')"])


def test_table_replaces_only_its_own_place(measuring: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- /one -->\nafter\n", encoding="utf-8")
    measuring.update_table(page, "one", "| new |\n")
    assert page.read_text(encoding="utf-8") == "before\n<!-- one -->\n| new |\n<!-- /one -->\nafter\n"
    with pytest.raises(measuring.BenchmarkError, match="two"):
        measuring.update_table(page, "two", "| new |")


def test_the_page_has_a_place_for_the_table(loop_overhead: ModuleType) -> None:
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "<!-- loop_overhead -->" in page
    assert "<!-- /loop_overhead -->" in page
