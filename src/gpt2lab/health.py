"""Numbers going bad: what is skipped, what stands out, and what has to be the same in every replica."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from gpt2lab.data.batches import Batches
from gpt2lab.errors import NumbersError
from gpt2lab.tokenizer import Tokenizer

SKIPS_WITHIN = 100
"""Steps over which skipped ones are counted."""
SPIKE_WINDOW, SPIKE_SCORE, FEWEST_LOSSES = 64, 6.0, 16
"""A loss is a spike when it lies so many standard deviations above the mean of the losses before it, of which so many count."""
MOST_TEXTS = 64
"""Samples of a bad step whose text is kept."""


class Health:
    """What the last steps were like: a function of the rows of metrics.jsonl, so a resumed run knows it too."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.losses: list[float] = []
        self.skipped: list[int] = []
        for row in rows:
            self.note(row)

    def note(self, row: dict[str, Any]) -> None:
        """Take in the row of a step."""
        if row.get("skipped"):
            self.skipped.append(row["step"])
        elif row.get("loss") is not None:
            self.losses = [*self.losses, row["loss"]][-SPIKE_WINDOW:]
        self.skipped = [step for step in self.skipped if step > row["step"] - SKIPS_WITHIN]

    def spike(self, loss: float) -> float | None:
        """How many standard deviations a loss lies above those before it, if that is far; never of the first few."""
        if len(self.losses) < FEWEST_LOSSES:
            return None
        # Early in training the loss falls steadily: what is left after a straight line is its noise.
        steps = np.arange(len(self.losses))
        slope, start = np.polyfit(steps, self.losses, 1)
        noise = float(np.std(np.array(self.losses) - (start + slope * steps)))
        score = (loss - float(start + slope * len(steps))) / max(noise, 1e-3 * abs(loss))
        return score if score > SPIKE_SCORE and loss > self.losses[-1] else None

    def refuse_too_many_skips(self, limit: int, where: str) -> None:
        """End a run whose numbers do not recover.

        Raises:
            NumbersError: more than `limit` of the last steps were skipped.
        """
        if len(self.skipped) > limit:
            steps = ", ".join(map(str, self.skipped[:10]))
            cause = f"of the last {SKIPS_WITHIN} steps {len(self.skipped)} were skipped ({steps}); {limit} may be"
            fix = "lower optim.learning_rate, lengthen optim.warmup_steps, or use --system.precision=fp32"
            raise NumbersError("numbers went bad", where=where, cause=cause, fix=fix)


def is_bad(loss: float, grad_norm: float, *, scaled: bool) -> bool:
    """Whether a step must not be taken. With fp16 an overflow of the gradient is usual: the scaler skips that by itself."""
    return not math.isfinite(loss) or (not math.isfinite(grad_norm) and not scaled)


def describe_batch(
    batches: Batches, tokenizer: Tokenizer, index: int, losses: list[float], row: dict[str, Any]
) -> dict[str, Any]:
    """What a step was to learn from: where each sample starts, and the text of those whose loss is not finite (or of all).

    Args:
        index: of the batch, from 0.
        losses: of each micro-batch.
    """
    samples, indices = batches.samples, batches.step_indices(index)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    size = batches.micro_batch
    shown = [sample for number in bad for sample in range(number * size, (number + 1) * size)] or list(
        range(len(indices))
    )
    texts = {str(sample): tokenizer.decode(samples.read(indices[sample])) for sample in shown[:MOST_TEXTS]}
    starts = [samples.start(sample) for sample in indices]
    return row | {"batch": index, "sample_starts": starts, "micro_batches_not_finite": bad, "text": texts}


def refuse_differing_replicas(digests: list[str], step: int) -> None:
    """Replicas that were given the same gradients have the same weights, or the arithmetic of one is broken.

    Args:
        digests: ``SHARD:SHA256`` of each process's weights, by rank.

    Raises:
        NumbersError: two that hold the same shard differ; named are those that are not like most.
    """
    odd = []
    for shard in {digest.partition(":")[0] for digest in digests}:
        same = [(rank, digest) for rank, digest in enumerate(digests) if digest.partition(":")[0] == shard]
        usual, count = Counter(digest for _, digest in same).most_common(1)[0]
        differing = [rank for rank, digest in same if digest != usual]
        odd += (
            [f"rank {rank}" for rank in differing]
            if 2 * count > len(same)
            else [f"ranks {[r for r, _ in same]}"] * bool(differing)
        )
    if odd:
        cause = f"after step {step} the weights of {', '.join(sorted(odd))} are not those of the others"
        fix = "go back to the last checkpoint: give the same command again; if it comes back, suspect that machine's memory"
        raise NumbersError("replicas differ", where="weights", cause=cause, fix=fix)
