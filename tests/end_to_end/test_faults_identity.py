"""Faults and attacks on a deployed federation: who is who, which app runs, which clock and certificate count,
what a hospital survives.

Three hospitals on real processes behind the real proxy. One of them, hospital-c, has its state on a small
disk of its own, and a relay between its node and its agent that keeps every question; later its node is
played by an attacker who holds all of its keys.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import signal
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message, RecordDict
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER, HEAD_VALUE_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.ipc.client import agent_health, ask_agent
from client.ipc.protocol import FAILED, METHODS, SERVICE
from client.site.budget import budgets
from client.supervision.supervisor import state_of
from common.errors import NetworkError, RunError
from common.pricing import with_noise
from common.signing import Statement, load_key, payload_sha256, sign
from common.wire import Envelope, SiteUpdate, TrainTask
from server.federation.registry import EnrolledKeys, Federation, site_keys
from server.federation.services import environment
from server.messaging.signatures import Question, Seal
from server.run_folder import RunFolder
from tests.helpers.command_line import FEDQC
from tests.helpers.hospital import (
    Hospital,
    at_the_address_of,
    code_of,
    fill,
    memory_of,
    small_disk,
    wrong_servers,
)
from tests.helpers.ports import free_port
from tests.helpers.rig import NGINX, Deployment, deployed_plan, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]

A, B, C = "hospital-a", "hospital-b", "hospital-c"
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
PROTOBUF = "application/protobuf"


# ---- the rig


class Relay:
    """Between a hospital's node and its agent: passes everything on, keeps every question, and may do
    something first.
    """

    def __init__(self, site: Path) -> None:
        self.path, self._agent = site / "run" / "relay.sock", site / "run" / "agent.sock"
        self.seen: list[tuple[str, str, bytes]] = []
        self.first: Callable[[str, int], None] = lambda method, number: None
        self._server = grpc.server(
            ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 1 << 28)]
        )
        handlers = {method: grpc.unary_stream_rpc_method_handler(self._handler(method)) for method in METHODS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._server.add_insecure_port(f"unix:{self.path}")
        self._server.start()
        config = site / "node" / "node.yaml"
        config.write_text(
            yaml.safe_dump(yaml.safe_load(config.read_text()) | {"agent_socket": str(self.path)})
        )

    def close(self) -> None:
        self._server.stop(0).wait(10)

    def _handler(self, method: str) -> Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]:
        def handle(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            (length,) = struct.unpack_from("<I", request)
            plan, envelope = request[4 : 4 + length].decode(), request[4 + length :]
            self.seen.append((method, plan, envelope))
            self.first(method, sum(kind == method for kind, _, _ in self.seen))
            try:
                yield b"A" + ask_agent(self._agent, method, plan, envelope, deadline_s=120)
            except NetworkError:
                context.abort(grpc.StatusCode.INTERNAL, FAILED)

        return handle


class Federated(Deployment):
    """The deployment of this module."""

    relays: dict[str, Relay]
    has_small_disk: bool

    def hospital(self, name: str) -> Hospital:
        return Hospital(self, name)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def superlink(self) -> str:
        return f"127.0.0.1:{Federation.open(self.fed).settings.superlink_port}"

    def records(self, run: str) -> list[dict[str, Any]]:
        return RunFolder.open(self.run(run)).arm("federated_dp", None).rounds()

    def node_says(self, name: str) -> str:
        """The last line that the node told its operator."""
        lines = [line for line in self.log(name).splitlines() if line.startswith(("node: ", "fedqc: error"))]
        return lines[-1] if lines else ""

    def node_alone(
        self, site: Path, *, prefix: Sequence[str] = (), wall: bool = True
    ) -> tuple[int | None, str, float]:
        """Run only the node of a site folder until it ends or is connected: exit status (None: connected),
        its last line, seconds.

        Args:
            wall: False leaves its files alone: libfaketime wants to share memory between processes.
        """
        name = f"node-of-{site.name}-{time.monotonic_ns()}"
        began = time.monotonic()
        words: list[object] = ["site", "start", "--only", "node", "--site", site]
        bare = (
            f"from client.node.process import *; sys.exit(run_node(Path({str(site)!r}), "
            "require_isolation=False, isolate=False))"
        )
        process = self.background(
            name, words if wall else ["-c", bare], prefix=prefix, program=FEDQC if wall else sys.executable
        )
        wait_until(
            lambda: process.poll() is not None or "node: connected" in self.log(name), 90, name, self.tails
        )
        took = time.monotonic() - began
        said = self.node_says(name)
        assert "Traceback" not in self.log(name)
        if process.poll() is None:
            process.terminate()
            process.wait(30)
            return None, said, took
        return process.returncode, said, took


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federated]:
    made = Federated(tmp_path_factory.mktemp("identity"), running=False)
    made.make_data()
    with ExitStack() as stack:
        made.has_small_disk = stack.enter_context(small_disk(made.site(C) / "state"))
        stack.enter_context(made)
        made.init()
        for name in made.names:
            made.enrol(name)
        made.relays = {name: Relay(made.site(name)) for name in (A, C)}
        for relay in made.relays.values():
            stack.callback(relay.close)
        made.start_federation()
        for name in made.names:
            made.start_site(name, wait=False)
        for name in made.names:
            made.await_site(name)
        yield made
    assert made.left_behind == []


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# ---- F6, F15: a hospital without disk, then without memory, in one run


@pytest.fixture(scope="module")
def faulty(deployment: Federated) -> list[dict[str, Any]]:
    """Three rounds: hospital-c has no room in the first, no memory in the second, and everything in the
    third.
    """
    state, limit = deployment.site(C) / "state", (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def first(method: str, number: int) -> None:
        if method != "Train":
            return
        agent = deployment.pid(C, "agent")
        (state / "ballast").unlink(missing_ok=True)
        resource.prlimit(agent, resource.RLIMIT_AS, limit)
        if number == 1 and deployment.has_small_disk:
            fill(state, leave_pages=0)
        if number == 2:
            resource.prlimit(
                agent, resource.RLIMIT_AS, (memory_of(agent) + (16 << 20), resource.RLIM_INFINITY)
            )

    deployment.relays[C].first = first
    agents = deployment.pid(C, "agent"), deployment.pid(C, "node")
    deployment.run_start(deployed_plan(name="faulty", image_size=256), "faulty", status=6)
    deployment.relays[C].first = lambda method, number: None
    assert (deployment.pid(C, "agent"), deployment.pid(C, "node")) == agents, "neither process was lost"
    records = deployment.records("faulty")
    for record in records:
        print(f"F6/F15 round {record['round']}: answered {record['answered']}, failed {record['failed']}")
    return records


def test_f6_f15_the_coordinator_sees_one_code_a_round_and_the_site_comes_back(
    deployment: Federated, faulty: list[dict[str, Any]]
) -> None:
    assert [record["answered"] for record in faulty] == [
        [A, B, C] if not deployment.has_small_disk else [A, B],
        [A, B],
        [A, B, C],
    ]
    if deployment.has_small_disk:
        assert faulty[0]["failed"] == {C: "disk-full"}
    assert faulty[1]["failed"] == {C: "site-failure"}
    assert faulty[2]["failed"] == {}
    assert deployment.evaluation("faulty")["status"] == "partial"
    print("F6/F15 the report says:", deployment.evaluation("faulty")["incomplete"])


def test_f6_f15_the_operator_reads_why_and_what_to_do(
    deployment: Federated, faulty: list[dict[str, Any]]
) -> None:
    lines = [
        line
        for line in (deployment.site(C) / "state" / "site.log").read_text().splitlines()
        if "incident" in line
    ]
    print("F6/F15 site log:", *lines, sep="\n  ")
    assert any("out-of-memory: a batch size below 16, or a larger machine" in line for line in lines)
    if deployment.has_small_disk:  # the log is on the disk that was full
        (said, *_) = [line for line in deployment.log(C).splitlines() if "disk-full" in line]
        print("F6 terminal:", said)
        assert "free some space" in said


def test_f6_f15_what_was_reserved_counts_once(deployment: Federated, faulty: list[dict[str, Any]]) -> None:
    for name in deployment.names:
        (account,) = budgets(deployment.site(name))
        assert len(account["entries"]) == 1
        assert 1.7 < account["spent"] <= 2
    updates = [
        line
        for line in deployment.json("site", "sent", "--site", deployment.site(C))
        if line["kind"] == "SiteUpdate"
    ]
    assert [line["round"] for line in updates] == ([3] if deployment.has_small_disk else [1, 3])


# ---- F16: what was really signed, sent again


def test_f16_questions_taken_from_the_wire_are_not_answered_twice(
    deployment: Federated, faulty: list[dict[str, Any]]
) -> None:
    hospital = deployment.hospital(C)
    before = hospital.rows()
    kept = {
        (method, json.loads(plan)["name"]): (method, plan, envelope)
        for method, plan, envelope in deployment.relays[C].seen
    }
    kinds = {method for method, _ in kept}
    assert kinds == {"Describe", "Train", "Evaluate"}
    for method, plan, envelope in kept.values():
        answer = hospital.send(method, plan, envelope)
        print(f"F16 {method} again: {code_of(answer)}")
        assert code_of(answer) == "replayed-task"
    method, plan, envelope = kept["Train", "faulty"]
    other = deployment.hospital(A)
    assert code_of(other.send(method, plan, envelope)) == "wrong-site"
    loose = json.dumps(json.loads(plan) | {"seed": 4}, sort_keys=True, separators=(",", ":"))
    assert code_of(hospital.send(method, loose, envelope)) == "wrong-plan"
    deployment.kill(C, "agent")
    wait_until(lambda: agent_health(hospital.socket), 60, "the agent again", deployment.tails)
    assert code_of(hospital.send(method, plan, envelope)) == "replayed-task", (
        "also by an agent that has begun anew"
    )
    assert hospital.rows() == before
    task = TrainTask.from_bytes(Envelope.from_bytes(envelope).payload)
    assert code_of(hospital.ask(task, plan)) == "SiteUpdate", "the control: the coordinator itself signs anew"
    assert hospital.rows() == before


# ---- F10, F13, F28: what a stranger, a wrong clock and a hostile hospital can do through the proxy


def status_of(deployment: Federated, address: str, path: str, body: bytes) -> int:
    context = ssl.create_default_context(cafile=str(deployment.fed / "certificates" / "ca.crt"))
    request = urllib.request.Request(
        f"https://{address}{path}", data=body, headers={"Content-Type": PROTOBUF, "Accept": PROTOBUF}
    )
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_f28_a_stranger_lists_registers_starts_and_acquires_nothing(deployment: Federated) -> None:
    key = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    calls: dict[str, Any] = {
        "/v1/control/list-nodes": ListNodesRequest(),
        "/v1/control/register-node": RegisterNodeRequest(public_key=key),
        "/v1/control/start-run": StartRunRequest(),
        "/v1/runtime/acquire-task": AcquireTaskRequest(supported_task_types=["flwr-serverapp"]),
        "/v1/fleet/register-node": RegisterNodeFleetRequest(public_key=key),
        "/v1/fleet/activate-node": ActivateNodeRequest(public_key=key, heartbeat_interval=30),
        "/v1/fleet/pull-messages": PullMessagesRequest(node=Node(node_id=1)),
        "/v1/fleet/push-messages": PushMessagesRequest(node=Node(node_id=1)),
    }
    found = {
        path: status_of(deployment, deployment.address, path, call.SerializeToString())
        for path, call in calls.items()
    }
    print("F28 without credentials:", *(f"{status} {path}" for path, status in found.items()), sep="\n  ")
    assert {status for path, status in found.items() if "/fleet/" not in path} == {404}
    assert {status for path, status in found.items() if "/fleet/" in path} == {401}
    # the control: on loopback the first is answered to anybody, and the secret guards the tasks
    assert (
        status_of(
            deployment, deployment.superlink, "/v1/control/list-nodes", ListNodesRequest().SerializeToString()
        )
        == 200
    )
    assert (
        status_of(
            deployment,
            deployment.superlink,
            "/v1/runtime/acquire-task",
            AcquireTaskRequest().SerializeToString(),
        )
        == 401
    )


class Clock:
    """Signs as Flower's node does, by a clock that is `ahead_s` ahead."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, ahead_s: float) -> None:
        self._inner = NodeAuthHttpInterceptor(key, key.public_key())
        self._key, self.ahead_s = key, ahead_s

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        def forged(inner: ProtobufRequestContext) -> httpx.Response:
            if self.ahead_s:
                stamp = (datetime.now(UTC) + timedelta(seconds=self.ahead_s)).isoformat()
                (name,) = (name for name in inner.request.headers if "timestamp" in name)
                (signature,) = (name for name in inner.request.headers if "signature" in name)
                inner.request.headers[name] = stamp
                inner.request.headers[signature] = base64.b64encode(
                    sign_message(self._key, stamp.encode("ascii"))
                ).decode()
            return call_next(inner)

        return self._inner.intercept(context, forged)


