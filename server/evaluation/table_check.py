"""Could the numbers of a published table have been counted? (`fedqc verify --table FILE`)

A score of n images is a fraction of whole numbers, and a row of scores comes from one confusion matrix. For
each row all matrices are searched, within the rounding of the printed decimals: where none fits, the row was
not counted on so many images. Each cell by itself is the GRIM test (Brown and Heathers, Social Psychological
and Personality Science 2017). Where a statistic is printed, its value is recomputed from the printed counts
or means.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chi2_contingency, fisher_exact, ttest_ind_from_stats

from common.errors import DataError

WORDS = ("table", "row", "test_set", "total")
COUNTS = ("n", "positives", "negatives", "test_n", "tp", "fn", "fp", "tn", "x1", "n1", "x2", "n2")
SCORES = ("accuracy", "sensitivity", "specificity", "precision", "recall", "f1")
RATES = ("rate1", "rate2")
STATISTICS = ("mean1", "sd1", "mean2", "sd2", "chi2", "t")
COLUMNS = (*WORDS, *COUNTS, *SCORES, *RATES, *STATISTICS, "p")
MATRIX = ("tp", "fn", "fp", "tn")
MAX_N, MAX_N_STATED = 10_000, 1_000_000
"""Largest n of a row: all matrices of it are tried; and where it states how many are positive."""
UNBOUNDED = 2**40
CHUNK = 2_000_000
MAX_BYTES = 1 << 20  # of a file: a published table is a page
"""Pairs of positives and true positives that are looked at together."""
SHOWN = 6
"""Of several possible numbers of positives, so many are named."""


@dataclass(frozen=True, kw_only=True)
class Printed:
    """A printed number as the integers between which its true value lies: `low / scale` to `high / scale`."""

    text: str
    low: int
    high: int
    scale: int

    @staticmethod
    def of(text: str, *, percent: bool = False, signed: bool = False) -> Printed:
        """A number with the half-width of its last decimal, as a fraction of 100 where it is a percentage.

        Raises:
            ValueError: not a number, or below 0 without `signed`.
        """
        if not re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)" if signed else r"\d+(\.\d*)?|\.\d+", text):
            raise ValueError(text)
        decimals = len(text.partition(".")[2])
        value = int(text.replace(".", ""))
        scale = 2 * 10**decimals * (100 if percent else 1)
        low = 2 * value - 1 if signed else max(2 * value - 1, 0)
        return Printed(text=text, low=low, high=2 * value + 1, scale=scale)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low / self.scale, self.high / self.scale

    def numerators(self, denominators: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the greatest whole number that, over a denominator, rounds to it; empty where the
        second is below the first. Of a denominator 0 the score counts as 0.
        """
        least = -(-denominators * self.low // self.scale)
        greatest = np.minimum(denominators * self.high // self.scale, denominators)
        return least, np.where((denominators == 0) & (self.low > 0), -1, greatest)

    def denominators(self, largest: int) -> np.ndarray:
        """The denominators up to `largest` of which a whole number is this share."""
        tried = np.arange(1, largest + 1)
        least, greatest = self.numerators(tried)
        return tried[least <= greatest]


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The confusion matrices of n images that fit a row: of each number of positives and true positives a
    range of true negatives.
    """

    n: int
    positives: np.ndarray
    true_positives: np.ndarray
    least_negatives: np.ndarray  # true negatives
    most_negatives: np.ndarray

    @property
    def count(self) -> int:
        return int((self.most_negatives - self.least_negatives + 1).sum())

    def first(self) -> tuple[int, int, int, int]:
        """TP, FN, FP, TN of the first one."""
        p, tp, tn = (int(a[0]) for a in (self.positives, self.true_positives, self.least_negatives))
        return tp, p - tp, self.n - p - tn, tn


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the file: words, whole numbers and printed numbers by column; what is blank is left out."""

    line: int
    words: Mapping[str, str]
    counts: Mapping[str, int]
    printed: Mapping[str, Printed]
    p: tuple[str, Printed] | None  # how it is printed: = or <

    @property
    def name(self) -> str:
        return " ".join(self.words[key] for key in ("table", "row") if key in self.words)

    @property
    def scores(self) -> dict[str, Printed]:
        return {name: self.printed[name] for name in SCORES if name in self.printed}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check of a table: where, whether it holds, and what was found."""

    line: int | None  # of the file; None: of several
    where: str
    check: str
    holds: bool | None  # None: nothing to check it by
    detail: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


# reading


def read_table(path: Path) -> list[Row]:
    """Read a table.

    Raises:
        DataError: the file is missing (`no-such-table`); no CSV in UTF-8, an unknown column, or a cell that
            is no number (`bad-table`).
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _bad(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(
            f"--table {path}: cannot be read ({error.strerror})",
            code="no-such-table",
            hint="correct the path",
        ) from None
    try:
        lines = list(csv.reader(io.StringIO(text, newline=None), strict=True))
    except csv.Error as error:
        raise _bad(f"{path}: not CSV ({error})") from None
    filled = [(number, line) for number, line in enumerate(lines, start=1) if any(map(str.strip, line))]
    if len(filled) < 2:
        raise _bad(f"{path}: no rows below a line of column names")
    head = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in filled[0][1]]
    if unknown := [name for name in head if name not in COLUMNS]:
        raise _bad(f"{path}: column {_plain(unknown[0])!r} is not known")
    if len(set(head)) < len(head):
        raise _bad(f"{path}: a column is named twice")
    cells = []
    for number, line in filled[1:]:
        if len(line) > len(head):
            raise _bad(f"{path}: line {number}: {len(line)} cells, {len(head)} columns")
        given = ((name, cell.strip()) for name, cell in zip(head, line, strict=False))
        cells.append((number, {name: cell for name, cell in given if cell not in ("", "-", "–")}))
    percent = _percent_columns(cells)
    return [_row(path, number, values, percent) for number, values in cells]


def _percent_columns(cells: Sequence[tuple[int, Mapping[str, str]]]) -> set[tuple[str, str]]:
    """(table, column) of scores in per cent: one of its cells is above 1, or has the sign."""
    return {
        (values.get("table", ""), name)
        for _, values in cells
        for name in (*SCORES, *RATES)
        if (text := values.get(name, "")).endswith("%")
        or (re.fullmatch(r"\d+(\.\d*)?", text) and float(text) > 1)
    }


def _row(path: Path, line: int, values: Mapping[str, str], percent: set[tuple[str, str]]) -> Row:
    counts: dict[str, int] = {}
    printed: dict[str, Printed] = {}
    p = None
    table = values.get("table", "")
    for name, text in values.items():
        where = f"{path}: line {line}: {name} = {_plain(text)!r}"
        if name in COUNTS:
            if not re.fullmatch(r"\d{1,9}", text):
                raise _bad(f"{where}, expected a whole number")
            counts[name] = int(text)
        elif name == "p":
            found = re.fullmatch(r"p?\s*([<=]?)\s*(\d?\.\d{1,12}|[01])", text, re.IGNORECASE)
            if found is None:
                raise _bad(f"{where}, expected such as 0.077 or <0.05")
            p = found[1] or "=", Printed.of(found[2])
        elif name not in WORDS:
            is_share = name in SCORES or name in RATES
            try:
                printed[name] = Printed.of(
                    text.removesuffix("%").strip()[:20] if is_share else text[:20],
                    percent=is_share and (table, name) in percent,
                    signed=name.startswith("mean"),
                )
            except ValueError:
                raise _bad(f"{where}, expected a number") from None
            if is_share and printed[name].bounds[0] > 1:
                raise _bad(f"{where}, above 100 %")
    largest = MAX_N_STATED if {"positives", "negatives"} & set(counts) else MAX_N
    if (n := counts.get("n", sum(counts.get(name, 0) for name in MATRIX))) > largest:
        raise _bad(
            f"{path}: line {line}: n = {n}, at most {largest} are tried"
            + ("; state positives" if largest == MAX_N else "")
        )
    words = {name: _plain(values[name]) for name in WORDS if name in values}
    return Row(line=line, words=words, counts=counts, printed=printed, p=p)


def _bad(what: str) -> DataError:
    return DataError(what, code="bad-table", hint=f"columns: {', '.join(COLUMNS)}")


def _plain(text: str) -> str:
    """A text of the file as a terminal may show it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:80]


# one row


def matrices(
    n: int,
    scores: Mapping[str, Printed],
    *,
    positives: int | None = None,
    known: Mapping[str, int] | None = None,
) -> Matrices:
    """All confusion matrices of n images whose scores round to the printed ones.

    Given the positives and the true positives, each score bounds the true negatives, so that one pass over
    these pairs is exhaustive. A score whose denominator is 0 counts as 0.

    Args:
        scores: of `SCORES`.
        positives: where they are stated.
        known: printed cells of the matrix, of `MATRIX`.
    """
    found = [
        _search(n, chunk, scores, known or {})
        for chunk in _chunks(np.arange(n + 1) if positives is None else np.array([positives]))
    ]
    columns = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return Matrices(
        n=n,
        positives=columns[0],
        true_positives=columns[1],
        least_negatives=columns[2],
        most_negatives=columns[3],
    )


def _chunks(positives: np.ndarray) -> Iterator[np.ndarray]:
    per_chunk = max(1, CHUNK // (int(positives[-1]) + 1))
    for start in range(0, len(positives), per_chunk):
        yield positives[start : start + per_chunk]


def _search(
    n: int, positives: np.ndarray, scores: Mapping[str, Printed], known: Mapping[str, int]
) -> tuple[np.ndarray, ...]:
    least, most = np.zeros_like(positives), positives.copy()
    for name in ("sensitivity", "recall"):
        if name in scores:
            low, high = scores[name].numerators(positives)
            least, most = np.maximum(least, low), np.minimum(most, high)
    if "tp" in known:
        least, most = np.maximum(least, known["tp"]), np.minimum(most, known["tp"])
    if "fn" in known:
        hits = positives - known["fn"]
        least, most = np.maximum(least, hits), np.minimum(most, hits)
    lengths = np.maximum(most - least + 1, 0)
    p = np.repeat(positives, lengths)
    starts = np.repeat(least - np.cumsum(lengths) + lengths, lengths)
    tp = starts + np.arange(len(p))
    negatives = n - p
    low, high = np.zeros_like(p), negatives.copy()  # of the true negatives
    fits = np.ones(len(p), bool)
    if "accuracy" in scores:
        right_low, right_high = scores["accuracy"].numerators(np.array(n))
        low, high = np.maximum(low, right_low - tp), np.minimum(high, right_high - tp)
    if "specificity" in scores:
        tn_low, tn_high = scores["specificity"].numerators(negatives)
        low, high = np.maximum(low, tn_low), np.minimum(high, tn_high)
    if "precision" in scores:
        fp_low, fp_high, possible = _wrong(tp, scores["precision"])
        low, high = np.maximum(low, negatives - fp_high), np.minimum(high, negatives - fp_low)
        fits &= possible
    if "f1" in scores:  # 2 TP of 2 TP + FP + FN
        wrong_low, wrong_high, possible = _wrong(2 * tp, scores["f1"])
        fn = p - tp
        low = np.maximum(low, negatives + fn - wrong_high)
        high = np.minimum(high, negatives + fn - wrong_low)
        fits &= possible
    for name, tn in (("tn", known.get("tn")), ("fp", known.get("fp"))):
        if tn is not None:
            exact = np.full_like(p, tn) if name == "tn" else negatives - tn
            low, high = np.maximum(low, exact), np.minimum(high, exact)
    fits &= low <= high
    return p[fits], tp[fits], low[fits], high[fits]


def _wrong(right: np.ndarray, score: Printed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many wrong ones, least and most, make `right / (right + wrong)` round to a score; and where there
    may be any: with none right the score is 0.
    """
    least = -(-right * score.scale // score.high) - right
    most = right * score.scale // score.low - right if score.low else np.full_like(right, UNBOUNDED)
    return (
        np.maximum(least, 0),
        np.where(right == 0, UNBOUNDED, most),
        (right > 0) | (score.low == 0),
    )


def swapped(scores: Mapping[str, Printed]) -> dict[str, Printed] | None:
    """The scores with precision and recall (or sensitivity) in each other's column; None without both."""
    recall = next((name for name in ("recall", "sensitivity") if name in scores), None)
    if recall is None or "precision" not in scores:
        return None
    return dict(scores) | {"precision": scores[recall], recall: scores["precision"]}


def _positives(row: Row) -> int | None:
    if "positives" in row.counts:
        return row.counts["positives"]
    if "negatives" in row.counts and "n" in row.counts:
        return row.counts["n"] - row.counts["negatives"]
    return None


# checks


def check_table(rows: Sequence[Row]) -> list[Finding]:
    """Every check of a table, row by row, then those over rows."""
    found: list[Finding] = []
    fitting: dict[int, Matrices] = {}
    for row in rows:
        found += _sizes(row)
        if row.scores or any(name in row.counts for name in MATRIX):
            found += _cells(row)
            finding, one = _matrix(row)
            found.append(finding)
            if one is not None:
                fitting[row.line] = one
        found += [*_two_rates(row), *_two_means(row)]
    return [*found, *_test_sets(rows, fitting), *_totals(rows), *_copies(rows)]


def _finding(row: Row, check: str, holds: bool | None, detail: str, **numbers: Any) -> Finding:
    return Finding(line=row.line, where=row.name, check=check, holds=holds, detail=detail, numbers=numbers)


def _sizes(row: Row) -> Iterator[Finding]:
    counts = row.counts
    n = counts.get("n")
    if n is not None and "test_n" in counts:
        holds = n <= counts["test_n"]
        yield _finding(row, "n and test set", holds, f"n {n}, test set {counts['test_n']}")
    parts = [("positives", "negatives"), MATRIX]
    for names in parts:
        if n is not None and all(name in counts for name in names):
            total = sum(counts[name] for name in names)
            yield _finding(row, "sum", total == n, f"{' + '.join(names)} = {total}, n {n}")


def _cells(row: Row) -> Iterator[Finding]:
    """Each cell by itself."""
    n, positives = row.counts.get("n"), _positives(row)
    if n is None or not row.scores:
        return
    wrong = []
    for name, score in row.scores.items():
        of = {
            "accuracy": n,
            "sensitivity": positives,
            "recall": positives,
            "specificity": None if positives is None else n - positives,
        }.get(name)
        if of is not None:
            low, high = score.numerators(np.array(of))
            if low > high:
                wrong.append(f"{name} {score.text} is no share of {of}")
        elif not len(score.denominators(2 * n if name == "f1" else n)):
            wrong.append(f"{name} {score.text} is no share of any number up to {n}")
    yield _finding(row, "cells", not wrong, "; ".join(wrong))


def _matrix(row: Row) -> tuple[Finding, Matrices | None]:
    """Whether a confusion matrix has all scores of a row, as printed or with two columns exchanged; and the
    matrices that do.
    """
    n, scores = row.counts.get("n"), row.scores
    known = {name: row.counts[name] for name in MATRIX if name in row.counts}
    if n is None and len(known) == len(MATRIX):
        n = sum(known.values())
    if n is None:
        return _finding(row, "matrix", None, "no n"), None
    positives = _positives(row)
    if positives is not None and not 0 <= positives <= n:
        return _finding(row, "matrix", False, f"{positives} positives of n {n}"), None
    as_printed = matrices(n, scores, positives=positives, known=known)
    if as_printed.count:
        return _finding(row, "matrix", True, _words(as_printed), **_numbers(as_printed)), as_printed
    other = swapped(scores)
    if other is not None:
        exchanged = matrices(n, other, positives=positives, known=known)
        if exchanged.count:
            detail = f"none at n {n}; with precision and recall exchanged: {_words(exchanged)}"
            numbers = _numbers(exchanged) | {"exchanged": True}
            return _finding(row, "matrix", False, detail, **numbers), exchanged
    also = "" if other is None else ", nor with precision and recall exchanged"
    needs = _needs(row, n) if positives is None else ""
    return _finding(row, "matrix", False, f"none at n {n}{also}{needs}", matrices=0), None


def _words(found: Matrices) -> str:
    if found.count == 1:
        return "TP {}, FN {}, FP {}, TN {}".format(*found.first())
    return f"{found.count} fit, positives {_some(np.unique(found.positives))}"


def _numbers(found: Matrices) -> dict[str, Any]:
    return {
        "matrices": found.count,
        "matrix": list(found.first()) if found.count == 1 else None,
        "positives": np.unique(found.positives).tolist(),
        "exchanged": False,
    }


def _needs(row: Row, n: int) -> str:
    """Of how many positives and negatives each share can be, where that is few."""
    said = []
    of = {"sensitivity": "positives", "recall": "positives", "specificity": "negatives"}
    for name, what in of.items():
        if name in row.scores and len(found := row.scores[name].denominators(n)) <= SHOWN:
            numbers = f"needs {_some(found)}" if len(found) else "fits no number of"
            said.append(f"{name} {row.scores[name].text} {numbers} {what}")
    return f"; {', '.join(said)}" if said else ""


def _some(numbers: np.ndarray) -> str:
    if len(numbers) > SHOWN:
        return f"{numbers[0]} to {numbers[-1]}"
    return " or ".join(map(str, numbers))


def _test_sets(rows: Sequence[Row], fitting: Mapping[int, Matrices]) -> Iterator[Finding]:
    """Rows of one test set have one n and one number of positives."""
    for name in dict.fromkeys(row.words["test_set"] for row in rows if "test_set" in row.words):
        own = [row for row in rows if row.words.get("test_set") == name]
        sizes = sorted({row.counts["n"] for row in own if "n" in row.counts})
        if len(sizes) > 1:
            yield Finding(
                line=None, where=name, check="one n", holds=False, detail=f"n {', '.join(map(str, sizes))}"
            )
            continue
        possible = [set(fitting[row.line].positives.tolist()) for row in own if row.line in fitting]
        if len(own) < 2 or not possible:
            continue
        common = np.array(sorted(set.intersection(*possible)), int)
        without = len(own) - len(possible)
        detail = f"{_some(common)} positives" if len(common) else "no number of positives fits all rows"
        detail += f"; {without} rows have no matrix at all" if without else ""
        yield Finding(line=None, where=name, check="one prevalence", holds=bool(len(common)), detail=detail)


def _totals(rows: Sequence[Row]) -> Iterator[Finding]:
    """The n of a row that is marked as the total is that of the others of its table."""
    for total in (row for row in rows if row.words.get("total", "").lower() in ("yes", "1", "true", "x")):
        table = total.words.get("table")
        parts = [row for row in rows if row is not total and row.words.get("table") == table]
        numbers = [row.counts["n"] for row in parts if "n" in row.counts]
        if "n" in total.counts and numbers:
            found = sum(numbers)
            detail = f"{' + '.join(map(str, numbers))} = {found}, printed {total.counts['n']}"
            yield _finding(total, "row sum", found == total.counts["n"], detail)


def _copies(rows: Sequence[Row]) -> Iterator[Finding]:
    """Two tables with all the same scores, row by row."""
    tables: dict[str, list[tuple[tuple[str, str], ...]]] = {}
    for row in rows:
        if row.scores:
            texts = tuple((name, score.text) for name, score in row.scores.items())
            tables.setdefault(row.words.get("table", ""), []).append(texts)
    for (one, first), (other, second) in itertools.combinations(tables.items(), 2):
        if first == second and len(first) > 1:
            detail = f"tables {one} and {other} have the same {len(first)} rows"
            yield Finding(
                line=None, where=f"{one}, {other}", check="tables differ", holds=False, detail=detail
            )


# statistics


def _two_rates(row: Row) -> Iterator[Finding]:
    """Two shares: their counts, chi-squared and p."""
    sizes, counts = [], []
    for group in "12":
        n, x, rate = (
            row.counts.get(f"n{group}"),
            row.counts.get(f"x{group}"),
            row.printed.get(f"rate{group}"),
        )
        if n is not None and rate is not None:
            low, high = (int(bound) for bound in rate.numerators(np.array(n)))
            holds = low <= high if x is None else low <= x <= high
            is_of = "" if x is None else f"{x}/{n} = {x / n:.4g}; " if n else ""
            detail = (
                ""
                if holds
                else f"{is_of}{rate.text} is "
                + (
                    f"{low} of {n}"
                    if low == high
                    else f"no share of {n}"
                    if low > high
                    else f"{low} to {high}"
                )
            )
            yield _finding(row, f"rate {group}", holds, detail)
            x = low if x is None and low == high else x
        sizes.append(n)
        counts.append(x)
    (n1, n2), (x1, x2) = sizes, counts
    if n1 is None or n2 is None or x1 is None or x2 is None:
        return
    if x1 > n1 or x2 > n2:
        yield _finding(row, "two rates", False, f"{x1} of {n1}, {x2} of {n2}")
        return
    cells = np.array([[x1, n1 - x1], [x2, n2 - x2]])
    tests = {"Fisher": (math.nan, float(fisher_exact(cells).pvalue))}
    if cells.sum(axis=0).all() and cells.sum(axis=1).all():
        for name, correction in (("chi2", False), ("chi2 with Yates' correction", True)):
            tested = chi2_contingency(cells, correction=correction)
            tests[name] = float(tested.statistic), float(tested.pvalue)
    if "chi2" in row.printed:
        bounds = row.printed["chi2"].bounds
        found = [value for value, _ in tests.values() if not math.isnan(value)]
        holds = any(bounds[0] <= value <= bounds[1] for value in found)
        yield _finding(row, "chi2", holds, "recomputed " + ", ".join(f"{value:.2f}" for value in found))
    yield from _p(row, {name: (p, p) for name, (_, p) in tests.items()})


def _two_means(row: Row) -> Iterator[Finding]:
    """Two means of independent groups: t and p, over all that their rounding permits."""
    names = ("mean1", "sd1", "mean2", "sd2")
    if not all(name in row.printed for name in names) or not {"n1", "n2"} <= set(row.counts):
        return
    n1, n2 = row.counts["n1"], row.counts["n2"]
    if min(n1, n2) < 2:
        yield _finding(row, "t", None, f"n1 {n1}, n2 {n2}: fewer than two")
        return
    corners = list(itertools.product(*(row.printed[name].bounds for name in names)))
    tests: dict[str, tuple[float, float]] = {}
    values = []
    for name, equal in (("Student", True), ("Welch", False)):
        with np.errstate(divide="ignore", invalid="ignore"):
            tested = [
                ttest_ind_from_stats(m1, s1, n1, m2, s2, n2, equal_var=equal) for m1, s1, m2, s2 in corners
            ]
        t = [abs(float(one.statistic)) for one in tested]
        p = [float(one.pvalue) for one in tested]
        if np.isfinite([*t, *p]).all():
            values.append((name, min(t), max(t)))
            tests[name] = min(p), max(p)
    if "t" in row.printed and values:
        low, high = row.printed["t"].bounds
        holds = any(least <= high and most >= low for _, least, most in values)
        said = ", ".join(f"{name} {least:.2f} to {most:.2f}" for name, least, most in values)
        yield _finding(row, "t", holds, f"recomputed, independent groups: {said}")
    yield from _p(row, tests)


def _p(row: Row, tests: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """Whether a printed p is that of any test.

    Args:
        tests: the least and the greatest p of each that the printed numbers permit.
    """
    if row.p is None or not tests:
        return
    relation, printed = row.p
    low, high = printed.bounds
    limit = float(printed.text)
    holds = {
        name: (least < limit) if relation == "<" else (least <= high and most >= low)
        for name, (least, most) in tests.items()
    }
    said = ", ".join(f"{name} {least:.3g}" for name, (least, _) in tests.items())
    yield _finding(row, "p", any(holds.values()), f"printed {relation} {printed.text}; recomputed: {said}")


# for a terminal


def findings_table(findings: Sequence[Finding]) -> str:
    """The findings in plain lines, and what does not hold in a last one."""
    words = {True: "ok", False: "FAIL", None: "-"}
    lines = []
    for found in findings:
        where = " ".join(filter(None, [f"line {found.line}" if found.line else "", found.where]))
        lines.append(f"{words[found.holds]:5s} {where:32s} {found.check:16s} {found.detail}".rstrip())
    wrong = sum(found.holds is False for found in findings)
    return "\n".join([*lines, f"{wrong} of {len(findings)} checks do not hold"])
