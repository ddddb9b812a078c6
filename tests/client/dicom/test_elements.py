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


@pytest.mark.parametrize(
    ("vr", "keyword", "value"),
    [
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
    ],
)
@pytest.mark.parametrize("little_endian", [True, False])
def test_a_value_is_what_pydicom_says(
    vr: str | None, keyword: str, value: bytes, little_endian: bool
) -> None:
    make = partial(dataset_of, vr, value, keyword, little_endian)
    converted = make()
    with suppress(Exception):
        _ = converted[keyword].value
    assert readings(make(), keyword) == readings(converted, keyword)


@pytest.mark.parametrize("charset", sorted(python_encoding))
def test_ascii_means_the_same_in_every_character_set(charset: str) -> None:
    ascii_text = bytes(range(0x20, 0x7F)).replace(b"\\", b"")
    dataset = dataset_of("LO", ascii_text, "Manufacturer")
    dataset.set_original_encoding(False, True, [python_encoding[charset]])
    assert (
        value_of(elements_of(dataset), "Manufacturer") == dataset["Manufacturer"].value == ascii_text.decode()
    )
