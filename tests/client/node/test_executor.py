"""The node's loop against Flower's own Runtime API (a SuperNode without its SuperLink), and the private names
that it needs.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid
from flwr.supernode import start_client_internal
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client.node import executor, supernode
from client.node.executor import serve
from common.errors import NetworkError
from common.wire import PULLING, Refusal
from tests.helpers.ports import free_port

SECRET = b"s" * 48
BUNDLE = b"the app that this site joined with"
PINNED = hashlib.sha256(BUNDLE).hexdigest()
NODE, RUN = 77, 5


class Node:
    """What a SuperNode keeps in memory, and its Runtime API on the loopback."""

    def __init__(self, port: int, *, bundle: bytes = BUNDLE) -> None:
        self.objects = ObjectStoreFactory()
        self.states = NodeStateFactory(objectstore_factory=self.objects)
        self.state: Any = self.states.state()
        self.state.set_node_id(NODE)
        run = Run.create_empty(RUN)
        run.fab_hash, run.series_id = hashlib.sha256(bundle).hexdigest(), 9
        self.state.store_run(run)
        self.state.store_fab(Fab(run.fab_hash, bundle, {}))
        self.state.set_run_series_context(
            9, Context(RUN, NODE, {"agent-socket": "/s"}, RecordDict(), {"plan": "{}"}, series_id=9)
        )
        self.tasks: list[int] = []
        app = create_app(self.states, superexec_auth_secret=SECRET)
        self.server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))

    def put(self, text: str, *, whole: bool = True) -> None:
        """As the SuperNode does with a message that has come: it is stored, then a task is made for it.

        Args:
            whole: whether the content of the message has come too.
        """
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, 1, 1
        message = Message(
            RecordDict({"q": ConfigRecord({"text": text, "drawn": time.time_ns()})}),
            dst_node_id=NODE,
            message_type="train",
        )
        message.metadata.__dict__["_message_id"] = message.object_id
        store = self.objects.store()
        store.preregister(RUN, get_object_tree(message))
        for name, part in get_all_nested_objects(message).items() if whole else ():
            store.put(name, part.deflate())
        self.state.store_message(remove_content_from_message(message))
        task = self.state.create_task(
            task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash=self.state.get_run(RUN).fab_hash
        )
        self.tasks.append(task)

    def reply(self) -> RecordDict:
        """The content of the answer, once all of it has come."""
        found: list[Message] = []
        until(lambda: bool(found.extend(self.state.get_messages_legacy(is_reply=True)) or found))  # type: ignore[func-returns-value]
        (message,) = found
        store = self.objects.store()
        tree = store.get_object_tree(message.metadata.message_id)
        names = [part.object_id for part in start_client_internal.iterate_object_tree(tree)]
        until(lambda: all(store.get(name) for name in names))
        whole = inflate_object_from_contents(
            message.metadata.message_id,
            {name: store.get(name) for name in names},  # type: ignore[misc]
        )
        assert isinstance(whole, Message)
        assert not whole.has_error()
        return whole.content


def until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


@contextmanager
def node(port: int, **settings: Any) -> Iterator[Node]:
    found = Node(port, **settings)
    thread = threading.Thread(target=found.server.run, daemon=True)
    thread.start()
    until(lambda: found.server.started)
    try:
        yield found
    finally:
        found.server.should_exit = True
        thread.join(30)


@contextmanager
def serving(
    port: int, app: Any, *, secret: bytes = SECRET, pinned: str = PINNED
) -> Iterator[threading.Thread]:
    stop = threading.Event()
    arguments = {"stop": stop, "poll_s": 0.02, "app": app}
    thread = threading.Thread(
        target=serve, args=(f"127.0.0.1:{port}", secret, pinned), kwargs=arguments, daemon=True
    )
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def echo(message: Message, context: Context) -> Message:
    context.state["seen"] = ConfigRecord({"count": int(_count(context)) + 1})
    text = f"{message.content['q']['text']} for {context.node_config['agent-socket']}, {_count(context)}"  # type: ignore[str-bytes-safe]
    return Message(RecordDict({"a": ConfigRecord({"text": text})}), reply_to=message)


def _count(context: Context) -> int:
    return int(context.state["seen"]["count"]) if "seen" in context.state else 0  # type: ignore[arg-type]


def test_each_message_is_answered_by_the_same_process() -> None:
    port = free_port()
    with node(port) as found, serving(port, echo):
        for number in (1, 2, 3):
            found.put(f"question {number}")
            assert found.reply()["a"]["text"] == f"question {number} for /s, {number}"
            until(
                lambda: found.state.get_tasks(task_ids=[found.tasks[-1]])[0].status.status == Status.FINISHED
            )
        assert {task.status.sub_status for task in found.state.get_tasks()} == {SubStatus.COMPLETED}


def test_another_bundle_is_refused_and_nothing_runs() -> None:
    port, ran = free_port(), threading.Event()
    with node(port, bundle=b"another app") as found, serving(port, lambda message, context: ran.set()):
        found.put("question")
        refusal = Refusal.from_record(found.reply())
    assert refusal.code == "wrong-bundle"
    assert not ran.is_set()


@pytest.mark.parametrize(
    "error", [ValueError("PATIENT-77 in /secret"), SystemExit("PATIENT-77"), RecursionError()]
)
def test_an_exception_leaves_as_one_code(error: BaseException) -> None:
    def app(message: Message, context: Context) -> Message:
        raise error

    port = free_port()
    with node(port) as found, serving(port, app):
        found.put("question")
        refusal = Refusal.from_record(found.reply())
        assert refusal.code == "site-failure"
        assert "PATIENT" not in refusal.model_dump_json()
        found.put("question")
        assert Refusal.from_record(found.reply()).code == "site-failure"


def test_a_supernode_that_is_not_up_yet_is_waited_for_and_one_that_restarts_too() -> None:
    port = free_port()
    with serving(port, echo):
        time.sleep(0.2)
        for name in ("first", "second"):
            with node(port) as found:
                found.put(name)
                assert found.reply()["a"]["text"] == f"{name} for /s, 1"


def test_without_the_secret_no_task_is_given_and_the_control_is() -> None:
    port = free_port()
    with node(port) as found:
        found.put("question")
        with serving(port, echo, secret=b"x" * 48) as thread:
            time.sleep(0.5)
            assert thread.is_alive()
            assert not found.state.get_messages_legacy(is_reply=True)
        with serving(port, echo):
            assert found.reply()["a"]["text"].startswith("question")


def test_a_task_that_was_taken_back_is_forgotten() -> None:
    port, begun, go = free_port(), threading.Event(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        begun.set()
        assert go.wait(60)
        return echo(message, context)

    with node(port) as found, serving(port, app) as thread:
        found.put("first")
        assert begun.wait(60)
        assert found.state.finish_task(found.tasks[0], SubStatus.STOPPED, "")  # the token is void from here
        go.set()
        found.put("second")
        assert found.reply()["a"]["text"].startswith("second")
        assert thread.is_alive()


def test_a_message_that_never_becomes_whole_holds_up_none_after_it() -> None:
    """Its sender was killed half way: Flower's SuperNode goes on with the next, and so must whoever was given
    the task.
    """
    port = free_port()
    with node(port) as found, serving(port, echo):
        found.put("first", whole=False)
        until(lambda: all(entry.is_retrieved for entry in found.state.msg_store.values()))
        found.put("second")
        assert found.reply()["a"]["text"].startswith("second")


def test_it_ends_while_the_agent_works() -> None:
    port, begun = free_port(), threading.Event()

    def app(message: Message, context: Context) -> Message:
        begun.set()
        threading.Event().wait(100)
        raise AssertionError

    with node(port) as found, serving(port, app):
        found.put("question")
        assert begun.wait(60)


def test_an_answer_taken_by_halves_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's SuperNode waits forever for the rest of such an answer: it must be started anew, and run_node
    does that.
    """
    port = free_port()
    with node(port) as found:
        monkeypatch.setattr(found.state, "store_object", lambda *arguments: False)
        found.put("question")
        with pytest.raises(NetworkError) as caught:
            serve(f"127.0.0.1:{port}", SECRET, PINNED, stop=threading.Event(), app=echo)
    assert caught.value.code == "task-lost"


