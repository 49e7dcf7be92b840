"""The loss of every token of a text, each scored once, with as much context as the stride leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch

from gpt2lab.model.borders import Borders
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.loss import IGNORE

_LOGIT_NUMBERS = 1 << 24  # in one forward pass: 64 MB in fp32


def windows(num_tokens: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a text into windows: (first token, tokens, how many of their targets were scored before).

    Target i is token i + 1. Each window but the first starts `stride` later than the one before and scores only its new
    targets, each with at least ``seq_len - stride`` tokens of context; together they score every target once.
    """
    scored = 0
    for start in range(0, num_tokens - 1, stride):
        end = min(start + seq_len, num_tokens - 1)
        if end > scored:
            yield start, end - start, scored - start
            scored = end
        if end == num_tokens - 1:
            return


@torch.no_grad()  # inference mode would spoil the weights that FSDP gathers here for the next training pass
def token_losses(
    model: GPT2,
    token_ids: np.ndarray,
    seq_len: int,
    stride: int | None = None,
    *,
    lengths: Sequence[int] | None = None,
    borders: Borders | None = None,
    batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The loss in nats of each token but the first, in order: ``len(token_ids) - 1`` numbers in float64.

    Args:
        seq_len: tokens in a window.
        stride: tokens from window to window; None: seq_len, the cheapest; 1: the most context for every token.
        lengths: ids in each passage of the text, none of which a window reaches across; the first id of each is only
            context, and its own loss is 0. None: the text is one passage.
        borders: what documents' borders mean to the model; None: nothing. The text is cut as ever, and a window that begins
            inside a document sees what is left of it.
        batch_size: windows in a forward pass; None: what keeps the logits small.
        rank, world_size: score this rank's share of the passes alone, and give 0 elsewhere: the shares add up to the whole.
        on_batch: called before each pass; all ranks make equally many, since a sharded model needs all of them for one.
    """
    stride = stride or seq_len
    batch_size = batch_size or max(1, _LOGIT_NUMBERS // (seq_len * model.vocab_size))
    lengths = lengths or [len(token_ids)]
    cuts = [
        (end - length + start, count, done)
        for end, length in zip(accumulate(lengths), lengths, strict=True)
        for start, count, done in windows(length, seq_len, stride)
    ]
    losses = np.zeros(max(0, len(token_ids) - 1))
    was_training = model.training
    model.eval()
    groups = [cuts[first : first + batch_size] for first in range(0, len(cuts), batch_size)]
    for place in range(rank, -(-len(groups) // world_size) * world_size, world_size):
        group, mine = groups[min(place, len(groups) - 1)], place < len(groups)
        on_batch()
        longest = max(length for _, length, _ in group)
        inputs = np.zeros((len(group), longest), np.int64)
        targets = np.full((len(group), longest), IGNORE, np.int64)
        for row, (start, length, done) in enumerate(group):
            inputs[row, :length] = token_ids[start : start + length]
            targets[row, done:length] = token_ids[start + done + 1 : start + length + 1]
        read, asked = (torch.from_numpy(ids).to(model.device) for ids in (inputs, targets))
        result = model(read, asked, **(borders(read) if borders is not None else {}))
        for row, (start, length, done) in enumerate(group if mine else []):
            losses[start + done : start + length] = result[row, done:length].double().cpu().numpy()
    model.train(was_training)
    return losses


def losses_by_position(
    model: GPT2, token_ids: np.ndarray, seq_len: int, starts: Sequence[int], *, borders: Borders | None = None
) -> np.ndarray:
    """The mean loss at each position of contexts of `seq_len` tokens that begin at `starts`.

    Position p (from 0) is predicted from p + 1 tokens. Positions beyond the trained length show how a model extrapolates.
    """
    rows = [token_losses(model, token_ids[start : start + seq_len + 1], seq_len, borders=borders) for start in starts]
    return np.mean(rows, axis=0)
