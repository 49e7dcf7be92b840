"""Exports: the stock class of transformers computes the same, the folder comes back the same, and the rest is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import export, hf, save_model
from gpt2lab.weights.export import export_hf, native_for
from tests.reference import assert_differ, assert_same
from tests.weights import models
from tests.weights.models import ROPE, SHAPE, STORY, loud

EXPORTS: dict[str, tuple[dict[str, Any], str]] = {
    "GPT-2": ({}, "GPT2LMHeadModel"),
    "exact GELU": ({"activation": "gelu"}, "GPT2LMHeadModel"),
    "ReLU^2": ({"activation": "relu2"}, "GPT2LMHeadModel"),
    "no biases": ({"bias": False}, "GPT2LMHeadModel"),
    "a head of its own": ({"tie_head": False}, "GPT2LMHeadModel"),
    "grouped heads": ({"num_kv_heads": 2}, "GPT2LMHeadModel"),
    "a window as long as the context": ({"windows": [96]}, "GPT2LMHeadModel"),
    "one key head": ({"num_kv_heads": 1}, "GPTBigCodeForCausalLM"),
    "a window": ({"windows": [7]}, "GPTNeoForCausalLM"),
    "a window in every other layer": ({"windows": [None, 7]}, "GPTNeoForCausalLM"),
    "a window, grouped heads, no biases": ({"windows": [7], "num_kv_heads": 2, "bias": False}, "GPTNeoForCausalLM"),
    "RoPE": (ROPE, "Starcoder2ForCausalLM"),
    "RoPE, one key head, a window": (ROPE | {"num_kv_heads": 1, "windows": [7]}, "Starcoder2ForCausalLM"),
    "RoPE of another base": (ROPE | {"num_kv_heads": 2, "rope_base": 500.5}, "Starcoder2ForCausalLM"),
    "RoPE, linear": (ROPE | {"rope_scaling": "linear", "rope_factor": 4.0}, "Starcoder2ForCausalLM"),
    "RoPE, NTK": (ROPE | {"rope_scaling": "ntk", "rope_factor": 4.0}, "Starcoder2ForCausalLM"),
    "RoPE, YaRN": (ROPE | {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_base": 100.0}, "Starcoder2ForCausalLM"),
    "RoPE, no biases, a head of its own": (ROPE | {"bias": False, "tie_head": False}, "Starcoder2ForCausalLM"),
}
REFUSED = {
    "num_experts 4: beside GPT-2's other parts, no class": {"num_experts": 4, "experts_per_token": 2},
    "norm rmsnorm: beside": {"norm": "rmsnorm"},
    "activation swiglu: beside": ROPE | {"activation": "swiglu"},
    "qk_norm True: beside": ROPE | {"qk_norm": True},
    "logit_softcap 15.0: beside": {"logit_softcap": 15.0},
    "windows [5, None]: with RoPE, no class of transformers has windows that differ by layer": ROPE
    | {"windows": [5, None]},
    "windows [1]: its mask holds it": ROPE | {"windows": [1]},
    "windows [5, 7]: with learned positions, no class of transformers has two": {"windows": [5, 7]},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([STORY * 3], 290)


def logits(model: Any, time: int = 96) -> Tensor:
    return models.logits(model, torch.randint(250, (2, time), generator=torch.Generator().manual_seed(1)))


@torch.inference_mode()
def greedy(model: GPT2, prompt: Tensor, steps: int) -> Tensor:
    """Without a cache: the definition."""
    text = prompt
    for _ in range(steps):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    return text


def assert_runs_elsewhere(model: GPT2, folder: Path, architecture: str) -> Any:
    """The stock class has the same logits and the same 64 greedy tokens."""
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(stock).__name__ == architecture
    time = model.max_seq_len
    assert_same(logits(model, time), logits(stock, time), within=1e-4)
    prompt = torch.tensor([[5, 17, 211]])
    stock.generation_config.eos_token_id = None  # or it would end there, or be kept from saying it
    settings = {"do_sample": False, "max_new_tokens": 64, "pad_token_id": 0}
    theirs = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    ours = greedy(model, prompt, 64)
    assert ours.tolist() == theirs.tolist()
    return stock


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_runs_in_the_stock_class_and_comes_back(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    changes, architecture = EXPORTS[name]
    model, folder = loud(**changes), tmp_path / "out"
    exported = export_hf(model, tokenizer, folder)
    assert_runs_elsewhere(model, folder, architecture)
    assert exported.architecture == architecture and exported.max_logit_difference is not None
    assert exported.max_logit_difference < 1e-4 and exported.greedy_tokens == 64
    assert len(set(greedy(model, torch.tensor([[5, 17, 211]]), 64)[0].tolist())) > 3, (
        "one token again and again says little"
    )
    text = (folder / "README.md").read_text()
    assert f"{exported.max_logit_difference:.2g}" in text and architecture in text and "64 greedy tokens" in text
    assert not [path.name for path in tmp_path.iterdir() if path != folder]

    back = hf.read(folder)
    assert_same(logits(back.model), logits(model), within=2e-5)
    assert not back.map.missing and not back.map.left_over
    other = loud(seed=1, **changes)
    assert_differ(logits(other), logits(back.model), by=1, what="other weights")


@pytest.mark.parametrize(
    "name", [name for name, (changes, _) in EXPORTS.items() if not {"windows", "bias", "num_kv_heads"} & set(changes)]
)
def test_what_was_exported_comes_back_to_the_byte(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Where nothing had to be rewritten: our tensors, their file, our tensors; and their file, our tensors, their file."""
    model = loud(**EXPORTS[name][0])
    export_hf(model, tokenizer, tmp_path / "out", check=False)
    back = hf.read(tmp_path / "out").model
    for key, tensor in model.state_dict().items():
        there = (
            tensor[: model.vocab_size] if ("embedding" in key and "position" not in key) or "head" in key else tensor
        )
        assert torch.equal(back.state_dict()[key][: len(there)], there), key
    export_hf(back, tokenizer, tmp_path / "again", check=False)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    back.token_embedding.weight.data[3, 3] += 1e-3
    export_hf(back, tokenizer, tmp_path / "changed", check=False)
    assert (tmp_path / "changed" / "model.safetensors").read_bytes() != first


