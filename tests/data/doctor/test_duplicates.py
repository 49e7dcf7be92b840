"""Duplicates are the ones that a comparison of all pairs finds."""

import itertools

import numpy as np
import pytest

from gpt2lab.data.doctor import duplicates
from gpt2lab.data.doctor.duplicates import (
    NUM_HASHES,
    SIMILAR,
    minima,
    near_labels,
    repeated,
    shared,
    shingles,
    signatures,
    similarity,
)

RANDOM = np.random.default_rng(0)


def edited(ids: np.ndarray, edits: int) -> np.ndarray:
    """The same document with some of its ids replaced by ids that stand nowhere else."""
    copy = ids.copy()
    copy[RANDOM.choice(len(ids), edits, replace=False)] = 60_000 + np.arange(edits)
    return copy


def jaccard(documents: list[np.ndarray], shingle: int = 5) -> np.ndarray:
    """Shared shingles over all shingles of each two documents, by sets of tuples."""
    sets = [{tuple(ids[i : i + shingle].tolist()) for i in range(len(ids) - shingle + 1)} for ids in documents]
    return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def sign(documents: list[np.ndarray], shingle: int = 5) -> np.ndarray:
    return signatures(enumerate(documents), len(documents), shingle)


def families() -> list[np.ndarray]:
    """Texts with copies of themselves from nearly the same to hardly similar, and others that are like nothing."""
    texts = [RANDOM.integers(0, 300, size) for size in RANDOM.integers(30, 400, 20)]
    return [
        version
        for text in texts
        for version in [text, *(edited(text, max(1, len(text) * n // 200)) for n in (0, 1, 3, 8, 20))]
    ]


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return families()


def components(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The first row that each hangs together with, by following every pair until nothing changes."""
    labels = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in pairs:
            if labels[a] != labels[b]:
                labels[a] = labels[b] = min(labels[a], labels[b])
                changed = True
    return labels


def test_similarities_are_those_of_all_pairs(documents: list[np.ndarray]) -> None:
    left, right = np.triu_indices(len(documents), 1)
    estimated = similarity(sign(documents), left, right)
    true = jaccard(documents)[left, right]
    error = (estimated - true)[true > 0]
    deviation = np.sqrt(true * (1 - true) / NUM_HASHES)[true > 0]
    assert len(error) > 250 and min((true > SIMILAR).sum(), ((true < SIMILAR) & (true > 0.1)).sum()) > 60
    assert np.abs(error[deviation == 0]).max(initial=0) == 0
    z = error[deviation > 0] / deviation[deviation > 0]
    assert abs(z.mean()) < 0.3 and 0.8 < z.std() < 1.25 and np.abs(z).max() < 6
    assert np.abs(estimated[true == 0]).max() == 0


def test_groups_are_those_of_all_pairs(documents: list[np.ndarray]) -> None:
    """Documents whose similarity is close to the limit may fall on either side, so those pairs are kept out."""
    true, clear = jaccard(documents), list[int]()
    for row in range(len(documents)):
        if (np.abs(true[row, clear] - SIMILAR) > 0.12).all():
            clear.append(row)
    pairs = [(a, b) for a, b in itertools.combinations(range(len(clear)), 2) if true[clear[a], clear[b]] > SIMILAR]
    assert len(pairs) > 30 and len(clear) > 60
    assert near_labels(sign([documents[row] for row in clear])).tolist() == components(len(clear), pairs)


def test_joined_groups_are_those_of_following_every_pair() -> None:
    for _ in range(20):
        left, right = RANDOM.integers(0, 30, (2, 15))
        expected = components(30, list(zip(left.tolist(), right.tolist(), strict=True)))
        assert duplicates._joined(np.arange(30), left, right).tolist() == expected


def test_no_similar_pair_is_overlooked(documents: list[np.ndarray]) -> None:
    """Bands only choose what is compared: every pair whose values agree often enough hangs together."""
    found = sign(documents)
    labels = near_labels(found)
    left, right = np.triu_indices(len(documents), 1)
    alike = similarity(found, left, right) >= SIMILAR
    assert alike.sum() > 50 and (labels[left[alike]] == labels[right[alike]]).all()


def test_the_limit_is_what_is_asked_for(documents: list[np.ndarray]) -> None:
    found = sign(documents)
    groups = [len(np.unique(near_labels(found, similar))) for similar in (0.3, 0.8, 1.0)]
    assert groups[0] < groups[1] < groups[2] < len(documents)  # what is the same to the id is similar by 1


def test_many_copies_are_found_in_linear_time() -> None:
    """20,000 copies are 200 million pairs."""
    text = RANDOM.integers(0, 300, 40)
    found = np.repeat(sign([text]), 20_000, axis=0)
    assert not near_labels(found).any()


def test_pieces_of_a_document_are_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are batched; only the few shingles across two pieces are missing."""
    document, other = RANDOM.integers(0, 300, 2000), RANDOM.integers(0, 300, 300)
    pieces = [(0, document[:1500]), (0, document[1500:]), (1, other), (2, other[:4]), (2, other[4:]), (3, document)]
    once = signatures(pieces, 4, 5)
    monkeypatch.setattr(duplicates, "_BATCH", 700)
    np.testing.assert_array_equal(signatures(pieces, 4, 5), once)
    monkeypatch.setattr(duplicates, "_BATCH", 1)
    np.testing.assert_array_equal(signatures(pieces, 4, 5), once)
    assert similarity(once, np.array([0]), np.array([3]))[0] > 0.98
    assert (
        similarity(once, np.array([1]), np.array([2]))[0] > 0.95
        and similarity(once, np.array([0]), np.array([1]))[0] == 0
    )


def test_a_document_shorter_than_a_shingle_has_no_values() -> None:
    found = sign([np.arange(4), np.arange(5), np.zeros(0, np.int64)])
    assert (found[[0, 2]] == np.iinfo(np.uint32).max).all() and (found[1] < np.iinfo(np.uint32).max).all()
    assert sign([]).shape == (0, NUM_HASHES) and near_labels(sign([])).tolist() == []


@pytest.mark.parametrize("length", [1, 2, 5, 20])
def test_a_shingle_is_known_by_its_ids_and_their_order(length: int) -> None:
    ids = RANDOM.integers(0, 3, 400)
    hashes = shingles(ids, length)
    by_hash: dict[int, set[tuple[int, ...]]] = {}
    for start, value in enumerate(hashes.tolist()):
        by_hash.setdefault(value, set()).add(tuple(ids[start : start + length].tolist()))
    assert len(hashes) == len(ids) - length + 1
    assert all(len(runs) == 1 for runs in by_hash.values())
    assert len(by_hash) == len({run for runs in by_hash.values() for run in runs}) > 1


def test_repeated_and_shared_labels_are_those_of_a_dict() -> None:
    for size in (0, 1, 2, 7, 60):
        labels, others = RANDOM.integers(0, 30, size), RANDOM.integers(0, 30, RANDOM.integers(0, 40))
        first: dict[int, int] = {}
        again = [(row, first[x]) for row, x in enumerate(labels.tolist()) if first.setdefault(x, row) != row]
        assert list(zip(*(rows.tolist() for rows in repeated(labels)), strict=True)) == again
        known = others.tolist()
        among = [(row, known.index(x)) for row, x in enumerate(labels.tolist()) if x in known]
        assert list(zip(*(rows.tolist() for rows in shared(labels, others)), strict=True)) == among


def test_minima_are_those_of_each_range() -> None:
    hashes = RANDOM.integers(0, 2**63, 100).astype(np.uint64)
    for _ in range(50):
        edges = np.sort(RANDOM.integers(0, 101, 8))
        starts, stops = edges[::2], edges[1::2]
        expected = [min(hashes[a:b].tolist(), default=2**64 - 1) for a, b in zip(starts, stops, strict=True)]
        assert minima(hashes, starts, stops).tolist() == expected
