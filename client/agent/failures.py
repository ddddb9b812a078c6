"""Turn a failure into the refusal that leaves the site, and log its details at the site.

A refusal of the policy and a failure that only the task can cause keep their code. Any other failure leaves
as one code, whatever its cause: the cause may depend on patients. Where patients of an enrolled hospital are
worked on it does not leave at all (`NoAnswer`).
"""

from __future__ import annotations

import errno
import secrets
import sqlite3
import traceback
from pathlib import Path

from client.agent.site_log import append_site_log
from common.errors import FedqcError, RefusedError, RunError
from common.plan import RunPlan
from common.wire import Refusal

SITE_FAILURE = "site-failure"
DISK_FULL = "disk-full"
CAUSED_BY_TASK = {
    "bad-plan": "the plan cannot be read, or is not written as it is hashed",
    "bad-message": "the task cannot be read",
    "bad-frame": "the model in the task cannot be decoded",
    "bad-privacy-parameters": "the plan's noise, sampling rate or number of steps is out of range",
    "unknown-model": "the plan's network is not known here",
    "bad-model-args": "the plan's network does not take these arguments here",
    "no-initial-weights": "the plan's starting weights are not installed here",
    "wrong-initial-weights": "the plan's starting weights are not those installed here",
    "wrong-model": "the plan's starting weights are of another network",
}
"""Failures that depend on nothing but the task, with the reason that is sent."""


def refusal_of(failure: RefusedError, *, site: str, run: str) -> Refusal:
    """The refusal of a policy or budget, with the reason that may leave the site."""
    return Refusal(site=site, run=run, code=failure.code, reason=failure.public_reason)


def refusal_for(
    failure: Exception, *, site: str, run: str, state: Path, plan: RunPlan | None = None
) -> Refusal:
    """The refusal to send for `failure`. Call it while the exception is handled: the traceback is logged.

    Args:
        state: the site's state folder, where site.log lies.
        plan: of the work that failed. Once there is a plan, images may have been read: a full disk is then
            reported as such only where ledger or answer store met it, which says nothing of a patient.
    """
    full = disk_is_full(failure)
    if isinstance(failure, RefusedError) and not full:
        return refusal_of(failure, site=site, run=run)
    if isinstance(failure, FedqcError) and failure.code in CAUSED_BY_TASK:
        return Refusal(site=site, run=run, code=failure.code, reason=CAUSED_BY_TASK[failure.code])
    incident = secrets.token_hex(6)
    if not append_site_log(state, f"incident {incident}: {advice(failure, plan)}\n{traceback.format_exc()}"):
        incident = ""
    code, reason = SITE_FAILURE, "the site failed; see its log"
    if full and (plan is None or isinstance(failure, RefusedError | RunError)):
        code, reason = DISK_FULL, "the site's disk is full"
    return Refusal(site=site, run=run, code=code, reason=reason, incident=incident)


def advice(failure: BaseException, plan: RunPlan | None = None) -> str:
    """What the operator can do about `failure`, for the site log."""
    if memory_is_short(failure):
        below = f" below {plan.training.batch_size}" if plan else ", smaller than the plan's"
        return f"out-of-memory: a batch size{below}, or a larger machine; ask the coordinator for the former"
    if disk_is_full(failure):
        return f"{DISK_FULL}: free some space; nothing was sent"
    return getattr(failure, "hint", "") or "see below"


_MEMORY_MESSAGES = (
    "out of memory",
    "allocate memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)
"""In what torch, the loader and Python report where no memory is left."""


def memory_is_short(failure: BaseException) -> bool:
    """Whether a lack of memory caused `failure`."""
    return isinstance(failure, MemoryError) or any(
        message in str(failure).lower() for message in _MEMORY_MESSAGES
    )


# the second: no room for the index of the write-ahead log
_SQLITE_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def disk_is_full(failure: BaseException | None) -> bool:
    """Whether a full disk caused `failure`, in a file or in the ledger."""
    while failure is not None:
        if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(failure, sqlite3.Error) and getattr(failure, "sqlite_errorcode", None) in _SQLITE_FULL:
            return True
        failure = failure.__cause__ or failure.__context__
    return False
