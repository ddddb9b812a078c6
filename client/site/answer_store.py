"""The outbox: every answer that was computed for a question, kept so that the question asked again costs
nothing.

An answer is stored before it is sent. Repeating a round would draw fresh noise over the same patients and
release a second view of them; the stored bytes are the first release again. Files are named by a digest of
the question, never by text from outside; a file is whole or absent (temporary file, fsync, link, fsync of the
folder), and carries a digest of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path

from common.errors import RunError

AnswerKey = tuple[str, str, int, str]  # run, arm, round, kind of answer ("train", "evaluate")

_DIGEST_BYTES = 32


class Outbox:
    """Stored answers in one folder, by (run, arm, round, kind). Safe between threads and processes: the first
    answer stored stays.
    """

    def __init__(self, path: Path | str) -> None:
        self._folder = Path(path)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, key: AnswerKey) -> bytes | None:
        """The stored answer, byte for byte, or None if the question is new.

        Raises:
            RunError: `outbox-damaged`: the file is not what was written. Asking again would be a second
                release, so nobody is answered.
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
        """Store `payload` durably as the answer to `key`, and give back what is stored, which is what may be
        sent.

        Where an answer is stored already, that one is given back and `payload` is forgotten.
        """
        stored = self.get(key)
        if stored is not None:
            return stored
        path = self._file(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(payload).digest() + payload)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):  # someone else was first: theirs is the answer
                os.link(temporary, path)
        except OSError as error:
            raise RunError(
                f"{self._folder}: an answer cannot be stored: {error}", code="outbox-unwritable"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        stored = self.get(key)
        if stored is None:
            raise RunError(f"{path}: vanished while it was being stored", code="outbox-unwritable")
        return stored

    def _file(self, key: AnswerKey) -> Path:
        run, arm, round_number, kind = key
        question = json.dumps([str(run), str(arm), int(round_number), str(kind)]).encode()
        return self._folder / f"{hashlib.sha256(question).hexdigest()}.answer"
