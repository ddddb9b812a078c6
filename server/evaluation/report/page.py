"""Render report.html from evaluation.json and tuning.json: one self-contained file that opens offline."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from common.arms import is_private
from common.artifacts import ARTIFACTS
from common.cohort_table import CohortTable
from common.counts import Counts
from common.files import write_bytes
from common.i18n import Say, speaker
from common.operating_point import LEAST_FOUND
from common.plan import RunPlan
from common.privacy import epsilon_text
from server.evaluation.operating import GROUPS, STATED_PREVALENCES
from server.evaluation.participation import Participation, participation_of
from server.evaluation.report import decisions, figures, findings
from server.evaluation.report.cohorts import cohorts_view
from server.evaluation.report.numerals import Number, plain, score, signed
from server.evaluation.report.reading import Reading
from server.evaluation.report.subgroups import subgroup_tables
from server.evaluation.report.tuning import tuning_view
from server.evaluation.report.words import LANGUAGES
from server.evaluation_file import Contrast, Evaluation, Interval
from server.run_folder import REPORT, RunFolder

CURVE_SPANS: dict[Literal["loss", "auroc"], tuple[float, float]] = {"loss": (0.0, 0.1), "auroc": (0.5, 1.0)}
"""What the upright axis of a learning curve shows at least: not only the noise of the last rounds."""
PLACES = ("home", "elsewhere", "unseen", "worst")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a table, or why there is none. `text` is never a number when the value is missing."""

    text: str
    interval: str = ""
    note: str = ""
    missing: bool = False
    shade: str = ""
    own: bool = False
    alarm: bool = False
    crowded: bool = False


def write_report(folder: RunFolder, language: str = "en") -> Path:
    """Render the run's report.html and return where it lies.

    Args:
        language: `en` or `zh`.
    Raises:
        ConfigError: the run has no evaluation yet (code `not-finished`); tuning.json is damaged
            (`bad-tuning`); there is no such language (`bad-argument`).
    """
    path = folder.path / REPORT
    page = render(
        folder.evaluation,
        folder.manifest,
        folder.plan,
        folder.tuning,
        language=language,
        participation=participation_of(folder),
        cohorts=folder.cohorts,
    )
    write_bytes(path, page.encode())
    return path


