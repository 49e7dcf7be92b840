"""Text to ids and back, compared with GPT-2's published ids, with transformers, and with a slow byte-pair encoding."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gpt2lab import tokenizer as module
from gpt2lab import words
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, is_learned, open_tokenizer

STORY = "The cat sat on the mat. The cat's hat is the cat's.\n\nThe end, isn't it?  Yes: 1, 22, 333!\n" * 3
TEXTS = [
    "", " ", "\n", "a", "Hello world", " Hello  world  ", "it's we'll I'd you've I'm they're",
    "tab\tand\r\nreturn\n\n\nthree", "3.14159 and 1,000,000", "naïve café — “quoted” …", "e\u0301", "日本語 と 한국어",
    "🙂👩\u200d👧 family", "\u2028\x1c\x85\xa0x", "\0nul", "x" * 300, "def f(x):\n    return x ** 2  # squared\n", STORY,
    END_OF_TEXT, f"a{END_OF_TEXT} b",
]  # fmt: skip

FIRST_31 = [
    5962, 22307, 25, 198, 8421, 356, 5120, 597, 2252, 11, 3285, 502, 2740, 13, 198, 198, 3237, 25, 198, 5248, 461, 11,
    2740, 13, 198, 198, 5962, 22307, 25, 198, 1639,
]  # fmt: skip


@pytest.fixture(scope="session")
def gpt2(data_folder: Path) -> Tokenizer:
    return Tokenizer.load(data_folder / "gpt2-tokenizer")


@cache
def small() -> Tokenizer:
    return Tokenizer.train_bpe([STORY], 280)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": Tokenizer.bytes,
    "bpe": small,
    "chars": lambda: Tokenizer.chars([*TEXTS, "abc"]),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


# --- GPT-2's vocabulary -----------------------------------------------------------------------------------------------


def test_tiny_shakespeare_has_the_published_ids(gpt2: Tokenizer, data_folder: Path) -> None:
    text = (data_folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    assert gpt2.encode(text[:100]).tolist() == FIRST_31
    ids = gpt2.encode(text)
    assert len(ids) == 338_025 and ids[:30].tolist() == FIRST_31[:30]
    assert gpt2.decode(ids) == text
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


def test_transformers_gives_the_same_ids(gpt2: Tokenizer, data_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(data_folder / "gpt2-tokenizer")
    for text in TEXTS:
        assert gpt2.encode(text).tolist() == theirs(text, split_special_tokens=True)["input_ids"], text
    assert theirs(END_OF_TEXT)["input_ids"] == [50256] != gpt2.encode(END_OF_TEXT).tolist()


PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def slow_ids(
    text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int], pattern: regex.Pattern[str]
) -> list[int]:
    """GPT-2's encoder as its code has it: in each word, merge the pair of the lowest rank until none is left."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    ids = []
    for word in pattern.findall(text):
        parts = [spelling[byte] for byte in word.encode()]
        while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
            best, merged, i = min(pairs, key=ranks.__getitem__), [], 0
            while i < len(parts):
                joined = tuple(parts[i : i + 2]) == best
                merged.append("".join(parts[i : i + 2 if joined else i + 1]))
                i += 2 if joined else 1
            parts = merged
        ids += [vocab[part] for part in parts]
    return ids


def test_a_slow_byte_pair_encoding_gives_the_same_ids(gpt2: Tokenizer, data_folder: Path) -> None:
    folder = data_folder / "gpt2-tokenizer"
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(merges) if line}

    @given(ANY_TEXT | st.text("ab 's\n\t1é\u3000", max_size=60))
    @example(STORY)
    def check(text: str) -> None:
        assert gpt2.encode(text).tolist() == slow_ids(text, vocab, ranks, PATTERN)

    check()
    reversed_ranks = {pair: -rank for pair, rank in ranks.items()}
    split_at_spaces = regex.compile(r"\S+|\s+")
    ids = gpt2.encode(STORY).tolist()
    assert (
        ids != slow_ids(STORY, vocab, reversed_ranks, PATTERN) != slow_ids(STORY, vocab, ranks, split_at_spaces) != ids
    )


