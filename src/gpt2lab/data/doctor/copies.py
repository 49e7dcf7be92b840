"""Copies among the documents of prepared text: within a split, and of the training text in the validation text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from gpt2lab.data.doctor.duplicates import near_labels, repeated, shared, signatures, similarity
from gpt2lab.data.doctor.scan import Documents
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError

SPLITS = ("train", "validation")
_LISTED = 5
_EXCERPT = 60  # characters
_PIECE = 2**17  # ids


@dataclass(frozen=True)
class Place:
    """A document: its number in its split, from 0, its first token there, and how it begins."""

    split: str
    document: int
    start: int
    tokens: int
    bytes: int
    text: str


@dataclass(frozen=True)
class Pair:
    """A document that is like an earlier one, or like one of the training text; `similarity` is of their shingles."""

    copy: Place
    original: Place
    similarity: float


@dataclass(frozen=True)
class Copies:
    """Documents of a split that are like others: how many of how many that were looked at, and some of them."""

    documents: int
    of_documents: int
    tokens: int
    of_tokens: int
    pairs: list[Pair]

    @property
    def share(self) -> float:
        """Of the documents that were looked at."""
        return self.documents / max(1, self.of_documents)


@dataclass(frozen=True)
class Duplicates:
    """Copies of one kind: within the training text, within the validation text, and of the former in the latter."""

    train: Copies
    validation: Copies
    leaked: Copies


class Reader:
    """Reads parts of the splits as text; what cannot be read is empty."""

    def __init__(self, prepared: Prepared, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._prepared = prepared

    def shards(self, split: str) -> Shards:
        """The tokens of a split."""
        return {"train": self._prepared.train, "validation": self._prepared.validation}[split]

    def text(self, split: str, start: int, length: int) -> str:
        """Some tokens as text."""
        try:
            return self._prepared.tokenizer.decode(self.shards(split).read(start, length))
        except DataError:
            return ""

    def place(self, split: str, documents: Documents, row: int) -> Place:
        """A document, with its beginning."""
        number, start, tokens, size = (int(column[row]) for column in list(vars(documents).values())[:4])
        text = self.text(split, start, min(tokens, _EXCERPT))
        return Place(split, number, start, tokens, size, text[:_EXCERPT])

    def pieces(self, splits: list[Documents]) -> Iterator[tuple[int, np.ndarray]]:
        """The ids of documents of each split, piece by piece, with a row that counts through all of them."""
        rows = itertools.count()
        for split, documents in zip(SPLITS, splits, strict=True):
            for start, tokens in zip(documents.start.tolist(), documents.tokens.tolist(), strict=True):
                row = next(rows)
                for at in range(start, start + tokens, _PIECE):
                    yield row, self.shards(split).read(at, min(_PIECE, start + tokens - at))

    def sample(self, seq_len: int) -> str:
        """So many tokens of the training text, from a random place; fewer where there are fewer."""
        tokens = len(self._prepared.train)
        start = int(self.random.integers(max(1, tokens - seq_len)))
        return self.text("train", start, min(seq_len, tokens))


def exact_duplicates(reader: Reader, drawn: list[Documents]) -> Duplicates:
    """Documents of the same ids."""
    labels = np.concatenate([documents.digest for documents in drawn])
    return _duplicates(reader, drawn, drawn, labels, lambda left, right: np.ones(len(left)))


def near_duplicates(reader: Reader, drawn: list[Documents], shingle: int) -> Duplicates:
    """Documents that are alike, of those that are the same only the first."""
    train, validation = (documents.take(documents.tokens >= shingle) for documents in drawn)
    train = train.take(np.sort(np.unique(train.digest, return_index=True)[1]))
    validation = validation.take(np.sort(np.unique(validation.digest, return_index=True)[1]))
    validation = validation.take(~np.isin(validation.digest, train.digest))
    found = signatures(reader.pieces([train, validation]), len(train) + len(validation), shingle)
    labels = near_labels(found)
    return _duplicates(reader, [train, validation], drawn, labels, lambda left, right: similarity(found, left, right))


def _duplicates(
    reader: Reader,
    pool: list[Documents],
    drawn: list[Documents],
    labels: np.ndarray,
    similar: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Duplicates:
    """What equal labels mean, for documents of both splits.

    Args:
        pool: of each split, those that have labels.
        drawn: of each split, those that were looked at.
        similar: how similar rows of both pools together are.
    """
    first = [0, len(pool[0])]
    of_split = labels[: first[1]], labels[first[1] :]

    def copies(split: int, other: int, rows: np.ndarray, originals: np.ndarray) -> Copies:
        largest = np.argsort(-pool[split].tokens[rows], kind="stable")[:_LISTED]
        shown, like = rows[largest], originals[largest]
        pairs = [
            Pair(
                reader.place(SPLITS[split], pool[split], i),
                reader.place(SPLITS[other], pool[other], j),
                round(float(s), 3),
            )
            for i, j, s in zip(shown, like, similar(shown + first[split], like + first[other]), strict=True)
        ]
        tokens, of_tokens = int(pool[split].tokens[rows].sum()), int(drawn[split].tokens.sum())
        return Copies(len(rows), len(drawn[split]), tokens, of_tokens, pairs)

    return Duplicates(
        train=copies(0, 0, *repeated(of_split[0])),
        validation=copies(1, 1, *repeated(of_split[1])),
        leaked=copies(1, 0, *shared(of_split[1], of_split[0])),
    )
