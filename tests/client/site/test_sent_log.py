"""Every message that left stands in a chained log: a change is found, a crash is no change."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site.config import site_key
from client.site.sent_log import FIELDS, SENT, note_sent, read_sent
from common.errors import DataError


def entry(number: int, **changes: Any) -> dict[str, Any]:
    values = dict(
        zip(FIELDS, ("2026-11-29", "SiteUpdate", "dp", "train", "run-ä", number, 10, "ab"), strict=True)
    )
    return values | changes


@pytest.fixture
def state(tmp_path: Path) -> Path:
    site_key(tmp_path)
    for number in range(5):
        note_sent(tmp_path, entry(number))
    return tmp_path


def test_what_was_noted_is_read(state: Path) -> None:
    assert read_sent(state) == [entry(number) for number in range(5)]
    assert (state / SENT).stat().st_mode & 0o777 == 0o600


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "a line edited": lambda lines: [line.replace('"round": 2', '"round": 9') for line in lines],
    "a class edited": lambda lines: [lines[0].replace('"dp"', '"public"'), *lines[1:]],
    "the last line edited": lambda lines: [*lines[:-1], lines[-1].replace('"bytes": 10', '"bytes": 11')],
    "a line removed": lambda lines: lines[:2] + lines[3:],
    "the first line removed": lambda lines: lines[1:],
    "a line made unreadable": lambda lines: [*lines[:2], lines[2][:-9], *lines[3:]],
    "two lines exchanged": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line repeated": lambda lines: [*lines, lines[-1]],
    "a line inserted": lambda lines: [*lines[:3], json.dumps(entry(7)), *lines[3:]],
    "a mac removed": lambda lines: [*lines[:-1], json.dumps(entry(4))],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found(state: Path, name: str) -> None:
    path = state / SENT
    lines = path.read_text().splitlines()
    assert CHANGES[name](lines) != lines
    path.write_text("".join(line + "\n" for line in CHANGES[name](lines)))
    with pytest.raises(DataError) as caught:
        read_sent(state)
    assert caught.value.code == "sent-damaged"


@pytest.mark.parametrize("kept", [1, 40, -1, -20])
def test_a_torn_line_blocks_nothing_and_the_chain_goes_on(state: Path, kept: int) -> None:
    """A crash while the last line was written: that message did not leave."""
    path = state / SENT
    *whole, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + last[:-1][:kept])
    assert read_sent(state) == [entry(number) for number in range(4)]
    note_sent(state, entry(5))
    note_sent(state, entry(6))
    assert [one["round"] for one in read_sent(state)] == [0, 1, 2, 3, 5, 6]


def test_lines_of_an_earlier_version_stay_readable_before_the_chain(tmp_path: Path) -> None:
    site_key(tmp_path)
    (tmp_path / SENT).write_text("".join(json.dumps(entry(number)) + "\n" for number in (1, 2)))
    note_sent(tmp_path, entry(3))
    assert [one["round"] for one in read_sent(tmp_path)] == [1, 2, 3]


def test_another_key_and_a_missing_key_verify_nothing(state: Path) -> None:
    (state / "site.key").rename(state / "kept")
    with pytest.raises(DataError, match="is missing"):
        read_sent(state)
    assert not (state / "site.key").exists()
    site_key(state)
    with pytest.raises(DataError, match="line 1 was changed"):
        read_sent(state)


def _note(state: Path, process: int) -> None:
    for number in range(20):
        note_sent(state, entry(100 * process + number))


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    site_key(tmp_path)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_note, args=(tmp_path, number)) for number in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(read_sent(tmp_path)) == 40


def test_a_long_log_is_continued_from_its_end(tmp_path: Path) -> None:
    site_key(tmp_path)
    long = "x" * 400_000
    for number in range(4):
        note_sent(tmp_path, entry(number, run=long))
    assert (tmp_path / SENT).stat().st_size > 1 << 20
    assert len(read_sent(tmp_path)) == 4
