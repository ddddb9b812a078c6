"""Ports on loopback for the servers that tests start."""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress

_DRAWN: set[int] = set()


def free_port() -> int:
    """A port that no process uses, below those that Linux hands out to outgoing connections. Each test
    process draws from a range of its own, and no port twice: its first owner may not listen yet.
    """
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
    first = 20_000 + 1000 * process
    while True:
        port = secrets.choice([port for port in range(first, first + 1000) if port not in _DRAWN])
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _DRAWN.add(port)
            return port
