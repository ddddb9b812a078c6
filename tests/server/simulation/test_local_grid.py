"""The consortium in one process behaves as a SuperLink does, and the private Flower names it needs still
exist.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

import server.simulation.local_grid
import server.simulation.parallel_grid
from server.simulation.local_grid import APP_RAISED, NODE_UNAVAILABLE, LocalGrid

NODES = {1: {"site-config": "/a/site.yaml"}, 2: {"site-config": "/b/site.yaml"}}
RUN_CONFIG = {"plan": "{}", "run-dir": "/r"}


def app_that(answer: Any) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content=answer(message, context), reply_to=message)

    return app


def echo(message: Message, context: Context) -> RecordDict:
    return message.content


def question(node: int, content: RecordDict | None = None) -> Message:
    return Message(content=content or RecordDict(), dst_node_id=node, message_type="train")


def flower_names() -> list[tuple[str, str]]:
    files = [server.simulation.local_grid.__file__, server.simulation.parallel_grid.__file__]
    imports = [
        node
        for file in files
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("flwr")
    ]
    return [(str(node.module), alias.name) for node in imports for alias in node.names]


@pytest.mark.parametrize(("module", "name"), flower_names())
def test_every_flower_name_it_needs_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), (
        f"Flower moved {module}.{name}: see server/simulation/local_grid.py"
    )


def test_the_private_flower_names_are_these() -> None:
    """The list of what may break with the next Flower; the other imports are its public API."""
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
    private = {(module, name) for module, name in flower_names() if module not in public}
    assert private == {
        ("flwr.supercore.run", "Run"),
        ("flwr.supercore.task_identity", "TaskIdentity"),
        ("flwr.common.serde", "message_from_proto"),
        ("flwr.common.serde", "message_to_proto"),
        ("flwr.proto.message_pb2", "Message"),
    }


def test_it_is_a_grid_with_every_method_of_one() -> None:
    grid = LocalGrid(app_that(echo), NODES, RUN_CONFIG)
    assert isinstance(grid, Grid)
    for name in (
        "push_messages",
        "pull_messages",
        "send_and_receive",
        "get_node_ids",
        "create_message",
        "set_run",
    ):
        assert name in vars(LocalGrid)
    assert grid.run.run_id == 1


def test_each_site_sees_its_own_config_and_the_run_config() -> None:
    seen = []
    grid = LocalGrid(
        app_that(lambda message, context: seen.append(context) or RecordDict()),  # type: ignore[func-returns-value]
        NODES,
        RUN_CONFIG,
    )
    list(grid.send_and_receive([question(1), question(2)]))
    assert [dict(context.node_config) for context in seen] == list(NODES.values())
    assert all(dict(context.run_config) == RUN_CONFIG for context in seen)


def test_an_answer_refers_to_its_question() -> None:
    grid = LocalGrid(app_that(echo), NODES, RUN_CONFIG)
    ids = grid.push_messages([question(1), question(2)])
    assert len(set(ids)) == 2
    first = grid.pull_messages(ids)
    assert [answer.metadata.reply_to_message_id for answer in first] == ids[:1]
    second = grid.pull_messages(ids)
    assert [answer.metadata.reply_to_message_id for answer in second] == ids[1:]
    assert grid.pull_messages(ids) == []
    assert grid.pull_messages(["unknown"]) == []


def test_what_one_site_does_to_its_message_no_other_site_sees() -> None:
    def scribble(message: Message, context: Context) -> RecordDict:
        was = str(message.content.config_records["fields"]["json"])
        message.content.config_records["fields"]["json"] = "scribbled"
        message.content["arrays"] = ArrayRecord({})
        return RecordDict({"was": ConfigRecord({"json": was})})

    content = RecordDict(
        {"fields": ConfigRecord({"json": "clean"}), "arrays": ArrayRecord({"w": Array(np.zeros(3))})}
    )
    grid = LocalGrid(app_that(scribble), NODES, RUN_CONFIG)
    answers = grid.send_and_receive([question(1, content), question(2, content)])
    assert [str(answer.content.config_records["was"]["json"]) for answer in answers] == ["clean", "clean"]
    assert str(content.config_records["fields"]["json"]) == "clean"
    assert list(content.array_records["arrays"]) == ["w"]


def test_a_raising_app_becomes_an_error_reply() -> None:
    def fail(message: Message, context: Context) -> RecordDict:
        raise ValueError("no")

    grid = LocalGrid(app_that(fail), NODES, RUN_CONFIG)
    (answer,) = grid.send_and_receive([question(1)])
    assert answer.has_error()
    assert answer.error.code == APP_RAISED == 2


def test_an_unknown_question_becomes_an_error_reply() -> None:
    (answer,) = LocalGrid(app_that(echo), NODES, RUN_CONFIG).send_and_receive(
        [Message(content=RecordDict(), dst_node_id=1, message_type="evaluate")]
    )
    assert answer.error.code == APP_RAISED


def test_a_node_that_is_down_answers_error_five_and_is_not_listed() -> None:
    grid = LocalGrid(app_that(echo), NODES, RUN_CONFIG)
    assert grid.get_node_ids() == [1, 2]
    ids = grid.push_messages([question(1), question(2)])
    grid.down.add(2)
    answers = grid.pull_messages(ids) + grid.pull_messages(ids)
    assert [answer.has_error() for answer in answers] == [False, True]
    assert answers[1].error.code == NODE_UNAVAILABLE == 5
    assert grid.get_node_ids() == [1]


def test_ctrl_c_in_a_site_stops_the_caller() -> None:
    def interrupted(message: Message, context: Context) -> RecordDict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalGrid(app_that(interrupted), NODES, RUN_CONFIG).send_and_receive([question(1)])


def test_nothing_runs_before_its_answer_is_pulled() -> None:
    calls = []
    grid = LocalGrid(
        app_that(lambda message, context: calls.append(context.node_id) or RecordDict()),  # type: ignore[func-returns-value]
        NODES,
        RUN_CONFIG,
    )
    ids = grid.push_messages([question(2), question(1)])
    assert calls == []
    grid.pull_messages(ids)
    assert calls == [2]
