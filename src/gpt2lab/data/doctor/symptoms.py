"""What is wrong with a text that can be read: characters that a conversion broke, and lines that stand there too often."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

FAULTS = {
    "replacement": "U+FFFD, for characters that an earlier conversion lost",
    "mojibake": "UTF-8 that was read as Windows-1252 or Latin-1",
    "nul": "NUL characters",
    "control": "control characters (tab, line end and form feed are not meant)",
    "byte_order_mark": "byte order marks inside the text",
}
LINE_BYTES = 20
"""Shorter lines may well be the same many times."""
REPEATED = 10
"""A line is repeated when it is there so many times."""
_COMPARED = 200  # bytes of a line
_MOST_LINES = 2**17
_AROUND = 24  # bytes

_FAULT = re.compile(
    rb"[\x00-\x08\x0b\x0e-\x1f\x7f\xc2\xc3\xef]"  # the library looks for a set of first bytes faster than for alternatives
    rb"(?:(?<=[\x00-\x1f\x7f])|(?<=\xc2)[\x80-\x9f]|(?<=\xc3)(?:\xa2\xe2\x82\xac|\x83\xc2[\x80-\xbf])"
    rb"|(?<=\xef)(?:\xbf\xbd|\xbb\xbf))"
)
_KIND = {b"\x00": "nul", b"\xef\xbf\xbd": "replacement", b"\xef\xbb\xbf": "byte_order_mark"}


@dataclass
class Fault:
    """A kind of broken characters.

    Attributes:
        count: how many.
        documents: in how many documents.
        document: the first of them, by its number.
        text: around the first one, on its line.
    """

    count: int = 0
    documents: int = 0
    document: int = -1
    text: str = ""


class Symptoms:
    """What the text shows that was looked at so far.

    Attributes:
        faults: by kind, of `FAULTS`; those that occur.
        lines, crlf_lines: how many lines end, and how many of them in CR LF.
    """

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.lines = self.crlf_lines = 0
        self._lines: Counter[bytes] = Counter()
        self._last: dict[str, int] = {}

    def look(self, text: bytes, document_ends: np.ndarray, first: int) -> None:
        """Look at some text of whole characters.

        Args:
            document_ends: the bytes of `text` at which documents end, and a line end stands that is not theirs; the last one
                may go on.
            first: the number of the first document.
        """
        for found in _FAULT.finditer(text):
            kind = _KIND.get(found[0], "mojibake" if found[0][:1] == b"\xc3" else "control")
            fault = self.faults.setdefault(kind, Fault())
            document = first + int(np.searchsorted(document_ends, found.start(), side="right"))
            if not fault.count:
                before = text[max(0, found.start() - _AROUND) : found.start()].rpartition(b"\n")[2]
                after = text[found.end() : found.end() + _AROUND].partition(b"\n")[0]
                fault.document, fault.text = document, (before + found[0] + after).decode(errors="ignore")
            fault.count += 1
            fault.documents += document != self._last.get(kind)
            self._last[kind] = document
        self.crlf_lines += text.count(b"\r\n") - sum(text[end - 1 : end] == b"\r" for end in document_ends.tolist())
        self.lines += text.count(b"\n") - len(document_ends)
        lines = (line.strip()[:_COMPARED] for line in text.split(b"\n"))
        self._lines.update(line for line in lines if len(line) >= LINE_BYTES)
        rare = 1
        while len(self._lines) > _MOST_LINES:  # those that are there most often remain, and their counts hardly change
            self._lines = Counter({line: count for line, count in self._lines.items() if count > rare})
            rare *= 2

    def repeated_lines(self) -> list[tuple[str, int]]:
        """Lines of `LINE_BYTES` or more that are there `REPEATED` times or more, and how often: first what takes most bytes.

        Of a text with very many different lines, those that are spread thinly over it are left out.
        """
        often = [(line, count) for line, count in self._lines.items() if count >= REPEATED]
        often.sort(key=lambda item: (-len(item[0]) * item[1], item[0]))
        return [(line.decode(errors="replace"), count) for line, count in often]
