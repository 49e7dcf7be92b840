"""How many tokens to propose: as many as pay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from gpt2lab.generation.drafts import Statistics

LONGEST = 15
"""Tokens in a proposal, at the most."""
MEMORY = 0.95
"""What a test weighs after the next one, for a model's proposals: about twenty tests count."""
FIRST_WEIGHT = 2.0
"""Tests that the first guess counts for."""
FIRST_PAUSE, LONGEST_PAUSE = 32, 512
"""Steps without a proposal after it did not pay; they double each time."""
DEAREST = 0.9
"""The highest break-even that is worth a try: a draft that must be right more often than that costs more to test than it
can ever save."""


@dataclass(frozen=True)
class Costs:
    """What a step with a proposal costs beyond one without, in steps without.

    The figures for checking are those of 124M parameters on two CPU cores, where reading 2 tokens costs 1.07 times one, 5 cost
    1.27 and 16 cost 2.1 in fp32, and 1.1, 1.37 and 2.4 in eight bits.

    Attributes:
        checking: to read more than one token at once.
        checking_each: to read each token of the proposal.
        proposing_each: to make each.
    """

    checking: float = 0.0
    checking_each: float = 0.08
    proposing_each: float = 0.0

    def step(self, proposed: int) -> float:
        """Of a step with so many tokens proposed."""
        return 1 + self.checking + proposed * (self.checking_each + self.proposing_each) if proposed else 1.0

    def best(self, acceptance: float) -> int:
        """The length that writes most tokens for its cost, if each token is accepted as often; 0: none pays."""
        return best_lengths(self)[round(100 * acceptance)]

    @property
    def break_even(self) -> float:
        """The acceptance from which any length pays, to a hundredth; above 1 if none ever does."""
        return next((hundredth / 100 for hundredth, best in enumerate(best_lengths(self)) if best), 1.01)


@cache
def best_lengths(costs: Costs) -> list[int]:
    """For each hundredth of acceptance, from 0 to 1, the length that pays most.

    Of k tokens proposed, ``a + a**2 + ... + a**k`` are accepted (Leviathan et al. 2023, equation 1).
    """
    lengths = []
    for acceptance in (hundredth / 100 for hundredth in range(101)):
        written = accumulate(acceptance**count for count in range(LONGEST + 1))
        gains = [tokens / costs.step(length) for length, tokens in enumerate(written)]
        lengths.append(gains.index(max(gains)))
    return lengths


class DraftLength:
    """The length of a text's next proposal, by how often its tokens were accepted of late.

    The acceptance is a mean in which what is long ago fades. Where tokens are refused, proposals shorten and stop.

    Args:
        costs: what steps cost.
        statistics: where everything is counted.
        acceptance: the first guess; None: so much above break-even that two or three failures of a dear draft, or ten of a
            cheap one, turn it off: about the cost of one step.
        memory: what a test weighs after the next one.
    """

    def __init__(
        self, costs: Costs, statistics: Statistics, acceptance: float | None = None, memory: float = MEMORY
    ) -> None:
        self.costs, self.statistics, self.memory = costs, statistics, memory
        self.guess = (1 + statistics.break_even) / 2 if acceptance is None else acceptance
        self.pause, self.paused = FIRST_PAUSE, 0
        self._begin()

    def _begin(self) -> None:
        self.hits, self.tests = FIRST_WEIGHT * self.guess, FIRST_WEIGHT

    @property
    def best(self) -> int:
        """The length that pays most, as things stand."""
        return self.costs.best(self.hits / self.tests) if self.statistics.break_even <= DEAREST else 0

    def best_or_again(self) -> int:
        """The same, for a step of the model; where no length pays, begin anew after a while, from the first guess."""
        if not self.best:
            self.paused += 1
            if self.paused > self.pause:
                self.pause, self.paused = min(2 * self.pause, LONGEST_PAUSE), 0
                self._begin()
        return self.best

    def learn(self, tested: int, accepted: int) -> None:
        """So many tokens were accepted of those that were put to the test."""
        fading = self.memory**tested
        self.hits, self.tests = self.hits * fading + accepted, self.tests * fading + tested

    def count_step(self, proposed: int) -> None:
        """A step begins, with a proposal or none."""
        self.statistics.steps += 1
        self.statistics.proposed += proposed
        self.statistics.cost += self.costs.step(proposed)

    def count_tested(self, proposed: int, accepted: int) -> int:
        """A step has ended; give how many of the proposal's tokens were put to the test."""
        tested = min(proposed, accepted + 1)
        self.statistics.tested += tested
        self.statistics.accepted += accepted
        return tested
