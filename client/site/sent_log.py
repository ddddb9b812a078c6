"""The log of every message that left a site: one line each, chained under the site key.

Each line carries an HMAC over its content and the HMAC of the line before, so that a line that was edited,
removed, inserted or moved is found. A line that a crash tore is no line: the next one continues from the last
whole line. Lines of an earlier version, without HMAC, may stand before the first chained one. What is not
found: that lines at the end were removed. The coordinator keeps what it received in the run folder.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from client.site.config import site_key
from common.errors import DataError
from common.files import append_line, locked

SENT = "sent.jsonl"
TAIL_BYTES = 1 << 20
"""Enough for the last whole line, whatever was torn behind it."""
FIELDS = ("at", "kind", "class", "purpose", "run", "round", "bytes", "sha256")


def note_sent(state: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry with `FIELDS`, durably; to be called before the message leaves.

    Raises:
        OSError: it cannot be written, and the message must not leave.
    """
    key = site_key(state)
    with locked(state / "sent.lock"):
        last = _last_mac(state / SENT)
        text = _text(entry)
        line = dict(entry) | {"mac": _mac(key, last, text)}
        append_line(state / SENT, json.dumps(line, ensure_ascii=False))


def read_sent(state: Path) -> list[dict[str, Any]]:
    """The entries, oldest first, verified; [] where nothing was ever sent.

    Raises:
        DataError: a line was changed, or cannot be read (code `sent-damaged`).
    """
    path = state / SENT
    if not path.exists():
        return []
    if not (state / "site.key").is_file():  # to make a new one here would disown every line
        raise DataError(
            f"{path}: the key that verifies it, {state / 'site.key'}, is missing",
            code="sent-damaged",
            hint="restore the key from a backup",
        )
    key, previous = site_key(state), ""
    entries: list[dict[str, Any]] = []
    for number, entry in _lines(path):
        mac = entry.pop("mac", "")
        is_old = not mac and not previous
        if not is_old and not hmac.compare_digest(str(mac), _mac(key, previous, _text(entry))):
            raise DataError(
                f"{path}: line {number} was changed, or lines before it were removed",
                code="sent-damaged",
                hint="compare with a backup, and with the run folders of the coordinator",
            )
        previous = mac or previous
        entries.append({name: entry[name] for name in FIELDS})
    return entries


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each whole line; a line that does not end, or that another follows in place of
    its end, was torn by a crash.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror})", code="sent-damaged", hint="run as the agent's user"
        ) from None
    for number, line in enumerate(lines, start=1):
        if entry := _entry(line):
            yield number, entry


def _entry(line: bytes) -> dict[str, Any] | None:
    """The content of a line, or None where it is no whole entry."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and set(FIELDS) <= set(entry) else None


def _last_mac(path: Path) -> str:
    """The HMAC of the last whole line; "" where there is none."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 :]
    except FileNotFoundError:
        return ""
    whole = (entry for line in reversed(lines) if (entry := _entry(line)))
    return str(next(whole, {}).get("mac", ""))


def _text(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: entry.get(name) for name in FIELDS}, sort_keys=True, ensure_ascii=False)


def _mac(key: bytes, previous: str, text: str) -> str:
    return hmac.digest(key, f"sent v1\0{previous}\0{text}".encode("utf-8", "surrogatepass"), "sha256").hex()
