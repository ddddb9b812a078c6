"""A log of one line an entry, chained under the site key.

Each line carries an HMAC over its content and the HMAC of the line before, so that a line that was edited,
removed, inserted or moved is found. A line that a crash tore is no line: the next one continues from the last
whole line. What is not found: that lines at the end were removed.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.site.config import site_key
from common.errors import DataError
from common.files import append_line, locked

TAIL_BYTES = 1 << 20
"""Enough for the last whole line, whatever was torn behind it."""


@dataclass(frozen=True, kw_only=True)
class ChainedLog:
    """Where a log lies and what its lines hold."""

    name: str  # of the file in a site's state folder
    label: str  # what its HMACs are of, with a version
    fields: tuple[str, ...]
    damaged: str  # code of the error where a line was changed
    compare: str  # with what a person compares a damaged one
    plain_first: bool = False  # lines of an earlier version, without HMAC, may stand before the first chained

    def append(self, state: Path, entry: Mapping[str, Any]) -> None:
        """Add an entry with `fields`, durably.

        Raises:
            OSError: it cannot be written.
        """
        key, path = site_key(state), state / self.name
        with locked(path.with_suffix(".lock")):
            line = dict(entry) | {"mac": self._mac(key, self._last_mac(path), self._text(entry))}
            append_line(path, json.dumps(line, ensure_ascii=False))

    def read(self, state: Path) -> list[dict[str, Any]]:
        """The entries, oldest first, verified; [] where there is none.

        Raises:
            DataError: a line was changed, or cannot be read (code `damaged`).
        """
        path = state / self.name
        if not path.exists():
            return []
        if not (state / "site.key").is_file():  # to make a new one here would disown every line
            raise DataError(
                f"{path}: the key that verifies it, {state / 'site.key'}, is missing",
                code=self.damaged,
                hint="restore the key from a backup",
            )
        key, previous = site_key(state), ""
        entries: list[dict[str, Any]] = []
        for number, entry in self._lines(path):
            mac = entry.pop("mac", "")
            is_old = self.plain_first and not mac and not previous
            if not is_old and not hmac.compare_digest(str(mac), self._mac(key, previous, self._text(entry))):
                raise DataError(
                    f"{path}: line {number} was changed, or lines before it were removed",
                    code=self.damaged,
                    hint=f"compare with {self.compare}",
                )
            previous = mac or previous
            entries.append({name: entry[name] for name in self.fields})
        return entries

    def _lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and content of each whole line; a line that does not end, or that another follows in place
        of its end, was torn by a crash.
        """
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror})",
                code=self.damaged,
                hint="run as the user who writes it",
            ) from None
        for number, line in enumerate(lines, start=1):
            if entry := self._entry(line):
                yield number, entry

    def _entry(self, line: bytes) -> dict[str, Any] | None:
        """The content of a line, or None where it is no whole entry."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) and set(self.fields) <= set(entry) else None

    def _last_mac(self, path: Path) -> str:
        """The HMAC of the last whole line; "" where there is none."""
        try:
            with path.open("rb") as file:
                start = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
                file.seek(start)
                lines = file.read().split(b"\n")[1 if start else 0 :]
        except FileNotFoundError:
            return ""
        whole = (entry for line in reversed(lines) if (entry := self._entry(line)))
        return str(next(whole, {}).get("mac", ""))

    def _text(self, entry: Mapping[str, Any]) -> str:
        return json.dumps({name: entry.get(name) for name in self.fields}, sort_keys=True, ensure_ascii=False)

    def _mac(self, key: bytes, previous: str, text: str) -> str:
        said = f"{self.label}\0{previous}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.digest(key, said, "sha256").hex()
