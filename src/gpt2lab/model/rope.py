"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turn each pair of a query's or key's numbers by an angle that grows with its position.

    The pair (i, i + dim/2) turns by ``position * base ** (-2i / dim)`` radians, so a query and a key meet at an angle that
    depends only on how far apart they stand. It holds no parameters and no table: any position can be asked for.
    """

    def __init__(self, dim: int, max_seq_len: int = 2048, *, base: float = 10000.0) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"rotary embedding turns pairs, so dim must be even; it is {dim}")
        self.dim, self.max_seq_len, self.base = dim, max_seq_len, base

    def forward(
        self, x: Float[Tensor, "batch head time {self.dim}"], positions: Int[Tensor, " time"]
    ) -> Float[Tensor, "batch head time {self.dim}"]:
        """Rotate `x`, each token by its position."""
        exponents = torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim
        angles = positions.float()[:, None] * self.base**-exponents  # fp32: bf16 cannot count past 256
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, max_seq_len={self.max_seq_len}, base={self.base}"
