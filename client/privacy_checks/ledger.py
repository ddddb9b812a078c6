"""Check budget and stored answers by what the agent answers, whatever ledger and answer store look like."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from client.agent import tasks
from client.dp import dp_sgd
from client.privacy_checks.finding import Finding, Scene
from client.privacy_checks.hospital import (
    ROUNDS,
    change,
    hospital,
    public_weights,
    run_at,
    site_plan,
    train_task,
    watched,
)
from common.lineage import NO_DATA
from common.plan import RunPlan
from common.pricing import plan_epsilon, with_noise
from common.wire import DescribeTask, Refusal, SiteReadiness, SiteUpdate, WireMessage

AFFORDABLE_ROUNDS = 40


def stored_answers(scene: Scene) -> Finding:
    """A round asked twice gets the same bytes; if the stored answer is lost, no fresh noise."""
    plan, found = site_plan(scene), []
    site_yaml = hospital(scene, "stored")
    agent = tasks.Agent(site_yaml, plan)
    first = agent.train(train_task())
    if not isinstance(first, SiteUpdate):
        found.append(f"the hospital did not train ({_code(first)})")
    for words, one in (("", agent), (" by a restarted agent", tasks.Agent(site_yaml, plan))):
        if one.train(train_task()).to_bytes() != first.to_bytes():
            found.append(f"the same round gets other bytes{words}")
    state = site_yaml.parent / "state"
    shutil.rmtree(state / "outbox")
    again = tasks.Agent(site_yaml, plan).train(train_task())
    if not isinstance(again, Refusal):
        found.append("stored answers were deleted: the same round is answered with fresh noise")
    sent, beyond = 0, []
    with watched() as seen:
        agent = tasks.Agent(hospital(scene, "rounds"), plan)
        for number in range(1, ROUNDS + 3):
            before = len(seen.released)
            beyond.append(agent.train(train_task(round=number)))
            sent += len(seen.released) - before if isinstance(beyond[-1], SiteUpdate) else 0
    reserved = sum(row.steps for row in {row.sequence: row for row in seen.reserved}.values())
    if sent > reserved or any(isinstance(one, SiteUpdate) for one in beyond[ROUNDS:]):
        found.append(f"{sent} steps were sent, {reserved} reserved")
    return Finding(
        check="stored answers",
        holds=not found,
        measured="; ".join(found) or f"asked three times: the same bytes; lost: {_code(again)}",
        expected="one answer a round, ever; no step beyond those reserved",
    )


def one_budget(scene: Scene) -> Finding:
    """A spent budget stays spent, whatever is renamed, moved, deleted or set back; a run that failed is
    charged."""
    plan = _unscored(site_plan(scene))
    policy = {"max_epsilon": float(plan_epsilon(plan)) * 1.01}
    spent = hospital(scene, "spent", policy=policy)
    before = scene.folder / "before"
    shutil.copytree(spent.parent, before)
    first = run_at(spent, plan, rounds=1).answers[0]
    found, codes = [], []
    if not isinstance(first, SiteUpdate):
        found.append(f"a run within the budget is refused ({_code(first)})")
    resets: dict[str, Callable[[Path], object]] = {
        "nothing changed": lambda site: None,
        "cohort renamed": lambda site: change(site, cohort="renamed"),
        "state moved": lambda site: change(site, state="elsewhere"),
        "state renamed": lambda site: (site.parent / "state").rename(site.parent / "old"),
        "ledger deleted": lambda site: _delete(_ledger_files(site)),
        "ledger without its head deleted": lambda site: _delete(
            path for path in _ledger_files(site) if not path.name.endswith(".head")
        ),
        "ledger of yesterday": lambda site: _set_back(site, before),
    }
    for number, (words, reset) in enumerate(resets.items()):
        site_yaml = scene.folder / f"reset-{number}" / "site.yaml"
        shutil.copytree(spent.parent, site_yaml.parent)
        reset(site_yaml)
        answer = tasks.Agent(site_yaml, plan).train(train_task(run="another"))
        codes.append(_code(answer))
        if not isinstance(answer, Refusal):
            found.append(f"{words}: another run is answered")
    site_yaml = hospital(scene, "interrupted", policy=policy)
    with patch.object(dp_sgd, "descend", side_effect=MemoryError):
        codes.append(_code(tasks.Agent(site_yaml, plan).train(train_task())))
    answer = tasks.Agent(site_yaml, plan).train(train_task(run="another"))
    if not isinstance(answer, Refusal):
        found.append("a run that failed was not charged: another run is answered")
    return Finding(
        check="one budget",
        holds=not found,
        measured="; ".join(found)
        or f"another run after the budget is spent: {', '.join(dict.fromkeys(codes))}",
        expected="refused, whatever is renamed, moved, deleted or set back",
    )


def _ledger_files(site_yaml: Path) -> list[Path]:
    return [path for path in (site_yaml.parent / "state").glob("ledger*") if path.is_file()]


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def _set_back(site_yaml: Path, before: Path) -> None:
    """The ledger as it was before the run, with the head file of today."""
    for path in _ledger_files(site_yaml):
        old = before / "state" / path.name
        if path.name.endswith(".head"):
            continue
        path.unlink()
        if old.exists():
            shutil.copy2(old, path)


def fixed_filter(scene: Scene) -> Finding:
    """How much a hospital admits follows its policy: no delta of a plan moves it."""
    affordable: dict[float, set[int | None]] = {}
    delta = scene.plan.privacy.delta
    for number, rate in enumerate(sorted({scene.plan.privacy.sample_rate, 0.25})):
        plan = _unscored(_long_plan(scene, rate))
        other = plan.model_copy(update={"privacy": plan.privacy.model_copy(update={"delta": delta / 10})})
        policy = {"max_epsilon": float(plan_epsilon(other)) * 1.02, "max_delta": delta}
        for name, first in (("own", plan), ("other", other)):
            site_yaml = hospital(scene, f"filter-{number}-{name}", policy=policy)
            if not run_at(site_yaml, first, rounds=1).updates:
                affordable.setdefault(rate, set()).add(None)
            for asked in (plan, other):
                said = tasks.Agent(site_yaml, asked).describe(DescribeTask(rehearse=True))
                rounds = said.rounds_affordable if isinstance(said, SiteReadiness) else None
                affordable.setdefault(rate, set()).add(rounds)
    wrong = any(len(rounds) != 1 or rounds & {None, 0, AFFORDABLE_ROUNDS} for rounds in affordable.values())
    shown = ", ".join(f"rate {rate:g}: {sorted(map(str, rounds))}" for rate, rounds in affordable.items())
    return Finding(
        check="filter",
        holds=not wrong,
        measured=f"rounds left under two deltas of plans: {shown}".replace("'", ""),
        expected=f"one number each, above 0 and below {AFFORDABLE_ROUNDS}",
    )


def _unscored(plan: RunPlan) -> RunPlan:
    """The plan without its evaluation: what is left of its epsilon would else admit another training."""
    unpriced = {"evaluation_share": 0.0, "evaluation_noise_multiplier": None}
    return plan.model_copy(update={"privacy": plan.privacy.model_copy(update=unpriced)})


def _long_plan(scene: Scene, rate: float) -> RunPlan:
    training = scene.plan.training.model_copy(update={"rounds": AFFORDABLE_ROUNDS})
    privacy = scene.plan.privacy.model_copy(update={"sample_rate": rate, "noise_multiplier": None})
    return with_noise(site_plan(scene, training=training, privacy=privacy))


def lineage(scene: Scene) -> Finding:
    """A private arm refuses starting weights that nobody vouches for, or that patients shaped without
    noise.
    """
    public = NO_DATA.child("checks", weights="0" * 64, kinds=["public"], private=False)
    shaped = public.child("checks", weights="1" * 64, kinds=["hospital"], private=False)
    model = scene.plan.model.model_copy(
        update={"initial": "/coordinator/own.safetensors", "sha256": "5" * 64}
    )
    plan = site_plan(scene, model=model)
    base = (public_weights() + np.float32(0.001)).astype(np.float32)
    found, codes = [], []
    for number, (words, text, admitted) in enumerate(
        (
            ("unknown", "", False),
            ("trained without noise", shaped.text(), False),
            ("public data", public.text(), True),
        )
    ):
        site_yaml = hospital(scene, f"lineage-{number}")
        answer = tasks.Agent(site_yaml, plan).train(train_task(base=base, lineage=text))
        codes.append(f"{words}: {_code(answer)}")
        if isinstance(answer, SiteUpdate) != admitted:
            found.append(codes[-1])
    return Finding(
        check="lineage",
        holds=not found,
        measured="; ".join(found or codes),
        expected="refused; weights of public data are admitted",
    )


def _code(answer: WireMessage) -> str:
    return answer.code if isinstance(answer, Refusal) else type(answer).__name__
