"""Where proposals for the next tokens come from: what any draft is, and what is counted of it."""

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
        probabilities: the distribution that each was drawn from, in float64; None: they were not drawn, but are certain
            proposals.
    """

    token_ids: list[int]
    probabilities: Float[Tensor, "time vocab"] | None = None


@dataclass
class Statistics:
    """What became of the proposals for all texts of an engine.

    Attributes:
        break_even: the acceptance from which proposing pays.
        steps: times that a text was asked for a proposal; each wrote one token, and those accepted.
        proposed: tokens proposed.
        tested: those that the rule came to: the accepted ones and the first of a proposal that was not.
        accepted: those that became text.
        cost: of these steps, in steps without a draft, by the costs that the lengths were chosen by.
    """

    break_even: float
    steps: int = 0
    proposed: int = 0
    tested: int = 0
    accepted: int = 0
    cost: float = 0.0

    @property
    def acceptance(self) -> float:
        """The share of the tested tokens that was accepted."""
        return self.accepted / max(1, self.tested)

    @property
    def tokens_per_step(self) -> float:
        """Tokens written with each forward pass of the model."""
        return (self.steps + self.accepted) / max(1, self.steps)

    @property
    def speed_up(self) -> float:
        """How many times faster than without a draft, if steps cost what is assumed."""
        return (self.steps + self.accepted) / self.cost if self.steps else 1.0

    def __str__(self) -> str:
        """For people."""
        if not self.proposed:
            return f"none was worth checking: it would have to be right from {self.break_even:.0%} on"
        return (
            f"{self.accepted:,} of {self.proposed:,} proposed tokens accepted, {self.tokens_per_step:.2f} tokens a step; "
            f"{self.acceptance:.0%} of those tested were right, and it pays from {self.break_even:.0%} on: "
            f"{self.speed_up:.2f} times as fast by these numbers"
        )


class Draft(Protocol):
    """What proposes the next tokens of one text."""

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        """What may follow `token_ids`, `most` tokens at most; None: nothing worth checking.

        It is asked once a step, with prompt and text, which only ever grow. What it proposes depends on nothing else, so
        that a text is the same whatever is written beside it.
        """

    def learn(self, proposed: int, accepted: int) -> None:
        """Be told how many tokens of a proposal were accepted."""


class Drafts(Protocol):
    """Makes a draft for each text."""

    statistics: Statistics

    def start(self, request: Request, sample: int) -> Draft:
        """For one text."""
