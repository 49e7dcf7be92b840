"""One loop that yields token ids; what stops it, and text, are put around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.generation.sampling import Sampler, draw, uniforms
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A continuation.

    Attributes:
        text: without the prompt.
        token_ids: its tokens, without the prompt's and without a final separator.
        finish_reason: "stop" at the end of a document, "length" where the tokens asked for or the context ended.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


def decode(
    model: GPT2, prompt_ids: Int[Tensor, " time"], num_samples: int, max_new_tokens: int, sampler: Sampler, seed: int
) -> Iterator[Int[Tensor, " batch"]]:
    """The next token of each sample, then the next, up to `max_new_tokens` or to the end of the model's positions.

    The prompt is read once; after that each step computes one token a sample, with the cache.
    """
    room = max_new_tokens if model.position_embedding is None else model.max_seq_len - len(prompt_ids) + 1
    steps = min(max_new_tokens, room)
    with torch.inference_mode():
        cache = model.new_cache(num_samples, len(prompt_ids) + steps)
        token_ids = prompt_ids.to(model.device).expand(num_samples, -1)
        for position in range(len(prompt_ids), len(prompt_ids) + steps):
            logits = model(token_ids, cache=cache)[:, -1]
            probabilities = sampler.probabilities(logits)
            chosen = draw(probabilities, uniforms(seed, range(num_samples), position).to(model.device))
            yield chosen
            token_ids = chosen[:, None]


def generate(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> list[Sample]:
    """Continue `prompt`. Sample i of a seed is the same text however many samples are asked for.

    Args:
        temperature: 0 always takes the likeliest token; 1 is the model's own distribution.
        top_k: draw from so many of the likeliest tokens only.
        top_p: draw from the likeliest tokens that hold this probability only.
        on_text: called with each new piece of the first sample's text.

    Raises:
        ConfigError: an empty prompt, or one that leaves a model with learned positions no room.
        DataError: a character the tokenizer does not know.
    """
    sampler = Sampler(temperature, top_k, top_p)
    prompt_ids = torch.from_numpy(tokenizer.encode(prompt)).long()
    check_prompt(len(prompt_ids), model.config)
    _check_counts(num_samples, max_new_tokens, seed)
    was_training = model.training
    model.eval()
    rows: list[list[int]] = [[] for _ in range(num_samples)]
    stopped = [False] * num_samples
    stream = _TextStream(tokenizer, on_text)
    for chosen in decode(model, prompt_ids, num_samples, max_new_tokens, sampler, seed):
        for index, token_id in enumerate(chosen.tolist()):
            stopped[index] = stopped[index] or token_id == tokenizer.end_of_text
            if not stopped[index]:
                rows[index].append(token_id)
        stream.show(rows[0])
        if all(stopped):
            break
    stream.show(rows[0], last=True)
    model.train(was_training)
    return [
        Sample(tokenizer.decode(row), row, "stop" if stopped[index] else "length") for index, row in enumerate(rows)
    ]


class _TextStream:
    """Text as it grows, without the half of a character that its next token will complete."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None] | None) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.shown = ""

    def show(self, token_ids: list[int], *, last: bool = False) -> None:
        if self.on_text is None:
            return
        text = self.tokenizer.decode(token_ids)
        whole = text if last else text.rstrip("\ufffd")
        if len(whole) > len(self.shown):
            self.on_text(whole[len(self.shown) :])
            self.shown = whole


def check_prompt(num_tokens: int, config: GPT2Config, where: str = "PROMPT") -> None:
    """Refuse a prompt that a model cannot go on from.

    Raises:
        ConfigError: it is empty, or longer than the positions that the model has.
    """
    if not num_tokens:
        cause = "there is no token to go on from"
        raise ConfigError("empty prompt", where=where, cause=cause, fix='give some text, such as "The"')
    if config.position == "learned" and num_tokens > config.max_seq_len:
        cause = f"it has {num_tokens} tokens; this model has learned positions for {config.max_seq_len}"
        raise ConfigError("prompt too long", where=where, cause=cause, fix=f"give at most {config.max_seq_len} tokens")


def _check_counts(num_samples: int, max_new_tokens: int, seed: int) -> None:
    bounds = (
        ("--num-samples", num_samples, 1, 1024),
        ("--max-new-tokens", max_new_tokens, 1, 2**20),
        ("--seed", seed, 0, 2**63),
    )
    for flag, value, least, most in bounds:
        if not least <= value <= most:
            cause, fix = f"{value} is not between {least} and {most}", f"{least} or more"
            raise ConfigError("out of range", where=flag, cause=cause, fix=fix)
