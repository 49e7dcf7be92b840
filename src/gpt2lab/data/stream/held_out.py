"""The validation text of a stream: its first documents, which are left out of it wherever they come again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from gpt2lab.data.prepared import SUMMARY
from gpt2lab.data.records import Piece
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.data.shards import shard_path
from gpt2lab.data.tokenise import cut_safely, encode
from gpt2lab.paths import whole_folder, write_whole
from gpt2lab.tokenizer import Tokenizer

BEGINNING = 1000
"""Characters by which a document is known again: it can be long, and what is learned from it must not wait for its end."""
_NAME = "held_out.json"


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out.

    Attributes:
        chars: by the hash of a document's beginning, how many of its first characters.
    """

    chars: dict[str, int] = field(default_factory=dict)

    def without(self, document: Iterable[Piece]) -> Iterator[Piece]:
        """A document without what of it is held out."""
        pieces = iter(document)
        first = _beginning(pieces)
        drop = self.chars.get(_digest(first), 0)
        for piece in chain(first, pieces):
            yield replace(piece, text=piece.text[drop:])
            drop = max(0, drop - len(piece.text))

    @classmethod
    def load(cls, folder: Path) -> HeldOut:
        """What `hold_out` left out for a folder's text."""
        return cls(json.loads((folder / _NAME).read_text()))


def hold_out(
    documents: Iterable[Iterator[Piece]],
    tokenizer: Tokenizer,
    chars: int | None,
    folder: Path,
    account: Callable[[], dict[str, Any]],
) -> None:
    """Make a prepared folder whose validation text is the start of a text, and whose training text is empty.

    Args:
        documents: each in pieces.
        chars: how many characters to hold out, over all documents; None: everything.
        account: where the bytes went that were read by then.

    Raises:
        DataError: a character that the tokenizer has never seen.
    """
    held_out: dict[str, int] = {}
    with whole_folder(folder) as aside:
        with ShardWriter(shard_path(aside, "validation", 0), tokenizer) as writer:
            for document in documents:
                first = _beginning(document)
                known, taken = _digest(first), 0
                for piece in cut_safely(_first_chars(chain(first, document), chars)):
                    taken += len(piece.text)
                    if taken:
                        [ids] = encode([piece], tokenizer)
                        writer.add(ids, len(piece.text.encode()), documents=int(piece.last), scored=piece.scored)
                held_out |= {known: taken} if taken else {}
                chars = chars - taken if chars is not None else None
                if chars == 0:
                    break
            header = writer.finish()
        tokenizer.save(aside)
        splits = {"train": [], "validation": [asdict(header)]}
        write_whole(aside / SUMMARY, json.dumps({"key": folder.name, "account": account(), **splits}, indent=1))
        write_whole(aside / _NAME, json.dumps(held_out))


def _beginning(document: Iterator[Piece]) -> list[Piece]:
    """The first pieces of a document, which hold its beginning; they are taken from it."""
    first, length = list[Piece](), 0
    for piece in document:
        first.append(piece)
        length += len(piece.text)
        if length >= BEGINNING:
            break
    return first


def _digest(first: list[Piece]) -> str:
    return hashlib.sha256("".join(piece.text for piece in first)[:BEGINNING].encode()).hexdigest()


def _first_chars(document: Iterable[Piece], chars: int | None) -> Iterator[Piece]:
    """A document, or so many of its characters as if they were all of it."""
    for piece in document:
        if chars is not None and len(piece.text) >= chars:
            yield replace(piece, text=piece.text[:chars], last=True)
            return
        chars = chars - len(piece.text) if chars is not None else None
        yield piece