def flower_names(module: Any) -> list[tuple[str, str]]:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    froms = [
        line
        for line in ast.walk(tree)
        if isinstance(line, ast.ImportFrom) and str(line.module).startswith("flwr")
    ]
    return [(str(line.module), alias.name) for line in froms for alias in line.names]


@pytest.mark.parametrize(("module", "name"), flower_names(executor) + flower_names(supernode))
def test_every_flower_name_it_needs_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"Flower moved {module}.{name}: see client/node/executor.py, client/node/supernode.py"
    )


def test_the_private_flower_names_are_these() -> None:
    """The list of what may break with the next Flower."""
    private = {(module, name) for module, name in flower_names(executor) if module != "flwr.app"}
    assert private == {
        ("flwr.common.constant", "SubStatus"),
        ("flwr.proto.runtime_pb2", "AcquireTaskRequest"),
        ("flwr.proto.runtime_pb2", "SendTaskHeartbeatRequest"),
        ("flwr.supercore.constant", "TaskType"),
        ("flwr.supercore.heartbeat", "HeartbeatSender"),
        ("flwr.supercore.inflatable.inflatable_utils", "ObjectPushError"),
        ("flwr.supercore.inflatable.inflatable_utils", "pull_and_inflate_object_from_tree"),
        ("flwr.supercore.interceptors", "RuntimeTokenHttpInterceptor"),
        ("flwr.supercore.interceptors", "SuperExecAuthHttpInterceptor"),
        ("flwr.supercore.protobuf.client", "ProtobufClientInterceptor"),
        ("flwr.supercore.runtime", "RuntimeHttpClient"),
    }
    assert flower_names(supernode) == [
        ("flwr.app", "Message"),
        ("flwr.supercore.inflatable.inflatable_utils", "pull_objects"),
        ("flwr.supercore.retry", "RetryInvoker"),
        ("flwr.supercore.retry", "make_simple_http_retry_invoker"),
        ("flwr.supernode", "fleet_http_connection"),
        ("flwr.supernode.cli", "flower_supernode"),
    ]
    calls = executor.runtime_calls
    assert all(callable(call) for call in (calls.pull_task_input, calls.push_message, calls.push_task_output))


