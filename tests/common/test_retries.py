"""A network that breaks within TLS is tried again; a certificate that is refused is not."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import flwr.supernode.start_client_internal as main_loop
import httpx
import pytest
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection

from client.node import supernode
from common.retries import keep_trying, refuses_certificate
from server.federation.certificates import ca_certificate, key_pem, new_ec_key
from tests.helpers.hospital import Server


def caused(error: httpx.TransportError, cause: Exception) -> httpx.TransportError:
    error.__cause__ = cause
    return error


BROKEN = {
    "reset": httpx.ReadError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"),
    "slow handshake": httpx.ConnectTimeout("_ssl.c:1000: The handshake operation timed out"),
    "spoilt record": httpx.WriteError("[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC] (_ssl.c:2580)"),
    "a portal in between": httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"),
    "TLS is named": httpx.RemoteProtocolError("TLS/SSL connection has been closed (EOF)"),
    "a certificate is named": httpx.ReadError("reset while the certificate was sent"),
}
REFUSED = {
    "not verified": httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"),
    "not verified, deeper": caused(httpx.ConnectError("failed"), ssl.SSLCertVerificationError("expired")),
    "ours is not wanted": httpx.ReadError("[SSL] tlsv13 alert certificate required (_ssl.c:2580)"),
    "ours is unknown": httpx.ReadError("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca"),
}


def retries() -> RetryInvoker:
    """Flower's own invoker, adapted; it waits for nothing."""
    found = make_simple_http_retry_invoker()
    keep_trying(found)
    found.wait_function = lambda seconds: None
    return found


def outcomes(invoker: RetryInvoker, *happens: Exception | str) -> tuple[Any, int]:
    """What comes of a call that meets these one after the other, and how often it was made."""
    calls = 0

    def call() -> str:
        nonlocal calls
        one = happens[calls]
        calls += 1
        if isinstance(one, Exception):
            raise one
        return one

    try:
        return invoker.invoke(call), calls
    except httpx.TransportError as error:
        return error, calls


@pytest.mark.parametrize("name", BROKEN)
def test_an_answer_outlives_a_network_that_breaks_within_tls(name: str) -> None:
    invoker, broken = retries(), BROKEN[name]
    assert outcomes(invoker, "reached") == ("reached", 1)
    assert outcomes(invoker, *[broken] * 5, "handed in") == ("handed in", 6)
    theirs = make_simple_http_retry_invoker()
    theirs.wait_function = lambda seconds: None
    assert outcomes(theirs, broken, "never")[0] is broken, "else Flower has mended it, and this can go"


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_certificate_ends_it_at_once(name: str) -> None:
    invoker, refused = retries(), REFUSED[name]
    assert refuses_certificate(refused)
    assert outcomes(invoker, "reached") == ("reached", 1)
    assert outcomes(invoker, refused, "never") == (refused, 1)


def test_a_wrong_server_is_said_at_once_where_none_was_reached() -> None:
    broken = BROKEN["a portal in between"]
    assert outcomes(retries(), broken, "never") == (broken, 1)
    away = httpx.ConnectError("[Errno 111] Connection refused")
    assert outcomes(retries(), away, away, "reached") == ("reached", 3)


def test_a_real_server_with_a_foreign_certificate_is_recognised(tmp_path: Path) -> None:
    key = new_ec_key()
    (tmp_path / "foreign.key").write_bytes(key_pem(key))
    (tmp_path / "foreign.crt").write_bytes(ca_certificate(key, "foreign"))
    server = Server((tmp_path / "foreign.crt", tmp_path / "foreign.key"))
    try:
        with pytest.raises(httpx.TransportError) as refused:
            httpx.get(f"https://127.0.0.1:{server.port}/", timeout=10)
        found = outcomes(retries(), refused.value, "never")
    finally:
        server.close()
    assert refuses_certificate(refused.value)
    assert found == (refused.value, 1)


def test_adapting_twice_changes_nothing() -> None:
    invoker = retries()
    once = invoker.should_giveup
    keep_trying(invoker)
    assert invoker.should_giveup is once


def test_the_supernode_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (main_loop, fleet_http_connection):
        for name, value in list(vars(module).items()):
            monkeypatch.setitem(vars(module), name, value)  # restored after the test
    supernode.adapt()
    made = vars(fleet_http_connection)["make_simple_http_retry_invoker"]()
    assert isinstance(made, RetryInvoker)
    assert made.should_giveup.__module__ == "common.retries"
    assert isinstance(vars(main_loop)["time"], supernode.Naps)
    assert time.sleep is not vars(main_loop)["time"].sleep
