"""One transformer block."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.model.attention import GroupQueryAttention
from gpt2lab.model.cache import KVCache, LayerSideBySide
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import MoE, Routing
from gpt2lab.model.slots import StaticLayer


class Block(nn.Module):
    """Attention and MLP (or experts), each behind a norm and added to the residual stream (pre-norm, as in GPT-2)."""

    def __init__(self, attn_norm: nn.Module, attn: GroupQueryAttention, mlp_norm: nn.Module, mlp: MLP | MoE) -> None:
        super().__init__()
        self.attn_norm, self.attn = attn_norm, attn
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(
        self,
        x: Float[Tensor, "batch time embed"],
        positions: Int[Tensor, "*each time"],
        cache: KVCache | LayerSideBySide | StaticLayer | None = None,
        routing: Routing | None = None,
        reach: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        x = x + self.attn(self.attn_norm(x), positions, cache, reach)
        return x + self.mlp(self.mlp_norm(x), routing)
