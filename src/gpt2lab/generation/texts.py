"""What is being written: a request, the text that grows from it, and how much of that the model has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import ConfigError
from gpt2lab.generation.drafts import Draft
from gpt2lab.generation.logprobs import log_probabilities
from gpt2lab.generation.sampling import BANNED, Sampler, uniforms
from gpt2lab.generation.seen import Seen
from gpt2lab.model.cache import Cache

PastEnd = Literal["stop", "slide"]
FinishReason = Literal["stop", "length", "banned", "cancelled"]

READ_AT_ONCE = 512
"""Tokens of a text that one forward pass reads, at the most; they end where its context has multiples of so many. What is
computed for a text then never depends on what else is read with it."""


@dataclass(frozen=True)
class Request:
    """A text to go on with.

    Attributes:
        prompt_ids: its tokens; at least one.
        max_new_tokens: tokens to write at most.
        sampler: how each is drawn.
        seed: with the number of a sample and a token's position, it decides the token.
        past_end: what happens where the positions that a model learned end: "stop", or "slide": go on from the last half
            of them, which is read again.
        end_of_text: the token that ends a text; None: none does.
        log_probabilities: how many of the likeliest tokens to tell of at each place, besides the chosen one; None: nothing.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampler: Sampler = field(default_factory=Sampler)
    seed: int = 0
    past_end: PastEnd = "stop"
    end_of_text: int | None = None
    log_probabilities: int | None = None

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens decide which is next, as the model's logits have them; None: any may."""
        return None if self.log_probabilities is not None else self.sampler.likeliest


def context_start(length: int, limit: int | None) -> int:
    """Where the context of the next token begins, after `length` tokens of which a model can see `limit` at once."""
    if limit is None or length <= limit:
        return 0
    half = max(1, limit - limit // 2)
    return -(-(length - limit) // half) * half


class Reading:
    """Token ids, and how far a model has read them.

    A model with learned positions has no place for more than `limit` tokens. The context of the next token then begins
    later: whenever it would be full, its first half is dropped, and the other half is read again from the first position.

    Attributes:
        token_ids: all of them.
        cache: of those from `start` on; None: nothing was read yet.
        start: where the context begins.
        limit: the longest context; None: any.
    """

    def __init__(self, token_ids: Sequence[int], limit: int | None) -> None:
        self.token_ids = list(token_ids)
        self.limit = limit
        self.start = context_start(len(self.token_ids), limit)
        self.cache: Cache | None = None

    @property
    def read(self) -> int:
        """Tokens of the context that the cache holds."""
        return 0 if self.cache is None else self.cache.length

    @property
    def unread(self) -> int:
        """Tokens that stand between what was read and the next one."""
        return len(self.token_ids) - self.start - self.read

    def next_part(self) -> list[int]:
        """The tokens to read next, up to where the context has a multiple of `READ_AT_ONCE`."""
        begin = self.start + self.read
        return self.token_ids[begin : begin + min(self.unread, READ_AT_ONCE - self.read % READ_AT_ONCE)]

    def slide(self) -> None:
        """Begin the context later where it is full."""
        start = context_start(len(self.token_ids), self.limit)
        if start > self.start:
            self.start, self.cache = start, None

    def forget_drafts(self) -> None:
        """Roll the cache back to what was read of the text itself, whose newest token was not; then slide."""
        assert self.cache is not None
        self.cache.truncate(len(self.token_ids) - 1 - self.start)
        self.slide()

    def fork(self) -> Reading:
        """Another text that begins with this one."""
        other = Reading(self.token_ids, self.limit)
        other.cache = None if self.cache is None else self.cache.select(torch.zeros(1, dtype=torch.long))
        return other


class Text:
    """One sample of a request, as it grows.

    Attributes:
        request: what it is written for.
        sample: which of the samples of that request's seed.
        token_ids: what was written so far, without the prompt and without the end of text.
        finish_reason: why nothing more comes: "stop" at the end of a text, "length" where the tokens asked for or the
            positions end, "banned" where no token is possible, "cancelled"; None: it goes on.
        log_probabilities: for each token the (token id, log-probability) of it and of the likeliest, if they were asked for.
        reading: prompt and text, as the model reads them; None: it has not begun, or has ended.
        draft: proposes the next tokens; None: each is computed by itself.
    """

    def __init__(self, request: Request, sample: int, draft: Draft | None = None) -> None:
        self.request, self.sample, self.draft = request, sample, draft
        self.token_ids: list[int] = []
        self.log_probabilities: list[list[tuple[int, float]]] = []
        self.finish_reason: FinishReason | None = None
        self.reading: Reading | None = None
        self.seen = Seen(request.prompt_ids)

    @property
    def position(self) -> int:
        """Of the next token, in prompt and text."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.request.max_new_tokens - len(self.token_ids)

    def number(self, ahead: int = 0) -> Float[Tensor, " one"]:
        """What decides the token `ahead` tokens after the next one, in [0, 1)."""
        return uniforms(self.request.seed, range(self.sample, self.sample + 1), self.position + ahead)

    def write(self, token_id: int, logits: Float[Tensor, " vocab"] | None) -> None:
        """Go on with a token that was chosen by its logits, or end because of it; `BANNED` stands for none.

        Args:
            logits: only needed where log-probabilities are told.
        """
        assert self.reading is not None and self.finish_reason is None
        if token_id in (BANNED, self.request.end_of_text):
            self.finish("banned" if token_id == BANNED else "stop")
            return
        if self.request.log_probabilities is not None:
            assert logits is not None
            self.log_probabilities.append(log_probabilities(logits, token_id, self.request.log_probabilities))
        self.token_ids.append(token_id)
        self.reading.token_ids.append(token_id)
        self.seen.add(token_id)
        limit = self.reading.limit
        if not self.left or (self.request.past_end == "stop" and limit is not None and self.position > limit):
            self.finish("length")

    def cut(self, count: int) -> None:
        """Keep the first `count` tokens of a text that has ended."""
        del self.token_ids[count:], self.log_probabilities[count:]

    def finish(self, reason: FinishReason) -> None:
        """Nothing more comes; what was held for it is let go."""
        self.finish_reason, self.reading, self.draft = reason, None, None


def check_prompt(num_tokens: int, config: GPT2Config, where: str = "PROMPT", past_end: PastEnd = "stop") -> None:
    """Refuse a prompt that a model cannot go on from.

    Raises:
        ConfigError: it is empty, or longer than the positions that the model has, and must not slide.
    """
    if not num_tokens:
        cause = "there is no token to go on from"
        raise ConfigError("empty prompt", where=where, cause=cause, fix='give some text, such as "The"')
    if config.position == "learned" and past_end == "stop" and num_tokens > config.max_seq_len:
        cause = f"it has {num_tokens} tokens; this model has learned positions for {config.max_seq_len}"
        raise ConfigError("prompt too long", where=where, cause=cause, fix=f"give at most {config.max_seq_len} tokens")
