"""`fedqc site start` and `stop`: the agent and the node as two child processes that are kept running.

Where systemd or a container engine does that (SITE/systemd/, docker/), each of the two is started alone and
nothing here is used.

A node that crashed is refused by Flower under the same key until the coordinator has missed its heartbeats,
up to 60 seconds; so it is started again after 15 seconds, as often as it takes. What ends at once for a
reason that stays (configuration, refused isolation) is not started again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from client.site.config import read_site
from client.site.enrolment import coordinator_of
from client.supervision.preflight import contact, coordinator_address
from common.cli import SILENT
from common.errors import ConfigError, NetworkError
from common.files import sweep, write_as_owner
from common.processes import die_with_parent

PID_FILE, AFTER_ROUND, BUSY = "supervisor.pid", "stop-after-round", "busy"
"""In run/. `busy` is kept by the agent while it works on a job."""
NODE_DELAY_S, AGENT_DELAY_S = 15.0, 2.0
GIVE_UP_S = 150.0
"""How long a node that never connected is started again: Flower's 60 seconds, more than twice."""
GRACE_S = 9.0
SETTLE_S = 20.0
"""After the last job, for the node to hand in its answer."""
POLL_S = 0.2
_LASTING = {2, 4}
"""Exit statuses that another start would only repeat: configuration; refused."""
_TLS = {"no-tls", "wrong-authority", "wrong-host", "certificate-expired", "bad-certificate"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process to keep running, and how long to wait before it is started again."""

    name: str
    command: Sequence[str]
    delay_s: float


def start(
    site: Path,
    *,
    only: Literal["agent", "node"] | None = None,
    require_isolation: bool = False,
    say: Callable[[str], None],
) -> int:
    """Run the site until it is told to stop. Success is said only when the agent answers and the node is
    connected.

    Args:
        only: be that one process, in this process.
    Returns:
        exit status.
    Raises:
        ConfigError: `not-joined`, `already-running`.
        NetworkError: the coordinator's certificate or TLS is wrong (see
            `client.supervision.preflight.contact`). That it cannot be reached at the moment is said, and
            waited for.
    """
    if only == "node":  # may read nothing of the site but node/
        coordinator_address(site / "node")
        from client.node.process import run_node

        return run_node(site, require_isolation=require_isolation)
    config, folder = read_site(site)
    # an agent that never joined would have nobody's signature to ask for
    if coordinator_of(folder / config.state) is None:
        raise ConfigError(
            f"{site}: has not joined a federation",
            code="not-joined",
            hint="fedqc site join kit.zip --fingerprint …",
        )
    if only == "agent":
        from client.agent.server import run_agent

        return run_agent(site, require_isolation=require_isolation)
    _knock(site, say)
    again = [sys.executable, "-P", "-m", "common.cli", "site", "start", "--site", str(site.absolute())]
    again += ["--require-isolation"] if require_isolation else []
    parts = [
        Part(name="agent", command=[*again, "--only", "agent"], delay_s=AGENT_DELAY_S),
        Part(name="node", command=[*again, "--only", "node"], delay_s=NODE_DELAY_S),
    ]
    return supervise(
        site, parts, is_up=lambda: all(state_of(site)[name] for name in ("agent", "node")), say=say
    )


def supervise(
    site: Path,
    parts: Sequence[Part],
    *,
    is_up: Callable[[], bool],
    say: Callable[[str], None],
    give_up_s: float = GIVE_UP_S,
    settle_s: float = SETTLE_S,
) -> int:
    """Start `parts`, start again whichever ends, until SIGTERM, Ctrl-C or run/stop-after-round; then end them
    all within 10 s.

    Args:
        is_up: whether all of them do their work.
        give_up_s: how long it is tried where it never came up.
        settle_s: how long the site must have been without a job before a stop after the round.
    Returns:
        0 after a stop after the round, 143 or 130 after a signal, else the exit status of the part that
        cannot run.
    Raises:
        ConfigError: `already-running`.
    """
    run = site / "run"
    if "supervisor" not in _alive(run):  # it was killed, and its children are on their way out
        _wait(lambda: not _alive(run), GRACE_S + 2)
    if alive := _alive(run):
        raise ConfigError(
            f"{site}: is running already (process {next(iter(alive.values()))})",
            code="already-running",
            hint="fedqc site stop",
        )
    sweep(run)
    for stale in (run / AFTER_ROUND, run / BUSY, site / "node" / "status.json"):
        stale.unlink(missing_ok=True)
    stopped = threading.Event()
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.append(number)
        stopped.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    keeper = _Keeper(run, parts, say)
    try:
        status = _watch(keeper, run, stopped, is_up=is_up, say=say, give_up_s=give_up_s, settle_s=settle_s)
        return 128 + received[0] if received else status
    finally:
        keeper.end()
        (run / PID_FILE).unlink(missing_ok=True)
        (run / AFTER_ROUND).unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(site: Path, *, after_round: bool = False) -> str:
    """End what `start` started, within 10 seconds; or ask it to end once the present job is done.

    Returns:
        what was done, one sentence.
    Raises:
        ConfigError: `not-running`.
    """
    run = site / "run"
    alive = _alive(run)
    if not alive:
        hint = (
            "what systemd or a container engine started is stopped there: systemctl stop fedqc-node "
            "fedqc-agent"
        )
        raise ConfigError(
            f"{site}: nothing that `fedqc site start` started is running", code="not-running", hint=hint
        )
    if after_round:
        if "supervisor" not in alive:
            raise ConfigError(
                f"{site}: nobody is left to wait for the round",
                code="not-running",
                hint="fedqc site stop ends the rest",
            )
        write_as_owner(run / AFTER_ROUND, b"")
        return "the present job is finished, no other is begun, then the site stops"
    if supervisor := alive.get("supervisor"):  # it ends its children itself
        _signal(supervisor, signal.SIGTERM)
        _wait(lambda: not _alive(run), GRACE_S + 2)
    rest = _alive(run)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in rest.values():
            _signal(pid, number)
        _wait(lambda: not _alive(run), GRACE_S)
        rest = _alive(run)
    (run / PID_FILE).unlink(missing_ok=True)
    return "stopped"


def state_of(site: Path) -> dict[str, Any]:
    """Whether the agent answers, how it is isolated, and whether the node is connected.

    Returns:
        {"agent", "node": bool, "isolation", "since", "last_error": text or None}. Where the node's folder is
        closed to this user, "node" is None.
    """
    from client.ipc.client import agent_health

    found: dict[str, Any] = {"agent": agent_health(site / "run" / "agent.sock"), "isolation": None}
    found |= {"node": False, "since": None, "last_error": None}
    with suppress(OSError, ValueError, KeyError, TypeError):
        found["isolation"] = str(
            json.loads((site / "run" / "agent.json").read_text(encoding="utf-8"))["isolation"]
        )
    try:
        status = json.loads((site / "node" / "status.json").read_text(encoding="utf-8"))
        found["node"] = status.get("connected") is True and Path(f"/proc/{int(status['pid'])}").exists()
        found["since"], found["last_error"] = status.get("since"), status.get("last_error") or None
    except PermissionError:
        found["node"] = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return found


def is_running(site: Path) -> bool:
    """Whether something that `start` started is alive."""
    return bool(_alive(site / "run"))


class _Keeper:
    """The children: started in sessions of their own, so that Ctrl-C reaches only the one who ends them in
    order.

    A supervisor that is killed takes them with it, so that the next start finds the site free.
    """

    def __init__(self, run: Path, parts: Sequence[Part], say: Callable[[str], None]) -> None:
        self._run, self._parts, self._say = run, parts, say
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._due = {part.name: 0.0 for part in parts}  # when to start, on the monotonic clock
        self.outage_told = False

    def tend(self) -> int | None:
        """Start what is due, note what ended.

        Returns:
            the exit status of a part that ended now, None if none did.
        """
        ended = None
        for part in self._parts:
            child = self._children.get(part.name)
            if child is not None and (status := child.poll()) is not None:
                del self._children[part.name]
                if part.name == "agent":
                    (self._run / BUSY).unlink(missing_ok=True)
                # what it started itself would hold its port and its key
                _signal(child.pid, signal.SIGKILL, group=True)
                self._due[part.name] = time.monotonic() + part.delay_s
                self._tell(part, status)
                ended = status
                self._note()
            if part.name not in self._children and time.monotonic() >= self._due[part.name]:
                self._children[part.name] = subprocess.Popen(
                    part.command,
                    start_new_session=True,
                    env=os.environ | SILENT,
                    preexec_fn=die_with_parent,  # noqa: PLW1509  (one call into a library that is loaded already)
                )
                self._note()
        return ended

    def end(self) -> None:
        """Last started, first ended: the node stops asking before the agent stops answering."""
        for child in reversed(self._children.values()):
            child.terminate()
        _wait(lambda: all(child.poll() is not None for child in self._children.values()), GRACE_S)
        for child in self._children.values():
            if child.poll() is None:
                _signal(child.pid, signal.SIGKILL, group=True)
            child.wait()

    def _tell(self, part: Part, status: int) -> None:
        if self.outage_told:
            return
        self.outage_told = True
        why = " (after a crash Flower refuses the same key for up to 60 s)" if part.name == "node" else ""
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._say(
            f"the {part.name} ended with {how}; it is started again every {part.delay_s:.0f} s until it "
            f"stays{why}"
        )

    def _note(self) -> None:
        pids = {"supervisor": os.getpid()} | {name: child.pid for name, child in self._children.items()}
        write_as_owner(
            self._run / PID_FILE,
            json.dumps({name: [pid, _started(pid)] for name, pid in pids.items()}).encode(),
            mode=0o640,
        )


def _watch(
    keeper: _Keeper,
    run: Path,
    stopped: threading.Event,
    *,
    is_up: Callable[[], bool],
    say: Callable[[str], None],
    give_up_s: float,
    settle_s: float,
) -> int:
    began = last_busy = time.monotonic()
    was_up = up = False
    told_wait = False
    while True:
        ended = keeper.tend()
        if ended is not None:
            up = False
            if not was_up and (ended in _LASTING or time.monotonic() - began >= give_up_s):
                say("it never worked, and another start would not change that")
                return ended if ended > 0 else 1
        elif not up and is_up():
            say(
                "connected again"
                if was_up
                else "connected: the agent answers, and the node has reached the coordinator"
            )
            up = was_up = True
            keeper.outage_told = False
        elif not up and not told_wait and time.monotonic() - began > 10:
            say("still waiting for the coordinator; Ctrl-C stops")
            told_wait = True
        is_busy = (run / BUSY).exists()
        if is_busy:
            last_busy = time.monotonic()
        if (run / AFTER_ROUND).exists() and not is_busy and time.monotonic() - last_busy >= settle_s:
            say("stopped after the round")
            return 0
        if stopped.wait(POLL_S):
            return 0


def _knock(site: Path, say: Callable[[str], None]) -> None:
    """Is that the coordinator? A wrong certificate ends the start at once; a coordinator who cannot be
    reached now is waited for.
    """
    try:
        contact(coordinator_address(site / "node"), site / "node" / "ca.crt")
    except NetworkError as error:
        if error.code in _TLS:
            raise
        say(f"{error.message} [{error.code}]; trying on")


def _alive(run: Path) -> dict[str, int]:
    """Which of supervisor, agent and node still run, by process number. A number that was given to another
    process since is not alive.
    """
    try:
        noted = json.loads((run / PID_FILE).read_text(encoding="utf-8"))
        pids = {str(name): (int(pid), str(started)) for name, (pid, started) in noted.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: pid for name, (pid, started) in pids.items() if started and _started(pid) == started}


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks: with the number it names one process for good. "" if there
    is none, or it has ended.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _signal(pid: int, number: int, *, group: bool = False) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number) if group else os.kill(pid, number)


def _wait(is_done: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not is_done() and time.monotonic() < end:
        time.sleep(0.05)
