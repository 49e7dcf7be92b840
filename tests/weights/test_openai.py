"""OpenAI's checkpoints as ours: the same logits and text from files in the published format, and damage refused.

The files are written here, from the descriptions of the formats (leveldb/doc/table_format.md, tensor_bundle.proto); an
index that TensorFlow wrote is at the end of the first part.
"""

import base64
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel

from gpt2lab.errors import CheckpointError, LabError, UntrustedFileError
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import openai, tensor_bundle
from gpt2lab.weights.tensor_bundle import read_index
from tests.reference import assert_differ, assert_same
from tests.weights.bundles import HEADER, Record, bundle, field, sealed, table, varint
from tests.weights.models import STORY, assert_same_greedy_text, logits, their_model

SHAPE = {"n_vocab": 280, "n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
KINDS = {torch.float32: 1, torch.float64: 2, torch.int32: 3, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}


# --- A writer of checkpoints -------------------------------------------------------------------------------------------


def write(folder: Path, tensors: dict[str, Tensor], **hparams: Any) -> list[Record]:
    """A checkpoint as it was published, of one shard; what its index says."""
    folder.mkdir(exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(SHAPE | hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    data, records = b"", []
    for name, tensor in sorted(tensors.items()):
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
        records.append(
            Record(name.encode(), KINDS[tensor.dtype], tuple(tensor.shape), len(data), len(content), sealed(content))
        )
        data += content
    (folder / DATA).write_bytes(data)
    (folder / INDEX).write_bytes(bundle(records))
    return records


def as_published(model: GPT2LMHeadModel) -> dict[str, Tensor]:
    """The tensors of a model by OpenAI's names and shapes."""
    tensors = {}
    for name, tensor in model.transformer.state_dict().items():
        parts = name.removeprefix("h.").split(".")
        kind = {"weight": "g" if "ln" in name else "w", "bias": "b"}[parts.pop()]
        place = "/".join(parts)
        if name.startswith("h."):
            tensors[f"model/h{place}/{kind}"] = tensor[None] if kind == "w" else tensor
        else:
            tensors[f"model/{place}/{kind}" if "ln" in name else f"model/{place}"] = tensor
    return tensors


@dataclass(frozen=True)
class Original:
    """A checkpoint, the model in it, and what its index says."""

    folder: Path
    model: GPT2LMHeadModel
    records: list[Record]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder, model = tmp_path_factory.mktemp("openai"), their_model()
    records = write(folder, as_published(model))
    Tokenizer.train_bpe([STORY * 3], 280).save(folder)
    return Original(folder, model, records)


@pytest.fixture
def copy(original: Original, tmp_path: Path) -> Original:
    """A copy to change."""
    return replace(original, folder=Path(shutil.copytree(original.folder, tmp_path / "copy")))


# --- The same model ---------------------------------------------------------------------------------------------------


def test_the_logits_are_theirs(original: Original) -> None:
    found = openai.read(original.folder)
    ours = found.model
    assert not ours.training and ours.vocab_size == 280 and {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(logits(ours), logits(original.model), within=1e-4)
    assert_differ(logits(ours), logits(their_model(seed=1)), by=1, what="another model")
    names = sorted(record.name.decode() for record in original.records)
    assert sorted(found.map.loaded + found.map.transposed) == names and len(names) == 28
    assert found.map.transposed == [name for name in names if name.endswith("/w")] and len(found.map.transposed) == 8
    assert not found.map.missing and not found.map.left_over and not found.map.cut


def test_the_index_of_the_test_has_what_makes_the_format_hard(original: Original) -> None:
    index = (original.folder / INDEX).read_bytes()
    assert index.count(b"model/") > 7, "several blocks, and restarts in them"
    assert index.count(b"model/") < len(original.records) - 7, "names that share what they begin with"
    assert len(bundle(original.records, block_bytes=2**18)) < len(index)


def test_the_greedy_text_is_theirs(original: Original) -> None:
    found = openai.read(original.folder)
    assert_same_greedy_text(found.model, found.tokenizer, original.model)


def test_a_number_that_moved_in_the_file_moves_the_logits(original: Original, tmp_path: Path) -> None:
    """The control: each tensor of the file reaches the model, and its own place in it."""
    tensors = as_published(original.model)
    for name in tensors:
        if "/h0/" in name:
            continue  # they are read as those of the other layer
        write(tmp_path, tensors | {name: tensors[name].flip(-1)})
        moved = openai.read(tmp_path, "bytes").model
        assert_differ(logits(moved), logits(original.model), by=1e-2, what=name)


@pytest.mark.parametrize(("dtype", "coarse"), [(torch.float16, 5e-4), (torch.bfloat16, 5e-3)])
def test_halves_are_read_as_they_are(dtype: torch.dtype, coarse: float, tmp_path: Path) -> None:
    theirs = their_model()
    exact = logits(theirs)
    write(tmp_path, {name: tensor.to(dtype) for name, tensor in as_published(theirs).items()})
    ours = openai.read(tmp_path, "bytes").model
    assert_same(logits(ours), logits(theirs.to(dtype).float()), within=1e-4)
    assert_differ(logits(ours), exact, by=coarse, what=f"before it was rounded to {dtype}")


def test_the_optimizer_s_tensors_are_left_over(copy: Original) -> None:
    tensors = as_published(copy.model)
    slots = {f"{name}/{slot}": tensor * 0 for name, tensor in tensors.items() for slot in ("Adam", "Adam_1")}
    single = {"global_step": torch.tensor(10), "beta1_power": torch.tensor(0.9), "model/extra": torch.zeros(3)}
    write(copy.folder, tensors | slots | single)
    found = openai.read(copy.folder)
    assert_same(logits(found.model), logits(copy.model), within=1e-4)
    left_over = dict(text.split(" ", 1) for text in found.map.left_over)
    assert sorted(left_over) == sorted([*slots, *single])
    assert left_over.pop("model/extra") == "(no part of this model)"
    assert set(left_over.values()) == {"(the optimizer's, which only training needs)"}


@pytest.mark.parametrize("block_bytes", [1, 100, 2**18])
@pytest.mark.parametrize("restart_every", [1, 16])
def test_any_blocks_and_restarts_are_read(block_bytes: int, restart_every: int, copy: Original) -> None:
    index = bundle(copy.records, block_bytes=block_bytes, restart_every=restart_every)
    assert index != (copy.folder / INDEX).read_bytes()
    before = read_index(copy.folder / INDEX)
    (copy.folder / INDEX).write_bytes(index)
    assert read_index(copy.folder / INDEX) == before and len(before) == 28


def test_the_tokenizer_is_the_one_beside_the_weights_or_the_one_that_is_named(copy: Original) -> None:
    assert openai.read(copy.folder).tokenizer.fingerprint == Tokenizer.train_bpe([STORY * 3], 280).fingerprint
    assert openai.read(copy.folder, "bytes").tokenizer.fingerprint == Tokenizer.bytes().fingerprint


def test_encoder_json_and_vocab_bpe_are_a_tokenizer(copy: Original) -> None:
    backend = json.loads((copy.folder / "tokenizer.json").read_text())["model"]
    (copy.folder / "tokenizer.json").unlink()
    (copy.folder / "encoder.json").write_text(json.dumps(backend["vocab"]))
    (copy.folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, backend["merges"]), ""]))
    tokenizer = openai.read(copy.folder).tokenizer
    assert tokenizer.vocab_size == 280
    assert tokenizer.encode(STORY).tolist() == Tokenizer.train_bpe([STORY * 3], 280).encode(STORY).tolist()
    assert len(tokenizer.encode(STORY)) < len(STORY.encode())


def test_the_folder_and_its_index_are_recognised_and_nothing_else(copy: Original, tmp_path: Path) -> None:
    for path in (copy.folder, copy.folder / INDEX):
        assert openai.recognises(path)
        assert_same(logits(openai.read(path).model), logits(copy.model), within=1e-4)
    os.mkfifo(tmp_path / "pipe.index")
    for path in (tmp_path, tmp_path / "nothing.index", tmp_path / "pipe.index", copy.folder / DATA):
        assert not openai.recognises(path)
    (copy.folder / "hparams.json").unlink()
    assert not openai.recognises(copy.folder)


def test_one_of_several_checkpoints_has_to_be_named(copy: Original) -> None:
    later = as_published(their_model(seed=1))
    write(copy.folder.parent / "later", later)
    for name in (INDEX, DATA):
        shutil.copy(copy.folder.parent / "later" / name, copy.folder / name.replace("model.ckpt", "model-10"))
    with pytest.raises(CheckpointError, match=r"there are 2: model-10.index, model.ckpt.index") as caught:
        openai.read(copy.folder)
    named = Path(caught.value.fix.removeprefix("name the one that is meant, such as "))
    assert named == copy.folder / INDEX
    assert_same(logits(openai.read(named).model), logits(copy.model), within=1e-4)
    other = openai.read(copy.folder / "model-10.index").model
    assert_same(logits(other), logits(their_model(seed=1)), within=1e-4)


FROM_TENSORFLOW = (
    "c-muNVB=tvV&Y(A5aZ9yPf5+u&oIzWEGfy;PmTvuNgRwqEJ92iJQ@b3sq-4mL>Z;ZfkHe$Ax0nuODPy=9AGpR;`WgjU=u1R%Flx9Vo~_Os3Bm=-RkIs"
    "MI(zs1Cxe>Y4&-~51ed5IeGDhNE#0?0X6mpJ?G?O6iSDSUI2;iG!oU}VHPq%QvCoV{zZ^G7De?3kf_2ZhVPtQLb*8wKtH7=!!-#gG%y2gKWcQLS%^^@"
    "-E9I22beV)m`r0CSws0Te06{oXt3wOc1ICZodOU?vVwGS3eEYz2KH7OlFke4K%FmEAMEBvcIX3;Xw>~<E7+LD$_r9~;vDcW`oIo!<w3`54;VNlAW>9a"
    "0#d;##LUsi1Xi+vLt}!1>Grepy%~UD4I={s6Nuq{X4Vc6%?Kh6d|J4Hfsr|n;SMugtV;L9mWRw7@0j@+2!in64c#iG?zaK`{b^|"
)
"""The index that tf.compat.v1.train.Saver of TensorFlow 2.21 wrote of tensors that count on from one another, in 1/1024."""


def test_an_index_that_tensorflow_wrote(tmp_path: Path) -> None:
    sizes = {"n_vocab": 257, "n_ctx": 4, "n_embd": 4, "n_head": 1, "n_layer": 1}
    numbers = np.arange(1296, dtype=np.float32) / 1024
    index = zlib.decompress(base64.b85decode(FROM_TENSORFLOW))
    (tmp_path / "hparams.json").write_text(json.dumps(sizes))
    (tmp_path / INDEX).write_bytes(index)
    (tmp_path / DATA).write_bytes(numbers.tobytes())
    weights = dict(openai.read(tmp_path, "bytes").model.named_parameters())
    first = {"blocks.0.attn.qkv_proj.bias": 0, "token_embedding.weight": 1296 - 257 * 4}
    assert all(weights[name].flatten()[0] == numbers[at] for name, at in first.items())
    matrix = weights["blocks.0.attn.qkv_proj.weight"]
    assert torch.equal(matrix.T.flatten(), torch.from_numpy(numbers[12 : 12 + 4 * 12])) and matrix.shape == (12, 4)
    assert weights["token_embedding.weight"][:257].flatten().tolist() == numbers[-257 * 4 :].tolist()
    # And the writer of this file is believed: of the same tensors it makes the same file, with TensorFlow's settings.
    shapes = {name: entry.shape for name, entry in read_index(tmp_path / INDEX).items()}
    parts = torch.from_numpy(numbers).split([torch.Size(shape).numel() for shape in shapes.values()])
    tensors = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    assert bundle(write(tmp_path / "ours", tensors), block_bytes=2**18, restart_every=16) == index


def test_a_tensor_is_checked_piece_by_piece(copy: Original, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_bundle, "PIECE", 1000)
    assert_same(logits(openai.read(copy.folder).model), logits(copy.model), within=1e-4)
    data(lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]))(copy)
    refusal(copy.folder, "model/wte .*do not match their checksum")


