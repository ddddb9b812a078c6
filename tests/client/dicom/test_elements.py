"""Header values that are read from their bytes, beside pydicom's word for them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
from pydicom.charset import python_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from client.dicom.elements import elements_of, integer, numbers, positive, text, texts, value_of, whole, words
from common.errors import ImagingError

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom's, about the values
_TEXTS = (
    b"",
    b" ",
    b"\0",
    b"ONE",
    b" ONE ",
    b"ONE\0",
    b"ONE\\TWO",
    b"ONE\\ ",
    b"\\",
    b"A\0B",
    b"\xc4B",
    b"\x1b$B",
    b"A\nB",
    b"~",
)
_NUMBERS = (
    b"1.5",
    b"1.5\\2 ",
    b" -3 ",
    b"+2e1",
    b"1_0",
    b"1_0.5",
    b"nan",
    b"1e999",
    b"12\0",
    b"1.0",
    b"99999999999",
    b"1,5",
    b"3 4",
    b"7\\8",
    b"-0",
    b"+5",
    b"012 ",
)
_BINARY = (b"", b"\1", b"\xfe\xff", b"\1\0\2\0", b"\1\0\2")


def dataset_of(vr: str | None, value: bytes, keyword: str, little_endian: bool = True) -> Dataset:
    tag = Tag(keyword)
    return Dataset({tag: RawDataElement(tag, vr, len(value), value, 0, vr is None, little_endian)})


def readings(dataset: Dataset, keyword: str) -> list[object]:
    """What every kind of reader makes of the element."""
    elements = elements_of(dataset)
    found: list[object] = [reader(elements, keyword) for reader in (text, texts, words, positive, whole)]
    found += [numbers(elements, keyword, count) for count in (1, 2)]
    try:
        return [*found, integer(elements, keyword)]
    except ImagingError as error:
        return [*found, error.code]


CASES: list[tuple[str | None, str, bytes]] = [
    *(
        (vr, "PatientAge", value)
        for vr in ("AS", "CS", "DA", "LO", "SH", "UI", "DS", "IS", "UN")
        for value in (*_TEXTS, *_NUMBERS)
    ),
    *((vr, "Rows", value) for vr in ("US", "SS", "IS") for value in (*_BINARY, *_NUMBERS)),
    *(
        (None, keyword, value)
        for keyword in ("Manufacturer", "RescaleSlope", "InstanceNumber")
        for value in (*_TEXTS, *_NUMBERS)
    ),
    *((None, keyword, value) for keyword in ("Rows", "PixelPaddingValue") for value in _BINARY),
]
"""Value representation (None: implicit), keyword and bytes of an element."""


@pytest.mark.parametrize("little_endian", [True, False])
def test_a_value_is_what_pydicom_says(little_endian: bool) -> None:
    differ = []
    for vr, keyword, value in CASES:
        make = partial(dataset_of, vr, value, keyword, little_endian)
        converted = make()
        with suppress(Exception):
            _ = converted[keyword].value
        ours, pydicoms = readings(make(), keyword), readings(converted, keyword)
        if ours != pydicoms:
            differ.append(f"{keyword} {vr} {value!r}: {ours}, pydicom: {pydicoms}")
    assert not differ, "\n".join(differ)
    assert len(CASES) > 400


def test_ascii_means_the_same_in_every_character_set() -> None:
    ascii_text = bytes(range(0x20, 0x7F)).replace(b"\\", b"")
    for charset, encoding in sorted(python_encoding.items()):
        dataset = dataset_of("LO", ascii_text, "Manufacturer")
        dataset.set_original_encoding(False, True, [encoding])
        ours = value_of(elements_of(dataset), "Manufacturer")
        assert ours == dataset["Manufacturer"].value == ascii_text.decode(), charset
