"""Find the functional groups of each frame of an enhanced image, and parse those that are asked for.

An enhanced image may have 65,535 frames, each with a dozen nested sequences: parsed as a whole they take a
minute and a gigabyte. So the items are only found, by their lengths, and a frame's item is parsed when it is
wanted. Items of undefined length are walked element by element.

Reference: DICOM PS3.5 7.5 (nesting of data sets), 7.1 (data element structure).
"""

from __future__ import annotations

import io
import struct
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from client.dicom.refusals import refusal

MAX_BYTES = 256 << 20
MAX_DEPTH = 32
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_BLOCK = 4 << 20


class FrameItems:
    """The items of PerFrameFunctionalGroupsSequence, in order. `end`: where the sequence ends in the file."""

    def __init__(
        self, content: bytes, spans: list[tuple[int, int]], *, end: int, implicit: bool, big_endian: bool
    ) -> None:
        self._content, self._spans, self.end = content, spans, end
        self._implicit, self._big_endian = implicit, big_endian

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> Dataset:
        start, stop = self._spans[number]
        return read_dataset(io.BytesIO(self._content[start:stop]), self._implicit, not self._big_endian)


def read_frame_items(
    source: BinaryIO, start: int, size: int, *, length: int, implicit: bool, big_endian: bool
) -> FrameItems:
    """Find the items of a sequence.

    Args:
        start: of the first item. size: of the file. length: of the sequence in bytes, or 0xFFFFFFFF.
    Raises:
        ImagingError: `truncated`, `too-large`, `too-nested` or `unreadable`.
    """
    if length != _UNDEFINED and start + length > size:
        raise refusal("truncated", "an element is longer than the rest of the file")
    walker = _Walker(source, start, min(size, start + length), implicit=implicit, big_endian=big_endian)
    spans, at = walker.items(0, None if length == _UNDEFINED else length, depth=0)
    return FrameItems(walker.upto(at), spans, end=start + at, implicit=implicit, big_endian=big_endian)


class _Walker:
    """Offsets are from the start of the sequence. Only what has been walked over is read from the file."""

    def __init__(self, source: BinaryIO, start: int, stop: int, *, implicit: bool, big_endian: bool) -> None:
        self._source, self._start, self._limit = source, start, stop - start
        self._content = bytearray()
        order = ">" if big_endian else "<"
        self._short = struct.Struct(f"{order}HHL")
        self._explicit = struct.Struct(f"{order}HH2sH")
        self._long = struct.Struct(f"{order}L")
        self._implicit = implicit

    def upto(self, end: int) -> bytes:
        """The bytes from the start to `end`.

        Raises:
            ImagingError: `truncated`, `too-large`.
        """
        if end > self._limit:
            raise refusal("truncated", "an element is longer than the rest of the file")
        if end > MAX_BYTES:
            raise refusal("too-large", f"functional groups of more than {MAX_BYTES} bytes")
        if end > len(self._content):
            self._source.seek(self._start + len(self._content))
            more = min(max(end - len(self._content), _BLOCK), self._limit - len(self._content))
            self._content += self._source.read(more)
        return bytes(memoryview(self._content)[:end])

    def _need(self, end: int) -> None:
        if end > len(self._content):
            self.upto(end)
            if end > len(self._content):
                raise refusal("changed", "the file became shorter while it was read")

    def _tag_at(self, at: int) -> tuple[int, int]:
        """Tag and length of an item or a delimiter, which have no VR."""
        self._need(at + 8)
        group, element, length = self._short.unpack_from(self._content, at)
        return group << 16 | element, length

    def items(self, at: int, length: int | None, depth: int) -> tuple[list[tuple[int, int]], int]:
        """The contents of the items of a sequence at `at`, and where it ends. Length None: undefined."""
        if depth > MAX_DEPTH:
            raise refusal("too-nested", "sequences nested deeper than any scanner writes")
        spans: list[tuple[int, int]] = []
        stop = None if length is None else at + length
        while stop is None or at + 8 <= stop:
            tag, item_length = self._tag_at(at)
            at += 8
            if tag == _SEQUENCE_END:
                return spans, at if stop is None else stop
            if tag != _ITEM:
                raise refusal("unreadable", "a sequence of functional groups is not a chain of items")
            if item_length == _UNDEFINED:
                end, after = self._item_end(at, depth, implicit=self._implicit)
            else:
                end = after = at + item_length
            if end > self._limit:
                raise refusal("truncated", "an element is longer than the rest of the file")
            spans.append((at, end))
            at = after
        return spans, stop if stop is not None else at

    def _item_end(self, at: int, depth: int, *, implicit: bool) -> tuple[int, int]:
        """Where the content of an item of undefined length ends, and where its delimiter does."""
        while True:
            tag, length = self._tag_at(at)
            if tag == _ITEM_END:
                return at, at + 8
            after, vr = at + 8, b""
            if not implicit:
                _, _, vr, length = self._explicit.unpack_from(self._content, at)
                if vr in _LONG:
                    self._need(at + 12)
                    (length,) = self._long.unpack_from(self._content, at + 8)
                    after = at + 12
            if length == _UNDEFINED:
                if depth >= MAX_DEPTH:
                    raise refusal("too-nested", "sequences nested deeper than any scanner writes")
                after = self._sequence_end(after, depth + 1, implicit=implicit or vr == b"UN")
            else:
                after += length
            at = after

    def _sequence_end(self, at: int, depth: int, *, implicit: bool) -> int:
        """Where a nested sequence of undefined length ends, behind its delimiter."""
        while True:
            tag, length = self._tag_at(at)
            at += 8
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise refusal("unreadable", "a nested sequence is not a chain of items")
            at = self._item_end(at, depth, implicit=implicit)[1] if length == _UNDEFINED else at + length
