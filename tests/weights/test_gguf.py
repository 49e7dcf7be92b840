"""GGUF files: transformers reads the same model and tokens, keys and tensors are llama.cpp's, and the rest is refused."""

import importlib.util
import json
import os
import resource
import signal
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, Starcoder2Config
from transformers import GPT2Config as HFConfig

from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import gguf as package
from gpt2lab.weights.gguf import export_gguf, obstacle
from tests.reference import assert_differ, assert_same
from tests.test_checkpoint import DIED, DONE, RAISED, SURVIVED, at_each_operation, die, in_a_child, run_out_of_disk
from tests.weights import models
from tests.weights.models import ROPE, STORY, loud

TEXTS = [
    STORY,
    " \n\t don't  DON'T 3.14\u00a0\u3000x",
    "caf\u00e9 \U0001f680\u200d\u6211\u60f3 \u0663",
    "\x00\x1c\x85",
    string.printable,
]
FILE = "model.gguf"

EXPORTS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "no biases": {"bias": False},
    "a head of its own": {"tie_head": False},
    "grouped heads": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1, "bias": False},
    "a window as long as the context": {"windows": [None, 96]},
    "RoPE": ROPE,
    "RoPE, grouped heads, no biases": ROPE | {"num_kv_heads": 2, "bias": False},
    "RoPE, one key head, a head of its own": ROPE | {"num_kv_heads": 1, "tie_head": False},
    "RoPE, a window as long as the context": ROPE | {"windows": [96, 97]},
    "RoPE of another base": ROPE | {"num_kv_heads": 2, "rope_base": 500.5},
    "RoPE, linear": ROPE | {"rope_scaling": "linear", "rope_factor": 4.5},
    "RoPE, NTK": ROPE | {"rope_scaling": "ntk", "rope_factor": 4.0},
    "RoPE, YaRN": ROPE | {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_base": 100.0},
}
REFUSED = {
    "norm rmsnorm: llama.cpp has no architecture with it and GPT-2's other parts": {"norm": "rmsnorm"},
    "activation gelu: llama.cpp has no": {"activation": "gelu"},
    "activation relu2: llama.cpp has no": ROPE | {"activation": "relu2"},
    "activation swiglu: llama.cpp has no": ROPE | {"activation": "swiglu"},
    "qk_norm True: llama.cpp has no": ROPE | {"qk_norm": True},
    "logit_softcap 15.0: llama.cpp has no": {"logit_softcap": 15.0},
    "num_experts 4: llama.cpp has no": {"num_experts": 4, "experts_per_token": 2},
    "windows [None, 95]: llama.cpp would attend to all 96 tokens": {"windows": [None, 95]},
    "windows [95]: llama.cpp would attend to all 96 tokens": ROPE | {"windows": [95]},
    "rope_factor 5: llama.cpp's YaRN wants whole trained tokens, 7 or more, not 19.2": ROPE
    | {"rope_scaling": "yarn", "rope_factor": 5.0},
    "rope_factor 16: llama.cpp's YaRN wants whole trained tokens, 7 or more, not 6": ROPE
    | {"rope_scaling": "yarn", "rope_factor": 16.0},
    "vocab_size 289: the tokenizer has 290 tokens": {"vocab_size": 289},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe([STORY * 3], 290)


def read(folder: Path) -> dict[str, Any]:
    """Every key of a file and its value, by gguf's own reader; llama.cpp's keys without the architecture before them."""
    fields = GGUFReader(folder / FILE).fields
    keys = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    return {name.removeprefix(f"{keys['general.architecture']}."): value for name, value in keys.items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its name, the output dimension first; all must be fp32."""
    stored = GGUFReader(folder / FILE).tensors
    assert {tensor.tensor_type for tensor in stored} == {GGMLQuantizationType.F32}
    return {t.name: torch.tensor(t.data).view(t.shape.tolist()[::-1]) for t in stored}


def described(keys: dict[str, Any]) -> PretrainedConfig:
    """What the keys say, in transformers' words.

    transformers 5.23 turns the tensors around rightly, but of these keys it leaves some out: of gpt2, context_length (it
    fills n_ctx, which GPT2Config has no more) and feed_forward_length; of starcoder2, all that begin with rope.
    """
    common = {
        "vocab_size": len(keys["tokenizer.ggml.tokens"]),
        "bos_token_id": keys["tokenizer.ggml.bos_token_id"],
        "eos_token_id": keys["tokenizer.ggml.eos_token_id"],
    }
    if keys["general.architecture"] == "gpt2":
        assert keys["attention.head_count_kv"] == keys["attention.head_count"]
        return HFConfig(
            n_positions=keys["context_length"],
            n_embd=keys["embedding_length"],
            n_layer=keys["block_count"],
            n_head=keys["attention.head_count"],
            n_inner=keys["feed_forward_length"],
            layer_norm_epsilon=keys["attention.layer_norm_epsilon"],
            **common,
        )
    rope = {"rope_type": keys.get("rope.scaling.type", "default"), "rope_theta": keys["rope.freq_base"]}
    if "rope.scaling.factor" in keys:
        rope["factor"] = keys["rope.scaling.factor"]
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    return Starcoder2Config(
        max_position_embeddings=keys["context_length"],
        hidden_size=keys["embedding_length"],
        num_hidden_layers=keys["block_count"],
        num_attention_heads=keys["attention.head_count"],
        num_key_value_heads=keys["attention.head_count_kv"],
        intermediate_size=keys["feed_forward_length"],
        norm_epsilon=keys["attention.layer_norm_epsilon"],
        rope_parameters=rope,
        **common,
    )


def reread(folder: Path, config: PretrainedConfig | None = None) -> Any:
    """What transformers makes of a file."""
    if config is not None:
        config.tie_word_embeddings = "output.weight" not in tensors(folder)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, config=config, dtype=torch.float32).eval()


def logits(model: Any, time: int = 96) -> Tensor:
    return models.logits(model, torch.randint(300, (2, time), generator=torch.Generator().manual_seed(1)))


# --- The same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_reads_the_same_model(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = loud(**EXPORTS[name])
    exported = export_gguf(ours, tokenizer, tmp_path / FILE)
    theirs = reread(tmp_path, described(read(tmp_path)))
    assert type(theirs).__name__ == ("Starcoder2ForCausalLM" if "RoPE" in name else "GPT2LMHeadModel")
    assert exported.architecture == ("starcoder2" if "RoPE" in name else "gpt2")
    assert_same(logits(ours), logits(theirs), within=1e-4)
    assert_differ(logits(loud(1, **EXPORTS[name])), logits(theirs), by=1, what="another model")
    tokens = prompt = torch.arange(8)[None] * 31
    settings = {"do_sample": False, "max_new_tokens": 64, "min_new_tokens": 64, "pad_token_id": 0, "eos_token_id": None}
    generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    with torch.inference_mode():
        for _ in range(64):
            tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == tokens.tolist() and tokens.shape == (1, 72)


@pytest.mark.parametrize("name", [name for name in EXPORTS if {"rope_base", "rope_scaling"} & set(EXPORTS[name])])
def test_the_keys_of_rope_are_needed(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The control: without them, transformers reads another model."""
    ours = loud(**EXPORTS[name])
    export_gguf(ours, tokenizer, tmp_path / FILE)
    assert_differ(logits(ours), logits(reread(tmp_path)), by=0.1, what=f"{name}, read without its keys")


@pytest.mark.parametrize("changes", [{"max_seq_len": 1024, "ff_hidden_dim": 128}, ROPE], ids=["GPT-2", "RoPE"])
def test_where_transformers_reads_all_it_needs_no_help(
    changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = loud(**changes)
    export_gguf(ours, tokenizer, tmp_path / FILE)
    assert_same(logits(ours), logits(reread(tmp_path)), within=1e-4)


def test_what_was_rewritten_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = loud(num_kv_heads=2, bias=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export_gguf(model, tokenizer, tmp_path / FILE).changed == [
        "its 2 key and value heads are repeated to 4: a larger cache",
        "its biases are zeros: it was trained without",
    ]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.num_kv_heads == 2
    assert export_gguf(loud(**ROPE, num_kv_heads=2), tokenizer, tmp_path / FILE).changed == []


# --- As llama.cpp's converter writes it -------------------------------------------------------------------------------

KEYS = {
    "general.type": "model",
    "general.name": "model",
    "general.file_type": 0,
    "general.quantization_version": 2,
    "block_count": 2,
    "context_length": 96,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.bos_token_id": 289,
    "tokenizer.ggml.eos_token_id": 289,
    "tokenizer.ggml.add_bos_token": False,
}
GPT2_KEYS = KEYS | {"general.architecture": "gpt2", "attention.head_count_kv": 4}
ROPE_KEYS = KEYS | {
    "general.architecture": "starcoder2",
    "attention.head_count_kv": 2,
    "rope.freq_base": 10000.0,
}
KEYS_OF: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "GPT-2": ({"num_kv_heads": 2}, GPT2_KEYS),
    "RoPE": ({}, ROPE_KEYS),
    "another base": ({"rope_base": 500.5}, ROPE_KEYS | {"rope.freq_base": 500.5}),
    "linear": (
        {"rope_scaling": "linear", "rope_factor": 4.5},
        ROPE_KEYS | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.5},
    ),
    # 10000 * 4 ** (8 / 6), in fp32
    "NTK": ({"rope_scaling": "ntk", "rope_factor": 4.0}, ROPE_KEYS | {"rope.freq_base": 63496.04296875}),
    "YaRN": (
        {"rope_scaling": "yarn", "rope_factor": 4.0},
        ROPE_KEYS
        | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 24,
        },
    ),
}


@pytest.mark.parametrize(("changes", "expected"), KEYS_OF.values(), ids=KEYS_OF)
def test_every_key(changes: dict[str, Any], expected: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path) -> None:
    rope = ROPE | {"num_kv_heads": 2} if expected["general.architecture"] == "starcoder2" else {}
    export_gguf(loud(**rope | changes), tokenizer, tmp_path / FILE)
    keys = read(tmp_path)
    lists = {key: keys.pop(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")}
    assert keys.pop("attention.layer_norm_epsilon") == pytest.approx(1e-5, rel=1e-6)
    assert keys == expected
    tokenizer.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert {token: index for index, token in enumerate(lists["tokens"][:290])} == model["vocab"]
    assert lists["tokens"][290:] == [f"[PAD{index}]" for index in range(290, 300)]
    assert lists["token_type"] == [TokenType.NORMAL] * 289 + [TokenType.CONTROL] + [TokenType.UNUSED] * 10
    assert lists["merges"] == [f"{first} {second}" for first, second in model["merges"]] and len(lists["merges"]) == 33


NAMES = {
    "attn_norm": "attn_norm",
    "attn_output": "attn.output_proj",
    "ffn_norm": "mlp_norm",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "a head of its own"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_every_tensor(position: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = loud(position=position, num_kv_heads=4 if position == "learned" else 2, tie_head=tied)
    exported = export_gguf(model, tokenizer, tmp_path / FILE)
    ours, expected = model.state_dict(), {}
    for kind in ("weight", "bias"):
        expected[f"output_norm.{kind}"] = ours[f"final_norm.{kind}"]
        for layer in (0, 1):
            expected |= {
                f"blk.{layer}.{name}.{kind}": ours[f"blocks.{layer}.{our}.{kind}"] for name, our in NAMES.items()
            }
            qkv = ours[f"blocks.{layer}.attn.qkv_proj.{kind}"]
            pieces = {"attn_qkv": qkv}
            if position == "rope":
                pieces = {"attn_q": qkv[:32], "attn_k": qkv[32:48], "attn_v": qkv[48:]}
            expected |= {f"blk.{layer}.{name}.{kind}": piece for name, piece in pieces.items()}
    embedding = ours["token_embedding.weight"]
    assert embedding.shape == (320, 32)
    expected["token_embd.weight"] = embedding[:300]
    if position == "learned":
        expected["position_embd.weight"] = ours["position_embedding.weight"]
    if not tied:
        expected["output.weight"] = ours["head.weight"][:300]
    found = tensors(tmp_path)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert_same(found[name], tensor, within=0, what=name)
    assert_differ(
        found["blk.1.ffn_norm.weight"], found["blk.0.ffn_norm.weight"], by=0.1, what="the norm of another layer"
    )
    assert sorted(exported.map.loaded) == sorted(expected) and not exported.map.left_over
    cut = [
        f"{name} (20 rows that pad the vocabulary)"
        for name in ("token_embd.weight", "output.weight")
        if name in expected
    ]
    assert exported.map.cut == cut and not exported.map.transposed


# --- The same tokens --------------------------------------------------------------------------------------------------


def reread_ids(folder: Path) -> list[list[int]]:
    """The ids of TEXTS by the tokenizer that transformers makes of a file."""
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    assert theirs.bos_token == theirs.eos_token == "<|endoftext|>"
    return [list(theirs(text)["input_ids"]) for text in TEXTS]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_transformers_reads_the_same_tokens(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours = {"bpe": tokenizer, "bytes": Tokenizer.bytes()}[kind]
    export_gguf(loud(), ours, tmp_path / FILE)
    assert reread_ids(tmp_path) == [ours.encode(text).tolist() for text in TEXTS]
    other = Tokenizer.train_bpe([STORY * 3], 270)
    assert reread_ids(tmp_path) != [other.encode(text).tolist() for text in TEXTS]


def packed(key: str, strings: list[str]) -> bytes:
    """A list of strings as the format has it: the key, 9 for a list, 8 for strings, how many, each with its length."""
    encoded = [text.encode() for text in strings]
    items = b"".join(len(text).to_bytes(8, "little") + text for text in encoded)
    return key.encode() + b"".join(n.to_bytes(4, "little") for n in (9, 8)) + len(strings).to_bytes(8, "little") + items


def test_gpt2_s_own_tokens(data_folder: Path, tmp_path: Path) -> None:
    folder = data_folder / "gpt2-tokenizer"
    export_gguf(GPT2(50257, 8, 4, 1, 4, 1).eval(), Tokenizer.load(folder), tmp_path / FILE)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    content = (tmp_path / FILE).read_bytes()
    assert packed("tokenizer.ggml.tokens", sorted(vocab, key=vocab.__getitem__)) in content and len(vocab) == 50257
    assert packed("tokenizer.ggml.merges", merges) in content and len(merges) == 50000


def test_a_tokenizer_of_bytes_has_a_list_of_no_merges(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """llama.cpp refuses a file without the list; the gguf library by itself would leave it out."""
    export_gguf(loud(), Tokenizer.bytes(), tmp_path / FILE)
    assert packed("tokenizer.ggml.merges", []) in (tmp_path / FILE).read_bytes()
    export_gguf(loud(), tokenizer, tmp_path / FILE)
    assert packed("tokenizer.ggml.merges", []) not in (tmp_path / FILE).read_bytes()


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sentence", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_llama_cpp_does_not_run_is_refused(
    sentence: str, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = loud(**changes)
    found = obstacle(model.config, tokenizer)
    assert found is not None and found.startswith(sentence)
    with pytest.raises(ConfigError) as caught:
        export_gguf(model, tokenizer, tmp_path / "new" / FILE)
    assert f"llama.cpp does not run this model (model.{found.split()[0]}): {sentence}" in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "new").exists()
    assert obstacle(loud().config, tokenizer) is None


def changed(**changes: Any) -> Callable[[Tokenizer], Tokenizer]:
    """A tokenizer with other settings: of its splitter by their names, of its model by those that begin with model_."""

    def change(tokenizer: Tokenizer) -> Tokenizer:
        state = json.loads(tokenizer._backend.to_str())
        for key, value in changes.items():
            part, name = ("model", key.removeprefix("model_")) if key.startswith("model_") else ("pre_tokenizer", key)
            assert state[part][name] != value
            state[part][name] = value
        return Tokenizer(Backend.from_str(json.dumps(state)))

    return change


REFUSED_TOKENIZERS: dict[str, Callable[[Tokenizer], Tokenizer]] = {
    "tokenizer WordLevel: of GPT-2's kind, llama.cpp has byte-level BPE alone": lambda _: Tokenizer.chars([STORY]),
    "tokenizer use_regex false: llama.cpp splits text by GPT-2's rule": changed(use_regex=False),
    "tokenizer dropout 0.5: llama.cpp merges without it": changed(model_dropout=0.5),
    "tokenizer ignore_merges True: llama.cpp merges without it": changed(model_ignore_merges=True),
}


@pytest.mark.parametrize(("sentence", "change"), REFUSED_TOKENIZERS.items(), ids=REFUSED_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    sentence: str, change: Callable[[Tokenizer], Tokenizer], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        export_gguf(loud(), change(tokenizer), tmp_path / FILE)
    assert f"llama.cpp does not run this model (tokenizer): {sentence}" in str(caught.value)
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_without_the_library_the_fix_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the gguf library is not installed. Fix: pip install 'gpt2lab\[export\]'"):
        export_gguf(loud(), tokenizer, tmp_path / FILE)
    assert not list(tmp_path.iterdir())


# --- Whole or not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("act", "seen"), [(die, DIED), (run_out_of_disk, RAISED)], ids=["killed", "disk full"])
def test_a_writer_may_stop_at_any_operation(
    act: Callable[[], None], seen: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = loud(num_layers=1)
    export_gguf(model, tokenizer, tmp_path / "spare" / FILE)
    whole, path = (tmp_path / "spare" / FILE).read_bytes(), tmp_path / "new" / FILE
    path.parent.mkdir()
    path.write_bytes(b"old")
    codes = []
    for code in at_each_operation(lambda: void(export_gguf(model, tokenizer, path)), act):
        assert code in (seen, DONE, SURVIVED)
        assert path.read_bytes() in (b"old", whole) and (path.read_bytes() == whole or code == seen)
        if act is run_out_of_disk:
            assert os.listdir(path.parent) == [FILE]
        codes.append((code, path.read_bytes() == whole))
        path.write_bytes(b"old")
    print(len(codes))
    assert (seen, False) in codes and codes[-1] == (DONE, True) and len(codes) > 10
    export_gguf(model, tokenizer, path)
    assert os.listdir(path.parent) == [FILE] and path.read_bytes() == whole


def void(_: Any) -> None:
    """Throw a result away."""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_writer_may_die_in_the_middle_of_the_file(share: float, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The kernel kills it (SIGXFSZ) when the file grows beyond the limit."""
    model = loud()
    export_gguf(model, tokenizer, tmp_path / "spare" / FILE)
    limit = max(4096, int(share * (tmp_path / "spare" / FILE).stat().st_size))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        export_gguf(model, tokenizer, tmp_path / "new" / FILE)

    assert in_a_child(work) == -signal.SIGXFSZ
    assert os.listdir(tmp_path / "new") == [f".{FILE}.part"]
    export_gguf(model, tokenizer, tmp_path / "new" / FILE)
    assert os.listdir(tmp_path / "new") == [FILE]


def test_it_is_on_the_disk_before_it_has_its_name(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str, int]] = []
    sync, rename = package.sync, Path.replace

    def noted_sync(path: Path) -> None:
        done.append(("sync", path.name, path.stat().st_size if path.is_file() else 0))
        sync(path)

    def noted_replace(path: Path, target: Path) -> Path:
        done.append(("rename", target.name, path.stat().st_size))
        return rename(path, target)

    monkeypatch.setattr(package, "sync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    export_gguf(loud(), tokenizer, tmp_path / "new" / FILE)
    size = (tmp_path / "new" / FILE).stat().st_size
    assert done == [("sync", f".{FILE}.part", size), ("rename", FILE, size), ("sync", "new", 0)]
