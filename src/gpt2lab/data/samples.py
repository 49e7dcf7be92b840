"""What a run learns from, sample by sample, in the order in which it does: a pure function of the seed.

A sample is ``seq_len`` tokens and the token after them. An epoch visits every sample once, in an order drawn from the seed
and the epoch; each epoch cuts the text at another place, so that a token does not always stand at the same position. What
is left over at the ends (less than two samples) waits for another epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError
from gpt2lab.seeds import derive


class Samples(ABC):
    """Samples by their number, from 0 on without an end; asked again, each is the same.

    Attributes:
        seq_len: tokens in a sample.
    """

    seq_len: int

    @abstractmethod
    def start(self, index: int) -> int:
        """Where in the text a sample begins."""

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Its ``seq_len + 1`` ids, as a fresh int64 array."""

    @abstractmethod
    def scored(self, index: int) -> np.ndarray:
        """Which of its `seq_len` targets, all but its first id, are to be learned: booleans."""

    def where(self, index: int) -> str:
        """Where in its source it lies, for the line that shows progress; empty where the step says as much."""
        return ""

    def news(self) -> list[str]:
        """What a person should be told of the source, and was not yet."""
        return []

    def close(self) -> None:  # noqa: B027, most have nothing to do
        """Let go of what brings the text: no more of it is needed."""


@dataclass(frozen=True)
class Contiguous(Samples):
    """Samples cut from the text one after the other, wherever its documents begin.

    Attributes:
        shards: the tokens.
        seed: decides the order.

    Raises:
        DataError: the text is shorter than one sample.
    """

    shards: Shards
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        check_length(self.shards, self.seq_len, "training")

    @property
    def per_epoch(self) -> int:
        """Samples in an epoch."""
        return epoch_samples(len(self.shards), self.seq_len)

    def start(self, index: int) -> int:
        """Where in the shards a sample begins."""
        epoch, place = divmod(index, self.per_epoch)
        order, phase = _epoch_order(self.seed, epoch, self.per_epoch, len(self.shards), self.seq_len)
        return phase + int(order[place]) * self.seq_len

    def read(self, index: int) -> np.ndarray:
        """Its ids."""
        return self.shards.read(self.start(index), self.seq_len + 1)

    def scored(self, index: int) -> np.ndarray:
        """All but those of prompts."""
        return self.shards.scored(self.start(index) + 1, self.seq_len)


def epoch_samples(num_tokens: int, seq_len: int) -> int:
    """Samples in an epoch of `num_tokens` tokens, wherever the epoch starts to cut."""
    return max(1, num_tokens // seq_len - 1)


def check_length(shards: Shards, seq_len: int, what: str) -> None:
    """Refuse a text that is shorter than one sample."""
    if len(shards) < seq_len + 1:
        cause = f"the {what} text has {len(shards)} tokens, one sample needs seq_len + 1 = {seq_len + 1}"
        raise DataError("too little text", where="data", cause=cause, fix="give more text, or a smaller seq_len")


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, samples: int, num_tokens: int, seq_len: int) -> tuple[np.ndarray, int]:
    """The order of an epoch's samples, and the token at which the first of them begins."""
    random = np.random.default_rng(derive(seed, "order", epoch))
    phase = int(random.integers(min(seq_len, num_tokens - samples * seq_len)))
    return random.permutation(samples), phase
