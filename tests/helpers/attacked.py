"""Readers under attack: what they may take, raise and write for one mutation of what they read."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import MAX_MESSAGE, FedqcError
from common.strict import dump_yaml
from tests.helpers.mutations import changed, mutated

MAX_S, MAX_BYTES = 10.0, 1 << 30
Random = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """A good specimen, a mutation of it and its reader."""

    number: int  # of mutations
    make: Callable[[Random | None], Any]  # None: as it was made, unchanged
    read: Callable[[Any], object]


def of_bytes(
    good: bytes, mutate: Callable[[bytes, Random], bytes] = mutated
) -> Callable[[Random | None], bytes]:
    return lambda rng: good if rng is None else mutate(good, rng)


def of_values(values: Any, write: Callable[[Any], bytes]) -> Callable[[Random | None], bytes]:
    """Values or bytes of a text are changed, half and half."""

    def make(rng: Random | None) -> bytes:
        if rng is None:
            return write(values)
        return write(changed(values, rng)) if rng.random() < 0.5 else mutated(write(values), rng)

    return make


def as_yaml(values: Any) -> bytes:
    return dump_yaml(values).encode()


def as_json(values: Any) -> bytes:
    return json.dumps(values).encode()


def in_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def put_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return put_and_read


class Outside:
    """Files that were opened for writing, made, renamed or removed outside a folder, while it is entered."""

    def __init__(self) -> None:
        self.allowed = ""
        self.found: list[str] = []
        sys.addaudithook(self._hear)  # for good: a hook cannot be removed

    @contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        self.found.clear()
        self.allowed = f"{folder}/"
        try:
            yield
        finally:
            self.allowed = ""

    def _hear(self, event: str, words: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        if event == "open":
            path, _, flags = words
            if not isinstance(path, str | bytes | os.PathLike) or not flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            ):
                return
            self._note(path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "sqlite3.connect"):
            self._note(words[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._note(words[1])

    def _note(self, path: Any) -> None:
        where = os.path.abspath(os.fsdecode(path))
        if not f"{where}/".startswith(self.allowed) and where != os.devnull:
            self.found.append(where)


OUTSIDE = Outside()


def put(kind: Kind, number: int, seed: int) -> Counter[str]:
    """What became of so many mutations, by code; "read" where nothing was found wrong."""
    kind.read(kind.make(None))  # the specimen itself is good
    rng, told = np.random.default_rng(seed), Counter[str]()
    for count in range(number):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak of memory counts from here
        before = peak_bytes()
        given = kind.make(rng)
        began = time.process_time()
        try:
            with OUTSIDE.watched(Path.cwd()):
                kind.read(given)
            told["read"], said = told["read"] + 1, ""
        except FedqcError as refused:
            told[refused.code] += 1
            said = refused.message
        except Exception as error:
            error.add_note(f"mutation {count} of seed {seed}: {str(given)[:2000]}")
            raise
        assert "\n" not in said, (count, said)
        assert len(said) <= MAX_MESSAGE + 1, (count, said)
        assert time.process_time() - began < MAX_S, (count, given)
        assert peak_bytes() - before < MAX_BYTES, (count, given)
        assert not OUTSIDE.found, (count, OUTSIDE.found)
    return told


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
