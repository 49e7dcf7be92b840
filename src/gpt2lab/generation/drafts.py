"""Where proposals for the next tokens come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from gpt2lab.generation.texts import Request


@dataclass(frozen=True)
class Proposal:
    """Tokens that may come next.

    Attributes:
        token_ids: at least one.
        probabilities: the distribution that each was drawn from; None: they were not drawn, but are certain proposals.
    """

    token_ids: list[int]
    probabilities: Float[Tensor, "time vocab"] | None = None


class Draft(Protocol):
    """What proposes the next tokens of one text."""

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        """What may follow `token_ids`, `most` tokens at most; None: nothing worth checking."""

    def learn(self, proposed: int, accepted: int) -> None:
        """Be told what became of a proposal."""


class Drafts(Protocol):
    """Makes a draft for each text."""

    def start(self, request: Request, sample: int) -> Draft:
        """For one text."""
