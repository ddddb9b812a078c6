"""Parse values of DICOM elements to types; an invalid value becomes None.

No function here raises for a bad value, except those that say so; none puts a value into a message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset

from client.dicom.refusals import refusal

Elements = Mapping[int, tuple[Dataset, DataElement | RawDataElement]]
"""For each tag its element as it was read, and the data set that holds it: the top level, or a functional
group of one frame.
"""

_KEPT_EMPTY = frozenset({0x00281052, 0x00281053})  # RescaleIntercept, RescaleSlope
_TEXTS = frozenset({"AS", "CS", "DA", "DS", "LO", "SH", "UI"})
_ASCII = re.compile(rb"[ -~]*[ \0]*")
_WHOLE = re.compile(rb" *(?:0|-?[1-9]\d{0,8})[ \0]?")
_AGE = re.compile(r"(\d{1,3})([YMWD])")
_PER_YEAR = {"Y": 1.0, "M": 12.0, "W": 52.1775, "D": 365.2425}


def elements_of(dataset: Dataset) -> dict[int, tuple[Dataset, DataElement | RawDataElement]]:
    """The elements of one data set, those of its sequences apart. An element without a value is left out:
    empty says no more than absent (PS3.5 7.4), and anonymizers empty what they were to delete.
    """
    return {
        int(tag): (dataset, element)
        for tag, element in dataset.items()
        if int(tag) in _KEPT_EMPTY or not _is_empty(element)
    }


def is_empty(elements: Elements, keyword: str | int) -> bool:
    """Whether the element is there without a value. Known of the rescale only, which CT must have."""
    tag = tag_for_keyword(keyword) if isinstance(keyword, str) else keyword
    return tag is not None and tag in elements and _is_empty(elements[tag][1])


def _is_empty(element: DataElement | RawDataElement) -> bool:
    value = element.value
    if value is None or (isinstance(value, bytes | str | Sequence) and not len(value)):
        return True
    if not isinstance(element, RawDataElement) or not isinstance(value, bytes) or len(value) > 64:
        return False
    vr = _vr_of(element)
    if vr == "UN" and dictionary_has_tag(element.tag):
        vr = dictionary_VR(element.tag)
    return vr in _TEXTS | {"IS"} and not value.strip(b" \0")


def _vr_of(element: RawDataElement) -> str:
    return element.VR or (dictionary_VR(element.tag) if dictionary_has_tag(element.tag) else "")


def holds(elements: Elements, keyword: str) -> bool:
    return tag_for_keyword(keyword) in elements


def raw_bytes(elements: Elements, keyword: str) -> bytes | str | None:
    """The value before any character set is applied, where it was read so."""
    tag = tag_for_keyword(keyword)
    if tag is None or tag not in elements:
        return None
    value = elements[tag][1].value
    return value if isinstance(value, bytes) else str(value or "")


def value_of(elements: Elements, tag: str | int) -> Any:
    """The element's value, None where absent or not convertible.

    Raises:
        RecursionError, MemoryError: a sequence is too much to convert.
    """
    number = tag_for_keyword(tag) if isinstance(tag, str) else tag
    if number is None or number not in elements:
        return None
    dataset, element = elements[number]
    try:
        value = _plain_value(element) if isinstance(element, RawDataElement) else None
        return dataset[number].value if value is None else value
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return None


def _plain_value(element: RawDataElement) -> str | list[str] | int | None:
    """What the commonest elements say, in a tenth of the time that pydicom takes; None where it has to be
    asked.

    That is text in printable ASCII, which means the same in every character set, also of decimal numbers; and
    one whole number.
    """
    value, vr = element.value or b"", _vr_of(element)
    if vr in _TEXTS and _ASCII.fullmatch(value) and (value or vr != "DS"):
        texts = value.decode("ascii").rstrip(" \0").split("\\")
        return texts[0] if len(texts) == 1 else texts
    if vr == "IS" and _WHOLE.fullmatch(value):
        return int(value.rstrip(b"\0"))
    if vr in {"US", "SS"} and len(value) == 2:
        return int.from_bytes(value, "little" if element.is_little_endian else "big", signed=vr == "SS")
    return None


def items_of(elements: Elements, tag: str | int) -> Sequence[Dataset]:
    """The items of a sequence, none where it is absent or no sequence."""
    value = value_of(elements, tag)
    items = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()
    return items if all(isinstance(item, Dataset) for item in items) else ()


def texts(elements: Elements, tag: str | int) -> list[str]:
    value = value_of(elements, tag)
    if value is None or isinstance(value, bytes):
        return []
    values = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else [value]
    return [str(item).strip(" \0") for item in values]


def text(elements: Elements, tag: str | int) -> str:
    """One text; "" where there is none or several."""
    values = texts(elements, tag)
    return values[0] if len(values) == 1 else ""


def words(elements: Elements, tag: str | int) -> str:
    """All values, with the backslash of DICOM between them, as one printable text of at most 64
    characters.
    """
    return printable("\\".join(texts(elements, tag)))


def printable(characters: Iterable[str]) -> str:
    return "".join(character for character in characters if character.isprintable())[:64]


def numbers(elements: Elements, tag: str | int, count: int) -> tuple[float, ...] | None:
    """Exactly `count` finite numbers, else None."""
    value = value_of(elements, tag)
    if value is None or isinstance(value, bytes):
        return None
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        found = tuple(float(item) for item in items)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def positive(elements: Elements, tag: str | int) -> float | None:
    found = numbers(elements, tag, 1)
    return found[0] if found and found[0] > 0 else None


def integer(elements: Elements, keyword: str, default: int | None = None) -> int:
    """A whole number of a binary or IS element.

    Raises:
        ImagingError: `bad-geometry`, naming the attribute and not its value.
    """
    value = value_of(elements, keyword)
    if value is None and default is not None and not holds(elements, keyword):
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise refusal("bad-geometry", f"{keyword} is missing or not a whole number")
    return int(value)


def whole(elements: Elements, tag: str | int) -> int | None:
    """A whole number, also one written as text; None where it is anything else."""
    found = numbers(elements, tag, 1)
    return int(found[0]) if found and found[0].is_integer() else None


def date(elements: Elements, keyword: str) -> str:
    """YYYYMMDD, or "". The dots of ACR-NEMA are dropped."""
    found = text(elements, keyword).replace(".", "")
    return found if len(found) == 8 and found.isascii() and found.isdigit() else ""


def age_years(elements: Elements) -> float | None:
    """PatientAge (034Y, 006M, 002W, 010D) in years, else None. 000Y is None too: it stands where the age is
    unknown.
    """
    found = _AGE.fullmatch(text(elements, "PatientAge").upper())
    return int(found[1]) / _PER_YEAR[found[2]] if found and int(found[1]) else None
