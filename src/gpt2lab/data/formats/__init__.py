"""One file's documents: what it is, the pieces of its texts, and every byte that is none of theirs.

A document is a plain text or a page, or a record of JSON, CSV, Parquet or Arrow. What a file is, its beginning decides.
Memory is bounded, whatever the length of the file, its lines and its records.

The bytes of a file are those of its content, unpacked. UTF-16 and UTF-32 count as what they are in UTF-8, an undecodable
byte as itself; Parquet and Arrow count the strings of their text columns as UTF-8. The fields of a record are joined by
line breaks, which stand for what was between them; in Parquet and Arrow they count as bytes of the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import BinaryIO

from gpt2lab.data.formats.columns import Columns, seekable
from gpt2lab.data.formats.documents import documents, look_ahead
from gpt2lab.data.formats.fields import Fields, given_fields
from gpt2lab.data.formats.html import read_html
from gpt2lab.data.formats.jsons import read_json, read_json_lines
from gpt2lab.data.formats.kinds import HEAD, Kind, binary, column_kind, foreign_kind, text_kind
from gpt2lab.data.formats.lines import BYTE_ORDER_MARK, EMPTY, Bad, Refused, as_rows
from gpt2lab.data.formats.tables import read_table, sniff_table
from gpt2lab.data.formats.text import read_text, strip_mark
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.unpack import Stream

__all__ = ["Fields", "Found", "read_file"]

_ARCHIVES = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Found:
    """What a file turned out to be.

    Attributes:
        file: its name.
        kind: of its content, such as "json lines"; "nothing" where no text can be in it.
        archives: that it is packed in, from the outside in, such as ``("gzip",)``.
        encoding: of its text.
        fields: of its records that are the text, given or guessed; None where it has none.
    """

    file: str
    kind: Kind
    archives: tuple[str, ...]
    encoding: str = "utf-8"
    fields: Fields | None = None


def read_file(source: Path | BinaryIO, name: str, fields: Sequence[str] = ()) -> Iterator[Found | Piece | Skipped]:
    """What a file is, its documents in pieces, and what of it was skipped: the same, whenever it is read.

    The bytes of the pieces and of what was skipped are all bytes of the file. `Found` comes once, before the first piece.

    Args:
        source: its path; or a stream, which is read once, forward, and left open.
        name: of the file, for people; its suffix decides where the content leaves open what the file is.
        fields: of its records that are the text: one, or a prompt's and its response's. Empty: they are guessed.

    Raises:
        OSError: the file cannot be opened or read.
    """
    given = given_fields(fields) if fields else None
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield from _read(Stream(file), name, given)
    else:
        yield from _read(Stream(source), name, given)


def _read(stream: Stream, name: str, given: Fields | None) -> Iterator[Found | Piece | Skipped]:
    found = Found(name, "nothing", stream.archives)
    head = stream.peek(HEAD)
    if not head:  # of an archive that gives nothing, its own bytes are skipped
        yield found
        if stream.problem:
            yield Skipped(name, "", stream.drain_packed(), stream.problem)
        else:
            yield Skipped(name, "", 0, EMPTY, fault=False)
        return
    if columns := column_kind(head):
        yield from _read_columns(stream, replace(found, kind=columns), given)
    elif foreign := foreign_kind(head):
        yield found
        yield Skipped(name, "", stream.drain(), foreign)
    else:
        yield from _read_characters(stream, found, given)
    if stream.problem:
        yield Skipped(name, "", 0, stream.problem)


def _read_characters(stream: Stream, found: Found, given: Fields | None) -> Iterator[Found | Piece | Skipped]:
    encoding, mark = strip_mark(stream)
    if mark:
        yield Skipped(found.file, f"bytes 0 to {mark - 1}", mark, BYTE_ORDER_MARK, fault=False)
    try:
        found, items = _open_characters(stream, replace(found, encoding=encoding), given)
    except Refused as error:
        stream.drain()
        yield found
        yield Skipped(found.file, "", stream.bytes - mark, str(error))
    else:
        yield found
        yield from as_rows(found.file, items)


def _open_characters(
    stream: Stream, found: Found, given: Fields | None
) -> tuple[Found, Iterator[Piece | Bad | Skipped]]:
    """What a file of characters is, and what is in it.

    Raises:
        Refused: it is to be skipped as a whole.
    """
    head = stream.peek(HEAD)
    if reason := binary(head):
        raise Refused(reason)
    beginning, suffix = head.decode(errors="replace"), _suffix(found.file)
    kind = text_kind(beginning, suffix)
    if kind == "text":
        return replace(found, kind=kind), read_text(stream, found.file)
    if kind == "html":
        return replace(found, kind=kind), read_html(stream, found.file)
    if dialect := sniff_table(beginning, suffix) if kind == "table" else None:
        records = read_table(stream, dialect)
    else:
        records = read_json_lines(stream) if kind == "json lines" else read_json(stream)
    first, fields = look_ahead(records, given)
    return replace(found, kind=kind, fields=fields), documents(chain(first, records), found.file, fields)


def _read_columns(stream: Stream, found: Found, given: Fields | None) -> Iterator[Found | Piece | Skipped]:
    """The documents of a file of columns."""
    with seekable(stream) as file:
        try:
            columns = Columns(file, found.kind)
            fields = columns.fields(given)
        except Refused as error:
            yield replace(found, kind="nothing")
            yield Skipped(found.file, "", file.seek(0, os.SEEK_END), str(error))
            return
        yield replace(found, fields=fields)
        try:
            yield from as_rows(found.file, documents(columns.records(fields), found.file, fields, structured=False))
        except Refused as error:  # its rows are in no order that would tell how much is lost
            yield Skipped(found.file, f"after row {columns.rows_read}", 0, str(error))


def _suffix(name: str) -> str:
    """The last suffix of a name that is not one of an archive, in lower case."""
    suffixes = [suffix for suffix in PurePath(name.lower()).suffixes if suffix not in _ARCHIVES]
    return suffixes[-1] if suffixes else ""
