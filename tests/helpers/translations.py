"""Check that a table of sentences is complete: every report has one, see common/i18n.py."""

from __future__ import annotations

import re
from collections import Counter

from common.i18n import Languages


def assert_same_sentences(languages: Languages) -> None:
    """Every language has the keys of English, is empty where English is, and the values in braces are the same."""
    english = languages["en"]
    for words in languages.values():
        assert words.keys() == english.keys()
        for key, sentence in english.items():
            assert bool(words[key].strip()) == bool(sentence.strip()), key
            assert Counter(re.findall(r"\{\w+\}", words[key])) == Counter(re.findall(r"\{\w+\}", sentence)), (
                key
            )
