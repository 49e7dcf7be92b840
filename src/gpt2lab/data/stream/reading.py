"""A source as one endless text: its files over and over, each time in another order, from any place in it on.

What stands where is a function of the files, the tokenizer and the seed. So a place, which is five small numbers, is all
that is needed to go on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, groupby
from typing import Any

import numpy as np

from gpt2lab.data.formats import Found
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.sources import SourceFile
from gpt2lab.data.stream.held_out import HeldOut
from gpt2lab.data.survey import described
from gpt2lab.data.text import MOST_FAULTS
from gpt2lab.data.tokenise import Tokens, tokenise
from gpt2lab.errors import DataError
from gpt2lab.seeds import derive
from gpt2lab.tokenizer import Tokenizer

ENOUGH = 2**16
"""Faulty bytes from which on it counts how large a part of the text they are."""
_LISTED = 100


@dataclass(frozen=True)
class Place:
    """Where in the endless text an id lies.

    Attributes:
        epoch: how often all files were read before.
        file: files of this epoch before the one that it lies in.
        document: documents of that file before the one that it lies in.
        byte: of the document's UTF-8 text where the piece begins that it lies in.
        ids: of that piece before it.
    """

    epoch: int = 0
    file: int = 0
    document: int = 0
    byte: int = 0
    ids: int = 0


@dataclass
class Account:
    """Where the bytes of a file went: each was tokenised, held out or skipped.

    Attributes:
        epoch, turn: which reading of the file this is: how often all were read before, and how many files since.
        skipped: the first rows of what is no text.
    """

    file: str
    epoch: int
    turn: int
    read_as: str = ""
    bytes_in: int = 0
    bytes_tokenised: int = 0
    bytes_held_out: int = 0
    skipped_by_reason: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self) | {"skipped_by_reason": dict(self.skipped_by_reason)}


class Reader:
    """Files, one after the other, with an account of each.

    Attributes:
        text, faulty: bytes so far that are text, and that should be and are not.
    """

    def __init__(self, on_fault: str) -> None:
        self._on_fault = on_fault
        self.text = self.faulty = 0

    def pieces(self, file: SourceFile, account: Account) -> Iterator[Piece]:
        """The documents of a file; what else is in it goes into its account.

        Raises:
            DataError: there is a fault, and faults stop; or they are more than a tenth of all that was read so far.
        """
        for item in file.read():
            match item:
                case Found():
                    account.read_as = described(item)
                case Skipped():
                    self._skip(item, account)
                case Piece():
                    size = len(item.text.encode())
                    account.bytes_in += size
                    self.text += size
                    yield item

    def _skip(self, item: Skipped, account: Account) -> None:
        account.bytes_in += item.bytes
        account.skipped_by_reason[item.reason] += item.bytes
        if len(account.skipped) < _LISTED:
            account.skipped.append(asdict(item))
        if not item.fault:
            return
        where = f"{item.file}, {item.where}" if item.where else item.file
        if self._on_fault == "stop":
            fix = "mend it, or leave out what is faulty with --data.on_fault=skip"
            raise DataError("unusable text", where=where, cause=item.reason, fix=fix)
        self.faulty += item.bytes if item.where else 0
        if self.faulty > max(ENOUGH, MOST_FAULTS * (self.text + self.faulty)):
            fix = "convert it to UTF-8, or leave that file out"
            raise DataError("not text", where=where, cause=f"{item.reason}; so is a tenth of the text", fix=fix)


@dataclass
class Endless:
    """The endless text of some files.

    Attributes:
        files: in the order of the source.
        seed: decides the order in each epoch.
        held_out: what is not learned from, wherever it comes.
        on_fault: skip or stop.
        on_file: is told the account of each file that was read to its end.
    """

    files: Sequence[SourceFile]
    seed: int
    held_out: HeldOut
    on_fault: str = "skip"
    on_file: Callable[[Account], object] = lambda account: None

    def __post_init__(self) -> None:
        self._begun: deque[Place] = deque()  # of each document that is on its way through the tokenizer
        self._reader, self._learned = Reader(self.on_fault), 0

    def tokens(self, start: Place, tokenizer: Tokenizer, workers: int = 1) -> Iterator[tuple[Place, Tokens]]:
        """The ids from a place on, in parts, each with the place of its first id.

        Raises:
            DataError: there is no text, or too much of it is faulty, or a file cannot be read.
        """
        document, byte, skip = None, 0, start.ids
        for part in tokenise(self._pieces(start), tokenizer, workers):
            if document is None:
                document = self._begun.popleft()
                byte = document.byte
            yield replace(document, byte=byte, ids=skip), replace(part, ids=part.ids[skip:])
            byte, skip = byte + part.bytes, 0
            if part.last:
                document = None

    def file_at(self, place: Place) -> SourceFile:
        """The file that a place is in."""
        return self.files[file_order(self.seed, place.epoch, len(self.files))[place.file]]

    def _pieces(self, start: Place) -> Iterator[Piece]:
        """The documents from the place's piece on."""
        for epoch in count(start.epoch):
            before, first = self._learned, start.file if epoch == start.epoch else 0
            for number in range(first, len(self.files)):
                here = Place(epoch, number)
                yield from self._file(start if (start.epoch, start.file) == (epoch, number) else here)
            if first == 0 and self._learned == before:
                cause = "all of it is held out, or is no text"
                fix = "give more text, or smaller data.validation_tokens; leave out data.stream to see what is in it"
                raise DataError("too little text to stream", where="data.source", cause=cause, fix=fix)

    def _file(self, start: Place) -> Iterator[Piece]:
        """The documents of a file from a place in it on. What stands before is read, and counted, too."""
        file = self.file_at(start)
        account = Account(file.name, start.epoch, start.file)
        for number, document in enumerate(documents(self._reader.pieces(file, account))):
            text = self._kept(document, account)
            if number < start.document:
                deque(text, maxlen=0)
            else:
                byte = start.byte if number == start.document else 0
                yield from self._noted(_after(text, byte), replace(start, document=number, byte=byte, ids=0))
        account.bytes_held_out = account.bytes_in - account.bytes_tokenised - account.skipped_by_reason.total()
        self.on_file(account)

    def _kept(self, document: Iterable[Piece], account: Account) -> Iterator[Piece]:
        """What of a document is learned from."""
        for piece in self.held_out.without(document):
            size = len(piece.text.encode())
            account.bytes_tokenised += size
            self._learned += size
            yield piece

    def _noted(self, document: Iterable[Piece], place: Place) -> Iterator[Piece]:
        """A document with its place noted when it begins; nothing of one without text."""
        begun = False
        for piece in document:
            if piece.text and not begun:
                begun = True
                self._begun.append(place)
            if begun:
                yield piece


def documents(pieces: Iterable[Piece]) -> Iterator[Iterator[Piece]]:
    """The pieces of each document; what is not taken of one is passed over."""

    def numbered() -> Iterator[tuple[int, Piece]]:
        number = 0
        for piece in pieces:
            yield number, piece
            number += piece.last

    for _, document in groupby(numbered(), key=lambda item: item[0]):
        yield (piece for _, piece in document)


def file_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which an epoch reads the files."""
    return np.random.default_rng(derive(seed, "files", epoch)).permutation(count)


def _after(document: Iterable[Piece], byte: int) -> Iterator[Piece]:
    """What follows the first bytes of a document."""
    for piece in document:
        encoded = piece.text.encode()
        yield replace(piece, text=encoded[byte:].decode()) if byte else piece
        byte = max(0, byte - len(encoded))
