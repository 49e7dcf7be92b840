"""What a training step holds in memory, by purpose and moment: arithmetic over a config, for one process.

A step's memory has a few high points: when the logits meet their gradient, when a block's MLP or attention goes backward,
when the embedding does, when the optimizer moves the weights. Which of them is the highest depends on the shape, so each is
added up, and the largest is the peak. `tests/campaigns/memory.py` compares it with what real steps allocate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from gpt2lab.config import GPT2Config, ResolvedConfig
from gpt2lab.model.attend import SMALLEST_BLOCK
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.strategy import choose_strategy

FP32, INT64 = 4, 8
_WIDTH = {"bf16": 2, "fp16": 2}
"""Bytes of a number in a matrix product; FP32 in all other precisions."""


def meta_model(model: GPT2Config) -> GPT2:
    """A model without storage, for counting."""
    with torch.device("meta"):
        return GPT2.from_config(model)


@dataclass(frozen=True)
class Counts:
    """Numbers in the parts of a model.

    Attributes:
        block: in one block; `matrices`: those of them that 16-bit precision copies.
        largest: in the largest parameter of a block.
        root: outside the blocks: embeddings, final norm, head.
        head: in the matrix that makes logits.
    """

    block: int
    matrices: int
    largest: int
    root: int
    head: int


@lru_cache(maxsize=16)
def count(model: GPT2Config) -> Counts:
    """The counts of a model; all its blocks are alike."""
    one = meta_model(replace(model, num_layers=1, windows=None))
    block = {name: p.numel() for name, p in one.layers[0].named_parameters()}
    matrices = sum(n for name, n in block.items() if "_proj" in name)  # a router stays in fp32
    root = sum(p.numel() for p in one.parameters()) - sum(block.values())
    return Counts(sum(block.values()), matrices, max(block.values()), root, one.head_weight.numel())


Bytes = Counter[str]
"""Bytes by what they are for."""


class Pass:
    """The activations of one forward and backward pass.

    Args:
        config: with nothing left open.
        device: "cpu", "cuda" or "mps": a CPU has no fused attention with dropout, and its masks are numbers, not bits.
    """

    def __init__(self, config: ResolvedConfig, device: str = "cpu") -> None:
        self.model = model = config.model
        self.batch, self.time = config.micro_batch, config.seq_len
        self.rows = self.batch * self.time
        self.width = _WIDTH.get(config.system.precision, FP32)
        self.counts = count(model)
        self.dropout = model.dropout > 0
        self.mask_width = self.width if device == "cpu" else 1
        self.weights_kept = self.dropout and device == "cpu"
        self.checkpointing = config.system.activation_checkpointing
        self.across = config.data.attend_across
        windows = model.windows or (None,)
        self.windows = [windows[layer % len(windows)] for layer in range(model.num_layers)]

    def block(self, window: int | None) -> Bytes:
        """What one block leaves for its backward pass."""
        attention, weights_mask = self.attention(window)
        experts = self.model.num_experts > 1
        return Counter(
            {
                "norms": self.norm() + self.norm(routed=experts),
                "attention": attention,
                "experts" if experts else "mlp": self.mlp(),
                "dropout": weights_mask + self.dropout * 2 * self.rows * self.model.embed_dim * self.mask_width,
                "casts": self.casts(self.counts.matrices),
            }
        )

    def casts(self, numbers: int) -> int:
        """Copies of weights in 16 bits."""
        return 2 * numbers if self.width == 2 else 0

    def norm(self, *, routed: bool = False) -> int:
        """A norm's input in fp32 and its output as products read it. RMSNorm keeps what it has normalised, too."""
        output = FP32 if routed else self.width  # a router reads fp32
        return self.rows * self.model.embed_dim * (FP32 + output + (FP32 if self.model.norm == "rmsnorm" else 0))

    def mlp(self) -> int:
        """The MLP before and after its nonlinearity; experts also keep the rows they were given and gave."""
        inner = (4 if self.model.activation == "swiglu" else 2) * self.model.hidden_dim
        routed = 2 * self.model.embed_dim if self.model.num_experts > 1 else 0
        return self.rows * self.model.experts_per_token * (inner + routed) * self.width

    def attention(self, window: int | None) -> tuple[int, int]:
        """What attention leaves, and how much more its dropout does."""
        model, width, time = self.model, self.width, self.time
        embed, keys = model.embed_dim, 2 * model.kv_dim
        projected = self.rows * (embed + keys) * width
        given = self.rows * embed * width
        placed = model.qk_norm or model.position == "rope"
        kept = projected + given
        if placed:
            kept += self.rows * (embed + keys // 2) * width
        if model.qk_norm and width == 2:
            kept += self.rows * (embed + keys // 2) * FP32
        blocks = self.queries_and_keys(window)
        in_blocks = len(blocks) == 2
        scores = sum(self.batch * model.num_heads * queries * seen * chunks for queries, seen, chunks in blocks) * FP32
        if (
            self.weights_kept
        ):  # queries, keys and values of all heads are copied in fp32; weights before and after dropout
            copies = self.batch * sum(chunks * (queries + 2 * seen) for queries, seen, chunks in blocks) * embed * FP32
            return copies + given + 2 * scores + (projected if model.qk_norm else 0), scores
        kept += self.rows * model.num_heads * FP32  # logsumexp
        if placed or in_blocks:  # brought back to time before heads
            kept += given
        if in_blocks and (time - blocks[0][0]) % blocks[1][0]:  # copies that are padded to whole blocks
            size, seen, chunks = blocks[1]
            kept += self.batch * (size * chunks * embed + (size * (chunks - 1) + seen) * keys) * width
        if not self.across:  # the masks, as numbers: one for each sequence, or for each block and head
            masks = [1, model.num_heads * blocks[-1][2]]
            kept += sum(q * k * n for (q, k, _), n in zip(blocks, masks, strict=False)) * self.batch * width
        elif in_blocks or (window or time) < time:
            kept += blocks[-1][0] * blocks[-1][1] * width  # the mask, as numbers
        return kept, 0

    def queries_and_keys(self, window: int | None) -> list[tuple[int, int, int]]:
        """Queries, keys for them and how many times, as `attend` cuts a sequence."""
        time = self.time
        if window is None or time <= 2 * max(window, SMALLEST_BLOCK):
            return [(time, time, 1)]
        size = max(window // 2, SMALLEST_BLOCK)
        return [(window, window, 1), (size, window - 1 + size, -(-(time - window) // size))]

    def embedding(self) -> Bytes:
        """What the embeddings leave."""
        mask = FP32 if self.mask_width > 1 else 1
        return Counter(
            {"norms": 2 * INT64 * self.rows, "dropout": self.dropout * self.rows * self.model.embed_dim * mask}
        )

    def head(self) -> Bytes:
        """What the final norm and the head leave, besides logits."""
        return Counter({"norms": self.norm(), "casts": self.casts(self.counts.head)})

    def up_to(self, layer: int) -> Bytes:
        """What the embeddings and the blocks below a layer leave: with checkpointing, only what enters each block."""
        below, kept = self.windows[:layer], self.embedding()
        if self.checkpointing:
            kept["norms"] += len(below) * self.rows * self.model.embed_dim * FP32
            return kept
        return sum((self.block(window) for window in below), kept)

    def kept(self) -> Bytes:
        """What a whole forward pass leaves, logits apart."""
        return self.up_to(len(self.windows)) + self.head()

    def logits(self) -> int:
        """Around the loss: log-softmax, its gradient and what that is made from; or the product and its copies before."""
        vocab, padded = self.model.vocab_size or 0, self.model.padded_vocab_size
        bent = vocab * self.width if self.model.logit_softcap is not None else 0
        copy = FP32 * vocab if self.width == 2 or vocab < padded else 0
        forward = padded * self.width + copy + FP32 * vocab
        if self.checkpointing and self.width == 2:  # casts of all blocks live until the forward pass ends
            forward += self.casts(len(self.windows) * self.counts.matrices) // self.rows
        return self.rows * (bent + max(forward, 3 * FP32 * vocab))

    def head_work(self) -> int:
        """In the head's product, backward: the gradients of logits and input, and that of the weights in 16 bits."""
        rough = self.casts(self.counts.head)
        return self.rows * (self.model.padded_vocab_size * self.width + self.model.embed_dim * FP32) + rough

    def mlp_work(self) -> int:
        """In an MLP, backward: gradients of its inside and of its input, and that of a matrix in 16 bits."""
        inner = {"swiglu": 2, "relu2": 3}.get(self.model.activation, 1) * self.model.hidden_dim
        wide = self.rows * (self.model.experts_per_token * inner * self.width + self.model.embed_dim * FP32)
        return wide + self.casts(self.counts.largest)

    def attention_work(self, window: int | None) -> int:
        """In attention, backward: gradients of what it gave, of queries, keys and values, twice while they are joined."""
        model = self.model
        work = self.rows * (self.width * (model.embed_dim + 2 * (model.embed_dim + 2 * model.kv_dim)))
        if self.weights_kept:
            scores = sum(a * b * n for a, b, n in self.queries_and_keys(window)) * self.batch * model.num_heads * FP32
            work += scores
        return work + self.rows * model.embed_dim * FP32


@dataclass(frozen=True)
class Moment:
    """A high point of a step: what happens then, and the bytes a process holds, by purpose."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.parts.values())


def peak(config: ResolvedConfig, device: str = "cpu", world_size: int | None = None) -> Moment:
    """The moment of a step at which a process holds the most.

    Args:
        device: "cpu", "cuda" or "mps".
        world_size: processes. None: those that the config starts, or 1.
    """
    return max(moments(config, device, world_size), key=lambda moment: moment.total)


def activation_bytes(config: ResolvedConfig, device: str = "cpu") -> dict[str, int]:
    """What a forward pass leaves for the backward pass, by part, logits apart."""
    return dict(Pass(config, device).kept())


def moments(config: ResolvedConfig, device: str = "cpu", world_size: int | None = None) -> Iterator[Moment]:
    """The high points of a step, in their order."""
    one, model, system, layers = Pass(config, device), config.model, config.system, config.model.num_layers
    world_size = world_size or system.num_processes or 1
    strategy = choose_strategy(config.system.strategy, world_size)
    counts, numbers = one.counts, one.counts.root + layers * one.counts.block
    fsdp, ddp = strategy == "fsdp", strategy == "ddp"
    cut = (system.shard_size or world_size) if fsdp else 1
    shard = 0 if system.offload else -(-numbers // cut)
    # What FSDP gathers and reduces, a group at a time; the others have everything at hand.
    block, root = (counts.block, counts.root) if fsdp else (0, 0)
    emptied = system.exact and not fsdp  # each pass's gradients go into the integers
    accumulates = config.batch_tokens > config.micro_batch * config.seq_len * world_size and not emptied
    appears = not accumulates and (emptied or not ddp)  # one after another; a single pass of DDP writes to its buckets
    lasting = numbers * ddp + 2 * shard * system.exact  # DDP's buckets; integers are twice as wide

    def moment(name: str, activations: int, *, done: int, fresh: int = 0, gathered: int = 0, logits: int = 0) -> Moment:
        """`done`: gradients that this pass has finished; `fresh`: those that are not added or reduced yet."""
        finished = shard if accumulates else min(-(-done // cut), shard) if appears else 0
        parts = {
            "weights": FP32 * (shard + gathered),
            "gradients": FP32 * (finished + lasting + fresh),
            "optimizer": FP32 * shard * (2 if config.optim.name == "adamw" else 1),
            "activations": activations,
            "logits": logits,
        }
        return Moment(name, parts)

    kept, at_head = one.kept().total(), {"done": 0, "gathered": root + block}
    yield moment("at the loss", kept, logits=one.logits(), **at_head)
    yield moment("in the head's backward pass", kept, logits=one.head_work(), fresh=counts.head, **at_head)
    # A tied head's gradient waits for that of the embedding.
    waiting = counts.head if model.tie_head else 0
    for layer in reversed(range(layers)):
        entered = one.up_to(layer) + one.block(one.windows[layer])
        done = counts.root - counts.head + (layers - 1 - layer) * counts.block
        above = block if layer < layers - 1 else 0  # still being reduced
        at_block = {"done": done, "gathered": root + 3 * block}
        activations = entered.total() + one.mlp_work()
        fresh = waiting + above + counts.largest
        yield moment("in an MLP's backward pass", activations, fresh=fresh, **at_block)
        activations = entered.total() - entered["mlp"] - entered["experts"] + one.attention_work(one.windows[layer])
        fresh = waiting + above + block + 2 * block * system.exact
        yield moment("in attention's backward pass", activations, fresh=fresh, **at_block)
    activations = one.up_to(0).total() + one.rows * model.embed_dim * FP32
    fresh = counts.head + 2 * waiting + root + 2 * root * system.exact  # what waited, the embedding's, their sum
    fresh -= counts.head if appears and not fsdp else 0  # which is the finished one
    yield moment("in the embedding's backward pass", activations, done=numbers, fresh=fresh, gathered=root + block)
    yield moment("in the optimizer", 0, done=numbers)
