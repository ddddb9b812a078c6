"""Workers: the results of one process, in the order asked, and nothing left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, RunError
from server.run.workers import Workers
from tests.helpers.rig import born

MANY = range(400)  # more than this process begins before a worker has started


def telling(asking: int, item: int) -> tuple[int, int, int]:
    """The item, the process and its threads."""
    time.sleep(0.1 if os.getpid() == asking else 0)
    return item, os.getpid(), torch.get_num_threads()


def failing(asking: int, item: int) -> int:
    """Fails in workers alone."""
    if os.getpid() != asking:
        raise ConfigError("no such item", code="bad-argument", hint="name another")
    return telling(asking, item)[0]


def ending(asking: int, item: int) -> int:
    if os.getpid() != asking:
        os._exit(3)
    return telling(asking, item)[0]


def sleeping(given: tuple[int, Path], item: int) -> None:
    asking, folder = given
    if os.getpid() == asking and any(folder.iterdir()):
        raise KeyboardInterrupt
    if os.getpid() != asking:
        (folder / str(os.getpid())).touch()
        time.sleep(600)
    time.sleep(0.1)


def test_results_come_in_the_order_of_items_from_several_processes() -> None:
    told: list[int] = []
    with Workers(telling, os.getpid(), jobs=2) as workers:
        found = workers.map(MANY, tell=told.append)
        again = workers.map(range(3), tell=told.append)
    assert [item for item, _, _ in (*found, *again)] == [*MANY, *range(3)]
    others = {pid: threads for _, pid, threads in found if pid != os.getpid()}
    assert list(others.values()) == [1]
    assert os.getpid() in {pid for _, pid, _ in found}
    assert (told[-1], max(told)) == (3, len(MANY))
    assert not any(born(pid) for pid in others)


def test_one_job_has_no_other_process() -> None:
    with Workers(divmod, 7, jobs=1) as workers:
        assert workers.map([2, 3], tell=lambda _: None) == [(3, 1), (2, 1)]
        assert workers.map([], tell=lambda _: None) == []


def test_an_error_in_a_worker_is_the_error_of_the_call() -> None:
    with pytest.raises(ConfigError) as caught, Workers(failing, os.getpid(), jobs=2) as workers:
        workers.map(MANY, tell=lambda _: None)
    assert (caught.value.message, caught.value.code) == ("no such item", "bad-argument")
    assert caught.value.hint == "name another"


def test_a_worker_that_ends_ends_the_call() -> None:
    with pytest.raises(RunError) as caught, Workers(ending, os.getpid(), jobs=2) as workers:
        workers.map(MANY, tell=lambda _: None)
    assert caught.value.code == "worker-ended"
    assert "status 3" in caught.value.message
    assert "--jobs 1" in caught.value.hint


def test_leaving_ends_what_is_still_at_work(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Workers(sleeping, (os.getpid(), tmp_path), jobs=2) as workers,
    ):
        workers.map(MANY, tell=lambda _: None)
    (pid,) = (int(path.name) for path in tmp_path.iterdir())
    assert not born(pid)