def test_what_is_on_its_way_is_looked_for_sooner_than_flower_does() -> None:
    """Three of Flower's modules look again for an object that has not come; what they call is replaced, and
    takes these arguments.
    """
    for module, name in (
        (executor.runtime_calls, "pull_and_inflate_object_from_tree"),
        (start_client_internal, "pull_objects"),
    ):
        assert f"{name}(" in inspect.getsource(module)
    assert "pull_objects(" in inspect.getsource(http_grid)
    for call in (inflatable_utils.pull_and_inflate_object_from_tree, inflatable_utils.pull_objects):
        assert set(PULLING) <= set(inspect.signature(call).parameters)
    assert executor.runtime_calls.pull_and_inflate_object_from_tree.keywords == PULLING


def test_flower_naps_where_it_is_told_to_nap_shorter() -> None:
    """client/node/supernode.py replaces `time` in the main loop and recognizes two lengths."""
    loop = inspect.getsource(start_client_internal)
    assert start_client_internal.time is time
    calls = [
        line.strip() for line in loop.splitlines() if "time." in line and "#" not in line and ":" not in line
    ]
    assert {call for call in calls if "sleep" in call} == {"time.sleep(3)", "time.sleep(0.5)"}
    assert (supernode.IDLE_S, supernode.ANSWER_S) == (3, 0.5)


