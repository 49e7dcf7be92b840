"""Our models as folders that transformers runs: written, loaded again with the stock class, compared, and said in the card."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab import __version__
from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError, ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.paths import whole_folder
from gpt2lab.seeds import generator_for
from gpt2lab.tensors import save_tensors
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer
from gpt2lab.weights.convert import convert
from gpt2lab.weights.layout import WeightMap, pour
from gpt2lab.weights.natives import NATIVES, GPTNeoNative, Native

TOLERANCE = 1e-4
"""How far logits may differ, as a part of the largest: rounding, in fp32."""
GREEDY_TOKENS = 64


@dataclass
class Exported:
    """What was written.

    Attributes:
        architecture: the class of transformers that runs it.
        changed: what had to be rewritten for that class, without changing what is computed; a sentence each.
        max_logit_difference: between ours and the stock class, over `compared_tokens`; None where it was not checked.
    """

    architecture: str
    map: WeightMap
    changed: list[str] = field(default_factory=list)
    max_logit_difference: float | None = None
    compared_tokens: int = 0
    greedy_tokens: int = 0


def export_hf(model: GPT2, tokenizer: Tokenizer, folder: Path, *, check: bool = True) -> Exported:
    """Write a folder that ``from_pretrained`` loads, and compare what it computes with `model`.

    Raises:
        ConfigError: no class of transformers holds such a model, or transformers is not installed.
        CheckpointError: the stock class computes something else; nothing is left behind.
    """
    native = native_for(model.config)
    if check and importlib.util.find_spec("transformers") is None:
        fix = "pip install 'gpt2lab[export]', or give --no-check"
        raise ConfigError("cannot check the export", cause="transformers is not installed", fix=fix)
    held, changed = as_held(model, native)
    tensors, written = pour(held, native.layout(held.config))
    named = {name if name == "lm_head.weight" else native.prefix + name: tensor for name, tensor in tensors.items()}
    exported = Exported(native.architecture, written, changed)
    with whole_folder(folder) as aside:
        save_tensors(aside / "model.safetensors", named)
        write_json(aside / "config.json", config_json(native, held.config, tokenizer))
        ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
        write_json(aside / "generation_config.json", ends | {"_from_model_config": True})
        write_tokenizer(aside, tokenizer, held.config)
        if check:
            compare(model, aside, exported)
        (aside / "README.md").write_text(card(model.config, exported), encoding="utf-8")
    return exported


def native_for(config: GPT2Config) -> type[Native]:
    """The class that holds such a model exactly.

    Raises:
        ConfigError: there is none; the reason names the field.
    """
    obstacles = {native: native.obstacle(config) for native in NATIVES}
    for native, obstacle in obstacles.items():
        if obstacle is None:
            return native
    # Of the reasons, that of the class which has the model's positions says what is in the way.
    cause = next(o for o in reversed(obstacles.values()) if o and not o.startswith("position"))
    fix = "convert it, or train without; `gpt2lab generate` and `load_model` run it as it is"
    raise ConfigError(
        "no class of transformers holds this model", where=f"model.{cause.split()[0]}", cause=cause, fix=fix
    )


def as_held(model: GPT2, native: type[Native]) -> tuple[GPT2, list[str]]:
    """The model rewritten as a class needs it, and what was rewritten; the function it computes stays."""
    config = model.config
    changes = {key: value for key, value in native.changes(config).items() if getattr(config, key) != value}
    said = []
    if changes:
        model = convert(model, changes, generator_for(0, "export")).model
        if "num_kv_heads" in changes:
            said.append(
                f"its {config.num_kv_heads} key and value heads are repeated to {config.num_heads}: a larger cache"
            )
        if "bias" in changes:
            said.append("its biases are zeros: it was trained without")
    if native is GPTNeoNative:
        model, folded = without_qkv_biases(model)
        said.append("queries are scaled by 1/sqrt(head_dim) in their weights: GPT-Neo does not scale scores")
        if folded:
            said.append("the biases of queries, keys and values went into attn_norm.bias and output_proj.bias")
    return model, said


@torch.no_grad()
def without_qkv_biases(model: GPT2) -> tuple[GPT2, bool]:
    """A model of learned positions that computes the same with zeros for all biases of qkv_proj; and whether any was not.

    A key's bias adds the same to all scores of a query, which softmax takes away again; a value's bias passes through
    attention, whose weights add up to 1, into the output's bias. A query's bias is moved into the norm before it, by the
    shift that the query matrix turns into that bias; what this shift does to keys and values is again such a constant.
    """
    twin = GPT2.from_config(model.config)
    twin.load_state_dict(model.state_dict())
    any_bias = False
    for block in twin.layers:
        weight, bias = (p.double() for p in (block.attn.qkv_proj.weight, block.attn.qkv_proj.bias))
        if not bias.any():
            continue
        any_bias = True
        (q_weight, _, v_weight), (q_bias, _, v_bias) = weight.chunk(3), bias.chunk(3)
        shift = torch.linalg.lstsq(q_weight, q_bias[:, None]).solution[:, 0]
        output = block.attn.output_proj
        output.bias.add_((output.weight.double() @ (v_bias - v_weight @ shift)).float())
        cast_bias = block.attn_norm.bias
        assert isinstance(cast_bias, Tensor)
        cast_bias.add_(shift.float())
        block.attn.qkv_proj.bias.zero_()
    return twin.eval(), any_bias


def config_json(native: type[Native], config: GPT2Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The whole config.json of a class."""
    return {
        "architectures": [native.architecture],
        "model_type": native.model_type,
        "vocab_size": config.vocab_size,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "tie_word_embeddings": config.tie_head,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "float32",
        "torch_dtype": "float32",  # what 4.x reads
        **native.of(config),
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, config: GPT2Config) -> None:
    """The tokenizer as transformers loads it; the separator is its beginning and its end."""
    tokenizer.save(folder)
    special = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "unk")}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len, **special}
    write_json(folder / "tokenizer_config.json", about | {"clean_up_tokenization_spaces": False})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file for people and programs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def compare(model: GPT2, folder: Path, exported: Exported) -> None:
    """Load the folder with the stock class; note how far its logits are, and how many greedy tokens are the same.

    Raises:
        CheckpointError: they are not the same model.
    """
    stock = load_stock(folder)
    if type(stock).__name__ != exported.architecture:
        raise _mismatch(folder, f"transformers made a {type(stock).__name__} of it, not a {exported.architecture}")
    config = model.config
    widest = max(window or 0 for window in config.windows or (0,))
    time = min(config.max_seq_len, max(64, min(2 * widest + 16, 1024)))
    token_ids = torch.randint(model.vocab_size, (2, time), generator=generator_for(0, "compare"))
    with torch.inference_mode():
        ours, theirs = model(token_ids), stock(token_ids).logits.float()
    exported.compared_tokens = token_ids.numel()
    exported.max_logit_difference = (ours - theirs).abs().max().item()
    if not exported.max_logit_difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise _mismatch(folder, f"its logits differ by {exported.max_logit_difference:.3g}")
    prompt, steps = token_ids[:1, :8], min(GREEDY_TOKENS, config.max_seq_len - 8)
    if steps <= 0:
        return
    stock.generation_config.eos_token_id = None  # the end of a text is a token like others here
    settings = {"do_sample": False, "max_new_tokens": steps, "pad_token_id": 0}
    with torch.inference_mode():
        generated = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, 8:]
    greedy, margins = greedy_tokens(model, prompt, steps)
    same = (generated == greedy).long().cumprod(0).sum().item()
    if same < steps and margins[same] > 2 * TOLERANCE * max(1.0, ours.abs().max().item()):
        raise _mismatch(folder, f"greedy token {same} is {generated[same]}, not {greedy[same]}")
    exported.greedy_tokens = int(same)


