"""Static steps write what the engine writes otherwise, and ask nothing of what they compute. Graphs: tests/gpu."""

import random
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gpt2lab.errors import NumbersError
from gpt2lab.generation import Engine, Request, Sampler
from gpt2lab.generation.graph import Step, doubled
from gpt2lab.generation.inslots import AHEAD, InSlots, suits
from gpt2lab.generation.texts import Text
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import GroupedLinear
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens

GREEDY, DRAWN = Sampler(0), Sampler(1.0, top_k=20)
QUICKLY = pytest.mark.usefixtures("unchecked_shapes")
"""For what takes long: the checks take most of the time, and see the same in the other tests."""
A_FEW = {name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full")}


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed=seed)[0].tolist()


def write(
    model: GPT2, requests: list[Request], samples: int = 1, *, static: bool | None, most: int = 64
) -> list[list[int]]:
    """What an engine writes; if `static`, nothing is ever read by parts but the prompts."""
    engine = Engine(model, static=static, max_texts=most)
    texts = [text for request in requests for text in engine.submit(request, samples)]
    steps = 0
    while engine.busy:
        engine.step()
        steps += 1
    assert not engine.held_bytes and (engine.in_slots is not None) == bool(static)
    if engine.in_slots is not None:
        assert not engine.in_slots.seats and not engine.in_slots.step.slots.ends.any(), "a slot was left behind"
        assert steps < max(len(text.token_ids) for text in texts), "no text was written several tokens at a time"
    return [text.token_ids for text in texts]


@QUICKLY
@each_variant
def test_texts_of_many_lengths_are_those_of_the_other_path(variant: dict[str, Any]) -> None:
    model = build(variant).eval()
    requests = [Request(prompt(n, seed=n), 20, GREEDY if n % 2 else DRAWN, seed=n) for n in (4, 41)]
    written = write(model, requests, static=True)
    assert written == write(model, requests, static=False)
    assert [len(row) for row in written] == [20] * 2
    [other] = write(model, [replace(requests[0], seed=9)], static=True)
    assert other != written[0]


@QUICKLY
@pytest.mark.parametrize("samplers", [[DRAWN] * 5, [GREEDY] * 5, [GREEDY, DRAWN, Sampler(0.5), DRAWN, Sampler(2.0)]])
def test_texts_that_are_drawn_alike_and_otherwise(samplers: list[Sampler]) -> None:
    model = build(VARIANTS["rope-gqa-window-4-full"]).eval()
    requests = [Request(prompt(9), 20, sampler, seed=n) for n, sampler in enumerate(samplers)]
    written = write(model, requests, 2, static=True)
    assert written == write(model, requests, 2, static=False)
    assert len({tuple(row) for row in written}) == (
        1 if samplers[0] == samplers[1] == GREEDY else 10 - (GREEDY in samplers)
    )


