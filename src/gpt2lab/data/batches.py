"""Which text at which step: a pure function, so nothing has to be remembered to go on.

A sample is ``seq_len`` tokens and the token after them. An epoch visits every sample once, in an order drawn from the seed
and the epoch; each epoch cuts the text at another place, so that a token does not always stand at the same position. What
is left over at the ends (less than two samples) waits for another epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError
from gpt2lab.model.loss import IGNORE
from gpt2lab.seeds import derive


@dataclass(frozen=True)
class Batches:
    """The training batches of a run.

    Attributes:
        shards: the tokens.
        seq_len: tokens in a sample.
        step_samples: samples in an optimizer step, over all micro-batches and ranks.
        micro_batch: samples in one call, on one rank.
        seed: decides the order.
        rank, world_size: which share of a step is this process's.

    Raises:
        DataError: the text is shorter than one sample.
    """

    shards: Shards
    seq_len: int
    step_samples: int
    micro_batch: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        check_length(self.shards, self.seq_len, "training")

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch."""
        return epoch_samples(len(self.shards), self.seq_len)

    @property
    def passes(self) -> int:
        """Micro-batches in a step, over all ranks."""
        return self.step_samples // self.micro_batch

    @property
    def micro_steps(self) -> int:
        """Calls that make up a step on each rank; where passes cannot be shared evenly, some of the last score nothing."""
        return -(-self.passes // self.world_size)

    def number(self, micro_step: int) -> int:
        """Which of the step's micro-batches a call reads; one that scores nothing has a number beyond them."""
        return micro_step * self.world_size + self.rank

    def step_starts(self, step: int) -> list[int]:
        """Where in the shards the samples of a whole step begin, over all ranks. `step` counts from 0."""
        first = step * self.step_samples
        return [self._start(index) for index in range(first, first + self.step_samples)]

    def sample_starts(self, step: int, micro_step: int) -> list[int]:
        """Where in the shards the samples of one call begin. `step` counts from 0."""
        first = step * self.step_samples + self.number(micro_step) % self.passes * self.micro_batch
        return [self._start(index) for index in range(first, first + self.micro_batch)]

    def num_targets(self, step: int) -> int:
        """Targets in a whole step, over all ranks, that are no prompt's. `step` counts from 0."""
        return sum(int(self.shards.scored(start + 1, self.seq_len).sum()) for start in self.step_starts(step))

    def __call__(self, step: int, micro_step: int) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
        """Inputs and targets of one call: fresh tensors on the CPU. `step` counts from 0. Tokens of prompts are no targets."""
        starts = self.sample_starts(step, micro_step)
        samples = torch.from_numpy(np.stack([self.shards.read(start, self.seq_len + 1) for start in starts]))
        token_ids, targets = samples[:, :-1].clone(), samples[:, 1:].clone()
        scored = np.stack([self.shards.scored(start + 1, self.seq_len) for start in starts])
        targets.masked_fill_(torch.from_numpy(~scored), IGNORE)
        if self.number(micro_step) >= self.passes:  # all ranks call equally often, so that none waits for another
            targets.fill_(IGNORE)
        return token_ids, targets

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.epoch_samples)
        order, phase = _epoch_order(self.seed, epoch, self.epoch_samples, len(self.shards), self.seq_len)
        return phase + int(order[place]) * self.seq_len


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
