"""Keep the privacy ledger: the epsilon spent for each cohort, on the site's disk for as long as the site
exists.

One SQLite file per installation and cohort (WAL, synchronous = FULL). Guarantee: an epsilon read from here is
never smaller than that of all releases under this ledger. To that end
- a reservation is on the disk *before* the first patient is sampled, and is never refunded: what is reserved
  is charged in full, whether the work finished, failed or was killed. `commit` records what was done, for the
  report;
- two processes cannot both pass the gate: check and write are one `BEGIN IMMEDIATE` transaction;
- the same request asked twice gets its first reservation and costs nothing more. That is right only if one
  answer per request ever leaves the site, which is the outbox's part;
- every row carries an HMAC under a key of the site over its content and the previous row's HMAC. An edited,
  inserted, reordered or deleted row, a foreign file or a wrong key is refused (`ledger-damaged`,
  `ledger-foreign`);
- the length and last HMAC are repeated in `<file>.head` beside it, also under the key, so that a truncated
  tail, yesterday's copy or a missing file is refused (`ledger-rolled-back`, `ledger-missing`,
  `ledger-head-missing`).

What voids it: restoring the ledger *and* its head file from a backup, or deleting both; someone who holds the
site key; the same patient in two cohorts or at two sites (costs add up). Nothing here looks at a patient:
rows hold request names, numbers and dataset fingerprints.

Non-private runs are rows of their own kind, an infinite epsilon that is shown (`has_non_private`) and kept
apart from the private budget.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from common.errors import ConfigError, RefusedError
from common.files import write_bytes
from common.privacy import GaussianSteps, filter_admits, filter_epsilon, merge, rdp_epsilon

RowKind = Literal["open", "reserve", "commit", "non-private"]

MIN_KEY_BYTES = 16
MAX_TEXT_LENGTH = 512
BUSY_TIMEOUT_S = 30.0


class LedgerError(RefusedError):
    """The ledger cannot vouch for what was spent, so the site refuses: it fails closed.

    `public_reason` says no more than that; the message, for the site's log, says what is wrong with which
    file.
    """

    code = "ledger-damaged"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        super().__init__(
            message, code=code, hint=hint, public_reason="the site's privacy ledger cannot be used"
        )


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One line of the ledger, as written. Numbers that do not apply to its kind are 0."""

    sequence: int
    kind: RowKind
    request: str  # which question: run and arm, or run, arm and round
    part: str  # of a commit: which part of the request was done
    purpose: str
    fingerprint: str  # of the dataset at that time; recorded, never a key
    noise_multiplier: float
    sample_rate: float
    steps: int
    at: str  # UTC, for a human; the order is that of `sequence`

    def as_steps(self) -> GaussianSteps:
        return GaussianSteps(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps
        )


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A charge that is on the disk. `steps` is all that may be executed under it."""

    request: str
    steps: GaussianSteps
    sequence: int
    is_new: bool  # False: the request had been reserved before, nothing was charged now


class Ledger:
    """The privacy ledger of one cohort at one installation. Safe to share between threads; other processes
    open their own.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, *, cohort: str, key: bytes) -> None:
        """Private: use `Ledger.open`, which verifies."""
        self._connection = connection
        self._path = path
        self._cohort = cohort
        self._key = hmac.digest(key, b"fedqc privacy ledger v1\0" + cohort.encode(), "sha256")
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path | str, *, cohort: str, key: bytes) -> Ledger:
        """Open the ledger of `cohort`, creating it where there has never been one, and verify it.

        Args:
            path: the SQLite file. `<path>.head` lies beside it.
            cohort: the cohort id of `site.yaml`; a ledger of another cohort is refused.
            key: the site's ledger key, at least 16 bytes, secret, kept for as long as the ledger.
        Raises:
            LedgerError: `ledger-damaged`, `ledger-foreign`, `ledger-rolled-back`, `ledger-missing`,
                `ledger-unwritable`, `ledger-busy`.
            ConfigError: the cohort is empty or the key too short.
        """
        path = Path(path)
        _checked_text("cohort", cohort)
        if not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES:
            raise ConfigError(f"the ledger key must be at least {MIN_KEY_BYTES} bytes", code="bad-ledger-key")
        if not path.exists() and _head_path(path).exists():
            raise LedgerError(
                f"{path} is missing, but {_head_path(path).name} exists",
                code="ledger-missing",
                hint=(
                    "restore the ledger from a backup; deleting the head file declares that nothing was "
                    "ever spent"
                ),
            )
        with _sqlite_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            ledger = cls(connection, path, cohort=cohort, key=key)
            try:
                ledger._prepare()
                ledger.verify()
            except BaseException:
                connection.close()
                raise
        return ledger

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def spent(self, delta: float) -> float:
        """Epsilon at `delta` of every reservation ever made, per patient, add/remove (RDP); non-private rows
        are kept apart.
        """
        return rdp_epsilon(self.history(), delta)

    def history(self, *, executed: bool = False) -> list[GaussianSteps]:
        """What the budget is charged for, equal mechanisms added up. With `executed`, only the steps that
        commits say were done.
        """
        rows = self.rows()
        if not executed:
            return _charged(rows)
        reserved = {row.request: row for row in rows if row.kind == "reserve"}
        done = [(reserved[row.request], row.steps) for row in rows if row.kind == "commit" and row.steps > 0]
        return merge(
            GaussianSteps(noise_multiplier=row.noise_multiplier, sample_rate=row.sample_rate, steps=steps)
            for row, steps in done
        )

    @property
    def has_non_private(self) -> bool:
        """Whether a run without differential privacy ever trained on this cohort: its patients' epsilon is
        then infinite.
        """
        return any(row.kind == "non-private" for row in self.rows())

    def fits(self, steps: GaussianSteps, *, max_epsilon: float, delta: float) -> bool:
        """Whether a reservation of `steps` would be granted now. Nothing is written; only `reserve`
        decides.
        """
        return filter_admits(self.history(), steps, epsilon=max_epsilon, delta=delta)

    def reserve(
        self,
        *,
        request: str,
        steps: GaussianSteps,
        purpose: str,
        fingerprint: str,
        max_epsilon: float,
        delta: float,
    ) -> Reservation:
        """Charge `steps` to the cohort, durably, before the first patient is sampled; or refuse.

        The gate is the RDP filter over all reservations and this one (`common.privacy.filter_admits`).
        Reserve a whole run under one request so that a run that was admitted never stops for lack of budget
        (an abandoned run then stays charged in full), or round by round for the reverse.

        Args:
            request: names the question: run and arm, or run, arm and round. Asked again with the same steps
                and purpose, the first reservation is returned and nothing is charged.
            purpose: what for, in the report: "train", "evaluate".
            fingerprint: of the dataset; recorded in the row.
            max_epsilon, delta: the policy's lifetime cap.
        Raises:
            RefusedError: `budget-exhausted`; `request-mismatch` if the request was reserved with other steps
                or purpose.
            LedgerError: the ledger cannot be verified or written.
            ConfigError: steps without noise (see `record_non_private`), or arguments out of range.
        """
        _checked_text("request", request)
        _checked_text("purpose", purpose)
        _checked_text("fingerprint", fingerprint, may_be_empty=True)
        if not steps.is_private:
            raise ConfigError(
                "a reservation needs noise; a run without is recorded by record_non_private",
                code="bad-privacy-parameters",
            )
        with self._transaction() as rows:
            for row in rows:
                if row.request != request or row.kind not in ("reserve", "non-private"):
                    continue
                if row.kind != "reserve" or row.as_steps() != steps or row.purpose != purpose:
                    raise _mismatch(request)
                return Reservation(request=request, steps=steps, sequence=row.sequence, is_new=False)
            history = _charged(rows)
            if not filter_admits(history, steps, epsilon=max_epsilon, delta=delta):
                before = rdp_epsilon(history, delta)
                after = filter_epsilon(history, steps, epsilon=max_epsilon, delta=delta)
                raise RefusedError(
                    (
                        f"{request}: {before:.4g} of epsilon {max_epsilon:.4g} at delta {delta:g} is spent; "
                        f"{steps} would make it {after:.4g}"
                    ),
                    code="budget-exhausted",
                    public_reason=(
                        f"the site's privacy budget is {max_epsilon:.4g}; this request would "
                        f"make the total {after:.4g}"
                    ),
                    hint="use fewer steps or more noise; see fedqc site budget",
                )
            sequence = self._append(
                "reserve", request=request, purpose=purpose, fingerprint=fingerprint, steps=steps
            )
        self._mark_head()
        return Reservation(request=request, steps=steps, sequence=sequence, is_new=True)

    def commit(self, reservation: Reservation, *, steps_done: int, part: str = "") -> None:
        """Record that `steps_done` steps were executed under `reservation`; the charge stays what was
        reserved.

        Call it before the answer leaves. `part` tells the pieces of one reservation apart, e.g. "round 3";
        the same part committed again with the same number changes nothing.

        Raises:
            LedgerError: `unknown-reservation`; `reservation-exceeded` if more steps were executed than
                reserved, whose outcome must not leave; `request-mismatch` if the part was committed with
                another number.
        """
        _checked_text("part", part, may_be_empty=True)
        if isinstance(steps_done, bool) or not isinstance(steps_done, int) or steps_done < 0:
            raise ConfigError(
                f"steps_done = {steps_done!r} must be a whole number, at least 0",
                code="bad-privacy-parameters",
            )
        with self._transaction() as rows:
            reserved = [row for row in rows if row.kind == "reserve" and row.request == reservation.request]
            if not reserved or reserved[0].as_steps() != reservation.steps:
                raise LedgerError(f"{reservation.request}: no such reservation", code="unknown-reservation")
            commits = {
                row.part: row.steps
                for row in rows
                if row.kind == "commit" and row.request == reservation.request
            }
            if part in commits:
                if commits[part] != steps_done:
                    raise LedgerError(
                        (
                            f"{reservation.request} {part}: {commits[part]} steps were committed before, "
                            f"{steps_done} now"
                        ),
                        code="request-mismatch",
                    )
                return
            total = sum(commits.values()) + steps_done
            if total > reserved[0].steps:
                raise LedgerError(
                    f"{reservation.request} {part}: {total} steps done, {reserved[0].steps} reserved",
                    code="reservation-exceeded",
                )
            self._append(
                "commit",
                request=reservation.request,
                part=part,
                purpose=reserved[0].purpose,
                num_steps=steps_done,
            )
        self._mark_head()

    def record_non_private(self, *, request: str, purpose: str, fingerprint: str) -> None:
        """Record, before it starts, a run that trains without differential privacy: epsilon is infinite from
        here on.

        The caller has asked the policy (`allow_non_private`). Once per request; a second call changes
        nothing.
        """
        _checked_text("request", request)
        _checked_text("purpose", purpose)
        _checked_text("fingerprint", fingerprint, may_be_empty=True)
        with self._transaction() as rows:
            kinds = {row.kind for row in rows if row.request == request}
            if kinds == {"non-private"}:
                return
            if kinds:
                raise _mismatch(request)
            self._append("non-private", request=request, purpose=purpose, fingerprint=fingerprint)
        self._mark_head()

    def rows(self) -> list[LedgerRow]:
        """Every row in order, after verifying the chain."""
        with self._lock, _sqlite_errors(self._path):
            return self._verified_rows()

    def verify(self) -> None:
        """Verify every row's HMAC, the chain, and that nothing noted in the head file is gone.

        Raises:
            LedgerError: what is wrong, see the module's first lines.
        """
        with self._lock, _sqlite_errors(self._path):
            self._verified_rows()

    def _prepare(self) -> None:
        self._use_write_ahead_log()
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS rows (sequence INTEGER PRIMARY KEY, content TEXT NOT NULL, "
                    "mac BLOB NOT NULL)"
                )
                if self._connection.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is None:
                    noted = self._noted_head()
                    if noted is not None and noted[0] > 0:
                        raise LedgerError(
                            f"{self._path} is empty, but {noted[0]} rows were written",
                            code="ledger-rolled-back",
                        )
                    self._write_head(0, b"")
                    self._append("open", request=self._cohort)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
        first = self._connection.execute("SELECT content FROM rows ORDER BY sequence LIMIT 1").fetchone()[0]
        cohort = json.loads(first).get("request") if first.startswith("{") else None
        if cohort != self._cohort:
            raise LedgerError(
                f"{self._path} is the ledger of cohort {cohort!r}, not of {self._cohort!r}",
                code="ledger-foreign",
            )
        self.verify()
        self._mark_head()

    def _use_write_ahead_log(self) -> None:
        """Switch the file to WAL, once in its life. Where two processes switch at the same time, SQLite
        answers one of them with "database is locked" at once, whatever its busy timeout (a wait there could
        be a deadlock), so the wait is here.
        """
        until = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                # only a lock goes away by waiting: a full disk is reported at once
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _transaction(self) -> Iterator[list[LedgerRow]]:
        """The verified rows under the write lock; what is appended inside is on the disk when the block has
        ended.
        """
        with self._lock, _sqlite_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._verified_rows()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _append(
        self,
        kind: RowKind,
        *,
        request: str,
        part: str = "",
        purpose: str = "",
        fingerprint: str = "",
        steps: GaussianSteps | None = None,
        num_steps: int = 0,
    ) -> int:
        last = self._connection.execute(
            "SELECT sequence, mac FROM rows ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        sequence, previous = (last[0] + 1, bytes(last[1])) if last else (1, b"")
        row = {
            "kind": kind,
            "request": request,
            "part": part,
            "purpose": purpose,
            "fingerprint": fingerprint,
            "noise_multiplier": float(steps.noise_multiplier) if steps else 0.0,
            "sample_rate": float(steps.sample_rate) if steps else 0.0,
            "steps": steps.steps if steps else num_steps,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        content = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
        mac = self._mac(sequence, content, previous)
        self._connection.execute(
            "INSERT INTO rows (sequence, content, mac) VALUES (?, ?, ?)", (sequence, content, mac)
        )
        return sequence

    def _mac(self, sequence: int, content: str, previous: bytes) -> bytes:
        message = sequence.to_bytes(8, "big") + len(previous).to_bytes(8, "big") + previous + content.encode()
        return hmac.digest(self._key, message, "sha256")

    def _chain(self) -> Iterator[tuple[str, bytes]]:
        """Content and HMAC of each row, each verified against the row before."""
        previous = b""
        expected = 1
        for sequence, content, mac in self._connection.execute(
            "SELECT sequence, content, mac FROM rows ORDER BY sequence"
        ):
            intact = sequence == expected and isinstance(content, str) and isinstance(mac, bytes)
            if not intact or not hmac.compare_digest(mac, self._mac(sequence, content, previous)):
                raise LedgerError(
                    (
                        f"{self._path}: row {expected} is damaged (edited, removed, moved, or "
                        "the key is another)"
                    ),
                    hint="restore the newest intact copy of the ledger, its head file and its key",
                )
            yield content, mac
            previous, expected = mac, expected + 1

    def _verified_rows(self) -> list[LedgerRow]:
        # read before the rows: another process may add rows meanwhile, never take them away
        noted = self._noted_head()
        chain = list(self._chain())
        if noted is None:
            raise LedgerError(
                f"{_head_path(self._path)} is missing",
                code="ledger-head-missing",
                hint="restore it from a backup",
            )
        length, mac = noted
        if len(chain) < length or (length and chain[length - 1][1] != mac):
            raise LedgerError(
                (
                    f"{self._path} has {len(chain)} rows, but {length} were written: rows at the end were "
                    "removed, or an old copy restored"
                ),
                code="ledger-rolled-back",
                hint="restore the newest copy",
            )
        return [
            LedgerRow(sequence=number, **json.loads(content))
            for number, (content, _) in enumerate(chain, start=1)
        ]

    def _mark_head(self) -> None:
        """Note length and last HMAC beside the ledger, under its write lock so that an older note never
        replaces a newer one.
        """
        with self._lock, _sqlite_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                length, mac = self._connection.execute(
                    "SELECT sequence, mac FROM rows ORDER BY sequence DESC LIMIT 1"
                ).fetchone()
                self._write_head(length, bytes(mac))
            finally:
                self._connection.execute("ROLLBACK")

    def _write_head(self, length: int, mac: bytes) -> None:
        note = json.dumps({"length": length, "mac": mac.hex(), "seal": self._seal(length, mac).hex()})
        write_bytes(_head_path(self._path), note.encode(), 0o600)

    def _noted_head(self) -> tuple[int, bytes] | None:
        try:
            text = _head_path(self._path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            note = json.loads(text)
            length, mac, seal = note["length"], bytes.fromhex(note["mac"]), bytes.fromhex(note["seal"])
            intact = (
                isinstance(length, int) and length >= 0 and hmac.compare_digest(seal, self._seal(length, mac))
            )
        except (ValueError, KeyError, TypeError, OverflowError):
            intact = False
        if not intact:
            raise LedgerError(f"{_head_path(self._path)} is damaged (edited, or written under another key)")
        return length, mac

    def _seal(self, length: int, mac: bytes) -> bytes:
        return hmac.digest(self._key, b"head" + length.to_bytes(8, "big") + mac, "sha256")


def ledger_file_name(cohort: str) -> str:
    """A file name for the ledger of `cohort`, made of a digest so that no cohort id can name another path."""
    return f"ledger-{hashlib.sha256(cohort.encode()).hexdigest()[:16]}.sqlite3"


def _charged(rows: list[LedgerRow]) -> list[GaussianSteps]:
    return merge(row.as_steps() for row in rows if row.kind == "reserve")


def _head_path(path: Path) -> Path:
    return path.with_name(path.name + ".head")


def _checked_text(name: str, value: str, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str) or len(value) > MAX_TEXT_LENGTH or not (value or may_be_empty):
        raise ConfigError(
            (
                f"{name} must be text of at most {MAX_TEXT_LENGTH} "
                f"characters{'' if may_be_empty else ', not empty'}"
            ),
            code="bad-request",
        )


def _mismatch(request: str) -> RefusedError:
    return RefusedError(
        f"{request}: was recorded before with other steps, another purpose or another kind",
        code="request-mismatch",
        public_reason="a request of this name was recorded before with other privacy parameters",
        hint="use a new name for a new run",
    )


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        busy = "locked" in str(error) or "busy" in str(error)
        raise LedgerError(f"{path}: {error}", code="ledger-busy" if busy else "ledger-unwritable") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: {error}", hint="restore the newest intact copy") from error
    except OSError as error:
        raise LedgerError(
            f"{path}: {error}",
            code="ledger-unwritable",
            hint="check the disk's free space and the folder's permissions",
        ) from error
