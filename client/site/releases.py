"""Release an answer about patients once: reserve, compute, store, commit, send, in this order.

A crash anywhere over-counts what was spent, never under-counts it:

    after reserve   charged; asked again, the answer is computed under this charge
    after store     asked again, the stored answer is committed and sent
    after commit    the stored answer is the only one that may ever be sent under this part of the charge

So a stored answer that is lost after it was committed is not computed again: that would be a second view of
the same patients. The request is refused (`answer-missing`), and a new release is a new charge.
"""

from __future__ import annotations

import hashlib

from client.site.answer_store import AnswerKey, Outbox
from client.site.ledger import Ledger, Reservation
from common.errors import RefusedError


def released(
    outbox: Outbox, ledger: Ledger, key: AnswerKey, *, request: str, part: str, steps_done: int
) -> bytes | None:
    """The answer that was released, or stored to be; None where it may be computed.

    Args:
        request, part, steps_done: as `Ledger.commit`.
    Raises:
        RefusedError: `answer-missing`: an answer was committed, and is not stored (any more).
        RunError: `outbox-damaged`.
        LedgerError: as `Ledger.commit`.
    """
    stored, row = outbox.get(key), ledger.committed(request, part)
    if row is None:
        if stored is not None:  # the crash between storing and committing: nothing has left
            _commit(ledger, ledger.reservation(request), stored, part=part, steps_done=steps_done)
        return stored
    if stored is None or row.digest not in ("", _digest(stored)):
        raise RefusedError(
            f"{request} {part}: an answer was given, and it is not stored any more",
            code="answer-missing",
            public_reason="this request was answered before, and the stored answer is lost",
            hint="restore the state folder's outbox from the newest backup, or start a new run: a new charge",
        )
    return stored


def release(
    outbox: Outbox,
    ledger: Ledger,
    key: AnswerKey,
    payload: bytes,
    *,
    reservation: Reservation,
    part: str,
    steps_done: int,
) -> bytes:
    """Store an answer and commit it; returns the bytes to send, which are those of whoever stored first.

    Raises:
        RunError: `outbox-damaged`, `outbox-unwritable`.
        LedgerError: as `Ledger.commit`.
    """
    stored = outbox.put(key, payload)
    _commit(ledger, reservation, stored, part=part, steps_done=steps_done)
    return stored


def _commit(ledger: Ledger, reservation: Reservation, stored: bytes, *, part: str, steps_done: int) -> None:
    ledger.commit(reservation, steps_done=steps_done, digest=_digest(stored), part=part)


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
