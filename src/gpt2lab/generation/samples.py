"""Text from a model: prompts in, samples out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from gpt2lab.errors import ConfigError
from gpt2lab.generation.beam import beam_search
from gpt2lab.generation.drafts import Drafts
from gpt2lab.generation.engine import Engine
from gpt2lab.generation.sampling import Sampler
from gpt2lab.generation.stopping import GrowingText
from gpt2lab.generation.texts import PastEnd, Request, Text, check_prompt
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer

CacheName = Literal["bf16", "int8"]
CACHES: dict[CacheName, torch.dtype] = {"bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Sample:
    """A continuation.

    Attributes:
        text: without the prompt, and up to a stop string.
        token_ids: all that were written, the last of a stop string included, but no final separator.
        finish_reason: "stop" at the end of a document or at a stop string, "length" where the tokens asked for or the
            context ended, "banned" where no token was possible.
        log_probabilities: for each token the (token id, log-probability) of it and of the likeliest; empty unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    log_probabilities: list[list[tuple[int, float]]] = field(default_factory=list)


def generate(model: GPT2, tokenizer: Tokenizer, prompt: str, **settings: Any) -> list[Sample]:
    """Continue `prompt`: `generate_all` of one prompt, with the same settings."""
    [samples] = generate_all(model, tokenizer, [prompt], **settings)
    return samples


def generate_all(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    seed: int = 0,
    stop: Sequence[str] = (),
    past_end: PastEnd = "stop",
    log_probabilities: int | None = None,
    drafts: Drafts | None = None,
    cache: CacheName | None = None,
    on_text: Callable[[str], None] | None = None,
    temperature: float = 0.8,
    **sampling: Any,
) -> list[list[Sample]]:
    """Continue each prompt, all side by side. Sample i of a prompt is the same text whatever else is asked for.

    Args:
        num_samples: of each prompt.
        stop: texts that end a sample, which does not contain them.
        past_end: what happens where learned positions end: "stop", or "slide" to the last half of them.
        log_probabilities: of how many of the likeliest tokens to tell at each place, besides that of the token itself.
        drafts: what proposes tokens, so that several can be checked at once.
        cache: keys and values in fewer bits, "bf16" or "int8"; None: as the weights.
        on_text: called with each new piece of the very first sample's text.
        temperature: 0 always takes the likeliest token; 1 is the model's own distribution.
        sampling: other settings of `Sampler` by their names: top_k, top_p, min_p, repetition_penalty...

    Raises:
        ConfigError: an empty prompt, or one that leaves a model with learned positions no room; a number out of range.
        DataError: a character the tokenizer does not know.
    """
    check_counts(num_samples, max_new_tokens, seed)
    sampler = Sampler(temperature, **sampling)
    requests = [
        Request(
            tokenizer.encode(prompt).tolist(),
            max_new_tokens,
            sampler,
            seed=seed,
            past_end=past_end,
            end_of_text=tokenizer.end_of_text,
            log_probabilities=log_probabilities,
        )
        for prompt in prompts
    ]
    was_training = model.training
    engine = Engine(model.eval(), cache_dtype=None if cache is None else CACHES[cache], drafts=drafts)
    try:
        texts = [engine.submit(request, num_samples) for request in requests]
        growing = {text: GrowingText(tokenizer, stop) for samples in texts for text in samples}
        _write(engine, growing, texts[0][0], on_text or (lambda _: None))
    finally:
        model.train(was_training)
    return [[_sample(text, growing[text]) for text in samples] for samples in texts]


def _write(engine: Engine, growing: dict[Text, GrowingText], first: Text, on_text: Callable[[str], None]) -> None:
    """Run the engine until every text has ended; one that meets a stop string is cut there."""
    heard = dict.fromkeys(growing, 0)
    while engine.busy:
        for text in engine.step():
            grown, pieces = growing[text], []
            while heard[text] < len(text.token_ids) and grown.met is None:
                pieces.append(grown.add(text.token_ids[heard[text]]))
                heard[text] += 1
            if grown.met is not None:
                engine.cancel(text)
                text.cut(heard[text])
            elif text.finish_reason is not None:
                pieces.append(grown.finish())
            if text is first and any(pieces):
                on_text("".join(pieces))


def _sample(text: Text, grown: GrowingText) -> Sample:
    reason = "stop" if grown.met is not None else str(text.finish_reason)
    return Sample(grown.text, text.token_ids, reason, text.log_probabilities)


def search(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_beams: int,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    length_penalty: float = 1.0,
) -> list[Sample]:
    """The likeliest continuations that a beam search finds, the best first.

    Raises:
        ConfigError: as `generate_all`, or more samples than beams.
    """
    check_counts(num_samples, max_new_tokens, 0)
    token_ids = torch.from_numpy(tokenizer.encode(prompt)).long()
    check_prompt(len(token_ids), model.config)
    beams = beam_search(
        model,
        token_ids,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        end_of_text=tokenizer.end_of_text,
        length_penalty=length_penalty,
        num_return=num_samples,
    )
    return [Sample(tokenizer.decode(beam.token_ids), beam.token_ids, beam.finish_reason) for beam in beams]


def check_counts(num_samples: int, max_new_tokens: int, seed: int) -> None:
    """Refuse what nobody can mean.

    Raises:
        ConfigError: a number out of its range.
    """
    bounds = (
        ("--num-samples", num_samples, 1, 1024),
        ("--max-new-tokens", max_new_tokens, 1, 2**20),
        ("--seed", seed, 0, 2**63),
    )
    for flag, value, least, most in bounds:
        if not least <= value <= most:
            cause, fix = f"{value} is not between {least} and {most}", f"{least} or more"
            raise ConfigError("out of range", where=flag, cause=cause, fix=fix)
