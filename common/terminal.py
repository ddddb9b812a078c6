"""Print text that may hold foreign words: nothing in it can move the cursor, hide or reorder what is shown.

Plans, requests, runs and files bring texts of other people to a terminal. Every `print` of fedqc is this one.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories that change how other text is shown: control characters, invisible ones that turn the
direction of writing or join letters, halves of characters, separators of lines.
"""


class ReaderGone(Exception):
    """Who read the output has closed it, as `head` does. Click takes a BrokenPipeError for a failure."""


def escaped(text: str, encoding: str = "utf-8") -> str:
    r"""A text with all characters that a terminal obeys, or cannot show, written as in JSON: `\u001b`.

    In the output of `json.dumps` only the spelling changes, not the content. Line feeds and tabs stay.

    Args:
        encoding: of the stream; characters that it lacks are escaped, too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(one if _is_safe(one, encoding) else _code(one) for one in text)


def is_plain(text: str) -> bool:
    """Whether a text is one line in which nothing hides or reorders (`common.names.ONE_LINE`)."""
    return text.isprintable() or not any(unicodedata.category(one) in UNSAFE for one in text)


def print(*values: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """As Python's, and `escaped`; written in one piece, so that Ctrl-C cannot part a line from its end.

    Raises:
        ReaderGone: nobody reads the standard output any more.
    """
    stream = file or sys.stdout
    text = escaped(" ".join(str(value) for value in values), getattr(stream, "encoding", None) or "utf-8")
    try:
        stream.write(text + end)
        if flush:
            stream.flush()
    except BrokenPipeError:
        if stream is sys.stdout:
            raise ReaderGone from None
        raise


COLUMNS = 80
"""Of a terminal, as wide as a table may be."""


def table_row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a table: each cell in its column, those of negative width to the right. A cell that fills its
    column, or more, ends its line; the others follow below, each in its own column.
    """
    lines, line, start = [], "", 0
    for cell, width in zip(cells, widths, strict=True):
        if width > 0 and _columns(cell) >= width:
            lines.append(line + cell)
            line = " " * (start + width)
        else:
            blank = " " * (abs(width) - _columns(cell))
            line += cell + blank if width > 0 else blank + cell
        start += abs(width)
    return "\n".join(one.rstrip() for one in (*lines, line) if one.strip())


def wrapped(text: str, *, start: str = "", indent: int = 4, columns: int = COLUMNS) -> str:
    """One paragraph in lines of at most so many columns, each after the first behind an indent.

    So no foreign text begins a line of its own, whatever blanks it holds. Words that fit on a line are not
    broken; wide letters take two columns.

    Args:
        start: before the first word; its own blanks are kept.
    """
    lines, line, is_empty = [], start, True
    for word in text.split():
        while word:
            room = columns - _columns(line) - (not is_empty)
            if _columns(word) <= room:
                line, word, is_empty = line + " " * (not is_empty) + word, "", False
                continue
            if is_empty:  # longer than a whole line
                part = next(n for n in range(len(word), 0, -1) if n == 1 or _columns(word[:n]) <= room)
                line, word = line + word[:part], word[part:]
            lines.append(line)
            line, is_empty = " " * indent, True
    return "\n".join([*lines, line] if not is_empty or not lines else lines)


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(one) in "WFA" else 1 for one in text)


def _is_safe(one: str, encoding: str) -> bool:
    if one in "\n\t":
        return True
    if unicodedata.category(one) in UNSAFE:
        return False
    try:
        one.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _code(one: str) -> str:
    number = ord(one)
    if number < 0x10000:
        return f"\\u{number:04x}"
    number -= 0x10000
    return f"\\u{0xD800 + (number >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}"
