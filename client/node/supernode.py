"""Run Flower's SuperNode with shorter polling intervals, answers in order, and retries that outlast a bad
network; it ends when the node ends.

Flower 1.41 polls for a message every 3 s and for its answer every 0.5 s, both fixed: most of the time of a
short round. The main loop's only `time.sleep`s are replaced. An interval is a share of the time waited so
far, so it adds little to any wait, and is never longer than Flower's: polling for the answer is a local
query, polling the coordinator a signed request.

Takes the arguments of `flower-supernode`.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import flwr.supernode.start_client_internal as main_loop
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode

from common.processes import die_with_parent, keep_memory_private
from common.retries import keep_trying
from common.wire import PULLING

IDLE_S, ANSWER_S = 3, 0.5
"""What Flower asks to sleep: no message; no answer yet. Other lengths are slept as they are."""
MIN_NAP_S, SHARE = 0.2, 1 / 20
ANSWER_NAP_S, ANSWER_SHARE = 0.02, 1 / 100


class Naps:
    """Stands in for the module `time` in Flower's main loop."""

    def __init__(self) -> None:
        self._last_message = time.monotonic()
        self._answer_since: float | None = None  # when the present message began to be worked on

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(self.length(seconds))

    def length(self, seconds: float) -> float:
        """How long to sleep where Flower wants `seconds`."""
        now = time.monotonic()
        if seconds == ANSWER_S:  # there is a message
            self._last_message = now
            self._answer_since = self._answer_since or now
            return min(max((now - self._answer_since) * ANSWER_SHARE, ANSWER_NAP_S), ANSWER_S)
        if seconds == IDLE_S:
            self._answer_since = None
            return min(max((now - self._last_message) * SHARE, MIN_NAP_S), IDLE_S)
        return seconds


class Turns:
    """Sees to it that a message's own answer is handed in before the next message is asked for.

    Flower hands in whatever answer there is and goes on. Of a task that came to nothing (its run ended in the
    middle of the message) Flower itself makes an error answer, a minute later; handed in with the next
    message, it would leave that one's answer lying until another message comes, and so on for ever.
    """

    def __init__(self, pull: Callable[..., int | None], push: Callable[..., None]) -> None:
        """Args: Flower's `_pull_and_store_message` and `_push_messages`."""
        self._pull, self._push = pull, push
        self._asked = ""

    def pull(self, *, receive: Callable[[], Any], **others: Any) -> int | None:
        def noted() -> Any:
            found = receive()
            if found is not None:
                self._asked = found[0].metadata.message_id
            return found

        return self._pull(receive=noted, **others)

    def push(self, *, send: Callable[..., Any], **others: Any) -> None:
        answered: set[str] = set()

        def noted(message: Message, *rest: Any) -> Any:
            answered.add(message.metadata.reply_to_message_id)
            return send(message, *rest)

        while self._asked not in answered:
            self._push(send=noted, **others)


def patient_retries() -> RetryInvoker:
    """Flower's, and a network that breaks within TLS loses no answer."""
    retries = make_simple_http_retry_invoker()
    keep_trying(retries)
    return retries


def adapt() -> None:
    """Replace what of Flower's SuperNode is done otherwise here."""
    vars(main_loop)["time"] = Naps()
    turns = Turns(main_loop._pull_and_store_message, main_loop._push_messages)
    vars(main_loop).update(_pull_and_store_message=turns.pull, _push_messages=turns.push)
    vars(main_loop)["pull_objects"] = functools.partial(pull_objects, **PULLING)
    vars(fleet_http_connection)["make_simple_http_retry_invoker"] = patient_retries


def main(parent: int) -> None:
    """Run a SuperNode until the process `parent` or Flower's main loop ends; does not return."""
    die_with_parent()
    if os.getppid() != parent:
        sys.exit("the node that started this SuperNode has ended")
    keep_memory_private()
    adapt()
    status = 1
    try:
        flower_supernode()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # Flower's threads outlive its main loop and would keep a process that is not connected
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv.pop(1)))
