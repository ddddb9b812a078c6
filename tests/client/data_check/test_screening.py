"""Near-duplicates, outliers and steps over time are found where they are, and not where they are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ranksums

from client.data_check import screening
from client.data_check.screening import near_duplicates, outliers, protocols, rank_sum_z, scanners_of, trends
from client.dicom.index import SliceRecord
from tests.helpers.slice_record import RECORD


def brute_force(
    hashes: np.ndarray, values: np.ndarray, kinds: np.ndarray, series: np.ndarray, patients: np.ndarray
) -> np.ndarray:
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= 3
    spread = np.maximum(values[:, None, 1], values[None, :, 1])
    alike = np.abs(values[:, None, 0] - values[None, :, 0]) <= 0.02 * spread
    alike &= np.abs(values[:, None, 1] - values[None, :, 1]) <= 0.02 * spread
    alike &= np.abs(values[:, None, 2] - values[None, :, 2]) <= 0.02 * np.maximum(
        values[:, None, 2], values[None, :, 2]
    )
    others = (
        (patients[:, None] != patients[None, :])
        & (series[:, None] != series[None, :])
        & (kinds[:, None] == kinds[None, :])
    )
    return (bits & alike & others).any(1)


@pytest.mark.parametrize("seed", range(6))
def test_the_bands_miss_no_pair(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = 400
    hashes = draw.integers(0, 2**64, 60, dtype=np.uint64)[draw.integers(0, 60, n)]
    for _ in range(4):  # up to four bits differ
        hashes ^= np.where(
            draw.random(n) < 0.5, np.uint64(1) << draw.integers(0, 64, n).astype(np.uint64), np.uint64(0)
        )
    values = np.array([[100.0, 50.0, 1.0], [101.5, 50.5, 1.0], [100.0, 60.0, 1.0], [100.0, 50.0, 1.1]])[
        draw.integers(0, 4, n)
    ]
    kinds, patients = draw.integers(0, 2, n), draw.integers(0, 40, n)
    series = patients * 2 + draw.integers(0, 2, n)
    found = near_duplicates(hashes, values, kinds, series, patients, patients % 3)
    expected = brute_force(hashes, values, kinds, series, patients)
    assert 0 < expected.sum() < n
    np.testing.assert_array_equal(found.across_patients, expected)
    assert found.is_complete
    assert (found.across_split <= found.across_patients).all()
    assert all(patients[a] != patients[b] and found.across_patients[[a, b]].all() for a, b in found.pairs)


def pair(**changes: list[int]) -> screening.Duplicates:
    """Two slices with the same hash and measures, of two patients in two parts."""
    given = {"kinds": [0, 0], "series": [0, 1], "patients": [0, 1], "parts": [0, 2]} | changes
    return near_duplicates(
        np.full(2, 0xF0F0, np.uint64),
        np.full((2, 3), 7.0),
        **{name: np.array(values) for name, values in given.items()},
    )


def test_what_is_a_near_duplicate() -> None:
    assert pair().across_split.all()
    assert pair().pairs == ((0, 1),)
    assert not pair(parts=[0, 0]).across_split.any()
    assert pair(parts=[-1, -1]).across_patients.all()
    assert not pair(parts=[-1, -1]).across_split.any()
    for same in ({"patients": [0, 0]}, {"series": [0, 0]}, {"kinds": [0, 1]}):
        assert not pair(**same).across_patients.any()


def test_blank_slices_and_no_slices_are_no_duplicates() -> None:
    zeros = np.zeros(2, np.int64)
    assert not near_duplicates(
        zeros.astype(np.uint64), np.zeros((2, 3)), zeros, np.arange(2), np.arange(2), zeros
    ).across_patients.any()
    none = np.zeros(0, np.int64)
    assert near_duplicates(none.astype(np.uint64), np.zeros((0, 3)), none, none, none, none).pairs == ()


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "MAX_CANDIDATES", 0)
    assert not pair().is_complete


def test_outliers_by_hand() -> None:
    values = np.zeros((21, 3))
    values[:, 0] = np.arange(21)  # median 10, MAD 5
    values[20, 0] = 110
    found = outliers(values, np.zeros(21, np.int64))
    assert found.z[20, 0] == pytest.approx(0.6745 * 100 / 5)
    assert found.z[0, 0] == pytest.approx(0.6745 * -10 / 5)
    assert found.slices.tolist() == [20]
    assert not found.z[:, 1:].any(), "a measure that never varies has no outlier"


def test_an_outlier_is_one_of_its_own_protocol() -> None:
    values = np.zeros((60, 3))
    values[30:] += 1000
    values[:, 0] += np.tile(np.arange(30), 2)
    assert not outliers(values, np.repeat([0, 1], 30)).slices.size
    values[5] += 1000  # usual in the other protocol
    assert outliers(values, np.repeat([0, 1], 30)).slices.tolist() == [5]
    assert not outliers(values[:10], np.zeros(10, np.int64)).slices.size, (
        "of ten slices nothing is unlike the rest"
    )


def test_most_slices_alike_and_one_not() -> None:
    values = np.ones((30, 3))
    values[3, 2] = 2
    assert outliers(values, np.zeros(30, np.int64)).slices.tolist() == [3]


def test_a_protocol_is_modality_and_sequence_or_kernel() -> None:
    records = [
        RECORD,
        replace(RECORD, sequence="GR"),
        replace(RECORD, kernel="B30f"),
        replace(RECORD, modality="CT"),
    ]
    assert protocols([*records, replace(RECORD, modality="CT", kernel="B30f")]).tolist() == [0, 1, 0, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_rank_sum_is_the_known_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.normal(0.5, 1, 12), draw.normal(0, 1, 20)
    assert rank_sum_z(first, second) == pytest.approx(ranksums(first, second).statistic)


def test_rank_sum_with_ties_by_hand() -> None:
    """Ranks 1.5, 1.5, 3.5, 3.5; variance 2·2/12 · (5 - 12/12) = 4/3."""
    assert rank_sum_z(np.array([1.0, 1.0]), np.array([0.0, 0.0])) == pytest.approx(2 / np.sqrt(4 / 3))
    assert rank_sum_z(np.ones(3), np.ones(3)) == 0.0


def history(
    step: float, *, months: int = 9, studies: int = 4, scanner: str = "x"
) -> tuple[list[SliceRecord], np.ndarray]:
    """Studies of two slices each; the detail of the last third of the months is higher by `step` robust
    standard deviations.
    """
    draw = np.random.default_rng(1)
    records, rows = [], []
    for month in range(months):
        for study in range(studies):
            for _ in range(2):
                date = f"2024{month + 1:02}{study + 1:02}"
                records.append(
                    replace(RECORD, study=f"{scanner}{month}-{study}", study_date=date, scanner=scanner)
                )
                rows.append(
                    [
                        draw.normal(),
                        draw.normal(),
                        draw.normal(0, 0.3) + step * (month >= months - months // 3),
                    ]
                )
    return records, np.array(rows)


def test_a_step_is_seen_where_it_is() -> None:
    old, still = history(0.0, scanner="old")
    new, stepped = history(3.0, scanner="new")
    records = [*old, *new]
    scanners, counts = scanners_of(records)
    assert counts == [72, 72]
    found = trends(records, np.concatenate([still, stepped]), scanners)
    assert [(trend.scanner, trend.measure) for trend in found if trend.is_alarming] == [(1, "detail")]
    (step,) = [trend for trend in found if trend.is_alarming]
    assert step.step == pytest.approx(3.0, abs=0.5)
    assert (step.months[0], step.months[-1], step.studies) == ("2024-01", "2024-09", 36)
    assert len(step.medians) == 9


@pytest.mark.parametrize(("months", "studies", "step"), [(4, 20, 5.0), (9, 2, 5.0), (9, 4, 0.5)])
def test_few_months_few_studies_and_small_steps_are_no_alarm(months: int, studies: int, step: float) -> None:
    records, z = history(step, months=months, studies=studies)
    assert not any(trend.is_alarming for trend in trends(records, z, np.zeros(len(records), np.int64)))


def test_slices_without_a_date_are_left_out() -> None:
    records = [replace(RECORD, study_date=date) for date in ("", "2024", "20241301", "abcdefgh", "20240229")]
    (month,) = {trend.months for trend in trends(records, np.zeros((5, 3)), np.zeros(5, np.int64))}
    assert month == ("2024-02",)


def test_without_a_serial_number_maker_and_model_tell_scanners_apart() -> None:
    records = [replace(RECORD, scanner="", model=model) for model in ("Verio", "Trio", "Verio")]
    numbers, counts = scanners_of(records)
    assert (numbers.tolist(), counts) == ([0, 1, 0], [2, 1])
    assert scanners_of([])[1] == []
