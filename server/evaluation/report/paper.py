"""Tables as papers print them, in columns that `fedqc verify --table` reads; all of them pass it.

Scores by artifact, site and arm at the operating point; seconds a case, human against machine, where they
were measured; rescans before and after, where they were counted.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from scipy.stats import chi2_contingency, fisher_exact, ttest_ind

from common.errors import ConfigError
from server.evaluation.report.decisions import Line, any_lines, lines_of
from server.evaluation.report.reading import Reading

Table = list[dict[str, str]]
"""Rows: column -> text; all rows have the same columns."""

SCORES = ("accuracy", "sensitivity", "specificity", "precision", "f1")
READERS = ("human", "machine")


def scores_table(reading: Reading) -> Table:
    """A row an arm, artifact and site that was scored exactly and has an operating point. A score without
    denominator is blank.
    """
    return [
        _row(reading, line)
        for arm in reading.arms
        for line in chain(lines_of(reading, arm), any_lines(reading, arm))
        if line.found.tp is not None
    ]


def _row(reading: Reading, line: Line) -> dict[str, str]:
    found = line.found
    assert None not in (found.tp, found.fn, found.fp, found.tn)
    matrix = {name: str(getattr(found, name)) for name in ("tp", "fn", "fp", "tn")}
    values = {
        "accuracy": found.accuracy,
        "sensitivity": found.sensitivity and found.sensitivity.value,
        "specificity": found.specificity and found.specificity.value,
        "precision": found.precision and found.precision.value,
        "f1": found.f1,
    }
    return {
        "table": reading.evaluation["plan"],
        "row": f"{line.model} {line.artifact} {line.site}",
        "test_set": f"{line.site} {line.artifact}",
        "n": str(found.n),
        "positives": str(found.positives),
        **matrix,
        **{name: "" if value is None else f"{value:.4f}" for name, value in values.items()},
    }


def rescans_table(before: str, after: str) -> Table:
    """Rescan rates before and after, with chi-squared (without and with Yates' correction) and Fisher's p.

    Args:
        before, after: `x/n`, rescans of scans.
    Raises:
        ConfigError: not such a pair (code `bad-argument`).
    """
    (x1, n1), (x2, n2) = (_pair(text) for text in (before, after))
    cells = np.array([[x1, n1 - x1], [x2, n2 - x2]])
    row = {
        "table": "rescans",
        "row": "before, after",
        "x1": str(x1),
        "n1": str(n1),
        "rate1": f"{x1 / n1:.4f}",
        "x2": str(x2),
        "n2": str(n2),
        "rate2": f"{x2 / n2:.4f}",
    }
    rows = []
    if cells.sum(axis=0).all():
        for name, correction in (("chi-squared", False), ("chi-squared, Yates", True)):
            tested = chi2_contingency(cells, correction=correction)
            both = {"chi2": f"{tested.statistic:.2f}", "p": _p(float(tested.pvalue))}
            rows.append(row | {"row": f"{row['row']}: {name}"} | both)
    exact = {"chi2": "", "p": _p(float(fisher_exact(cells).pvalue))}
    return [*rows, row | {"row": f"{row['row']}: Fisher, exact"} | exact]


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if found is None or not 0 <= int(found[1]) <= int(found[2]) or not int(found[2]):
        raise ConfigError(
            f"--rescans {text!r}: not X/N, X rescans of N scans",
            code="bad-argument",
            hint="for example --rescans 12/150 5/148",
        )
    return int(found[1]), int(found[2])


def seconds_table(path: Path) -> Table:
    """Seconds a case, human against machine: means, standard deviations and Welch's t test.

    Args:
        path: CSV with the columns `reader`, `human` or `machine`, and `seconds`; a line a case.
    Raises:
        ConfigError: the file cannot be read or is no such table, or a reader has fewer than two cases (code
            `bad-argument`).
    """
    seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
    try:
        for number, line in enumerate(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"))), start=2):
            value = float(line["seconds"] or "")
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"line {number}")
            seconds[line["reader"].strip()].append(value)
    except OSError as error:
        raise _no_seconds(f"{path}: cannot be read ({error.strerror})") from None
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error):
        raise _no_seconds(f"{path}: no table of reader ({' or '.join(READERS)}) and seconds") from None
    if few := [reader for reader, values in seconds.items() if len(values) < 2]:
        raise _no_seconds(f"{path}: fewer than two cases of {few[0]}")
    one, other = (np.array(seconds[reader]) for reader in READERS)
    row = {"table": "seconds", "row": "human, machine"}
    for group, values in (("1", one), ("2", other)):
        row |= {f"mean{group}": f"{values.mean():.4f}", f"sd{group}": f"{values.std(ddof=1):.4f}"}
        row |= {f"n{group}": str(len(values))}
    tested = ttest_ind(one, other, equal_var=False)
    if not np.isfinite(tested.statistic):
        return [row | {"t": "", "p": ""}]
    return [row | {"t": f"{abs(tested.statistic):.2f}", "p": _p(float(tested.pvalue))}]


def _no_seconds(what: str) -> ConfigError:
    return ConfigError(
        f"--seconds {what}", code="bad-argument", hint="a CSV file with the columns reader and seconds"
    )


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


# text


def as_csv(tables: Sequence[Table]) -> str:
    """All rows in one file, the columns of all tables; what a table does not have is blank."""
    columns = list(dict.fromkeys(name for table in tables for row in table for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows([{name: inert(text) for name, text in row.items()} for row in table])
    return file.getvalue()


def as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table; nothing in a cell is markup."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(plain_text(text) for text in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def inert(text: str) -> str:
    """A cell that no spreadsheet takes for a formula, and no terminal for a command."""
    shown = without_control(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def plain_text(text: str) -> str:
    """Words in Markdown that are no markup, and no command to a terminal."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$!])", r"\\\1", without_control(text)).replace("\\<", "&lt;")


def without_control(text: str) -> str:
    """Without control characters, line breaks and marks of writing direction."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]", " ", text)
