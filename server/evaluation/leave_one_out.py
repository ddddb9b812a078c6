"""Runs of one plan that hold out another hospital each: how models do at hospitals that they never saw.

The runs of a family differ in `held_out` and seed alone. Each hospital of it is held out once by itself; runs
that hold out none give the scores at home, and runs that hold out two (all pairs) what a jackknife over
hospitals needs. Hospitals are the sample: intervals are over them, not over their patients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.arms import ARMS
from common.artifacts import NAMES
from common.errors import ConfigError, DataError
from common.leave_one_out import together_epsilon
from common.privacy import epsilon_text
from server.evaluation.compare import about, patient_numbers, plan_differences, privacy_line
from server.evaluation.estimates import raised
from server.evaluation.next_hospital import (
    FEW_HOSPITALS,
    MIN_HOSPITALS,
    hospitals_expected,
    jackknife,
    mean_interval,
    on_logit_scale,
    prediction_interval,
)
from server.evaluation.tables import aligned
from server.evaluation_file import Evaluation
from server.run_folder import RunFolder, without_nan

GIVEN = "given these training hospitals"
"""What an interval of a mean is where models of the same hospitals meet in several of its scores."""
JACKKNIFE = "jackknife over hospitals"


@dataclass(frozen=True, kw_only=True)
class Member:
    """A finished run of a family."""

    folder: RunFolder
    evaluation: Evaluation

    @property
    def held_out(self) -> frozenset[str]:
        return frozenset(self.folder.plan.held_out)

    def scored_on(self, site: str) -> str:
        """`test` or `all`: whose scores a site sent, its test patients' or everybody's."""
        kinds = {about["site"]: about.get("kind") for about in self.evaluation["sites"]}
        everyone = site in self.held_out and self.folder.plan.held_out_patients == "all"
        return "all" if everyone and kinds[site] != "hospital" else "test"

    def trained(self) -> list[str]:
        """Sites whose updates any round of any arm took in, from the records of its rounds."""
        arms: list[tuple[str, str | None]] = [(arm, None) for arm in self.folder.plan.arms]
        arms += [(arm, site["site"]) for arm in self.folder.plan.arms for site in self.evaluation["sites"]]
        return sorted(
            {
                site
                for arm, owner in arms
                for record in self.folder.arm(arm, owner).rounds()
                for site in record["answered"]
            }
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """The runs of one plan, by the hospitals that they hold out; several of one set are seeds."""

    members: Sequence[Member]
    hospitals: tuple[str, ...]  # each held out by itself once, in the order of the sites

    @property
    def has_pairs(self) -> bool:
        """Whether every two of its hospitals were left out together, too."""
        return all(self.holding_out(*two) for two in itertools.combinations(self.hospitals, 2))

    def holding_out(self, *sites: str) -> list[Evaluation]:
        """The runs that hold out these hospitals and no other."""
        return [member.evaluation for member in self.members if member.held_out == frozenset(sites)]


def family_of(folders: Sequence[RunFolder]) -> Family | None:
    """The leave-one-hospital-out family that runs form; None where they form none.

    Raises:
        ConfigError: a run has no evaluation (`not-finished`), or one seed of one member is named twice
            (`same-run`).
        DataError: a site scored other patients in one run than in another (`data-changed`).
    """
    if len(folders) < 2 or plan_differences(folders) != ["held_out"]:
        return None
    members = [Member(folder=folder, evaluation=folder.evaluation) for folder in folders]
    sites = [site["site"] for site in members[0].evaluation["sites"]]
    alone = {site for member in members if len(member.held_out) == 1 for site in member.held_out}
    if len(alone) < 2 or any(
        {site["site"] for site in member.evaluation["sites"]} != set(sites)
        or len(member.held_out) > 2
        or not member.held_out <= alone
        for member in members
    ):
        return None
    _check_repeats(members)
    _check_patients(members, sites)
    return Family(members=members, hospitals=tuple(site for site in sites if site in alone))


def _check_repeats(members: Sequence[Member]) -> None:
    seen: set[tuple[frozenset[str], int]] = set()
    for member in members:
        which = member.held_out, member.folder.plan.seed
        if which in seen:
            raise ConfigError(
                f"{member.folder.path}: seed {which[1]} with {', '.join(sorted(which[0])) or 'no site'} held "
                "out is named twice",
                code="same-run",
                hint="fedqc simulate PLAN --leave-one-site-out --seed N makes another family",
            )
        seen.add(which)


def _check_patients(members: Sequence[Member], sites: Sequence[str]) -> None:
    for site in sites:
        known: dict[str, Any] = {}
        for member in members:
            numbers = patient_numbers(member.evaluation).get(site)
            if numbers and known.setdefault(member.scored_on(site), numbers) != numbers:
                raise DataError(
                    f"{member.folder.path}: {site} scored other patients than in another run of the family",
                    code="data-changed",
                    hint="run the family anew on data that stay as they are",
                )


def compare_hospitals(family: Family) -> dict[str, Any]:
    """What a family says, ready for JSON.

    A score is the macro AUROC over the artifacts that every left-out hospital can be scored on, the mean over
    seeds: means over different artifacts are not compared. A hospital that can be scored on none, its test
    patients being of one class, has no score and takes no part in a mean.

    Returns:
        `kind`: `hospitals`; `runs`; `hospitals`, and of each `scored_on` (`test` or `all`);
        `artifacts` of the macro AUROC, and `other_artifacts` of each hospital; `members`: run, seed,
        `plan_sha256`, `held_out` and the sites that `trained`; `leave_two_out`: whether all pairs were held
        out, too; `epsilon`:
        of a patient in all runs together, where arms are private. `scores`: arm -> `unseen` -> value (mean
        over hospitals), low, high, `basis` of this interval, `per_hospital` and `standard_errors` in the
        order of `hospitals`, `worst`, and `next`: the prediction interval (`low`, `high`, `too_few`,
        `random_effects`, see server/evaluation/next_hospital.py). `contrasts`: arm, other, where, value, low,
        high, `basis`, `per_hospital`, `next`, paired over patients. `unseen_less_home`: trained arm -> the
        same for what it scores less at a hospital than where this hospital trained.
    """
    first = family.members[0].evaluation
    arms = [arm for arm in first["arms"] if all(_models(one.evaluation, arm) for one in family.members)]
    pairs = dict.fromkeys((row["arm"], row["other"]) for row in first["contrasts"])
    estimable = {site: _pairs(family.holding_out(site)[0], site) for site in family.hospitals}
    scorable = [found for found in estimable.values() if any(found.values())]
    common = [name for name in NAMES if scorable and all(found.get(name) for found in scorable)]
    scores = {arm: _Scores(family=family, arm=arm, artifacts=common) for arm in arms}
    half_pairs = np.array(
        [
            np.mean([1 / (2 * found[name]) for name in common])
            if common and all(found.get(name) for name in common)
            else math.nan
            for found in estimable.values()
        ]
    )
    result = {
        "kind": "hospitals",
        "runs": [about(member.evaluation) for member in family.members],
        "hospitals": list(family.hospitals),
        "scored_on": {
            site: next(m.scored_on(site) for m in family.members if m.held_out == {site})
            for site in family.hospitals
        },
        "artifacts": common,
        "other_artifacts": {
            site: [name for name, number in found.items() if number and name not in common]
            for site, found in estimable.items()
        },
        "members": [
            {
                "run": member.evaluation["run"],
                "seed": member.folder.plan.seed,
                "plan_sha256": member.folder.plan.sha256(),
                "held_out": sorted(member.held_out),
                "trained": member.trained(),
            }
            for member in family.members
        ],
        "leave_two_out": family.has_pairs,
        "epsilon": together_epsilon([member.folder.plan for member in family.members], family.hospitals),
        "scores": {arm: {"unseen": _unseen(found, half_pairs)} for arm, found in scores.items()},
        "contrasts": [
            {"arm": arm, "other": other, "where": "unseen", "paired": True}
            | _contrast(scores[arm], scores[other])
            for arm, other in pairs
            if arm in scores and other in scores
        ],
        "unseen_less_home": {
            arm: _differences(found.left_out()[0] - home, None)
            for arm, found in scores.items()
            if ARMS[arm].is_trained and (home := found.at_home()) is not None
        },
    }
    shown: dict[str, Any] = without_nan(result)
    return shown


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """An arm's scores over a family."""

    family: Family
    arm: str
    artifacts: Sequence[str]

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """(k,) values and standard errors at hospitals that were left out."""
        found = [
            self._mean(self.family.holding_out(site), site, lambda one: _models(one, self.arm))
            for site in self.family.hospitals
        ]
        return np.array([value for value, _ in found]), np.array([error for _, error in found])

    def without(self) -> np.ndarray | None:
        """(k, k), [h, i]: the score at hospital h of models that neither h nor i trained; None where no run
        says it. A model that nobody trains, and models of single hospitals, need no further run.
        """
        family, needs_pairs = self.family, ARMS[self.arm].owner == "federation"
        if needs_pairs and not family.has_pairs:
            return None

        def at(h: str, i: str) -> float:
            if h == i:
                return math.nan
            runs = family.holding_out(h, i) if needs_pairs else family.holding_out(h)
            return self._mean(
                runs, h, lambda one: [m for m in _models(one, self.arm) if m != f"{self.arm}/{i}"]
            )[0]

        return np.array([[at(h, i) for i in family.hospitals] for h in family.hospitals])

    def at_home(self) -> np.ndarray | None:
        """(k,) values where the hospital trained: of the run that holds out none, else of its sister runs.
        None where a hospital was scored on other patients when it was left out.
        """
        family = self.family
        if any(member.scored_on(site) != "test" for member in family.members for site in member.held_out):
            return None
        values = []
        for site in family.hospitals:
            runs = family.holding_out() or [
                member.evaluation
                for member in family.members
                if len(member.held_out) == 1 and site not in member.held_out
            ]
            own = [f"{self.arm}/{site}" if ARMS[self.arm].owner == "site" else self.arm]
            found = [_macro(one, own, site, self.artifacts)[0] for one in runs]
            values.append(float(np.mean(found)) if found else math.nan)
        return np.array(values)

    def _mean(
        self, runs: Sequence[Evaluation], site: str, models: Callable[[Evaluation], Sequence[str]]
    ) -> tuple[float, float]:
        """Value and standard error at a site, means over models and seeds; over seeds the error is the bound
        of perfect correlation, as the patients are the same.
        """
        found = np.array([_macro(one, models(one), site, self.artifacts) for one in runs])
        return (float(found[:, 0].mean()), float(found[:, 1].mean())) if len(found) else (math.nan, math.nan)


