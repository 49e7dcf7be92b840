"""What the model itself thought of a token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gpt2lab.generation.sampling import likeliest


def log_probabilities(logits: Float[Tensor, " vocab"], chosen: int, top: int) -> list[tuple[int, float]]:
    """Log-probabilities, in nats, of the chosen token and of the `top` likeliest, in float64.

    They are the model's own: without temperature, penalties, bias or filters, so they say what the text was worth to the
    model, however it was sampled.

    Returns:
        (token id, log-probability) of the chosen one, then of the likeliest, likeliest first, of equals the first in the
        vocabulary; the chosen one may be among them again.

    Raises:
        NumbersError: a logit is NaN or infinite.
    """
    likeliest(logits[None])
    scores = logits.double().log_softmax(-1)
    count = min(top, len(scores))
    # All that reach the last of them, of which a stable sort then takes the first.
    places = (scores >= scores.topk(count).values[-1]).nonzero().squeeze(-1) if count else scores.new_zeros(0).long()
    places = places[scores[places].sort(descending=True, stable=True).indices[:count]]
    return [(chosen, scores[chosen].item()), *zip(places.tolist(), scores[places].tolist(), strict=True)]
