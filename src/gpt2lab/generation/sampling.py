"""From logits to a token: filters are pure functions, chained once into a sampler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.errors import ConfigError
from gpt2lab.seeds import derive

BANNED = -1
Logits = Float[Tensor, "batch vocab"]
Probabilities = Float[Tensor, "batch vocab"]


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Only the `k` likeliest tokens (all that tie with the last of them) stay possible."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(probabilities: Probabilities, p: float) -> Probabilities:
    """Only the likeliest tokens stay possible: the fewest that hold probability `p` together (Holtzman et al. 2020)."""
    ordered, order = probabilities.sort(descending=True, stable=True)
    needed = ordered.cumsum(-1) - ordered < p  # what came before it does not hold p yet
    kept = torch.zeros_like(needed).scatter(-1, order, needed)
    filtered = probabilities.masked_fill(~kept, 0.0)
    return filtered / filtered.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn.

    Attributes:
        temperature: 0 always takes the likeliest; 1 is the model's own distribution; above is wilder.
        top_k: only so many of the likeliest; None: all.
        top_p: only the likeliest that hold this probability; None: all.

    Raises:
        ConfigError: a number outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        bounds = [
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "0 or more, such as 0.8"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more, such as 50"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, such as 0.95"),
        ]
        for name, value, fits, fix in bounds:
            if not fits:
                where = f"--{name.replace('_', '-')}"
                raise ConfigError("out of range", where=where, cause=f"{value} is no {name}", fix=fix)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def needs_seen(self) -> bool:
        return False

    def choose(self, logits: Logits, numbers, seen=None):
        if self.greedy:
            return logits.argmax(-1)
        return draw(self.probabilities(logits), numbers)

    def probabilities(self, logits: Logits, seen=None) -> Probabilities:
        """The distribution the next token is drawn from, in float64; one-hot at temperature 0."""
        logits = logits.double()
        if self.temperature < 1e-6:  # colder than float64 can divide by: the limit, which takes the first of equals
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        probabilities = logits.softmax(-1)
        return probabilities if self.top_p is None else keep_top_p(probabilities, self.top_p)


def draw(probabilities: Probabilities, uniforms: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """One token a row: where the running sum of its probabilities passes the row's uniform number in [0, 1)."""
    sums = probabilities.cumsum(-1)
    # `right`: a token of probability 0 is never drawn. Scaled by the sum as rounded, so that a number near 1 finds a token.
    tokens = torch.searchsorted(sums, (uniforms[:, None] * sums[:, -1:]), right=True).squeeze(-1)
    return tokens.clamp(max=probabilities.shape[-1] - 1)


def uniforms(seed: int, samples: range, position: int) -> Float[Tensor, " batch"]:
    """The numbers that decide the token at a position, one a sample: no sample depends on the others."""
    return torch.tensor(
        [np.random.default_rng(derive(seed, "sample", s, position)).random() for s in samples], dtype=torch.float64
    )


def log_probabilities(logits, chosen, top):
    return []
