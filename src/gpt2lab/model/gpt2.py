"""GPT-2 (Radford et al. 2019), its wiring: every variant is chosen here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.config import GPT2_VOCAB_SIZE, GPT2Config
from gpt2lab.model.attention import GroupQueryAttention
from gpt2lab.model.block import Block
from gpt2lab.model.cache import Cache, KVCache
from gpt2lab.model.loss import token_losses
from gpt2lab.model.mlp import MLP
from gpt2lab.model.rope import RotaryEmbedding


class GPT2(nn.Module):
    """A decoder-only transformer: token and position embeddings, pre-norm blocks, a head tied to the token embedding.

    Args:
        vocab_size: tokens known.
        max_seq_len: the longest context, in tokens.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        ff_hidden_dim: inner width of the MLP.
        num_layers: blocks.
        num_kv_heads: key and value heads; None: num_heads.
        position: "learned" or "rope".
        rope_base: RoPE's base.
        windows: tokens each layer may look at, tiled over the layers; None: all of them, in a layer or in all.
        dropout: probability, while training.
        generator: draws the first weights; None: the global one.

    Raises:
        ValueError: sizes that do not divide, or an unknown position.
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        embed_dim: int,
        num_heads: int,
        ff_hidden_dim: int,
        num_layers: int,
        *,
        num_kv_heads: int | None = None,
        position: Literal["learned", "rope"] = "learned",
        rope_base: float = 10000.0,
        windows: Sequence[int | None] | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        # One place knows which shapes are possible; both doors, this one and the config, go through it.
        self.config = GPT2Config(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            ff_hidden_dim=ff_hidden_dim,
            num_layers=num_layers,
            position=position,
            rope_base=rope_base,
            windows=tuple(windows) if windows is not None else None,
            dropout=dropout,
        )
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        head_dim = embed_dim // num_heads
        windows = windows or [None]
        rotate = RotaryEmbedding(head_dim, max_seq_len, base=rope_base) if position == "rope" else None

        self.token_embedding = nn.Embedding(self.config.padded_vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_seq_len, embed_dim) if position == "learned" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                nn.LayerNorm(embed_dim),
                GroupQueryAttention(
                    embed_dim,
                    num_heads,
                    num_heads if num_kv_heads is None else num_kv_heads,
                    window=windows[layer % len(windows)],
                    rotate=rotate,
                    dropout=dropout,
                ),
                nn.LayerNorm(embed_dim),
                MLP(embed_dim, ff_hidden_dim, dropout=dropout),
            )
            for layer in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(embed_dim)
        self.init_weights(generator)

    @classmethod
    def from_config(cls, config: GPT2Config, *, generator: torch.Generator | None = None) -> Self:
        """The model that a config describes."""
        return cls(
            config.vocab_size or GPT2_VOCAB_SIZE,
            config.max_seq_len,
            config.embed_dim,
            config.num_heads,
            config.hidden_dim,
            config.num_layers,
            num_kv_heads=config.num_kv_heads,
            position=config.position,
            rope_base=config.rope_base,
            windows=config.windows,
            dropout=config.dropout,
            generator=generator,
        )

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's first weights: N(0, 0.02), biases 0, norms 1; what writes to the residual stream is scaled by depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, 0.02, generator=generator)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        for block in self.layers:
            for projection in (block.attn.output_proj, block.mlp.down_proj):
                projection.weight.div_(math.sqrt(2 * len(self.blocks)))

    def forward(
        self,
        token_ids: Int[Tensor, "batch time"],
        targets: Int[Tensor, "batch time"] | None = None,
        *,
        cache: Cache | None = None,
    ) -> Float[Tensor, "batch time vocab"] | Float[Tensor, "batch time"]:
        """Logits for the token after each one; or, with `targets`, each target's loss in nats.

        Args:
            targets: the true next tokens; -100 is not scored and costs 0.
            cache: what was read before; `token_ids` continue it and are added to it.

        Raises:
            ValueError: a position beyond what a model with learned positions has.
        """
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + token_ids.shape[1], device=token_ids.device)
        x = self.token_embedding(token_ids)
        if self.position_embedding is not None:
            if start + len(positions) > self.max_seq_len:
                length = start + len(positions)
                raise ValueError(f"{length} tokens, but learned positions end at max_seq_len {self.max_seq_len}")
            x = x + self.position_embedding(positions)
        x = self.dropout(x)
        layer_caches = cache.layers if cache is not None else [None] * len(self.layers)
        for block, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = block(x, positions, layer_cache)
        # The rows that only pad the embedding are no tokens: they are cut off before anything is normalised.
        logits = nn.functional.linear(self.final_norm(x), self.token_embedding.weight)[..., : self.vocab_size]
        return logits if targets is None else token_losses(logits, targets)

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for sequences of up to `capacity` tokens. `dtype` is that of the weights unless given."""
        weight = self.token_embedding.weight
        return Cache(
            [
                KVCache(
                    batch_size,
                    block.attn.num_kv_heads,
                    block.attn.head_dim,
                    capacity,
                    window=block.attn.window,
                    dtype=dtype or weight.dtype,
                    device=weight.device,
                )
                for block in self.layers
            ]
        )

    @property
    def layers(self) -> Sequence[Block]:
        """The blocks, from first to last."""
        return cast("Sequence[Block]", self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embedding.weight.device

    def num_parameters(self) -> int:
        """Numbers that are learned, without the rows that pad the vocabulary; the tied head counts once."""
        padding = self.token_embedding.num_embeddings - self.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.token_embedding.embedding_dim
