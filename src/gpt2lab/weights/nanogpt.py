"""nanoGPT's ckpt.pt: a pickle, of which only the weights and the shape are read, and only where the user asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpt2lab.config import GPT2_VOCAB_SIZE, GPT2Config
from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.weights import pickles, sandbox
from gpt2lab.weights.files import tokenizer_for
from gpt2lab.weights.layout import Imported, Layout, Slot, Stored, fill

SUFFIXES = frozenset([".pt", ".pth", ".ckpt", ".bin"])
MODEL, ARGUMENTS, HEAD = "model", "model_args", "lm_head.weight"
PADDED_VOCAB_SIZE = 50304
"""What nanoGPT makes of GPT-2's 50257 tokens: the next multiple of 64."""

# Theirs and ours; {} is the layer.
_BLOCK = {
    "ln_1": "attn_norm", "attn.c_attn": "attn.qkv_proj", "attn.c_proj": "attn.output_proj",
    "ln_2": "mlp_norm", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_PREFIX = re.compile(r"^((module|_orig_mod)\.)+")
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")
_FIX = "give a ckpt.pt of nanoGPT's train.py"
_Size = Annotated[int, Field(ge=1, le=2**20)]


class ModelArguments(BaseModel):
    """The shape of a nanoGPT model, bounded. A key that nanoGPT does not have may change the mathematics: refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n_layer: Annotated[int, Field(ge=1, le=1024)]
    n_head: _Size
    n_embd: _Size
    block_size: _Size
    vocab_size: _Size
    bias: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def to_ours(self) -> GPT2Config:
        """The same shape in our words: nanoGPT computes the exact GELU, and rows that only pad are no tokens."""
        return GPT2Config(
            vocab_size=GPT2_VOCAB_SIZE if self.vocab_size == PADDED_VOCAB_SIZE else self.vocab_size,
            max_seq_len=self.block_size,
            embed_dim=self.n_embd,
            num_heads=self.n_head,
            num_kv_heads=self.n_head,
            ff_hidden_dim=4 * self.n_embd,
            num_layers=self.n_layer,
            activation="gelu",
            bias=self.bias,
            dropout=self.dropout,
        )


def recognises(path: Path) -> bool:
    """Whether a file could be one that torch wrote."""
    return path.suffix in SUFFIXES and pickles.is_pickle(path)


def read(path: Path, tokenizer: str | None = None, *, allow_pickle: bool = False) -> Imported:
    """A nanoGPT model, its weights read by a child process; the optimizer's state is left behind.

    Args:
        tokenizer: as a recipe names it; None: the one beside the file, or GPT-2's where the vocabulary has that size.
        allow_pickle: open it at all.

    Raises:
        UntrustedFileError: not allowed, or it wants more than tensors. CheckpointError: damaged, or not nanoGPT's.
    """
    if not allow_pickle:
        pickles.refuse(path)
    with sandbox.unpack(path, (MODEL, ARGUMENTS)) as unpacked:
        config, padded = _config(unpacked.values.get(ARGUMENTS), path)
        found_tokenizer = tokenizer_for(config.vocab_size or GPT2_VOCAB_SIZE, path.parent, tokenizer)
        with torch.device("meta"):
            model = GPT2.from_config(config)
        found = fill(
            model,
            layout(config),
            _checked(unpacked.below(MODEL), model, path),
            where=str(path),
            short=_short,
            ignored=lambda name: "the causal mask" if _MASK.fullmatch(name) else None,
            padded=padded,
        )
    model.eval()
    return Imported(model, found_tokenizer, found)


def layout(config: GPT2Config) -> Layout:
    """nanoGPT's names; its matrices are oriented as ours."""
    names = {"transformer.ln_f": "final_norm"}
    for layer in range(config.num_layers):
        names |= {f"transformer.h.{layer}.{theirs}": f"blocks.{layer}.{ours}" for theirs, ours in _BLOCK.items()}
    kinds = ("weight", "bias") if config.bias else ("weight",)
    embeddings = {
        "transformer.wte.weight": Slot("token_embedding.weight"),
        "transformer.wpe.weight": Slot("position_embedding.weight"),
    }
    return embeddings | {f"{theirs}.{kind}": Slot(f"{ours}.{kind}") for theirs, ours in names.items() for kind in kinds}


def _config(given: Any, path: Path) -> tuple[GPT2Config, bool]:
    """The shape that the file states, and whether its vocabulary has rows that are no tokens."""
    if not isinstance(given, dict):
        cause = f"it has no {ARGUMENTS}, as nanoGPT writes them"
        raise CheckpointError("not nanoGPT's", where=str(path), cause=cause, fix=_FIX)
    try:
        arguments = ModelArguments.model_validate(given)
        return arguments.to_ours(), arguments.vocab_size == PADDED_VOCAB_SIZE
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join((ARGUMENTS, *map(str, first["loc"])))
        cause = f"{key}: {first['msg']}, not {first['input']!a:.80}"
        raise CheckpointError("unusable model_args", where=str(path), cause=cause, fix=_FIX) from None


def _short(name: str) -> str:
    """Their name without what torch.compile and DDP put before it."""
    return _PREFIX.sub("", name)


def _checked(tensors: Iterator[Stored], model: GPT2, path: Path) -> Iterator[Stored]:
    """The tensors, the tied head without the rows that `fill` cuts off the embedding.

    Raises:
        CheckpointError: one is no part of the model: leaving it out would compute something else.
    """
    known = layout(model.config)
    for stored in tensors:
        name = _short(stored.name)
        if name == HEAD and stored.shape[:1] == (PADDED_VOCAB_SIZE,):
            stored = Stored(stored.name, (model.vocab_size, *stored.shape[1:]), stored.read)
        elif name != HEAD and name not in known and not _MASK.fullmatch(name):
            cause = f"{stored.name} is no part of the model that {ARGUMENTS} describe"
            raise CheckpointError("weights do not fit", where=str(path), cause=cause, fix=_FIX)
        yield stored
