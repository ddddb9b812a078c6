"""AUROCs by subgroup: what adds up, what is independent, and what two severities share."""

from __future__ import annotations

import numpy as np
import pytest

from client.agent.evaluation import subgroup_sums
from common.counts import auroc, quantile_edges
from common.subgroups import LEVELS, PLACE, SUBGROUPS
from server.evaluation.subgroups import subgroup_differences, subgroup_rows

SIEMENS, GE = PLACE["vendor", "siemens"], PLACE["vendor", "ge"]
MILD, SEVERE = PLACE["severity", "mild"], PLACE["severity", "severe"]
EDGES = quantile_edges(np.random.default_rng(0).normal(0.4, 1.3, (20_000, 1)))


def drawn(seed: int, patients: int, better: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and subgroups of one artifact; scores of Siemens are better by `better`."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((patients, 1)) < 0.4).astype(float)
    member = np.zeros((patients, 1, len(LEVELS)), bool)
    is_siemens, is_mild = rng.random((2, patients)) < 0.5
    member[:, 0, SIEMENS], member[:, 0, GE] = is_siemens, ~is_siemens
    absent = truth[:, 0] == 0
    member[:, 0, MILD], member[:, 0, SEVERE] = absent | is_mild, absent | ~is_mild
    scores = rng.normal(truth * (1 + better * is_siemens[:, None] + 0.8 * ~is_mild[:, None]))
    return scores, truth, member


def sums(seed: int, patients: int, better: float = 0.0) -> dict[str, np.ndarray]:
    scores, truth, member = drawn(seed, patients, better)
    return {"federated": subgroup_sums([scores], truth, member, EDGES[None])[0]}


def cell(rows: list[dict], place: str, level: tuple[str, str]) -> dict:  # type: ignore[type-arg]
    (found,) = [row for row in rows if row["place"] == place and (row["subgroup"], row["level"]) == level]
    return found


def test_a_level_has_the_auroc_of_its_patients() -> None:
    scores, truth, member = drawn(1, 800)
    rows = subgroup_rows({"a": [("a", "federated")]}, {"a": sums(1, 800)}, ["metal"])
    assert {row["subgroup"] for row in rows} == {"vendor", "severity"}
    for level in (SIEMENS, GE, MILD, SEVERE):
        row, own = cell(rows, "a", LEVELS[level]), member[:, 0, level]
        assert (row["n_pos"], row["n_neg"]) == (truth[own].sum(), (1 - truth[own]).sum())
        assert row["auroc"] == pytest.approx(float(auroc(scores[own], truth[own])[0]), abs=0.01)
        assert row["low"] < row["auroc"] < row["high"]


def test_sites_add_up_where_they_are_named_together() -> None:
    kept = {"a": sums(1, 300), "b": sums(2, 500)}
    cells = [("a", "federated"), ("b", "federated")]
    rows = subgroup_rows({"home": cells, "a": cells[:1], "b": cells[1:]}, kept, ["metal"])
    for level in (LEVELS[SIEMENS], LEVELS[SEVERE]):
        home, a, b = (cell(rows, place, level) for place in ("home", "a", "b"))
        assert home["sites"] == ["a", "b"]
        assert home["n_pos"] == a["n_pos"] + b["n_pos"]
        assert min(a["auroc"], b["auroc"]) - 0.05 < home["auroc"] < max(a["auroc"], b["auroc"]) + 0.05


def test_few_patients_are_not_estimable_and_are_in_no_difference() -> None:
    kept = {"a": sums(1, 300)}
    one = kept["a"]["federated"][0, 0, GE]
    one[:] = 0
    one[5] = 1
    rows = subgroup_rows({"a": [("a", "federated")]}, kept, ["metal"])
    few = cell(rows, "a", LEVELS[GE])
    assert np.isnan(few["auroc"])
    assert few["reason"] == "one_patient"
    one[:] = 0
    assert (
        cell(subgroup_rows({"a": [("a", "federated")]}, kept, ["metal"]), "a", LEVELS[GE])["reason"]
        == "one_class"
    )
    found = subgroup_differences({"a": [("a", "federated")]}, kept, ["metal"])
    assert {row["subgroup"] for row in found} == {"severity"}


def test_a_real_difference_is_found_and_none_is_not() -> None:
    place = {"home": [("a", "federated")]}
    (real,) = [
        row
        for row in subgroup_differences(place, {"a": sums(3, 3000, better=1.0)}, ["metal"])
        if row["subgroup"] == "vendor"
    ]
    assert (real["level"], real["other"]) == ("siemens", "ge")
    assert real["value"] > 0.08
    assert real["p"] <= real["p_holm"] < 1e-4
    none = [
        row["p"]
        for seed in range(200)
        for row in subgroup_differences(place, {"a": sums(seed, 300)}, ["metal"])
        if row["subgroup"] == "vendor"
    ]
    assert 0.01 <= float(np.mean(np.array(none) < 0.05)) <= 0.09


def test_two_severities_share_the_patients_without() -> None:
    """The stated standard error is that of draws; as if independent, it would be too long."""
    place = {"home": [("a", "federated")]}
    found = [
        row
        for seed in range(300)
        for row in subgroup_differences(place, {"a": sums(seed, 150)}, ["metal"])
        if row["subgroup"] == "severity"
    ]
    values = np.array([row["value"] for row in found])
    stated = np.mean([(row["high"] - row["low"]) / 2 / 1.96 for row in found])
    assert 0.85 < stated / values.std() < 1.15
    assert SUBGROUPS["severity"] == ("mild", "moderate", "severe")