def fleet(deployment: Federated, key: ec.EllipticCurvePrivateKey, ahead_s: float = 0.0) -> FleetHttpClient:
    """Flower's own client, through the proxy."""
    authority = (deployment.fed / "certificates" / "ca.crt").read_bytes()
    return FleetHttpClient.from_server_address(deployment.address, False, authority, [Clock(key, ahead_s)])


def node_key(site: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_ssh_private_key((site / "node" / "node.key").read_bytes(), password=None)
    return cast(ec.EllipticCurvePrivateKey, key)


def refused_with(call: Callable[[], object]) -> int:
    """The HTTP status that a call ends with; 200 if it is answered."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def test_f10_a_key_that_nobody_enrolled_cannot_register_itself_nor_connect(deployment: Federated) -> None:
    stranger = ec.generate_private_key(ec.SECP384R1())
    public = public_key_to_bytes(stranger.public_key())
    with fleet(deployment, stranger) as client:
        found = {
            "register": refused_with(
                lambda: client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
            ),
            "activate": refused_with(
                lambda: client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
            ),
        }
    print(f"F10 a stranger's key: {found}")
    assert found == {"register": 412, "activate": 412}
    twin = twin_of(deployment, A, "stranger")
    pem = stranger.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (twin / "node" / "node.key").write_bytes(pem)
    status, said, took = deployment.node_alone(twin)
    print(f"F10 a node with it: status {status} after {took:.1f} s: {said}")
    assert status == 3
    assert "[key-not-accepted]" in said


def twin_of(deployment: Federated, name: str, new: str) -> Path:
    """A copy of what the node of a site holds, on other loopback ports."""
    twin = deployment.folder / new
    for part in ("node", "run"):
        (twin / part).mkdir(parents=True, mode=0o700)
    for file in ("node.key", "node.yaml", "ca.crt", "runtime.secret"):
        shutil.copy(deployment.site(name) / "node" / file, twin / "node")
    config = twin / "node" / "node.yaml"
    config.write_text(
        yaml.safe_dump(
            yaml.safe_load(config.read_text()) | {"runtime_port": free_port(), "health_port": free_port()}
        )
    )
    return twin


def test_f9_a_second_process_with_the_same_key_is_turned_away_and_the_first_stays(
    deployment: Federated,
) -> None:
    since = state_of(deployment.site(A))["since"]
    status, said, took = deployment.node_alone(twin_of(deployment, A, "twin"))
    print(f"F9 the second: status {status} after {took:.1f} s: {said}")
    assert status == 3
    assert (
        "[key-not-accepted] the coordinator does not accept this node's key, or still counts it as connected"
    ) in said, said
    first = state_of(deployment.site(A))
    assert (first["node"], first["since"], first["last_error"]) == (True, since, None)
    assert deployment.run_check(deployed_plan(name="after-twin"))["sites"][A]["answer"] in (
        "accept",
        "budget-exhausted",
    )


# ---- F28: a hostile hospital


class HostileNode:
    """The node of an enrolled hospital, as an attacker would write it: holds its node key, its signing key,
    and asks its real agent.
    """

    def __init__(self, deployment: Federated, name: str) -> None:
        self._deployment, self.name = deployment, name
        key = node_key(deployment.site(name))
        self._client = fleet(deployment, key)
        self.key = load_key(deployment.site(name) / "state" / "signing.key")
        public = public_key_to_bytes(key.public_key())
        self.id = wait_until(lambda: self._activated(public), 90, "the hostile node is let in")
        self._node = Node(node_id=self.id)
        self._stop = threading.Event()
        self.errors: list[BaseException] = []
        self.plan = ""

    def _activated(self, public: bytes) -> int:
        with suppress(httpx.HTTPStatusError):
            return int(
                self._client.ActivateNode(
                    ActivateNodeRequest(public_key=public, heartbeat_interval=30)
                ).node_id
            )
        return 0

    def _run(self, behave: Callable[[Message], None]) -> None:
        beaten = 0.0
        while not self._stop.is_set():
            try:
                if time.monotonic() - beaten > 10:
                    self._client.SendNodeHeartbeat(
                        SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=30)
                    )
                    beaten = time.monotonic()
                if (message := self.pull()) is not None:
                    behave(message)
            except BaseException as error:
                self.errors.append(error)
            self._stop.wait(0.1)

    @contextmanager
    def running(self, behave: Callable[[Message], None]) -> Iterator[None]:
        """Pull messages and treat each as `behave` says."""
        self._stop.clear()
        self.errors.clear()
        thread = threading.Thread(target=self._run, args=(behave,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)

    def close(self) -> None:
        with suppress(httpx.HTTPError, RuntimeError):  # the second time: closed already
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.id))
        self._client.close()

    def pull(self) -> Message | None:
        found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        message, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        run_id, contents = message.metadata.run_id, {}
        for each in iterate_object_tree(tree):
            while each.object_id not in contents:
                got = self._client.PullObject(
                    PullObjectRequest(node=self._node, run_id=run_id, object_id=each.object_id)
                )
                if got.object_available:
                    contents[each.object_id] = got.object_content
        whole = cast(Message, inflate_object_from_contents(message.metadata.message_id, contents))
        whole.metadata.__dict__["_message_id"] = message.metadata.message_id
        confirm = ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message.metadata.message_id
        )
        self._client.ConfirmMessageReceived(confirm)
        return whole

    def push(
        self, inner: Message, *, envelope: Mapping[str, Any] | None = None, withhold: bool = False
    ) -> bool:
        """Hand in a message; `envelope` changes what is written on the outside, `withhold` never sends the
        content.
        """
        run_id = inner.metadata.run_id
        inner.metadata.__dict__["_message_id"] = inner.object_id
        contents = {each_id: each.deflate() for each_id, each in get_all_nested_objects(inner).items()}
        outside = message_to_proto(remove_content_from_message(inner))
        for name, value in (envelope or {}).items():
            setattr(outside.metadata, name, value)
        return self._hand_in(run_id, outside, get_object_tree(inner), {} if withhold else contents)

    def push_garbage(self, asked: Message) -> bool:
        """A reply whose content has the right hash, and is no message."""
        inner = Message(RecordDict(), reply_to=asked)
        body = b"[]"
        content = (
            f"Message{HEAD_VALUE_DIVIDER}{HEAD_VALUE_DIVIDER}{len(body)}".encode() + HEAD_BODY_DIVIDER + body
        )
        inner.metadata.__dict__["_message_id"] = get_object_id(content)
        outside = message_to_proto(remove_content_from_message(inner))
        tree = ObjectTree(object_id=get_object_id(content))
        return self._hand_in(asked.metadata.run_id, outside, tree, {tree.object_id: content})

    def _hand_in(self, run_id: int, outside: Any, tree: ObjectTree, contents: Mapping[str, bytes]) -> bool:
        said = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[outside],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.1],
            )
        )
        for each in said.objects_to_push:
            if each in contents:
                self._client.PushObject(
                    PushObjectRequest(
                        node=self._node,
                        run_id=run_id,
                        session_id=said.session_id,
                        object_id=each,
                        object_content=contents[each],
                    )
                )
        return bool(said.objects_to_push)

    def honest(self, message: Message) -> Envelope:
        """What the hospital's real agent says."""
        method = {"query.describe": "Describe", "train": "Train", "evaluate": "Evaluate"}[
            message.metadata.message_type
        ]
        asked = Envelope.from_record(message.content).to_bytes()
        socket = self._deployment.site(self.name) / "run" / "agent.sock"
        return Envelope.from_bytes(ask_agent(socket, method, self.plan, asked, deadline_s=120))

    def as_other(self, name: str, mine: Envelope) -> Envelope:
        """My update, said to be another site's, signed with the only signing key I have."""
        payload = SiteUpdate.from_bytes(mine.payload).model_copy(update={"site": name}).to_bytes()
        said = {"site": name, "payload_sha256": payload_sha256(payload)}
        statement = Statement.parse(mine.statement).model_copy(update=said).text()
        return Envelope(payload=payload, statement=statement, signature=sign(statement, self.key))


def as_reply_of(node: int, to: str, asked: Message, content: RecordDict) -> Message:
    """A message that says it comes from `node` and answers the message `to`."""
    metadata = Metadata(
        run_id=asked.metadata.run_id,
        message_id="",
        src_node_id=node,
        dst_node_id=asked.metadata.src_node_id,
        reply_to_message_id=to,
        group_id=asked.metadata.group_id,
        created_at=time.time(),
        ttl=60.0,
        message_type=asked.metadata.message_type,
    )
    return make_message(metadata=metadata, content=content)


def open_questions(deployment: Federated, node: int) -> list[str]:
    """Ids of the training questions to a node that nobody has answered: what an attacker finds by trying."""
    database = sqlite3.connect(f"file:{deployment.fed / 'state' / 'superlink.db'}?mode=ro", uri=True)
    try:
        signed = node - (1 << 64) if node >= 1 << 63 else node
        query = "SELECT message_id FROM message_ins WHERE dst_node_id = ? AND message_type = 'train'"
        query += " AND message_id NOT IN (SELECT reply_to_message_id FROM message_res)"
        return [str(row[0]) for row in database.execute(query, (signed,))]
    finally:
        database.close()


@pytest.fixture(scope="module")
def hostile(deployment: Federated, faulty: list[dict[str, Any]]) -> Iterator[HostileNode]:
    """hospital-c's node is the attacker's; its agent is real, and answers it."""
    deployment.stop_site(C)
    deployment.start_site(C, only="agent")
    wait_until(
        lambda: agent_health(deployment.site(C) / "run" / "agent.sock"), 60, "the agent", deployment.tails
    )
    node = HostileNode(deployment, C)
    yield node
    node.close()


def test_f28_answers_in_the_name_of_another_site_are_never_counted(
    deployment: Federated, hostile: HostileNode
) -> None:
    """Round 1: answers another's question. Round 2: answers its own, and says inside that it is the other's
    answer to the other's question.

    Round 3: answers every question that the other is asked. The other's node is held up meanwhile, so that
    the attacker is always first.
    """
    plan = deployed_plan(name="impostor", federation={"deadline_s": 45})
    hostile.plan = with_noise(plan).canonical_json()
    victim = int(Federation.open(deployment.fed).site(A).node_id or 0)
    attacked = {number: threading.Event() for number in (1, 2, 3)}
    done: list[str] = []
    forged: list[Envelope] = []

    def hold(method: str, number: int) -> None:
        envelope = Envelope.from_bytes(deployment.relays[A].seen[-1][2])
        if method == "Train":
            attacked[Statement.parse(envelope.statement).round].wait(60)

    def behave(message: Message) -> None:
        mine = hostile.honest(message)
        answer = Message(mine.to_record(), reply_to=message)
        if message.metadata.message_type != "train":
            hostile.push(answer)
            return
        number = SiteUpdate.from_bytes(mine.payload).round
        forged.append(false := hostile.as_other(A, mine))
        for _ in range(2 if number == 3 else 1):
            (to,) = wait_until(lambda: open_questions(deployment, victim), 30, "the victim's question")
            inner = as_reply_of(victim, to, message, false.to_record())
            if number == 2:
                outside = {"src_node_id": hostile.id, "reply_to_message_id": message.metadata.message_id}
                accepted = hostile.push(inner, envelope=outside)
                done.append(f"round {number}: answered its own question as {A}; Flower took it: {accepted}")
            else:
                accepted = hostile.push(inner)
                done.append(f"round {number}: answered {A}'s question; Flower took it: {accepted}")
        attacked[number].set()
        if number != 2:
            hostile.push(answer)

    deployment.relays[A].first = hold
    try:
        with hostile.running(behave):
            deployment.run_start(plan, "impostor", status=6)
    finally:
        for event in attacked.values():
            event.set()
        deployment.relays[A].first = lambda method, number: None
    assert hostile.errors == []
    records = deployment.records("impostor")
    print("F28:", *done, sep="\n  ")
    for record in records:
        print(f"  round {record['round']}: answered {record['answered']}, failed {record['failed']}")
    assert all("took it: True" in line for line in done), "the transport lets all of it pass"
    assert len(done) == 4
    assert [record["answered"] for record in records] == [[A, B, C], [A, B], [B, C]]
    assert records[0]["failed"] == {}
    assert set(records[1]["failed"]) == {C}, "the attacker's own question stays without an answer"
    assert records[2]["failed"] == {A: "bad-signature"}
    print("F28 the report says:", deployment.evaluation("impostor")["incomplete"])
    assert any(
        A in line and "bad-signature" in line for line in deployment.evaluation("impostor")["incomplete"]
    )
    # the control: without the seal the forged answer would have been hospital-a's update
    question = Question(payload=b"", statement=Statement.parse(forged[0].statement))
    payload = Seal.none(with_noise(plan)).open(forged[0], question)
    update = SiteUpdate.from_bytes(payload)
    assert update.site == A
    with pytest.raises(RunError, match="key on file"):
        Seal(
            plan_sha256=with_noise(plan).sha256(),
            key=deployment.hospital(A).coordinator,
            sites=site_keys(Federation.open(deployment.fed)),
        ).open(forged[0], question)


@pytest.mark.parametrize("way", ["garbage", "withhold"])
def test_f28_a_node_that_hands_in_what_is_no_message_costs_itself_the_round(
    way: str, deployment: Federated, hostile: HostileNode
) -> None:
    plan = deployed_plan(name=f"spoiler-{way}", training={"rounds": 2}, federation={"deadline_s": 45})
    hostile.plan = with_noise(plan).canonical_json()

    def behave(message: Message) -> None:
        if message.metadata.message_type != "train":
            hostile.push(Message(hostile.honest(message).to_record(), reply_to=message))
        elif way == "garbage":
            assert hostile.push_garbage(message)
        else:
            assert hostile.push(Message(hostile.honest(message).to_record(), reply_to=message), withhold=True)

    with hostile.running(behave):
        deployment.run_start(plan, f"spoiler-{way}", status=6, limit_s=280)
    records = deployment.records(f"spoiler-{way}")
    for record in records:
        print(
            f"F28 {way}, round {record['round']}: answered {record['answered']}, failed "
            f"{record['failed']}, {record['round_seconds']} s"
        )
    assert hostile.errors == []
    assert [record["answered"] for record in records] == [[A, B], [A, B]]
    assert all(set(record["failed"]) == {C} for record in records)


# ---- F24: another app


EVIL_SERVER = """
import json
import time
from flwr.app import Message
from flwr.serverapp import ServerApp
from common.wire import DescribeTask, Envelope, Refusal, type_of

app = ServerApp()

@app.main()
def main(grid, context):
    until = time.monotonic() + 60
    number = int(context.run_config["nodes"])
    while len(nodes := list(grid.get_node_ids())) < number and time.monotonic() < until:
        time.sleep(0.2)
    found = {}
    for kind in ("query.describe", "train", "evaluate"):
        question = Envelope(payload=DescribeTask().to_bytes()).to_record()
        messages = [Message(question, dst_node_id=node, message_type=kind) for node in nodes]
        for reply in grid.send_and_receive(messages, timeout=60):
            node = str(reply.metadata.src_node_id)
            if reply.has_error():
                found[f"{kind} {node}"] = f"error {reply.error.code}"
                continue
            try:
                payload = Envelope.from_record(reply.content).payload
                found[f"{kind} {node}"] = Refusal.from_bytes(payload).code
            except Exception as error:
                found[f"{kind} {node}"] = type(error).__name__
    with open(context.run_config["out"], "w") as file:
        json.dump(found, file)
"""
EVIL_CLIENT = """
from pathlib import Path
Path({marker!r}).touch()  # what no hospital must ever run
from flwr.app import Message
from flwr.clientapp import ClientApp
app = ClientApp()

@app.train()
@app.evaluate()
@app.query("describe")
def answer(message, context):
    Path({marker!r}).write_text(repr(dict(context.node_config)))
    return Message(message.content, reply_to=message)
"""
EVIL_PROJECT = """
[project]
name = "fedqc"
version = "0.1.0"
dependencies = []
[tool.flwr.app]
publisher = "fedqc"
[tool.flwr.app.components]
serverapp = "evil.server:app"
clientapp = "evil.client:app"
[tool.flwr.app.config]
plan = ""
out = ""
nodes = 1
"""


@pytest.fixture(scope="module")
def evil(deployment: Deployment) -> tuple[Path, Path]:
    """An app that calls itself fedqc, and the file that its client side leaves behind wherever it runs."""
    app, marker = deployment.folder / "evil-app", deployment.folder / "ran-on-a-hospital"
    (app / "evil").mkdir(parents=True)
    (app / "evil" / "__init__.py").touch()
    (app / "evil" / "server.py").write_text(EVIL_SERVER)
    (app / "evil" / "client.py").write_text(EVIL_CLIENT.format(marker=str(marker)))
    (app / "pyproject.toml").write_text(EVIL_PROJECT)
    return app, marker


def submit(deployment: Federated, app: Path, nodes: int) -> dict[str, str]:
    """`flwr run` as somebody on the coordinator's machine could; what each node answered to each kind of
    question.
    """
    out = deployment.folder / f"evil-{time.monotonic_ns()}.json"
    config = f'out="{out}" nodes={nodes}'
    words = ("run", app, "fedqc", "--run-config", config, "--format", "json")
    said = deployment.call(
        *words, program=FEDQC.with_name("flwr"), env=environment(Federation.open(deployment.fed))
    )
    assert said.returncode == 0, deployment.told(said)
    wait_until(out.exists, 200, "the app's answers", deployment.tails)
    time.sleep(0.2)
    return cast(dict[str, str], json.loads(out.read_text()))


def test_f24_another_app_is_answered_wrong_bundle_and_nothing_of_it_runs_at_a_hospital(
    deployment: Federated, hostile: HostileNode, evil: tuple[Path, Path]
) -> None:
    app, marker = evil
    hostile.close()
    found = submit(deployment, app, nodes=2)
    print("F24:", *(f"{name}: {code}" for name, code in sorted(found.items())), sep="\n  ")
    ids = {Federation.open(deployment.fed).site(name).node_id for name in (A, B)}
    asked = {(kind, str(node)) for kind in ("query.describe", "train", "evaluate") for node in ids}
    assert all(found.get(f"{kind} {node}") == "wrong-bundle" for kind, node in asked), found
    assert not marker.exists()
    (line,) = {
        line.partition("fedqc.node ")[2]
        for line in (deployment.site(A) / "node" / "node.log").read_text().splitlines()
        if "wrong-bundle" in line
    }
    print("F24 the node's log:", line)
    assert deployment.run_check(deployed_plan(name="after-evil"))["sites"][A]["answer"] == "accept", (
        "the pinned app is still served"
    )


def test_f24_control_flower_s_own_executor_runs_what_it_is_sent(
    deployment: Federated, hostile: HostileNode, evil: tuple[Path, Path]
) -> None:
    app, marker = evil
    marker.unlink(missing_ok=True)
    node = deployment.site(C) / "node"
    words = [
        "--superlink",
        deployment.address,
        "--root-certificates",
        node / "ca.crt",
        "--auth-supernode-private-key",
        node / "node.key",
    ]
    words += [
        "--port",
        free_port(),
        "--node-config",
        f'agent-socket="{deployment.site(C) / "run" / "agent.sock"}"',
    ]
    prefix = [
        "env",
        f"FLWR_HOME={deployment.folder / 'flower-home'}",
        f"PATH={FEDQC.parent}:{os.environ['PATH']}",
    ]
    process = deployment.background(
        "plain-flower", words, program=FEDQC.with_name("flower-supernode"), prefix=prefix
    )
    try:
        wait_until(
            lambda: "SuperNode ID" in deployment.log("plain-flower") or process.poll() is not None,
            90,
            "a plain node",
            deployment.tails,
        )
        found = submit(deployment, app, nodes=3)
    finally:
        process.terminate()
        process.wait(30)
    assert marker.exists(), (found, deployment.log("plain-flower")[-3000:])
    print("F24 control: run by Flower's own executor, and told:", marker.read_text()[:120])
    assert set(found.values()) >= {"wrong-bundle"}, "the others still refuse"


# ---- F13: the clock of a node


@pytest.mark.parametrize(
    ("ahead_s", "status"), [(0, 200), (3, 200), (-290, 200), (7, 401), (3600, 401), (-310, 401)]
)
def test_f13_a_signature_of_another_time_is_refused(ahead_s: int, status: int, deployment: Federated) -> None:
    with fleet(deployment, node_key(deployment.site(A)), ahead_s) as client:
        node = Node(node_id=int(Federation.open(deployment.fed).site(A).node_id or 0))
        found = refused_with(
            lambda: client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=30))
        )
    print(f"F13 a call signed {ahead_s:+d} s from now: {found}")
    assert found == status


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize(("ahead_s", "runs"), [(2, True), (8, False), (3600, False), (-600, False)])
def test_f13_what_happens_to_a_node_with_a_wrong_clock_is_said_in_one_line(
    ahead_s: int, runs: bool, deployment: Federated, hostile: HostileNode
) -> None:
    site = deployment.site(C)
    clock = ["env", f"LD_PRELOAD={FAKETIME}", f"FAKETIME={ahead_s:+d}"]
    status, said, took = deployment.node_alone(site, prefix=clock, wall=False)
    print(f"F13 clock {ahead_s:+d} s: status {status} after {took:.1f} s: {said}")
    if runs:
        assert (status, said) == (None, "node: connected")
        return
    assert status == 3
    assert said.startswith("node: [not-authenticated]")
    assert "clock" in said
    checked = deployment.call(*clock[1:], FEDQC, "site", "check", "--site", site, program="env")
    found = " ".join(checked.stdout.split())  # rows wrap at 80 columns
    print(f"F13 site check: {found[found.index('FAIL clock') :][:120]}")
    assert "FAIL clock" in found
    assert "Flower allows -305 to +5 s" in found


