"""Beam search: the likeliest text that keeping several beginnings finds, in place of the likeliest next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gpt2lab.errors import ConfigError
from gpt2lab.generation.sampling import likeliest
from gpt2lab.model.gpt2 import GPT2


@dataclass(frozen=True)
class Beam:
    """A continuation that the search has finished.

    Attributes:
        token_ids: without the prompt's and without a final separator.
        log_probability: of all its tokens, the separator included, in nats.
        score: what it was ranked by: `log_probability / num_tokens ** length_penalty`, the separator counted.
        finish_reason: "stop" at the end of a document, "length" where the tokens asked for or the context ended.
    """

    token_ids: list[int]
    log_probability: float
    score: float
    finish_reason: str


@torch.inference_mode()
def beam_search(
    model: GPT2,
    prompt_ids: Int[Tensor, " time"],
    *,
    num_beams: int,
    max_new_tokens: int,
    end_of_text: int | None,
    length_penalty: float = 1.0,
    num_return: int = 1,
) -> list[Beam]:
    """The best continuations of a prompt that a search finds which keeps the `num_beams` likeliest beginnings.

    As transformers has it (with its default, early_stopping=False): of the 2 * num_beams likeliest continuations of all
    beginnings by one token, those that end and rank among the first num_beams are finished, and the first num_beams of
    those that do not end go on. The search is over when num_beams are finished and the likeliest beginning, were it finished
    now, would not be better than the worst of them; or at the last position, where everything is finished.

    Args:
        model: in evaluation mode.
        end_of_text: the token that finishes a text; None: only its length does.
        length_penalty: above 0 longer texts are preferred, below 0 shorter ones; 0 ranks by probability alone.
        num_return: so many of the best finished.

    Returns:
        The best first; fewer than `num_return` only if there are fewer texts at all.

    Raises:
        ConfigError: a number outside its range. NumbersError: a logit is NaN or infinite.
    """
    _check(num_beams, max_new_tokens, length_penalty, num_return)
    room = max_new_tokens if model.position_embedding is None else model.max_seq_len - len(prompt_ids) + 1
    steps = min(max_new_tokens, room)
    cache = model.new_cache(1, len(prompt_ids) + steps)
    token_ids = prompt_ids.to(model.device)[None]
    texts: list[list[int]] = [[]]
    sums = torch.zeros(1, dtype=torch.float64, device=model.device)
    finished: list[Beam] = []
    for length in range(1, steps + 1):
        last = torch.tensor([token_ids.shape[1] - 1], device=model.device)
        logits = model(token_ids, cache=cache, wanted=last)[:, 0]
        likeliest(logits)
        totals = (sums[:, None] + logits.double().log_softmax(-1)).flatten()
        best = totals.topk(min(2 * num_beams, len(totals)))
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ranked = [(total, *divmod(place, logits.shape[-1])) for total, place in found]
        for total, row, token_id in ranked[:num_beams]:
            if token_id == end_of_text:
                finished.append(Beam(texts[row], total, total / length**length_penalty, "stop"))
            elif length == steps:
                finished.append(Beam([*texts[row], token_id], total, total / length**length_penalty, "length"))
        finished = sorted(finished, key=lambda beam: beam.score, reverse=True)[:num_beams]
        going_on = [beam for beam in ranked if beam[2] != end_of_text][:num_beams]
        if not going_on or _is_over(finished, going_on[0][0] / length**length_penalty, num_beams):
            break
        texts = [[*texts[row], token_id] for _, row, token_id in going_on]
        sums = sums.new_tensor([total for total, _, _ in going_on])
        cache = cache.select(torch.tensor([row for _, row, _ in going_on], device=model.device))
        token_ids = torch.tensor([[token_id] for _, _, token_id in going_on], device=model.device)
    return finished[:num_return]


def _is_over(finished: list[Beam], best_score: float, num_beams: int) -> bool:
    """Whether no beginning is better than the worst finished text."""
    return len(finished) == num_beams and best_score <= finished[-1].score


def _check(num_beams: int, max_new_tokens: int, length_penalty: float, num_return: int) -> None:
    bounds = (
        ("--num-beams", num_beams, 1, 1024),
        ("--max-new-tokens", max_new_tokens, 1, 2**20),
        ("--length-penalty", length_penalty, -10, 10),
        ("--num-return", num_return, 1, num_beams),
    )
    for flag, value, least, most in bounds:
        if not least <= value <= most:
            cause, fix = f"{value} is not between {least} and {most}", f"{least} to {most}"
            raise ConfigError("out of range", where=flag, cause=cause, fix=fix)
