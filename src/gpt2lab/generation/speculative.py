"""The rule by which drafts are accepted, so that they change nothing but the speed.

Speculative decoding (Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). Temperature 0 is the
one-hot distribution here: the rule for drawn text is also that for greedy text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gpt2lab.generation.drafts import Proposal
from gpt2lab.generation.sampling import draw
from gpt2lab.seeds import derive

if TYPE_CHECKING:
    from gpt2lab.generation.texts import Text

Distribution = Float[Tensor, " vocab"]


def check(text: Text, logits: Float[Tensor, "place vocab"], proposal: Proposal) -> list[int]:
    """The tokens of the proposal that are accepted, and one more; or up to the end of the text.

    A proposal that was not drawn is one-hot at its token x: x would be accepted with probability p(x), and any other token y
    drawn with p(y). Drawing from p with the number that decides this place anyway, and accepting x where x comes, is just
    that, and writes for each seed the very text that is written without drafts.

    Args:
        text: what the proposal goes on from.
        logits: for the token after the text's newest, and after each token of the proposal.
    """
    sampler, drafted = text.request.sampler, proposal.token_ids
    token_ids: list[int] = []
    for ahead, row in enumerate(logits.split(1)):
        seen = [text.seen.extended(drafted[:ahead])] if sampler.needs_seen else None
        number = text.number(ahead).to(row.device)
        if proposal.probabilities is None or ahead == len(drafted):
            token_ids.append(int(sampler.choose(row, number, seen)))
        else:
            p, q = sampler.probabilities(row, seen)[0], proposal.probabilities[ahead]
            luck = uniform(text.request.seed, "accept", text.sample, text.position + ahead)
            token_ids.append(accept_or_redraw(p, q.to(p.device), drafted[ahead], luck.to(p.device), number))
        if token_ids[-1] == text.request.end_of_text or token_ids != drafted[: ahead + 1]:
            break
    return token_ids


def accept_or_redraw(
    p: Distribution, q: Distribution, drafted: int, luck: Float[Tensor, " one"], number: Float[Tensor, " one"]
) -> int:
    """A token with distribution `p`, made from one with distribution `q`.

    The drafted token is accepted with probability ``min(1, p / q)``; else one is drawn from ``max(p - q, 0)``, normalised.

    Args:
        p: the model's, in float64; 0 where every token is banned.
        q: the draft's, in float64.
        drafted: was drawn from `q`.
        luck: decides whether it is accepted, in [0, 1).
        number: decides what is drawn in its place, in [0, 1).
    """
    if luck * q[drafted] < p[drafted]:
        return drafted
    rest = (p - q).clamp(min=0)
    return int(
        draw((rest if rest.any() else p)[None], number)
    )  # no rest: they differ by rounding, or nothing is possible


def uniform(seed: int, purpose: str, sample: int, position: int) -> Float[Tensor, " one"]:
    """The number in [0, 1) that decides something about the token of a sample at a position."""
    number = np.random.default_rng(derive(seed, purpose, sample, position)).random()
    return torch.tensor([number], dtype=torch.float64)
