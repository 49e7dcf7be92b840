"""A GPT-2 for reading alone: its linear layers packed or quantised, and its rows independent of each other to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.errors import ConfigError
from gpt2lab.model import native
from gpt2lab.model.cache import KEPT_IN, ONE_BY_ONE, Cache, SideBySide
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.mlp import MLP
from gpt2lab.model.moe import GroupedLinear, MoE, Routing
from gpt2lab.model.packed import PackedLinear, can_pack
from gpt2lab.model.quantized import Int8Embedding, Int8Linear, dequantize, has_int8, quantize
from gpt2lab.model.quantized4 import Int4Linear, dequantize4, fits_int4, quantize4
from gpt2lab.model.slots import StaticCache
from gpt2lab.model.step import NativeStep

Quantize = Literal["int8", "int4"]
"""What weights can be quantised to."""
SCALE = "_scale"
"""A quantised tensor ``x.weight`` has its scales beside it, in ``x.weight_scale``."""
BLOCKS, TABLES = ("_proj.weight",), ("token_embedding.weight", "head.weight")
"""How the names of the weights end that are quantised: not positions, norms, biases and routers, which are small."""

FEW = ONE_BY_ONE
"""New tokens of a text up to which its reading is bound by memory, and the loops of a step are the fastest way."""
ALIGNED, SHARE = 64, 16384
"""Rows of which width end where torch's vectors do, and up to how many numbers it computes a nonlinearity in one thread."""


class ReadingGPT2(GPT2):
    """A GPT2 that computes logits and cannot be trained, converted or saved; made by `assemble`.

    With a `step`, texts of which no more than `FEW` tokens are new go through its loops, all together, and any other text that
    stands side by side with them by itself, so that what is computed for a text does not depend on the texts beside it.

    Attributes:
        step: None: the layers themselves serve.
    """

    step: NativeStep | None = None

    def hidden(
        self,
        token_ids: Int[Tensor, "batch time"],
        cache: Cache | SideBySide | StaticCache | None = None,
        routing: Routing | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        reach: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time embed"]:
        if self.step is None or routing is not None or not isinstance(cache, Cache | SideBySide):
            return super().hidden(token_ids, cache, routing, positions, reach)
        if isinstance(cache, Cache):
            texts, counts = [cache], [token_ids.shape[1]]
        else:
            texts, counts = list(cache.caches), cache.counts
        if any(layer.keys.dtype not in KEPT_IN for text in texts for layer in text.layers[:1]):
            return super().hidden(token_ids, cache)
        x, places = self.embed(token_ids, cache)
        if max(counts) <= FEW:
            places = places.expand(token_ids.shape)
            return self.step.read(x.flatten(0, 1), places.flatten(), texts, counts).view(x.shape)
        if len(texts) == 1:
            return super().hidden(token_ids, texts[0])
        few = [text for text, count in enumerate(counts) if count <= FEW]
        parts, found = token_ids.split(counts, dim=1), {}
        if few:
            together = SideBySide([texts[text] for text in few], [counts[text] for text in few])
            x = self.hidden(torch.cat([parts[text] for text in few], dim=1), together)
            found = dict(zip(few, x.split(together.counts, dim=1), strict=True))
        for text in set(range(len(texts))) - set(few):
            found[text] = self.hidden(parts[text], texts[text])
        return torch.cat([found[text] for text in range(len(texts))], dim=1)

    def logits(
        self, x: Float[Tensor, "batch time embed"], likeliest: int | None = None
    ) -> Float[Tensor, "batch time vocab"]:
        if self.step is None:
            return super().logits(x)
        return self.step.logits(x.flatten(0, 1), likeliest).unflatten(0, x.shape[:-1])

    def train(self, mode: bool = True) -> ReadingGPT2:
        """Stay in eval mode.

        Raises:
            ConfigError: `mode` is true.
        """
        if mode:
            raise self._refused("cannot train a model that was prepared for reading")
        super().train(False)
        return self

    def state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        """Not there: packed weights are this machine's.

        Raises:
            ConfigError: always.
        """
        raise self._refused("cannot save a model that was prepared for reading")

    def load_state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        """As `state_dict`.

        Raises:
            ConfigError: always.
        """
        raise self._refused("cannot load into a model that was prepared for reading")

    def _apply(self, *args: object, **kwargs: object) -> NoReturn:
        raise self._refused("cannot move a model that was prepared for reading, or change its type")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise self._refused("cannot copy a model that was prepared for reading")

    def num_parameters(self) -> int:
        """As of the model it was made from."""
        with torch.device("meta"):
            return GPT2.from_config(self.config).num_parameters()

    @staticmethod
    def _refused(what: str) -> ConfigError:
        cause = "its weights are packed or quantised"
        return ConfigError(what, cause=cause, fix="use the model it was made from")


class Experts(nn.Module):
    """One linear layer an expert, in place of a `GroupedLinear`."""

    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Float[Tensor, "row in"], counts: Int[Tensor, " expert"]) -> Float[Tensor, "row out"]:
        """`counts` rows of `x` belong to each expert, in their order."""
        each = zip(self.experts, x.split(counts.tolist()), strict=True)
        return torch.cat([expert(rows) for expert, rows in each if len(rows)])


