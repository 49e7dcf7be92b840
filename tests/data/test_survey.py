"""What a first reading decides follows from the documents alone, and shares each of them out once."""

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data import survey as module
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.survey import HELD_OUT, Division, Survey, divide, survey
from gpt2lab.errors import DataError

TEXTS = st.lists(st.text("abc \u00e9\n", min_size=1, max_size=30), max_size=40)


def pieces(texts: list[str], *, at_once: int = 7) -> list[Piece | Skipped]:
    """Documents in pieces of a few characters, with an empty piece at the end of each."""
    return [
        Piece(str(number), part, last)
        for number, text in enumerate(texts)
        for part, last in [*((text[at : at + at_once], False) for at in range(0, len(text), at_once)), ("", True)]
    ]


def held_out(texts: list[str]) -> list[str]:
    """The documents, or parts of them, that are validation text."""
    return [text[cut:] for text, cut in zip(texts, divide(survey(pieces(texts))).cuts, strict=True) if cut < len(text)]


@given(TEXTS, st.integers(1, 40))
def test_where_pieces_end_changes_nothing(texts: list[str], at_once: int) -> None:
    one, other = survey(pieces(texts)), survey(pieces(texts, at_once=at_once))
    assert one.fingerprint == other.fingerprint and (one.digests == other.digests).all()
    assert one.chars.tolist() == other.chars.tolist() == list(map(len, texts))
    assert one.bytes == other.bytes == sum(len(text.encode()) for text in texts) == one.bytes_in
    assert one.digests.tolist() == [int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in texts]


def test_another_text_or_order_has_another_fingerprint() -> None:
    prints = {
        survey(pieces(texts)).fingerprint for texts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab"], ["ab", "c", "c"])
    }
    assert len(prints) == 5


def test_empty_documents_are_none() -> None:
    assert survey(pieces(["", "a", ""])).fingerprint == survey(pieces(["a"])).fingerprint


def test_what_is_skipped_is_kept_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LISTED", 2)
    rows = [Skipped("a", f"line {line}", line, "bad" if line % 2 else "worse") for line in range(1, 6)]
    found = survey([*rows, *pieces(["\u00e9"])])
    assert found.skipped == rows[:2] and found.skipped_bytes == {"bad": 1 + 3 + 5, "worse": 2 + 4}
    assert (found.bytes, found.bytes_in) == (2, 17)


def test_a_fault_stops_where_that_is_asked_for() -> None:
    nature = Skipped("a", "", 3, "byte order mark", fault=False)
    assert survey([nature], stop=True).bytes_in == 3
    with pytest.raises(DataError, match=r"unusable text \(b, line 2\): broken"):
        survey([nature, Skipped("b", "line 2", 1, "broken")], stop=True)


# --- What is held out -------------------------------------------------------------------------------------------------


@given(st.lists(st.text("abc \n", min_size=1, max_size=30), min_size=HELD_OUT, max_size=40, unique=True), st.randoms())
def test_whole_documents_are_held_out_whatever_their_order(texts: list[str], order: random.Random) -> None:
    held = held_out(texts)
    assert set(held) <= set(texts) and held
    wanted = sum(map(len, texts)) // HELD_OUT
    assert wanted <= sum(map(len, held)) < wanted + 30
    mixed = order.sample(texts, len(texts))
    assert sorted(held_out(mixed)) == sorted(held)


def test_another_text_holds_out_other_documents() -> None:
    drawn = {
        tuple(text.split()[1] for text in held_out([f"{draw} {i} {'x' * 50}" for i in range(20)])) for draw in range(5)
    }
    assert len(drawn) > 1


def test_the_twin_of_a_held_out_document_is_not_learned_from() -> None:
    texts = [f"{number:02}" * 50 for number in range(15)] * 2
    held = held_out(texts)
    assert held and all(held.count(text) == 2 for text in held)


def test_of_few_documents_the_last_tenth_of_each_is_held_out() -> None:
    assert held_out(["0123456789" * 10, "x" * 15]) == ["0123456789", "xx"]


def test_a_validation_text_of_its_own_leaves_the_source_whole() -> None:
    both = survey(pieces(["learn" * 10])) + survey(pieces(["validate", "too"]))
    assert divide(both, np.array([False, True, True])).cuts.tolist() == [50, 0, 0]
    assert both.bytes == 61 and len(both) == 3


# --- Shards -----------------------------------------------------------------------------------------------------------


def naive(chars: list[int], size: int) -> list[int]:
    """The shard of each document, one after the other."""
    shards, total, known = [], 0, list[int]()
    for length in chars:
        if not length:
            shards.append(-1)
            continue
        if total // size not in known:
            known.append(total // size)
        shards.append(known.index(total // size))
        total += length
    return shards


@given(st.lists(st.integers(0, 300), max_size=50))
def test_a_shard_ends_with_the_document_that_fills_it(chars: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD_CHARS", 100)
        found = Survey(np.arange(len(chars), dtype=np.uint64), np.array(chars, np.int64), 0)
        divided = divide(found, np.zeros(len(chars), bool))
    assert divided.shards["train"].tolist() == naive(chars, 100)
    assert divided.shards["validation"].tolist() == [-1] * len(chars)


def test_a_split_has_at_least_one_shard() -> None:
    divided = Division(np.zeros(0, int), {"train": np.array([0, 0, 1]), "validation": np.array([-1])})
    assert divided.names("train") == ["train-00000", "train-00001"] and divided.names("validation") == [
        "validation-00000"
    ]
