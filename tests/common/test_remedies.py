"""What is advised about an artifact: complete, in both languages, and never a plain repeat of a CT scan."""

from __future__ import annotations

import re

from common.artifacts import ARTIFACTS
from common.remedies import remedies


def test_every_artifact_has_a_remedy_in_both_languages_with_a_source() -> None:
    assert list(remedies()) == [artifact.name for artifact in ARTIFACTS]
    for remedy in remedies().values():
        assert len(remedy.en) == len(remedy.zh)
        assert not re.search(r"[\u4e00-\u9fff]", " ".join(remedy.en))
        assert all(re.search(r"[\u4e00-\u9fff]", step) for step in remedy.steps("zh"))
        assert all(re.search(r"\(\d{4}\)", source) for source in remedy.sources)


def test_repeating_is_offered_for_movement_alone() -> None:
    """Physics makes the other artifacts: they come back, and in CT the dose does, too."""
    assert remedies()["quality"].repeat is None  # its reason decides
    assert [name for name, remedy in remedies().items() if remedy.repeat] == ["motion", "ct_motion"]
