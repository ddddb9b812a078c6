"""Compare several runs: pool the seeds of one plan; set different plans against the first.

Seeds of one plan score the same test patients. Then the errors that come from the patients are alike in every
run and do not average out, while those that come from training do:

    half-width = sqrt((z * mean standard error)^2 + (t_{S-1} * sd over seeds / sqrt(S))^2)

The first term is the conservative bound of perfect correlation over seeds. Runs of different plans, or on
different test patients, share nothing that this file could use: their standard errors add as if independent,
and the result says `paired: false`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, t

from common.arms import ARMS
from common.errors import ConfigError
from common.privacy import epsilon_text
from server.evaluation.tables import noised_sites
from server.run_folder import RunFolder, without_nan

PLACES = ("home", "elsewhere", "unseen")
Estimate = Mapping[str, float | None]


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
    """Dotted keys, apart from `seed`, in which the plans differ."""
    plans = [dict(_leaves(folder.plan.model_dump(mode="json", exclude={"seed"}))) for folder in folders]
    return [key for key in plans[0] if any(plan[key] != plans[0][key] for plan in plans)]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def patient_numbers(evaluation: Mapping[str, Any]) -> dict[str, dict[str, tuple[int | None, int | None]]]:
    """site -> artifact -> patients with and without it; (None, None) where noise hides them. Equal numbers do
    not prove equal patients; unequal ones disprove it.
    """
    first: Mapping[str, Any] = next(iter(evaluation["matrix"].values()), {})
    return {
        site: {name: (rows["n_pos"], rows["n_neg"]) for name, rows in at_site.items()}
        for site, at_site in first.items()
    }


def about(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Who a run is, and what stands beside its private scores."""
    return {
        **{key: evaluation[key] for key in ("run", "plan", "seed", "status", "private_arms", "incomplete")},
        "privacy": {
            site: {key: claim[key] for key in ("epsilon", "delta", "unit", "adjacency", "refused")}
            | ({"void": claim["void"]} if claim.get("void") else {})
            for site, claim in evaluation["privacy"].items()
        },
        "noised": noised_sites(evaluation),
    }


# seeds of one plan


def pool_seeds(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds of every contrast and score that all runs have."""
    tables = [
        {(row["arm"], row["other"], row["where"]): row for row in evaluation["contrasts"]}
        for evaluation in evaluations
    ]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    contrasts = [
        {"arm": arm, "other": other, "where": where, "paired": True}
        | pooled([table[arm, other, where] for table in tables])
        for arm, other, where in shared
    ]
    scores = {
        arm: {
            where: pooled([evaluation["scores"][arm][where] for evaluation in evaluations])
            for where in places
        }
        for arm, places in evaluations[0]["scores"].items()
        if all(arm in evaluation["scores"] for evaluation in evaluations)
    }
    return {
        "contrasts": contrasts,
        "scores": scores,
        "below_zero": below_zero(contrasts, training_sites(evaluations[0])),
    }


def pooled(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The mean over seeds with its 95 % interval; nan where a seed has no value or no standard error.

    Args:
        estimates: one a seed, each with `value` and `standard_error`, all on the same test patients.
    """
    values = np.array([_number(estimate["value"]) for estimate in estimates])
    patient = float(np.mean([_number(estimate["standard_error"]) for estimate in estimates]))
    count = len(values)
    seed = float(t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count))
    value, half = float(values.mean()), math.hypot(float(norm.ppf(0.975)) * patient, seed)
    return {"value": value, "low": value - half, "high": value + half, "per_seed": values}


def below_zero(contrasts: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> list[dict[str, Any]]:
    """For each pair of arms, the sites where the first one does worse: on average, and with an interval that
    excludes zero.
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
                "excluding_zero": [row["where"] for row in here if row["high"] < 0],
                "of": sum(bool(np.isfinite(row["value"])) for row in here),
            }
        )
    return found


# different plans


def set_against_first(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every arm and place of each later run less that of the first, where both mean the same sites; errors as
    if independent.
    """
    first = evaluations[0]
    contrasts = []
    for number, evaluation in enumerate(evaluations[1:], start=1):
        for arm in (arm for arm in ARMS if arm in first["scores"] and arm in evaluation["scores"]):
            for where in comparable_places(first, evaluation):
                row = {"arm": arm, "other": arm, "where": where, "paired": False, "runs": [number, 0]}
                contrasts.append(
                    row | unpaired(evaluation["scores"][arm][where], first["scores"][arm][where])
                )
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
    return {"contrasts": contrasts, "scores": scores}


def comparable_places(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Means only over the same sites, and sites of the same name and role."""
    training = [training_sites(evaluation, scored=True) for evaluation in (first, second)]
    held_out = [held_out_sites(evaluation) for evaluation in (first, second)]
    places = ["home", "elsewhere"] if set(training[0]) == set(training[1]) else []
    if held_out[0] and set(held_out[0]) == set(held_out[1]):
        places.append("unseen")
    return places + [site for sites in (training, held_out) for site in sites[0] if site in sites[1]]


def unpaired(later: Estimate, first: Estimate) -> dict[str, float]:
    """The difference of two independent estimates with its 95 % interval."""
    value = _number(later["value"]) - _number(first["value"])
    half = float(norm.ppf(0.975)) * math.hypot(
        _number(later["standard_error"]), _number(first["standard_error"])
    )
    return {"value": value, "low": value - half, "high": value + half}


def _bounds(evaluation: Mapping[str, Any], arm: str, where: str) -> dict[str, float | None] | None:
    """None where the run has no such arm or place; nulls where it has and could not estimate it."""
    found = evaluation["scores"].get(arm, {}).get(where)
    return {key: found[key] for key in ("value", "low", "high")} if found else None


def training_sites(evaluation: Mapping[str, Any], *, scored: bool = False) -> list[str]:
    names = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    return [name for name in names if name in evaluation["counts"]] if scored else names


def held_out_sites(evaluation: Mapping[str, Any]) -> list[str]:
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
    for pair in result["below_zero"]:
        if pair["sites"]:
            below, certain = ", ".join(pair["sites"]), ", ".join(pair["excluding_zero"]) or "none"
            start = (
                f"{pair['arm']} is below {pair['other']} at {len(pair['sites'])} of {pair['of']} "
                "training sites"
            )
            lines.append(f"{start}: {below} (interval excludes zero: {certain})")
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
        (
            "errors taken as independent: on the same patients these intervals are usually too wide, and a "
            "smaller difference may be real"
        ),
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
    if row["value"] is None:
        return ["not estimable", "", ""]
    if row["low"] is None or row["high"] is None:
        return [_signed(row["value"]), "not estimable", ""]
    verdict = "excludes zero" if row["low"] > 0 or row["high"] < 0 else "includes zero"
    return [_signed(row["value"]), f"[{_signed(row['low'])}, {_signed(row['high'])}]", verdict]


def _signed(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"
