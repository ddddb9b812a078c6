"""Which round's model an arm hands on, and when it ends early: by the coordinator's public set alone.

Both follow from the public scores in rounds.jsonl, so that a resumed run chooses the same and `fedqc verify`
finds the same. Choosing among released models on public data is post-processing: it costs no privacy, and no
budget comes back for rounds that are not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.arms import ARMS
from common.plan import RunPlan

MEAN = "public_mean"
"""Key of a record: the public score of the arm's model after this round, where that is a mean over rounds."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The rules of one arm. A score is a macro AUROC on the public set; not defined counts as 0."""

    rounds: int  # of the plan
    by_public: bool  # the best round, the first of equals; else the last
    patience: int | None  # rounds without a better score after which the arm ends

    @property
    def needs_scores(self) -> bool:
        """Whether the public scores decide anything."""
        return self.by_public or self.patience is not None

    def best(self, records: Sequence[Mapping[str, Any]]) -> int:
        """The round of the best score, the first of equals."""
        return max(records, key=_score)["round"]

    def chosen(self, records: Sequence[Mapping[str, Any]]) -> int:
        """The round whose model the arm hands on."""
        return self.best(records) if self.by_public else records[-1]["round"]

    def has_ended(self, records: Sequence[Mapping[str, Any]]) -> bool:
        """Whether no further round follows these."""
        if not records:
            return False
        last = records[-1]["round"]
        return last >= self.rounds or (
            self.patience is not None and last - self.best(records) >= self.patience
        )


def choice_of(plan: RunPlan, arm: str) -> Choice:
    """The rules that a plan has for an arm: by default the best round of a hospital's own model that is
    trained without clip, the last of every other; with early stopping, the best of every arm. The public set
    of a network of metrics has no labels, so that there it is the last.
    """
    kind, training = ARMS[arm], plan.training
    rule = training.choose_round
    if rule is None:
        is_own = kind.owner == "site" and kind.by_rounds and not kind.clips
        is_chosen = (is_own and not plan.model.is_of_measures) or training.early_stopping is not None
        rule = "public" if is_chosen else "last"
    return Choice(rounds=training.rounds, by_public=rule == "public", patience=training.early_stopping)


def _score(record: Mapping[str, Any]) -> float:
    return record.get(MEAN, record["public"])["auroc"] or 0.0
