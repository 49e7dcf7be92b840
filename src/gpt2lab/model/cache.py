"""Keys and values of the tokens already read, so that each new token is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.model.attend import attend
from gpt2lab.model.stored import store

ROLLBACK = 32
"""Tokens that a windowed cache can always take back, counted from the furthest it has been."""
ONE_BY_ONE = 16
"""Up to so many new tokens are attended one by one on a CPU, as in decoding: what a draft is checked by are the same bits."""

KEPT_IN = (torch.float32, torch.bfloat16, torch.int8)
"""In the order of the numbers by which the loops of `step.cpp` know them."""

New = Float[Tensor, "batch kv_head time dim"]
Held = Float[Tensor, "batch kv_head key dim"]


class KVCache:
    """One layer's keys and values, in the order of their positions: every token is kept.

    ``append`` alone advances it and ``truncate`` rolls it back. The texts of a batch are of one length.

    Args:
        window: tokens each token may see, itself included; it bounds what is read, not what is kept. None: all.
        dtype: what they are kept in; int8 with a scale for each token and head.

    Attributes:
        capacity: tokens there is room for.
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
        shape = (batch_size, num_kv_heads, self.slots(capacity, window), head_dim)
        self.keys, self.values = store(shape, dtype, device), store(shape, dtype, device)
        self.window, self.capacity = window, capacity
        self.start = self.length = 0

    @staticmethod
    def slots(capacity: int, window: int | None) -> int:
        """Tokens that it holds at most."""
        return capacity

    def append(self, k: New, v: New) -> tuple[Held, Held, int]:
        """Remember `k` and `v`; return all that their queries may need, and the position of the first of it.

        Raises:
            ValueError: another batch size, or more tokens than the capacity asked for.
        """
        if k.shape[0] != self.keys.shape[0]:
            raise ValueError(f"a batch of {k.shape[0]} does not go on with a cache of {self.keys.shape[0]}")
        if self.length + k.shape[2] > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.length + k.shape[2]} do not fit")
        held = self.length - self.start
        self.keys.write(held, k)
        self.values.write(held, v)
        self.length += k.shape[2]
        held += k.shape[2]
        return self.keys.read(held, k.dtype), self.values.read(held, v.dtype), self.start

    def attend(self, q: Float[Tensor, "batch head time dim"], k: New, v: New) -> Float[Tensor, "batch head time dim"]:
        """What `q` finds among all that was appended, and `k` and `v`, which are appended now."""
        first, time = self.length, q.shape[2]
        k, v, k_start = self.append(k, v)
        if not 1 < time <= ONE_BY_ONE or q.device.type != "cpu":
            return attend(q, k, v, q_start=first, k_start=k_start, window=self.window)
        ends = range(k.shape[2] - time + 1, k.shape[2] + 1)
        singly = [
            attend(q_, k[:, :, :end], v[:, :, :end], q_start=k_start + end - 1, k_start=k_start, window=self.window)
            for q_, end in zip(q.split(1, dim=2), ends, strict=True)
        ]
        return torch.cat(singly, dim=2)

    def rooms(self, time: int) -> list[int]:
        """Where the loops of `step.cpp` append `time` tokens themselves: of each text of the batch its `Room`, in numbers.

        Raises:
            ValueError: more tokens than the capacity asked for.
        """
        self.make_room(time)
        about = (KEPT_IN.index(self.keys.dtype), self.keys.shape[2], self.length - self.start)
        rooms: list[int] = []
        for (keys, key_scales), (values, value_scales) in zip(self.keys.addresses, self.values.addresses, strict=True):
            rooms += (keys, values, key_scales, value_scales, *about)
        return rooms

    def make_room(self, time: int) -> None:
        """Have `time` more tokens, no more than `ROLLBACK`, fit behind those that are held.

        Raises:
            ValueError: more tokens than the capacity.
        """
        if self.length + time > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; {self.length + time} do not fit")

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on.

        Raises:
            ValueError: `length` lies ahead, or so far back that tokens a window needs are already gone.
        """
        self.check_truncate(length)
        self.length = length

    def check_truncate(self, length: int) -> None:
        """Raise what `truncate` would."""
        if not self.oldest_length <= length <= self.length:
            raise ValueError(f"cannot roll back to {length} tokens: the cache holds {self.start} to {self.length}")

    @property
    def oldest_length(self) -> int:
        """The shortest it can be rolled back to."""
        return 0

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, of which those read so far are kept."""
        if capacity > self.capacity:
            slots, held = self.slots(capacity, self.window), self.length - self.start
            self.keys, self.values = self.keys.resized(slots, held), self.values.resized(slots, held)
            self.capacity = capacity

    def select(self, rows: Int[Tensor, " row"]) -> KVCache:
        """A cache of its own with these texts of the batch, any of them as often as it is named."""
        chosen = object.__new__(type(self))
        chosen.__dict__ |= self.__dict__ | {"keys": self.keys.select(rows), "values": self.values.select(rows)}
        return chosen

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return self.keys.nbytes + self.values.nbytes


