"""OpenAI's GPT-2 as it was published: a folder with hparams.json and a TensorFlow checkpoint, model.ckpt."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.weights.files import read_json, regular_file, tokenizer_for
from gpt2lab.weights.layout import EMBEDDING, Imported, Layout, Slot, Stored, fill
from gpt2lab.weights.tensor_bundle import DATA, FIX, INDEX, Entry, checked_tensor, read_index

HPARAMS = "hparams.json"

_PARTS = {
    "ln_1": "attn_norm",
    "attn/c_attn": "attn.qkv_proj",
    "attn/c_proj": "attn.output_proj",
    "ln_2": "mlp_norm",
    "mlp/c_fc": "mlp.up_proj",
    "mlp/c_proj": "mlp.down_proj",
}
_OPTIMIZERS = re.compile(r"(^|/)(global_step|beta[12]_power|Adam(_1)?|Momentum|Adafactor\w*)$")

_Size = Annotated[int, Field(ge=1, le=2**20)]


class HParams(BaseModel):
    """The keys of hparams.json, bounded. Others are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True)

    n_vocab: _Size
    n_ctx: _Size
    n_embd: _Size
    n_head: _Size
    n_layer: Annotated[int, Field(ge=1, le=1024)]


def recognises(path: Path) -> bool:
    """Whether a path looks like a published GPT-2: a folder with hparams.json and an index, or an index itself."""
    if path.is_dir():
        return (path / HPARAMS).is_file() and any(path.glob(f"*{INDEX}"))
    return path.suffix == INDEX and path.is_file()


def read(path: Path, tokenizer: str | None = None) -> Imported:
    """A GPT-2 from OpenAI's folder, or from one of the indices in such a folder.

    Args:
        tokenizer: its name, where it is not the one beside the weights.

    Raises:
        CheckpointError: damaged, incomplete, or another model. UntrustedFileError: a file of it is no plain file.
    """
    index = find_index(path)
    folder, data = index.parent, index.with_name(index.name.removesuffix(INDEX) + DATA)
    config, entries = read_hparams(folder / HPARAMS), read_index(index)
    with regular_file(data).open("rb") as file:
        check_sizes(config, entries, os.fstat(file.fileno()).st_size, where=str(index))
        known = tokenizer_for(config.vocab_size or 0, folder, tokenizer)
        with torch.device("meta"):
            model = GPT2.from_config(config)
        slots = layout(config.num_layers)
        found = fill(model, slots, stored(file, entries, slots), where=str(index), ignored=_ignored)
    return Imported(model.eval(), known, found)


def layout(num_layers: int) -> Layout:
    """OpenAI's names, and which of ours they are. Their matrices have the input dimension first."""
    slots = {"model/wte": Slot(EMBEDDING), "model/wpe": Slot("position_embedding.weight")}
    parts = {f"h{i}/{theirs}": f"blocks.{i}.{ours}" for i in range(num_layers) for theirs, ours in _PARTS.items()}
    for theirs, ours in (parts | {"ln_f": "final_norm"}).items():
        is_norm = ours.endswith("norm")
        slots[f"model/{theirs}/{'g' if is_norm else 'w'}"] = Slot(f"{ours}.weight", transposed=not is_norm)
        slots[f"model/{theirs}/b"] = Slot(f"{ours}.bias")
    return slots


def find_index(path: Path) -> Path:
    """The index that a path means: itself, or the only one in a folder.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{INDEX}"))
    if len(found) != 1:
        names = ", ".join(index.name for index in found[:5]) or f"no file ends in {INDEX}"
        fix = f"name the one that is meant, such as {found[-1]}" if found else FIX
        raise CheckpointError("not one checkpoint", where=str(path), cause=f"there are {len(found)}: {names}", fix=fix)
    return found[0]


def read_hparams(path: Path) -> GPT2Config:
    """The shape that an hparams.json describes.

    Raises:
        CheckpointError: it is damaged, or no GPT-2 has that shape. UntrustedFileError: it is no plain file.
    """
    try:
        theirs = HParams.model_validate(read_json(path))
        return GPT2Config(
            vocab_size=theirs.n_vocab, max_seq_len=theirs.n_ctx, embed_dim=theirs.n_embd, num_heads=theirs.n_head,
            num_kv_heads=theirs.n_head, ff_hidden_dim=4 * theirs.n_embd, num_layers=theirs.n_layer,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        cause = ": ".join([*map(str, first["loc"]), first["msg"]])
        if first["loc"] and first["type"] != "missing":
            cause += f", not {first['input']!r:.80}"
    raise CheckpointError("impossible shape", where=str(path), cause=cause, fix="mend the file")


def check_sizes(config: GPT2Config, entries: dict[str, Entry], size: int, where: str) -> None:
    """See that the tensors fill the data file, of `size` bytes, and that a model of this shape fits into as many.

    Raises:
        CheckpointError: they overlap, leave gaps, or end elsewhere; or they are too few for the model.
    """
    end, cause = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            cause = cause or f"{name} begins at byte {entry.offset} of the data, where byte {end} is expected"
        end += entry.size
    if end != size:
        cause = cause or f"its tensors have {end} bytes, the data file has {size}"
    width, rows = config.embed_dim, (config.vocab_size or 0) + config.max_seq_len + 2
    numbers = width * (rows + config.num_layers * (12 * width + 13))
    if 2 * numbers > size:  # a number has 2 bytes at least
        cause = cause or f"{HPARAMS} describes {numbers} numbers, the data file has {size} bytes"
    if cause:
        raise CheckpointError("incomplete checkpoint", where=where, cause=cause, fix=FIX)


def stored(file: BufferedReader, entries: dict[str, Entry], slots: Layout) -> Iterator[Stored]:
    """The tensors of a data file; of those that have no slot, the names.

    Raises:
        CheckpointError: a tensor is of a type that is not read; or when it is read, its checksum differs.
    """
    for name, entry in entries.items():
        if name not in slots:
            yield Stored.of(name, torch.empty(0))
            continue
        shape = entry.shape
        if slots[name].transposed and len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]  # their matrices are convolutions of width 1
        yield checked_tensor(name, file, entry, shape)


def _ignored(name: str) -> str | None:
    return "the optimizer's, which only training needs" if _OPTIMIZERS.search(name) else None
