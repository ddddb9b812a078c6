"""The Flower door of a hospital: decode, ask the agent, forward. Loads no torch and sees no data.

Whatever goes wrong behind it, what leaves is a `Refusal`: Flower would otherwise send the text of the exception.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.wire import EvaluateTask, Refusal, TrainTask, WireMessage

if TYPE_CHECKING:
    from client.agent import Agent

app = ClientApp()
log = logging.getLogger("fedqc.client")


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    return _reply(message, lambda: _agent(context).describe())


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply(message, lambda: _agent(context).train(TrainTask.from_record(message.content)))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _reply(message, lambda: _agent(context).evaluate(EvaluateTask.from_record(message.content)))


def _agent(context: Context) -> Agent:
    from client.agent import agent_for

    return agent_for(str(context.node_config["site-config"]), str(context.run_config["plan"]))


def _reply(message: Message, ask: Callable[[], WireMessage]) -> Message:
    try:
        answer = ask()
    except Exception:
        log.exception("the site could not answer")  # of this process, on the hospital's side
        answer = Refusal(code="site-failure", reason="the site could not answer; its operator finds the cause in the node's log")
    return Message(content=answer.to_record(), reply_to=message)
