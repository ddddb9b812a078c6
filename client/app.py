"""The ClientApp of a hospital: decode a message, ask the agent, forward its answer. Loads no torch, no data.

In a deployment the agent is another process behind a unix socket (`agent-socket` in the node config); in a
simulation it is called in this process (`site-config`). A failure leaves as a `Refusal`: Flower would
otherwise send the text of the exception.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.errors import NetworkError
from common.wire import Envelope, Refusal

app = ClientApp()
log = logging.getLogger("fedqc.client")


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    return answer(message, context, functools.partial(_ask, "Describe"))


@app.train()
def train(message: Message, context: Context) -> Message:
    return answer(message, context, functools.partial(_ask, "Train"))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return answer(message, context, functools.partial(_ask, "Evaluate"))


def answer(message: Message, context: Context, ask: Callable[[Envelope, Context], Envelope]) -> Message:
    """The answer of `ask` to a message; a refusal where it raises."""
    try:
        envelope = ask(Envelope.from_record(message.content), context)
    except NetworkError as failure:  # between the two processes of this hospital
        log.warning("%s: %s", failure.code, failure)
        envelope = _refusal(failure.code, "the node could not reach the site's agent")
    except Exception:
        log.exception("the site could not answer")  # of this process, on the hospital's side
        envelope = _refusal(
            "site-failure", "the site could not answer; its operator finds the cause in the node's log"
        )
    return Message(content=envelope.to_record(), reply_to=message)


def _ask(method: str, envelope: Envelope, context: Context) -> Envelope:
    plan = str(context.run_config["plan"])
    socket = context.node_config.get("agent-socket")
    if socket:
        from client.ipc.client import ask_agent

        return Envelope.from_bytes(
            ask_agent(Path(str(socket)), method, plan, envelope.to_bytes(), deadline_s=_deadline_s(plan))
        )
    from client.agent.verification import guard_for

    return Envelope.from_bytes(
        guard_for(str(context.node_config["site-config"])).answer(method, plan, envelope.to_bytes())
    )


@functools.lru_cache(maxsize=8)
def _deadline_s(plan: str) -> float:
    """How long the coordinator waits for an answer: the one number of the plan that this process needs. The
    agent validates the plan.
    """
    return float(json.loads(plan)["federation"]["deadline_s"])


def _refusal(code: str, reason: str) -> Envelope:
    """Unsigned: this process has no key of the site. The coordinator counts it as a failure, not as a
    decision of the site.
    """
    return Envelope(payload=Refusal(code=code, reason=reason).to_bytes())
