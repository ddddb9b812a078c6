from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from client.site.answer_store import KEPT_DAYS, AnswerKey, Outbox
from common.errors import RunError

KEY: AnswerKey = ("run-1", "federated_dp", 3, "train")


def test_a_new_question_has_no_answer(tmp_path: Path) -> None:
    assert Outbox(tmp_path / "outbox").get(KEY) is None


def test_a_repeated_question_gets_the_stored_bytes_after_a_restart(tmp_path: Path) -> None:
    payload = os.urandom(100_000)
    Outbox(tmp_path / "outbox").put(KEY, payload)
    assert Outbox(tmp_path / "outbox").get(KEY) == payload


def test_the_first_answer_stays(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert outbox.put(KEY, b"first") == b"first"
    assert outbox.put(KEY, b"second") == b"first"
    assert outbox.get(KEY) == b"first"


def test_every_part_of_the_question_counts(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    keys: list[AnswerKey] = [
        KEY,
        ("run-2", *KEY[1:]),
        ("run-1", "local", 3, "train"),
        (*KEY[:2], 4, "train"),
        (*KEY[:3], "evaluate"),
    ]
    keys += [("a", "b-c", 1, "d"), ("a-b", "c", 1, "d"), ("", "", 0, "")]
    for number, key in enumerate(keys):
        outbox.put(key, str(number).encode())
    assert [outbox.get(key) for key in keys] == [str(number).encode() for number in range(len(keys))]


def test_text_from_outside_never_names_a_path(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.put(("../../etc/passwd", "/absolute", 1, "nul\0byte" * 500), b"answer")
    assert [path.parent for path in tmp_path.rglob("*.answer")] == [tmp_path / "outbox"]
    assert all(len(path.name) == 64 + len(".answer") for path in (tmp_path / "outbox").iterdir())


def test_a_damaged_answer_is_not_sent_and_not_computed_again(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(KEY, b"answer")
    (file,) = tmp_path.iterdir()
    for content in (file.read_bytes()[:-1], b"", b"x" * 40):
        file.write_bytes(content)
        with pytest.raises(RunError) as caught:
            outbox.get(KEY)
        assert caught.value.code == "outbox-damaged"
        with pytest.raises(RunError):
            outbox.put(KEY, b"answer again")


def test_a_crash_before_the_answer_is_whole_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "link", crash)
    with pytest.raises(RunError, match="power cut"):
        Outbox(tmp_path).put(KEY, b"answer")
    assert Outbox(tmp_path).get(KEY) is None
    assert list(tmp_path.iterdir()) == []


def test_threads_that_answer_together_all_send_one_answer(tmp_path: Path) -> None:
    sent: list[bytes] = []
    outbox = Outbox(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: sent.append(outbox.put(KEY, bytes([n]) * 1000))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 8
    assert set(sent) == {outbox.get(KEY)}


def test_an_answer_is_kept_for_more_than_a_year_and_then_removed(tmp_path: Path) -> None:
    outbox, later = Outbox(tmp_path), ("run-2", "local", 1, "train")
    outbox.put(KEY, b"old")
    outbox.put(later, b"younger")
    for path in tmp_path.glob("*.answer"):
        days = KEPT_DAYS + 1 if b"old" in path.read_bytes() else KEPT_DAYS - 1
        os.utime(path, (time.time() - days * 86_400,) * 2)
    outbox.put(("run-3", "local", 1, "train"), b"new")
    assert outbox.get(KEY) is None
    assert outbox.get(later) == b"younger"
