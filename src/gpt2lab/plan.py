"""What a run will be: the settings a recipe leaves open, each with its reason, and what the run will need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from gpt2lab.config import GPT2Config, ResolvedConfig, RunConfig
from gpt2lab.data.samples import epoch_samples
from gpt2lab.errors import ResourceError
from gpt2lab.memory import activation_bytes, meta_model, peak
from gpt2lab.model.activation import ACTIVATIONS
from gpt2lab.optim import default_warmup
from gpt2lab.strategy import choose_strategy
from gpt2lab.tracking import clock, size

ENOUGH_TOKENS = {"cpu": 4096, "mps": 16384, "cuda": 65536}
"""Tokens in a forward pass beyond which a device gets no faster, and the caches only colder."""

EXACT_PASSES = 4
"""Micro-batches that an exact step has at least, so that up to so many processes have work."""


@dataclass(frozen=True)
class Derived:
    """A setting that was left open, what it became, and why."""

    key: str
    value: Any
    reason: str


def resolve(
    config: RunConfig,
    vocab_size: int,
    train_tokens: int,
    device: str,
    memory: int,
    world_size: int = 1,
    *,
    per_epoch: int | None = None,
) -> tuple[ResolvedConfig, list[Derived]]:
    """Fill what a recipe leaves open; a pure function of its arguments.

    Args:
        vocab_size: of the tokenizer.
        train_tokens: in the training text.
        device: "cpu", "cuda" or "mps".
        memory: bytes that are free there, for each process.
        world_size: processes that share the work.
        per_epoch: samples in an epoch. None: those of text that is cut wherever documents begin.
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

    epochs, samples = config.epochs or 1.0, config.batch_tokens // seq_len
    per_epoch = per_epoch or epoch_samples(train_tokens, seq_len)
    reason = f"{epochs:g} epochs of {per_epoch} samples, {samples} a step"
    steps = fill("steps", config.steps, math.ceil(epochs * per_epoch / samples), reason)

    optim = config.optim
    warmup = fill("optim.warmup_steps", optim.warmup_steps, default_warmup(steps), "a fiftieth of the steps")
    floor = fill("optim.min_learning_rate", optim.min_learning_rate, optim.learning_rate / 10, "a tenth of the peak")
    optim = replace(optim, warmup_steps=warmup, min_learning_rate=floor)

    given = {field.name: getattr(config, field.name) for field in fields(config)}
    filled = {"model": model, "seq_len": seq_len, "steps": steps, "epochs": None, "optim": optim}
    resolved = ResolvedConfig(**given | filled | {"micro_batch": config.micro_batch or 1})
    fitting, reason = _default_micro_batch(resolved, device, memory // 2, world_size)
    return replace(resolved, micro_batch=fill("micro_batch", config.micro_batch, fitting, reason)), derived


def _default_micro_batch(config: ResolvedConfig, device: str, max_bytes: int, world_size: int) -> tuple[int, str]:
    """Sequences in a forward pass, and why so many."""
    samples, most = config.batch_tokens // config.seq_len, ENOUGH_TOKENS[device]
    candidates = [n for n in range(1, min(samples, most // config.seq_len) + 1) if samples % n == 0]
    limit = f"at most {most} tokens"
    if config.system.exact:  # what a step adds up must not depend on the machine
        several = [n for n in candidates if samples // n >= EXACT_PASSES]
        return max(several, default=1), f"the most that divides {samples} into {EXACT_PASSES} or more and is {limit}"
    even = [n for n in candidates if samples // n % world_size == 0]
    enough = [n for n in candidates if samples // n >= world_size]
    shared = even or enough
    fitting = (
        n
        for n in reversed(shared)
        if memory_bytes(replace(config, micro_batch=n), device, world_size)["total"] <= max_bytes
    )
    each = "" if world_size == 1 else f" for each of {world_size} processes"
    return next(fitting, 1), f"the most that divides {samples}{each}, fits half of {size(2 * max_bytes)} and is {limit}"


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


def memory_bytes(config: ResolvedConfig, device: str = "cpu", world_size: int | None = None) -> dict[str, int]:
    """Bytes that a process holds at the peak of a training step, by purpose.

    Args:
        device: "cpu", "cuda" or "mps".
        world_size: processes. None: those that the config starts, or 1.
    """
    moment = peak(config, device, world_size)
    return moment.parts | {"total": moment.total}


def cheapest_fit(
    config: ResolvedConfig, available_bytes: int, device: str = "cpu", world_size: int | None = None
) -> tuple[str, ResolvedConfig] | None:
    """The change that makes a step fit and costs the least speed, as words for a fix and as a config; None: no single one.

    A smaller micro_batch comes first, then activation checkpointing, then shards where there are several processes. A
    smaller seq_len comes last: it changes what is learned.
    """
    for words, changed in _smaller(config, world_size or config.system.num_processes or 1):
        total = memory_bytes(changed, device, world_size)["total"]
        if total <= available_bytes:
            return f"{words} ({size(total)})", changed
    return None


def _smaller(config: ResolvedConfig, world_size: int) -> Iterator[tuple[str, ResolvedConfig]]:
    samples, system = config.batch_tokens // config.seq_len, config.system
    for count in reversed(range(1, config.micro_batch)):
        if samples % count == 0:
            yield f"--micro_batch={count}", replace(config, micro_batch=count)
    if not system.activation_checkpointing:
        checkpointing = replace(config, system=replace(system, activation_checkpointing=True))
        yield "--system.activation_checkpointing=true", checkpointing
    if world_size > 1 and choose_strategy(config.system.strategy, world_size) != "fsdp":
        yield "--system.strategy=fsdp", replace(config, system=replace(system, strategy="fsdp"))
    seq_len = config.seq_len
    while seq_len % 2 == 0:
        seq_len //= 2
        yield f"--seq_len={seq_len}", replace(config, seq_len=seq_len)


def explain(
    config: ResolvedConfig, available_bytes: int, device: str = "cpu", world_size: int | None = None
) -> ResourceError:
    """Out of memory, as the plan of a step and the cheapest change that fits."""
    needed = memory_bytes(config, device, world_size)
    fitting = cheapest_fit(config, available_bytes, device, world_size)
    return ResourceError(
        "out of memory",
        cause=f"a step holds {size(needed['total'])} ({_listed(needed)}), and {size(available_bytes)} can be had",
        fix=fitting[0] if fitting else "a smaller model (model.num_layers, model.embed_dim): no single change fits",
    )


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count and name != "total")


@dataclass(frozen=True)
class Plan:
    """What ``gpt2lab plan`` reports: bytes, FLOPs, and a time forecast from this machine's rate of products.

    Attributes:
        memory_bytes: of one process at the peak of a step, by purpose; `memory_moment` says when that is.
        activation_bytes: what a forward pass leaves for the backward pass, by part.
        strategy_bytes: of one process at the peak, for each way to share the work; {} for one process.
    """

    parameters: int
    flops_per_token: float
    memory_bytes: dict[str, int]
    memory_moment: str
    activation_bytes: dict[str, int]
    strategy_bytes: dict[str, int]
    kv_bytes_per_token: int
    tokens: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        a_process = " a process" if self.strategy_bytes else ""
        strategies = [f"  {name:10} {size(count)} a process" for name, count in self.strategy_bytes.items()]
        return [
            f"parameters   {self.parameters:,}",
            f"work         {self.flops_per_token / 1e6:,.1f} MFLOP a token, forward and backward",
            f"memory       {size(self.memory_bytes['total'])}{a_process} at most, {self.memory_moment}: "
            f"{_listed(self.memory_bytes)}; Python and torch come on top",
            f"activations  {size(sum(self.activation_bytes.values()))} for the backward pass: {_listed(self.activation_bytes)}",
            *strategies,
            f"KV cache     {self.kv_bytes_per_token:,} bytes a token in 16 bits",
            f"time         {clock(self.seconds)} at least for {self.tokens:,} tokens: the products alone, at their best here",
        ]


def make_plan(config: ResolvedConfig, rate: float, device: str = "cpu", world_size: int | None = None) -> Plan:
    """The plan of a config with nothing left open.

    Args:
        rate: FLOP/s in matrix products, of all processes together.
        device: "cpu", "cuda" or "mps".
        world_size: processes. None: those that the config starts, or 1.
    """
    processes = world_size or config.system.num_processes or 1
    moment = peak(config, device, processes)
    tokens, work = config.steps * config.batch_tokens, flops_per_token(config.model, config.seq_len)
    return Plan(
        parameters=meta_model(config.model).num_parameters(),
        flops_per_token=work,
        memory_bytes=moment.parts | {"total": moment.total},
        memory_moment=moment.name,
        activation_bytes=activation_bytes(config, device),
        strategy_bytes=_strategies(config, device, processes) if processes > 1 else {},
        kv_bytes_per_token=kv_bytes_per_token(config.model),
        tokens=tokens,
        seconds=tokens * work / rate,
    )


def _strategies(config: ResolvedConfig, device: str, processes: int) -> dict[str, int]:
    def total(strategy: Literal["single", "ddp", "fsdp"], world_size: int) -> int:
        system = replace(config.system, strategy=strategy, shard_size=None, offload=False)
        return memory_bytes(replace(config, system=system), device, world_size)["total"]

    return {
        "single": total("single", 1),
        f"ddp {processes}": total("ddp", processes),
        f"fsdp {processes}": total("fsdp", processes),
    }
