"""One pass through a split: its documents, the ids it uses, and the symptoms of its text. Memory is bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gpt2lab.data.doctor.duplicates import minima, mix, shingles
from gpt2lab.data.doctor.spelling import Spelling
from gpt2lab.data.doctor.symptoms import Symptoms
from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError

NUM_LONGEST = 3
_BLOCK = 2**17  # ids
_UNCUT = 2**20  # ids in a row without such a place, after which any is cut at
_MOST_ERRORS = 10
_DIGEST_BYTES = 8
_NEVER = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Documents:
    """Documents of a split: in each array, the same row is the same document.

    Attributes:
        number: which of the split's, from 0.
        start: the token of the split at which it begins.
        tokens: how many, without end-of-text.
        bytes: of text.
        digest: the same for the same ids.
        key: from 0 to 2 ** 64 - 1. Two documents have the same with the probability that is their similarity: who draws by
            it draws a document together with its copies, also with those that are not exact.
    """

    number: np.ndarray
    start: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    digest: np.ndarray
    key: np.ndarray

    def __len__(self) -> int:
        return len(self.number)

    def take(self, rows: np.ndarray) -> Documents:
        """These rows."""
        return Documents(**{name: column[rows] for name, column in vars(self).items()})

    @classmethod
    def joined(cls, parts: list[Documents]) -> Documents:
        """All rows of several."""
        signed, unsigned = np.zeros(0, np.int64), np.zeros(0, np.uint64)
        empty = cls(signed, signed, signed, signed, unsigned, unsigned)
        return cls(**{name: np.concatenate([vars(part)[name] for part in [empty, *parts]]) for name in vars(empty)})


def last_key(share: float) -> np.uint64:
    """The largest key of the documents that are drawn when this share of them is."""
    return np.uint64(max(1, int(share * 2**64)) - 1)


class Scan:
    """What a split holds.

    Args:
        share: of the documents that are drawn.
        shingle: ids in a shingle, of which a document's key is made.

    Attributes:
        num_documents, num_empty: how many, and how many of them without any text.
        bytes: of text.
        usage: how often each id is there; the last entry counts ids beyond the vocabulary.
        drawn: documents that have text, or a sample of them.
        longest: the longest ones, the longest first.
        symptoms: of the text.
        errors: what could not be read, in words; the first ones.
        unread: tokens that could not be read.
    """

    def __init__(self, shards: Shards, spelling: Spelling, *, share: float = 1.0, shingle: int = 5) -> None:
        self.num_documents = self.num_empty = self.bytes = self.unread = 0
        self.usage = np.zeros(spelling.vocab_size + 1, np.int64)
        self.drawn = self.longest = Documents.joined([])
        self.symptoms = Symptoms()
        self.errors: list[str] = []
        self._shards, self._spelling = shards, spelling
        self._shingle, self._last_key = shingle, last_key(share)
        self._parts: list[Documents] = []
        self._open = _Open(0)
        for start, ids in self._blocks():
            if start != self._open.reached:  # what is between could not be read
                self._end_open()
                self._open = _Open(start, reached=start)
            self._add(start, np.minimum(ids, spelling.vocab_size))
        self._end_open()
        self.drawn, self._parts = Documents.joined(self._parts), []

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Where some ids start, and these ids: all that can be read, in their order, cut where nothing is cut in two."""
        start, rest = 0, np.zeros(0, np.int64)
        for at, ids in self._readable():
            if at != start + len(rest):
                yield start, rest
                start, rest = at, rest[:0]
            rest = np.concatenate([rest, ids])
            cuts = np.flatnonzero(self._spelling.can_cut[np.minimum(rest, self._spelling.vocab_size)])
            cut = int(cuts[-1]) if len(cuts) else len(rest) if len(rest) >= _UNCUT else 0
            if cut:
                yield start, rest[:cut]
                start, rest = start + cut, rest[cut:]
        yield start, rest

    def _readable(self) -> Iterator[tuple[int, np.ndarray]]:
        """Ids in blocks; one that is damaged is noted, together with all that its hash stands for."""
        start = 0
        for header in self._shards.headers:
            checked = header.block_bytes // int(header.dtype[-1]) or max(1, header.tokens)
            for first in range(start, start + header.tokens, checked):
                end = min(first + checked, start + header.tokens)
                for at in range(first, end, _BLOCK):
                    try:
                        ids = self._shards.read(at, min(_BLOCK, end - at))
                    except DataError as error:
                        self.unread += end - at
                        self.errors = [*self.errors, f"{error.where}: {error.cause}"][:_MOST_ERRORS]
                        break
                    yield at, ids
            start += header.tokens

    def _add(self, start: int, ids: np.ndarray) -> None:
        """The next ids: the rest of the open document, others, and the beginning of one that is open then."""
        ends = np.flatnonzero(ids == self._spelling.end_of_text)
        bytes_before = np.append(0, np.cumsum(self._spelling.lengths[ids]))
        none = int(self._shards.separator_first and len(ends) > 0 and start + ends[0] == 0)  # no document ends there
        self.usage += np.bincount(ids, minlength=len(self.usage))
        self.symptoms.look(self._spelling(ids), bytes_before[ends], self.num_documents - none)
        starts, stops = np.append(0, ends + 1), np.append(ends, len(ids))
        spans = np.stack([start + starts, stops - starts, bytes_before[stops] - bytes_before[starts]])
        smallest = minima(shingles(ids, self._shingle), starts, np.maximum(starts, stops - self._shingle + 1))
        spans[:, 0] = self._open.start, self._open.tokens + spans[1, 0], self._open.bytes + spans[2, 0]
        smallest[0] = min(smallest[0], self._open.smallest)
        digest, digests = self._open.digest, list[bytes]()
        digest.update(ids[: stops[0]].tobytes())
        for first, stop in zip(starts[1:].tolist(), stops[1:].tolist(), strict=True):
            digests.append(digest.digest())
            digest = hashlib.blake2b(ids[first:stop].tobytes(), digest_size=_DIGEST_BYTES)
        self._close(spans[:, none:-1], digests[none:], smallest[none:-1])
        last, tokens, size = spans[:, -1].tolist()
        self._open = _Open(last, tokens, size, smallest[-1], digest, start + len(ids))

    def _end_open(self) -> None:
        """The open document ends without end-of-text, if there is one."""
        last = self._open
        if last.tokens or (self._shards.separator_first and last.start):
            spans = np.array([[last.start], [last.tokens], [last.bytes]])
            self._close(spans, [last.digest.digest()], np.array([last.smallest]))

    def _close(self, spans: np.ndarray, digests: list[bytes], smallest: np.ndarray) -> None:
        """Documents that are complete: where they start, their tokens and bytes, shaped (3, documents), and their hashes."""
        number, digest = self.num_documents + np.arange(len(smallest)), np.frombuffer(b"".join(digests), np.uint64)
        key = np.where(smallest == _NEVER, digest, mix(smallest))  # without a single shingle, copies are exact ones
        start, tokens, size = spans
        documents = Documents(number, start, tokens, size, digest, key)
        self.num_documents += len(documents)
        self.num_empty += int((documents.tokens == 0).sum())
        self.bytes += int(documents.bytes.sum())
        longest = Documents.joined([self.longest, documents])
        self.longest = longest.take(np.argsort(-longest.tokens, kind="stable")[:NUM_LONGEST])
        self._parts.append(documents.take((documents.tokens > 0) & (key <= self._last_key)))


@dataclass
class _Open:
    """The document that goes on in the next block: what is known of it so far, and the token up to which it is known."""

    start: int
    tokens: int = 0
    bytes: int = 0
    smallest: np.uint64 = _NEVER
    digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
    reached: int = 0
