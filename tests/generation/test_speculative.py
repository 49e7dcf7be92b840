"""Drafts change nothing but the speed: greedy text token for token, drawn text for the same seed or in distribution."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.generation import Engine, Request, Sampler, speculative
from gpt2lab.generation.drafts import Proposal
from gpt2lab.generation.model_draft import EarlyExitDrafts, ModelDrafts
from gpt2lab.generation.sampling import BANNED, draw
from gpt2lab.generation.seen import Seen
from gpt2lab.generation.speculative import accept_or_redraw, check
from gpt2lab.generation.texts import Text
from tests.generation.drafting import CHEAP, FREE, Each, all_kinds, at_random, certain_kinds, half_right, right, write
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens

GREEDY = Sampler(0)
SAMPLERS = {
    "greedy with penalties": Sampler(0, repetition_penalty=1.5, frequency_penalty=1.0),
    "drawn": Sampler(1.0, top_k=20),
    "narrow": Sampler(0.7, top_p=0.9, min_p=0.02),
    "penalties": Sampler(0.9, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.2),
    "biased": Sampler(1.2, logit_bias=((3, -math.inf), (7, 2.0))),
}
unchecked = pytest.mark.usefixtures("unchecked_shapes")  # three quarters of the time; other tests here are checked
Rule = Callable[[Tensor, Tensor, int, Tensor, Tensor], int]


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed=seed)[0].tolist()


# --- Greedy: the same tokens ------------------------------------------------------------------------------------------


@unchecked
@each_variant
def test_greedy_text_is_the_same_with_every_draft(variant: dict[str, Any]) -> None:
    model, other = build(variant).eval(), build(variant, seed=1).eval()
    request = Request(prompt(9) * 2, 20, GREEDY)
    [text] = write(model, request)
    kinds = all_kinds(model, other, text)
    assert write(model, request, 7, kinds) == [text] * 7
    _, by_chance, always, partly = kinds.outcomes
    assert sum(accepted for _, accepted in by_chance) < 4 < sum(proposed for proposed, _ in by_chance)
    assert always == [(15, 15), (2, 2)], "20 are 1 by the prompt, 15 + 1, and 2 + 1"
    assert len({proposed - accepted for proposed, accepted in partly}) > 2, "rollbacks of several lengths"


def test_greedy_text_is_another_by_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    request, drafts = Request(prompt(9), 24, GREEDY), Each(lambda *_: at_random(61))
    [text] = write(model, request)
    assert write(model, request, 1, drafts) == [text]
    monkeypatch.setattr("gpt2lab.generation.engine.check", lambda text, logits, proposal: [*proposal.token_ids, 0])
    assert write(model, request, 1, drafts) != [text]


HARD = {
    name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full", "modern")
}


@unchecked
@each(HARD)
def test_greedy_text_is_the_same_for_any_prompt_and_rollback(variant: dict[str, Any]) -> None:
    model, other = build(variant).eval(), build(variant, seed=1).eval()

    @settings(max_examples=4)
    @given(st.lists(st.integers(0, 60), min_size=1, max_size=70), st.integers(1, 60), st.integers(0, 99))
    def same(prompt_ids: list[int], count: int, seed: int) -> None:
        request = Request(prompt_ids, count, GREEDY)
        [text] = write(model, request)
        assert write(model, request, 7, all_kinds(model, other, text)) == [text] * 7
        assert write(model, request, 1, Each(lambda *_: half_right(prompt_ids, text, 61, seed))) == [text]

    same()


@unchecked
@pytest.mark.parametrize("past_end", ["stop", "slide"])
def test_greedy_text_is_the_same_where_learned_positions_end(past_end: Any) -> None:
    model, other = build(SHAPE | {"max_seq_len": 16}).eval(), build(SHAPE | {"max_seq_len": 12}, seed=1).eval()
    for length in (1, 9, 15, 16):
        request = Request(prompt(length), 40, GREEDY, past_end=past_end)
        [text] = write(model, request)
        assert len(text) == (17 - length if past_end == "stop" else 40)
        assert write(model, request, 7, all_kinds(model, other, text)) == [text] * 7


def test_a_text_ends_inside_a_draft() -> None:
    model = build(VARIANTS["rope-mha-full"]).eval()
    [text] = write(model, Request(prompt(9), 30, GREEDY))
    drafts = Each(lambda request, _: right(request.prompt_ids, text))
    for end in (text.index(token) for token in set(text)):
        assert write(model, Request(prompt(9), 30, GREEDY, end_of_text=text[end]), 1, drafts) == [text[:end]]
    for count in range(1, 20):
        assert write(model, Request(prompt(9), count, GREEDY), 1, drafts) == [text[:count]]


def test_a_cancelled_text_leaves_the_others_as_they_are() -> None:
    variant = VARIANTS["rope-gqa-windows-3-7"]
    model, other, request = build(variant).eval(), build(variant, seed=1).eval(), Request(prompt(9) * 2, 30, GREEDY)
    [alone] = write(model, request)
    engine = Engine(model, drafts=all_kinds(model, other, alone))
    texts = engine.submit(request, 7)
    for cancelled in texts[1::2]:
        engine.step()
        engine.cancel(cancelled)
    while engine.busy:
        engine.step()
    assert not engine.held_bytes
    assert [text.finish_reason for text in texts] == ["length", "cancelled"] * 3 + ["length"]
    assert all(text.token_ids == alone for text in texts[::2])


# --- Drawn, by proposals that are certain: the same text for the same seed --------------------------------------------


@unchecked
@pytest.mark.parametrize("how", SAMPLERS)
@each({name: VARIANTS[name] for name in ("learned-mha-full", "modern")})
def test_drawn_text_is_the_same_for_the_same_seed(variant: dict[str, Any], how: str) -> None:
    model = build(variant).eval()
    request = Request(prompt(9) * 2, 24, SAMPLERS[how], seed=4)
    texts = write(model, request, 5)
    drafts = certain_kinds(model, texts)
    assert write(model, request, 5, drafts) == texts
    assert drafts.outcomes[2] == [(15, 15), (6, 6)]
    assert (len(set(map(tuple, texts))) == 1) == SAMPLERS[how].greedy


def test_penalties_count_the_drafted_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: without them, it is another text."""
    model, request = build(VARIANTS["rope-mha-full"]).eval(), Request(prompt(9), 24, SAMPLERS["penalties"])
    [text] = write(model, request)
    monkeypatch.setattr(Seen, "extended", lambda seen, token_ids: seen)
    assert write(model, request, 1, Each(lambda *_: right(request.prompt_ids, text))) != [text]


