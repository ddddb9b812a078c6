"""Child processes are restarted and ended; ports and conditions are what they are said to be."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from common import processes
from common.processes import (
    LOOPBACK,
    Child,
    Ended,
    Supervisor,
    free_ports,
    port_error,
    stop_requests,
    wait_for,
)

SLEEPS = (sys.executable, "-c", "print('here', flush=True); import time; time.sleep(600)")
FAILS = (sys.executable, "-c", "raise SystemExit(7)")


class Rig:
    def __init__(self) -> None:
        self.ended: list[Ended] = []
        self.pids: list[Mapping[str, int]] = []
        self.supervisor: Supervisor | None = None

    def __call__(self, *children: Child, steady_s: float = 60.0) -> Supervisor:
        self.supervisor = Supervisor(
            children, on_end=self.ended.append, on_change=self.pids.append, steady_s=steady_s
        )
        return self.supervisor

    def tend_until(self, is_done: Callable[[], bool]) -> None:
        assert self.supervisor is not None

        def tended() -> bool:
            assert self.supervisor is not None
            self.supervisor.tend()
            return is_done()

        assert wait_for(tended, 60)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    if made.supervisor is not None:
        made.supervisor.end(5)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_child_that_ends_is_restarted_later_each_time(rig: Rig) -> None:
    rig(Child(name="a", command=FAILS, back_off_s=[0.0, 0.1, 0.2]))
    rig.tend_until(lambda: len(rig.ended) == 4)
    assert [one.delay_s for one in rig.ended] == [0.0, 0.1, 0.2, 0.2]
    assert {one.how for one in rig.ended} == {"status 7"}


def test_a_child_that_ran_long_begins_its_back_off_anew(rig: Rig) -> None:
    rig(Child(name="a", command=FAILS, back_off_s=[0.0, 600.0]), steady_s=0.0)
    rig.tend_until(lambda: len(rig.ended) == 3)
    assert [one.delay_s for one in rig.ended] == [0.0, 0.0, 0.0]


def test_a_signal_is_named_and_the_others_go_on(rig: Rig) -> None:
    rig(*(Child(name=name, command=SLEEPS, back_off_s=[0.0]) for name in "ab"))
    rig.tend_until(lambda: len(rig.pids[-1]) == 2 if rig.pids else False)
    first = dict(rig.pids[-1])
    os.kill(first["a"], signal.SIGKILL)
    rig.tend_until(lambda: rig.pids[-1].get("a") not in (None, first["a"]))
    assert rig.pids[-1]["b"] == first["b"]
    assert [one.how for one in rig.ended] == ["signal 9"]


def test_the_log_gets_what_a_child_prints_and_the_environment_and_folder_are_its_own(
    rig: Rig, tmp_path: Path
) -> None:
    script = "import os; print(os.getcwd(), os.environ['WORD'], flush=True)"
    log = tmp_path / "log"
    child = Child(
        name="a",
        command=(sys.executable, "-c", script),
        back_off_s=[600.0],
        environment=os.environ | {"WORD": "word"},
        folder=tmp_path,
        log=log,
    )
    rig(child)
    rig.tend_until(lambda: bool(rig.ended))
    assert log.read_text() == f"{tmp_path} word\n"


@pytest.mark.parametrize("along", [True, False])
def test_what_a_dead_child_started_is_ended_with_it_where_that_is_asked(
    along: bool, rig: Rig, tmp_path: Path
) -> None:
    script = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
"""
    rig(Child(name="a", command=(sys.executable, "-c", script), back_off_s=[600.0], takes_group_along=along))
    rig.tend_until(lambda: bool(rig.ended))
    pid = int((tmp_path / "pid").read_text())
    try:
        if along:
            assert wait_for(lambda: not alive(pid), 30)
        else:
            time.sleep(0.2)
            assert alive(pid)
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_all_end_even_one_that_ignores_sigterm(rig: Rig, tmp_path: Path) -> None:
    log = tmp_path / "log"
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
    )
    supervisor = rig(
        Child(name="a", command=SLEEPS, back_off_s=[0.0], signals_group=True),
        Child(name="b", command=(sys.executable, "-c", stubborn), back_off_s=[0.0], log=log),
    )
    rig.tend_until(lambda: log.exists() and "here" in log.read_text())
    pids = rig.pids[-1]
    supervisor.end(0.3)
    assert not any(alive(pid) for pid in pids.values())


def test_the_first_signal_counts_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert not request.event.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.event.wait(10)
        assert wait_for(lambda: request.number == signal.SIGINT, 10)
    assert signal.getsignal(signal.SIGTERM) is before


def test_waiting_ends_with_the_condition_or_with_the_time() -> None:
    event = threading.Event()
    threading.Timer(0.1, event.set).start()
    assert wait_for(event.is_set, 60)
    assert not wait_for(lambda: False, 0.1)


def test_a_port_in_use_is_noticed_and_not_offered() -> None:
    (port,) = free_ports(1)
    assert port in processes.LOOPBACK_PORTS
    assert port_error(LOOPBACK, port) is None
    with socket.socket() as other:
        other.bind((LOOPBACK, port))
        other.listen()
        assert port_error(LOOPBACK, port) is not None
    half = range(processes.LOOPBACK_PORTS.start, processes.LOOPBACK_PORTS.start + 500)
    ports = free_ports(5, avoid=half)
    assert len(set(ports)) == len(ports)
    assert min(ports) >= half.stop


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOPBACK_PORTS", range(29_000, 29_006))
    monkeypatch.setattr(processes, "_DRAWN", set())
    given = [free_ports(2) for _ in range(4)]
    assert sorted(port for pair in given for port in pair) == sorted(set().union(*given))
    assert given[-1] == []


def test_no_core_file_and_no_neighbour_gets_the_keys_in_memory() -> None:
    code = (
        "import ctypes, resource; from common.processes import keep_memory_private\n"
        "keep_memory_private()\n"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.split() == ["0", "0", "0"]


class Reached(Exception):
    """The process got as far as to guard its memory."""


def test_every_process_that_holds_a_key_guards_its_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import client.agent.server as agent
    import client.node.process as node
    from client.node import supernode
    from client.site.isolation import Isolation
    from server.run import order

    def reached() -> None:
        raise Reached

    held = Isolation(holds=True, how="for the test")
    for module in (agent, node, supernode, order):
        monkeypatch.setattr(module, "keep_memory_private", reached)
    for module in (agent, node):
        monkeypatch.setattr(module, "as_first_thing", lambda *words, **more: None)
    monkeypatch.setattr(agent, "isolate_network", lambda: held)
    monkeypatch.setattr(node, "_confine", lambda site: held)
    monkeypatch.setattr(node, "_require_free", lambda port: None)
    (tmp_path / "node").mkdir()
    (tmp_path / "federation.yaml").touch()
    for name in ("node.key", "ca.crt", "runtime.secret"):
        (tmp_path / "node" / name).touch()
    reach = {"address": "h:1", "site": "a", "runtime_port": 1, "health_port": 2, "agent_socket": "/s"}
    (tmp_path / "node" / "node.yaml").write_text(json.dumps(reach | {"bundle_sha256": "0" * 64}))
    starts: tuple[Callable[[], object], ...] = (
        lambda: agent.run_agent(tmp_path, require_isolation=True),
        lambda: node.run_node(tmp_path, require_isolation=True),
        lambda: supernode.main(os.getppid()),
        lambda: order.carry_out(None, None, tmp_path / "runs" / "r"),
    )
    monkeypatch.setattr(supernode, "die_with_parent", lambda: None)
    for start in starts:
        with pytest.raises(Reached):
            start()
