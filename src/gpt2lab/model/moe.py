"""A mixture of experts in place of the MLP: each token goes to the few experts that a router chooses for it.

Top-k routing with normalised weights (Shazeer et al. 2017, arXiv:1701.06538; as in Mixtral, Jiang et al. 2024, 2401.04088).
No expert has a capacity: every token reaches each expert it chose, and only that work is done.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gpt2lab.model.activation import ACTIVATIONS, Activation

FEW_ROWS = 256
"""Rows up to which the experts of a decoding model on a GPU need no kernel of their own."""


class Routing:
    """What the routers of one forward pass decided, layer by layer. Passed to the model, whose layers append to it.

    Attributes:
        counts: tokens that each expert of a layer was given; (expert).
        balance_losses: of each layer, experts * sum over experts of (share of the tokens * mean probability): 1 where both
            are even, up to the number of experts where one gets all (Fedus et al. 2021, arXiv:2101.03961).
        closed: set after the forward pass: nothing is noted any more.
        z_losses: of each layer, the mean over tokens of logsumexp(router logits) squared (Zoph et al. 2022, 2202.08906).
    """

    def __init__(self) -> None:
        self.counts: list[Int[Tensor, " expert"]] = []
        self.balance_losses: list[Float[Tensor, ""]] = []
        self.z_losses: list[Float[Tensor, ""]] = []
        self.closed = False

    def append(self, logits: Float[Tensor, "token expert"], counts: Int[Tensor, " expert"]) -> None:
        """Note one layer's router logits, and how many tokens each expert got."""
        share = counts.to(logits.dtype) / counts.sum()
        balance_loss = len(counts) * (share * logits.softmax(-1).mean(0)).sum()
        z_loss = logits.logsumexp(-1).square().mean()
        if (
            not self.closed
        ):  # a block that is computed again in the backward pass must do the same, but is known already
            self.counts.append(counts)
            self.balance_losses.append(balance_loss)
            self.z_losses.append(z_loss)

    @property
    def balance_loss(self) -> Float[Tensor, ""]:
        """The mean over the layers."""
        return torch.stack(self.balance_losses).mean()

    @property
    def z_loss(self) -> Float[Tensor, ""]:
        """The mean over the layers."""
        return torch.stack(self.z_losses).mean()


class GroupedLinear(nn.Module):
    """One linear layer an expert: consecutive groups of rows, each multiplied with a matrix of its own."""

    def __init__(self, num_groups: int, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_groups, out_features)) if bias else None
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "row in"], counts: Int[Tensor, " expert"]) -> Float[Tensor, "row out"]:
        """`counts` rows of `x` belong to each group, in their order."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if dtype == torch.bfloat16 and self._has_kernel(x):  # all groups at once, and no wait for the counts
            ends = counts.cumsum(0).to(torch.int32)
            out = F.grouped_mm(x.to(dtype), self.weight.to(dtype).transpose(1, 2), offs=ends)
            if self.bias is not None:
                groups = torch.arange(len(counts), device=x.device)
                member = groups.repeat_interleave(counts, output_size=len(x))[:, None] == groups
                out = out + member.to(dtype) @ self.bias.to(dtype)  # a product: its gradient is summed in fp32
            return out
        if x.is_cuda and len(x) <= FEW_ROWS and not torch.is_grad_enabled():
            return self.by_all(x.to(dtype), counts)
        biases = self.bias if self.bias is not None else [None] * len(self.weight)
        each = zip(x.split(counts.tolist()), self.weight, biases, strict=True)
        return torch.cat([F.linear(rows, weight, bias) for rows, weight, bias in each])

    def by_all(self, x: Float[Tensor, "row in"], counts: Int[Tensor, " expert"]) -> Float[Tensor, "row out"]:
        """The same without asking for the counts: all groups work on all rows. Few rows wait for the weights anyway."""
        rows = torch.arange(len(x), device=x.device)
        groups = torch.searchsorted(counts.cumsum(0), rows, right=True)
        out = (x @ self.weight.to(x.dtype).transpose(1, 2))[groups, rows]
        return out if self.bias is None else out + self.bias[groups].to(x.dtype)

    def _has_kernel(self, x: Tensor) -> bool:
        """Whether torch has one product for all groups here: it reads 16 bytes at a time."""
        aligned = not (self.weight.shape[1] % 8 or self.weight.shape[2] % 8)
        return (
            aligned and x.is_cuda and hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device) >= (8, 0)
        )


class Router(nn.Linear):
    """Logits over the experts, in fp32 at least: in bf16 its choices would be rough (Fedus et al. 2021)."""

    def forward(self, tokens: Float[Tensor, "token embed"]) -> Float[Tensor, "token expert"]:
        with torch.autocast(tokens.device.type, enabled=False):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            return F.linear(tokens.to(dtype), self.weight.to(dtype))


class MoE(nn.Module):
    """Experts, each an MLP, and the router that chooses `experts_per_token` of them for each token.

    Args:
        embed_dim: width of the residual stream.
        ff_hidden_dim: inner width of one expert.
        num_experts: experts there are; `experts_per_token`: those that work on a token.
        activation: what stands between an expert's projections.
        bias: whether the experts' projections have one; a router has none.
        dropout: on the output, while training.

    Raises:
        ValueError: more experts a token than there are.
    """

    def __init__(
        self,
        embed_dim: int,
        ff_hidden_dim: int,
        num_experts: int,
        experts_per_token: int,
        *,
        activation: Activation = ACTIVATIONS["gelu_tanh"],
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if experts_per_token > num_experts:
            raise ValueError(f"experts_per_token {experts_per_token} is more than num_experts {num_experts}")
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.router = Router(embed_dim, num_experts, bias=False)
        self.up_proj = GroupedLinear(num_experts, embed_dim, activation.inputs * ff_hidden_dim, bias=bias)
        self.activation = activation.function
        self.down_proj = GroupedLinear(num_experts, ff_hidden_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch time embed"], routing: Routing | None = None
    ) -> Float[Tensor, "batch time embed"]:
        """Route, sort by expert, compute, sort back, add up by weight.

        Args:
            routing: is told what was decided here.
        """
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)
        best, chosen = logits.topk(self.experts_per_token, dim=-1)
        weights = best.softmax(dim=-1)  # over the chosen alone: the probabilities of all, normalised
        counts = (chosen.flatten()[:, None] == torch.arange(self.num_experts, device=x.device)).sum(0)
        if routing is not None:
            routing.append(logits, counts)
        order = chosen.flatten().argsort(stable=True)
        hidden = self.up_proj(tokens.index_select(0, order // self.experts_per_token), counts)
        out = self.down_proj(self.activation(hidden), counts)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        parts = out.index_select(0, back).unflatten(0, chosen.shape)
        return self.dropout((parts * weights[..., None].to(parts.dtype)).sum(dim=1).view(x.shape))
