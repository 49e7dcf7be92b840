"""One compiled step of decoding on a CPU: a few tokens of each text through all blocks, and to logits, in two calls.

What `GPT2` wires is handed to the loops of `loops/step.cpp` once, as pointers. They compute each row by itself: the same bits
come of a token alone, in a batch, or in a draft that is checked.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.model import native
from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.model.block import Block
from gpt2lab.model.cache import Cache
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import GroupedLinear
from gpt2lab.model.native import pointer
from gpt2lab.model.quantized import Int8Linear, dequantize, quantize
from gpt2lab.model.rope import RotaryEmbedding

if TYPE_CHECKING:
    from gpt2lab.model.gpt2 import GPT2


class NativeStep:
    """The loops of `loops/step.cpp`, for one model in fp32 or with eight bits a weight.

    Args:
        model: whose parts are then neither replaced nor moved.

    Attributes:
        heads: of each layer, how many key heads there are and how wide.
    """

    def __init__(self, model: GPT2) -> None:
        self.layers = (native.Layer * len(model.layers))(*map(_layer, model.layers))
        self.heads = [(block.attn.num_kv_heads, block.attn.head_dim) for block in model.layers]
        self.norm = _norm(model.final_norm)
        self.head = _linear(model.head if model.head is not None else model.token_embedding)
        self.head.out_features = model.vocab_size  # not the rows that pad it
        self.rotate = model.layers[0].attn.rotate
        self.rough: Rough | None = None
        if self.head.scale is None and model.config.logit_softcap is None:
            self.rough = Rough(model.head_weight[: model.vocab_size])

    def first(self, num_layers: int) -> NativeStep:
        """The same for the first layers alone."""
        fewer = copy(self)
        fewer.heads = self.heads[:num_layers]
        return fewer

    def read(
        self,
        x: Float[Tensor, "row embed"],
        positions: Int[Tensor, " row"],
        texts: Sequence[Cache],
        counts: Sequence[int],
    ) -> Float[Tensor, "row embed"]:
        """What comes of embedded tokens behind the last block; they are added to the caches of their texts.

        Args:
            positions: where the tokens stand, each in its text.
            counts: tokens of each text; of a cache with several texts, of each of those.

        Raises:
            ValueError: a cache of another model, or of another batch size, or one that is too small.
        """
        loops, x = native.library(), x.contiguous()
        assert loops is not None and x.dtype == torch.float32
        if any(text.heads != self.heads for text in texts):
            raise ValueError("the cache is another model's: its layers or heads differ")
        batch = sum(count * text.batch_size for text, count in zip(texts, counts, strict=True))
        if batch != len(x):
            raise ValueError(f"{len(x)} tokens do not go on with caches that expect {batch}: another batch size")
        rooms, each = array("q"), array("q")
        for layer in zip(*texts, strict=True):
            for cache, count in zip(layer, counts, strict=True):
                rooms.extend(cache.rooms(count))
        for text, count in zip(texts, counts, strict=True):
            each.extend([count] * text.batch_size)
        turns: tuple[Tensor | None, Tensor | None] = (None, None)
        if isinstance(self.rotate, RotaryEmbedding):
            turns = self.rotate.turns(positions)
        where = (ctypes.byref(self.layers), len(self.heads), pointer(x), *x.shape)
        kept = (rooms.buffer_info()[0], len(each), each.buffer_info()[0])
        loops.run_layers(*where, *kept, *map(pointer, turns))
        for text, count in zip(texts, counts, strict=True):
            for cache in text:
                cache.length += count
        return x

    def logits(self, x: Float[Tensor, "row embed"], likeliest: int | None = None) -> Float[Tensor, "row vocab"]:
        """What follows each row, by final norm and head.

        Args:
            likeliest: only so many of the largest logits of a row are asked for; others may be -inf. None: all.

        Raises:
            ValueError: `likeliest` is below 1.
        """
        if likeliest is not None and likeliest < 1:
            raise ValueError(f"the {likeliest} likeliest tokens were asked for")
        if likeliest is None or self.rough is None or likeliest > self.head.out_features:
            return native.project(self.norm, self.head, x)
        rough = self.rough = self.rough.renewed()
        return native.project_largest(self.norm, self.head, rough.layer, rough.changed, rough.sizes, x, likeliest)


def _norm(norm: nn.Module) -> native.Norm:
    if isinstance(norm, nn.LayerNorm):
        return native.Norm(pointer(norm.weight), pointer(norm.bias), True, norm.eps)
    assert isinstance(norm, nn.RMSNorm) and norm.eps is not None
    return native.Norm(pointer(norm.weight), None, False, norm.eps)


def _linear(layer: nn.Module, *expert: int) -> native.Linear:
    """A layer in fp32 or in eight bits, or one expert's part of it."""
    if isinstance(layer, Int8Linear):
        assert layer.native is not None
        return native.Linear.from_buffer_copy(layer.native)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor) and weight.dtype == torch.float32
    return native.Linear.of(weight[expert], None if bias is None else bias[expert])


def _layer(block: Block) -> native.Layer:
    attn, mlp = block.attn, block.mlp
    router, experts_per_token = None, 1
    functions = [activation.function for activation in ACTIVATIONS.values()]
    if isinstance(mlp, MLP):
        up, down = [_linear(mlp.up_proj)], [_linear(mlp.down_proj)]
    else:
        experts_per_token = mlp.experts_per_token
        router = ctypes.pointer(_linear(mlp.router))
        up, down = _experts(mlp.up_proj), _experts(mlp.down_proj)
    return native.Layer(
        *(_norm(block.attn_norm), _linear(attn.qkv_proj), _linear(attn.output_proj), _norm(block.mlp_norm)),
        *(router, (native.Linear * len(up))(*up), (native.Linear * len(down))(*down)),
        *(len(up), experts_per_token, attn.num_heads, attn.num_kv_heads, attn.head_dim, attn.window or 0),
        *(functions.index(mlp.activation), attn.qk_norm is not None),
        attn.qk_norm.eps if isinstance(attn.qk_norm, nn.RMSNorm) else 0.0,
    )


def _experts(layer: nn.Module) -> list[native.Linear]:
    if isinstance(layer, GroupedLinear):
        return [_linear(layer, expert) for expert in range(len(layer.weight))]
    assert isinstance(layer.experts, nn.ModuleList)
    return [_linear(expert) for expert in layer.experts]


class Rough:
    """A matrix in eight bits, by which most logits can be told from the largest before they are computed.

    Attributes:
        layer: multiplies with it.
        changed: the length of what quantising changed in each row, and as much again as two sums in fp32, in any order, can be
            off (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1).
        sizes: how long its rows are.
    """

    def __init__(self, weight: Float[Tensor, "out in"]) -> None:
        self.of, self.version = weight, _version(weight)
        steps, scale = quantize(weight)
        self.eight = Int8Linear(steps, scale)
        self.layer = _linear(self.eight)
        unit = 8 * weight.shape[1] * torch.finfo(torch.float32).eps
        eight, length = dequantize(steps, scale), weight.norm(dim=-1)
        self.changed = ((weight - eight).norm(dim=-1) + unit * length) * (1 + unit)
        self.sizes = eight.norm(dim=-1) * (1 + unit)

    def renewed(self) -> Rough:
        """This, or another where the weights were trained since: they may be shared with a model that is."""
        return self if self.version == _version(self.of) else Rough(self.of)


def _version(weight: Tensor) -> int:
    """How often torch has seen it change."""
    return 0 if weight.is_inference() else weight._version
