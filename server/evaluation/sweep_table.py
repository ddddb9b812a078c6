"""The table of a sweep: each setting's mean over seeds, its difference from the first, and how many patients
would decide it.

All runs of a sweep score the same test patients, and `server.evaluation.compare` gives the interval over
patients and seeds. A difference of two settings is taken seed by seed; the errors that come from the patients
add as if independent, because runs keep no scores of patients. On the same patients they are correlated, so
that intervals and numbers of patients are upper bounds.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from scipy.stats import norm, t

from common.arms import ARMS, FINAL_ARMS, PUBLIC
from common.artifacts import ARTIFACTS, MODALITIES
from common.errors import DataError
from common.files import write_bytes
from server.evaluation.compare import (
    compare_runs,
    held_out_sites,
    pooled,
    pooled_scores,
    same_artifacts,
    training_sites,
)
from server.evaluation.inference import holm, two_sided
from server.evaluation.sweep_plot import forest_png, roc_png
from server.evaluation_file import Evaluation, Interval, Score
from server.run_folder import RunFolder, write_json

RESULTS, MARKDOWN, CSV, PLOT, ROC, PAGE = (
    "results.json",
    "table.md",
    "table.csv",
    "plot.png",
    "roc.png",
    "report.html",
)
POWER, LEVEL = 0.8, 0.95
RELEVANT = 0.05
"""Difference of macro AUROC for which the table says how many patients would show it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the grid and its runs, one a seed."""

    number: int
    labels: Mapping[str, str]  # plan key -> how its value is called
    runs: Sequence[RunFolder]

    @property
    def words(self) -> str:
        return ", ".join(f"{key} {label}" for key, label in self.labels.items())


def to_decide(
    difference: float, standard_error: float, deviation: float, *, patients: int
) -> tuple[int, int] | None:
    """Test patients and seeds with which a true difference of this size would be found with power 0.8 at the
    two-sided level 0.05, where patients and seeds each take half of the variance that this permits.

    n = 2 (z_.975 + z_.8)^2 s^2 / d^2, s^2 the variance of one patient, or of one seed.

    Args:
        difference: of two settings.
        standard_error: of the difference, from `patients` test patients.
        deviation: standard deviation of the difference over seeds; nan: of one seed, which tells nothing.
    Returns:
        None where a number is missing, or the difference is 0, which no number decides.
    """
    if not (difference and math.isfinite(difference) and math.isfinite(standard_error)):
        return None
    factor = 2 * (norm.ppf(0.5 + LEVEL / 2) + norm.ppf(POWER)) ** 2 / difference**2
    seeds = 1.0 if math.isnan(deviation) else factor * deviation**2
    return math.ceil(factor * standard_error**2 * patients), max(2, math.ceil(seeds))


def sweep_results(name: str, question: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """What a sweep found, ready for JSON.

    Returns:
        `rows`, one a setting, arm and place (`home`; `unseen` where sites were held out): `labels`, `value`,
        `low`, `high`, `deviation` over seeds, `per_seed`, `patients`, and `against_first`: difference from
        the first setting with interval, `verdict` (better, worse, undecided; after Holm's correction over the
        `looks` differences of the table), the same over seeds alone
        (`on_these_patients`), and the patients and seeds that would decide it, or a difference of 0.05.
    Raises:
        DataError: the runs of the sweep did not score the same test patients (code `data-changed`).
    """
    evaluations = [[run.evaluation for run in setting.runs] for setting in settings]
    first = evaluations[0]
    rows: list[dict[str, Any]] = []
    for setting, own in zip(settings, evaluations, strict=True):
        _check_patients(setting)
        for arm in own[0]["arms"]:
            for where in ("home", "unseen"):
                row = _row(own, arm, where)
                if row is not None and not _is_known(rows, arm, where, row):
                    rows.append(
                        {
                            "setting": setting.number,
                            "labels": dict(setting.labels),
                            "arm": arm,
                            "where": where,
                        }
                        | row
                        | {
                            "against_first": None
                            if own is first
                            else against(own, first, arm, where, patients=row["patients"])
                        }
                    )
    looks = _correct(rows)
    return {
        "name": name,
        "question": question,
        "looks": looks,
        "seeds": [evaluation["seed"] for evaluation in first],
        "partial": any(evaluation["status"] == "partial" for own in evaluations for evaluation in own),
        "cpu_seconds": round(sum(evaluation["cpu_seconds"] for own in evaluations for evaluation in own), 1),
        "runs": sum(map(len, evaluations)),
        "private_arms": sorted({arm for own in evaluations for one in own for arm in one["private_arms"]}),
        "rows": rows,
    }


def _is_known(rows: Sequence[Mapping[str, Any]], arm: str, where: str, row: Mapping[str, Any]) -> bool:
    """Whether an arm that is not trained stands in the table already, with the same values."""
    return not ARMS[arm].is_trained and any(
        (known["arm"], known["where"], known["per_seed"]) == (arm, where, row["per_seed"]) for known in rows
    )


def _check_patients(setting: Setting) -> None:
    if len(setting.runs) > 1 and not compare_runs(setting.runs)["same_test_patients"]:
        raise DataError(
            f"{setting.words}: its runs scored different test patients: the data changed during the sweep",
            code="data-changed",
            hint="run the sweep anew into another folder",
        )


def _correct(rows: Sequence[Mapping[str, Any]]) -> int:
    """Holm's correction over all differences from the first setting: add `p_holm`, and take back a verdict
    that it does not let stand; gives their number.
    """
    against_first = [row["against_first"] for row in rows if row["against_first"] is not None]
    adjusted = holm([found["p"] for found in against_first])
    for found, p in zip(against_first, adjusted, strict=True):
        found["p_holm"] = p
        if not p < 1 - LEVEL:
            found["verdict"] = "undecided"
    return sum(not math.isnan(p) for p in adjusted)


def _estimates(own: Sequence[Evaluation], arm: str, where: str) -> list[Score] | None:
    found = [evaluation["scores"].get(arm, {}).get(where) for evaluation in own]
    known = [one for one in found if one is not None and one["value"] is not None]
    return known if len(known) == len(found) else None


def _row(own: Sequence[Evaluation], arm: str, where: str) -> dict[str, Any] | None:
    found = _estimates(own, arm, where)
    if found is None:
        return None
    values = [value for one in found if (value := one["value"]) is not None]
    one = found[0]
    single = {"value": one["value"], "low": one["low"], "high": one["high"]}
    interval = pooled_scores(found) if len(found) > 1 else single
    return {key: interval[key] for key in ("value", "low", "high")} | {
        "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        "per_seed": values,
        "patients": _patients(own[0], arm, where),
    }


def _patients(evaluation: Evaluation, arm: str, where: str) -> int | None:
    """Test patients at a place: of each modality as many as had its most often assessed artifact; None where
    noise hides them.
    """
    sites = held_out_sites(evaluation) if where == "unseen" else training_sites(evaluation)
    total = 0
    for site in sites:
        at_site = evaluation["metrics"][arm].get(site, {})
        for modality in MODALITIES:
            most = 0
            for one in ARTIFACTS:
                if modality not in one.modalities or one.name not in at_site:
                    continue
                n_pos, n_neg = at_site[one.name]["n_pos"], at_site[one.name]["n_neg"]
                if n_pos is None or n_neg is None:
                    return None
                most = max(most, n_pos + n_neg)
            total += most
    return total


def against(
    own: Sequence[Evaluation],
    first: Sequence[Evaluation],
    arm: str,
    where: str,
    *,
    patients: int | None,
) -> dict[str, Any] | None:
    """The difference of a setting from the first, seed by seed, as `against_first` of `sweep_results`.

    Args:
        own, first: evaluations of both, one a seed, in the same order.
        patients: that were scored; None where noise hides it.
    Returns:
        None where either has no score there, or they average other sites or artifacts.
    """
    mine, theirs = _estimates(own, arm, where), _estimates(first, arm, where)
    sites_of = held_out_sites if where == "unseen" else training_sites
    sites = sites_of(first[0])
    if mine is None or theirs is None or any(sites_of(one) != sites for one in (*own, *first)):
        return None
    if not same_artifacts([*first, *own], sites):
        return None
    values = [(a["value"] or 0.0) - (b["value"] or 0.0) for a, b in zip(mine, theirs, strict=True)]
    errors = [
        math.hypot(*(math.nan if one["standard_error"] is None else one["standard_error"] for one in pair))
        for pair in zip(mine, theirs, strict=True)
    ]
    pairs: list[Interval] = [
        {"value": value, "low": None, "high": None, "standard_error": one}
        for value, one in zip(values, errors, strict=True)
    ]
    error = float(np.mean(errors))
    if len(pairs) > 1:
        found = pooled(pairs)
        deviation = float(np.std(values, ddof=1))
        by_seeds = float(t.ppf(0.5 + LEVEL / 2, len(pairs) - 1)) * deviation / math.sqrt(len(pairs))
    else:
        half = float(norm.ppf(0.5 + LEVEL / 2)) * error
        found = {"value": values[0], "low": values[0] - half, "high": values[0] + half}
        found["p"] = two_sided(values[0], error)
        deviation = by_seeds = math.nan
    needed = None if patients is None else to_decide(found["value"], error, deviation, patients=patients)
    relevant = None if patients is None else to_decide(RELEVANT, error, deviation, patients=patients)
    return {
        **{key: found[key] for key in ("value", "low", "high", "p")},
        "deviation": deviation,
        "per_seed": values,
        "verdict": _verdict(found["low"], found["high"]),
        "on_these_patients": _verdict(found["value"] - by_seeds, found["value"] + by_seeds),
        "decided_by": needed,
        "relevant_decided_by": relevant,
    }


def _verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


# files


def write_results(out: Path, name: str, question: str, settings: Sequence[Setting]) -> dict[str, Any]:
    """Write table, figures and page of a sweep into its folder; gives `sweep_results`."""
    results = sweep_results(name, question, settings)
    arm, where = _shown(results)
    write_json(out / RESULTS, results)
    write_bytes(out / MARKDOWN, (markdown(results) + "\n").encode())
    write_bytes(out / CSV, _csv(results).encode())
    groups = [
        (setting.words, [row for row in results["rows"] if row["setting"] == setting.number])
        for setting in settings
    ]
    axis = f"macro AUROC, {where}; mean and 95 % interval over patients and seeds; dots: seeds"
    plot = forest_png(
        [(words, [row for row in rows if row["where"] == where]) for words, rows in groups], name, axis
    )
    write_bytes(out / PLOT, plot)
    roc = roc_png([(setting.words, setting.runs) for setting in settings], arm, where)
    if roc is None:
        (out / ROC).unlink(missing_ok=True)
    else:
        write_bytes(out / ROC, roc)
    write_bytes(out / PAGE, _page(results, plot, roc).encode())
    return results


def _shown(results: Mapping[str, Any]) -> tuple[str, str]:
    """The arm and the place that figures show: whose model a run hands on; unseen sites where there are."""
    arms = dict.fromkeys(row["arm"] for row in results["rows"])
    arm = next((one for one in FINAL_ARMS if one in arms), next(reversed(arms), PUBLIC))
    places = {row["where"] for row in results["rows"]}
    return arm, "unseen" if "unseen" in places else "home"


HEAD = (
    "arm",
    "where",
    "mean",
    "SD over seeds",
    "95 % interval",
    "test patients",
    "less the first",
    "95 % interval",
    "verdict",
    "on these patients",
    "would decide it",
    f"would decide {RELEVANT:g}",
)


def _cells(row: Mapping[str, Any]) -> list[str]:
    against = row["against_first"]
    return [
        *row["labels"].values(),
        row["arm"],
        row["where"],
        _number(row["value"]),
        _number(row["deviation"]),
        f"{_number(row['low'])} to {_number(row['high'])}",
        "hidden by noise" if row["patients"] is None else str(row["patients"]),
        *(
            ["-"] * 6
            if against is None
            else [
                _number(against["value"], signed=True),
                f"{_number(against['low'], signed=True)} to {_number(against['high'], signed=True)}",
                against["verdict"],
                against["on_these_patients"],
                _needed(against["decided_by"]),
                _needed(against["relevant_decided_by"]),
            ]
        ),
    ]


def _table(results: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows, as text."""
    rows = results["rows"]
    return [[*(rows[0]["labels"] if rows else ()), *HEAD], *map(_cells, rows)]


