"""What the kernel of this machine offers: Landlock."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping

import pytest


def said(code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> list[str]:
    """What code says in a process that has only begun."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(code), *map(str, arguments)]
    env = {"PATH": os.environ["PATH"]} | dict(environment or {})
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def landlock() -> int:
    found = said(
        """
        import ctypes
        print(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))
        """
    )
    return int(found[0])


needs_landlock = pytest.mark.skipif(landlock() < 1, reason="this kernel has no Landlock")
