"""Plain text: one document a file, whatever its length and that of its lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import partial

from gpt2lab.data.formats.lines import BLOCK, CUT, NOT_UTF8, NUL, Bad
from gpt2lab.data.records import Piece
from gpt2lab.data.unpack import Stream

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark is the start of this one
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ESCAPE = "gpt2lab.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Half a surrogate pair for each byte that is not of the encoding, and where to go on."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff" * (error.end - error.start), error.end


codecs.register_error(_ESCAPE, _escape)


def strip_mark(stream: Stream) -> tuple[str, int]:
    """Take a byte order mark off a stream, and turn what follows into UTF-8: the encoding, and the mark's bytes.

    A byte that is not of the encoding becomes one that is not UTF-8: no bytes are lost, and the line is found out later.
    """
    for mark, encoding in MARKS:
        if stream.peek(len(mark)) == mark:
            stream.read(len(mark))
            if encoding != "utf-8":
                stream.through(partial(_as_utf8, encoding=encoding))
            return encoding, len(mark)
    return "utf-8", 0


def _as_utf8(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)(_ESCAPE)
    for chunk in chunks:
        yield decoder.decode(chunk).encode(errors="surrogateescape")
    yield decoder.decode(b"", final=True).encode(errors="surrogateescape")


def read_text(stream: Stream, name: str) -> Iterator[Piece | Bad]:
    """One document, without the lines that are not UTF-8 or hold a NUL."""
    held = ""  # until it is known whether the document ends with it
    for item in _texts(stream):
        if isinstance(item, Bad):
            yield item
        else:
            if held:
                yield Piece(name, held, last=False)
            held = item
    if held:
        yield Piece(name, held, last=True)


def _texts(stream: Stream) -> Iterator[str | Bad]:
    number, rest = 1, b""
    while block := stream.read(BLOCK):
        data = rest + block
        end = data.rfind(b"\n") + 1 or (_character_start(data) if len(data) >= BLOCK else 0)
        yield from _decode(data[:end], number)
        number += data.count(b"\n", 0, end)
        rest = data[end:]
    if rest and stream.problem:
        yield Bad("line", number, len(rest), CUT)
    else:
        yield from _decode(rest, number)


def _decode(data: bytes, number: int) -> Iterator[str | Bad]:
    """Some lines as one text; where that cannot be, halves of them are looked at, down to single lines."""
    text, problem = _decoded(data)
    if problem:
        half = len(data) // 2
        cut = data.rfind(b"\n", 0, half) + 1 or data.find(b"\n", half) + 1
        if cut in (0, len(data)):
            yield Bad("line", number, len(data), problem)
        else:
            yield from _decode(data[:cut], number)
            yield from _decode(data[cut:], number + data.count(b"\n", 0, cut))
    elif text:
        yield text


def _decoded(data: bytes) -> tuple[str, str]:
    """The text of some bytes, or why they are none."""
    if b"\0" in data:
        return "", NUL
    try:
        return data.decode(), ""
    except UnicodeDecodeError:
        return "", NOT_UTF8


def _character_start(data: bytes) -> int:
    """Where the last character of a text begins, which may be cut off."""
    start = len(data) - 1
    while start > len(data) - 4 and data[start] & 0xC0 == 0x80:
        start -= 1
    return start
