"""Summarize evaluation.json for the terminal and for `--format json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arms import is_control
from common.privacy import epsilon_text
from common.terminal import COLUMNS
from server.evaluation_file import Evaluation, Score

ALTERNATIVES = "private arms are alternatives: each costs epsilon as if it were run alone"
PARTIAL = 6


def summary(evaluation: Evaluation, folder: Path) -> dict[str, Any]:
    """What `simulate --format json` promises."""
    keys = ("schema", "status", "rounds", "sites", "metrics", "matrix", "headline", "privacy", "cpu_seconds")
    found = dict(evaluation)
    return {"run": str(folder)} | {key: found[key] for key in keys} | {"scoring": evaluation["scoring"]}


def table(evaluation: Evaluation) -> str:
    """The headline for a terminal: arms by place, macro AUROC with its 95 % interval."""
    training = [site["site"] for site in evaluation["sites"] if site["role"] == "training"]
    places = ["home", "elsewhere", "unseen", *training]
    if "evaluates" in evaluation and not training:
        places = ["unseen", *(site["site"] for site in evaluation["sites"])]
    missing = "not estimable" if noised_sites(evaluation) else "n = 0"
    width = max(14, *(len(arm) + 2 for arm in evaluation["arms"]))
    wide = max(20, *(len(place) + 2 for place in places))
    at_once = max(1, (COLUMNS - width) // wide)  # more places stand in a table below
    lines: list[str] = []
    for block in (places[start : start + at_once] for start in range(0, len(places), at_once)):
        lines += [""] if lines else []
        lines.append(f"{'macro AUROC':{width}s}" + "".join(f"{place:>{wide}s}" for place in block))
        for arm in evaluation["arms"]:
            cells = _cells(evaluation, arm, block, missing)
            lines.append(f"{arm:{width}s}" + "".join(f"{cell:>{wide}s}" for cell in cells))
    lines += _evaluated(evaluation)
    lines += [
        f"not in any mean: {GAPS[reason]}: {', '.join(named)}" for reason, named in _gaps(evaluation).items()
    ]
    differences = {
        f"{contrast['arm']} - {contrast['other']}, {contrast['where']}": contrast
        for contrast in evaluation["contrasts"]
        if contrast["family"] == "overall" and contrast["value"] is not None
    }
    wide = max([40, *map(len, differences)])
    lines += [
        f"{name:{wide}s} {_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"
        f"{'  *' if found['p_holm'] is not None and found['p_holm'] < 0.05 else ''}"
        for name, found in differences.items()
    ]
    if differences:
        lines.append(f"* differs at 0.05 after Holm's correction for {evaluation['looks']['overall']} looks")
    lines += [
        f"LABELS SWAPPED? {row['site']}, {row['artifact']}, {row['model']}: AUROC {row['auroc']:.3f}, "
        f"below 0.5 (p {row['p_holm']:.1g})"
        for row in evaluation["below_chance"]
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
    lines += [f"partial: {line}" for line in [*evaluation["refusals"], *evaluation["incomplete"]]]
    if changed := evaluation.get("data_changed"):
        lines.append(f"data changed during the run, accepted by the operator: {', '.join(changed)}")
    return "\n".join(lines)


def noised_sites(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """How each site was scored that was scored with noise, as words."""
    return {
        site: f"scored with noise, epsilon {epsilon_text(found['epsilon'])}, delta {found['delta']:g}"
        + _told_beforehand(found)
        for site, found in evaluation.get("scoring", {}).items()
        if found["mode"] == "dp"
    }


def _evaluated(evaluation: Evaluation) -> list[str]:
    """Of an evaluation by itself: whose models these are, and where they were not trained."""
    if (of := evaluation.get("evaluates")) is None:
        return []
    unseen = [site["site"] for site in evaluation["sites"] if site["role"] == "held_out"]
    where = f"not trained here: {', '.join(unseen)}" if unseen else "trained at every site here"
    return [f"models of run {of['run']}, {where}. Nothing was trained."]


def _told_beforehand(scoring: Mapping[str, Any]) -> str:
    """That nothing could be told from a site's numbers, which was known before it was asked."""
    if scoring.get("estimable", True):
        return ""
    return (
        f"; not estimable at this n and epsilon ({scoring['nominal_tested']} test patients by the bucket: an "
        f"AUROC of .85 may come out off by {scoring['expected_error']:.2f})"
    )


GAPS = {
    "n0": "no patient assessed",
    "one_class": "one class only",
    "one_patient": "fewer than two patients of a class",
    "noise": "hidden by noise",
}
"""Why an artifact is in no macro score of a site."""


def _gaps(evaluation: Evaluation) -> dict[str, list[str]]:
    """Reason -> artifact and site."""
    found: dict[str, list[str]] = {}
    for gap in evaluation["missing"]:
        found.setdefault(gap["reason"], []).append(f"{gap['artifact']} at {gap['site']}")
    return found


def models_of(evaluation: Evaluation, arm: str) -> list[str]:
    """An arm's models: its shared one, or one a site."""
    return [model for model in evaluation["matrix"] if model == arm or model.startswith(f"{arm}/")]


def _cells(evaluation: Evaluation, arm: str, places: Sequence[str], missing: str) -> list[str]:
    """The scores of an arm at places; of an arm without a model one word."""
    scores = evaluation["scores"].get(arm)
    if scores is None:
        return ["refused"]
    none = {"elsewhere": "not defined"} if len(models_of(evaluation, arm)) == 1 else {}
    return [_cell(scores[place], none.get(place, missing)) for place in places]


def _cell(score: Score, none: str) -> str:
    if score["value"] is None:
        return none
    if score["low"] is None or score["high"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} [{score['low']:.2f}, {score['high']:.2f}]"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:+.3f}"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal, columns padded to their widest cell."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
