"""Start, restart and end child processes; wait for conditions; find free ports."""

from __future__ import annotations

import ctypes
import os
import resource
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

LOOPBACK = "127.0.0.1"
LOOPBACK_PORTS = range(20_000, 30_000)
"""For services that only this machine uses: below the ports that Linux gives to outgoing connections."""
_DRAWN: set[int] = set()
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_LIBC = ctypes.CDLL(None)  # loaded before any fork, so that the child makes one call and nothing else


def die_with_parent() -> None:
    """In the child (`preexec_fn`): receive SIGTERM when the parent ends, however it ends. Linux; the setting
    survives exec.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_memory_private() -> None:
    """Write no core file of this process, or of what it starts, and let no other process of this user read
    its memory: it holds keys. Linux (prctl(2), PR_SET_DUMPABLE); what is executed is dumpable again.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Child:
    """One process to keep running.

    It runs in a session of its own, so that Ctrl-C reaches only its supervisor, and ends with its supervisor.
    """

    name: str
    command: Sequence[str]
    back_off_s: Sequence[float]  # before the first, second … restart in a row; the last one repeats
    environment: Mapping[str, str] | None = None  # None: that of this process
    folder: Path | None = None  # working directory
    log: Path | None = None  # gets its output and errors; None: they go where those of this process go
    signals_group: bool = False  # SIGTERM goes to all that it started; False: it ends them itself
    takes_group_along: bool = True  # when it ends by itself, what it started is killed


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A child that ended by itself."""

    child: Child
    status: int  # exit status, negative for a signal
    delay_s: float  # until it is started again

    @property
    def how(self) -> str:
        return described_status(self.status)


def described_status(status: int) -> str:
    """How a process ended, for a sentence: "status 1", "signal 9" (a negative status)."""
    return f"signal {-status}" if status < 0 else f"status {status}"


class Supervisor:
    """Keep child processes running: `start` or `tend` starts them, `tend` restarts, `end` ends them all."""

    def __init__(
        self,
        children: Sequence[Child],
        *,
        on_end: Callable[[Ended], None],
        on_change: Callable[[Mapping[str, int]], None],
        steady_s: float = 60.0,
    ) -> None:
        """
        Args:
            on_end: called for each child that ended by itself, before it is started again.
            on_change: called with the process number of each running child, whenever that changed.
            steady_s: a child that ran this long begins its back-off anew.
        """
        self._children = {child.name: child for child in children}
        self._on_end, self._on_change, self._steady_s = on_end, on_change, steady_s
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        self._failures = dict.fromkeys(self._children, 0)
        self._due = dict.fromkeys(self._children, 0.0)  # when to start, on the monotonic clock

    def start(self, name: str) -> None:
        """Start one child.

        Raises:
            OSError: its program cannot be run.
        """
        child = self._children[name]
        with ExitStack() as files:
            log = files.enter_context(child.log.open("ab")) if child.log else None
            self._running[name] = subprocess.Popen(
                child.command,
                env=child.environment,
                cwd=child.folder,
                stdin=subprocess.DEVNULL if log else None,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509  (one call into a library that is loaded already)
            )
        self._began[name] = time.monotonic()
        self._tell_change()

    def has_ended(self, name: str) -> bool:
        """Whether a child that was started has ended, before `tend` noticed it."""
        return self._running[name].poll() is not None

    def tend(self) -> list[Ended]:
        """Note what ended by itself, start what is due.

        Returns:
            the children that ended since the last call.
        """
        ended = []
        for name, child in self._children.items():
            process = self._running.get(name)
            if process is not None and (status := process.poll()) is not None:
                del self._running[name]
                if child.takes_group_along:
                    _signal_group(process.pid, signal.SIGKILL)
                if time.monotonic() - self._began[name] >= self._steady_s:
                    self._failures[name] = 0
                delay_s = child.back_off_s[min(self._failures[name], len(child.back_off_s) - 1)]
                self._failures[name] += 1
                self._due[name] = time.monotonic() + delay_s
                ended.append(Ended(child=child, status=status, delay_s=delay_s))
                self._on_end(ended[-1])
                self._tell_change()
            if name not in self._running and time.monotonic() >= self._due[name]:
                self.start(name)
        return ended

    def end(self, grace_s: float) -> None:
        """SIGTERM to all, the last started first; after `grace_s` SIGKILL to them and all they started."""
        for name, process in reversed(self._running.items()):
            if self._children[name].signals_group:
                _signal_group(process.pid, signal.SIGTERM)
            else:
                process.terminate()
        wait_for(lambda: all(process.poll() is not None for process in self._running.values()), grace_s)
        for process in self._running.values():
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def _tell_change(self) -> None:
        self._on_change({name: process.pid for name, process in self._running.items()})


class StopRequest:
    """Whether SIGTERM or SIGINT arrived. `event` may also be set by hand."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.number: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler; the first signal counts."""
        self.number = self.number or number
        self.event.set()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a `StopRequest`; the earlier handlers come back afterwards. Main thread
    only.
    """
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for(is_done: Callable[[], bool], limit_s: float) -> bool:
    """Wait until `is_done()`, for at most `limit_s` seconds. Returns its last answer."""
    until = time.monotonic() + limit_s
    while not (done := is_done()) and time.monotonic() < until:
        time.sleep(0.05)
    return done


def port_error(address: str, port: int) -> OSError | None:
    """Why a server cannot listen on this port now (PermissionError: not permitted), None where it can."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error
    return None


def free_ports(count: int, *, avoid: Collection[int] = ()) -> list[int]:
    """Ports of loopback that are free now, drawn at random from `LOOPBACK_PORTS`. One process gives no port
    twice: whom it was given to may not listen yet.

    Returns:
        `count` ports, or fewer where fewer are free.
    """
    free: list[int] = []
    unused = [port for port in LOOPBACK_PORTS if port not in _DRAWN and port not in avoid]
    for port in secrets.SystemRandom().sample(unused, min(200, len(unused))):
        if len(free) == count:
            break
        with socket.socket() as probe:  # no SO_REUSEADDR: a port in TIME_WAIT is not offered
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        free.append(port)
    _DRAWN.update(free)
    return free


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
