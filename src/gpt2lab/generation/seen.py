"""What a text has so far, for the penalties on saying it again."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class Seen:
    """The tokens of a prompt, and how often each was generated since.

    Args:
        prompt_ids: the prompt.

    Attributes:
        times: token id to how often it was generated; 0 for a token that stands in the prompt alone.
    """

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self.times = dict.fromkeys(map(int, prompt_ids), 0)

    def add(self, token_id: int) -> None:
        """One token more of the text."""
        self.times[token_id] = self.times.get(token_id, 0) + 1

    def extended(self, token_ids: Iterable[int]) -> Seen:
        """A copy whose text goes on with these: what a draft is judged by, token for token."""
        longer = Seen(())
        longer.times = self.times.copy()
        for token_id in token_ids:
            longer.add(int(token_id))
        return longer

    def tensors(self, device: torch.device) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """The ids that occur, each once, and how often each was generated."""
        both = (np.fromiter(numbers, np.int64, len(self.times)) for numbers in (self.times, self.times.values()))
        ids, times = (torch.from_numpy(numbers).to(device) for numbers in both)
        return ids, times
