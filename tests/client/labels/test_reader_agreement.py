"""Consensus by rule; kappa as worked out by hand and as scikit-learn has it; intervals over patients."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from client.labels.reader_agreement import (
    Rule,
    agreement,
    cohen_kappa,
    fleiss_kappa,
    settle,
)
from common.errors import DataError

NAN = math.nan
RULES = get_args(Rule)


def settled(rule: Rule, *readers: list[float], panel: tuple[list[float], ...] = ()) -> list[str]:
    """One letter an item: 1, 0, d(isputed), i(ncomplete), - (nobody)."""
    answers = np.array([*readers, *panel], float)[:, :, None]
    is_panel = np.array([False] * len(readers) + [True] * len(panel))
    found = settle(answers, np.full(answers.shape, NAN), is_panel, rule)
    letters = []
    for present, disputed, incomplete in zip(
        found.present[:, 0], found.disputed[:, 0], found.incomplete[:, 0], strict=True
    ):
        assert (not math.isnan(present)) + disputed + incomplete <= 1
        letters.append(
            "d" if disputed else "i" if incomplete else "-" if math.isnan(present) else str(int(present))
        )
    return letters


@pytest.mark.parametrize("rule", RULES)
def test_a_single_readers_word_stands(rule: Rule) -> None:
    assert settled(rule, [1, 0, NAN]) == ["1", "0", "-"]


@pytest.mark.parametrize("rule", RULES)
def test_two_readers_must_agree(rule: Rule) -> None:
    assert settled(rule, [1, 0, 1, 0, 1, NAN], [1, 0, 0, 1, NAN, NAN]) == ["1", "0", "d", "d", "i", "-"]


def test_three_readers_by_rule() -> None:
    three = [1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 0, NAN, NAN, NAN]
    assert settled("agree", *three) == ["1", "d", "d", "0", "d"]
    assert settled("majority", *three) == ["1", "1", "d", "0", "d"]
    assert settled("unanimous", *three) == ["1", "d", "d", "i", "d"]


def test_the_panel_decides_what_the_first_level_left_open() -> None:
    two = [1, 1, 1, 1, 1, NAN], [0, 0, NAN, 1, 0, NAN]
    panel = [1, NAN, 0, 0, 1, 1], [1, NAN, NAN, NAN, 0, 1]
    assert settled("agree", *two, panel=panel) == ["1", "d", "0", "1", "d", "1"]
    assert settled("panel", *two, panel=panel) == ["1", "d", "0", "0", "d", "1"], (
        "the panel's word stands where it gave one"
    )


def test_who_never_reads_an_artifact_is_not_missed() -> None:
    answers = np.array([[[1, NAN]], [[NAN, 0]]])
    for rule in RULES:
        assert settle(
            answers, np.full(answers.shape, NAN), np.array([False, False]), rule
        ).present.tolist() == [[1, 0]]


def test_severity_is_the_median_of_those_who_said_present() -> None:
    answers = np.array([1, 1, 0, 1])[:, None, None].astype(float)
    severities = np.array([0.2, 0.4, NAN, 0.9])[:, None, None]
    first = np.zeros(4, bool)
    assert settle(answers, severities, first, "majority").severity.item() == pytest.approx(0.4)
    assert math.isnan(settle(answers, severities, first, "agree").severity.item()), "in dispute"
    panel = np.array([False, False, False, True])
    assert settle(answers, severities, panel, "agree").severity.item() == pytest.approx(0.9)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(RULES),
)
def test_the_order_of_readers_does_not_matter(readers: list[list[float]], rule: Rule) -> None:
    assert settled(rule, *readers) == settled(rule, *reversed(readers))


def test_cohens_kappa_by_hand() -> None:
    """20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed .70, by chance .50, kappa .40."""
    first = np.array([1] * 25 + [0] * 25)
    second = np.array([1] * 20 + [0] * 5 + [1] * 10 + [0] * 15)
    found = cohen_kappa(first.astype(float), second.astype(float), np.arange(50), seed=1)
    assert found.value == pytest.approx(0.4)
    assert found.observed == pytest.approx(0.7)
    assert (found.n, found.patients) == (50, 50)
    # Fleiss, Cohen and Everitt: A = .4 (1 - 1.1·.6)² + .3 (1 - .9·.6)², B = .36 (.1·(.6 + .5)² + .2·(.4 +
    # .5)²), C = (.4 - .5·.6)²
    by_hand = 0.4 * 0.34**2 + 0.3 * 0.46**2 + 0.36 * (0.1 * 1.1**2 + 0.2 * 0.9**2) - 0.01
    assert found.standard_error == pytest.approx(math.sqrt(by_hand / (50 * 0.25)))
    assert found.low < 0.4 < found.high
    assert (found.high - found.low) / 3.92 == pytest.approx(found.standard_error, rel=0.1), (
        "one item a patient: both say the same"
    )


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=40))
def test_cohens_kappa_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs).T
    found = cohen_kappa(first.astype(float), second.astype(float), np.arange(len(pairs)), seed=0, draws=1)
    if len(set(first) | set(second)) == 1:
        assert math.isnan(found.value), "everybody always says the same: no chance to disagree, no kappa"
        assert found.observed == 1
    else:
        assert found.value == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)


def test_nothing_read_together_is_nan_with_n_0() -> None:
    found = cohen_kappa(np.array([1, NAN]), np.array([NAN, 0]), np.array([0, 1]), seed=0)
    assert found.n == 0
    assert found.public() == {
        "kappa": None,
        "low": None,
        "high": None,
        "standard_error": None,
        "observed": None,
        "n": 0,
        "patients": 0,
    }
    assert fleiss_kappa(np.zeros((0, 2)), np.zeros(0), seed=0).n == 0


def test_fleiss_kappa_of_a_worked_example() -> None:
    """Ten subjects, fourteen raters, five categories: observed .378, by chance .213, kappa .210."""
    counts = np.array(
        [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
    )
    found = fleiss_kappa(counts, np.arange(10), seed=3)
    assert found.value == pytest.approx(0.210, abs=5e-4)
    assert found.observed == pytest.approx(0.378, abs=5e-4)
    assert found.low < found.value < found.high
    assert math.isnan(found.standard_error)
    with pytest.raises(DataError):
        fleiss_kappa(np.array([[1, 2], [2, 2]]), np.arange(2), seed=0)


def test_fleiss_kappa_by_hand_for_three_readers() -> None:
    """Present counts 3, 3, 0, 1 of 3: agreeing pairs 1, 1, 1, 1/3; present 7/12, absent 5/12."""
    found = fleiss_kappa(np.array([[0, 3], [0, 3], [3, 0], [2, 1]]), np.arange(4), seed=0)
    chance = (7 / 12) ** 2 + (5 / 12) ** 2
    assert found.value == pytest.approx((10 / 12 - chance) / (1 - chance))


def test_alike_slices_of_a_patient_do_not_narrow_the_interval() -> None:
    generator = np.random.default_rng(5)
    first = generator.integers(0, 2, 30).astype(float)
    second = np.where(generator.random(30) < 0.8, first, 1 - first)
    patients = np.arange(30)
    once = cohen_kappa(first, second, patients, seed=2)
    tenfold = cohen_kappa(np.tile(first, 10), np.tile(second, 10), np.tile(patients, 10), seed=2)
    assert (once.low, once.high) == pytest.approx((tenfold.low, tenfold.high))
    assert tenfold.standard_error < once.standard_error / 3, (
        "the large-sample error believes in 300 independent items"
    )
    assert math.isnan(cohen_kappa(first, second, np.zeros(30), seed=2).low), (
        "one patient says nothing about others"
    )


def test_the_seed_decides_the_interval() -> None:
    first, second, patients = np.array([1, 0, 1, 0, 1.0]), np.array([1, 0, 0, 0, 1.0]), np.arange(5)
    assert cohen_kappa(first, second, patients, seed=4) == cohen_kappa(first, second, patients, seed=4)


def test_one_row_for_a_series_is_one_item() -> None:
    answers = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], float)
    sources = np.array([[0, 0, 0, 1, 2], [3, 3, 3, 4, 5]])
    pairs, fleiss = agreement(answers, sources, np.arange(5), seed=0)
    assert pairs[0, 1].n == 3
    assert pairs[0, 1].value == pytest.approx(cohen_kappa_score([1, 0, 0], [1, 1, 0]))
    assert fleiss is None


def test_three_readers_have_three_pairs_and_a_fleiss_kappa_of_what_all_read() -> None:
    answers = np.array([[1, 0, 1, NAN], [1, 0, 0, 1], [1, 1, 0, 1], [NAN] * 4])
    sources = np.arange(16).reshape(4, 4)
    pairs, fleiss = agreement(answers, sources, np.arange(4), seed=0)
    assert {pair: kappa.n for pair, kappa in pairs.items()} == {(0, 1): 3, (0, 2): 3, (1, 2): 4}
    assert fleiss is not None
    assert fleiss.n == 3
    assert fleiss.value == pytest.approx(
        fleiss_kappa(np.array([[0, 3], [2, 1], [2, 1]]), np.arange(3), seed=0).value
    )
