"""Other people's files: opened only where they are plain files in their own folder, bounded in size, and never run."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab.errors import CheckpointError, DataError, LabError, UntrustedFileError
from gpt2lab.tensors import unique
from gpt2lab.tokenizer import Tokenizer, open_tokenizer

LARGEST_JSON = 2**20


def regular_file(path: Path) -> Path:
    """`path`, if it is a plain file that lies where it seems to lie.

    A link is followed only inside its own folder, and from a snapshot of the Hub's cache to the blobs of that cache.

    Raises:
        CheckpointError: there is no such file. UntrustedFileError: a device, a pipe, or a link that leads elsewhere.
    """
    try:
        real, root = path.resolve(strict=True), path.parent.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise CheckpointError("cannot be read", where=str(path), cause=cause, fix="complete the folder") from None
    if not stat.S_ISREG(mode):
        raise UntrustedFileError(
            "not opened", where=str(path), cause="it is no plain file", fix="put the file itself there"
        )
    if real.parent not in (root, root.parent.parent / "blobs"):
        cause = f"it is a link to {real}, outside its folder"
        raise UntrustedFileError("not opened", where=str(path), cause=cause, fix="put the file itself there")
    return real


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """A JSON file of a stranger.

    Raises:
        CheckpointError: it is too large, too deep, no JSON, or says a thing twice. UntrustedFileError: see `regular_file`.
    """

    try:
        size = regular_file(path).stat().st_size
        if size > largest:
            raise ValueError(f"{size} bytes; {largest} are allowed")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except LabError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        cause = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError("unusable JSON", where=str(path), cause=cause, fix="copy the file again") from None


def reader(
    file: BufferedReader, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Callable[[int, int], Tensor]:
    """What `Stored.read` needs for a tensor that lies in `file` from `offset` on, row by row.

    The file is read, not mapped: one that shrinks meanwhile is an error, where a mapped one would kill the process.
    """
    row = torch.Size(shape[1:]).numel() * dtype.itemsize

    def read(start: int, stop: int) -> Tensor:
        buffer = torch.empty((stop - start) * row, dtype=torch.uint8)
        file.seek(offset + start * row)
        if file.readinto(buffer.numpy().data) != len(buffer):
            raise CheckpointError(
                "truncated weights", where=file.name, cause="it ends before its tensors do", fix="copy the file again"
            )
        return buffer.view(dtype).view(stop - start, *shape[1:])

    return read


def tokenizer_for(vocab_size: int, folder: Path, named: str | None = None) -> Tokenizer:
    """The tokenizer that the user named, or the one beside the weights, or for a vocabulary of GPT-2's size, GPT-2's.

    Raises:
        CheckpointError: there is none, it is damaged, or it has more tokens than the model knows.
    """
    beside = ("tokenizer.json", "vocab.json", "encoder.json")
    try:
        if named is not None:
            tokenizer = open_tokenizer(named)
        elif any((folder / name).is_file() for name in beside):
            tokenizer = Tokenizer.load(folder)
        elif vocab_size == 50257:
            tokenizer = open_tokenizer("gpt2")
        else:
            cause = f"nothing beside it says what its {vocab_size} tokens are"
            fix = "name it: --tokenizer=FOLDER, or bytes"
            raise CheckpointError("no tokenizer", where=str(folder), cause=cause, fix=fix)
    except DataError as error:
        fix = "put the model's own tokenizer there, or name one with --tokenizer=..."
        raise CheckpointError(error.what, where=error.where or str(folder), cause=error.cause, fix=fix) from None
    if tokenizer.vocab_size > vocab_size:
        cause = f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows {vocab_size}"
        fix = "give the model's own tokenizer, with --tokenizer=..."
        raise CheckpointError("vocabularies differ", where=str(folder), cause=cause, fix=fix)
    return tokenizer
