"""Hugging Face's GPT-2 as ours: the same logits and the same text, every tensor accounted for, and damage refused."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel

from gpt2lab.errors import CheckpointError, ConfigError, LabError, UntrustedFileError
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import hf, import_model, load_model, load_tokenizer, open_model
from tests.reference import assert_differ, assert_same
from tests.weights.models import STORY, THEIR_SHAPE, assert_same_greedy_text, logits, their_model

MATRICES = {
    f"h.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
}


def saved_model(folder: Path, seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """A model of theirs in `folder`, with a tokenizer."""
    model = their_model(seed, **changes)
    model.save_pretrained(folder)
    Tokenizer.train_bpe([STORY * 3], 280).save(folder)
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    folder = tmp_path_factory.mktemp("hf")
    return folder, saved_model(folder)


@pytest.fixture
def folder(original: tuple[Path, GPT2LMHeadModel], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original[0], tmp_path / "hf"))


# --- The same model ---------------------------------------------------------------------------------------------------


def test_the_logits_are_theirs(original: tuple[Path, GPT2LMHeadModel], tmp_path: Path) -> None:
    folder, theirs = original
    ours = load_model(str(folder))
    assert not ours.training and ours.vocab_size == 280 and ours.token_embedding.num_embeddings == 320
    assert_same(logits(ours), logits(theirs), within=1e-4)
    assert_differ(logits(ours), logits(saved_model(tmp_path, seed=1)), by=1, what="another model")


def test_the_greedy_text_is_theirs(original: tuple[Path, GPT2LMHeadModel]) -> None:
    folder, theirs = original
    model, tokenizer = open_model(str(folder))
    assert_same_greedy_text(model, tokenizer, theirs)


def test_gpt2_s_own_vocabulary(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = saved_model(tmp_path, vocab_size=50257, n_embd=16, n_layer=1)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setenv("GPT2LAB_DATA", str(data_folder))
    model, without = open_model(str(tmp_path))
    assert_same(logits(model), logits(theirs), within=1e-4)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data_folder / "gpt2-tokenizer" / name, tmp_path)
    assert load_tokenizer(str(tmp_path)).fingerprint == without.fingerprint
    assert without.encode("First Citizen:").tolist() == [5962, 22307, 25]


def test_the_124m_shape(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About 10 seconds and 500 MB of disk, given back at the end."""
    monkeypatch.setenv("GPT2LAB_DATA", str(data_folder))
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(HFConfig()).eval()
    theirs.save_pretrained(tmp_path / "124M")
    ours = load_model(str(tmp_path / "124M"))
    shutil.rmtree(tmp_path / "124M")
    assert ours.num_parameters() == 124_439_808 == theirs.num_parameters()
    assert_same(logits(ours), logits(theirs), within=1e-4)
    with torch.no_grad():
        ours.final_norm.bias[0] += 0.1
    assert_differ(logits(ours), logits(theirs), by=1e-3, what="one number of 124 million moved by 0.1")


# --- Layouts ----------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Replace the tensors of a folder; `change` gets them without their prefix."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / hf.WEIGHTS).items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in change(tensors).items()}, folder / hf.WEIGHTS)


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda tensors: {prefix + name: t for name, t in tensors.items()})


def with_buffers(folder: Path) -> None:
    mask, minus = torch.ones(1, 1, 64, 64).tril().bool(), torch.tensor(-1e4)
    buffers = {f"h.{layer}.attn.{name}": t for layer in (0, 1) for name, t in (("bias", mask), ("masked_bias", minus))}
    rewrite(folder, lambda tensors: tensors | buffers)


def with_head(folder: Path) -> None:
    rewrite(
        folder,
        lambda tensors: {f"transformer.{n}": t for n, t in tensors.items()} | {"lm_head.weight": tensors["wte.weight"]},
    )


def sharded(folder: Path) -> None:
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / hf.WEIGHTS).unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 2 and (folder / hf.INDEX).is_file()


def old_config(folder: Path) -> None:
    keys = {"model_type", "n_ctx", *THEIR_SHAPE}
    known = json.loads((folder / hf.CONFIG).read_text()) | {"n_ctx": 64}
    (folder / hf.CONFIG).write_text(json.dumps({key: value for key, value in known.items() if key in keys}))


