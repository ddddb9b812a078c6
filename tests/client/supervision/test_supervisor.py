from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.supervision import supervisor
from client.supervision.supervisor import AFTER_ROUND, BUSY, PID_FILE, is_running, start, stop
from common.errors import ConfigError, NetworkError
from common.processes import Child

STAYS = (
    "import sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(__import__('os').getpid())); "
    "time.sleep(60)"
)
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + STAYS
DIES = """
import pathlib, sys
count = pathlib.Path(sys.argv[1] + ".count")
so_far = int(count.read_text()) if count.exists() else 0
count.write_text(str(so_far + 1))
if so_far < int(sys.argv[2]):
    sys.exit(int(sys.argv[3]))
"""

RUN = """
import sys
from pathlib import Path
from client.supervision import supervisor
from common.processes import Child
site = Path(sys.argv[1])
supervisor.GRACE_S = float(sys.argv[2])
parts = [Child(name=name, command=[sys.executable, "-c", code, str(site / f"{name}.pid")], back_off_s=[0.1])
         for name, code in (("agent", sys.argv[3]), ("node", sys.argv[4]))]
up = lambda: all((site / f"{name}.pid").exists() for name in ("agent", "node"))
sys.exit(supervisor.supervise(site, parts, is_up=up, say=lambda text: print(text, flush=True)))
"""


def part(site: Path, name: str, code: str, *words: object, delay_s: float = 0.05) -> Child:
    return Child(
        name=name,
        command=[sys.executable, "-c", code, str(site / f"{name}.pid"), *map(str, words)],
        back_off_s=[delay_s],
    )


def eventually(claim: Callable[[], bool]) -> None:
    for _ in range(600):
        if claim():
            return
        time.sleep(0.1)
    raise AssertionError("it never came to pass")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def pid_of(site: Path, name: str) -> int:
    return int((site / f"{name}.pid").read_text())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(supervisor, "POLL_S", 0.02)
    for name in ("run", "node", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "site.yaml").write_text(
        "name: hospital-a\nkind: hospital\ncohort: c\nnominal_patients: 200\n", encoding="utf-8"
    )
    return tmp_path


