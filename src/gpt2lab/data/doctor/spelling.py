"""The text behind ids, as bytes and in bulk: ten times as fast as decoding, and half a character is no question mark."""

from __future__ import annotations

import json

import numpy as np

from gpt2lab.tokenizer import Tokenizer


class Spelling:
    """How a tokenizer's ids are spelled. End-of-text is a line end here, so that no line goes on in the next document.

    Attributes:
        vocab_size, end_of_text: as in the tokenizer.
        lengths: bytes of each id; the last entry stands for all ids beyond the vocabulary, which have none.
        can_cut: whether no character, no line end and no broken character can go across the start of an id: it begins with
            an ASCII character that is no line feed, or separates documents.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size, self.end_of_text = tokenizer.vocab_size, tokenizer.end_of_text
        spelled = [*token_bytes(tokenizer), b""]
        spelled[self.end_of_text] = b"\n"
        self.lengths = np.array([len(token) for token in spelled])
        self.can_cut = np.array([token[:1].isascii() and token[:1] != b"\n" for token in spelled])
        self.can_cut[self.end_of_text] = True
        self._bytes = np.frombuffer(b"".join(spelled), np.uint8)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def __call__(self, ids: np.ndarray) -> bytes:
        """The text of `ids`; none is larger than the vocabulary's size, which is spelled as nothing."""
        lengths = self.lengths[ids]
        shifts = np.repeat(self._starts[ids] - (np.cumsum(lengths) - lengths), lengths)
        return self._bytes[shifts + np.arange(len(shifts))].tobytes()


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for; end-of-text is spelled out."""
    state = json.loads(tokenizer.to_json())
    vocab: dict[str, int] = state["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    if state["decoder"]["type"] != "ByteLevel":
        return [token.encode() for token in tokens]
    byte_level: dict[str, int] = json.loads(Tokenizer.bytes().to_json())["model"]["vocab"]
    spelled = str.maketrans({char: chr(byte) for char, byte in byte_level.items() if byte < 256})  # GPT-2's characters
    known = frozenset(map(chr, spelled))
    return [t.translate(spelled).encode("latin-1") if known.issuperset(t) else t.encode() for t in tokens]
