"""Static steps on CUDA: the mathematics of tests/model/test_slots.py, and graphs that do what a step does: `make gpu-check`."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2lab.generation import Engine, Request, Sampler
from gpt2lab.generation.graph import Step
from gpt2lab.generation.inslots import InSlots
from gpt2lab.generation.texts import Text
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.moe import GroupedLinear
from tests.model.test_slots import LENGTHS, STEPS, in_slots, read
from tests.model.test_variants import SHAPE, VARIANTS, build, each, each_variant, tokens
from tests.reference import assert_differ, assert_same

DEVICE = "cuda"
GREEDY, DRAWN = Sampler(0), Sampler(1.0, top_k=20)
A_FEW = {
    name: VARIANTS[name]
    for name in ["learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full", "learned-gqa-full-experts"]
}

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: `make gpu-check` needs one"),
    pytest.mark.usefixtures("unchecked_shapes"),
]


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed=seed)[0].tolist()


def finish(engine: Engine, requests: list[Request], samples: int = 1) -> list[Text]:
    texts = [text for request in requests for text in engine.submit(request, samples)]
    while engine.busy:
        engine.step()
    assert not engine.held_bytes
    return texts


def write(model: GPT2, requests: list[Request], *, static: bool | None = None) -> list[list[int]]:
    return [text.token_ids for text in finish(Engine(model, static=static), requests)]


# --- Slots ------------------------------------------------------------------------------------------------------------


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_texts_in_slots_are_each_one_forward_pass(variant: dict[str, Any], dtype: torch.dtype) -> None:
    """Near the forward pass on the CPU in float64; far from that over another text."""
    exact, model = build(variant).double(), build(variant).to(DEVICE, dtype)
    texts = tokens(3, 100 + STEPS)
    truth, rough = exact(texts), 1e-4 if dtype == torch.float32 else 0.03
    if "num_experts" in variant and dtype == torch.bfloat16:
        rough = 0.1  # of 24 tokens, a few may go to another expert
    for logits, row, length in zip(in_slots(model, texts.to(DEVICE)), truth, LENGTHS, strict=True):
        row = row[length : length + STEPS]
        error = (logits.double().cpu() - row).abs().mean() / row.std()
        other = (logits.double().cpu() - row.roll(1, 0)).abs().mean() / row.std()
        assert error < rough < 0.3 < other, f"after a prompt of {length}: {error:.3g}; one token late {other:.3g}"


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_rows_of_experts_wait_for_no_counts(bias: bool) -> None:
    layer, x = GroupedLinear(4, 6, 5, bias=bias), torch.randn(9, 6)
    counts = torch.tensor([2, 0, 3, 4])
    truth = layer(x, counts)
    layer, x, counts = layer.to(DEVICE), x.to(DEVICE), counts.to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = layer(x, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found.cpu(), truth, within=1e-5)
    assert_differ(found.cpu(), truth.flip(0), by=1e-3, what="rows of other experts")


# --- A graph is the step ----------------------------------------------------------------------------------------------


def seated(model: GPT2, *, graphs: bool, compiled: bool = False) -> Step:
    """A step with three texts in its slots."""
    step, texts = Step(model, compiled=compiled), tokens(3, 101).to(DEVICE)
    if not graphs:
        step.pool = None
    step.reserve(3, 128)
    for slot, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        step.slots.put(slot, read(model, text[None], length), 250)
        step.token_ids[slot] = text[length]
    return step


def runs(step: Step, samplers: list[Sampler | None]) -> tuple[list[Tensor], Tensor]:
    """Tokens of three runs, and where the texts stand after them. In the second nothing may be waited for."""
    numbers = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    chosen = [step.run(samplers, numbers, 128)]
    launch = step._launch(4, 256, None if len({*samplers} - {None}) > 1 else samplers[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chosen += [step.run(samplers, numbers, 140), step.run(samplers, numbers, 150)]
    return [tokens_.cpu() for tokens_ in chosen], step.slots.positions.cpu()


@each_variant
@pytest.mark.parametrize("samplers", [[GREEDY] * 3, [DRAWN, None, DRAWN], [GREEDY, DRAWN, Sampler(0.5)]], ids=str)
@torch.inference_mode()
def test_a_graph_does_what_the_step_does(variant: dict[str, Any], samplers: list[Sampler | None]) -> None:
    model = build(variant).to(DEVICE).eval()
    ours, truth = (runs(seated(model, graphs=graphs), samplers) for graphs in (True, False))
    assert torch.equal(torch.cat(ours[0]), torch.cat(truth[0]))
    assert torch.equal(ours[1], truth[1]) and ours[1].tolist() == [23, 31, 122, 0]
    assert not torch.equal(truth[0][0], truth[0][1]), "the texts go on"


@torch.inference_mode()
def test_a_capture_changes_nothing_and_growth_forgets_it() -> None:
    """Graphs are made in the middle of texts, whose rings are full, and again when there is more room."""
    model = build(SHAPE | {"windows": [3, 16], "position": "rope"}).to(DEVICE).eval()
    step = seated(model, graphs=True)
    before = [x.clone() for x in (step.token_ids, step.slots.positions, step.slots.ends)]
    launch = step._launch(4, 256, GREEDY)
    assert all(map(torch.equal, before, (step.token_ids, step.slots.positions, step.slots.ends)))
    assert step._launch(4, 256, GREEDY) is launch
    step.reserve(5, 300)
    assert not step.launches and (step.slots.count, step.slots.capacity) == (8, 512)


@each(A_FEW)
@torch.inference_mode()
def test_a_compiled_step_chooses_the_same(variant: dict[str, Any]) -> None:
    model = build(variant).to(DEVICE).eval()
    [ours, where], [truth, there] = (
        runs(seated(model, graphs=True, compiled=compiled), [GREEDY] * 3) for compiled in (True, False)
    )
    assert torch.equal(torch.cat(ours), torch.cat(truth)) and torch.equal(where, there)


# --- The engine -------------------------------------------------------------------------------------------------------


@each_variant
def test_the_engine_writes_what_it_writes_on_the_cpu(variant: dict[str, Any]) -> None:
    """In fp32: greedy, and drawn with the same numbers."""
    cpu, gpu = build(variant).eval(), build(variant).to(DEVICE).eval()
    requests = [Request(prompt(n, n), 30, GREEDY if n % 2 else DRAWN, seed=n) for n in (3, 40, 1, 90)]
    written = write(gpu, requests)
    assert written == write(cpu, requests) == write(gpu, requests, static=False)
    assert len({tuple(row) for row in written}) == 4


@each({name: variant for name, variant in A_FEW.items() if "position" in variant})
def test_texts_that_outgrow_their_bucket(variant: dict[str, Any]) -> None:
    """The graphs of 256 tokens, then those of 512; a text that comes later is in a smaller bucket again."""
    cpu, gpu = build(variant).eval(), build(variant).to(DEVICE).eval()
    requests = [Request(prompt(200), 200, GREEDY), Request(prompt(20), 30, GREEDY)]
    assert write(gpu, requests) == write(cpu, requests)
    engine = Engine(gpu)
    first, second = (finish(engine, [request])[0].token_ids for request in requests)
    assert [first, second] == write(cpu, requests)
    assert isinstance(engine.in_slots, InSlots)
    assert {bucket for _, bucket, _ in engine.in_slots.step.launches} == {256, 512}


def test_where_learned_positions_end_and_many_samples_of_one_prompt() -> None:
    variant = SHAPE | {"max_seq_len": 24, "windows": [5, None]}
    cpu, gpu = build(variant).eval(), build(variant).to(DEVICE).eval()
    for past_end in ("stop", "slide"):
        request = Request(prompt(9), 60, DRAWN, past_end=past_end)
        ours, theirs = (finish(Engine(model), [request], 9) for model in (gpu, cpu))
        assert [text.token_ids for text in ours] == [text.token_ids for text in theirs]
        assert len(ours[0].token_ids) == (60 if past_end == "slide" else 16)


def test_bf16_writes_and_leaves_nothing_behind() -> None:
    model = build(VARIANTS["modern"]).to(DEVICE, torch.bfloat16).eval()
    engine = Engine(model)
    texts = finish(engine, [Request(prompt(9, n), 40, DRAWN, seed=n) for n in range(20)])
    assert {len(text.token_ids) for text in texts} == {40}
    assert engine.in_slots is not None and not engine.in_slots.seats
    assert len({tuple(text.token_ids) for text in texts}) == 20
