"""The feed-forward half of a block."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """GPT-2's two-layer perceptron with the tanh form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, embed_dim: int, ff_hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, ff_hidden_dim)
        self.down_proj = nn.Linear(ff_hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch time embed"]) -> Float[Tensor, "batch time embed"]:
        return self.dropout(self.down_proj(F.gelu(self.up_proj(x), approximate="tanh")))
