"""Many texts at once, of any lengths, coming and going: each is the text that it would be alone, and nothing of it stays."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2lab.errors import ConfigError
from gpt2lab.generation import Engine, Request, Sampler, texts
from gpt2lab.generation.texts import Text, context_start
from gpt2lab.model.cache import LayerSideBySide
from gpt2lab.model.gpt2 import GPT2
from tests.generation.test_writing import SAMPLERS, slow_decode
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens

DRAWN = Sampler(1.0, top_k=20)
unchecked = pytest.mark.usefixtures("unchecked_shapes")  # four fifths of the time; other tests here are checked


def finish(engine: Engine) -> None:
    while engine.busy:
        engine.step()
    assert not engine.held_bytes and not engine.running and not engine.prompts


def alone(model: GPT2, request: Request, samples: int = 1) -> list[list[int]]:
    """Each sample from an engine of its own."""
    rows = []
    for sample in range(samples):
        engine = Engine(model)
        *_, text = engine.submit(request, sample + 1)
        finish(engine)
        rows.append(text.token_ids)
    return rows


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed=seed)[0].tolist()


# --- Side by side is alone --------------------------------------------------------------------------------------------


@unchecked
@each_variant
def test_texts_of_many_lengths_are_those_written_alone(variant: dict[str, Any]) -> None:
    model, lengths = build(variant).eval(), [3, 40, 1, 70]
    requests = [Request(prompt(n, seed=n), 8, SAMPLERS["greedy"] if n % 2 else DRAWN, seed=n) for n in lengths]
    engine = Engine(model)
    together = [engine.submit(request, 2) for request in requests]
    finish(engine)
    for request, written in zip(requests, together, strict=True):
        rows = [text.token_ids for text in written]
        slow = [
            slow_decode(model, torch.tensor(request.prompt_ids), sample, 8, request.sampler, request.seed)
            for sample in range(2)
        ]
        assert rows == slow
    assert len({tuple(text.token_ids) for written in together for text in written}) > len(lengths)


def test_a_mix_up_of_the_caches_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(VARIANTS["rope-gqa-window-4-full"]).eval()
    requests = [Request(prompt(9, seed=n), 12, SAMPLERS["greedy"]) for n in range(3)]
    right = [row for request in requests for row in alone(model, request)]
    attend = LayerSideBySide.attend

    def mixed_up(layer: LayerSideBySide, *qkv: Any) -> Any:
        if max(layer.counts) == 1:  # once the prompts are read
            layer.texts = [*layer.texts[1:], layer.texts[0]]
        return attend(layer, *qkv)

    monkeypatch.setattr(LayerSideBySide, "attend", mixed_up)
    engine = Engine(model)
    together = [engine.submit(request)[0] for request in requests]
    finish(engine)
    assert [text.token_ids for text in together] != right


@dataclass(frozen=True)
class Order:
    """What somebody asks for, and when they lose interest."""

    length: int
    samples: int
    count: int
    greedy: bool
    at_step: int
    cancel_after: int | None


orders = st.lists(
    st.builds(
        Order,
        length=st.integers(1, 40),
        samples=st.integers(1, 3),
        count=st.integers(1, 15),
        greedy=st.booleans(),
        at_step=st.integers(0, 12),
        cancel_after=st.none() | st.integers(0, 12),
    ),
    min_size=1,
    max_size=7,
)


def run_orders(model: GPT2, orders: list[Order], max_texts: int) -> list[tuple[Order, Request, list[Text]]]:
    """Submit and cancel as ordered, step by step, until nothing is left."""
    engine, step, placed = Engine(model, max_texts=max_texts), 0, []
    waiting = list(orders)
    while waiting or engine.busy:
        for order in [order for order in waiting if order.at_step <= step]:
            waiting.remove(order)
            sampler = SAMPLERS["greedy"] if order.greedy else DRAWN
            request = Request(prompt(order.length, order.length), order.count, sampler, seed=order.count)
            placed.append((order, request, engine.submit(request, order.samples)))
        for order, _, written in placed:
            if order.cancel_after is not None and step == order.at_step + order.cancel_after:
                for text in written:
                    engine.cancel(text)
        assert len(engine.running) <= max_texts
        engine.step()
        step += 1
    finish(engine)
    return placed


@unchecked
@each({name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full")})
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders=orders, max_texts=st.integers(1, 6))
def test_whatever_comes_and_goes_each_text_is_its_own(
    variant: dict[str, Any], orders: list[Order], max_texts: int
) -> None:
    model = build(variant).eval()
    for order, request, written in run_orders(model, orders, max_texts):
        for text, row in zip(written, alone(model, request, order.samples), strict=True):
            assert text.finish_reason == ("length" if len(text.token_ids) == order.count else "cancelled")
            assert text.token_ids == row[: len(text.token_ids)]
            assert text.finish_reason == "length" or order.cancel_after is not None


@unchecked
def test_sixty_four_requests_with_cancellations_leave_nothing_behind() -> None:
    model, draw = build(VARIANTS["rope-gqa-window-4-full"]).eval(), random.Random(0)
    many = [
        Order(draw.randint(1, 60), 1, draw.randint(1, 30), bool(draw.randint(0, 1)), draw.randint(0, 20), after)
        for after in [*[None] * 32, *range(32)]
    ]
    placed = run_orders(model, many, max_texts=8)
    reasons = [text.finish_reason for *_, written in placed for text in written]
    assert len(reasons) == 64 and reasons.count("cancelled") > 10 and reasons.count("length") > 20
    for _, request, [text] in placed[::8]:
        assert text.token_ids == alone(model, request)[0][: len(text.token_ids)]


# --- What is read -----------------------------------------------------------------------------------------------------


def reads(model: GPT2, engine: Engine) -> list[int]:
    """Tokens of each forward pass, until nothing is left."""
    read: list[int] = []
    with model.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1])):
        finish(engine)
    return read


def test_a_prompt_is_read_once_for_all_its_samples_and_nothing_is_padded() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    engine = Engine(model)
    engine.submit(Request(prompt(50), 4), 5)
    engine.submit(Request(prompt(7), 2), 1)
    assert reads(model, engine) == [57, 6, 5, 5]


def test_a_long_prompt_is_read_in_parts_between_the_others_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("texts", "engine"):
        monkeypatch.setattr(f"gpt2lab.generation.{module}.READ_AT_ONCE", 16)
    model = build(VARIANTS["rope-gqa-windows-3-7"]).eval()
    request, long = Request(prompt(5), 6, DRAWN), Request(prompt(70, seed=1), 3, DRAWN)
    expected = [*alone(model, request), *alone(model, long)]
    engine = Engine(model)
    written = [*engine.submit(request), *engine.submit(long)]
    assert reads(model, engine) == [5, 17, 17, 17, 17, 7, 1, 1]
    assert [text.token_ids for text in written] == expected
    assert expected[1] == slow_decode(model, torch.tensor(long.prompt_ids), 0, 3, DRAWN, 0)


def test_texts_wait_for_their_turn_and_a_finished_one_makes_room() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    engine = Engine(model, max_texts=2)
    first, second, third = (engine.submit(Request(prompt(4, seed=n), 3 + n, SAMPLERS["greedy"]))[0] for n in range(3))
    engine.step()
    assert first.token_ids and second.token_ids and not third.token_ids
    engine.cancel(first)
    engine.step()
    assert first.finish_reason == "cancelled" and len(first.token_ids) == 1 and third.token_ids
    finish(engine)
    assert third.finish_reason == "length"


def test_a_cache_grows_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2lab.generation.engine.SMALLEST_CACHE", 8)
    model = build(VARIANTS["rope-gqa-window-4-full"]).eval()
    engine = Engine(model)
    [text] = engine.submit(Request(prompt(3), 40, DRAWN))
    held = set()
    while engine.busy:
        held.add(engine.held_bytes)
        engine.step()
    assert len(held) > 3 and text.token_ids == slow_decode(model, torch.tensor(prompt(3)), 0, 40, DRAWN, 0)


def test_keys_and_values_in_eight_bits_take_a_third_of_the_room_and_nearly_say_the_same() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    whole, small = Engine(model), Engine(model, cache_dtype=torch.int8)
    for engine in (whole, small):
        engine.submit(Request(prompt(50), 2, SAMPLERS["greedy"]))
        engine.step()
    assert 0.25 < small.held_bytes / whole.held_bytes < 0.4
    with torch.no_grad():
        cache, rough = model.new_cache(1, 60), model.new_cache(1, 60, torch.int8)
        text = tokens(1, 60)
        exact = torch.cat([model(part, cache=cache) for part in text.split(20, dim=1)], dim=1)
        near = torch.cat([model(part, cache=rough) for part in text.split(20, dim=1)], dim=1)
    assert 0 < (near - exact).abs().mean() / exact.std() < 0.01


# --- Where positions end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_the_context_slides_by_half(limit: int) -> None:
    """However long the text: the context is never empty, never longer than the limit, and begins later only when it must."""
    starts = [context_start(length, limit) for length in range(1, 60)]
    for length, start in enumerate(starts, 1):
        assert 1 <= length - start <= limit
        assert start == starts[max(0, length - 2)] or length - 1 - starts[length - 2] == limit
    assert context_start(59, None) == 0 and (limit < 2 or len(set(starts)) < 59)


@torch.no_grad()
def slow_slide(model: GPT2, prompt_ids: list[int], steps: int) -> list[int]:
    """The definition: read the whole context again for each token."""
    ids = list(prompt_ids)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids[context_start(len(ids), model.max_seq_len) :]]))[0, -1].argmax()))
    return ids[len(prompt_ids) :]


@unchecked
@pytest.mark.parametrize("windows", [None, [3]])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 30])
def test_learned_positions_slide_when_asked(length: int, windows: list[int] | None) -> None:
    model = build(SHAPE | {"max_seq_len": 8, "windows": windows}).eval()
    request = Request(prompt(length), 30, SAMPLERS["greedy"], past_end="slide")
    engine = Engine(model)
    written = [*engine.submit(request, 2), *engine.submit(replace(request, prompt_ids=prompt(5, seed=9)))]
    finish(engine)
    expected = slow_slide(model, prompt(length), 30)
    assert [text.token_ids for text in written] == [expected, expected, slow_slide(model, prompt(5, seed=9), 30)]
    stopped = Engine(model)
    if length <= 8:
        [text] = stopped.submit(replace(request, past_end="stop"))
        finish(stopped)
        assert text.token_ids == expected[: 8 - length + 1] and text.finish_reason == "length"
    else:
        with pytest.raises(ConfigError, match=f"{length} tokens; this model has learned positions for 8"):
            stopped.submit(replace(request, past_end="stop"))


def test_a_text_can_be_cancelled_before_while_and_after_it_is_written() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    engine = Engine(model)
    waiting, running = (engine.submit(Request(prompt(4), 9), 3) for _ in range(2))
    engine.cancel(waiting[1])
    engine.step()
    engine.cancel(running[0])
    assert waiting[1].token_ids == [] and len(running[0].token_ids) == 1
    finish(engine)
    engine.cancel(running[1])
    assert [text.finish_reason for text in running] == ["cancelled", "length", "length"]
    assert running[1].token_ids == waiting[2].token_ids or running[1].sample != waiting[2].sample
    assert texts.READ_AT_ONCE == 512
