"""A decoder may hang, crash, hoard, print and lie: it costs its own item a code, and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.dicom.workers import WORKER_CODES, Outcome, Workers
from common.errors import InternalError, RunError
from tests.helpers.command_line import ROOT
from tests.helpers.worker_functions import act, arrays, give

linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part in this is Linux")


def outcomes(*items: dict[str, Any], **settings: Any) -> list[Outcome]:
    with Workers(act, **settings) as workers:
        return list(workers.map(items))


def seen(*items: dict[str, Any], **settings: Any) -> list[Any]:
    """The value of each item, or its failure."""
    return [outcome.failure or outcome.value for outcome in outcomes(*items, **settings)]


def is_gone(pid: int) -> bool:
    """Whether a process ended, also where nobody collects it."""
    try:
        os.kill(pid, 0)
        return (
            sys.platform == "linux"
            and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        )
    except (ProcessLookupError, FileNotFoundError):
        return True


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_answers_come_in_the_order_of_the_items_however_long_each_takes() -> None:
    items = [{"sleep": seconds} for seconds in (0.5, 0.0, 0.6, 0.0, 0.1)] + [
        {"give": number} for number in range(60)
    ]
    assert seen(*items, count=3) == [0.5, 0.0, 0.6, 0.0, 0.1, *range(60)]


def test_arrays_arrive_as_they_were_and_may_be_written_to() -> None:
    with Workers(arrays) as workers:
        (outcome,) = workers.map([None])
    for came, meant in zip(outcome.arrays, arrays(None)[1], strict=True):
        np.testing.assert_array_equal(came, meant)
        assert came.dtype == meant.dtype.newbyteorder("<")
        assert came.shape == meant.shape
        came[...] = 0


def test_a_huge_answer_does_not_stop_the_ones_behind_it() -> None:
    first, *rest = outcomes({"big": 5000}, {"give": 1}, {"big": 600}, {"give": 2}, count=1)
    assert len(first.value) == 5000
    assert first.arrays[0].shape == (5000, 5000)
    assert (first.arrays[0] == 7).all()
    assert [len(str(outcome.value)) for outcome in rest] == [1, 600, 1]


def test_an_item_larger_than_a_pipe_arrives() -> None:
    text = "é" * 300_000
    assert seen(*[{"give": text}] * 5, count=1) == [text] * 5


def test_a_hang_is_killed_and_costs_nobody_else_anything() -> None:
    items = ({"give": 1}, {"hang": ""}, {"give": 2}, {"stuck": None}, {"give": 3}, {"give": 4})
    assert seen(*items, seconds_per_item=1.0, count=1) == [1, "too-slow", 2, "too-slow", 3, 4]


@linux
def test_waiting_for_a_processor_is_no_fault_of_a_file() -> None:
    """Four processes want one processor: each works a quarter of the time."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        items = [{"give": 1}, {"spin": 0.6}, {"spin": 5.0}, {"give": 2}]
        assert seen(*items, seconds_per_item=1.0, count=1) == [1, "done", "too-slow", 2]
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()


def test_a_crash_is_answered_with_a_code() -> None:
    items = ({"give": 1}, {"segfault": None}, {"give": 2}, {"vanish": 0}, {"give": 3})
    assert seen(*items, count=1) == [1, "decoder-crashed", 2, "decoder-crashed", 3]


def test_one_crash_is_not_yet_an_items_fault(tmp_path: Path) -> None:
    """The item before it may have left the process broken."""
    assert seen({"give": 1}, {"segfault_once": str(tmp_path / "mark")}, {"give": 2}, count=1) == [
        1,
        "second",
        2,
    ]


def test_memory_is_limited_and_the_child_goes_on() -> None:
    memory = 256 << 20
    # the limit is not exact to the page
    hoards = [{"hoard": count} for count in (100, memory // 2, 2 * memory)]
    first, second, third, bomb, last = outcomes(
        {"surroundings": None}, *hoards, {"surroundings": None}, memory_bytes=memory, count=1
    )
    assert bomb.failure == "out-of-memory"
    assert second.arrays[0].nbytes == 100
    assert third.arrays[0].nbytes == memory // 2
    assert first.value["pid"] == last.value["pid"]


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ({"refuse": "too-nested"}, "too-nested"),
        ({"fail": None}, "unreadable"),
        ({"leave": 0}, "unreadable"),
        ({"strange": None}, "unreadable"),
        ({"no such deed": None}, "unreadable"),
        ({"hoard": (512 << 20) + 1}, "too-large"),
        ({"give": "x" * (17 << 20)}, "too-large"),
    ],
)
def test_an_exception_is_a_code_and_no_text(item: dict[str, Any], code: str) -> None:
    outcome, after = outcomes(item, {"give": 1}, count=1)
    assert outcome == Outcome(failure=code)
    assert after.value == 1


