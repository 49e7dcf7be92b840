"""What real training steps hold in memory, against what `gpt2lab plan` says: 20 configurations, each in fresh processes.

    python -m tests.campaigns.memory --configs 20

Steps are those of the loop: losses a token, backward, clipping, update, for several micro-batches. Every allocation of a
tensor and of a kernel's working space is an event of torch's profiler; the peak is the highest sum of them. The most
resident memory of the process is printed beside it: Python and torch are in it, and what malloc keeps. Of two processes,
one with the most memory is shown. The test suite runs small ones (tests/test_plan.py).
"""

import argparse
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._profiler import _EventType
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from gpt2lab.config import DataConfig, GPT2Config, OptimConfig, ResolvedConfig, RunConfig, SystemConfig
from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import Routing
from gpt2lab.optim import make_optimizer
from gpt2lab.plan import memory_bytes, resolve
from gpt2lab.system import make_accelerator, peak_memory_bytes

WITHIN = 0.1
SMALL = {"embed_dim": 256, "num_heads": 4, "num_layers": 6, "max_seq_len": 512, "vocab_size": 257}
GPT2_ROWS = {"vocab_size": 50257}
EXPERTS = {"num_experts": 8, "experts_per_token": 2, "num_layers": 3}
WIDE = {"embed_dim": 768, "num_heads": 12, "num_layers": 3, "max_seq_len": 64, "vocab_size": 5000}
BF16, CHECKPOINTING = {"precision": "bf16"}, {"activation_checkpointing": True}
DDP, FSDP = ({"strategy": strategy, "num_processes": 2} for strategy in ("ddp", "fsdp"))

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int, int]] = {
    "bytes": ({}, {}, 4, 2, 0),
    "bytes, one pass": ({}, {}, 4, 1, 0),
    "GPT-2's vocabulary": (GPT2_ROWS | {"num_layers": 2}, {}, 1, 2, 0),
    "untied, softcap, one pass": (GPT2_ROWS | {"tie_head": False, "logit_softcap": 30.0, "num_layers": 2}, {}, 1, 1, 0),
    "wide, few tokens": (WIDE, {}, 4, 2, 0),
    "wide, one pass, sgd": (WIDE, {}, 4, 1, 1),
    "multi-query, rope, qk_norm": ({"num_kv_heads": 1, "position": "rope", "qk_norm": True}, {}, 4, 2, 0),
    "windows": ({"windows": (64, 64, None), "num_kv_heads": 2}, {}, 4, 2, 0),
    "long, windows with padding": ({"windows": (192,), "max_seq_len": 2048}, {}, 1, 2, 0),
    "swiglu, rmsnorm": ({"activation": "swiglu", "norm": "rmsnorm", "bias": False}, {}, 4, 2, 0),
    "relu2": ({"activation": "relu2"}, {}, 4, 2, 0),
    "dropout": ({"dropout": 0.1}, {}, 4, 2, 0),
    "dropout, windows, bf16": ({"dropout": 0.1, "windows": (64,)}, BF16, 4, 2, 0),
    "experts": (EXPERTS, {}, 4, 2, 0),
    "experts, swiglu, bf16": (EXPERTS | {"activation": "swiglu"}, BF16, 4, 2, 0),
    "bf16": ({"vocab_size": 5000}, BF16, 4, 2, 0),
    "bf16, GPT-2's vocabulary": (GPT2_ROWS | {"num_layers": 2}, BF16, 1, 2, 0),
    "checkpointing": ({"num_layers": 18}, CHECKPOINTING, 4, 2, 0),
    "checkpointing, bf16": ({"num_layers": 18, "vocab_size": 5000}, CHECKPOINTING | BF16, 4, 2, 0),
    "ddp": ({}, DDP, 4, 2, 0),
    "ddp, wide": (WIDE, DDP, 4, 1, 0),
    "fsdp": ({}, FSDP, 4, 2, 0),
    "fsdp, wide": (WIDE, FSDP, 4, 2, 0),
    "fsdp, checkpointing, untied": (GPT2_ROWS | {"tie_head": False}, FSDP | CHECKPOINTING, 1, 2, 0),
}
"""Name: changes of the model, of the system, sequences in a micro-batch, micro-batches in a step, 1 for SGD."""


class Recomputed(Routing):
    """A routing that, once it is `read`, is not told again by what checkpointing recomputes."""

    read = False

    def append(self, logits: torch.Tensor, counts: torch.Tensor) -> None:
        super().append(logits, counts)
        if self.read:
            for noted in (self.counts, self.balance_losses, self.z_losses):
                noted.pop()