def _unseen(scores: _Scores, half_pairs: np.ndarray) -> dict[str, Any]:
    values, errors = scores.left_out()
    scored, sites = np.isfinite(values), scores.family.hospitals
    worst = int(np.nanargmin(values)) if scored.any() else None
    mean = _mean(values, scores.without())
    mean["low"], mean["high"] = map(float, on_logit_scale(mean["value"], mean["low"], mean["high"]))
    return mean | {
        "standard_errors": errors,
        "worst": None if worst is None else {"site": sites[worst], "value": values[worst]},
        "next": hospitals_expected(values[scored], errors[scored], half_pairs[scored])
        if scored.any()
        else None,
    }


def _contrast(mine: _Scores, theirs: _Scores) -> dict[str, Any]:
    one, other = mine.without(), theirs.without()
    both = None if one is None or other is None else one - other
    return _differences(mine.left_out()[0] - theirs.left_out()[0], both)


def _differences(values: np.ndarray, without: np.ndarray | None) -> dict[str, Any]:
    low, high = prediction_interval(values[np.isfinite(values)])
    return _mean(values, without) | {"next": {"low": float(low), "high": float(high)}}


def _mean(values: np.ndarray, without: np.ndarray | None) -> dict[str, Any]:
    """The mean over the hospitals that have a value, and its interval."""
    scored = np.isfinite(values)
    known = values[scored]
    if without is not None:
        without = without[np.ix_(scored, scored)]
    k = len(known)
    is_known = without is not None and bool(np.isfinite(without[~np.eye(k, dtype=bool)]).all())
    if without is not None and is_known and k >= MIN_HOSPITALS:
        interval, basis = jackknife(known, without), JACKKNIFE
    else:
        low, high = mean_interval(known) if k else (math.nan, math.nan)
        interval, basis = (float(low), float(high)), GIVEN
    return {
        "value": float(known.mean()) if k else math.nan,
        "low": interval[0],
        "high": interval[1],
        "basis": basis,
        "hospitals": k,
        "per_hospital": values,
    }


