"""The errors that fedqc raises on purpose: one tree, each class names who can act on it.

FedqcError                         exit status   who acts
├── ConfigError                    2             the author of the command, plan, policy or site.yaml
│   └── PlanError                  2             the coordinator
├── DataError                      2             the hospital operator: the site folder cannot be used
│   └── ImagingError               2             one DICOM file cannot be used; intake lists it and goes on
├── NetworkError                   3             the network's administrator
├── RefusedError                   4             the site: its policy or budget refuses, with a public reason
├── RunError                       1             the work itself failed
└── InternalError                  5             a developer: please report

A finished but partial run is not an error; the command line reports it with exit status 6.
"""

from __future__ import annotations

import errno

MAX_MESSAGE = 2000
"""Characters of a message: what it quotes of a foreign file may be of any length."""


class FedqcError(Exception):
    """Base of all deliberate errors: a stable code, one line of message, one hint.

    Args:
        message: what was found, where, and what was expected. May name local paths and values, so it
            must never be put into a message that leaves a hospital; only `code` may.
        code: stable, lower-case, hyphenated; documented in docs/errors.md.
        hint: what to do about it, one line.
    """

    exit_status = 5
    code = "internal"

    def __init__(self, message: str, *, code: str | None = None, hint: str = "") -> None:
        message = " ".join(message.splitlines())
        message = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}…"
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.hint = hint

    def __str__(self) -> str:
        return self.message


class ConfigError(FedqcError):
    exit_status = 2
    code = "bad-configuration"


class PlanError(ConfigError):
    code = "bad-plan"


class DataError(FedqcError):
    exit_status = 2
    code = "bad-data"


class ImagingError(DataError):
    """One file cannot be used. `code` is what the intake report shows."""

    code = "unreadable"


class NetworkError(FedqcError):
    exit_status = 3
    code = "network"


class RefusedError(FedqcError):
    """A policy or a budget says no. `code` and `public_reason` may leave the hospital; `message` may not.

    `public_reason` is a function of plan, policy and ledger only, never of patients.
    """

    exit_status = 4
    code = "refused"

    def __init__(
        self, message: str, *, code: str | None = None, hint: str = "", public_reason: str = ""
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.public_reason = public_reason


class RunError(FedqcError):
    exit_status = 1
    code = "run-failed"


class InternalError(FedqcError):
    exit_status = 5
    code = "internal"


_FULL = ("disk-full", "no space is left on the disk", "free some space and run it again")
_CLOSED = (
    "not-writable",
    "cannot be opened or written",
    "check its name and permissions, and whether the disk is read-only",
)
_TOO_MANY = (
    "too-many-files",
    "this process may open no more files",
    "raise the limit and start again: ulimit -n 1024, or LimitNOFILE= of systemd",
)
_WITHOUT_ACCESS = (
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.ENOTDIR,
)
_DENIED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys(_WITHOUT_ACCESS, _CLOSED),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _TOO_MANY),
}


def denied_by_machine(error: BaseException | None) -> RunError | None:
    """What to report where this machine denied somebody a file, and that caused `error`: `disk-full`,
    `not-writable` or `too-many-files`. None for any other error.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DENIED:
            code, message, hint = _DENIED[error.errno]
            where = f"{error.filename}: " if error.filename else ""
            return RunError(f"{where}{message}", code=code, hint=hint)
        error = error.__cause__
    return None
