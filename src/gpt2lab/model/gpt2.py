"""GPT-2 (Radford et al. 2019), its wiring: every variant is chosen here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.config import GPT2_VOCAB_SIZE, GPT2Config
from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.model.attention import GroupQueryAttention
from gpt2lab.model.block import Block
from gpt2lab.model.cache import Cache, KVCache, SideBySide, WindowCache
from gpt2lab.model.loss import token_losses
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import MoE, Routing
from gpt2lab.model.rope import RotaryEmbedding
from gpt2lab.model.slots import StaticCache

NORM_EPS = 1e-5


class GPT2(nn.Module):
    """A decoder-only transformer: token and position embeddings, pre-norm blocks, a head tied to the token embedding.

    Args:
        vocab_size: tokens known.
        max_seq_len: the longest context, in tokens.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        ff_hidden_dim: inner width of the MLP, or of one expert.
        num_layers: blocks.
        generator: draws the first weights; None: the global one.
        variants: the other fields of `GPT2Config`, by name: num_kv_heads, position, windows, num_experts, norm...

    Raises:
        ValueError: sizes that do not divide, or variants that cannot be.
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
        generator: torch.Generator | None = None,
        **variants: Any,
    ) -> None:
        super().__init__()
        if variants.get("num_kv_heads") is None:
            variants["num_kv_heads"] = num_heads
        # One place knows which shapes are possible; both doors, this one and the config, go through it.
        self.config = config = GPT2Config(
            vocab_size=vocab_size,
            max_seq_len=max_seq_len,
            embed_dim=embed_dim,
            num_heads=num_heads,
            ff_hidden_dim=ff_hidden_dim,
            num_layers=num_layers,
            **variants,
        )
        self.vocab_size, self.max_seq_len = vocab_size, max_seq_len
        learned, dropout = config.position == "learned", config.dropout
        windows = config.windows or (None,)
        activation = ACTIVATIONS[config.activation]
        rotate = None
        if not learned:
            rotate = RotaryEmbedding(
                config.head_dim,
                max_seq_len,
                base=config.rope_base,
                scaling=config.rope_scaling,
                factor=config.rope_factor,
            )
        qk_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS, elementwise_affine=False) if config.qk_norm else None

        def norm() -> nn.Module:
            if config.norm == "rmsnorm":
                return nn.RMSNorm(embed_dim, eps=NORM_EPS)
            return nn.LayerNorm(embed_dim, eps=NORM_EPS, bias=config.bias)

        def mlp() -> MLP | MoE:
            how: dict[str, Any] = {"activation": activation, "bias": config.bias, "dropout": dropout}
            if config.num_experts == 1:
                return MLP(embed_dim, ff_hidden_dim, **how)
            return MoE(embed_dim, ff_hidden_dim, config.num_experts, config.experts_per_token, **how)

        self.token_embedding = nn.Embedding(config.padded_vocab_size, embed_dim)
        self.position_embedding = nn.Embedding(max_seq_len, embed_dim) if learned else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(
                norm(),
                GroupQueryAttention(
                    embed_dim,
                    num_heads,
                    variants["num_kv_heads"],
                    window=windows[layer % len(windows)],
                    rotate=rotate,
                    qk_norm=qk_norm,
                    bias=config.bias,
                    dropout=dropout,
                ),
                norm(),
                mlp(),
            )
            for layer in range(num_layers)
        )
        self.final_norm = norm()
        self.head: nn.Module | None = None
        if not config.tie_head:
            self.head = nn.Linear(embed_dim, config.padded_vocab_size, bias=False)
        self.init_weights(generator)

    @classmethod
    def from_config(cls, config: GPT2Config, *, generator: torch.Generator | None = None) -> Self:
        """The model that a config describes."""
        values = {field.name: getattr(config, field.name) for field in fields(config)}
        decided = {"vocab_size": config.vocab_size or GPT2_VOCAB_SIZE, "ff_hidden_dim": config.hidden_dim}
        return cls(**values | decided, generator=generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """GPT-2's first weights: N(0, 0.02), biases 0, norms 1; what writes to the residual stream is scaled by depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
        for block in self.layers:
            for projection in (block.attn.output_proj, block.mlp.down_proj):
                if self.config.zero_init:
                    projection.weight.zero_()
                else:
                    projection.weight.div_(math.sqrt(2 * len(self.blocks)))

    def forward(
        self,
        token_ids: Int[Tensor, "batch time"],
        targets: Int[Tensor, "batch time"] | None = None,
        *,
        cache: Cache | SideBySide | StaticCache | None = None,
        routing: Routing | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        reach: Int[Tensor, "batch time"] | None = None,
        wanted: Int[Tensor, " place"] | None = None,
        likeliest: int | None = None,
    ) -> Float[Tensor, "batch time vocab"] | Float[Tensor, "batch place vocab"] | Float[Tensor, "batch time"]:
        """Logits for the token after each one; or, with `targets`, each target's loss in nats.

        Args:
            targets: the true next tokens; -100 is not scored and costs 0.
            cache: what was read before; `token_ids` continue it and are added to it.
            routing: is told what the routers of a model with experts decide.
            positions: where each token stands, from 0 and below `time`; None: one after the other.
            reach: how many tokens each may see at most, itself included; None: all before it. A layer's window holds, too.
            wanted: the places in `time` whose logits are asked for; None: all.
            likeliest: how many of the largest logits of each place are asked for: a model for reading may leave others at
                -inf. None: all.

        Raises:
            ValueError: a position beyond what a model with learned positions has; `positions` or `reach` with a cache, which
                goes on with one text.
        """
        if cache is not None and not (positions is None and reach is None):
            raise ValueError("positions and reach are for texts that are read at once, without a cache")
        x = self.hidden(token_ids, cache, routing, positions, reach)
        if self.config.logit_softcap is not None:
            likeliest = None  # the cap makes equals of what was not
        logits = self.logits(x if wanted is None else x[:, wanted], likeliest)
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits if targets is None else token_losses(logits, targets)

    def hidden(
        self,
        token_ids: Int[Tensor, "batch time"],
        cache: Cache | SideBySide | StaticCache | None = None,
        routing: Routing | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        reach: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        """The residual stream behind the last block; the arguments are those of `forward`."""
        x, places = self.embed(token_ids, cache, positions)
        x = self.dropout(x)
        layer_caches = cache.layers if cache is not None else [None] * len(self.layers)
        for block, layer_cache in zip(self.layers, layer_caches, strict=True):
            x = block(x, places, layer_cache, routing, reach)
        return x

    def embed(
        self,
        token_ids: Int[Tensor, "batch time"],
        cache: Cache | SideBySide | StaticCache | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time embed"], Int[Tensor, "*each time"]]:
        """Tokens as the first block gets them, and where they stand."""
        time = token_ids.shape[1]
        length = time if cache is None else cache.length_after(time)
        places = positions
        if places is None:
            here = token_ids.device
            places = torch.arange(time, device=here) if cache is None else cache.places(time, here)
        x = self.token_embedding(token_ids)
        if self.position_embedding is not None:
            if length > self.max_seq_len:
                raise ValueError(f"{length} tokens, but learned positions end at max_seq_len {self.max_seq_len}")
            x = x + self.position_embedding(places)
        return x, places

    def logits(
        self, x: Float[Tensor, "batch time embed"], likeliest: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        """What the head makes of the residual stream; the cap, if there is one, comes after it."""
        x = self.final_norm(x)
        logits = self.head(x) if self.head is not None else nn.functional.linear(x, self.token_embedding.weight)
        # The rows that only pad the embedding are no tokens: they are cut off before anything is normalised.
        return logits[..., : self.vocab_size]

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for sequences of up to `capacity` tokens. `dtype` is that of the weights unless given.

        A layer with a window keeps what its window needs and no more.
        """
        weight = self.final_norm.weight  # of the type that is computed in, also where larger weights are quantised
        assert isinstance(weight, Tensor)
        return Cache(
            [
                (KVCache if block.attn.window is None else WindowCache)(
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
    def head_weight(self) -> Tensor:
        """The matrix that makes logits: the token embedding, unless the head has weights of its own."""
        weight = self.token_embedding.weight if self.head is None else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embedding.weight.device

    def num_parameters(self) -> int:
        """Numbers that are learned, without the rows that pad the vocabulary; the tied head counts once."""
        padding = self.token_embedding.num_embeddings - self.vocab_size
        padding *= 1 if self.head is None else 2
        return sum(p.numel() for p in self.parameters()) - padding * self.token_embedding.embedding_dim
