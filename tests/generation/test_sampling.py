"""From logits to a token: each filter against a loop, and the draw against the distribution it is drawn from."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.errors import ConfigError
from gpt2lab.generation.filters import keep_top_k, keep_top_p
from gpt2lab.generation.sampling import Sampler, draw, uniforms

TOTAL = 64
LAST = 1 - 2**-53
"""The largest number below 1: numpy draws nothing larger."""


@st.composite
def shares(draw: st.DrawFn) -> list[int]:
    """A distribution over up to 8 tokens in 64ths, so that sums are exact. With ties, and with zeros."""
    cuts = draw(st.lists(st.integers(0, TOTAL), max_size=7).map(sorted))
    return [high - low for low, high in zip([0, *cuts], [*cuts, TOTAL], strict=True)]


def row(values: list[int]) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


# --- Filters ----------------------------------------------------------------------------------------------------------


def slow_top_k(logits: list[int], k: int) -> list[float]:
    kept = [sum(other > logit for other in logits) < k for logit in logits]  # ties with the last stay
    return [logit if keep else -math.inf for logit, keep in zip(logits, kept, strict=True)]


def slow_top_p(counts: list[int], p: Fraction) -> list[float]:
    kept, before = [0] * len(counts), Fraction(0)
    for index in sorted(range(len(counts)), key=lambda index: -counts[index]):  # of equals, the first comes first
        if before < p:
            kept[index] = counts[index]
        before += Fraction(counts[index], TOTAL)
    return [count / sum(kept) for count in kept]


@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=8), k=st.integers(1, 10))
def test_top_k_is_the_loop(logits: list[int], k: int) -> None:
    assert keep_top_k(row(logits), k).tolist() == [slow_top_k(logits, k)]


@given(counts=shares(), p=st.integers(1, TOTAL))
def test_top_p_is_the_loop(counts: list[int], p: int) -> None:
    assert keep_top_p(row(counts) / TOTAL, p / TOTAL).tolist() == [slow_top_p(counts, Fraction(p, TOTAL))]


def test_the_loops_can_fail() -> None:
    assert keep_top_k(row([1, 2, 2, 3]), 2).tolist() == [[-math.inf, 2, 2, 3]] != [slow_top_k([1, 2, 2, 3], 1)]
    half = keep_top_p(row([16, 32, 16]) / TOTAL, 0.5).tolist()
    assert half == [[0, 1, 0]] != [slow_top_p([16, 32, 16], Fraction(33, TOTAL))]


def test_rows_are_filtered_by_themselves() -> None:
    logits = torch.randn(5, 20, dtype=torch.float64)
    sampler = Sampler(0.7, top_k=6, top_p=0.8)
    together = sampler.probabilities(logits)
    apart = torch.cat([sampler.probabilities(logits[i : i + 1]) for i in range(5)])
    assert torch.equal(together, apart)
    assert len({tuple(kept) for kept in (together > 0).tolist()}) > 1


def test_filters_are_chained_in_this_order() -> None:
    """Temperature, then top-k, then top-p of what top-k left."""
    logits = torch.randn(1, 30, dtype=torch.float64)
    expected = keep_top_p(keep_top_k(logits / 0.5, 9).softmax(-1), 0.7)
    assert torch.equal(Sampler(0.5, 9, 0.7).probabilities(logits), expected)
    p_first = keep_top_k(keep_top_p((logits / 0.5).softmax(-1), 0.7).log(), 9).softmax(-1)
    assert (p_first - expected).abs().max() > 1e-3


# --- Temperature ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -0.0, 5e-324, 1e-45, 1e-7])
def test_at_temperature_0_it_is_the_first_of_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 1e-3]])
    for sampler in (Sampler(temperature), Sampler(temperature, top_k=3, top_p=0.1)):
        assert sampler.probabilities(logits).tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_a_low_temperature_is_near_0_and_a_high_one_is_near_uniform() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert Sampler(1e-2).probabilities(logits)[0, 1] > 1 - 1e-9
    assert (Sampler(1e300).probabilities(logits) - 1 / 3).abs().max() < 1e-9
    assert torch.equal(Sampler().probabilities(logits), logits.double().softmax(-1))


@given(
    logits=st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=2, max_size=9),
    temperature=st.sampled_from([0, 1e-45, 1e-6, 1e-3, 0.8, 1, 2, 1e10, 1e308]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.sampled_from([1e-300, 1e-9, 0.5, 0.999, 1]),
)
def test_probabilities_are_a_distribution(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    probabilities = Sampler(temperature, top_k, top_p).probabilities(torch.tensor([logits]))
    assert probabilities.dtype == torch.float64
    assert ((probabilities >= 0) & (probabilities <= 1)).all()
    assert abs(probabilities.sum().item() - 1) < 1e-12
    likeliest = [index for index, logit in enumerate(logits) if logit == max(logits)]
    assert any(probabilities[0, index] > 0 for index in likeliest)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": -1}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": math.inf}, "--temperature"),
        ({"top_k": 0}, "--top-k"),
        ({"top_k": -1}, "--top-k"),
        ({"top_p": 0}, "--top-p"),
        ({"top_p": 1.01}, "--top-p"),
        ({"top_p": math.nan}, "--top-p"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"out of range \({words}\): .*{next(iter(arguments.values()))}.*Fix: "):
        Sampler(**arguments)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def slow_draw(counts: list[int], number: Fraction) -> int:
    before = Fraction(0)
    for token, count in enumerate(counts):
        before += Fraction(count, TOTAL)
        if number < before:
            return token
    raise AssertionError


@given(counts=shares(), number=st.integers(0, 4 * TOTAL - 1))
def test_a_draw_is_where_the_running_sum_passes_the_number(counts: list[int], number: int) -> None:
    """At every 256th: four numbers for each 64th of probability, the limits between tokens among them."""
    fraction = Fraction(number, 4 * TOTAL)
    [token] = draw(row(counts) / TOTAL, torch.tensor([float(fraction)], dtype=torch.float64)).tolist()
    assert token == slow_draw(counts, fraction)


def test_a_token_of_probability_0_is_never_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 8, 1000):
        weights = torch.rand(500, size, generator=generator, dtype=torch.float64)
        weights *= torch.rand(500, size, generator=generator) < 0.3
        weights[:, size // 2] += 1e-3
        probabilities = weights / weights.sum(-1, keepdim=True)  # sums to 1 as well as rounding lets it
        for number in (0.0, 5e-324, 1e-17, 0.5, LAST - 2**-53, LAST):
            tokens = draw(probabilities, torch.full((500,), number, dtype=torch.float64))
            assert (probabilities[torch.arange(500), tokens] > 0).all(), number
    edges = torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    assert [draw(edges, torch.tensor([u], dtype=torch.float64)).item() for u in (0.0, 0.5 - 2**-54, 0.5, LAST)] == [
        2,
        2,
        4,
        4,
    ]


EIGHT = torch.tensor([0.30, 0.02, 0.0, 0.18, 0.10, 0.25, 0.05, 0.10], dtype=torch.float64)


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """The statistic of Pearson's test; with 6 degrees of freedom it is above 33 once in 100,000 times."""
    expected = probabilities * len(tokens)
    seen = torch.bincount(tokens, minlength=len(probabilities))
    assert not seen[expected == 0].any()
    return ((seen - expected) ** 2 / expected)[expected > 0].sum().item()


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "a squared number": lambda u: draw(EIGHT.expand(len(u), -1), u**2),
    "a temperature of 1.1": lambda u: draw(EIGHT.pow(1 / 1.1).expand(len(u), -1), u),
    "two tokens exchanged": lambda u: draw(EIGHT[[5, 1, 2, 3, 4, 0, 6, 7]].expand(len(u), -1), u),
    "the last token left out": lambda u: draw(EIGHT[:7].expand(len(u), -1), u),
}


