"""Which text at which step: a pure function, so nothing has to be remembered to go on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gpt2lab.data.samples import Samples
from gpt2lab.model.loss import IGNORE


@dataclass(frozen=True)
class Batches:
    """The training batches of a run.

    Attributes:
        samples: in the order in which they are learned from.
        step_samples: samples in an optimizer step, over all micro-batches and ranks.
        micro_batch: samples in one call, on one rank.
        rank, world_size: which share of a step is this process's.
    """

    samples: Samples
    step_samples: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

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

    def step_indices(self, step: int) -> range:
        """The samples of a whole step, over all ranks. `step` counts from 0."""
        return range(step * self.step_samples, (step + 1) * self.step_samples)

    def indices(self, step: int, micro_step: int) -> range:
        """The samples of one call. `step` counts from 0."""
        first = self.number(micro_step) % self.passes * self.micro_batch
        return self.step_indices(step)[first : first + self.micro_batch]

    def num_targets(self, step: int) -> int:
        """Targets in a whole step, over all ranks, that are to be learned. `step` counts from 0."""
        return sum(int(self.samples.scored(index).sum()) for index in self.step_indices(step))

    def __call__(self, step: int, micro_step: int) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
        """Inputs and targets of one call: fresh tensors on the CPU. `step` counts from 0. Tokens of prompts are no targets."""
        indices = self.indices(step, micro_step)
        ids = torch.from_numpy(np.stack([self.samples.read(index) for index in indices]))
        token_ids, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
        scored = np.stack([self.samples.scored(index) for index in indices])
        targets.masked_fill_(torch.from_numpy(~scored), IGNORE)
        if self.number(micro_step) >= self.passes:  # all ranks call equally often, so that none waits for another
            targets.fill_(IGNORE)
        return token_ids, targets
