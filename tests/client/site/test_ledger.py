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
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client.site.ledger import Ledger, head_path
from client.site.ledger_rows import LedgerError
from common.errors import ConfigError, RefusedError
from common.privacy import (
    GaussianSteps,
    PrivacyFilter,
    gdp_epsilon,
    gdp_max_mu,
    gdp_mu,
    noise_multiplier_for,
    rdp_epsilon,
)

KEY = b"a site key that nobody else has."
DELTA = 1e-5
DIGEST = "ab" * 32


def steps(noise_multiplier: float = 3.0, sample_rate: float = 0.25, count: int = 20) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=count)


def opened(folder: Path, **changes: Any) -> Ledger:
    path = folder / "ledger.sqlite3"
    return Ledger.open(
        path, **{"cohort": "brain-mri", "key": KEY, "create": not head_path(path).exists()} | changes
    )


def spent(ledger: Ledger) -> float:
    return ledger.accounts(max_epsilon=8.0, max_delta=DELTA)[0].spent


def cost(*history: GaussianSteps) -> float:
    """What the filter that `steps()` fixes at a cap of 8 adds up."""
    return PrivacyFilter.for_first(steps(), epsilon=8.0, delta=DELTA).cost(history)


def commit(ledger: Ledger, reservation: Any, steps_done: int, part: str = "", digest: str = DIGEST) -> None:
    ledger.commit(reservation, steps_done=steps_done, digest=digest, part=part)


def executed(ledger: Ledger) -> int:
    return sum(row.steps for row in ledger.rows() if row.kind == "commit")


def kinds(ledger: Ledger) -> list[str]:
    return [row.kind for row in ledger.rows()]


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
        max_delta=DELTA,
    )


def filled(folder: Path, count: int = 4) -> None:
    with opened(folder) as ledger:
        for number in range(count):
            commit(ledger, reserved(ledger, f"run-{number}"), 20)


def edited(folder: Path, *statements: str) -> None:
    connection = sqlite3.connect(folder / "ledger.sqlite3")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_new_ledger_has_spent_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        assert spent(ledger) == 0
        assert ledger.history() == []
        assert not ledger.has_non_private
        assert kinds(ledger) == ["open"]


