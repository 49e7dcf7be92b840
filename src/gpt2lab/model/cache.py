"""Keys and values of the tokens already read, so that each new token is computed once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

ROLLBACK = 32
"""Tokens that a windowed cache can always take back, counted from the furthest it has been."""


class KVCache:
    """One layer's keys and values, in the order of their positions.

    ``append`` alone advances it and ``truncate`` rolls it back. A layer without a window keeps every token. A windowed
    layer keeps the tokens its window can still reach, and enough before them to take back `ROLLBACK` tokens.

    Attributes:
        length: tokens appended so far; the next one's position.
        start: the position of the oldest token held.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # What a later query may look back at after a rollback, and as much room again to make moving it rare.
        self.reach = capacity if window is None else window - 1 + ROLLBACK
        slots = min(capacity, self.reach + 1 + ROLLBACK)
        shape = (batch_size, num_kv_heads, slots, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.window, self.capacity = window, capacity
        self.start = self.length = 0

    def append(
        self, k: Float[Tensor, "batch kv_head time dim"], v: Float[Tensor, "batch kv_head time dim"]
    ) -> tuple[Float[Tensor, "batch kv_head key dim"], Float[Tensor, "batch kv_head key dim"], int]:
        """Remember `k` and `v`; return all that their queries may need, and the position of the first of it.

        Raises:
            ValueError: another batch size, or more tokens than the capacity asked for.
        """
        if k.shape[0] != self.keys.shape[0]:
            raise ValueError(f"a batch of {k.shape[0]} does not go on with a cache of {self.keys.shape[0]}")
        new_length = self.length + k.shape[2]
        if new_length > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {new_length} do not fit")
        held = self.length - self.start
        if new_length - self.start <= self.keys.shape[2]:
            self.keys[:, :, held : held + k.shape[2]] = k
            self.values[:, :, held : held + k.shape[2]] = v
            self.length = new_length
            held = new_length - self.start
            return self.keys[:, :, :held].to(k.dtype), self.values[:, :, :held].to(v.dtype), self.start
        # The slots are used up: these queries see everything once more, then only the reachable tail is kept.
        start = self.start
        k = torch.cat([self.keys[:, :, :held].to(k.dtype), k], dim=2)
        v = torch.cat([self.values[:, :, :held].to(v.dtype), v], dim=2)
        kept = min(self.reach, k.shape[2])
        self.keys[:, :, :kept], self.values[:, :, :kept] = k[:, :, -kept:], v[:, :, -kept:]
        self.start, self.length = new_length - kept, new_length
        return k, v, start

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises:
            ValueError: `length` lies ahead, or so far back that tokens a window needs are already gone.
        """
        self.check_truncate(length)
        self.length = length

    def check_truncate(self, length: int) -> None:
        """Raise what `truncate` would."""
        oldest_needed = 0 if self.window is None else max(0, length - self.window + 1)
        if not 0 <= length <= self.length or oldest_needed < self.start:
            raise ValueError(f"cannot roll back to {length} tokens: the cache holds {self.start} to {self.length}")

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.keys.nbytes + self.values.nbytes


class Cache:
    """The caches of all layers; made by ``GPT2.new_cache``."""

    def __init__(self, layers: list[KVCache]) -> None:
        self.layers = layers

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self.layers)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, in all layers or, with a ValueError, in none."""
        for layer in self.layers:
            layer.check_truncate(length)
        for layer in self.layers:
            layer.truncate(length)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.nbytes for layer in self.layers)