def test_what_a_decoder_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    assert seen({"chatter": "PATIENT^NAME"}, {"give": 1}, count=1) == ["PATIENT^NAME", 1]
    assert capfd.readouterr() == ("", "")


def test_a_child_knows_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQC_SITE_KEY", "secret")
    (outcome,) = outcomes({"surroundings": None})
    found = outcome.value
    assert not [name for name in found["environment"] if name.startswith("FEDQC")]
    assert found["main"] is None  # the caller's __main__ was not run again
    assert not {"torch", "flwr", "pytest", "pydicom", "multiprocessing"} & set(found["modules"])
    assert found["core"] == [0, 0]
    assert len(found["files"]) <= 6  # three that lead nowhere, two pipes, and the listing itself


def test_a_reader_of_dicom_loads_neither_a_network_client_nor_a_decoder_that_nobody_asks() -> None:
    names = ["pydicom", "requests", "urllib3", "PIL"]
    assert seen({"reader": names}) == [["pydicom"]]


def test_a_decoder_cannot_write_a_file(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    assert seen({"write": str(path)}) == ["unreadable"]
    assert not path.exists() or path.stat().st_size == 0


def test_no_item_starts_no_process() -> None:
    with Workers(act) as workers:
        assert list(workers.map([])) == []
        assert workers.pids() == []


def test_a_few_items_start_one_process() -> None:
    with Workers(act, count=8) as workers:
        assert [outcome.value for outcome in workers.map({"give": number} for number in range(5))] == list(
            range(5)
        )
        assert len(workers.pids()) == 1


def test_slow_work_is_shared_by_as_many_as_allowed() -> None:
    with Workers(act, count=3) as workers:
        answers = list(workers.map([{"sleep": 0.1}, {"surroundings": None}] * 14))
        pids = {outcome.value["pid"] for outcome in answers[1::2]}
        assert 1 < len(pids) <= 3
        assert pids <= set(workers.pids())


def test_items_are_taken_only_a_few_ahead() -> None:
    taken = 0

    def items() -> Iterator[dict[str, int]]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield {"give": number}

    with Workers(act, count=2) as workers:
        for given, outcome in enumerate(workers.map(items())):
            assert outcome.value == given
            assert taken <= given + 1 + 16


def test_large_answers_do_not_pile_up_behind_a_slow_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.dicom.workers._HELD_BYTES", 1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Workers(act, count=4) as workers:
        answers = workers.map([{"sleep": 1.5}, *[{"hoard": 64 << 20}] * 12])
        assert next(answers).value == 1.5
        # KiB: not all of them
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 12 * (64 << 10)
        assert [answer.arrays[0].nbytes for answer in answers] == [64 << 20] * 12


def test_a_caller_who_is_slow_to_ask_makes_no_item_slow() -> None:
    with Workers(act, seconds_per_item=0.5, count=1) as workers:
        answers = workers.map([{"give": 1}, {"big": 3000}, {"big": 3000}, {"give": 2}])
        assert next(answers).value == 1
        time.sleep(1.2)
        assert [answer.failure for answer in answers] == ["", "", ""]


def test_children_serve_one_map_after_another() -> None:
    with Workers(act, count=1) as workers:
        left = next(workers.map([{"surroundings": None}, {"hang": ""}])).value["pid"]
        again = [outcome.value["pid"] for outcome in workers.map([{"surroundings": None}] * 2)]
        assert len(set(again)) == 1
        assert workers.pids() == again[:1]
        assert is_gone(left)
    assert is_gone(again[0])


@pytest.mark.parametrize("how", ["close", "break", "raise", "items"])
def test_leaving_early_leaves_no_child(how: str) -> None:
    def items() -> Iterator[dict[str, Any]]:
        yield {"surroundings": None}
        if how == "items":
            for _ in range(20):
                yield {"give": 1}
            raise ValueError("the caller's own")
        yield from [{"hang": ""}] * 9

    workers = Workers(act, count=2)
    answers = workers.map(items())
    pid = 0
    try:
        for outcome in answers:
            pid = pid or outcome.value["pid"]
            if how == "break":
                break
            if how == "raise":
                raise ValueError("the caller's own")
            if how == "close":
                answers.close()  # type: ignore[attr-defined]
    except ValueError:
        pass
    del answers
    assert workers.pids() == []
    assert pid
    assert is_gone(pid)
    workers.close()


_PARENT = """
import sys
from client.dicom.workers import Workers
from tests.helpers.worker_functions import act

with Workers(act) as workers:
    answers = workers.map([{"surroundings": None}, {"hang": sys.argv[1]}, {"stuck": None}])
    print(next(answers).value["pid"], flush=True)
    print(list(answers))
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_parent_that_ends_takes_its_children_with_it(number: int, tmp_path: Path) -> None:
    mark = tmp_path / "hanging"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(mark)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        wait_for(mark.exists)
        assert not is_gone(pid)
        parent.send_signal(number)
        assert parent.wait(60) == (-number if number != signal.SIGINT else parent.returncode) != 0
        wait_for(lambda: is_gone(pid))


@linux
def test_what_a_child_started_ends_with_it() -> None:
    with Workers(act, count=1) as workers:
        (outcome,) = workers.map([{"start": None}])
        pid = outcome.value
        assert not is_gone(pid)
    wait_for(lambda: is_gone(pid))


def frame(answer: object, body: bytes = b"") -> list[int]:
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return list(struct.pack(">I", len(text)) + text + body)


LIES: dict[str, Callable[[int], list[int]]] = {
    "a length beyond all memory": lambda _: [255] * 64,
    "a length of nothing": lambda _: [0] * 8,
    "not JSON": lambda _: frame(b"\x80\x04cos\nsystem\n(S'id'\ntR."),
    "nested without end": lambda _: frame(b"[" * 200_000),
    "no answer": lambda _: frame([1, 2]),
    "another item": lambda number: frame({"item": number + 1, "value": 1, "arrays": []}),
    "text as a code": lambda number: frame({"item": number, "failure": "Doe^Jane 1970"}),
    "a code that is none": lambda number: frame({"item": number, "failure": ["too-large"]}),
    "objects": lambda number: frame({"item": number, "value": 1, "arrays": [["|O", [1]]]}, bytes(8)),
    "a type as a list": lambda number: frame(
        {"item": number, "value": 1, "arrays": [[["<i2"], [1]]]}, bytes(8)
    ),
    "a negative side": lambda number: frame(
        {"item": number, "value": 1, "arrays": [["<i2", [-1, -4]]]}, bytes(8)
    ),
    "a side of true": lambda number: frame(
        {"item": number, "value": 1, "arrays": [["<i2", [True]]]}, bytes(8)
    ),
    "more than may be": lambda number: frame(
        {"item": number, "value": 1, "arrays": [["|u1", [1 << 20, 1 << 20]]]}
    ),
    "more than may be, in pieces": lambda number: frame(
        {"item": number, "value": 1, "arrays": [["<i8", [1 << 25]]] * 3}
    ),
    "nothing, of an endless side": lambda number: frame(
        {"item": number, "value": 1, "arrays": [["|u1", [0, 1 << 60]]]}
    ),
    "too many sides": lambda number: frame({"item": number, "value": 1, "arrays": [["|u1", [1] * 33]]}, b"1"),
}


def test_a_child_that_lies_is_not_believed() -> None:
    items = [
        item
        for number, lie in enumerate(LIES.values())
        for item in ({"lie": lie(2 * number)}, {"give": number})
    ]
    with Workers(act, count=2) as workers:
        found = dict(enumerate(workers.map(items)))
    failures = {name: found[2 * number].failure for number, name in enumerate(LIES)}
    assert failures == dict.fromkeys(LIES, "decoder-crashed")
    assert [found[2 * number + 1].value for number in range(len(LIES))] == list(range(len(LIES)))


def test_one_answer_too_many_costs_nobody_an_item() -> None:
    assert seen(
        {"lie": frame({"item": 0, "value": "said", "arrays": []})}, {"give": 1}, {"give": 2}, count=1
    ) == ["said", 1, 2]


def test_lingering_children_are_found_again_and_only_by_their_like() -> None:
    def pid_of(linger: bool, **settings: Any) -> int:
        with Workers(act, linger=linger, count=1, **settings) as workers:
            (outcome,) = workers.map([{"surroundings": None}])
            return int(outcome.value["pid"])

    first = pid_of(True)
    assert not is_gone(first)
    assert pid_of(True, seconds_per_item=11.0) != first
    assert pid_of(True) == first
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: is_gone(first))
    second = pid_of(True)
    assert second != first
    assert pid_of(False) == second
    assert is_gone(second)
    assert is_gone(pid_of(False, seconds_per_item=11.0))


def test_a_function_that_a_child_cannot_import_is_refused_at_once() -> None:
    with pytest.raises(InternalError):
        Workers(lambda item: (item, []))


def test_a_child_that_cannot_start_is_an_error_and_not_an_items_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(give, "__module__", "tests.no_such_module")
    with Workers(give) as workers, pytest.raises(RunError) as caught:
        list(workers.map([1, 2]))
    assert caught.value.code == "worker-failed"
    assert "ModuleNotFoundError" in str(caught.value)
    assert workers.pids() == []


def test_a_system_without_another_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Workers(act) as workers, pytest.raises(RunError) as caught:
        list(workers.map([{"give": 1}]))
    assert caught.value.code == "worker-failed"


def test_every_code_has_its_explanation() -> None:
    assert set(WORKER_CODES) == {"too-slow", "out-of-memory", "decoder-crashed"}
    assert all(len(line) > 20 for line in WORKER_CODES.values())
