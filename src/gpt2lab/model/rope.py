"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and three ways to read further than it was trained."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Scaling = Literal["linear", "ntk", "yarn"]

FAST, SLOW = 32, 1
"""YaRN's turns over the trained length: a pair that turns more often is left alone, one that turns less is squeezed."""


class RotaryEmbedding(nn.Module):
    """Turn each pair of a query's or key's numbers by an angle that grows with its position.

    The pair (i, i + dim/2) turns by ``position * base ** (-2i / dim)`` radians, so a query and a key meet at an angle that
    depends only on how far apart they stand. It holds no parameters and no table: any position can be asked for.

    Args:
        dim: width of a head.
        max_seq_len: the longest context in tokens; with `scaling`, `factor` times the trained one.
        scaling: None; "linear" (position interpolation, Chen et al. 2023, arXiv:2306.15595): positions are divided by
            `factor`; "ntk": the base grows so that only the slowest pair is; "yarn" (Peng et al. 2023, arXiv:2309.00071):
            fast pairs stay, slow ones are divided, those between by parts, and queries and keys grow with log(factor).

    Raises:
        ValueError: an odd `dim`.
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int = 2048,
        *,
        base: float = 10000.0,
        scaling: Scaling | None = None,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary embedding turns pairs, so dim must be even; it is {dim}")
        self.dim, self.max_seq_len = dim, max_seq_len
        self.scaling, self.factor = scaling, factor
        self.base = ntk_base(dim, base, factor) if scaling == "ntk" else base
        self.amplitude = 0.1 * math.log(factor) + 1 if scaling == "yarn" else 1.0

    def frequencies(self, device: torch.device | None = None) -> Float[Tensor, " pair"]:
        """Radians that each pair turns from one position to the next."""
        exponents = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        frequencies = self.base**-exponents  # fp32: bf16 cannot count past 256
        if self.scaling == "linear":
            return frequencies / self.factor
        if self.scaling == "yarn":
            trained = self.max_seq_len / self.factor
            first, last = (
                self.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.base))
                for turns in (FAST, SLOW)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), self.dim - 1)
            pairs = torch.arange(self.dim // 2, device=device, dtype=torch.float32)
            squeezed = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
            return frequencies * (1 - squeezed) + frequencies / self.factor * squeezed
        return frequencies

    def turns(
        self, positions: Int[Tensor, "*each time"]
    ) -> tuple[Float[Tensor, "*each time {self.dim//2}"], Float[Tensor, "*each time {self.dim//2}"]]:
        """Cosine and sine of each pair's angle at each position, times the amplitude."""
        angles = positions.float()[..., None] * self.frequencies(positions.device)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def forward(
        self, x: Float[Tensor, "batch head time {self.dim}"], positions: Int[Tensor, "*each time"]
    ) -> Float[Tensor, "batch head time {self.dim}"]:
        """Rotate `x`, each token by its position; `positions` are those of all sequences, or a row for each."""
        cos, sin = (turn[..., None, :, :].to(x.dtype) for turn in self.turns(positions))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def extra_repr(self) -> str:
        scaled = f", scaling={self.scaling}, factor={self.factor:g}" if self.scaling else ""
        return f"dim={self.dim}, max_seq_len={self.max_seq_len}, base={self.base:g}{scaled}"


def ntk_base(dim: int, base: float, factor: float) -> float:
    """The base with which the slowest pair turns `factor` times slower, and the fastest as before (NTK-aware scaling)."""
    return base * factor ** (dim / (dim - 2)) if dim > 2 else base