def make(
    model: dict[str, Any],
    *,
    system: dict[str, Any],
    optim: str,
    micro_batch: int,
    passes: int,
    data: DataConfig | None = None,
) -> ResolvedConfig:
    """A config for a few steps."""
    shape = GPT2Config(**model)
    processes = system.get("num_processes", 1)
    config = RunConfig(
        model=shape,
        system=SystemConfig(**{"precision": "fp32"} | system),
        optim=OptimConfig(name=optim),
        data=data or DataConfig(),
        micro_batch=micro_batch,
        batch_tokens=shape.max_seq_len * micro_batch * passes * processes,
        steps=3,
    )
    return resolve(config, 257, 10**6, "cpu", 10**10)[0]


def train(config: ResolvedConfig) -> None:
    """Steps as the loop makes them, on tokens drawn at random."""
    accelerator = make_accelerator(config.system.precision, torch.device("cpu"))
    model = GPT2.from_config(config.model).train()
    if config.system.activation_checkpointing:
        for block in model.layers:
            vars(block)["forward"] = functools.partial(checkpoint, block.forward, use_reentrant=False)
    module = wrap(accelerator.prepare_model(model, evaluation_mode=True), model, config.system.strategy)
    optimizer = make_optimizer(model, config.optim)
    processes = config.system.num_processes or 1
    passes = config.batch_tokens // (config.seq_len * config.micro_batch * processes)
    borders = Borders(0, config.data.attend_across, config.data.restart_positions)
    for _ in range(2):
        for number in range(passes):
            drawn = torch.randint(config.model.vocab_size or 1, (config.micro_batch, config.seq_len + 1))
            token_ids, targets = drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
            routing = Recomputed() if config.model.num_experts > 1 else None
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = number == passes - 1
            loss = module(token_ids, targets, routing=routing, **borders(token_ids)).sum() / config.batch_tokens
            if routing is not None:
                loss = loss + 0.01 * routing.balance_loss + 0.001 * routing.z_loss
                routing.read = True
            accelerator.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()


def wrap(module: nn.Module, model: GPT2, strategy: str) -> nn.Module:
    """The module as a strategy wraps it."""
    if strategy == "ddp":
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    if strategy == "fsdp":
        for part in (*model.layers, model):
            fully_shard(part)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    return module


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes of tensors that are held at once of those that `work` makes."""
    gc.collect()  # what others left is not given back meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    held: dict[int, int] = {}
    total = peak = 0
    found = all_events(profiled.profiler.kineto_results.experimental_event_tree())
    for event in sorted((e for e in found if e.tag == _EventType.Allocation), key=lambda event: event.start_time_ns):
        allocated = event.extra_fields
        # A place that is given again was free: another thread (gloo's) gave it back, which this profile does not see.
        total -= held.pop(allocated.ptr, 0)
        if allocated.alloc_size > 0:
            held[allocated.ptr] = allocated.alloc_size
            total += allocated.alloc_size
        peak = max(peak, total)
    return peak


def all_events(events: list[Any]) -> Iterator[Any]:
    """A profile's events and those inside them."""
    for event in events:
        yield event
        yield from all_events(event.children)


def measure(name: str, rank: int, store: str) -> dict[str, int]:
    """Peak bytes of tensors and of the process, here."""
    config = named(name)
    processes = config.system.num_processes or 1
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
    tensors = peak_bytes(lambda: train(config))
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()
    return {"tensors": tensors, "resident": peak_memory_bytes(torch.device("cpu"))}


def named(name: str) -> ResolvedConfig:
    """The config of a row of the table."""
    model, system, micro_batch, passes, sgd = CONFIGS[name]
    return make(SMALL | model, system=system, optim="sgd" if sgd else "adamw", micro_batch=micro_batch, passes=passes)


def in_fresh_processes(name: str) -> dict[str, int]:
    """The peaks of a config, the higher of all processes."""
    processes = named(name).system.num_processes or 1
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.campaigns.memory",
            "--measure",
            name,
            "--store",
            str(Path(folder, "store")),
        ]
        running = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            for rank in range(processes)
        ]
        found = [json.loads(process.communicate()[0]) for process in running]
    return {key: max(one[key] for one in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=int, default=len(CONFIGS), help="how many, from the first")
    parser.add_argument("--only", choices=CONFIGS, help="one of them")
    parser.add_argument("--measure", choices=CONFIGS, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure, chosen.rank, chosen.store)))
        return
    worst = 0.0
    print(f"{'':36} forecast  measured  ratio  resident (MB)")
    for name in [chosen.only] if chosen.only else list(CONFIGS)[: chosen.configs]:
        found, forecast = in_fresh_processes(name), memory_bytes(named(name))["total"]
        ratio = forecast / found["tensors"]
        worst = max(worst, abs(ratio - 1))
        print(
            f"{name:36} {forecast / 1e6:8,.0f}  {found['tensors'] / 1e6:8,.0f}  {ratio:.3f}  {found['resident'] / 1e6:8,.0f}",
            flush=True,
        )
    print(f"{'all' if worst <= WITHIN else 'NOT all'} within {WITHIN:.0%}; the worst is off by {worst:.1%}")
    sys.exit(worst > WITHIN)


if __name__ == "__main__":
    main()