def in_float64(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor.double() for name, tensor in tensors.items()})


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "as it is": lambda folder: None,
    "no prefix": prefixed(""),
    "module": prefixed("module.transformer."),
    "compiled": prefixed("_orig_mod.transformer."),
    "compiled in a module": prefixed("module._orig_mod."),
    "old buffers": with_buffers,
    "tied head": with_head,
    "sharded": sharded,
    "old config": old_config,
    "float64": in_float64,
}


def tensor_names(folder: Path) -> list[str]:
    return sorted(name for path in folder.glob("*.safetensors") for name in load_file(path))


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_is_the_same_model_and_every_tensor_is_accounted_for(
    change: Callable[[Path], None], folder: Path, original: tuple[Path, GPT2LMHeadModel]
) -> None:
    change(folder)
    found = hf.read(folder)
    assert_same(logits(found.model), logits(original[1]), within=1e-4)
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    left_over = [name.split(" (")[0] for name in found.map.left_over]
    assert sorted([*found.map.loaded, *found.map.transposed, *left_over]) == tensor_names(folder)
    stripped = {name.split("transformer.")[-1].split("_orig_mod.")[-1] for name in found.map.transposed}
    assert (
        stripped == MATRICES
        and len(found.map.loaded) == 28 - len(MATRICES)
        and not found.map.missing
        and not found.map.cut
    )


def test_what_holds_nothing_to_learn_from_is_listed_with_the_reason(folder: Path) -> None:
    with_buffers(folder)
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["wte.weight"], "score.weight": torch.zeros(3)})
    assert sorted(hf.read(folder).map.left_over) == sorted(
        [
            f"h.{layer}.attn.{name} (the causal mask, which is a rule here)"
            for layer in (0, 1)
            for name in ("bias", "masked_bias")
        ]
        + ["lm_head.weight (tied to the token embedding)", "score.weight (no part of this model)"]
    )


def test_a_number_that_moved_in_the_file_moves_the_logits(folder: Path, original: tuple[Path, GPT2LMHeadModel]) -> None:
    """The control for all layouts: each tensor of the file reaches the model."""
    for name in ("wte.weight", "wpe.weight", "ln_f.bias", "h.1.ln_2.weight", *sorted(MATRICES)):
        rewrite(folder, lambda tensors, name=name: tensors | {name: tensors[name].flip(0)})
        assert_differ(logits(load_model(str(folder))), logits(original[1]), by=0.1, what=name)
        rewrite(folder, lambda tensors, name=name: tensors | {name: tensors[name].flip(0)})
    assert_same(logits(load_model(str(folder))), logits(original[1]), within=1e-4)


# --- Refused ----------------------------------------------------------------------------------------------------------


def tensors(**changes: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """A folder where some tensors are gone (None) or others; __ stands for the dot."""

    def change(all_: dict[str, Tensor]) -> dict[str, Tensor]:
        for key, function in changes.items():
            name = key.replace("__", ".")
            tensor = all_.pop(name)
            if function is not None:
                all_[name] = function(tensor)
        return all_

    return lambda folder: rewrite(folder, change)


def config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / hf.CONFIG).write_text(json.dumps(json.loads((folder / hf.CONFIG).read_text()) | changes))

    return damage


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: void((folder / name).write_bytes(content.encode() if isinstance(content, str) else content))


