"""Translate what people read: a table of sentences per language, and a function that fills them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from common.errors import ConfigError

Say = Callable[..., str]


def counted(say: Say, count: int, what: str) -> str:
    """A number of `files`, `slices` or `patients`."""
    return f"{count} {say(f'one {what}' if count == 1 else what)}"


def speaker(language: str, languages: Mapping[str, Mapping[str, str]]) -> Say:
    """A function from a key and its values to a sentence.

    Args:
        languages: key to sentence, for each language.
    Raises:
        ConfigError: `bad-argument`.
    """
    if language not in languages:
        raise ConfigError(
            f"--lang {language!r}: not a language of this report",
            code="bad-argument",
            hint=f"known: {', '.join(languages)}",
        )
    words = languages[language]

    def say(key: str, **values: object) -> str:
        return words[key].format(**values)

    return say
