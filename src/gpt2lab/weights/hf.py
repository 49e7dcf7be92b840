"""Hugging Face's GPT-2 format, read without its library: config.json, safetensors (in one file or in shards), tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError, UntrustedFileError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.paths import hub_files
from gpt2lab.tokenizer import Tokenizer, open_tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 2**20

# Ours, theirs, and whether the matrix is transposed (their Conv1D keeps the input dimension first). {} is the layer.
TABLE: list[tuple[str, str, bool]] = [
    ("token_embedding.weight", "wte.weight", False),
    ("position_embedding.weight", "wpe.weight", False),
    *(
        (f"blocks.{{}}.{ours}.{kind}", f"h.{{}}.{theirs}.{kind}", is_conv and kind == "weight")
        for ours, theirs, is_conv in (
            ("attn_norm", "ln_1", False),
            ("attn.qkv_proj", "attn.c_attn", True),
            ("attn.output_proj", "attn.c_proj", True),
            ("mlp_norm", "ln_2", False),
            ("mlp.up_proj", "mlp.c_fc", True),
            ("mlp.down_proj", "mlp.c_proj", True),
        )
        for kind in ("weight", "bias")
    ),
    ("final_norm.weight", "ln_f.weight", False),
    ("final_norm.bias", "ln_f.bias", False),
]
_PREFIX = re.compile(r"^((module|_orig_mod|transformer)\.)+")
_BUFFER = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # the causal mask, which old versions stored
_Size = Annotated[int, Field(ge=1, le=2**20)]


class HFConfig(BaseModel):
    """The keys of a GPT-2 config.json that decide the mathematics, bounded. The others are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model_type: str
    vocab_size: _Size = 50257
    n_positions: _Size = 1024
    n_embd: _Size = 768
    n_layer: Annotated[int, Field(ge=1, le=1024)] = 12
    n_head: _Size = 12
    n_inner: _Size | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False

    def to_ours(self, where: str) -> GPT2Config:
        """The same shape in our words.

        Raises:
            CheckpointError: it is not GPT-2, or has a part that ours has not.
        """
        same = {
            "model_type": ("gpt2",),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        }
        for key, known in same.items():
            if getattr(self, key) not in known:
                cause = f"{key} is {getattr(self, key)!r}, where this model computes {known[0]!r}"
                raise CheckpointError("another model", where=where, cause=cause, fix="import a GPT-2")
        try:
            return GPT2Config(
                vocab_size=self.vocab_size, max_seq_len=self.n_positions, embed_dim=self.n_embd, num_heads=self.n_head,
                num_kv_heads=self.n_head, ff_hidden_dim=self.n_inner or 4 * self.n_embd, num_layers=self.n_layer,
            )  # fmt: skip
        except ValidationError as error:
            raise CheckpointError(
                "impossible shape", where=where, cause=error.errors()[0]["msg"], fix="mend the file"
            ) from None


@dataclass
class Imported:
    """A foreign model as ours, and the whole map of its tensors by their own names.

    Attributes:
        loaded: names that went in as they are; `transposed`: those that were turned on the way.
        cut: tensors of which only a part was used.
        missing: names of ours that nothing was found for (an error, except where it is empty).
        left_over: names that hold nothing to learn from, with the reason.
    """

    model: GPT2
    tokenizer: Tokenizer
    loaded: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder looks like Hugging Face's."""
    return (folder / CONFIG).is_file()


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of one on the Hub, and is nothing on this disk."""
    return not Path(name).exists() and re.fullmatch(r"(gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+)", name) is not None


def read(name: str) -> Imported:
    """A Hugging Face GPT-2 from a folder, or from the Hub or its cache.

    Raises:
        CheckpointError: damaged, incomplete, or not GPT-2. UntrustedFileError: its weights are a pickle.
        DataError: the Hub cannot be reached.
    """
    folder = Path(name)
    if is_hub_name(name):
        repository = name if "/" in name else f"openai-community/{name}"
        folder = hub_files(repository, CONFIG, WEIGHTS, "vocab.json", "merges.txt")[0].parent
    config = read_config(folder / CONFIG)
    with torch.device("meta"):
        model = GPT2.from_config(config)
    imported = Imported(model, read_tokenizer(folder, config))
    fill(imported, folder)
    model.eval()
    return imported


def read_config(path: Path) -> GPT2Config:
    """The shape that a config.json describes."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size} bytes are too many for a config")
        return HFConfig.model_validate(json.loads(path.read_text(encoding="utf-8"))).to_ours(str(path))
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, not {first['input']!r:.80}"
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        cause = str(error)
    raise CheckpointError("unusable config", where=str(path), cause=cause, fix="copy the folder again")


