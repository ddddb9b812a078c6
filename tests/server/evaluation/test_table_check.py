"""Published tables: a row is possible where a confusion matrix rounds to it, and the papers' rows are not."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from server.evaluation.table_check import (
    Finding,
    Printed,
    check_table,
    findings_table,
    matrices,
    read_table,
    swapped,
)
from tests.helpers.command_line import ROOT, typed

TABLES = ROOT / "tests" / "helpers" / "tables"
SCORE_COLUMNS = ("accuracy", "sensitivity", "specificity", "precision", "recall", "f1")


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def checked(path: Path) -> list[Finding]:
    return check_table(read_table(path))


def of(findings: list[Finding], check: str) -> dict[int | None, Finding]:
    return {found.line: found for found in findings if found.check == check}


def scores_of(tp: int, fn: int, fp: int, tn: int) -> dict[str, Fraction]:
    """The scores of a confusion matrix; 0 where a denominator is."""

    def share(right: int, of: int) -> Fraction:
        return Fraction(right, of) if of else Fraction(0)

    return {
        "accuracy": share(tp + tn, tp + fn + fp + tn),
        "sensitivity": share(tp, tp + fn),
        "recall": share(tp, tp + fn),
        "specificity": share(tn, tn + fp),
        "precision": share(tp, tp + fp),
        "f1": share(2 * tp, 2 * tp + fp + fn),
    }


def random_matrix(generator: np.random.Generator, largest: int) -> tuple[int, int, int, int]:
    n = int(generator.integers(1, largest))
    positives = int(generator.integers(0, n + 1))
    tp, tn = int(generator.integers(0, positives + 1)), int(generator.integers(0, n - positives + 1))
    return tp, positives - tp, n - positives - tn, tn


def test_every_matrix_is_found_that_rounds_to_the_row() -> None:
    """Against all matrices of small n, tried one by one with exact fractions."""
    generator = np.random.default_rng(3)
    for _ in range(60):
        truth = random_matrix(generator, 14)
        n, decimals = sum(truth), int(generator.integers(1, 4))
        chosen = generator.permutation(SCORE_COLUMNS)[: generator.integers(1, 5)]
        row = {name: Printed.of(f"{float(scores_of(*truth)[name]):.{decimals}f}") for name in chosen}
        half = Fraction(1, 2 * 10**decimals)
        expected = 0
        for tp, fn, fp in itertools.product(range(n + 1), repeat=3):
            if tp + fn + fp <= n:
                found = scores_of(tp, fn, fp, n - tp - fn - fp)
                expected += all(abs(found[name] - Fraction(row[name].text)) <= half for name in chosen)
        assert matrices(n, row).count == expected > 0
        positives = truth[0] + truth[1]
        assert 0 < matrices(n, row, positives=positives).count <= expected


def test_200_correct_tables_pass(tmp_path: Path) -> None:
    generator = np.random.default_rng(11)
    for number in range(200):
        rows, percent, decimals = [], bool(number % 2), int(generator.integers(2, 5))
        test = random_matrix(generator, 300)
        n, positives = sum(test), test[0] + test[1]
        for row in range(3):  # models on one test set
            tp, tn = generator.integers(0, positives + 1), generator.integers(0, n - positives + 1)
            truth = int(tp), positives - int(tp), n - positives - int(tn), int(tn)
            texts = [
                f"{float(score * (100 if percent else 1)):.{decimals - 2 * percent}f}{'%' if percent else ''}"
                for score in scores_of(*truth).values()
            ]
            stated = str(positives) if row == 1 else ""
            rows.append(",".join([f"m{row}", "a", str(n), str(n), stated, *texts]))
        head = "row,test set,n,test_n,positives,Accuracy,Sensitivity,Recall,Specificity,Precision,F1"
        found = checked(written(tmp_path / "t.csv", head, *rows))
        assert all(one.holds for one in found), (rows, findings_table(found))
        assert {one.check for one in found} == {"n and test set", "cells", "matrix", "one prevalence"}


def test_paper_000() -> None:
    """Of six rows one is possible at its n, and from one matrix only."""
    found = checked(TABLES / "paper_000.csv")
    rows = of(found, "matrix")
    assert {line: row.holds for line, row in rows.items()} == {line: line == 5 for line in (2, 3, 4, 5, 6, 7)}
    assert rows[5].numbers["matrix"] == [10, 1, 1, 12]
    assert "91.89 needs 37 or 74 positives" in rows[2].detail
    assert "93.10 needs 29 or 58 negatives" in rows[2].detail
    total = of(found, "row sum")[2]
    assert (total.holds, "= 79, printed 80" in total.detail) == (False, True)
    assert [row.holds for row in of(found, "n and test set").values()] == [
        False,
        False,
        True,
        False,
        True,
        True,
    ]


def test_statistics_of_paper_000() -> None:
    """7 of 40 against 2 of 40, printed as 18.75 % and 6.25 %, p < 0.05; t of the printed means is 54.27."""
    found = checked(TABLES / "paper_000_statistics.csv")
    assert of(found, "chi2")[2].holds is True
    assert of(found, "rate 1")[2].holds is of(found, "rate 2")[2].holds is False
    rates, seconds = of(found, "p")[2], of(found, "p")[3]
    assert (rates.holds, seconds.holds) == (False, True)
    assert "Fisher 0.154" in rates.detail
    assert "chi2 0.0769" in rates.detail
    means = of(found, "t")[3]
    assert means.holds is False
    assert "Student 54.09 to 54.45" in means.detail


def test_t_and_p_that_are_right_hold(tmp_path: Path) -> None:
    head = "mean1,sd1,n1,mean2,sd2,n2,t,p"
    found = checked(written(tmp_path / "t.csv", head, "125.6,20.5,80,1.2,0.3,80,54.27,<0.001"))
    assert [one.holds for one in found] == [True, True]
    found = checked(written(tmp_path / "t.csv", "x1,n1,rate1,x2,n2,rate2,p", "7,40,17.5,2,40,5.0,0.154"))
    assert [one.holds for one in found] == [True, True, True]
    found = checked(written(tmp_path / "t.csv", "n1,rate1,n2,rate2,p", "40,17.5,40,5.0,p=.20"))
    assert [one.holds for one in found] == [True, True, False]


EXCHANGED = {
    2: (332, 168, 144, 356),
    3: (150, 350, 83, 417),
    4: (279, 221, 74, 426),
    5: (360, 140, 110, 390),
    13: (441, 59, 160, 340),  # table 3 at .3
}
IMPOSSIBLE = (6, 7, 8, 9, 14, 15, 16, 32, 33)  # table 2; table 3 at .4, .5, .6; U-Net; YOLOv5


def test_paper_001() -> None:
    """At 500 and 500 no row is possible as printed; with precision and recall exchanged, some are."""
    found = checked(TABLES / "paper_001.csv")
    rows = of(found, "matrix")
    assert len(rows) == 33
    assert not any(row.holds for row in rows.values())
    for line, matrix in EXCHANGED.items():
        assert rows[line].numbers["exchanged"]
        assert rows[line].numbers["matrix"] == list(matrix)
    impossible = {line for line, row in rows.items() if row.numbers["matrices"] == 0}
    assert impossible == {*IMPOSSIBLE, 24, 25, 26}  # table 4 is a copy of table 3
    copies = of(found, "tables differ")[None]
    assert (copies.holds, copies.where) == (False, "3, 4")


def test_rows_of_one_test_set_have_one_number_of_positives(tmp_path: Path) -> None:
    """Each row is possible by itself: 3 of 7 positives, 2 of 5."""
    head = "row,test_set,n,sensitivity,specificity"
    first = matrices(12, {"sensitivity": Printed.of("0.429"), "specificity": Printed.of("0.40")})
    assert np.unique(first.positives).tolist() == [7]
    lines = ["a,one,12,0.429,0.40", "b,one,12,0.40,0.429"]
    found = of(checked(written(tmp_path / "t.csv", head, *lines)), "one prevalence")[None]
    assert (found.holds, found.where) == (False, "one")
    other = of(checked(written(tmp_path / "t.csv", head, lines[0], "b,one,12,0.571,0.20")), "one prevalence")
    assert other[None].holds is True
    assert "7 positives" in other[None].detail
    sizes = of(checked(written(tmp_path / "t.csv", head, lines[0], "b,one,13,0.5,0.5")), "one n")[None]
    assert (sizes.holds, sizes.detail) == (False, "n 12, 13")


@pytest.mark.parametrize(
    ("line", "check", "says"),
    [
        ("30,20,5,5,,,0.800", "sum", "positives + negatives"),
        ("30,20,10,,,,0.800", "cells", ""),
        ("30,,,5,15,5,0.813", "cells", "0.813 is no share of 30"),
        ("30,40,,,,,0.800", "matrix", "40 positives of n 30"),
    ],
)
def test_numbers_that_contradict_each_other(line: str, check: str, says: str, tmp_path: Path) -> None:
    found = of(checked(written(tmp_path / "t.csv", "n,positives,negatives,fp,tp,fn,accuracy", line)), check)[
        2
    ]
    assert (found.holds, says in found.detail) == (check == "cells" and not says, True)


def test_a_printed_matrix_must_give_its_scores_and_its_n(tmp_path: Path) -> None:
    head = "n,tp,fn,fp,tn,precision,f1"
    good, bad = "24,10,1,1,12,0.909,0.91", "25,10,1,1,12,0.909,0.92"
    found = checked(written(tmp_path / "t.csv", head, good, bad))
    assert [one.holds for one in found if one.line == 2] == [True, True, True]
    assert (of(found, "sum")[3].holds, of(found, "matrix")[3].holds) == (False, False)
    found = checked(written(tmp_path / "t.csv", "tp,fn,fp,tn,f1", "10,1,1,12,0.92"))  # n from the matrix
    assert of(found, "matrix")[2].holds is False


def test_a_score_without_n_is_not_judged(tmp_path: Path) -> None:
    found = checked(written(tmp_path / "t.csv", "row,accuracy", "a,0.913"))
    assert [(one.check, one.holds) for one in found] == [("matrix", None)]


def test_columns_are_exchanged_only_where_there_are_two() -> None:
    recall, precision = Printed.of("0.5"), Printed.of("0.25")
    assert swapped({"recall": recall}) is None
    assert swapped({"sensitivity": recall, "precision": precision}) == {
        "sensitivity": precision, "precision": recall,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "code", "says"),
    [
        (["n,accuracy"], "bad-table", "no rows"),
        (["n,auc", "5,0.5"], "bad-table", "column 'auc' is not known"),
        (["n,n", "5,5"], "bad-table", "a column is named twice"),
        (["n,accuracy", "5,0.5,1"], "bad-table", "line 2: 3 cells, 2 columns"),
        (["n,accuracy", "5,high"], "bad-table", "line 2: accuracy = 'high', expected a number"),
        (["n,accuracy", "5,120"], "bad-table", "above 100 %"),
        (["n,accuracy", "5.5,0.5"], "bad-table", "expected a whole number"),
        (["n,accuracy", "99999,0.5"], "bad-table", "at most 10000 are tried; state positives"),
        (["x1,p", "5,low"], "bad-table", "expected such as 0.077"),
        (["n,\x1b[31m", "5,5"], "bad-table", "'?[31m'"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_line(
    lines: list[str], code: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        read_table(written(tmp_path / "t.csv", *lines))
    assert caught.value.code == code
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "t.csv")
    assert caught.value.code == "no-such-table"
    (tmp_path / "t.csv").write_bytes(b"n,accuracy\n5,\xff\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_table(Path("/dev/zero"))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, talk = typed(capsys, "verify", "--table", TABLES / "paper_000.csv", "--format", "json")
    assert (status, talk) == (1, "")
    rows: list[dict[str, Any]] = json.loads(said)
    assert next(row for row in rows if row["check"] == "matrix" and row["holds"])["numbers"] == {
        "matrices": 1, "matrix": [10, 1, 1, 12], "positives": [11], "exchanged": False,
    }  # fmt: skip
    status, said, _ = typed(capsys, "verify", "--table", TABLES / "paper_000.csv")
    assert said.splitlines()[-1] == "12 of 19 checks do not hold"
    good = written(tmp_path / "t.csv", "row,n,accuracy", "\x1b[2Ja,24,91.67")
    status, said, _ = typed(capsys, "verify", "--table", good)
    assert (status, "\x1b" in said) == (0, False)
    status, _, talk = typed(capsys, "verify", "--table", tmp_path / "no.csv")
    assert (status, "error [no-such-table]" in talk) == (2, True)
    status, _, talk = typed(capsys, "verify", tmp_path, "--table", good)
    assert (status, "error [bad-argument]" in talk) == (2, True)
