"""Perplexity and bits a byte of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gpt2lab.data.shards import Shards
from gpt2lab.data.sources import Document
from gpt2lab.evaluate.scoring import token_losses
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer

PASSAGE = 4096
"""Tokens of held-out text that are scored together, where not all are: the first of a few documents are a poor sample."""


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        loss: nats a token.
        perplexity: e to the loss.
        bits_per_byte: bits for each byte of UTF-8 text, comparable between tokenizers.
        tokens: tokens scored.
        bytes: of text behind them.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, losses: np.ndarray, num_bytes: int) -> Perplexity:
        """From the losses of all tokens."""
        loss = float(losses.mean())
        bits = float(losses.sum()) / math.log(2) / max(1, num_bytes)
        return cls(loss, math.exp(min(loss, 700.0)), bits, len(losses), num_bytes)


@dataclass(frozen=True)
class Passages:
    """Text to score.

    Attributes:
        token_ids: one passage after the other; the first id of each is only context.
        lengths: ids in each passage.
        scored: of each id but the very first whether its loss counts: not that of a passage's first, nor of a prompt's.
        bytes: of UTF-8 text behind what is scored; in proportion, where only a part of a text is.
    """

    token_ids: np.ndarray
    lengths: tuple[int, ...]
    scored: np.ndarray
    bytes: int


def document_passages(documents: list[Document], tokenizer: Tokenizer) -> Passages:
    """Documents as one passage, with a separator before each."""
    separator = np.array([tokenizer.end_of_text], np.int32)
    encoded = tokenizer.encode_documents([document.text for document in documents])
    token_ids = np.concatenate([part for ids in encoded for part in (separator, ids)])
    num_bytes = sum(len(document.text.encode()) for document in documents)
    return Passages(token_ids, (len(token_ids),), np.ones(len(token_ids) - 1, bool), num_bytes)


def held_out_passages(shards: Shards, tokenizer: Tokenizer, limit: int | None) -> Passages:
    """Prepared text as one passage; or, where it has more than `limit` tokens, passages from all over it, evenly apart."""
    count = min(len(shards), limit or len(shards))
    passages = 1 if count == len(shards) else -(-count // PASSAGE)
    ends = [count * number // passages for number in range(passages + 1)]
    room = len(shards) - count
    token_ids, scored = list[np.ndarray](), list[np.ndarray]()
    for number, (first, end) in enumerate(pairwise(ends)):
        start, length = first + room * number // max(1, passages - 1), end - first
        before = shards.read(start - 1, 1) if start else np.array([tokenizer.end_of_text])
        token_ids += [before, shards.read(start, length)]
        scored += [np.array([False]), shards.scored(start, length)]
    lengths = tuple(len(part) + 1 for part in token_ids[1::2])
    counts = np.concatenate(scored)[1:]
    num_bytes = round(shards.bytes * int(counts.sum()) / max(1, len(shards)))
    return Passages(np.concatenate(token_ids), lengths, counts, num_bytes)


def perplexity(
    model: GPT2, text: Passages, seq_len: int, stride: int | None = None, *, borders: Borders | None = None
) -> Perplexity:
    """How well a model predicts a text, each of its tokens once."""
    losses = token_losses(model, text.token_ids, seq_len, stride, lengths=text.lengths, borders=borders)
    return Perplexity.of(losses[text.scored], text.bytes)


def unigram_perplexity(train: Shards, text: Passages, vocab_size: int) -> float:
    """Perplexity of a model that knows only how often each token occurs in `train` (add-one)."""
    counts = np.ones(vocab_size)
    for start in range(0, len(train), 1 << 22):
        ids = train.read(start, min(1 << 22, len(train) - start))
        counts += np.bincount(ids, minlength=vocab_size)
    return float(np.exp(-np.log(counts / counts.sum())[text.token_ids[1:][text.scored]].mean()))
