"""Show how `auto` chose the settings of the private arms, from the run folder's tuning.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from pydantic import Field, ValidationError, model_validator

from common.i18n import Say
from common.plan import RunPlan
from common.strict import StrictModel, describe_validation
from server.evaluation.report import figures
from server.evaluation.report.numerals import plain, score, signed
from server.run_folder import TUNING, bad_tuning, tuning_digest


class TriedSetting(StrictModel):
    """A setting and its gains, macro AUROC minus that of the starting weights."""

    clip_norm: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    steps_per_round: int = Field(ge=1)
    average_rounds: int = Field(ge=1)
    gains: dict[str, float]  # by rehearsal
    worst: float
    spread: float = Field(ge=0)

    @property
    def rate(self) -> float:
        """Learning rate times clip: how far a step carries the head at most, before noise."""
        return float(f"{self.learning_rate * self.clip_norm:.6g}")


class Tuned(StrictModel):
    """What tuning.json holds; `server.run.tune` writes it."""

    epsilon: float = Field(gt=0)
    sites: int = Field(ge=1)
    patients: int = Field(ge=1)
    start: str  # digest of the starting weights
    public: dict[str, float]  # rehearsal -> macro AUROC of the starting weights
    chosen: TriedSetting
    tried: tuple[TriedSetting, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rates_and_rehearsals(self) -> Tuned:
        if any(not 0 < one.rate < float("inf") for one in (self.chosen, *self.tried)):
            raise ValueError("learning_rate times clip_norm is no number above 0")
        if not self.public or self.chosen.gains.keys() != self.public.keys():
            raise ValueError("the chosen setting has not one gain for each rehearsal")
        return self


def tuning_view(tuning: Mapping[str, Any], plan: RunPlan, say: Say) -> dict[str, Any]:
    """What the page shows of a choice: `figure`, `legend`, `settings` and `gains` (rows), `digests` (rows),
    `belongs`.

    Args:
        tuning: content of tuning.json.
        plan: of the run; its `privacy.origin` names the digest of the choice.
    Raises:
        ConfigError: the content is not what fedqc writes (code `bad-tuning`).
    """
    try:
        found = Tuned.model_validate_json(json.dumps(tuning))
    except (ValidationError, ValueError) as error:
        what = describe_validation(error) if isinstance(error, ValidationError) else str(error)
        raise bad_tuning(f"{TUNING}: {what}") from None
    digest = tuning_digest(tuning)
    lines = _lines(found, say)
    return {
        "lead": say(
            "tuning.lead",
            count=len(found.public),
            epsilon=plain(found.epsilon),
            sites=found.sites,
            patients=found.patients,
        ),
        "figure": _figure(found, lines, say),
        "legend": [(figures.swatch_of(line.style), line.label) for line in lines],
        "settings": _settings(found.chosen, say),
        "gains": _gains(found, say),
        "digests": [
            (say("tuning.start"), found.start),
            (say("tuning.digest"), digest),
            (say("tuning.origin"), plan.privacy.origin or say("tuning.no_origin")),
        ],
        "belongs": f"curve {digest[:16]}" in plan.privacy.origin,
    }


def _lines(found: Tuned, say: Say) -> list[figures.GainLine]:
    """Worst gain by rate, a line for each number of steps, of settings that are else the same: the clip that
    most were tried with, and the chosen averaging.
    """
    (clip, _), *_ = Counter(one.clip_norm for one in found.tried).most_common(1)
    alike = [
        one
        for one in found.tried
        if one.clip_norm == clip and one.average_rounds == found.chosen.average_rounds
    ]
    lines = []
    for number, steps in enumerate(sorted({one.steps_per_round for one in alike})):
        points = sorted((one.rate, one.worst) for one in alike if one.steps_per_round == steps)
        label = say("tuning.one_step") if steps == 1 else say("tuning.steps", count=steps)
        style = figures.SERIES[number % len(figures.SERIES)]
        lines.append(figures.GainLine(label=label, style=style, points=points))
    return lines


def _figure(found: Tuned, lines: list[figures.GainLine], say: Say) -> Markup:
    return figures.gains_by_rate(
        lines,
        chosen=(found.chosen.rate, found.chosen.worst),
        words=figures.GainWords(
            alt=say("tuning.alt"),
            rate=say("tuning.axis.rate"),
            gain=say("tuning.axis.gain"),
            chosen=say("tuning.chosen"),
        ),
    )


def _settings(chosen: TriedSetting, say: Say) -> list[tuple[str, str]]:
    return [
        (say("tuning.clip"), plain(chosen.clip_norm)),
        (say("tuning.learning_rate"), plain(chosen.learning_rate)),
        (say("tuning.rate"), plain(chosen.rate)),
        (say("tuning.steps_per_round"), str(chosen.steps_per_round)),
        (say("tuning.average_rounds"), str(chosen.average_rounds)),
        (say("tuning.worst"), signed(chosen.worst)),
        (say("tuning.spread"), score(chosen.spread)),
    ]


def _gains(found: Tuned, say: Say) -> list[dict[str, str]]:
    """A row a rehearsal; the one with the smallest gain, which decided, says so."""
    worst = min(found.chosen.gains, key=lambda shift: found.chosen.gains[shift])
    return [
        {
            "rehearsal": shift,
            "start": score(start),
            "gain": signed(found.chosen.gains[shift]),
            "note": say("tuning.is_worst") if shift == worst else "",
        }
        for shift, start in found.public.items()
    ]
