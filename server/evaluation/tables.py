"""Summarize evaluation.json for the terminal and for `--format json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PARTIAL = 6


def summary(evaluation: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `simulate --format json` promises."""
    keys = ("status", "rounds", "sites", "metrics", "matrix", "headline", "privacy", "cpu_seconds")
    return {"run": str(folder)} | {key: evaluation[key] for key in keys}


def table(evaluation: dict[str, Any]) -> str:
    """The headline for a terminal: arms by place, macro AUROC with its 95 % interval."""
    training = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    places = ["home", "elsewhere", "unseen", *training]
    lines = [f"{'macro AUROC':14s}" + "".join(f"{place:>18s}" for place in places)]
    for arm in evaluation["arms"]:
        scores = evaluation["scores"].get(arm)
        if scores is None:
            lines.append(f"{arm:14s}" + f"{'refused':>18s}")
            continue
        lines.append(f"{arm:14s}" + "".join(f"{_cell(scores[place]):>18s}" for place in places))
    for contrast in evaluation["contrasts"]:
        if contrast["where"] in ("home", "elsewhere", "unseen") and contrast["value"] is not None:
            sign = f"{contrast['arm']} - {contrast['other']}, {contrast['where']}"
            lines.append(
                f"{sign:40s} {contrast['value']:+.3f} [{_number(contrast['low'])}, "
                f"{_number(contrast['high'])}]"
            )
    for site, claim in evaluation["privacy"].items():
        if claim["refused"]:
            lines.append(
                f"{site}: private arm refused [{claim['refused']['code']}]: {claim['refused']['reason']}"
            )
        else:
            lines.append(
                f"{site}: epsilon {claim['epsilon']:.2f}, delta {claim['delta']:g}, per {claim['unit']}, "
                f"{claim['adjacency']}"
            )
    if not evaluation["private_arms"]:
        lines.append("This run is NOT PRIVATE.")
    lines += [f"partial: {line}" for line in evaluation["incomplete"]]
    if changed := evaluation.get("data_changed"):
        lines.append(f"data changed during the run, accepted by the operator: {', '.join(changed)}")
    return "\n".join(lines)


def _cell(score: dict[str, float | None]) -> str:
    if score["value"] is None:
        return "n = 0"
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ±{(score['high'] or 0) - score['value']:.3f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"
