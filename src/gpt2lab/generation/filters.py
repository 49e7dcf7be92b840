"""Which tokens stay possible: pure functions of logits or probabilities, and the distribution that they leave together."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Logits = Float[Tensor, "batch vocab"]
Probabilities = Float[Tensor, "batch vocab"]


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Only the `k` likeliest tokens (all that tie with the last of them) stay possible."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(probabilities: Probabilities, p: float) -> Probabilities:
    """Only the likeliest tokens stay possible: the fewest that hold probability `p` together (Holtzman et al. 2020).

    Of tokens that tie, the first in the vocabulary counts as the likelier.
    """
    ordered, order = probabilities.sort(descending=True, stable=True)
    needed = ordered.cumsum(-1) - ordered < p  # what came before it does not hold p yet
    kept = torch.zeros_like(needed).scatter(-1, order, needed)
    return normalised(probabilities.masked_fill(~kept, 0.0))


def keep_min_p(probabilities: Probabilities, p: float) -> Probabilities:
    """Only tokens with at least `p` times the probability of the likeliest stay possible (Nguyen et al. 2024)."""
    return normalised(probabilities.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), 0.0))


def normalised(weights: Probabilities) -> Probabilities:
    """Shares of the sum; where all are 0 they stay 0."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def distribution(
    logits: Logits, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Probabilities:
    """Probabilities in float64, after temperature, top-k, top-p of what top-k left, and min-p of what top-p left.

    Top-k looks at the logits as they are, whose order no temperature changes.

    Args:
        temperature: above 0.

    Returns:
        Rows that sum to 1, or are 0 where every logit is -inf.
    """
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    highest = logits.amax(-1, keepdim=True).double()
    # From the highest down, nothing overflows at any temperature; where there is none, all weights are exp(-inf).
    weights = logits.double() - highest.masked_fill(highest == -math.inf, 0.0)
    probabilities = normalised((weights / temperature).exp())
    if top_p is not None and top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    return keep_min_p(probabilities, min_p) if min_p else probabilities
