"""Text from a model: prompts in, samples out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt2lab.errors import ConfigError
from gpt2lab.generation.drafts import Drafts
from gpt2lab.generation.engine import Engine
from gpt2lab.generation.sampling import Sampler
from gpt2lab.generation.stopping import GrowingText
from gpt2lab.generation.texts import PastEnd, Request, Text
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A continuation.

    Attributes:
        text: without the prompt, and up to a stop string.
        token_ids: all that were written, without the prompt's and without a final separator.
        finish_reason: "stop" at the end of a document or at a stop string, "length" where the tokens asked for or the
            context ended, "banned" where no token was possible.
        log_probabilities: for each token the (token id, log-probability) of it and of the likeliest; empty unless asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    log_probabilities: list[list[tuple[int, float]]] = field(default_factory=list)


def generate(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    past_end: PastEnd = "stop",
    log_probabilities: int | None = None,
    drafts: Drafts | None = None,
    on_text: Callable[[str], None] | None = None,
    **sampling: Any,
) -> list[Sample]:
    """Continue `prompt`. Sample i of a seed is the same text however many samples are asked for.

    Args:
        temperature: 0 always takes the likeliest token; 1 is the model's own distribution.
        top_k: draw from so many of the likeliest tokens only.
        top_p: draw from the likeliest tokens that hold this probability only.
        stop: strings that end a sample, which does not contain them.
        past_end: what happens where learned positions end: "stop", or "slide" to the last half of them.
        log_probabilities: of how many of the likeliest tokens to tell at each place.
        drafts: what proposes tokens, so that several can be checked at once.
        on_text: called with each new piece of the first sample's text.
        sampling: other settings of `Sampler`, by name.

    Raises:
        ConfigError: an empty prompt, or one that leaves a model with learned positions no room.
        DataError: a character the tokenizer does not know.
    """
    check_counts(num_samples, max_new_tokens, seed)
    request = Request(
        tokenizer.encode(prompt).tolist(),
        max_new_tokens,
        Sampler(temperature, top_k, top_p, **sampling),
        seed,
        past_end,
        tokenizer.end_of_text,
        log_probabilities,
    )
    was_training = model.training
    engine = Engine(model.eval(), drafts=drafts)
    try:
        [samples] = generate_all(engine, tokenizer, [request], num_samples=num_samples, stop=stop, on_text=on_text)
    finally:
        model.train(was_training)
    return samples


def generate_all(
    engine: Engine,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> list[list[Sample]]:
    """The samples of each request, written side by side; `on_text` hears the first of them grow."""
    texts = [engine.submit(request, num_samples) for request in requests]
    growing = {text: GrowingText(tokenizer, stop) for samples in texts for text in samples}
    show = on_text or (lambda _: None)

    def hear(text: Text, piece: str) -> None:
        if piece and text is texts[0][0]:
            show(piece)

    shown = dict.fromkeys(growing, 0)
    while engine.busy:
        for text in engine.step():
            grown = growing[text]
            for token_id in text.token_ids[shown[text] :]:
                shown[text] += 1
                hear(text, grown.add(token_id))
                if grown.stopped:
                    engine.cancel(text)
                    break
            if text.finish_reason is not None and not grown.stopped:
                hear(text, grown.finish())
    return [[_sample(text, growing[text], shown[text]) for text in samples] for samples in texts]


def _sample(text: Text, grown: GrowingText, count: int) -> Sample:
    reason = "stop" if grown.stopped else str(text.finish_reason)
    return Sample(grown.text, text.token_ids[:count], reason, text.log_probabilities[:count])


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
