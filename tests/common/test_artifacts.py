"""One vocabulary, whose order is the order of the model's outputs."""

from __future__ import annotations

import pytest

from common.artifacts import ARTIFACTS, INDEX, MODALITIES, NAMES, Artifact, applies_to, parse_name
from common.errors import ConfigError


def test_the_order_of_outputs_is_this() -> None:
    """Committed weights and every stored evaluation depend on it: append, never reorder."""
    assert NAMES[:5] == ("metal", "beam_hardening", "motion", "susceptibility", "chemical_shift")
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


def test_every_artifact_occurs_in_exactly_one_modality() -> None:
    masks = [applies_to(modality) for modality in MODALITIES]
    assert all(sum(column) == 1 for column in zip(*masks, strict=True))
    assert not any(applies_to("US"))


def test_every_synonym_is_understood() -> None:
    for artifact in ARTIFACTS:
        for word in artifact.synonyms:
            for spelling in (word, word.replace("-", "_"), word.replace("-", " ")):
                assert parse_name(spelling) == artifact.name
