"""What evaluation.json holds beside the numbers of a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.evaluation_file import SCHEMA


def empty_evaluation(sites: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    """Of a run in which nothing was scored; all its sites are made of phantoms."""
    return {
        "schema": SCHEMA,
        "question": "",
        "rounds": 1,
        "epochs": 1,
        "status": "completed",
        "private_arms": [],
        "incomplete": [],
        "refusals": [],
        "privacy": {},
        "curves": {},
        "chosen_rounds": {},
        "cpu_seconds": 1.0,
        "seconds": 1.0,
        "scoring": {site: {"mode": "synthetic"} for site in sites},
        "counts": {site: {} for site in sites},
        "covariance": {},
        "averaged": {site: ["metal"] for site in sites},
        "missing": [],
        "metrics": {},
        "matrix": {},
        "model_scores": {},
        "scores": {},
        "headline": {},
        "worst": {},
        "common": None,
        "contrasts": [],
        "below_chance": [],
        "looks": {"overall": 2, "sites": 2, "below_chance": 3},
        "sites": [
            {
                "site": site,
                "role": "held_out" if site in held_out else "training",
                "kind": "synthetic",
                "nominal_patients": 50,
                "stand_in": "",
                "version": "0.1.0",
            }
            for site in sites
        ],
    }
