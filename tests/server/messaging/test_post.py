"""How long the coordinator waits for an answer that began to come: for its next part."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any, cast

import pytest
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.superlink.grid import http_grid

from server.messaging import requests
from server.messaging.requests import _Post

DEADLINE_S = 3600.0


class Halves:
    """A grid whose answer has begun to come; its parts come as the test says."""

    def __init__(self, parts_s: Iterable[float]) -> None:
        self.parts_s, self.left = tuple(parts_s), threading.Event()

    def pull_messages(self, ids: list[str]) -> list[Message]:
        def part(name: str) -> bytes:
            self.left.wait(float(name))
            return b""

        for seconds in self.parts_s:  # one after the other, as over a slow line
            vars(http_grid)["pull_objects"](object_ids=[str(seconds)], pull_object_fn=part)
        return [cast(Any, f"answer to {one}") for one in ids]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "STALL_S", 1.0)
    monkeypatch.setitem(vars(http_grid), "pull_objects", None)


def hear(grid: Halves, ids: list[str]) -> tuple[list[Message], list[str], float]:
    began = time.monotonic()
    post = _Post(cast(Grid, grid), patient_s=DEADLINE_S / 4)
    try:
        while time.monotonic() - began < 30:
            came, lost = post.pull(ids, until=began + DEADLINE_S)
            if came or lost:
                return came, lost, time.monotonic() - began
    finally:
        grid.left.set()
    raise AssertionError("waits for a quarter of the deadline")


@pytest.mark.parametrize("ids", [["b"], ["a", "b"]])
def test_an_answer_that_broke_off_is_lost_soon_whatever_the_deadline(ids: list[str]) -> None:
    came, lost, seconds = hear(Halves([0.0, DEADLINE_S]), ids)
    assert (came, lost) == ([], ids)
    assert 1 <= seconds < 15


def test_an_answer_over_a_slow_line_is_waited_for_part_by_part() -> None:
    came, lost, seconds = hear(Halves([0.4] * 6), ["b"])
    assert (came, lost) == (["answer to b"], [])
    assert seconds > 2 * requests.STALL_S


def test_a_node_that_sends_a_part_now_and_then_has_no_longer_than_before() -> None:
    grid = Halves([0.4] * 1000)
    post, began = _Post(cast(Grid, grid), patient_s=3.0), time.monotonic()
    try:
        while not (found := post.pull(["b"], until=began + 60))[1]:
            assert found == ([], [])
    finally:
        grid.left.set()
    assert 3 <= time.monotonic() - began < 15


def test_the_serverapp_s_own_retries_outlast_a_broken_handshake() -> None:
    grid = http_grid.HttpGrid(token="t")
    _Post(cast(Grid, grid), patient_s=1.0)
    assert grid._retry_invoker.should_giveup.__module__ == "common.retries"
