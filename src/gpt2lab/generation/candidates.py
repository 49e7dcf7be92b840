"""The same distribution as `filters.distribution`, of one text on a CPU, where it takes a tenth of the time.

Sampling is mostly the time that fifty thousand numbers take to pass: here most of them pass once, in numpy, whose
comparisons, sums and small arrays cost a fraction of torch's. What remains are few candidates, for which all is exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int

Scores = Float[np.ndarray, " token"]
Places = Int[np.ndarray, " found"]

GROUPS = 16
"""Groups a wanted token: so many that few of the wanted share one."""
SHARES = [2.0**-exponent for exponent in range(5, 24, 3)]
"""Shares of the likeliest token's probability that may divide what top-p keeps from the rest, tried in turn."""


def candidates(
    scores: Scores, highest: float, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Float[np.ndarray, " found"], Places | None]:
    """The probabilities in float64 of the tokens that may come next, and their ids, in order; None: all tokens.

    Args:
        highest: the largest of `scores`; where it is -inf, there are no candidates.
        temperature: above 0.
    """
    if highest == -math.inf:
        return np.zeros(0), np.zeros(0, np.int64)
    token_ids = None
    if top_k is not None and top_k < len(scores):
        token_ids = largest(scores, top_k)
        scores = scores[token_ids]
    weights = scores - np.float64(highest)  # of which the likeliest's will be 1
    weights /= temperature
    np.exp(weights, out=weights)
    if top_p is not None and top_p < 1:
        kept = nucleus(weights, top_p)
        weights, token_ids = weights[kept], kept if token_ids is None else token_ids[kept]
    if min_p:
        kept = np.flatnonzero(weights >= min_p)
        weights, token_ids = weights[kept], kept if token_ids is None else token_ids[kept]
    weights /= weights.sum()
    return weights, token_ids


def largest(scores: Scores, k: int) -> Places:
    """Where the `k` largest stand, and all that tie with the last of them.

    They are looked for among those that reach the k-th largest of the maxima of any groups: at least k scores do.
    """
    size = len(scores) // (GROUPS * k)
    places = np.arange(len(scores))
    if size > 1:
        maxima = scores[: size * GROUPS * k].reshape(size, GROUPS * k).max(axis=0)
        places = np.flatnonzero(scores >= _kth_largest(maxima, k))
    found = scores[places]
    return places[found >= _kth_largest(found, k)]


def nucleus(weights: Scores, p: float) -> Places:
    """Where the likeliest stand that hold a share `p` of the sum together: the fewest, and of equals the first."""
    wanted = p * weights.sum()
    for share in (*SHARES, 0.0):
        places = np.flatnonzero(weights >= share)
        found = weights[places]
        if found.sum() > wanted * (1 + 1e-9):  # so much more that no rounding of a sum is decisive
            break
    ordered = -np.sort(-found)
    needed = int((running_sum(ordered) - ordered < wanted).sum())  # what comes before them does not hold p yet
    last = ordered[needed - 1]
    kept = found > last
    kept[np.flatnonzero(found == last)[: needed - int(kept.sum())]] = True
    return places[kept]


def running_sum(values: Scores) -> Scores:
    """One by one, as numpy's, in a quarter of the time."""
    return torch.from_numpy(values).cumsum(0).numpy()


def _kth_largest(values: Scores, k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