# --- Drawn, by a model's proposals: the same distribution -------------------------------------------------------------


def accept_always(p: Tensor, q: Tensor, drafted: int, luck: Tensor, number: Tensor) -> int:
    return drafted


def redraw_from_p(p: Tensor, q: Tensor, drafted: int, luck: Tensor, number: Tensor) -> int:
    return drafted if luck * q[drafted] < p[drafted] else int(draw(p[None], number))


def accept_too_often(p: Tensor, q: Tensor, drafted: int, luck: Tensor, number: Tensor) -> int:
    return accept_or_redraw(p, q, drafted, luck / 2, number)


WRONG: dict[str, Rule] = {
    "accept always": accept_always,
    "redraw from p": redraw_from_p,
    "accept too often": accept_too_often,
}
CASES: dict[str, tuple[list[int], list[int]]] = {
    "any": ([4, 1, 0, 2, 1, 0, 0, 8], [2, 2, 4, 2, 0, 4, 0, 2]),
    "p = q": ([4, 1, 0, 2, 1, 0, 0, 8], [4, 1, 0, 2, 1, 0, 0, 8]),
    "nothing in common": ([8, 8, 0, 0], [0, 0, 4, 12]),
    "q is one-hot": ([5, 3, 8], [0, 16, 0]),
    "p is one-hot": ([0, 16, 0], [8, 4, 4]),
    "another is one-hot": ([0, 16, 0], [16, 0, 0]),
}
"""Distributions of the model and of the draft, in sixteenths."""


