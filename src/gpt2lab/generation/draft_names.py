"""What ``--draft`` says."""

from __future__ import annotations

from collections.abc import Callable

from gpt2lab.errors import ConfigError
from gpt2lab.generation.drafts import Drafts
from gpt2lab.generation.model_draft import EarlyExitDrafts, ModelDrafts
from gpt2lab.generation.ngram import NgramDrafts
from gpt2lab.model.gpt2 import GPT2

EARLY = "early:"


def drafts_for(name: str, model: GPT2, open_model: Callable[[str], GPT2]) -> Drafts:
    """The drafts that a name stands for: ngram, early:N for the first N layers, or a smaller model's name.

    Args:
        model: the one that writes, in eval mode, as it will write.
        open_model: gives the model of a name, in eval mode.

    Raises:
        ConfigError: a number of layers that cannot be, or a model with other tokens.
    """
    if name == "ngram":
        return NgramDrafts()
    if not name.startswith(EARLY):
        return ModelDrafts(open_model(name), model)
    number = name.removeprefix(EARLY)
    if not (number.isascii() and number.isdigit()):
        fix = f"early:N with a number of layers, such as early:{max(1, len(model.layers) // 3)}"
        raise ConfigError("no such draft", where="--draft", cause=f"{number!r} is no number of layers", fix=fix)
    return EarlyExitDrafts(model, int(number))
