"""The equalities of reading and writing, for a model drawn from the whole table, and for each model of it once.

A text is the same however it is cut into chunks, whatever wrong tokens were read between and taken back, and whatever is
read or written beside it. Models prepared for reading say so to the bit, and others nearly.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.generation import Engine, Request, Sampler
from gpt2lab.generation.ngram import NgramDrafts
from gpt2lab.generation.prepare import for_reading
from gpt2lab.generation.texts import Text
from gpt2lab.model.cache import ONE_BY_ONE, Cache, SideBySide
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.packed import can_pack
from gpt2lab.model.quantized import has_int8
from tests.generation.drafting import FREE, write
from tests.model.test_variants import VARIANTS, build, looks_back, tokens
from tests.reference import assert_same

KINDS = ["plain", "packed", "int8"] if has_int8() and can_pack(torch.ones(1, 1)) else ["plain"]
ROOM = 256


@pytest.fixture(scope="module", autouse=True)
def _unchecked_shapes() -> Iterator[None]:
    """Four fifths of the time; the tests of each part check them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@cache
def model_of(name: str, kind: str) -> GPT2:
    model = build(VARIANTS[name]).eval()
    return model if kind == "plain" else for_reading(model, "int8" if kind == "int8" else None)


models = st.tuples(st.sampled_from(list(VARIANTS)), st.sampled_from(KINDS))

# --- Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a text is read.

    Attributes:
        seed: of its tokens.
        turn: at which it comes to the others.
        steps: right tokens that are read at once, and wrong ones after them that are then taken back.
    """

    seed: int
    turn: int
    steps: list[tuple[int, int]]

    @property
    def text(self) -> Tensor:
        return tokens(1, sum(right for right, _ in self.steps), seed=self.seed)[0]


short = st.tuples(st.integers(1, ONE_BY_ONE // 2), st.integers(0, ONE_BY_ONE // 2))
long = st.tuples(st.integers(ONE_BY_ONE + 1, 30), st.just(0))
plans = st.builds(
    lambda seed, turn, first, rest: Plan(seed, turn, [(first, 0), *rest]),
    seed=st.integers(0, 999),
    turn=st.integers(0, 3),
    first=st.integers(1, 60),
    rest=st.lists(short | short | long, max_size=6),
)


def by_plans(model: GPT2, plans: list[Plan]) -> list[Tensor]:
    """Logits of each text; all that have a step at the same turn are read side by side."""
    caches = [model.new_cache(1, ROOM) for _ in plans]
    rows: list[list[Tensor]] = [[] for _ in plans]
    for turn in zip_longest(*([None] * plan.turn + plan.steps for plan in plans)):
        reads = [(i, *step) for i, step in enumerate(turn) if step is not None]
        if not reads:
            continue
        parts = []
        for i, right, wrong in reads:
            place = sum(map(len, rows[i]))
            parts.append(torch.cat([plans[i].text[place : place + right], tokens(1, wrong, seed=1000 + place)[0]]))
        counts = [len(part) for part in parts]
        logits = model(torch.cat(parts)[None], cache=SideBySide([caches[i] for i, *_ in reads], counts))[0]
        for (i, right, _), row in zip(reads, logits.split(counts), strict=True):
            rows[i].append(row[:right])
            caches[i].truncate(sum(map(len, rows[i])))
    return [torch.cat(row) for row in rows]


def singly(model: GPT2, plan: Plan) -> Tensor:
    """Logits of one text by itself: what is a prompt's at once, and then token by token."""
    cache = model.new_cache(1, ROOM)
    first, *rest = (right for right, _ in plan.steps)
    sizes = [first, *(size for right in rest for size in ([right] if right > ONE_BY_ONE else [1] * right))]
    return torch.cat([model(part[None], cache=cache)[0] for part in plan.text.split(sizes)])


@torch.inference_mode()
def assert_read_alike(name: str, kind: str, plans: list[Plan]) -> None:
    model = model_of(name, kind)
    for plan, logits in zip(plans, by_plans(model, plans), strict=True):
        whole = model(plan.text[None])[0]
        assert_same(
            logits, whole, within=(0.1 if kind == "int8" else 1e-4) * whole.std().item(), what="cached and whole"
        )
        assert kind == "plain" or torch.equal(logits, singly(model, plan)), "other bits than read singly"