def test_naps_grow_with_the_silence() -> None:
    naps = supernode.Naps()
    assert naps.length(0.5) == supernode.ANSWER_NAP_S
    assert naps.length(3) == supernode.MIN_NAP_S
    naps._last_message -= 20
    assert naps.length(3) == pytest.approx(1, abs=0.2)
    naps._last_message -= 10_000
    assert naps.length(3) == 3
    assert naps.length(0.7) == 0.7
    assert naps.monotonic is time.monotonic


def test_a_message_is_answered_though_a_dead_one_s_error_is_handed_in_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With Flower's own functions on its own state; the control shows what happens without our turns."""

    def sent_after_one_message(pull: Callable[..., Any], push: Callable[..., Any]) -> list[str]:
        node = Node(0)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, 1, NODE
        store, sent = node.objects.store(), []

        def stored(text: str, *, answers: Message | None = None) -> Message:
            content = RecordDict({"q": ConfigRecord({"text": text})})
            message = (
                Message(content, reply_to=answers)
                if answers
                else Message(content, dst_node_id=NODE, message_type="train")
            )
            start_client_internal._insert_message(message, node.state, store)
            return message

        dead = stored("of a run that has ended")
        stored("the error answer that Flower made of it", answers=dead)
        asked = Message(
            RecordDict({"q": ConfigRecord({"text": "new"})}), dst_node_id=NODE, message_type="train"
        )
        asked.metadata.__dict__["_message_id"] = asked.object_id

        def nap(seconds: float) -> None:  # while the loop waits, the executor hands in the answer
            if "the answer" not in made:
                made.append("the answer")
                stored("the answer", answers=asked)

        made: list[str] = []
        monkeypatch.setattr(start_client_internal, "time", type("Clock", (), {"sleep": staticmethod(nap)}))
        pulled = pull(
            state=node.state,
            object_store=store,
            node_config={},
            receive=lambda: (remove_content_from_message(asked), get_object_tree(asked)),
            get_run=None,
            get_fab=None,
            pull_object=lambda run, name: get_all_nested_objects(asked)[name].deflate(),
            confirm_message_received=lambda run, name: None,
            trusted_entities=None,
        )
        assert pulled == RUN

        def send(message: Message, tree: Any, seconds: float) -> tuple[set[str], str]:
            sent.append("new" if message.metadata.reply_to_message_id == asked.object_id else "dead")
            return set(), "session"

        push(state=node.state, object_store=store, send=send, push_object=lambda *_: None)
        return sent

    ours = supernode.Turns(
        start_client_internal._pull_and_store_message, start_client_internal._push_messages
    )
    assert sent_after_one_message(ours.pull, ours.push) == ["dead", "new"]
    assert sent_after_one_message(
        start_client_internal._pull_and_store_message, start_client_internal._push_messages
    ) == ["dead"]


ENDED = """
import os, sys, threading, time
from client.node import supernode

def main_loop():
    threading.Thread(target=time.sleep, args=(120,)).start()
    {ends}

supernode.flower_supernode = main_loop
supernode.main(os.getppid())
"""


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("raise OSError('certificate has expired')", 1),
        ("sys.exit(0)", 0),
        ("sys.exit(303)", 303 % 256),
        ("return", 0),
    ],
)
def test_the_process_ends_with_flower_s_main_loop_whatever_threads_it_leaves(ends: str, status: int) -> None:
    """Where the coordinator's certificate ran out the loop ended and the process stayed, so that nobody
    started it again.
    """
    command = [sys.executable, "-c", ENDED.format(ends=ends)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == status
    assert ("certificate has expired" in said.stderr) == ("OSError" in ends)
