"""How much memory the messages of an Arrow stream need, read off their headers: pyarrow holds each whole, and believes
what a compressed buffer says of its own size.

A message is four bytes of ones, the length of its header, the header, and a body. A header is a flatbuffer: a table's
fields are found through its table of offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from gpt2lab.data.formats.pages import BadHeader

_CONTINUES = 0xFFFFFFFF
_HEADER = 2**24  # bytes; a header holds a few numbers a column
_DICTIONARY, _BATCH = 2, 3  # types of message
_TYPE, _CONTENT, _BODY = 1, 2, 3  # fields of a message
_DICTIONARY_DATA = 1
_BUFFERS, _COMPRESSION = 2, 3  # fields of a batch


def message_sizes(file: BinaryIO, start: int) -> Iterator[int]:
    """Bytes that each message from `start` on needs, together with all dictionaries before it.

    Raises:
        BadHeader: a header cannot be read, or a body is not there.
    """
    dictionaries, end = 0, file.seek(0, 2)
    while start < end:
        file.seek(start)
        mark, length = struct.unpack("<II", file.read(8).ljust(8, b"\0"))
        if mark != _CONTINUES:
            raise BadHeader("no message")
        if length == 0:  # the end
            return
        if length > _HEADER or start + 8 + length > end:
            raise BadHeader("a header that is too long")
        try:
            size, kind, body = _size(file, file.read(length), start + 8 + length)
        except struct.error:
            raise BadHeader("a header that leads nowhere") from None
        start += 8 + length + body
        if body < 0 or start > end:
            raise BadHeader("a body that is not there")
        yield size + dictionaries
        dictionaries += size if kind == _DICTIONARY else 0


def _size(file: BinaryIO, header: bytes, body_start: int) -> tuple[int, int, int]:
    """Bytes that a message needs, its type, and the bytes of its body."""
    message = _Table(header, struct.unpack_from("<I", header)[0])
    kind, body = message.number(_TYPE, "<B"), message.number(_BODY, "<q")
    if kind not in (_DICTIONARY, _BATCH):
        return body, kind, body
    batch = message.table(_CONTENT)
    if kind == _DICTIONARY:
        batch = batch.table(_DICTIONARY_DATA)
    if not batch.place_of(_COMPRESSION):
        return body, kind, body
    size = body
    for offset, length in batch.pairs(_BUFFERS):
        if length >= 8:
            file.seek(body_start + max(0, offset))
            unpacked = struct.unpack("<q", file.read(8))[0]
            size += max(0, unpacked)  # -1: this buffer is not compressed
    return size, kind, body


class _Table:
    """A flatbuffer's table."""

    def __init__(self, data: bytes, place: int) -> None:
        self._data, self._place = data, place

    def place_of(self, field: int) -> int:
        """Where a field is; 0 where it is not."""
        offsets = self._place - struct.unpack_from("<i", self._data, self._place)[0]
        slot = 4 + 2 * field
        if slot >= struct.unpack_from("<H", self._data, offsets)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self._data, offsets + slot)[0]
        return self._place + offset if offset else 0

    def number(self, field: int, code: str) -> int:
        """A field's number, 0 where there is none."""
        place = self.place_of(field)
        return int(struct.unpack_from(code, self._data, place)[0]) if place else 0

    def table(self, field: int) -> _Table:
        """The table that a field leads to."""
        return _Table(self._data, self._target(field))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """The pairs of long numbers in the list that a field leads to."""
        place = self._target(field)
        count = struct.unpack_from("<I", self._data, place)[0]
        if place + 4 + 16 * count > len(self._data):
            raise BadHeader("a list that is too long")
        for index in range(count):
            yield struct.unpack_from("<qq", self._data, place + 4 + 16 * index)

    def _target(self, field: int) -> int:
        place = self.place_of(field)
        if not place:
            raise BadHeader("a field that is missing")
        return place + int(struct.unpack_from("<I", self._data, place)[0])
