"""The words that GPT-2's pattern makes of a text, each looked up in a table of those that were met before.

A text repeats its words, and to merge one costs as much as to look up a hundred. Python's `re` splits the text, the
`tokenizers` library merges what the table has not, and also says once what a letter is: its Unicode is newer than Python's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
from tokenizers import Regex, pre_tokenizers

LONGEST = 64
"""Characters of a word that is kept."""
MOST = 1 << 17
"""Words that are kept, some 200 bytes each."""

_KNOWN = 0x3001
"""Characters below it are told apart: all white space, and the scripts that put it between words. `re` is slow beyond 2**16."""


class WordTable:
    """What encodes text word by word.

    Args:
        merge: the ids of a piece of text, whole words, by the library.
    """

    def __init__(self, merge: Callable[[str], list[int]]) -> None:
        self._table = _Table(merge)

    def __call__(self, text: str) -> np.ndarray:
        """The ids of `text`, as int32. What `merge` raises passes through."""
        words = word_pattern().findall(text)
        return np.frombuffer(bytearray().join(map(self._table.__getitem__, words)), np.int32)


class _Table(dict[str, bytes]):
    """The ids of each word as the bytes of an int32 array."""

    def __init__(self, merge: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._merge = merge

    def __missing__(self, word: str) -> bytes:
        ids = np.array(self._merge(word), np.int32).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()  # the frequent words are soon back
            self[word] = ids
        return ids


@cache
def word_pattern() -> re.Pattern[str]:
    r"""GPT-2's 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ for Python's `re`.

    A match is one of GPT-2's words, or a few in a row: where a run of letters, numbers or others meets a character that is
    not told apart, a match takes all up to the next white space, before which GPT-2's words always end.
    """
    space, letter, number, other = map(_members, (r"\s", r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]"))
    ends = rf"(?![^\0-{chr(_KNOWN - 1)}])"
    return re.compile(
        rf" ?[{letter}]++{ends}|'(?:[stmd]|re|ve|ll)| ?[{number}]++{ends}| ?[{other}]++{ends}"
        rf"| ?[^{space}]+|[{space}]+(?![^{space}])|[{space}]+"
    )


def _members(kind: str) -> str:
    """The characters below `_KNOWN` that the library's regular expressions take for `kind`, as ranges for Python's."""
    characters = "".join(map(chr, range(_KNOWN)))
    runs = pre_tokenizers.Split(Regex(f"{kind}+"), "removed", invert=True).pre_tokenize_str(characters)
    return "".join(f"{re.escape(run[0])}-{re.escape(run[-1])}" for run, _ in runs)
