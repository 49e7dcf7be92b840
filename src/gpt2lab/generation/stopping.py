"""Text as it grows: what of it can be shown already, and whether a stop string has ended it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gpt2lab.errors import ConfigError
from gpt2lab.tokenizer import Tokenizer


class GrowingText:
    """The text of tokens that come one by one.

    It ends before the stop string that is complete first, and of those complete with the same character before the longest.

    Args:
        stop: the stop strings.

    Attributes:
        met: the stop string that ended it; None: none did.

    Raises:
        ConfigError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            cause, fix = "an empty text stands everywhere", "give at least one character"
            raise ConfigError("empty stop string", where="--stop", cause=cause, fix=fix)
        self._decoder = _Bytes(tokenizer) if tokenizer.concatenates else _Whole(tokenizer)
        self._stops = [_Prefix(text) for text in sorted(stop, key=len, reverse=True)]
        self._shown: list[str] = []
        self._held = ""
        self.met: str | None = None

    @property
    def text(self) -> str:
        """All that has been shown so far; at the end the whole text."""
        return "".join(self._shown)

    def add(self, token_id: int) -> str:
        """The text that can be shown now: no half of a character, and nothing that a stop string may begin with."""
        return self._grow(self._decoder.add(token_id))

    def finish(self) -> str:
        """The rest, once no token follows."""
        shown = self._grow(self._decoder.finish())
        return shown + self._show(self._held, 0)

    def _grow(self, characters: str) -> str:
        if self.met is not None:
            return ""
        for index, character in enumerate(characters):
            for stop in self._stops:
                if stop.advance(character):
                    self.met = stop.text
                    return self._show(self._held + characters[: index + 1], len(stop.text))
        return self._show(self._held + characters, max((stop.length for stop in self._stops), default=0))

    def _show(self, text: str, held: int) -> str:
        """All of `text` but its last `held` characters, which are kept unless a stop string was met."""
        shown, rest = text[: len(text) - held], text[len(text) - held :]
        self._held = rest if self.met is None else ""
        self._shown.append(shown)
        return shown


class _Prefix:
    """How much of a text the characters so far end with (Knuth, Morris and Pratt 1977).

    Attributes:
        length: of the longest beginning of `text` that they end with.
    """

    def __init__(self, text: str) -> None:
        self.text, self.length = text, 0
        self._shorter = [
            0
        ]  # at i: of the longest beginning that the first i + 1 characters end with, not counting all of them
        for character in text[1:]:
            self._shorter.append(self._next(self._shorter[-1], character))

    def advance(self, character: str) -> bool:
        """Whether the text is complete with this character."""
        self.length = self._next(self.length, character)
        return self.length == len(self.text)

    def _next(self, length: int, character: str) -> int:
        while length and self.text[length] != character:
            length = self._shorter[length - 1]
        return length + (self.text[length] == character)


class _Bytes:
    """Tokens that are bytes, one after the other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Whole:
    """Tokens whose text depends on those around them: all are decoded again for each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._given = 0

    def add(self, token_id: int) -> str:
        self._token_ids.append(token_id)
        return self._since(self._tokenizer.decode(self._token_ids).rstrip("\ufffd"))

    def finish(self) -> str:
        return self._since(self._tokenizer.decode(self._token_ids))

    def _since(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new
