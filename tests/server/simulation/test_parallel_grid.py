"""Nodes in processes of their own answer as nodes in this one do, and end with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from common.errors import RunError
from server.simulation.local_grid import APP_RAISED, NODE_UNAVAILABLE
from server.simulation.parallel_grid import ParallelGrid, places
from tests.helpers.rig import born, wait_until

NODES = {number: {"site-config": f"/{number}/site.yaml"} for number in (1, 2, 3, 4, 5)}


def grid(
    app: str,
    folder: Path,
    *,
    jobs: int = 2,
    nodes: Sequence[int] = tuple(NODES),
    plan: str = "{}",
    device: str = "cpu",
) -> ParallelGrid:
    return ParallelGrid(
        f"tests.helpers.grid_apps:{app}",
        {node: NODES[node] for node in nodes},
        {"plan": plan, "run-dir": str(folder)},
        jobs=jobs,
        threads=1,
        device=device,
        load=dict.fromkeys(nodes, 1.0),
    )


def question(node: int, content: RecordDict | None = None) -> Message:
    return Message(content=content or RecordDict(), dst_node_id=node, message_type="train")


def said(answer: Message) -> dict[str, Any]:
    return dict(answer.content.config_records["said"])


def pulled(running: ParallelGrid, ids: Sequence[str]) -> list[Message]:
    found: list[Message] = []
    while len(found) < len(ids):
        found += running.pull_messages(ids)
    return found


def test_each_node_keeps_its_process_and_its_threads(tmp_path: Path) -> None:
    with grid("telling", tmp_path) as running:
        assert isinstance(running, Grid)
        rounds = [
            pulled(running, running.push_messages([question(node) for node in NODES])) for _ in range(3)
        ]
        answers = [said(answer) for answers in rounds for answer in answers]
        assert running.cpu_seconds() > 0
    homes = {node: {answer["pid"] for answer in answers if answer["node"] == node} for node in NODES}
    assert all(len(pids) == 1 for pids in homes.values())
    assert len(set().union(*homes.values())) == 4  # two jobs have four places
    assert {answer["threads"] for answer in answers} == {1}
    assert {(answer["node"], answer["config"]) for answer in answers} == {
        (node, str(config)) for node, config in NODES.items()
    }


def test_what_is_sent_arrives_and_refers_to_its_question(tmp_path: Path) -> None:
    sent = np.arange(6, dtype=np.float32)
    content = RecordDict({"arrays": ArrayRecord({"w": Array(sent)})})
    with grid("telling", tmp_path, nodes=(1, 2)) as running:
        ids = running.push_messages([question(1, content), question(2, content)])
        answers = pulled(running, ids)
        assert {answer.metadata.reply_to_message_id for answer in answers} == set(ids)
        assert running.pull_messages(ids) == []
        (both,) = running.send_and_receive([question(2, content)])
    for answer in (*answers, both):
        assert np.array_equal(answer.content.array_records["arrays"]["w"].numpy(), sent)


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_answer_at_once_and_no_more(jobs: int, tmp_path: Path) -> None:
    with grid("meeting", tmp_path, jobs=jobs, plan=str(jobs)) as running:
        answers = pulled(running, running.push_messages([question(node) for node in NODES]))
    assert max(said(answer)["most"] for answer in answers) == jobs


def test_what_goes_wrong_in_a_site_is_its_answer(tmp_path: Path) -> None:
    with grid("failing", tmp_path, nodes=(1, 2)) as running:
        running.down.add(2)
        raised, lost = running.send_and_receive([question(1), question(2)])
    assert raised.error.code == APP_RAISED
    assert lost.error.code == NODE_UNAVAILABLE


def test_a_process_that_ends_ends_the_run(tmp_path: Path) -> None:
    with grid("ending", tmp_path, nodes=(1, 2)) as running:
        ids = running.push_messages([question(1)])
        with pytest.raises(RunError) as caught:
            pulled(running, ids)
    assert caught.value.code == "worker-ended"
    assert "status 9" in caught.value.message
    assert "--jobs 1" in caught.value.hint


def test_a_device_reaches_the_processes(tmp_path: Path) -> None:
    """One that no machine has ends them."""
    with grid("telling", tmp_path, nodes=(1, 2), device="cuda:99") as running:
        ids = running.push_messages([question(1)])
        with pytest.raises(RunError) as caught:
            pulled(running, ids)
    assert caught.value.code == "worker-ended"


def test_leaving_ends_what_is_still_at_work(tmp_path: Path) -> None:
    with grid("telling", tmp_path, nodes=(1, 2)) as running:
        pids = [said(answer)["pid"] for answer in running.send_and_receive([question(1), question(2)])]
    assert not any(born(pid) for pid in pids)
    began = time.monotonic()
    with grid("sleeping", tmp_path, nodes=(1, 2)) as running:
        ids = running.push_messages([question(1), question(2)])
        wait_until(lambda: len(list(tmp_path.glob("asleep-*"))) == 2, 60, "both are at work")
    assert time.monotonic() - began < 300
    with pytest.raises(RunError):
        pulled(running, ids)


def test_the_heaviest_node_has_a_place_for_itself() -> None:
    assert places({1: 2, 2: 2, 3: 2, 4: 0, 5: 5}, 3) == {5: 0, 1: 1, 2: 2, 3: 1, 4: 2}
    assert places({1: 0, 2: 0, 3: 0}, 3) == {1: 0, 2: 1, 3: 2}
