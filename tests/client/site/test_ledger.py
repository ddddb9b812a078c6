from __future__ import annotations

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site.ledger import Ledger, LedgerError, ledger_file_name
from common.errors import ConfigError, RefusedError
from common.privacy import GaussianSteps, noise_multiplier_for, rdp_epsilon

KEY = b"a site key that nobody else has."
DELTA = 1e-5


def steps(noise_multiplier: float = 3.0, sample_rate: float = 0.25, count: int = 20) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=count)


def opened(folder: Path, **changes: Any) -> Ledger:
    return Ledger.open(folder / "ledger.sqlite3", **{"cohort": "brain-mri", "key": KEY, **changes})


def reserved(
    ledger: Ledger, request: str, planned: GaussianSteps | None = None, max_epsilon: float = 8.0
) -> Any:
    planned = planned or steps()
    return ledger.reserve(
        request=request,
        steps=planned,
        purpose="train",
        fingerprint="sha256:00",
        max_epsilon=max_epsilon,
        delta=DELTA,
    )


def filled(folder: Path, count: int = 4) -> None:
    with opened(folder) as ledger:
        for number in range(count):
            ledger.commit(reserved(ledger, f"run-{number}"), steps_done=20)


def edited(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite3")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_new_ledger_has_spent_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        assert ledger.spent(DELTA) == 0
        assert ledger.history() == []
        assert not ledger.has_non_private
        assert [row.kind for row in ledger.rows()] == ["open"]


def test_ledger_survives_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1/federated_dp")
        ledger.commit(reservation, steps_done=20)
        spent = ledger.spent(DELTA)
    with opened(tmp_path) as ledger:
        assert ledger.spent(DELTA) == spent == rdp_epsilon([steps()], DELTA)
        reserved(ledger, "run-2/federated_dp")
        assert ledger.spent(DELTA) == rdp_epsilon([steps(count=40)], DELTA)


def test_costs_are_composed_not_added(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        for number in range(10):
            reserved(ledger, f"round-{number}")
        assert ledger.history() == [steps(count=200)]
        assert ledger.spent(DELTA) < 10 * rdp_epsilon([steps()], DELTA) / 2


def test_a_request_over_budget_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", max_epsilon=2.0)
        before = ledger.spent(DELTA)
        expensive = steps(noise_multiplier=1.0, count=50)
        assert not ledger.fits(expensive, max_epsilon=2.0, delta=DELTA)
        with pytest.raises(RefusedError) as caught:
            reserved(ledger, "run-2", expensive, max_epsilon=2.0)
        assert caught.value.code == "budget-exhausted"
        assert "budget is 2" in caught.value.public_reason
        assert ledger.spent(DELTA) == before
        assert len(ledger.rows()) == 2


def test_a_plan_calibrated_to_the_whole_budget_is_admitted_once(tmp_path: Path) -> None:
    planned = steps(noise_multiplier_for(8.0, DELTA, 0.064, 800), 0.064, 800)
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", planned)
        with pytest.raises(RefusedError):
            reserved(ledger, "run-2", steps(count=1))


def test_the_same_request_twice_is_charged_once(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        first = reserved(ledger, "run-1")
    with opened(tmp_path) as ledger:
        again = reserved(ledger, "run-1", max_epsilon=0.001)  # already paid for: the cap is not asked again
        assert (first.is_new, again.is_new) == (True, False)
        assert again.sequence == first.sequence
        assert ledger.spent(DELTA) == rdp_epsilon([steps()], DELTA)


def test_a_request_cannot_come_back_with_other_numbers(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1")
        for other in (steps(noise_multiplier=2.9), steps(count=21), steps(sample_rate=0.26)):
            with pytest.raises(RefusedError) as caught:
                reserved(ledger, "run-1", other)
            assert caught.value.code == "request-mismatch"
        with pytest.raises(RefusedError):
            ledger.record_non_private(request="run-1", purpose="train", fingerprint="")


def test_a_reservation_is_never_refunded(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1")
        ledger.commit(reservation, steps_done=3)
        assert ledger.history() == [steps(count=20)]
        assert ledger.history(executed=True) == [steps(count=3)]


def test_rounds_draw_from_the_reservation_of_their_run(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1/federated_dp")
        for number in range(4):
            ledger.commit(reservation, steps_done=5, part=f"round {number}")
            # a repeated commit changes nothing
            ledger.commit(reservation, steps_done=5, part=f"round {number}")
        assert ledger.history(executed=True) == [steps(count=20)]
        with pytest.raises(LedgerError) as caught:
            ledger.commit(reservation, steps_done=1, part="round 4")
        assert caught.value.code == "reservation-exceeded"
        with pytest.raises(LedgerError) as caught:
            ledger.commit(reservation, steps_done=4, part="round 0")
        assert caught.value.code == "request-mismatch"


def test_only_what_was_reserved_can_be_committed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with opened(tmp_path) as ledger, opened(tmp_path / "other") as other:
        with pytest.raises(LedgerError) as caught:
            ledger.commit(reserved(other, "run-1"), steps_done=1)
        assert caught.value.code == "unknown-reservation"
        for wrong in (-1, 1.5, True):
            with pytest.raises(ConfigError):
                ledger.commit(reserved(ledger, "run-2"), steps_done=wrong)  # type: ignore[arg-type]


def test_a_run_without_privacy_is_recorded_apart_from_the_budget(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.record_non_private(request="run-1/federated", purpose="train", fingerprint="sha256:00")
        ledger.record_non_private(request="run-1/federated", purpose="train", fingerprint="sha256:00")
        assert ledger.has_non_private
        assert ledger.spent(DELTA) == 0
        assert [row.kind for row in ledger.rows()] == ["open", "non-private"]
        reserved(ledger, "run-1/federated_dp")
        with pytest.raises(ConfigError):
            reserved(ledger, "run-2", GaussianSteps(noise_multiplier=0.0, sample_rate=1.0, steps=1))
        with pytest.raises(RefusedError):
            reserved(ledger, "run-1/federated")


# ---- damage


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET content = replace(content, '\"steps\": 20', '\"steps\": 02') WHERE sequence = 2",
        "UPDATE rows SET content = replace(content, '3.0', '9.0') WHERE sequence = 4",
        "UPDATE rows SET content = replace(content, 'reserve', 'commit') WHERE sequence = 2",
        "UPDATE rows SET mac = zeroblob(32) WHERE sequence = 3",
        "UPDATE rows SET mac = 'text' WHERE sequence = 3",
        "DELETE FROM rows WHERE sequence = 4",
        "DELETE FROM rows WHERE sequence = 9",
        "DELETE FROM rows WHERE sequence > 3",
        "DELETE FROM rows",
        "UPDATE rows SET sequence = 100 WHERE sequence = 9",
        "INSERT INTO rows SELECT 10, content, mac FROM rows WHERE sequence = 9",
        "DROP TABLE rows",
    ],
)
def test_an_edited_ledger_is_refused(tmp_path: Path, statement: str) -> None:
    filled(tmp_path)
    edited(tmp_path, statement)
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code in ("ledger-damaged", "ledger-rolled-back")
    assert str(tmp_path) not in caught.value.public_reason


def test_reordered_rows_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    edited(
        tmp_path,
        *(
            f"UPDATE rows SET sequence = {new} WHERE sequence = {old}"
            for old, new in ((2, 99), (4, 2), (99, 4))
        ),
    )
    with pytest.raises(LedgerError):
        opened(tmp_path)


def test_a_row_from_a_forked_copy_is_refused(tmp_path: Path) -> None:
    """A cheaper row, written under the same key at the same place of a copy, does not fit the rows after
    it.
    """
    filled(tmp_path, 1)
    fork = tmp_path / "fork"
    fork.mkdir()
    for path in tmp_path.glob("ledger.sqlite3*"):
        shutil.copy(path, fork)
    with opened(tmp_path) as ledger, opened(fork) as copy:
        reserved(ledger, "run-a", steps(count=100))
        reserved(ledger, "run-b")
        reserved(copy, "run-a", steps(count=1))
    edited(
        tmp_path,
        f"ATTACH '{fork / 'ledger.sqlite3'}' AS fork",
        (
            "UPDATE rows SET (content, mac) = (SELECT content, mac FROM fork.rows WHERE sequence = 4) WHERE "
            "sequence = 4"
        ),
    )
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-damaged"


def test_an_edit_is_noticed_while_the_ledger_is_open(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as ledger:
        edited(tmp_path, "DELETE FROM rows WHERE sequence >= 8")
        for act in (lambda: ledger.spent(DELTA), lambda: reserved(ledger, "run-9"), ledger.verify):
            with pytest.raises(LedgerError) as caught:
                act()
            assert caught.value.code == "ledger-rolled-back"


def test_yesterdays_copy_is_refused(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    shutil.copy(tmp_path / "ledger.sqlite3", tmp_path / "yesterday")
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-today")
    shutil.copy(tmp_path / "yesterday", tmp_path / "ledger.sqlite3")
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-rolled-back"


def test_a_deleted_ledger_is_not_a_fresh_budget(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in tmp_path.glob("ledger.sqlite3*"):
        if not path.name.endswith(".head"):
            path.unlink()
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-missing"
    (tmp_path / "ledger.sqlite3").touch()
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-rolled-back"


def spoil_head(path: Path) -> None:
    path.write_text(path.read_text().replace('"length": 9', '"length": 3'))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (Path.unlink, "ledger-head-missing"),
        (spoil_head, "ledger-damaged"),
        (lambda path: path.write_text("[]"), "ledger-damaged"),
    ],
)
def test_a_spoiled_head_file_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], code: str) -> None:
    filled(tmp_path)
    spoil(tmp_path / "ledger.sqlite3.head")
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == code


def test_a_foreign_ledger_or_key_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path, cohort="liver-ct")
    assert caught.value.code == "ledger-foreign"
    with pytest.raises(LedgerError):
        opened(tmp_path, key=KEY[::-1])
    for key in (b"short", "x" * 32):
        with pytest.raises(ConfigError):
            opened(tmp_path, key=key)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite3").write_bytes(b"this is not a database, but long enough to look at" * 50)
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-damaged"


def test_a_ledger_that_cannot_be_written_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError) as caught:
        Ledger.open(tmp_path / "file" / "ledger.sqlite3", cohort="a", key=KEY)
    assert caught.value.code == "ledger-unwritable"


def test_a_row_whose_head_was_not_yet_noted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash between the row on the disk and its note in the head file."""
    with opened(tmp_path) as ledger:
        monkeypatch.setattr(ledger, "_mark_head", lambda: None)
        reserved(ledger, "run-1")
    with opened(tmp_path) as ledger:
        assert ledger.spent(DELTA) == rdp_epsilon([steps()], DELTA)


def test_names_of_cohorts_never_name_a_path() -> None:
    assert "/" not in ledger_file_name("../../etc/passwd")
    assert ledger_file_name("a") != ledger_file_name("b")


def test_the_ledger_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    filled(tmp_path)
    assert [path.stat().st_mode & 0o077 for path in tmp_path.glob("ledger.sqlite3*")] == [0, 0]


# ---- crashes and company

CHILD = """
import os, sys
from client.site.ledger import Ledger
from common.errors import RefusedError
from common.privacy import GaussianSteps
path, name, last = sys.argv[1:]
ledger = Ledger.open(path, cohort="brain-mri", key=b"a site key that nobody else has.")
for number in range(int(last)):
    try:
        reservation = ledger.reserve(
            request=f"{name}-{number}", purpose="train",
            steps=GaussianSteps(noise_multiplier=3.0, sample_rate=0.25, steps=20),
            fingerprint="", max_epsilon=8.0, delta=1e-5,
        )
        print(number, flush=True)
        ledger.commit(reservation, steps_done=20)
    except RefusedError as refusal:
        assert refusal.code == "budget-exhausted", refusal
"""


def child(folder: Path, name: str, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(folder / "ledger.sqlite3"), name, str(last)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize("after", [1, 4, 9])
def test_a_kill_between_reserve_and_commit_still_counts(tmp_path: Path, after: int) -> None:
    process = child(tmp_path, "run", 1000)
    assert process.stdout is not None
    acknowledged = sum(bool(process.stdout.readline()) for _ in range(after))
    assert acknowledged == after
    process.send_signal(signal.SIGKILL)
    acknowledged += len(process.stdout.readlines())
    assert process.wait() == -signal.SIGKILL
    with opened(tmp_path) as ledger:
        assert ledger.spent(DELTA) >= rdp_epsilon([steps(count=20 * acknowledged)], DELTA)
        assert len([row for row in ledger.rows() if row.kind == "reserve"]) in (
            acknowledged,
            acknowledged + 1,
        )


def how_many_fit(folder: Path) -> int:
    with opened(folder) as ledger:
        number = 0
        while ledger.fits(steps(count=20 * (number + 1)), max_epsilon=8.0, delta=DELTA):
            number += 1
    return number


def test_two_processes_cannot_overspend_together(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    fit = how_many_fit(tmp_path / "alone")
    processes = [child(tmp_path, name, fit) for name in ("one", "two")]
    granted = [len(process.communicate(timeout=60)[0].split()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with opened(tmp_path) as ledger:
        assert sum(granted) == fit
        assert 7 < ledger.spent(DELTA) <= 8.0
        assert ledger.history(executed=True) == ledger.history()


def test_threads_cannot_overspend_together(tmp_path: Path) -> None:
    granted: list[str] = []
    refused: list[str] = []
    planned = steps(noise_multiplier=1.0, count=5)
    with opened(tmp_path) as ledger:

        def spend(name: str) -> None:
            for number in range(10):
                try:
                    reserved(ledger, f"{name}-{number}", planned)
                    granted.append(name)
                except RefusedError as refusal:
                    refused.append(refusal.code)

        threads = [threading.Thread(target=spend, args=(str(number),)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 0 < len(granted) < 40
        assert refused == ["budget-exhausted"] * (40 - len(granted))
        assert math.isclose(ledger.spent(DELTA), rdp_epsilon([steps(1.0, 0.25, 5 * len(granted))], DELTA))
        assert ledger.spent(DELTA) <= 8.0


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    """SQLite refuses one of two that turn a new file's journal into a write-ahead log together, without
    waiting.
    """
    failures: list[BaseException] = []

    def open_one(path: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            Ledger.open(path, cohort="brain-mri", key=KEY).close()
        except BaseException as error:
            failures.append(error)

    for number in range(20):
        together = threading.Barrier(4)
        path = tmp_path / f"ledger-{number}.sqlite3"
        threads = [threading.Thread(target=open_one, args=(path, together)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
