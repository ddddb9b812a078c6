"""ClientApps for tests of grids whose nodes live in other processes, which import them by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict


def telling(message: Message, context: Context) -> Message:
    """Says where and how it runs, and gives back what it was sent."""
    said = ConfigRecord(
        {
            "node": context.node_id,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "config": str(dict(context.node_config)),
            "plan": str(context.run_config["plan"]),
        }
    )
    return Message(content=RecordDict({"said": said, **message.content}), reply_to=message)


def meeting(message: Message, context: Context) -> Message:
    """Waits for as many others as the plan says, and then a while for more; says how many there were."""
    folder, expected = Path(str(context.run_config["run-dir"])), int(str(context.run_config["plan"]))
    (folder / f"in-{context.node_id}").touch()
    most, until = 0, time.monotonic() + 120
    while time.monotonic() < until:
        most = max(most, len(list(folder.glob("in-*"))), len(list(folder.glob("met"))) * expected)
        if most >= expected and until > time.monotonic() + 1:
            (folder / "met").touch()
            until = time.monotonic() + 0.5
        time.sleep(0.01)
    (folder / f"in-{context.node_id}").unlink()
    return Message(content=RecordDict({"said": ConfigRecord({"most": most})}), reply_to=message)


def ending(message: Message, context: Context) -> Message:
    os._exit(9)


def failing(message: Message, context: Context) -> Message:
    raise ValueError("no")


def sleeping(message: Message, context: Context) -> Message:
    Path(str(context.run_config["run-dir"]), f"asleep-{context.node_id}").touch()
    time.sleep(600)
    return Message(content=RecordDict(), reply_to=message)
