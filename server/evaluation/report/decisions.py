"""What models do at their operating point, and how far their probabilities hold: tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from markupsafe import Markup

from common.any_artifact import ANY
from common.arms import FEDERATED, FEDERATED_DP, LOCAL, POOLED, PUBLIC, is_baseline
from common.counts import hanley_mcneil
from common.i18n import Say
from common.plan import PublicSet
from server.evaluation.inference import Z
from server.evaluation.operating import (
    LEAST_PATIENTS,
    STATED_PREVALENCES,
    Performance,
    Scored,
    Share,
    calibration,
    decision_curve,
    net_benefit_of_all,
)
from server.evaluation.report import figures
from server.evaluation.report.numerals import score
from server.evaluation.report.reading import Reading

LEADS = (FEDERATED, FEDERATED_DP, POOLED, LOCAL, PUBLIC)
"""The arm whose numbers are shown first: of these the first that has a model."""
DRAWN = (PUBLIC, LOCAL, FEDERATED, FEDERATED_DP)
"""Arms with a line in the figures; more are not told apart."""
THRESHOLDS = np.round(np.arange(0.02, 0.801, 0.02), 2)
"""Probabilities of a decision curve."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm, site and artifact that has a number."""

    arm: str
    model: str
    site: str
    artifact: str
    found: Performance


def lead_of(reading: Reading) -> str | None:
    """The arm whose numbers are shown first; None without a model."""
    return next((arm for arm in LEADS if reading.models_of(arm)), None)


def lines_of(reading: Reading, arm: str) -> Iterator[Line]:
    """Every artifact and scored site of an arm, with the model that the site would use; at a held-out site,
    one line for each model of a single site.
    """
    scored = [row["site"] for row in reading.sites if reading.is_scored(row["site"])]
    for artifact in reading.artifacts:
        yield from _lines_at(reading, arm, scored, artifact)


def any_lines(reading: Reading, arm: str) -> Iterator[Line]:
    """The same of any artifact, at the sites that counted it; a baseline has no such score."""
    return _lines_at(reading, arm, [] if is_baseline(arm) else reading.any_sites, ANY)


def _lines_at(reading: Reading, arm: str, sites: Iterable[str], artifact: str) -> Iterator[Line]:
    for site in sites:
        home = reading.model_at(arm, site)
        for model in [home] if home else reading.models_of(arm) if site in reading.held_out else []:
            found = reading.performance(model, site, artifact)
            yield Line(arm=arm, model=model, site=site, artifact=artifact, found=found)


def origin(reading: Reading, settings: PublicSet) -> str:
    """Where the operating points come from."""
    if settings.file is not None:
        return reading.say("operating.origin.file", sha256=(settings.sha256 or "")[:16])
    return reading.say("operating.origin.phantoms", patients=settings.patients, seed=settings.seed)


# tables


def operating_tables(reading: Reading) -> list[dict[str, Any]]:
    """A table an arm, the lead first: by artifact its sites, at the operating point."""
    lead = lead_of(reading)
    arms = [arm for arm in [lead, *(arm for arm in reading.arms if arm != lead)] if arm]
    return [
        {
            "arm": arm,
            "tag": reading.privacy_tag(arm),
            "groups": groups,
            "rows": [row for _, rows in groups for row in rows],
        }
        for arm in arms
        if reading.models_of(arm)
        for groups in [_groups(reading, arm)]
        if groups
    ]