def test_ledger_survives_restart(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1/federated_dp")
        commit(ledger, reservation, 20)
        before = spent(ledger)
    with opened(tmp_path) as ledger:
        assert spent(ledger) == before == cost(steps())
        reserved(ledger, "run-2/federated_dp")
        assert spent(ledger) == cost(steps(count=40))


def test_costs_are_composed_not_added(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        for number in range(10):
            reserved(ledger, f"round-{number}")
        assert ledger.history() == [steps(count=200)]
        assert rdp_epsilon([steps(count=200)], DELTA) <= spent(ledger) < 10 * cost(steps()) / 2


def test_a_request_over_budget_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", max_epsilon=2.0)
        before = spent(ledger)
        expensive = steps(noise_multiplier=1.0, count=50)
        with pytest.raises(RefusedError):
            ledger.check({"run-2": expensive}, max_epsilon=2.0, max_delta=DELTA)
        with pytest.raises(RefusedError) as caught:
            reserved(ledger, "run-2", expensive, max_epsilon=2.0)
        assert caught.value.code == "budget-exhausted"
        assert "budget is 2" in caught.value.public_reason
        assert spent(ledger) == before
        assert kinds(ledger) == ["open", "filter", "reserve"]


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
        assert spent(ledger) == cost(steps())


def test_a_request_cannot_come_back_with_other_numbers(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1")
        for other in (steps(count=21), steps(sample_rate=0.26)):
            with pytest.raises(RefusedError) as caught:
                reserved(ledger, "run-1", other)
            assert caught.value.code == "request-mismatch"
        with pytest.raises(RefusedError):
            ledger.record_non_private(request="run-1", purpose="train", fingerprint="")


def test_an_unfinished_run_keeps_its_reserved_noise(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1")
        again = reserved(ledger, "run-1", steps(noise_multiplier=2.9))
        assert (again.steps, again.is_new) == (steps(), False)
        commit(ledger, again, 20)


def test_a_reservation_is_never_refunded(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1")
        commit(ledger, reservation, 3)
        assert ledger.history() == [steps(count=20)]
        assert executed(ledger) == 3


def test_rounds_draw_from_the_reservation_of_their_run(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reservation = reserved(ledger, "run-1/federated_dp")
        for number in range(4):
            commit(ledger, reservation, 5, f"round {number}")
            commit(ledger, reservation, 5, f"round {number}")  # a repeated commit changes nothing
        assert executed(ledger) == 20
        with pytest.raises(LedgerError) as caught:
            commit(ledger, reservation, 1, "round 4")
        assert caught.value.code == "reservation-exceeded"
        for other in ({"steps_done": 4}, {"steps_done": 5, "digest": "cd" * 32}):
            with pytest.raises(LedgerError) as caught:
                commit(ledger, reservation, part="round 0", **other)
            assert caught.value.code == "request-mismatch"


def test_only_what_was_reserved_can_be_committed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with opened(tmp_path) as ledger, opened(tmp_path / "other") as other:
        with pytest.raises(LedgerError) as caught:
            commit(ledger, reserved(other, "run-1"), 1)
        assert caught.value.code == "unknown-reservation"
        for wrong in (-1, 1.5, True):
            with pytest.raises(ConfigError):
                commit(ledger, reserved(ledger, "run-2"), wrong)  # type: ignore[arg-type]


def test_a_run_without_privacy_is_recorded_apart_from_the_budget(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.record_non_private(request="run-1/federated", purpose="train", fingerprint="sha256:00")
        ledger.record_non_private(request="run-1/federated", purpose="train", fingerprint="sha256:00")
        assert ledger.has_non_private
        assert spent(ledger) == 0
        assert kinds(ledger) == ["open", "non-private"]
        reserved(ledger, "run-1/federated_dp")
        with pytest.raises(ConfigError):
            reserved(ledger, "run-2", GaussianSteps(noise_multiplier=0.0, sample_rate=1.0, steps=1))
        with pytest.raises(RefusedError):
            reserved(ledger, "run-1/federated")


# ---- damage


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE rows SET content = replace(content, '\"steps\": 20', '\"steps\": 02') WHERE sequence = 3",
        "UPDATE rows SET content = replace(content, '3.0', '9.0') WHERE sequence = 5",
        "UPDATE rows SET content = replace(content, 'reserve', 'commit') WHERE sequence = 3",
        "UPDATE rows SET content = replace(content, '8.0', '9.0') WHERE sequence = 2",
        "UPDATE rows SET mac = zeroblob(32) WHERE sequence = 3",
        "UPDATE rows SET mac = 'text' WHERE sequence = 3",
        "DELETE FROM rows WHERE sequence = 4",
        "DELETE FROM rows WHERE sequence = 10",
        "DELETE FROM rows WHERE sequence > 3",
        "DELETE FROM rows",
        "UPDATE rows SET sequence = 100 WHERE sequence = 10",
        "INSERT INTO rows SELECT 11, content, mac FROM rows WHERE sequence = 10",
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
            for old, new in ((3, 99), (5, 3), (99, 5))
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
            "UPDATE rows SET (content, mac) = (SELECT content, mac FROM fork.rows WHERE sequence = 5) WHERE "
            "sequence = 5"
        ),
    )
    with pytest.raises(LedgerError) as caught:
        opened(tmp_path)
    assert caught.value.code == "ledger-damaged"


def test_an_edit_is_noticed_while_the_ledger_is_open(tmp_path: Path) -> None:
    filled(tmp_path)
    with opened(tmp_path) as ledger:
        edited(tmp_path, "DELETE FROM rows WHERE sequence >= 9")
        for act in (lambda: spent(ledger), lambda: reserved(ledger, "run-9"), ledger.head):
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
    path.write_text(path.read_text().replace('"length": 10', '"length": 3'))


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


def test_another_key_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
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
        Ledger.open(tmp_path / "file" / "ledger.sqlite3", cohort="a", key=KEY, create=True)
    assert caught.value.code == "ledger-unwritable"


def test_a_row_whose_head_was_not_yet_noted_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The crash between the row on the disk and its note in the head file."""
    with opened(tmp_path) as ledger:
        monkeypatch.setattr(ledger, "_mark_head", lambda: None)
        reserved(ledger, "run-1")
    with opened(tmp_path) as ledger:
        assert spent(ledger) == cost(steps())


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
ledger = Ledger.open(path, cohort="brain-mri", key=b"a site key that nobody else has.", create=True)
for number in range(int(last)):
    try:
        reservation = ledger.reserve(
            request=f"{name}-{number}", purpose="train",
            steps=GaussianSteps(noise_multiplier=3.0, sample_rate=0.25, steps=20),
            fingerprint="", max_epsilon=8.0, max_delta=1e-5,
        )
        print(number, flush=True)
        ledger.commit(reservation, steps_done=20, digest="ab" * 32)
    except RefusedError as refusal:
        assert refusal.code == "budget-exhausted", refusal
"""


def child(folder: Path, name: str, last: int, program: str = CHILD) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder / "ledger.sqlite3"), name, str(last)]
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
        assert spent(ledger) >= cost(steps(count=20 * acknowledged))
        assert len([row for row in ledger.rows() if row.kind == "reserve"]) in (
            acknowledged,
            acknowledged + 1,
        )


def how_many_fit() -> int:
    gate = PrivacyFilter.for_first(steps(), epsilon=8.0, delta=DELTA)
    number = 0
    while gate.admits([], steps(count=20 * (number + 1))):
        number += 1
    return number


def test_two_processes_cannot_overspend_together(tmp_path: Path) -> None:
    fit = how_many_fit()
    processes = [child(tmp_path, name, fit) for name in ("one", "two")]
    granted = [len(process.communicate(timeout=60)[0].split()) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with opened(tmp_path) as ledger:
        assert sum(granted) == fit
        assert 7 < spent(ledger) <= 8.0
        assert executed(ledger) == 20 * fit


def test_a_ledger_opened_twice_in_a_process_loses_nothing_to_another(tmp_path: Path) -> None:
    """Whoever closes a file takes all POSIX locks of its process on it away. An agent that made sure of the
    file's mode, while it held the ledger open, lost its place: the next process removed the log as if it were
    the last, and what the agent then recorded went into the removed file.
    """
    closing = CHILD + "\nledger.close()\n"
    with opened(tmp_path) as held:
        first = reserved(held, "held", steps(count=1))
        with opened(tmp_path) as again:
            assert len(again.rows()) == len(held.rows())
        other = child(tmp_path, "other", 2, closing)
        other.communicate(timeout=60)
        assert other.returncode == 0
        held.commit(first, steps_done=1, digest="ab" * 32)
        reserved(held, "held-2", steps(count=1))
        assert (tmp_path / "ledger.sqlite3-wal").exists()
    with opened(tmp_path) as ledger:
        rows = ledger.rows()
    assert [row.request for row in rows if row.kind == "reserve"] == ["held", "other-0", "other-1", "held-2"]
    assert sum(row.kind == "commit" for row in rows) == 3


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
        gate = PrivacyFilter.for_first(planned, epsilon=8.0, delta=DELTA)
        assert math.isclose(spent(ledger), gate.cost([steps(1.0, 0.25, 5 * len(granted))]))
        assert spent(ledger) <= 8.0


def test_many_may_open_a_new_ledger_at_once(tmp_path: Path) -> None:
    """SQLite refuses one of two that turn a new file's journal into a write-ahead log together, without
    waiting.
    """
    failures: list[BaseException] = []

    def open_one(path: Path, together: threading.Barrier) -> None:
        together.wait()
        try:
            Ledger.open(path, cohort="brain-mri", key=KEY, create=True).close()
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


def test_a_ledger_that_another_process_makes_at_this_moment_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite3"
    exists = Path.exists
    made: list[Path] = []

    def made_by_another(asked: Path) -> bool:
        before = exists(asked)
        if asked == path and not made:
            made.append(asked)
            Ledger.open(path, cohort="brain-mri", key=KEY, create=True).close()
        return before

    monkeypatch.setattr(Path, "exists", made_by_another)
    Ledger.open(path, cohort="brain-mri", key=KEY, create=True).close()
    assert made == [path]


# ---- the filter

UNSAMPLED = steps(noise_multiplier=5.0, sample_rate=1.0, count=10)


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises((RefusedError, ConfigError)) as caught:
        act()
    return caught.value.code


def test_the_first_reservation_fixes_the_filter_in_its_own_transaction(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        assert refusal(lambda: reserved(ledger, "too-much", steps(0.5, 1.0, 90))) == "budget-exhausted"
        assert kinds(ledger) == ["open"], "a refused request fixes nothing"
        reserved(ledger, "run-1", UNSAMPLED)
        found = ledger.rows()[1]
        assert (found.kind, found.request, found.epsilon, found.delta, found.order) == (
            *("filter", "gdp", 8.0, DELTA),
            0.0,
        )
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED]), DELTA)
    (tmp_path / "sampled").mkdir()
    with opened(tmp_path / "sampled") as ledger:
        reserved(ledger, "run-1")
        found = ledger.rows()[1]
        gate = PrivacyFilter.for_first(steps(), epsilon=8.0, delta=DELTA)
        assert (found.request, found.order) == ("rdp", gate.order)
        reserved(ledger, "run-2", UNSAMPLED)  # the other way round is no harm


def test_gdp_admits_exactly_up_to_its_largest_mu(tmp_path: Path) -> None:
    one = steps(noise_multiplier=2.0, sample_rate=1.0, count=1)
    fit = int(gdp_max_mu(8.0, DELTA) ** 2 * 4)
    with opened(tmp_path) as ledger:
        for number in range(fit):
            reserved(ledger, f"run-{number}", one)
        assert refusal(lambda: reserved(ledger, "one-more", one)) == "budget-exhausted"


def test_sampling_under_gdp_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)
        assert refusal(lambda: reserved(ledger, "run-2", steps())) == "sampling-not-permitted"
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED]), DELTA)


