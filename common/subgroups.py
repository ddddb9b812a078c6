"""Subgroups of patients in which a model is scored apart: a fixed vocabulary, no text of a header."""

from __future__ import annotations

from itertools import combinations

SEVERITY = "severity"
"""Of the artifact, not of the patient: each level has the positives of its own, and all negatives."""

SUBGROUPS: dict[str, tuple[str, ...]] = {
    "vendor": ("siemens", "ge", "philips", "canon", "united_imaging", "other"),
    "field_strength": ("1.5_t", "3_t", "other"),
    "tube_voltage": ("to_90_kv", "91_to_110_kv", "111_to_130_kv", "over_130_kv"),
    "body_part": ("head", "neck", "chest", "abdomen", "pelvis", "spine", "limb", "other"),
    "sex": ("female", "male"),
    "age": ("under_20", "20_to_39", "40_to_59", "60_to_79", "80_and_over"),
    SEVERITY: ("mild", "moderate", "severe"),
}
LEVELS: tuple[tuple[str, str], ...] = tuple(
    (subgroup, level) for subgroup, levels in SUBGROUPS.items() for level in levels
)
"""The order in which they travel."""
PLACE: dict[tuple[str, str], int] = {level: place for place, level in enumerate(LEVELS)}


def pairs() -> list[tuple[str, str, str]]:
    """Each subgroup with two of its levels."""
    return [(name, *two) for name, levels in SUBGROUPS.items() for two in combinations(levels, 2)]
