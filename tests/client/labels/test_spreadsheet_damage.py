"""A workbook that is damaged anywhere is read, or refused by a code; nothing else is ever raised."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.data.opt_outs import read_opt_outs
from client.labels.label_sheet import inspect_labels
from common.errors import ConfigError, DataError
from tests.helpers.mutations import label_workbook, mutated_archive

KEY = bytes(32)


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
    good = label_workbook()
    assert read(tmp_path / "a.xlsx", good).startswith("read"), "a formula in a note does not matter"
    rng = np.random.default_rng(7)  # a workbook holds the time it was made: no two runs damage the same bytes
    told: set[str] = set()
    for _ in range(2000):
        told.add(read(tmp_path / "a.xlsx", mutated_archive(good, rng)).split()[0])
        if told >= {"bad-label", "problems"}:
            break
    assert told >= {"bad-label", "problems"}