def test_another_delta_of_the_policy_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)

        def with_delta(request: str, delta: float) -> Any:
            return ledger.reserve(
                request=request,
                steps=UNSAMPLED,
                purpose="train",
                fingerprint="",
                max_epsilon=8.0,
                max_delta=delta,
            )

        for delta in (1e-4, 1e-6):
            assert refusal(partial(with_delta, "run-2", delta)) == "filter-fixed"
        assert not with_delta("run-1", 1e-6).is_new, "what is paid for is not asked again"
        with_delta("run-2", DELTA)


def test_a_lower_epsilon_of_the_policy_counts_and_a_higher_one_does_not(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)
        now = spent(ledger)
        assert refusal(lambda: reserved(ledger, "run-2", UNSAMPLED, max_epsilon=now)) == "budget-exhausted"
        large = steps(noise_multiplier=1.0, sample_rate=1.0, count=5)
        assert refusal(lambda: reserved(ledger, "run-3", large, max_epsilon=50.0)) == "budget-exhausted"
        account = ledger.accounts(max_epsilon=50.0, max_delta=DELTA)[0]
        assert (account.cap, account.delta, account.kind) == (8.0, DELTA, "gdp")


def test_the_cap_is_raised_by_a_row_that_names_who_and_why(tmp_path: Path) -> None:
    large = steps(noise_multiplier=1.0, sample_rate=1.0, count=5)
    with opened(tmp_path) as ledger:
        assert refusal(lambda: ledger.raise_cap(9.0, reason="r", by="u")) == "bad-cap"
        reserved(ledger, "run-1", UNSAMPLED)
        for wrong in (8.0, 7.0, math.inf, math.nan, 1001.0):
            assert refusal(partial(ledger.raise_cap, wrong, reason="r", by="u")) == "bad-cap"
        assert refusal(lambda: ledger.raise_cap(20.0, reason="", by="u")) == "bad-request"
        ledger.raise_cap(20.0, reason="new consent form", by="operator")
        row = ledger.rows()[-1]
        assert (row.kind, row.epsilon, row.purpose, row.by) == ("cap", 20.0, "new consent form", "operator")
        assert refusal(lambda: reserved(ledger, "run-2", large)) == "budget-exhausted", "the policy says 8"
        reserved(ledger, "run-2", large, max_epsilon=20.0)


