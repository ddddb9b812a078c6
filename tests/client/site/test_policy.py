from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from client.site.enrolment import LEVELS
from client.site.policy import (
    SitePolicy,
    admit_hours,
    admit_noised_evaluation,
    admit_training,
    default_policy,
    evaluation_mode,
    in_plain_words,
    read_policy,
)
from common.errors import ConfigError, RefusedError

PLAN: dict[str, Any] = {
    "private": True,
    "epsilon": 3.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_patients": 200,
    "rounds": 20,
}


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_hospital_is_cautious_by_default() -> None:
    policy = default_policy("hospital")
    assert (policy.max_epsilon, policy.max_delta, policy.evaluation, policy.allow_non_private) == (
        8.0,
        1e-5,
        "dp",
        False,
    )
    admit_training(policy, **PLAN | {"epsilon": 2.0})
    with pytest.raises(RefusedError, match="at most 2 per run"):
        admit_training(policy, **PLAN | {"epsilon": 2.01})
    assert SitePolicy().epsilon_per_run == 8.0  # a policy that was written keeps its numbers


@pytest.mark.parametrize("kind", ["public", "synthetic"])
def test_a_public_site_is_open_but_refuses_a_tiny_cohort_like_a_hospital(kind: Any) -> None:
    policy = default_policy(kind)
    admit_training(
        policy,
        **{
            **PLAN,
            "private": False,
            "epsilon": None,
            "delta": None,
            "clip_norm": None,
            "nominal_patients": 4,
        },
    )
    with pytest.raises(RefusedError) as caught:
        admit_training(policy, **{**PLAN, "nominal_patients": 49})
    assert caught.value.code == "too-few-patients"


def test_an_unknown_kind_of_site_is_refused() -> None:
    with pytest.raises(ConfigError, match="clinic"):
        default_policy("clinic")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"epsilon": 8.0001}, "epsilon-over-policy"),
        ({"delta": 2e-5}, "delta-over-policy"),
        ({"nominal_patients": 20}, "too-few-patients"),
        ({"private": False}, "non-private-not-permitted"),
        ({"clip_norm": 2.5}, "clip-norm-over-policy"),
        ({"rounds": 101}, "too-many-rounds"),
        ({"private": False, "rounds": 101}, "too-many-rounds"),
    ],
)
def test_a_plan_looser_than_the_policy_is_refused_with_the_reason(change: dict[str, Any], code: str) -> None:
    policy = SitePolicy(max_clip_norm=2.0, max_rounds=100)
    with pytest.raises(RefusedError) as caught:
        admit_training(policy, **{**PLAN, **change})
    assert caught.value.code == code
    assert "policy" in caught.value.public_reason


def test_a_stricter_plan_is_admitted_and_nothing_is_altered() -> None:
    assert (
        admit_training(SitePolicy(), **{**PLAN, "epsilon": 0.1, "delta": 1e-9, "nominal_patients": 50})  # type: ignore[func-returns-value]
        is None
    )


def test_a_run_may_have_less_than_the_lifetime() -> None:
    policy = SitePolicy(max_epsilon=8.0, max_epsilon_per_run=2.0)
    with pytest.raises(RefusedError, match="at most 2"):
        admit_training(policy, **PLAN)


@pytest.mark.parametrize("field", ["epsilon", "delta", "clip_norm"])
@pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan"), float("inf"), True, "3"])
def test_a_private_arm_without_a_real_bound_is_an_error(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        admit_training(SitePolicy(), **{**PLAN, field: value})


@pytest.mark.parametrize(
    ("permitted", "kind", "noise", "mode"),
    [
        ("dp", "hospital", 4.0, "dp"),
        ("dp", "hospital", None, None),
        ("disclosed", "hospital", 4.0, "disclosed"),
        ("disclosed", "hospital", None, "disclosed"),
        ("synthetic", "hospital", 4.0, None),
        ("none", "hospital", 4.0, None),
        ("synthetic", "synthetic", 4.0, "synthetic"),
        ("dp", "public", None, "synthetic"),
        ("none", "public", 4.0, None),
    ],
)
def test_a_site_is_scored_as_loosely_as_its_policy_permits_and_no_looser(
    permitted: Any, kind: Any, noise: float | None, mode: str | None
) -> None:
    policy = SitePolicy(evaluation=permitted)
    if mode is not None:
        assert evaluation_mode(policy, kind, noise) == mode
        return
    with pytest.raises(RefusedError) as caught:
        evaluation_mode(policy, kind, noise)
    assert caught.value.code == "evaluation-not-permitted"
    missing = "evaluation_noise_multiplier" in caught.value.public_reason
    assert missing == (permitted == "dp"), "what the plan lacks is named"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"nominal_patients": 50}, "too-few-patients"),
        ({"epsilon": 1.01}, "epsilon-over-policy"),
        ({"delta": 1e-5}, "delta-over-policy"),
        ({}, None),
    ],
)
def test_an_evaluation_with_noise_is_held_to_the_same_caps_as_training(
    changes: dict[str, Any], code: str | None
) -> None:
    asked = {"epsilon": 1.0, "delta": 1e-6, "nominal_patients": 500} | changes
    cautious = LEVELS["cautious"].policy
    if code is None:
        admit_noised_evaluation(cautious, **asked)
        return
    with pytest.raises(RefusedError) as caught:
        admit_noised_evaluation(cautious, **asked)
    assert caught.value.code == code