def read_tokenizer(folder: Path, config: GPT2Config) -> Tokenizer:
    """The tokenizer beside the weights; where there is none and the vocabulary has GPT-2's size, GPT-2's."""
    if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")) or config.vocab_size != 50257:
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = open_tokenizer("gpt2")
    if tokenizer.vocab_size > (config.vocab_size or 0):
        cause = f"the tokenizer has {tokenizer.vocab_size} tokens, the model knows {config.vocab_size}"
        raise CheckpointError(
            "vocabularies differ", where=str(folder), cause=cause, fix="put the model's own tokenizer there"
        )
    return tokenizer


def fill(imported: Imported, folder: Path) -> None:
    """Put every tensor of a folder into the model, and note what became of it."""
    model, config = imported.model, imported.model.config
    expected = model.state_dict()
    ours_of = {
        theirs.format(layer): (ours.format(layer), transposed)
        for ours, theirs, transposed in TABLE
        for layer in (range(config.num_layers) if "{}" in ours else [0])
    }
    tensors: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    head = None
    for name, tensor in read_tensors(folder):
        short = _PREFIX.sub("", name)
        if short == "lm_head.weight":
            head = tensor
        elif short not in ours_of:
            why = "the causal mask, which is a rule here" if _BUFFER.match(short) else "no part of a GPT-2"
            imported.left_over.append(f"{name} ({why})")
        else:
            ours, transposed = ours_of[short]
            shape = expected[ours].shape
            if ours == "token_embedding.weight":
                shape = torch.Size([config.vocab_size or 0, shape[1]])
            shape = shape[::-1] if transposed else shape
            if tensor.shape != shape:
                refused[short] = f"{name} is {tuple(tensor.shape)}, not {tuple(shape)}"
            elif ours in tensors:
                refused[short] = f"{short} is there twice, also as {name}"
            elif not tensor.isfinite().all():
                refused[short] = f"{name} has numbers that are not finite"
            else:
                (imported.transposed if transposed else imported.loaded).append(name)
                value = (tensor.t() if transposed else tensor).float().contiguous()
                padding = expected[ours].shape[0] - value.shape[0]
                tensors[ours] = torch.nn.functional.pad(value, (0, 0, 0, padding)) if padding else value
    imported.missing = [name for name, (ours, _) in ours_of.items() if ours not in tensors and name not in refused]
    problems = [*refused.values(), *(f"missing {name}" for name in imported.missing)]
    embedding = tensors.get("token_embedding.weight")
    if head is not None and embedding is not None:
        if not torch.equal(head.float(), embedding[: config.vocab_size]):
            problems.append("lm_head.weight is not wte.weight, but this model's head is tied")
        imported.left_over.append("lm_head.weight (tied to wte.weight)")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(
            "weights do not fit GPT-2", where=str(folder), cause=shown, fix="give a complete GPT-2 folder"
        )
    model.load_state_dict(tensors, assign=True)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder, one after the other.

    Raises:
        CheckpointError: a file is missing or damaged. UntrustedFileError: there is only a pickle.
    """
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "unusable weights", where=str(path), cause=str(error), fix="copy the file again"
            ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            if (folder / INDEX).stat().st_size > 4 * LARGEST_JSON:
                raise ValueError("it is too large for an index")
            names = sorted({str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                "unusable index", where=str(folder / INDEX), cause=repr(error), fix="copy it again"
            ) from None
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                cause = f"it names {name!r}, which is no file of this folder"
                raise CheckpointError(
                    "unusable index", where=str(folder / INDEX), cause=cause, fix="copy the folder again"
                )
        return [folder / name for name in names]
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(kind))
    if pickles:
        cause = f"{pickles[0]} is a pickle, which can run code when it is opened"
        fix = f"get {WEIGHTS} in its place; most models on the Hub have it"
        raise UntrustedFileError("not opened", where=str(folder), cause=cause, fix=fix)
    raise CheckpointError(
        "no weights", where=str(folder), cause=f"neither {WEIGHTS} nor {INDEX} is there", fix="complete the folder"
    )
