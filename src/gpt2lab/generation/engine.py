"""The one loop that writes: any number of texts at once, each as if it were alone (continuous batching, Yu et al. 2022, Orca).

Every step is one forward pass over whatever is to be read: the newest token of each text, the drafts that are to be
checked, and a part of a prompt. Texts come and go between steps. They stand side by side in one row, each with a cache of
its own, so that nothing is padded and none waits for the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2lab.generation.drafts import Drafts, Proposal
from gpt2lab.generation.inslots import AHEAD, InSlots, suits
from gpt2lab.generation.sampling import Sampler
from gpt2lab.generation.speculative import check
from gpt2lab.generation.texts import READ_AT_ONCE, Reading, Request, Text, check_prompt
from gpt2lab.model.cache import ONE_BY_ONE, Cache, SideBySide
from gpt2lab.model.gpt2 import GPT2

SMALLEST_CACHE = 256
"""Tokens that a text's cache has room for, at the least; it doubles when they are used up."""
LONGEST_DRAFT = ONE_BY_ONE - 1
"""Tokens proposed at once, at the most."""


@dataclass(frozen=True)
class Part:
    """What one forward pass reads of a text.

    Attributes:
        text_ids: tokens that are certain; the proposal's follow them.
        likeliest: as `Request.likeliest` of the text.
    """

    reading: Reading
    text_ids: Sequence[int]
    likeliest: int | None
    proposal: Proposal | None = None

    @property
    def drafted(self) -> int:
        """Tokens that are only proposed."""
        return 0 if self.proposal is None else len(self.proposal.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """All that is read."""
        return [*self.text_ids, *(self.proposal.token_ids if self.proposal is not None else ())]


@dataclass
class Prompt:
    """A prompt that several texts begin with: it is read once.

    Attributes:
        texts: those that have not begun.
        logits: for the first token, once all is read; (1, vocab).
    """

    reading: Reading
    texts: deque[Text]
    logits: Float[Tensor, "1 vocab"] | None = None


class Engine:
    """Writes texts.

    Args:
        model: in eval mode.
        max_texts: texts written at once; others wait for their turn.
        cache_dtype: what keys and values are kept in; None: the type of the weights; int8: with scales.
        drafts: makes what proposes tokens for each text; None: nothing does.
        static: whether texts without drafts and penalties are written in static steps; None: where the model `suits`.
    """

    def __init__(
        self,
        model: GPT2,
        *,
        max_texts: int = 64,
        cache_dtype: torch.dtype | None = None,
        drafts: Drafts | None = None,
        static: bool | None = None,
    ) -> None:
        self.model, self.max_texts, self.cache_dtype, self.drafts = model, max_texts, cache_dtype, drafts
        self.prompts: deque[Prompt] = deque()
        self.running: list[Text] = []
        static = suits(model) if static is None else static
        self.in_slots = InSlots(model) if static and cache_dtype is None else None

    def submit(self, request: Request, num_samples: int = 1) -> list[Text]:
        """Have a prompt gone on with so many times; the texts grow with each `step`."""
        drafts = [self.drafts.start(request, i) if self.drafts is not None else None for i in range(num_samples)]
        texts = [Text(request, sample, draft) for sample, draft in enumerate(drafts)]
        check_prompt(len(request.prompt_ids), self.model.config, past_end=request.past_end)
        limit = self.model.max_seq_len if self.model.position_embedding is not None else None
        self.prompts.append(Prompt(Reading(request.prompt_ids, limit), deque(texts)))
        return texts

    def cancel(self, text: Text) -> None:
        """Stop a text, wherever it is; nothing that was held for it stays."""
        if text.finish_reason is None:
            text.finish("cancelled")
            self._tidy()

    @property
    def busy(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.running or self.prompts)

    @property
    def held_bytes(self) -> int:
        """Memory of all caches."""
        readings = [text.reading for text in self.running] + [prompt.reading for prompt in self.prompts]
        held = sum(reading.cache.nbytes for reading in readings if reading is not None and reading.cache is not None)
        return held + (self.in_slots.held_bytes if self.in_slots is not None else 0)

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """One forward pass; returns the texts that have grown or ended."""
        told: list[Text] = []
        by_parts = self.running
        if self.in_slots is not None:
            waited_for = self.prompts and len(self.running) < self.max_texts
            told += self.in_slots.write(self.running, 1 if waited_for else AHEAD)
            by_parts = [text for text in self.running if text not in told]
        parts = [self._next_part(text) for text in by_parts]
        room = READ_AT_ONCE  # for prompts: running texts do not wait for them, nor they for those
        reading = [prompt for prompt in self.prompts if prompt.logits is None]
        reading = reading[: max(0, self.max_texts - len(self.running))]
        for prompt in reading:
            part = Part(prompt.reading, prompt.reading.next_part(), prompt.texts[0].request.likeliest)
            if len(part.token_ids) > room:
                break
            parts.append(part)
            room -= len(part.token_ids)
        if parts:
            logits = self._read(parts)
            running = list(zip(by_parts, parts, logits, strict=False))
            told += self._write([(text, rows, part.proposal) for text, part, rows in running if rows is not None])
            for prompt, rows in zip(reading, logits[len(running) :], strict=False):
                prompt.logits = rows
        told += self._begin()
        self._tidy()
        return told

    def _next_part(self, text: Text) -> Part:
        """What is read of a running text: its newest token and a draft, or more where its context has begun later."""
        reading = _reading(text)
        token_ids = reading.next_part()
        if text.draft is None or reading.unread > 1:
            return Part(reading, token_ids, text.request.likeliest)
        room = min(LONGEST_DRAFT, text.left - 1)
        if reading.limit is not None:
            room = min(room, reading.limit - reading.read - len(token_ids))
        proposal = text.draft.propose(reading.token_ids, room) if room > 0 else None
        return Part(reading, token_ids, text.request.likeliest, proposal)

    def _read(self, parts: Sequence[Part]) -> list[Float[Tensor, "_ vocab"] | None]:
        """Let the model read; give what follows the newest token of each text and each token of its draft, or None where more
        is to be read first."""
        caches = [self._cache(part.reading, len(part.token_ids)) for part in parts]
        counts = [len(part.token_ids) for part in parts]
        finished = [part.reading.unread == len(part.token_ids) - part.drafted for part in parts]
        token_ids = [token_id for part in parts for token_id in part.token_ids]
        tells = [part.drafted + 1 if all_read else 0 for part, all_read in zip(parts, finished, strict=True)]
        places = [end - tell + i for end, tell in zip(accumulate(counts), tells, strict=True) for i in range(tell)]
        wanted = torch.tensor(places or [0], device=self.model.device)
        cache = caches[0] if len(caches) == 1 else SideBySide(caches, counts)
        most = [part.likeliest for part in parts if part.likeliest is not None]
        likeliest = max(most) if len(most) == len(parts) else None
        read = torch.tensor([token_ids], device=self.model.device)
        logits = self.model(read, cache=cache, wanted=wanted, likeliest=likeliest)[0]
        split = logits[: len(places)].split(tells)
        return [rows if len(rows) else None for rows in split]

    def _cache(self, reading: Reading, count: int) -> Cache:
        """The cache of a text, with room for so many tokens more."""
        needed = reading.read + count
        if reading.cache is None:
            reading.cache = self.model.new_cache(1, SMALLEST_CACHE, self.cache_dtype)
        while reading.cache.capacity < needed:
            reading.cache.reserve(2 * reading.cache.capacity)
        return reading.cache

    def _write(self, news: Sequence[tuple[Text, Float[Tensor, "_ vocab"], Proposal | None]]) -> list[Text]:
        """Choose what each text goes on with."""
        singly = [(text, rows) for text, rows, proposal in news if proposal is None]
        chosen = dict(zip((text for text, _ in singly), choose_each(singly), strict=True))
        for text, rows, proposal in news:
            token_ids = check(text, rows, proposal) if proposal is not None else [chosen[text]]
            if proposal is not None and text.draft is not None:
                text.draft.learn(len(proposal.token_ids), len(token_ids) - 1)
            for token_id, row in zip(token_ids, rows, strict=False):
                if text.finish_reason is None:
                    text.write(token_id, row)
            if text.finish_reason is None:
                _reading(text).forget_drafts()
        return [text for text, *_ in news]

    def _begin(self) -> list[Text]:
        """Let texts whose prompt is read start, while there is room."""
        begun: list[tuple[Text, Float[Tensor, "1 vocab"], None]] = []
        for prompt in self.prompts:
            while prompt.logits is not None and prompt.texts and len(self.running) < self.max_texts:
                text = prompt.texts.popleft()
                if text.finish_reason is None:
                    text.reading = prompt.reading.fork() if prompt.texts else prompt.reading
                    self.running.append(text)
                    begun.append((text, prompt.logits, None))
        return self._write(begun)

    def _tidy(self) -> None:
        """Let go of what has ended."""
        if self.in_slots is not None:
            self.in_slots.tidy()
        self.running = [text for text in self.running if text.finish_reason is None]
        for prompt in self.prompts:
            prompt.texts = deque(text for text in prompt.texts if text.finish_reason is None)
        self.prompts = deque(prompt for prompt in self.prompts if prompt.texts)


def _reading(text: Text) -> Reading:
    """Of a text that is being written."""
    assert text.reading is not None
    return text.reading


def choose_each(texts: Sequence[tuple[Text, Float[Tensor, "1 vocab"]]]) -> list[int]:
    """The next token of each text; those that are drawn alike are drawn together."""
    groups: dict[Sampler, list[int]] = {}
    for index, (text, _) in enumerate(texts):
        groups.setdefault(text.request.sampler, []).append(index)
    chosen = [0] * len(texts)
    for sampler, members in groups.items():
        rows = torch.cat([texts[index][1] for index in members])
        drawn = [texts[index][0].number() for index in members] if not sampler.greedy else [torch.zeros(len(members))]
        seen = [texts[index][0].seen for index in members] if sampler.needs_seen else None
        for index, token_id in zip(
            members, sampler.choose(rows, torch.cat(drawn).to(rows.device), seen).tolist(), strict=True
        ):
            chosen[index] = token_id
    return chosen
