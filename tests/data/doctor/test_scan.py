"""A pass through a split finds what is there, wherever its blocks are cut."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt2lab.data.doctor import scan as module
from gpt2lab.data.doctor import symptoms
from gpt2lab.data.doctor.scan import Scan
from gpt2lab.data.doctor.spelling import Spelling
from gpt2lab.data.doctor.symptoms import Symptoms
from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.data.shards import Shards
from gpt2lab.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WORDS = (
    "the a sea whale ship captain \xe9 na\xefve \u4e2d\u6587 \U0001f40b in on of and harpoon \n\n , . ; said old".split(
        " "
    )
)
NASTY = [
    "\0",
    "\ufffd",
    "\x07",
    "\x7f",
    "\x85",
    "\ufeff",
    "\xe2\u20ac",
    "\xc3\xa9",
    "\xc3\x85",
    "\xc3",
    "\xc2",
    "\r\n",
    "\t",
    "\f",
    "\xe9",
    "\u4e2d",
    "a",
    "\n",
]
TOKENIZERS = [
    BYTES,
    Tokenizer.chars([*WORDS, *NASTY, " "]),
    Tokenizer.train_bpe([" ".join(WORDS * 20)], 300),
]


def write(
    folder: Path, texts: Sequence[str], tokenizer: Tokenizer = BYTES, *, cuts: int = 1, block_bytes: int = 2**18
) -> Shards:
    """A split of these documents in `cuts` shards, which end anywhere."""
    ids = [np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in texts]
    parts = np.array_split(np.concatenate([np.zeros(0, np.int64), *ids]), cuts)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"train-{i:05d}.bin" for i in range(cuts)]
    for path, part in zip(paths, parts, strict=True):
        with ShardWriter(path, tokenizer, block_bytes=block_bytes) as writer:
            size = len("".join(texts).encode()) if path == paths[0] else 0
            writer.add(part, size, documents=int((part == tokenizer.end_of_text).sum()))
            writer.finish()
    return Shards(paths)


def story(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


def stories(count: int = 40, *, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [story(random, int(words)) for words in random.integers(0, 60, count)]


def rows(scan: Scan) -> list[tuple[int, ...]]:
    """The drawn documents as tuples, but for their place among the tokens."""
    drawn = scan.drawn
    return list(
        zip(*(column.tolist() for column in (drawn.number, drawn.tokens, drawn.bytes, drawn.digest)), strict=True)
    )


@pytest.fixture(params=[5, 2**17])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "_BLOCK", request.param)
    return int(request.param)


# --- Spelling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_ids_are_spelled_as_they_were_written(tokenizer: Tokenizer) -> None:
    text = "".join([*WORDS, *NASTY, "na\xefve \U0001f40b"])
    spelling, ids = Spelling(tokenizer), tokenizer.encode(text)
    assert spelling(ids) == text.encode() and len(spelling(ids[:0])) == 0
    assert spelling(np.array([ids[0], tokenizer.end_of_text, tokenizer.vocab_size])) == text[0].encode() + b"\n"
    assert spelling.lengths[ids].sum() == len(text.encode())


# --- Documents ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("cuts", [1, 5])
def test_documents_are_the_ones_that_were_written(tokenizer: Tokenizer, cuts: int, block: int, tmp_path: Path) -> None:
    texts = ["", *stories(6), "", "the end", "the end"]
    shards = write(tmp_path, texts, tokenizer, cuts=cuts)
    scan = Scan(shards, Spelling(tokenizer))
    expected = [(i, len(tokenizer.encode(text)), len(text.encode())) for i, text in enumerate(texts) if text]
    assert [row[:3] for row in rows(scan)] == expected
    spans = [span for span in shards.document_spans(tokenizer.end_of_text) if span[1]]
    assert list(zip(scan.drawn.start.tolist(), scan.drawn.tokens.tolist(), strict=True)) == spans
    assert (scan.num_documents, scan.num_empty) == (len(texts), texts.count(""))
    assert (scan.bytes, scan.unread, scan.errors) == (shards.bytes, 0, [])
    assert scan.usage.tolist() == np.bincount(shards.read(0, len(shards)), minlength=tokenizer.vocab_size + 1).tolist()
    longest = sorted((-len(tokenizer.encode(text)), i) for i, text in enumerate(texts))[: module.NUM_LONGEST]
    assert scan.longest.number.tolist() == [i for _, i in longest]


def test_a_digest_is_of_the_ids_alone(block: int, tmp_path: Path) -> None:
    texts = [text for text in stories(8) if text]
    texts += [texts[3], texts[0] + "!", texts[5]]
    digests = Scan(write(tmp_path / "a", texts), Spelling(BYTES)).drawn.digest.tolist()
    assert [[a == b for a in texts] for b in texts] == [[a == b for a in digests] for b in digests]
    shifted = Scan(write(tmp_path / "b", ["x", *texts]), Spelling(BYTES)).drawn.digest.tolist()
    assert shifted[1:] == digests


class Opened(Shards):
    """Shards whose end-of-text opens a document."""

    separator_first = True


@pytest.mark.parametrize("texts", [["one", "two three", "", "four\0"], ["one", ""], ["", "", "x"], ["x"]])
def test_end_of_text_may_open_a_document(texts: list[str], block: int, tmp_path: Path) -> None:
    ids = np.concatenate([np.append(BYTES.end_of_text, BYTES.encode(text)) for text in texts])
    with ShardWriter(tmp_path / "a.bin", BYTES) as writer:
        writer.add(ids, len("".join(texts)), documents=len(texts))
        writer.finish()
    scan = Scan(Opened([tmp_path / "a.bin"]), Spelling(BYTES))
    assert [fault.document for fault in scan.symptoms.faults.values()] == [i for i, t in enumerate(texts) if "\0" in t]
    assert [row[:2] for row in rows(scan)] == [(i, len(text)) for i, text in enumerate(texts) if text]
    assert (scan.num_documents, scan.num_empty, scan.bytes) == (len(texts), texts.count(""), len("".join(texts)))


def test_a_last_document_may_lack_its_end_of_text(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", BYTES) as writer:
        writer.add(np.append(np.append(BYTES.encode("one"), 256), BYTES.encode("tw")), 5, documents=1)
        writer.finish()
    assert [row[:3] for row in rows(Scan(Shards([tmp_path / "a.bin"]), Spelling(BYTES)))] == [(0, 3, 3), (1, 2, 2)]


def test_a_sample_holds_its_documents_with_their_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy is drawn with its original, and one that is nearly the same nearly always, in pieces as well."""
    monkeypatch.setattr(module, "_BLOCK", 1000)
    random = np.random.default_rng(1)
    texts = [story(random, 80) for _ in range(600)]
    near = [text[:200] + "*" + text[200:] for text in texts]
    drawn = Scan(write(tmp_path, texts + texts + near), Spelling(BYTES), share=0.3, shingle=20).drawn.number
    groups = [set(drawn[(drawn >= at) & (drawn < at + 600)] - at) for at in (0, 600, 1200)]
    assert 120 < len(groups[0]) < 240
    same, near = (len(groups[0] & group) / len(groups[0] | group) for group in groups[1:])
    assert same > 0.9 and 0.8 < near < 1  # drawn by their ids it would be 0.18


