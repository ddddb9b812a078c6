"""Summarize evaluation.json for the terminal and for `--format json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arms import is_control
from common.privacy import epsilon_text

ALTERNATIVES = "private arms are alternatives: each costs epsilon as if it were run alone"
PARTIAL = 6


def summary(evaluation: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What `simulate --format json` promises."""
    keys = ("status", "rounds", "sites", "metrics", "matrix", "headline", "privacy", "cpu_seconds")
    return {"run": str(folder)} | {key: evaluation[key] for key in keys} | {"scoring": evaluation["scoring"]}


def table(evaluation: dict[str, Any]) -> str:
    """The headline for a terminal: arms by place, macro AUROC with its 95 % interval."""
    training = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    places = ["home", "elsewhere", "unseen", *training]
    none = "not estimable" if noised_sites(evaluation) else "n = 0"
    width = max(14, *(len(arm) + 2 for arm in evaluation["arms"]))
    lines = [f"{'macro AUROC':{width}s}" + "".join(f"{place:>18s}" for place in places)]
    for arm in evaluation["arms"]:
        scores = evaluation["scores"].get(arm)
        if scores is None:
            lines.append(f"{arm:{width}s}" + f"{'refused':>18s}")
            continue
        lines.append(f"{arm:{width}s}" + "".join(f"{_cell(scores[place], none):>18s}" for place in places))
    differences = {
        f"{contrast['arm']} - {contrast['other']}, {contrast['where']}": contrast
        for contrast in evaluation["contrasts"]
        if contrast["where"] in ("home", "elsewhere", "unseen") and contrast["value"] is not None
    }
    wide = max([40, *map(len, differences)])
    lines += [
        f"{name:{wide}s} {found['value']:+.3f} [{_number(found['low'])}, {_number(found['high'])}]"
        for name, found in differences.items()
    ]
    for site, claim in evaluation["privacy"].items():
        if claim["refused"]:
            lines.append(
                f"{site}: private arm refused [{claim['refused']['code']}]: {claim['refused']['reason']}"
            )
        elif claim["epsilon"] is None:
            lines.append(f"{site}: {claim.get('void', 'no claim')}")
        else:
            lines.append(
                f"{site}: epsilon {epsilon_text(claim['epsilon'])}, delta {claim['delta']:g}, "
                f"per {claim['unit']}, {claim['adjacency']}"
            )
    if evaluation.get("alternatives"):
        lines.append(ALTERNATIVES)
    lines += [f"{site}: {how}" for site, how in noised_sites(evaluation).items()]
    lines += [f"{arm}: noise 0, NOT PRIVATE" for arm in evaluation["arms"] if is_control(arm)]
    if not evaluation["private_arms"]:
        lines.append("This run is NOT PRIVATE.")
    lines += [f"partial: {line}" for line in evaluation["incomplete"]]
    if changed := evaluation.get("data_changed"):
        lines.append(f"data changed during the run, accepted by the operator: {', '.join(changed)}")
    return "\n".join(lines)


def noised_sites(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """How each site was scored that was scored with noise, as words."""
    return {
        site: f"scored with noise, epsilon {epsilon_text(found['epsilon'])}, delta {found['delta']:g}"
        for site, found in evaluation.get("scoring", {}).items()
        if found["mode"] == "dp"
    }


def _cell(score: dict[str, float | None], none: str) -> str:
    if score["value"] is None:
        return none
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ±{(score['high'] or 0) - score['value']:.3f}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal, columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