# ---- cohorts and accounts


def test_all_cohorts_share_one_budget(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)
    with opened(tmp_path, cohort="renamed") as ledger:
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED]), DELTA)
        reserved(ledger, "run-1", UNSAMPLED)  # the same question about another cohort is another charge
        assert spent(ledger) == gdp_epsilon(gdp_mu([UNSAMPLED, UNSAMPLED]), DELTA)
        assert [row.cohort for row in ledger.rows() if row.kind == "reserve"] == ["brain-mri", "renamed"]


def test_a_disjoint_cohort_has_its_own_account_and_loses_patients_of_an_older_one(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        assert ledger.admit_patients({"a": ["form-a"], "b": [], "gone": []}) == set()
        reserved(ledger, "run-1", UNSAMPLED)
        assert ledger.admit_patients({"a": ["form-a"], "b": []}) == set()  # one opted out meanwhile
    with opened(tmp_path, cohort="new", disjoint=True) as ledger:
        assert refusal(lambda: reserved(ledger, "run-2", UNSAMPLED)) == "cohort-unknown"
        assert ledger.admit_patients({"x": ["form-a"], "b": [], "gone": [], "c": []}) == {"x", "b", "gone"}
        assert spent(ledger) == 0
        reserved(ledger, "run-2", UNSAMPLED)
        own, shared = ledger.accounts(max_epsilon=8.0, max_delta=DELTA)
        assert (own.name, own.cohorts, shared.name, shared.cohorts) == ("new", ("new",), "", ("brain-mri",))
        assert own.spent == shared.spent > 0
    with opened(tmp_path) as ledger:  # back to the first cohort, whose folder has patients of the second now
        assert ledger.admit_patients({"a": [], "c": [], "d": []}) == {"c"}
    with opened(tmp_path, cohort="third") as ledger:
        assert refusal(lambda: reserved(ledger, "run-3", UNSAMPLED)) == "cohort-unknown"
        assert ledger.admit_patients({"c": [], "a": []}) == {"c"}
        reserved(ledger, "run-3", UNSAMPLED)


def test_asking_who_is_elsewhere_notes_nobody(tmp_path: Path) -> None:
    """The operator's report: what a run would leave out, without a trace in the table."""
    with opened(tmp_path) as ledger:
        ledger.admit_patients({"a": ["form-a"], "b": []})
        assert ledger.found_elsewhere({"a": [], "c": []}) == set()
    with opened(tmp_path, cohort="new", disjoint=True) as ledger:
        before = ledger.head(), list(ledger._chain("members"))
        assert ledger.found_elsewhere({"x": ["form-a"], "b": [], "c": []}) == {"x", "b"}
        assert (ledger.head(), list(ledger._chain("members"))) == before
        assert ledger.admit_patients({"x": ["form-a"], "b": [], "c": []}) == {"x", "b"}


def test_the_same_index_again_leaves_no_trace(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        for _ in range(3):
            ledger.admit_patients({"a": ["form"], "b": []})
        ledger.admit_patients({"b": []})
        assert len(list(ledger._chain("members"))) == 1


@pytest.mark.parametrize("disjoint", [True, False])
def test_what_a_cohort_is_at_its_first_use_it_stays(tmp_path: Path, disjoint: bool) -> None:
    with opened(tmp_path, disjoint=disjoint) as ledger:
        ledger.admit_patients({"a": []})
        reserved(ledger, "run-1", UNSAMPLED)
    with opened(tmp_path, disjoint=not disjoint) as ledger:
        for act in (
            lambda: reserved(ledger, "run-2", UNSAMPLED),
            lambda: ledger.admit_patients({"a": []}),
            lambda: ledger.record_non_private(request="r", purpose="p", fingerprint=""),
        ):
            assert refusal(act) == "cohort-fixed"


def test_no_cohort_is_disjoint_from_one_whose_patients_nobody_noted(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)
    with opened(tmp_path, cohort="new", disjoint=True) as ledger:
        assert refusal(lambda: ledger.admit_patients({"a": []})) == "cohort-unknown"


def test_patients_cannot_be_taken_out_of_the_table_again(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.admit_patients({"a": []})
        ledger.admit_patients({"b": []})
        reserved(ledger, "run-1", UNSAMPLED)
    edited(tmp_path, "DELETE FROM members WHERE sequence = 2")
    with opened(tmp_path, cohort="new", disjoint=True) as ledger:
        assert refusal(lambda: ledger.admit_patients({"b": []})) == "ledger-rolled-back"
    edited(tmp_path, "UPDATE members SET content = replace(content, 'brain-mri', 'x')")
    with opened(tmp_path, cohort="new", disjoint=True) as ledger:
        assert refusal(lambda: ledger.admit_patients({"b": []})) == "ledger-damaged"


def test_the_table_holds_no_pseudonym(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.admit_patients({"pseudonym-1": ["form-of-1"]})
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"pseudonym-1" not in raw
    assert b"form-of-1" not in raw


# ---- the head


def test_the_head_does_not_move_with_the_patients(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        reserved(ledger, "run-1", UNSAMPLED)
        before = ledger.head()
        ledger.admit_patients({"a": [], "b": []})
        assert ledger.head() == before
        assert before.startswith("3:")


def test_every_earlier_head_is_an_ancestor_and_nothing_else_is(tmp_path: Path) -> None:
    heads = []
    with opened(tmp_path) as ledger:
        for number in range(3):
            heads.append(ledger.head())
            commit(ledger, reserved(ledger, f"run-{number}", UNSAMPLED), 10)
        heads.append(ledger.head())
        for head in heads:
            ledger.check_ancestor(head)
        foreign = [f"2:{heads[-1].partition(':')[2]}", "99:" + "0" * 64, "0:", "x", "1:"]
        for head in foreign:
            assert refusal(partial(ledger.check_ancestor, head)) == "ledger-rolled-back"


def test_yesterdays_copy_with_its_head_file_is_no_descendant(tmp_path: Path) -> None:
    """Also a copy that went its own way since: of two running copies of a site one is found."""
    filled(tmp_path, 1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("ledger.sqlite3*"):
        shutil.copy(path, copy)
    with opened(tmp_path) as ledger, opened(copy) as other:
        reserved(ledger, "run-today")
        head = ledger.head()
        assert refusal(lambda: other.check_ancestor(head)) == "ledger-rolled-back"
        reserved(other, "run-other")
        reserved(other, "run-another")
        assert refusal(lambda: other.check_ancestor(head)) == "ledger-rolled-back"


def test_an_emptied_ledger_without_a_head_is_no_new_one(tmp_path: Path) -> None:
    filled(tmp_path)
    for path in tmp_path.glob("ledger.sqlite3*"):
        path.unlink()
    (tmp_path / "ledger.sqlite3").touch()
    assert refusal(lambda: opened(tmp_path, create=False)) == "ledger-missing"
