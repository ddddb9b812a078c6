"""Faults on real processes, each with its control, and what the operator is told: notes on what is tried
stand at each test.

`make test-slow`, a quarter of an hour. The run that nothing happened to (`undisturbed`) is the control of
every comparison of models: with the site or the service really lost, the models differ, and there are tests
here in which they do.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.federation.registry import Federation
from server.run.control_files import is_being_run
from tests.helpers.faulty import A, B, C, Faulty, one_error, plan_of
from tests.helpers.ports import free_port
from tests.helpers.rig import LIMIT_S, NGINX, born, descendants, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: the proxy cannot run"),
]
ALL = [A, B, C]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    running = Faulty(tmp_path_factory.mktemp("faults"))
    with running:
        for name in ALL:  # more runs than a patient's budget is made for
            policy = running.site(name) / "policy.yaml"
            values = yaml.safe_load(policy.read_text(encoding="utf-8")) | {
                "max_epsilon": 1000.0,
                "max_epsilon_per_run": 20.0,
            }
            policy.write_text(yaml.safe_dump(values), encoding="utf-8")
        yield running
    assert running.left_behind == []


@pytest.fixture(autouse=True)
def _whole_before_and_sound_after(deployment: Faulty) -> Iterator[None]:
    deployment.make_whole()
    yield
    deployment.check_invariants()


@pytest.fixture(scope="module")
def undisturbed(deployment: Faulty) -> list[str]:
    """The model after each round of the run that nothing happened to."""
    deployment.make_whole()
    deployment.begin(plan_of("federated"), "undisturbed")
    deployment.outcome("undisturbed")
    return deployment.hashes("undisturbed")


def sent(deployment: Faulty, name: str, run: str) -> list[dict[str, Any]]:
    """Updates that left a site's agent in a run of the federation, oldest first."""
    full = json.loads((deployment.run(run) / "manifest.json").read_text(encoding="utf-8"))["run"]
    lines = [
        json.loads(line)
        for line in (deployment.site(name) / "state" / "sent.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["run"] == full and line["kind"] == "SiteUpdate"]


def charges(deployment: Faulty, run: str) -> dict[str, list[float]]:
    """What each site's ledger says a run cost."""
    full = json.loads((deployment.run(run) / "manifest.json").read_text(encoding="utf-8"))["run"]
    found: dict[str, list[float]] = {}
    for name in deployment.names:
        (account,) = deployment.json("site", "budget", "--verify", "--site", deployment.site(name))
        found[name] = [entry["epsilon"] for entry in account["entries"] if full in entry["request"]]
    return found


def answered(deployment: Faulty, run: str) -> list[list[str]]:
    return [record["answered"] for record in deployment.records(run)]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def thaw(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def told(fault: str, *lines: str) -> None:
    """For `pytest -s`: what the operator saw."""
    print(f"\n{fault}:", *lines, sep="\n  ")


def lines_with(text: str, *words: str) -> list[str]:
    return list(dict.fromkeys(line for line in text.splitlines() if any(word in line for word in words)))


# ---- F1: a site's process is killed in the middle of its work


@pytest.mark.parametrize("parts", [("agent",), ("node",), ("node", "agent")], ids="+".join)
def test_f1_what_is_killed_in_mid_training_comes_back_and_the_models_are_the_same(
    parts: tuple[str, ...], deployment: Faulty, undisturbed: list[str]
) -> None:
    run = f"f1-{'-'.join(parts)}"
    deployment.begin(plan_of("federated"), run)
    agent = deployment.freeze_in_training(B, run)
    before = {part: deployment.pid(B, part) for part in parts}
    for part in parts:
        deployment.kill_pid(before[part])
    thaw(agent)
    deployment.outcome(run)
    assert all(deployment.pid(B, part) != before[part] for part in parts)
    assert answered(deployment, run) == [ALL] * 3
    assert deployment.hashes(run) == undisturbed
    told(
        f"F1 {'+'.join(parts)}",
        *lines_with(deployment.log(B), "ended with", "key-not-accepted", "connected again"),
    )


def test_f1_a_killed_supervisor_takes_its_site_along_and_is_simply_started_anew(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated"), "f1-supervisor")
    agent = deployment.freeze_in_training(B, "f1-supervisor")
    children = [deployment.pid(B, part) for part in ("agent", "node")]
    deployment.kill(B, "supervisor")
    thaw(agent)
    deployment.start_site(B)  # at once: the children of the old one may still be on their way out
    assert not {deployment.pid(B, part) for part in ("agent", "node")} & set(children)
    deployment.outcome("f1-supervisor")
    assert answered(deployment, "f1-supervisor") == [ALL] * 3
    assert deployment.hashes("f1-supervisor") == undisturbed
    told("F1 supervisor", *deployment.log(B).splitlines())


def test_f1_control_without_patience_the_round_goes_on_without_the_site(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated", patience_s=0), "f1-control")
    deployment.kill_pid(deployment.freeze_in_training(B, "f1-control"))
    deployment.outcome("f1-control", status=6)
    second = deployment.records("f1-control")[1]
    assert (second["answered"], second["failed"]) == ([A, C], {B: "agent-unreachable"})
    assert deployment.hashes("f1-control")[0] == undisturbed[0]
    assert deployment.hashes("f1-control")[1] != undisturbed[1]


def test_f1_a_private_round_is_charged_once_and_its_second_answer_is_the_first(deployment: Faulty) -> None:
    """Round 1: the agent is killed while it samples patients. Round 2: it has answered, and the answer is
    lost with its node.
    """
    run = "f1-private"
    deployment.begin(plan_of("federated_dp", rounds=2), run)
    deployment.kill_pid(deployment.freeze_in_training(B, run, after_round=0))
    agent = deployment.freeze_in_training(B, run)
    node = deployment.pid(B, "node")
    os.kill(node, signal.SIGSTOP)
    thaw(agent)
    wait_until(
        lambda: any(line["round"] == 2 for line in sent(deployment, B, run)),
        LIMIT_S,
        "an answer of round 2",
        deployment.tails,
    )
    deployment.kill_pid(node)
    deployment.outcome(run)

    assert answered(deployment, run) == [ALL] * 2
    first, *second = [line["sha256"] for line in sent(deployment, B, run)]
    assert len(second) == 2
    assert second[0] == second[1] != first, "asked again, the site gives the answer that it gave"
    assert [line["round"] for line in sent(deployment, A, run)] == [1, 2]
    cost = charges(deployment, run)
    assert [len(cost[name]) for name in ALL] == [1, 1, 1]
    assert cost[B] == cost[A] == cost[C]


# ---- F2: a site dies for good


def die(deployment: Faulty, name: str, run: str) -> None:
    """The whole machine, in the middle of a round."""
    agent = deployment.freeze_in_training(name, run)
    pids = [deployment.pid(name, part) for part in ("supervisor", "node")] + [agent]
    for pid in pids:
        deployment.kill_pid(pid)


def test_f2_a_round_closes_at_the_deadline_without_the_dead(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated", rounds=2, deadline_s=45), "f2")
    die(deployment, B, "f2")
    said = deployment.outcome("f2", status=6)
    first, second = deployment.records("f2")
    assert first["answered"] == ALL
    assert (second["answered"], list(second["failed"])) == ([A, C], [B])
    assert deployment.hashes("f2")[0] == undisturbed[0]
    assert deployment.hashes("f2")[1] != undisturbed[1]
    evaluation = deployment.evaluation("f2")
    assert evaluation["status"] == "partial"
    assert any(B in line for line in evaluation["incomplete"])
    deployment.do("report", deployment.run("f2"))
    assert all(
        line in (deployment.run("f2") / "report.html").read_text(encoding="utf-8")
        for line in evaluation["incomplete"]
    )
    told("F2 quorum holds", said.splitlines()[-1], *evaluation["incomplete"])


def test_f2_below_the_quorum_the_run_stops_cleanly_and_can_be_resumed(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated", quorum=3, deadline_s=45, patience_s=20), "f2-quorum")
    die(deployment, B, "f2-quorum")
    error, hint = one_error(deployment.outcome("f2-quorum", status=1), "no-quorum")
    assert "2 valid answers, the quorum is 3" in error
    assert B in error
    assert "fedqc run resume" in hint
    refused = deployment.call("run", "resume", "f2-quorum", "--federation", deployment.fed, "--wait", 1)
    assert refused.returncode == 2
    told("F2 below the quorum", error, hint, *one_error(refused.stderr, "too-few-sites"))

    deployment.make_whole()
    deployment.resume("f2-quorum")
    deployment.outcome("f2-quorum")
    assert deployment.hashes("f2-quorum") == undisturbed


# ---- F3: a site is too slow


def test_f3_a_straggler_does_not_hold_up_the_round_and_is_charged_for_what_it_began(
    deployment: Faulty,
) -> None:
    """The agent stands still for longer than the deadline."""
    deployment.begin(plan_of("federated_dp", rounds=2, deadline_s=45), "f3")
    agent = deployment.freeze_in_training(B, "f3", after_round=0)
    try:
        first = deployment.await_rounds("f3", 1)[0]
    finally:
        thaw(agent)
    assert first["answered"] == [A, C]
    assert first["failed"][B] in ("no-answer", "agent-deadline")
    said = deployment.outcome("f3", status=6)
    assert deployment.records("f3")[0] == first
    assert answered(deployment, "f3")[1] == ALL
    cost = charges(deployment, "f3")
    assert [len(cost[name]) for name in ALL] == [1, 1, 1]
    assert cost[B] == cost[A]
    told("F3", said.splitlines()[-1], f"round 1: failed {first['failed']}", f"charged: {cost}")


def test_f3_control_with_time_enough_the_same_straggler_is_waited_for(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated"), "f3-control")
    agent = deployment.freeze_in_training(B, "f3-control")
    wait_until(
        lambda: waiting(deployment, "f3-control") == [B], LIMIT_S, "the others' answers", deployment.tails
    )
    time.sleep(15)  # an idle quarter of a minute: this is the fault
    thaw(agent)
    deployment.outcome("f3-control")
    assert deployment.hashes("f3-control") == undisturbed


def waiting(deployment: Faulty, run: str) -> list[str]:
    found: list[str] = json.loads((deployment.run(run) / "live.json").read_text(encoding="utf-8"))["waiting"]
    return found


# ---- F4: the coordinator's processes are killed


def test_f4_a_superlink_that_is_killed_comes_back_and_the_run_goes_on_by_itself(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    deployment.begin(plan_of("federated"), "f4-superlink")
    agent = deployment.freeze_in_training(B, "f4-superlink")
    deployment.kill("federation", "superlink")
    thaw(agent)
    deployment.outcome("f4-superlink")
    assert deployment.hashes("f4-superlink") == undisturbed
    told("F4 SuperLink alone", *lines_with(deployment.log("federation"), "superlink ended"))


@pytest.mark.parametrize("within", [True, False], ids=["within", "between"])
def test_f4_superlink_and_serverapp_killed_together_cost_a_round_at_most(
    within: bool, deployment: Faulty, undisturbed: list[str]
) -> None:
    """Within a round, or as soon as one has been written down."""
    run = f"f4-{'within' if within else 'between'}"
    deployment.begin(plan_of("federated"), run)
    agent = deployment.freeze_in_training(B, run) if within else 0
    before = deployment.await_rounds(run, 1)
    deployment.kill_pid(deployment.server_app())
    deployment.kill("federation", "superlink")
    if agent:
        thaw(agent)
    error, hint = one_error(deployment.outcome(run, status=1), "run-interrupted")
    deployment.make_whole()
    deployment.resume(run)
    deployment.outcome(run)
    assert deployment.records(run)[: len(before)] == before
    assert deployment.hashes(run) == undisturbed
    told(f"F4 {run}", error, hint, *lines_with(deployment.log("federation"), "superlink ended")[-1:])


def test_f4_a_private_round_that_is_asked_again_by_a_resumed_run_is_charged_once(deployment: Faulty) -> None:
    """Killed once the answers of round 2 have left the sites and before the coordinator has all: what is
    asked again is in the outboxes.
    """
    run = "f4-private"
    deployment.begin(plan_of("federated_dp", rounds=2), run)
    agent = deployment.freeze_in_training(B, run)
    wait_until(
        lambda: [line["round"] for line in sent(deployment, A, run)] == [1, 2],
        LIMIT_S,
        "an answer of round 2",
        deployment.tails,
    )
    deployment.kill_pid(deployment.server_app())
    deployment.kill("federation", "superlink")
    thaw(agent)
    one_error(deployment.outcome(run, status=1), "run-interrupted")
    deployment.make_whole()
    deployment.resume(run)
    deployment.outcome(run)
    assert answered(deployment, run) == [ALL] * 2
    assert [line["round"] for line in sent(deployment, A, run)] == [1, 2, 2]
    assert len({line["sha256"] for line in sent(deployment, A, run)}) == 2
    cost = charges(deployment, run)
    assert [len(cost[name]) for name in ALL] == [1, 1, 1]


# ---- F1 and F4 together: a storm


STORM = {"agent": 15, "node": 12, "superlink": 6, "serverapp": 6, "superexec": 3, "proxy": 3}
"""How often a process of each kind is killed: 45 times in all."""


def test_a_storm_of_45_kills_over_all_roles_ends_in_the_same_models(deployment: Faulty) -> None:
    """The next is killed up to six seconds later, while others are still on their way back. A run that this
    interrupts is resumed at once, as often as it takes.
    """
    plan, rng = plan_of("federated", rounds=5, epochs=8), random.Random(18)
    deployment.begin(plan, "calm")
    deployment.outcome("calm")
    victims = [part for part, times in STORM.items() for _ in range(times)]
    rng.shuffle(victims)
    sites = {part: itertools.cycle(ALL) for part in ("agent", "node")}

    def alive(part: str) -> int:
        """The number of such a process, 0 while there is none. A number may be another's by now."""
        with suppress(OSError, ValueError, KeyError, IndexError):
            if part == "serverapp":
                mine = descendants(deployment.pid("federation", "superexec"))
                pid = next((pid for pid in mine if b"flwr-serverapp" in command_of(pid)), 0)
            else:
                pid = deployment.pid(next(sites[part]) if part in sites else "federation", part)
            return pid if (pid, born(pid)) in deployment.processes() else 0
        return 0

    run, said, killed = "storm", Counter[str](), Counter[str]()
    deployment.begin(plan, run)
    deployment.await_rounds(run, 1)
    again_at = 0.0
    process = deployment.started(f"run-{run}")
    while victims or process.poll() != 0:
        if victims and time.monotonic() >= again_at:
            number = next((n for n, part in enumerate(victims) if alive(part)), None)
            if number is not None and (pid := alive(victims[number])):
                deployment.kill_pid(pid)
                killed[victims.pop(number)] += 1
                again_at = time.monotonic() + rng.uniform(0, 6)
        if process.poll():
            (code,) = re.findall(r"^fedqc: error \[([a-z-]+)\]", deployment.log(f"run-{run}"), re.MULTILINE)
            one_error(deployment.log(f"run-{run}"), code)
            said[code] += 1
            deployment.resume(run)
            process = deployment.started(f"run-{run}")
        assert not victims or process.poll() != 0, "the run was over before the storm"
        time.sleep(0.1)
    assert killed == STORM
    assert sum(killed.values()) == 45
    assert answered(deployment, run) == [ALL] * 5
    assert deployment.hashes(run) == deployment.hashes("calm")
    told("storm", f"killed {dict(killed)}", f"resumed after {dict(said)}")


# ---- F30: people and systemd end things


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_f30_run_start_is_only_a_watcher(
    number: int, status: int, deployment: Faulty, undisturbed: list[str]
) -> None:
    run = f"f30-run-{status}"
    deployment.begin(plan_of("federated"), run)
    agent = deployment.freeze_in_training(B, run)
    deployment.started(f"run-{run}").send_signal(number)
    said = deployment.outcome(run, status=status)
    thaw(agent)
    watched = deployment.call("run", "watch", run, "--federation", deployment.fed, limit_s=LIMIT_S)
    assert watched.returncode == 0, deployment.told(watched)
    assert deployment.hashes(run) == undisturbed
    told(f"F30 run start, {status}", said.splitlines()[-1])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_f30_federation_start_ends_in_order_and_the_run_is_resumed(
    number: int, status: int, deployment: Faulty, undisturbed: list[str]
) -> None:
    run = f"f30-federation-{status}"
    deployment.begin(plan_of("federated"), run)
    agent = deployment.freeze_in_training(B, run)
    server_app, federation = deployment.server_app(), deployment.started("federation")
    federation.send_signal(number)
    assert federation.wait(60) == status
    assert "stopped" in deployment.log("federation")
    wait_until(lambda: not Path(f"/proc/{server_app}").exists(), 30, "the end of the ServerApp")
    assert not list((deployment.fed / "state").glob("*.pid"))
    thaw(agent)
    error, hint = one_error(deployment.outcome(run, status=1), "run-interrupted")
    deployment.make_whole()
    deployment.resume(run)
    deployment.outcome(run)
    assert deployment.hashes(run) == undisturbed
    told(f"F30 federation start, {status}", error, hint)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_f30_site_start_ends_in_order_and_the_round_waits_for_it(
    number: int, status: int, deployment: Faulty, undisturbed: list[str]
) -> None:
    run = f"f30-site-{status}"
    deployment.begin(plan_of("federated"), run)
    thaw(deployment.freeze_in_training(B, run))
    site = deployment.started(B)
    site.send_signal(number)
    assert site.wait(60) == status
    assert not list((deployment.site(B) / "run").glob("*.pid"))
    assert not (deployment.site(B) / "run" / "agent.sock").exists()
    deployment.start_site(B)
    deployment.outcome(run)
    assert deployment.hashes(run) == undisturbed


# ---- F14: the network between a hospital and the coordinator


class Wire:
    """Between a node and the coordinator's proxy: a network that is cut, breaks off, loses halves and says
    things twice.

    It has the server's key, so that it can tell one call from another, as no network can.
    """

    def __init__(self, fed: Path, port: int) -> None:
        federation = Federation.open(fed)
        self.port, self._to = free_port(), port
        self.cut_until = 0.0
        self.held = 0  # calls that met the cut
        self.faults: dict[str, list[str]] = {}  # call -> what happens to it, one after the other
        self.happened: Counter[str] = Counter()
        self._trust = ssl.create_default_context(cafile=str(federation.ca_certificate))
        inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        inside.load_cert_chain(federation.server_certificate, federation.server_key)
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                wire.wait_out()
                self.request = inside.wrap_socket(self.request, server_side=True)
                super().setup()

            def do_POST(self) -> None:
                wire.carry(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_GET = do_POST

            def log_message(self, *words: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *words: object) -> None: ...  # somebody hung up

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def cut(self, seconds: float) -> None:
        self.cut_until = time.monotonic() + seconds

    def wait_out(self) -> None:
        """What is under way in a cut arrives when it is over: TCP sends it again."""
        if time.monotonic() < self.cut_until:
            self.held += 1
        while (left := self.cut_until - time.monotonic()) > 0:
            time.sleep(left)

    def carry(self, caller: BaseHTTPRequestHandler, body: bytes) -> None:
        call = caller.path.rpartition("/")[2]
        fault = self.faults[call].pop(0) if self.faults.get(call) else ""
        if fault:
            self.happened[f"{call} {fault}"] += 1
        self.wait_out()
        if fault in ("request reset", "request halved"):
            if fault == "request halved":
                self._ask(caller, body, half=True)
            self._reset(caller)
            return
        status, headers, answer = self._ask(caller, body)
        if fault == "said twice":
            status, headers, answer = self._ask(caller, body)
        self.wait_out()
        if fault == "answer reset":
            self._reset(caller)
            return
        caller.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                caller.send_header(name, value)
        caller.send_header("Content-Length", str(len(answer)))
        caller.end_headers()
        caller.wfile.write(answer[: len(answer) // 2] if fault == "answer halved" else answer)
        if fault == "answer halved":
            self._reset(caller)

    def _ask(
        self, caller: BaseHTTPRequestHandler, body: bytes, *, half: bool = False
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        with closing(HTTPSConnection("127.0.0.1", self._to, timeout=70, context=self._trust)) as onward:
            onward.putrequest(caller.command, caller.path, skip_accept_encoding=True)
            for name, value in caller.headers.items():
                if name.lower() not in ("host", "connection"):
                    onward.putheader(name, value)
            onward.endheaders()
            onward.send(body[: len(body) // 2] if half else body)
            if half:
                return 0, [], b""
            try:
                answer = onward.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (OSError, HTTPException):
                return 502, [], b""

    def _reset(self, caller: BaseHTTPRequestHandler) -> None:
        caller.close_connection = True
        caller.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.close(caller.connection)


def send_over(deployment: Faulty, name: str, port: int) -> None:
    """Have a hospital reach the coordinator through this port of its own machine."""
    if deployment.started(name).poll() is None:
        deployment.stop_site(name)
    path = deployment.site(name) / "node" / "node.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | {"address": f"127.0.0.1:{port}"}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    deployment.start_site(name)


@pytest.fixture
def wire(deployment: Faulty) -> Iterator[Wire]:
    made = Wire(deployment.fed, deployment.port)
    try:
        send_over(deployment, B, made.port)
        yield made
    finally:
        send_over(deployment, B, deployment.port)
        made.close()


def test_f14_cuts_of_up_to_forty_seconds_change_nothing(
    deployment: Faulty, undisturbed: list[str], wire: Wire
) -> None:
    """One a round, while the site works: its answer meets the cut. What Flower then hands in by halves is
    asked for again.
    """
    deployment.begin(plan_of("federated", deadline_s=200), "f14-cuts")
    for done, seconds in enumerate((5, 20, 40)):
        agent = deployment.freeze_in_training(B, "f14-cuts", after_round=done)
        before = wire.held
        wire.cut(seconds)
        thaw(agent)
        wait_until(lambda: wire.held > before, LIMIT_S, "something met the cut", deployment.tails)  # noqa: B023
    deployment.outcome("f14-cuts")
    assert answered(deployment, "f14-cuts") == [ALL] * 3
    assert deployment.hashes("f14-cuts") == undisturbed
    told(
        "F14 cuts", f"{wire.held} calls met them", *lines_with(deployment.log(B), "unreachable", "connected")
    )


def test_f14_control_an_answer_that_comes_after_the_deadline_is_not_counted(
    deployment: Faulty, undisturbed: list[str], wire: Wire
) -> None:
    """F3 too: the answer is whole, signed, and late."""
    deployment.begin(plan_of("federated", deadline_s=45), "f14-late")
    agent = deployment.freeze_in_training(B, "f14-late")
    wire.cut(LIMIT_S)
    thaw(agent)
    wait_until(
        lambda: any(line["round"] == 2 for line in sent(deployment, B, "f14-late")),
        LIMIT_S,
        "an answer",
        deployment.tails,
    )
    second = deployment.await_rounds("f14-late", 2)[1]
    wire.cut(0)
    assert (second["answered"], list(second["failed"])) == ([A, C], [B])
    deployment.outcome("f14-late", status=6)
    assert deployment.records("f14-late")[1] == second
    assert deployment.hashes("f14-late")[0] == undisturbed[0]
    assert deployment.hashes("f14-late")[1] != undisturbed[1]


def test_f14_resets_halves_and_repetitions_change_nothing(
    deployment: Faulty, undisturbed: list[str], wire: Wire
) -> None:
    """Every call of a round of the site meets one of them. What the site says twice is counted once."""
    deployment.begin(plan_of("federated", deadline_s=200), "f14-breaks")
    kinds = ("request reset", "said twice", "answer halved", "request halved", "answer reset")
    for done, (sending, fetching) in enumerate(
        (("request halved", kinds[:2]), ("said twice", kinds[2:4]), ("answer reset", kinds[4:]))
    ):
        agent = deployment.freeze_in_training(B, "f14-breaks", after_round=done)
        wire.faults |= {
            "push-messages": [sending],
            "push-object": [*kinds],
            "pull-messages": [*fetching],
            "pull-object": [*fetching],
        }
        thaw(agent)
        wait_until(lambda: not wire.faults["push-messages"], LIMIT_S, "an answer met it", deployment.tails)
    deployment.outcome("f14-breaks")
    assert answered(deployment, "f14-breaks") == [ALL] * 3
    assert deployment.hashes("f14-breaks") == undisturbed
    assert {happened.partition(" ")[2] for happened in wire.happened} == set(kinds)
    assert wire.happened["push-messages said twice"] == 1
    assert deployment.records("f14-breaks")[1]["weights"] == deployment.records("undisturbed")[1]["weights"]
    told("F14 breaks", *(f"{times} × {what}" for what, times in sorted(wire.happened.items())))


def test_f14_who_sends_a_byte_a_second_is_let_go_and_holds_up_nobody(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    """Its head ends it. A body may dribble, in one of so many connections an address, and nothing of it
    reaches the SuperLink.
    """
    trust = ssl.create_default_context(cafile=str(Federation.open(deployment.fed).ca_certificate))

    def connect() -> ssl.SSLSocket:
        return trust.wrap_socket(
            socket.create_connection(("127.0.0.1", deployment.port), timeout=30), server_hostname="127.0.0.1"
        )

    def dribble(slow: ssl.SSLSocket, stop: threading.Event, ended: threading.Event) -> None:
        with suppress(OSError):
            while not stop.wait(1):
                slow.sendall(b"x")
        ended.set()

    stop, ended, never = threading.Event(), threading.Event(), threading.Event()
    with connect() as head, connect() as body:
        head.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        body.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n")
        for arguments in ((head, stop, ended), (body, stop, never)):
            threading.Thread(target=dribble, args=arguments, daemon=True).start()
        deployment.begin(plan_of("federated"), "f14-slow")
        deployment.outcome("f14-slow")
        assert ended.wait(60)
        stop.set()
    assert deployment.hashes("f14-slow") == undisturbed


# ---- F12: certificates run out. Last: it changes the federation's certificate


def shorten_certificate(fed: Path, seconds: float) -> datetime:
    """The same certificate, but for its end, which is returned."""
    federation = Federation.open(fed)
    authority = x509.load_pem_x509_certificate(federation.ca_certificate.read_bytes())
    key = serialization.load_pem_private_key(federation.ca_key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = x509.load_pem_x509_certificate(federation.server_certificate.read_bytes())
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=seconds)
    new = x509.CertificateBuilder(
        issuer_name=authority.subject,
        subject_name=old.subject,
        public_key=old.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=datetime.now(UTC) - timedelta(days=1),
        not_valid_after=end,
        extensions=list(old.extensions),
    ).sign(key, hashes.SHA256())
    federation.server_certificate.write_bytes(new.public_bytes(serialization.Encoding.PEM))
    return end


def restart(deployment: Faulty) -> None:
    assert deployment.end_process("federation") == 143
    deployment.make_whole()


def warnings(deployment: Faulty) -> dict[str, list[str]]:
    """Who says that the certificate should be renewed: at the start, in the list of sites, at a hospital."""
    sites = deployment.do("federation", "sites", "--federation", deployment.fed)
    checks = deployment.call("site", "check", "--site", deployment.site(A), "--format", "json")
    (certificate,) = [found for found in json.loads(checks.stdout) if found["check"] == "certificate"]
    assert certificate["ok"] is True
    return {
        "federation start": lines_with(deployment.log("federation"), "federation renew"),
        "federation sites": lines_with(sites.stderr, "federation renew"),
        "site check": [f"{certificate['problem']}; fix: {certificate['fix']}"]
        if certificate["problem"]
        else [],
    }


def test_f12_a_certificate_that_ends_in_a_week_is_told_in_all_three_places(deployment: Faulty) -> None:
    deployment.do("federation", "renew", "--days", 31 + 1, "--federation", deployment.fed)
    restart(deployment)
    assert not any(warnings(deployment).values()), "the control"
    deployment.do("federation", "renew", "--days", 7, "--federation", deployment.fed)
    restart(deployment)
    said = warnings(deployment)
    assert all(len(lines) == 1 for lines in said.values()), said
    told("F12 in a week", *(f"{who}: {line}" for who, (line,) in said.items()))
    deployment.do("federation", "renew", "--federation", deployment.fed)
    restart(deployment)


def test_f12_a_certificate_that_ends_in_mid_run_stops_it_cleanly_until_it_is_renewed(
    deployment: Faulty, undisturbed: list[str]
) -> None:
    end = shorten_certificate(deployment.fed, 180)
    restart(deployment)
    # a round that needs every site, and waits longer than the certificate lasts, is open at its end on a
    # quick machine, too
    deployment.begin(plan_of("federated", quorum=3, deadline_s=240, patience_s=30), "f12")
    agent = deployment.freeze_in_training(B, "f12")
    assert datetime.now(UTC) < end, "this machine is too slow for this test"
    wait_until(lambda: datetime.now(UTC) > end + timedelta(seconds=1), 200, "the end of the certificate")
    deployment.kill("federation", "proxy")  # all connections with it
    thaw(agent)
    # the ServerApp either hears of no site any more, or needs a new connection itself
    said = deployment.outcome("f12", status=1)
    error, hint = one_error(said, "no-superlink" if "[no-superlink]" in said else "no-quorum")
    for name in ALL:
        wait_until(
            lambda name=name: "[certificate-expired]" in deployment.log(name),  # type: ignore[misc]
            LIMIT_S,
            name,
            deployment.tails,
        )  # type: ignore[misc]
    again = deployment.call("site", "check", "--site", deployment.site(A))
    assert again.returncode == 3
    assert deployment.end_process("federation") == 143
    refused = deployment.call("federation", "start", "--federation", deployment.fed)
    assert refused.returncode == 2
    told(
        "F12 in mid-run",
        error,
        hint,
        *lines_with(deployment.log(A), "certificate-expired"),
        *lines_with(again.stdout, "certificate"),
        *one_error(refused.stderr, "certificate-expired"),
    )

    deployment.do("federation", "renew", "--federation", deployment.fed)
    deployment.make_whole()
    deployment.resume("f12")
    deployment.outcome("f12")
    assert deployment.hashes("f12") == undisturbed
    assert not is_being_run(deployment.fed, "f12")
