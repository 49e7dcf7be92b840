"""Parameter groups, optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gpt2lab.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig, *, exact: bool = False) -> torch.optim.Optimizer:
    """AdamW or SGD, with decay on matrices only: not on norms or biases (experts' biases have rows).

    Args:
        exact: not in the fused form, whose last bits on a CPU depend on where in its tensor (or shard) a number lies.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    fused = not exact and not (sharded and config.name == "sgd")  # torch has no fused SGD of shards
    how = {"fused": True} if fused else {"foreach": False, "fused": False}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (matrices if parameter.dim() >= 2 and not name.endswith("bias") else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, **how)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.betas[0], **how)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of update number `step`, from 1: linear from 0 over the warm-up, then a cosine to the minimum at `steps`."""
    peak = config.learning_rate
    floor = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    warmup = default_warmup(steps) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return peak * step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def default_warmup(steps: int) -> int:
    """A fiftieth of all steps, at least 1."""
    return max(1, steps // 50)
