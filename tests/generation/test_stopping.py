"""Text as it grows, against a naive one that decodes everything again and looks at every end."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from gpt2lab.errors import ConfigError
from gpt2lab.generation.stopping import GrowingText
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, byte_characters

BYTES = Tokenizer.bytes()
LETTERS = Tokenizer.chars(["abcé€🙂\ufffd "])


def merged() -> Tokenizer:
    """Bytes, and tokens of several: among them halves of characters with something before or after."""
    spelled = sorted(byte_characters().values())
    joined = ["ab", "aba", "bb", "aÃ", "Ã©", "©a", "ðŁ", "ĻĤb", "âĤ", "¬ab", "a b", "日é", END_OF_TEXT]
    backend = Backend(models.WordLevel({text: index for index, text in enumerate(spelled + joined)}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return Tokenizer(backend)


def spaced() -> Tokenizer:
    """A decoder that puts spaces between tokens, so that no text is that of its tokens one after the other."""
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "ab": 2, "é": 3, "##a": 4, END_OF_TEXT: 5}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.WordPiece(cleanup=False)
    return Tokenizer(backend)


TOKENIZERS = {"bytes": BYTES, "letters": LETTERS, "merged": merged(), "spaced": spaced()}


def test_one_of_them_is_no_concatenation() -> None:
    assert {name for name, tokenizer in TOKENIZERS.items() if not tokenizer.concatenates} == {"spaced"}
    assert TOKENIZERS["spaced"].decode([0, 1]) == "a b"


def naive_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, of those that end there the longest; and which it is."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def grow(tokenizer: Tokenizer, token_ids: list[int], stops: list[str]) -> tuple[GrowingText, list[str]]:
    growing = GrowingText(tokenizer, stops)
    return growing, [*map(growing.add, token_ids), growing.finish()]


TEXTS = st.text(st.sampled_from("abcé€🙂\ufffd "), max_size=12)
STOPS = st.lists(st.text(st.sampled_from("abé€🙂\ufffd "), min_size=1, max_size=5), max_size=4)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), stops=STOPS)
def test_what_is_shown_is_the_text_before_the_first_stop(name: str, data: st.DataObject, stops: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    letters = [
        i for char in "ab é€🙂" for i in (tokenizer.encode(char).tolist() if name in ("bytes", "letters") else [])
    ]
    ids = st.integers(0, tokenizer.vocab_size + 1) | st.sampled_from([*letters, *range(tokenizer.vocab_size)][:40])
    token_ids = data.draw(st.lists(ids, max_size=30))
    growing, shown = grow(tokenizer, token_ids, stops)
    expected, met = naive_stop(tokenizer.decode(token_ids), stops)
    assert ("".join(shown), growing.text, growing.met) == (expected, expected, met)


@given(text=TEXTS, stops=STOPS)
@example(text="ababac", stops=["abac"])  # the beginning of a stop string within another
@example(text="aabé", stops=["é", "abé", "b"])
@example(text="aaab", stops=["aaaa", "b"])
def test_it_is_shown_as_soon_as_it_is_certain(text: str, stops: list[str]) -> None:
    """After each byte: what is held back is the longest beginning of a stop string, or of a character."""
    growing, shown = GrowingText(BYTES, stops), ""
    raw = text.encode()
    for end in range(1, len(raw) + 1):
        shown += growing.add(raw[end - 1])
        whole = raw[:end].decode(errors="ignore")  # the bytes are those of characters: only the last can be a half
        before, met = naive_stop(whole, stops)
        assert growing.met == met
        if met is not None:
            assert shown == before
            return
        ends = [whole[-n:] for n in range(1, len(whole) + 1) if any(stop.startswith(whole[-n:]) for stop in stops)]
        assert shown == whole.removesuffix(max(ends, key=len, default=""))


def test_the_naive_one_can_fail() -> None:
    """Two other rules that one might have meant give another text."""
    text, stops = "xabcd", ["abcd", "bc"]
    assert naive_stop(text, stops) == ("xa", "bc")
    earliest_start = text[: min(text.find(stop) for stop in stops)]
    assert earliest_start == "x" != grow(BYTES, list(text.encode()), stops)[0].text == "xa"
    of_equals = grow(BYTES, list(b"xabc"), ["bc", "abc", "c"])[0]
    assert (of_equals.text, of_equals.met) == ("x", "abc")


def test_nothing_follows_a_stop() -> None:
    growing = GrowingText(BYTES, ["b"])
    assert [growing.add(token_id) for token_id in b"abab"] == ["a", "", "", ""]
    assert growing.finish() == "" and growing.text == "a"


def test_no_half_of_a_character_is_shown() -> None:
    assert grow(BYTES, list("é€🙂x".encode()), [])[1] == ["", "é", "", "", "€", "", "", "", "🙂", "x", ""]
    assert grow(BYTES, list("€".encode()[:2]), [])[1] == ["", "", "\ufffd"]
    assert grow(BYTES, [0xFF, *b"ab"], [])[1] == ["\ufffd", "a", "b", ""]
    assert grow(BYTES, list("€".encode()[:2]), ["\ufffd"])[0].met == "\ufffd"  # the end is also a place to stop


def test_a_stop_string_may_begin_and_end_inside_tokens() -> None:
    tokenizer = TOKENIZERS["merged"]
    aba, bb, cut = (tokenizer._backend.token_to_id(text) for text in ("aba", "bb", "aÃ"))
    growing, shown = grow(tokenizer, [aba, bb, aba], ["ab"])
    assert shown == ["", "", "", ""] and growing.met == "ab"
    growing, shown = grow(tokenizer, [bb, aba, bb, bb], ["abab"])
    assert shown == ["bb", "", "", "", ""] and growing.met == "abab"
    growing, shown = grow(tokenizer, [bb, bb, aba], ["bbba"])
    assert shown == ["", "b", "", ""] and growing.met == "bbba"
    assert grow(tokenizer, [cut], [])[1] == ["a", "\ufffd"]


def test_a_long_text_is_not_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda *_: pytest.fail("all of it was decoded"))
    for name in ("bytes", "letters", "merged"):
        growing, _ = grow(TOKENIZERS[name], [0] * 2000, ["x" * 50])
        assert len(growing.text) == 2000


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"empty stop string \(--stop\)"):
        GrowingText(BYTES, ["a", ""])