@st.composite
def exportable(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of a model that some class of transformers holds."""
    heads, kv_share, dim = (
        draw(st.sampled_from([1, 2, 3, 4, 6])),
        draw(st.sampled_from([1, 2, 3])),
        2 * draw(st.integers(2, 6)),
    )
    kv_heads = heads // kv_share if heads % kv_share == 0 else heads
    length, layers = draw(st.integers(67, 90)), draw(st.integers(1, 3))
    arguments = {
        "vocab_size": draw(st.integers(258, 330)), "max_seq_len": length, "embed_dim": heads * dim, "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([1, kv_heads, heads])), "ff_hidden_dim": draw(st.integers(8, 40)),
        "num_layers": layers, "activation": draw(st.sampled_from(["gelu_tanh", "gelu", "relu2"])),
        "bias": draw(st.booleans()), "tie_head": draw(st.booleans()), "dropout": draw(st.sampled_from([0.0, 0.1])),
    }  # fmt: skip
    window = draw(st.integers(2, length))
    if draw(st.booleans()):
        scaling = draw(st.sampled_from([None, "linear", "ntk"]))
        arguments |= {"position": "rope", "rope_base": draw(st.sampled_from([100.0, 9999.5, 10000.0, 1000000.0]))}
        arguments |= {"rope_scaling": scaling, "rope_factor": 2.0 if scaling else 1.0}
        arguments |= {"windows": draw(st.sampled_from([None, [window], [window] * layers]))}
    else:
        arguments |= {"windows": draw(st.lists(st.sampled_from([None, window]), min_size=1, max_size=layers))}
    return arguments


@settings(max_examples=48)
@given(arguments=exportable())
def test_whatever_can_be_exported_runs_elsewhere(
    arguments: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("export") / "out"
    model = loud(**arguments)
    exported = export_hf(model, Tokenizer.bytes(), folder, check=False)
    try:
        stock = assert_runs_elsewhere(model, folder, exported.architecture)
        with torch.no_grad():
            stock.get_input_embeddings().weight[:, 0] += 0.5
        assert_differ(
            logits(model, model.max_seq_len), logits(stock, model.max_seq_len), by=1e-2, what="another embedding"
        )
    finally:
        shutil.rmtree(folder)


def test_control_a_class_is_not_chosen_by_its_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Each switch that decides the class decides what is computed: written without it, the folder computes something else."""
    for changes in ({"windows": [7]}, ROPE | {"windows": [7]}, ROPE | {"rope_base": 100.0}):
        model = loud(**changes)
        plain = GPT2(**SHAPE | {key: value for key, value in changes.items() if key == "position"})
        plain.load_state_dict(model.state_dict())
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        export_hf(plain.eval(), tokenizer, folder, check=False)
        stock = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert_differ(logits(model), logits(stock), by=0.1, what=f"exported without {changes}")


def test_an_export_that_computes_something_else_is_not_left_behind(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.pour

    def wrong(model: GPT2, layout: Any) -> Any:
        tensors, found = right(model, layout)
        tensors["h.1.mlp.c_fc.bias"][3] += 0.05
        return tensors, found

    monkeypatch.setattr(export, "pour", wrong)
    with pytest.raises(CheckpointError, match="its logits differ by"):
        export_hf(loud(), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_no_class_holds_is_refused_with_the_reason(sentence: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GPT2(**SHAPE | REFUSED[sentence])
    with pytest.raises(ConfigError) as refusal:
        export_hf(model, tokenizer, tmp_path / "out")
    field = sentence.split()[0]
    assert sentence in str(refusal.value) and f"(model.{field})" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_every_model_is_held_or_refused() -> None:
    """No combination of switches falls through."""
    for position in ("learned", "rope"):
        for windows in (None, (5,), (5, 7), (None, 5), (200,)):
            for heads in (None, 1, 2):
                config = GPT2Config(
                    embed_dim=32, num_heads=4, num_kv_heads=heads or 4, position=position, windows=windows
                )
                if (position == "rope" and windows == (None, 5)) or windows == (5, 7):
                    with pytest.raises(ConfigError, match="windows"):
                        native_for(config)
                else:
                    assert native_for(config).obstacle(config) is None


def test_the_tokenizer_goes_along(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, words in enumerate((tokenizer, Tokenizer.bytes())):
        folder = tmp_path / str(number)
        export_hf(loud(), words, folder, check=False)
        theirs = AutoTokenizer.from_pretrained(folder)
        for text in (STORY, " a  b\n\n", "naïve café ☕", "x" * 50):
            assert theirs.encode(text, add_special_tokens=False) == words.encode(text).tolist()
            assert theirs.decode(words.encode(text).tolist()) == text
        assert theirs.eos_token_id == theirs.bos_token_id == words.end_of_text
        config = json.loads((folder / "config.json").read_text())
        assert config["eos_token_id"] == config["bos_token_id"] == words.end_of_text and config["n_ctx"] == 96
    assert tokenizer.encode(STORY).tolist() != Tokenizer.bytes().encode(STORY).tolist()


def test_a_folder_of_ours_is_exported_by_the_command(tokenizer: Tokenizer, tmp_path: Path, capsys: Any) -> None:
    from gpt2lab import cli

    save_model(tmp_path / "ours", loud(num_kv_heads=2), tokenizer)
    assert cli.run(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"loaded", "transposed", "cut", "missing", "left_over", "max_logit_difference"} <= said.keys()
    assert len(said["loaded"]) + len(said["transposed"]) == len(load_file(tmp_path / "out" / "model.safetensors"))
    assert said["cut"] == ["wte.weight (20 rows that pad the vocabulary)"] and said["max_logit_difference"] < 1e-4
    assert cli.run(["export", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert "will not overwrite" in capsys.readouterr().err
    assert cli.run(["export", str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 4


def test_a_neo_like_the_published_ones_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """EleutherAI's folders say attention_types and have mask buffers; their qkv has no biases."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=300, max_position_embeddings=96, hidden_size=32, num_layers=4, num_heads=4, window_size=7,
        attention_types=[[["global", "local"], 2]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    mask = torch.ones(1, 1, 96, 96).tril().bool()
    save_file(
        tensors | {f"transformer.h.{layer}.attn.attention.bias": mask.clone() for layer in range(4)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    found = hf.read(tmp_path)
    assert found.model.config.windows == (None, 7, None, 7)
    assert len(found.map.left_over) == 4 and "causal mask" in found.map.left_over[0]
    assert_same(logits(found.model), logits(theirs), within=1e-4)
    assert_differ(logits(loud(num_layers=4)), logits(theirs), by=1, what="another model")
