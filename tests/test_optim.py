"""The learning rate at points computed by hand, and one optimizer's update after the other in float64."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2lab.config import OptimConfig
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.optim import default_warmup, learning_rate, make_optimizer
from tests.reference import assert_differ, assert_same

# --- Learning rate ----------------------------------------------------------------------------------------------------

STEADY = OptimConfig(learning_rate=8.0, min_learning_rate=2.0, warmup_steps=4)
BY_HAND = {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 6: 5 + 3 * math.sqrt(0.5), 8: 5, 10: 5 - 3 * math.sqrt(0.5), 12: 2}
"""Of 12 steps: a line to 8 in 4 steps, then half a cosine around 5 in 8 steps."""


def test_the_rate_is_a_line_and_half_a_cosine() -> None:
    assert [learning_rate(step, 12, STEADY) for step in BY_HAND] == pytest.approx(list(BY_HAND.values()), rel=1e-12)
    assert learning_rate(6, 13, STEADY) != pytest.approx(BY_HAND[6], rel=1e-3)


@given(st.integers(1, 300), st.floats(1e-9, 1.0), st.floats(0, 1), st.none() | st.floats(0, 1))
def test_the_rate_rises_to_the_peak_and_falls_to_the_minimum(
    steps: int, peak: float, warm: float, low: float | None
) -> None:
    warmup = None if low is None else int(warm * steps)
    config = OptimConfig(learning_rate=peak, warmup_steps=warmup, min_learning_rate=None if low is None else low * peak)
    top = default_warmup(steps) if warmup is None else warmup
    rates = [learning_rate(step, steps, config) for step in range(1, steps + 1)]
    assert all(a < b for a, b in pairwise(rates[:top])), "warm-up does not rise"
    assert all(a >= b for a, b in pairwise(rates[max(0, top - 1) :])), "cosine does not fall"
    assert min(rates) >= 0 and max(rates) <= peak * (1 + 1e-12)
    assert top == 0 or rates[top - 1] == pytest.approx(peak, rel=1e-12)
    assert top == steps or rates[-1] == pytest.approx(peak / 10 if low is None else low * peak, abs=1e-15)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (49, 1), (99, 1), (100, 2), (5000, 100)])
def test_the_warm_up_is_a_fiftieth_of_the_steps(steps: int, warmup: int) -> None:
    assert default_warmup(steps) == warmup
    assert learning_rate(warmup, steps, OptimConfig()) == OptimConfig().learning_rate
    assert steps == 1 or learning_rate(warmup + 1, steps, OptimConfig()) < OptimConfig().learning_rate


def test_without_a_warm_up_the_first_step_is_close_to_the_peak() -> None:
    rates = [learning_rate(step, 100, OptimConfig(learning_rate=1.0, warmup_steps=0)) for step in (1, 50, 100)]
    assert rates == pytest.approx([0.55 + 0.45 * math.cos(math.pi / 100), 0.55, 0.1])


# --- Decay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_is_on_matrices_alone(name: str) -> None:
    model = GPT2(61, 16, 8, 2, 12, 1)
    optimizer = make_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {"token_embedding.weight", "position_embedding.weight"}
    matrices |= {
        f"blocks.0.{part}.weight" for part in ("attn.qkv_proj", "attn.output_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert decay == {key: 0.3 if key in matrices else 0.0 for key in names.values()} and len(decay) == 16


@pytest.mark.parametrize("bias", [True, False])
def test_experts_biases_are_no_matrices_though_they_have_rows(bias: bool) -> None:
    model = GPT2(61, 16, 8, 2, 12, 1, num_experts=3, bias=bias, tie_head=False)
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert sorted(decayed + others) == sorted(names.values())
    matrices = [f"attn.{part}_proj" for part in ("qkv", "output")]
    matrices += [f"mlp.{part}" for part in ("router", "up_proj", "down_proj")]
    assert set(decayed) == {f"blocks.0.{part}.weight" for part in matrices} | {
        f"{part}.weight" for part in ("token_embedding", "position_embedding", "head")
    }
    biases = {"blocks.0.mlp.up_proj.bias", "blocks.0.mlp.down_proj.bias"}
    assert (biases <= set(others)) == bias
    if bias:
        assert {model.get_parameter(name).dim() for name in biases} == {2}


# --- The update -------------------------------------------------------------------------------------------------------

RATE, DECAY, BETAS = 0.01, 0.1, (0.9, 0.95)


def small_model() -> nn.Module:
    return nn.Linear(3, 2).double()


def gradient(step: int, p: Tensor) -> Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)


def after_steps(config: OptimConfig, steps: int) -> Tensor:
    """All numbers of a small model after some updates; its gradients are drawn."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = make_optimizer(model, config)
    for step in range(steps):
        for p in model.parameters():
            p.grad = gradient(step, p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_hand(update: Callable[[Tensor, Tensor, list[Tensor], int, float], Tensor], steps: int) -> Tensor:
    """The same, where `update(p, g, state, t, decay)` gives the new p of update number t, from 1; it keeps `state`."""
    torch.manual_seed(0)
    numbers = []
    for p in small_model().parameters():
        p, state = p.detach(), [torch.zeros_like(p), torch.zeros_like(p)]
        for step in range(steps):
            p = update(p, gradient(step, p), state, step + 1, DECAY if p.dim() == 2 else 0.0)
        numbers.append(p.flatten())
    return torch.cat(numbers)


def adamw(
    p: Tensor,
    g: Tensor,
    state: list[Tensor],
    t: int,
    decay: float,
    betas: tuple[float, float] = BETAS,
    correct: bool = True,
) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2."""
    state[0] = betas[0] * state[0] + (1 - betas[0]) * g
    state[1] = betas[1] * state[1] + (1 - betas[1]) * g**2
    mean, square = (m / (1 - b**t) if correct else m for m, b in zip(state, betas, strict=True))
    return p - RATE * decay * p - RATE * mean / (square.sqrt() + 1e-8)


def sgd(p: Tensor, g: Tensor, state: list[Tensor], t: int, decay: float) -> Tensor:
    """With an L2 penalty: the decay is added to the gradient, so it goes through the momentum."""
    state[0] = BETAS[0] * state[0] + g + decay * p
    return p - RATE * state[0]


def decoupled_sgd(p: Tensor, g: Tensor, state: list[Tensor], t: int, decay: float) -> Tensor:
    return sgd(p, g, state, t, 0.0) - RATE * decay * p


FAULTS = {
    "no decay": lambda p, g, state, t, decay: adamw(p, g, state, t, 0.0),
    "decay on biases too": lambda p, g, state, t, decay: adamw(p, g, state, t, DECAY),
    "decay in the gradient (Adam with L2)": lambda p, g, state, t, decay: adamw(p, g + decay * p, state, t, 0.0),
    "betas the wrong way round": lambda p, g, state, t, decay: adamw(p, g, state, t, decay, betas=BETAS[::-1]),
    "no correction of the first steps": lambda p, g, state, t, decay: adamw(p, g, state, t, decay, correct=False),
}
CONFIG = OptimConfig(learning_rate=RATE, weight_decay=DECAY, betas=BETAS)


@pytest.mark.parametrize("steps", [1, 4])
def test_adamw_is_the_published_update(steps: int) -> None:
    ours = after_steps(CONFIG, steps)
    assert_same(ours, by_hand(adamw, steps), within=1e-14)


@pytest.mark.parametrize("fault", FAULTS)
def test_adamw_is_not_the_update_with_a_planted_fault(fault: str) -> None:
    assert_differ(after_steps(CONFIG, 4), by_hand(FAULTS[fault], 4), by=1e-4, what=fault)


def test_sgd_has_momentum() -> None:
    config = OptimConfig(name="sgd", learning_rate=RATE, weight_decay=0.0, betas=BETAS)
    without_decay = by_hand(lambda p, g, state, t, decay: sgd(p, g, state, t, 0.0), 4)
    assert_same(after_steps(config, 4), without_decay, within=1e-14)
    plain = by_hand(lambda p, g, state, t, decay: p - RATE * g, 4)
    assert_differ(after_steps(config, 4), plain, by=1e-3, what="no momentum")


def test_the_decay_of_sgd_is_added_to_the_gradient() -> None:
    config = OptimConfig(name="sgd", learning_rate=RATE, weight_decay=DECAY, betas=BETAS)
    assert_same(after_steps(config, 4), by_hand(sgd, 4), within=1e-14)
    assert_differ(after_steps(config, 4), by_hand(decoupled_sgd, 4), by=1e-4, what="decay past the momentum")