def _models(evaluation: Evaluation, arm: str) -> list[str]:
    return [model for model in evaluation["matrix"] if model == arm or model.startswith(f"{arm}/")]


def _macro(
    evaluation: Evaluation, models: Sequence[str], site: str, artifacts: Sequence[str]
) -> tuple[float, float]:
    """The mean AUROC of models at a site over artifacts, and its standard error; nan where one is missing."""
    cells: list[Mapping[str, Any]] = [
        evaluation["matrix"].get(model, {}).get(site, {}).get(name, {})
        for model in models
        for name in artifacts
    ]
    if not cells or any(cell.get("auroc") is None for cell in cells):
        return math.nan, math.nan
    sent = evaluation["covariance"][site]
    order = [(model, name) for model in sent["models"] for name in sent["artifacts"]]
    used = [order.index((model, name)) for model in models for name in artifacts]
    covariance = np.array(sent["matrix"], float)[np.ix_(used, used)]
    aurocs, n_pos, n_neg = (
        np.array([cell[key] for cell in cells], float) for key in ("auroc", "n_pos", "n_neg")
    )
    half = 0.5 / np.maximum(n_pos * n_neg, 1.0)  # nan where noise hides the numbers: nothing is raised
    moved = np.clip(aurocs, half, 1 - half)
    variance = float(raised(covariance, moved, n_pos, n_neg).mean())
    error = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.nan
    return float(np.mean([cell["auroc"] for cell in cells])), error


