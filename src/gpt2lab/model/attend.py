"""One mask rule, and the cheapest exact way to apply it.

Whether a token may look at another is decided by where they stand and how far it reaches (`visible`). Training, prefill,
decoding with a cache, windows and the borders of documents differ only in which keys are at hand and how many of them
count; `attend` picks the cheapest exact way to apply the rule.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "batch head time dim"]
Keys = Float[Tensor, "batch kv_head key dim"]
Reach = Int[Tensor, "batch #head time"]

SMALLEST_BLOCK = 64
"""Queries in a block of windowed attention, at the least: smaller products waste the machine."""


def visible(
    q_positions: Int[Tensor, "*texts time"],
    k_positions: Int[Tensor, "*texts key"],
    window: int | Int[Tensor, "*each time"] | None = None,
) -> Bool[Tensor, "*masks time key"]:
    """The mask rule: a token sees itself and the ``window - 1`` tokens before it, or all before it without a window.

    Args:
        q_positions: of the queries, and k_positions: of the keys; of all texts, or a row for each.
        window: one for all tokens, or one for each of them; then there are as many masks as it has rows of tokens.
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    seen = distance >= 0
    if window is None:
        return seen
    return seen & (distance < (window[..., None] if isinstance(window, Tensor) else window))


def attend(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    q_start: int = 0,
    k_start: int = 0,
    window: int | None = None,
    reach: Reach | None = None,
    dropout: float = 0.0,
) -> Queries:
    """Softmax attention of queries at positions ``q_start...`` over keys at positions ``k_start...``, scaled by 1/sqrt(dim).

    Args:
        q: queries; `head` is a multiple of `kv_head`, and consecutive query heads share a key head.
        k: keys, and v: values; the last of them is at the last query's position.
        window: keys each query may see, itself included. The cost is then linear in the number of keys.
        reach: what a window is, for each query by itself, 1 or more: both hold. None: as far as the window goes.
        dropout: probability of dropping an attention weight.
    """
    num_queries = q.shape[2]
    if window is not None:  # what no query can see need not be read
        out_of_reach = max(0, q_start - window + 1 - k_start)
        k, v, k_start = k[:, :, out_of_reach:], v[:, :, out_of_reach:], k_start + out_of_reach
    num_keys = k.shape[2]
    if window is not None and num_queries > 2 * max(window, SMALLEST_BLOCK):
        return _attend_in_blocks(q, k, v, q_start - k_start, window, reach, dropout)
    mask = None
    causal = q_start == k_start and (window is None or window >= num_keys) and reach is None
    if reach is not None or (not causal and num_queries > 1):  # a single newest token sees every key that is left
        q_positions = torch.arange(q_start, q_start + num_queries, device=q.device)
        k_positions = torch.arange(k_start, k_start + num_keys, device=q.device)
        mask = visible(q_positions, k_positions, window)
        mask = mask if reach is None else mask & visible(q_positions, k_positions, reach)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=dropout, is_causal=causal and num_queries > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attend_in_blocks(
    q: Queries, k: Keys, v: Keys, earlier: int, window: int, reach: Reach | None, dropout: float
) -> Queries:
    """Windowed attention in time and memory linear in the queries (after Beltagy et al. 2020, arXiv:2004.05150).

    The first `window` queries, which also see the `earlier` keys, go by themselves. The others are cut into blocks of half
    a window: each reads its own keys and the `window - 1` before them, so 1.5 keys are computed for each that is seen.
    All blocks share one small mask, or with `reach` have one each, and become one batch of views: nothing is copied to
    overlap.
    """
    batch, heads, time, _ = q.shape
    size = max(window // 2, SMALLEST_BLOCK)
    back = window - 1
    first_q, q = q.split([window, time - window], dim=2)
    padding = -q.shape[2] % size
    first_reach = None
    if reach is not None:
        first_reach, reach = reach.split([window, time - window], dim=2)
        reach = F.pad(reach, (0, padding), value=1).expand(batch, heads, -1)
        reach = reach.flatten(0, 1).unflatten(1, (-1, size)).transpose(0, 1)
    head = earlier + window
    first = attend(
        first_q, k[:, :, :head], v[:, :, :head], q_start=earlier, window=window, reach=first_reach, dropout=dropout
    )
    k, v = k[:, :, head - back :], v[:, :, head - back :]
    if padding:  # at the end it is never seen: it comes after every real token
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    # (block, sequence * head, time, dim): an axis for both keeps overlapping blocks views, and query heads in their groups.
    q = q.flatten(0, 1).unflatten(1, (-1, size)).transpose(0, 1)
    k, v = (x.flatten(0, 1).unfold(1, back + size, size).permute(1, 0, 3, 2) for x in (k, v))
    later = attend(q, k, v, q_start=back, window=window, reach=reach, dropout=dropout)
    later = later.transpose(0, 1).flatten(1, 2).unflatten(0, (batch, heads))[:, :, : time - window]
    return torch.cat([first, later], dim=2)
