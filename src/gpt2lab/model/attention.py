"""Multi-head, grouped-query and sliding-window attention: a layer that projects, remembers and attends."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.model.attend import attend
from gpt2lab.model.cache import KVCache, LayerSideBySide
from gpt2lab.model.slots import StaticLayer

Rotate = Callable[[Tensor, Tensor], Tensor]


class GroupQueryAttention(nn.Module):
    """Causal self-attention in which groups of query heads share a key and value head (Ainslie et al. 2023, 2305.13245).

    ``num_kv_heads == num_heads`` is GPT-2's multi-head attention, ``num_kv_heads == 1`` multi-query attention.

    Args:
        embed_dim: width of the residual stream.
        num_heads: query heads; must divide embed_dim.
        num_kv_heads: key and value heads; must divide num_heads.
        window: tokens a token may see, itself included; None: all.
        rotate: applied to queries and keys with their positions before they are remembered; None: nothing is.
        qk_norm: applied to queries and keys before that (Henry et al. 2020, arXiv:2010.04245); None: nothing is.
        bias: whether the projections have one.
        dropout: on attention weights and on the output, while training.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        window: int | None = None,
        rotate: Rotate | None = None,
        qk_norm: nn.Module | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, embed_dim // num_heads
        self.window, self.rotate, self.qk_norm = window, rotate, qk_norm
        self.qkv_proj = nn.Linear(embed_dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        self.output_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.attn_dropout = dropout
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch time embed"],
        positions: Int[Tensor, "*each time"],
        cache: KVCache | LayerSideBySide | StaticLayer | None = None,
        reach: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        """Project, place, remember, attend, project back.

        Args:
            positions: of the tokens of `x`, one row for all sequences or one each, as they are rotated by. Who sees whom is
                counted in tokens from the cache's first, or from the first of `x`.
            cache: what was read before, to which this is appended.
            reach: how many tokens each may see at most, itself included; not with a cache.
        """
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if self.rotate is not None:
            q, k = self.rotate(q, positions), self.rotate(k, positions)
        if cache is not None:
            out = cache.attend(q, k, v)
        else:
            dropout = self.attn_dropout if self.training else 0.0
            reach = None if reach is None else reach[:, None]
            out = attend(q, k, v, window=self.window, reach=reach, dropout=dropout)
        return self.dropout(self.output_proj(out.transpose(1, 2).flatten(2)))
