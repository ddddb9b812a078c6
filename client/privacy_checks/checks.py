"""Every check, in the order in which it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from client.privacy_checks import accounting, agent, audit, evaluation, ledger, mechanism, network
from client.privacy_checks.finding import Finding, Scene
from common.plan import RunPlan

CHECKS: dict[str, Callable[[Scene], Finding]] = {
    "sensitivity": mechanism.sensitivity,
    "noise": mechanism.noise,
    "noise between steps": mechanism.noise_between_steps,
    "noise between calls": mechanism.noise_between_calls,
    "participation": mechanism.participation,
    "public divisor": mechanism.public_divisor,
    "network": network.network,
    "accountant": accounting.accountant,
    "arguments": agent.arguments,
    "leave one out": agent.leave_one_out,
    "coverage": agent.coverage,
    "wire": agent.wire,
    "stored answers": ledger.stored_answers,
    "one budget": ledger.one_budget,
    "filter": ledger.fixed_filter,
    "lineage": ledger.lineage,
    "scores": evaluation.scores,
    "evaluations apart": evaluation.evaluations_apart,
    "test patients": evaluation.test_patients,
}


def run_check(name: str, scene: Scene) -> Finding:
    """Run one check. One that cannot be carried out fails: a fault may be why."""
    try:
        return CHECKS[name](scene)
    except Exception as failure:
        measured = f"stopped by {type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
        return Finding(check=name, holds=False, measured=measured, expected="a check that runs to its end")


def run_checks(plan: RunPlan, *, with_audit: bool = False) -> Iterator[Finding]:
    """Run every check on a plan's private training, and the audit if asked; files go to a temporary folder.

    Raises:
        ConfigError: no noise makes the plan cost its epsilon.
    """
    scene = Scene(plan=plan)
    try:
        for name in CHECKS:
            yield run_check(name, scene)
        if with_audit:
            yield from audit.audit(scene)
    finally:
        scene.close()
