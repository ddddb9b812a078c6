"""The list of what leaves a hospital, and Flower records with arbitrary payloads."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from flwr.app import RecordDict

from common.wire import (
    DISCLOSED,
    DP,
    PUBLIC,
    Envelope,
)

LEAVES_A_HOSPITAL = {
    "SiteDescription": {
        "site": PUBLIC,
        "kind": PUBLIC,
        "members": PUBLIC,
        "nominal_patients": PUBLIC,
        "stand_in": PUBLIC,
        "unit": PUBLIC,
        "ethics": PUBLIC,
        "version": PUBLIC,
        "ledger_head": PUBLIC,
        "nominal_tested": PUBLIC,
    },
    "SiteReadiness": {
        "site": PUBLIC,
        "kind": PUBLIC,
        "nominal_patients": PUBLIC,
        "version": PUBLIC,
        "arms": PUBLIC,
        "reasons": PUBLIC,
        "evaluation": PUBLIC,
        "scoring": PUBLIC,
        "nominal_tested": PUBLIC,
        "data_prepared": PUBLIC,
        "rounds_affordable": PUBLIC,
        "seconds_a_round": PUBLIC,
    },
    "SiteUpdate": {
        "site": PUBLIC,
        "run": PUBLIC,
        "arm": PUBLIC,
        "round": PUBLIC,
        "base_sha256": PUBLIC,
        "weight": PUBLIC,
        "private": PUBLIC,
        "noise_multiplier": PUBLIC,
        "epsilon": PUBLIC,
        "delta": PUBLIC,
        "data_changed": PUBLIC,
        "void": PUBLIC,
        "ledger_head": PUBLIC,
        "added_variance": DP,
        "update": DP,
    },
    "SiteEvaluation": {
        "site": PUBLIC,
        "run": PUBLIC,
        "models": PUBLIC,
        "mode": PUBLIC,
        "noise_multiplier": PUBLIC,
        "epsilon": PUBLIC,
        "delta": PUBLIC,
        "data_changed": PUBLIC,
        "noised": DP,
        "histograms": DISCLOSED,
        "covariance": DISCLOSED,
        "any_histograms": DISCLOSED,
        "subgroups": DISCLOSED,
    },
    "Refusal": {"site": PUBLIC, "run": PUBLIC, "code": PUBLIC, "reason": PUBLIC, "incident": PUBLIC},
}


def payload(text: Any, arrays: dict[str, np.ndarray] | None = None) -> bytes:
    """The bytes of a message whose JSON part is `text`, whatever that is."""
    header: dict[str, Any] = {"__metadata__": {"json": text}}
    body = b""
    for name, array in (arrays or {}).items():
        raw = array.tobytes()
        kind = {"float64": "F64", "int32": "I32"}[str(array.dtype)]
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + body


def record(text: Any, arrays: dict[str, np.ndarray] | None = None) -> RecordDict:
    return Envelope(payload=payload(text, arrays)).to_record()