# --- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bytes", "bpe", "gpt2"])
def test_decoding_gives_the_text_back(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else KINDS[name]()

    @given(ANY_TEXT | st.sampled_from(TEXTS))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not text or tokenizer.decode(ids[:-1]) != text

    check()


@given(st.text("".join(sorted(set().union(*TEXTS)))))
def test_characters_give_the_text_back(text: str) -> None:
    tokenizer = KINDS["chars"]()
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode([*tokenizer.encode(text), 0]) != text


@given(ANY_TEXT)
def test_bytes_are_the_bytes(text: str) -> None:
    assert bytes(Tokenizer.bytes().encode(text).tolist()) == text.encode()


def test_half_a_character_shows_as_a_replacement() -> None:
    assert Tokenizer.bytes().decode([0xC3]) == "\ufffd"
    assert Tokenizer.bytes().decode([0xC3, 0xA9]) == "é"


@each_kind
def test_the_separator_in_a_text_is_ordinary_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode(f"a{END_OF_TEXT}b").tolist()
    assert tokenizer.end_of_text not in ids and tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1


def test_the_separator_in_a_text_is_ordinary_text_to_gpt2(gpt2: Tokenizer) -> None:
    assert gpt2.encode(END_OF_TEXT).tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_an_unknown_character_is_named() -> None:
    tokenizer = Tokenizer.chars(["abc"])
    with pytest.raises(DataError, match=re.escape(r"this tokenizer has never seen 'x', '\xe9'.")):
        tokenizer.encode_documents(["abc", "axé"])
    assert tokenizer.encode("cab").tolist() == [2, 0, 1]


@each_kind
def test_half_a_surrogate_pair_is_refused(make: Callable[[], Tokenizer]) -> None:
    """Such text comes from a shell argument that is not UTF-8."""
    with pytest.raises(DataError, match=re.escape(r"this tokenizer has never seen '\udcff'.")):
        make().encode("a\udcff")


@pytest.mark.parametrize("name", ["bytes", "bpe", "chars"])
def test_only_the_half_that_is_refused_is_named(name: str) -> None:
    with pytest.raises(DataError, match=re.escape(r"this tokenizer has never seen '\udcff'.")):
        KINDS[name]().encode("a café \udcff\n")


# --- The library's ids, without the library ---------------------------------------------------------------------------


def in_one_go(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer._backend.encode(text, add_special_tokens=False).ids)


NOT_TOLD_APART = ["日本", "、", "\u3000", "가", "\uff21", "\uff11", "🙂", "\U0001d7d8", "\U00020000", "\U000e0001"]
NEAR_ENDS = [
    "'s",
    "'",
    "re",
    "a",
    "é",
    "\u0301",
    "1",
    "½",
    ".",
    "\0",
    " ",
    "  ",
    "\n",
    "\r",
    "\x1c",
    "\x85",
    "\u180e",
    "\u2028",
]


@cache
def mixed() -> Tokenizer:
    """One that has merged across scripts, so that a word cut in two has other ids."""
    return Tokenizer.train_bpe([f"{a}{b}\n" * 9 for a in "aé1½.!" for b in NOT_TOLD_APART], 700)


@pytest.mark.parametrize("name", ["gpt2", "mixed", "bytes"])
def test_the_ids_are_the_librarys(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else (KINDS | {"mixed": mixed})[name]()

    @settings(max_examples=200)
    @given(st.lists(st.sampled_from(NEAR_ENDS + NOT_TOLD_APART)).map("".join) | ANY_TEXT)
    @example("\n".join(a + b for a in "aé1½.!" for b in NOT_TOLD_APART))
    def check(text: str) -> None:
        assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text)
        assert tokenizer.encode(text).dtype == "int32"

    check()


@given(st.text("".join(sorted(set().union(*TEXTS)))))
def test_the_ids_of_characters_are_the_librarys(text: str) -> None:
    tokenizer = KINDS["chars"]()
    assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text)


EVERY_CHARACTER = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def test_all_white_space_is_told_apart_and_is_white_space_to_python() -> None:
    """What is not told apart must not be white space, and no safe cut may follow white space."""
    spaces = pre_tokenizers.Split(Regex(r"\s"), "removed", invert=True).pre_tokenize_str(EVERY_CHARACTER)
    found = {char for char, _ in spaces}
    assert {" ", "\x85", "\u2028", "\u3000"} < found and "\x1c" not in found
    assert all(ord(char) < words._KNOWN and re.fullmatch(r"\s", char) for char in found)


