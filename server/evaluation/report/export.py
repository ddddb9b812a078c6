"""The report without its page: Markdown for a document, JSON for programs, CSV for `fedqc verify --table`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from common.cohort_table import CohortTable
from common.i18n import speaker
from server.evaluation.participation import Participation
from server.evaluation.report import decisions, findings
from server.evaluation.report.cohorts import cohorts_view, text_rows
from server.evaluation.report.numerals import score
from server.evaluation.report.paper import as_csv, as_markdown, plain_text, scores_table
from server.evaluation.report.reading import Reading
from server.evaluation.report.subgroups import subgroup_tables
from server.evaluation.report.words import LANGUAGES
from server.evaluation_file import Evaluation

KEPT = (
    "run",
    "plan",
    "question",
    "status",
    "arms",
    "private_arms",
    "sites",
    "privacy",
    "headline",
    "scores",
    "contrasts",
    "missing",
)


def reading_of(evaluation: Evaluation, language: str) -> Reading:
    """An evaluation in a language.

    Raises:
        ConfigError: there is no such language (`bad-argument`).
    """
    return Reading(evaluation, speaker(language, LANGUAGES), language)


def report_json(
    reading: Reading,
    participation: Participation,
    *,
    trainable: str,
    cohorts: Mapping[str, CohortTable] | None = None,
) -> dict[str, Any]:
    """The answers in words, the scores, every row at an operating point with its counts, and the cohorts of
    which the run folder has the tables.
    """
    found: dict[str, Any] = dict(reading.evaluation)
    answers = findings.answers(reading, participation, trainable=trainable)
    return {
        "answers": [{"question": answer.question, "lines": answer.lines} for answer in answers],
        **{name: found[name] for name in KEPT},
        "generalization_gap": found.get("generalization_gap"),
        "participation": {
            arm: {
                site: {
                    "rounds": row.rounds,
                    "invited": row.invited,
                    "counted": row.counted,
                    "codes": sorted(row.codes),
                }
                for site, row in rows.items()
            }
            for arm, rows in participation.items()
        },
        "cohorts": dict(cohorts or {}),
        "operating": [
            {"arm": line.arm, "model": line.model, "site": line.site, "artifact": line.artifact}
            | line.found.to_json()
            for arm in reading.arms
            for line in chain(decisions.lines_of(reading, arm), decisions.any_lines(reading, arm))
        ],
        "subgroups": found.get("subgroups"),
        "any_artifact": {name: found["any_artifact"][name] for name in ("artifacts", "matrix")}
        if "any_artifact" in found
        else None,
    }


def report_csv(reading: Reading) -> str:
    """Scores at the operating point, a line an arm, artifact and site."""
    return as_csv([scores_table(reading)])


def report_markdown(
    reading: Reading,
    participation: Participation,
    *,
    trainable: str,
    cohorts: Mapping[str, CohortTable] | None = None,
) -> str:
    """The privacy banner, the four answers, scores by arm, the lead arm's decisions, Table 1 and flow."""
    say, evaluation = reading.say, reading.evaluation
    banner = findings.privacy_banner(reading)
    lines = [
        f"# {plain_text(evaluation['question'] or say('page.no_question', plan=evaluation['plan']))}",
        "",
        f"{say('page.plan')} {plain_text(evaluation['plan'])}, "
        f"{say('page.run')} {plain_text(evaluation['run'])}",
        "",
        f"**{plain_text(banner.title)}** " + " ".join(plain_text(line) for line in banner.lines),
        "",
    ]
    for answer in findings.answers(reading, participation, trainable=trainable):
        lines += [f"## {answer.question}", "", *(f"- {plain_text(line)}" for line in answer.lines), ""]
    places = ("home", "elsewhere", "unseen")
    rows = [
        {say("column.arm"): arm, say("column.privacy"): reading.privacy_tag(arm)}
        | {say(f"column.{place}"): _score(reading, arm, place) for place in places}
        for arm in reading.arms
        if reading.models_of(arm)
    ]
    lines += [f"## {say('headline.caption')}", "", as_markdown(rows)]
    lead = decisions.lead_of(reading)
    if reading.has_points and lead is not None:
        lines += [f"## {say('operating.section')}", "", as_markdown(_decisions(reading, lead))]
        if reading.any_artifacts:
            lines += [plain_text(say("any.note", artifacts=reading.any_artifacts)), ""]
    for table in subgroup_tables(reading)[:1]:
        lines += [f"## {say('subgroups.section')}", "", plain_text(say("subgroups.lead")), ""]
        for place in table["places"]:
            lines += [plain_text(say("subgroups.caption", arm=table["arm"], sites=place["title"])), ""]
            lines += [as_markdown(_subgroups(say("subgroups.column"), place))]
        lines += [f"- {plain_text(line)}" for line in table["differences"]["lines"]] + [""]
    view = cohorts_view(reading, cohorts or {})
    lines += [f"## {say('cohorts.section')}", ""]
    if view.sites:
        lines += [f"### {say('cohort.table.title')}", "", as_markdown(text_rows(view.table, view.labels))]
        lines += [plain_text(say("cohort.table.note")), ""]
        lines += [f"### {say('cohort.flow.title')}", "", as_markdown(text_rows(view.flow, view.sites))]
    if view.absent:
        lines += [plain_text(say("cohorts.absent", sites=reading.listing(view.absent))), ""]
    lines += [f"## {say('not.section')}", ""]
    lines += [f"- {plain_text(line)}" for line in findings.not_measured(reading)]
    return "\n".join(lines) + "\n"


def _subgroups(column: str, place: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {column: row["name"]}
        | {
            name: f"{cell['text']} ({cell['interval'] or '–'}), n {cell['n']}" if cell["n"] else cell["text"]
            for name, cell in zip(place["columns"], row["cells"], strict=True)
        }
        for row in place["rows"]
    ]


def _score(reading: Reading, arm: str, place: str) -> str:
    found = reading.score(arm, place)
    if found is None or found["value"] is None:
        return reading.why_missing(place, arm)
    if found["low"] is None or found["high"] is None:
        return score(found["value"])
    return f"{score(found['value'])} ({score(found['low'])} – {score(found['high'])})"


def _decisions(reading: Reading, arm: str) -> list[dict[str, str]]:
    columns = ("n", "prevalence", "auroc", "ap", "sensitivity", "specificity", "precision", "f1", "accuracy")
    table = next(table for table in decisions.operating_tables(reading) if table["arm"] == arm)
    return [
        {reading.say("column.artifact"): artifact, reading.say("column.site"): row["site"]}
        | {
            reading.say(f"operating.column.{name}"): " ".join(filter(None, row[name]))
            if isinstance(row[name], tuple)
            else row[name]
            for name in (*columns, "balanced", "alarms")
        }
        for artifact, rows in table["groups"]
        for row in rows
    ]
