"""Texts in slots, each at a place of its own, one token a step: the logits of one forward pass over each text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gpt2lab.model.attend import visible
from gpt2lab.model.cache import Cache
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import GroupedLinear
from gpt2lab.model.slots import ALIGNED, Ring, Slots, StaticCache
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens
from tests.reference import assert_differ, assert_same

LENGTHS = [1, 9, 100]
"""Of the prompts: before a ring is full, and after the buffer of a windowed cache has moved."""
STEPS = 24
"""More than a ring of these windows has places."""


def read(model: GPT2, text: Tensor, length: int) -> Cache:
    """The cache of a text's first tokens, read in parts."""
    cache = model.new_cache(1, 128)
    for part in text[:, :length].split(60, dim=1):
        model(part, cache=cache)
    return cache


def new_slots(model: GPT2, count: int, capacity: int = 128) -> Slots:
    return Slots(model.new_cache(1, 1), count, capacity)


def step(model: GPT2, slots: Slots, token_ids: list[Tensor], bucket: int = 128) -> Tensor:
    """Logits after one more token of each slot; (slot, vocab)."""
    logits = model(torch.stack(token_ids), cache=StaticCache(slots, slots.count, bucket))[:, 0]
    slots.advance(slots.count)
    return logits


def in_slots(model: GPT2, texts: Tensor, steps: int = STEPS) -> list[Tensor]:
    """Logits of `steps` tokens of each text after its prompt, beside an empty slot."""
    slots, rows = new_slots(model, 4), [3, 0, 2]
    for row, text, length in zip(rows, texts, LENGTHS, strict=True):
        slots.put(row, read(model, text[None], length), 127)
    found: list[list[Tensor]] = [[] for _ in texts]
    for i in range(steps):
        news = [torch.zeros(1, dtype=torch.long, device=texts.device)] * 4
        for row, text, length in zip(rows, texts, LENGTHS, strict=True):
            news[row] = text[length + i : length + i + 1]
        logits = step(model, slots, news)
        assert logits.isfinite().all(), "an empty slot does harm"
        for row, logits_of_one in zip(rows, found, strict=True):
            logits_of_one.append(logits[row])
    assert slots.positions.tolist() == [9 + steps, 0, 100 + steps, 1 + steps]
    return [torch.stack(logits) for logits in found]


def one_late(ring: Ring, positions: Tensor, places: int) -> Tensor:
    newest = positions[:, None]
    return newest - (newest + 1 - torch.arange(places, device=positions.device)) % ring.length


