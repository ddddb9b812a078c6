"""Call the agent from the node: three calls over the unix socket (see client/agent/server.py); its health.

Loads no torch. Error messages stay between the two processes of one hospital; only their codes may leave it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from client.ipc.protocol import BUSY, MAX_BYTES, METHODS, SERVICE, STOPPING
from common.errors import NetworkError


def ask_agent(
    socket: Path,
    method: str,
    plan_json: str,
    envelope: bytes,
    *,
    deadline_s: float,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> bytes:
    """Ask the agent, wait for its answer.

    Args:
        socket: the agent's, absolute.
        method: "Describe", "Train" or "Evaluate".
        plan_json: the run's plan, canonical JSON.
        envelope: `Envelope.to_bytes()` of a task.
        deadline_s: after it the agent stops at its next step, and this call fails.
        on_progress: called with (stage, done, total).
    Returns:
        the bytes of the answer's envelope.
    Raises:
        NetworkError: `agent-unreachable` (not running, its socket closed to this user, or it ended during the
            work), `agent-busy` (it works on another job, or finishes its last one), `agent-deadline`,
            `agent-failed` (any other error: see its site.log).
    """
    plan = plan_json.encode()
    request = b"".join((struct.pack("<I", len(plan)), plan, envelope))
    if method not in METHODS or len(request) > MAX_BYTES:
        raise NetworkError(
            f"{method}, {len(request)} bytes: not a valid request to the agent", code="agent-failed"
        )
    with _channel(socket) as channel:
        call = channel.unary_stream(f"/{SERVICE}/{method}")
        try:
            for frame in call(request, timeout=deadline_s):
                if frame[:1] == b"A":
                    return bytes(frame[1:])
                if on_progress is not None:
                    stage, done, total = json.loads(frame[1:])
                    on_progress(str(stage), int(done), int(total))
        except grpc.RpcError as error:
            raise _network_error(socket, error.code(), error.details() or "", deadline_s) from None
    raise NetworkError(
        f"{socket}: the agent ended the call without an answer",
        code="agent-failed",
        hint="see state/site.log",
    )


def agent_health(socket: Path, timeout_s: float = 2.0) -> bool:
    """Whether an agent serves this socket."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with _channel(socket) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def _channel(socket: Path) -> Iterator[grpc.Channel]:
    options = [
        ("grpc.max_receive_message_length", MAX_BYTES),
        ("grpc.max_send_message_length", MAX_BYTES),
        ("grpc.use_local_subchannel_pool", 1),  # or an earlier failure would keep a new call waiting
        ("grpc.enable_http_proxy", 0),
    ]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        yield channel


def _network_error(socket: Path, status: grpc.StatusCode, details: str, deadline_s: float) -> NetworkError:
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and details in (BUSY, STOPPING):
        why = "works on another job" if details == BUSY else "is about to stop"
        return NetworkError(f"{socket}: the agent {why}", code="agent-busy", hint="try again later")
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        hint = "the plan's deadline_s is too short for this site"
        return NetworkError(
            f"{socket}: no answer within {deadline_s:.0f} s", code="agent-deadline", hint=hint
        )
    if status is grpc.StatusCode.UNAVAILABLE:
        hint = "start it: fedqc site start"
        if socket.exists() and not os.access(socket, os.W_OK):
            hint = "this user may not use the socket: node and agent must share the group of run/"
        return NetworkError(
            f"{socket}: no agent answers, or it ended during the work", code="agent-unreachable", hint=hint
        )
    return NetworkError(
        f"{socket}: the agent failed ({status.name.lower()})", code="agent-failed", hint="see state/site.log"
    )
