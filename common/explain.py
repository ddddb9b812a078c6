"""Explain an error code: `fedqc explain CODE` prints its entry of errors.md, which the package holds."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Annotated

import typer

from common.cli import Format, FormatOption
from common.errors import ConfigError
from common.terminal import print

explain = typer.Typer(add_completion=False)
_CELL = re.compile(r"(?<!\\)\|")
_CODE = re.compile(r"`([a-z][a-z0-9-]*)`")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of errors.md."""

    code: str
    section: str
    cause: str
    action: str


@lru_cache(maxsize=1)
def entries() -> dict[str, tuple[Entry, ...]]:
    """The rows of errors.md, by code. A code may stand in several sections."""
    found: dict[str, tuple[Entry, ...]] = {}
    section = ""
    for line in (files("common") / "errors.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:].strip()
        cells = [cell.strip() for cell in _CELL.split(line.strip())[1:-1]]
        if not section or len(cells) != 3:
            continue
        for code in _CODE.findall(cells[0]):
            one = Entry(
                code=code,
                section=section,
                cause=_LINK.sub(r"\1", cells[1]),
                action=_LINK.sub(r"\1", cells[2]),
            )
            found[code] = (*found.get(code, ()), one)
    return found


@explain.command()
def explain_command(
    code: Annotated[
        str, typer.Argument(metavar="CODE", help="The code in brackets of a message, or of a report.")
    ],
    format: FormatOption = Format.text,
) -> None:
    """Explain a code of an error, a refusal or a file that is not used: the cause, and what to do."""
    known = entries()
    name = code.strip().strip("[]`").lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
        near += [other for other in known if name and name in other and other not in near][:4]
        raise ConfigError(
            f"{code}: no such code",
            code="unknown-code",
            hint=f"did you mean {', '.join(near)}?" if near else "the code stands in brackets in the message",
        )
    if format is Format.json:
        print(json.dumps([asdict(entry) for entry in known[name]], ensure_ascii=False))
        return
    print("\n\n".join(_text(entry) for entry in known[name]))


def _text(entry: Entry) -> str:
    return f"{entry.code} ({entry.section})\n  cause:  {entry.cause}\n  action: {entry.action}"
