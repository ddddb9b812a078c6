"""`fedqc verify --attack`: what an attacker would learn of one patient from this site's next update."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.cli.privacy import private_plan
from client.cli.site import site_folder
from common.cli import Format
from common.pricing import plan_epsilon, training_steps, with_noise
from common.privacy import epsilon_text
from common.terminal import print

if TYPE_CHECKING:
    from client.data.cohort import Cohort
    from client.privacy_checks.attack import Attack
    from client.privacy_checks.guessing import Estimate
    from client.privacy_checks.membership import Membership
    from common.plan import RunPlan

KEEP = "Computed from patients without noise: keep it here, do not send it."
READ_ONLY = "Nothing was spent, written or released."


def verify_attack(site: Path | None, plan: Path | None, models: Sequence[Path], *, format: Format) -> int:
    """Attack the next update of a site, and finished models that it trained. Writes nothing.

    Args:
        site: its folder; None: as the `fedqc site` commands find it.
        plan: whose private training is attacked; None: one with the defaults.
        models: finished models whose training patients are to be told from the test patients.
    Returns:
        the exit status: 1 where the attacker does better than the noise permits.
    Raises:
        ConfigError: the plan has no private arm or holds the site out (`bad-argument`), the plan or a model
            cannot be read.
        DataError: the site cannot be read as it is (`not-prepared`), or teaches nothing.
    """
    from client.privacy_checks.attack import attack
    from client.privacy_checks.own_patients import own_patients

    checked = with_noise(private_plan(plan))
    cohort = own_patients(site_folder(site), checked)
    found = attack(cohort, checked)
    told = _told(cohort, checked, models)
    if format is Format.json:
        print(json.dumps(_without_nan(_values(cohort, checked, found, told)), ensure_ascii=False))
    else:
        print("\n".join([*_text(cohort, checked, found), *_membership_text(told)]))
    return 0 if found.holds else 1


def _told(cohort: Cohort, plan: RunPlan, models: Sequence[Path]) -> dict[str, Membership]:
    """File -> how well its training patients are told from the test patients."""
    from client.privacy_checks.membership import PatientLosses, membership, patient_losses
    from common.model_file import load_model
    from common.models import network_of
    from common.weights import manifest_of, resolve_initial

    if not models:
        return {}
    manifest = manifest_of(network_of(plan.model).state_dict())
    paths = [resolve_initial(plan.model.initial, plan.model.sha256), *models]
    losses = patient_losses(
        cohort, plan.model, [load_model(path, manifest, plan.model.labels) for path in paths]
    )
    rows = [
        PatientLosses(members=losses.members[place][None], others=losses.others[place][None])
        for place in range(len(paths))
    ]
    return {str(path): membership(rows[0], row) for path, row in zip(models, rows[1:], strict=True)}


def _values(cohort: Cohort, plan: RunPlan, found: Attack, told: dict[str, Membership]) -> dict[str, Any]:
    return {
        "site": cohort.site.name,
        "plan": plan.name,
        "epsilon": plan_epsilon(plan),
        "delta": plan.privacy.delta,
        "unit": cohort.site.patients.unit,
        "clip_norm": plan.privacy.clip_norm,
        **asdict(training_steps(plan)),
        "patients": found.patients,
        "without_gradient": found.without_gradient,
        "draws": found.draws,
        "holds": found.holds,
        "bounds": found.bounds._asdict(),
        "groups": [
            asdict(one)
            | {
                "with_noise": _estimate(one.with_noise),
                "advantage": 2 * one.with_noise.value - 1,
                "auc": _estimate(one.auc),
                "expected": one.expected._asdict(),
            }
            for one in found.groups
        ],
        "likeness": asdict(found.likeness),
        "membership": {name: asdict(one) for name, one in told.items()},
        "note": f"{KEEP} {READ_ONLY}",
    }


def _estimate(found: Estimate) -> dict[str, float]:
    low, high = found.interval()
    return {"value": found.value, "low": low, "high": high}


def _text(cohort: Cohort, plan: RunPlan, found: Attack) -> Iterator[str]:
    unit, run = cohort.site.patients.unit, training_steps(plan)
    longest, typical = found.groups[0], found.groups[-1]
    yield f"ATTACK on the next update of {cohort.site.name}, plan {plan.name}. {READ_ONLY}"
    yield KEEP
    yield (
        f"Plan: ε {epsilon_text(plan_epsilon(plan))} at δ {plan.privacy.delta:g} per {unit}, evaluation "
        f"included; {run.steps} private steps, noise {run.noise_multiplier:g} times the clip."
    )
    yield ""
    yield (
        f"An attacker who knows everything but this {unit}, and sees all {run.steps} steps, guesses right in "
        f"{_cases(typical.with_noise.value)} of 100 cases; where the {unit} has the longest gradient, in "
        f"{_cases(longest.with_noise.value)}; without noise, in {_cases(typical.without_noise)}. A coin: 50."
    )
    yield f"Whoever it is: in {_cases_up(found.bounds.accuracy)} of 100 at most, with the plan's noise."
    yield ""
    yield _row("right guesses of", "length", "no noise", "noise [95 %]", "expected", "AUC [95 %]")
    for one in found.groups:
        yield _row(
            one.patients,
            f"{one.length:.3f}",
            f"{one.without_noise:.2f}",
            _shown(one.with_noise),
            f"{one.expected.accuracy:.3f}",
            _shown(one.auc),
        )
    yield _row("any, at most", "1", "", _up(found.bounds.accuracy), "", _up(found.bounds.auc))
    yield "Length: of the clipped gradient, in clips. Expected: at this length, by theory."
    if found.without_gradient:
        yield f"{found.without_gradient} of {found.patients} have no gradient: they are not in the update."
    like = found.likeness
    yield ""
    yield (
        f"Likeness (median cosine) of one step's update to one {unit}'s gradient: {like.update:.2f} without "
        f"noise, {like.update_noised:.2f} with; all others subtracted: {like.others_subtracted:.2f}, "
        f"{like.others_subtracted_noised:.2f}."
    )
    if not found.holds:
        yield "FAIL: better than the plan's noise permits. Do not train; run fedqc verify --privacy."


def _row(name: str, length: str, no_noise: str, noise: str, expected: str, auc: str) -> str:
    return f"{name:20s}{length:>7s}{no_noise:>10s}{noise:>22s}{expected:>10s}{auc:>22s}".rstrip()


def _membership_text(told: dict[str, Membership]) -> Iterator[str]:
    if not told:
        return
    first = next(iter(told.values()))
    yield ""
    yield (
        f"MEMBERSHIP by a finished model: {first.members} patients who train, {first.others} who never do. "
        "A coin: AUC .5, found .01."
    )
    yield f"{'AUC [95 %]':22s}{'found at 1 % false alarms':28s}model"
    for name, one in told.items():
        yield f"{_three(one.auc, one.auc_interval):22s}{_three(one.found, one.found_interval):28s}{name}"


def _shown(found: Estimate) -> str:
    return _three(found.value, found.interval())


def _three(value: float, interval: tuple[float, float]) -> str:
    return "–" if math.isnan(value) else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _cases(share: float) -> str:
    return f"{100 * share:.0f}"


def _cases_up(share: float) -> str:
    """Rounded up: a bound that is printed must hold."""
    return f"{math.ceil(100 * share - 1e-9)}"


def _up(share: float) -> str:
    return epsilon_text(min(share, 1.0), decimals=3)


def _without_nan(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_nan(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values