def markdown(results: Mapping[str, Any]) -> str:
    """The table with what it means, as Markdown."""
    head, *rows = _table(results)
    return "\n".join(
        [
            f"**{results['name']}**: {results['question']}".rstrip(": "),
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            _note(results),
        ]
    )


def results_table(results: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    table = _table(results)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join([*lines, "", _note(results)])


def _note(results: Mapping[str, Any]) -> str:
    private = ", ".join(results["private_arms"])
    return (
        f"Macro AUROC. {results['runs']} runs, seeds {', '.join(map(str, results['seeds']))}, "
        f"{results['cpu_seconds'] / 60:.1f} CPU-min. Verdicts after Holm's correction for "
        f"{results['looks']} differences. On these patients: from seeds alone, uncorrected, says nothing of "
        "others. Would decide: test patients and seeds for power 0.8 at level 0.05, an upper bound, as "
        "errors of the same patients are taken as independent. "
        + (
            f"Private arms: {private}; the epsilon of each run is its own."
            if private
            else "No run is private."
        )
    )


def _csv(results: Mapping[str, Any]) -> str:
    """One line a row, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = list(results["rows"][0]["labels"]) if results["rows"] else []
    numbers = ("value", "deviation", "low", "high", "patients")
    writer.writerow(
        [
            *keys,
            "arm",
            "where",
            *numbers,
            "seeds",
            "difference",
            "difference_low",
            "difference_high",
            "verdict",
            "on_these_patients",
        ]
        + [f"{what}_{of}" for of in ("decide", f"decide_{RELEVANT:g}") for what in ("patients", "seeds")]
    )
    for row in results["rows"]:
        against = row["against_first"] or {}
        writer.writerow(
            [
                *row["labels"].values(),
                row["arm"],
                row["where"],
                *(_plain(row[key]) for key in numbers),
                len(row["per_seed"]),
                *(
                    _plain(against.get(key))
                    for key in ("value", "low", "high", "verdict", "on_these_patients")
                ),
                *(against.get("decided_by") or ("", "")),
                *(against.get("relevant_decided_by") or ("", "")),
            ]
        )
    return text.getvalue()


def _page(results: Mapping[str, Any], plot: bytes, roc: bytes | None) -> str:
    """One page that needs no network."""
    head, *rows = _table(results)
    row = Markup("<tr>{}</tr>")
    figures = [(plot, "Scores of the settings")] + ([(roc, "ROC curves of the settings")] if roc else [])
    return str(
        Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
            "<style>body{{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem}}"
            "table{{border-collapse:collapse;font-size:14px}}td,th{{padding:.2rem .6rem;text-align:left;"
            "border-bottom:1px solid #d9d9d9}}img{{max-width:100%}}.wide{{overflow-x:auto}}</style>"
            '<h1>{name}</h1><p>{question}</p>{figures}<div class="wide"><table>{head}{body}</table></div>'
            "<p>{note}</p></html>\n"
        ).format(
            name=results["name"],
            question=results["question"],
            figures=Markup("").join(
                Markup('<p><img src="data:image/png;base64,{}" alt="{}"></p>').format(
                    base64.b64encode(image).decode(), alt
                )
                for image, alt in figures
            ),
            head=row.format(Markup("").join(Markup("<th>{}</th>").format(text) for text in head)),
            body=Markup("").join(
                row.format(Markup("").join(Markup("<td>{}</td>").format(text) for text in cells))
                for cells in rows
            ),
            note=_note(results),
        )
    )


def _plain(value: object) -> object:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _number(value: float | None, *, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _needed(found: tuple[int, int] | None) -> str:
    """Patients to two digits, as they are an estimate."""
    if found is None:
        return "-"
    patients, seeds = found
    rounded = float(f"{patients:.1e}") if patients >= 100 else patients
    return "over a million patients" if rounded > 1e6 else f"{rounded:.0f} patients, {seeds} seeds"
