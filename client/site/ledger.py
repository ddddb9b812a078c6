"""Keep the privacy ledger: what was spent on an installation's patients, for as long as the site exists.

One SQLite file an installation, `state/ledger.sqlite3` (WAL, synchronous = FULL). Guarantee: what is read
from here is never less than what all releases under this ledger cost one patient of this installation. To
that end
- a reservation is on the disk *before* the first patient is sampled, and is never refunded: what is reserved
  is charged in full, whether the work finished, failed or was killed;
- `commit` records the digest of a stored answer before that answer leaves, so that an answer that was sent
  and is lost is never replaced by a second one under the same charge;
- two processes cannot both pass the gate: check and write are one `BEGIN IMMEDIATE` transaction;
- the gate is one `common.privacy.PrivacyFilter`, written in the transaction of the first reservation, from
  that request and the policy alone. Its kind, delta and order never change; its cap rises only by
  `raise_cap`;
- every row carries an HMAC under a key of the site over its content and the previous row's HMAC. An edited,
  inserted, reordered or deleted row, a foreign file or a wrong key is refused (`ledger-damaged`);
- the length and last HMAC are repeated in `<file>.head` beside it, also under the key, so that a truncated
  tail, yesterday's copy or a missing file is refused (`ledger-rolled-back`, `ledger-missing`,
  `ledger-head-missing`). The coordinator keeps the same two numbers (`head`), and a site refuses where they
  are not an ancestor in its chain (`check_ancestor`).

**Accounts.** All cohorts share one account, whatever they are called. A cohort that site.yaml declares
disjoint has its own: no patient is in two accounts, because `admit_patients`, asked at every reading of an
index, leaves out of each account every patient who was found in another before, and forgets none. What a
patient loses is then the largest of the accounts, not their sum. What a cohort is at its first use it stays.

What voids the guarantee: restoring everything, ledger, head file and the coordinator's note of it; someone
who holds the site key; one patient at two installations, or under two identifiers that no rule joins (costs
add up). Rows hold request names, numbers and index fingerprints. The table of patients holds keyed digests;
neither it nor its growth shows in `head`.

Training without noise is a row of its own kind, an infinite epsilon that is shown (`has_non_private`) and
kept apart from the private budget. So is an operator's declaration that the images are no hospital's patients
(`record_declaration`): it charges nothing, and says why nothing was charged.
"""

from __future__ import annotations

import errno
import hmac
import json
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.site.ledger_rows import (
    DEFAULTS,
    SHARED,
    Account,
    LedgerError,
    LedgerRow,
    RowKind,
    account_named,
    admitted,
    charged,
    filter_of,
    fixed_filter,
)
from common.errors import ConfigError, RefusedError
from common.files import make_private, write_bytes
from common.privacy import GaussianSteps

MIN_KEY_BYTES = 16
MAX_TEXT_LENGTH = 512
BUSY_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Reservation:
    """A charge that is on the disk. `steps` is all that may be executed under it, with its noise."""

    request: str
    steps: GaussianSteps
    sequence: int
    is_new: bool  # False: the request had been reserved before, nothing was charged now


