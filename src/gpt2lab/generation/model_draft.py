"""A smaller model that proposes: another one, or the first layers of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gpt2lab.errors import ConfigError
from gpt2lab.generation.draft_length import Costs, DraftLength
from gpt2lab.generation.drafts import Proposal, Statistics
from gpt2lab.generation.sampling import BANNED, draw
from gpt2lab.generation.seen import Seen
from gpt2lab.generation.speculative import uniform
from gpt2lab.generation.texts import Reading, Request
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import ReadingGPT2
from gpt2lab.plan import flops_per_token

SMALLEST_CACHE = 256
"""Tokens that a draft's cache has room for, at the least; it doubles when they are used up."""


class ModelDraft:
    """Draws from a smaller model, as the request says; at temperature 0, takes the likeliest.

    It has a cache of its own, rolled back to what became text. What was accepted is not read again.
    """

    def __init__(self, model: GPT2, request: Request, sample: int, length: DraftLength) -> None:
        self.model, self.request, self.sample, self.length = model, request, sample, length
        self.reading = Reading(request.prompt_ids, None)
        self.text_length = len(request.prompt_ids)
        self.seen = Seen(request.prompt_ids)

    def propose(self, token_ids: Sequence[int], most: int) -> Proposal | None:
        """As in `Draft`."""
        most = min(most, self.length.best_or_again())
        if self.model.position_embedding is not None:  # of what it proposes, it reads all but the last
            most = min(most, self.model.max_seq_len + 1 - len(token_ids))
        proposal = self._propose(token_ids, most) if most > 0 else None
        self.length.count_step(len(proposal.token_ids) if proposal else 0)
        return proposal

    def learn(self, proposed: int, accepted: int) -> None:
        """As in `Draft`."""
        self.length.learn(self.length.count_tested(proposed, accepted), accepted)

    def _propose(self, token_ids: Sequence[int], count: int) -> Proposal | None:
        self._catch_up(token_ids)
        sampler, drafted = self.request.sampler, self.reading.token_ids
        rows: list[Float[Tensor, "1 vocab"]] = []
        while len(drafted) < len(token_ids) + count:
            seen = [self.seen.extended(drafted[len(token_ids) :])] if sampler.needs_seen else None
            logits = self._read()
            number = uniform(self.request.seed, "draft", self.sample, len(drafted)).to(logits.device)
            if sampler.greedy:
                token_id = int(sampler.choose(logits, number, seen))
            else:
                rows.append(sampler.probabilities(logits, seen))
                token_id = int(draw(rows[-1], number))
            if token_id == BANNED:
                break
            drafted.append(token_id)
        new = drafted[len(token_ids) :]
        return Proposal(new, torch.cat(rows[: len(new)]) if rows else None) if new else None

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        """Take back what was drafted and did not become text, and learn of what did."""
        ours, agreed = self.reading.token_ids, self.text_length
        while agreed < min(len(ours), len(token_ids)) and ours[agreed] == token_ids[agreed]:
            agreed += 1
        for token_id in token_ids[self.text_length :]:
            self.seen.add(token_id)
        ours[agreed:] = token_ids[agreed:]
        self.text_length = len(token_ids)
        if self.reading.cache is not None:  # the newest is read in any case, for what follows it
            self.reading.cache.truncate(min(self.reading.read, agreed, len(token_ids) - 1))

    def _read(self) -> Float[Tensor, "1 vocab"]:
        """Read what was not, a prompt part by part; what may follow the newest token."""
        reading = self.reading
        if reading.cache is None:
            reading.cache = self.model.new_cache(1, SMALLEST_CACHE)
        while True:
            part = reading.next_part()
            if reading.read + len(part) > reading.cache.capacity:
                reading.cache.reserve(max(2 * reading.cache.capacity, reading.read + len(part)))
            here = self.model.device
            last, likeliest = torch.tensor([len(part) - 1], device=here), self.request.likeliest
            logits = self.model(
                torch.tensor([part], device=here), cache=reading.cache, wanted=last, likeliest=likeliest
            )[0]
            if not reading.unread:
                return logits


class ModelDrafts:
    """A smaller model proposes for each text.

    Args:
        draft: the smaller one, in eval mode.
        model: the one that writes.
        costs: what steps cost; None: a proposed token costs as much of a step as the draft has of the model's weights.

    Raises:
        ConfigError: they do not have the same number of tokens.
    """

    def __init__(self, draft: GPT2, model: GPT2, costs: Costs | None = None) -> None:
        if draft.vocab_size != model.vocab_size:
            cause = f"the draft knows {draft.vocab_size} tokens, the model {model.vocab_size}"
            raise ConfigError(
                "draft does not fit", where="--draft", cause=cause, fix="take one with the same tokenizer"
            )
        share = flops_per_token(draft.config, 1) / flops_per_token(model.config, 1)
        self.draft, self.costs = draft, costs or Costs(proposing_each=share)
        self.statistics = Statistics(self.costs.break_even)

    def start(self, request: Request, sample: int) -> ModelDraft:
        """As in `Drafts`."""
        return ModelDraft(self.draft, request, sample, DraftLength(self.costs, self.statistics))


class EarlyExitDrafts(ModelDrafts):
    """The first layers of the model itself propose, through its final norm and head (Elhoushi et al. 2024, LayerSkip).

    Args:
        model: in eval mode, and as it will write: layers that are exchanged later are not seen.
        num_layers: how many.
        costs: as in `ModelDrafts`.

    Raises:
        ConfigError: not fewer layers than the model has, or none.
    """

    def __init__(self, model: GPT2, num_layers: int, costs: Costs | None = None) -> None:
        super().__init__(first_layers(model, num_layers), model, costs)


def first_layers(model: GPT2, num_layers: int) -> GPT2:
    """The model without its last layers; all parameters are shared.

    Raises:
        ConfigError: not fewer layers than the model has, or none.
    """
    if not 0 < num_layers < len(model.layers):
        cause = f"{num_layers} layers of {len(model.layers)}"
        fix = f"leave some out, and take one at least, such as early:{max(1, len(model.layers) // 3)}"
        raise ConfigError("draft does not fit", where="--draft", cause=cause, fix=fix)
    windows = model.config.windows and model.config.windows[:num_layers]
    with torch.device("meta"):  # nothing is allocated: every part is then the model's
        shallow = type(model).from_config(replace(model.config, num_layers=num_layers, windows=windows))
    for name, part in model.named_children():
        setattr(shallow, name, nn.ModuleList(model.layers[:num_layers]) if name == "blocks" else part)
    if isinstance(model, ReadingGPT2) and isinstance(shallow, ReadingGPT2):
        shallow.step = model.step and model.step.first(num_layers)
    return shallow.train(model.training)
