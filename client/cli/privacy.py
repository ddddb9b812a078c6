"""`fedqc verify --privacy`: check the installed code against what the privacy accounting assumes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from common.arms import ARMS
from common.cli import Format
from common.errors import ConfigError
from common.plan import RunPlan, parse_plan, read_plan
from common.terminal import print

EVIDENCE = "Regression evidence: these checks find faults of known kinds. They are no proof of privacy."


def verify_privacy(plan: Path | None, *, with_audit: bool, format: Format) -> int:
    """Print one line a check as it ends.

    Args:
        plan: whose private training is checked; None: one with the defaults.
        with_audit: also audit the step with canaries.
    Returns:
        the exit status: 1 where a check failed.
    Raises:
        ConfigError: the plan has no private arm (code `bad-argument`), or cannot be priced.
        PlanError: the plan cannot be read.
    """
    from client.privacy_checks.checks import run_checks

    checked = private_plan(plan)
    findings = []
    for finding in run_checks(checked, with_audit=with_audit):
        findings.append(finding)
        if format is Format.text:
            word = {True: "ok", False: "FAIL", None: "-"}[finding.holds]
            print(f"{word:5s}{finding.check:21s}{finding.measured}", flush=True)
            print(f"{'':26s}expected: {finding.expected}", flush=True)
    if format is Format.json:
        print(json.dumps({"checks": [asdict(one) for one in findings], "note": EVIDENCE}, ensure_ascii=False))
    else:
        print(EVIDENCE)
    return 1 if any(finding.holds is False for finding in findings) else 0


def private_plan(plan: Path | None) -> RunPlan:
    """The plan of a file, or one with the defaults where there is none.

    Raises:
        ConfigError: it has no private arm (code `bad-argument`).
        PlanError: it cannot be read.
    """
    checked = parse_plan({"name": "privacy", "arms": ["federated_dp"]}) if plan is None else read_plan(plan)
    if not any(ARMS[arm].private for arm in checked.arms):
        raise ConfigError(
            f"{plan}: no arm of this plan is private", code="bad-argument", hint="arms: [federated_dp]"
        )
    return checked