class Ledger:
    """The privacy ledger of an installation, on behalf of one of its cohorts. Safe to share between threads;
    other processes open their own.
    """

    def __init__(
        self, connection: sqlite3.Connection, path: Path, *, key: bytes, cohort: str, disjoint: bool
    ) -> None:
        """Private: use `Ledger.open`, which verifies."""
        self._connection = connection
        self._path = path
        self._cohort, self._disjoint = cohort, disjoint
        self._key = hmac.digest(key, b"fedqc privacy ledger v2\0", "sha256")
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls, path: Path | str, *, key: bytes, cohort: str, disjoint: bool = False, create: bool = False
    ) -> Ledger:
        """Open the ledger of an installation and verify it.

        Args:
            path: the SQLite file. `<path>.head` lies beside it.
            key: the site's key, at least 16 bytes, secret, kept for as long as the ledger.
            cohort: of site.yaml; it stands in each row.
            disjoint: whether site.yaml declares this cohort disjoint from every other.
            create: make it where there is none. Whether there may be a new one, the caller has checked
                (`client.site.site_ledger`).
        Raises:
            LedgerError: `ledger-damaged`, `ledger-rolled-back`, `ledger-missing`, `ledger-head-missing`,
                `ledger-unwritable`, `ledger-busy`.
            ConfigError: the cohort is empty or the key too short.
        """
        path = Path(path)
        _checked_text("cohort", cohort)
        if not isinstance(key, bytes) or len(key) < MIN_KEY_BYTES:
            raise ConfigError(f"the ledger key must be at least {MIN_KEY_BYTES} bytes", code="bad-ledger-key")
        with _sqlite_errors(path):
            # asked first: whoever makes a ledger at this moment makes the file before its head
            has_head = head_path(path).exists()
            if not path.exists() and (has_head or not create):
                known = ", but its head file exists" if has_head else ""
                raise LedgerError(
                    f"{path} is missing{known}",
                    code="ledger-missing",
                    hint="restore ledger and head file from the newest backup",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            make_private(path)
            connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            ledger = cls(connection, path, key=key, cohort=cohort, disjoint=disjoint)
            try:
                ledger._prepare(create=create)
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

    def history(self) -> list[GaussianSteps]:
        """What the account of this cohort is charged for, equal mechanisms added up."""
        rows = self.rows()
        return charged(rows, self._account_of(rows))

    @property
    def has_non_private(self) -> bool:
        """Whether a run without differential privacy ever trained on this account's patients: their epsilon
        is then infinite.
        """
        rows = self.rows()
        account = self._account_of(rows)
        return any(row.kind == "non-private" and row.account == account for row in rows)

    def accounts(self, *, max_epsilon: float, max_delta: float) -> list[Account]:
        """Every account, that of this cohort first.

        Args:
            max_epsilon, max_delta: the policy's lifetime cap, which counts where it is below the ledger's.
        """
        rows = self.rows()
        found = filter_of(rows, max_epsilon, max_delta)
        own = self._account_of(rows)
        names = [own, *sorted({row.account for row in rows if row.cohort} - {own})]
        return [account_named(rows, name, found, max_epsilon, max_delta, self._cohort) for name in names]

    def check(self, planned: Mapping[str, GaussianSteps], *, max_epsilon: float, max_delta: float) -> None:
        """Refuse reservations as `reserve` would if they came now, one after another. Nothing is written;
        only `reserve` decides.

        Args:
            planned: request -> its steps; a request that was reserved before costs nothing.
        Raises:
            RefusedError: as `reserve`.
        """
        rows = self.rows()
        account = self._account_of(rows)
        before: list[GaussianSteps] = []
        for request, steps in planned.items():
            if not self._recorded(rows, request):
                admitted(rows, account, request, steps, max_epsilon, max_delta, planned=before)
                before.append(steps)

    def reservation(self, request: str) -> Reservation:
        """The charge that was made for a request.

        Raises:
            LedgerError: there is none under this cohort (code `unknown-reservation`).
        """
        for row in self._recorded(self.rows(), request):
            if row.kind == "reserve":
                return Reservation(request=request, steps=row.as_steps(), sequence=row.sequence, is_new=False)
        raise LedgerError(f"{request}: no such reservation", code="unknown-reservation")

    def reserve(
        self,
        *,
        request: str,
        steps: GaussianSteps,
        purpose: str,
        fingerprint: str,
        max_epsilon: float,
        max_delta: float,
    ) -> Reservation:
        """Charge `steps` to the cohort's account, durably, before the first patient is sampled; or refuse.

        The gate is the ledger's `PrivacyFilter` over all reservations of the account and this one. The first
        reservation of all fixes it, by `PrivacyFilter.for_first`; no number of a plan's but its steps moves
        it. Reserve a whole run under one request so that a run that was admitted never stops for lack of
        budget (an abandoned run then stays charged in full).

        Args:
            request: names the question: run and arm. Asked again with the same steps and purpose, the first
                reservation is returned, with the noise that was reserved, and nothing is charged.
            purpose: what for, in the report: "train", "evaluate".
            fingerprint: of the index; recorded in the row.
            max_epsilon, max_delta: the policy's lifetime cap. A lower epsilon than the ledger's counts; a
                higher one does not, until the operator raised the ledger's (`raise_cap`).
        Raises:
            RefusedError: `budget-exhausted`; `filter-fixed` if the policy's delta is not the ledger's;
                `sampling-not-permitted` if patients would be sampled under a `gdp` filter;
                `request-mismatch` if the request was reserved with other steps or purpose.
            LedgerError: the ledger cannot be verified or written.
            ConfigError: steps without noise (see `record_non_private`), or arguments out of range;
                `cohort-fixed`, `cohort-unknown` (see `admit_patients`).
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
            for row in self._recorded(rows, request):
                before = row.as_steps() if row.kind == "reserve" else None
                same = (row.sample_rate, row.steps) == (steps.sample_rate, steps.steps)
                if before is None or not same or row.purpose != purpose:
                    raise _mismatch(request)
                return Reservation(request=request, steps=before, sequence=row.sequence, is_new=False)
            account = self._account_of(rows)
            self._check_disjoint(rows, account)
            found = admitted(rows, account, request, steps, max_epsilon, max_delta)
            if not any(row.kind == "filter" for row in rows):
                self._append(
                    "filter",
                    request=found.kind,
                    epsilon=found.epsilon,
                    delta=found.delta,
                    order=found.order or 0.0,
                )
            sequence = self._append(
                "reserve",
                account=account,
                cohort=self._cohort,
                request=request,
                purpose=purpose,
                fingerprint=fingerprint,
                members=self._members_mark(),
                noise_multiplier=float(steps.noise_multiplier),
                sample_rate=float(steps.sample_rate),
                steps=steps.steps,
            )
        self._mark_head()
        return Reservation(request=request, steps=steps, sequence=sequence, is_new=True)

    def commit(self, reservation: Reservation, *, steps_done: int, digest: str, part: str = "") -> None:
        """Record that the answer with this digest is stored; the charge stays what was reserved.

        Call it when the answer is stored and before it leaves. `part` tells the pieces of one reservation
        apart, e.g. "round 3"; the same part committed again with the same numbers changes nothing.

        Args:
            steps_done: of the steps reserved.
            digest: SHA-256 of the stored answer, hexadecimal.
        Raises:
            LedgerError: `unknown-reservation`; `reservation-exceeded` if more steps were executed than
                reserved, whose outcome must not leave; `request-mismatch` if the part was committed with
                another number or digest.
        """
        _checked_text("part", part, may_be_empty=True)
        _checked_text("digest", digest)
        if isinstance(steps_done, bool) or not isinstance(steps_done, int) or steps_done < 0:
            raise ConfigError(
                f"steps_done = {steps_done!r} must be a whole number, at least 0",
                code="bad-privacy-parameters",
            )
        request = reservation.request
        with self._transaction() as rows:
            reserved = [row for row in self._recorded(rows, request) if row.kind == "reserve"]
            if not reserved or reserved[0].as_steps() != reservation.steps:
                raise LedgerError(f"{request}: no such reservation", code="unknown-reservation")
            commits = {
                row.part: row
                for row in rows
                if row.kind == "commit" and (row.cohort, row.request) == (self._cohort, request)
            }
            if part in commits:
                before = commits[part]
                if before.steps != steps_done or before.digest not in ("", digest):
                    raise LedgerError(
                        f"{request} {part}: was committed before with other steps or another answer",
                        code="request-mismatch",
                    )
                return
            total = sum(row.steps for row in commits.values()) + steps_done
            if total > reserved[0].steps:
                raise LedgerError(
                    f"{request} {part}: {total} steps done, {reserved[0].steps} reserved",
                    code="reservation-exceeded",
                )
            self._append(
                "commit",
                account=reserved[0].account,
                cohort=self._cohort,
                request=request,
                part=part,
                purpose=reserved[0].purpose,
                steps=steps_done,
                digest=digest,
            )
        self._mark_head()

    def committed(self, request: str, part: str = "") -> LedgerRow | None:
        """The row that says that an answer to this part of a request may have left, under whatever cohort;
        None where none may. Its digest is empty in a ledger of an earlier version.
        """
        return next(
            (
                row
                for row in self.rows()
                if row.kind == "commit" and (row.request, row.part) == (request, part)
            ),
            None,
        )

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
            kinds = {row.kind for row in self._recorded(rows, request)}
            if kinds == {"non-private"}:
                return
            if kinds:
                raise _mismatch(request)
            account = self._account_of(rows)
            self._check_disjoint(rows, account)
            self._append(
                "non-private",
                account=account,
                cohort=self._cohort,
                request=request,
                purpose=purpose,
                fingerprint=fingerprint,
                members=self._members_mark(),
            )
        self._mark_head()

    def record_declaration(self, *, kind: str, images: str, why: str, by: str) -> None:
        """Record, before it is first used, an operator's word that the images of a site are no hospital's
        patients, so that nothing is charged for them. Once a declaration; it costs nothing.

        Args:
            kind: of the site. images: the folder, as site.yaml names it. why, by: of the declaration.
        """
        _checked_text("kind", kind)
        said = {"request": kind, "part": images, "purpose": why, "by": by}
        with self._transaction() as rows:
            found = (row for row in rows if row.kind == "declared")
            if any({name: getattr(row, name) for name in said} == said for row in found):
                return
            self._append("declared", **said)
        self._mark_head()

    def raise_cap(self, epsilon: float, *, reason: str, by: str) -> None:
        """Raise the ledger's cap, on the operator's word; never because of what models or scores looked like.

        Raises:
            ConfigError: nothing was ever reserved (the policy's cap counts then), the cap is not raised by
                it, or no reason is given (code `bad-cap`).
        """
        _checked_text("reason", reason)
        _checked_text("by", by)
        with self._transaction() as rows:
            found = fixed_filter(rows)
            if found is None or not found.epsilon < epsilon <= MAX_CAP:
                now = "no cap yet" if found is None else f"the cap {found.epsilon:g}"
                raise ConfigError(
                    f"epsilon {epsilon:g}: this ledger has {now}",
                    code="bad-cap",
                    hint="max_epsilon of policy.yaml counts until the first reservation, and lowers the cap; "
                    f"--raise takes a higher one, up to {MAX_CAP:g}",
                )
            self._append("cap", epsilon=float(epsilon), purpose=reason, by=by)
        self._mark_head()

    def admit_patients(self, patients: Mapping[str, Collection[str]]) -> set[str]:
        """Note the patients of this cohort's index, and say which of them to leave out: those that were found
        in the index of another account before. No patient is forgotten, also after an opt-out.

        Args:
            patients: of each its pseudonym and the keyed forms of its identifier, any of which names it.
        Raises:
            ConfigError: `cohort-fixed` if the cohort was disjoint at its first use and is declared not to be,
                or the reverse; `cohort-unknown` if it is declared disjoint while the patients of an earlier
                cohort were never noted (a ledger of an earlier version).
        """
        with self._transaction() as rows:
            account = self._account_of(rows)
            members = self._members_beside(rows, account)
            digests = self._digests_of(patients)
            left_out = _elsewhere(digests, members, account)
            known = {one for member in members if member.account == account for one in member.digests}
            added = {one for patient, forms in digests.items() if patient not in left_out for one in forms}
            if added - known or self._cohort not in {member.cohort for member in members}:
                content = {"account": account, "cohort": self._cohort, "digests": sorted(added - known)}
                self._append_to("members", json.dumps(content, sort_keys=True, ensure_ascii=False))
        return left_out

    def found_elsewhere(self, patients: Mapping[str, Collection[str]]) -> set[str]:
        """Whom `admit_patients` would leave out now. Nothing is noted: for a report to the operator.

        Raises:
            ConfigError, LedgerError: as `admit_patients`.
        """
        with self._lock, _sqlite_errors(self._path):
            rows = self._verified_rows()
            account = self._account_of(rows)
            return _elsewhere(self._digests_of(patients), self._members_beside(rows, account), account)

    def head(self) -> str:
        """Length and last HMAC of the chain, "length:hex": what the coordinator keeps."""
        with self._lock, _sqlite_errors(self._path):
            chain = self._verified_chain()
        return f"{len(chain)}:{chain[-1][1].hex()}"

    def check_ancestor(self, head: str) -> None:
        """Refuse unless `head` was the head of this chain once.

        Raises:
            LedgerError: `ledger-rolled-back`.
        """
        with self._lock, _sqlite_errors(self._path):
            chain = self._verified_chain()
        length, _, mac = head.partition(":")
        at = int(length) if length.isdigit() else 0
        if not 1 <= at <= len(chain) or not hmac.compare_digest(chain[at - 1][1].hex(), mac):
            raise LedgerError(
                f"{self._path} has {len(chain)} rows, and row {at} is not the one that the coordinator was "
                "told of: an old copy, a copied folder or another state folder",
                code="ledger-rolled-back",
                hint="restore the newest copy of the state folder; run one copy of a site only",
            )

    def rows(self) -> list[LedgerRow]:
        """Every row in order, after verifying the chain."""
        with self._lock, _sqlite_errors(self._path):
            return self._verified_rows()

    def migrate(self, ledgers: Mapping[str, tuple[str, Sequence[LedgerRow]]]) -> None:
        """Take over the verified rows of an earlier version's ledgers, in the order of their times, once.

        Args:
            ledgers: name of the file -> HMAC of its last row, hexadecimal, and its rows with their cohort.
        Raises:
            LedgerError: `ledger-foreign` if another ledger of this name was migrated before: an earlier
                version of the program has written since.
        """
        with self._transaction() as present:
            known = {row.request: row.digest for row in present if row.kind == "migrated"}
            for file, (last_mac, _) in ledgers.items():
                if known.get(file, last_mac) != last_mac:
                    raise LedgerError(
                        f"{self._path.with_name(file)}: written by an earlier version after it was migrated",
                        code="ledger-foreign",
                        hint="the new ledger lacks what it charged; set it aside only if it is a copy",
                    )
            new = [rows for file, (_, rows) in ledgers.items() if file not in known]
            for row in sorted((row for rows in new for row in rows), key=lambda row: row.at):
                self._append(**{name: value for name, value in asdict(row).items() if name != "sequence"})
            for file, (last_mac, _) in ledgers.items():
                if file not in known:
                    self._append("migrated", request=file, digest=last_mac)
        self._mark_head()

    # ---- accounts

    def _recorded(self, rows: Sequence[LedgerRow], request: str) -> list[LedgerRow]:
        """The charge of a request to this cohort."""
        return [
            row
            for row in rows
            if row.kind in ("reserve", "non-private") and (row.cohort, row.request) == (self._cohort, request)
        ]

    def _account_of(self, rows: Sequence[LedgerRow]) -> str:
        """The account of this cohort: what it was at its first use, which site.yaml must not contradict."""
        declared = self._cohort if self._disjoint else SHARED
        known = {row.account for row in rows if row.cohort == self._cohort}
        known |= {member.account for member in self._members() if member.cohort == self._cohort}
        if known - {declared}:
            raise ConfigError(
                f"cohort {self._cohort!r} is declared {'' if self._disjoint else 'not '}disjoint, and was "
                "used otherwise before",
                code="cohort-fixed",
                hint="restore cohort_disjoint in site.yaml, or choose a new name of the cohort",
            )
        return declared

    def _check_disjoint(self, rows: Sequence[LedgerRow], account: str) -> None:
        """Nothing is charged to separate accounts before the patients of the cohort were noted."""
        members = self._verified_members(rows)
        accounts = {row.account for row in rows} | {member.account for member in members} | {account}
        if accounts - {SHARED} and self._cohort not in {member.cohort for member in members}:
            raise _unknown_cohort(self._cohort)

    def _members_beside(self, rows: Sequence[LedgerRow], account: str) -> list[_Members]:
        """The table of patients; refused where the patients of an earlier cohort were never noted, and this
        one has an account of its own.
        """
        members = self._verified_members(rows)
        if account != SHARED:
            noted = {member.cohort for member in members}
            for row in rows:
                if row.kind in ("reserve", "non-private") and row.cohort not in {self._cohort, *noted}:
                    raise _unknown_cohort(row.cohort)
        return members

    def _digests_of(self, patients: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
        return {
            patient: {self._patient_digest(form) for form in (patient, *forms)}
            for patient, forms in patients.items()
        }

    def _patient_digest(self, form: str) -> str:
        return hmac.digest(self._key, b"patient\0" + form.encode("utf-8", "surrogatepass"), "sha256").hex()[
            :32
        ]

    def _members(self) -> list[_Members]:
        return [_Members(**json.loads(content)) for content, _ in self._chain("members")]

    def _verified_members(self, rows: Sequence[LedgerRow]) -> list[_Members]:
        """The table of patients, after verifying that it holds all that it held at the last charge."""
        chain = list(self._chain("members"))
        mark = next((row.members for row in reversed(rows) if row.members), "0:")
        length, _, mac = mark.partition(":")
        if len(chain) < int(length) or (int(length) and chain[int(length) - 1][1].hex() != mac):
            raise LedgerError(
                f"{self._path}: patients were removed from the table that keeps cohorts disjoint",
                code="ledger-rolled-back",
                hint="restore the newest copy",
            )
        return [_Members(**json.loads(content)) for content, _ in chain]

    def _members_mark(self) -> str:
        last = self._last("members")
        return f"{last[0]}:{last[1].hex()}" if last else ""

    # ---- the file

    def _prepare(self, *, create: bool) -> None:
        self._use_write_ahead_log()
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                for table in ("rows", "members"):
                    self._connection.execute(
                        f"CREATE TABLE IF NOT EXISTS {table} (sequence INTEGER PRIMARY KEY, "
                        "content TEXT NOT NULL, mac BLOB NOT NULL)"
                    )
                if self._last("rows") is None:
                    noted = self._noted_head()
                    if noted is not None and noted[0] > 0:
                        raise LedgerError(
                            f"{self._path} is empty, but {noted[0]} rows were written",
                            code="ledger-rolled-back",
                        )
                    if not create:
                        raise LedgerError(
                            f"{self._path} is empty",
                            code="ledger-missing",
                            hint="restore ledger and head file from the newest backup",
                        )
                    self._write_head(0, b"")
                    self._append("open")
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
        self.rows()
        if self._noted_head() != self._last("rows"):  # the crash between a row and its note
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

    def _append(self, kind: RowKind, **values: Any) -> int:
        """Add a row; values that are the default of `LedgerRow` are left out of its text."""
        row = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **values, "kind": kind}
        kept = {name: value for name, value in row.items() if value != DEFAULTS.get(name)}
        return self._append_to("rows", json.dumps(kept, sort_keys=True, ensure_ascii=False, allow_nan=False))

    def _append_to(self, table: str, content: str) -> int:
        last = self._last(table)
        sequence, previous = (last[0] + 1, last[1]) if last else (1, b"")
        mac = self._mac(table, sequence, content, previous)
        self._connection.execute(
            f"INSERT INTO {table} (sequence, content, mac) VALUES (?, ?, ?)", (sequence, content, mac)
        )
        return sequence

    def _last(self, table: str) -> tuple[int, bytes] | None:
        found = self._connection.execute(
            f"SELECT sequence, mac FROM {table} ORDER BY sequence DESC LIMIT 1"
        ).fetchone()
        return (found[0], bytes(found[1])) if found else None

    def _mac(self, table: str, sequence: int, content: str, previous: bytes) -> bytes:
        place = table.encode() + b"\0" + sequence.to_bytes(8, "big") + len(previous).to_bytes(8, "big")
        return hmac.digest(self._key, place + previous + content.encode(), "sha256")

    def _chain(self, table: str) -> Iterator[tuple[str, bytes]]:
        """Content and HMAC of each row of a table, each verified against the row before."""
        previous = b""
        expected = 1
        for sequence, content, mac in self._connection.execute(
            f"SELECT sequence, content, mac FROM {table} ORDER BY sequence"
        ):
            intact = sequence == expected and isinstance(content, str) and isinstance(mac, bytes)
            if not intact or not hmac.compare_digest(mac, self._mac(table, sequence, content, previous)):
                raise LedgerError(
                    f"{self._path}: row {expected} of {table} is damaged (edited, removed, moved, or the key "
                    "is another)",
                    hint="restore the newest intact copy of the ledger, its head file and its key",
                )
            yield content, mac
            previous, expected = mac, expected + 1

    def _verified_chain(self) -> list[tuple[str, bytes]]:
        # read before the rows: another process may add rows meanwhile, never take them away
        noted = self._noted_head()
        chain = list(self._chain("rows"))
        if noted is None:
            raise LedgerError(
                f"{head_path(self._path)} is missing",
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
        return chain

    def _verified_rows(self) -> list[LedgerRow]:
        return [
            LedgerRow(sequence=number, **json.loads(content))
            for number, (content, _) in enumerate(self._verified_chain(), start=1)
        ]

    def _mark_head(self) -> None:
        """Note length and last HMAC beside the ledger, under its write lock so that an older note never
        replaces a newer one.
        """
        with self._lock, _sqlite_errors(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                last = self._last("rows")
                assert last is not None
                self._write_head(*last)
            finally:
                self._connection.execute("ROLLBACK")

    def _write_head(self, length: int, mac: bytes) -> None:
        note = json.dumps({"length": length, "mac": mac.hex(), "seal": self._seal(length, mac).hex()})
        write_bytes(head_path(self._path), note.encode(), 0o600)

    def _noted_head(self) -> tuple[int, bytes] | None:
        return read_head(self._path, self._key)

    def _seal(self, length: int, mac: bytes) -> bytes:
        return _head_seal(self._key, length, mac)


MAX_CAP = 1000.0
"""As `max_epsilon` of a policy."""


@dataclass(frozen=True, kw_only=True)
class _Members:
    """Patients that were noted at one reading of a cohort's index, as keyed digests."""

    account: str
    cohort: str
    digests: list[str]


def head_path(path: Path) -> Path:
    """The head file beside a ledger."""
    return path.with_name(path.name + ".head")


def read_head(path: Path, key: bytes) -> tuple[int, bytes] | None:
    """Length and last HMAC that the head file of a ledger notes; None where there is none.

    Args:
        key: derived from the site's, as the ledger's version does.
    Raises:
        LedgerError: `ledger-damaged`.
    """
    try:
        text = head_path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        note = json.loads(text)
        length, mac, seal = note["length"], bytes.fromhex(note["mac"]), bytes.fromhex(note["seal"])
        intact = (
            isinstance(length, int)
            and length >= 0
            and hmac.compare_digest(seal, _head_seal(key, length, mac))
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        intact = False
    if not intact:
        raise LedgerError(f"{head_path(path)} is damaged (edited, or written under another key)")
    return length, mac


def _head_seal(key: bytes, length: int, mac: bytes) -> bytes:
    return hmac.digest(key, b"head" + length.to_bytes(8, "big") + mac, "sha256")


def _elsewhere(digests: Mapping[str, set[str]], members: Sequence[_Members], account: str) -> set[str]:
    """The patients who were found in the index of another account before."""
    others = {one for member in members if member.account != account for one in member.digests}
    return {patient for patient, forms in digests.items() if forms & others}


def _unknown_cohort(cohort: str) -> ConfigError:
    return ConfigError(
        f"the patients of cohort {cohort!r} were never noted: no cohort is known to be disjoint from it",
        code="cohort-unknown",
        hint="leave out cohort_disjoint; or let the site once take part with that cohort's images first",
    )


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


_NO_MEMORY = (sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR_NOMEM, sqlite3.SQLITE_IOERR_SHMMAP)
"""How much memory is left depends on the images that were read: it is no decision of the ledger's."""


@contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", None) in _NO_MEMORY:
            raise MemoryError(f"{path}: {error}") from error
        busy = "locked" in str(error) or "busy" in str(error)
        raise LedgerError(f"{path}: {error}", code="ledger-busy" if busy else "ledger-unwritable") from error
    except sqlite3.DatabaseError as error:
        raise LedgerError(f"{path}: {error}", hint="restore the newest intact copy") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"{path}: {error}") from error
        raise LedgerError(
            f"{path}: {error}",
            code="ledger-unwritable",
            hint="check the disk's free space and the folder's permissions",
        ) from error
