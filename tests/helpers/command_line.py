"""The fedqc command line for tests, in this process and in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FEDQC = Path(sys.executable).with_name("fedqc")


def fedqc(
    *words: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The console script in a process of its own."""
    command = [str(FEDQC), *map(str, words)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[object, str, str]:
    """Exit status, stdout and stderr of a command line, run in this process; its handling of signals is taken
    back.
    """
    from common.cli import main

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


def simulate_words(plan: Path, data: Path, out: Path, *more: object) -> list[object]:
    return ["simulate", plan, "--data", data, "--out", out, "--jobs", 1, *more]
