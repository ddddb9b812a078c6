"""The questions of `fedqc site init`: an answer is checked when it is typed, and asked for again where it is
wrong. What was answered is not lost: a set-up that ends early says the command that goes on from there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import typer

from common.errors import ConfigError, FedqcError
from common.names import MAX_PATIENTS, SITE_NAME
from common.progress_bar import say

Check = Callable[[str], str]
"""From what was typed to the answer; raises ConfigError with what is wrong."""


class Questions:
    """Asks for what no option gives, and keeps it."""

    def __init__(self, *, yes: bool) -> None:
        self._yes = yes
        self._typed: dict[str, str] = {}

    @property
    def asks(self) -> bool:
        """Whether a person is asked."""
        return not self._yes

    def ask(
        self, option: str, given: str | None, question: str, default: str | None = None, *, check: Check
    ) -> str:
        """What the option gives; else the default, where nobody is to be asked; else what is typed.

        Raises:
            ConfigError: nobody is to be asked, and there is no default (code `bad-argument`).
        """
        if given is not None:
            return given
        if self._yes:
            if default is None:
                raise ConfigError(
                    f"--{option} is missing", code="bad-argument", hint="omit --yes to be asked for it"
                )
            return default
        while True:
            try:
                answer = check(str(typer.prompt(question, default=default, err=True)).strip())
            except ConfigError as wrong:
                say(wrong.message)
                continue
            self._typed[option] = answer
            return answer

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Say how to go on from the answers where the set-up ends early."""
        try:
            yield
        except (FedqcError, click.Abort, KeyboardInterrupt):
            if self._typed:
                words = [word for option, text in self._typed.items() for word in (f"--{option}", text)]
                say(f"nothing was made; with what you answered: fedqc site init {shlex.join(words)} …")
            raise


def a_path(text: str) -> str:
    """A path as typed, with `~` for the home folder."""
    return str(Path(text).expanduser()) if text.startswith("~") else text


def a_text(text: str) -> str:
    """Anything but blanks."""
    if not text:
        raise _wrong("an answer is needed")
    return text


def a_folder(text: str) -> str:
    """A folder that is there."""
    path = a_path(a_text(text))
    if not Path(path).is_dir():
        raise _wrong(f"{path}: no such folder")
    return path


def a_sheet(text: str) -> str:
    """A file, or one that is still to be made in a folder that is there; `none`."""
    path = a_path(a_text(text))
    if Path(path).is_dir():
        raise _wrong(f"{path}: a folder; the label sheet is a file")
    if path != "none" and not Path(path).absolute().parent.is_dir():
        raise _wrong(f"{Path(path).absolute().parent}: no such folder")
    return path


def a_name(text: str) -> str:
    """The name of a site."""
    if not re.fullmatch(SITE_NAME, text):
        raise _wrong("lower-case letters, digits and hyphens, a letter first, at most 32")
    return text


def a_cohort(text: str) -> str:
    """The name of a group of patients."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise _wrong("letters, digits, dots, hyphens and underscores, a letter or digit first, at most 64")
    return text


def a_bucket(text: str) -> str:
    """A number of patients."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= MAX_PATIENTS):
        raise _wrong("a whole number: 50, 100, 200, 500, 1000 …")
    return text


def one_of(words: Collection[str]) -> Check:
    """One of these words."""

    def check(text: str) -> str:
        if text not in words:
            raise _wrong(f"one of {', '.join(words)}")
        return text

    return check


def stated(field: str) -> Check:
    """What a hospital must state in cohort.yaml: `none` or `pending` states nothing."""

    def check(text: str) -> str:
        from client.site.policy import missing_ethics

        if field in missing_ethics("hospital", {field: a_text(text)}):
            raise _wrong(f"{text!r} states nothing")
        return text

    return check


def artifacts(text: str) -> str:
    """Known artifacts, separated by commas; `none`."""
    from common.artifacts import parse_name

    for word in filter(None, (part.strip() for part in text.split(","))):
        if word != "none":
            parse_name(word)
    return text


def _wrong(what: str) -> ConfigError:
    return ConfigError(what, code="bad-argument")
