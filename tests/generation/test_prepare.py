"""Models for reading: near the model they were made from, each text by itself to the bit, and not for training."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2lab.data.sources import Document
from gpt2lab.errors import ConfigError
from gpt2lab.evaluate.perplexity import document_passages, perplexity
from gpt2lab.generation.prepare import for_reading
from gpt2lab.model.cache import SideBySide
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.packed import can_pack
from gpt2lab.model.quantized import Int8Embedding, has_int8
from gpt2lab.model.reading import Quantize, RowByRow
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import save_model
from tests.model.test_variants import PARTS, SHAPE, build, each_variant, tokens
from tests.reference import assert_differ, assert_same
from tests.test_train import sentences

pytestmark = pytest.mark.skipif(
    not (has_int8() and can_pack(torch.ones(1, 1))), reason="this torch has no such kernels"
)

KINDS: tuple[Quantize | None, ...] = (None, "int8", "int4")
IN_FOUR_BITS = [SHAPE | part for part in PARTS.values()]
"""The variants for which four bits are tried, too: the same code, and slower."""
COUNTS = (3, 1, 9, 5, 12)


def alone(model: GPT2, texts: list[Tensor]) -> list[Tensor]:
    """Logits of each text, read by itself: its first tokens at once, then one more."""
    found = []
    for text in texts:
        cache = model.new_cache(1, 16)
        found.append(torch.cat([model(text[None, :-1], cache=cache)[0], model(text[None, -1:], cache=cache)[0]]))
    return found


def together(model: GPT2, texts: list[Tensor]) -> list[Tensor]:
    """The same with all texts side by side."""
    caches, counts = [model.new_cache(1, 16) for _ in texts], [len(text) - 1 for text in texts]
    first = model(torch.cat([text[:-1] for text in texts])[None], cache=SideBySide(caches, counts))[0].split(counts)
    last = model(torch.stack([text[-1] for text in texts])[None], cache=SideBySide(caches, [1] * len(texts)))[0].split(
        1
    )
    return [torch.cat(pair) for pair in zip(first, last, strict=True)]


def spread(logits: Tensor, reference: Tensor) -> float:
    """How far logits are from others, as a part of how much those vary."""
    return float((logits - reference).std() / reference.std())


@each_variant
@torch.inference_mode()
def test_packed_is_the_model_and_quantised_is_near(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant).eval(), tokens(5, 20)
    reference, other = model(token_ids), build(variant, seed=1).eval()(token_ids)
    assert_same(for_reading(model)(token_ids), reference, within=1e-5)
    assert_differ(other, reference, by=1e-2, what="another model")
    # Where one expert of three is chosen, a near tie that falls the other way is a different computation.
    within = 0.3 if variant.get("num_experts", 1) > variant.get("experts_per_token", 1) else 0.05
    eight, four = (spread(for_reading(model, kind)(token_ids), reference) for kind in ("int8", "int4"))
    assert 0 < eight < within and eight < four < 10 * within
    assert spread(other, reference) > 2 * within


@each_variant
@pytest.mark.usefixtures("unchecked_shapes")  # the test above checks them, and a check takes longer than these layers
@torch.inference_mode()
def test_a_text_is_the_same_bits_alone_and_beside_others(variant: dict[str, Any]) -> None:
    model, token_ids = build(variant).eval(), tokens(5, 13)
    texts = [row[: count + 1] for row, count in zip(token_ids, COUNTS, strict=True)]
    for kind in KINDS if variant in IN_FOUR_BITS else KINDS[:2]:
        reading = for_reading(model, kind)
        batch = reading(token_ids, cache=reading.new_cache(5, 16))
        for number, (one, beside) in enumerate(zip(alone(reading, texts), together(reading, texts), strict=True)):
            assert torch.equal(one, beside), (kind, number)
        for number in (0, 4):
            one = reading(token_ids[number : number + 1], cache=reading.new_cache(1, 16))[0]
            assert torch.equal(one, batch[number]), (kind, number)


@torch.inference_mode()
def test_without_packing_texts_do_depend_on_their_neighbours() -> None:
    """The control of the test above."""
    token_ids = tokens(5, 13)
    texts = [row[: count + 1] for row, count in zip(token_ids, COUNTS, strict=True)]
    for model in (build(SHAPE).eval(), for_reading(build(SHAPE), pack=False)):
        assert not all(map(torch.equal, alone(model, texts), together(model, texts)))


@pytest.mark.parametrize("width", [48, 64, 3072])
@pytest.mark.parametrize("threads", [1, 5])
def test_a_nonlinearity_is_the_same_wherever_a_row_stands(width: int, threads: int) -> None:
    x = torch.randn(64, width)

    def differs(function: Any) -> bool:
        rows = torch.cat([function(row[None]) for row in x])
        return any(
            not torch.equal(function(x[:count].view(1, count, -1))[0], rows[:count]) for count in (2, 3, 8, 33, 64)
        )

    gelu = torch.nn.GELU(approximate="tanh")
    torch.set_num_threads(threads)
    try:
        assert not differs(RowByRow(gelu))
        if width == 48 or (width == 3072 and threads == 5):
            assert differs(gelu), "torch has changed: RowByRow may not be needed any more"
    finally:
        torch.set_num_threads(1)


# --- What it is made of -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_it_was_made_from_stays_as_it_was(kind: Quantize | None) -> None:
    model = build(SHAPE)
    before, logits = {name: p.clone() for name, p in model.state_dict().items()}, model(tokens(2, 9))
    reading = for_reading(model, kind)
    assert model.training and not reading.training
    assert reading.position_embedding is not None and model.position_embedding is not None
    assert reading.position_embedding.weight.data_ptr() == model.position_embedding.weight.data_ptr(), "shared"
    assert reading.final_norm.bias.data_ptr() == model.final_norm.bias.data_ptr(), "shared"
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(tokens(2, 9)), logits)
    model(tokens(2, 9), tokens(2, 9)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None and not p.requires_grad for p in reading.parameters())
    assert reading.num_parameters() == model.num_parameters() and reading.device == model.device
    assert for_reading(reading) is reading


def test_a_cache_has_the_type_that_is_computed_in() -> None:
    reading = for_reading(build(SHAPE), "int8")
    assert isinstance(reading.token_embedding, Int8Embedding) and reading.token_embedding.weight.dtype == torch.int8
    cache = reading.new_cache(1, 8)
    reading(tokens(1, 3), cache=cache)
    assert cache.layers[0].keys.read(3, torch.float32).dtype == torch.float32
    assert "numbers" in cache.layers[0].keys.tensors and "scales" not in cache.layers[0].keys.tensors


@pytest.mark.parametrize("kind", KINDS)
def test_it_cannot_be_trained_or_saved(kind: Quantize | None, tmp_path: Any) -> None:
    reading = for_reading(build(SHAPE), kind)
    with pytest.raises(
        ConfigError, match=r"^cannot train .*: its weights are packed or quantised\. Fix: use the model it"
    ):
        reading.train()
    assert not reading.eval().training and not reading.train(False).training
    with pytest.raises(ConfigError, match=r"^cannot save .* Fix: use the model it was made from\.$"):
        save_model(tmp_path / "out", reading, Tokenizer.bytes())
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="does not require grad"):
        reading(tokens(1, 4), tokens(1, 4)).mean().backward()


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_eight_bits_cost_next_to_nothing_and_four_bits_more() -> None:
    """A model that has learned something: of random weights nothing can be spoilt."""
    tokenizer = Tokenizer.bytes()
    ids = torch.from_numpy(tokenizer.encode(sentences(600))).long()
    model = GPT2(tokenizer.vocab_size, 64, 64, 2, 256, 2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        starts = torch.randint(len(ids) - 65, (8,))
        batch = torch.stack([ids[start : start + 65] for start in starts])
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        optimizer.step()
    text = document_passages([Document("held out", sentences(60, seed=1))], tokenizer)
    whole, eight, four = (perplexity(for_reading(model, kind), text, 64).perplexity for kind in KINDS)
    print(f"perplexity {whole:.4f}, int8 {eight / whole - 1:+.3%}, int4 {four / whole - 1:+.3%}")
    assert whole < 8 < perplexity(GPT2.from_config(model.config), text, 64).perplexity
    assert whole == pytest.approx(perplexity(model, text, 64).perplexity, rel=1e-5)
    assert abs(eight / whole - 1) < 0.002 and four / whole - 1 > max(0.002, 3 * abs(eight / whole - 1))