# ---- F11: a wrong server in front of a running node's program


def test_f11_a_node_that_meets_a_wrong_server_ends_at_once_and_says_which(
    deployment: Federated, hostile: HostileNode
) -> None:
    site = deployment.site(C)
    for what, (code, server) in wrong_servers(deployment).items():
        with at_the_address_of(site, server):
            status, said, took = deployment.node_alone(site)
        print(f"F11 {what}: status {status} after {took:.1f} s, {server.knocks} connections: {said}")
        assert status == 3
        assert f"[{code}]" in said or (code == "wrong-authority" and "[bad-certificate]" in said)
        assert server.knocks <= 2, "no storm of retries"


# ---- F10: revoked in the middle of a run; last, because it is for good


def test_f10_a_site_that_is_revoked_is_out_from_the_next_round(
    deployment: Federated, hostile: HostileNode
) -> None:
    plan = deployed_plan(
        name="revoked", training={"rounds": 4}, federation={"quorum": 1, "deadline_s": 120, "patience_s": 30}
    )
    deployment.run_start(plan, "revoked", "--accept-missing", "--wait", 15, "--detach")

    def rounds() -> int:
        return (
            len(deployment.records("revoked")) if (deployment.run("revoked") / "rounds.jsonl").exists() else 0
        )

    wait_until(rounds, 90, "the first round", deployment.tails)
    keys, kept = EnrolledKeys(Federation.open(deployment.fed)), site_keys(Federation.open(deployment.fed))
    assert B in keys
    with frozen(deployment.pid(A, "agent"), deployment.pid(B, "agent")):
        seen = rounds()
        said = deployment.do("federation", "revoke", B, "--yes", "--federation", deployment.fed)
        print("F10", said.stdout.strip())
        assert B not in keys, "to a run under way an answer of this site is nobody's from now on"
        assert B in kept, "the control: keys read once would still count it"
        wait_until(
            lambda: f"{B}: its node was removed" in deployment.log("federation"),
            60,
            "removed",
            deployment.tails,
        )
    watched = deployment.call("run", "watch", "revoked", "--federation", deployment.fed, limit_s=200)
    assert watched.returncode == 6, deployment.told(watched)
    records = deployment.records("revoked")
    for record in records:
        print(
            f"F10 round {record['round']}: answered {record['answered']}, failed {record['failed']}, "
            f"{record['round_seconds']} s"
        )
    print("F10 the report says:", deployment.evaluation("revoked")["incomplete"])
    assert records[0]["answered"] == [A, B]
    assert all(record["answered"] == [A] and set(record["failed"]) == {B} for record in records[seen:]), (
        "from the round it was revoked in"
    )
    assert deployment.evaluation("revoked")["status"] == "partial"
    (row,) = (
        row
        for row in deployment.json("federation", "sites", "--federation", deployment.fed)
        if row["site"] == B
    )
    print(f"F10 federation sites: {row['site']} {row['status']} {row['connection']}")
    assert (row["status"], row["connection"]) == ("revoked", "unregistered")
    wait_until(lambda: not state_of(deployment.site(B))["node"], 60, "the node is out", deployment.tails)
    print("F10 the site's operator:", *deployment.log(B).splitlines()[-6:], sep="\n  ")
    # the control: a rehearsal has the other site, and not this one
    check = deployment.run_check(deployed_plan(name="after-revoked", federation={"quorum": 1}))
    assert check["sites"][A]["takes_part"]
    assert B not in check["sites"] or not check["sites"][B]["takes_part"]
