"""Run a site's agent and node as child processes: `fedqc site start` and `stop`.

Under systemd or a container engine (SITE/systemd/, docker/) each of the two is started alone; `supervise` is
not used then.

After a crash Flower refuses the node's key until the coordinator has missed its heartbeats, up to 60 seconds;
so the node is restarted every 15 seconds until it is accepted. A site that never came up is given up when a
process ends for a reason that a restart does not change (configuration, refused isolation).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, Literal

from client.site.config import read_site
from client.site.enrolment import coordinator_of
from client.supervision.preflight import check_enrolment, contact, coordinator_address
from common.cli import SILENT
from common.errors import ConfigError, NetworkError
from common.files import sweep, write_as_owner
from common.processes import Child, Ended, StopRequest, Supervisor, stop_requests, wait_for
from common.progress_bar import SPEAK_S

PID_FILE, AFTER_ROUND, BUSY = "supervisor.pid", "stop-after-round", "busy"
"""In run/. `busy` is kept by the agent while it works on a job."""
NODE_DELAY_S, AGENT_DELAY_S = 15.0, 2.0
GIVE_UP_S = 150.0
"""How long a node that never connected is restarted: more than twice Flower's 60 seconds."""
GRACE_S = 9.0
SETTLE_S = 20.0
"""After the last job, for the node to deliver its answer."""
POLL_S = 0.2
_LASTING = {2, 4}
"""Exit statuses that a restart would repeat: configuration; refused."""
_TLS = {"no-tls", "wrong-authority", "wrong-host", "certificate-expired", "bad-certificate"}


def start(
    site: Path,
    *,
    only: Literal["agent", "node"] | None = None,
    require_isolation: bool = False,
    say: Callable[[str], None],
) -> int:
    """Run the site until it is stopped. Report success only when the agent answers and the node is connected.

    Args:
        only: run this one of the two, in this process.
    Returns:
        exit status.
    Raises:
        ConfigError: `not-joined`, `already-running`.
        NetworkError: the coordinator's certificate or TLS is wrong (see
            `client.supervision.preflight.contact`). A coordinator that cannot be reached now is reported, and
            waited for.
    """
    if only == "node":  # may read nothing of the site but node/
        coordinator_address(site / "node")
        from client.node.process import run_node

        return run_node(site, require_isolation=require_isolation)
    config, folder = read_site(site)
    # an agent that never joined has no coordinator's key to verify tasks with
    pinned = coordinator_of(folder / config.state)
    if pinned is None:
        raise ConfigError(
            f"{site}: has not joined a federation",
            code="not-joined",
            hint="fedqc site join kit.zip --fingerprint …",
        )
    if only == "agent":
        from client.agent.server import run_agent

        return run_agent(site, require_isolation=require_isolation)
    enrolled = check_enrolment(pinned, date.today())
    if enrolled.problem:
        say(f"enrolment: {enrolled.problem}; {enrolled.fix}")
    _knock(site, say)
    again = [sys.executable, "-P", "-m", "common.cli", "site", "start", "--site", str(site.absolute())]
    again += ["--require-isolation"] if require_isolation else []
    children = [
        Child(
            name=name,
            command=[*again, "--only", name],
            back_off_s=[delay_s],
            environment=os.environ | SILENT,
        )
        for name, delay_s in (("agent", AGENT_DELAY_S), ("node", NODE_DELAY_S))
    ]
    return supervise(
        site, children, is_up=lambda: all(state_of(site)[name] for name in ("agent", "node")), say=say
    )


def supervise(
    site: Path,
    children: Sequence[Child],
    *,
    is_up: Callable[[], bool],
    say: Callable[[str], None],
    give_up_s: float = GIVE_UP_S,
    settle_s: float = SETTLE_S,
) -> int:
    """Start `children` and restart each that ends, until SIGTERM, Ctrl-C or run/stop-after-round; then end
    them all within 10 s.

    Args:
        is_up: whether all of them do their work.
        give_up_s: how long to keep trying while it never came up.
        settle_s: how long the site must have been without a job before a stop after the round.
    Returns:
        0 after a stop after the round, 143 or 130 after a signal, else the exit status of the child that
        cannot run.
    Raises:
        ConfigError: `already-running`.
    """
    run = site / "run"
    if "supervisor" not in _alive(run):  # it was killed, and its children are on their way out
        wait_for(lambda: not _alive(run), GRACE_S + 2)
    if alive := _alive(run):
        raise ConfigError(
            f"{site}: is already running (process {next(iter(alive.values()))})",
            code="already-running",
            hint="fedqc site stop",
        )
    sweep(run)
    for stale in (run / AFTER_ROUND, run / BUSY, site / "node" / "status.json"):
        stale.unlink(missing_ok=True)
    watch = _Watch(run, children, say)
    with stop_requests() as request:
        try:
            status = watch.follow(request, is_up=is_up, give_up_s=give_up_s, settle_s=settle_s)
            return 128 + request.number if request.number else status
        finally:
            watch.children.end(GRACE_S)
            (run / PID_FILE).unlink(missing_ok=True)
            (run / AFTER_ROUND).unlink(missing_ok=True)