def test_every_character_that_is_told_apart_is_split_as_the_library_splits_it() -> None:
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = EVERY_CHARACTER[: words._KNOWN]
    text = "".join(f"a{char}1{char}!{char}'{char} {char}x\n" for char in known)
    ours = [match.span() for match in words.word_pattern().finditer(text)]
    theirs = [span for _, span in library.pre_tokenize_str(text)]
    assert len(ours) > 8 * len(known) and ours == theirs
    as_python_has_it = re.compile(r" ?[^\W\d_]+|'(?:[stmd]|re|ve|ll)| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")
    assert [match.span() for match in as_python_has_it.finditer(text)] != theirs


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST", 5)
    monkeypatch.setattr(words, "LONGEST", 9)
    tokenizer = Tokenizer.train_bpe([STORY], 280)
    text = STORY + "abcdefghi " + "abcdefghij " * 3
    sizes, table = [], tokenizer._encode._table
    for word in text.split(" "):
        assert tokenizer.encode(word).tolist() == in_one_go(tokenizer, word)
        sizes.append(len(table))
        assert all(len(kept) <= 9 for kept in table)
    assert max(sizes) == 5 and sizes != sorted(sizes)
    assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text)


@pytest.mark.parametrize("letter", ["x", "日", "'", " ", "\n"])
def test_a_very_long_word(letter: str) -> None:
    text = letter * (1_000_000 if letter == "x" else 200_000)
    assert small().decode(small().encode(text)) == text


def test_kinds_that_look_like_ours_go_to_the_library(tmp_path: Path) -> None:
    by_bytes = json.loads(Tokenizer.bytes().to_json())["model"]["vocab"]
    no_bytes = Backend(models.BPE(vocab=by_bytes, merges=[], unk_token="a"))
    no_bytes.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    unknown = Backend(models.WordLevel(vocab={"a": 0, "?": 1, END_OF_TEXT: 2}, unk_token="?"))
    unknown.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    removed = Backend(models.WordLevel(vocab={"a": 0, END_OF_TEXT: 1}))
    removed.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "removed")
    unsplit = Backend(models.BPE(vocab=by_bytes | {"Ġ a": 257, "aĠ": 258}, merges=[("a", "Ġ")]))
    unsplit.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for backend, text, ids in (
        (no_bytes, "aéa", [97, 233, 97]),
        (unknown, "aba", [0, 1, 0]),
        (removed, "aaa", []),
        (unsplit, "a a", [258, 97]),
    ):
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text) == ids


def test_merges_that_are_left_out_by_chance_are_not(tmp_path: Path) -> None:
    state = json.loads(small().to_json())
    state["model"]["dropout"] = 0.5
    by_chance = Backend.from_str(json.dumps(state))
    assert len({tuple(by_chance.encode(STORY).ids) for _ in range(5)}) == 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    assert Tokenizer.load(tmp_path).encode(STORY).tolist() == small().encode(STORY).tolist()


# --- Pieces -----------------------------------------------------------------------------------------------------------


NEAR_CUTS = ["a\nb", "é.\n1", "a\n'", "\n\n", "'s", *"a \n\r\t1.\x1c\x85\u2028"]


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bytes"])
def test_cutting_a_text_into_pieces_changes_nothing(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = request.getfixturevalue("gpt2") if name == "gpt2" else KINDS[name]()
    monkeypatch.setattr(module, "_PIECE", 4)

    @settings(max_examples=200)
    @given(st.lists(st.sampled_from(NEAR_CUTS), min_size=15, max_size=40).map("".join))
    @example("a\n\nb \nc\n d\ne \n f\n\n\n" * 9)
    @example(STORY)
    def check(text: str) -> None:
        assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text)
        pieces.append(list(module.pieces([text])))
        assert "".join(pieces[-1]) == text

    pieces: list[list[str]] = []
    check()
    assert sum(len(cut) > 1 for cut in pieces) > 100, "hardly any of these texts was cut"


