"""Ways of writing that take turns: ours, as users can ask for them, and those of other programs."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch

from gpt2lab.bench.others import Heard, Write
from gpt2lab.generation import Engine, Request, Sampler
from gpt2lab.generation.drafts import Drafts
from gpt2lab.generation.ngram import NgramDrafts
from gpt2lab.generation.prepare import for_reading
from gpt2lab.model.gpt2 import GPT2

ALONE, BATCH, LONG = "one text", "a batch", "first token of a long prompt"
TEXTS = {"repetitive text": Sampler(0), "other text": Sampler(1.0)}
"""A model of any weights soon repeats itself where it takes the likeliest token, and does not where it draws from all."""
DRAFTED = ", n-gram drafts"


@dataclass(frozen=True)
class Work:
    """What every way is asked to do.

    Attributes:
        prompts: of which the first is gone on with by itself, and all of them as a batch.
        long: a prompt of which only the first token is waited for.
        count: tokens to write after each prompt.
    """

    prompts: list[list[int]]
    long: list[int]
    count: int


@dataclass
class Way:
    """One way of writing: each turn writes the same tokens again.

    Attributes:
        who: the program, and in what numbers it computes. what: which part of the work.
        write: writes the texts, and calls its argument as each token of the first one comes.
        tokens: written in a turn, over all texts.
        read_bytes: of weights for each step of one text; None: not known, or there are several.
        gaps: seconds between one token and the next, of all turns.
        firsts: seconds to the first token, a turn.
        written: what the last turn wrote.
    """

    who: str
    what: str
    write: Callable[[Heard], list[list[int]]]
    tokens: int
    read_bytes: int | None = None
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    written: list[list[int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.who}, {self.what}"

    def turn(self) -> None:
        """Write once, and note when each token came."""
        started = time.perf_counter()
        times: list[float] = []
        self.written = self.write(lambda: times.append(time.perf_counter()))
        self.firsts.append(times[0] - started)
        self.gaps += [later - earlier for earlier, later in itertools.pairwise(times)]


def our_ways(model: GPT2, work: Work, device: torch.device, dtype: torch.dtype) -> list[Way]:
    """Whole and, on a CPU, in eight bits: one text, a batch, a long prompt, and texts with drafts and without."""
    kinds = {"bf16" if dtype == torch.bfloat16 else "fp32": (for_reading(deepcopy(model).to(device, dtype)), dtype)}
    if device.type == "cpu":
        kinds["int8"] = (for_reading(model, "int8"), torch.int8)
    ways = []
    for kind, (reader, numbers) in kinds.items():
        who, first = f"gpt2lab {kind}", work.prompts[:1]
        write = partial(write_ours, reader, Sampler(0), None, work.count)
        ways.append(Way(who, ALONE, partial(write, first), work.count, read_bytes(model, numbers.itemsize)))
        ways.append(Way(who, BATCH, partial(write, work.prompts), work.count * len(work.prompts)))
        ways.append(Way(who, LONG, partial(write_ours, reader, Sampler(0), None, 1, [work.long]), 1))
        for what, sampler in TEXTS.items():
            for suffix, drafts in {"": None, DRAFTED: NgramDrafts}.items():
                text = [repetitive(first[0])] if sampler.greedy else first
                ways.append(
                    Way(who, what + suffix, partial(write_ours, reader, sampler, drafts, work.count, text), work.count)
                )
    return ways


def their_ways(who: str, write: Write, work: Work) -> list[Way]:
    """One text, and a long prompt."""

    def way(what: str, prompt: list[int], count: int) -> Way:
        return Way(who, what, lambda heard: [write(prompt, count, heard)], count)

    return [way(ALONE, work.prompts[0], work.count), way(LONG, work.long, 1)]


def repetitive(prompt: list[int]) -> list[int]:
    """The first eighth of a prompt, again and again."""
    phrase = prompt[: max(1, len(prompt) // 8)]
    return (phrase * len(prompt))[: len(prompt)]


def write_ours(
    model: GPT2,
    sampler: Sampler,
    drafts: Callable[[], Drafts] | None,
    count: int,
    prompts: list[list[int]],
    heard: Heard,
) -> list[list[int]]:
    """Go on with each prompt, in one engine."""
    engine = Engine(model, drafts=drafts() if drafts is not None else None)
    texts = [engine.submit(Request(prompt, count, sampler))[0] for prompt in prompts]
    first, told = texts[0], 0
    while engine.busy:
        engine.step()
        for _ in first.token_ids[told:]:
            heard()
        told = len(first.token_ids)
    return [text.token_ids for text in texts]


def read_bytes(model: GPT2, bytes_each: int) -> int:
    """Bytes of weights that a step of one text reads: not the embeddings that it looks up, nor experts that it does not ask."""
    config = model.config
    head = 0 if model.head is not None else model.vocab_size * config.embed_dim
    weights = {name: p.numel() for name, p in model.named_parameters() if "embedding" not in name}
    idle = 1 - config.experts_per_token / config.num_experts
    experts = sum(count for name, count in weights.items() if ".mlp." in name and "router" not in name)
    return round(bytes_each * (sum(weights.values()) + head - idle * experts))
