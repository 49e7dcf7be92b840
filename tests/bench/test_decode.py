"""How fast models write: every way does the work it says, all with the same weights, and the result is what was measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2lab.bench.decode import DecodeBench, _work, bench_decode, table
from gpt2lab.bench.others import OTHERS
from gpt2lab.bench.ways import ALONE, BATCH, LONG, our_ways, read_bytes, repetitive
from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.tracking import Console
from gpt2lab.weights import save_model
from tests.model.test_variants import VARIANTS, build, each_variant

SHAPE: dict[str, Any] = {
    "vocab_size": 257, "max_seq_len": 64, "embed_dim": 32, "num_heads": 4, "ff_hidden_dim": 48, "num_layers": 2,
}  # fmt: skip
SMALL = DecodeBench(
    prompt_tokens=8, new_tokens=6, batch_size=3, long_prompt_tokens=20, rounds=1, device="cpu", precision="fp32"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    save_model(folder, GPT2(**SHAPE), Tokenizer.bytes())
    return folder


def test_every_program_writes_the_same_tokens_and_is_measured(folder: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, model=str(folder), out=str(tmp_path))
    result = bench_decode(settings, Console(quiet=True))
    assert json.loads((tmp_path / "decode.json").read_text()) == json.loads(json.dumps(result))
    who = [row["who"] for row in result["rows"]]
    assert {"gpt2lab fp32", "gpt2lab int8", "transformers fp32", "ctranslate2 fp32", "ctranslate2 int8"} == set(who)
    same = result["same_greedy_tokens"]
    assert same["transformers fp32"] == same["ctranslate2 fp32"] == 6
    for row in result["rows"]:
        assert row["low"] <= row["tokens_per_second"] <= row["high"]
        assert ("token_seconds" in row) == (row["what"] != LONG)
        assert ("share_of_memory_speed" in row) == (row["who"].startswith("gpt2lab") and row["what"] == ALONE)
    [round_] = result["rounds"]["kept"]
    seconds = round_["seconds"]
    ratio = seconds[f"transformers fp32, {ALONE}"] / seconds[f"gpt2lab fp32, {ALONE}"]
    assert result["ratios"]["gpt2lab fp32 over transformers fp32"] == pytest.approx(ratio)
    batch = 3 * seconds[f"gpt2lab int8, {ALONE}"] / seconds[f"gpt2lab int8, {BATCH}"]
    assert result["ratios"]["gpt2lab int8, 3 texts over one"] == pytest.approx(batch)
    shown = table(result)
    assert "transformers fp32: 6 of 6 greedy tokens are ours" in shown and "memory is read at" in shown


def test_each_way_writes_what_it_says() -> None:
    model = build(VARIANTS["learned-mha-full"]).eval()
    work = _work(replace(SMALL, new_tokens=9), model)
    for way in our_ways(model, work, torch.device("cpu"), torch.float32):
        way.turn()
        assert sum(map(len, way.written)) == way.tokens and len(way.firsts) == 1
        assert len(way.gaps) == (0 if way.what == LONG else 8)
    assert [len(prompt) for prompt in work.prompts] == [8] * 3 and len(work.long) == 20
    assert repetitive([5, 6, *range(14)]) == [5, 6] * 8


@each_variant
def test_what_a_step_reads_is_every_weight_that_it_multiplies_with(variant: dict[str, Any]) -> None:
    """Counted by looking: the elements of every matrix that a step of one token is given."""
    model, seen = build(variant).eval(), []
    for name, module in model.named_modules():
        if list(module.children()) or "embedding" in name:
            continue

        def note(module: torch.nn.Module, _: Any, __: Any, name: str = name) -> None:
            share = (
                model.config.experts_per_token / model.config.num_experts
                if ".mlp." in name and "router" not in name
                else 1
            )
            seen.append(sum(p.numel() for p in module.parameters()) * share)

        module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long))
    tied = 0 if model.head is not None else model.vocab_size * model.config.embed_dim
    assert read_bytes(model, 4) == pytest.approx(4 * (sum(seen) + tied))
    assert read_bytes(model, 1) * 4 == pytest.approx(read_bytes(model, 4), abs=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"against": ("vllm",)}, "--against vllm.*there are transformers, ctranslate2"),
        ({"new_tokens": 60}, "68 tokens, and the model's positions end at 64"),
        ({"long_prompt_tokens": 64}, "65 tokens, and the model's positions end at 64"),
        ({"rounds": 0}, "--rounds"),
        ({"batch_size": 0}, "--batch-size"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], words: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        bench_decode(replace(SMALL, model=str(folder), out=str(tmp_path / "out"), **changes), Console(quiet=True))


def test_other_programs_are_known_by_the_names_of_their_libraries() -> None:
    assert list(OTHERS) == ["transformers", "ctranslate2"]