CUTS = {
    "before an apostrophe's letter": r"'(?=s)",
    "after a sign": r"\.(?=\.)",
    "in white space": r"\s(?=[ \n])",
    "between a newline and spaces": r"\n(?=  )",
    "in a row of newlines": r"\n(?=\n)",
    "after a space": r" (?=\S)",
    "in a word": r"a",
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_other_cuts_would_change_something(cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the end \n the cat's\n\n\n the mat...\n  the hat" * 4
    tokenizer = Tokenizer.train_bpe([text * 20, "\n\n\n \n  \n"], 400)
    monkeypatch.setattr(module, "_PIECE", 4)
    assert tokenizer.encode(text).tolist() == in_one_go(tokenizer, text)
    monkeypatch.setattr(module, "_SAFE_CUT", re.compile(cut))
    assert tokenizer.encode(text).tolist() != in_one_go(tokenizer, text)


def test_a_text_longer_than_a_piece_is_cut(gpt2: Tokenizer, data_folder: Path) -> None:
    text = (data_folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:400_000]
    assert len(list(module.pieces([text]))) == 3
    assert gpt2.encode(text).tolist() == in_one_go(gpt2, text)


@settings(max_examples=200)
@given(st.lists(st.text("ab 1.\n", max_size=9)), st.lists(st.integers(0, 200)))
@example(["a" * 50, " b"], [1, 2, 3])
@example(["a " * 50], list(range(0, 100, 7)))
def test_where_the_parts_of_a_text_end_changes_no_piece(texts: list[str], ends: list[int]) -> None:
    text = "".join(texts)
    ends = [0, *sorted(min(end, len(text)) for end in ends), len(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 4)
        patch.setattr(module, "_LONGEST_PIECE", 12)
        pieces = list(module.pieces([text]))
        assert list(module.pieces(text[a:b] for a, b in pairwise(ends))) == pieces
    assert "".join(pieces) == text and max(map(len, pieces)) <= 12
    assert all(len(piece) >= 4 for piece in pieces[:-1])


def test_a_text_that_cannot_be_cut_safely_is_cut_all_the_same() -> None:
    lengths = [len(piece) for piece in module.pieces(["x" * 700_000] * 3)]
    assert lengths == [1 << 20, 1 << 20, 2_100_000 - (1 << 21)]
    assert [len(piece) for piece in module.pieces(["x" * 1_000_000])] == [1_000_000]
    assert list(module.pieces([])) == [""]


def test_documents_do_not_run_into_each_other() -> None:
    texts = ["the c", "at", "", "\n", STORY]
    encoded = [ids.tolist() for ids in small().encode_documents(texts)]
    assert encoded == [small().encode(text).tolist() for text in texts]
    assert encoded[0] + encoded[1] != small().encode("the cat").tolist()


# --- Training ---------------------------------------------------------------------------------------------------------


def test_training_is_the_same_in_every_process() -> None:
    code = "import sys; from gpt2lab import Tokenizer; print(Tokenizer.train_bpe([sys.argv[1]], 280).fingerprint)"
    elsewhere = subprocess.run(
        [sys.executable, "-c", code, STORY],
        env=os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert elsewhere == small().fingerprint
    others = Tokenizer.train_bpe([STORY], 279), Tokenizer.train_bpe([STORY.upper()], 280)
    assert elsewhere not in [other.fingerprint for other in others]


def test_the_most_frequent_pair_is_merged_first() -> None:
    for text, spelled in (("xy\nxy\nxyz\nyz", ["xy", "z"]), ("xy\nyz\nyz", ["x", "yz"])):
        tokenizer = Tokenizer.train_bpe([text], 258)
        assert tokenizer.vocab_size == 258
        assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("xyz")] == spelled


def test_a_larger_vocabulary_spells_the_text_in_fewer_tokens() -> None:
    lengths = [len(Tokenizer.train_bpe([STORY], size).encode(STORY)) for size in (257, 270, 290, 310)]
    assert lengths == sorted(set(lengths), reverse=True) and lengths[0] == len(STORY.encode())


NAMELESS = ["bpe:256", "bpe:", "bpe:-1", "bpe:1e3", "no/such/folder", "BYTES", "bpe:" + "9" * 30, "bpe:" + "9" * 5000]


@pytest.mark.parametrize("name", NAMELESS, ids=lambda name: f"{name:.10} of {len(name)}")
def test_names_that_name_nothing(name: str) -> None:
    with pytest.raises(ConfigError):
        open_tokenizer(name, [STORY])


def test_names_that_name_something(tmp_path: Path) -> None:
    small().save(tmp_path)
    sizes = {"bytes": 257, "chars": len(set(STORY)) + 1, "bpe:280": 280, str(tmp_path): 280}
    assert {name: open_tokenizer(name, [STORY]).vocab_size for name in sizes} == sizes
    assert [name for name in sizes if is_learned(name)] == ["chars", "bpe:280"]


# --- Files ------------------------------------------------------------------------------------------------------------


@each_kind
def test_a_saved_tokenizer_comes_back(make: Callable[[], Tokenizer], tmp_path: Path) -> None:
    tokenizer = make()
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(STORY).tolist() == tokenizer.encode(STORY).tolist()


def test_gpt2_saved_as_one_file_is_still_gpt2(gpt2: Tokenizer, tmp_path: Path) -> None:
    gpt2.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == gpt2.fingerprint


def test_different_tokenizers_have_different_fingerprints() -> None:
    made = [*(make() for make in KINDS.values()), Tokenizer.chars(["abc"]), Tokenizer.chars(["abd"])]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made) == 5


def test_what_another_program_adds_around_a_text_is_not_added(tmp_path: Path) -> None:
    small().save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    special = {"id": 279, "content": END_OF_TEXT, "special": True}
    special |= dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    around = {
        "type": "TemplateProcessing",
        "pair": [],
        "special_tokens": {},
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    }
    around["single"].append({"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}})
    around["special_tokens"] = {END_OF_TEXT: {"id": END_OF_TEXT, "ids": [279], "tokens": [END_OF_TEXT]}}
    state |= {"added_tokens": [special], "post_processor": around}
    state["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    loaded, theirs = Tokenizer.load(tmp_path), module.Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert loaded.encode(f"the cat {END_OF_TEXT}").tolist() == small().encode(f"the cat {END_OF_TEXT}").tolist()
    assert theirs.encode("the cat").ids[-1] == 279 and len(theirs.encode("the cat sat on").ids) == 3


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACE_BEFORE = BYTE_LEVEL | {"add_prefix_space": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
OTHER_KINDS = {
    "lower case": {"normalizer": {"type": "Lowercase"}},
    "composed characters": {"normalizer": {"type": "NFC"}},
    "a space before": {"pre_tokenizer": SPACE_BEFORE},
    "a space before, in a sequence": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPACE_BEFORE]}},
    "a metaspace before": {"pre_tokenizer": METASPACE},
}


@pytest.mark.parametrize(
    "change",
    [pytest.param(change, id=name) for name, change in OTHER_KINDS.items()],
)
def test_a_tokenizer_that_changes_text_before_it_splits_it_is_refused(
    change: dict[str, object], tmp_path: Path
) -> None:
    small().save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (state["normalizer"], state["pre_tokenizer"]) == (None, BYTE_LEVEL)
    assert Tokenizer.load(tmp_path).fingerprint == small().fingerprint
    (tmp_path / "tokenizer.json").write_text(json.dumps(state | change), encoding="utf-8")
    with pytest.raises(DataError, match="another kind of tokenizer"):
        Tokenizer.load(tmp_path)


GOOD = Tokenizer.bytes()._backend.to_str()
TWO = json.dumps({"a": 0, END_OF_TEXT: 1})
DAMAGED: dict[str, dict[str, bytes | str]] = {
    "nothing there": {},
    "a vocabulary without merges": {"vocab.json": TWO},
    "garbage": {"tokenizer.json": "garbage"},
    "half a file": {"tokenizer.json": GOOD[: len(GOOD) // 2]},
    "a list": {"tokenizer.json": "[]"},
    "not text": {"tokenizer.json": b"\xff\xfe"},
    "deep": {"tokenizer.json": "[" * 100_000},
    "a gap": {"tokenizer.json": GOOD.replace(f'"{END_OF_TEXT}":256', f'"{END_OF_TEXT}":300')},
    "no separator": {"tokenizer.json": GOOD.replace(END_OF_TEXT, "end")},
    "two tokens, one id": {"vocab.json": json.dumps({"a": 0, "b": 0, END_OF_TEXT: 1}), "merges.txt": ""},
    "an id of 2**70": {"vocab.json": json.dumps({"a": 2**70, END_OF_TEXT: 1}), "merges.txt": ""},
    "an empty vocabulary": {"vocab.json": "{}", "merges.txt": ""},
    "an empty file": {"vocab.json": "", "merges.txt": ""},
    "a merge of unknown tokens": {"vocab.json": TWO, "merges.txt": "#version: 0.2\nq z\n"},
    "half a merge": {"vocab.json": TWO, "merges.txt": "#version: 0.2\na\n"},
    "merges that are not text": {"vocab.json": TWO, "merges.txt": b"\xff\xff"},
}


@pytest.mark.parametrize("files", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused(files: dict[str, bytes | str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match="Fix: "):
        Tokenizer.load(tmp_path)


def test_a_file_too_large_to_be_a_vocabulary_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Tokenizer.bytes().save(tmp_path)
    Tokenizer.load(tmp_path)
    monkeypatch.setattr(module, "LARGEST_FILE", 100)
    with pytest.raises(DataError, match="no file of at most 100 bytes"):
        Tokenizer.load(tmp_path)
