"""One step of decoding for many texts, the choice of the token included, that never waits for what it computes.

On a GPU it is captured once as a CUDA graph for each bucket of texts and lengths, and launched again and again: hundreds of
kernels for one call, and many steps behind one another before anybody looks at a token. On a CPU the same code runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.generation.filters import distribution
from gpt2lab.generation.sampling import Sampler, draw
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.model.slots import Slots, StaticCache

SMALLEST_BUCKET = 256
"""Tokens that are read at the least; buckets are its doubles, since a kernel may have to be planned for each length."""
NOT_FINITE = -2
"""Stands for a token where a logit is NaN or infinite: only the host can raise."""
WARM_UPS = 3
"""Runs before a capture: libraries choose kernels and take memory in the first."""
MOST_COMPILED = 256
"""Graphs that torch.compile may make of one model: one for each pair of buckets."""

Logits = Float[Tensor, "slot vocab"]
Launch = Callable[[], Logits]


class Step:
    """Reads the newest token of each text in `slots` and chooses the next.

    Args:
        model: in eval mode.
        compiled: whether torch.compile fuses the model's kernels; slower to start, and in need of a compiler.

    Attributes:
        slots: where the texts are.
        token_ids: the newest token of each text, which is read next, or below 0 where none was possible; (slot).
    """

    def __init__(self, model: GPT2, *, compiled: bool = False) -> None:
        self.model, self.compiled = model, compiled
        self.forward: Callable[..., Tensor] = torch.compile(model, dynamic=False) if compiled else model
        self.slots = Slots(model.new_cache(1, 1), 1, SMALLEST_BUCKET, model.max_seq_len if self._learned else None)
        self.token_ids = torch.zeros(1, dtype=torch.long, device=model.device)
        self.numbers = torch.zeros(1, dtype=torch.float64, device=model.device)
        self.launches: dict[tuple[int, int, Sampler | None], Launch] = {}
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    @property
    def _learned(self) -> bool:
        return self.model.position_embedding is not None

    def reserve(self, count: int, capacity: int) -> None:
        """Make room for so many texts of so many tokens; what was captured before reads the old memory, and is forgotten."""
        slots = self.slots
        if count > slots.count or capacity > slots.capacity:
            count = max(slots.count, doubled(1, count))
            self.launches.clear()
            self.slots = slots.resized(count, max(slots.capacity, doubled(SMALLEST_BUCKET, capacity)))
            new = (0, count - slots.count)
            self.token_ids, self.numbers = F.pad(self.token_ids, new), F.pad(self.numbers, new)

    def run(
        self, samplers: Sequence[Sampler | None], numbers: Float[Tensor, "step slot"], longest: int
    ) -> Int[Tensor, "step slot"]:
        """Go on with every text by as many tokens as there are rows of `numbers`; nothing is waited for.

        Args:
            samplers: how the tokens of each slot are drawn; None: nobody asks for them.
            numbers: in [0, 1), what decides them.
            longest: tokens of the longest text at the end, of those that are read.

        Returns:
            The tokens that were chosen; `BANNED` or `NOT_FINITE` instead of one.
        """
        self.reserve(len(samplers), longest)
        count, bucket = doubled(1, len(samplers)), min(doubled(SMALLEST_BUCKET, longest), self.slots.capacity)
        distinct = [sampler for sampler in dict.fromkeys(samplers) if sampler is not None]
        # Where all are drawn alike, it is part of the graph. If not, kernels for each way follow it, and nobody waits either.
        alike = distinct[0] if len(distinct) == 1 else None
        slots = {
            sampler: [s for s, its in enumerate(samplers) if its == sampler] for sampler in distinct if alike is None
        }
        members = {sampler: torch.tensor(its, device=self.token_ids.device) for sampler, its in slots.items()}
        launch = self._launch(count, bucket, alike)
        chosen = self.token_ids.new_zeros(numbers.shape)
        for step, numbers_now in enumerate(numbers.to(self.token_ids.device)):
            self.numbers[: len(samplers)].copy_(numbers_now)
            logits = launch()
            for sampler, its in members.items():
                self.token_ids[its] = choose(sampler, logits[its], self.numbers[its])
            chosen[step] = self.token_ids[: len(samplers)]
        return chosen

    def once(self, count: int, bucket: int, sampler: Sampler | None) -> Logits:
        """One step of the first `count` texts; without a sampler nothing is chosen. Shapes say all that it does."""
        token_ids = self.token_ids[:count]
        logits = self.forward(token_ids.clamp(min=0)[:, None], cache=StaticCache(self.slots, count, bucket))[:, 0]
        self.slots.advance(count)
        if sampler is not None:
            token_ids.copy_(choose(sampler, logits, self.numbers[:count]))
        return logits

    def _launch(self, count: int, bucket: int, sampler: Sampler | None) -> Launch:
        """What does `once`; on a GPU, a graph of it."""
        if self.pool is None:
            return lambda: self.once(count, bucket, sampler)
        key = (count, bucket, sampler)
        if key not in self.launches:
            many = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED) if self.compiled else nullcontext()
            with torch.cuda.device(self.model.device), many:
                self.launches[key] = self._capture(lambda: self.once(count, bucket, sampler))
        return self.launches[key]

    def _capture(self, once: Launch) -> Launch:
        """A graph of one step. All graphs share their memory: one runs at a time, and its logits are used before the next."""
        state = (self.token_ids, self.slots.positions)
        before = [x.clone() for x in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                once()  # from the same place each time: it writes the keys that the step itself will write
                for x, old in zip(state, before, strict=True):
                    x.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits = once()

        def launch() -> Logits:
            graph.replay()
            return logits

        return launch


def choose(sampler: Sampler, logits: Logits, numbers: Float[Tensor, " slot"]) -> Int[Tensor, " slot"]:
    """What ``Sampler.choose`` chooses, without waiting: where it would raise, the token is `NOT_FINITE`."""
    if sampler.greedy:
        chosen = logits.argmax(-1)
    else:
        limits = sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p
        chosen = draw(distribution(logits, *limits), numbers)
    return chosen.masked_fill(~(logits.amax(-1) < torch.inf), NOT_FINITE)


def doubled(smallest: int, needed: int) -> int:
    """`smallest`, doubled until it is enough."""
    return smallest << max(0, -(-needed // smallest) - 1).bit_length()
