"""llm.c's model files as ours: the same logits and text, the padding of the vocabulary cut, and damage refused."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2lab.errors import CheckpointError, LabError, UntrustedFileError
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import llmc
from tests.reference import assert_differ, assert_same
from tests.weights.models import STORY, assert_same_greedy_text, logits, their_model

HEADER = {
    "magic": 20240326, "version": 3, "max_seq_len": 64, "vocab_size": 280, "num_layers": 2, "num_heads": 4,
    "channels": 32, "padded_vocab_size": 384,
}  # fmt: skip
IN_A_BLOCK = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split()
NUMBERS = (384 + 64 + 2) * 32 + 2 * (12 * 32 + 13) * 32


def write(path: Path, model: GPT2LMHeadModel, dtype: torch.dtype = torch.float32, **header: int) -> None:
    """A model file as llm.c's train_gpt2.py writes it; `header` says other things than those that are true."""
    values = list((HEADER | header).values())
    weights = model.transformer.state_dict()
    padding = torch.full((384 - 280, 32), 1e4)  # not read, or it would be seen
    tensors = [weights["wte.weight"], padding, weights["wpe.weight"]]
    for name in IN_A_BLOCK:
        for kind in ("weight", "bias"):
            for layer in (0, 1):
                tensor = weights[f"h.{layer}.{name}.{kind}"]
                tensors.append(tensor.T if tensor.ndim == 2 else tensor)  # theirs have the input dimension first
    tensors += [weights["ln_f.weight"], weights["ln_f.bias"]]
    content = b"".join(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
    path.write_bytes(struct.pack("<256i", *values, *[0] * (256 - len(values))) + content)


@pytest.fixture(scope="module")
def theirs() -> GPT2LMHeadModel:
    return their_model()


@pytest.fixture
def path(tmp_path: Path, theirs: GPT2LMHeadModel) -> Path:
    """A model file with a tokenizer beside it."""
    write(tmp_path / "gpt2.bin", theirs)
    Tokenizer.train_bpe([STORY * 3], 280).save(tmp_path)
    return tmp_path / "gpt2.bin"


# --- The same model ---------------------------------------------------------------------------------------------------


def test_the_logits_are_theirs(path: Path, theirs: GPT2LMHeadModel) -> None:
    assert llmc.recognises(path)
    found = llmc.read(path)
    ours = found.model
    assert not ours.training and ours.vocab_size == 280 and {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(logits(ours), logits(theirs), within=1e-4)
    assert_differ(logits(ours), logits(their_model(seed=1)), by=1, what="another model")
    assert not ours.token_embedding.weight[280:].any(), "rows that are no tokens"


def test_every_tensor_is_accounted_for(path: Path) -> None:
    found = llmc.read(path).map
    in_a_block = "ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb".split()
    expected = ["wte", "wpe", *(f"{name}[{layer}]" for name in in_a_block for layer in (0, 1)), "lnfw", "lnfb"]
    assert found.loaded == expected and found.cut == ["wte (104 rows that pad the vocabulary)"]
    assert not found.transposed and not found.missing and not found.left_over


def test_the_greedy_text_is_theirs(path: Path, theirs: GPT2LMHeadModel) -> None:
    found = llmc.read(path)
    assert_same_greedy_text(found.model, found.tokenizer, theirs)


def test_bf16_is_read_as_it_is(path: Path) -> None:
    theirs = their_model()
    exact = logits(theirs)
    write(path, theirs, torch.bfloat16, version=5)
    assert path.stat().st_size == 1024 + 2 * NUMBERS
    ours = llmc.read(path).model
    assert_same(logits(ours), logits(theirs.to(torch.bfloat16).float()), within=1e-4)
    assert_differ(logits(ours), exact, by=5e-3, what="before it was rounded")


def test_a_number_that_moved_in_the_file_moves_the_logits(path: Path, theirs: GPT2LMHeadModel) -> None:
    """The control: each tensor of the file reaches the model, and its own place in it."""
    for name, tensor in theirs.transformer.state_dict().items():
        changed = their_model()
        with torch.no_grad():
            changed.transformer.state_dict()[name].copy_(tensor.flip(-1))
        write(path, changed)
        ours = logits(llmc.read(path).model)
        assert_same(ours, logits(changed), within=1e-4)
        assert_differ(ours, logits(theirs), by=1e-2, what=name)


def test_a_vocabulary_that_needs_no_padding_is_not_cut(path: Path, theirs: GPT2LMHeadModel) -> None:
    content = path.read_bytes()
    rows = 384 * 32 * 4
    header = struct.pack("<8i", *(HEADER | {"padded_vocab_size": 280}).values()) + content[32:1024]
    path.write_bytes(header + content[1024 : 1024 + 280 * 32 * 4] + content[1024 + rows :])
    found = llmc.read(path)
    assert_same(logits(found.model), logits(theirs), within=1e-4)
    assert found.map.cut == []


def test_the_tokenizer_is_the_one_beside_the_file_or_the_one_that_is_named(path: Path) -> None:
    assert llmc.read(path).tokenizer.fingerprint == Tokenizer.train_bpe([STORY * 3], 280).fingerprint
    assert llmc.read(path, "bytes").tokenizer.fingerprint == Tokenizer.bytes().fingerprint


def test_what_is_no_file_of_llm_c_is_not_recognised(path: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "zeros.bin").symlink_to("/dev/zero")
    (tmp_path / "empty.bin").touch()
    (tmp_path / "short.bin").write_bytes(path.read_bytes()[:3])
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    for name in ("pipe.bin", "zeros.bin", "empty.bin", "short.bin", "pickle.bin", "nothing.bin", ".", "n" * 300):
        assert not llmc.recognises(tmp_path / name), name


# --- Refused ----------------------------------------------------------------------------------------------------------

Damage = Callable[[Path], Any]


def header(*magic: int, **changes: int) -> Damage:
    """The same weights under another header."""
    values = list((HEADER | changes).values())
    values[: len(magic)] = magic
    return lambda path: path.write_bytes(struct.pack("<8i", *values) + path.read_bytes()[32:])


def resized(change: int) -> Damage:
    return lambda path: path.write_bytes((path.read_bytes() + bytes(max(0, change)))[: 1024 + 4 * NUMBERS + change])


def elsewhere(path: Path) -> None:
    """A link to the file, which now lies in another folder."""
    (path.parent / "elsewhere").mkdir()
    path.rename(path.parent / "elsewhere" / "gpt2.bin")
    path.symlink_to(path.parent / "elsewhere" / "gpt2.bin")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def not_finite(number: float) -> Damage:
    """The last number of the file, in lnfb, is another."""
    return lambda path: path.write_bytes(path.read_bytes()[:-4] + struct.pack("<f", number))


SIZES = "max_seq_len vocab_size num_layers num_heads channels padded_vocab_size".split()
REFUSED: dict[str, tuple[Damage, int, str]] = {
    "tokens": (header(20240520, 1), 4, "it is tokens, not weights"),
    "tokens of Llama 3": (header(20240801, 7), 4, "it is tokens, not weights"),
    "an evaluation": (header(20240522, 1), 4, "it is the questions of an evaluation"),
    "the state of a run": (header(20240527, 1), 4, "it is the state of an optimizer"),
    "the numbers of a test": (header(20240327, 2), 4, "it is numbers to test an implementation with"),
    "a tokenizer": (header(20240328, 2), 4, "it is a tokenizer"),
    "a Llama 3": (header(20240803, 3), 4, "it is a Llama 3, not a GPT-2"),
    "another magic": (header(20240325), 4, "it begins with 20240325, not 20240326"),
    "a big-endian magic": (lambda path: path.write_bytes(struct.pack(">256i", *[20240326] * 256)), 4, "it begins with"),
    "nothing": (lambda path: path.write_bytes(b""), 4, "it begins with 0"),
    "version 1": (header(version=1), 4, "its version is 1, from before the vocabulary was padded"),
    "version 4": (header(version=4), 4, r"its version is 4; 3 \(float32\) and 5 \(bfloat16\) are read"),
    "a negative version": (header(version=-3), 4, "its version is -3"),
    "fp32 that is called bf16": (header(version=5), 4, "where its header describes 80640"),
    "half a header": (lambda path: path.write_bytes(path.read_bytes()[:512]), 4, "it has 512 bytes; its header alone"),
    "a header alone": (lambda path: path.write_bytes(path.read_bytes()[:1024]), 4, "it has 1024 bytes, where"),
    "a byte too few": (resized(-1), 4, rf"it has {1023 + 4 * NUMBERS} bytes, where its header describes"),
    "a byte too many": (resized(1), 4, rf"it has {1025 + 4 * NUMBERS} bytes, where its header describes"),
    "a number too few": (resized(-4), 4, "where its header describes"),
    **{f"{name} 0": (header(**{name: 0}), 4, f"its {name} is 0, not 1 to") for name in SIZES},
    **{f"{name} -1": (header(**{name: -1}), 4, f"its {name} is -1, not 1 to") for name in SIZES},
    **{f"{name} 2**31-1": (header(**{name: 2**31 - 1}), 4, f"its {name} is 2147483647, not 1 to") for name in SIZES},
    "1025 layers": (header(num_layers=1025), 4, "its num_layers is 1025, not 1 to 1024"),
    "all of the largest": (
        header(**dict.fromkeys(SIZES, 2**20) | {"num_layers": 1024}), 4, "bytes, where its header describes 54052047464432640"
    ),
    "a vocabulary that is not padded but cut": (header(vocab_size=385), 4, "its vocab_size is 385, not 1 to 384"),
    "a layer more": (header(num_layers=3), 4, "where its header describes"),
    "heads that do not divide": (header(num_heads=5), 4, "num_heads 5 does not divide embed_dim 32"),
    "NaN": (not_finite(float("nan")), 4, "lnfb has numbers that are not finite"),
    "infinity": (not_finite(float("inf")), 4, "lnfb has numbers that are not finite"),
    "a larger tokenizer": (
        lambda path: Tokenizer.train_bpe([STORY * 3], 281).save(path.parent), 4, "the tokenizer has 281 tokens"
    ),
    "no tokenizer": (lambda path: (path.parent / "tokenizer.json").unlink(), 4, "no tokenizer"),
    "no file": (lambda path: path.unlink(), 4, "cannot be read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), 8, "it is no plain file"),
    "a pipe": (pipe, 8, "it is no plain file"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), 8, "it is no plain file"),
    "a link to elsewhere": (elsewhere, 8, "outside its folder"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "exit_code", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(damage: Damage, exit_code: int, sentence: str, path: Path) -> None:
    damage(path)
    with pytest.raises(LabError, match=sentence) as caught:
        llmc.read(path)
    assert type(caught.value) in (CheckpointError, UntrustedFileError) and caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value) and "Fix: " in str(caught.value)


def test_what_is_refused_by_its_magic_is_recognised_so_that_the_reason_is_heard(path: Path) -> None:
    for magic in llmc.OTHERS:
        header(magic)(path)
        assert llmc.recognises(path)
    header(20240325)(path)
    assert not llmc.recognises(path)


def test_any_length_but_the_right_one_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in [*range(0, 1100, 7), *range(1100, len(content), 4099), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            llmc.read(path)
    path.write_bytes(content)
    assert llmc.read(path).model.vocab_size == 280
