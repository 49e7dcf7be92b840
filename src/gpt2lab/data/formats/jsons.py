"""JSON: one object or an array, a record at a time; and JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from gpt2lab.data.formats.fields import Unfit
from gpt2lab.data.formats.lines import BLOCK, CUT, RECORD, Line, Record, as_line, read_lines
from gpt2lab.data.unpack import Stream

DEPTH = 64
"""Brackets inside one another."""
INVALID = "invalid JSON"
_STRINGS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_OBJECT = re.compile(r'\[?\s*\{\s*("[^"\\]*+(?:\\.[^"\\]*+)*+"\s*:|\})')
_ARRAY = re.compile(r"\[")
_STRINGS_ARRAY = re.compile(r'\[\s*"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*[,\]]')  # [1] and [section] begin texts, too
_SNIFFED = 20  # lines
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def sniff_json(head: str, suffix: str) -> Literal["json", "json lines"] | None:
    """Which kind of JSON begins so, or None where it looks like none.

    One of the first lines is an object by itself: then each line should be, also where the first is broken.
    """
    start = head.lstrip(" \t\r\n")
    called_lines = suffix in (".jsonl", ".ndjson")
    if (start.startswith("{") or called_lines) and any(map(_is_object, start.split("\n", _SNIFFED)[:_SNIFFED])):
        return "json lines"
    if called_lines and start.startswith(("{", '"')):
        return "json lines"
    begins = _OBJECT.match(start) or (_ARRAY if suffix == ".json" else _STRINGS_ARRAY).match(start)
    return "json" if begins else None


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and bool(parse(line))
    except Unfit:
        return False


def read_json_lines(stream: Stream) -> Iterator[Record]:
    """A record a line. Empty lines are nothing."""
    for line in read_lines(stream):
        yield _record("line", line)


def read_json(stream: Stream) -> Iterator[Record]:
    """The elements of an array, or the values that follow one another, as of a single object."""
    for value in _values(stream):
        yield _record("record", value)


def _record(unit: str, line: Line) -> Record:
    if line.problem:
        return Record(unit, line.number, line.bytes, None, line.problem)
    text = line.text.strip(" \t\r\n\ufeff")
    try:
        return Record(unit, line.number, line.bytes, parse(text) if text else None)
    except Unfit as error:
        return Record(unit, line.number, line.bytes, None, str(error))


def parse(text: str) -> dict[str, Any]:
    """One JSON object; a string counts as an object with a ``text``.

    NaN and Infinity, which Python and pandas write, are read: they are no text, and do no harm beside one. Of a name that
    comes twice nobody knows which is meant.

    Raises:
        Unfit: it is none, too deep, or a name comes twice.
    """
    if text.count("[") + text.count("{") > DEPTH and _depth(text) > DEPTH:
        raise Unfit(f"nested deeper than {DEPTH}")
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise Unfit(f"{INVALID}: {error.msg}") from None
    except Unfit:
        raise
    except ValueError:  # Python reads no number of more than some thousand digits
        raise Unfit(f"{INVALID}: a number too long") from None
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise Unfit("neither an object nor a string")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise Unfit("a name comes twice")
    return values


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", _STRINGS.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _values(stream: Stream) -> Iterator[Line]:
    """The values of a file, numbered from 1, each with the bytes around it; blank ones are structure.

    Those of an array end at its commas and brackets, others where all brackets are closed.
    """
    brackets = _Brackets(array=stream.peek(BLOCK).lstrip()[:1] == b"[")
    number, held, dropped = 1, b"", 0
    while block := stream.read(BLOCK):
        start = 0
        for end in brackets.edges(block):
            content = held + block[start:end]
            line = as_line(number, content[:-1] if brackets.array else content, dropped)
            yield line._replace(bytes=dropped + len(content))
            number += bool(line.problem or line.text.strip())
            start, held, dropped = end, b"", 0
        held += block[start:]
        if dropped or len(held) > RECORD:
            held, dropped = b"", dropped + len(held)
    line = as_line(number, held, dropped)
    yield line._replace(problem=CUT) if stream.problem and held.strip() else line
    if brackets.array:
        yield Line(number + 1, "", 0, CUT if stream.problem else "the array is not closed")


class _Brackets:
    """Counts brackets outside of strings, over the blocks of a file.

    Attributes:
        array: whether the file is an array that is still open.
        depth: brackets that are open.
    """

    def __init__(self, *, array: bool) -> None:
        self.array, self.depth = array, 0
        self._inside = self._escaped = False

    def edges(self, block: bytes) -> Iterator[int]:
        """Where in the block values end: after the comma or bracket that ends each."""
        place = 0
        while place < len(block):
            if self._inside:
                place = self._string_end(block, place)
            elif match := _OUTSIDE.search(block, place):
                mark, place = match[0], match.end()
                self._inside = mark == b'"'
                self.depth += (mark in b"[{") - (mark in b"]}")
                closes = self.depth <= 0 and mark in b"]}"
                if closes or (self.array and self.depth == 1 and mark in b",["):
                    self.depth = max(0, self.depth)
                    yield place
                    self.array = self.array and not closes
            else:
                return

    def _string_end(self, block: bytes, place: int) -> int:
        """Where in the block what is outside of the string goes on; its end, where the string is longer."""
        if self._escaped:
            self._escaped = False
            place += 1
        inside = _INSIDE.match(block, place)
        assert inside  # of nothing, too
        place = inside.end()
        self._escaped = block[place : place + 1] == b"\\"
        self._inside = block[place : place + 1] != b'"'
        return place + 1
