"""Take over the ledgers of earlier versions: one file a cohort, `ledger-<digest of the cohort>.sqlite3`.

Every row of them is verified as the earlier version did, and refused if it cannot be; then all rows are
added to the installation's ledger in one transaction, in the order of their times, and the files are set
aside, read-only, as `….migrated`. A crash in between is made good at the next start. The rows are marked
`float_noise`: the earlier version drew its noise in floating point. Its commits have no digest; the answers
that it stored stay valid. All cohorts of earlier versions share one account: nothing there kept their
patients apart.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from client.site.ledger import Ledger, head_path, read_head
from client.site.ledger_rows import LedgerError, LedgerRow

OLD_LEDGERS = "ledger-*.sqlite3"
SET_ASIDE = ".migrated"


def old_ledgers(state: Path) -> list[Path]:
    """Ledgers of an earlier version that were not migrated yet, or whose head file is left."""
    found = set(state.glob(OLD_LEDGERS))
    found |= {path.with_suffix("") for path in state.glob(f"{OLD_LEDGERS}.head")}
    return sorted(found)


def migrate(state: Path, ledger: Ledger, key: bytes) -> None:
    """Add the rows of all earlier ledgers of this state folder to `ledger`, and set them aside.

    Args:
        key: the site's.
    Raises:
        LedgerError: a row, a head file or a name is not what the earlier version wrote; nothing was migrated.
    """
    done = {row.request for row in ledger.rows() if row.kind == "migrated"}
    paths = old_ledgers(state)
    # of a migrated ledger that a crash left half set aside, one of the two files may be there alone
    read = {
        path.name: _rows_of(path, key, with_head=path.name not in done)
        for path in paths
        if path.exists() or path.name not in done
    }
    ledger.migrate(read)
    for path in paths:
        for part in (path, head_path(path)):
            if part.exists():
                os.chmod(part, 0o400)
                os.replace(part, part.with_name(part.name + SET_ASIDE))


def _rows_of(path: Path, key: bytes, *, with_head: bool) -> tuple[str, list[LedgerRow]]:
    """The last row's HMAC, hexadecimal, and the rows of an earlier version's ledger, all verified.

    Raises:
        LedgerError: `ledger-missing`, `ledger-head-missing`, `ledger-rolled-back`, `ledger-foreign`,
            `ledger-damaged`.
    """
    if not path.exists():
        raise LedgerError(
            f"{path} is missing, but its head file exists",
            code="ledger-missing",
            hint="restore it from the newest backup",
        )
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT sequence, content, mac FROM rows ORDER BY sequence").fetchall()
            cohort = str(json.loads(found[0][1])["request"]) if found else ""
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path}: not a ledger that can be read ({error})", hint="restore the newest intact copy"
        ) from None
    if path.name != _old_name(cohort):
        raise LedgerError(
            f"{path} is the ledger of cohort {cohort!r}, under another name", code="ledger-foreign"
        )
    ledger_key = hmac.digest(key, b"fedqc privacy ledger v1\0" + cohort.encode(), "sha256")
    previous, rows, macs = b"", [], []
    for expected, (sequence, content, mac) in enumerate(found, start=1):
        message = expected.to_bytes(8, "big") + len(previous).to_bytes(8, "big") + previous
        intact = sequence == expected and isinstance(content, str) and isinstance(mac, bytes)
        if not intact or not hmac.compare_digest(
            mac, hmac.digest(ledger_key, message + content.encode(), "sha256")
        ):
            raise LedgerError(
                f"{path}: row {expected} is damaged (edited, removed, moved, or the key is another)",
                hint="restore the newest intact copy of the ledger, its head file and its key",
            )
        row = LedgerRow(sequence=expected, **json.loads(content) | {"cohort": cohort, "float_noise": True})
        if row.kind != "open":
            rows.append(row)
        macs.append(mac)
        previous = mac
    noted = read_head(path, ledger_key) if with_head else (0, b"")
    if noted is None:
        raise LedgerError(
            f"{head_path(path)} is missing", code="ledger-head-missing", hint="restore it from a backup"
        )
    length, mac = noted
    if len(macs) < length or (length and macs[length - 1] != mac):
        raise LedgerError(
            f"{path} has {len(macs)} rows, but {length} were written",
            code="ledger-rolled-back",
            hint="restore the newest copy",
        )
    return macs[-1].hex(), rows


def _old_name(cohort: str) -> str:
    return f"ledger-{hashlib.sha256(cohort.encode()).hexdigest()[:16]}.sqlite3"
