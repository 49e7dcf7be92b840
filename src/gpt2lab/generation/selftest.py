"""The shortcuts of writing, held against the long way round, for a model of the user's own and on this machine.

Texts in a batch, and with drafts, should be equal to the bit on a CPU. Where a sum's order may differ, logits are nearly the
same, and a token may be another only where two are so nearly equally likely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.generation.drafts import Drafts
from gpt2lab.generation.engine import Engine
from gpt2lab.generation.model_draft import EarlyExitDrafts
from gpt2lab.generation.ngram import NgramDrafts
from gpt2lab.generation.sampling import Sampler
from gpt2lab.generation.texts import Request
from gpt2lab.model.cache import ROLLBACK
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.quantized import Int8Embedding
from gpt2lab.seeds import generator_for

PROMPT_LENGTHS = (1, 5, 12, 33, 3, 20)
Logits = Float[Tensor, "time vocab"]


@dataclass(frozen=True)
class Finding:
    """What one comparison showed.

    Attributes:
        name: the shortcut and what it was held against.
        compared: logits or tokens.
        worst: the largest difference of logits, in standard deviations of one token's; of texts that part, how far the two
            tokens at which they do were apart in the logits that the long way gives.
        same_bits: whether there was no difference at all.
        passed: whether what differs may.
    """

    name: str
    compared: int
    worst: float
    same_bits: bool
    passed: bool


def selftest(model: GPT2, num_tokens: int = 128) -> Iterator[Finding]:
    """Compare each shortcut with the long way round, on random tokens.

    Args:
        model: in eval mode.
        num_tokens: read, and written, in each comparison; no more than a model with learned positions has places.

    Yields:
        A finding for each; the last is the control: what another text's logits differ by, which must not pass.
    """
    time = num_tokens if model.position_embedding is None else min(num_tokens, model.max_seq_len)
    token_ids = torch.randint(model.vocab_size, (2, time), generator=generator_for(0, "selftest")).to(model.device)
    text, other = token_ids
    with torch.inference_mode():
        whole = model(text[None])[0].float()
        spread = whole.std(dim=-1).mean().item()

        def near(name: str, logits: Logits) -> Finding:
            worst = (logits.float() - whole).abs().max().item() / spread
            return Finding(name, logits.numel(), worst, torch.equal(logits.float(), whole), worst <= _near(model))

        yield near("token by token with a cache == at once", _read(model, text, [1] * time))
        yield near("in chunks == at once", _read(model, text, _chunks(time)))
        yield near("after wrong drafts are taken back == at once", _read_with_drafts(model, text, other))
        yield from _written(model, time, spread)
        control = near("control: another text != this one", model(other[None])[0].float())
        yield Finding(control.name, control.compared, control.worst, control.same_bits, not control.passed)


def _chunks(time: int) -> list[int]:
    """Sizes of chunks, from one token up, that add up to `time`."""
    sizes: list[int] = []
    size = 1
    while sum(sizes) < time:
        sizes.append(min(size, time - sum(sizes)))
        size = size * 2 + 1
    return sizes


def _read(model: GPT2, text: Int[Tensor, " time"], sizes: list[int]) -> Logits:
    cache = model.new_cache(1, len(text))
    return torch.cat([model(chunk[None], cache=cache)[0] for chunk in text.split(sizes)])


def _read_with_drafts(model: GPT2, text: Int[Tensor, " time"], wrong: Int[Tensor, " time"]) -> Logits:
    """Each few tokens are first read with wrong ones after them, which are then forgotten."""
    cache, rows = model.new_cache(1, len(text)), []
    for start in range(0, len(text), 3):
        right = text[start : start + 3]
        drafted = torch.cat([right, wrong[start + 3 : start + 3 + ROLLBACK // 2]])
        rows.append(model(drafted[None], cache=cache)[0, : len(right)])
        cache.truncate(start + len(right))
    return torch.cat(rows)


def _near(model: GPT2) -> float:
    """What may lie between equal logits: little, but for weights of fewer bits than 32. Where what is multiplied has eight, a
    difference in the last bit before it can be one of a whole step after it."""
    rough = isinstance(model.token_embedding, Int8Embedding)
    return (
        0.1 if rough or any(weight.dtype in (torch.bfloat16, torch.float16) for weight in model.parameters()) else 1e-3
    )


def _written(model: GPT2, time: int, spread: float) -> Iterator[Finding]:
    """Texts of many lengths, alone and together, and with drafts."""
    generator = generator_for(0, "selftest prompts")
    room = None if model.position_embedding is None else model.max_seq_len
    lengths = [length for length in PROMPT_LENGTHS if room is None or length <= room]
    prompts = [torch.randint(model.vocab_size, (length,), generator=generator).tolist() for length in lengths]
    early = partial(EarlyExitDrafts, model, max(1, len(model.layers) // 2))
    for how, sampler in {"greedy": Sampler(0), "sampled": Sampler(1.0)}.items():
        requests = [Request(prompt, time, sampler, seed=index) for index, prompt in enumerate(prompts)]
        alone = [row for request in requests for row in _write(model, [request])]
        ways = {"a batch == each alone": _write(model, requests)}
        ways["n-gram drafts == none"] = _write(model, requests, NgramDrafts)
        if sampler.greedy:  # sampled, its text is another of the same distribution
            ways["early-exit drafts == none"] = _write(model, requests, early)
        for name, rows in ways.items():
            gaps = [_gap(model, prompt, *pair) for prompt, *pair in zip(prompts, alone, rows, strict=True)]
            same, worst = rows == alone, max(gaps) / spread
            passed = same or (sampler.greedy and worst <= _near(model))
            yield Finding(f"{name}, {how}", sum(map(len, alone)), worst, same, passed)


def _write(model: GPT2, requests: list[Request], drafts: Callable[[], Drafts] | None = None) -> list[list[int]]:
    """The texts of these requests, in one engine."""
    engine = Engine(model, drafts=drafts() if drafts is not None else None)
    texts = [engine.submit(request)[0] for request in requests]
    while engine.busy:
        engine.step()
    return [text.token_ids for text in texts]


def _gap(model: GPT2, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Where two texts part: how far the logits of the two tokens are apart that they go on with; 0 where they do not."""
    pairs = zip(one, other, strict=False)
    first = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return 0.0 if len(one) == len(other) else float("inf")
    logits = model(torch.tensor([prompt + one[:first]], device=model.device))[0, -1]
    return (logits[one[first]] - logits[other[first]]).abs().item()