# --- What cannot be read ----------------------------------------------------------------------------------------------------


def test_a_damaged_block_is_noted_and_the_rest_is_read(block: int, tmp_path: Path) -> None:
    texts = [f"{i:03d} {'x' * 40}" for i in range(50)]  # 45 ids each, 90 bytes
    whole = rows(Scan(write(tmp_path, texts, block_bytes=1000), Spelling(BYTES)))
    path = tmp_path / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[1024 + 2 * 1000 + 5] ^= 1  # in the third block: ids 1000 to 1499, of documents 22 to 33
    path.write_bytes(content)
    scan = Scan(Shards([path]), Spelling(BYTES))
    assert scan.unread == 500 and len(scan.errors) == 1 and "train-00000.bin" in scan.errors[0]
    assert scan.usage.sum() == 50 * 45 - 500
    assert rows(scan)[:22] == whole[:22] and [row[3] for row in rows(scan)[-16:]] == [row[3] for row in whole[-16:]]
    assert [row[1] for row in rows(scan)[22:-16]] == [10, 29]  # what is left of documents 22 and 33


def test_ids_beyond_the_vocabulary_are_counted(tmp_path: Path) -> None:
    larger = TOKENIZERS[2]
    shards = write(tmp_path, ["the whale and the sea", "x"], larger)
    beyond = int((shards.read(0, len(shards)) >= BYTES.vocab_size).sum())
    assert beyond > 3 and Scan(shards, Spelling(BYTES)).usage[-1] == beyond
    assert Scan(shards, Spelling(larger)).usage[-1] == 0


