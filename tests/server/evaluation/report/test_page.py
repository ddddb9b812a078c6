"""The page says what evaluation.json says, loudly where it must, and nothing else gets in or out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import DEFAULT_LABELS
from common.errors import ConfigError
from common.i18n import speaker
from common.privacy import epsilon_text
from server.evaluation.report import findings
from server.evaluation.report.figures import ticks
from server.evaluation.report.numerals import signed
from server.evaluation.report.page import render, write_report
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import ENGLISH, LANGUAGES
from server.run_folder import EVALUATION, RunFolder, write_json
from tests.helpers.report_page import (
    ARMS,
    HELD_OUT,
    HOSTILE,
    MANIFEST,
    PLAN,
    STAND_IN,
    TRAINING,
    Texts,
    evaluation_of,
    section,
    tables,
    text_of,
)
from tests.helpers.translations import assert_same_sentences

SAY = speaker("en", LANGUAGES)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return evaluation_of()


@pytest.fixture(scope="module")
def page(whole: dict[str, Any]) -> str:
    return render(whole, MANIFEST, PLAN)


def numbers_in(values: Any) -> list[float]:
    if isinstance(values, dict):
        return [number for value in values.values() for number in numbers_in(value)]
    if isinstance(values, list):
        return [number for value in values for number in numbers_in(value)]
    return [float(values)] if isinstance(values, int | float) else []


def test_the_page_needs_nothing_from_outside(page):
    assert "http://" not in page
    assert "https://" not in page
    parsed = Texts(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    for _, attributes in parsed.tags:
        assert not {"src", "srcset", "data", "xlink:href"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page
    assert "url(" not in page


def test_every_arm_and_site_is_there(page, whole):
    for part in ("headline", "sites", "contrasts", "matrix", "roc"):
        found = text_of(section(page, part))
        for arm in ARMS:
            assert arm in found, (part, arm)
    for part in ("sites", "matrix", "roc", "provenance"):
        for site in HELD_OUT:
            assert site in text_of(section(page, part)), (part, site)
    for site in TRAINING:
        assert site in text_of(section(page, "sites"))
        assert site in text_of(section(page, "matrix"))
    assert whole["question"] in text_of(page)


def test_figures_have_words_for_those_who_cannot_see_them(page):
    drawings = [attributes for tag, attributes in Texts(page).tags if tag == "svg"]
    assert len(drawings) > 10
    assert all(
        attributes.get("aria-label") or attributes.get("aria-hidden") == "true" for attributes in drawings
    )


def test_epsilon_stands_beside_every_private_score(page):
    full = "ε 7.91, δ 1e-05, per patient, add/remove"
    seen = 0
    for part in ("headline", "sites", "matrix", "roc"):
        for table in tables(section(page, part)):
            for row in table:
                if row and row[0].startswith("federated_dp"):
                    assert full in " ".join(row), row
                    seen += 1
    assert seen >= 3 + len(DEFAULT_LABELS)
    for row in tables(section(page, "contrasts"))[0]:
        if "federated_dp" in row[0]:
            assert full in row[0]
    for name in ("sites", "curves"):
        for figure in re.findall(r'<svg[^>]*class="figure">.*?</svg>', section(page, name), re.S):
            labels = [
                label
                for label in re.findall(r"<text[^>]*>(.*?)</text>", figure)
                if label.startswith("federated_dp")
            ]
            assert labels
            assert all("ε 7.91" in label for label in labels)


def test_a_headline_sentence_about_the_private_model_names_its_epsilon(whole):
    sentences = findings.headline(Reading(whole, SAY))
    assert len(sentences) == 2
    assert "never trained" in sentences[0]
    assert "the federated model scores" in sentences[0]
    assert "per patient" in sentences[1]


def test_every_number_of_the_headline_is_in_evaluation_json(page, whole):
    known = {f"{number:.3f}" for number in numbers_in([whole["scores"], whole["worst"]])}
    shown = re.findall(
        r"\d\.\d{3}", text_of(section(page, "headline").split("<table")[1].split("</table>")[0])
    )
    assert len(shown) >= 3 * (4 * len(ARMS) - 3)  # three shared models have no `elsewhere`
    assert set(shown) <= known
    for arm in ARMS:
        assert f"{whole['headline'][arm]['worst']:.3f}" in shown


def test_what_has_no_patients_is_never_a_number(page, whole):
    """birch has no chemical_shift patient; cedar has no patient with metal."""
    block = next(
        table
        for table in tables(section(page, "matrix"))
        if "alder" in table[0][1] and table[0][2].endswith("n 0 / 0")
    )
    column = [row[2] for row in block[1:]]
    assert column == ["n = 0"] * len(whole["matrix"])
    patients = next(
        table for table in tables(section(page, "sites")) if table[-1][0].startswith("chemical shift")
    )
    assert patients[-1][2] == "n = 0"
    metal = [table for table in tables(section(page, "matrix")) if re.search(r"n 0 / [1-9]", table[0][3])]
    assert [row[3] for row in metal[0][1:]] == ["not estimable"] * len(whole["matrix"])
    gaps = findings.not_measured(Reading(whole, SAY))
    assert any(line.startswith("birch: n = 0 for chemical shift") for line in gaps)
    assert any(line.startswith("cedar: patients only with, or only without, metal") for line in gaps)
    assert any("different artifacts at different sites" in line for line in gaps)


def test_a_site_without_scores_is_named_and_not_zero():
    values = evaluation_of()
    without = {"dune"}
    for group in ("counts", "covariance"):
        values[group] = {site: rows for site, rows in values[group].items() if site not in without}
    for model in values["matrix"]:
        del values["matrix"][model]["dune"], values["model_scores"][model]["dune"]
    for arm in values["scores"]:
        for where in ("unseen", "dune"):
            values["scores"][arm][where] = {"value": None, "low": None, "high": None, "standard_error": None}
        values["headline"][arm]["unseen"] = None
        values["metrics"][arm].pop("dune", None)
    for contrast in values["contrasts"]:
        if contrast["where"] == "unseen":
            contrast.update(value=None, low=None, high=None, standard_error=None)
    page = render(values, MANIFEST, PLAN)
    assert findings.headline(Reading(values, SAY)) == [
        "This run has no result for an unseen hospital: dune † (synthetic) sent no score."
    ]
    rows = tables(section(page, "headline"))[0]
    assert [row[4] for row in rows[1:]] == ["not scored"] * len(ARMS)
    assert "None" not in text_of(page)
    assert "nan" not in text_of(page).lower().split()


def test_no_held_out_site_means_nothing_about_the_unseen():
    values = evaluation_of(held_out=())
    reading = Reading(values, SAY)
    assert findings.headline(reading) == [
        "This run has no result for an unseen hospital: no site was held out."
    ]
    assert any("No site was held out" in line for line in findings.not_measured(reading))
    assert "no site held out" in text_of(render(values, MANIFEST, PLAN.model_copy(update={"held_out": ()})))


def test_two_held_out_sites_are_both_set_apart():
    values = evaluation_of(held_out=("dune", "elm"))
    page = render(values, MANIFEST, PLAN)
    assert "all held-out sites (mean)" in page
    assert "dune † (synthetic) and elm † (synthetic)" in findings.headline(Reading(values, SAY))[0]


def test_a_run_without_a_private_arm_says_not_private():
    values = evaluation_of(("public", "local", "federated"))
    banner = findings.privacy_banner(Reading(values, SAY))
    assert (banner.level, banner.title) == ("alarm", "NOT PRIVATE")
    page = render(values, MANIFEST, PLAN)
    assert "NOT PRIVATE" in page
    assert "synthetic" in " ".join(banner.lines)
    rows = tables(section(page, "headline"))[0]
    assert {row[0].split()[0]: row[1] for row in rows[1:]} == {
        "public": "saw no site's patients",
        "local": "not private",
        "federated": "not private",
    }
    hospitals = findings.privacy_banner(Reading(evaluation_of(("public", "federated"), kind="hospital"), SAY))
    assert "No hospital patient" not in " ".join(hospitals.lines)


def test_a_private_arm_does_not_whitewash_the_others(whole):
    banner = findings.privacy_banner(Reading(whole, SAY))
    assert banner.level == "caution"
    assert banner.title == "Private: only federated_dp"
    assert "local, federated and pooled trained without noise" in " ".join(banner.lines)
    alone = findings.privacy_banner(Reading(evaluation_of(("public", "federated_dp")), SAY))
    assert alone.level == "calm"
    assert "NOT PRIVATE" not in render(evaluation_of(("public", "federated_dp")), MANIFEST, PLAN)


def test_a_private_arm_without_a_finite_epsilon_is_an_alarm(whole):
    values = copy.deepcopy(whole)
    values["privacy"]["birch"]["epsilon"] = None
    banner = findings.privacy_banner(Reading(values, SAY))
    assert (banner.level, banner.title) == ("alarm", "NO GUARANTEE at birch")
    page = render(values, MANIFEST, PLAN)
    assert "ε 7.91," not in text_of(section(page, "headline"))


def test_different_epsilons_are_shown_as_a_range(whole):
    values = copy.deepcopy(whole)
    values["privacy"]["birch"]["epsilon"] = 2.5
    assert Reading(values, SAY).privacy_tag("federated_dp").startswith("ε 2.50 to 7.91 by site, δ 1e-05")


def test_a_refused_private_arm_is_named_with_code_and_reason():
    values = evaluation_of(refused=TRAINING)
    page = render(values, MANIFEST, PLAN)
    banner = findings.privacy_banner(Reading(values, SAY))
    assert banner.level == "alarm"
    found = text_of(section(page, "privacy"))
    assert found.count("refused [epsilon-cap]: the policy allows epsilon 3 a run") == len(TRAINING)
    row = next(row for row in tables(section(page, "headline"))[0] if row[0].startswith("federated_dp"))
    assert row[-1] == "no model: refused"
    assert not re.search(r"\d\.\d{3}", " ".join(row))


def test_a_partial_run_says_what_is_missing():
    values = evaluation_of(refused=("birch",))
    page = render(values, MANIFEST, PLAN)
    top = text_of(page.split("<main>")[0].split("<body")[1])
    assert "partial" in top
    assert "federated_dp: birch refused" in top
    assert "refused [epsilon-cap]" in text_of(section(page, "privacy"))
    assert "federated_dp: birch refused." in text_of(section(page, "not"))


def test_stand_in_patients_are_marked_wherever_the_site_is_a_column(page, whole):
    for part in ("sites", "matrix"):
        heads = tables(section(page, part))[0][0]
        assert all("†" in head for head in heads[1:])
        assert STAND_IN in text_of(section(page, part))
    lines = findings.not_measured(Reading(whole, SAY))
    assert f"alder, birch, cedar and dune: “patients” are not persons ({STAND_IN})." in lines
    assert "every site is synthetic" in lines[0]
    real = evaluation_of(kind="hospital")
    assert "†" not in text_of(render(real, MANIFEST, PLAN))
    assert not any("every site is" in line for line in findings.not_measured(Reading(real, SAY)))


def test_hostile_words_are_shown_and_do_nothing(whole):
    text = json.dumps(whole)
    values = json.loads(text.replace("birch", "BAD").replace("dune", "WORSE"))
    values = json.loads(
        json.dumps(values).replace("BAD", json.dumps(HOSTILE)[1:-1]).replace("WORSE", "</style><b onclick=1>")
    )
    values["question"] = values["run"] = values["plan"] = HOSTILE
    values["incomplete"] = values["refusals"] = [HOSTILE]
    for site in values["sites"]:
        site["stand_in"] = site["version"] = HOSTILE
    for claim in values["privacy"].values():
        claim["refused"] = {"code": HOSTILE, "reason": HOSTILE}
    page = render(values, MANIFEST | {"versions": {HOSTILE: HOSTILE}}, PLAN)
    assert "<script" not in page
    assert "<b onclick" not in page
    assert page.count("</style>") == 1
    assert "{{ 7 * 7 }}{plan}" in text_of(page)
    assert not [name for _, attributes in Texts(page).tags for name in attributes if name.startswith("on")]


def test_no_path_of_this_machine_is_on_the_page(whole):
    own = {
        "model": PLAN.model.model_copy(update={"initial": "/home/someone/weights.safetensors"}),
        "public_set": PLAN.public_set.model_copy(
            update={"file": "/home/someone/public.h5", "sha256": "a" * 64}
        ),
    }
    for key, value in own.items():
        page = render(whole, MANIFEST, PLAN.model_copy(update={key: value}))
        assert "/home/" not in page
        assert "a file (see its hash)" in page


def test_an_interval_that_includes_zero_is_not_called_a_difference():
    def difference(value: float | None, low: float | None, high: float | None, p: float | None) -> Any:
        return {"value": value, "low": low, "high": high, "p_holm": p}

    assert findings.verdict(difference(0.1, -0.01, 0.2, 0.2)) == "unclear"
    assert findings.verdict(difference(0.1, 0.01, 0.2, 0.01)) == "higher"
    assert findings.verdict(difference(0.1, 0.01, 0.2, 0.06)) == "alone"
    assert findings.verdict(difference(-0.1, -0.2, -0.01, 0.01)) == "lower"
    assert findings.verdict(difference(0.1, None, None, None)) == "no_interval"
    assert findings.verdict(difference(None, None, None, None)) == "not_estimable"
    assert findings.verdict(difference(0.0, 0.0, 0.0, 1.0)) == "same"


def test_the_headline_repeats_the_verdict_of_the_contrast(whole):
    values = copy.deepcopy(whole)
    for contrast in values["contrasts"]:
        if contrast["where"] == "unseen" and contrast["arm"] == "federated":
            contrast.update(
                {"value": 0.01, "low": -0.05, "high": 0.07, "p_holm": 1.0}
                if contrast["other"] == "local"
                else {"value": 0.1, "low": 0.05, "high": 0.15, "p_holm": 0.001}
            )
        if contrast["where"] == "unseen" and contrast["arm"] == "pooled":
            contrast.update({"value": 0.1, "low": 0.05, "high": 0.15, "p_holm": 0.001})
    sentence = findings.headline(Reading(values, SAY))[0]
    assert "better than the starting weights" in sentence
    assert "worse than the pooled model" in sentence
    assert "not distinguishable from sites training alone" in sentence


def test_an_artifact_at_chance_is_not_hidden_by_the_macro_score(whole):
    values = copy.deepcopy(whole)
    values["metrics"]["federated"]["dune"]["motion"].update(auroc=0.482, low=0.396, high=0.569)
    lines = findings.remarks(Reading(values, SAY))
    assert (
        "At dune †, federated is not distinguishable from chance on motion (0.482): "
        "the interval includes 0.5." in lines
    )


def test_epsilon_is_never_rounded_down():
    assert epsilon_text(7.9001) == "7.91"
    assert epsilon_text(8.0) == "8.00"
    assert epsilon_text(float("inf")) == "∞"


def test_a_minus_is_a_minus():
    assert signed(-0.05) == "−0.050"
    assert signed(0.0) == "0.000"


def test_ticks_are_round_numbers_inside():
    assert ticks(0.4, 1.0) == [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert all(0.433 <= tick <= 0.671 for tick in ticks(0.433, 0.671))


def test_every_sentence_is_used(page):
    code = "".join(
        path.read_text()
        for path in Path(findings.__file__).parent.iterdir()
        if path.suffix in (".py", ".j2") and path.name != "words.py"
    )
    built = (
        "contrasts.column.",
        "privacy.column.",
        "contrasts.",
        "headline.",
        "arm.",
        "who.",
        "where.",
        "not.",
        "column.",
        "status.",
        "curves.",
        "unit.",
        "list.",
        "operating.",
        "calibration.column.",
        "word.",
    )
    unused = [key for key in ENGLISH if key not in code and not key.startswith(built)]
    assert unused == []


def test_languages_have_the_same_sentences() -> None:
    assert_same_sentences(LANGUAGES)


def test_write_report_puts_one_whole_file_into_the_run_folder(tmp_path, whole):
    folder = RunFolder.create(tmp_path / "run", PLAN, MANIFEST)
    with pytest.raises(ConfigError) as caught:
        write_report(folder)
    assert caught.value.code == "not-finished"
    write_json(folder.path / EVALUATION, whole)
    path = write_report(folder)
    assert path == folder.path / "report.html"
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    first = path.read_bytes()
    write_report(folder)
    assert path.read_bytes() == first


def with_contrast(
    values: dict[str, Any], arm: str, other: str, *, value: float, low: float, high: float, p: float
) -> dict[str, Any]:
    """The same evaluation with one difference at the unseen site."""
    changed = copy.deepcopy(values)
    for row in changed["contrasts"]:
        if (row["arm"], row["other"], row["where"]) == (arm, other, "unseen"):
            row.update(value=value, low=low, high=high, p_holm=p)
    return changed


PRIVATE_ARMS = ("public", "local", "local_dp", "federated", "federated_clipped", "federated_dp")


def test_a_shared_model_is_not_shown_as_unseen_where_it_trained(page):
    rows = {row[0].split()[0]: row for row in tables(section(page, "headline"))[0][1:]}
    for arm in ("federated", "federated_dp", "pooled"):
        assert rows[arm][3] == "not defined: it trained there"
    assert re.match(r"0\.\d{3}", rows["local"][3])


def test_every_site_that_trained_a_model_is_outlined_in_its_row(whole):
    page = section(render(whole, MANIFEST, PLAN), "matrix").split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.S)[1:]
    own = {text_of(row).split()[0]: row.count(' own"') + row.count(' own "') for row in rows}
    assert own["public"] == 0
    assert own["federated"] == own["pooled"] == len(TRAINING)
    assert own["local/alder"] == 1


def test_private_gain_needs_its_control(whole):
    """Better than the start is no merit of federation while each hospital alone may do as well."""
    values = with_contrast(
        evaluation_of(PRIVATE_ARMS), "federated_dp", "public", value=0.05, low=0.02, high=0.08, p=0.001
    )

    def said(found: dict[str, Any]) -> str:
        (line,) = findings.private_gain(Reading(found, SAY))
        return line

    alike = with_contrast(values, "federated_dp", "local_dp", value=0.01, low=-0.02, high=0.04, p=1.0)
    assert "That federation is the cause is not shown" in said(alike)
    better = with_contrast(values, "federated_dp", "local_dp", value=0.03, low=0.01, high=0.05, p=0.01)
    assert "and over local_dp" in said(better)
    nothing = with_contrast(values, "federated_dp", "public", value=0.0, low=0.0, high=0.0, p=1.0)
    assert "no gain over the starting weights is shown" in said(nothing)
    without = with_contrast(whole, "federated_dp", "public", value=0.05, low=0.02, high=0.08, p=0.001)
    assert "that needs the arm local_dp" in said(without)


def test_nothing_trained_is_not_told_as_a_gain(whole):
    """`at or above it at every one of 3 training sites` held for a model that is the starting weights."""
    values = copy.deepcopy(whole)
    for row in values["contrasts"]:
        row.update(value=0.0, low=0.0, high=0.0, standard_error=0.0, p=1.0, p_holm=1.0)
    lines = findings.remarks(Reading(values, SAY))
    told = [line for line in lines if "site by site" in line]
    assert len(told) == 2
    assert all("after Holm's correction higher at none of them" in line for line in told)
    assert "public (which did not train there)" in told[1]


def prices_of(page: str) -> list[list[list[str]]]:
    return [table for table in tables(section(page, "contrasts")) if table[0][0] == "Part"]


def test_the_price_of_privacy_is_decomposed_and_what_is_not_measured_is_not_attributed(whole):
    (found,) = prices_of(render(evaluation_of(PRIVATE_ARMS), MANIFEST, PLAN))[:1]
    assert [row[0] for row in found[1:]] == ["in all", "frozen, clipped, other steps", "noised"]
    assert found[3][1] == "federated_dp − federated_clipped"
    numbers = [float(row[3].split()[0].replace("−", "-")) for row in found[1:]]
    assert numbers[0] == pytest.approx(numbers[1] + numbers[2], abs=0.0011)
    bare = render(whole, MANIFEST, PLAN)
    (found,) = prices_of(bare)
    assert [row[3].startswith("not attributed") for row in found[1:]] == [False, True, True]
    assert "needs the arm federated_clipped" in text_of(bare)
    assert "frozen" not in text_of(
        section(render(evaluation_of(("public", "local")), MANIFEST, PLAN), "contrasts")
    )


def test_a_plan_that_freezes_nothing_says_so(whole):
    plan = PLAN.model_copy(update={"privacy": PLAN.privacy.model_copy(update={"trainable": "all"})})
    page = text_of(section(render(evaluation_of(PRIVATE_ARMS), MANIFEST, plan), "contrasts"))
    assert "Nothing is frozen (privacy.trainable: all)" in page


def test_the_number_of_looks_is_printed(page, whole):
    looks = whole["looks"]
    assert f"{looks['overall']} looks here and {looks['sites']} at single sites" in text_of(page)


def test_a_hospital_below_chance_is_red(whole):
    values = copy.deepcopy(whole)
    values["below_chance"] = [
        {"site": "birch", "model": "federated", "artifact": "motion", "auroc": 0.2, "p": 1e-6, "p_holm": 1e-4}
    ]
    page = render(values, MANIFEST, PLAN)
    assert page.count('class="score  swapped"') == 1
    assert (
        "At birch †, models rank patients with motion below those without: AUROC federated 0.200"
        in text_of(page)
    )
    assert "swapped" not in section(render(whole, MANIFEST, PLAN), "matrix")


def test_a_merged_curve_above_every_site_is_named():
    """Two hospitals of chance, with other prevalence and level of scores: together they look like skill."""
    values = evaluation_of(("public", "federated"), held_out=())
    metal = values["counts"]
    low, high = [[100, 5], [101, 5]], [[300, 5], [301, 5]]
    for model in ("public", "federated"):
        metal["alder"][model]["metal"] = {"positives": low, "negatives": [[100, 20], [101, 20]]}
        metal["birch"][model]["metal"] = {"positives": [[300, 20], [301, 20]], "negatives": high}
        metal["cedar"][model]["metal"] = {"positives": [], "negatives": []}
    page = text_of(section(render(values, MANIFEST, PLAN.model_copy(update={"held_out": ()})), "roc"))
    assert "metal (CT), federated: the curve of the merged counts" in page
    assert "lies above every site's (0.500 to 0.500)" in page


def test_what_is_not_in_the_scores_is_counted_and_named(page):
    found = text_of(section(page, "headline"))
    assert "The scores average 18 of 20 cells" in found
    assert "metal / cedar (n 0 / " in found
    assert "chemical shift / birch (n 0 / 0)" in found
    assert "The same on beam hardening, motion and susceptibility, which every site can estimate" in found


def test_that_a_patient_may_be_at_two_hospitals_is_said(page):
    assert "Whether the same patient was seen at two hospitals: not checked." in text_of(page)


def test_a_cell_of_crowded_coarse_bins_is_grey_and_the_page_says_why(whole, page):
    values = copy.deepcopy(whole)
    values["matrix"]["federated"]["dune"]["motion"]["crowded"] = True
    found = render(values, MANIFEST, PLAN)
    for part in ("matrix", "roc"):  # the matrix of the artifact, and the table of the held-out site
        (cell,) = re.findall(r'<td class="score [^"]*crowded"[^>]*>.*?</td>', section(found, part))
        assert "coarse bins" in cell
        assert "style=" not in cell
        assert "one of them holds more than a fifth of a class" in text_of(section(found, part))
        assert "motion / dune" in text_of(section(found, part))
    assert "holds more than a fifth" not in page


def test_the_unit_of_a_score_is_named_by_site(whole, page):
    values = copy.deepcopy(whole)
    for site in values["sites"]:
        site["unit"] = "study" if site["site"] == "dune" else "patient"
    found = render(values, MANIFEST, PLAN)
    for part in ("headline", "sites"):
        text = text_of(section(found, part))
        assert "one score a patient at alder †, birch † and cedar †." in text
        assert "one score a study at dune †; a person with several studies counts several times." in text
    assert "Unit:" not in page  # sites that did not say


def test_one_held_out_hospital_is_said_to_say_nothing_about_the_next(whole):
    def said(values: dict[str, Any]) -> str:
        return " ".join(findings.remarks(Reading(values, SAY)))

    assert "one hospital says nothing about the next one" in said(whole)
    assert "--leave-one-site-out" in said(whole)
    assert "--leave-one-site-out" not in said(evaluation_of(held_out=("dune", "elm")))
