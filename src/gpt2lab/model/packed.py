"""A linear layer for reading only, in the layout that oneDNN reads fastest, whose rows do not depend on their neighbours."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

EXPECTED_ROWS = 16
"""What the layout is chosen for: few rows, as in decoding. Any number of rows can be multiplied."""


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with such a matrix here."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` for reading. A row's result is the same, to the bit, with whatever rows it is computed.

    `F.linear` adds up in an order that depends on the number of rows. With this layout oneDNN does so only for a single row,
    and not with every shape: it is tried once, on as many threads as then. Where it does, a single row is computed twice.

    Args:
        weight: one that `can_pack`; it is copied, and not changed.
    """

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # No buffer: the layout is this machine's, and is never saved.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), EXPECTED_ROWS)
        self.product = torch.ops.mkldnn._linear_pointwise.default
        self.bias = None if bias is None else bias.detach()
        trial = torch.randn(4, self.in_features, generator=torch.Generator().manual_seed(0))
        singly = torch.cat([self._multiply(row) for row in trial.split(1)])
        self.alone_differs = not torch.equal(singly, self._multiply(trial))

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        if self.alone_differs and x.numel() == self.in_features:  # a single row
            return self._multiply(x.reshape(1, -1).expand(2, -1))[0].view(*x.shape[:-1], -1)
        return self._multiply(x)

    def _multiply(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.product(x, self.packed, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
