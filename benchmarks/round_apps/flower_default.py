"""The way Flower's documentation writes an app: PyTorch in the ClientApp, a state_dict of one array a layer,
FedAvg's own loop.

Half of benchmarks/deployment_round.py. Nothing is trained: a site moves each weight by a little of its own,
so that no two answers are the same bytes (Flower stores equal ones once). No evaluation is asked for: that
would be a second message, and cost twice as much.
"""

from __future__ import annotations

import json
import time

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    received = message.content.array_records["arrays"].to_torch_state_dict()
    step = 1e-4 * (1 + int(context.node_config["partition-id"]))
    state = {name: tensor + step for name, tensor in received.items()}
    content = RecordDict(
        {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 50, "train_loss": 0.0})}
    )
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.manual_seed(0)
    initial = ArrayRecord(
        {name: 0.02 * torch.randn(shape) for name, shape in json.loads(str(config["layers"]))}
    )

    def note(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        size = sum(len(array.data) for array in arrays.values())
        with open(str(config["marks"]), "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"round": number, "at": time.time(), "bytes": {"down": 3 * size, "up": 3 * size}})
                + "\n"
            )
        return None

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    strategy.start(
        grid,
        initial,
        num_rounds=int(config["rounds"]),
        train_config=ConfigRecord({"lr": 0.01}),
        evaluate_fn=note,
    )
