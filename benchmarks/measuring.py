"""Measure commands: cost, sides interleaved, ratios with their spread, and the table in the docs.

Costs are those of the whole process tree of a fresh process. On a machine that others use too, seconds mean
little: only sides that took turns within one run are compared, and only as ratios.

This module stays free of torch: Linux counts the memory of the process that starts a child into the child's
peak.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
KIB_PER_MIB = 1024
STEADY = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
"""One compute thread, and an allocator (glibc) that keeps what batches free.

By default it gives memory back to the kernel or not depending on the largest block the process ever freed; a
side that happens to free a large one early then saves 5 to 15 % of its CPU in page faults.
"""


class BenchmarkError(Exception):
    """A side failed, or the sides did not do the same work: there is no ratio to print."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one process and all its descendants used."""

    wall_s: float
    cpu_s: float  # user and system
    peak_mib: float  # resident memory of the largest process of the tree


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two sides over the repetitions of one run."""

    min: float
    median: float
    max: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f}–{self.max:.3f})"


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end, under `STEADY` unless `environment` says otherwise, and count all of its
    tree.

    Descendants that were left running in the background (Ray's daemons, say) are ended, waited for, and
    counted.
    Raises:
        BenchmarkError: it failed; carries the end of its output.
    """
    with tempfile.TemporaryFile() as output, _Adoption() as adoption:
        began = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **STEADY, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        usages = [usage, *adoption.end_orphans()]
        if process.returncode != 0:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-3000:]
            raise BenchmarkError(f"exit status {process.returncode}: {' '.join(map(str, command))}\n{tail}")
    return Cost(
        wall_s=wall_s,
        cpu_s=sum(used.ru_utime + used.ru_stime for used in usages),
        peak_mib=max(used.ru_maxrss for used in usages) / KIB_PER_MIB,
    )


class _Adoption:
    """While open, orphans among our descendants become our children (Linux), so that their CPU can be
    read.
    """

    def __enter__(self) -> _Adoption:
        self._set(1)
        self._before = _children()
        return self

    def __exit__(self, *_: object) -> None:
        self._set(0)

    def end_orphans(self) -> list[resource.struct_rusage]:
        """End the adopted processes, and what they leave in turn; their resource usages."""
        usages = []
        while orphans := _children() - self._before:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                usages.append(os.wait4(pid, 0)[2])
        return usages

    @staticmethod
    def _set(value: int) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, value, 0, 0, 0)


def _children() -> set[int]:
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, path.read_text().split()))
    return found


def interleave(
    sides: Mapping[str, Callable[[int], Cost]], repetitions: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[Cost]]:
    """Run each side once uncounted, to warm files and byte code, then `repetitions` times in turns, each turn
    in reversed order.

    Args:
        sides: name -> a run of that side, told which repetition it is (0 is the uncounted one).
    """
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    order = list(sides)
    for repetition in range(repetitions + 1):
        for name in order:
            cost = sides[name](repetition)
            counted = "" if repetition else " (warm-up, not counted)"
            say(
                f"{repetition}/{repetitions} {name}: {cost.wall_s:.2f} s, {cost.cpu_s:.2f} CPU-s, "
                f"{cost.peak_mib:.0f} MiB{counted}"
            )
            if repetition:
                costs[name].append(cost)
        order.reverse()
    return costs


def ratio(side: Sequence[float], reference: Sequence[float]) -> Ratio:
    """side / reference, repetition by repetition."""
    ratios = [a / b for a, b in zip(side, reference, strict=True)]
    return Ratio(min=min(ratios), median=statistics.median(ratios), max=max(ratios))


def cost_ratios(side: Sequence[Cost], reference: Sequence[Cost]) -> dict[str, Ratio]:
    """The ratios of wall time, CPU and memory."""
    return {
        what: ratio([getattr(cost, field) for cost in side], [getattr(cost, field) for cost in reference])
        for what, field in (("wall", "wall_s"), ("cpu", "cpu_s"), ("memory", "peak_mib"))
    }


def environment(packages: Sequence[str] = ("fedqc", "torch", "numpy", "flwr")) -> dict[str, object]:
    """What the numbers depend on: versions, cores, how busy the machine was."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def to_json(values: object) -> str:
    """Indented JSON; dataclasses become mappings."""
    return json.dumps(values, indent=1, default=_plain)


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def update_table(page: Path, name: str, table: str) -> None:
    """Put `table` between `<!-- name -->` and `<!-- /name -->` of a Markdown page.

    Raises:
        BenchmarkError: the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise BenchmarkError(f"{page}: has no {opening} ... {closing}")
    page.write_text(f"{before}{opening}\n{table.strip()}\n{closing}{after}", encoding="utf-8")


def say(text: str) -> None:
    """Progress: stdout has the result only."""
    print(text, file=sys.stderr, flush=True)


def command_line(about: str | None, *, quick: str = "", usual: int = 9) -> argparse.ArgumentParser:
    """The options that benchmarks have in common.

    Args:
        about: the docstring of the benchmark.
        quick: what --quick does, besides 3 repetitions; "": there is no such option.
        usual: repetitions without --quick.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=f"{quick}, 3 repetitions")
    less = ", or 3 with --quick" if quick else ""
    parser.add_argument("--repetitions", type=int, help=f"instead of {usual}{less}")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--update", type=Path, metavar="PAGE", help="also rewrite the table in this Markdown page"
    )
    parser.set_defaults(usual=usual)
    return parser


def repetitions_of(arguments: argparse.Namespace) -> int:
    """How often each side is measured."""
    found: int = arguments.repetitions or (3 if getattr(arguments, "quick", False) else arguments.usual)
    return found


def reported(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[], Any],
    table: Callable[[Any], str],
) -> int:
    """Measure, print the result as asked, and rewrite the table of a page if asked; the exit status."""
    try:
        result = measure()
        if arguments.update:
            update_table(arguments.update, name, table(result))
    except BenchmarkError as error:
        say(f"{name}: {error}")
        return 1
    print(to_json(result) if arguments.format == "json" else table(result))
    return 0
