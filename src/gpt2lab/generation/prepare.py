"""A model as generation reads it fastest: packed for this machine, or quantised."""

from __future__ import annotations

from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import Quantize, ReadingGPT2, assemble, quantize_weights


def for_reading(model: GPT2, quantize: Quantize | None = None, pack: bool = True) -> GPT2:
    """The model for inference alone; `model` stays as it is, and what need not change is shared with it.

    On a CPU, with `pack`, what it computes for a text does not depend on the texts beside it, to the bit. On other devices
    neither packing nor quantising is faster: there it is the same model, with the same layers.

    Args:
        quantize: eight bits a weight, or four where a single text's next token is what counts, and not its last percent of
            perplexity. A model that was prepared before stays as it was.
        pack: copy matrices that are not quantised into the layout that is read fastest.
    """
    if isinstance(model, ReadingGPT2):
        return model
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if model.device.type != "cpu":
        return assemble(model, weights, pack=False)
    if quantize is not None:
        weights = quantize_weights(weights, quantize)
    return assemble(model, weights, pack=pack)
