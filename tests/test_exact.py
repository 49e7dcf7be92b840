"""Sums of gradients: the same bits in any order, on any number of processes, whole or in shards; NaN rather than wrong."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from gpt2lab import exact
from gpt2lab.config import OptimConfig
from gpt2lab.exact import LARGEST, UNIT, ShardedSums, WholeSums, digest, make_sums, total_norm
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import Routing
from gpt2lab.optim import make_optimizer
from tests.forked import Forked

# --- The weights after some steps, on any number of processes ------------------------------------------------------------

PASSES, STEPS, SAMPLES, LENGTH = 6, 5, 2, 12
POISONED = (2, 4)
"""Step and pass whose gradients are too large to be added."""
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"dropout": 0.2},
    "rope-gqa-window-untied": {"position": "rope", "num_kv_heads": 1, "windows": [5, None], "tie_head": False},
    "experts": {"num_experts": 3, "experts_per_token": 2},
}


def make_model(variant: str) -> GPT2:
    """Two layers, of sizes that 3 and 4 processes cannot share evenly."""
    return GPT2(61, 16, 20, 2, 50, 2, generator=torch.Generator().manual_seed(5), **VARIANTS[variant])


def loss_of(model: nn.Module, step: int, number: int) -> Tensor:
    """The share of a pass in the step's loss; of a pass too many, 0."""
    draw = torch.Generator().manual_seed(1000 * step + number)
    token_ids, targets = torch.randint(61, (2, SAMPLES, LENGTH), generator=draw)
    torch.manual_seed(step * PASSES + number)
    routing = Routing()
    loss = model(token_ids, targets, routing=routing).sum() / (PASSES * SAMPLES * LENGTH)
    if routing.counts:
        loss = loss + 0.01 * routing.balance_loss / PASSES
    return loss * (1e30 if (step, number) == POISONED else number < PASSES)


def train(variant: str, strategy: str, rank: int, world: int, exactly: bool = True) -> list[str]:
    """Steps of AdamW with clipping; the gradient norms in full, then a digest of the weights."""
    model = make_model(variant)
    model.layers[0].attn.requires_grad_(variant != "gpt2")  # frozen weights of one have no gradient
    if strategy == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
    sums = make_sums(model, PASSES) if exactly else None
    optimizer = make_optimizer(model, OptimConfig(learning_rate=0.01), exact=True)
    rounds, norms = -(-PASSES // world), []
    for step in range(STEPS):
        for index in range(rounds):
            if sums is not None:
                sums.last = index == rounds - 1
            loss_of(model, step, index * world + rank).backward()
            if sums is not None:
                sums.add()
        if sums is not None:
            sums.combine()
        elif world > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        norm = total_norm(model.parameters()).item()
        norms.append(norm.hex())
        if math.isfinite(norm) and step != POISONED[0]:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.1 / norm)
            optimizer.step()
        optimizer.zero_grad()
    assert isinstance(model, FSDPModule) == (strategy == "fsdp")
    return [
        *norms,
        digest(
            {
                name: tensor.full_tensor() if strategy == "fsdp" else tensor
                for name, tensor in model.state_dict().items()
            }
        ),
    ]


def in_processes(world: int, work: Callable[[int], Any], place: Path) -> list[Any]:
    """What the work returns in each of the processes of a group."""

    def in_group(rank: int) -> Any:
        if world == 1:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group("gloo")
        result = work(rank)
        dist.destroy_process_group()
        return result

    with Forked(world, in_group, place) as processes:
        return processes.results()


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    """What each variant comes to in one process."""
    return {variant: train(variant, "single", 0, 1) for variant in VARIANTS}


# The losses of a pass are a view of the model's; nothing is done to them in place.
@pytest.mark.filterwarnings("ignore:.*returned a view tensor:UserWarning")
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_same_bits_on_any_number_of_processes(
    strategy: str, world: int, alone: dict[str, list[str]], tmp_path: Path
) -> None:
    def work(rank: int) -> dict[str, list[str]]:
        return {variant: train(variant, strategy, rank, world) for variant in VARIANTS}

    assert in_processes(world, work, tmp_path) == [alone] * world


def test_only_the_poisoned_step_is_not_finite(alone: dict[str, list[str]]) -> None:
    for *norms, _ in alone.values():
        assert [math.isfinite(float.fromhex(norm)) for norm in norms] == [step != POISONED[0] for step in range(STEPS)]


