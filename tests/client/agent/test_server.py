"""The agent as a real process on a real socket: what it answers, whom it turns away, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket as sockets
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from client.ipc import client
from client.ipc.client import agent_health, ask_agent
from client.site.isolation import _in_a_child, _leave_the_network
from common.errors import NetworkError

ANSWER = """
import socket, sys, time
from pathlib import Path
from client.agent import server
from client.agent.job import NoAnswer

site = Path(sys.argv[1])

def answer(method, plan_json, envelope, *, progress, cancelled):
    (site / "begun").write_text(plan_json)
    if envelope == b"fail":
        raise ValueError("the images of PATIENT-77 in /secret/path")
    if envelope == b"hide":
        raise NoAnswer
    if envelope == b"connect":
        return str(socket.socket().connect_ex(("127.0.0.1", int(plan_json)))).encode()
    if envelope == b"large":
        return bytes(20_000)
    if envelope == b"steps":
        for step in range(3):
            progress("training", step + 1, 3)
    if envelope in (b"wait", b"deaf"):
        while not (cancelled.is_set() and envelope == b"wait") and not (site / "go").exists():
            time.sleep(0.01)
    if cancelled.is_set():
        (site / "was-cancelled").touch()
        while (site / "slow").exists():
            time.sleep(0.01)
    return b" ".join([method.encode(), plan_json.encode(), envelope])

