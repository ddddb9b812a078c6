"""The page says what evaluation.json says, loudly where it must, and nothing else gets in or out."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.artifacts import NAMES
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
    assert seen >= 3 + len(NAMES)
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
    known = {f"{min(max(number, 0), 1):.3f}" for number in numbers_in(whole["scores"])}
    shown = re.findall(
        r"\d\.\d{3}", text_of(section(page, "headline").split("<table")[1].split("</table>")[0])
    )
    assert len(shown) >= 3 * 4 * len(ARMS)
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
    top = text_of(page.split("<main>")[0].split("<body>")[1])
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
    plan = PLAN.model_copy(
        update={"model": PLAN.model.model_copy(update={"initial": "/home/someone/weights.safetensors"})}
    )
    page = render(whole, MANIFEST, plan)
    assert "/home/" not in page
    assert "a file (see its hash)" in page


def test_an_interval_that_includes_zero_is_not_called_a_difference():
    def difference(low: float | None, high: float | None) -> dict[str, float | None]:
        return {"value": 0.1, "low": low, "high": high}

    assert findings.verdict(difference(-0.01, 0.2)) == "unclear"
    assert findings.verdict(difference(0.01, 0.2)) == "higher"
    assert findings.verdict(difference(-0.2, -0.01)) == "lower"
    assert findings.verdict(difference(None, None)) == "no_interval"
    assert findings.verdict({"value": None, "low": None, "high": None}) == "not_estimable"
    assert findings.verdict({"value": 0.0, "low": 0.0, "high": 0.0}) == "same"


def test_the_headline_repeats_the_verdict_of_the_contrast(whole):
    values = copy.deepcopy(whole)
    for contrast in values["contrasts"]:
        if contrast["where"] == "unseen" and contrast["arm"] == "federated":
            contrast.update(
                {"value": 0.01, "low": -0.05, "high": 0.07}
                if contrast["other"] == "local"
                else {"value": 0.1, "low": 0.05, "high": 0.15}
            )
        if contrast["where"] == "unseen" and contrast["arm"] == "pooled":
            contrast.update({"value": 0.1, "low": 0.05, "high": 0.15})
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
