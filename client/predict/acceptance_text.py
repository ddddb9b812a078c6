"""Acceptance and constancy tests in words, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client.data_check.text import table
from client.predict.acceptance import Constancy, Tested
from client.predict.text import wrapped
from common.artifacts import NAMES


def comparison_text(tested: Tested) -> str:
    """The figures of a candidate and of the model in use, side by side."""
    found, cases = tested.comparison, tested.cases
    rows: list[tuple[str, ...]] = [("", "found", "in use", "alarms", "in use")]
    for name in (*NAMES, "all"):
        new, old = found.candidate[name], found.present[name]
        if new["with"] or new["without"]:
            rows.append((name, *_cells(new, old, "found", "with"), *_cells(new, old, "alarms", "without")))
    gone = f", {cases.missing} of them are gone" if cases.missing else ""
    lines = wrapped(f"{len(cases.names)} frozen cases of this site{gone}, sha256 {cases.sha256[:16]}", "")
    lines += [*table(rows, indent=""), ""]
    lines += wrapped(
        f"Both models call {found.agreement:.0%} alike; where they differ the new one is right "
        f"{found.only_candidate_right} times, the one in use {found.only_present_right} times. By case: "
        f"{found.better_cases} better, {found.worse_cases} worse (McNemar's exact test, p {_p(found.p)}).",
        "",
    )
    return "\n".join(line.rstrip() for line in lines)


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _cells(new: Mapping[str, int], old: Mapping[str, int], what: str, of: str) -> tuple[str, str]:
    return f"{new[what]} of {new[of]}", str(old[what])


def constancy_text(found: Constancy) -> str:
    """One sentence."""
    verdict = "constant" if found.is_constant else "NOT CONSTANT: find out what changed before you go on"
    gone = f", {found.missing} are gone" if found.missing else ""
    return "\n".join(
        wrapped(
            f"{verdict}. {found.cases} cases{gone}: scores differ by {found.largest_change:.4f} at most from "
            f"those of {found.accepted_at}, {found.changed_calls} calls changed.",
            "",
        )
    )


def log_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Who did what, and when; one entry a line and its figures below."""
    lines = []
    for entry in entries:
        model = entry["model"][:16] or "none"
        lines.append(f"{entry['at']}  {entry['action']:8s}  {model}")
        lines += wrapped(f"by {entry['by']} (user {entry['user']})", "    ")
        if worse := entry["figures"].get("worse"):
            lines += wrapped(f"worse: {'; '.join(worse)}", "    ")
        if "constant" in entry["figures"]:
            lines.append(f"    {'constant' if entry['figures']['constant'] else 'NOT CONSTANT'}")
    return "\n".join(lines) or "no model was tested at this site"