def load_stock(folder: Path) -> Any:
    """What transformers makes of a folder, in eval mode and fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()
    their_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy_tokens(model: GPT2, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The likeliest token, `steps` times, and by how much each was likelier than the next."""
    cache = model.new_cache(1, prompt.shape[1] + steps)
    unread, tokens, margins = prompt, [], []
    for _ in range(steps):
        best = model(unread, cache=cache)[0, -1].topk(2)
        tokens.append(best.indices[0])
        margins.append(best.values[0] - best.values[1])
        unread = best.indices[None, :1]
    return torch.stack(tokens), torch.stack(margins)


def card(config: GPT2Config, exported: Exported) -> str:
    """The model card: what it is, how it was made, and what was compared."""
    heads = f"{config.num_heads} heads" + (
        "" if config.num_kv_heads == config.num_heads else f", {config.num_kv_heads} KV heads"
    )
    shape = f"{config.num_layers} layers of width {config.embed_dim}, {heads}, {config.max_seq_len} tokens of context"
    lines = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2lab]\n---",
        f"# A {exported.architecture} from gpt2lab",
        f"A GPT-2 with {config.position} positions: {shape}, {config.vocab_size:,} tokens. "
        f"Written by gpt2lab {__version__} as the class of transformers that computes the same.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
    ]
    if exported.changed:
        lines.append(
            "Rewritten for that class, with the same result:\n\n" + "\n".join(f"- {line}" for line in exported.changed)
        )
    if exported.max_logit_difference is None:
        lines.append("It was not compared with the original when it was written.")
    else:
        lines.append(
            f"Compared with the original when it was written: over {exported.compared_tokens} random tokens the logits differ "
            f"by at most {exported.max_logit_difference:.2g}; {exported.greedy_tokens} greedy tokens are the same."
        )
    return "\n\n".join(lines) + "\n"


def _mismatch(folder: Path, cause: str) -> CheckpointError:
    return CheckpointError(
        "the export is not the model", where=folder.name, cause=cause, fix="report it; nothing was written"
    )
