"""The texts of an engine that a GPU writes in static steps, several tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gpt2lab.errors import NumbersError
from gpt2lab.generation.graph import NOT_FINITE, Step
from gpt2lab.generation.texts import Reading, Text
from gpt2lab.model.gpt2 import GPT2

MOST = 64
"""Slots, at the most."""
AHEAD = 16
"""Tokens of each text that are asked for before anybody looks at them. What follows a text's end is dropped."""


@dataclass(frozen=True)
class Seat:
    """Where a text is.

    Attributes:
        reading: the text's; `start` is where its context began when it came.
        end: the last position of the context that can be read, or need be.
    """

    text: Text
    reading: Reading
    start: int
    end: int

    @property
    def read(self) -> int:
        """Tokens of the context that were read: all but the newest."""
        return len(self.reading.token_ids) - 1 - self.start

    @property
    def left(self) -> int:
        """Tokens that still can be written here."""
        return self.end - self.read + 1

    @property
    def is_over(self) -> bool:
        """Whether the text has ended, or its context begins later now, and is read again."""
        return self.text.finish_reason is not None or self.reading.start > self.start


class InSlots:
    """Texts in slots. One comes once its prompt is read, if nothing but its logits decides how it goes on.

    Args:
        model: in eval mode.
        compiled: see `Step`.
    """

    def __init__(self, model: GPT2, *, compiled: bool = False) -> None:
        self.step = Step(model, compiled=compiled)
        self.seats: list[Seat | None] = []

    def __contains__(self, text: Text) -> bool:
        return any(seat is not None and seat.text is text for seat in self.seats)

    @property
    def held_bytes(self) -> int:
        """Memory of the slots that are taken."""
        return self.step.slots.nbytes * sum(seat is not None for seat in self.seats) // self.step.slots.count

    def write(self, texts: Sequence[Text], most: int = AHEAD) -> list[Text]:
        """Take in those of `texts` that can come, and let all that are here grow by up to `most` tokens each.

        Returns:
            The texts that are here, or have been until now.

        Raises:
            NumbersError: a logit is NaN or infinite.
        """
        for text in texts:
            if text not in self and may_come(text) and (None in self.seats or len(self.seats) < MOST):
                self._take(text)
        taken = [(slot, seat) for slot, seat in enumerate(self.seats) if seat is not None]
        if not taken:
            return []
        steps = min(most, max(seat.left for _, seat in taken))
        numbers = torch.zeros(steps, len(self.seats), dtype=torch.float64)
        for slot, seat in taken:
            if not seat.text.request.sampler.greedy:
                numbers[:, slot] = torch.cat([seat.text.number(ahead) for ahead in range(steps)])
        samplers = [seat.text.request.sampler if seat is not None else None for seat in self.seats]
        longest = max(seat.read + min(steps, seat.left) for _, seat in taken)
        chosen = self.step.run(samplers, numbers, longest).T.tolist()  # the only wait
        for slot, seat in taken:
            for token_id in chosen[slot][: seat.left]:
                if token_id == NOT_FINITE:
                    cause = f"a logit after {seat.text.position} tokens is NaN or infinite"
                    fix = "take an earlier checkpoint, or a precision in which these weights do not overflow"
                    raise NumbersError("numbers went bad", where="logits", cause=cause, fix=fix)
                if seat.text.finish_reason is None:
                    seat.text.write(token_id, None)
            seat.reading.slide()
        return [seat.text for _, seat in taken]

    @torch.inference_mode()  # in which the slots were made: a text can be cancelled between steps
    def tidy(self) -> None:
        """Empty the slots of texts that have ended, or whose context is to be read again."""
        for slot, seat in enumerate(self.seats):
            if seat is not None and seat.is_over:
                self.step.slots.free(slot)
                self.seats[slot] = None
        while self.seats and self.seats[-1] is None:
            self.seats.pop()

    def _take(self, text: Text) -> None:
        """Let a text come: the first empty slot takes over its cache."""
        reading = text.reading
        assert reading is not None and reading.cache is not None
        end = reading.read + text.left - 1
        if reading.limit is not None:
            end = min(end, reading.limit - 1)
        if None not in self.seats:
            self.seats.append(None)
        slot = self.seats.index(None)
        self.step.reserve(len(self.seats), reading.read + 1)
        self.step.slots.put(slot, reading.cache, end)
        self.step.token_ids[slot] = reading.token_ids[-1]
        self.seats[slot] = Seat(text, reading, reading.start, end)
        reading.cache = None


def suits(model: GPT2) -> bool:
    """Whether steps can be captured: the model lies on a GPU, not in shards, and nothing changes its precision on the way."""
    weight = model.token_embedding.weight
    return weight.is_cuda and type(weight) is nn.Parameter and not torch.is_autocast_enabled("cuda")


def may_come(text: Text) -> bool:
    """Whether all but the newest token is read, and its logits alone decide the next one."""
    reading, sampler = text.reading, text.request.sampler
    asks = text.draft is not None or text.request.log_probabilities is not None
    return (
        not (asks or sampler.needs_seen or sampler.logit_bias)
        and reading is not None
        and reading.cache is not None
        and reading.unread == 1
    )
