"""What an error quotes of a foreign file makes it neither long nor several lines."""

from __future__ import annotations

from common.errors import MAX_MESSAGE, ConfigError, RefusedError


def test_a_message_is_one_line_of_bounded_length() -> None:
    error = ConfigError("m.safetensors: unknown variant `a\nb\u2028c\r\nd`", code="wrong-model")
    assert str(error) == error.message == "m.safetensors: unknown variant `a b c d`"
    assert len(RefusedError("x" * 100_000, code="refused").message) == MAX_MESSAGE + 1
    assert ConfigError("as it is  ").message == "as it is  "
