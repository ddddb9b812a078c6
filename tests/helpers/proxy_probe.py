"""HTTP requests sent byte by byte, and the ways to write a path that a proxy may misread."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress

from server.federation.registry import Federation


def head(
    method: str, target: str, *, version: str = "HTTP/1.1", body: bytes = b"", headers: str = ""
) -> bytes:
    length = f"Content-Length: {len(body)}\r\n" if method == "POST" else ""
    fields = f"Host: localhost\r\n{length}{headers}Connection: close\r\n"
    return f"{method} {target} {version}\r\n{fields}\r\n".encode("latin-1") + body


def _dotted(path: str) -> str:
    return path.replace("/v1/", "/v1/./")


TRICKS = {
    "plain": lambda path: path,
    "query": lambda path: f"{path}?a=/v1/fleet/pull-messages",
    "fragment": lambda path: f"{path}#/v1/fleet/pull-messages",
    "trailing slash": lambda path: f"{path}/",
    "trailing dot": lambda path: f"{path}.",
    "trailing space encoded": lambda path: f"{path}%20",
    "trailing NUL": lambda path: f"{path}%00",
    "NUL before a good name": lambda path: f"{path}%00/v1/fleet/pull-messages",
    "doubled slash": lambda path: path.replace("/", "//"),
    "doubled first slash": lambda path: f"/{path}",
    "dot segment": lambda path: f"/.{path}",
    "dot segment inside": _dotted,
    "up from a fleet call": lambda path: f"/v1/fleet/pull-messages/../../..{path}",
    "up from the fleet": lambda path: f"/v1/fleet/../..{path}",
    "up, slash encoded": lambda path: f"/v1/fleet/..%2f..{path}",
    "up, dots encoded": lambda path: f"/v1/fleet/%2e%2e/%2e%2e{path}",
    "up, half encoded": lambda path: f"/v1/fleet/.%2e/%2E.{path}",
    "up, encoded twice": lambda path: f"/v1/fleet/%252e%252e/%252e%252e{path}",
    "up with a parameter": lambda path: f"/v1/fleet/..;/..;{path}",
    "up with backslashes": lambda path: f"/v1/fleet/..\\..{path}".replace("/docs", "\\docs"),
    "up with backslashes encoded": lambda path: f"/v1/fleet/..%5c..{path}",
    "overlong dots": lambda path: f"/v1/fleet/%c0%ae%c0%ae/%c0%ae%c0%ae{path}",
    "slash encoded": lambda path: "/" + path[1:].replace("/", "%2f"),
    "slash encoded, upper case": lambda path: "/" + path[1:].replace("/", "%2F"),
    "slash encoded twice": lambda path: "/" + path[1:].replace("/", "%252f"),
    "first letter encoded": lambda path: f"/%{ord(path[1]):02x}{path[2:]}",
    "last letter encoded": lambda path: f"{path[:-1]}%{ord(path[-1]):02x}",
    "last letter encoded twice": lambda path: f"{path[:-1]}%25{ord(path[-1]):02x}",
    "upper case": lambda path: path.upper(),
    "mixed case": lambda path: path.title(),
    "path parameter": lambda path: f"{path};a=b",
    "backslashes": lambda path: "/" + path[1:].replace("/", "\\"),
    "tab encoded": lambda path: f"{path}%09",
    "line end encoded": lambda path: f"{path}%0d%0aX-More:%201",
    "full-width slash": lambda path: "/" + path[1:].replace("/", "%ef%bc%8f"),
    "absolute form": lambda path: f"https://localhost{path}",
    "absolute form, other host": lambda path: f"http://127.0.0.1:1{path}",
    "absolute form, up": lambda path: f"https://localhost/v1/fleet/../..{path}",
    "a fleet call as its user": lambda path: f"https://v1/fleet/pull-messages@localhost{path}",
}
"""Ways to write a path that some server reads as the path itself."""


def connect(federation: Federation, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    context = context or ssl.create_default_context(cafile=str(federation.ca_certificate))
    raw = socket.create_connection(("127.0.0.1", federation.settings.port), timeout=60)
    return context.wrap_socket(raw, server_hostname="localhost")


def answers(
    federation: Federation, request: bytes, context: ssl.SSLContext | None = None, *, first: bool = False
) -> list[int]:
    """Send bytes as they are; the status of every answer until the proxy closes, or of the first alone."""
    with connect(federation, context) as stream:
        with suppress(OSError):
            stream.sendall(request)
        received = b""
        with suppress(OSError):
            while chunk := stream.recv(65536):
                received += chunk
                if first and b"\r\n" in received:
                    break
    return [int(line.split()[1]) for line in received.splitlines() if line.startswith(b"HTTP/1.")]
