"""Where documents begin inside a sequence, and what that means to a model: what a token may see, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


def places_in_documents(token_ids: Int[Tensor, "batch time"], end_of_text: int) -> Int[Tensor, "batch time"]:
    """How many tokens of its document stand before each one, in the same sequence.

    End-of-text closes a document and is its last token. What a sequence begins with is a document of its own, also where it
    continues one that began before.
    """
    time = torch.arange(token_ids.shape[1], device=token_ids.device)
    begins = torch.zeros_like(token_ids, dtype=torch.bool)
    begins[:, 1:] = token_ids[:, :-1] == end_of_text
    return time - torch.where(begins, time, 0).cummax(dim=1).values


@dataclass(frozen=True)
class Borders:
    """What the borders of documents mean to a model, as the recipe's `data` says.

    Attributes:
        end_of_text: the id that closes a document.
        attend_across: whether a token may see documents before its own.
        restart_positions: whether positions count from where the document begins.
    """

    end_of_text: int
    attend_across: bool = True
    restart_positions: bool = False

    def __call__(self, token_ids: Int[Tensor, "batch time"]) -> dict[str, Tensor]:
        """What to give a model with these ids: its `reach` and `positions`, where they are not the usual ones."""
        if self.attend_across and not self.restart_positions:
            return {}
        places = places_in_documents(token_ids, self.end_of_text)
        given = {} if self.attend_across else {"reach": places + 1}
        return given | ({"positions": places} if self.restart_positions else {})
