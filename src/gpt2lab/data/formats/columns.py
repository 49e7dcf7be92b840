"""Parquet and Arrow: the text columns alone, a few rows at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpt2lab.data.formats.fields import CHATS, SAMPLE, Fields, guess_fields
from gpt2lab.data.formats.lines import BLOCK, NOT_UTF8, Record, Refused
from gpt2lab.data.formats.messages import message_sizes
from gpt2lab.data.formats.pages import BadHeader, page_sizes
from gpt2lab.data.unpack import FLOOR, RATIO, Stream

PAGE = 2**27
"""Bytes of the largest Parquet page that is read."""
GIANT_PAGE = f"a page larger than {PAGE // 2**20} MiB"
MESSAGE = 2**28
"""Bytes of the largest batch of an Arrow file that is read."""
GIANT_MESSAGE = f"a batch larger than {MESSAGE // 2**20} MiB"
_ARROW_START, _ARROW_END = 8, b"ARROW1"
_BATCH = 2**26  # bytes that the rows read at once may have
_BATCH_ROWS = 1024
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())


class Columns:
    """The columns of a Parquet or Arrow file.

    Attributes:
        kind: "parquet", "arrow file" or "arrow stream".
        rows_read: so far.

    Raises:
        Refused: the file is damaged, or not safe to read.
    """

    def __init__(self, file: BinaryIO, kind: str) -> None:
        self.kind, self._file = kind, file
        self.rows_read = 0
        self._size = file.seek(0, os.SEEK_END)
        with self._damage():
            self.schema = self._open().schema_arrow if kind == "parquet" else self._open().schema
        if len(set(self.schema.names)) < len(self.schema.names):
            raise Refused("two columns have one name")

    def fields(self, given: Fields | None) -> Fields:
        """Where the text is: as given, or as guessed from the first rows.

        Raises:
            Refused: there is no such column, or none that holds text.
        """
        names = self.schema.names
        if given:
            if missing := [name for name in given.names if name not in names]:
                raise Refused(f"no field {missing[0]!r} among {', '.join(names[:20])}")
            return given
        candidates = [field.name for field in self.schema if _is_text(field.type) or field.name in CHATS]
        with self._damage():
            first = next(self._batches(candidates), None) if candidates else None
            rows = filter(None, _rows(first.slice(0, SAMPLE))) if first else [dict.fromkeys(candidates, "a text")]
            found = guess_fields(list(rows))
        if not found:
            raise Refused(f"no text field among {', '.join(names[:20])}")
        return found

    def records(self, fields: Fields) -> Iterator[Record]:
        """A record a row, as long as there is no damage. Its bytes are those of the strings in its fields as UTF-8.

        Raises:
            Refused: the rest is damaged, or a bomb.
        """
        size = 0
        with self._damage():
            for batch in self._batches(list(fields.names)):
                for record in _records(batch, self.rows_read + 1):
                    yield record
                    self.rows_read += 1
                    size += record.bytes
                    if size > max(FLOOR, RATIO * self._size):
                        raise Refused(f"decompression bomb: more than {RATIO} times its size")

    def _open(self) -> Any:
        if self.kind == "parquet":
            self._file.seek(0)
            return pq.ParquetFile(self._file, buffer_size=BLOCK, pre_buffer=False)
        # An Arrow file is a stream between two marks: read as one, it is read as it was checked.
        start = _ARROW_START if self.kind == "arrow file" else 0
        if start:
            self._file.seek(-len(_ARROW_END), os.SEEK_END)
            if self._file.read() != _ARROW_END:
                raise BadHeader("it ends before its end")
        if max(message_sizes(self._file, start), default=0) > MESSAGE:
            raise Refused(GIANT_MESSAGE)
        self._file.seek(start)
        return pa.ipc.open_stream(self._file)

    def _batches(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        source = self._open()
        if self.kind == "parquet":
            for group in range(source.num_row_groups):
                rows = self._batch_rows(source.metadata.row_group(group), names)
                yield from source.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)
        else:
            for batch in source:
                part = batch.select(names)
                dictionaries = [c.dictionary.nbytes for c in part.columns if pa.types.is_dictionary(c.type)]
                rows = _rows_at_once(part.nbytes // max(1, part.num_rows), *dictionaries)
                yield from (part.slice(start, rows) for start in range(0, part.num_rows, rows))

    def _batch_rows(self, group: Any, names: list[str]) -> int:
        """How many rows of a row group can be held at once: each may be as long as a page of the dictionary."""
        longest = 1
        for index in range(group.num_columns):
            chunk = group.column(index)
            if chunk.path_in_schema.partition(".")[0] in names:
                pages = list(page_sizes(self._file, chunk))
                if max(pages, default=0) > PAGE:
                    raise Refused(GIANT_PAGE)
                mean = chunk.total_uncompressed_size // max(1, group.num_rows)
                longest = max(longest, mean, pages[0] if chunk.has_dictionary_page else 0)
        return _rows_at_once(longest)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Say what pyarrow raises in our words."""
        try:
            yield
        except (pa.ArrowException, BadHeader, OSError, ValueError, KeyError, MemoryError) as error:
            raise Refused(f"damaged {self.kind}: {' '.join(str(error).split())[:100]}") from None


@contextmanager
def seekable(stream: Stream) -> Iterator[BinaryIO]:
    """The content as a file to seek in: the file itself, or a copy on disk of what was unpacked or came through a pipe."""
    if not stream.archives and stream.file.seekable():
        yield stream.file
    else:
        with tempfile.TemporaryFile() as copy:
            for data in iter(lambda: stream.read(BLOCK), b""):
                copy.write(data)
            yield copy


def _records(batch: pa.RecordBatch, first: int) -> Iterator[Record]:
    for index, values in enumerate(_rows(batch)):
        if values is None:
            strings = [column.slice(index, 1) for column in batch.columns if _is_text(column.type)]
            size = sum(pc.sum(pc.binary_length(string)).as_py() or 0 for string in strings)
            yield Record("row", first + index, size, None, NOT_UTF8)
        else:
            size = sum(len(value.encode(errors="surrogatepass")) for value in values.values() if isinstance(value, str))
            yield Record("row", first + index, size, values)


def _rows_at_once(*longest: int) -> int:
    """How many rows may be held at once, if each may have as many bytes as that."""
    return max(1, min(_BATCH_ROWS, _BATCH // max(1, *longest)))


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one that is not UTF-8."""
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [None]
        return [row for index in range(batch.num_rows) for row in _rows(batch.slice(index, 1))]
    return rows


def _is_text(kind: pa.DataType) -> bool:
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in _TEXTS
