"""A site of the tiny consortium: its enrolment, its ledger, and the model it is sent."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.site.config import read_site, site_key
from client.site.ledger import Ledger, ledger_file_name
from common.model_file import load_model
from common.models import build
from common.signing import new_key, public_text
from common.weights import manifest_of, resolve_initial
from tests.helpers.consortium import TRAINING

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
BASE = load_model(resolve_initial("package:small_cnn.safetensors", None), MANIFEST)
HEAD = MANIFEST.part("head.")


def ledger(data: Path, name: str = A) -> Ledger:
    site, folder = read_site(data / name)
    state = folder / site.state
    return Ledger.open(state / ledger_file_name(site.cohort), cohort=site.cohort, key=site_key(state))


def rows(data: Path, name: str = A) -> list[tuple[str, str, int]]:
    with ledger(data, name) as opened:
        return [(row.kind, row.part, row.steps) for row in opened.rows() if row.kind != "open"]


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
