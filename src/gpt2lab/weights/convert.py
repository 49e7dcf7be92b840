"""A model with other parts: what becomes of each weight, and whether the new model still computes the same function.

What is exact is exact up to the rounding of a matrix product that has other dimensions. What is not is a start: the
weights that fit are kept, and training (``train --init_from``) has to do the rest.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpt2lab.config import GPT2Config, to_dict
from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.recipe import Setting, build_model_config
from gpt2lab.weights.changes import CHANGES, Work, show
from gpt2lab.weights.layout import EMBEDDING, WeightMap

FIXED = ("vocab_size", "embed_dim", "num_heads", "head_dim", "ff_hidden_dim", "num_layers")
"""Sizes that every weight depends on."""


@dataclass(frozen=True)
class Converted:
    """A model with other parts.

    Attributes:
        model: in eval mode; it shares no memory with the one it was made from.
        map: by our names. `cut`: smaller than before. `missing`: drawn, filled or repeated, and how. `left_over`: what the
            new model has no place for.
        exact: a sentence for each change that leaves the function as it was, with the condition where there is one.
        approximate: a sentence for each change after which the model is a start that has to be trained.
    """

    model: GPT2
    map: WeightMap
    exact: list[str]
    approximate: list[str]


@torch.no_grad()
def convert(model: GPT2, changes: Mapping[str, Any], generator: torch.Generator) -> Converted:
    """A model whose config has these changes, with as much of the weights of `model`, which stays as it is, as can be kept.

    Args:
        changes: fields of `GPT2Config` and their new values.
        generator: draws the routers of new experts.

    Raises:
        ConfigError: nothing is changed, no such model can be, or no weights for it can be made of these.
    """
    before, after = model.config, _new_config(model.config, changes)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    work = Work(before, after, weights, generator)
    for key, change in CHANGES.items():
        if getattr(before, key) != getattr(after, key):
            change(work, key)
    return _finish(work)


@torch.no_grad()
def max_logit_difference(before: GPT2, after: GPT2, generator: torch.Generator) -> float:
    """The largest difference of the logits of two models of one vocabulary in eval mode, over up to 1,024 random tokens."""
    time = min(before.max_seq_len, after.max_seq_len, 1024)  # longer than most windows, or a new one would not show
    token_ids = torch.randint(before.vocab_size, (1, time), generator=generator)
    one, other = (model(token_ids.to(model.device)).double().cpu() for model in (before, after))
    return float((one - other).abs().max())


def _new_config(before: GPT2Config, changes: Mapping[str, Any]) -> GPT2Config:
    """The config with the changes, if there is such a model, of these sizes, and it is another one."""
    possible, fix = ", ".join(CHANGES), "`gpt2lab train` makes a model of any size from the start"
    if unknown := [key for key in changes if key not in (*CHANGES, *FIXED)]:
        near = difflib.get_close_matches(unknown[0], CHANGES, n=1, cutoff=0.6)
        fix = f"perhaps {near[0]}" if near else f"one of {possible}"
        raise ConfigError("cannot convert", cause=f"unknown key {', '.join(unknown)}", fix=fix)
    if sizes := [key for key in FIXED if key in changes and changes[key] != getattr(before, key)]:
        cause = "; ".join(f"{key} is {getattr(before, key)}, not {show(changes[key])}" for key in sizes)
        raise ConfigError("cannot convert into a model of another size", cause=cause, fix=f"leave it out; {fix}")
    settings = {f"model.{key}": Setting(value, "the model") for key, value in to_dict(before).items()}
    settings |= {
        f"model.{key}": Setting(value, f"--{key.replace('_', '-')}")
        for key, value in changes.items()
        if key != "head_dim"
    }
    if changes.get("num_kv_heads", 1) is None:
        settings["model.num_kv_heads"] = Setting(before.num_heads, "--num-kv-heads")
    after = build_model_config(settings)
    if after == before:
        cause = "no value differs from the model's" if changes else "no change was given"
        raise ConfigError("nothing to convert", cause=cause, fix=f"give another value to one of {possible}")
    return after


def _finish(work: Work) -> Converted:
    """The weights in a model of their own."""
    with torch.device("meta"):
        model = GPT2.from_config(work.after)
    like = work.weights[EMBEDDING]
    for name, parameter in model.named_parameters():
        if name not in work.weights and name.endswith("bias"):
            work.weights[name] = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
            work.made[name] = "zeros"
    model.load_state_dict(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in work.weights.items()},
        assign=True,
    )
    names = [name for name, _ in model.named_parameters()]
    found = WeightMap(
        loaded=[name for name in names if name not in work.cut and name not in work.made],
        cut=[f"{name} ({work.cut[name]})" for name in names if name in work.cut],
        missing=[f"{name} ({work.made[name]})" for name in names if name in work.made],
        left_over=[f"{name} ({reason})" for name, reason in work.dropped.items()],
    )
    return Converted(model.eval(), found, work.exact, work.approximate)
