"""Compare several runs: pool the seeds of one plan; set different plans against the first.

Seeds of one plan score the same test patients. Then the errors that come from the patients are alike in every
run and do not average out, while those that come from training do:

    half-width = sqrt((z * mean standard error)^2 + (t_{S-1} * sd over seeds / sqrt(S))^2)

The first term is the conservative bound of perfect correlation over seeds. Of differences this is on the
scale of AUROC, of scores on the logit scale, each seed with its own logit. The p value of a difference is
the level at which its interval would touch zero, and Holm's correction runs over all differences at the
overall places and over all at single sites. Runs whose macro scores average other artifacts are not
compared. Runs of different plans, or on different test patients, share nothing that this file could use:
their standard errors add as if independent, and the result says `paired: false`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from common.arms import ARMS
from common.errors import ConfigError
from common.plan import CHOSEN
from common.privacy import epsilon_text
from server.evaluation.inference import LEVEL, expit, holm, two_sided
from server.evaluation.tables import noised_sites
from server.evaluation_file import Evaluation, Interval, Score
from server.run_folder import RunFolder, without_nan

PLACES = ("home", "elsewhere", "unseen")


def compare_runs(folders: Sequence[RunFolder]) -> dict[str, Any]:
    """What several runs say together, ready for JSON.

    Args:
        folders: two or more finished runs; the first is what others are set against when their plans differ.
    Returns:
        `runs`; `kind`: `seeds` or `plans`; `plan_differs`: dotted plan keys; `contrasts`: arm, other, where,
        value, low, high, paired and `per_seed` or `runs`; `scores`: arm -> where -> value, low, high and
        `per_seed` (of kind `plans` a list, an entry a run). Of kind `seeds` also `below_zero`: for each pair
        of arms the training sites whose pooled difference is below zero.
    Raises:
        ConfigError: fewer than two runs (`too-few-runs`), one run or seed named twice (`same-run`), one
            without an evaluation (`not-finished`).
    """
    if len(folders) < 2:
        raise ConfigError(
            f"{len(folders)} run named, comparing needs at least two",
            code="too-few-runs",
            hint="fedqc compare RUN RUN ...",
        )
    evaluations = [folder.evaluation for folder in folders]
    _refuse_repeats([evaluation["run"] for evaluation in evaluations])
    differs = plan_differences(folders)
    same_patients = all(
        patient_numbers(evaluation) == patient_numbers(evaluations[0]) for evaluation in evaluations
    )
    result: dict[str, Any] = {
        "runs": [about(evaluation) for evaluation in evaluations],
        "plan_differs": differs,
        "same_test_patients": same_patients,
    }
    if not differs and same_patients:
        _refuse_repeats([f"seed {evaluation['seed']}" for evaluation in evaluations])
        result |= {"kind": "seeds"} | pool_seeds(evaluations)
    else:
        result |= {"kind": "plans"} | set_against_first(evaluations)
    found: dict[str, Any] = without_nan(result)
    return found


def _refuse_repeats(names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"{repeated[0]}: named twice",
            code="same-run",
            hint="fedqc simulate PLAN --seed N makes another run",
        )


def plan_differences(folders: Sequence[RunFolder]) -> list[str]:
    """Dotted keys, apart from `seed`, in which the plans differ. Settings that `auto` found for each seed by
    itself are no difference: the same was asked.
    """
    plans = [dict(_leaves(folder.plan.model_dump(mode="json", exclude={"seed"}))) for folder in folders]
    keys = dict.fromkeys(key for plan in plans for key in plan)
    different = [key for key in keys if any(plan.get(key) != plans[0].get(key) for plan in plans)]
    if all(str(plan.get("privacy.origin", "")).startswith("auto:") for plan in plans):
        found = {f"privacy.{key}" for key in (*CHOSEN, "noise_multiplier", "origin")}
        return [key for key in different if key not in found]
    return different


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def patient_numbers(evaluation: Evaluation) -> dict[str, dict[str, tuple[int | None, int | None]]]:
    """site -> artifact -> patients with and without it; (None, None) where noise hides them. Equal numbers do
    not prove equal patients; unequal ones disprove it.
    """
    first = next(iter(evaluation["matrix"].values()), {})
    return {
        site: {name: (rows["n_pos"], rows["n_neg"]) for name, rows in at_site.items()}
        for site, at_site in first.items()
    }


def about(evaluation: Evaluation) -> dict[str, Any]:
    """Who a run is, and what stands beside its private scores."""
    found = dict(evaluation)
    return {
        **{key: found[key] for key in ("run", "plan", "seed", "status", "private_arms", "incomplete")},
        "privacy": {
            site: {key: dict(claim)[key] for key in ("epsilon", "delta", "unit", "adjacency", "refused")}
            | ({"void": claim["void"]} if claim.get("void") else {})
            for site, claim in evaluation["privacy"].items()
        },
        "noised": noised_sites(evaluation),
    }


# seeds of one plan


def pool_seeds(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Means over seeds of every contrast and score that all runs have, over the same artifacts."""
    tables = [
        {(row["arm"], row["other"], row["where"]): row for row in evaluation["contrasts"]}
        for evaluation in evaluations
    ]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    alike = same_artifacts(evaluations)
    contrasts = [
        {"arm": arm, "other": other, "where": where, "paired": True}
        | pooled([table[arm, other, where] if alike else NOTHING for table in tables])
        for arm, other, where in shared
    ]
    scores = {
        arm: {
            where: pooled_scores(
                [evaluation["scores"][arm][where] if alike else NO_SCORE for evaluation in evaluations]
            )
            for where in places
        }
        for arm, places in evaluations[0]["scores"].items()
        if all(arm in evaluation["scores"] for evaluation in evaluations)
    }
    looks = corrected(contrasts)
    return {
        "contrasts": contrasts,
        "looks": looks,
        "scores": scores,
        "below_zero": below_zero(contrasts, training_sites(evaluations[0])),
    }