@pytest.mark.usefixtures("unchecked_shapes")  # they take most of the time, and see the same in the other tests
@each_variant
@torch.no_grad()
def test_texts_in_slots_are_each_one_forward_pass(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = build(variant).double(), tokens(3, 100 + STEPS)
    truth = model(texts)
    found = in_slots(model, texts)
    for logits, row, length in zip(found, truth, LENGTHS, strict=True):
        assert_same(logits, row[length : length + STEPS], within=1e-12, what=f"after a prompt of {length}")
    monkeypatch.setattr(Ring, "held", one_late)
    for logits, wrong in zip(found, in_slots(model, texts, 2), strict=True):
        assert_differ(logits[:2], wrong, by=1e-3, what="with a ring that is off by one")


@given(length=st.integers(1, 40), position=st.integers(0, 200), places=st.integers(1, 40))
def test_a_ring_knows_what_stands_where(length: int, position: int, places: int) -> None:
    """Against a dictionary that is written in order."""
    places = min(places, length)
    stands = {p % length: p for p in range(position + 1)}
    ring = Ring((1, 1, length, 1), None, torch.float32, torch.device("cpu"))
    [held] = ring.held(torch.tensor([position]), places).tolist()
    assert [max(-1, p) for p in held] == [stands.get(place, -1) for place in range(places)]


@each({name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full")})
@torch.no_grad()
def test_a_slot_is_used_again_and_nothing_of_the_last_text_is_left(variant: dict[str, Any]) -> None:
    model, (first, second, third) = build(variant).double(), tokens(3, 100).unbind()
    slots = new_slots(model, 2)
    slots.put(0, read(model, first[None], 70), 127)
    slots.put(1, read(model, second[None], 20), 127)
    for i in range(5):
        step(model, slots, [first[70 + i, None], second[20 + i, None]])
    slots.free(0)
    beside = [step(model, slots, [first[:1], second[25 + i, None]])[1] for i in range(5)]
    assert slots.positions.tolist() == [0, 30]
    slots.put(0, read(model, third[None], 3), 127)
    both = [step(model, slots, [third[3 + i, None], second[30 + i, None]]) for i in range(30)]
    after = torch.stack([*beside, *(logits[1] for logits in both)])
    assert_same(after, model(second[None])[0, 25:60], within=1e-12)
    again = torch.stack([logits[0] for logits in both])
    assert_same(again, model(third[None])[0, 3:33], within=1e-12)
    assert_differ(again, model(torch.cat([first[:3], third[3:]])[None])[0, 3:33], by=1e-3, what="after another prompt")


@pytest.mark.parametrize("windows", [None, [3, None], [40]])
@torch.no_grad()
def test_slots_grow_under_their_texts(windows: list[int | None] | None) -> None:
    model, texts = build(SHAPE | {"windows": windows}).double(), tokens(2, 100)
    slots, found = new_slots(model, 1, 32), []
    slots.put(0, read(model, texts[:1], 10), 98)
    for i in range(10, 99):
        if i in (32, 64):
            slots = slots.resized(slots.count + 1, 2 * slots.capacity)
            assert slots.positions.tolist() == [i] + [0] * (slots.count - 1)
        found.append(step(model, slots, [texts[0, i, None]] * slots.count, min(128, slots.capacity))[0])
    assert_same(torch.stack(found), model(texts[:1])[0, 10:99], within=1e-12)
    assert_differ(torch.stack(found), model(texts[1:])[0, 10:99], by=1e-3, what="another text")


@torch.no_grad()
def test_what_a_window_reads_and_keeps_does_not_grow_with_the_text() -> None:
    model = build(SHAPE | {"windows": [20, None], "position": "rope"})
    kept = [Slots(model.new_cache(1, 1), 2, capacity).rings[0].length for capacity in (8, 256, 16384)]
    assert kept == [8, 2 * ALIGNED, 2 * ALIGNED]
    for bucket in (256, 16384):
        cache = StaticCache(new_slots(model, 2, 16384), 2, bucket)
        assert [layer.reads.mask.shape[-1] for layer in cache.layers] == [2 * ALIGNED, bucket]


@torch.no_grad()
def test_a_text_stands_still_at_its_end_and_never_leaves_its_positions() -> None:
    model, text = build(SHAPE | {"max_seq_len": 40}).double(), tokens(1, 40)
    slots = Slots(model.new_cache(1, 1), 2, 64, model.max_seq_len)
    assert slots.capacity == 40
    slots.put(1, read(model, text, 37), 39)
    logits = [step(model, slots, [text[0, :1], text[0, i, None]], 40)[1] for i in (37, 38, 39, 39, 39)]
    assert slots.positions.tolist() == [0, 39]
    assert_same(torch.stack(logits[:3]), model(text)[0, 37:], within=1e-12)
    assert torch.equal(logits[2], logits[4])
    with pytest.raises(ValueError, match="37 tokens, to end at position 36, in slots of 40"):
        slots.put(0, read(model, text, 37), 36)
    with pytest.raises(ValueError, match="40 tokens, to end at position 50, in slots of 40"):
        slots.put(0, read(model, text, 40), 50)
    with pytest.raises(ValueError, match="2 new tokens; texts in slots go on with one"):
        model(text[:, :2].expand(2, 2), cache=StaticCache(slots, 2, 40))


@torch.no_grad()
def test_a_cache_whose_drafts_were_taken_back_is_taken_over_too() -> None:
    model, text = build(VARIANTS["rope-gqa-windows-3-7"]).double(), tokens(1, 120)
    cache = read(model, text, 100)
    model(tokens(1, 9, seed=5), cache=cache)
    cache.truncate(98)
    slots = new_slots(model, 1)
    slots.put(0, cache, 127)
    found = torch.stack([step(model, slots, [text[0, i, None]])[0] for i in range(98, 120)])
    assert_same(found, model(text)[0, 98:], within=1e-12)
    assert_differ(found, model(text)[0, 97:-1], by=1e-3, what="one token late")


@given(starts=st.lists(st.integers(0, 30), min_size=1, max_size=4), window=st.none() | st.integers(1, 9))
def test_the_mask_rule_for_many_texts_is_the_rule_for_each(starts: list[int], window: int | None) -> None:
    q, k = (torch.tensor(starts)[:, None] + torch.arange(n) for n in (3, 7))
    masks = visible(q, k, window)
    assert torch.equal(masks, torch.stack([visible(*row, window) for row in zip(q, k, strict=True)]))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_all_experts_on_all_rows_give_each_row_its_expert(bias: bool) -> None:
    layer, x = GroupedLinear(4, 6, 5, bias=bias).double(), torch.randn(9, 6, dtype=torch.float64)
    for counts in ([2, 0, 3, 4], [0, 0, 9, 0], [9, 0, 0, 0], [0, 4, 0, 5]):
        truth = layer(x, torch.tensor(counts))
        assert_same(layer.by_all(x, torch.tensor(counts)), truth, within=1e-12)
        assert_differ(layer.by_all(x, torch.tensor(counts).roll(1)), truth, by=1e-3, what="with other experts")