# --- Refused ----------------------------------------------------------------------------------------------------------


def refusal(path: Path, sentence: str) -> LabError:
    """The error that reading gives, which is of the right kind, one line, and says what `sentence` matches."""
    with pytest.raises(LabError, match=sentence) as caught:
        openai.read(path)
    assert type(caught.value) in (CheckpointError, UntrustedFileError)
    text = str(caught.value)
    assert "\n" not in text and "Fix: " in text and len(text) < 2000 and text.isprintable()
    return caught.value


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, bytes]:
    """A checkpoint of one layer, which can be read, and its index."""
    write(tmp_path, as_published(their_model(n_layer=1)), n_layer=1)
    Tokenizer.bytes().save(tmp_path)
    assert len(openai.read(tmp_path).map.loaded) == 12
    return tmp_path, (tmp_path / INDEX).read_bytes()


def test_an_index_that_is_truncated_anywhere_is_refused(small: tuple[Path, bytes]) -> None:
    folder, index = small
    for length in range(len(index)):
        (folder / INDEX).write_bytes(index[:length])
        refusal(folder, "unusable index")


def test_an_index_of_which_any_byte_is_another_is_refused(small: tuple[Path, bytes]) -> None:
    folder, index = small
    for at in range(len(index)):
        (folder / INDEX).write_bytes(index[:at] + bytes([index[at] ^ 1 << at % 8]) + index[at + 1 :])
        refusal(folder, "unusable index")


