"""Weights in eight bits: linear layers whose sums are exact integers, and an embedding that shares a head's table."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.model import native

LEVELS = 255 if torch.cpu._is_vnni_supported() else 127
"""Steps between a row's lowest and highest number. Without VNNI the kernel adds two products in 16 bits, where those of 8-bit
numbers would be cut off: 2 * 255 * 127 is above 32767, 2 * 127 * 127 is not (as torch's `reduce_range` does it)."""


def has_int8() -> bool:
    """Whether torch multiplies 8-bit numbers here by the kernel that gives exact sums (FBGEMM, on x86)."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def quantize(
    weight: Float[Tensor, "*group out in"],
) -> tuple[Int[Tensor, "*group out in"], Float[Tensor, "*group out"]]:
    """Eight bits a weight, -127 to 127, and the size of a step for each output (its largest weight over 127)."""
    scale = weight.abs().amax(dim=-1).float() / 127
    steps = weight / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().to(torch.int8), scale


def dequantize(
    weight: Int[Tensor, "*group out in"], scale: Float[Tensor, "*group out"]
) -> Float[Tensor, "*group out in"]:
    """What the eight bits stand for, in fp32."""
    return weight.float() * scale[..., None]


class Int8Linear(nn.Module):
    """``x @ weight.T + bias`` for reading, the weights and each row of `x` in eight bits.

    A row is cut into `LEVELS` steps from its lowest number to its highest, x = low + step * q, so that

        y = step * scale * (weight @ q) + low * scale * weight.sum(in) + bias.

    The sums of weight @ q are integers and exact, so a row's result is the same, to the bit, with whatever rows it is
    computed. One scale an output and one with an offset a row: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, table 1)
    loses 0.3% of perplexity at 125M with them, and 20% or more with one scale for all of `x`, or without the offset.

    Args:
        weight: -127 to 127; it is packed, for the loops of `native` or for torch's kernel, and not kept.
        scale: the size of a step, for each output.
    """

    def __init__(
        self,
        weight: Int[Tensor, "out in"],
        scale: Float[Tensor, " out"],
        bias: Float[Tensor, " out"] | None = None,
        *,
        levels: int = LEVELS,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.row_sums = weight.sum(dim=-1, dtype=torch.int64).float() * scale
        self.bias = bias
        self.native: native.Linear | None = None
        if native.library() is not None:
            self.blocks, self.scale = native.in_blocks(weight), scale.contiguous()
            self.native = native.Linear.of_eight(self.blocks, self.scale, self.row_sums, bias, self.in_features)
            return
        self.step = 1 / levels
        with warnings.catch_warnings():  # torch warns that the type will go; its packed form has no other door yet
            warnings.simplefilter("ignore", UserWarning)
            zero_points = torch.zeros(self.out_features, dtype=torch.long)
            typed = torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zero_points, 0)
            self.packed = torch.ops.quantized.linear_prepack(typed, None)
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.native is not None:
            return native.project(None, self.native, x)
        low, high = x.aminmax(dim=-1, keepdim=True)
        span = high - low
        # Where all numbers of a row are the same, this divides 0 by 0; whatever integers come of it count 0 times.
        parts = (x - low).div_(span)
        product = self.product(parts, self.step, 0, self.packed)
        offset = low * self.row_sums if self.bias is None else torch.addcmul(self.bias, low, self.row_sums)
        return offset.addcmul_(product, span)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(nn.Module):
    """A table of rows in eight bits, each with a scale: the same numbers as an `Int8Linear` of them multiplies with."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Int[Tensor, "row dim"], scale: Float[Tensor, " row"]) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, indices: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape dim"]:
        return dequantize(self.weight[indices], self.scale[indices])

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
