"""Weights in four bits: linear layers that read half as much as in eight, for one text at a time."""

from __future__ import annotations

import torch
from jaxtyping import BFloat16, Float, UInt8
from torch import Tensor, nn

GROUP = 32
"""Weights that share a scale and a middle, along the inputs: the smallest group that the kernel knows."""
OUTPUTS = 16
"""Outputs that the kernel computes at a time."""
Packed = UInt8[Tensor, "*group out half"]
Scales = BFloat16[Tensor, "*group out block 2"]


def fits_int4(weight: Tensor) -> bool:
    """Whether the kernel multiplies with a matrix of that shape."""
    return weight.shape[-1] % GROUP == 0 and weight.shape[-2] % OUTPUTS == 0


def quantize4(weight: Float[Tensor, "*group out in"]) -> tuple[Packed, Scales]:
    """Four bits a weight, two weights a byte, the first in the low half; and for each `GROUP` of them a step and a middle.

    A group is cut into 15 steps from its lowest weight to its highest: weight = middle + step * (q - 8).
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scales = torch.stack([(high - low) / 15, low + (high - low) * (8 / 15)], dim=-1).to(torch.bfloat16)
    step, middle = scales.float()[..., None].unbind(-2)
    q = ((groups - middle) / step.clamp(min=torch.finfo(torch.float32).tiny) + 8).round().clamp(0, 15).to(torch.uint8)
    first, second = q.flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return first | (second << 4), scales


def dequantize4(weight: Packed, scales: Scales) -> Float[Tensor, "*group out in"]:
    """What the four bits stand for, in fp32."""
    step, middle = scales.float()[..., None].unbind(-2)
    return (middle + step * (unpacked(weight).float().unflatten(-1, (-1, GROUP)) - 8)).flatten(-2)


def unpacked(weight: Packed) -> UInt8[Tensor, "*group out in"]:
    """One weight a byte, 0 to 15."""
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2)


class Int4Linear(nn.Module):
    """``x @ weight.T + bias`` for reading, the weights in four bits; `x` and the result are rounded to bf16.

    The kernel turns the weights into bf16 on its way. It computes row by row: a row's result is the same, to the bit, with
    whatever rows it is computed, but many rows take as many times as long.

    Args:
        weight: as `quantize4` gives it, and `scales`.
    """

    def __init__(self, weight: Packed, scales: Scales, bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpacked(weight).to(torch.int32), 1)
        self.scales = scales.transpose(0, 1).contiguous()
        self.product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        self.bias = bias

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        rows = x.reshape(-1, self.in_features).to(torch.bfloat16)
        out = self.product(rows, self.packed, GROUP, self.scales).view(*x.shape[:-1], self.out_features)
        return out.to(x.dtype) if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
