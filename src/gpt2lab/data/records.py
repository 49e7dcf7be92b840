"""What a source gives: documents, in pieces of any length, and every byte of it that is not text of one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A part of a document; documents come one after the other, and so do their pieces.

    Attributes:
        name: of the document: its file, and where in it, such as ``books.jsonl:17``.
        text: some of its text. Where one piece ends says nothing: it may be inside a word.
        last: whether the document ends here.
        scored: whether a model is to learn to write it; a prompt is only read.
    """

    name: str
    text: str
    last: bool
    scored: bool = True


@dataclass(frozen=True)
class Skipped:
    """Bytes of a source that become no text.

    Attributes:
        file: the name of the file.
        where: in it: ``line 17``, ``lines 3 to 9``, ``row 5``, ``bytes 0 to 3``, or empty for all of it.
        bytes: how many.
        reason: why, in a few words that tests and people may rely on.
        fault: whether something is wrong with them; False for what is no text by its nature, such as quotes and keys.
    """

    file: str
    where: str
    bytes: int
    reason: str
    fault: bool = True