def outcome(rule: Rule, p: list[int], q: list[int]) -> list[Fraction]:
    """The distribution of what a rule writes, exactly: the two numbers that decide take the middles of all the intervals
    between which it changes its mind."""
    rest = sum(max(0, a - b) for a, b in zip(p, q, strict=True))
    lucks, numbers = math.lcm(*(weight for weight in q if weight)), math.lcm(16, rest or 1)
    counts: Counter[int] = Counter()
    grids = [torch.arange(count).double().add(0.5).div(count).split(1) for count in (lucks, numbers)]
    for drafted, luck, number in itertools.product(range(len(q)), *grids):
        if q[drafted]:
            counts[rule(torch.tensor(p) / 16.0, torch.tensor(q) / 16.0, drafted, luck, number)] += q[drafted]
    return [Fraction(counts[token], lucks * numbers) for token in range(len(p))]


@pytest.mark.parametrize("case", CASES)
def test_the_rule_writes_exactly_the_model_s_distribution(case: str) -> None:
    p, q = CASES[case]
    assert outcome(accept_or_redraw, p, q) == p


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_rule_writes_another_distribution(how: str) -> None:
    p, q = CASES["any"]
    print(f"{how}: {[str(share) for share in outcome(WRONG[how], p, q)]} sixteenths, not {p}")
    assert outcome(WRONG[how], p, q) != p
    assert outcome(WRONG[how], p, p) == p  # where the draft is the model, every rule is right


@unchecked
def test_the_rule_writes_the_distribution_of_many_tokens() -> None:
    """20,000 pairs of tokens, by random distributions over 8 that depend on the token before; and so by wrong rules."""
    chance = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(2 * torch.randn(9, 8, generator=generator).double(), -1) for _ in range(2))
    expected = (p[8][:, None] * p[:8]).flatten()

    def second(rule: Rule, before: int) -> int:
        number, luck, other = (torch.tensor([chance.random()]).double() for _ in range(3))
        return rule(p[before], q[before], int(draw(q[before][None], number)), luck, other)

    for how, rule in {"right": accept_or_redraw, **WRONG}.items():
        counts = torch.zeros(64)
        for _ in range(20_000 if how == "right" else 1_000):
            first = second(rule, 8)
            counts[8 * first + second(rule, first)] += 1
        assert (unlikely(counts, expected) > 0.001) == (how == "right"), how


def unlikely(counts: Tensor, expected: Tensor) -> float:
    """The probability that a distribution gives counts so far from it, by Pearson's chi-square; rare cells are put together."""
    expected = expected * counts.sum()
    rare = expected < 5
    cells, wanted = (torch.cat([x[~rare].double(), x[rare].sum()[None].double()]) for x in (counts, expected))
    kept = wanted > 0
    chi_square = ((cells - wanted)[kept] ** 2 / wanted[kept]).sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2, chi_square / 2))


TINY = {"vocab_size": 8, "max_seq_len": 16, "embed_dim": 8, "num_heads": 2, "ff_hidden_dim": 8, "num_layers": 2}


