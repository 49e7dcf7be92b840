"""Models in whatever format they come: ours or other people's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2lab import checkpoint
from gpt2lab.config import to_dict, to_yaml
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.manifest import MANIFEST
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import Quantize, ReadingGPT2, assemble, quantize_weights
from gpt2lab.seeds import generator_for
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import convert, export, hf, llmc, nanogpt, openai
from gpt2lab.weights.convert import Converted
from gpt2lab.weights.export import Exported
from gpt2lab.weights.layout import Imported

FORMATS = "a Hugging Face folder (config.json) or Hub name, a folder of OpenAI's, nanoGPT's ckpt.pt, llm.c's .bin"


def open_model(name: str) -> tuple[GPT2, Tokenizer]:
    """A model in eval mode and its tokenizer, from a run folder, a checkpoint folder, or a foreign format.

    Raises:
        CheckpointError: there is nothing, or it is damaged. UntrustedFileError: it would run code when opened.
    """
    folder = Path(name)
    if (folder / MANIFEST).is_file():
        return checkpoint.load(folder).open_model()
    if (folder / "checkpoints").is_dir():
        newest, troubles = checkpoint.latest(folder)
        if newest is None:
            cause = "; ".join(troubles) or "it has no checkpoint yet"
            raise CheckpointError(
                "no checkpoint", where=name, cause=cause, fix="let the run reach its first checkpoint"
            )
        return newest.open_model()
    imported = read_foreign(name)
    return imported.model, imported.tokenizer


def open_whole(name: str) -> tuple[GPT2, Tokenizer]:
    """The model of `open_model`, if it can be trained, converted and exported.

    Raises:
        ConfigError: it is quantised. Otherwise as `open_model`.
    """
    model, tokenizer = open_model(name)
    if isinstance(model, ReadingGPT2):
        cause = "its weights are quantised, which is for generating and evaluating alone"
        raise ConfigError("not a whole model", where=name, cause=cause, fix="name the model it was made from")
    return model, tokenizer


def read_foreign(name: str, tokenizer: str | None = None, *, allow_pickle: bool = False) -> Imported:
    """A model in somebody else's format.

    Args:
        tokenizer: as a recipe names it; None: the one beside the weights, or GPT-2's.
        allow_pickle: read the tensors of a pickle, in a child process that can do nothing else.

    Raises:
        CheckpointError: there is nothing, or it is damaged. UntrustedFileError: it would run code when opened.
    """
    path = Path(name)
    if hf.is_hub_name(name):
        return hf.read(hf.download(name), tokenizer)
    if hf.recognises(path):
        return hf.read(path, tokenizer, allow_pickle=allow_pickle)
    if openai.recognises(path):
        return openai.read(path, tokenizer)
    if llmc.recognises(path):
        return llmc.read(path, tokenizer)
    if nanogpt.recognises(path):
        return nanogpt.read(path, tokenizer, allow_pickle=allow_pickle)
    cause = f"it is no run, no checkpoint, and none of: {FORMATS}"
    raise CheckpointError("no such model", where=name, cause=cause, fix="give the folder of a run, such as runs/tiny")


def import_model(source: str, folder: Path, tokenizer: str | None = None, *, allow_pickle: bool = False) -> Imported:
    """Read a foreign model and write it as a folder of ours; return the map of its weights.

    Raises:
        ConfigError: `folder` is not empty. Otherwise as `read_foreign`.
    """
    refuse_full(folder)
    imported = read_foreign(source, tokenizer, allow_pickle=allow_pickle)
    save_model(folder, imported.model, imported.tokenizer)
    return imported


def export_model(name: str, out: Path, to: str = "hf", *, check: bool = True) -> Exported:
    """A model of any kind as a folder that transformers loads, or as a file for llama.cpp (`to` is "hf" or "gguf").

    Raises:
        ConfigError: that format does not hold it, or `out` is there already. CheckpointError: see `export.export_hf`.
    """
    refuse_full(out)
    model, tokenizer = open_whole(name)
    if to == "gguf":
        from gpt2lab.weights import gguf  # its library is optional

        return gguf.export_gguf(model, tokenizer, out)
    return export.export_hf(model, tokenizer, out, check=check)


def convert_model(name: str, out: Path, changes: Mapping[str, Any]) -> tuple[Converted, float]:
    """A model with other parts as a new folder of ours; also, how far its logits are from the first one's.

    Raises:
        ConfigError: changes that cannot be made, or `out` is there already.
    """
    refuse_full(out)
    model, tokenizer = open_whole(name)
    converted = convert.convert(model, changes, generator_for(0, "convert"))
    save_model(out, converted.model, tokenizer)
    return converted, convert.max_logit_difference(model, converted.model, generator_for(0, "compare"))


def quantize_model(name: str, out: Path, to: Quantize = "int8") -> float:
    """A model with quantised weights as a new folder of ours, which `open_model` opens ready to read.

    Returns:
        How far its logits are from the first one's, at most.

    Raises:
        ConfigError: it is quantised already, or `out` is there already.
    """
    refuse_full(out)
    model, tokenizer = open_whole(name)
    weights = quantize_weights(model.state_dict(), to)
    recipe = to_yaml({checkpoint.QUANTIZE: to, "model": to_dict(model.config)})
    checkpoint.save(out, weights, recipe=recipe, tokenizer=tokenizer)
    return convert.max_logit_difference(model, assemble(model, weights), generator_for(0, "compare"))


def save_model(folder: Path, model: GPT2, tokenizer: Tokenizer) -> None:
    """A model by itself as a folder of ours."""
    checkpoint.save(folder, model.state_dict(), recipe=to_yaml({"model": to_dict(model.config)}), tokenizer=tokenizer)


def refuse_full(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: `folder` is not empty, or no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "will not overwrite", where=str(folder), cause="it is there and not empty", fix="name a new folder"
        )


def load_model(name: str) -> GPT2:
    """The model of `open_model`."""
    return open_model(name)[0]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `open_model`."""
    return open_model(name)[1]
