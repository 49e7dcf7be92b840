"""From logits to a token: what the sampler is asked for, and the draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.errors import ConfigError, NumbersError
from gpt2lab.generation.candidates import candidates, running_sum
from gpt2lab.generation.filters import Logits, Probabilities, distribution
from gpt2lab.generation.seen import Seen
from gpt2lab.seeds import derive

BANNED = -1
"""In place of a token where every one is banned."""
COLDEST = 1e-6
"""Below this temperature it is 0: the limit, which takes the first of equals."""
LARGEST = 1e30
"""Penalties and biases end here, so that no sum or product of them with a logit leaves float64."""


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    In this order: the repetition penalty, which is defined on what the model says; the other penalties and the bias, which
    are added to it, so that a bias is worth the same for every token; temperature; top-k; top-p of what top-k left; min-p.
    It is the order of transformers and vLLM, and of a bias as OpenAI defines it.

    Attributes:
        temperature: 0 always takes the likeliest; 1 is the model's own distribution; above is wilder.
        top_k: only so many of the likeliest, and all that tie with the last; None: all.
        top_p: only the likeliest that hold this probability; None: all.
        min_p: only those with this share of the likeliest's probability; None: all.
        repetition_penalty: the logit of each token in prompt or text is divided by it, or multiplied if negative
            (Keskar et al. 2019); 1: none.
        frequency_penalty: taken off a token's logit for each time it was generated; below 0 it asks for repetition.
        presence_penalty: taken off once for each token that was generated at all.
        logit_bias: token ids and what is added to their logits; -inf bans a token.

    Raises:
        ConfigError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        bounds: list[tuple[str, object, bool, str]] = [
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more, such as 0.8"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more, such as 50"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, such as 0.95"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1, such as 0.05"),
        ]
        fits = 1 / LARGEST <= self.repetition_penalty <= LARGEST
        bounds.append(("repetition_penalty", self.repetition_penalty, fits, "above 0, such as 1.2"))
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            bounds.append((name, value, abs(value) <= LARGEST, "a number, such as 0.5"))
        for pair in self.logit_bias:
            fits = pair[0] >= 0 and (pair[1] == -math.inf or abs(pair[1]) <= LARGEST)
            bounds.append(("logit_bias", pair, fits, "a token id and a number or -inf, such as 50256 -5"))
        for name, value, fits, fix in bounds:
            if not fits:
                where = f"--{name.replace('_', '-')}"
                raise ConfigError("out of range", where=where, cause=f"{value} is no {name}", fix=fix)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < COLDEST

    @property
    def likeliest(self) -> int | None:
        """How many of the largest logits decide which token comes; None: any may, or a penalty or a bias changes them."""
        if self.needs_seen or self.logit_bias:
            return None
        return 1 if self.greedy else self.top_k

    @property
    def needs_seen(self) -> bool:
        """Whether what a text has so far decides what comes next, by any penalty."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def probabilities(self, logits: Logits, seen: Sequence[Seen] | None = None) -> Probabilities:
        """The distribution the next token is drawn from, in float64; one-hot at temperature 0.

        Args:
            seen: what each row's text has so far; only needed where `needs_seen`.

        Returns:
            Rows that sum to 1, or are 0 where every token is banned.

        Raises:
            NumbersError: a logit is NaN or infinite. ConfigError: a bias for a token that the model does not have.
        """
        scores = self._scores(logits, seen)
        first, highest = likeliest(scores)
        if self.greedy:
            one = (highest > -math.inf).double()
            return one.new_zeros(scores.shape).scatter_(-1, first[:, None], one[:, None])
        if not scores.is_cpu:
            return distribution(scores, self.temperature, self.top_k, self.top_p, self.min_p)
        everything = torch.zeros(scores.shape, dtype=torch.float64)
        for row, (probabilities, token_ids) in zip(everything.numpy(), self._candidates(scores, highest), strict=True):
            row[slice(None) if token_ids is None else token_ids] = probabilities
        return everything

    def choose(
        self, logits: Logits, numbers: Float[Tensor, " batch"], seen: Sequence[Seen] | None = None
    ) -> Int[Tensor, " batch"]:
        """The token that `draw` would take from `probabilities` with the same numbers in [0, 1), in less time.

        Returns:
            Token ids; -1 where every token is banned.

        Raises:
            NumbersError: a logit is NaN or infinite. ConfigError: a bias for a token that the model does not have.
        """
        scores = self._scores(logits, seen)
        first, highest = likeliest(scores)
        if self.greedy:
            return first.masked_fill(highest == -math.inf, BANNED)
        if not scores.is_cpu:
            return draw(distribution(scores, self.temperature, self.top_k, self.top_p, self.min_p), numbers)
        chosen = []
        for number, (probabilities, token_ids) in zip(numbers.tolist(), self._candidates(scores, highest), strict=True):
            sums = running_sum(probabilities)
            place = int(sums.searchsorted(number * sums[-1], side="right")) if len(sums) else BANNED
            chosen.append(place if token_ids is None or place < 0 else int(token_ids[place]))
        return torch.tensor(chosen)

    def _candidates(
        self, scores: Logits, highest: Float[Tensor, " batch"]
    ) -> Iterator[tuple[Float[np.ndarray, " found"], Int[np.ndarray, " found"] | None]]:
        """Row by row, on a CPU, whose caches hold one."""
        for row, its_highest in zip(scores.detach().numpy(), highest.tolist(), strict=True):
            yield candidates(row, its_highest, self.temperature, self.top_k, self.top_p, self.min_p)

    def _scores(self, logits: Logits, seen: Sequence[Seen] | None) -> Logits:
        """Logits with penalties and bias, in float64 where there are any."""
        if not (self.needs_seen or self.logit_bias):
            return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        scores = logits.to(torch.float64, copy=True)
        if self.needs_seen:
            assert seen is not None
            for row, text in zip(scores, seen, strict=True):
                token_ids, times = text.tensors(scores.device)
                said = row[token_ids]
                said = torch.where(said < 0, said * self.repetition_penalty, said / self.repetition_penalty)
                said -= self.frequency_penalty * times.double() + self.presence_penalty * (times > 0).double()
                row[token_ids] = said
        if self.logit_bias:
            ids, biases = zip(*self.logit_bias, strict=True)
            if max(ids) >= scores.shape[-1]:
                cause = f"token {max(ids)}; this model has {scores.shape[-1]}"
                raise ConfigError("no such token", where="--logit-bias", cause=cause, fix="ids start at 0")
            bias = torch.tensor(biases, dtype=torch.float64, device=scores.device).expand(len(scores), -1)
            scores.index_add_(1, torch.tensor(ids, device=scores.device), bias)
        return scores