def _groups(reading: Reading, arm: str) -> list[tuple[str, list[dict[str, Any]]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in chain(lines_of(reading, arm), any_lines(reading, arm)):
        if line.found.reason != "n0":
            groups.setdefault(reading.with_modality(line.artifact), []).append(_row(reading, line))
    return list(groups.items())


def _row(reading: Reading, line: Line) -> dict[str, Any]:
    """Texts of a line; a dash where the counts do not allow a number, and a word why."""
    say, found = reading.say, line.found
    name = reading.name(line.site)
    if line.model != line.arm and line.site in reading.held_out:
        name = f"{name}, {line.model.partition('/')[2]}"
    about = "≈ " if line.site in reading.noised else ""
    why = _why(reading, found)
    stated = [found.at(prevalence) for prevalence in STATED_PREVALENCES]
    return {
        "site": name,
        "held_out": line.site in reading.held_out,
        "n": f"{about}{found.n} ({found.positives})",
        "prevalence": _number(found.prevalence),
        "auroc": _number(reading.auroc_row(line.model, line.site, line.artifact)["auroc"]),
        "ap": _number(found.average_precision),
        "sensitivity": _share(found.sensitivity),
        "specificity": _share(found.specificity),
        "precision": _share(found.precision),
        "f1": _number(found.f1),
        "accuracy": _number(found.accuracy),
        "balanced": _number(found.balanced_accuracy),
        "alarms": "–" if found.alarms is None else f"{found.alarms:.1f}",
        "stated": [
            (_number(None if at is None else at[0]), "–" if at is None else f"{at[1]:.1f}") for at in stated
        ],
        "calibration": _calibration(say, found),
        "grey": bool(why),
        "why": why,
    }


def _why(reading: Reading, found: Performance) -> str:
    """Why a row is grey: it has no number, or coarse bins say little."""
    if found.reason in ("no_point", "noise", "one_class"):
        return reading.say(f"operating.{found.reason}")
    return reading.say("crowded") if found.is_crowded else ""


def _calibration(say: Say, found: Performance) -> dict[str, str]:
    own = found.calibration
    if own is None:
        return {"why": say("operating.few", least=LEAST_PATIENTS)}
    return {
        "why": "",
        "slope": f"{own.slope.value:.2f}",
        "slope_interval": f"{own.slope.low:.2f} – {own.slope.high:.2f}",
        "intercept": f"{own.intercept:+.2f}".replace("-", "−"),
        "ece": score(own.ece),
        "brier": score(own.brier),
        "brier_prevalence": score(own.brier_prevalence),
        "note": say("operating.coarse") if found.is_coarse else "",
    }


def point_rows(reading: Reading) -> list[dict[str, str]]:
    """The lead arm's operating points, one row an artifact and number of bins that a site sent."""
    lead, rows = lead_of(reading), []
    if lead is None:
        return []
    kinds = sorted({reading.bins(site["site"]) for site in reading.sites if reading.is_scored(site["site"])})
    for artifact in [*reading.artifacts, *([ANY] if reading.any_sites else [])]:
        model = reading.models_of(lead)[0]
        for bins in reversed(kinds):
            point = reading.point(model, artifact, bins)
            if point is None:
                continue
            rows.append(
                {
                    "artifact": reading.with_modality(artifact),
                    "threshold": "−∞" if point.place == 0 else f"{point.threshold:.2f}".replace("-", "−"),
                    "sensitivity": score(point.sensitivity),
                    "specificity": score(point.specificity),
                    "n": f"{point.positives} / {point.negatives}",
                    "bins": str(bins),
                }
            )
    return rows


def _number(value: float | None) -> str:
    return "–" if value is None else score(value)


def _share(found: Share | None) -> tuple[str, str]:
    """Value and interval."""
    return ("–", "") if found is None else (score(found.value), f"{score(found.low)} – {score(found.high)}")


# figures


def _blocks(reading: Reading) -> list[tuple[str, list[str], bool]]:
    """Heading, sites, and whether they were held out: the training sites together, then those held out; sites
    scored with noise have no curve.
    """
    say = reading.say
    held_out = reading.listing([reading.name(site) for site in reading.held_out])
    blocks = [
        (say("roc.training"), reading.training, False),
        (say("roc.unseen", sites=held_out), reading.held_out, True),
    ]
    return [
        (heading, usable, apart)
        for heading, sites, apart in blocks
        if (usable := [site for site in sites if reading.is_scored(site) and site not in reading.noised])
    ]


def _scored(reading: Reading, arm: str, sites: list[str], artifact: str) -> list[Scored]:
    """The patients of an arm at some sites by their probability, each with the model its site would use."""
    return [
        Scored.of(*_histograms(line.found, reading, line), line.found.point)
        for line in lines_of(reading, arm)
        if line.artifact == artifact and line.site in sites and line.found.point is not None
    ]


def _histograms(found: Performance, reading: Reading, line: Line) -> tuple[np.ndarray, np.ndarray]:
    counts, place = reading.counts(line.site, line.model), reading.number(line.artifact)
    return counts.positives[place], counts.negatives[place]


def calibration_figures(reading: Reading) -> list[dict[str, Any]]:
    """Reliability by artifact: of groups of patients, the share with it over the mean probability."""
    say, blocks = reading.say, []
    for heading, sites, apart in _blocks(reading):
        panels = []
        for artifact in reading.artifacts:
            lines = []
            for arm in DRAWN:
                found = calibration(_scored(reading, arm, sites, artifact))
                if found is not None:
                    points = [(group.predicted, group.observed.value) for group in found.groups]
                    lines.append(_line(reading, arm, points))
            panels.append(
                figures.Panel(
                    title=reading.with_modality(artifact),
                    note=_size(reading, sites, artifact),
                    missing=say("operating.few", least=LEAST_PATIENTS),
                    lines=lines,
                    guides=[figures.Guide(points=[(0, 0), (1, 1)], label=say("calibration.ideal"))],
                )
            )
        alt = say("calibration.alt", where=heading)
        axes = (say("calibration.x"), say("calibration.y"))
        figure = figures.panels(panels, alt, axes, marks=True)
        blocks.append({"title": heading, "figure": figure, "held_out": apart})
    return blocks


def decision_figures(reading: Reading) -> list[dict[str, Any]]:
    """Net benefit over the probability from which on one acts, beside acting on everybody and on nobody."""
    say, blocks = reading.say, []
    for heading, sites, apart in _blocks(reading):
        panels = []
        for artifact in reading.artifacts:
            lines, prevalence = [], 0.0
            for arm in DRAWN:
                parts = _scored(reading, arm, sites, artifact)
                scored = Scored.together(parts)
                if min(scored.positives.sum(), scored.negatives.sum()) < LEAST_PATIENTS:
                    continue
                prevalence = float(scored.positives.sum()) / scored.n
                points = list(
                    zip(THRESHOLDS.tolist(), decision_curve(parts, THRESHOLDS).tolist(), strict=True)
                )
                lines.append(_line(reading, arm, points))
            everybody = list(
                zip(THRESHOLDS.tolist(), net_benefit_of_all(prevalence, THRESHOLDS).tolist(), strict=True)
            )
            guides = [
                figures.Guide(points=everybody, label=say("decision.all")),
                figures.Guide(points=[(0, 0), (1, 0)], label=say("decision.none")),
            ]
            top = max([prevalence, *(y for line in lines for _, y in line.points)], default=0.1)
            panels.append(
                figures.Panel(
                    title=reading.with_modality(artifact),
                    note=_size(reading, sites, artifact),
                    missing=say("operating.few", least=LEAST_PATIENTS),
                    lines=lines,
                    guides=guides if lines else [],
                    x=(0.0, 0.8),
                    y=(-0.25 * top, 1.05 * top) if lines else (0.0, 1.0),
                )
            )
        alt = say("decision.alt", where=heading)
        axes = (say("decision.x"), say("decision.y"))
        figure = figures.panels(panels, alt, axes)
        blocks.append({"title": heading, "figure": figure, "held_out": apart})
    return blocks


def _line(reading: Reading, arm: str, points: list[tuple[float, float]]) -> figures.RocLine:
    return figures.RocLine(model=arm, label=reading.label(arm), points=points)


def _size(reading: Reading, sites: list[str], artifact: str) -> str:
    pairs = [reading.sizes[site][artifact] for site in sites]
    return f"n {sum(pos for pos, _ in pairs)} / {sum(neg for _, neg in pairs)}"


def width_figure(reading: Reading) -> Markup | None:
    """Width of the 95 % interval of each AUROC of the lead arm over the patients of the rarer class, and the
    width that an AUROC of .85 has with two classes of that size.
    """
    lead, places = lead_of(reading), []
    if lead is None:
        return None
    for line in lines_of(reading, lead):
        row = reading.evaluation["matrix"][line.model][line.site][line.artifact]
        low, high = row["low"], row["high"]
        rarer = min(line.found.positives, line.found.n - line.found.positives)
        if low is not None and high is not None and rarer > 0:
            noised = line.site in reading.noised
            places.append((float(rarer), high - low, noised, f"{line.artifact} / {line.site}"))
    if not places:
        return None
    return figures.widths(
        places,
        lead,
        figures.WidthWords(
            alt=reading.say("width.alt"),
            x=reading.say("width.x"),
            y=reading.say("width.y"),
            guide=reading.say("width.guide"),
        ),
        guide=_expected_width,
    )


def _expected_width(each: float) -> float:
    return 2 * Z * float(np.sqrt(hanley_mcneil(0.85, each, each)))