def test_draws_follow_the_distribution() -> None:
    numbers = torch.from_numpy(np.random.default_rng(0).random(40_000))
    found = chi_square(draw(EIGHT.expand(len(numbers), -1), numbers), EIGHT)
    print(f"chi-square {found:.1f}")
    assert found < 33
    for name, rule in WRONG.items():
        tokens = rule(numbers)
        tokens = tokens[EIGHT[tokens] > 0]  # the control shall fail by its numbers, not at the first impossible token
        found = chi_square(tokens, EIGHT)
        print(f"{name}: chi-square {found:.1f}")
        assert found > 100, name


@pytest.mark.parametrize("what", ["seeds", "samples", "positions"])
def test_the_numbers_of_seeds_samples_and_positions_are_uniform_and_independent(what: str) -> None:
    count = 4000
    numbers = {
        "seeds": lambda: torch.cat([uniforms(seed, range(1), 0) for seed in range(count)]),
        "samples": lambda: uniforms(0, range(count), 0),
        "positions": lambda: torch.cat([uniforms(0, range(1), position) for position in range(count)]),
    }[what]()
    assert ((numbers >= 0) & (numbers < 1)).all() and len(numbers.unique()) == count
    eighths = (numbers * 8).long()
    pairs = eighths[:-1] * 8 + eighths[1:]  # each with the one after it
    assert chi_square(eighths, torch.full((8,), 1 / 8)) < 36  # 7 degrees of freedom, once in 100,000 times
    assert chi_square(pairs, torch.full((64,), 1 / 64)) < 124  # 63 degrees of freedom
    assert chi_square((eighths[:-1] + eighths[1:]) % 8, torch.full((8,), 1 / 8)) < 36
    assert chi_square(eighths.sort().values[1:] * 8 + eighths.sort().values[:-1], torch.full((64,), 1 / 64)) > 1000


def test_a_sample_s_number_does_not_depend_on_the_others() -> None:
    assert torch.equal(uniforms(3, range(5), 7)[2:4], uniforms(3, range(2, 4), 7))
    assert len({uniforms(a, range(b, b + 1), c).item() for a in range(4) for b in range(4) for c in range(4)}) == 64