def likeliest(scores: Logits) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The first of each row's likeliest tokens, and its score.

    Raises:
        NumbersError: a score is NaN or infinite.
    """
    # On a CPU numpy takes a twentieth of the time of torch.
    first = torch.from_numpy(scores.detach().numpy().argmax(-1)) if scores.is_cpu else scores.argmax(-1)
    highest = scores.gather(-1, first[:, None]).squeeze(-1)  # of a row with NaN, that
    for row, value in enumerate(highest.tolist()):
        if value < math.inf:
            continue
        cause = f"a logit of text {row} is {value}"
        fix = "take an earlier checkpoint, or a precision in which these weights do not overflow"
        raise NumbersError("numbers went bad", where="logits", cause=cause, fix=fix)
    return first, highest


def draw(probabilities: Probabilities, uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """One token a row: where the running sum of its probabilities passes the row's uniform number in [0, 1).

    Returns:
        Token ids; -1 for a row in which every probability is 0.
    """
    sums = probabilities.cumsum(-1)
    # `right`: a token of probability 0 is never drawn. Scaled by the sum as rounded, so that a number near 1 finds a token:
    # no sum is passed by its product with a number below 1, except 0.
    tokens = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True).squeeze(-1)
    return tokens.masked_fill_(tokens == probabilities.shape[-1], BANNED)


def uniforms(seed: int, samples: range, position: int) -> Float[Tensor, " batch"]:
    """The numbers that decide the token at a position, one a sample: no sample depends on the others."""
    return torch.tensor(
        [np.random.default_rng(derive(seed, "sample", s, position)).random() for s in samples], dtype=torch.float64
    )
