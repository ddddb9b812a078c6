"""A hostile or broken site costs itself the round or its score, never the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.errors import RunError
from common.wire import SiteDescription, SiteEvaluation, SiteReadiness, message_type
from server.messaging.answer_checks import check_update
from tests.helpers.answers import BASE_SHA256, PLAN, SITE, SIZE, task, update
from tests.helpers.consortium import TRAINING, Consortium, tiny_plan
from tests.helpers.wire import record

A, B, _ = TRAINING


def evaluation_with(**changes: Any) -> Any:
    def tamper(question: Message, answer: Message) -> Message | None:
        if message_type(answer.content) != "SiteEvaluation" or question.metadata.dst_node_id != 2:
            return None
        said = SiteEvaluation.from_record(answer.content)
        values = said.model_dump() | {key: value(said) for key, value in changes.items()}
        return Message(content=SiteEvaluation(**values).to_record(), reply_to=question)

    return tamper


@pytest.mark.parametrize(
    "changes",
    [
        {"covariance": lambda said: said.covariance[:2, :2]},
        {"covariance": lambda said: said.covariance.astype(np.int8)},
        {"covariance": lambda said: -1000 * np.eye(len(said.covariance))},
        {"histograms": lambda said: said.histograms[..., :7]},
        {"histograms": lambda said: said.histograms.astype(np.float64)},
        {"histograms": lambda said: -said.histograms},
        {"histograms": lambda said: said.histograms + 2**61},
        {"models": lambda said: ("other",)},
        {"run": lambda said: "other"},
        {"site": lambda said: "other"},
    ],
    ids=[
        "cov-shape",
        "cov-int",
        "cov-negative",
        "bins",
        "float",
        "negative",
        "overflow",
        "models",
        "run",
        "site",
    ],
)
def test_a_bad_evaluation_costs_its_site_only(
    changes: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Consortium(data=data, tamper=evaluation_with(**changes)).conduct(
        tiny_plan(training={"rounds": 1}), tmp_path / "run"
    )
    found = folder.evaluation
    assert found["incomplete"] == [f"evaluation: {B} gave no score (bad-evaluation)"]
    assert B not in found["counts"]
    assert capsys.readouterr().err.count("[bad-evaluation]") == 1


@pytest.mark.parametrize("kind", ["query.describe", "evaluate"])
@pytest.mark.parametrize(
    "half", ['{"type": "SiteDescription"}', '{"type": "SiteEvaluation"}', '{"type": "Refusal"}', "7", "[]"]
)
def test_a_malformed_answer_costs_its_site_only(kind: str, half: str, data: Path, tmp_path: Path) -> None:
    def tamper(question: Message, answer: Message) -> Message | None:
        mine = question.metadata.dst_node_id == 2 and question.metadata.message_type == kind
        return Message(content=record(half), reply_to=question) if mine else None

    plan = tiny_plan(training={"rounds": 1}, federation={"deadline_s": 5.0})
    folder = Consortium(data=data, tamper=tamper).conduct(plan, tmp_path / "run")
    assert A in folder.evaluation["counts"]
    assert B not in folder.evaluation["counts"]


@pytest.mark.parametrize(
    "claim",
    [
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": 1e-9},
        {"epsilon": float("nan")},
        {"epsilon": -1.0},
        {"epsilon": 0.0},
        {"epsilon": float("inf")},
        {"delta": 0.0},
        {"delta": 2.0},
        {"delta": float("nan")},
    ],
)
def test_a_guarantee_that_is_none_is_refused(claim: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(True, **claim), task(True), BASE_SHA256, SITE, SIZE, PLAN)
    assert caught.value.code in {"bad-update", "bad-message"}


@pytest.mark.parametrize(
    "claim", [{"epsilon": 1e30}, {"epsilon": 0.1, "delta": 1e-5}, {"delta": 1e-5}, {"noise_multiplier": 3.0}]
)
def test_an_answer_without_noise_claims_no_guarantee(claim: dict[str, Any]) -> None:
    """Else the report would state it."""
    with pytest.raises(RunError) as caught:
        check_update(update(False, **claim), task(False), BASE_SHA256, SITE, SIZE, PLAN)
    assert caught.value.code == "bad-update"


@pytest.mark.parametrize(
    "claim",
    [
        {"seconds_a_round": float("inf")},
        {"seconds_a_round": -1.0},
        {"rounds_affordable": 10**4000},
        {"rounds_affordable": -1},
        {"arms": {"federated\x1b[2K": "accept"}},
        {"reasons": {"x" * 200: "no"}},
        {"evaluation": "accept\u202e"},
    ],
)
def test_a_readiness_that_no_site_has_is_no_message(claim: dict[str, Any]) -> None:
    values = {"site": "a", "kind": "public", "nominal_patients": 50, "version": "0", "arms": {}}
    honest = SiteReadiness(**values, reasons={}, evaluation="accept", data_prepared=True)
    assert SiteReadiness.from_bytes(honest.to_bytes()) == honest
    with pytest.raises(RunError) as caught:
        SiteReadiness.from_bytes(honest.model_copy(update=claim).to_bytes())
    assert caught.value.code == "bad-message"
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("nominal", [10**10, 2**62, 2**70])
def test_a_site_cannot_make_itself_larger_than_any_hospital(nominal: int) -> None:
    """Its weight times its update would wrap around, or drown all others."""
    with pytest.raises((RunError, ValueError)):
        SiteDescription(site="a", kind="public", nominal_patients=nominal, version="0")


def test_a_public_set_too_small_to_score_does_not_break_the_local_arm(data: Path, tmp_path: Path) -> None:
    for patients in (2, 3):
        plan = tiny_plan(arms=["local"], public_set={"patients": patients})
        folder = Consortium(data=data).conduct(plan, tmp_path / f"run{patients}")
        assert folder.evaluation["status"] == "completed"


def test_a_round_without_quorum_says_who_failed(data: Path, tmp_path: Path) -> None:
    consortium = Consortium(data=data, lost={A, B})
    with pytest.raises(RunError) as caught:
        consortium.conduct(tiny_plan(), tmp_path / "run")
    assert f"{A} unavailable" in caught.value.message


def test_local_arms_that_all_fail_are_a_failure_not_a_refusal(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        Consortium(data=data, lost=set(TRAINING)).conduct(tiny_plan(arms=["local"]), tmp_path / "run")
    assert caught.value.exit_status == 1