@QUICKLY
@each(A_FEW)
def test_more_tokens_and_texts_than_there_was_room_for(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2lab.generation.graph.SMALLEST_BUCKET", 8)
    model = build(variant).eval()
    requests = [Request(prompt(n, seed=n), 9 * n, DRAWN, seed=n) for n in range(1, 6)]
    assert write(model, requests, static=True, most=3) == write(model, requests, static=False)


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_a_text_ends_in_the_middle_of_what_was_asked_for() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    request = Request(prompt(5), 40, DRAWN)
    [whole] = write(model, [request], static=True)
    last = next(place for place in range(AHEAD + 3, 40) if whole[place] not in whole[:place])
    [cut] = write(model, [replace(request, end_of_text=whole[last])], static=True)
    assert cut == whole[:last]


@pytest.mark.parametrize("length", [1, 7, 8])
@pytest.mark.parametrize("past_end", ["stop", "slide"])
def test_where_learned_positions_end(length: int, past_end: Any) -> None:
    model = build(SHAPE | {"max_seq_len": 8, "windows": [3, None]}).eval()
    requests = [Request(prompt(n), 30, GREEDY, past_end=past_end) for n in (length, 5)]
    engines = [Engine(model, static=static) for static in (True, False)]
    written = [[engine.submit(request)[0] for request in requests] for engine in engines]
    while any(engine.busy for engine in engines):
        for engine in engines:
            engine.step()
    ours, theirs = ([(text.token_ids, text.finish_reason) for text in texts] for texts in written)
    assert ours == theirs and len(ours[0][0]) == (30 if past_end == "slide" else 8 - length + 1)
    in_slots = engines[0].in_slots
    assert in_slots is not None and not in_slots.seats and in_slots.step.slots.capacity == 8


def test_texts_that_need_more_than_logits_are_read_beside_the_others() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    request = Request(prompt(9), 30, DRAWN)
    engine = Engine(model, static=True)
    [silent], [tells] = engine.submit(request), engine.submit(replace(request, log_probabilities=1))
    assert engine.in_slots is not None
    engine.step()
    engine.step()
    assert silent in engine.in_slots and tells not in engine.in_slots
    while engine.busy:
        engine.step()
    assert silent.token_ids == tells.token_ids and len(silent.token_ids) == 30


@QUICKLY
def test_whatever_is_cancelled_the_others_are_their_own() -> None:
    model, pick = build(VARIANTS["rope-gqa-window-4-full"]).eval(), random.Random(0)
    requests = [Request(prompt(pick.randint(1, 60), n), pick.randint(20, 50), DRAWN, seed=n) for n in range(16)]
    truth = write(model, requests, static=False)
    engine, texts, waiting = Engine(model, static=True, max_texts=6), list[Text](), list(requests)
    while waiting or engine.busy:
        for _ in range(min(len(waiting), pick.randint(0, 4))):
            texts += engine.submit(waiting.pop(0))
        engine.step()
        if texts and pick.random() < 0.5:
            engine.cancel(pick.choice(texts))
    for text, row in zip(texts, truth, strict=True):
        assert text.token_ids == row[: len(text.token_ids)]
        assert text.finish_reason == "cancelled" or text.token_ids == row
    assert len({text.finish_reason for text in texts}) == 2
    assert not engine.held_bytes and engine.in_slots is not None and not engine.in_slots.seats


def test_numbers_that_went_bad_are_told() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    engine = Engine(model, static=True)
    engine.submit(Request(prompt(5), 30, GREEDY))
    engine.step()
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(NumbersError, match="a logit after 6 tokens is NaN or infinite"):
        engine.step()


# --- A step can be captured -------------------------------------------------------------------------------------------


def ask_for_shapes_alone(variant: dict[str, Any]) -> None:
    """A step on a device that has no numbers: what asks for one raises, and so does what comes from another device.

    That device does not know of autocast, which routers turn off: models with experts are faked on the CPU.
    """
    experts = "num_experts" in variant
    with torch.inference_mode(), FakeTensorMode() if experts else nullcontext():
        model = GPT2(**variant).eval() if experts else GPT2(**variant).to("meta").eval()
        step = Step(model)
        step.reserve(3, 200)
        for sampler in (GREEDY, Sampler(0.7, top_k=5, top_p=0.9)):
            assert step.once(4, 256, sampler).shape == (4, SHAPE["vocab_size"])
        assert step.run([GREEDY, None, DRAWN], torch.zeros(2, 3, dtype=torch.float64), 200).shape == (2, 3)


@QUICKLY
@each_variant
def test_a_step_waits_for_nothing(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "num_experts" in variant:
        with pytest.raises(DataDependentOutputException):  # on a CPU experts ask for their counts
            ask_for_shapes_alone(variant)
        monkeypatch.setattr(GroupedLinear, "forward", GroupedLinear.by_all)
    ask_for_shapes_alone(variant)


def test_what_waits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(sampler: Sampler, logits: Tensor, numbers: Tensor) -> Tensor:
        return torch.full_like(numbers, logits.argmax().item(), dtype=torch.long)

    monkeypatch.setattr("gpt2lab.generation.graph.choose", choose)
    with pytest.raises(RuntimeError, match="item"):
        ask_for_shapes_alone(VARIANTS["learned-mha-full"])


def test_torch_compile_makes_one_graph_of_it(unchecked_shapes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break and without compiling again while texts grow; the fused kernels themselves are run on a GPU."""
    graphs: list[Any] = []

    def count(module: Any, example: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiler(model, backend=count, fullgraph=True, **how))
    model = build(VARIANTS["rope-gqa-windows-3-7"]).eval()
    compiled, plain = InSlots(model, compiled=True), InSlots(model)
    rows = []
    for in_slots in (compiled, plain):
        engine = Engine(model, static=True)
        engine.in_slots = in_slots
        [text] = engine.submit(Request(prompt(9), 60, DRAWN))
        while engine.busy:
            engine.step()
        rows.append(text.token_ids)
    assert len(graphs) == 1 and rows[0] == rows[1]


def test_which_models_are_written_in_static_steps() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    assert not suits(model) and Engine(model).in_slots is None
    assert Engine(model, static=True, cache_dtype=torch.int8).in_slots is None


def test_buckets_are_doubles() -> None:
    assert [doubled(1, n) for n in (0, 1, 2, 3, 4, 5, 64)] == [1, 1, 2, 4, 4, 8, 64]
    assert [doubled(256, n) for n in (1, 256, 257, 512, 513, 16384)] == [256, 256, 512, 512, 1024, 16384]
