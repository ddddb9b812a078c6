"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork, so that the child makes one call and nothing else


def die_with_parent() -> None:
    """In the child (`preexec_fn`): be told to end when the parent ends, in whatever way. Linux; kept when the
    child becomes a program.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
