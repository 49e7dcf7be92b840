"""The compiled step: what the layers compute, on every machine it is made for, and the same without it where it cannot be."""

import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2lab.errors import ConfigError, NumbersError
from gpt2lab.generation import Engine, Request, Sampler
from gpt2lab.generation.model_draft import first_layers
from gpt2lab.generation.prepare import for_reading
from gpt2lab.model import native
from gpt2lab.model.cache import SideBySide
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import ReadingGPT2
from tests.conftest import ROOT
from tests.model.test_variants import PARTS, SHAPE, VARIANTS, build, each, each_variant, tokens
from tests.reference import assert_differ, assert_same

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or no processor that the loops are for")
CHUNKS = [5, 1, 3, 16, 1, 9]
KEPT_IN = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 0.05), "int8": (torch.int8, 0.05)}


def prepared_from(model: GPT2, **how: Any) -> ReadingGPT2:
    reading = for_reading(model, **how)
    assert isinstance(reading, ReadingGPT2)
    return reading


def prepared(variant: dict[str, Any], **how: Any) -> ReadingGPT2:
    return prepared_from(build(variant).eval(), **how)


def read(model: GPT2, token_ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    cache = model.new_cache(len(token_ids), token_ids.shape[1], dtype)
    chunks = token_ids.tensor_split(list(accumulate(CHUNKS[:-1])), dim=1)
    return torch.cat([model(chunk, cache=cache) for chunk in chunks if chunk.numel()], dim=1)


def write(model: GPT2, requests: list[Request]) -> list[list[int]]:
    """All texts from one engine."""
    engine = Engine(model)
    texts = [engine.submit(request)[0] for request in requests]
    while engine.busy:
        engine.step()
    return [text.token_ids for text in texts]


# --- The step is the layers -------------------------------------------------------------------------------------------


@each_variant
@torch.inference_mode()
def test_it_computes_what_the_layers_do(variant: dict[str, Any]) -> None:
    model, token_ids = prepared(variant), tokens(2, sum(CHUNKS))
    assert model.step is not None
    found, expected = read(model, token_ids), model(token_ids)
    assert_same(found, expected, within=1e-5)
    assert_differ(read(model, token_ids.flip(1)), expected, by=1e-2, what="another text")


@each({name: SHAPE | part for name, part in PARTS.items() if "expert" not in name})
@pytest.mark.parametrize("kept_in", KEPT_IN)
@torch.inference_mode()
def test_keys_and_values_are_kept_as_the_layers_keep_them(variant: dict[str, Any], kept_in: str) -> None:
    (dtype, within), token_ids = KEPT_IN[kept_in], tokens(2, sum(CHUNKS))
    stepping, layers = prepared(variant), prepared(variant, pack=False)
    assert stepping.step is not None and layers.step is None
    found, expected = read(stepping, token_ids, dtype), read(layers, token_ids, dtype)
    spread = expected.std()
    assert (found - expected).std() / spread < within
    if dtype != torch.float32:
        assert not torch.equal(found, read(stepping, token_ids)), "fewer bits were not used"


@pytest.mark.parametrize("embed_dim", [60, 72, 36])
@torch.inference_mode()
def test_a_row_is_the_same_bits_at_every_width(embed_dim: int) -> None:
    """Where it ends within a vector, too: there the compiler may join products and sums, in one place and not in another."""
    model = prepared(SHAPE | {"embed_dim": embed_dim, "num_heads": 6, "ff_hidden_dim": 90})
    token_ids = tokens(9, 16)
    batch = read(model, token_ids)
    for row in (0, 8):
        cache = model.new_cache(1, 16)
        singly = [model(token_id, cache=cache) for token_id in token_ids[row : row + 1].split(1, dim=1)]
        assert torch.equal(torch.cat(singly, dim=1)[0], batch[row])
    x = torch.randn(1, 50, embed_dim)
    whole, largest = model.logits(x), model.logits(x, 1)
    assert torch.equal(largest[largest > -torch.inf], whole[largest > -torch.inf])


@torch.inference_mode()
def test_a_prompt_beside_running_texts_goes_by_itself() -> None:
    """Its products are those of torch, whose order depends on the number of rows."""
    model, prompt, text = prepared(VARIANTS["rope-gqa-window-4-full"]), tokens(1, 40), tokens(1, 12, seed=1)
    alone = [model(prompt, cache=model.new_cache(1, 64)), model(text, cache=model.new_cache(1, 64))]
    beside = SideBySide([model.new_cache(1, 64) for _ in range(2)], [12, 40])
    together = model(torch.cat([text, prompt], dim=1), cache=beside)
    assert torch.equal(together, torch.cat(alone[::-1], dim=1))
    assert [cache.length for cache in beside.caches] == [12, 40]


@torch.inference_mode()
def test_the_first_layers_take_the_same_step() -> None:
    model, token_ids = prepared(VARIANTS["rope-mha-windows-3-7"]), tokens(1, sum(CHUNKS))
    shallow = first_layers(model, 1)
    assert isinstance(shallow, ReadingGPT2) and shallow.step is not None
    assert_same(read(shallow, token_ids), shallow(token_ids), within=1e-5)
    assert_differ(read(shallow, token_ids), read(model, token_ids), by=1e-2, what="all layers")


@torch.inference_mode()
def test_models_in_bf16_or_four_bits_are_left_to_torch() -> None:
    for model in (for_reading(build(SHAPE).eval().bfloat16()), for_reading(build(SHAPE).eval(), "int4")):
        assert isinstance(model, ReadingGPT2) and model.step is None
        assert model(tokens(1, 4), cache=model.new_cache(1, 8)).isfinite().all()


@torch.inference_mode()
def test_a_cache_that_is_too_small_is_refused_before_anything_is_read() -> None:
    model = prepared(SHAPE)
    cache = model.new_cache(1, 8)
    model(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="holds 8 tokens; 9 do not fit"):
        model(tokens(1, 4), cache=cache)
    assert cache.length == 5


@torch.inference_mode()
def test_another_models_cache_or_batch_is_refused() -> None:
    model, token_ids = prepared(SHAPE), tokens(1, 3)
    others = [SHAPE | {"num_layers": 5}, SHAPE | {"num_heads": 2, "num_kv_heads": 2}, SHAPE | {"num_layers": 1}]
    for other in others:
        with pytest.raises(ValueError, match="another model's"):
            model(token_ids, cache=build(other).new_cache(1, 8))
    for batch_size in (2, 64):
        with pytest.raises(ValueError, match="another batch size"):
            model(token_ids, cache=model.new_cache(batch_size, 8))
    with pytest.raises(ValueError, match="another model's"):
        first_layers(model, 1)(token_ids, cache=model.new_cache(1, 8))


@torch.inference_mode()
def test_a_copied_cache_is_another() -> None:
    model, token_ids = prepared(SHAPE), tokens(1, 12)
    cache = model.new_cache(1, 12)
    model(token_ids[:, :5], cache=cache)
    other = deepcopy(cache)
    expected = model(token_ids[:, 5:8], cache=cache)
    model(tokens(1, 5, seed=9), cache=other)
    assert torch.equal(model(token_ids[:, 8:], cache=cache)[0, -1], read(model, token_ids)[0, -1])
    cache.truncate(5)
    assert torch.equal(model(token_ids[:, 5:8], cache=cache), expected)


def test_what_it_points_to_cannot_be_moved_or_copied() -> None:
    for pack in (True, False):
        model = prepared(SHAPE, pack=pack)
        changes: list[Callable[[], object]] = [model.double, model.half, partial(deepcopy, model)]
        for change in [*changes, partial(model.load_state_dict, {}), partial(model.to, "meta")]:
            with pytest.raises(ConfigError, match="prepared for reading"):
                change()


@torch.inference_mode()
def test_a_cache_of_a_type_that_the_loops_do_not_know_is_left_to_the_layers() -> None:
    model, token_ids = prepared(SHAPE), tokens(1, 12)
    assert_same(read(model, token_ids, torch.float64), model(token_ids), within=1e-5)
    nothing = torch.zeros(0, dtype=torch.long)
    assert model(token_ids, cache=model.new_cache(1, 12), wanted=nothing).shape == (1, 0, 61)


@pytest.mark.parametrize("quantize", [None, "int8"])
@torch.inference_mode()
def test_a_number_gone_bad_is_not_lost_on_the_way(quantize: Any) -> None:
    model = build(SHAPE).eval()
    model.layers[0].mlp.down_proj.bias.data[3] = float("nan")
    for likeliest in (None, 1):
        assert for_reading(model, quantize)(tokens(1, 3), likeliest=likeliest).isnan().all()
    engine = Engine(for_reading(model, quantize))
    engine.submit(Request([1, 2], 3, Sampler(0)))
    with pytest.raises(NumbersError):
        engine.step()


# --- The largest logits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 4, 61, 100])
@torch.inference_mode()
def test_the_largest_logits_are_right_and_the_others_are_theirs_or_nothing(most: int) -> None:
    model = prepared(SHAPE | {"vocab_size": 61})
    x = torch.randn(7, 300, model.config.embed_dim) * torch.rand(7, 300, 1) * 10
    whole, found = model.logits(x), model.logits(x, most)
    told = found > -torch.inf
    assert torch.equal(found[told], whole[told])
    assert torch.equal(found.topk(min(most, 61)).values, whole.topk(min(most, 61)).values)
    assert torch.equal(found.argmax(-1), whole.argmax(-1))
    assert told.all() == (most >= 61) and (most > 4 or told.float().mean() < 0.3), "it computed them all"


def test_a_head_that_is_trained_on_is_seen() -> None:
    """Its weights are shared with the model that it was made from."""
    whole = build(SHAPE).eval()
    model, x = prepared_from(whole), torch.randn(1, 500, SHAPE["embed_dim"])
    with torch.no_grad():
        assert torch.equal(model.logits(x, 1).argmax(-1), model.logits(x).argmax(-1))
        whole.token_embedding.weight.normal_()
        assert torch.equal(model.logits(x, 1).argmax(-1), model.logits(x).argmax(-1))


@torch.inference_mode()
def test_without_the_bound_the_largest_would_be_missed() -> None:
    """The control: eight bits alone take another token now and then."""
    model, x = prepared(SHAPE), torch.randn(1, 4000, SHAPE["embed_dim"])
    assert model.step is not None and model.step.rough is not None
    whole = model.logits(x)
    for bound in (model.step.rough.changed, model.step.rough.sizes):
        bound.zero_()
    assert (model.logits(x, 1).argmax(-1) != whole.argmax(-1)).sum() > 3


@pytest.mark.parametrize("name", ["learned-mha-full", "softcap"])
def test_a_text_is_the_same_whether_others_need_all_logits_or_not(name: str) -> None:
    model = prepared(VARIANTS[name])
    wants = [Sampler(0), Sampler(1.0, top_k=5), Sampler(1.0), Sampler(0, repetition_penalty=1.3)]
    requests = [Request(tokens(1, 4, seed=n)[0].tolist(), 12, sampler, seed=n) for n, sampler in enumerate(wants)]
    assert [request.likeliest for request in requests] == [1, 5, None, None]
    alone = [row for request in requests for row in write(model, [request])]
    assert write(model, requests) == alone
    assert alone == [row for request in requests for row in write(prepared(VARIANTS[name], pack=False), [request])]


# --- Where it can be had ----------------------------------------------------------------------------------------------


def elsewhere(code: str, **environment: str) -> str:
    """What a fresh process prints, in an environment like that."""
    command = [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{code}"]
    there = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, env=there, capture_output=True, text=True, check=True, timeout=300).stdout.strip()


HAS_LOOPS = "from gpt2lab.model.native import library; print(library() is not None)"


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    there = {"GPT2LAB_CACHE": str(tmp_path)}
    assert elsewhere(HAS_LOOPS, **there) == "True"
    [made] = (tmp_path / "native").iterdir()
    written = made.stat().st_mtime_ns
    assert elsewhere(HAS_LOOPS, **there) == "True" and made.stat().st_mtime_ns == written
    assert (
        elsewhere(HAS_LOOPS, **there, CXXFLAGS="-O1", CXX="env g++") == "True"
        and len(list((tmp_path / "native").iterdir())) == 2
    )


@pytest.mark.parametrize(
    "how", [{"GPT2LAB_NATIVE": "0"}, {"CXX": "false"}, {"CXX": "no-such-compiler"}, {"PATH": ""}, {"CXXFLAGS": '"'}]
)
def test_without_a_compiler_there_is_none_and_nothing_is_left(how: dict[str, str], tmp_path: Path) -> None:
    assert elsewhere(HAS_LOOPS, GPT2LAB_CACHE=str(tmp_path), **how) == "False"
    assert not list(tmp_path.glob("native/*"))


LOGITS = """
from gpt2lab.generation.prepare import for_reading
from tests.model.test_variants import SHAPE, build, tokens
with torch.inference_mode():
    for kind in (None, "int8"):
        model = for_reading(build(SHAPE | {"activation": "swiglu", "position": "rope"}).eval(), kind)
        assert model.step is not None
        cache = model.new_cache(1, 40)
        for chunk in tokens(1, 40).split([3, 7, 1, 9, 20], dim=1):
            last = model(chunk, cache=cache)[0, -1]
        print(*last.tolist())
"""


def test_processors_with_avx2_alone_compute_the_same(tmp_path: Path) -> None:
    """Its sums are in another order, so nearly; in eight bits they are exact."""
    here, there = (
        [Tensor(list(map(float, line.split()))) for line in elsewhere(LOGITS, **how).splitlines()]
        for how in ({}, {"CXXFLAGS": "-march=haswell", "GPT2LAB_CACHE": str(tmp_path)})
    )
    for mine, other in zip(here, there, strict=True):
        assert_same(mine, other, within=1e-4)


def test_processors_without_tiles_compute_the_same_bits(tmp_path: Path) -> None:
    without = {"CXXFLAGS": "-mno-amx-int8", "GPT2LAB_CACHE": str(tmp_path)}
    whole, eight = elsewhere(LOGITS).splitlines()
    assert elsewhere(LOGITS, **without).splitlines() == [whole, eight] and whole != eight


@each({name: VARIANTS[name] for name in ("learned-mha-full", "rope-gqa-windows-3-7", "rope-mqa-window-4-full")})
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_without_it_torch_writes_the_same_texts(
    variant: dict[str, Any], quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request(tokens(1, 4 + n, seed=n)[0].tolist(), 8, Sampler(0)) for n in range(3)]
    expected = write(prepared(variant, quantize=quantize), requests)
    monkeypatch.setattr(native, "library", lambda: None)
    model = prepared(variant, quantize=quantize)
    assert model.step is None
    alone = [row for request in requests for row in write(model, [request])]
    assert write(model, requests) == alone, "torch's kernels depend on the texts beside"
    assert sum(a == b for a, b in zip(alone, expected, strict=True)) >= (3 if quantize is None else 1)
