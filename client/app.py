"""The Flower door of a hospital: decode, ask the agent, forward. Loads no torch and sees no data.

In a deployment the agent is another process behind a unix socket (`agent-socket` in the node config); in a
simulation it is a few function calls away (`site-config`). Whatever goes wrong, what leaves is a `Refusal`:
Flower would otherwise send the text of the exception.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.errors import NetworkError
from common.wire import Envelope, Refusal

app = ClientApp()
log = logging.getLogger("fedqc.client")


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    return _reply("Describe", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _reply("Train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _reply("Evaluate", message, context)


def _reply(method: str, message: Message, context: Context) -> Message:
    try:
        answer = _ask(method, Envelope.from_record(message.content), context)
    except NetworkError as failure:  # between the two processes of this hospital
        log.warning("%s: %s", failure.code, failure)
        answer = _refusal(failure.code, "the node could not reach the site's agent")
    except Exception:
        log.exception("the site could not answer")  # of this process, on the hospital's side
        answer = _refusal(
            "site-failure", "the site could not answer; its operator finds the cause in the node's log"
        )
    return Message(content=answer.to_record(), reply_to=message)


def _ask(method: str, envelope: Envelope, context: Context) -> Envelope:
    plan = str(context.run_config["plan"])
    socket = context.node_config.get("agent-socket")
    if socket:
        from client.ipc.client import ask_agent

        deadline_s = float(json.loads(plan)["federation"]["deadline_s"])
        return Envelope.from_bytes(
            ask_agent(Path(str(socket)), method, plan, envelope.to_bytes(), deadline_s=deadline_s)
        )
    from client.agent.verification import guard_for

    return Envelope.from_bytes(
        guard_for(str(context.node_config["site-config"])).answer(method, plan, envelope.to_bytes())
    )


def _refusal(code: str, reason: str) -> Envelope:
    """Unsigned: this process has no key of the site. The coordinator takes it for a failure, never for a
    decision.
    """
    return Envelope(payload=Refusal(code=code, reason=reason).to_bytes())
