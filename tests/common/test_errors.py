"""What an error quotes of a foreign file makes it neither long nor several lines."""

from __future__ import annotations

import errno

import pytest

from common.errors import MAX_MESSAGE, ConfigError, RefusedError, denied_by_machine


def test_a_message_is_one_line_of_bounded_length() -> None:
    error = ConfigError("m.safetensors: unknown variant `a\nb\u2028c\r\nd`", code="wrong-model")
    assert str(error) == error.message == "m.safetensors: unknown variant `a b c d`"
    assert len(RefusedError("x" * 100_000, code="refused").message) == MAX_MESSAGE + 1
    assert ConfigError("as it is  ").message == "as it is  "


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EFBIG, "disk-full"),
        (errno.EROFS, "not-writable"),
        (errno.EACCES, "not-writable"),
        (errno.EMFILE, "too-many-files"),
    ],
)
def test_what_the_machine_denies_has_a_code_behind_a_librarys_error_too(number: int, code: str) -> None:
    denied = denied_by_machine(OSError(number, "denied", "runs/a"))
    assert denied is not None
    assert (denied.code, denied.message[:8]) == (code, "runs/a: ")
    assert denied.hint
    outer = RuntimeError("could not connect")
    outer.__cause__ = OSError(number, "denied")
    behind = denied_by_machine(outer)
    assert behind is not None
    assert behind.code == code


def test_other_errors_of_the_system_are_nobodys_disk() -> None:
    assert denied_by_machine(OSError(errno.EINVAL, "invalid")) is None
    assert denied_by_machine(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert denied_by_machine(ValueError("no")) is None
