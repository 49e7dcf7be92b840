"""Perplexity and bits a byte of a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gpt2lab.data.shards import Shards
from gpt2lab.data.sources import Document
from gpt2lab.evaluate.scoring import token_losses
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer


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


def document_tokens(documents: list[Document], tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Documents as one sequence with a separator before each, and their bytes. The first separator is context, not scored."""
    separator = np.array([tokenizer.end_of_text], np.int32)
    encoded = tokenizer.encode_documents([document.text for document in documents])
    parts = [part for ids in encoded for part in (separator, ids)]
    return np.concatenate(parts), sum(len(document.text.encode()) for document in documents)


def shard_tokens(shards: Shards, tokenizer: Tokenizer, limit: int | None) -> tuple[np.ndarray, int]:
    """The first `limit` tokens of prepared text with a separator before them, and their bytes (in proportion, where cut)."""
    count = min(len(shards), limit or len(shards))
    tokens = np.append(np.int64(tokenizer.end_of_text), shards.read(0, count))
    return tokens, round(shards.bytes * count / max(1, len(shards)))


def perplexity(
    model: GPT2,
    token_ids: np.ndarray,
    num_bytes: int,
    seq_len: int,
    stride: int | None = None,
    *,
    borders: Borders | None = None,
) -> Perplexity:
    """Score every token of `token_ids` but the first, which only serves as context, once."""
    return Perplexity.of(token_losses(model, token_ids, seq_len, stride, borders=borders), num_bytes)


def unigram_perplexity(train: Shards, token_ids: np.ndarray, vocab_size: int) -> float:
    """Perplexity of a model that knows only how often each token occurs in `train` (add-one), on `token_ids` but the first."""
    counts = np.ones(vocab_size)
    for start in range(0, len(train), 1 << 22):
        ids = train.read(start, min(1 << 22, len(train) - start))
        counts += np.bincount(ids, minlength=vocab_size)
    return float(np.exp(-np.log(counts / counts.sum())[token_ids[1:]].mean()))
