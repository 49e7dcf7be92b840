"""Hugging Face folders, read without its library: config.json, safetensors (in one file or in shards), tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError
from gpt2lab.hub import CONFIG, INDEX, LARGEST_INDEX, WEIGHTS, fetch
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tensors import read_header
from gpt2lab.weights import pickles, sandbox
from gpt2lab.weights.files import read_json, reader, regular_file, tokenizer_for
from gpt2lab.weights.layout import Imported, Stored, fill
from gpt2lab.weights.natives import NATIVES, Native

PICKLE = "pytorch_model.bin"
MOST_SHARDS = 256

_WRAPPERS = re.compile(r"^((module|_orig_mod|transformer|model)\.)+")
_BUFFER = re.compile(r"^h\.\d+\.attn(\.attention)?\.(bias|masked_bias)$")  # the causal mask, which old versions stored


def recognises(path: Path) -> bool:
    """Whether a folder looks like Hugging Face's."""
    return (path / CONFIG).is_file()


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of one on the Hub (owner/name, with @revision or without), and is nothing on this disk."""
    form = r"(gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+)(@[\w./-]+)?"
    return not Path(name).exists() and re.fullmatch(form, name) is not None


def download(name: str) -> Path:
    """The folder of a model on the Hub, from its cache or downloaded. `gpt2` and its sisters are OpenAI's."""
    return fetch(name)


def read(folder: Path, tokenizer: str | None = None, *, allow_pickle: bool = False) -> Imported:
    """A model of one of the classes in `natives`.

    Args:
        tokenizer: named by the user in place of the one in the folder.
        allow_pickle: where there is only pytorch_model.bin, have a child process read its tensors.

    Raises:
        CheckpointError: damaged, incomplete, or of another class. UntrustedFileError: its weights are a pickle.
    """
    native, notes = read_config(folder / CONFIG)
    config = to_ours(native, folder)
    with torch.device("meta"):
        model = GPT2.from_config(config)
    words = tokenizer_for(native.vocab_size, folder, tokenizer)
    with stored_tensors(folder, allow_pickle) as stored:
        found = fill(
            model,
            native.layout(config),
            stored,
            where=str(folder),
            short=lambda name: _WRAPPERS.sub("", name),
            ignored=lambda name: "the causal mask, which is a rule here" if _BUFFER.match(name) else None,
        )
    return Imported(model.eval(), words, found, notes)


def read_config(path: Path) -> tuple[Native, list[str]]:
    """What a config.json describes, and what in it is not followed.

    Raises:
        CheckpointError: it is damaged, impossible, or of a class that we have nothing for.
    """
    values = read_json(path)
    kinds = {native.model_type: native for native in NATIVES}
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        cause = f"model_type is {kind!r:.60}; known are {', '.join(sorted(kinds))}"
        raise CheckpointError("another model", where=str(path), cause=cause, fix="import one of those")
    notes = ["auto_map is ignored: no code of the folder is run"] if "auto_map" in values else []
    try:
        return kinds[kind].model_validate(values), notes
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r:.80}"
        raise CheckpointError("unusable config", where=str(path), cause=cause, fix="copy the folder again") from None


def to_ours(native: Native, folder: Path) -> GPT2Config:
    """The same model in our words.

    Raises:
        CheckpointError: a shape that cannot be, or a part that ours has not.
    """
    try:
        return native.to_ours()
    except ValidationError as error:
        cause = error.errors()[0]["msg"].removeprefix("Value error, ")
    except ValueError as error:
        cause = str(error)
    raise CheckpointError(
        "cannot be computed here", where=str(folder / CONFIG), cause=cause, fix="import a model without it"
    )


@contextmanager
def stored_tensors(folder: Path, allow_pickle: bool = False) -> Iterator[list[Stored]]:
    """The tensors of a folder, from all its files; each is read when it is asked for.

    Raises:
        CheckpointError: a file is missing or damaged. UntrustedFileError: there are only pickles.
    """
    found: list[Stored] = []
    with ExitStack() as files:
        if (
            allow_pickle
            and not any((folder / name).exists() for name in (WEIGHTS, INDEX))
            and (folder / PICKLE).exists()
        ):
            yield files.enter_context(sandbox.unpack(folder / PICKLE)).tensors
            return
        for path in weight_files(folder):
            file = files.enter_context(regular_file(path).open("rb"))
            try:
                entries = read_header(file)
            except ValueError as error:
                raise CheckpointError(
                    "unusable weights", where=str(path), cause=str(error), fix="copy the file again"
                ) from None
            found += [
                Stored(name, entry.shape, reader(file, entry.offset, entry.shape, entry.dtype))
                for name, entry in entries.items()
            ]
        yield found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those its index names.

    Raises:
        CheckpointError: none, or an index that leads nowhere. UntrustedFileError: there are only pickles.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        index: Any = read_json(folder / INDEX, LARGEST_INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            cause = "it has no weight_map from tensors to files"
            raise CheckpointError("unusable index", where=str(folder / INDEX), cause=cause, fix="copy it again")
        names = sorted(set(places.values()))
        if len(names) > MOST_SHARDS:
            cause = f"{len(names)} files; {MOST_SHARDS} are allowed"
            raise CheckpointError("unusable index", where=str(folder / INDEX), cause=cause, fix="use fewer shards")
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                cause = f"it names {name!r:.80}, which is no safetensors file of this folder"
                raise CheckpointError(
                    "unusable index", where=str(folder / INDEX), cause=cause, fix="copy the folder again"
                )
        return [folder / name for name in names]
    if found := pickles.pickles_in(folder):
        named = folder / PICKLE
        pickles.refuse(named if named in found else found[0], final=named not in found)
    raise CheckpointError(
        "no weights", where=str(folder), cause=f"neither {WEIGHTS} nor {INDEX} is there", fix="complete the folder"
    )
