"""llm.c's model files: a header of 256 numbers, then the weights, those of one kind for all layers together."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.weights.files import reader, regular_file, tokenizer_for
from gpt2lab.weights.layout import EMBEDDING, Imported, Layout, Slot, Stored, fill

HEADER_BYTES = 256 * 4
MODEL = 20240326
OTHERS = {
    20240327: "numbers to test an implementation with, not a model",
    20240328: "a tokenizer, not a model",
    20240520: "tokens, not weights",
    20240522: "the questions of an evaluation, not weights",
    20240527: "the state of an optimizer, not a model",
    20240801: "tokens, not weights",
    20240803: "a Llama 3, not a GPT-2",
}
"""What llm.c's other files are, by the number that they begin with."""
DTYPES = {3: torch.float32, 5: torch.bfloat16}
"""By the version, which is the second number."""
MOST_LAYERS, LARGEST_SIZE = 1024, 2**20

# Theirs, ours, and the shape in multiples of the width, in the order of the file. Matrices are as torch's Linear has them.
_PARTS = [
    ("ln1w", "attn_norm.weight", (1,)),
    ("ln1b", "attn_norm.bias", (1,)),
    ("qkvw", "attn.qkv_proj.weight", (3, 1)),
    ("qkvb", "attn.qkv_proj.bias", (3,)),
    ("attprojw", "attn.output_proj.weight", (1, 1)),
    ("attprojb", "attn.output_proj.bias", (1,)),
    ("ln2w", "mlp_norm.weight", (1,)),
    ("ln2b", "mlp_norm.bias", (1,)),
    ("fcw", "mlp.up_proj.weight", (4, 1)),
    ("fcb", "mlp.up_proj.bias", (4,)),
    ("fcprojw", "mlp.down_proj.weight", (1, 4)),
    ("fcprojb", "mlp.down_proj.bias", (1,)),
]


@dataclass(frozen=True)
class Header:
    """What a model file says of itself: the type of its numbers, then its sizes in the order of the file."""

    dtype: torch.dtype
    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int
    padded_vocab_size: int


def recognises(path: Path) -> bool:
    """Whether a path is a file of llm.c's: a model, or one of those that `read` can tell are none."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            return False
        with path.open("rb") as file:
            return int.from_bytes(file.read(4), "little") in {MODEL, *OTHERS}
    except OSError:
        return False


def read(path: Path, tokenizer: str | None = None) -> Imported:
    """A GPT-2 from one of llm.c's model files.

    Args:
        tokenizer: its name, where it is not the one beside the file.

    Raises:
        CheckpointError: damaged, or no such model. UntrustedFileError: it is no plain file.
    """
    with regular_file(path).open("rb") as file:
        try:
            header = parse_header(file.read(HEADER_BYTES))
            size, expected = os.fstat(file.fileno()).st_size, expected_bytes(header)
            if size != expected:
                raise ValueError(f"it has {size} bytes, where its header describes {expected}")
            config = GPT2Config(
                vocab_size=header.vocab_size, max_seq_len=header.max_seq_len, embed_dim=header.channels,
                num_heads=header.num_heads, num_kv_heads=header.num_heads, ff_hidden_dim=4 * header.channels,
                num_layers=header.num_layers,
            )  # fmt: skip
        except ValueError as error:
            cause = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            fix = "give a model file, as llm.c writes it, and all of it"
            raise CheckpointError("not a model of llm.c", where=str(path), cause=cause, fix=fix) from None
        known = tokenizer_for(header.vocab_size, path.parent, tokenizer)
        with torch.device("meta"):
            model = GPT2.from_config(config)
        found = fill(model, layout(config.num_layers), stored(file, header), where=str(path), padded=True)
    return Imported(model.eval(), known, found)


def parse_header(data: bytes) -> Header:
    """The header of a model file.

    Raises:
        ValueError: it is that of another file, or has a size that no model has.
    """
    magic = int.from_bytes(data[:4], "little")
    if magic != MODEL:
        raise ValueError(f"it is {OTHERS[magic]}" if magic in OTHERS else f"it begins with {magic}, not {MODEL}")
    if len(data) < HEADER_BYTES:
        raise ValueError(f"it has {len(data)} bytes; its header alone has {HEADER_BYTES}")
    version, *sizes = np.frombuffer(data, dtype="<i4")[1:8].tolist()
    if version not in DTYPES:
        old = ", from before the vocabulary was padded" if version == 1 else ""
        raise ValueError(f"its version is {version}{old}; 3 (float32) and 5 (bfloat16) are read")
    header = Header(DTYPES[version], *sizes)
    largest = {"num_layers": MOST_LAYERS, "vocab_size": header.padded_vocab_size}
    for name, value in reversed(list(vars(header).items())[1:]):  # what bounds another is looked at first
        if not 1 <= value <= largest.get(name, LARGEST_SIZE):
            raise ValueError(f"its {name} is {value}, not 1 to {largest.get(name, LARGEST_SIZE)}")
    return header


def layout(num_layers: int) -> Layout:
    """llm.c's names, each with the layer that it is of, and which of ours they are."""
    return {
        "wte": Slot(EMBEDDING),
        "wpe": Slot("position_embedding.weight"),
        **{f"{theirs}[{i}]": Slot(f"blocks.{i}.{ours}") for theirs, ours, _ in _PARTS for i in range(num_layers)},
        "lnfw": Slot("final_norm.weight"),
        "lnfb": Slot("final_norm.bias"),
    }


def shapes(header: Header) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and the shape of every tensor, in the order of the file, which has nothing between them."""
    width = header.channels
    yield "wte", (header.padded_vocab_size, width)
    yield "wpe", (header.max_seq_len, width)
    for theirs, _, multiples in _PARTS:
        for layer in range(header.num_layers):
            yield f"{theirs}[{layer}]", tuple(multiple * width for multiple in multiples)
    yield "lnfw", (width,)
    yield "lnfb", (width,)


def expected_bytes(header: Header) -> int:
    """How large a file with this header is."""
    return HEADER_BYTES + header.dtype.itemsize * sum(math.prod(shape) for _, shape in shapes(header))


def stored(file: BufferedReader, header: Header) -> Iterator[Stored]:
    """The tensors of a model file."""
    offset = HEADER_BYTES
    for name, shape in shapes(header):
        yield Stored(name, shape, reader(file, offset, shape, header.dtype))
        offset += math.prod(shape) * header.dtype.itemsize