NOTHING: Interval = {"value": None, "low": None, "high": None, "standard_error": None}
NO_SCORE: Score = {**NOTHING, "logit": None, "logit_standard_error": None}


def same_artifacts(evaluations: Sequence[Evaluation], sites: Sequence[str] | None = None) -> bool:
    """Whether all runs average the same artifacts at each site, or at each of some.

    Args:
        sites: None: all sites of the first run.
    """
    averaged = [evaluation["averaged"] for evaluation in evaluations]
    return all(
        set(found.get(site, ())) == set(averaged[0].get(site, ()))
        for site in (averaged[0] if sites is None else sites)
        for found in averaged[1:]
    )


def corrected(contrasts: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Add `family` and `p_holm` to differences that have a `p`; gives the number of looks of each family."""
    looks = {}
    for family in ("overall", "sites"):
        rows = [row for row in contrasts if (row["where"] in PLACES) == (family == "overall")]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row |= {"family": family, "p_holm": p}
        looks[family] = sum(not math.isnan(row["p"]) for row in rows)
    return looks


def pooled(estimates: Sequence[Interval]) -> dict[str, Any]:
    """The mean difference over seeds with its 95 % interval; nan where a seed has no value or no standard
    error.

    Args:
        estimates: one a seed, each with `value` and `standard_error`, all on the same test patients.
    """
    values = np.array([_number(estimate["value"]) for estimate in estimates])
    patient = float(np.mean([_number(estimate["standard_error"]) for estimate in estimates]))
    value, half = float(values.mean()), _half_width(values, patient, 1 - LEVEL)
    return {
        "value": value,
        "low": value - half,
        "high": value + half,
        "p": _p_value(values, patient),
        "per_seed": values,
    }


def pooled_scores(scores: Sequence[Score]) -> dict[str, Any]:
    """The mean score over seeds; its 95 % interval is `pooled` on the logit scale, and holds the mean."""
    values = np.array([_number(score["value"]) for score in scores])
    logits = np.array([_number(score["logit"]) for score in scores])
    patient = float(np.mean([_number(score["logit_standard_error"]) for score in scores]))
    half, middle = _half_width(logits, patient, 1 - LEVEL), float(logits.mean())
    value, low, high = float(values.mean()), expit(middle - half), expit(middle + half)
    if math.isnan(value) or math.isnan(low):
        low = high = math.nan
    else:
        low, high = min(low, value), max(high, value)
    return {"value": value, "low": low, "high": high, "per_seed": values}


def _half_width(values: np.ndarray, patient: float, alpha: float) -> float:
    """Half of the interval of level 1 - alpha."""
    count = len(values)
    seed = float(t.ppf(1 - alpha / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return math.hypot(float(norm.ppf(1 - alpha / 2)) * patient, seed)


def _p_value(values: np.ndarray, patient: float) -> float:
    """The alpha whose interval just touches zero, by bisection; nan where there is no interval."""
    mean = abs(float(values.mean()))
    if not math.isfinite(_half_width(values, patient, 0.5)):
        return math.nan
    if _half_width(values, patient, 0.5) == 0:
        return two_sided(mean, 0.0)
    low, high = 1e-15, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _half_width(values, patient, middle) > mean else (low, middle)
    return high


def below_zero(contrasts: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> list[dict[str, Any]]:
    """For each pair of arms, the sites where the first one does worse: on average, and after Holm's
    correction.
    """
    pairs = dict.fromkeys((row["arm"], row["other"]) for row in contrasts)
    found = []
    for arm, other in pairs:
        here = [
            row for row in contrasts if (row["arm"], row["other"]) == (arm, other) and row["where"] in sites
        ]
        found.append(
            {
                "arm": arm,
                "other": other,
                "sites": [row["where"] for row in here if row["value"] < 0],
                "excluding_zero": [
                    row["where"] for row in here if row["high"] < 0 and row["p_holm"] < 1 - LEVEL
                ],
                "of": sum(bool(np.isfinite(row["value"])) for row in here),
            }
        )
    return found


# different plans


def set_against_first(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Every arm and place of each later run less that of the first, where both mean the same sites; errors as
    if independent. No value where the two average different artifacts.
    """
    first = evaluations[0]
    contrasts: list[dict[str, Any]] = []
    for number, evaluation in enumerate(evaluations[1:], start=1):
        for arm in (arm for arm in ARMS if arm in first["scores"] and arm in evaluation["scores"]):
            for where in comparable_places(first, evaluation):
                row = {"arm": arm, "other": arm, "where": where, "paired": False, "runs": [number, 0]}
                if not same_artifacts([first, evaluation], _sites_of(first, where)):
                    contrasts.append(row | {"artifacts_differ": True} | unpaired(NOTHING, NOTHING))
                    continue
                pair = evaluation["scores"][arm][where], first["scores"][arm][where]
                if where == "elsewhere" and None in (pair[0]["value"], pair[1]["value"]):
                    continue
                contrasts.append(row | unpaired(*pair))
    looks = corrected(contrasts)
    arms = [arm for arm in ARMS if any(arm in evaluation["scores"] for evaluation in evaluations)]
    places = list(
        dict.fromkeys(
            where for evaluation in evaluations for arm in evaluation["scores"].values() for where in arm
        )
    )
    scores = {
        arm: {where: [_bounds(evaluation, arm, where) for evaluation in evaluations] for where in places}
        for arm in arms
    }
    return {"contrasts": contrasts, "looks": looks, "scores": scores}


def _sites_of(evaluation: Evaluation, where: str) -> list[str]:
    """The sites that a place averages over."""
    if where == "unseen":
        return held_out_sites(evaluation)
    return training_sites(evaluation) if where in PLACES else [where]


def comparable_places(first: Evaluation, second: Evaluation) -> list[str]:
    """Means only over the same sites, and sites of the same name and role."""
    training = [training_sites(evaluation, scored=True) for evaluation in (first, second)]
    held_out = [held_out_sites(evaluation) for evaluation in (first, second)]
    places = ["home", "elsewhere"] if set(training[0]) == set(training[1]) else []
    if held_out[0] and set(held_out[0]) == set(held_out[1]):
        places.append("unseen")
    return places + [site for sites in (training, held_out) for site in sites[0] if site in sites[1]]


def unpaired(later: Interval, first: Interval) -> dict[str, float]:
    """The difference of two independent estimates with its 95 % interval and p value."""
    value = _number(later["value"]) - _number(first["value"])
    error = math.hypot(_number(later["standard_error"]), _number(first["standard_error"]))
    half = float(norm.ppf(0.5 + LEVEL / 2)) * error
    return {"value": value, "low": value - half, "high": value + half, "p": two_sided(value, error)}


def _bounds(evaluation: Evaluation, arm: str, where: str) -> dict[str, float | None] | None:
    """None where the run has no such arm or place; nulls where it has and could not estimate it."""
    found = evaluation["scores"].get(arm, {}).get(where)
    return {"value": found["value"], "low": found["low"], "high": found["high"]} if found else None


def training_sites(evaluation: Evaluation, *, scored: bool = False) -> list[str]:
    names = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    return [name for name in names if name in evaluation["counts"]] if scored else names


def held_out_sites(evaluation: Evaluation) -> list[str]:
    return [site["site"] for site in evaluation["sites"] if site["role"] == "held_out"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


# for a terminal


def compare_table(result: Mapping[str, Any]) -> str:
    """The comparison in plain lines."""
    lines = [f"[{number}] {_run_line(run)}" for number, run in enumerate(result["runs"])]
    lines += [
        f"[{number}] {site}: {how}"
        for number, run in enumerate(result["runs"])
        for site, how in run["noised"].items()
    ]
    lines += [f"    partial: {line}" for run in result["runs"] for line in run["incomplete"]]
    body = _seeds_lines(result) if result["kind"] == "seeds" else _plans_lines(result)
    return "\n".join([*lines, "", *body])


def _run_line(run: Mapping[str, Any]) -> str:
    return f"{run['run']}: plan {run['plan']}, seed {run['seed']}, {run['status']}, {privacy_line(run)}"


def privacy_line(run: Mapping[str, Any]) -> str:
    """What stands beside a run's private scores."""
    given = [claim for claim in run["privacy"].values() if not claim["refused"]]
    if not run["private_arms"]:
        return "NOT PRIVATE"
    arms, spent = ", ".join(run["private_arms"]), _epsilon(run)
    if not spent:
        void = sorted({claim["void"] for claim in given if claim.get("void")})
        return f"{arms}: NO GUARANTEE{f' ({void[0]})' if void else ''}"
    delta = max(claim["delta"] for claim in given)
    return f"{arms}: epsilon {spent} by site, delta {delta:g}, per {units_of(given)}, {given[0]['adjacency']}"


def units_of(claims: Sequence[Mapping[str, Any]]) -> str:
    """The units of privacy of several sites: `patient`, `study`, or `patient or study`."""
    return " or ".join(sorted({claim["unit"] for claim in claims}))


def _epsilon(*runs: Mapping[str, Any]) -> str:
    """The smallest and largest epsilon of any site, rounded up; empty where one has none."""
    claims = [claim["epsilon"] for run in runs for claim in run["privacy"].values() if not claim["refused"]]
    if not claims or None in claims:
        return ""
    spent = [epsilon_text(epsilon) for epsilon in (min(claims), max(claims))]
    return " to ".join(dict.fromkeys(spent))


def _label(arm: str, *runs: Mapping[str, Any]) -> str:
    """An arm's name, with its epsilon where it is private in any of the runs."""
    private = [run for run in runs if arm in run["private_arms"]]
    if not private:
        return arm
    spent = _epsilon(*private)
    units = units_of([claim for run in private for claim in run["privacy"].values() if not claim["refused"]])
    per = "" if not spent or units == "patient" else f" per {units}"
    return f"{arm} (epsilon {spent or 'NOT BOUNDED'}{per})"


def _seeds_lines(result: Mapping[str, Any]) -> list[str]:
    count = len(result["runs"])
    lines = [f"{count} seeds of one plan, pooled; 95 % intervals over test patients and seeds", ""]
    places = list(dict.fromkeys(where for scores in result["scores"].values() for where in scores))
    lines += _grid(
        ["macro AUROC", *places],
        [
            [_label(arm, *result["runs"]), *(_score(scores.get(where)) for where in places)]
            for arm, scores in result["scores"].items()
        ],
    )
    rows = [
        [
            f"{_label(row['arm'], *result['runs'])} - {row['other']}",
            row["where"],
            *_difference(row),
            "  ".join(_signed(value) for value in row["per_seed"]),
        ]
        for row in result["contrasts"]
    ]
    lines += (
        ["", *_grid(["difference", "where", "mean", "95 % interval", "", "by seed"], rows)] if rows else []
    )
    lines += _looks(result, rows)
    for pair in result["below_zero"]:
        if pair["sites"]:
            below, certain = ", ".join(pair["sites"]), ", ".join(pair["excluding_zero"]) or "none"
            start = (
                f"{pair['arm']} is below {pair['other']} at {len(pair['sites'])} of {pair['of']} "
                "training sites"
            )
            lines.append(f"{start}: {below} (after Holm's correction: {certain})")
        elif pair["of"]:
            lines.append(f"{pair['arm']} is below {pair['other']} at none of {pair['of']} training sites")
    if any(run["private_arms"] for run in result["runs"]):
        lines.append(
            "Each run's epsilon is its own. On the same patients they add up: all of these runs together "
            "cost more than any one."
        )
    return lines


def _plans_lines(result: Mapping[str, Any]) -> list[str]:
    reasons = [f"plans differ in {', '.join(result['plan_differs'])}"] if result["plan_differs"] else []
    reasons += [] if result["same_test_patients"] else ["test patients differ"]
    lines = [f"side by side, NOT PAIRED: {'; '.join(reasons)}", ""]
    numbers = range(len(result["runs"]))
    rows = [
        [_label(arm, *result["runs"]), where, *(_score(found) for found in by_run)]
        for arm, places in result["scores"].items()
        for where, by_run in places.items()
        if where in PLACES
    ]
    lines += _grid(["macro AUROC", "where", *(f"[{number}]" for number in numbers)], rows)
    rows = [
        [
            f"[{row['runs'][0]}] - [{row['runs'][1]}]",
            _label(row["arm"], *result["runs"]),
            row["where"],
            *_difference(row),
        ]
        for row in result["contrasts"]
    ]
    if not rows:
        return [*lines, "", "no arm was scored at the same sites in both, so there is no difference to give"]
    lines += ["", *_grid(["difference", "arm", "where", "value", "95 % interval", ""], rows)]
    return [
        *lines,
        *_looks(result, rows),
        (
            "errors taken as independent: on the same patients these intervals are usually too wide, and a "
            "smaller difference may be real"
        ),
    ]


def _looks(result: Mapping[str, Any], rows: Sequence[object]) -> list[str]:
    if not rows:
        return []
    looks = result["looks"]
    return [
        f"verdicts after Holm's correction: {looks['overall']} differences overall, {looks['sites']} at "
        "single sites; intervals are not corrected"
    ]


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _score(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found["value"] is None:
        return "not estimable"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{max(found['low'], 0):.3f}, {min(found['high'], 1):.3f}]"


def _difference(row: Mapping[str, Any]) -> list[str]:
    if row.get("artifacts_differ"):
        return ["-", "", "averages other artifacts"]
    if row["value"] is None:
        return ["not estimable", "", ""]
    if row["low"] is None or row["high"] is None:
        return [_signed(row["value"]), "not estimable", ""]
    alone = row["low"] > 0 or row["high"] < 0
    holds = row["p_holm"] is not None and row["p_holm"] < 1 - LEVEL
    verdict = "excludes zero" if holds else "excludes zero only alone" if alone else "includes zero"
    return [_signed(row["value"]), f"[{_signed(row['low'])}, {_signed(row['high'])}]", verdict]


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"
