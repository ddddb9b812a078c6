"""A site of the tiny consortium: its enrolment, its ledger, and the model it is sent."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.agent.tasks import Agent
from client.site.config import read_site
from client.site.ledger import Ledger
from client.site.site_ledger import open_ledger
from common.artifacts import DEFAULT_LABELS
from common.model_file import load_model
from common.models import build
from common.plan import Model, RunPlan
from common.signing import new_key, public_text
from common.weights import manifest_of, resolve_initial
from common.wire import EvaluateTask, Refusal, SiteUpdate, TrainTask, WireMessage
from tests.helpers.consortium import TRAINING, tiny_plan

COORDINATOR, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (7, 8))


def enrol(site: Path, coordinator: Ed25519PrivateKey = COORDINATOR) -> Ed25519PrivateKey:
    """What `fedqc site init` and `join` leave in a site's state folder; gives the site's signing key."""
    state = site / "state"
    key = new_key(state / "signing.key")
    pinned = {
        "federation": "qc",
        "coordinator_key": public_text(coordinator),
        "fingerprint": "",
        "expires": "2099-01-01",
    }
    (state / "coordinator.json").write_text(json.dumps(pinned), encoding="utf-8")
    return key


A, B, C = TRAINING
MARKER = "MARKER-4711-Zhang-San"
MANIFEST = manifest_of(build("small_cnn").state_dict())
BASE = load_model(resolve_initial(Model().initial, None), MANIFEST, DEFAULT_LABELS)
HEAD = MANIFEST.part("head.")


def ledger(data: Path, name: str = A) -> Ledger:
    return open_ledger(*read_site(data / name))


def rows(data: Path, name: str = A) -> list[tuple[str, str, int]]:
    with ledger(data, name) as opened:
        charges = [row for row in opened.rows() if row.kind in ("reserve", "commit", "non-private")]
        return [(row.kind, row.part, row.steps) for row in charges]


def spellings(text: str) -> list[bytes]:
    """The text as it may hide in other bytes: raw, other case, backwards, hex, base64 at any offset."""
    raw = text.encode()
    turned = [base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)]
    assert all(len(part) >= 4 for part in turned), "too short to look for"
    return [
        raw,
        raw.lower(),
        raw[::-1],
        raw.hex().encode(),
        raw.hex().upper().encode(),
        text.encode("utf-16-le"),
        *turned,
    ]


PLAN = tiny_plan(name="private", arms=["federated", "federated_dp"])


def agent(data: Path, name: str = A, plan: RunPlan = PLAN) -> Agent:
    return Agent(data / name / "site.yaml", plan)


def train_task(**changes: Any) -> TrainTask:
    return TrainTask(
        **({"run": "r", "arm": "federated_dp", "round": 1, "private": True, "base": BASE} | changes)
    )


def non_private(**changes: Any) -> TrainTask:
    return train_task(**({"arm": "federated", "private": False} | changes))


def evaluate_task(everyone: bool = False) -> EvaluateTask:
    return EvaluateTask(run="r", models=("public",), everyone=everyone, weights=BASE[None])


def update_of(answer: WireMessage) -> SiteUpdate:
    assert isinstance(answer, SiteUpdate), answer
    return answer


def refusal_of(answer: WireMessage) -> Refusal:
    assert isinstance(answer, Refusal), answer
    return answer
