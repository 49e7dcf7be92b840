"""The feed-forward half of a block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from gpt2lab.model.activation import ACTIVATIONS, Activation
from gpt2lab.model.moe import Routing


class MLP(nn.Module):
    """GPT-2's two-layer perceptron.

    Args:
        embed_dim: width of the residual stream.
        ff_hidden_dim: inner width.
        activation: what stands between the projections.
        bias: whether the projections have one.
        dropout: on the output, while training.
    """

    def __init__(
        self,
        embed_dim: int,
        ff_hidden_dim: int,
        *,
        activation: Activation = ACTIVATIONS["gelu_tanh"],
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(embed_dim, activation.inputs * ff_hidden_dim, bias=bias)
        self.activation = activation.function
        self.down_proj = nn.Linear(ff_hidden_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch time embed"], routing: Routing | None = None
    ) -> Float[Tensor, "batch time embed"]:
        """One MLP for every token; `routing` is for layers of experts, and stays as it is."""
        return self.dropout(self.down_proj(self.activation(self.up_proj(x))))