@given(st.data())
def test_an_index_that_lies_under_good_checksums_is_refused_or_is_the_same_model(
    original: Original, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    def spoil(block: int, content: bytes) -> bytes:
        if block != where:
            return content
        spoilt = bytearray(content)
        for at, byte in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)
        ):
            spoilt[at] = byte
        return bytes(spoilt)

    where = data.draw(st.integers(0, 9))
    folder = tmp_path_factory.mktemp("lies")
    for name in ("hparams.json", "tokenizer.json", DATA):
        (folder / name).symlink_to(shutil.copy(original.folder / name, folder / f"{name}.whole"))
    (folder / INDEX).write_bytes(bundle(original.records, spoil=spoil))
    try:
        found = openai.read(folder)
    except LabError:
        refusal(folder, "Fix: ")
    else:
        assert_same(logits(found.model), logits(original.model), within=1e-4)


Damage = Callable[[Original], Any]


def index(content: Callable[[list[Record]], bytes]) -> Damage:
    """Another index, made from the records of the right one."""
    return lambda copy: (copy.folder / INDEX).write_bytes(content(copy.records))


def records(**changes: Any) -> Damage:
    """An index in which the entry of wpe says something else."""
    changed = lambda record: replace(record, **changes) if record.name == b"model/wpe" else record  # noqa: E731
    return index(lambda all_: bundle(map(changed, all_)))


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    """A checkpoint of other tensors, whole in itself."""
    return lambda copy: write(copy.folder, change(as_published(copy.model)))


