"""The rule by which drafts are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from gpt2lab.generation.drafts import Proposal

if TYPE_CHECKING:
    from gpt2lab.generation.texts import Text


def check(text: Text, logits: Float[Tensor, "place vocab"], proposal: Proposal) -> list[int]:
    """The tokens of the proposal that are accepted, and one more."""
    raise NotImplementedError