def stop(site: Path, *, after_round: bool = False) -> str:
    """End what `start` started, within 10 seconds; or ask it to end once the current job is done.

    Returns:
        one sentence for the operator.
    Raises:
        ConfigError: `not-running`.
    """
    run = site / "run"
    alive = _alive(run)
    if not alive:
        hint = (
            "stop what systemd or a container engine started with that: systemctl stop fedqc-node fedqc-agent"
        )
        raise ConfigError(f"{site}: is not running under `fedqc site start`", code="not-running", hint=hint)
    if after_round:
        if "supervisor" not in alive:
            raise ConfigError(
                f"{site}: its supervisor is gone, nothing waits for the round",
                code="not-running",
                hint="end the remaining processes: fedqc site stop",
            )
        write_as_owner(run / AFTER_ROUND, b"")
        return "the site stops when the current job is finished; no other is started"
    if supervisor := alive.get("supervisor"):  # it ends its children itself
        _signal(supervisor, signal.SIGTERM)
        wait_for(lambda: not _alive(run), GRACE_S + 2)
    rest = _alive(run)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in rest.values():
            _signal(pid, number)
        wait_for(lambda: not _alive(run), GRACE_S)
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

    state: dict[str, Any] = {"agent": agent_health(site / "run" / "agent.sock"), "isolation": None}
    state |= {"node": False, "since": None, "last_error": None}
    with suppress(OSError, ValueError, KeyError, TypeError):
        state["isolation"] = str(
            json.loads((site / "run" / "agent.json").read_text(encoding="utf-8"))["isolation"]
        )
    try:
        status = json.loads((site / "node" / "status.json").read_text(encoding="utf-8"))
        state["node"] = status.get("connected") is True and Path(f"/proc/{int(status['pid'])}").exists()
        state["since"], state["last_error"] = status.get("since"), status.get("last_error") or None
    except PermissionError:
        state["node"] = None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return state


def is_running(site: Path) -> bool:
    """Whether something that `start` started is alive."""
    return bool(_alive(site / "run"))


class _Watch:
    """The supervised site: its children, what was reported of them, and whether it ever came up."""

    def __init__(self, run: Path, children: Sequence[Child], say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._outage_reported = False
        self.children = Supervisor(children, on_end=self._report_end, on_change=self._write_pids)

    def follow(
        self, stop: StopRequest, *, is_up: Callable[[], bool], give_up_s: float, settle_s: float
    ) -> int:
        """Keep the children running until a stop is asked for. Arguments and exit status: see `supervise`."""
        began = spoke = last_busy = time.monotonic()
        was_up = up = False
        while True:
            if ended := self.children.tend():
                up = False
                status = ended[-1].status
                if not was_up and (status in _LASTING or time.monotonic() - began >= give_up_s):
                    self._say("gave up: it never came up")
                    return status if status > 0 else 1
            elif not up and is_up():
                self._say(
                    "connected again"
                    if was_up
                    else "connected: the agent answers, the node has reached the coordinator"
                )
                up = was_up = True
                self._outage_reported = False
            elif not was_up and time.monotonic() - spoke >= SPEAK_S and spoke - began < GIVE_UP_S:
                spoke = time.monotonic()
                self._say(f"waiting for agent and coordinator; Ctrl-C stops  ({spoke - began:.0f} s)")
            is_busy = (self._run / BUSY).exists()
            if is_busy:
                last_busy = time.monotonic()
            if (
                (self._run / AFTER_ROUND).exists()
                and not is_busy
                and time.monotonic() - last_busy >= settle_s
            ):
                self._say("stopped after the round")
                return 0
            if stop.event.wait(POLL_S):
                return 0

    def _report_end(self, ended: Ended) -> None:
        name = ended.child.name
        if name == "agent":
            (self._run / BUSY).unlink(missing_ok=True)
        if self._outage_reported:
            return
        self._outage_reported = True
        why = " (after a crash Flower refuses the same key for up to 60 s)" if name == "node" else ""
        self._say(
            f"the {name} ended with {ended.how}; it is restarted every {ended.delay_s:.0f} s until it stays "
            f"up{why}"
        )

    def _write_pids(self, children: Mapping[str, int]) -> None:
        pids = {"supervisor": os.getpid()} | dict(children)
        write_as_owner(
            self._run / PID_FILE,
            json.dumps({name: [pid, _started(pid)] for name, pid in pids.items()}).encode(),
            mode=0o640,
        )


def _knock(site: Path, say: Callable[[str], None]) -> None:
    """Check the coordinator's certificate. A wrong one ends the start; a coordinator that cannot be reached
    now is waited for.
    """
    try:
        contact(coordinator_address(site / "node"), site / "node" / "ca.crt")
    except NetworkError as error:
        if error.code in _TLS:
            raise
        say(f"{error.message} [{error.code}]; trying again")


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


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