def index(content: Any) -> Callable[[Path], None]:
    """Weights in shards, by an index that says `content`."""

    def damage(folder: Path) -> None:
        (folder / hf.WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / hf.INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def leads_out(folder: Path) -> None:
    """Weights that are there and whole, but one folder above."""
    index({"weight_map": {"wte.weight": "../model.safetensors"}})(folder)
    (folder / "model-00001-of-00001.safetensors").rename(folder.parent / hf.WEIGHTS)


def without(*names: str, then: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
        then(folder)

    return damage


def void(_: Any) -> None:
    """For lambdas that return nothing."""


def untied(folder: Path) -> None:
    rewrite(folder, lambda all_: all_ | {"lm_head.weight": all_["wte.weight"] + 1e-3})


def number_for_a_head(folder: Path) -> None:
    rewrite(folder, lambda all_: all_ | {"lm_head.weight": torch.tensor(1.0)})


def twice(folder: Path) -> None:
    rewrite(folder, lambda all_: all_ | {"transformer.wpe.weight": all_["wpe.weight"] + 1})


def more_rows(rows: int) -> Callable[[Path], None]:
    return tensors(wte__weight=lambda t: torch.cat([t, torch.ones(rows - len(t), t.shape[1])]))


def truncated(folder: Path) -> None:
    os.truncate(folder / hf.WEIGHTS, (folder / hf.WEIGHTS).stat().st_size - 1)


def shape_lies(folder: Path) -> None:
    content = (folder / hf.WEIGHTS).read_bytes()
    (folder / hf.WEIGHTS).write_bytes(content.replace(b"[280,32]", b"[281,32]", 1))


def header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A safetensors file whose header is another one."""

    def damage(folder: Path) -> None:
        content = (folder / hf.WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        changed = change(content[8 : 8 + length].rstrip())
        (folder / hf.WEIGHTS).write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])

    return damage


def many_tensors(_: bytes) -> bytes:
    return json.dumps({f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10_001)}).encode()


def append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def elsewhere(name: str) -> Callable[[Path], None]:
    """A file that is whole, but lies one folder above, and a link to it."""

    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / f"other-{name}")
        (folder / name).symlink_to(folder.parent / f"other-{name}")

    return damage


def pipe(name: str) -> Callable[[Path], None]:
    return without(name, then=lambda folder: os.mkfifo(folder / name))


def big_merges(folder: Path) -> None:
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").touch()
    os.truncate(folder / "merges.txt", 100 * 2**20)


def holes(folder: Path) -> None:
    known = json.loads((folder / "tokenizer.json").read_text())
    known["model"]["vocab"]["<|endoftext|>"] = 1000
    (folder / "tokenizer.json").write_text(json.dumps(known))


def pickled_shards(folder: Path) -> None:
    without(hf.WEIGHTS)(folder)
    write("pytorch_model-00001-of-00001.bin", b"\x80\x04cos\nsystem\n(S'true'\ntR.")(folder)
    write("pytorch_model.bin.index.json", '{"weight_map": {"wte.weight": "pytorch_model-00001-of-00001.bin"}}')(folder)


PICKLE = without(hf.WEIGHTS, then=write("pytorch_model.bin", b"\x80\x04cos\nsystem\n"))
REFUSED: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "only a pickle": (PICKLE, 8, "pytorch_model.bin.*(os|posix).system"),
    "no weights": (without(hf.WEIGHTS), 4, "neither model.safetensors nor"),
    "a tensor missing": (tensors(h__1__mlp__c_fc__weight=None), 4, "missing h.1.mlp.c_fc.weight"),
    "many tensors missing": (config(n_layer=9), 4, "missing h.2.ln_1.weight; .*; and 79 more"),
    "a short table": (tensors(wpe__weight=lambda t: t[:32]), 4, r"weight is \(32, 32\), not \(64, 32\)"),
    "a matrix as Linear holds it": (
        tensors(h__0__attn__c_attn__weight=lambda t: t.T), 4, r"c_attn.weight is \(96, 32\), not \(32, 96\)"
    ),
    "a matrix of three dimensions": (
        tensors(h__0__attn__c_attn__weight=lambda t: t[None]), 4, r"c_attn.weight is \(1, 32, 96\), not \(32, 96\)"
    ),
    "an embedding without dimensions": (tensors(wte__weight=lambda t: t[0, 0]), 4, r"wte.weight is \(\), not \(280, 32\)"),
    "an embedding of one dimension": (tensors(wte__weight=lambda t: t[0]), 4, r"wte.weight is \(32,\), not \(280, 32\)"),
    "a short embedding": (tensors(wte__weight=lambda t: t[:100]), 4, r"wte.weight is \(100, 32\), not \(280, 32\)"),
    "rows beyond the vocabulary": (more_rows(300), 4, r"wte.weight is \(300, 32\), not \(280, 32\)"),
    "as many rows as ours is padded to": (more_rows(320), 4, r"wte.weight is \(320, 32\), not \(280, 32\)"),
    "a larger vocabulary": (config(vocab_size=281), 4, r"wte.weight is \(280, 32\), not \(281, 32\)"),
    "a tensor twice": (twice, 4, "wpe.weight is there twice, also as .*wpe.weight"),
    "NaN": (tensors(ln_f__bias=lambda t: t * torch.nan), 4, "ln_f.bias has numbers that are not finite"),
    "infinity": (tensors(wpe__weight=lambda t: t / 0), 4, "wpe.weight has numbers that are not finite"),
    "a head of its own": (untied, 4, "lm_head.weight is not the token embedding, but this model's head is tied"),
    "a head without dimensions": (number_for_a_head, 4, "lm_head.weight is not the token embedding"),
    "relu": (config(activation_function="relu"), 4, "activation_function is 'relu'; known are"),
    "another model": (config(model_type="bert"), 4, "model_type is 'bert'; known are gpt2, gpt_bigcode"),
    "a model type that is a list": (config(model_type=["gpt2"]), 4, "model_type is"),
    "another class's config": (config(model_type="gpt_neo"), 4, "weights do not fit"),
    "another epsilon": (config(layer_norm_epsilon=1e-6), 4, "layer_norm_epsilon is 1e-06"),
    "scores not scaled": (config(scale_attn_weights=False), 4, "scale_attn_weights is False"),
    "scores scaled by layer": (config(scale_attn_by_inverse_layer_idx=True), 4, "scale_attn_by_inverse_layer_idx"),
    "cross attention": (config(add_cross_attention=True), 4, "add_cross_attention is True"),
    "heads that do not divide": (config(n_head=5), 4, "num_heads 5 does not divide embed_dim 32"),
    "a huge width": (config(n_embd=10**9), 4, "n_embd: Input should be less than or equal to 1048576"),
    "a huge number": (write(hf.CONFIG, '{"model_type": "gpt2", "n_embd": 1' + "0" * 5000 + "}"), 4, "unusable JSON"),
    "no heads": (config(n_head=0), 4, "n_head: Input should be greater than or equal to 1"),
    "a number as text": (config(n_layer="2"), 4, "n_layer: Input should be a valid integer"),
    "a number as truth": (config(n_layer=True), 4, "n_layer: Input should be a valid integer"),
    "an empty config": (write(hf.CONFIG, ""), 4, "unusable JSON"),
    "a config that is a list": (write(hf.CONFIG, "[]"), 4, "model_type is None"),
    "half a config": (write(hf.CONFIG, '{"model_type": "gp'), 4, "unusable JSON"),
    "a config of brackets": (write(hf.CONFIG, "[" * 100_000), 4, "unusable JSON"),
    "a config that is no text": (write(hf.CONFIG, b"\xff\xfe"), 4, "unusable JSON"),
    "a config of 2 MB": (write(hf.CONFIG, "{" + " " * 2**21 + "}"), 4, "1048576 are allowed"),
    "an index that leads out": (leads_out, 4, r"it names '\.\./model.safetensors', which is no"),
    "an index of what is not there": (index({"weight_map": {"a": "b.safetensors"}}), 4, "it names 'b.safetensors'"),
    "an index of nothing": (index({"weight_map": {}}), 4, "missing wte.weight"),
    "an index that is a list": (index([]), 4, "unusable index"),
    "an index of numbers": (index({"weight_map": {"wte.weight": 5}}), 4, "no weight_map from tensors to files"),
    "an index of brackets": (index("[" * 100_000), 4, "nested too deep"),
    "half an index": (index('{"weight_map": {'), 4, "unusable JSON"),
    "an index of a pickle": (index({"weight_map": {"wte.weight": "tokenizer.json"}}), 4, "which is no safetensors file"),
    "an index of 300 shards": (index({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(300)}}), 4, "300 files; 256"),
    "truncated weights": (truncated, 4, "unusable weights"),
    "empty weights": (write(hf.WEIGHTS, b""), 4, "unusable weights"),
    "a pickle renamed": (write(hf.WEIGHTS, b"\x80\x04cos\nsystem\n"), 4, "unusable weights"),
    "a header of 2**60 bytes": (write(hf.WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"), 4, "unusable weights"),
    "a shape that lies": (shape_lies, 4, "unusable weights"),
    "a header that says a tensor twice": (header(lambda h: h[:-1] + b"," + h[1:]), 4, "stands there twice"),
    "a header of brackets": (header(lambda h: b"[" * 100_000), 4, "the header is no JSON"),
    "a header of 5 MB": (header(lambda h: h + b" " * 5 * 2**20), 4, "4194304 are allowed"),
    "a header that is a list": (header(lambda h: b"[]"), 4, "no list of at most 10000 tensors"),
    "a header of 10001 tensors": (header(many_tensors), 4, "no list of at most 10000 tensors"),
    "a header of numbers": (header(lambda h: h.replace(b'"F32"', b"32", 1)), 4, "cannot be"),
    "a dtype that is none": (header(lambda h: h.replace(b'"F32"', b'"F31"', 1)), 4, "cannot be"),
    "another dtype of the same width": (header(lambda h: h.replace(b'"F32"', b'"I64"', 1)), 4, "cannot be"),
    "a shape of 2**60": (header(lambda h: h.replace(b"[280,32]", b"[1152921504606846976,32]", 1)), 4, "cannot be"),
    "a negative shape": (header(lambda h: h.replace(b"[280,32]", b"[-280,-32]", 1)), 4, "cannot be"),
    "a shape of truths": (header(lambda h: h.replace(b"[280,32]", b"[true,8960]", 1)), 4, "cannot be"),
    "tensors that overlap": (header(lambda h: re.sub(rb"\[0,(\d+)\]", rb"[4,\1]", h, count=1)), 4, "cannot be|begins at"),
    "bytes of no tensor": (lambda f: void(append(f / hf.WEIGHTS, b"more")), 4, "bytes, but .* are there"),
    "weights that are a folder": (without(hf.WEIGHTS, then=lambda f: (f / hf.WEIGHTS).mkdir()), 8, "it is no plain file"),
    "weights that are a pipe": (without(hf.WEIGHTS, then=lambda f: os.mkfifo(f / hf.WEIGHTS)), 8, "it is no plain file"),
    "weights that are a device": (without(hf.WEIGHTS, then=link(hf.WEIGHTS, "/dev/zero")), 8, "it is no plain file"),
    "weights that are a link elsewhere": (elsewhere(hf.WEIGHTS), 8, "it is a link to .*, outside its folder"),
    "weights that are a link to themselves": (without(hf.WEIGHTS, then=link(hf.WEIGHTS, hf.WEIGHTS)), 4, "no weights"),
    "a sparse file of 1 TB": (lambda f: os.truncate(f / hf.WEIGHTS, 2**40), 4, "unusable weights"),
    "a config that is a pipe": (without(hf.CONFIG, then=lambda f: os.mkfifo(f / hf.CONFIG)), 4, "no such model"),
    "a config that is a link elsewhere": (elsewhere(hf.CONFIG), 8, "outside its folder"),
    "a config that says a thing twice": (write(hf.CONFIG, '{"n_embd": 32, "n_embd": 64}'), 4, "stands there twice"),
    "not a number": (config(layer_norm_epsilon=float("nan")), 4, "layer_norm_epsilon is nan"),
    "more layers than there is memory": (config(n_embd=2**20, n_head=2**10, n_layer=1024), 4, r"not \(1048576, 3145728\)"),
    "a tokenizer of a foreign kind": (write("tokenizer.json", '{"model": {}}'), 4, "damaged tokenizer"),
    "a tokenizer that is a pipe": (pipe("tokenizer.json"), 4, "no tokenizer|damaged"),
    "a merges file of 100 MB": (big_merges, 4, "damaged tokenizer"),
    "a tokenizer with holes": (holes, 4, "unusable tokenizer"),
    "only a sharded pickle": (pickled_shards, 8, "is a pickle|pickled code"),
    "a checkpoint folder of torch": (without(hf.WEIGHTS, then=write(".metadata", b"\x80\x04cos\nsystem\n")), 8, "pickle"),
    "training arguments alone": (without(hf.WEIGHTS, then=write("training_args.bin", b"\x80\x04cos\nsystem\n")), 8, "pickle"),
    "a larger tokenizer": (lambda f: Tokenizer.train_bpe([STORY * 3], 281).save(f), 4, "the tokenizer has 281 tokens"),
    "no tokenizer": (without("tokenizer.json"), 4, "no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "exit_code", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(damage: Callable[[Path], None], exit_code: int, sentence: str, folder: Path, tmp_path: Path) -> None:
    damage(folder)
    with pytest.raises(LabError, match=sentence) as caught:
        import_model(str(folder), tmp_path / "ours")
    assert caught.value.exit_code == exit_code and "Fix: " in str(caught.value) and not (tmp_path / "ours").exists()


# --- Into a folder of ours --------------------------------------------------------------------------------------------


def test_an_imported_model_opens_from_its_own_folder(
    folder: Path, original: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    found = import_model(str(folder), tmp_path / "a" / "ours")
    shutil.rmtree(folder)
    model, tokenizer = open_model(str(tmp_path / "a" / "ours"))
    assert_same(logits(model), logits(found.model), within=0)
    assert_same(logits(model), logits(original[1]), within=1e-4)
    assert model.config == found.model.config and not model.training
    assert tokenizer.fingerprint == found.tokenizer.fingerprint == Tokenizer.train_bpe([STORY * 3], 280).fingerprint


def test_a_folder_that_holds_something_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    for taken in (tmp_path / "mine", tmp_path / "mine" / "letter.txt"):
        with pytest.raises(ConfigError, match="it is there and not empty"):
            import_model(str(folder), taken)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    import_model(str(folder), tmp_path / "empty")


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "fetch", lambda *args: pytest.fail("asked the network"))
    (tmp_path / "nothing").mkdir()
    for name in (str(tmp_path / "nothing"), str(tmp_path / "no" / "such"), "no such", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such model"):
            open_model(name)
        with pytest.raises(CheckpointError, match="no such model"):
            import_model(name, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "gpt2"),
        ("gpt2-xl", "gpt2-xl"),
        ("me/my.gpt-2", "me/my.gpt-2"),
        ("gpt2@607a30d", "gpt2@607a30d"),
    ],
)
def test_a_hub_name_is_fetched(
    name: str, repository: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf, "fetch", fetch)
    import_model(name, tmp_path / "ours")
    assert asked == [repository]


def test_a_folder_s_own_code_is_not_run_and_that_is_said(folder: Path) -> None:
    config(auto_map={"AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
    assert hf.read(folder).notes == ["auto_map is ignored: no code of the folder is run"]
    assert not (folder / "canary").exists()


def test_a_pickled_state_dict_is_read_where_the_user_allows_it(
    folder: Path, original: tuple[Path, GPT2LMHeadModel], tmp_path: Path
) -> None:
    """By a child process; and what wants more than tensors is refused all the same."""
    torch.save(original[1].state_dict(), folder / "pytorch_model.bin")
    (folder / hf.WEIGHTS).unlink()
    with pytest.raises(UntrustedFileError, match=r"pytorch_model.bin.*--allow-pickle"):
        import_model(str(folder), tmp_path / "ours")
    found = import_model(str(folder), tmp_path / "ours", allow_pickle=True)
    assert_same(logits(found.model), logits(original[1]), within=1e-4)
    write("pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")(folder)
    with pytest.raises(UntrustedFileError, match=r"(os|posix).system"):
        import_model(str(folder), tmp_path / "other", allow_pickle=True)


def test_pickles_beside_safetensors_are_not_looked_at(folder: Path, original: tuple[Path, GPT2LMHeadModel]) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "random_states_0.pkl", "pytorch_model.bin"):
        write(name, b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")(folder)
    assert_same(logits(hf.read(folder).model), logits(original[1]), within=1e-4)


@settings(max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), where=st.sampled_from(["header", "config"]))
def test_a_byte_changed_anywhere_is_a_model_or_one_line(
    place: float,
    byte: int,
    where: str,
    original: tuple[Path, GPT2LMHeadModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Headers and configs with one byte changed: another model that can be, or a refusal; never anything else."""
    folder = tmp_path_factory.mktemp("mutated") / "hf"
    shutil.copytree(original[0], folder)
    path = folder / (hf.WEIGHTS if where == "header" else hf.CONFIG)
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little") if where == "header" else len(content)
    content[int(place * length)] = byte
    path.write_bytes(content)
    try:
        assert not hf.read(folder).map.missing
    except (CheckpointError, UntrustedFileError) as refusal:
        lines = str(refusal).splitlines()
        assert len(lines) == 1
    finally:
        shutil.rmtree(folder)