@given(models, st.lists(plans, min_size=1, max_size=3))
def test_however_texts_are_read_they_are_read_alike(model: tuple[str, str], plans: list[Plan]) -> None:
    assert_read_alike(*model, plans)


TWO = [Plan(1, 0, [(9, 0), (2, 7), (1, 3), (20, 0), (3, 0), (1, 15)]), Plan(2, 1, [(30, 0), (1, 0), (5, 5), (1, 1)])]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_reads_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts; and the control: caches that keep the wrong tokens, which shows wherever there is anything to look back at."""
    for kind in KINDS:
        assert_read_alike(name, kind, TWO)
    monkeypatch.setattr(Cache, "truncate", lambda cache, length: None)
    model = model_of(name, "plain")
    if looks_back(model.config) or model.position_embedding is not None:
        with pytest.raises(AssertionError, match="cached and whole differ by"):
            assert_read_alike(name, "plain", TWO)


# --- Writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """What is asked for, at which step, and when it is cancelled; its prompt repeats itself, so that there is a draft."""

    request: Request
    samples: int
    at_step: int
    cancel_after: int | None


FEW = Sampler(1.0, logit_bias=tuple((token, -math.inf) for token in range(3, 61)))
"""Three tokens alone are possible, so that a text repeats itself whatever the model: there are drafts, and many are wrong."""

orders = st.builds(
    lambda pattern, times, count, sampler, seed, *when: Order(Request(pattern * times, count, sampler, seed), *when),
    st.lists(st.integers(0, 60), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 16),
    st.sampled_from([FEW, Sampler(0), Sampler(1.0, top_k=20), Sampler(0.3, repetition_penalty=1.2)]),
    st.integers(0, 9),
    st.integers(1, 2),
    st.integers(0, 6),
    st.none() | st.integers(0, 6),
)


def assert_written_alike(name: str, kind: str, orders: list[Order], max_texts: int) -> int:
    """Each text is the one that is written alone and without drafts, as far as it goes; returns the tokens drafted."""
    model, drafts = model_of(name, kind), NgramDrafts(FREE)
    engine = Engine(model, max_texts=max_texts, drafts=drafts)
    placed: dict[int, list[Text]] = {}
    step = 0
    while len(placed) < len(orders) or engine.busy:
        for i, order in enumerate(orders):
            if step == order.at_step:
                placed[i] = engine.submit(order.request, order.samples)
            if order.cancel_after is not None and step == order.at_step + order.cancel_after:
                for text in placed[i]:
                    engine.cancel(text)
        engine.step()
        step += 1
    assert not engine.held_bytes
    for i, texts in placed.items():
        for text, row in zip(texts, write(model, orders[i].request, orders[i].samples), strict=True):
            assert text.token_ids == (row if text.finish_reason == "length" else row[: len(text.token_ids)])
            assert text.finish_reason == "length" or orders[i].cancel_after is not None
    return drafts.statistics.proposed


@given(models, st.lists(orders, min_size=1, max_size=5), st.integers(1, 6))
def test_whatever_is_written_beside_a_text_it_is_its_own(
    model: tuple[str, str], orders: list[Order], max_texts: int
) -> None:
    assert_written_alike(*model, orders, max_texts)


MIXED = [
    Order(Request([0, 1, 2] * 3, 14, FEW), 1, 0, None),
    Order(Request([5, 9, 2, 6] * 4, 9, Sampler(1.0, top_k=20), 1), 2, 1, None),
    Order(Request([7] * 20, 9, Sampler(0)), 1, 0, 4),
]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_writes_alike(name: str) -> None:
    """Packed and in eight bits by turns: each position, number of heads and window is met in both, a part of PARTS in one."""
    kinds = KINDS[-2:]
    assert assert_written_alike(name, kinds[list(VARIANTS).index(name) % len(kinds)], MIXED, 3) > 0, (
        "nothing was drafted"
    )


def test_a_wrong_acceptance_writes_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr("gpt2lab.generation.engine.check", lambda text, logits, proposal: [*proposal.token_ids, 0])
    for kind in KINDS:
        with pytest.raises(AssertionError):
            assert_written_alike("modern", kind, MIXED, 3)