def _pairs(evaluation: Evaluation, site: str) -> dict[str, int]:
    """Artifact -> pairs of a patient with it and one without at a site; estimates where noise hides them."""
    first: Mapping[str, Any] = next(iter(evaluation["matrix"].values()), {})
    counts = {
        name: [row[key] if row[key] is not None else row[f"{key}_estimate"] for key in ("n_pos", "n_neg")]
        for name, row in first.get(site, {}).items()
    }
    return {name: max(n_pos, 0) * max(n_neg, 0) for name, (n_pos, n_neg) in counts.items()}


# for a terminal


def hospitals_table(result: Mapping[str, Any]) -> str:
    """A family's result in plain lines."""
    hospitals, scores = result["hospitals"], result["scores"]
    seeds = sorted({member["seed"] for member in result["members"]})
    lines = [
        f"{len(hospitals)} hospitals, each left out once: macro AUROC there of models that it did not train; "
        f"{len(result['runs'])} runs, seeds {', '.join(map(str, seeds))}",
        "",
        *aligned(
            ["left out", *scores],
            [
                [f"{site}{'' if result['scored_on'][site] == 'test' else ' (all patients)'}"]
                + [_three(rows["unseen"]["per_hospital"][h]) for rows in scores.values()]
                for h, site in enumerate(hospitals)
            ],
        ),
        "",
        *aligned(
            ["", "mean", "95 % interval of it", "next hospital, 95 %", "worst", "interval of the mean"],
            [[arm, *_summary(rows["unseen"])] for arm, rows in scores.items()],
        ),
    ]
    differences = [(f"{row['arm']} - {row['other']}", row) for row in result["contrasts"]]
    differences += [(f"{arm}, unseen - home", row) for arm, row in result["unseen_less_home"].items()]
    if differences:
        lines += [
            "",
            *aligned(
                ["difference", "mean", "95 % interval of it", "next hospital, 95 %", "interval of the mean"],
                [[name, *_summary_of_difference(row)] for name, row in differences],
            ),
        ]
    return "\n".join([*lines, "", *_notes(result)])


