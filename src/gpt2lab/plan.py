"""What a run will be: the settings a recipe leaves open, each with its reason, and what the run will need."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from gpt2lab.config import GPT2Config, ResolvedConfig, RunConfig
from gpt2lab.data.batches import epoch_samples
from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import default_warmup
from gpt2lab.tracking import clock, size

ENOUGH_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 65536}
"""Tokens in a forward pass beyond which a device gets no faster, and the caches only colder."""
_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Derived:
    """A setting that was left open, what it became, and why."""

    key: str
    value: Any
    reason: str


def resolve(
    config: RunConfig, vocab_size: int, train_tokens: int, device: str, memory: int
) -> tuple[ResolvedConfig, list[Derived]]:
    """Fill what a recipe leaves open; a pure function of its arguments.

    Args:
        vocab_size: of the tokenizer.
        train_tokens: in the training text.
        device: "cpu", "cuda" or "mps".
        memory: bytes that are free there.
    """
    derived: list[Derived] = []

    def fill(key: str, given: Any, value: Any, reason: str) -> Any:
        if given is not None:
            return given
        derived.append(Derived(key, value, reason))
        return value

    model = config.model
    vocab_size = fill("model.vocab_size", model.vocab_size, vocab_size, "the tokenizer's")
    model = replace(
        model, vocab_size=vocab_size, num_kv_heads=model.kv_dim // model.head_dim, ff_hidden_dim=model.hidden_dim
    )
    seq_len = fill("seq_len", config.seq_len, model.max_seq_len, "model.max_seq_len")

    epochs, samples, per_epoch = (
        config.epochs or 1.0,
        config.batch_tokens // seq_len,
        epoch_samples(train_tokens, seq_len),
    )
    reason = f"{epochs:g} epochs of {per_epoch} samples, {samples} a step"
    steps = fill("steps", config.steps, math.ceil(epochs * per_epoch / samples), reason)

    optim = config.optim
    warmup = fill("optim.warmup_steps", optim.warmup_steps, default_warmup(steps), "a fiftieth of the steps")
    floor = fill("optim.min_learning_rate", optim.min_learning_rate, optim.learning_rate / 10, "a tenth of the peak")
    optim = replace(optim, warmup_steps=warmup, min_learning_rate=floor)

    given = {field.name: getattr(config, field.name) for field in fields(config)}
    filled = {"model": model, "seq_len": seq_len, "steps": steps, "epochs": None, "optim": optim}
    resolved = ResolvedConfig(**given | filled | {"micro_batch": config.micro_batch or 1})
    reason = (
        f"the most that divides {samples}, fits half of {size(memory)} and is at most {ENOUGH_TOKENS[device]} tokens"
    )
    fitting = _fitting_micro_batch(resolved, ENOUGH_TOKENS[device], memory // 2)
    return replace(resolved, micro_batch=fill("micro_batch", config.micro_batch, fitting, reason)), derived


def _fitting_micro_batch(config: ResolvedConfig, max_tokens: int, max_bytes: int) -> int:
    samples = config.batch_tokens // config.seq_len
    candidates = [n for n in range(1, min(samples, max_tokens // config.seq_len) + 1) if samples % n == 0]
    fitting = [n for n in candidates if memory_bytes(replace(config, micro_batch=n))["total"] <= max_bytes]
    return max(fitting, default=1)


def flops_per_token(model: GPT2Config, seq_len: int) -> float:
    """Forward and backward FLOPs of one token: 6 for each weight of a matrix product, 12 for each visible key and channel.

    Attention is counted as it is needed: causal, and inside the windows; of experts, those that work on the token.
    """
    attn = model.embed_dim * (2 * model.embed_dim + 2 * model.kv_dim)
    layer = (
        attn + model.embed_dim * _active_hidden(model) + (model.num_experts > 1) * model.embed_dim * model.num_experts
    )
    windows = model.windows or (None,)
    keys = sum(mean_visible_keys(seq_len, windows[layer % len(windows)]) for layer in range(model.num_layers))
    return 6.0 * (model.num_layers * layer + model.padded_vocab_size * model.embed_dim) + 12.0 * model.embed_dim * keys


def _active_hidden(model: GPT2Config) -> int:
    """Columns of all matrices between the residual stream and the MLPs that work on a token, up and down."""
    return model.experts_per_token * model.hidden_dim * (ACTIVATIONS[model.activation].inputs + 1)


def mean_visible_keys(seq_len: int, window: int | None) -> float:
    """Keys a token sees on average in a sequence, itself included."""
    reach = min(window or seq_len, seq_len)
    return reach - reach * (reach - 1) / (2 * seq_len)


def kv_bytes_per_token(model: GPT2Config, bytes_per_number: int = 2) -> int:
    """Bytes that one more token adds to the cache, in all layers (a windowed layer later gives the same back)."""
    return 2 * model.num_layers * model.kv_dim * bytes_per_number


def memory_bytes(config: ResolvedConfig) -> dict[str, int]:
    """Bytes that a training step holds, by purpose. Activations count what the backward pass reads again."""
    model, rows = config.model, config.micro_batch * config.seq_len
    width = _BYTES.get(config.system.precision, 4)
    weights = 4 * sum(p.numel() for p in meta_model(model).parameters())
    # Of one block: two norms in fp32 (input and output of each), q k v and what attention gives back, the MLP before and
    # after its nonlinearity; with experts, what each is given and gives back.
    routed = 2 * model.embed_dim * model.experts_per_token if model.num_experts > 1 else 0
    block = 4 * 4 * model.embed_dim + width * (2 * model.embed_dim + 2 * model.kv_dim + _active_hidden(model) + routed)
    # Of the head: the product, its fp32 copy where it is coarser, the log-softmax and its gradient.
    head = model.padded_vocab_size * (width + (4 if width == 2 else 0) + 4 + 4)
    parts = {
        "weights": weights,
        "gradients": weights,
        "optimizer": weights * (2 if config.optim.name == "adamw" else 1),
        "activations": rows * model.num_layers * block,
        "logits": rows * head,
    }
    return parts | {"total": sum(parts.values())}


def meta_model(model: GPT2Config) -> GPT2:
    """A model without storage, for counting."""
    with torch.device("meta"):
        return GPT2.from_config(model)


@dataclass(frozen=True)
class Plan:
    """What ``gpt2lab plan`` reports: bytes, FLOPs, and a time forecast from this machine's rate of products."""

    parameters: int
    flops_per_token: float
    memory_bytes: dict[str, int]
    kv_bytes_per_token: int
    tokens: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {size(count)}" for name, count in self.memory_bytes.items() if name != "total")
        return [
            f"parameters   {self.parameters:,}",
            f"work         {self.flops_per_token / 1e6:,.1f} MFLOP a token, forward and backward",
            f"memory       {size(self.memory_bytes['total'])}: {parts}; Python and torch come on top",
            f"KV cache     {self.kv_bytes_per_token:,} bytes a token in 16 bits",
            f"time         {clock(self.seconds)} at least for {self.tokens:,} tokens: the products alone, at their best here",
        ]


def make_plan(config: ResolvedConfig, rate: float) -> Plan:
    """The plan of a config with nothing left open, on a machine that does `rate` FLOP/s in matrix products."""
    tokens, work = config.steps * config.batch_tokens, flops_per_token(config.model, config.seq_len)
    return Plan(
        parameters=meta_model(config.model).num_parameters(),
        flops_per_token=work,
        memory_bytes=memory_bytes(config),
        kv_bytes_per_token=kv_bytes_per_token(config.model),
        tokens=tokens,
        seconds=tokens * work / rate,
    )
