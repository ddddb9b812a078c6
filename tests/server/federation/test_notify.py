"""An event reaches a webhook and a command as one JSON object; a way that fails silences neither the run nor
the other way.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from server.federation import notify
from server.federation.notify import Notify, tell

EVENT = {"event": "silence", "run": "r", "site": "hospital-b", "detail": "no-answer"}


@contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook"  # type: ignore[index, str-bytes-safe]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Hook(BaseHTTPRequestHandler):
    heard: list[tuple[str, str, dict[str, Any]]]
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((self.command, self.headers["Content-Type"], json.loads(body)))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def hook(status: int = 200) -> tuple[HTTPServer, list[tuple[str, str, dict[str, Any]]]]:
    heard: list[tuple[str, str, dict[str, Any]]] = []
    return HTTPServer(("127.0.0.1", 0), type("Counted", (Hook,), {"heard": heard, "status": status})), heard


def command_writing(path: Path) -> tuple[str, ...]:
    return (
        sys.executable,
        "-c",
        f"import sys; open({str(path)!r}, 'w').write(sys.stdin.read()); print('spoken')",
    )


def tell_all(wanted: Notify) -> None:
    tell(wanted, event="silence", run="r", site="hospital-b", detail="no-answer")


def test_a_webhook_gets_the_event_as_one_json_object() -> None:
    server, heard = hook()
    with serving(server) as url:
        tell_all(Notify(webhook=url))
    assert heard == [("POST", "application/json", EVENT)]


def test_a_command_gets_the_same_object_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tell_all(Notify(command=command_writing(tmp_path / "heard")))
    assert json.loads((tmp_path / "heard").read_text(encoding="utf-8")) == EVENT
    assert capfd.readouterr() == ("", "")


def test_a_command_is_no_shell(tmp_path: Path) -> None:
    tell(
        Notify(command=("/bin/echo", f"$(touch {tmp_path}/made)", ";", "touch", str(tmp_path / "made"))),
        event="failed",
        run="$(id)",
    )
    assert not (tmp_path / "made").exists()


def test_nothing_wanted_is_nothing_done(capfd: pytest.CaptureFixture[str]) -> None:
    tell_all(Notify())
    assert capfd.readouterr() == ("", "")


class Garbage(socketserver.BaseRequestHandler):
    said = b"\x00\xff not HTTP\r\n\r\n"

    def handle(self) -> None:
        self.request.recv(65536)
        self.request.sendall(self.said)


class Silence(Garbage):
    said = b""


def closed() -> socketserver.BaseServer:
    server = socketserver.TCPServer(("127.0.0.1", 0), Silence, bind_and_activate=False)
    server.server_bind()  # and does not listen
    return server


@contextmanager
def bound(make: Callable[[], socketserver.BaseServer]) -> Iterator[str]:
    server = make()
    if make is closed:
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"  # type: ignore[index, str-bytes-safe]
        finally:
            server.server_close()
    else:
        with serving(server) as url:
            yield url


BROKEN: dict[str, Callable[[], socketserver.BaseServer]] = {
    "refuses": lambda: hook(500)[0],
    "is missing": lambda: hook(404)[0],
    "speaks no HTTP": lambda: socketserver.TCPServer(("127.0.0.1", 0), Garbage),
    "hangs up": lambda: socketserver.TCPServer(("127.0.0.1", 0), Silence),
    "is not there": closed,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_webhook_that_fails_is_said_and_the_command_is_still_started(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with bound(BROKEN[name]) as url:
        tell_all(Notify(webhook=url, command=command_writing(tmp_path / "heard")))
    assert json.loads((tmp_path / "heard").read_text(encoding="utf-8")) == EVENT
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("notify: silence of r could not be sent")
    assert "127.0.0.1" not in said[0], "the address of a webhook is often its password"


@pytest.mark.parametrize(
    "url", ["no address", "http://", "http://a b/", "http://127.0.0.1:99999/", "gopher://x/", "http://[::1"]
)
def test_an_address_that_is_none_changes_nothing(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    tell_all(Notify(webhook=url))
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ("/does/not/exist",),
        (sys.executable, "-c", "raise SystemExit(3)"),
        ("/",),
        (sys.executable, "-c", "import time; time.sleep(600)"),
    ],
    ids=["missing", "fails", "a-folder", "hangs"],
)
def test_a_command_that_fails_changes_nothing(
    command: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.5)
    tell_all(Notify(command=command))
    assert "could not be sent" in capfd.readouterr().err


def test_a_webhook_that_fails_does_not_end_a_command_that_reads_nothing() -> None:
    tell_all(Notify(command=("/bin/true",)))
