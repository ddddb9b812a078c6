"""Translate reports and pages: a table of sentences per language, and a function that fills them in.

A table is `LANGUAGES` in the module of its report; every language has the same keys and the same values in
braces, which `tests/helpers/translations.py` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.errors import ConfigError

Languages = Mapping[str, Mapping[str, str]]
"""Language code -> key -> sentence with values in braces."""

Say = Callable[..., str]
"""From a key and its values to a sentence."""


def counted(say: Say, count: int, what: str) -> str:
    """A number of `files`, `slices` or `patients`."""
    return f"{count} {say(f'one {what}' if count == 1 else what)}"


def speaker(language: str, languages: Languages) -> Say:
    """A function from a key and its values to a sentence in `language`; a missing key is a KeyError.

    Raises:
        ConfigError: `bad-argument`, the report does not exist in this language.
    """
    if language not in languages:
        raise ConfigError(
            f"--lang {language!r}: this report is not available in that language",
            code="bad-argument",
            hint=f"known: {', '.join(languages)}",
        )
    words = languages[language]

    def say(key: str, **values: object) -> str:
        return words[key].format(**values)

    return say
