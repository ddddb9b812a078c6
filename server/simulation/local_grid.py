"""A Flower grid in one process: the ServerApp and ClientApp of a deployment, without sockets, Ray or threads.

The private names of Flower that a simulation needs are imported here (those of a node: client/node/);
tests/server/simulation/test_local_grid.py fails when one of them moves. There is no wire and no process
boundary. A job runs in the caller's thread when its answer is pulled, one site after another, so results do
not depend on timing and Ctrl-C stops at once.
"""

from __future__ import annotations

import copy
import importlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

ClientApp = Callable[[Message, Context], Message]
"""A Flower ClientApp, or a function like one."""

NODE_UNAVAILABLE = 5
APP_RAISED = 2


class LocalGrid(Grid):
    """Deliver messages to one ClientApp, which answers for all nodes in turn.

    Args:
        app: the ClientApp.
        sites: node id -> node config (`site-config`: absolute path).
        run_config: `plan` and `run-dir`, as Flower would pass them.
    `down` may be filled with node ids that answer with Flower's error 5, as a lost SuperNode does.
    """

    def __init__(
        self,
        app: ClientApp,
        sites: Mapping[int, Mapping[str, str]],
        run_config: Mapping[str, str],
        *,
        run_id: int = 1,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 1, 1
        self._run = Run.create_empty(run_id)
        self._app = app
        self._contexts = {
            node: Context(run_id, node, dict(config), RecordDict(), dict(run_config))
            for node, config in sites.items()
        }
        self._waiting: dict[str, Message] = {}
        self.down: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left behind."""

    def cpu_seconds(self) -> float:
        """What processes of the grid have used, beside this one."""
        return 0.0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return [node for node in self._contexts if node not in self.down]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            # Flower hands one RecordDict to every site; a real wire copies
            message.content = _isolated(message.content)
            ids.append(stamp(message))
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the first waiting job among `message_ids` and return its answer alone, so that the caller sees
        progress.
        """
        for message_id in message_ids:
            if message_id in self._waiting:
                return [self.deliver(self._waiting.pop(message_id))]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        ids = self.push_messages(messages)
        return [self.deliver(self._waiting.pop(message_id)) for message_id in ids]

    def deliver(self, message: Message) -> Message:
        """The answer to a message, now."""
        node = message.metadata.dst_node_id
        if node in self.down:
            answer = Message(Error(NODE_UNAVAILABLE, "Node unavailable"), reply_to=message)
        else:
            try:
                answer = self._app(message, self._contexts[node])
            except Exception as error:
                answer = Message(Error(APP_RAISED, f"{type(error)}:<'{error}'>"), reply_to=message)
        stamp(answer)
        return answer


def _isolated(content: RecordDict) -> RecordDict:
    copied: dict[str, Any] = {
        key: ArrayRecord(dict(record)) if isinstance(record, ArrayRecord) else copy.deepcopy(record)
        for key, record in content.items()
    }
    return RecordDict(copied)


def named(reference: str) -> Any:
    """An object by "module:name". A simulation plays both sides, and is the only place where the server names
    the client.
    """
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def stamp(message: Message) -> str:
    """Give a message the number by which its answer is known."""
    message.metadata.__dict__["_message_id"] = message_id = uuid.uuid4().hex
    return message_id