@unchecked
@pytest.mark.parametrize("how", ["right", *WRONG])
def test_the_engine_writes_the_distribution_of_the_model(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third token, which a draft model proposes together; penalties are those of what was drafted before."""
    model, other = build(TINY).eval(), build(TINY | {"num_layers": 1}, seed=1).eval()
    sampler, prompt_ids = Sampler(0.7, top_k=6, repetition_penalty=1.5), [1, 2]

    @torch.no_grad()
    def probabilities(*text: int) -> Tensor:
        logits = model(torch.tensor([[*prompt_ids, *text]]))[:, -1]
        return sampler.probabilities(logits, [Seen(prompt_ids).extended(text)])[0]

    expected = torch.zeros(8, 8).double()
    for first, second in itertools.product(range(8), repeat=2):
        expected[second] += probabilities()[first] * probabilities(first)[second] * probabilities(first, second)
    if how != "right":
        monkeypatch.setattr(speculative, "accept_or_redraw", WRONG[how])
    counts, drafts = torch.zeros(8, 8), ModelDrafts(other, model, FREE)
    for _, *second_and_third, _ in write(
        model, Request(prompt_ids, 4, sampler), 1000 if how == "right" else 400, drafts
    ):
        counts[tuple(second_and_third)] += 1
    print(f"{how}: {unlikely(counts.flatten(), expected.flatten()):.2g}, {drafts.statistics}")
    assert 0.2 < drafts.statistics.acceptance < 0.9 or how == "accept always"
    assert (unlikely(counts.flatten(), expected.flatten()) > 0.001) == (how == "right")


@unchecked
@each(HARD)
def test_a_drafted_text_does_not_depend_on_what_is_written_beside_it(variant: dict[str, Any]) -> None:
    model, other = build(variant).eval(), build(variant, seed=1).eval()
    requests = [Request(prompt(n), 20, Sampler(1.0, top_k=20), seed=n) for n in (3, 17, 30)]
    drafts = EarlyExitDrafts(model, 1), ModelDrafts(other, model)
    engine = Engine(model, drafts=(both := Each(*(draft.start for draft in drafts))))
    texts = [engine.submit(request, 2) for request in requests]
    while engine.busy:
        engine.step()
    together = [[text.token_ids for text in samples] for samples in texts]
    assert together == [
        [write(model, request, i + 1, Each(*[draft.start] * (i + 1)))[i] for i, draft in enumerate(drafts)]
        for request in requests
    ]
    assert len(both.drafts) == 6
    assert together != [write(model, request, 2) for request in requests], "the numbers that decide are others"


# --- The edges --------------------------------------------------------------------------------------------------------


def judge(sampler: Sampler, logits: Tensor, proposal: Proposal) -> list[int]:
    return check(Text(Request([1], 20, sampler), 0), logits, proposal)


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(1.0)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("drawn", [False, True])
def test_where_all_tokens_are_banned_the_text_ends(sampler: Sampler, drawn: bool) -> None:
    logits = torch.full((3, 4), -math.inf)
    logits[0, 2] = 0.0  # the only possible one, then none
    q = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]]).double() if drawn else None
    assert judge(sampler, logits, Proposal([2, 1], q)) == [2, BANNED]
    assert judge(sampler, logits[:2], Proposal([1], None if q is None else q[1:])) == [2]


def test_a_banned_token_is_never_accepted() -> None:
    sampler, q = Sampler(1.0, logit_bias=((1, -math.inf),)), torch.tensor([[0.0, 1.0, 0.0]]).double()
    rows = [check(Text(Request([1], 9, sampler, seed), 0), torch.zeros(2, 3), Proposal([1], q)) for seed in range(50)]
    assert {tuple(row) for row in rows} == {(0,), (2,)}


@unchecked
@pytest.mark.parametrize("how", SAMPLERS)
def test_the_model_as_its_own_draft_is_always_right(how: str) -> None:
    model = build(VARIANTS["rope-gqa-windows-3-7"]).eval()
    request = Request(prompt(5), 20, SAMPLERS[how])
    for draft in (model, build(VARIANTS["rope-gqa-windows-3-7"], seed=1).eval()):
        drafts = ModelDrafts(draft, model, CHEAP)
        write(model, request, 2, drafts)
        assert drafts.statistics.proposed > 20
        assert (drafts.statistics.acceptance == 1.0) == (draft is model)
