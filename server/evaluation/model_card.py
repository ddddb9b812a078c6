"""Write model_card.md: what the released model is, for readers who have the file without the run."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.arms import is_private
from common.artifacts import ARTIFACTS, modality_text
from common.counts import Counts
from common.privacy import epsilon_text
from server.evaluation.operating import point_of
from server.evaluation.tables import noised_sites
from server.evaluation_file import Claim, Evaluation, Score, artifacts_of

INJECTED_LABELS = "sheet and injected views"
"""How labels arose where the plan injects artifacts. Which sites have a label sheet, no site says."""


def model_card(evaluation: Evaluation, arm: str, model: dict[str, Any]) -> str:
    """Markdown from evaluation.json's content.

    Args:
        arm: the arm whose model is handed on; `model` is the plan's `model` section.
    """
    claims = {site: claim for site, claim in evaluation["privacy"].items() if claim["epsilon"] is not None}
    void = {site: claim["void"] for site, claim in evaluation["privacy"].items() if claim.get("void")}
    private = is_private(arm) and claims and not void
    guarantees = "; ".join(_guarantee(site, claim) for site, claim in claims.items())
    scores = evaluation["scores"][arm]
    sites = ", ".join(
        f"{site['site']} ({site['kind']})" for site in evaluation["sites"] if site["role"] == "training"
    )
    unlearned = evaluation.get("unlearned", {}).get(arm, [])
    none = "not estimable" if noised_sites(evaluation) else "not measured (n = 0)"
    unseen = ", ".join(site["site"] for site in evaluation["sites"] if site["role"] == "held_out")
    lines = [
        f"# Model of run {evaluation['run']}",
        "",
        (
            f"Artifact classifier `{model['name']}`, arm `{arm}`, {evaluation['epochs']} epochs from public "
            f"weights ({model['initial']})."
        ),
        "",
        f"**Private:** {guarantees}" if private else "**This model is NOT PRIVATE.**",
        *([f"- {site}: {why}." for site, why in void.items()] if is_private(arm) else []),
        "",
        (
            "- Input: one CT (HU) or MR slice as `common/preprocess.py` prepares it. Output: a logit an "
            "artifact, meaningless for the"
        ),
        "  other modality; a patient's score is the expected maximum of three slices.",
        *(
            f"  - `{one.name}` ({modality_text(one.name)}): {one.definition}"
            for one in ARTIFACTS
            if one.name in artifacts_of(evaluation) and one.name not in unlearned
        ),
        *([f"  - Never learned, and says nothing: {', '.join(unlearned)}."] if unlearned else []),
        f"- Trained at: {sites}. Never saw: {unseen or 'no site was held out'}.",
        *(
            [
                f"- Labels: {labels}. Each site simulated artifacts on slices of its own patients, and used "
                "its label sheet where it has one. Scores are against label sheets."
            ]
            if (labels := evaluation.get("labels"))
            else []
        ),
        (
            f"- Macro AUROC at home {_score(scores['home'], none)}, at a hospital never seen "
            f"{_score(scores['unseen'], none)}; report.html has every site."
        ),
        *_on_common_artifacts(evaluation, arm, none),
        *(
            f"- Scores at {site}: {how}; no exact number left it."
            for site, how in noised_sites(evaluation).items()
        ),
        *_gap(evaluation, arm),
        *_points(evaluation, arm),
        (
            "- Not measured: agreement with radiologists. report.html has calibration, any artifact at once, "
            "and what the thresholds give at each site. Not a medical device; not for diagnosis."
        ),
    ]
    lines += [f"- {site['site']}: {site['stand_in']}." for site in evaluation["sites"] if site["stand_in"]]
    return "\n".join(lines) + "\n"


def _on_common_artifacts(evaluation: Evaluation, arm: str, none: str) -> list[str]:
    """The same two scores on the artifacts of every site, where sites average different ones."""
    common = evaluation["common"]
    if common is None:
        return []
    if not common["artifacts"]:
        return ["  No artifact is estimable at every site: the two scores average different ones."]
    home, unseen = (_score(common["scores"][arm][where], none) for where in ("home", "unseen"))
    return [
        f"  The two average different artifacts; on {', '.join(common['artifacts'])}, which every site can "
        f"estimate: {home} and {unseen}."
    ]


def _gap(evaluation: Evaluation, arm: str) -> list[str]:
    """Unseen less home, where both are estimable on the same artifacts."""
    gap = evaluation.get("generalization_gap", {}).get(arm)
    if gap is None or gap["value"] is None or gap["low"] is None or gap["high"] is None:
        return []
    line = (
        f"- Unseen less home: {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}] on "
        f"{', '.join(gap['artifacts'])}, of {gap['held_out']} held-out hospitals"
    )
    if gap["next_low"] is None or gap["next_high"] is None:
        return [f"{line}; too few for what to expect at the next."]
    return [f"{line}; at the next one expect {gap['next_low']:.3f} to {gap['next_high']:.3f} (95 %)."]


def _points(evaluation: Evaluation, arm: str) -> list[str]:
    """The operating points of a shared model, found on public patients."""
    public = evaluation.get("public_counts", {}).get(arm)
    if public is None:
        return ["- Thresholds: none was chosen."]
    counts, edges = Counts.from_json(public), evaluation.get("edges", {}).get(arm, {})
    found = []
    for number, name in enumerate(artifacts_of(evaluation)):
        row = edges.get(name)
        point = point_of(counts, number, None if row is None else np.array(row))
        if point is not None:
            found.append(
                f"  - `{name}`: logit {point.threshold:.2f}; sensitivity {point.sensitivity:.3f} of "
                f"{point.positives}, specificity {point.specificity:.3f} of {point.negatives}."
            )
    if not found:
        return ["- Thresholds: none; too few public patients."]
    head = "- Thresholds of a patient's score, chosen on the coordinator's public set and optimistic there:"
    return [head, *found]


def _guarantee(site: str, claim: Claim) -> str:
    epsilon = "∞" if claim["epsilon"] is None else epsilon_text(claim["epsilon"])
    return f"{site}: ε = {epsilon}, δ = {claim['delta']:g} per {claim['unit']} ({claim['adjacency']})"


def _score(score: Score, none: str) -> str:
    """A value with its interval; no value is said, not printed as a number."""
    value, low, high = score["value"], score["low"], score["high"]
    if value is None:
        return none
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"