def _summary(row: Mapping[str, Any]) -> list[str]:
    worst, after = row["worst"], row["next"]
    return [
        _three(row["value"]),
        _interval(row["low"], row["high"]),
        _next(row["hospitals"], after and _interval(after["low"], after["high"])),
        f"{_three(worst['value'])} at {worst['site']}" if worst else "-",
        row["basis"],
    ]


def _summary_of_difference(row: Mapping[str, Any]) -> list[str]:
    after = row["next"]
    return [
        _three(row["value"], signed=True),
        _interval(row["low"], row["high"], signed=True),
        _next(row["hospitals"], _interval(after["low"], after["high"], signed=True)),
        row["basis"],
    ]


def _next(hospitals: int, interval: str | None) -> str:
    if hospitals < MIN_HOSPITALS or not interval:
        return f"none from {hospitals}"
    return f"({interval}) too few to say much" if hospitals <= FEW_HOSPITALS else interval


def _notes(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "next hospital: where 95 % of further hospitals' observed scores are expected, on a test set of "
        "similar size (t interval of the logits). A much smaller test set scatters more.",
        f"{GIVEN}: left-out scores share training hospitals, and this interval of the mean does not count "
        "that; other training hospitals would differ by more",
    ]
    for arm, rows in result["scores"].items():
        if rows["unseen"]["next"] is None:
            continue
        if (effects := rows["unseen"]["next"]["random_effects"]) is None:
            lines.append(
                f"{arm}, random effects: not estimable, as a hospital's standard error is missing or 0"
            )
        else:
            lines.append(
                f"{arm}, random effects on the logit scale: Q {effects['q']:.2f}, I2 {effects['i2']:.2f}, "
                f"tau2 {effects['tau2']:.3f}, mean {effects['mean']:.3f}, "
                f"SE {effects['standard_error']:.3f}; "
                "true score of the next hospital, which covers less than 95 %: t with k - 2 "
                f"{_interval(effects['dl_low'], effects['dl_high'])}, half-normal(.5) prior "
                f"{_interval(effects['bayes_low'], effects['bayes_high'])}"
            )
    if other := {site: names for site, names in result["other_artifacts"].items() if names}:
        shown = "; ".join(f"{site} {', '.join(names)}" for site, names in other.items())
        over = ", ".join(result["artifacts"])
        lines.append(
            f"macro AUROC over {over}, which all of them can be scored on. Not in it: {shown}"
            if over
            else "no artifact can be scored at all of them, and means over different ones are not compared: "
            + shown
        )
    lines += [
        f"{run['run']}: partial: {line}" for run in result["runs"] for line in run["incomplete"]
    ]  # an arm that was refused somewhere has no score there
    lines += list(dict.fromkeys(privacy_line(run) for run in result["runs"]))
    if result["epsilon"] is not None:
        lines.append(
            f"all {len(result['runs'])} runs together: epsilon {epsilon_text(result['epsilon'])} of a "
            "patient, who trains in all but those that hold out the hospital"
        )
    return lines


def _interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    return (
        "-"
        if low is None or high is None
        else f"[{_three(low, signed=signed)}, {_three(high, signed=signed)}]"
    )


def _three(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "not estimable"
    return f"{value:+.3f}" if signed else f"{value:.3f}"