class RowByRow:
    """A nonlinearity whose results do not depend on where a row stands.

    torch computes GELU and SiLU a vector at a time, and the last few numbers of each thread's share by another formula, which
    may differ in the last bit. Here a share ends where a row does, and rows that are no whole number of vectors go one by one.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        width = x.shape[-1]
        if x.numel() == width or (width % ALIGNED == 0 and x.numel() <= SHARE):
            return self.function(x)
        at_once = max(1, SHARE // width) if width % ALIGNED == 0 else 1
        pieces = [self.function(rows) for rows in x.flatten(0, -2).split(at_once)]
        return torch.cat(pieces).view(*x.shape[:-1], -1)


@torch.no_grad()
def assemble(shape: GPT2, weights: Mapping[str, Tensor], *, pack: bool = True) -> ReadingGPT2:
    """A model for reading, in eval mode. What is neither packed nor quantised shares memory with `weights`.

    Args:
        shape: a model of that config; its own weights are not looked at.
        weights: by their names in the code, whole or as `quantize_weights` gives them.
        pack: whether what this machine reads fastest is made: a `NativeStep`, or matrices in oneDNN's layout.
    """
    if not has_int8() and native.library() is None:
        weights = whole(weights)
    fits = all(weight.dtype in (torch.float32, torch.int8) for weight in weights.values())
    stepping = pack and fits and native.library() is not None
    pack = pack and not stepping
    with torch.device("meta"):
        model = ReadingGPT2.from_config(shape.config)

    def linear(name: str, bias_name: str, *expert: int) -> nn.Module | None:
        """The part that reads this matrix, or one expert's of them; None: the layer that is there."""
        weight, scale, bias = (weights.get(key) for key in (name, name + SCALE, bias_name))
        assert weight is not None
        bias = None if bias is None else bias[expert]
        if scale is not None:
            kind = Int8Linear if weight.dtype == torch.int8 else Int4Linear
            return kind(weight[expert], scale[expert], bias)
        return PackedLinear(weight[expert], bias) if pack and can_pack(weight) else None

    for name, module in list(model.named_modules()):
        names = f"{name}.weight", f"{name}.bias"
        part: nn.Module | None = None
        if isinstance(module, nn.Linear):
            part = linear(*names)
        elif isinstance(module, GroupedLinear):
            experts = [linear(*names, expert) for expert in range(len(module.weight))]
            part = Experts([expert for expert in experts if expert is not None]) if None not in experts else None
        elif isinstance(module, nn.Embedding) and names[0] + SCALE in weights:
            part = Int8Embedding(weights[names[0]], weights[names[0] + SCALE])
        elif isinstance(module, MLP | MoE) and pack:
            module.activation = RowByRow(module.activation)
        if part is not None:
            model.set_submodule(name, part)
    if model.head is None and (head := linear("token_embedding.weight", "")) is not None:
        model.head = head
    kept = {name: weights[name] for name, _ in model.named_parameters()}
    GPT2.load_state_dict(model, kept | dict(model.named_buffers()), assign=True)
    model.requires_grad_(False).eval()
    if stepping:
        model.step = NativeStep(model)
    return model


def quantize_weights(weights: Mapping[str, Tensor], to: Quantize) -> dict[str, Tensor]:
    """A model's weights by their names, the large ones quantised, with their scales beside them.

    With int4, the embedding and the head have eight bits, and so have matrices whose shape the kernel for four does not take.
    """
    quantized: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not name.endswith((*BLOCKS, *TABLES)):
            quantized[name] = weight.float()
        elif to == "int4" and name.endswith(BLOCKS) and fits_int4(weight):
            quantized[name], quantized[name + SCALE] = quantize4(weight)
        else:
            quantized[name], quantized[name + SCALE] = quantize(weight)
    return quantized


def whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp32 that quantised ones stand for."""
    scales = {name.removesuffix(SCALE): scale for name, scale in weights.items() if name.endswith(SCALE)}
    methods = {torch.int8: dequantize, torch.uint8: dequantize4}
    return {
        name: methods[weight.dtype](weight, scales[name]) if name in scales else weight
        for name, weight in weights.items()
        if not name.endswith(SCALE)
    }
