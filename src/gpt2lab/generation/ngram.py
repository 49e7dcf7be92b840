"""Prompt lookup: what a text said before after the same few tokens, it may say again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2lab.generation.draft_length import Costs, DraftLength
from gpt2lab.generation.drafts import Proposal, Statistics

if TYPE_CHECKING:
    from gpt2lab.generation.texts import Request

SIZES = (4, 3, 2)
"""Tokens that must agree; the longest that were there before decide."""
MEMORY = 0.8
"""What a test weighs after the next one: about five tests count, since a text begins and ends to repeat all at once."""


class NgramDraft:
    """Proposes what followed the last few tokens when they stood there before (prompt lookup, Saxena 2023).

    What follows each n-gram is in a table, to which a token adds a fixed number of entries: nothing is searched.

    Every token of prompt and text, proposed or not, is compared with what the table would have foretold. So it is known
    without cost how often a proposal would be accepted, and nothing is proposed before that pays.
    """

    def __init__(self, length: DraftLength) -> None:
        self.length = length
        self.next_place: dict[tuple[int, ...], int] = {}
        self.known = 0

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        """As in `Draft`."""
        for new in range(self.known, len(token_ids)):
            self._add(token_ids, new)
        self.known = len(token_ids)
        count = min(most, self.length.best)
        place = self._find(token_ids, len(token_ids)) if count > 0 else None
        proposal = None
        if place is not None:  # what is found may reach up to the end: then it goes round
            period = len(token_ids) - place
            proposal = Proposal([token_ids[place + i % period] for i in range(count)])
        self.length.count_step(count if proposal else 0)
        return proposal

    def learn(self, proposed: int, accepted: int) -> None:
        """As in `Draft`; the tokens themselves tell the rest when they are there."""
        self.length.count_tested(proposed, accepted)

    def _find(self, token_ids: Sequence[int], end: int) -> int | None:
        """Where the text went on after the tokens before `end` stood there last."""
        grams = (tuple(token_ids[end - size : end]) for size in SIZES if size <= end)
        return next((self.next_place[gram] for gram in grams if gram in self.next_place), None)

    def _add(self, token_ids: Sequence[int], place: int) -> None:
        """Compare a token with what was foretold, then remember that it follows those before it."""
        foretold = self._find(token_ids, place)
        if foretold is not None:
            self.length.learn(1, int(token_ids[foretold] == token_ids[place]))
        for size in SIZES:
            if size <= place:
                self.next_place[tuple(token_ids[place - size : place])] = place


class NgramDrafts:
    """Prompt lookup for each text.

    Args:
        costs: what steps cost; a proposal itself costs nothing.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs or Costs()
        self.statistics = Statistics(self.costs.break_even)

    def start(self, request: Request, sample: int) -> NgramDraft:
        """As in `Drafts`."""
        return NgramDraft(DraftLength(self.costs, self.statistics, acceptance=0.0, memory=MEMORY))
