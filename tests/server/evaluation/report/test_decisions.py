"""Operating points, calibration and the four answers: the page says what the counts and the gap say."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from common.any_artifact import ANY
from common.artifacts import INDEX
from common.counts import BINS, DISCLOSED_BINS, Counts
from common.i18n import speaker
from common.plan import PublicSet
from server.evaluation.participation import Presence
from server.evaluation.report import decisions, figures, findings
from server.evaluation.report.numerals import signed
from server.evaluation.report.page import render
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.evaluation_file import artifacts_of
from tests.helpers.report_page import MANIFEST, PLAN, TRAINING, evaluation_of, section, tables, text_of

SAY = speaker("en", LANGUAGES)
PRIVATE_ARMS = ("public", "local", "federated", "federated_clipped", "federated_dp")


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return evaluation_of()


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    return render(whole, MANIFEST, PLAN)


def answers(values: dict[str, Any], participation: Any = None, trainable: str = "head") -> dict[str, str]:
    found = findings.answers(Reading(values, SAY), participation or {}, trainable=trainable)
    return {answer.question: " ".join(answer.lines) for answer in found}


def test_the_first_screen_has_four_questions_before_anything_else(page: str) -> None:
    first = page.split("<main>")[1].split("<table", maxsplit=1)[0]
    assert re.findall(r"<h3>(.*?)</h3>", first) == [
        "How good is it at my hospital?",
        "How good is it at a hospital it never saw?",
        "What did privacy cost?",
        "Who was missing?",
    ]


def test_the_worst_cell_at_the_operating_point_is_named(whole: dict[str, Any]) -> None:
    reading = Reading(whole, SAY)
    rows = [line.found for line in decisions.lines_of(reading, "federated") if line.site in TRAINING]
    least = min(row.sensitivity.value for row in rows if row.sensitivity and row.specificity)
    said = answers(whole)["How good is it at my hospital?"]
    assert re.search(rf"the lowest {least:.3f} \([a-z ]+ / (alder|birch|cedar) †\); median specificity", said)


def test_unseen_less_home_is_the_gap_of_evaluation_json(whole: dict[str, Any]) -> None:
    gap = whole["generalization_gap"]["federated"]
    said = answers(whole)["How good is it at a hospital it never saw?"]
    difference = f"{signed(gap['value'])} [{signed(gap['low'])}, {signed(gap['high'])}]"
    assert f"federated, unseen − home: {difference} on beam hardening, motion and susceptibility" in said
    assert "k = 1 held-out hospitals. Fewer than 3 give no prediction interval" in said
    three = evaluation_of(held_out=("dune", "elm", "fir"))
    gap = three["generalization_gap"]["federated"]
    said = answers(three)["How good is it at a hospital it never saw?"]
    assert (
        f"from {gap['next_low']:.3f} to {gap['next_high']:.3f} (95 % prediction interval); of so few" in said
    )
    assert "observed score, on about as many patients as these had" in said


@pytest.mark.parametrize(("held_out", "grey"), [(3, 1), (4, 1), (5, 0)])
def test_what_three_or_four_hospitals_say_of_the_next_is_grey(held_out: int, grey: int) -> None:
    values = evaluation_of(
        ("public", "federated"), held_out=tuple(f"seen-never-{k}" for k in range(held_out))
    )
    found = re.findall(r'<p class="faint">(.*?)</p>', render(values, MANIFEST, PLAN))
    assert len(found) == grey
    assert all("says little" in line for line in found)


def test_the_price_of_privacy_is_parted_or_said_to_be_whole() -> None:
    values = evaluation_of(PRIVATE_ARMS)
    found = {(row["arm"], row["other"]): row for row in values["contrasts"] if row["where"] == "unseen"}
    said = answers(values)["What did privacy cost?"]
    total = found["federated_dp", "federated"]
    noise = found["federated_dp", "federated_clipped"]
    assert f"− federated at dune †, which no model saw: {signed(total['value'])}" in said
    assert f"noise: {signed(noise['value'])}" in said
    assert "layers that are frozen" in said
    assert "frozen, clipping" not in answers(values, trainable="all")["What did privacy cost?"]
    assert "that needs the arm federated_clipped" in answers(evaluation_of())["What did privacy cost?"]
    none = answers(evaluation_of(("public", "federated")))["What did privacy cost?"]
    assert none == "Not measured: no arm trained in private."


def test_who_was_missing_is_read_from_the_rounds(whole: dict[str, Any]) -> None:
    def rows(**counted: int) -> dict[str, Presence]:
        return {
            site: Presence(
                rounds=6,
                invited=6,
                counted=counted.get(site, 6),
                codes={"no-answer"} if site in counted else set(),
            )
            for site in TRAINING
        }

    nobody = answers(whole, {"federated": rows(), "local": rows()})["Who was missing?"]
    assert nobody.startswith("Nobody: all 3 training sites are in every round, and all 4 sites sent scores.")
    birch = answers(whole, {"federated": rows(birch=4), "local": rows(birch=4)})["Who was missing?"]
    assert birch.startswith("birch † is in 4 of 6 rounds of federated and local (no-answer).")
    refused = answers(evaluation_of(refused=("birch",)), {"federated_dp": rows(birch=0)})["Who was missing?"]
    assert refused.startswith("birch refused [epsilon-cap]")
    assert "0 of 6" not in refused
    shown = text_of(
        section(render(whole, MANIFEST, PLAN, participation={"federated": rows(birch=4)}), "participation")
    )
    assert "4 of 6 no-answer" in shown


def test_a_row_at_the_operating_point_is_counted_from_the_histograms(
    whole: dict[str, Any], page: str
) -> None:
    reading = Reading(whole, SAY)
    point = reading.point("federated", "motion", BINS)
    assert point is not None
    counts = Counts.from_json(whole["counts"]["dune"]["federated"])
    pos, neg = (rows[INDEX["motion"]] for rows in (counts.positives, counts.negatives))
    tp, fp = pos[point.place :].sum(), neg[point.place :].sum()
    table = next(table for table in tables(section(page, "operating")) if "Balanced accuracy" in table[0])
    rows = [row for row in table if row[0] == "dune †"]
    row = dict(zip(table[0], rows[2], strict=True))  # metal, beam hardening, motion
    assert row["n (with)"] == f"{pos.sum() + neg.sum()} ({pos.sum()})"
    assert row["Sensitivity"].split()[0] == f"{tp / pos.sum():.3f}"
    assert row["Specificity"].split()[0] == f"{1 - fp / neg.sum():.3f}"
    assert row["Precision (PPV)"].split()[0] == f"{tp / (tp + fp):.3f}"
    assert row["Accuracy"] == f"{(tp + neg.sum() - fp) / (pos.sum() + neg.sum()):.3f}"
    assert row["Alarms per 100"] == f"{100 * (tp + fp) / (pos.sum() + neg.sum()):.1f}"
    assert row["AUROC"] == f"{whole['matrix']['federated']['dune']['motion']['auroc']:.3f}"


def test_any_artifact_is_a_group_of_its_own_beside_the_artifacts(whole: dict[str, Any], page: str) -> None:
    reading = Reading(whole, SAY)
    counts = reading.any_counts("dune", "federated")
    row = whole["any_artifact"]["matrix"]["federated"]["dune"]
    assert row["auroc"] == pytest.approx(float(counts.auroc()[0]))
    assert row["low"] < row["auroc"] < row["high"]
    point = reading.point("federated", ANY, BINS)
    assert point is not None
    tp, n_pos = int(counts.positives[0, point.place :].sum()), int(counts.n_pos[0])
    (line,) = [one for one in decisions.any_lines(reading, "federated") if one.site == "dune"]
    assert (line.found.tp, line.found.positives) == (tp, n_pos)
    shown = text_of(section(page, "operating"))
    assert "any artifact" in shown
    assert "Any artifact (metal, beam hardening, motion, susceptibility or chemical shift): patients" in shown
    table = next(table for table in tables(section(page, "operating")) if "Balanced accuracy" in table[0])
    last = [dict(zip(table[0], row, strict=True)) for row in table if row[0] == "dune †"][-1]
    assert last["AUROC"] == f"{row['auroc']:.3f}"
    assert last["Sensitivity"].split()[0] == f"{tp / n_pos:.3f}"


def test_no_mean_over_artifacts_and_no_artifact_of_the_run_is_any(whole: dict[str, Any]) -> None:
    assert ANY not in artifacts_of(whole)  # type: ignore[arg-type]
    without = {key: value for key, value in whole.items() if key not in ("any_artifact", "any_public")}
    assert ANY not in json.dumps(without)


def test_who_says_nothing_of_any_artifact_is_named_with_the_reason(whole: dict[str, Any]) -> None:
    changed = copy.deepcopy(whole)
    del changed["any_artifact"]["counts"]["alder"]
    for rows in changed["any_artifact"]["matrix"].values():
        del rows["alder"]
    for counts in changed["any_artifact"]["counts"]["birch"].values():
        counts["positives"], counts["negatives"] = [], []
    changed["scoring"]["cedar"] = {"mode": "dp", "epsilon": 1.0, "deviation": 3.0}
    said = findings._without_any(Reading(changed, SAY))
    assert [line.partition(":")[0] for line in said] == [
        "Any artifact at cedar",
        "Any artifact at alder",
        "Any artifact at birch",
    ]
    old = {key: value for key, value in whole.items() if key not in ("any_artifact", "any_public")}
    assert findings._without_any(Reading(old, SAY)) == [SAY("not.any")]
    assert "any artifact" not in text_of(section(render(old, MANIFEST, PLAN), "operating"))
    alone = copy.deepcopy(old) | {"any_artifact": {"artifacts": [], "counts": {}, "matrix": {}}}
    assert findings._without_any(Reading(alone, SAY)) == []


def test_subgroups_are_a_section_with_what_cannot_be_estimated_and_holms_count(
    whole: dict[str, Any], page: str
) -> None:
    shown = text_of(section(page, "subgroups"))
    rows = whole["subgroups"]["rows"]["federated"]
    wanted = ("home", "motion", "siemens")
    (row,) = [one for one in rows if (one["place"], one["artifact"], one["level"]) == wanted]
    assert row["sites"] == list(TRAINING)
    assert f"{row['auroc']:.3f}" in shown
    assert f"{row['n_pos']} / {row['n_neg']}" in shown
    assert "vendor: Siemens" in shown
    assert "not estimable" in shown, "of two women"
    tested = whole["subgroups"]["differences"]["federated"]
    assert f"{len(tested)} tested" in shown
    changed = copy.deepcopy(whole)
    changed["subgroups"]["differences"]["federated"][0]["p_holm"] = 0.001
    told = text_of(section(render(changed, MANIFEST, PLAN), "subgroups"))
    assert "vendor: Siemens less vendor: GE is" in told
    old = {key: value for key, value in whole.items() if key != "subgroups"}
    assert 'id="subgroups"' not in render(old, MANIFEST, PLAN)


def test_the_origin_of_the_threshold_is_printed(page: str, whole: dict[str, Any]) -> None:
    assert "Origin: 60 public phantoms, drawn from seed 20261." in text_of(section(page, "operating"))
    plan = PLAN.model_copy(update={"public_set": PublicSet(file="/x/public.npz", sha256="ab" * 32)})
    shown = text_of(section(render(whole, MANIFEST, plan), "operating"))
    assert "the public set of the plan, SHA-256 abababababababab…" in shown
    assert "/x/" not in shown


def test_a_site_without_patients_of_a_class_is_grey_and_has_no_rate(page: str) -> None:
    """cedar has nobody with metal."""
    table = section(page, "operating").split("<tbody>")[2]
    (row,) = re.findall(r'<tr class="grey-row">.*?</tr>', table, re.S)
    assert "one class only" in row
    cells = [text_of(cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)]
    assert [cells[place] for place in (4, 6, 7, 9)] == ["–"] * 4  # sensitivity, precision, F1, balanced


def test_coarse_bins_use_their_own_edges_and_crowded_ones_are_grey(whole: dict[str, Any]) -> None:
    values = copy.deepcopy(whole)
    values["scoring"]["dune"] = {"mode": "disclosed"}
    width = BINS // DISCLOSED_BINS
    for counts in values["counts"]["dune"].values():
        for rows in counts.values():
            for kind in ("positives", "negatives"):
                rows[kind] = [[(place // width) * width + width // 2, n] for place, n in rows[kind]]
                merged: dict[int, int] = {}
                for place, n in rows[kind]:
                    merged[place] = merged.get(place, 0) + n
                rows[kind] = [[place, n] for place, n in sorted(merged.items())]
    reading = Reading(values, SAY)
    found = reading.performance("federated", "dune", "motion")
    assert found.point is not None
    assert found.point.place % width == 0
    assert found.is_coarse
    bins = [row["bins"] for row in decisions.point_rows(reading)]
    assert {"480", "20"} == set(bins)
    assert not reading.performance("federated", "alder", "motion").is_coarse


def test_an_earlier_file_says_what_it_lacks(whole: dict[str, Any]) -> None:
    values = evaluation_of(public=False)
    del values["generalization_gap"], values["any_artifact"]
    shown = render(values, MANIFEST, PLAN)
    assert "no threshold was chosen" in text_of(section(shown, "operating"))
    assert 'id="calibration"' not in shown
    assert "unseen − home" not in shown
    assert "does not hold the scores of public patients" in text_of(section(shown, "not"))
    assert "“Any artifact” is not reported" in text_of(section(shown, "not"))
    assert "“Any artifact” is not reported" not in text_of(section(render(whole, MANIFEST, PLAN), "not"))


def test_labels_that_no_site_has_are_not_shown(whole: dict[str, Any]) -> None:
    values = copy.deepcopy(whole)
    for at_sites in values["matrix"].values():
        for rows in at_sites.values():
            rows["motion"].update(auroc=None, low=None, high=None, n_pos=0, n_neg=0)
    for models in values["counts"].values():
        for counts in models.values():
            counts["motion"] = {"positives": [], "negatives": []}
    shown = render(values, MANIFEST, PLAN)
    for part in ("sites", "operating", "matrix", "roc", "calibration"):
        assert "motion (MR)" not in text_of(section(shown, part)), part
        assert "beam hardening (CT)" in text_of(section(shown, part)), part


def test_a_learning_curve_is_not_zoomed_into_noise() -> None:
    noise = [(step, 0.9 + 0.001 * (step % 2)) for step in range(7)]
    line = figures.Curve(model="federated", label="federated", points=noise)
    drawn = figures.curves([("AUROC", (0.5, 1.0), [line])], "alt", "round")
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawn)]
    assert len(heights) == 7
    assert max(heights) - min(heights) < 2  # of 250
    assert ">0.5</text>" in drawn


def test_many_models_have_one_name_an_arm_beside_the_curve() -> None:
    """With 25 models their names filled more than the chart, and lay above it."""
    points = [(0, 0.7), (1, 0.8)]
    models = [f"local/hospital-{number}" for number in range(24)]
    lines = [
        figures.Curve(model=model, label=f"{model} (ε 2)", points=points) for model in [*models, "federated"]
    ]
    drawn = figures.curves([("AUROC", (0.5, 1.0), lines)], "alt", "round")
    assert re.findall(r">(local[^<]*)</text>", drawn) == ["local (ε 2)"]
    assert min(float(y) for y in re.findall(r'<text x="[\d.]+" y="(-?[\d.]+)"', drawn)) > 10
    few = figures.curves([("AUROC", (0.5, 1.0), lines[:3])], "alt", "round")
    assert len(re.findall(r">(local/[^<]*)</text>", few)) == 3


def test_reading_of_a_whole_page_is_written_once(whole: dict[str, Any]) -> None:
    """The numbers of a page do not depend on who asked first."""
    assert json.dumps(decisions.operating_tables(Reading(whole, SAY))) == json.dumps(
        decisions.operating_tables(Reading(whole, SAY))
    )
