"""Strings there and back: `decode(encode(x)) == x`, and the ids are the library's, for 100,000 strings and every character.

    python -m tests.campaigns.round_trip --strings 100000

The test suite tries a few hundred (tests/test_tokenizer.py).
"""

import argparse
import time
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer, open_tokenizer
from tests.test_tokenizer import NEAR_ENDS, NOT_TOLD_APART, in_one_go, mixed

WORDS = [
    *NEAR_ENDS,
    *NOT_TOLD_APART,
    END_OF_TEXT,
    "The",
    " cat",
    "\r\n",
    "I'll",
    "x" * 70,
    "\t",
    "\u200d",
    "\ufeff",
    "\xa0",
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(st.sampled_from(WORDS)).map("".join)


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).tolist()
    assert ids == in_one_go(tokenizer, text), ascii(text)
    assert tokenizer.decode(ids) == text, ascii(text)


def try_strings(tokenizer: Tokenizer, count: int) -> int:
    """Distinct strings that were tried."""
    tried = set()

    @settings(max_examples=count, derandomize=False, database=None, deadline=None)
    @given(TEXTS)
    def strings(text: str) -> None:
        check(tokenizer, text)
        tried.add(text)

    strings()
    return len(tried)


def try_characters(tokenizer: Tokenizer) -> int:
    """Characters that were tried: each beside a letter, a number, another, and white space."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 1000):
        check(tokenizer, "".join(f"a{c}1{c}!{c}'{c} {c}x\n" for c in characters[start : start + 1000]))
    return len(characters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="gpt2")
    arguments = parser.parse_args()
    kinds: dict[str, Callable[[], Tokenizer]] = {
        arguments.tokenizer: lambda: open_tokenizer(arguments.tokenizer),
        "bpe": mixed,
        "bytes": Tokenizer.bytes,
    }
    for name, make in kinds.items():
        tokenizer, began = make(), time.monotonic()
        tried = f"{try_strings(tokenizer, arguments.strings):,} strings, {try_characters(tokenizer):,} characters"
        print(f"{name}: {tried}, all as they were, in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
