"""Every random choice is a function of what it is for: nothing is drawn from a state that someone else may have moved."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose, such as ``derive(seed, "dropout", step, micro_step)``.

    The parts are mixed as a sequence, not added, so (1, 2) and (2, 1) are different.
    """
    mixed = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers]).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A fresh generator on the CPU for one purpose."""
    import torch  # what reads text needs none of it, and its import takes a second

    return torch.Generator().manual_seed(derive(seed, purpose))
