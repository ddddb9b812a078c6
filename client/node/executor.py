"""Run a node's tasks in place of Flower's executor: one process for all messages, only the installed code.

Flower starts a new process for every message, installs the bundle that the coordinator sent and runs it. Here
the bundle's hash is compared with the one pinned when the site joined, the bundle is discarded, and the
installed `client.app` answers. (Flower's persistent executors cannot do that: in 1.41
`flwr.supercore.superexec.executor` has them for Kubernetes pods only, and only for the task types agentapp,
model and connector; a ClientApp on local processes is always a new subprocess.)

The private names of Flower that the node needs are imported here and in client/node/supernode.py;
tests/client/node/test_executor.py notices when one moves. Flower's own retries are not used: on a refused
credential they send SIGINT to the process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import flwr.supernode.runtime.run_clientapp as runtime_calls
import httpx
from flwr.app import Context, Message
from flwr.common.constant import SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from common.errors import NetworkError
from common.wire import PULLING, Refusal

WRONG_BUNDLE, SITE_FAILURE = "wrong-bundle", "site-failure"
MAX_POLL_S = 1.0
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"

log = logging.getLogger("fedqc.node")

# A task is there before the SuperNode has all of its message.
vars(runtime_calls)["pull_and_inflate_object_from_tree"] = functools.partial(
    pull_and_inflate_object_from_tree, **PULLING
)

App = Callable[[Message, Context], Message]


def serve(
    runtime_address: str,
    secret: bytes,
    bundle_sha256: str,
    *,
    stop: threading.Event,
    poll_s: float = 0.1,
    app: App | None = None,
) -> None:
    """Answer the tasks of one SuperNode, one after the other, until `stop` is set.

    A SuperNode that is not up yet, or started anew, is waited for; a task that was taken back meanwhile is
    forgotten. So is one whose message never becomes whole, because the coordinator stopped in the middle of
    sending it: Flower would ask for the rest for an hour, but a SuperNode has one message at a time, and so
    another task says that the one before is void.

    Args:
        runtime_address: host:port of the SuperNode's Runtime API, plain HTTP on the loopback.
        secret: the content of the file given to it as --superexec-auth-secret-file.
        bundle_sha256: hash of the only Flower app that is served, lower-case hexadecimal.
        poll_s: between two questions for work; up to a second while there is none for long.
        app: answers a message; default the installed `client.app.app`.
    Raises:
        NetworkError: `task-lost`: an answer was handed in by halves, for which this SuperNode would wait
            forever. It must be started anew.
    """
    answer = app or _installed_app()
    signed = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({_ACQUIRE}))
    pause, silent = poll_s, False
    task: _Task | None = None
    with _client(runtime_address, [signed]) as queue:
        while not stop.is_set():
            if task is not None and (task.has_message.is_set() or not task.is_alive()):
                # whoever waits for the agent is left behind when the node must end
                while task.is_alive() and not stop.is_set():
                    task.join(0.2)
                if task.is_lost.is_set():
                    raise NetworkError(
                        "the SuperNode took an answer by halves",
                        code="task-lost",
                        hint="the node is restarted",
                    )
                task, pause = None, poll_s
                continue
            try:
                token = _acquire(queue)
                silent = False
            except (httpx.HTTPError, ValueError) as error:
                token = ""
                if not silent:  # once, not ten times a second
                    log.warning("the SuperNode gives no task: %s", _public(error))
                silent = True
            if not token:
                stop.wait(pause)
                pause = min(pause * 1.05, MAX_POLL_S)
                continue
            if task is not None:
                task.forget()
            task = _Task(runtime_address, token, bundle_sha256, answer)
            task.start()
            task.has_message.wait(pause := poll_s)


def _installed_app() -> App:
    from client.app import app

    return app


def _acquire(queue: RuntimeHttpClient) -> str:
    """The token of a task that is now ours, "" if there is none."""
    found = queue.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
    return str(found.token) if found.HasField("task") else ""


class _Task(threading.Thread):
    """One task, from its message to its answer. Where the answer cannot be handed in, Flower itself says so
    after a minute.
    """

    def __init__(self, runtime_address: str, token: str, bundle_sha256: str, app: App) -> None:
        super().__init__(name="task", daemon=True)
        self._runtime = _client(runtime_address, [RuntimeTokenHttpInterceptor(token)])
        self._bundle_sha256, self._app = bundle_sha256, app
        self._forget = lambda: None
        self.has_message = threading.Event()
        self.is_lost = threading.Event()  # the answer was taken by halves

    def run(self) -> None:
        try:
            with self._runtime as runtime, _heartbeat(runtime):
                self._forget = runtime.close
                message, context, _, bundle = runtime_calls.pull_task_input(runtime)
                self.has_message.set()
                reply = _reply(
                    message,
                    context,
                    hashlib.sha256(bundle.content).hexdigest() == self._bundle_sha256,
                    self._app,
                )
                runtime_calls.push_message(runtime, reply, context)
                runtime_calls.push_task_output(runtime, context, SubStatus.COMPLETED, "")
        except Exception as error:  # the task was taken back, the SuperNode is gone
            if isinstance(error, httpx.TimeoutException | ObjectPushError):
                self.is_lost.set()
            log.warning("a task could not be handed back: %s", _public(error))
            log.debug("details", exc_info=True)

    def forget(self) -> None:
        """Ask for the rest of the message no more."""
        self._forget()


def _reply(message: Message, context: Context, is_pinned: bool, app: App) -> Message:
    if not is_pinned:
        log.error(
            "%s: the coordinator's bundle is not the one this site joined with; nothing of it was run",
            WRONG_BUNDLE,
        )
        return _refusal(message, WRONG_BUNDLE, "the Flower app is not the one this site's kit names")
    try:
        return app(message, context)
    except BaseException:
        log.exception("the site could not answer")  # of this process, on the hospital's side
        return _refusal(
            message, SITE_FAILURE, "the site could not answer; its operator finds the cause in the node's log"
        )


def _refusal(message: Message, code: str, reason: str) -> Message:
    return Message(content=Refusal(code=code, reason=reason).to_record(), reply_to=message)


@contextmanager
def _client(address: str, interceptors: Sequence[ProtobufClientInterceptor]) -> Iterator[RuntimeHttpClient]:
    client = RuntimeHttpClient.from_server_address(
        address, insecure=True, root_certificates=None, interceptors=interceptors
    )
    try:
        yield client
    finally:
        client.close()


@contextmanager
def _heartbeat(runtime: RuntimeHttpClient) -> Iterator[None]:
    """Tells the SuperNode that the task is being worked on. That it has been taken back shows when the answer
    is handed in.
    """

    def beat() -> bool:
        with suppress(httpx.HTTPError, ValueError, RuntimeError):  # the last: the client was closed
            runtime.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def _public(error: Exception) -> str:
    """What may stand in a log: no token, no content."""
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return type(error).__name__