# --- Symptoms ---------------------------------------------------------------------------------------------------------------


def faults_of(texts: list[str]) -> dict[str, tuple[int, int, int]]:
    """By kind: how many, in how many documents, and in which first; by the characters of strings."""
    counts: dict[str, list[int]] = {}
    for text in texts:
        broken = len(re.findall("\xe2\u20ac|\xc3[\x80-\xbf]", text))
        rest = re.sub("\xe2\u20ac|\xc3[\x80-\xbf]", " ", text)
        found = {
            "replacement": rest.count("\ufffd"),
            "mojibake": broken,
            "nul": rest.count("\0"),
            "control": sum(c not in "\0\t\n\r\f" and (c < " " or "\x7f" <= c < "\xa0") for c in rest),
            "byte_order_mark": rest.count("\ufeff"),
        }
        for kind, count in found.items():
            counts.setdefault(kind, []).append(count)
    return {
        kind: (sum(found), sum(map(bool, found)), next(i for i, count in enumerate(found) if count))
        for kind, found in counts.items()
        if any(found)
    }


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_faults_are_counted_and_placed(tokenizer: Tokenizer, block: int, tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    texts = [
        "fine\r",
        *("".join(NASTY[i] for i in random.integers(0, len(NASTY), size)) for size in random.integers(0, 12, 25)),
        "fine",
    ]
    found = Scan(write(tmp_path, texts, tokenizer), Spelling(tokenizer)).symptoms
    assert {kind: (f.count, f.documents, f.document) for kind, f in found.faults.items()} == faults_of(texts)
    assert len(found.faults) == len(symptoms.FAULTS)
    assert (found.lines, found.crlf_lines) == ("".join(texts).count("\n"), "".join(texts).count("\r\n"))


def test_a_clean_text_has_no_faults(tmp_path: Path) -> None:
    texts = [
        "Caf\xe9, na\xefve: \u201cquotes\u201d - \u4e2d\u6587, \U0001f40b\r\n\tand\fa page.\n",
        "\xc2\xa3 and \xc3 alone",
        "\u00a0",
    ]
    assert Scan(write(tmp_path, texts), Spelling(BYTES)).symptoms.faults == {}


def test_the_place_of_the_first_fault_is_shown() -> None:
    found = Symptoms()
    found.look("one\nIt was caf\ufffd time, said he.\n".encode(), np.array([3]), 6)
    assert found.faults["replacement"].document == 7 and "caf\ufffd time" in found.faults["replacement"].text


def test_repeated_lines_are_those_of_a_counter() -> None:
    random = np.random.default_rng(3)
    lines = [f"{'x' * 15} line {i}" for i in random.zipf(1.3, 5000)] + ["short"] * 100
    random.shuffle(lines)
    found = Symptoms()
    for at in range(0, len(lines), 100):
        found.look("\n".join(lines[at : at + 100]).encode(), np.zeros(0, np.int64), 0)
    expected = {
        line: n for line, n in Counter(lines).items() if n >= symptoms.REPEATED and len(line) >= symptoms.LINE_BYTES
    }
    assert dict(found.repeated_lines()) == expected and len(expected) > 20
    sizes = [len(line) * count for line, count in found.repeated_lines()]
    assert sizes == sorted(sizes, reverse=True)


def test_of_very_many_lines_the_repeated_ones_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symptoms, "_MOST_LINES", 500)
    found = Symptoms()
    for at in range(100):
        lines = [f"a line that is there once: {at} {i}" for i in range(50)]
        found.look("\n".join([*lines, "all rights reserved, 1999"]).encode(), np.zeros(0, np.int64), 0)
        assert len(found._lines) <= 500
    assert [line for line, _ in found.repeated_lines()] == ["all rights reserved, 1999"]