def test_a_policy_is_read_as_people_write_it(tmp_path: Path) -> None:
    policy = read_policy(
        written(tmp_path, "max_epsilon: 3\nmax_delta: 1e-6\nevaluation: none\nmax_rounds: 40\n")
    )
    assert policy == SitePolicy(max_epsilon=3.0, max_delta=1e-6, evaluation="none", max_rounds=40)
    assert read_policy(written(tmp_path, "# nothing yet\n")) == SitePolicy()


def test_every_wrong_field_is_named_with_value_and_bound(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        (
            "max_epsilon: -1\nmax_delta: 0.1\nmin_nominal_patients: 2.5\nallow_non_private: "
            '"yes"\nmax_epsilonn: 3\n'
        ),
    )
    with pytest.raises(ConfigError) as caught:
        read_policy(path)
    message = caught.value.message
    assert "`max_epsilon` = -1: must be greater than 0" in message
    assert "`max_delta` = 0.1: must be less than 0.001" in message
    assert "`min_nominal_patients` = 2.5" in message
    assert "`allow_non_private` = 'yes'" in message
    assert "unknown key `max_epsilonn`" in message
    assert caught.value.code == "bad-policy"
    assert "evaluation" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "max_epsilon: .inf\n",
        "max_epsilon: .nan\n",
        "max_epsilon: '3'\n",
        "max_epsilon: 3\nmax_epsilon: 100\n",
        "- max_epsilon\n",
        "max_epsilon: [\n",
        "evaluation: all\n",
        "max_epsilon: 2\nmax_epsilon_per_run: 3\n",
        "max_epsilon: !!python/object/apply:os.getcwd []\n",
    ],
)
def test_a_policy_that_could_be_misread_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_policy(written(tmp_path, text))
    assert caught.value.code == "bad-policy"


def test_a_missing_policy_is_an_error_not_a_default(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_policy(tmp_path / "policy.yaml")
    assert caught.value.code == "policy-unreadable"


def test_a_policy_cannot_be_changed_in_memory() -> None:
    with pytest.raises(ValidationError):
        SitePolicy().max_epsilon = 100.0  # type: ignore[misc]


def test_policy_ledger_and_outbox_need_no_torch() -> None:
    code = (
        "import sys, client.site.policy, client.site.ledger, client.site.answer_store; "
        "print(sorted({'torch', 'opacus', 'flwr'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("hours", "clock", "is_admitted"),
    [
        (None, "12:00", True),
        ("22:00-06:00", "23:59", True),
        ("22:00-06:00", "00:00", True),
        ("22:00-06:00", "05:59", True),
        ("22:00-06:00", "06:00", False),
        ("22:00-06:00", "21:59", False),
        ("08:00-17:30", "08:00", True),
        ("08:00-17:30", "17:29", True),
        ("08:00-17:30", "17:30", False),
        ("20:00-00:00", "23:00", True),
        ("20:00-00:00", "00:00", False),
    ],
)
def test_work_begins_only_in_the_hours_of_the_policy(
    hours: str | None, clock: str, is_admitted: bool
) -> None:
    policy, now = SitePolicy(hours=hours), datetime.fromisoformat(f"2026-03-01T{clock}:30")
    if is_admitted:
        admit_hours(policy, now)
    else:
        with pytest.raises(RefusedError) as caught:
            admit_hours(policy, now)
        assert caught.value.code == "outside-hours"


def test_a_refusal_out_of_hours_tells_the_rule_and_not_the_clock() -> None:
    reasons = set()
    for clock in ("07:00", "21:59"):
        with pytest.raises(RefusedError) as caught:
            admit_hours(SitePolicy(hours="22:00-06:00"), datetime.fromisoformat(f"2026-03-01T{clock}:00"))
        reasons.add(caught.value.public_reason)
    assert reasons == {"this site's policy permits work at 22:00-06:00 local time only"}


@pytest.mark.parametrize(
    "hours", ["22-6", "24:00-06:00", "22:00-22:00", "22:00 - 06:00", "22:60-06:00", "", "2200", "always"]
)
def test_hours_that_could_be_misread_are_refused(hours: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two different times of day"):
        read_policy(written(tmp_path, f"hours: '{hours}'\n"))


def test_hours_are_read_as_people_write_them(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "hours: 22:00-06:00\n")).hours == "22:00-06:00"


def test_epsilon_in_plain_words_is_an_upper_bound() -> None:
    assert "at most 74 times in 100" in in_plain_words(1.0, 1e-5)  # e / (1 + e) = 0.731
    assert "at most 51 times in 100" in in_plain_words(0.01, 1e-5)  # 0.5025
    assert "99.97" in in_plain_words(8.0, 1e-5)
    assert "says little" in in_plain_words(8.0, 1e-5)
    assert "says little" not in in_plain_words(2.0, 1e-5)
    assert "certain" in in_plain_words(float("inf"), 0.0)
    assert "100 times in 100" in in_plain_words(1000.0, 1e-5)
