"""Our models as the one file that llama.cpp runs: as its architecture "gpt2" with learned positions, as "starcoder2" with RoPE.

Only what llama.cpp computes is written: it would leave out the rest (a window, a softcap) without a word. Weights are fp32;
llama.cpp's own ``llama-quantize`` makes smaller files of that.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.config import GPT2_VOCAB_SIZE, GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2, NORM_EPS
from gpt2lab.model.rope import ntk_base
from gpt2lab.paths import sync
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer
from gpt2lab.weights.export import Exported, as_held
from gpt2lab.weights.layout import Layout, pour
from gpt2lab.weights.natives import GPT2Native, Native, Starcoder2Native

if TYPE_CHECKING:
    from gguf import GGUFWriter

NATIVES: dict[str, type[Native]] = {"learned": GPT2Native, "rope": Starcoder2Native}
"""By position: the class of transformers from which llama.cpp's own converter makes the architecture of the same name."""
SHORTEST_YARN = 7
"""Trained tokens below which no pair turns once (2 pi); llama.cpp's ramp and ours then differ."""


def export_gguf(model: GPT2, tokenizer: Tokenizer, path: Path) -> Exported:
    """Write a model and its tokenizer as a GGUF file, which takes the place of `path` only when it is whole.

    Raises:
        ConfigError: llama.cpp has no architecture that computes the same, or the gguf library is not installed.
    """
    cause = obstacle(model.config, tokenizer)
    if cause is not None:
        where, fix = f"model.{cause.split()[0]}", "convert it, or train without; `gpt2lab generate` runs it as it is"
        if cause.startswith("tokenizer"):
            where, fix = "tokenizer", "train with bytes, bpe:4096 or gpt2; `gpt2lab generate` runs it as it is"
        raise ConfigError("llama.cpp does not run this model", where=where, cause=cause, fix=fix)
    if importlib.util.find_spec("gguf") is None:
        fix = "pip install 'gpt2lab[export]'"
        raise ConfigError("cannot write GGUF", cause="the gguf library is not installed", fix=fix)
    native = NATIVES[model.config.position]
    held, changed = as_held(model, native)
    tensors, written = pour(held, layout(native, held.config))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    writer = new_writer(aside, native.model_type)
    describe(writer, held.config, path.stem)
    add_tokenizer(writer, tokenizer, held.vocab_size)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)
    return Exported(native.model_type, written, changed)


def obstacle(config: GPT2Config, tokenizer: Tokenizer) -> str | None:
    """Why llama.cpp does not run such a model, in one sentence that begins with the field; None: it does."""
    for name, known in {
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "qk_norm": False,
        "logit_softcap": None,
        "num_experts": 1,
    }.items():
        if (value := getattr(config, name)) != known:
            return f"{name} {value}: llama.cpp has no architecture with it and GPT-2's other parts"
    if any(window is not None and window < config.max_seq_len for window in config.windows or ()):
        return f"windows {list(config.windows or ())}: llama.cpp would attend to all {config.max_seq_len} tokens"
    trained = config.max_seq_len / config.rope_factor
    if config.rope_scaling == "yarn" and (trained % 1 or trained < SHORTEST_YARN):
        return f"rope_factor {config.rope_factor:g}: llama.cpp's YaRN wants whole trained tokens, 7 or more, not {trained:g}"
    vocab_size = config.vocab_size or GPT2_VOCAB_SIZE
    if tokenizer.vocab_size > vocab_size:
        return f"vocab_size {vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens"
    return _otherwise(json.loads(tokenizer.to_json()))


def layout(native: type[Native], config: GPT2Config) -> Layout:
    """The tensors of a class of transformers by llama.cpp's names; every matrix has the output dimension first."""
    import gguf

    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == native.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    found: Layout = {}
    for theirs, slot in native.layout(config).items():
        prefix = "" if theirs == "lm_head.weight" else native.prefix
        name = names.get_name(prefix + theirs, try_suffixes=(".weight", ".bias"))
        assert name is not None, theirs
        found[name] = replace(slot, transposed=False)
    return found


def describe(writer: GGUFWriter, config: GPT2Config, name: str) -> None:
    """The keys that llama.cpp reads for these architectures."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads or config.num_heads)
    writer.add_layer_norm_eps(NORM_EPS)
    if config.position == "learned":
        return
    base, factor = config.rope_base, config.rope_factor
    # NTK scaling is nothing but another base.
    writer.add_rope_freq_base(ntk_base(config.head_dim, base, factor) if config.rope_scaling == "ntk" else base)
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(factor)
    if config.rope_scaling == "yarn":  # queries and keys grow by 1 + 0.1 ln(factor), as ours: no key is needed for that
        writer.add_rope_scaling_orig_ctx_len(int(config.max_seq_len / factor))


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> None:
    """The vocabulary, filled up to `vocab_size` as llama.cpp's converter does; the merges; the separator as both ends."""
    from gguf import TokenType

    model = json.loads(tokenizer.to_json())["model"]
    kinds = dict.fromkeys(sorted(model["vocab"], key=model["vocab"].__getitem__), TokenType.NORMAL)
    kinds |= {f"[PAD{index}]": TokenType.UNUSED for index in range(len(kinds), vocab_size)}
    kinds[END_OF_TEXT] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(kinds))
    writer.add_token_types(list(kinds.values()))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def new_writer(path: Path, arch: str) -> GGUFWriter:
    """The library's writer, which here also writes an empty list: the merges of a tokenizer of bytes.

    The library leaves an empty list out, and llama.cpp opens no byte-level vocabulary without one.
    """
    from gguf import GGUFValueType, GGUFWriter

    class Writer(GGUFWriter):
        def add_array(self, key: str, val: Sequence[Any]) -> None:
            self.add_key_value(key, val, GGUFValueType.ARRAY)

        def _pack_val(self, val: Any, vtype: GGUFValueType, *args: Any, **options: Any) -> bytes:
            if vtype == GGUFValueType.ARRAY and len(val) == 0:
                return struct.pack("<IIQ", vtype, GGUFValueType.STRING, 0)
            return super()._pack_val(val, vtype, *args, **options)

    return Writer(path, arch)


def _otherwise(state: dict[str, Any]) -> str | None:
    """Why llama.cpp would make other tokens of a text, or None."""
    model, splitter = state["model"], state["pre_tokenizer"] or {}
    if model["type"] != "BPE" or splitter.get("type") != "ByteLevel":
        return f"tokenizer {model['type']}: of GPT-2's kind, llama.cpp has byte-level BPE alone"
    if model["merges"] and not splitter.get("use_regex", True):
        return "tokenizer use_regex false: llama.cpp splits text by GPT-2's rule before it merges"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            return f"tokenizer {option} {model[option]}: llama.cpp merges without it"
    return None