def hparams(**changes: Any) -> Damage:
    return lambda copy: (copy.folder / "hparams.json").write_text(json.dumps(SHAPE | changes))


def file(name: str, content: bytes) -> Damage:
    return lambda copy: (copy.folder / name).write_bytes(content)


def without(name: str) -> Damage:
    return lambda copy: (copy.folder / name).unlink()


def data(change: Callable[[bytes], bytes]) -> Damage:
    return lambda copy: (copy.folder / DATA).write_bytes(change((copy.folder / DATA).read_bytes()))


def elsewhere(name: str) -> Damage:
    """A link to the file, which now lies in another folder."""

    def damage(copy: Original) -> None:
        (copy.folder.parent / "elsewhere").mkdir()
        shutil.move(copy.folder / name, copy.folder.parent / "elsewhere" / name)
        (copy.folder / name).symlink_to(copy.folder.parent / "elsewhere" / name)

    return damage


def pipe(name: str) -> Damage:
    def damage(copy: Original) -> None:
        (copy.folder / name).unlink()
        os.mkfifo(copy.folder / name)

    return damage


def twice(all_: list[Record]) -> bytes:
    return bundle([record for record in all_ for _ in range(2 if record.name == b"model/wpe" else 1)])


def overlong(block: int, content: bytes) -> bytes:
    """The length of the first value in more bytes than it needs; what follows is moved on."""
    return content[:2] + bytes([content[2] | 0x80, 0]) + content[3:] if block == 1 else content


def negative(block: int, content: bytes) -> bytes:
    return content[:2] + varint(-1) + content[3:] if block == 1 else content


def restarts(number: int) -> Callable[[int, bytes], bytes]:
    return lambda block, content: content[:-4] + number.to_bytes(4, "little") if block == 1 else content


def shares_nothing(block: int, content: bytes) -> bytes:
    return b"\x01" + content[1:] if block == 1 else content


