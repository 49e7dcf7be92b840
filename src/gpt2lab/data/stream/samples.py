"""Samples of a stream: each block's in an order of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpt2lab.data.samples import Samples
from gpt2lab.data.stream.window import Window
from gpt2lab.seeds import derive


@dataclass(frozen=True)
class Streamed(Samples):
    """Samples cut from the stream one after the other; those of a block are learned from in an order drawn by seed and block.

    Attributes:
        window: the blocks at hand.
        per_block: samples in a block, no fewer than in a step.
    """

    window: Window
    seq_len: int
    per_block: int
    seed: int

    def block(self, index: int) -> int:
        """The block in which a sample lies."""
        return index // self.per_block

    def start(self, index: int) -> int:
        """Where in the stream a sample begins."""
        return self.block(index) * self.per_block * self.seq_len + self._offset(index)

    def read(self, index: int) -> np.ndarray:
        """Its ids."""
        return self.window.block(self.block(index)).read(self._offset(index), self.seq_len + 1)

    def scored(self, index: int) -> np.ndarray:
        """All but those of prompts."""
        return self.window.block(self.block(index)).scored(self._offset(index) + 1, self.seq_len)

    def where(self, index: int) -> str:
        """The file in which its block begins."""
        return self.window.where(self.block(index))

    def news(self) -> list[str]:
        """What was left out of the files."""
        return self.window.news()

    def close(self) -> None:
        """End what brings the blocks."""
        self.window.close()

    def _offset(self, index: int) -> int:
        block, place = divmod(index, self.per_block)
        return int(_order(self.seed, block, self.per_block)[place]) * self.seq_len


@lru_cache(maxsize=4)
def _order(seed: int, block: int, samples: int) -> np.ndarray:
    """The order in which the samples of a block are learned from."""
    return np.random.default_rng(derive(seed, "block", block)).permutation(samples)
