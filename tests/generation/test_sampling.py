"""From logits to a token: filters against loops and transformers, the fast way against the plain, draws by their numbers."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt2lab.errors import ConfigError, NumbersError
from gpt2lab.generation.candidates import largest, nucleus
from gpt2lab.generation.filters import distribution, keep_min_p, keep_top_k, keep_top_p
from gpt2lab.generation.logprobs import log_probabilities
from gpt2lab.generation.sampling import Sampler, draw, uniforms
from gpt2lab.generation.seen import Seen
from tests.reference import assert_differ, assert_same

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
    assert_same(Sampler(0.5, 9, 0.7).probabilities(logits), expected, within=1e-15)
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
    assert_same(Sampler().probabilities(logits), logits.double().softmax(-1), within=1e-15)


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
        ({"min_p": -0.1}, "--min-p"),
        ({"min_p": 1.1}, "--min-p"),
        ({"min_p": math.nan}, "--min-p"),
        ({"repetition_penalty": 0}, "--repetition-penalty"),
        ({"repetition_penalty": 10**31}, "--repetition-penalty"),
        ({"repetition_penalty": math.nan}, "--repetition-penalty"),
        ({"frequency_penalty": math.inf}, "--frequency-penalty"),
        ({"presence_penalty": -(10**31)}, "--presence-penalty"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"out of range \({words}\): .*{next(iter(arguments.values()))}.*Fix: "):
        Sampler(**arguments)


@pytest.mark.parametrize("pair", [(-1, 0.0), (0, math.inf), (0, math.nan), (0, 1e31)], ids=str)
def test_a_bias_out_of_range_is_refused(pair: tuple[int, float]) -> None:
    with pytest.raises(ConfigError, match=r"out of range \(--logit-bias\)"):
        Sampler(logit_bias=((1, 1.0), pair))
    with pytest.raises(ConfigError, match=r"no such token \(--logit-bias\): token 4; this model has 4"):
        Sampler(logit_bias=((4, 1.0),)).probabilities(torch.zeros(1, 4))


# --- Penalties and bias -----------------------------------------------------------------------------------------------

PROMPT, SAID = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]


def seen_so_far() -> Seen:
    return Seen(PROMPT).extended(SAID)


def test_each_step_is_transformers() -> None:
    """One after the other, each with another number as a control, and all together."""
    logits, read = 3 * torch.randn(1, 40, dtype=torch.float64), torch.tensor([PROMPT + SAID])
    steps: list[tuple[dict[str, float], LogitsProcessor, dict[str, float]]] = [
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3), {"repetition_penalty": 1 / 1.3}),
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7), {"temperature": 0.8}),
        ({"top_k": 20}, TopKLogitsWarper(20), {"top_k": 19}),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9), {"top_p": 0.5}),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1), {"min_p": 0.6}),
    ]
    together: dict[str, float] = {}
    scores = logits
    for ours, theirs, wrong in steps:
        expected = theirs(read, logits.clone()).softmax(-1)
        assert_same(Sampler(**ours).probabilities(logits, [seen_so_far()]), expected, within=1e-14, what=str(ours))
        found = Sampler(**wrong).probabilities(logits, [seen_so_far()])
        assert_differ(found, expected, by=1e-3, what=str(wrong))
        scores, together = theirs(read, scores.clone()), together | ours
        found = Sampler(**together).probabilities(logits, [seen_so_far()])
        assert_same(found, scores.softmax(-1), within=1e-14, what=str(together))
        other = Sampler(**together | wrong).probabilities(logits, [seen_so_far()])
        assert_differ(other, found, by=1e-4, what=f"{wrong} in the place of {ours}")


def test_penalties_and_bias_are_the_loop() -> None:
    """OpenAI's formula for what was generated, Keskar's for all that was read, and the bias, in that order."""
    logits = 3 * torch.randn(1, 40)
    sampler = Sampler(1.0, None, None, None, 1.3, 0.2, 0.5, ((4, 1.5), (9, -2.0), (9, 0.5), (7, -math.inf)))

    def slow(generated: list[int]) -> Tensor:
        scores = logits[0].tolist()
        for token in range(40):
            if token in PROMPT + SAID:
                scores[token] *= 1 / 1.3 if scores[token] > 0 else 1.3
            scores[token] -= 0.2 * generated.count(token) + 0.5 * (token in generated)
            scores[token] += {4: 1.5, 9: -1.5, 7: -math.inf}.get(token, 0)
        return torch.tensor([scores], dtype=torch.float64).softmax(-1)

    found = sampler.probabilities(logits, [seen_so_far()])
    assert_same(found, slow(SAID), within=1e-14)
    assert found[0, 7] == 0
    assert_differ(found, slow(PROMPT + SAID), by=1e-3, what="the prompt counted as generated")
    assert sampler.needs_seen and not Sampler(logit_bias=((1, 2.0),)).needs_seen
    assert {Sampler(logit_bias=((1, 2.0),)): 1}[Sampler(logit_bias=((1, 2.0),))] == 1  # it can be a key


def test_each_row_has_its_own_past() -> None:
    logits, sampler = torch.randn(3, 40), Sampler(repetition_penalty=2.0, frequency_penalty=0.3)
    pasts = [Seen([1, 2]), seen_so_far(), Seen([]).extended([8, 8])]
    together = sampler.probabilities(logits, pasts)
    for row in range(3):
        assert torch.equal(together[row], sampler.probabilities(logits[row : row + 1], [pasts[row]])[0])
    assert_differ(together, sampler.probabilities(logits, pasts[::-1]), by=1e-3, what="exchanged")
    assert_differ(together, Sampler().probabilities(logits), by=1e-3, what="no penalties")


@pytest.mark.parametrize(
    "sampler", [Sampler(0), Sampler(1.0, 2), Sampler(1e30, 3, 0.5, 0.5), Sampler(0.5), Sampler(min_p=1)]
)
def test_where_all_tokens_are_banned_there_is_none(sampler: Sampler) -> None:
    bans = tuple((token, -math.inf) for token in range(5))
    banned = replace(sampler, logit_bias=bans)
    numbers = torch.full((2,), LAST, dtype=torch.float64)
    assert banned.choose(torch.randn(2, 5), numbers).tolist() == [-1, -1]
    assert not banned.probabilities(torch.randn(2, 5)).any()
    assert draw(torch.zeros(2, 5, dtype=torch.float64), numbers).tolist() == [-1, -1]
    one_left, logits = replace(sampler, logit_bias=bans[1:]), torch.randn(2, 5)
    assert one_left.choose(logits, numbers).tolist() == [0, 0]
    rows = torch.stack([logits[0], torch.full((5,), -math.inf)])
    assert (sampler.choose(rows, numbers) < 0).tolist() == [False, True]


@pytest.mark.parametrize(
    "sampler", [Sampler(0), Sampler(), Sampler(top_k=2), Sampler(top_p=0.5, logit_bias=((1, -math.inf),))]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_went_bad_end_it(sampler: Sampler, bad: float) -> None:
    logits = torch.randn(3, 7)
    logits[1, 4] = bad
    numbers = torch.rand(3, dtype=torch.float64)
    for ask in (sampler.probabilities, lambda logits: sampler.choose(logits, numbers)):
        with pytest.raises(NumbersError, match=rf"numbers went bad \(logits\): a logit of text 1 is {bad}\. Fix: "):
            ask(logits)
        ask(torch.where(logits.isfinite(), logits, -math.inf))


# --- The fast way -----------------------------------------------------------------------------------------------------

SAMPLERS = st.builds(
    Sampler,
    temperature=st.sampled_from([0, 1e-45, 1e-6, 1e-3, 0.8, 1, 2, 1e30, 1e308]) | st.floats(0, 1e308),
    top_k=st.none() | st.integers(1, 12) | st.just(2**70),
    top_p=st.none() | st.sampled_from([5e-324, 1e-45, 0.25, 0.5, 0.999, 1 - 2**-53, 1]) | st.floats(1e-9, 1),
    min_p=st.none() | st.sampled_from([0, 1e-45, 0.5, 1]) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(1e-30, 1e30),
    frequency_penalty=st.just(0.0) | st.floats(-1e30, 1e30),
    presence_penalty=st.just(0.0) | st.floats(-1e30, 1e30),
    logit_bias=st.just(())
    | st.lists(st.tuples(st.integers(0, 1), st.just(-math.inf) | st.floats(-1e30, 1e30)), max_size=3).map(tuple),
)
NUMBERS = st.floats(0, 1, exclude_max=True) | st.sampled_from(
    [0, LAST, *(n / d for d in range(2, 9) for n in range(1, d))]
)


@settings(max_examples=400)
@given(data=st.data(), sampler=SAMPLERS)
def test_choosing_is_drawing_from_the_probabilities(data: st.DataObject, sampler: Sampler) -> None:
    """At every setting, with ties and with -inf: the same token for the same number, and never an impossible one."""
    values = st.integers(-3, 3).map(float) | st.floats(-(2.0**127), 2.0**127, width=32) | st.just(-math.inf)
    vocab_size = data.draw(st.integers(2, 40))
    rows = data.draw(st.lists(st.lists(values, min_size=vocab_size, max_size=vocab_size), min_size=1, max_size=3))
    logits = torch.tensor(rows, dtype=data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    numbers = torch.tensor([data.draw(NUMBERS) for _ in rows], dtype=torch.float64)
    ids = st.lists(st.integers(0, vocab_size - 1), max_size=6)
    seen = [Seen(data.draw(ids)).extended(data.draw(ids)) for _ in rows]
    probabilities = sampler.probabilities(logits, seen)
    assert probabilities.dtype == torch.float64 and ((probabilities >= 0) & (probabilities <= 1)).all()
    chosen = sampler.choose(logits, numbers, seen)
    assert torch.equal(chosen, draw(probabilities, numbers))
    for row, token in enumerate(chosen.tolist()):
        assert (token < 0) == (not probabilities[row].any())
        assert token < 0 or (probabilities[row, token] > 0 and abs(probabilities[row].sum().item() - 1) < 1e-12)
        alone = sampler.choose(logits[row : row + 1], numbers[row : row + 1], seen[row : row + 1])
        assert alone.tolist() == [token]  # whatever stands beside it


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.01, 0.5, 3, 12]),
    k=st.none() | st.integers(1, 200),
    p=st.none() | st.integers(40, 3990).map(lambda n: (n + 1 / math.pi) / 4000),  # never just what n equals hold
    least=st.none() | st.floats(0.001, 1),
    levels=st.sampled_from([None, 1, 4]),
)
def test_few_candidates_are_the_distribution_of_all(
    seed: int, spread: float, k: int | None, p: float | None, least: float | None, levels: int | None
) -> None:
    """A vocabulary in which groups and shares matter; `levels` to a unit make ties."""
    generator = np.random.default_rng(seed)
    logits = torch.from_numpy(generator.normal(scale=spread, size=(1, 4000))).float()
    if levels:
        logits = (logits * levels).round() / levels
    expected = distribution(logits, 0.9, k, p, least)
    found = Sampler(0.9, k, p, least).probabilities(logits)
    assert_same(found, expected, within=1e-14)
    assert torch.equal(found > 0, expected > 0)
    number = torch.from_numpy(generator.random(1))
    assert torch.equal(Sampler(0.9, k, p, least).choose(logits, number), draw(expected, number))


def test_what_compares_the_two_ways_can_fail() -> None:
    logits = torch.arange(4000.0)[None] % 400 / 40
    right = distribution(logits, 0.9, 25, 0.5, None)
    assert int((right > 0).sum()) == 15 and int((distribution(logits, 0.9, 25, None, None) > 0).sum()) == 30
    for wrong in (Sampler(0.9, 15, 0.5), Sampler(0.9, 25, 0.4), Sampler(0.3, 25, 0.5)):
        assert_differ(wrong.probabilities(logits), right, by=1e-3, what=str(wrong))


@given(logits=st.lists(st.integers(-3, 3), min_size=1, max_size=200), k=st.integers(1, 200))
def test_the_largest_are_the_loop(logits: list[int], k: int) -> None:
    k = min(k, len(logits))
    kept = [place for place, logit in enumerate(slow_top_k(logits, k)) if logit > -math.inf]
    assert largest(np.array(logits, np.float32), k).tolist() == kept


@given(counts=shares(), p=st.integers(1, TOTAL))
def test_the_nucleus_is_the_loop(counts: list[int], p: int) -> None:
    kept = [place for place, share in enumerate(slow_top_p(counts, Fraction(p, TOTAL))) if share > 0]
    found = [place for place in nucleus(np.array(counts) / max(counts), p / TOTAL).tolist() if counts[place]]
    assert found == kept


@given(counts=shares(), p=st.integers(0, 8))
def test_min_p_is_the_loop(counts: list[int], p: int) -> None:
    kept = [count if 8 * count >= p * max(counts) else 0 for count in counts]
    assert keep_min_p(row(counts) / TOTAL, p / 8).tolist() == [[count / sum(kept) for count in kept]]


# --- Log-probabilities ------------------------------------------------------------------------------------------------


@given(logits=st.lists(st.integers(-3, 3), min_size=2, max_size=9), chosen=st.integers(0, 8), top=st.integers(0, 12))
def test_log_probabilities_are_the_loop(logits: list[int], chosen: int, top: int) -> None:
    chosen %= len(logits)
    total = math.log(sum(map(math.exp, logits)))
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top]
    found = log_probabilities(torch.tensor(logits, dtype=torch.float32), chosen, top)
    assert [token for token, _ in found] == [chosen, *order]
    assert [value for _, value in found] == pytest.approx([logits[token] - total for token in (chosen, *order)])


def test_log_probabilities_of_bad_numbers_are_refused() -> None:
    with pytest.raises(NumbersError):
        log_probabilities(torch.tensor([0.0, math.nan]), 0, 1)


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
