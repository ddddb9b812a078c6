"""One vocabulary, whose order is the order of the model's outputs."""

from __future__ import annotations

import pytest

from common.artifacts import (
    ARTIFACTS,
    DEFAULT_LABELS,
    INDEX,
    MODALITIES,
    NAMES,
    Artifact,
    applies_to,
    modality_text,
    parse_name,
)
from common.errors import ConfigError


def test_the_order_of_outputs_is_this() -> None:
    """Committed weights and every stored evaluation depend on it: append, never reorder."""
    five = ("metal", "beam_hardening", "motion", "susceptibility", "chemical_shift")
    assert NAMES[:7] == (*five, "quality", "ct_motion")
    assert five == DEFAULT_LABELS
    assert {name: NAMES.index(name) for name in NAMES} == INDEX


def test_every_word_means_one_artifact() -> None:
    words = [word for artifact in ARTIFACTS for word in {artifact.name, artifact.chinese, *artifact.synonyms}]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("artifact", ARTIFACTS, ids=lambda artifact: artifact.name)
def test_every_name_and_synonym_is_understood_in_any_spelling(artifact: Artifact) -> None:
    for word in (
        artifact.name,
        artifact.chinese,
        *(synonym for synonym in artifact.synonyms if "-" not in synonym),
    ):
        for spelling in (
            word,
            word.upper(),
            f" {word} ",
            word.replace(" ", "_"),
            word.replace("_", " "),
            word.replace("_", "-"),
        ):
            assert parse_name(spelling) == artifact.name


@pytest.mark.parametrize("word", ["", "clean", "metl", "metal motion"])
def test_an_unknown_word_lists_the_known_ones(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_name(word)
    assert caught.value.code == "unknown-artifact"
    assert all(name in caught.value.hint for name in NAMES)


def test_every_artifact_occurs_in_one_modality_and_a_rating_in_both() -> None:
    masks = [applies_to(modality) for modality in MODALITIES]
    occurs = {name: sum(column) for name, column in zip(NAMES, zip(*masks, strict=True), strict=True)}
    assert occurs.pop("quality") == 2
    assert set(occurs.values()) == {1}
    assert applies_to("CT", ("motion", "ct_motion")) == (False, True)
    assert modality_text("quality") == "CT, MR"
    assert not any(applies_to("US"))


def test_every_synonym_is_understood() -> None:
    for artifact in ARTIFACTS:
        for word in artifact.synonyms:
            for spelling in (word, word.replace("-", "_"), word.replace("-", " ")):
                assert parse_name(spelling) == artifact.name
