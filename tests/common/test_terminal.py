"""Foreign words on a terminal: nothing in them moves the cursor, hides or reorders what is shown."""

from __future__ import annotations

import ast
import io
import json
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from common import terminal
from common.enrolment import Kit, Request
from common.lineage import Lineage
from common.plan import RunPlan
from common.signing import Statement
from common.wire import OUTGOING, DescribeTask, EvaluateTask, TrainTask

ROOT = Path(__file__).resolve().parents[2]
HIDES = "\x1b[2K\r", "\x9b2J", "a\u202eb", "a\u2028b", "a\u200bb", "\x7f", "a\nb"


def printed(*values: object, encoding: str = "utf-8", **options: Any) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, newline="")
    terminal.print(*values, file=stream, **options)
    stream.flush()
    return raw.getvalue().decode(encoding)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_printed(text: str) -> None:
    shown = printed(text, end="")
    assert not [one for one in shown if unicodedata.category(one) in terminal.UNSAFE and one not in "\n\t"]


@given(st.dictionaries(st.text(), st.text()))
def test_escaping_does_not_change_what_json_means(value: dict[str, str]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert json.loads(printed(text)) == json.loads(text) == value
    assert json.loads(printed(text, encoding="ascii")) == value


def test_plain_words_of_any_language_stay() -> None:
    said = "ε ≤ 2 → 某次运行\tfür “alle”\n— naïve"
    assert printed(said) == said + "\n"
    assert printed("a", 1, end="!") == "a 1!"


def test_a_terminal_that_lacks_a_letter_gets_its_number() -> None:
    assert printed("ε → 2", encoding="ascii") == "\\u03b5 \\u2192 2\n"
    assert printed("\udc80 of a file name", encoding="utf-8") == "\\udc80 of a file name\n"


def test_every_print_of_the_package_is_the_one_that_escapes() -> None:
    bare = []
    for room in ("server", "client", "common"):
        for path in (ROOT / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = list(ast.walk(tree))
            prints = any(isinstance(one, ast.Name) and one.id == "print" for one in nodes)
            ours = any(
                isinstance(one, ast.ImportFrom)
                and one.module == "common.terminal"
                and "print" in {alias.name for alias in one.names}
                for one in nodes
            )
            if prints and not ours:
                bare.append(str(path.relative_to(ROOT)))
    assert not bare, f"add `from common.terminal import print` to {', '.join(bare)}"


FOREIGN: tuple[type[BaseModel], ...] = (
    *OUTGOING, DescribeTask, TrainTask, EvaluateTask, Statement, Request, Kit, RunPlan, Lineage,
)  # fmt: skip
BLOCKS = {"ca_certificate", "question"}
"""Which may hold a line feed: PEM, which nobody is shown, and a block of YAML, at its end."""


def strings_of(schema: Any, field: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every text in a pydantic core schema, with the name of its field."""
    if isinstance(schema, list | tuple):
        return [found for part in schema for found in strings_of(part, field)]
    if not isinstance(schema, dict):
        return []
    found = [(field, schema)] if schema.get("type") == "str" else []
    for key, part in schema.items():
        if key == "fields" and isinstance(part, dict):
            found += [one for name, inner in part.items() for one in strings_of(inner, name)]
        elif key not in ("metadata", "serialization", "default"):
            found += strings_of(part, field)
    return found


@pytest.mark.parametrize("model", FOREIGN, ids=lambda model: model.__name__)
def test_every_string_that_crosses_is_one_line_of_bounded_length(model: type[BaseModel]) -> None:
    strings = strings_of(model.__pydantic_core_schema__)
    assert len(strings) >= (1 if model is Lineage else 2)
    for field, schema in strings:
        where = f"{model.__name__}.{field}"
        pattern, length = schema.get("pattern"), schema.get("max_length")
        assert pattern is not None, f"{where}: no pattern"
        bounded = length or re.fullmatch(r"\^[^*+]*\$", pattern.replace("(|", "").replace("\\.", ""))
        assert bounded, f"{where}: no length"
        text = TypeAdapter(Annotated[str, Field(pattern=pattern, max_length=length)])
        for words in HIDES:
            if field == "ca_certificate" and words == "a\nb":
                continue
            with pytest.raises(ValidationError):
                text.validate_python(words)
        if field not in BLOCKS:
            with pytest.raises(ValidationError):
                text.validate_python("a\n")


def test_no_foreign_text_begins_a_line_of_its_own() -> None:
    forged = "harmless?" + "\u00a0" * 60 + "cost       ε 0.01" + " " * 200 + "x" * 200 + "宽" * 90
    lines = terminal.wrapped(forged, start="question   ", indent=11).split("\n")
    assert lines[0].startswith("question   harmless? cost")
    assert all(line.startswith(" " * 11) for line in lines[1:])
    widths = [sum(1 + (unicodedata.east_asian_width(one) in "WFA") for one in line) for line in lines]
    assert max(widths) <= 80
    assert "".join("".join(lines).split()) == "question" + "".join(forged.split())


def test_words_are_not_broken_where_they_fit() -> None:
    assert terminal.wrapped("aa bb " + "c" * 30, start="- ", indent=2, columns=32) == "- aa bb\n  " + "c" * 30
    assert terminal.wrapped("", start="name  ") == "name  "
    assert terminal.wrapped("a", start="") == "a"
