"""Keep Flower's HTTP retries going through a bad network.

Flower 1.41 gives up for good on every error whose text holds "ssl", "tls" or "certificate": a connection that
is reset within TLS, or a slow handshake, loses an answer by chance. Here only a certificate that is refused,
by either side, ends the retries once the other side was reached.
"""

from __future__ import annotations

import ssl
from typing import Any, Protocol

import httpx

_REFUSED = ("certificate_verify_failed", "alert certificate", "alert bad certificate", "alert unknown ca")
"""In OpenSSL's words: this side does not accept the other's certificate, or the other not this side's."""


class Retries(Protocol):
    """What is used of `flwr.supercore.retry.RetryInvoker`."""

    should_giveup: Any
    on_success: Any


def keep_trying(retries: Retries) -> None:
    """Let an invoker of Flower give up on a transport error only where a certificate was refused.

    Before its first success Flower's own rule holds: a wrong address or port is then said at once, and
    nothing is lost by starting again. So it does for HTTP errors.
    """
    give_up, succeeded = retries.should_giveup, retries.on_success
    if getattr(give_up, "__module__", "") == __name__:  # adapted before
        return
    reached = False

    def should_give_up(error: Exception) -> bool:
        refused = refuses_certificate(error)
        if reached and isinstance(error, httpx.TransportError) and not refused:
            return False
        return bool(give_up(error)) or refused

    def on_success(state: object) -> None:
        nonlocal reached
        reached = True
        succeeded(state)

    retries.should_giveup, retries.on_success = should_give_up, on_success


def refuses_certificate(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a certificate that one side does not accept."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if any(words in str(error).lower() for words in _REFUSED):
            return True
        error = error.__cause__ or error.__context__
    return False
