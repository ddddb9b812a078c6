"""AUROCs by subgroup of patients: tables, and the differences between levels that exceed chance."""

from __future__ import annotations

from typing import Any

from common.subgroups import SUBGROUPS
from server.evaluation.inference import LEVEL
from server.evaluation.report.decisions import lead_of
from server.evaluation.report.numerals import score, signed
from server.evaluation.report.reading import Reading
from server.evaluation_file import SubgroupDifference, SubgroupRow


def subgroup_tables(reading: Reading) -> list[dict[str, Any]]:
    """The arms with subgroups, the lead first; each with a table a place. None where no site counted any."""
    found = reading.evaluation.get("subgroups")
    if found is None:
        return []
    lead = lead_of(reading)
    arms = sorted(found["rows"], key=lambda arm: arm != lead)
    return [
        {
            "arm": arm,
            "tag": reading.privacy_tag(arm),
            "places": places,
            "differences": _differences(reading, arm),
        }
        for arm in arms
        if (places := _places(reading, found["rows"][arm]))
    ]


def _places(reading: Reading, rows: list[SubgroupRow]) -> list[dict[str, Any]]:
    """Training sites together and held-out sites together; of an arm without a shared model, each site."""
    names = list(dict.fromkeys(row["place"] for row in rows))
    shown = [name for name in names if name in ("home", "unseen")] or names
    return [_place(reading, [row for row in rows if row["place"] == name]) for name in shown]


def _place(reading: Reading, rows: list[SubgroupRow]) -> dict[str, Any]:
    artifacts = [name for name in reading.artifacts if any(row["artifact"] == name for row in rows)]
    cells = {(row["subgroup"], row["level"], row["artifact"]): row for row in rows}
    levels = [
        (subgroup, level)
        for subgroup, every in SUBGROUPS.items()
        for level in every
        if any((subgroup, level, artifact) in cells for artifact in artifacts)
    ]
    return {
        "title": reading.listing([reading.name(site) for site in rows[0]["sites"]]),
        "columns": [reading.title(name) for name in artifacts],
        "rows": [
            {
                "name": level_name(reading, subgroup, level),
                "cells": [_cell(reading, cells.get((subgroup, level, name))) for name in artifacts],
            }
            for subgroup, level in levels
        ],
    }


def _cell(reading: Reading, row: SubgroupRow | None) -> dict[str, str]:
    if row is None:
        return {"text": "–", "interval": "", "n": ""}
    size = f"{row['n_pos']} / {row['n_neg']}"
    if row["auroc"] is None or row["low"] is None or row["high"] is None:
        return {"text": reading.say("subgroups.not_estimable"), "interval": "", "n": size}
    return {
        "text": score(row["auroc"]),
        "interval": f"{score(row['low'])} – {score(row['high'])}",
        "n": size,
    }


def level_name(reading: Reading, subgroup: str, level: str) -> str:
    """`field strength: 3 T`."""
    key = f"level.{subgroup}.{level}" if level == "other" else f"level.{level}"
    names = {"subgroup": reading.say(f"subgroup.{subgroup}"), "level": reading.say(key)}
    return reading.say("subgroups.level", **names)


def _differences(reading: Reading, arm: str) -> dict[str, Any]:
    """How many were tested, and those below .05 after Holm's correction, in words."""
    tested: list[SubgroupDifference] = reading.evaluation["subgroups"]["differences"].get(arm, [])
    beyond = [row for row in tested if row["p_holm"] is not None and row["p_holm"] < 1 - LEVEL]
    return {
        "tested": len(tested),
        "lines": [
            reading.say(
                "subgroups.difference",
                place=reading.say(f"subgroups.{row['place']}"),
                artifact=reading.title(row["artifact"]),
                one=level_name(reading, row["subgroup"], row["level"]),
                other=level_name(reading, row["subgroup"], row["other"]),
                value=signed(row["value"]),
                low=signed(row["low"]),
                high=signed(row["high"]),
                p=f"{row['p_holm']:.3g}",
            )
            for row in beyond
        ],
    }
