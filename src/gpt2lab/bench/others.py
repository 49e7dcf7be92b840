"""Other programs that write with the same weights: each makes its own copy of a model and gives ways to write.

A way is called with a prompt, a number of tokens and a function to call at each token; it returns the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models

from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import END_OF_TEXT, Tokenizer
from gpt2lab.weights.export import export_hf, load_stock

Heard = Callable[[], None]
Write = Callable[[list[int], int, Heard], list[int]]
Others = Callable[[GPT2, Path, torch.device, torch.dtype], dict[str, Write]]


def numbered(vocab_size: int) -> Tokenizer:
    """A tokenizer whose tokens are their own numbers: other programs want one beside the weights."""
    names = [str(index) for index in range(vocab_size - 1)] + [END_OF_TEXT]
    return Tokenizer(Backend(models.WordLevel(vocab={name: index for index, name in enumerate(names)})))


def hf_folder(model: GPT2, place: Path) -> Path:
    """The model as transformers' files; written once."""
    folder = place / "hf"
    if not folder.exists():
        export_hf(model, numbered(model.vocab_size), folder, check=False)
    return folder


def transformers(model: GPT2, place: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Write]:
    """`generate`, as people call it: greedy, with its cache."""
    stock = load_stock(hf_folder(model, place)).to(device, dtype)
    stock.generation_config.eos_token_id = None  # it writes as many tokens as the others

    class Hears:
        """What it calls a streamer: it is given the prompt, then each token."""

        def __init__(self, heard: Heard) -> None:
            self.heard, self.begun = heard, False

        def put(self, _: Any) -> None:
            if self.begun:
                self.heard()
            self.begun = True

        def end(self) -> None:
            """Nothing is left to tell."""

    @torch.inference_mode()
    def write(prompt: list[int], count: int, heard: Heard) -> list[int]:
        token_ids = torch.tensor([prompt], device=device)
        how: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        mask = torch.ones_like(token_ids)
        written = stock.generate(token_ids, attention_mask=mask, streamer=Hears(heard), **how)
        return list(map(int, written[0, len(prompt) :]))

    return {"bf16" if dtype == torch.bfloat16 else "fp32": write}


def ctranslate2(model: GPT2, place: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Write]:
    """Its generator, whole and in int8, with as many threads as ours has."""
    import ctranslate2 as library
    from ctranslate2.converters import TransformersConverter

    folder = hf_folder(model, place)
    names = [str(index) for index in range(model.vocab_size - 1)] + [END_OF_TEXT]

    def way(kind: str) -> Write:
        made = str(place / kind)
        TransformersConverter(str(folder)).convert(made, quantization=kind)
        generator = library.Generator(made, device=device.type, intra_threads=torch.get_num_threads(), inter_threads=1)

        def write(prompt: list[int], count: int, heard: Heard) -> list[int]:
            def hear(_: Any) -> bool:
                heard()
                return False  # go on

            [found] = generator.generate_batch(
                [[names[token_id] for token_id in prompt]],
                max_length=count,
                min_length=count,
                sampling_topk=1,
                include_prompt_in_result=False,
                callback=hear,
            )
            return list(map(int, found.sequences_ids[0]))

        return write

    return {"int8": way("int8"), "fp32": way("float32")}


OTHERS: dict[str, Others] = {"transformers": transformers, "ctranslate2": ctranslate2}
"""By the names of their libraries."""
