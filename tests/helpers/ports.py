"""Ports on loopback for the servers that tests start."""

from __future__ import annotations

import os

from common import processes

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10


def keep_apart() -> None:
    """Let this test process, and what it runs in itself, draw from a range of ports of its own."""
    first = 20_000 + 1000 * _WORKER
    processes.LOOPBACK_PORTS = range(first, first + 1000)


def free_port() -> int:
    """A port that no process uses and that no test of this process was given."""
    (port,) = processes.free_ports(1)
    return port