def render(
    evaluation: Evaluation,
    manifest: Mapping[str, Any],
    plan: RunPlan,
    tuning: Mapping[str, Any] | None = None,
    *,
    language: str = "en",
    participation: Participation | None = None,
    cohorts: Mapping[str, CohortTable] | None = None,
) -> str:
    """The page as one string of HTML. Every value is escaped; the only markup is the template's and the
    figures'.

    Args:
        tuning: content of tuning.json; None: the plan stated its settings.
        language: `en` or `zh`.
        participation: from the records of the rounds; None: they are not there.
        cohorts: Table 1 and flow of the sites whose the run folder has.
    Raises:
        ConfigError: `tuning` is not what fedqc writes (code `bad-tuning`); there is no such language
            (`bad-argument`).
    """
    say = speaker(language, LANGUAGES)
    reading = Reading(evaluation, say, language)
    participation = participation or {}
    environment = Environment(
        loader=PackageLoader("server.evaluation.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        say=say,
        reading=reading,
        evaluation=evaluation,
        language=language,
        banner=findings.privacy_banner(reading),
        answers=findings.answers(reading, participation, trainable=plan.privacy.trainable),
        remarks=findings.remarks(reading),
        swapped=findings.swapped(reading),
        headline_rows=headline_rows(reading),
        common_rows=common_rows(reading),
        forest=forest(reading),
        site_rows=site_rows(reading),
        model_rows=model_rows(reading),
        artifact_tables=artifact_tables(reading),
        operating=operating_view(reading, plan),
        subgroups=subgroup_tables(reading),
        participation=participation,
        cohorts=cohorts_view(reading, cohorts or {}),
        roc=roc_figures(reading),
        unseen_tables=unseen_tables(reading),
        curves=curve_figure(reading),
        widths=decisions.width_figure(reading),
        lead=decisions.lead_of(reading),
        curve_rows=curve_rows(reading),
        contrasts=contrast_rows(reading),
        prices=price_tables(reading, plan),
        claims=claim_rows(reading),
        tuning=tuning_view(tuning, plan, say) if tuning else None,
        private_arms=reading.listing([arm for arm in reading.arms if is_private(arm)]),
        alternatives=bool(reading.evaluation.get("alternatives")),
        gaps=findings.not_measured(reading),
        provenance=provenance(reading, manifest, plan),
        settings=settings(plan, say),
        artifacts=[artifact for artifact in ARTIFACTS if artifact.name in reading.artifacts],
        names=reading.artifacts,
        crowded_cells=reading.listing(
            [f"{reading.title(artifact)} / {site}" for site, artifact in reading.crowded]
        ),
        places=PLACES,
        swatch=figures.swatch,
    )


# cells and tables


def cell(reading: Reading, found: Interval | None, where: str, arm: str = "", **more: Any) -> Cell:
    """An estimate with its interval; where there is none, the reason."""
    if found is None or found["value"] is None:
        return Cell(text=reading.why_missing(where, arm), missing=True, **more)
    return Cell(text=score(found["value"]), interval=interval(reading, found["low"], found["high"]), **more)


def interval(reading: Reading, low: Number, high: Number) -> str:
    if low is None or high is None:
        return reading.say("missing.interval")
    return f"{score(low)} – {score(high)}"


def headline_rows(reading: Reading) -> list[dict[str, Any]]:
    rows = []
    for arm in reading.arms:
        row: dict[str, Any] = {
            "arm": arm,
            "what": reading.describe("arm", arm),
            "tag": reading.privacy_tag(arm),
            "cells": [],
        }
        if not reading.models_of(arm):
            row["tag"] = "–"
            refused = is_private(arm) and any(claim["refused"] for claim in reading.claims.values())
            row["absent"] = reading.say("arm.refused" if refused else "arm.no_model")
        else:
            row["cells"] = [cell(reading, reading.score(arm, where), where, arm) for where in PLACES[:3]]
            row["cells"].append(worst_cell(reading, arm))
        rows.append(row)
    return rows


def worst_cell(reading: Reading, arm: str) -> Cell:
    """The lowest training site, beside what the lowest of as many equal sites would show."""
    worst = reading.worst(arm)
    if worst is None:
        return cell(reading, None, "worst", arm)
    note = reading.say("at", site=reading.name(worst["site"] or ""))
    if worst["of"] > 1 and worst["if_equal"] is not None:
        note += "; " + reading.say("worst.if_equal", count=worst["of"], value=score(worst["if_equal"]))
    return cell(reading, worst, "worst", arm, note=note)


def common_rows(reading: Reading) -> dict[str, Any] | None:
    """Scores on the artifacts of every site, which can be compared between places; None where all sites
    average the same.
    """
    common = reading.evaluation["common"]
    if common is None:
        return None
    return {
        "artifacts": reading.listing([reading.title(name) for name in common["artifacts"]]),
        "rows": [
            {
                "arm": arm,
                "tag": reading.privacy_tag(arm),
                "cells": [cell(reading, places[where], where, arm) for where in PLACES[:3]],
            }
            for arm, places in common["scores"].items()
        ],
    }


def price_tables(reading: Reading, plan: RunPlan) -> list[dict[str, Any]]:
    """What privacy cost, part by part: a table a private arm that has a model."""
    say, found = reading.say, []
    for private, control, frozen, other in findings.PRICES:
        if not reading.models_of(private):
            continue
        steps = [("price.total", private, other)]
        if reading.models_of(frozen):
            steps += [("price.layers", frozen, other), ("price.steps", control, frozen)]
        else:
            steps.append(("price.clipped", control, other))
        steps.append(("price.noised", private, control))
        rows = [
            {
                "step": say(step),
                "pair": say("contrasts.title", arm=arm, other=less),
                "cells": [
                    _difference_cell(reading, reading.contrast(arm, less, where), where)
                    if reading.models_of(arm) and reading.models_of(less)
                    else Cell(text=say("price.not_attributed"), missing=True)
                    for where in ("home", "unseen")
                ],
            }
            for step, arm, less in steps
        ]
        notes = findings.price_notes(
            reading, private, control, frozen, other, trainable=plan.privacy.trainable
        )
        found.append({"arm": private, "tag": reading.privacy_tag(private), "rows": rows, "notes": notes})
    return found


def _difference_cell(reading: Reading, found: Contrast | None, where: str) -> Cell:
    if found is None or found["value"] is None:
        return Cell(text=reading.why_missing(where), missing=True)
    words = reading.say(f"contrasts.{findings.verdict(found)}")
    return Cell(text=signed(found["value"]), interval=_signed_interval(reading, found), note=words)


def site_rows(reading: Reading) -> list[dict[str, Any]]:
    """Arm by site, as a hospital would use the arm: the shared model or its own."""
    return [
        {
            "arm": arm,
            "tag": reading.privacy_tag(arm),
            "cells": [
                cell(
                    reading,
                    reading.score(arm, site["site"]),
                    site["site"],
                    note=_mean_of(reading, arm, site["site"]),
                )
                if reading.model_at(arm, site["site"]) or _mean_of(reading, arm, site["site"])
                else Cell(text=reading.say("missing.not_defined"), missing=True)
                for site in reading.sites
            ],
        }
        for arm in reading.arms
        if reading.models_of(arm)
    ]


def _mean_of(reading: Reading, arm: str, site: str) -> str:
    """Says so where the score is the mean over the arm's models because the site has none of its own."""
    if reading.model_at(arm, site) or not reading.score(arm, site):
        return ""
    return reading.say("sites.mean_of", count=len(reading.models_of(arm)))


def model_rows(reading: Reading) -> list[dict[str, Any]]:
    """The site by site matrix: a row a model, a column a site."""
    rows = []
    for model in reading.models:
        cells = []
        for site in reading.sites:
            found = reading.evaluation["model_scores"][model].get(site["site"])
            value = None if found is None else found["value"]
            cells.append(
                cell(
                    reading,
                    found,
                    site["site"],
                    shade="" if value is None else figures.shade(value),
                    own=reading.trained_at(model, site["site"]),
                )
            )
        rows.append(
            {"model": model, "arm": model.partition("/")[0], "tag": _tag(reading, model), "cells": cells}
        )
    return rows


def _tag(reading: Reading, model: str) -> str:
    return reading.privacy_tag(model.partition("/")[0])


def artifact_cell(reading: Reading, model: str, site: str, artifact: str) -> Cell:
    rows = reading.evaluation["matrix"][model].get(site)
    if rows is None:
        return Cell(text=reading.say("missing.unscored"), missing=True)
    found = rows[artifact]
    if found["auroc"] is None and site in reading.noised:
        return Cell(text=reading.say("missing.noise"), missing=True)
    if found["auroc"] is None:
        empty = not found["n_pos"] and not found["n_neg"]
        return Cell(text=reading.say("missing.n0" if empty else "missing.not_estimable"), missing=True)
    if artifact in reading.unlearned(model):
        return Cell(text=reading.say("missing.unlearned"), missing=True)
    alarm = (site, model, artifact) in reading.below_chance
    crowded = bool(found.get("crowded"))
    return Cell(
        text=score(found["auroc"]),
        interval=interval(reading, found["low"], found["high"]),
        note=reading.say("swapped") if alarm else reading.say("crowded") if crowded else "",
        shade="" if crowded else figures.shade(found["auroc"]),
        alarm=alarm,
        crowded=crowded,
    )


def artifact_tables(reading: Reading) -> list[dict[str, Any]]:
    """One matrix an artifact."""
    return [
        {
            "artifact": reading.with_modality(artifact),
            "sizes": [reading.patients(site["site"], artifact) for site in reading.sites],
            "rows": [
                {
                    "model": model,
                    "tag": _tag(reading, model),
                    "cells": [
                        artifact_cell(reading, model, site["site"], artifact) for site in reading.sites
                    ],
                }
                for model in reading.models
            ],
        }
        for artifact in reading.artifacts
    ]


def unseen_tables(reading: Reading) -> list[dict[str, Any]]:
    """AUROC by artifact at each held-out site, a row a model."""
    return [
        {
            "site": site,
            "sizes": [reading.patients(site, artifact) for artifact in reading.artifacts],
            "rows": [
                {
                    "model": model,
                    "arm": model.partition("/")[0],
                    "tag": _tag(reading, model),
                    "cells": [
                        artifact_cell(reading, model, site, artifact) for artifact in reading.artifacts
                    ],
                }
                for model in reading.models
            ],
        }
        for site in reading.held_out
        if reading.is_scored(site)
    ]


def contrast_rows(reading: Reading) -> dict[str, Any]:
    """Differences with their verdicts, the overall places first, then the sites; and how many exclude
    zero.
    """
    overall: list[dict[str, Any]] = []
    at_sites: list[dict[str, Any]] = []
    found = reading.evaluation["contrasts"]
    limits = {
        family: _reach([contrast for contrast in found if contrast["family"] == family])
        for family in ("overall", "sites")
    }
    for contrast in found:
        verdict = findings.verdict(contrast)
        row = {
            "arm": contrast["arm"],
            "other": contrast["other"],
            "where": reading.where(contrast["where"]),
            "difference": reading.why_missing(contrast["where"])
            if contrast["value"] is None
            else signed(contrast["value"]),
            "interval": _signed_interval(reading, contrast),
            "picture": figures.difference_bar(
                contrast["value"],
                contrast["low"],
                contrast["high"],
                limits[contrast["family"]],
            ),
            "verdict": verdict,
            "words": reading.say(f"contrasts.{verdict}"),
            "tags": [
                f"{arm}: {reading.privacy_tag(arm)}"
                for arm in (contrast["arm"], contrast["other"])
                if reading.is_private(arm)
            ],
        }
        (at_sites if contrast["family"] == "sites" else overall).append(row)
    verdicts = [row["verdict"] for row in [*overall, *at_sites]]
    looks = reading.evaluation["looks"]
    return {
        "overall": _grouped(overall),
        "sites": _grouped(at_sites),
        "looks": {"overall": looks["overall"], "sites": looks["sites"]},
        "holding": sum(verdict in ("higher", "lower") for verdict in verdicts),
        "alone": sum(verdict == "alone" for verdict in verdicts),
    }


def _reach(contrasts: list[Contrast]) -> float:
    """The largest distance from zero, for a common scale."""
    ends = [
        abs(end)
        for contrast in contrasts
        for end in (contrast["value"], contrast["low"], contrast["high"])
        if end is not None
    ]
    return max([*ends, 0.05])


def _signed_interval(reading: Reading, contrast: Contrast) -> str:
    if contrast["value"] is None:
        return ""
    if contrast["low"] is None or contrast["high"] is None:
        return reading.say("missing.interval")
    return f"{signed(contrast['low'])} to {signed(contrast['high'])}"


def _grouped(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one comparison together, in their order."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["other"]), []).append(row)
    return list(groups.values())


def claim_rows(reading: Reading) -> list[dict[str, str]]:
    """What each site was promised, or why it refused; empty where no private arm was planned."""
    say, rows = reading.say, []
    if not any(is_private(arm) for arm in reading.arms):
        return []
    for site in reading.sites:
        claim = reading.claims.get(site["site"])
        row = dict.fromkeys(("epsilon", "epsilon_pld", "delta", "noise", "unit"), "–") | {
            "site": reading.name(site["site"])
        }
        if claim is None:
            row["state"] = say(
                "privacy.state.held_out" if site["role"] == "held_out" else "privacy.state.silent"
            )
        elif claim["refused"]:
            row["state"] = say(
                "privacy.state.refused", code=claim["refused"]["code"], reason=claim["refused"]["reason"]
            )
        else:
            none = say("privacy.tag.none")
            row |= {
                "epsilon": none if claim["epsilon"] is None else epsilon_text(claim["epsilon"]),
                "epsilon_pld": none if claim["epsilon_pld"] is None else epsilon_text(claim["epsilon_pld"]),
                "delta": none if claim["delta"] is None else plain(claim["delta"]),
                "noise": "–" if claim["noise_multiplier"] is None else f"{claim['noise_multiplier']:.4g}",
                "unit": f"{reading.word(claim['unit'])}, {reading.word(claim['adjacency'])}",
                "state": say("privacy.state.void" if claim.get("void") else "privacy.state.spent"),
            }
        rows.append(row)
    return rows


def operating_view(reading: Reading, plan: RunPlan) -> dict[str, Any] | None:
    """What the page says of operating points and probabilities; None where no public scores were kept."""
    if not reading.has_points:
        return None
    lead = decisions.lead_of(reading)
    return {
        "origin": decisions.origin(reading, plan.public_set),
        "share": f"{100 * LEAST_FOUND:g}",
        "groups": GROUPS,
        "prevalences": [f"{100 * prevalence:g}" for prevalence in STATED_PREVALENCES],
        "lead": lead,
        "points": decisions.point_rows(reading),
        "tables": decisions.operating_tables(reading),
        "calibration": decisions.calibration_figures(reading),
        "decision": decisions.decision_figures(reading),
        "drawn": [arm for arm in decisions.DRAWN if reading.models_of(arm)],
        "any": reading.any_artifacts,
    }


# figures


def forest(reading: Reading) -> Markup:
    say, groups = reading.say, []
    places = [(site["site"], site["role"] == "held_out") for site in reading.sites]
    if len(reading.held_out) > 1:
        places.append(("unseen", True))
    for place, apart in places:
        rows = []
        for arm in reading.arms:
            if not reading.models_of(arm):
                continue
            found = reading.score(arm, place)
            if found is None and place != "unseen" and not reading.model_at(arm, place):
                continue
            shown = cell(reading, found, place)
            mean = _mean_of(reading, arm, place) if place != "unseen" else ""
            rows.append(
                figures.ForestRow(
                    arm=arm,
                    label=f"{reading.label(arm)}, {mean}" if mean else reading.label(arm),
                    text=f"{shown.text} ({shown.interval})" if shown.interval else shown.text,
                    value=found["value"] if found else None,
                    low=found["low"] if found else None,
                    high=found["high"] if found else None,
                )
            )
        heading = say("sites.unseen_mean") if place == "unseen" else reading.name(place)
        note = say("sites.held_out" if apart else "sites.training")
        groups.append(figures.ForestGroup(title=heading, note=note, apart=apart, rows=rows))
    return figures.forest(groups, say("sites.figure.alt"), say("sites.figure"))


def roc_figures(reading: Reading) -> list[dict[str, Any]]:
    """Training sites merged, then the held-out sites."""
    say = reading.say
    wheres = [(say("roc.training"), reading.training, False)]
    if reading.held_out:
        wheres.append(
            (
                say("roc.unseen", sites=reading.listing([reading.name(site) for site in reading.held_out])),
                reading.held_out,
                True,
            )
        )
    return [
        {
            "title": heading,
            "held_out": unseen,
            "figure": figures.roc(
                [_roc_panel(reading, sites, artifact, unseen) for artifact in reading.artifacts],
                say("roc.alt", where=heading),
            ),
            "above": [line for artifact in reading.artifacts for line in _above(reading, sites, artifact)]
            if len(sites) > 1
            else [],
        }
        for heading, sites, unseen in wheres
    ]


def _above(reading: Reading, sites: list[str], artifact: str) -> list[str]:
    """The curves of merged counts that lie above the curve of every site that is in them: a pooled AUROC of
    hospitals whose prevalences and scores differ is no AUROC of any of them.
    """
    found, place = [], reading.number(artifact)
    for arm in reading.arms:
        scored = [
            (site, model)
            for site in sites
            if reading.is_scored(site)
            and site not in reading.noised
            and (model := reading.model_at(arm, site))
        ]
        each = [reading.counts(site, model) for site, model in scored]
        at_sites = [value for counts in each if np.isfinite(value := float(counts.auroc()[place]))]
        merged = sum_of(each).auroc()[place] if each else np.nan
        if len(at_sites) > 1 and merged > max(at_sites):
            found.append(
                reading.say(
                    "roc.above",
                    artifact=reading.with_modality(artifact),
                    arm=reading.label(arm),
                    merged=score(float(merged)),
                    low=score(min(at_sites)),
                    high=score(max(at_sites)),
                )
            )
    return found


def sum_of(counts: list[Counts]) -> Counts:
    """All counts added up."""
    return functools.reduce(Counts.merge, counts)


def _roc_panel(reading: Reading, sites: list[str], artifact: str, unseen: bool) -> figures.RocPanel:
    lines, sizes, place = [], [0, 0], reading.number(artifact)
    scored = [site for site in sites if reading.is_scored(site) and site not in reading.noised]
    for model in reading.models if unseen else reading.arms:
        merged = Counts.empty(len(reading.outputs))
        for site in scored:
            if used := model if unseen else reading.model_at(model, site):
                merged = merged.merge(reading.counts(site, used))
        sizes = [max(sizes[0], int(merged.n_pos[place])), max(sizes[1], int(merged.n_neg[place]))]
        if np.isfinite(merged.auroc()[place]):
            fpr, tpr = merged.roc(place)
            points = list(zip(fpr.tolist(), tpr.tolist(), strict=True))
            lines.append(figures.RocLine(model=model, label=reading.label(model), points=points))
    return figures.RocPanel(
        title=reading.with_modality(artifact),
        note=f"n {sizes[0]} / {sizes[1]}",
        missing=reading.say("missing.not_estimable" if any(sizes) else "missing.n0"),
        lines=lines,
    )


def curve_figure(reading: Reading) -> Markup | None:
    recorded = reading.evaluation["curves"]
    if not recorded:
        return None
    panels = [
        (
            reading.say(f"curves.{quantity}"),
            CURVE_SPANS[quantity],
            [
                figures.Curve(
                    model=model,
                    label=reading.label(model),
                    points=[
                        (point["round"], value) for point in points if (value := point[quantity]) is not None
                    ],
                )
                for model, points in recorded.items()
            ],
        )
        for quantity in CURVE_SPANS
    ]
    return figures.curves(panels, reading.say("curves.alt"), reading.say("curves.round"))


def curve_rows(reading: Reading) -> list[tuple[str, list[dict[str, str]]]]:
    """Model -> a row a round: loss and score."""
    return [
        (
            model,
            [
                {"round": str(point["round"])}
                | {
                    quantity: "–" if (value := point[quantity]) is None else score(value)
                    for quantity in ("loss", "auroc")
                }
                for point in points
            ],
        )
        for model, points in reading.evaluation["curves"].items()
    ]


# where it comes from


def provenance(reading: Reading, manifest: Mapping[str, Any], plan: RunPlan) -> list[tuple[str, str]]:
    say, evaluation = reading.say, reading.evaluation
    return [
        (say("provenance.run"), evaluation["run"]),
        (say("provenance.plan"), evaluation["plan"]),
        (say("provenance.plan_sha256"), manifest["plan_sha256"]),
        (say("provenance.initial_sha256"), manifest["initial_sha256"] or say("provenance.not_stated")),
        *([(say("provenance.labels"), say("labels.injected"))] if evaluation.get("labels") else []),
        (say("provenance.seed"), str(evaluation["seed"])),
        (say("provenance.rounds"), f"{evaluation['rounds']}, {evaluation['epochs']}"),
        (say("provenance.threads"), str(manifest["threads"])),
        (
            say("provenance.versions"),
            ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
        ),
        (say("provenance.cpu"), plain(evaluation["cpu_seconds"])),
        (say("provenance.wall"), plain(evaluation["seconds"])),
    ]


def settings(plan: RunPlan, say: Say) -> list[tuple[str, str]]:
    """Every setting of the plan by dotted name, without any path."""
    rows: list[tuple[str, str]] = []
    for key, value in plan.model_dump(mode="json").items():
        for name, leaf in (
            {f"{key}.{inner}": leaf for inner, leaf in value.items()}.items()
            if isinstance(value, dict)
            else [(key, value)]
        ):
            rows.append(
                (
                    name,
                    ", ".join(map(str, leaf))
                    if isinstance(leaf, list)
                    else "–"
                    if leaf in (None, "")
                    else str(leaf),
                )
            )
    initial, hidden = plan.model.initial, {}
    if not initial.startswith("package:") and initial != "random":
        hidden["model.initial"] = say("provenance.file")
    if plan.public_set.file is not None:
        hidden["public_set.file"] = say("provenance.file")
    return [(name, hidden.get(name, value)) for name, value in rows]
