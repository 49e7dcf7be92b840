"""Documents that are there twice: which are equal, and which nearly so.

Near-duplicates are found by MinHash (Broder 1997). The shingles of a document are its runs of so many ids; of each of many
hash functions a document keeps the smallest value over its shingles. Two documents agree in such a value with a probability
that is their Jaccard similarity: shingles in both over shingles in either. Documents that agree in a band of values are
compared (locality-sensitive hashing), so that the time is linear. This is numpy over many documents at once; the libraries
for it go document by document, and bring scipy.

Documents are rows here, numbered from 0. Both kinds of duplicates come out as labels: equal labels, the same document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

NUM_HASHES = 128
"""At a similarity of 0.8, its estimate has a standard error of sqrt(0.8 * 0.2 / 128) = 0.035."""
BAND = 4
"""Values that must all agree for two documents to be compared: 0.8 ** 4 in a band, 1 - (1 - 0.8 ** 4) ** 32 in one of 32."""
SIMILAR = 0.8
_BATCH = 2**17  # ids: their hashes stay in the processor's cache
_ODD = np.uint64(0x9E3779B97F4A7C15)


def repeated(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows whose label stands in an earlier row too, and the first row that has it."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    originals = first[inverse]
    rows = np.flatnonzero(originals != np.arange(len(labels)))
    return rows, originals[rows]


def shared(labels: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `labels` whose label is among `others` too, and the first row of those that has it."""
    rows, originals = repeated(np.concatenate([others, labels]))
    from_others = (rows >= len(others)) & (originals < len(others))
    return rows[from_others] - len(others), originals[from_others]


def mix(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one function of 64-bit numbers that looks random: the end of SplitMix64."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def shingles(ids: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of each run of `length` ids, by where it starts."""
    spread = mix(ids.astype(np.uint64))
    hashes = np.zeros(max(0, len(ids) - length + 1), np.uint64)
    for offset in range(length if len(hashes) else 0):
        hashes = hashes * _ODD + spread[offset : offset + len(hashes)]
    return mix(hashes)


def minima(hashes: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The smallest of each ``hashes[start:stop]``, and of an empty one the largest number there is.

    The ranges come in their order and do not overlap.
    """
    smallest = np.full(len(starts), np.iinfo(hashes.dtype).max, hashes.dtype)
    filled = np.flatnonzero(stops > starts)
    if len(filled):
        # reduceat goes from each index to the next: every other range is wanted, and the one in between is not.
        edges = np.column_stack([starts[filled], stops[filled]]).ravel()
        smallest[filled] = np.minimum.reduceat(hashes, edges[: -1 if edges[-1] == len(hashes) else None])[::2]
    return smallest


def signatures(pieces: Iterable[tuple[int, np.ndarray]], rows: int, shingle: int) -> np.ndarray:
    """The MinHash values of documents: uint32, shaped (rows, NUM_HASHES).

    Args:
        pieces: a row, and ids of its document. Shingles that cross from one piece to the next are left out.
        shingle: ids in a shingle. A document with fewer is similar to every other such document.
    """
    found = np.full((rows, NUM_HASHES), np.iinfo(np.uint32).max, np.uint32)
    numbers = mix(np.arange(1, 2 * NUM_HASHES + 1, dtype=np.uint64)).astype(np.uint32)
    for batch in _batches(pieces):
        owners, hashes = _owned_shingles(batch, shingle)
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        if not len(starts):
            continue
        best = found[owners[starts]]
        for column, (factor, summand) in enumerate(numbers.reshape(-1, 2)):
            values = hashes * (factor | np.uint32(1)) + summand  # one-to-one, as the factor is odd
            best[:, column] = np.minimum(best[:, column], np.minimum.reduceat(values, starts))
        found[owners[starts]] = best
    return found


def _batches(pieces: Iterable[tuple[int, np.ndarray]]) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Lists of pieces; each but the last has at least `_BATCH` ids."""
    batch, size = list[tuple[int, np.ndarray]](), 0
    for row, ids in pieces:
        batch.append((row, ids))
        size += len(ids)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _owned_shingles(batch: list[tuple[int, np.ndarray]], shingle: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all shingles of a batch, the rows and the hashes as uint32."""
    lengths = np.array([len(ids) for _, ids in batch])
    hashes = shingles(np.concatenate([ids for _, ids in batch]), shingle)
    owners = np.repeat([row for row, _ in batch], lengths)[: len(hashes)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(hashes)]
    whole = np.arange(len(hashes)) + shingle <= ends
    return owners[whole], (hashes[whole] >> np.uint64(32)).astype(np.uint32)


def similarity(found: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of each pair of rows."""
    shares = [(found[i] == found[j]).mean(axis=1) for i, j in zip(_chunks(left), _chunks(right), strict=True)]
    return np.concatenate([np.zeros(0), *shares])


def near_labels(found: np.ndarray, similar: float = SIMILAR) -> np.ndarray:
    """Of each row, the first of the rows that it hangs together with by a chain of similar ones; if alone, itself."""
    labels = np.arange(len(found))
    for column in range(0, NUM_HASHES, BAND):
        left, right = _met(found[:, column : column + BAND])
        apart = labels[left] != labels[right]
        left, right = left[apart], right[apart]
        alike = similarity(found, left, right) >= similar
        labels = _joined(labels, left[alike], right[alike])
    return labels


def _met(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that agree in all values. Of many, each meets the first and the one before it, not all the others."""
    halves = np.ascontiguousarray(values).view(np.uint64)
    band = mix(mix(halves[:, 0]) + halves[:, 1])
    order = np.argsort(band, kind="stable")
    again = np.flatnonzero(band[order][1:] == band[order][:-1]) + 1
    rows, firsts = repeated(band)
    return np.concatenate([order[again - 1], firsts]), np.concatenate([order[again], rows])


def _joined(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The labels after the groups of each pair have become one, which has the smaller label."""
    while not np.array_equal(labels[left], labels[right]):
        smaller = np.minimum(labels[left], labels[right])
        np.minimum.at(labels, labels[left], smaller)
        np.minimum.at(labels, labels[right], smaller)
        labels = labels[labels]
    return labels


def _chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of `rows` whose signatures take a few megabytes."""
    return (rows[at : at + 2**13] for at in range(0, len(rows), 2**13))
