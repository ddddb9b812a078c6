"""What is not the answer to the question is refused, and says which claim does not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.errors import RunError
from common.weights import LIMIT
from server.messaging.answer_checks import check_update
from tests.helpers.answers import BASE_SHA256, SITE, SIZE, task, update


@pytest.mark.parametrize("private", [False, True])
def test_an_honest_update_passes(private: bool) -> None:
    check_update(update(private), task(private), BASE_SHA256, SITE, SIZE)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"site": "hospital-b"}, "site"),
        ({"run": "other"}, "run"),
        ({"arm": "local"}, "arm"),
        ({"round": 2}, "round"),
        ({"base_sha256": "cd" * 32}, "base"),
        ({"weight": 5000}, "weight"),
        ({"private": True}, "private"),
        ({"update": np.zeros(SIZE + 1, np.int32)}, "shape"),
        ({"update": np.zeros((1, SIZE), np.int32)}, "shape"),
        ({"update": np.zeros((), np.int32)}, "shape"),
        ({"update": np.zeros(SIZE, np.int64)}, "dtype"),
        ({"update": np.zeros(SIZE, np.float32)}, "dtype"),
        ({"update": np.zeros(SIZE, ">i4")}, "dtype"),
        ({"update": np.array([0, 0, 0, 0, LIMIT + 1], np.int32)}, "grid"),
        ({"update": np.array([0, 0, 0, 0, -LIMIT - 1], np.int32)}, "grid"),
        ({"update": np.array([0, 0, 0, 0, -(2**31)], np.int32)}, "grid"),
    ],
)
def test_a_claim_that_does_not_hold_is_named(changes: dict[str, Any], claim: str) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(**changes), task(), BASE_SHA256, SITE, SIZE)
    assert caught.value.code == "bad-update"
    assert claim in caught.value.message
    assert caught.value.message.startswith("hospital-a: ")


@pytest.mark.parametrize(
    "missing", [{"epsilon": None}, {"delta": None}, {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}]
)
def test_a_private_update_says_what_it_guarantees(missing: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        check_update(update(True, **missing), task(True), BASE_SHA256, SITE, SIZE)
    assert caught.value.code == "bad-update"


def test_a_non_private_update_does_not_answer_a_private_task() -> None:
    with pytest.raises(RunError):
        check_update(update(True, private=False), task(True), BASE_SHA256, SITE, SIZE)