def hidden(all_: list[Record]) -> bytes:
    """Anything in place of the metaindex, as long as the first block, to which the metaindex's handle leads."""
    sizes: list[int] = []

    def spoil(block: int, content: bytes) -> bytes:
        sizes.append(len(content))
        return content if block != 1 else b"?" * sizes[0]

    return bundle(all_, block_bytes=2**18, spoil=spoil, handles=lambda places: [places[0], places[0], *places[2:]])


REFUSED: dict[str, tuple[Damage, int, str]] = {
    "an empty index": (file(INDEX, b""), 4, "does not end as a table does"),
    "a pickle": (file(INDEX, b"\x80\x04cos\nsystem\n" * 9), 4, "does not end as a table does"),
    "an index of 4 MB and more": (file(INDEX, bytes(2**22 + 1)), 4, "more than 4194304 bytes"),
    "an index of nothing": (index(lambda all_: table([])), 4, "it has no header"),
    "an index without a header": (index(lambda all_: table(r.item() for r in all_)), 4, "it has no header"),
    "an index of a header": (index(lambda all_: bundle([])), 4, "its tensors have 0 bytes"),
    "an empty header": (index(lambda all_: bundle(all_, header=b"")), 4, "it has no header"),
    "several shards": (index(lambda all_: bundle(all_, header=field(1, 2))), 4, "in 2 shards; one is read"),
    "no shards": (index(lambda all_: bundle(all_, header=field(3, b""))), 4, "in 0 shards"),
    "big-endian": (index(lambda all_: bundle(all_, header=HEADER + field(2, 1))), 4, "big-endian"),
    "a newer version": (
        index(lambda all_: bundle(all_, header=field(1, 1) + field(3, field(2, 2)))), 4, "for newer readers"
    ),
    "a version that is a number": (
        index(lambda all_: bundle(all_, header=field(1, 1) + field(3, 2))), 4, "field 3 in it is a number"
    ),
    "shards that are a text": (index(lambda all_: bundle(all_, header=field(1, b"1"))), 4, "field 1 in it is no number"),
    "snappy": (index(lambda all_: bundle(all_, compression=1)), 4, r"it is compressed \(snappy\), which is not read"),
    "another compression": (index(lambda all_: bundle(all_, compression=9)), 4, r"it is compressed \(9\)"),
    "a key twice": (index(twice), 4, "its keys are not in order, or one is there twice"),
    "keys in disorder": (index(lambda all_: bundle(all_[::-1])), 4, "its keys are not in order"),
    "a name of 1 MB": (
        index(lambda all_: bundle([*all_, replace(all_[-1], name=b"n" * 2**20)])), 4, "a name in it has more than 256"
    ),
    "a name that moves the cursor": (
        index(lambda all_: bundle([replace(all_[0], name=b"\x1b[2Jmodel")])), 4, r"'\\x1b\[2Jmodel' is no name"
    ),
    "a name that is no text": (index(lambda all_: bundle([replace(all_[0], name=b"\xff")])), 4, "is no name"),
    "20000 names": (
        index(lambda all_: bundle(Record(b"%05d" % n, 1, (), 0, 0, bytes(4)) for n in range(20_000))), 4,
        "names more than 16384 tensors",
    ),
    "a name that shares what is not there": (
        index(lambda all_: bundle(all_, spoil=shares_nothing)), 4, "shares what is not there"
    ),
    "an overlong number": (index(lambda all_: bundle(all_, spoil=overlong)), 4, "negative, longer than it need be"),
    "a negative length": (index(lambda all_: bundle(all_, spoil=negative)), 4, "negative, longer than it need be"),
    "a number that never ends": (
        index(lambda all_: bundle(all_, spoil=lambda block, content: b"\xff" * len(content[:-4]) + content[-4:])), 4,
        "negative, longer than it need be",
    ),
    "more restarts than bytes": (index(lambda all_: bundle(all_, spoil=restarts(2**32 - 1))), 4, "is too short"),
    "no restarts": (index(lambda all_: bundle(all_, spoil=restarts(0))), 4, "unusable index"),
    "an empty block": (
        index(lambda all_: bundle(all_, spoil=lambda block, content: content if block != 1 else b"")), 4, "is too short"
    ),
    "handles all of the first block": (
        index(lambda all_: bundle(all_, handles=lambda places: [*[places[0]] * (len(places) - 2), *places[-2:]])), 4,
        "a block of it begins at byte 0",
    ),
    "handles in a circle": (
        index(lambda all_: bundle(all_, handles=lambda places: [(0, size) for _, size in places])), 4, "checksum"
    ),
    "an index that is its own metaindex": (
        index(lambda all_: bundle(all_, handles=lambda places: [*places[:-2], places[-1], places[-1]])), 4,
        "a block of it begins at byte",
    ),
    "an index that is the metaindex": (
        index(lambda all_: bundle(all_, handles=lambda places: [*places[:-1], places[-2]])), 4, "do not follow"
    ),
    "an index that is the footer": (
        index(lambda all_: bundle(all_, handles=lambda places: [*places[:-1], (places[-1][0] + 20, 2**40)])), 4, "beyond"
    ),
    "a handle of 2**62": (
        index(lambda all_: bundle(all_, handles=lambda places: [(0, 2**62), *places[1:]])), 4, "ends beyond its end"
    ),
    "a negative handle": (
        index(lambda all_: bundle(all_, handles=lambda places: [(-9, 9), *places[1:]])), 4, "a number in it is negative"
    ),
    "bytes that no checksum covers": (index(hidden), 4, "do not follow one another"),
    "bytes between the blocks and the footer": (
        lambda copy: (copy.folder / INDEX).write_bytes(
            (whole := (copy.folder / INDEX).read_bytes())[:-48] + bytes(9) + whole[-48:]
        ), 4, "do not follow one another",
    ),
    "a tensor of 2**40": (records(shape=(2**40, 2**40)), 4, "model/wpe .*8192 bytes are not what"),
    "a tensor of 2**40 bytes": (records(shape=(2**40,), size=2**42), 4, "of the data, where byte"),
    "a tensor beyond the data": (records(offset=2**62), 4, "model/wte begins at byte 110080 of the data, where"),
    "a tensor that overlaps another": (records(offset=0), 4, "of the data, where byte"),
    "a negative dimension": (records(shape=(-1, 32)), 4, "a number in it is negative"),
    "a negative offset": (records(offset=-8), 4, "a number in it is negative"),
    "no dimensions": (records(shape=()), 4, r"8192 bytes are not what \(\) in torch.float32 takes"),
    "nine dimensions": (records(shape=(1,) * 7 + (64, 32)), 4, "field 2 in it is there 9 times; at most 8"),
    "an unknown rank": (
        index(lambda all_: table([(b"", HEADER), (b"a", field(1, 1) + field(2, field(3, 1)))])), 4, "no known shape"
    ),
    "two shapes": (records(more=field(2, b"")), 4, "field 2 in it is there 2 times"),
    "two sizes": (records(more=field(5, 1)), 4, "field 5 in it is no number, or is there twice"),
    "a shape that is a number": (
        index(lambda all_: table([(b"", HEADER), (b"a", field(2, 1))])), 4, "field 2 in it is a number"
    ),
    "a group": (records(more=b"\x4b\x4c"), 4, "of the kind 3, which is not read"),
    "half a field": (records(more=b"\x4a\x05no"), 4, "longer than what it is in"),
    "a tensor in slices": (records(more=field(7, b"")), 4, "in another shard or in parts"),
    "a tensor in another shard": (records(shard=1), 4, "in another shard or in parts"),
    "a tensor of int32": (records(dtype=3), 4, "type 3, not float32"),
    "a tensor of float64": (tensors(lambda all_: {n: t.double() for n, t in all_.items()}), 4, "type 2, not float32"),
    "a tensor of no type": (records(dtype=0), 4, "type 0, not float32"),
    "a tensor of half the bytes": (records(dtype=19), 4, r"8192 bytes are not what \(64, 32\) in torch.float16 takes"),
    "another checksum": (records(checksum=bytes(4)), 4, "model/wpe .*do not match their checksum"),
    "data one byte short": (data(lambda whole: whole[:-1]), 4, "its tensors have 145920 bytes, the data file has 145919"),
    "data one byte long": (data(lambda whole: whole + b"\0"), 4, "the data file has 145921"),
    "no data": (without(DATA), 4, "cannot be read"),
    "empty data": (file(DATA, b""), 4, "the data file has 0"),
    "data of zeros": (data(lambda whole: bytes(len(whole))), 4, "do not match their checksum"),
    "data that is one bit off at its end": (
        data(lambda whole: whole[:-1] + bytes([whole[-1] ^ 1])), 4, "unusable tensor model/wte .*checksum"
    ),
    "a tensor missing": (
        tensors(lambda all_: {n: t for n, t in all_.items() if n != "model/h1/mlp/c_fc/w"}), 4,
        "missing model/h1/mlp/c_fc/w",
    ),
    "a matrix as Linear holds it": (
        tensors(lambda all_: all_ | {"model/h0/mlp/c_fc/w": all_["model/h0/mlp/c_fc/w"].mT}), 4,
        r"c_fc/w is \(128, 32\), not \(32, 128\)",
    ),
    "a matrix of four dimensions": (
        tensors(lambda all_: all_ | {"model/h0/mlp/c_fc/w": all_["model/h0/mlp/c_fc/w"][None]}), 4,
        r"c_fc/w is \(1, 1, 32, 128\), not \(32, 128\)",
    ),
    "rows beyond the vocabulary": (
        tensors(lambda all_: all_ | {"model/wte": torch.cat([all_["model/wte"], torch.ones(40, 32)])}), 4,
        r"wte is \(320, 32\), not \(280, 32\)",
    ),
    "a tensor of nothing": (
        tensors(lambda all_: all_ | {"model/ln_f/b": torch.zeros(0)}), 4, r"ln_f/b is \(0,\), not \(32,\)"
    ),
    "NaN": (
        tensors(lambda all_: all_ | {"model/ln_f/b": torch.full((32,), torch.nan)}), 4, "numbers that are not finite"
    ),
    "a longer context": (hparams(n_ctx=65), 4, r"wpe is \(64, 32\), not \(65, 32\)"),
    "more layers than the file has": (hparams(n_layer=3), 4, "missing model/h2/ln_1/g"),
    "many more layers than the file has": (hparams(n_layer=1024), 4, "describes 13019968 numbers, the data"),
    "a model of a petabyte": (
        hparams(n_embd=2**20, n_head=1, n_ctx=2**20, n_vocab=2**20, n_layer=1024), 4, "the data file has 145920 bytes"
    ),
    "heads that do not divide": (hparams(n_head=5), 4, "num_heads 5 does not divide embed_dim 32"),
    "no heads": (hparams(n_head=0), 4, "n_head: Input should be greater than or equal to 1, not 0"),
    "2**31 layers": (hparams(n_layer=2**31), 4, "n_layer: Input should be less than or equal to 1024"),
    "a huge width": (hparams(n_embd=10**400), 4, "hparams.json"),
    "a number as text": (hparams(n_layer="2"), 4, "n_layer: Input should be a valid integer, not '2'"),
    "a number as truth": (hparams(n_layer=True), 4, "n_layer: Input should be a valid integer"),
    "a key missing": (file("hparams.json", b'{"n_vocab": 280}'), 4, r"hparams.json\): n_ctx: Field required"),
    "hparams that are a list": (file("hparams.json", b"[]"), 4, "Input should be a valid dictionary"),
    "half of hparams": (file("hparams.json", b'{"n_vocab": 2'), 4, "unusable JSON"),
    "hparams of brackets": (file("hparams.json", b"[" * 100_000), 4, "unusable JSON"),
    "no hparams": (without("hparams.json"), 4, "cannot be read"),
    "no index": (without(INDEX), 4, "there are 0: no file ends in .index"),
    "no tokenizer": (without("tokenizer.json"), 4, "no tokenizer"),
    "a larger tokenizer": (
        lambda copy: Tokenizer.train_bpe([STORY * 3], 281).save(copy.folder), 4, "the tokenizer has 281 tokens"
    ),
    "an index that is a link to elsewhere": (elsewhere(INDEX), 8, "outside its folder"),
    "data that is a link to elsewhere": (elsewhere(DATA), 8, "outside its folder"),
    "an index that is a pipe": (pipe(INDEX), 8, "it is no plain file"),
    "data that is a pipe": (pipe(DATA), 8, "it is no plain file"),
    "hparams that are a pipe": (pipe("hparams.json"), 8, "it is no plain file"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "exit_code", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused(damage: Damage, exit_code: int, sentence: str, copy: Original) -> None:
    damage(copy)
    assert refusal(copy.folder, sentence).exit_code == exit_code
