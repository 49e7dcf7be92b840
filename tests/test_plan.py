"""What a run will need: formulas compared with counting, in a brute-force loop or in a real model."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gpt2lab.config import DataConfig, GPT2Config, OptimConfig, ResolvedConfig, RunConfig, SystemConfig
from gpt2lab.memory import activation_bytes, meta_model, moments
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import make_optimizer
from gpt2lab.plan import (
    cheapest_fit,
    explain,
    flops_per_token,
    kv_bytes_per_token,
    make_plan,
    mean_visible_keys,
    memory_bytes,
    resolve,
)
from gpt2lab.tracking import size
from tests.campaigns import memory

SMALL = {"vocab_size": 61, "max_seq_len": 64, "embed_dim": 32, "num_heads": 4, "num_layers": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gqa": {"num_kv_heads": 2},
    "mqa, rope, narrow": {"num_kv_heads": 1, "position": "rope", "ff_hidden_dim": 40},
    "windows": {"windows": (5, None)},
    "swiglu": {"activation": "swiglu"},
    "swiglu, narrow, no bias, rmsnorm": {"activation": "swiglu", "ff_hidden_dim": 40, "bias": False, "norm": "rmsnorm"},
    "untied": {"tie_head": False, "logit_softcap": 5.0, "qk_norm": True},
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "one of three experts": {"num_experts": 3, "ff_hidden_dim": 40},
    "all experts, swiglu": {"num_experts": 3, "experts_per_token": 3, "activation": "swiglu"},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def resolved(model: GPT2Config, **changes: Any) -> ResolvedConfig:
    batch = {"batch_tokens": model.max_seq_len * 8, **changes}
    return resolve(RunConfig(model=model, **batch), 61, 10_000, "cpu", 10**10)[0]


# --- Parameters and FLOPs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_the_published_sizes(preset: str, parameters: int) -> None:
    assert meta_model(GPT2Config.from_preset(preset)).num_parameters() == parameters
    assert meta_model(GPT2Config.from_preset(preset, num_kv_heads=1)).num_parameters() < parameters


def test_flops_of_124m_by_hand() -> None:
    width, layers, rows, seq_len = 768, 12, 50304, 1024
    matrices = layers * (4 * width**2 + 8 * width**2) + rows * width
    attention = layers * 2 * width * (seq_len + 1) / 2  # scores and values: a product each, over half of the square
    assert flops_per_token(GPT2Config(), seq_len) == pytest.approx(6 * (matrices + attention), rel=1e-12)
    assert f"{flops_per_token(GPT2Config(vocab_size=50257), 1024) / 1e6:.1f}" == "798.1"
    assert f"{flops_per_token(GPT2Config(), 512) / 1e6:.1f}" != "798.1"


@each_variant
def test_flops_of_the_matrices_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    config = GPT2Config(**SMALL, **changes)
    model, tokens = GPT2.from_config(config), torch.randint(61, (2, 33))
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    counted = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    windows = config.windows or (None,)
    attention = 12 * config.embed_dim * sum(mean_visible_keys(32, windows[layer % len(windows)]) for layer in range(2))
    assert attention > 0 and counted == 64 * (flops_per_token(config, 32) - attention)


@given(st.integers(1, 60), st.none() | st.integers(1, 80))
def test_visible_keys_are_those_a_loop_counts(seq_len: int, window: int | None) -> None:
    def count(reach: int) -> int:
        return sum(q - k < reach for q in range(seq_len) for k in range(q + 1))

    reach = seq_len if window is None else window
    assert mean_visible_keys(seq_len, window) == pytest.approx(count(reach) / seq_len, rel=1e-12)
    assert reach >= seq_len or mean_visible_keys(seq_len, window) != pytest.approx(
        count(reach + 1) / seq_len, rel=1e-12
    )


def test_a_window_costs_less_and_one_that_sees_everything_the_same() -> None:
    full, wide, narrow = (flops_per_token(GPT2Config(windows=w), 1024) for w in (None, (1024,), (64,)))
    assert full == wide > narrow > flops_per_token(GPT2Config(windows=(1,)), 1024)


def test_experts_cost_what_works_and_not_what_there_is() -> None:
    """A router costs its matrix. Two experts of half the width cost what one MLP does; idle ones cost nothing more."""
    width, hidden, layers = 768, 3072, 12

    def flops(**changes: Any) -> float:
        return flops_per_token(GPT2Config(**changes), 1024)

    routers = {count: 6 * layers * width * count for count in (2, 4, 64)}
    assert flops(num_experts=4, experts_per_token=2, ff_hidden_dim=hidden // 2) == flops() + routers[4]
    assert flops(num_experts=4) == flops() + routers[4]
    assert flops(num_experts=64) == flops() + routers[64]
    assert flops(num_experts=2, experts_per_token=2) == flops() + routers[2] + 6 * layers * 2 * width * hidden
    assert flops(activation="swiglu") == flops(ff_hidden_dim=2048) + 6 * layers * width * 2048  # a third matrix
    assert flops(tie_head=False) == flops()


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_kv_heads", "expected"), [(None, 36_864), (12, 36_864), (4, 12_288), (1, 3_072)])
def test_kv_bytes_of_124m(num_kv_heads: int | None, expected: int) -> None:
    assert kv_bytes_per_token(GPT2Config(num_kv_heads=num_kv_heads)) == expected
    assert kv_bytes_per_token(GPT2Config(num_kv_heads=num_kv_heads), 4) == 2 * expected


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_kv_bytes_are_what_the_cache_grows_by(num_kv_heads: int) -> None:
    model = GPT2.from_config(GPT2Config(**SMALL, num_kv_heads=num_kv_heads))
    grown = model.new_cache(1, 41, torch.float16).nbytes - model.new_cache(1, 40, torch.float16).nbytes
    assert grown == kv_bytes_per_token(model.config) == 2 * 2 * num_kv_heads * 8 * 2


@each_variant
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weights_gradients_and_optimizer_are_those_of_a_real_model(changes: dict[str, Any], name: str) -> None:
    config = resolved(GPT2Config(**SMALL, **changes), optim=OptimConfig(name=name), micro_batch=1)
    model = GPT2.from_config(config.model)
    optimizer, tokens = make_optimizer(model, config.optim), torch.randint(61, (2, 33))
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    optimizer.step()
    forecast = next(moments(config)).parts
    assert forecast["weights"] == sum(p.nbytes for p in model.parameters())
    assert forecast["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    averages = [
        x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()
    ]
    assert forecast["optimizer"] == sum(x.nbytes for x in averages) > 0
    shown = memory_bytes(config)
    assert shown["total"] == sum(count for part, count in shown.items() if part != "total") >= sum(forecast.values())
    assert forecast["weights"] != memory_bytes(resolved(GPT2Config(**SMALL | {"num_layers": 3}, **changes)))["weights"]


def test_memory_grows_with_the_micro_batch_and_shrinks_with_the_precision() -> None:
    config = resolved(GPT2Config(**SMALL), micro_batch=2)
    one, two = (next(moments(dataclasses.replace(config, micro_batch=count))).parts for count in (1, 2))
    assert two["activations"] == 2 * one["activations"] and two["logits"] == 2 * one["logits"]
    assert two["weights"] == one["weights"]
    in_fp32, in_bf16 = (
        next(moments(dataclasses.replace(config, system=SystemConfig(precision=precision)))).parts
        for precision in ("fp32", "bf16")
    )
    assert in_bf16["activations"] < in_fp32["activations"] and in_bf16["weights"] == in_fp32["weights"]


def test_experts_take_memory_where_they_are() -> None:
    """All of them in weights, gradients and moments; only those that work in activations."""

    def parts(**changes: Any) -> dict[str, int]:
        return next(moments(resolved(GPT2Config(**SMALL, **changes), micro_batch=2))).parts

    dense, eight, two_of_eight = parts(), parts(num_experts=8), parts(num_experts=8, experts_per_token=2)
    one_mlp, router = 4 * (32 * 128 + 128 + 128 * 32 + 32), 4 * 8 * 32
    assert eight["weights"] == two_of_eight["weights"] == dense["weights"] + 2 * (7 * one_mlp + router)
    assert eight["optimizer"] == 2 * eight["gradients"] == 2 * eight["weights"]
    assert parts(num_experts=16)["activations"] == eight["activations"]
    assert dense["logits"] == eight["logits"] and dense["activations"] < eight["activations"]
    assert two_of_eight["activations"] > 1.3 * eight["activations"]
    assert parts(tie_head=False)["weights"] == dense["weights"] + 4 * 64 * 32


MEASURED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "loss": ({"vocab_size": 3000}, {}, 4),
    "MLP": ({"activation": "swiglu", "position": "rope", "num_kv_heads": 2}, {}, 4),
    "windows, one pass": ({"windows": (40, None), "norm": "rmsnorm", "tie_head": False}, {}, 8),
    "dropout in 16 bits": ({"dropout": 0.1, "num_experts": 4}, {"precision": "bf16"}, 4),
    "checkpointing": ({"num_layers": 8}, {"activation_checkpointing": True}, 4),
}
"""Changes of the model and of the system, and sequences in a micro-batch; 8 make a step."""


def measured_and_config(name: str) -> tuple[int, ResolvedConfig]:
    model, system, micro_batch = MEASURED[name]
    shape = {"vocab_size": 64, "max_seq_len": 256, "embed_dim": 64, "num_heads": 4, "num_layers": 3} | model
    config = memory.make(shape, system=system, optim="adamw", micro_batch=micro_batch, passes=8 // micro_batch)
    return memory.peak_bytes(lambda: memory.train(config)), config


@pytest.mark.parametrize("name", MEASURED)
def test_the_peak_is_that_of_real_steps(name: str) -> None:
    """What the allocator gave, in two steps with forward, backward, clipping and update."""
    measured, config = measured_and_config(name)
    forecast = memory_bytes(config)
    print(f"{measured:,} bytes were held at once; the forecast is {forecast['total'] / measured:.3f} of them")
    assert forecast["total"] == pytest.approx(measured, rel=0.05)
    # Controls: a plan that forgets a part, or is of another batch, is off by more than it may be.
    least = "logits" if name == "loss" else "activations"
    assert forecast["total"] - forecast[least] != pytest.approx(measured, rel=0.1)
    other = dataclasses.replace(config, micro_batch=2)
    assert memory_bytes(other)["total"] != pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("windows", [None, (32,)])
def test_the_masks_of_documents_are_in_the_peak(windows: tuple[int, ...] | None) -> None:
    """One for each sequence, or for each block of queries and head."""
    shape = {"vocab_size": 64, "max_seq_len": 512, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "windows": windows}
    alone = DataConfig(attend_across=False)
    config = memory.make(shape, system={}, optim="adamw", micro_batch=4, passes=2, data=alone)
    measured = memory.peak_bytes(lambda: memory.train(config))
    assert memory_bytes(config)["total"] == pytest.approx(measured, rel=0.05)
    assert memory_bytes(dataclasses.replace(config, data=DataConfig()))["total"] < 0.9 * measured


@each_variant
def test_activations_are_what_the_backward_pass_is_left(changes: dict[str, Any]) -> None:
    """Bytes that autograd keeps, each once, besides the weights."""
    model, tokens = GPT2.from_config(GPT2Config(**SMALL, **changes)), torch.randint(61, (4, 65))
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() not in weights else 0
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        losses = model(tokens[:, :-1], tokens[:, 1:])
    forecast = sum(activation_bytes(resolved(GPT2Config(**SMALL, **changes), micro_batch=4)).values())
    forecast += 4 * 64 * 61 * 4 * (2 if "logit_softcap" in changes else 1)  # log-softmax, and tanh
    found = sum(kept.values()) / forecast
    print(f"{sum(kept.values()):,} bytes are kept, {found:.3f} of the forecast")
    assert 0.95 < found < 1.05 and losses.requires_grad


def test_a_process_holds_less_with_shards_and_more_with_replicas() -> None:
    """Weights, gradients and optimizer are whole in each replica, beside buckets; a shard is a part, beside two groups."""
    model = GPT2Config(**SMALL | {"num_layers": 8, "embed_dim": 64})

    def lasting(strategy: str, **changes: Any) -> dict[str, int]:
        system = SystemConfig(strategy=strategy, num_processes=4, **changes)
        *_, last = moments(resolved(model, micro_batch=1, system=system))
        return last.parts

    [whole] = {sum(p.nbytes for p in meta_model(model).parameters())}
    *_, single = moments(resolved(model, micro_batch=1))
    ddp, fsdp, pairs = lasting("ddp"), lasting("fsdp"), lasting("fsdp", shard_size=2)
    assert single.parts["weights"] == single.parts["gradients"] == ddp["weights"] == whole
    assert ddp["gradients"] == 2 * whole
    assert fsdp["weights"] == fsdp["gradients"] == whole // 4 and fsdp["optimizer"] == whole // 2
    assert pairs["weights"] == whole // 2 and lasting("fsdp", offload=True)["optimizer"] == 0
    exact = lasting("ddp", exact=True)["gradients"]
    assert exact == whole + 2 * whole + whole  # buckets, integers twice as wide, what they are turned into
    totals = {
        strategy: memory_bytes(resolved(model, micro_batch=1, system=SystemConfig(strategy=strategy, num_processes=4)))[
            "total"
        ]
        for strategy in ("ddp", "fsdp")
    }
    assert totals["fsdp"] < totals["ddp"]


def test_the_cheapest_change_that_fits_is_named_and_fits() -> None:
    model = GPT2Config(**SMALL | {"max_seq_len": 256, "num_layers": 8})
    config = resolved(model, batch_tokens=256 * 8, micro_batch=8)

    def needs(**changes: Any) -> int:
        return memory_bytes(dataclasses.replace(config, **changes))["total"]

    one = dataclasses.replace(config, micro_batch=1)
    kept_less = SystemConfig(activation_checkpointing=True)
    wanted = {
        needs(micro_batch=4): (config, "--micro_batch=4"),
        needs(micro_batch=4) - 1: (config, "--micro_batch=2"),
        needs(micro_batch=1, system=kept_less): (one, "--system.activation_checkpointing=true"),
        needs(micro_batch=1, seq_len=32): (one, "--seq_len=32"),
    }
    for available, (start, words) in wanted.items():
        found = cheapest_fit(start, available)
        assert found is not None and found[0].startswith(f"{words} (") and found[0].endswith("B)")
        assert memory_bytes(found[1])["total"] <= available
        *_, flag = words.split("--")
        key, _, value = flag.partition("=")
        changed = functools.reduce(getattr, key.split("."), found[1])
        assert changed == yaml.safe_load(value)
    assert cheapest_fit(config, 1000) is None


def test_out_of_memory_is_explained_by_the_plan() -> None:
    config = resolved(GPT2Config(**SMALL), micro_batch=8)
    needed, fits = memory_bytes(config), memory_bytes(dataclasses.replace(config, micro_batch=4))["total"]
    error = explain(config, fits)
    assert error.exit_code == 5 and error.fix.startswith("--micro_batch=4 (")
    assert all(text in error.cause for text in (size(needed["total"]), size(fits), f"logits {size(needed['logits'])}"))
    assert "smaller model" in explain(config, 1000).fix


# --- What a recipe leaves open ----------------------------------------------------------------------------------------


def test_what_is_left_open_is_filled_and_said() -> None:
    config = RunConfig(model=GPT2Config(**SMALL | {"vocab_size": None}), batch_tokens=512, epochs=2)
    settled, derived = resolve(config, vocab_size=61, train_tokens=10_000, device="cpu", memory=10**10)
    said = {item.key: item.value for item in derived}
    assert said == {
        "model.vocab_size": 61, "seq_len": 64, "steps": 39, "optim.warmup_steps": 1, "micro_batch": 8,
        "optim.min_learning_rate": pytest.approx(6e-5),
    }  # fmt: skip
    assert (settled.model.vocab_size, settled.seq_len, settled.steps, settled.micro_batch) == (61, 64, 39, 8)
    assert (settled.model.num_kv_heads, settled.model.ff_hidden_dim, settled.epochs) == (4, 128, None)
    assert 39 == -(-2 * (10_000 // 64 - 1) // 8) and all(item.reason for item in derived)


def test_what_is_given_is_kept() -> None:
    optim = OptimConfig(warmup_steps=3, min_learning_rate=0.0)
    config = RunConfig(model=GPT2Config(**SMALL), batch_tokens=512, steps=9, seq_len=32, micro_batch=2, optim=optim)
    settled, derived = resolve(config, vocab_size=50, train_tokens=10_000, device="cpu", memory=10**10)
    assert not derived and settled.optim == optim and settled.model.vocab_size == 61
    assert (settled.steps, settled.seq_len, settled.micro_batch) == (9, 32, 2)
    again, derived = resolve(settled, vocab_size=50, train_tokens=99, device="cuda", memory=10**6)
    assert again == settled and not derived


def test_a_micro_batch_divides_the_step_fits_and_is_not_larger_than_helps() -> None:
    config = RunConfig(model=GPT2Config(**SMALL), batch_tokens=120 * 64, steps=9)
    chosen = []
    for device, free in (("cuda", 10**10), ("cpu", 10**10), ("cpu", 4 * 10**6), ("cpu", 1)):
        settled, _ = resolve(config, 61, 10_000, device, free)
        possible = [
            n
            for n in range(1, 121)
            if 120 % n == 0
            and n * 64 <= {"cpu": 4096, "cuda": 65536}[device]
            and memory_bytes(dataclasses.replace(settled, micro_batch=n))["total"] <= free / 2
        ]
        assert settled.micro_batch == max(possible, default=1)
        chosen.append(settled.micro_batch)
    assert chosen == sorted(set(chosen), reverse=True) and (chosen[0], chosen[1], chosen[-1]) == (120, 60, 1)


def test_each_process_has_a_micro_batch_where_that_can_be() -> None:
    config = RunConfig(model=GPT2Config(**SMALL), batch_tokens=24 * 64, steps=9)

    def chosen(world_size: int, **system: Any) -> int:
        changed = dataclasses.replace(config, system=SystemConfig(**system))
        return resolve(changed, 61, 10_000, "cpu", 10**10, world_size)[0].micro_batch

    assert [chosen(count) for count in (1, 2, 3, 5, 8, 24, 25)] == [24, 12, 8, 4, 3, 1, 1]
    assert [chosen(count, exact=True) for count in (1, 2, 5)] == [6, 6, 6]
    long = RunConfig(model=GPT2Config(**SMALL | {"max_seq_len": 512}), batch_tokens=24 * 512, steps=9)
    # 8 sequences are 4096 tokens, but 3 passes leave one of two processes idle in the last.
    assert [resolve(long, 61, 10_000, "cpu", 10**10, count)[0].micro_batch for count in (1, 2)] == [8, 6]
    by_memory = {
        exact: {
            resolve(dataclasses.replace(config, system=SystemConfig(exact=exact)), 61, 10_000, "cpu", memory)[
                0
            ].micro_batch
            for memory in (10**10, 1)
        }
        for exact in (True, False)
    }
    assert by_memory == {True: {6}, False: {24, 1}}


def test_a_plan_multiplies_it_out() -> None:
    config = resolved(GPT2Config(**SMALL), steps=10, batch_tokens=640)
    plan = make_plan(config, rate=1e9)
    assert (plan.tokens, plan.flops_per_token) == (6400, flops_per_token(config.model, 64))
    assert plan.seconds == pytest.approx(6400 * plan.flops_per_token / 1e9)
    assert plan.parameters == GPT2.from_config(config.model).num_parameters()
    assert plan.memory_bytes == memory_bytes(config) and plan.strategy_bytes == {}
    assert plan.activation_bytes == activation_bytes(config) and plan.memory_moment in "\n".join(plan.lines())
    assert dataclasses.asdict(plan)["activation_bytes"] == plan.activation_bytes  # as JSON has it
    shared = make_plan(config, rate=1e9, world_size=2)
    assert list(shared.strategy_bytes) == ["single", "ddp 2", "fsdp 2"]
    assert sum("a process" in line for line in shared.lines()) == 4 and "a process" not in "\n".join(plan.lines())
    assert plan.kv_bytes_per_token == kv_bytes_per_token(config.model)
    assert any(f"{plan.parameters:,}" in line for line in plan.lines())
    assert make_plan(resolved(GPT2Config(**SMALL), steps=20, batch_tokens=640), rate=1e9).seconds == 2 * plan.seconds
