"""The classes of Hugging Face's transformers that hold some of our models exactly: their config, their names, their limits.

Each is a `Native`, used in both directions: `weights.hf` reads a folder of one, `weights.export` writes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict

from gpt2lab.config import GPT2Config
from gpt2lab.model.rope import ntk_base
from gpt2lab.weights.layout import Layout, Slot

Size = Annotated[int, Field(ge=1, le=2**20)]
Layers = Annotated[int, Field(ge=1, le=1024)]
_Repeated = Annotated[tuple[list[Literal["global", "local"]], Layers], Strict(False)]  # in JSON, tuples are lists
_HF_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu2": "relu2",
}  # fmt: skip


class Native(BaseModel, ABC):
    """A config.json of one class: the keys that decide the mathematics, bounded. Other keys are not looked at.

    Attributes:
        model_type: as config.json has it; `architecture`: the class; `prefix`: before the names of all tensors but the head.
    """

    model_config = ConfigDict(extra="ignore", strict=True)
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str] = "transformer."

    vocab_size: Size
    tie_word_embeddings: bool = True

    @classmethod
    @abstractmethod
    def obstacle(cls, config: GPT2Config) -> str | None:
        """Why this class does not hold such a model, naming the field; None: it does, exactly."""

    @classmethod
    def changes(cls, config: GPT2Config) -> dict[str, Any]:
        """What has to be changed in a model for this class to hold it, without changing what it computes."""
        return {"bias": True}  # zeros, where there are none

    @classmethod
    @abstractmethod
    def of(cls, config: GPT2Config) -> dict[str, Any]:
        """Its config.json, without what is the same for all classes."""

    @abstractmethod
    def to_ours(self) -> GPT2Config:
        """The same model in our words.

        Raises:
            ValueError: it has a part that ours has not.
        """

    @classmethod
    @abstractmethod
    def layout(cls, config: GPT2Config) -> Layout:
        """Its tensors, without `prefix`."""


class GPT2Native(Native):
    """GPT-2: learned positions, one key head for each query head, full attention. Matrices have the input dimension first."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"

    n_positions: Size = 1024
    n_embd: Size = 768
    n_layer: Layers = 12
    n_head: Size = 12
    n_inner: Size | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False

    @classmethod
    def obstacle(cls, config: GPT2Config) -> str | None:
        return _other_parts(config) or _other_position(config, "learned") or _windowed(config)

    @classmethod
    def changes(cls, config: GPT2Config) -> dict[str, Any]:
        return {"bias": True, "num_kv_heads": config.num_heads}

    @classmethod
    def of(cls, config: GPT2Config) -> dict[str, Any]:
        return {
            "n_positions": config.max_seq_len,
            "n_ctx": config.max_seq_len,  # transformers 5 drops it; llama.cpp's converter reads it
            "n_embd": config.embed_dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": config.hidden_dim,
            "activation_function": _theirs(config.activation, "gelu_new"),
            "layer_norm_epsilon": 1e-5,
            "resid_pdrop": config.dropout,
            "embd_pdrop": config.dropout,
            "attn_pdrop": config.dropout,
        }

    def to_ours(self) -> GPT2Config:
        _same(self, layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        _same(self, add_cross_attention=False)
        return GPT2Config(
            vocab_size=self.vocab_size, max_seq_len=self.n_positions, embed_dim=self.n_embd, num_heads=self.n_head,
            num_kv_heads=self.n_head, num_layers=self.n_layer, ff_hidden_dim=self.n_inner or 4 * self.n_embd,
            tie_head=self.tie_word_embeddings, activation=_ours(self, "activation_function"),
        )  # fmt: skip

    @classmethod
    def layout(cls, config: GPT2Config) -> Layout:
        return _gpt2_layout(config, transposed=True)


class GPTBigCodeNative(GPT2Native):
    """GPTBigCode: GPT-2 with one key head for all query heads, and matrices as torch's Linear has them."""

    model_type = "gpt_bigcode"
    architecture = "GPTBigCodeForCausalLM"

    multi_query: bool = True

    @classmethod
    def obstacle(cls, config: GPT2Config) -> str | None:
        if config.num_kv_heads != 1 or config.num_heads == 1:
            return f"num_kv_heads {config.num_kv_heads} of num_heads {config.num_heads}: it holds one for several"
        return super().obstacle(config)

    @classmethod
    def changes(cls, config: GPT2Config) -> dict[str, Any]:
        return {"bias": True}

    @classmethod
    def of(cls, config: GPT2Config) -> dict[str, Any]:
        activation = _theirs(config.activation, "gelu_pytorch_tanh")
        return super().of(config) | {"multi_query": True, "activation_function": activation}

    def to_ours(self) -> GPT2Config:
        _same(self, multi_query=True)
        return replace(super().to_ours(), num_kv_heads=1)

    @classmethod
    def layout(cls, config: GPT2Config) -> Layout:
        return _gpt2_layout(config, transposed=False)


class GPTNeoNative(Native):
    """GPT-Neo: learned positions, and layers that are full or have the one window. Scores are not scaled; no qkv biases."""

    model_type = "gpt_neo"
    architecture = "GPTNeoForCausalLM"

    max_position_embeddings: Size = 2048
    hidden_size: Size = 2048
    num_layers: Layers = 24
    num_heads: Size = 16
    intermediate_size: Size | None = None
    window_size: Size = 256
    attention_types: Annotated[list[_Repeated], Field(max_length=1024)] = [(["global", "local"], 12)]
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5

    @classmethod
    def obstacle(cls, config: GPT2Config) -> str | None:
        different = sorted({window for window in layer_windows(config) if window is not None})
        if len(different) > 1:
            return f"windows {different}: with learned positions, no class of transformers has two of different lengths"
        return _other_parts(config) or _other_position(config, "learned")

    @classmethod
    def changes(cls, config: GPT2Config) -> dict[str, Any]:
        return {"bias": True, "num_kv_heads": config.num_heads}

    @classmethod
    def of(cls, config: GPT2Config) -> dict[str, Any]:
        windows = layer_windows(config)
        kinds = ["global" if window is None else "local" for window in windows]
        return {
            "max_position_embeddings": config.max_seq_len,
            "hidden_size": config.embed_dim,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "intermediate_size": config.hidden_dim,
            "window_size": next((window for window in windows if window is not None), config.max_seq_len),
            "attention_types": [[kinds, 1]],
            "attention_layers": kinds,
            "activation_function": _theirs(config.activation, "gelu_new"),
            "layer_norm_epsilon": 1e-5,
            "resid_dropout": config.dropout,
            "embed_dropout": config.dropout,
            "attention_dropout": config.dropout,
        }

    def to_ours(self) -> GPT2Config:
        _same(self, layer_norm_epsilon=1e-5)
        if sum(len(kinds) * times for kinds, times in self.attention_types) != self.num_layers:
            raise ValueError(f"attention_types does not describe num_layers {self.num_layers}")
        kinds = [kind for kinds, times in self.attention_types for _ in range(times) for kind in kinds]
        return GPT2Config(
            vocab_size=self.vocab_size, max_seq_len=self.max_position_embeddings, embed_dim=self.hidden_size,
            num_heads=self.num_heads, num_kv_heads=self.num_heads, num_layers=self.num_layers,
            ff_hidden_dim=self.intermediate_size or 4 * self.hidden_size, tie_head=self.tie_word_embeddings,
            windows=tuple(self.window_size if kind == "local" else None for kind in kinds) if "local" in kinds else None,
            activation=_ours(self, "activation_function"),
        )  # fmt: skip

    @classmethod
    def layout(cls, config: GPT2Config) -> Layout:
        attn, width = "h.{}.attn.attention.", config.embed_dim
        rows = {
            attn + "q_proj.weight": Slot("blocks.{}.attn.qkv_proj.weight", (0, width), scale=config.head_dim**-0.5),
            attn + "k_proj.weight": Slot("blocks.{}.attn.qkv_proj.weight", (width, 2 * width)),
            attn + "v_proj.weight": Slot("blocks.{}.attn.qkv_proj.weight", (2 * width, 3 * width)),
            **_pair("h.{}.ln_1", "attn_norm"),
            **_pair(attn + "out_proj", "attn.output_proj"),
            **_pair("h.{}.ln_2", "mlp_norm"),
            **_pair("h.{}.mlp.c_fc", "mlp.up_proj"),
            **_pair("h.{}.mlp.c_proj", "mlp.down_proj"),
        }
        return _ends(config, "wte.weight", "ln_f", "wpe.weight") | _tiled(rows, config)


class _Rope(BaseModel):
    """How transformers writes RoPE and its scaling: kinds and keys that ours has not are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rope_type: Literal["default", "linear", "yarn"] | None = None
    rope_theta: Annotated[float, Field(gt=1, lt=1e12, allow_inf_nan=False)] | None = None
    factor: Annotated[float, Field(ge=1, lt=1e6, allow_inf_nan=False)] = 1.0
    original_max_position_embeddings: Size | None = None


class Starcoder2Native(Native):
    """Starcoder2: RoPE, grouped heads, LayerNorm with biases, and one window in all layers or in none."""

    model_type = "starcoder2"
    architecture = "Starcoder2ForCausalLM"
    prefix = "model."

    max_position_embeddings: Size = 4096
    hidden_size: Size = 3072
    num_hidden_layers: Layers = 30
    num_attention_heads: Size = 24
    num_key_value_heads: Size = 2
    intermediate_size: Size = 12288
    hidden_act: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-5
    sliding_window: Size | None = None
    use_bias: bool = True
    rope_theta: Annotated[float, Field(gt=1, lt=1e12, allow_inf_nan=False)] | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None

    @classmethod
    def obstacle(cls, config: GPT2Config) -> str | None:
        if config.windows and set(config.windows) == {1}:
            return "windows [1]: its mask holds it, but transformers' sliding cache keeps everything then"
        if config.rope_scaling == "yarn" and config.max_seq_len % config.rope_factor:
            return f"rope_factor {config.rope_factor:g}: it has whole numbers of trained positions"
        return _other_parts(config) or _other_position(config, "rope") or _differing_windows(config)

    @classmethod
    def of(cls, config: GPT2Config) -> dict[str, Any]:
        base = config.rope_base
        if config.rope_scaling == "ntk":  # which is nothing but another base
            base = ntk_base(config.head_dim, base, config.rope_factor)
        base = int(base) if base == int(base) else base
        rope: dict[str, Any] = {"rope_type": "default"}
        if config.rope_scaling in ("linear", "yarn"):
            rope = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
            if config.rope_scaling == "yarn":
                rope["original_max_position_embeddings"] = int(config.max_seq_len / config.rope_factor)
        return {
            "max_position_embeddings": config.max_seq_len,
            "hidden_size": config.embed_dim,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.hidden_dim,
            "hidden_act": _theirs(config.activation, "gelu_pytorch_tanh"),
            "norm_epsilon": 1e-5,
            "sliding_window": config.windows[0] if config.windows else None,
            "use_bias": True,
            "rope_theta": base,  # what 4.x and vLLM read
            "rope_parameters": rope | {"rope_theta": base},
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "residual_dropout": config.dropout,
            "embedding_dropout": config.dropout,
            "attention_dropout": config.dropout,
        }

    def to_ours(self) -> GPT2Config:
        _same(self, norm_epsilon=1e-5, use_bias=True)
        rope = self.rope_parameters or self.rope_scaling or _Rope()
        scaling, trained = rope.rope_type, rope.original_max_position_embeddings
        if scaling == "yarn" and trained is not None and trained * rope.factor != self.max_position_embeddings:
            raise ValueError(f"{trained} original positions times {rope.factor} are not {self.max_position_embeddings}")
        scaling = None if scaling == "default" else scaling
        return GPT2Config(
            vocab_size=self.vocab_size, max_seq_len=self.max_position_embeddings, embed_dim=self.hidden_size,
            num_heads=self.num_attention_heads, num_kv_heads=self.num_key_value_heads, num_layers=self.num_hidden_layers,
            ff_hidden_dim=self.intermediate_size, position="rope", rope_scaling=scaling,
            rope_base=rope.rope_theta or self.rope_theta or 10000.0, rope_factor=rope.factor if scaling else 1.0,
            windows=(self.sliding_window,) if self.sliding_window else None,
            activation=_ours(self, "hidden_act"), tie_head=self.tie_word_embeddings,
        )  # fmt: skip

    @classmethod
    def layout(cls, config: GPT2Config) -> Layout:
        query, key = config.embed_dim, config.kv_dim
        attn = "layers.{}.self_attn."
        places = {"q_proj": (0, query), "k_proj": (query, query + key), "v_proj": (query + key, query + 2 * key)}
        rows = {
            **{
                f"{attn}{name}.{kind}": Slot(f"blocks.{{}}.attn.qkv_proj.{kind}", place)
                for name, place in places.items()
                for kind in ("weight", "bias")
            },
            **_pair("layers.{}.input_layernorm", "attn_norm"),
            **_pair(attn + "o_proj", "attn.output_proj"),
            **_pair("layers.{}.post_attention_layernorm", "mlp_norm"),
            **_pair("layers.{}.mlp.c_fc", "mlp.up_proj"),
            **_pair("layers.{}.mlp.c_proj", "mlp.down_proj"),
        }
        return _ends(config, "embed_tokens.weight", "norm") | _tiled(rows, config)


NATIVES: Sequence[type[Native]] = (GPTBigCodeNative, GPT2Native, GPTNeoNative, Starcoder2Native)
"""In the order in which `weights.export` asks them."""


def layer_windows(config: GPT2Config) -> list[int | None]:
    """The window of each layer. One that is as long as learned positions reach is none."""
    windows = config.windows or (None,)
    tiled = [windows[layer % len(windows)] for layer in range(config.num_layers)]
    if config.position == "learned":
        return [None if window is None or window >= config.max_seq_len else window for window in tiled]
    return tiled


def _other_parts(config: GPT2Config) -> str | None:
    """A part that none of these classes has."""
    for name, known in {
        "norm": ("layernorm",),
        "activation": ("gelu_tanh", "gelu", "relu2"),
        "qk_norm": (False,),
        "logit_softcap": (None,),
        "num_experts": (1,),
    }.items():
        if getattr(config, name) not in known:
            return f"{name} {getattr(config, name)}: beside GPT-2's other parts, no class of transformers has it"
    return None


def _other_position(config: GPT2Config, known: str) -> str | None:
    return None if config.position == known else f"position {config.position}: it has {known} positions"


def _windowed(config: GPT2Config) -> str | None:
    return None if not any(layer_windows(config)) else f"windows {list(config.windows or ())}: its attention is full"


def _differing_windows(config: GPT2Config) -> str | None:
    if len(set(layer_windows(config))) == 1:
        return None
    return f"windows {list(config.windows or ())}: with RoPE, no class of transformers has windows that differ by layer"


def _theirs(activation: str, tanh: str) -> str:
    return tanh if activation == "gelu_tanh" else activation


def _ours(native: Native, key: str) -> Any:
    theirs = getattr(native, key)
    if theirs not in _HF_ACTIVATIONS:
        raise ValueError(f"{key} is {theirs!r:.40}; known are {', '.join(_HF_ACTIVATIONS)}")
    return _HF_ACTIVATIONS[theirs]


def _same(native: Native, **ours: Any) -> None:
    for key, value in ours.items():
        if getattr(native, key) != value:
            raise ValueError(f"{key} is {getattr(native, key)!r}, where this model computes {value!r}")


def _gpt2_layout(config: GPT2Config, *, transposed: bool) -> Layout:
    rows = {
        **_pair("h.{}.ln_1", "attn_norm"),
        **_pair("h.{}.attn.c_attn", "attn.qkv_proj", transposed=transposed),
        **_pair("h.{}.attn.c_proj", "attn.output_proj", transposed=transposed),
        **_pair("h.{}.ln_2", "mlp_norm"),
        **_pair("h.{}.mlp.c_fc", "mlp.up_proj", transposed=transposed),
        **_pair("h.{}.mlp.c_proj", "mlp.down_proj", transposed=transposed),
    }
    return _ends(config, "wte.weight", "ln_f", "wpe.weight") | _tiled(rows, config)


def _ends(config: GPT2Config, embedding: str, norm: str, positions: str | None = None) -> Layout:
    """What is before and after the blocks."""
    layout = {embedding: Slot("token_embedding.weight")}
    if positions is not None:
        layout[positions] = Slot("position_embedding.weight")
    layout |= {f"{norm}.{kind}": Slot(f"final_norm.{kind}") for kind in ("weight", "bias")}
    return layout if config.tie_head else layout | {"lm_head.weight": Slot("head.weight")}


def _pair(theirs: str, ours: str, *, transposed: bool = False) -> Layout:
    """The weight and the bias of one part; {} stands for the layer."""
    return {
        f"{theirs}.weight": Slot(f"blocks.{{}}.{ours}.weight", transposed=transposed),
        f"{theirs}.bias": Slot(f"blocks.{{}}.{ours}.bias"),
    }


def _tiled(rows: Layout, config: GPT2Config) -> Layout:
    """The rows of one block for every block."""
    return {
        name.format(layer): Slot(slot.ours.format(layer), slot.rows, slot.transposed, slot.scale)
        for layer in range(config.num_layers)
        for name, slot in rows.items()
    }