server.MAX_BYTES = int(sys.argv[2])
how = {"require_isolation": "require" in sys.argv, "isolate": "open" not in sys.argv}
sys.exit(server.run_agent(site, **how, guard=lambda site: answer))
"""


class Running:
    def __init__(self, site: Path, process: subprocess.Popen[str]) -> None:
        self.site, self.process = site, process

    @property
    def socket(self) -> Path:
        return self.site / "run" / "agent.sock"

    def ask(
        self,
        envelope: bytes = b"task",
        method: str = "Train",
        plan: str = "{}",
        deadline_s: float = 60.0,
        **more: object,
    ) -> bytes:
        return ask_agent(self.socket, method, plan, envelope, deadline_s=deadline_s, **more)  # type: ignore[arg-type]

    def begin(self, envelope: bytes = b"wait", deadline_s: float = 60.0) -> threading.Thread:
        """Ask in the background, and come back when the work has begun."""
        (self.site / "begun").unlink(missing_ok=True)
        outcome: list[bytes | NetworkError] = []

        def work() -> None:
            try:
                outcome.append(self.ask(envelope, deadline_s=deadline_s))
            except NetworkError as error:
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.outcome = outcome  # type: ignore[attr-defined]
        thread.start()
        until((self.site / "begun").exists)
        return thread


def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def command(site: Path, *words: str, limit: int = 1 << 30) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(ANSWER), str(site), str(limit), *words]


@contextmanager
def agent(site: Path, *words: str, limit: int = 1 << 30) -> Iterator[Running]:
    process = subprocess.Popen(command(site, *words, limit=limit), stderr=subprocess.PIPE, text=True)
    running = Running(site, process)
    try:
        until(lambda: agent_health(running.socket) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        yield running
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def site() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedqc-") as name:  # unix sockets have short names
        yield Path(name)


@pytest.fixture
def running(site: Path) -> Iterator[Running]:
    with agent(site, "open") as found:
        yield found


def code_of(work: Callable[[], object]) -> str:
    with pytest.raises(NetworkError) as caught:
        work()
    return caught.value.code


def test_it_answers_and_tells_its_steps(running: Running) -> None:
    steps: list[tuple[str, int, int]] = []
    answer = running.ask(b"steps", plan='{"name": "é"}', on_progress=lambda *step: steps.append(step))
    assert answer == 'Train {"name": "é"} steps'.encode()
    assert steps == [("training", step, 3) for step in (1, 2, 3)]
    assert running.ask(b"", method="Describe") == b"Describe {} "
    assert running.ask(bytes(range(256)) * 1000, method="Evaluate").endswith(bytes(range(256)))


@pytest.mark.skipif(_in_a_child(_leave_the_network) != 0, reason="this system allows no network namespace")
@pytest.mark.parametrize("isolated", [True, False])
def test_the_agent_has_no_network_and_the_control_has(site: Path, isolated: bool) -> None:
    with sockets.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with agent(site, *([] if isolated else ["open"])) as running:
            reached = running.ask(b"connect", plan=str(server.getsockname()[1])) == b"0"
            note = json.loads((site / "run" / "agent.json").read_text())
    assert reached is not isolated
    assert note["holds"] is isolated
    assert note["pid"] == running.process.pid
    assert set(note) == {"pid", "started", "isolation", "holds"}


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can give up a capability for the test"
)
def test_without_isolation_it_says_so_or_refuses(site: Path) -> None:
    poor = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    refused = subprocess.run(
        [*poor, *command(site, "require")], capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode != 0
    assert "ConfigError" in refused.stderr
    assert "NOT ISOLATED" in refused.stderr
    assert not (site / "run" / "agent.sock").exists()
    module = [*poor, sys.executable, "-P", "-m", "client.agent.server", str(site), "--require-isolation"]
    refused = subprocess.run(module, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "error [not-isolated]" in refused.stderr
    assert "hint: " in refused.stderr
    process = subprocess.Popen([*poor, *command(site)], stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: agent_health(site / "run" / "agent.sock"))
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert said.startswith("agent: NOT ISOLATED")


def test_folder_and_socket_are_open_to_the_group_and_nobody_else(running: Running) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert (mode(running.site / "run"), mode(running.socket)) == (0o750, 0o660)
    assert mode(running.site / "state") == 0o700


def test_one_job_at_a_time(running: Running) -> None:
    first = running.begin()
    assert (running.site / "run" / "busy").exists()
    assert code_of(running.ask) == "agent-busy"
    assert code_of(lambda: running.ask(method="Describe")) == "agent-busy"
    assert agent_health(running.socket)
    (running.site / "go").touch()
    first.join(60)
    assert first.outcome == [b"Train {} wait"]  # type: ignore[attr-defined]
    assert running.ask() == b"Train {} task"
    assert not (running.site / "run" / "busy").exists()


def test_a_description_waits_for_a_job_that_is_about_to_end(running: Running) -> None:
    running.begin()
    threading.Timer(0.3, (running.site / "go").touch).start()
    assert running.ask(method="Describe") == b"Describe {} task"


def test_at_the_deadline_the_work_is_told_to_stop_and_makes_room_when_it_has(running: Running) -> None:
    (running.site / "slow").touch()
    assert code_of(lambda: running.ask(b"wait", deadline_s=0.3)) == "agent-deadline"
    until((running.site / "was-cancelled").exists)
    assert code_of(running.ask) == "agent-busy"  # it has not ended yet
    (running.site / "slow").unlink()
    until(lambda: not (running.site / "run" / "busy").exists())
    assert running.ask() == b"Train {} task"


def test_when_the_caller_is_killed_the_work_stops(running: Running) -> None:
    code = "import sys; from pathlib import Path; from client.ipc.client import ask_agent; "
    code += "ask_agent(Path(sys.argv[1]), 'Train', '{}', b'wait', deadline_s=100)"
    node = subprocess.Popen([sys.executable, "-c", code, str(running.socket)])
    until((running.site / "begun").exists)
    node.kill()
    node.wait()
    until((running.site / "was-cancelled").exists)
    until(lambda: not (running.site / "run" / "busy").exists())
    assert running.ask() == b"Train {} task"


def test_work_that_gives_no_answer_looks_like_an_agent_that_is_not_there(running: Running) -> None:
    with pytest.raises(NetworkError) as caught:
        running.ask(b"hide")
    assert caught.value.code == "agent-unreachable"
    with pytest.raises(NetworkError) as absent:
        ask_agent(running.site / "nowhere.sock", "Train", "{}", b"task", deadline_s=5.0)
    assert absent.value.code == caught.value.code
    assert running.ask() == b"Train {} task"


def test_a_failure_leaves_as_a_word_and_its_details_stay(running: Running) -> None:
    with pytest.raises(NetworkError) as caught:
        running.ask(b"fail")
    assert caught.value.code == "agent-failed"
    assert "PATIENT-77" not in str(caught.value) + caught.value.hint
    assert "PATIENT-77" in (running.site / "state" / "site.log").read_text()
    assert running.ask() == b"Train {} task"


def test_nothing_of_a_failure_is_on_the_wire(running: Running) -> None:
    with grpc.insecure_channel(f"unix:{running.socket}") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/fedqc.Agent/Train")(b"\x02\x00\x00\x00{}fail", timeout=60))
        assert caught.value.details() == "failed"
        for malformed in (b"", b"\x00", b"\xff\xff\xff\xff{}", b"\x01\x00\x00\x00\xff"):
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.unary_stream("/fedqc.Agent/Train")(malformed, timeout=60))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream("/fedqc.Agent/Delete")(b"\x02\x00\x00\x00{}", timeout=60))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_what_is_too_large_is_refused_on_both_sides(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with agent(site, "open", limit=10_000) as running:
        assert running.ask(bytes(5_000)).startswith(b"Train")
        assert code_of(lambda: running.ask(bytes(11_000))) == "agent-failed"  # the agent's limit
        assert code_of(lambda: running.ask(b"large")) == "agent-failed"
        monkeypatch.setattr(client, "MAX_BYTES", 1_000)
        (site / "begun").unlink()
        assert code_of(lambda: running.ask(bytes(2_000))) == "agent-failed"  # the caller's
        assert not (site / "begun").exists()


def test_nobody_there_is_said_at_once(site: Path) -> None:
    assert not agent_health(site / "run" / "agent.sock")
    assert (
        code_of(lambda: ask_agent(site / "run" / "agent.sock", "Train", "{}", b"", deadline_s=60))
        == "agent-unreachable"
    )
    with pytest.raises(NetworkError):
        ask_agent(site, "Delete", "{}", b"", deadline_s=60)


def test_an_agent_that_dies_during_the_work_is_said_at_once(running: Running) -> None:
    asked = running.begin()
    running.process.kill()
    asked.join(60)
    (outcome,) = asked.outcome  # type: ignore[attr-defined]
    assert isinstance(outcome, NetworkError)
    assert outcome.code == "agent-unreachable"


def test_the_socket_of_a_dead_agent_is_replaced_and_that_of_a_living_one_is_not(site: Path) -> None:
    with agent(site, "open") as first:
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        (site / "run" / "busy").touch()
        assert first.socket.exists()
        with agent(site, "open") as second:
            assert not (site / "run" / "busy").exists()
            third = subprocess.run(
                command(site, "open"), capture_output=True, text=True, timeout=60, check=False
            )
            assert third.returncode != 0
            assert "an agent is running already" in third.stderr
            assert second.ask() == b"Train {} task"


def test_sigterm_ends_the_work_and_the_process(running: Running) -> None:
    asked = running.begin()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 128 + signal.SIGTERM
    assert (running.site / "was-cancelled").exists()
    asked.join(60)
    assert not running.socket.exists()
    assert not (running.site / "run" / "agent.json").exists()


def test_work_that_does_not_listen_cannot_hold_the_process(running: Running) -> None:
    running.begin(b"deaf")
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 128 + signal.SIGTERM
    assert "did not end in time" in (running.site / "state" / "site.log").read_text()


def test_after_the_round_no_other_job_is_begun(running: Running) -> None:
    first = running.begin()
    (running.site / "run" / "stop-after-round").touch()
    (running.site / "go").touch()
    first.join(60)
    assert first.outcome == [b"Train {} wait"]  # type: ignore[attr-defined]
    assert code_of(running.ask) == "agent-busy"
    assert agent_health(running.socket)
    (running.site / "run" / "stop-after-round").unlink()
    assert running.ask() == b"Train {} task"


def test_a_folder_that_cannot_be_served_is_said_in_one_line(site: Path) -> None:
    long = site / ("x" * 100)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, long)
        long.mkdir()
        for folder, words in ((site / "nowhere", "no such folder"), (long, "longer than 107 bytes")):
            said = subprocess.run(
                command(folder, "open"), capture_output=True, text=True, timeout=60, check=False
            )
            assert said.returncode != 0
            assert words in said.stderr


def test_the_caller_loads_no_torch() -> None:
    code = (
        "import sys, client.ipc.client, client.agent.server; print([name for name in ('torch', 'numpy', "
        "'flwr') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
