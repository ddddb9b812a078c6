"""A ledger as earlier versions wrote it: one file a cohort, byte for byte in their format."""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from common.privacy import GaussianSteps


def old_row(kind: str, request: str, charged: GaussianSteps | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "request": request,
        "part": "",
        "purpose": "federated_dp",
        "fingerprint": "f" * 32,
        "noise_multiplier": float(charged.noise_multiplier) if charged else 0.0,
        "sample_rate": float(charged.sample_rate) if charged else 0.0,
        "steps": charged.steps if charged else 0,
        "at": "2026-03-01T10:00:00+00:00",
    } | changes


def old_name(cohort: str) -> str:
    return f"ledger-{hashlib.sha256(cohort.encode()).hexdigest()[:16]}.sqlite3"


def write_old_ledger(
    state: Path, key: bytes, rows: Sequence[Mapping[str, Any]], cohort: str = "radiology"
) -> Path:
    """Write ledger and head file of an earlier version, with an `open` row before `rows`."""
    state.mkdir(parents=True, exist_ok=True)
    path = state / old_name(cohort)
    derived = hmac.digest(key, b"fedqc privacy ledger v1\0" + cohort.encode(), "sha256")
    mac, length = b"", 0
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute(
            "CREATE TABLE rows (sequence INTEGER PRIMARY KEY, content TEXT NOT NULL, mac BLOB NOT NULL)"
        )
        for length, row in enumerate([old_row("open", cohort, purpose="", fingerprint=""), *rows], start=1):
            content = json.dumps(dict(row), sort_keys=True, ensure_ascii=False, allow_nan=False)
            message = length.to_bytes(8, "big") + len(mac).to_bytes(8, "big") + mac + content.encode()
            mac = hmac.digest(derived, message, "sha256")
            database.execute("INSERT INTO rows VALUES (?, ?, ?)", (length, content, mac))
    seal = hmac.digest(derived, b"head" + length.to_bytes(8, "big") + mac, "sha256")
    head = {"length": length, "mac": mac.hex(), "seal": seal.hex()}
    path.with_name(path.name + ".head").write_text(json.dumps(head))
    return path
