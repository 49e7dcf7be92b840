"""gpt2lab: the laboratory for GPT-2.

>>> from gpt2lab import load_model, load_tokenizer, generate
>>> model, tokenizer = load_model("runs/tiny"), load_tokenizer("runs/tiny")
>>> generate(model, tokenizer, "def ")[0].text  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2lab.config import GPT2Config, RunConfig
    from gpt2lab.generation import Sample, generate
    from gpt2lab.model.attention import GroupQueryAttention
    from gpt2lab.model.gpt2 import GPT2
    from gpt2lab.model.rope import RotaryEmbedding
    from gpt2lab.tokenizer import Tokenizer
    from gpt2lab.weights import load_model, load_tokenizer

__version__ = "0.1.0"
__all__ = [
    "GPT2", "GPT2Config", "GroupQueryAttention", "RotaryEmbedding", "RunConfig", "Sample", "Tokenizer", "generate",
    "load_model", "load_tokenizer",
]  # fmt: skip

_HOMES = {
    "GPT2": "model.gpt2", "GPT2Config": "config", "GroupQueryAttention": "model.attention", "RotaryEmbedding": "model.rope",
    "RunConfig": "config", "Sample": "generation.samples", "Tokenizer": "tokenizer", "generate": "generation.samples",
    "load_model": "weights", "load_tokenizer": "weights",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``gpt2lab --help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gpt2lab' has no attribute {name!r}")
    return getattr(import_module(f"gpt2lab.{_HOMES[name]}"), name)
