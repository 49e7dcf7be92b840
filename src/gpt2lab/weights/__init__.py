"""Models in whatever format they come: ours or other people's."""

from __future__ import annotations

from pathlib import Path

from gpt2lab import checkpoint
from gpt2lab.config import to_dict, to_yaml
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer
from gpt2lab.weights import hf


def open_model(name: str) -> tuple[GPT2, Tokenizer]:
    """A model in eval mode and its tokenizer, from a run folder, a checkpoint folder, a Hugging Face folder or Hub name.

    Raises:
        CheckpointError: there is nothing, or it is damaged. UntrustedFileError: it would run code when opened.
    """
    folder = Path(name)
    if (folder / checkpoint.MANIFEST).is_file():
        return checkpoint.load(folder).open_model()
    if (folder / "checkpoints").is_dir():
        newest, troubles = checkpoint.latest(folder)
        if newest is None:
            cause = "; ".join(troubles) or "it has no checkpoint yet"
            raise CheckpointError(
                "no checkpoint", where=name, cause=cause, fix="let the run reach its first checkpoint"
            )
        return newest.open_model()
    if hf.is_hf_folder(folder) or hf.is_hub_name(name):
        imported = hf.read(name)
        return imported.model, imported.tokenizer
    cause = "it is no run, no checkpoint, no Hugging Face folder, and not the form of a Hub name (owner/name)"
    raise CheckpointError("no such model", where=name, cause=cause, fix="give the folder of a run, such as runs/tiny")


def import_model(source: str, folder: Path) -> hf.Imported:
    """Read a foreign model and write it as a folder of ours; return the map of its weights.

    Raises:
        ConfigError: `folder` is not empty. Otherwise as `open_model`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            "will not overwrite", where=str(folder), cause="it is there and not empty", fix="name a new folder"
        )
    if not hf.is_hf_folder(Path(source)) and not hf.is_hub_name(source):
        cause = "it is no folder with a config.json, and not the form of a Hub name (gpt2, owner/name)"
        raise CheckpointError("nothing to import", where=source, cause=cause, fix="give a Hugging Face GPT-2 folder")
    imported = hf.read(source)
    recipe = to_yaml({"model": to_dict(imported.model.config)})
    checkpoint.save(folder, imported.model, recipe=recipe, tokenizer=imported.tokenizer)
    return imported


def load_model(name: str) -> GPT2:
    """The model of `open_model`."""
    return open_model(name)[0]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of `open_model`."""
    return open_model(name)[1]
