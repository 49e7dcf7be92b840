"""What a run is: frozen dataclasses, with a docstring under each field that is also its ``--help``, and the named sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from gpt2lab.errors import ConfigError

GPT2_VOCAB_SIZE = 50257
VOCAB_MULTIPLE = 64

PRESETS: dict[str, dict[str, int]] = {
    "124M": {"embed_dim": 768, "num_heads": 12, "num_layers": 12},
    "355M": {"embed_dim": 1024, "num_heads": 16, "num_layers": 24},
    "774M": {"embed_dim": 1280, "num_heads": 20, "num_layers": 36},
    "1558M": {"embed_dim": 1600, "num_heads": 25, "num_layers": 48},
    # For laptops and tests. The sizes of the first four count the head's 50257 rows; these are named for their width.
    "tiny-64": {"embed_dim": 64, "num_heads": 2, "num_layers": 2, "max_seq_len": 128},
    "tiny-128": {"embed_dim": 128, "num_heads": 4, "num_layers": 4, "max_seq_len": 256},
    "tiny-256": {"embed_dim": 256, "num_heads": 8, "num_layers": 6, "max_seq_len": 256},
}

_STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Strategy = Literal["auto", "single", "ddp", "fsdp"]
Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Rate = Annotated[float, Field(ge=0, lt=1)]


def _check_sources(value: Any) -> Any:
    """Say of both types at once what is wrong, and not the value: it may have passwords in it."""
    several = value if isinstance(value, list | tuple) and value else [value]
    if not all(isinstance(one, str) for one in several):
        raise ValueError("source should be a text, or a list of texts")
    return value


Sources = Annotated[str | tuple[str, ...], BeforeValidator(_check_sources)]


@dataclass(frozen=True, config=_STRICT)
class GPT2Config:
    """The shape of a GPT-2 and its variants. The defaults are GPT-2 124M."""

    vocab_size: Count | None = None
    """Tokens known. None: the tokenizer's number in a run, 50257 elsewhere. Stored rows are padded to a multiple of 64."""
    max_seq_len: Count = 1024
    """The longest context in tokens; a model with learned positions has no position beyond it."""
    embed_dim: Count = 768
    """Width of the residual stream."""
    num_heads: Count = 12
    """Query heads; must divide embed_dim."""
    num_kv_heads: Count | None = None
    """Key and value heads; must divide num_heads. None: num_heads (multi-head); 1: multi-query; between: grouped-query."""
    ff_hidden_dim: Count | None = None
    """Inner width of the MLP, or of one expert. None: 4 * embed_dim; with swiglu, which has a third matrix, 8/3 of it."""
    num_layers: Count = 12
    """Transformer blocks."""
    position: Literal["learned", "rope"] = "learned"
    """How a token knows its place: GPT-2's learned table, or rotary embeddings on queries and keys (RoPE)."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    """RoPE's base: the slowest rotation takes about 2 * pi * rope_base tokens for a turn."""
    rope_scaling: Literal["linear", "ntk", "yarn"] | None = None
    """How RoPE reads rope_factor times the length it was trained on: squeezed positions (linear), a larger base (ntk), or
    each frequency by how often it turns (yarn). The trained length is then max_seq_len / rope_factor."""
    rope_factor: Annotated[float, Field(ge=1)] = 1.0
    """How many times longer than the trained length max_seq_len is."""
    windows: tuple[Count | None, ...] | None = None
    """Tokens a token may attend to, itself included, one entry a layer, tiled over the layers: [64, 64, null]. None: all."""
    num_experts: Count = 1
    """MLPs in each block, of which a router chooses; 1: the dense MLP, without a router."""
    experts_per_token: Count = 1
    """Experts that work on a token. Their weights are normalised: with 1, a router learns from its balance alone."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """GPT-2's LayerNorm, or RMSNorm, which does not centre and has no bias."""
    activation: Literal["gelu_tanh", "gelu", "relu2", "swiglu"] = "gelu_tanh"
    """GPT-2's tanh form of GELU, the exact GELU, the square of ReLU, or SwiGLU, whose up_proj is twice as wide."""
    bias: bool = True
    """Whether projections and LayerNorms have biases."""
    qk_norm: bool = False
    """Whether each head's queries and keys are brought to RMS 1 before they meet."""
    logit_softcap: Annotated[float, Field(gt=0)] | None = None
    """Bend logits smoothly into (-cap, cap): cap * tanh(logits / cap). None: as they are."""
    zero_init: bool = False
    """Whether what writes to the residual stream starts at 0 in place of GPT-2's small random weights."""
    tie_head: bool = True
    """Whether the head is the token embedding, as in GPT-2, or has weights of its own."""
    dropout: Rate = 0.0
    """Probability of zeroing an activation while training: after embeddings, on attention weights, on both residuals."""

    def __post_init__(self) -> None:
        problems = []
        if self.embed_dim % self.num_heads:
            problems.append(f"num_heads {self.num_heads} does not divide embed_dim {self.embed_dim}")
        elif self.position == "rope" and self.head_dim % 2:
            problems.append(
                f"rope turns pairs, but embed_dim {self.embed_dim} / num_heads {self.num_heads} = {self.head_dim} is odd"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            problems.append(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.rope_scaling is not None and self.position != "rope":
            problems.append(f"rope_scaling {self.rope_scaling} needs position rope, not {self.position}")
        if (self.rope_scaling is None) != (self.rope_factor == 1):
            problems.append(f"rope_scaling {self.rope_scaling} and rope_factor {self.rope_factor:g} go together")
        if not self.experts_per_token <= self.num_experts:
            problems.append(f"experts_per_token {self.experts_per_token} is more than num_experts {self.num_experts}")
        if self.windows is not None and not 0 < len(self.windows) <= self.num_layers:
            problems.append(f"windows has {len(self.windows)} entries for num_layers {self.num_layers}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.embed_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return (self.num_kv_heads or self.num_heads) * self.head_dim

    @property
    def hidden_dim(self) -> int:
        """Inner width of the MLP, or of one expert."""
        default = 4 * self.embed_dim if self.activation != "swiglu" else max(1, round(self.embed_dim / 3)) * 8
        return self.ff_hidden_dim or default

    @property
    def padded_vocab_size(self) -> int:
        """Stored rows of the token embedding: a multiple of 64, because matrix products like round numbers."""
        return -(-(self.vocab_size or GPT2_VOCAB_SIZE) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """One of the named sizes, with changes: ``GPT2Config.from_preset("124M", position="rope")``.

        Raises:
            ConfigError: there is no such size.
        """
        sizes: dict[str, Any] = preset(name)
        return cls(**sizes | changes)


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """What text."""

    source: Sources = "python-docs"
    """python-docs (the prose and source of this Python installation), tinyshakespeare, a file, a folder, a pattern such as
    "books/*.jsonl.zst", an http(s) address, a data set on the Hub such as hf:roneneldan/TinyStories, - for standard input,
    prepared shards, or token files of nanoGPT and llm.c; or a list of them, for all their texts, one after the other."""
    fields: tuple[str, ...] = ()
    """The columns or keys that hold the text, in tables and JSON: one, or a prompt's and its response's. Empty: guessed."""
    on_fault: Literal["skip", "stop"] = "skip"
    """What is not text where text should be (bad bytes, broken records, binary files): leave it out and say so, or stop."""
    packing: Literal["contiguous", "documents"] = "contiguous"
    """How text becomes samples. contiguous: cut every seq_len tokens, wherever documents begin. documents: each sample holds
    whole documents, as many as fit; longer ones are cut, and what stays empty is no target."""
    attend_across: bool = True
    """Whether a token may look at the documents before its own in the same sample, in training and in validation."""
    restart_positions: bool = False
    """Whether positions count from where each document begins, or from where the sample does."""
    validation: str | None = None
    """Text to validate on, like source. None: a tenth of the source is held out, whole documents where there are many."""
    validation_tokens: Count | None = None
    """How many tokens of the validation text to score at each validation. None: all."""
    stream: bool = False
    """Learn from the text while it is read, for a source larger than the disk: a few blocks of it are kept at a time. It needs
    steps; what is held out are its first documents, about validation_tokens (None: 131072), unless validation is given."""
    window_tokens: Count = 2**24
    """With stream: tokens in a block, no fewer than in a step. The samples of a block are shuffled, so are the files."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The source, or all of them, as a list."""
        return (self.source,) if isinstance(self.source, str) else self.source


@dataclass(frozen=True, config=_STRICT)
class OptimConfig:
    """How the weights move."""

    name: Literal["adamw", "sgd"] = "adamw"
    """adamw (Loshchilov & Hutter 2019) or sgd with momentum betas[0]."""
    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """The peak, reached after warm-up."""
    min_learning_rate: Annotated[float, Field(ge=0)] | None = None
    """Where the cosine ends, at the last step. None: a tenth of the peak."""
    warmup_steps: CountOrZero | None = None
    """Steps of linear warm-up from 0. None: a fiftieth of all steps, at least 1."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """Decay of the running mean of the gradient and of its square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay, on matrices only: biases and norms are left alone. Decoupled in adamw; in sgd it is added to the gradient."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Longest gradient, as a norm over all parameters; 0 leaves it as it is."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """With experts: how much of the load-balancing loss is added to what is minimised (metrics.jsonl has it apart)."""
    z_weight: Annotated[float, Field(ge=0)] = 0.001
    """With experts: how much of the router-z loss is added."""


@dataclass(frozen=True, config=_STRICT)
class SystemConfig:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda where there is one, then Apple's mps, then cpu."""
    precision: Precision = "auto"
    """Of the matrix products; weights and sums stay fp32. auto: the fastest measured here at this model's shapes."""
    compile: bool = False
    """Compile the model with torch.compile: slower to start, often faster to run; on a CPU it needs a C++ compiler."""
    num_processes: Count | None = None
    """Processes to start on this machine, one a GPU. None: those that torchrun or accelerate launch started, else 1."""
    strategy: Strategy = "auto"
    """How processes share the work: ddp, each with a whole copy; fsdp, weights, gradients and optimizer cut into shards.
    auto: single for one process, else ddp."""
    shard_size: Count | None = None
    """With fsdp: processes that hold one copy of the model together; copies are replicas (hybrid sharding). None: all."""
    offload: bool = False
    """With fsdp on GPUs: keep shards and optimizer in the CPU's memory, and update there."""
    activation_checkpointing: bool = False
    """Keep only what enters each block, and compute the rest again in the backward pass: less memory, a third more work."""
    exact: bool = False
    """Equal bits on any number of processes and with any strategy, for the same micro_batch: gradients are added as
    integers, and on a CPU each process has one thread."""
    timeout_seconds: Count = 120
    """A process that gives no sign for so long is taken to hang, named with its stacks, and the run ends."""
    restarts: CountOrZero = 3
    """How often processes that died or hung are started again from the last checkpoint, with num_processes."""
    compare_every: CountOrZero = 100
    """Steps between comparisons of the replicas' weights, which must be the same to the bit; 0: never."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """A training run: everything that decides what comes out, and where it goes."""

    out: str = "runs/default"
    """The run folder. The same command on the same folder goes on where it left off."""
    steps: Count | None = None
    """Optimizer steps. None: as many as `epochs` needs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training text, in place of steps. Neither given: 1."""
    seed: CountOrZero = 1337
    """Decides the first weights, the order of samples, dropout and the samples while training."""
    batch_tokens: Count = 524_288
    """Tokens an optimizer step learns from, a multiple of seq_len."""
    micro_batch: Count | None = None
    """Sequences in one forward pass; a step accumulates as many passes as batch_tokens needs. None: what fits and is fast."""
    seq_len: Count | None = None
    """Tokens in a training sequence. None: model.max_seq_len."""
    validate_every: CountOrZero = 100
    """Steps between validations; 0: only at the start and the end."""
    checkpoint_every: CountOrZero = 500
    """Steps between checkpoints; 0: only at the end. A stop by signal always writes one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept, besides the one with the lowest validation loss; older ones are removed once a newer one
    has been verified. A file `step-00000500.keep` beside a checkpoint keeps that one too."""
    checkpoint_in_background: bool = True
    """Write checkpoints while training goes on; a last one, or one after a signal, is waited for."""
    checkpoint_file_bytes: Count = 5_000_000_000
    """Weights, and the optimizer's state, are cut into files of about so many bytes, by whole tensors."""
    skip_limit: CountOrZero = 10
    """Steps of the last hundred that may be skipped because their loss or gradient is not finite; one more ends the run."""
    on_spike: Literal["note", "rollback"] = "note"
    """What a jump of the loss brings: a line and a field in metrics.jsonl, or a return to the last checkpoint that goes
    on with the text after the spike (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1)."""
    sample_every: CountOrZero = 0
    """Steps between samples written to samples.jsonl; 0: only at the end."""
    sample_prompt: str = "\n"
    """What the samples while training start from."""
    init_from: str | None = None
    """A model whose weights are the start (fine-tuning): a run, a checkpoint, a Hugging Face folder or Hub name. Where no
    model key is given, its shape is taken too."""
    tokenizer: str | None = None
    """bytes, chars, bpe:N (byte-pair encoding of N tokens, trained on the source), gpt2, or a folder. None: that of
    init_from, else bytes."""
    model: GPT2Config = GPT2Config()
    """The model's shape."""
    data: DataConfig = DataConfig()
    """The text."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    system: SystemConfig = SystemConfig()
    """The machine."""

    def __post_init__(self) -> None:
        problems = []
        seq_len = self.seq_len or self.model.max_seq_len
        if seq_len > self.model.max_seq_len:
            problems.append(f"seq_len {seq_len} is longer than model.max_seq_len {self.model.max_seq_len}")
        elif self.init_from is not None and self.seq_len is None:
            pass  # seq_len is that model's, which is not read yet; checked again when it is
        elif self.batch_tokens % seq_len:
            near = max(1, round(self.batch_tokens / seq_len)) * seq_len
            problems.append(f"batch_tokens {self.batch_tokens} is no multiple of seq_len {seq_len}; {near} is")
        elif self.micro_batch and (self.batch_tokens // seq_len) % self.micro_batch:
            problems.append(
                f"micro_batch {self.micro_batch} does not divide the {self.batch_tokens // seq_len} sequences of a step"
            )
        if self.data.packing == "documents" and self.data.stream:
            problems.append("data.packing documents looks at the whole text first, which data.stream never has")
        if self.data.packing == "documents" and seq_len < 2:
            problems.append("data.packing documents needs a seq_len of 2 or more")
        if self.model.position == "rope" and self.data.restart_positions and self.data.attend_across:
            problems.append(
                "data.restart_positions with rope and data.attend_across would turn tokens of other documents to wrong"
                " distances; rope needs no restart"
            )
        if self.system.strategy == "single" and (self.system.num_processes or 1) > 1:
            problems.append(f"system.num_processes {self.system.num_processes} is too many for system.strategy single")
        if self.data.stream and not self.steps:
            problems.append("data.stream needs steps: how much text there is, nobody knows before it was read")
        if self.steps and self.epochs:
            problems.append(f"steps {self.steps} and epochs {self.epochs} are both given; one decides the other")
        floor, peak = self.optim.min_learning_rate, self.optim.learning_rate
        if floor is not None and floor > peak:
            problems.append(f"optim.min_learning_rate {floor} is above optim.learning_rate {peak}")
        if self.steps and (self.optim.warmup_steps or 0) > self.steps:
            problems.append(f"optim.warmup_steps {self.optim.warmup_steps} is more than steps {self.steps}")
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True, config=_STRICT)
class ResolvedConfig(RunConfig):
    """A training run with nothing left open: what `plan.resolve` makes of a RunConfig."""

    steps: Count = 1
    """Optimizer steps."""
    micro_batch: Count = 1
    """Sequences in one forward pass."""
    seq_len: Count = 1
    """Tokens in a training sequence."""


def fields(config_class: Any = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every dotted key of a config with its default and its docstring, in the order of the classes."""
    for field in dataclasses.fields(config_class):
        described = config_class.__pydantic_fields__[field.name]
        if dataclasses.is_dataclass(described.default):
            yield from fields(type(described.default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, described.default, described.description
    if config_class is GPT2Config:
        yield f"{prefix}preset", None, f"A named size that the other model keys then change: {', '.join(PRESETS)}."


def to_yaml(config: Any) -> str:
    """A config, or plain nested values, as a recipe that gives them back."""
    values = to_dict(config) if dataclasses.is_dataclass(config) else config
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain values: what YAML and JSON hold."""
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        for name, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    }


def preset(name: str) -> dict[str, int]:
    """The model keys of a named size.

    Raises:
        ConfigError: there is no such size.
    """
    if name not in PRESETS:
        fix = f"one of {', '.join(PRESETS)}"
        raise ConfigError("unknown preset", where="model.preset", cause=f"no size is called {name!r}: {fix}", fix=fix)
    return PRESETS[name]
