"""How large the pages of a Parquet file are, read off their headers: pyarrow holds each whole, whatever size it claims.

A header is a struct in Thrift's compact protocol, whose first three fields are the page's type and its two sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

_HEADER = 2**14  # bytes; headers hold a few numbers and short statistics
_UNPACKED, _PACKED = 2, 3  # fields


class BadHeader(ValueError):
    """A page's header that cannot be read."""


def page_sizes(file: BinaryIO, chunk: Any) -> Iterator[int]:
    """Bytes of each page of a column chunk, unpacked; `chunk` is pyarrow's ColumnChunkMetaData.

    Raises:
        BadHeader: one cannot be read, or the pages are not those that the chunk says it has.
    """
    offset = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end = offset + chunk.total_compressed_size
    while offset < end:
        file.seek(offset)
        header = _Header(file.read(_HEADER))
        fields = header.read_struct()
        unpacked, packed = fields.get(_UNPACKED, -1), fields.get(_PACKED, -1)
        if unpacked < 0 or packed < 0:
            raise BadHeader("a page without a size")
        yield unpacked
        offset += header.place + packed


class _Header:
    """A reader of the protocol."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def read_struct(self, depth: int = 0) -> dict[int, int]:
        """The numbers of a struct by field; everything else is passed over."""
        numbers, field = {}, 0
        if depth > 8:
            raise BadHeader("structs inside one another")
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._number()
            value = self._value(kind & 15, depth)
            if value is not None:
                numbers[field] = value
        return numbers

    def _value(self, kind: int, depth: int) -> int | None:
        if kind in (1, 2):  # true and false
            return None
        if kind in (4, 5, 6):
            return self._number()
        if kind in (3, 7, 8):  # a byte, a float, a string
            size = {3: 1, 7: 8}.get(kind) or self._varint()
            self.place += size
        elif kind == 12:
            self.read_struct(depth + 1)
        else:
            raise BadHeader(f"a field of type {kind}")
        return None

    def _byte(self) -> int:
        if self.place >= len(self.data):
            raise BadHeader("no end")
        self.place += 1
        return self.data[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
