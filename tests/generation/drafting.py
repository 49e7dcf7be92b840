"""Drafts for tests: every kind of the package, and some that nobody would want."""

import random
from collections.abc import Callable, Sequence

from gpt2lab.generation import Engine, Request
from gpt2lab.generation.draft_length import Costs
from gpt2lab.generation.drafts import Draft, Drafts, Proposal, Statistics
from gpt2lab.generation.model_draft import EarlyExitDrafts, ModelDrafts
from gpt2lab.generation.ngram import NgramDrafts
from gpt2lab.model.gpt2 import GPT2

FREE = Costs(checking=0.0, checking_each=0.0)
"""With these everything pays, so as much is proposed as may be."""
CHEAP = Costs(checking=0.0, checking_each=0.01)
"""With these nearly everything pays, but what is never right becomes short."""


class Guess:
    """Proposes what a function of prompt and text says, without probabilities.

    Attributes:
        outcomes: tokens proposed and accepted, time after time.
    """

    def __init__(self, guess: Callable[[Sequence[int], int], list[int]]) -> None:
        self.guess = guess
        self.outcomes: list[tuple[int, int]] = []

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        guessed = self.guess(token_ids, most)
        return Proposal(guessed) if guessed else None

    def learn(self, proposed: int, accepted: int) -> None:
        self.outcomes.append((proposed, accepted))


def nothing() -> Guess:
    return Guess(lambda token_ids, most: [])


def at_random(vocab_size: int, seed: int = 0) -> Guess:
    chance = random.Random(seed)
    return Guess(lambda token_ids, most: [chance.randrange(vocab_size) for _ in range(chance.randint(0, most))])


def right(prompt_ids: Sequence[int], text: Sequence[int]) -> Guess:
    """What will be written."""
    whole = [*prompt_ids, *text]
    return Guess(lambda token_ids, most: whole[len(token_ids) : len(token_ids) + most])


def half_right(prompt_ids: Sequence[int], text: Sequence[int], vocab_size: int, seed: int = 0) -> Guess:
    """Right for a while, then wrong, so that caches are rolled back by every number of tokens."""
    chance, whole = random.Random(seed), [*prompt_ids, *text]

    def guess(token_ids: Sequence[int], most: int) -> list[int]:
        good = whole[len(token_ids) : len(token_ids) + most]
        kept = chance.randint(0, len(good))
        return good[:kept] + [(token + 1) % vocab_size for token in good[kept:]]

    return Guess(guess)


class Each:
    """A draft of its own for each sample of a request."""

    def __init__(self, *starts: Callable[[Request, int], Draft]) -> None:
        self.starts, self.statistics = starts, Statistics(0.0)
        self.drafts: list[Draft] = []

    def start(self, request: Request, sample: int) -> Draft:
        self.drafts.append(self.starts[sample](request, sample))
        return self.drafts[-1]

    @property
    def outcomes(self) -> list[list[tuple[int, int]]]:
        """Of the guesses."""
        return [draft.outcomes for draft in self.drafts if isinstance(draft, Guess)]


def certain_kinds(model: GPT2, texts: Sequence[Sequence[int]]) -> Each:
    """For five samples: every kind of draft that proposes without probabilities."""
    vocab_size = model.vocab_size
    return Each(
        lambda request, sample: nothing(),
        lambda request, sample: at_random(vocab_size),
        lambda request, sample: right(request.prompt_ids, texts[sample]),
        lambda request, sample: half_right(request.prompt_ids, texts[sample], vocab_size),
        NgramDrafts(FREE).start,
    )


def all_kinds(model: GPT2, other: GPT2, text: Sequence[int]) -> Each:
    """For seven samples that are one greedy text: every kind of draft."""
    models = EarlyExitDrafts(model, 1, CHEAP), ModelDrafts(other, model, CHEAP)
    return Each(*certain_kinds(model, [text] * 5).starts, *(drafts.start for drafts in models))


def write(model: GPT2, request: Request, samples: int = 1, drafts: Drafts | None = None) -> list[list[int]]:
    """The samples of a request, written side by side by an engine in which nothing stays."""
    engine = Engine(model, drafts=drafts)
    texts = engine.submit(request, samples)
    while engine.busy:
        engine.step()
    assert not engine.held_bytes and all(text.draft is None for text in texts)
    return [text.token_ids for text in texts]
