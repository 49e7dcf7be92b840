"""What a prediction cost."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100
"""A target that is not scored: its loss is 0."""


def token_losses(
    logits: Float[Tensor, "batch time vocab"], targets: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Cross-entropy of each target in nats, in fp32; 0 where the target is `IGNORE`."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(targets)
