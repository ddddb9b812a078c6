"""Check that a table of sentences is complete: every report has one, see common/i18n.py."""

from __future__ import annotations

import re
from collections import Counter
from string import Formatter

from common.i18n import Languages


def assert_same_sentences(languages: Languages) -> None:
    """Every language has the keys and values in braces of English, and is empty only where English is.

    Braces hold a value's name and nothing else.
    """
    english = languages["en"]
    for words in languages.values():
        assert words.keys() == english.keys()
        for key, sentence in english.items():
            assert bool(words[key].strip()) == bool(sentence.strip()), key
            assert Counter(_values(words[key])) == Counter(_values(sentence)), key


def _values(sentence: str) -> list[str]:
    names = re.findall(r"\{(\w+)\}", sentence)
    assert [name for _, name, _, _ in Formatter().parse(sentence) if name is not None] == names, sentence
    return names