def test_floats_would_give_other_bits(tmp_path: Path) -> None:
    plain = {variant: train(variant, "single", 0, 1, exactly=False) for variant in VARIANTS}

    def work(rank: int) -> dict[str, list[str]]:
        return {variant: train(variant, "ddp", rank, 3, exactly=False) for variant in VARIANTS}

    first, *others = in_processes(3, work, tmp_path)
    assert others == [first, first]
    for variant in VARIANTS:
        assert float.fromhex(first[variant][0]) == pytest.approx(float.fromhex(plain[variant][0]), rel=1e-5)
        assert first[variant][-1] != plain[variant][-1]


def test_a_module_without_gradient_in_the_last_pass_is_noticed(tmp_path: Path) -> None:
    """Its sum would be lost: FSDP asks no module for gradients that are not there."""

    def work(rank: int) -> str:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        for part in (*model, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
        sums = ShardedSums(model, 4)
        for sums.last, layers in ((False, model), (True, model[:1])):
            layers(torch.ones(1, 3)).square().sum().backward()
        try:
            sums.combine()
        except AssertionError as error:
            return str(error)
        return "not noticed"

    assert in_processes(2, work, tmp_path) == ["a module had no gradient in the step's last pass"] * 2


# --- One process: what a sum is ------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Weights whose gradients are given."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.all = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])


def added(passes: list[Tensor], share_of: int | None = None) -> WholeSums:
    """The sums of passes of one weight each, not yet combined."""
    model = Weights(len(passes[0]))
    sums = WholeSums(model, share_of or len(passes))
    for gradient in passes:
        model.all[0].grad = gradient.clone()
        sums.add()
        assert model.all[0].grad is None
    return sums


def combined(sums: WholeSums) -> Tensor:
    """The gradient that comes of it."""
    sums.combine()
    (parameter,) = sums._parameters
    assert parameter.grad is not None
    return parameter.grad


def floats(largest: float) -> st.SearchStrategy[float]:
    return st.floats(-largest, largest, width=32)


@given(
    passes=st.lists(st.lists(floats(LARGEST / 16), min_size=5, max_size=5), min_size=2, max_size=16),
    order=st.randoms(use_true_random=False),
)
def test_order_and_grouping_change_no_bit(passes: list[list[float]], order: random.Random) -> None:
    gradients = [torch.tensor(values) for values in passes]
    expected = combined(added(gradients, 16))
    order.shuffle(gradients)
    cut = order.randrange(1, len(gradients))
    first, second = added(gradients[:cut], 16), added(gradients[cut:], 16)
    first._sum += second._sum  # what an all-reduce does
    assert torch.equal(combined(first), expected)


def test_order_changes_a_sum_of_floats() -> None:
    passes = [torch.tensor([x]) for x in (1.0, 2.0**-24, 2.0**-24)]
    assert sum(passes) != sum(passes[::-1])
    assert torch.equal(combined(added(passes)), combined(added(passes[::-1])))


def test_the_sum_is_the_true_one_to_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of 2**-27 and more are added without error, and the sum is rounded once; smaller ones lose half a unit."""
    monkeypatch.setattr(exact, "PIECE", 1000)
    size = 20_005
    exponents = torch.linspace(-60, 0, size)
    passes = [torch.randn(size).clamp(-3, 3) * 2**exponents for _ in range(7)]
    result = combined(added(passes)).numpy()
    true = np.array([math.fsum(values) for values in torch.stack(passes, dim=1).double().tolist()])
    rounded = true.astype(np.float32)
    ulp = np.spacing(np.abs(rounded))
    assert (np.abs(result - true) <= 7 * UNIT / 2 + ulp / 2).all()
    without_loss = (torch.stack(passes).abs().amin(0) >= 2.0**-27).numpy()
    assert 1000 < without_loss.sum() < size
    assert np.array_equal(result[without_loss], rounded[without_loss])
    assert not np.array_equal(result, rounded)


def test_the_sum_is_rounded_once() -> None:
    """Through fp64, 2**10 and half an ulp and a unit would become 2**10 and half an ulp, and then 2**10."""
    for size in (1, 37):
        passes = [torch.full((size,), value) for value in (2.0**10, 2.0**-14, UNIT)]
        assert combined(added(passes)).tolist() == [2.0**10 + 2.0**-13] * size


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38, LARGEST / 4 * 1.001])
@pytest.mark.parametrize("where", [0, 3])
def test_what_does_not_fit_makes_all_of_it_nan(value: float, where: int) -> None:
    """Also of the other weights: a step is taken as a whole or not at all. The next step knows nothing of it."""
    model = Weights(40_000, 3)
    sums = WholeSums(model, 4)
    big, small = model.all
    for number in range(4):
        big.grad, small.grad = torch.ones(40_000), torch.ones(3)
        if number == where:
            big.grad[39_999] = value
        sums.add()
    sums.combine()
    assert big.grad.isnan().all() and small.grad.isnan().all()
    assert math.isnan(total_norm(model.parameters()))
    big.grad, small.grad = torch.full((40_000,), 2.0), None
    sums.add()
    sums.combine()
    assert (big.grad == 2).all() and (small.grad == 0).all()


@pytest.mark.parametrize("passes", [1, 3, 1024])
def test_the_largest_that_fits_does_not_wrap(passes: int) -> None:
    share = torch.tensor([LARGEST / passes, -LARGEST / passes])
    assert combined(added([share] * passes)).tolist() == pytest.approx([LARGEST, -LARGEST], rel=1e-6)


def test_weights_without_gradient() -> None:
    """Where it never came it is zero; frozen ones stay without."""
    model = Weights(3, 4, 5)
    model.all[1].requires_grad_(False)
    sums = WholeSums(model, 1)
    model.all[0].grad = torch.ones(3)
    sums.add()
    sums.combine()
    assert [p.grad if p.grad is None else p.grad.tolist() for p in model.all] == [[1.0] * 3, None, [0.0] * 5]


# --- The norm, the optimizer, the digest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (1,), (50, 7), (3, 40, 50), (2, 40_001)])
def test_norm_is_the_true_one(shape: tuple[int, ...]) -> None:
    model = Weights(*shape)
    model.all.append(nn.Parameter(torch.zeros(shape)))
    for parameter in model.all:
        parameter.grad = torch.randn_like(parameter) * 10 ** torch.randn_like(parameter)
    numbers = [x for p in model.all for x in p.grad.double().flatten().tolist()]
    assert total_norm(model.parameters()).item() == pytest.approx(
        math.sqrt(math.fsum(x * x for x in numbers)), rel=1e-14
    )
    model.all[0].grad = None
    assert total_norm(model.parameters()) > 0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("width", [1, 7, 33])
@pytest.mark.parametrize("rows", [(22, 22, 20), (63, 1), (1,) * 64])
def test_an_update_does_not_depend_on_where_a_number_lies(name: str, width: int, rows: tuple[int, ...]) -> None:
    """Near the end of a tensor, or in the middle; at any address."""

    def update(cuts: tuple[int, ...], offset: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(3)
        weights, *gradients = torch.randn(7, sum(cuts), width, generator=draw)
        shards = nn.ParameterList()
        for part in weights.split(cuts):
            room = torch.empty(part.numel() + offset)
            shards.append(nn.Parameter(room[offset:].view_as(part).copy_(part)))
        optimizer = make_optimizer(shards, OptimConfig(name=name), exact=True)
        for exponent, gradient in enumerate(gradients):
            for shard, part in zip(shards, gradient.split(cuts), strict=True):
                shard.grad = part / 10**exponent
            torch._foreach_mul_([shard.grad for shard in shards], 0.123)  # as clipping does
            optimizer.step()
        state = [[t for t in optimizer.state[shard].values() if t.dim()] for shard in shards]
        return [torch.cat(parts).detach() for parts in (tuple(shards), *zip(*state, strict=True))]

    for ours, whole in zip(update(rows, 3), update((64,), 0), strict=True):
        assert torch.equal(ours, whole)


def test_digest() -> None:
    weights = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(7)}
    same = {"a": torch.tensor(7), "b": torch.arange(6.0).view(3, 2).t().contiguous().t().reshape(2, 3)}
    assert digest(weights) == digest(same)
    others = [
        {"a": weights["a"]},
        {"c": weights["b"], "a": weights["a"]},
        weights | {"b": weights["b"].t()},
        weights | {"b": weights["b"].view(torch.int32)},
        weights | {"b": weights["b"].nextafter(torch.tensor(9.0))},
        weights | {"b": -weights["b"]},
    ]
    assert len({digest(weights), *map(digest, others)}) == 7
