"""What becomes of bytes: lines that can be read, texts in pieces, and rows of what was skipped."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.unpack import Stream

BLOCK = 2**20
"""Bytes read at once; of a text that comes in one line, also what is skipped for one bad byte."""
RECORD = 2**23
"""The longest record, line of JSON or row that is read."""
STRUCTURE = "structure: keys, quotes, escapes, other fields"
BYTE_ORDER_MARK = "byte order mark"
MARKUP = "markup and boilerplate"
EMPTY = "empty file"
CUT = "cut off where the archive ends"
NOT_UTF8 = "not UTF-8"
NUL = "NUL byte"
TOO_LONG = f"longer than {RECORD // 2**20} MiB"


class Bad(NamedTuple):
    """One line, row or record that was skipped, before those that follow each other become one `Skipped`."""

    unit: str
    number: int
    bytes: int
    reason: str
    last: int = 0  # of several; 0: only this one


class Line(NamedTuple):
    """One line with its end. (A tuple: there are millions of them, and a dataclass takes three times as long.)

    Attributes:
        number: from 1.
        text: of it; bytes that are not UTF-8 are lone surrogates, and a line that is too long has none.
        bytes: of it.
        problem: why it cannot be used; else empty.
    """

    number: int
    text: str
    bytes: int
    problem: str


class Record(NamedTuple):
    """One record of a file, read or not.

    Attributes:
        unit, number: where it is, such as line 17.
        bytes: it takes in the file, with all that is around it.
        values: its fields; None where there is nothing to read, which is no fault.
        problem: why it cannot be used; else empty.
        last: the number of its last line, where it has several.
    """

    unit: str
    number: int
    bytes: int
    values: dict[str, Any] | None
    problem: str = ""
    last: int = 0


class Refused(Exception):
    """Why a whole file is skipped."""


def read_lines(stream: Stream) -> Iterator[Line]:
    """The lines of a stream, none of which is held when it is longer than `RECORD`."""
    number, rest, dropped = 0, b"", 0
    while block := stream.read(BLOCK):
        data = rest + block
        end = data.rfind(b"\n") + 1
        for content in io.BytesIO(data[:end]):
            number += 1
            yield as_line(number, content, dropped)
            dropped = 0
        rest = data[end:]
        if dropped or len(rest) > RECORD:
            dropped, rest = dropped + len(rest), b""
    if rest or dropped:
        line = as_line(number + 1, rest, dropped)
        yield line._replace(problem=CUT) if stream.problem else line


def as_line(number: int, content: bytes, dropped: int) -> Line:
    """A line from its bytes, after those that were dropped already."""
    if dropped or len(content) > RECORD:
        return Line(number, "", dropped + len(content), TOO_LONG)
    problem = NUL if b"\0" in content else ""
    try:
        return Line(number, content.decode(), len(content), problem)
    except UnicodeDecodeError:
        return Line(number, content.decode(errors="surrogateescape"), len(content), problem or NOT_UTF8)


def pieces(name: str, text: str, *, ends: bool = True, scored: bool = True) -> Iterator[Piece]:
    """A document, or a part of one, in pieces of at most a block; `ends`: with it the document ends."""
    for start in range(0, len(text), BLOCK):
        yield Piece(name, text[start : start + BLOCK], ends and start + BLOCK >= len(text), scored)


def as_rows(file: str, items: Iterable[Piece | Bad | Skipped]) -> Iterator[Piece | Skipped]:
    """Pieces as they are; what was skipped as rows, one for neighbours with one reason."""
    held: Bad | None = None
    for item in items:
        if held and isinstance(item, Bad) and _continues(held, item):
            held = held._replace(last=item.number, bytes=held.bytes + item.bytes)
            continue
        if held:
            yield _row(file, held)
        held = item if isinstance(item, Bad) else None
        if not isinstance(item, Bad):
            yield item
    if held:
        yield _row(file, held)


def _continues(held: Bad, item: Bad) -> bool:
    """Whether a row goes on: with the next line, or with more of a long one."""
    last = held.last or held.number
    return (held.unit, held.reason) == (item.unit, item.reason) and last <= item.number <= last + 1


def _row(file: str, bad: Bad) -> Skipped:
    several = bad.last > bad.number
    where = f"{bad.unit}s {bad.number} to {bad.last}" if several else f"{bad.unit} {bad.number}"
    return Skipped(file, where, bad.bytes, bad.reason)
