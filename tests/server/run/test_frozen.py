"""A frozen arm trains what the private arm trains, in ordinary steps: it parts the price of frozen layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from common.errors import PlanError
from common.i18n import speaker
from common.model_file import load_model
from common.plan import RunPlan
from common.pricing import plan_epsilon, with_noise
from common.trainable import trained_part
from common.weights import outside, part_size
from server.evaluation.report.page import price_tables, render
from server.evaluation.report.reading import Reading
from server.evaluation.report.words import LANGUAGES
from server.run.recompute import recompute
from tests.helpers.consortium import Consortium, settle, tiny_plan
from tests.helpers.site_agent import BASE, MANIFEST, A, agent, refusal_of, train_task, update_of

PERMITS = {"allow_non_private": True, "evaluation": "synthetic"}
ARMS = [
    "public",
    "local",
    "local_frozen",
    "federated",
    "federated_frozen",
    "federated_clipped",
    "federated_dp",
]


def plan_of(arms: list[str], **changes: Any) -> RunPlan:
    privacy = {"epsilon": 8.0, "clip_norm": 0.1, "alternatives": True} | changes.pop("privacy", {})
    values: dict[str, Any] = {"name": "frozen", "arms": arms, "training": {"rounds": 2}}
    return with_noise(tiny_plan(**values | changes, privacy=privacy))


@pytest.mark.parametrize("trainable", ["head", "norms"])
def test_it_trains_the_private_part_and_nothing_else(data: Path, trainable: str) -> None:
    plan = plan_of(["federated", "federated_frozen"], privacy={"trainable": trainable})
    asked = agent(data, plan=plan)
    whole = update_of(asked.train(train_task(arm="federated", private=False)))
    frozen = update_of(asked.train(train_task(arm="federated_frozen", private=False)))
    assert frozen.update.shape == (part_size(trained_part(plan, "federated_frozen")),)
    assert frozen.update.size < whole.update.size
    assert frozen.update.any()
    assert (frozen.private, frozen.epsilon, frozen.noise_multiplier) == (False, None, 0.0)


def test_a_run_parts_the_price(consortium: Consortium, tmp_path: Path) -> None:
    plan = plan_of(ARMS)
    folder = consortium.conduct(plan, tmp_path / "run")
    frozen, whole = (
        load_model(folder.arm(arm).model_path, MANIFEST) for arm in ("federated_frozen", "federated")
    )
    kept = outside(trained_part(plan, "federated_frozen"), MANIFEST.size)
    assert np.array_equal(frozen[kept], BASE[kept])
    assert not np.array_equal(whole[kept], BASE[kept])
    assert not np.array_equal(frozen, BASE)
    assert [finding for finding in recompute(folder) if finding.holds is False] == []
    found = {(row["arm"], row["other"], row["where"]): row["value"] for row in folder.evaluation["contrasts"]}
    steps = [
        ("federated_frozen", "federated"),
        ("federated_clipped", "federated_frozen"),
        ("federated_dp", "federated_clipped"),
    ]
    told = [where for *_, where in found if found.get(("federated_dp", "federated", where)) is not None]
    assert told
    for where in told:
        price = sum(found[(*step, where)] for step in steps)
        assert price == pytest.approx(found["federated_dp", "federated", where], abs=1e-9)
    assert f"local_frozen/{A}" in folder.evaluation["matrix"]
    with safetensors.safe_open(folder.path / "model.safetensors", framework="np") as file:
        assert file.metadata()["arm"] == "federated_dp"


def test_the_report_names_the_three_parts_in_both_languages(consortium: Consortium, tmp_path: Path) -> None:
    folder = consortium.conduct(plan_of(ARMS), tmp_path / "run")
    for language, words in (
        ("en", ("frozen", "clipped, other steps", "noised", "Of this, layers that are frozen: ")),
        ("zh", ("冻结", "裁剪、不同步数", "噪声", "其中，冻结的层：")),
    ):
        reading = Reading(folder.evaluation, speaker(language, LANGUAGES))
        price = next(row for row in price_tables(reading, folder.plan) if row["arm"] == "federated_dp")
        assert [row["step"] for row in price["rows"]][1:] == list(words[:3])
        assert reading.privacy_tag("federated_frozen") == reading.privacy_tag("federated")
        assert words[3] in render(folder.evaluation, folder.manifest, folder.plan, language=language)


def test_it_costs_nothing_and_is_for_simulations_only(consortium: Consortium) -> None:
    plan = plan_of(["federated_dp", "federated_frozen"])
    assert plan_epsilon(plan) == plan_epsilon(plan_of(["federated_dp"]))
    assert plan.simulated_arms == ("federated_frozen",)
    settle(consortium.data / A, kind="hospital", policy=PERMITS)
    asked = agent(consortium.data, plan=plan)
    assert (
        refusal_of(asked.train(train_task(arm="federated_frozen", private=False))).code == "simulation-only"
    )
    with pytest.raises(PlanError, match="only controls"):
        plan_of(["federated_frozen"])
    with pytest.raises(PlanError, match="freezes nothing"):
        plan_of(["federated", "federated_frozen"], privacy={"trainable": "all"})
