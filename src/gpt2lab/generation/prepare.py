"""A model as generation reads it fastest: packed for this machine, or quantised."""

from __future__ import annotations

from typing import Literal

import torch

from gpt2lab.errors import ConfigError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.reading import Quantize, ReadingGPT2, assemble, quantize_weights
from gpt2lab.system import choose_device

Precision = Literal["auto", "fp32", "bf16"]


def placed(model: GPT2, device: str = "auto", precision: Precision = "auto", quantize: Quantize | None = None) -> GPT2:
    """The model where it will write, ready for reading.

    Args:
        device: auto takes a GPU where there is one, unless the model is quantised.
        precision: of all that is computed; auto: bf16 on a GPU, fp32 elsewhere.

    Raises:
        ConfigError: no such device here, or a quantised model on a GPU.
    """
    quantised = quantize is not None or isinstance(model, ReadingGPT2)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not quantised else "cpu"
    where = choose_device(device, "device")
    if quantised and where.type != "cpu":
        cause = "weights in eight or four bits are multiplied by a CPU alone"
        raise ConfigError("not on this device", where=f"--device={device}", cause=cause, fix="--device=cpu")
    if isinstance(model, ReadingGPT2):
        return model
    bf16 = precision == "bf16" or (precision == "auto" and where.type == "cuda")
    return for_reading(model.to(where, torch.bfloat16 if bf16 else torch.float32), quantize)


def for_reading(model: GPT2, quantize: Quantize | None = None, pack: bool = True) -> GPT2:
    """The model for inference alone; `model` stays as it is, and what need not change is shared with it.

    On a CPU, with `pack`, what it computes with a cache for a text does not depend on the texts beside it, to the bit.
    Elsewhere nothing is packed.

    Args:
        quantize: eight bits a weight, or four where memory is what counts, and not the last percent of perplexity. A model
            that was prepared before stays as it was.
        pack: make what this machine reads fastest: a compiled step, or copies of matrices in oneDNN's layout.
    """
    if isinstance(model, ReadingGPT2):
        return model
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if quantize is not None:
        weights = quantize_weights(weights, quantize)
    return assemble(model, weights, pack=pack and model.device.type == "cpu")