class Running:
    """A supervisor in a process of its own."""

    def __init__(self, site: Path, *, agent: str = STAYS, node: str = STAYS, grace_s: float = 9.0) -> None:
        self.site = site
        command = [sys.executable, "-c", RUN, str(site), str(grace_s), agent, node]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        eventually(
            lambda: all(
                (site / f"{name}.pid").exists() and (site / f"{name}.pid").read_text()
                for name in ("agent", "node")
            )
        )
        self.children = [pid_of(site, name) for name in ("agent", "node")]

    def end(self) -> None:
        for pid in self.children:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def running(site: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(**how: Any) -> Running:
        started.append(Running(site, **how))
        return started[-1]

    yield begin
    for one in started:
        one.end()


def watch(
    site: Path, parts: list[Child], *, is_up: Callable[[], bool], stop_when: str = "", **how: Any
) -> tuple[int, list[str]]:
    """Supervise in this process until `stop_when` is said."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if stop_when and stop_when in text:
            (site / "run" / AFTER_ROUND).touch()

    return supervisor.supervise(site, parts, is_up=is_up, say=say, settle_s=0.0, **how), said


def test_success_is_said_only_when_both_are_up(site: Path) -> None:
    looked: list[bool] = []

    def is_up() -> bool:
        looked.append((site / "agent.pid").exists() and (site / "node.pid").exists() and len(looked) > 5)
        return looked[-1]

    status, said = watch(
        site, [part(site, "agent", STAYS), part(site, "node", STAYS)], is_up=is_up, stop_when="connected"
    )
    assert status == 0
    assert said[0].startswith("connected")
    assert looked.count(True) == 1
    assert looked[-1]
    assert not is_alive(pid_of(site, "agent"))
    assert not is_alive(pid_of(site, "node"))
    assert sorted(path.name for path in (site / "run").iterdir()) == []


def test_a_start_says_again_and_again_what_it_waits_for(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SPEAK_S", 0.05)
    looked: list[int] = []

    def is_up() -> bool:
        looked.append(1)
        return len(looked) > 4

    _, said = watch(site, [part(site, "agent", STAYS)], is_up=is_up, stop_when="connected")
    assert sum(text.startswith("waiting for agent and coordinator") for text in said) >= 2


def test_a_part_that_dies_is_started_again_and_that_is_said_once(site: Path) -> None:
    node = part(site, "node", DIES + STAYS, 3, 1)
    status, said = watch(
        site, [part(site, "agent", STAYS), node], is_up=(site / "node.pid").exists, stop_when="connected"
    )
    assert (status, (site / "node.pid.count").read_text()) == (0, "4")
    told = [text for text in said if "ended with status 1" in text]
    assert len(told) == 1
    assert "60 s" in told[0]


@pytest.mark.parametrize("lasting", [2, 4])
def test_what_another_start_would_not_change_ends_the_site(lasting: int, site: Path) -> None:
    node = part(site, "node", DIES, 99, lasting)
    status, _ = watch(site, [part(site, "agent", STAYS), node], is_up=lambda: False)
    assert (status, (site / "node.pid.count").read_text()) == (lasting, "1")
    assert not (site / "agent.pid").exists() or not is_alive(pid_of(site, "agent"))


def test_a_node_that_never_connects_is_given_up_in_the_end(site: Path) -> None:
    status, _ = watch(site, [part(site, "node", DIES, 99, 3)], is_up=lambda: False, give_up_s=0.0)
    assert status == 3


def test_a_site_that_was_connected_is_never_given_up(site: Path) -> None:
    """The node dies with a lasting status after it had worked, and comes back."""
    node = part(site, "node", "import time; time.sleep(0.5)\n" + DIES + STAYS, 2, 2)
    looked: list[int] = []

    def is_up() -> bool:
        """At once, and after the deaths only when it stays."""
        looked.append(1)
        return len(looked) == 1 or (site / "node.pid").exists()

    status, said = watch(site, [node], is_up=is_up, stop_when="connected again", give_up_s=0.0)
    assert (status, (site / "node.pid.count").read_text()) == (0, "3")
    assert said[-2:] == ["connected again", "stopped after the round"]


def test_what_a_dead_node_started_is_ended_with_it(site: Path) -> None:
    grandchild = """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
sys.exit(3)
"""
    watch(site, [part(site, "node", grandchild)], is_up=lambda: False, give_up_s=0.0)
    eventually(lambda: not is_alive(pid_of(site, "node")))


def test_a_stop_after_the_round_waits_for_the_job(site: Path) -> None:
    looked: list[bool] = []

    def is_up() -> bool:  # asked at every turn, because it says no
        looked.append((site / "run" / AFTER_ROUND).exists())
        if len(looked) == 1:
            (site / "run" / BUSY).touch()
            (site / "run" / AFTER_ROUND).touch()
        if len(looked) == 20:
            (site / "run" / BUSY).unlink()
        return False

    status, said = watch(site, [part(site, "agent", STAYS)], is_up=is_up)
    assert (status, said[-1]) == (0, "stopped after the round")
    assert len(looked) >= 20


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_both_and_leaves_nothing(
    number: int, status: int, site: Path, running: Callable[..., Running]
) -> None:
    one = running()
    one.process.send_signal(number)
    assert one.process.wait(60) == status
    assert [is_alive(pid) for pid in one.children] == [False, False]
    assert list((site / "run").iterdir()) == []


def test_a_child_that_does_not_listen_is_ended_all_the_same(running: Callable[..., Running]) -> None:
    one = running(agent=STUBBORN, grace_s=0.3)
    one.process.terminate()
    assert one.process.wait(60) == 143
    assert [is_alive(pid) for pid in one.children] == [False, False]


def test_stop_ends_what_start_started(site: Path, running: Callable[..., Running]) -> None:
    one = running()
    assert is_running(site)
    assert stop(site) == "stopped"
    assert one.process.wait(60) == 143
    assert [is_alive(pid) for pid in one.children] == [False, False]
    assert not is_running(site)


def test_two_supervisors_never_share_a_site(site: Path, running: Callable[..., Running]) -> None:
    running()
    with pytest.raises(ConfigError) as caught:
        watch(site, [], is_up=lambda: False)
    assert caught.value.code == "already-running"


def test_a_supervisor_that_is_killed_takes_both_along_and_the_next_start_works(
    site: Path, running: Callable[..., Running]
) -> None:
    one = running()
    one.process.kill()
    one.process.wait()
    assert watch(site, [part(site, "agent", STAYS)], is_up=lambda: True, stop_when="connected")[0] == 0
    assert [is_alive(pid) for pid in one.children] == [False, False]


def test_what_a_killed_supervisor_left_is_found_and_ended(
    site: Path, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_S", 0.5)
    one = running(agent=STUBBORN, node=STUBBORN)
    one.process.kill()
    one.process.wait()
    assert is_running(site)
    with pytest.raises(ConfigError) as caught:
        stop(site, after_round=True)
    assert caught.value.code == "not-running"
    stop(site)
    assert [is_alive(pid) for pid in one.children] == [False, False]


def test_stop_after_the_round_is_a_file_that_the_supervisor_sees(
    site: Path, running: Callable[..., Running]
) -> None:
    running()
    stop(site, after_round=True)
    assert (site / "run" / AFTER_ROUND).exists()


def test_stop_touches_no_process_that_only_has_the_number(site: Path) -> None:
    (site / "run" / PID_FILE).write_text(json.dumps({"supervisor": [os.getpid(), "1"]}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        stop(site)
    assert caught.value.code == "not-running"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"agent": 5}', '{"agent": ["x", "y"]}'])
def test_a_damaged_pid_file_names_nobody(text: str, site: Path) -> None:
    (site / "run" / PID_FILE).write_text(text, encoding="utf-8")
    assert not is_running(site)


def test_flowers_sixty_seconds_are_outlasted() -> None:
    assert supervisor.NODE_DELAY_S >= 15
    assert supervisor.GIVE_UP_S >= 90
    assert supervisor.GRACE_S < 10


def join_in_name(site: Path, address: str = "127.0.0.1:9", expires: str = "2999-01-01") -> None:
    values = {"federation": "north", "coordinator_key": "", "fingerprint": "", "expires": expires}
    (site / "state" / "coordinator.json").write_text(json.dumps(values), encoding="utf-8")
    (site / "node" / "node.yaml").write_text(f"address: {address}\n", encoding="utf-8")


@pytest.mark.parametrize("only", [None, "agent", "node"])
def test_a_site_that_never_joined_does_not_start(only: Any, site: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        start(site, only=only, say=lambda text: None)
    assert caught.value.code == "not-joined"


@pytest.mark.parametrize("code", ["wrong-authority", "wrong-host", "certificate-expired", "no-tls"])
def test_a_false_coordinator_ends_the_start_at_once(
    code: str, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def false(*_: object, **__: object) -> None:
        raise NetworkError("not who it should be", code=code)

    join_in_name(site)
    monkeypatch.setattr(supervisor, "contact", false)
    with pytest.raises(NetworkError) as caught:
        start(site, say=lambda text: None)
    assert caught.value.code == code


def test_a_coordinator_who_is_away_is_waited_for(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise NetworkError("no answer in time", code="timeout")

    started: list[Child] = []

    def note(site: Path, parts: list[Child], **_: Any) -> int:
        started.extend(parts)
        return 0

    join_in_name(site)
    monkeypatch.setattr(supervisor, "contact", away)
    monkeypatch.setattr(supervisor, "supervise", note)
    said: list[str] = []
    assert start(site, require_isolation=True, say=said.append) == 0
    assert "timeout" in said[0]
    assert [one.name for one in started] == ["agent", "node"]
    assert all("--require-isolation" in one.command and str(site) in one.command for one in started)


def test_a_site_whose_enrolment_has_expired_is_told_at_its_start(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "contact", lambda *_, **__: None)
    monkeypatch.setattr(supervisor, "supervise", lambda *_, **__: 0)
    for expires, told in (("2020-01-01", True), ("2999-01-01", False)):
        said: list[str] = []
        join_in_name(site, expires=expires)
        start(site, say=said.append)
        assert any("expired on 2020-01-01" in line and "renewed kit" in line for line in said) is told
