"""A workbook that is damaged anywhere is read, or refused by a code; nothing else is ever raised."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pytest

from client.data.opt_outs import read_opt_outs
from client.labels.label_sheet import inspect_labels
from common.errors import ConfigError, DataError

KEY = bytes(32)


def workbook() -> bytes:
    book = openpyxl.Workbook()
    page = book.worksheets[0]
    page.append(["accession", "series", "reader", "metal", "metal_severity", "note"])
    for number in range(6):
        page.append(
            [f"A{number}", number, "R 1", number % 2, 0.5 * (number % 2), "=1+1" if number == 5 else "ß"]
        )
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, removed, repeated or swapped: of the archive, or of a member that is packed again."""
    if rng.random() < 0.3:
        return _mutated(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    chosen = str(rng.choice(list(members)))
    members[chosen] = _mutated(members[chosen], rng)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            if name != chosen or rng.random() > 0.05:
                archive.writestr(name, member)
    return packed.getvalue()


def _mutated(content: bytes, rng: np.random.Generator) -> bytes:
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
            words = (
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
            )
            data[at:at] = words[int(rng.integers(0, len(words)))]
    return bytes(data)


def read(path: Path, content: bytes) -> str:
    """What became of a workbook as a label sheet and as an opt-out list."""
    path.write_bytes(content)
    told = []
    try:
        told.append("read" if not inspect_labels(path, key=KEY)[1] else "problems")
    except DataError as error:
        told.append(error.code)
    try:
        read_opt_outs(path)
    except ConfigError as error:
        told.append(error.code)
    return " ".join(told)


def test_a_good_workbook_is_read_and_damage_is_named(tmp_path: Path) -> None:
    good = workbook()
    assert read(tmp_path / "a.xlsx", good).startswith("read"), "a formula in a note does not matter"
    rng = np.random.default_rng(7)  # a workbook holds the time it was made: no two runs damage the same bytes
    told: set[str] = set()
    for _ in range(2000):
        told.add(read(tmp_path / "a.xlsx", damaged(good, rng)).split()[0])
        if told >= {"bad-label", "problems"}:
            break
    assert told >= {"bad-label", "problems"}


@pytest.mark.slow
def test_ten_thousand_damaged_workbooks_raise_nothing_else(tmp_path: Path) -> None:
    good, rng = workbook(), np.random.default_rng(11)
    for _ in range(10_000):
        read(tmp_path / "a.xlsx", damaged(good, rng))
