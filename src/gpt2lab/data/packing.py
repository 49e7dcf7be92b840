"""Whole documents packed into samples: what stays empty is little, and no document is cut that fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from gpt2lab.config import DataConfig
from gpt2lab.data.samples import Contiguous, Samples
from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError
from gpt2lab.seeds import derive

GROUP = 2**16
"""Consecutive documents that are packed among themselves: enough to fill samples, and few enough to sort at once."""
_SCAN = 2**22  # ids


@dataclass(frozen=True)
class Documents(Samples):
    """Samples that hold whole documents, each closed by its end-of-text.

    A sample's first id is the one that stands before its first document, an end-of-text, and is context alone. Then come
    documents, as many as fit, each id a target: the first id of a document is predicted from the end-of-text before it. What
    stays empty is filled with end-of-text and is no target. A document of more than `seq_len` ids is cut into pieces of so
    many; each but the first begins with the last id of the piece before, which is context there and no target again. So an
    epoch has every id of the text as a target once. Which documents share a sample follows from the text and `seq_len`
    alone; seed and epoch decide the order of the samples.

    Attributes:
        shards: the tokens.
        seq_len: 2 or more.
        seed: decides the order.
        end_of_text: the id that closes a document.

    Raises:
        DataError: there is no text, or it is damaged: all of it is read once, to find its documents.
    """

    shards: Shards
    seq_len: int
    seed: int
    end_of_text: int

    def __post_init__(self) -> None:
        if not len(self.shards):
            raise DataError("too little text", where="data", cause="the training text is empty", fix="give more text")
        _ = self.packed

    @cached_property
    def packed(self) -> Packed:
        """What lies in which sample; the same text is packed once."""
        return pack(self.shards, self.seq_len, self.end_of_text)

    @property
    def per_epoch(self) -> int:
        """Samples in an epoch."""
        return len(self.packed.firsts) - 1

    @property
    def padding(self) -> float:
        """The share of all places that no text fills."""
        return 1 - float(self.packed.counts.sum()) / (self.per_epoch * self.seq_len)

    def start(self, index: int) -> int:
        """Where in the shards the first document of a sample begins."""
        return self._pieces(index)[0][0]

    def read(self, index: int) -> np.ndarray:
        """Its ids."""
        ids = np.full(self.seq_len + 1, self.end_of_text, np.int64)
        pieces, at = self._pieces(index), 1
        if before := pieces[0][0]:
            ids[0] = self.shards.read(before - 1, 1)[0]
        for start, count, _ in pieces:
            ids[at : at + count] = self.shards.read(start, count)
            at += count
        return ids

    def scored(self, index: int) -> np.ndarray:
        """All but those of prompts, those that another sample has as targets, and what only fills it."""
        scored, at = np.zeros(self.seq_len, bool), 0
        for start, count, continues in self._pieces(index):
            scored[at : at + count] = self.shards.scored(start, count)
            scored[at] &= not continues
            at += count
        return scored

    def _pieces(self, index: int) -> list[tuple[int, int, bool]]:
        """What a sample holds: first id in the shards, ids, and whether it continues a document."""
        epoch, place = divmod(index, self.per_epoch)
        sample = int(_order(self.seed, epoch, self.per_epoch)[place])
        packed = self.packed
        which = slice(packed.firsts[sample], packed.firsts[sample + 1])
        columns = (packed.starts, packed.counts, packed.continues)
        return list(zip(*(column[which].tolist() for column in columns), strict=True))


def make_samples(
    config: DataConfig, shards: Shards, seq_len: int, seed: int, end_of_text: int
) -> Contiguous | Documents:
    """The samples that a recipe asks for.

    Raises:
        DataError: there is too little text for one.
    """
    if config.packing == "documents":
        return Documents(shards, seq_len, seed, end_of_text)
    return Contiguous(shards, seq_len, seed)


@dataclass(frozen=True)
class Packed:
    """Documents and pieces of them, in the order of the samples that hold them.

    Attributes:
        starts: the first id of each, in the shards.
        counts: its ids, end-of-text and an id that is repeated among them.
        continues: whether it continues a document, and so begins with such an id.
        firsts: the first of each sample, and the end of the last.
    """

    starts: np.ndarray
    counts: np.ndarray
    continues: np.ndarray
    firsts: np.ndarray


@lru_cache(maxsize=1)
def pack(shards: Shards, seq_len: int, end_of_text: int) -> Packed:
    """Pack all documents of a text into samples of `seq_len`: the largest first, each where it leaves the least room."""
    starts, counts = document_spans(shards, end_of_text)
    # A document and each of its pieces overlap by one id, but for the first: piece j begins at id j * (seq_len - 1).
    pieces = np.maximum(1, -(-(counts - 1) // (seq_len - 1)))
    document = np.repeat(np.arange(len(starts)), pieces)
    skipped = (np.arange(len(document)) - (np.cumsum(pieces) - pieces)[document]) * (seq_len - 1)
    starts, counts = starts[document] + skipped, np.minimum(counts[document] - skipped, seq_len)
    samples, used = np.empty(len(counts), np.int64), 0
    for first in range(0, len(counts), GROUP):
        placed = best_fit(counts[first : first + GROUP], seq_len)
        samples[first : first + GROUP] = placed + used
        used += int(placed.max()) + 1
    order = np.argsort(samples, kind="stable")  # so what lacks its end-of-text, at the end of the text, ends its sample
    firsts = np.concatenate([[0], np.cumsum(np.bincount(samples, minlength=used))])
    return Packed(starts[order], counts[order], (skipped > 0)[order], firsts)


def document_spans(shards: Shards, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each document starts, and how many ids it has with its end-of-text, which the last one may lack."""
    found = [
        np.flatnonzero(shards.read(at, min(_SCAN, len(shards) - at)) == end_of_text) + at
        for at in range(0, len(shards), _SCAN)
    ]
    ends = np.concatenate(found) + 1
    if not len(ends) or ends[-1] < len(shards):
        ends = np.append(ends, len(shards))
    starts = np.concatenate([[0], ends[:-1]])
    return starts, ends - starts


def best_fit(counts: np.ndarray, seq_len: int) -> np.ndarray:
    """Which sample each document goes to, of 1 to `seq_len` ids (best fit decreasing: Johnson 1973)."""
    placed = np.empty(len(counts), np.int64)
    with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # samples, by the ids that still fit
    rooms = used = 0  # bit r of `rooms`: some sample has room for r
    sizes = counts.tolist()
    for item in np.argsort(-counts, kind="stable").tolist():
        size = sizes[item]
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            sample = with_room[room].pop()
            rooms ^= (not with_room[room]) << room
        else:
            room, sample, used = seq_len, used, used + 1
        if left := room - size:
            with_room[left].append(sample)
            rooms |= 1 << left
        placed[item] = sample
    return placed


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int) -> np.ndarray:
    """The order of an epoch's samples."""
    return np.random.default_rng(derive(seed, "order", epoch)).permutation(samples)
