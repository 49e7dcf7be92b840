"""What stands between the two projections of an MLP or an expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """A nonlinearity.

    Attributes:
        inputs: numbers it takes for each one it gives; the projection before it is so many times as wide.
    """

    function: Callable[[Tensor], Tensor]
    inputs: int = 1


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's form of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


def swiglu(x: Tensor) -> Tensor:
    """The first half, through SiLU, opens and closes the second (Shazeer 2020, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Activation] = {
    "gelu_tanh": Activation(gelu_tanh),
    "gelu": Activation(F.gelu),
    "relu2": Activation(relu2),
    "swiglu": Activation(swiglu, inputs=2),
}
"""By their names in the config."""
