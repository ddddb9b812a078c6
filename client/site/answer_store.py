"""Store each answer of a site, so that a repeated request gets the same bytes and costs no privacy.

An answer is stored before it is sent. Computing a round again would draw fresh noise over the same patients
and release a second view of them; the stored bytes are the first release again. Files are named by a digest
of the request, never by text from outside; a file is complete or absent, and holds a digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from common.errors import RunError
from common.files import write_new

AnswerKey = tuple[str, str, int, str]  # run, arm, round, kind of answer ("train", "evaluate")

_DIGEST_BYTES = 32
KEPT_DAYS = 400
"""How long an answer is kept: a run that is resumed later is refused where it was charged."""


class Outbox:
    """Stored answers in one folder, by (run, arm, round, kind). Safe between threads and processes: the first
    stored answer stays.
    """

    def __init__(self, path: Path | str) -> None:
        self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, key: AnswerKey) -> bytes | None:
        """The stored answer, byte for byte, or None if the request is new.

        Raises:
            RunError: `outbox-damaged`: the file is not what was written. A new answer would be a second
                release, so none is given.
        """
        path = self._file(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            raise RunError(
                f"{path}: a stored answer is damaged",
                code="outbox-damaged",
                hint="restore it from a backup, or start a new run",
            )
        return payload

    def put(self, key: AnswerKey, payload: bytes) -> bytes:
        """Store `payload` durably as the answer to `key`, and return the stored answer, the only one to send.

        Where an answer is stored already, that one is returned and `payload` is dropped.

        Raises:
            RunError: `outbox-damaged` (see `get`), `outbox-unwritable`.
        """
        stored = self.get(key)
        if stored is not None:
            return stored
        path = self._file(key)
        self._forget_old()
        try:
            write_new(path, hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            raise RunError(
                f"{self._folder}: an answer cannot be stored: {error}", code="outbox-unwritable"
            ) from error
        stored = self.get(key)
        if stored is None:
            raise RunError(f"{path}: disappeared while it was stored", code="outbox-unwritable")
        return stored

    def _forget_old(self) -> None:
        """Remove answers of `KEPT_DAYS` ago. The ledger goes on refusing to draw them again."""
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for path in self._folder.glob("*.answer"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _file(self, key: AnswerKey) -> Path:
        run, arm, round_number, kind = key
        question = json.dumps([str(run), str(arm), int(round_number), str(kind)]).encode()
        return self._folder / f"{hashlib.sha256(question).hexdigest()}.answer"