class WindowCache(KVCache):
    """One layer's, of which no more is kept than its window can still reach, also after `ROLLBACK` tokens are taken back."""

    window: int

    @staticmethod
    def slots(capacity: int, window: int | None) -> int:
        """What can be reached, one token more, and as much room again to make moving it rare."""
        assert window is not None
        return min(capacity, window - 1 + ROLLBACK + 1 + ROLLBACK)

    @property
    def reach(self) -> int:
        """Tokens that a later query may look back at after a rollback."""
        return self.window - 1 + ROLLBACK

    def make_room(self, time: int) -> None:
        """As in `KVCache`; where the slots are used up, what a query can still reach moves to the first of them."""
        super().make_room(time)
        held = self.length - self.start
        if held + time > self.keys.shape[2]:
            kept = min(self.reach, held)
            self.keys.move(held - kept, held)
            self.values.move(held - kept, held)
            self.start = self.length - kept

    def append(self, k: New, v: New) -> tuple[Held, Held, int]:
        """As in `KVCache`; of more tokens than there are slots, the tail is kept, and the queries see everything once more."""
        if k.shape[2] <= ROLLBACK:
            self.make_room(k.shape[2])
        if self.length + k.shape[2] - self.start <= self.keys.shape[2] or self.length + k.shape[2] > self.capacity:
            return super().append(k, v)
        held, start = self.length - self.start, self.start
        k = torch.cat([self.keys.read(held, k.dtype), k], dim=2)
        v = torch.cat([self.values.read(held, v.dtype), v], dim=2)
        kept = min(self.reach, k.shape[2])
        self.keys.write(0, k[:, :, -kept:])
        self.values.write(0, v[:, :, -kept:])
        self.length = start + k.shape[2]
        self.start = self.length - kept
        return k, v, start

    @property
    def oldest_length(self) -> int:
        """The shortest it can be rolled back to: what a window needs before that is gone."""
        return self.start + self.window - 1 if self.start else 0


class Cache:
    """The caches of all layers, for a batch of texts of one length; made by ``GPT2.new_cache``.

    Attributes:
        heads: of each layer, how many key heads there are and how wide.
    """

    def __init__(self, layers: list[KVCache]) -> None:
        self.layers = layers
        self.heads = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in layers]

    def __iter__(self) -> Iterator[KVCache]:
        return iter(self.layers)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self.layers[0].length

    @property
    def batch_size(self) -> int:
        """Texts in the batch."""
        return self.layers[0].keys.shape[0]

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.layers[0].capacity

    def length_after(self, time: int) -> int:
        """Tokens read once `time` more are."""
        return self.length + time

    def places(self, time: int, device: torch.device) -> Int[Tensor, " time"]:
        """Where the next `time` tokens stand."""
        return torch.arange(self.length, self.length + time, device=device)

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, in all layers or, with a ValueError, in none."""
        for layer in self.layers:
            layer.check_truncate(length)
        for layer in self.layers:
            layer.truncate(length)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens."""
        for layer in self.layers:
            layer.reserve(capacity)

    def select(self, rows: Int[Tensor, " row"]) -> Cache:
        """A cache of its own with these texts of the batch, any of them as often as it is named."""
        return Cache([layer.select(rows) for layer in self.layers])

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.nbytes for layer in self.layers)


class SideBySide:
    """Caches of several texts, each of its own length, that one forward pass goes on with, without padding.

    Their new tokens stand one after the other in a single row: all that treats tokens by themselves sees one long text,
    and attention goes from text to text.

    Args:
        caches: of one text each.
        counts: new tokens of each, in the order in which they will be given.
    """

    def __init__(self, caches: Sequence[Cache], counts: Sequence[int]) -> None:
        self.caches, self.counts = caches, list(counts)
        self.layers = [LayerSideBySide(layer, self.counts) for layer in zip(*caches, strict=True)]

    def length_after(self, time: int) -> int:
        """Tokens of the longest text, once the new ones are read.

        Raises:
            ValueError: there are not as many new ones as was said.
        """
        if time != sum(self.counts):
            raise ValueError(f"{time} tokens for texts that go on with {self.counts}")
        return max(cache.length + count for cache, count in zip(self.caches, self.counts, strict=True))

    def places(self, time: int, device: torch.device) -> Int[Tensor, " time"]:
        """Where the new tokens stand, each in its text."""
        ranges = (cache.places(count, device) for cache, count in zip(self.caches, self.counts, strict=True))
        return torch.cat(list(ranges))


class LayerSideBySide:
    """One layer of the caches of several texts."""

    def __init__(self, texts: Sequence[KVCache], counts: list[int]) -> None:
        self.texts, self.counts = texts, counts

    def attend(self, q: Float[Tensor, "batch head time dim"], k: New, v: New) -> Float[Tensor, "batch head time dim"]:
        """What each text's queries find in that text."""
        pieces = zip(self.texts, *(x.split(self.counts, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([text.attend(*piece) for text, *piece in pieces], dim=2)
