"""Mutations of what strangers may send: bytes, members of archives, values of JSON and YAML. A generator of
the same seed makes the same mutation.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import openpyxl

WORDS = (
    b"1e999",
    b"-1",
    b"<v></v>",
    b't="b"',
    b't="e"',
    b't="d"',
    b't="s"',
    b"99999999999",
    b"&x;",
    b"\0",
    b"\x1b[2K",
    b"../../",
    b"&a [*a]",
    b"!!int ",
    b"[" * 5000,
)
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    5e-324,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 100_000,
    "../../outside",
    "/outside",
    "\x1b[2K\rgood",
    "\u202egood",
    "\ud800",
    "a\nb",
    "2026-99-99",
    "nan",
    [],
    {},
    DEEP,
    ["x"] * 5_000,
    {"\x1b": {"x": "y"}},
)
"""Values that nobody writes by mistake."""


def workbook(rows: Iterable[Sequence[object]]) -> bytes:
    """An Excel file of one sheet."""
    book = openpyxl.Workbook()
    for row in rows:
        book.worksheets[0].append(list(row))
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def label_workbook() -> bytes:
    """A small label sheet as an Excel file, with a formula in a note."""
    header = ["accession", "series", "reader", "metal", "metal_severity", "note"]
    rows = [[f"A{n}", n, "R 1", n % 2, 0.5 * (n % 2), "=1+1" if n == 5 else "ß"] for n in range(6)]
    return workbook([header, *rows])


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three places changed, removed, repeated, cut off or written over."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at, length = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 24))
        kind = int(rng.integers(0, 5))
        if kind == 0:
            data[at : at + length] = rng.bytes(length)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 9))
        elif kind == 3:
            del data[at:]
        else:
            data[at:at] = WORDS[int(rng.integers(0, len(WORDS)))]
    return bytes(data)


def mutated_archive(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes of a zip file, or of a member that is packed again, or is left out or renamed."""
    if rng.random() < 0.3:
        return mutated(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    chosen = str(rng.choice(list(members)))
    members[chosen] = mutated(members[chosen], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            fate = rng.random() if name == chosen else 1.0
            if fate > 0.05:
                archive.writestr(name if fate > 0.1 else f"../../{name}", member)
    return packed.getvalue()


def changed(values: Any, rng: np.random.Generator) -> Any:
    """A tree of mappings, lists and values in which one thing is gone, new, or `HOSTILE`; the given one
    stays as it is.
    """
    if isinstance(values, dict) and values and rng.random() < 0.95:
        key = list(values)[int(rng.integers(0, len(values)))]
        fate = rng.random()
        if fate < 0.05:
            return {name: value for name, value in values.items() if name != key}
        if fate < 0.1:
            return {**values, "x" * int(rng.integers(1, 200)): values[key]}
        return {**values, key: changed(values[key], rng)}
    if isinstance(values, list | tuple) and values and rng.random() < 0.9:
        at = int(rng.integers(0, len(values)))
        fate = rng.random()
        if fate < 0.1:
            return [*values[:at], *values[at + 1 :]]
        if fate < 0.2:
            return [*values, values[at]]
        return [*values[:at], changed(values[at], rng), *values[at + 1 :]]
    return HOSTILE[int(rng.integers(0, len(HOSTILE)))]
