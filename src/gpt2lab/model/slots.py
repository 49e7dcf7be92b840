"""Keys and values of many texts in tensors whose shapes never change: a step of decoding is then always the same work.

A GPU is asked for that work once, as a CUDA graph, and does it again and again. So nothing here depends on what a tensor
holds: where a text stands is a number on the device, and no shape and no branch asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gpt2lab.model.attend import visible
from gpt2lab.model.cache import Cache, KVCache

ALIGNED = 16
"""A ring's length is a multiple of so many tokens: fused kernels read a mask in pieces of 16 bytes."""

New = Float[Tensor, "slot kv_head 1 dim"]


class Ring:
    """One layer's keys and values: position p stands in place ``p % length``, and takes it from position ``p - length``.

    Without a window there are as many places as positions, and nothing is ever lost.

    Args:
        shape: (slot, kv_head, length, dim).
        window: tokens each token may see, itself included: no more than stand here, or than there can be. None: all.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], window: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, not whatever was there: a masked value weighs 0, and 0 * NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.window, self.length = window, shape[2]

    def held(self, positions: Int[Tensor, " slot"], places: int) -> Int[Tensor, "slot place"]:
        """The position that stands in each of the first `places` of texts that are at `positions`; below 0 where none does."""
        newest = positions[:, None]
        return newest - (newest - torch.arange(places, device=positions.device)) % self.length

    def put(self, slot: int, layer: KVCache) -> None:
        """Take over as much of the only text of a cache as there is room for."""
        first = max(layer.start, layer.length - self.length)
        held, skipped = layer.length - layer.start, first - layer.start
        places = torch.arange(first, layer.length, device=self.keys.device) % self.length
        for ours, theirs in ((self.keys, layer.keys), (self.values, layer.values)):
            ours[slot].index_copy_(1, places, theirs.read(held, ours.dtype)[0, :, skipped:])


class Slots:
    """Room for `count` texts of up to `capacity` tokens. A slot holds one text, or none and does no harm.

    Args:
        like: a cache of the model's, whose layers say their heads, windows and type; not one of int8.
        limit: tokens that the model has positions for; `capacity` is never more. None: any number.

    Attributes:
        positions: of the token that each text reads next: so many were read.
        ends: where each text stands still; (slot). A step that was asked for too much reads its last token once more.
    """

    def __init__(self, like: Cache, count: int, capacity: int, limit: int | None = None) -> None:
        self.like, self.count, self.limit = like, count, limit
        self.capacity = capacity = capacity if limit is None else min(capacity, limit)
        self.rings: list[Ring] = []
        for layer in like:
            numbers, window = layer.keys.tensors["numbers"], layer.window
            length = capacity if window is None else min(capacity, -(-window // ALIGNED) * ALIGNED)
            shape = (count, numbers.shape[1], length, numbers.shape[3])
            self.rings.append(Ring(shape, window, numbers.dtype, numbers.device))
        self.positions = torch.zeros(count, dtype=torch.long, device=self.rings[0].keys.device)
        self.ends = torch.zeros_like(self.positions)

    def put(self, slot: int, cache: Cache, end: int) -> None:
        """Let a text go on from what its cache holds, up to and with position `end`.

        Raises:
            ValueError: it does not fit.
        """
        if not cache.length <= end or cache.length >= self.capacity:
            raise ValueError(f"{cache.length} tokens, to end at position {end}, in slots of {self.capacity}")
        for ring, layer in zip(self.rings, cache.layers, strict=True):
            ring.put(slot, layer)
        self.positions[slot], self.ends[slot] = cache.length, end

    def free(self, slot: int) -> None:
        """Empty a slot: from now on it reads some token at position 0, which sees itself alone."""
        self.positions[slot] = self.ends[slot] = 0

    def advance(self, count: int) -> None:
        """The first `count` texts have read a token each."""
        positions = self.positions[:count]
        positions.copy_(torch.minimum(positions + 1, self.ends[:count]))

    def resized(self, count: int, capacity: int) -> Slots:
        """A larger copy. A ring that grows has not gone round: it was as long as the longest text could be."""
        larger = Slots(self.like, count, capacity, self.limit)
        for new, old in zip(larger.rings, self.rings, strict=True):
            new.keys[: self.count, :, : old.length] = old.keys
            new.values[: self.count, :, : old.length] = old.values
        larger.positions[: self.count], larger.ends[: self.count] = self.positions, self.ends
        return larger

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values, in bytes."""
        return sum(ring.keys.nbytes + ring.values.nbytes for ring in self.rings)


@dataclass(frozen=True)
class Reads:
    """What layers of one window read alike.

    Attributes:
        places: how many; the first of each ring.
        place: where the new token goes; (slot).
        mask: 0 where a query may look, minus infinity where not.
    """

    places: int
    place: Int[Tensor, " slot"]
    mask: Float[Tensor, "slot 1 1 place"]


class StaticCache:
    """One new token for each of the first `count` texts: what a forward pass goes on with (as HF's of that name).

    Args:
        bucket: none of these texts has a position of so much or more. It bounds what is read of layers without a window;
            one with a window reads its ring, however long the text.
    """

    def __init__(self, slots: Slots, count: int, bucket: int) -> None:
        self.positions, self.bucket = slots.positions[:count], bucket
        alike: dict[tuple[int, int | None], Reads] = {}
        rows = torch.arange(count, device=self.positions.device)
        self.layers: list[StaticLayer] = []
        for ring in slots.rings:
            kind = (ring.length, ring.window)
            if kind not in alike:
                alike[kind] = self._reads(ring)
            self.layers.append(StaticLayer(ring.keys[:count], ring.values[:count], rows, alike[kind]))

    def _reads(self, ring: Ring) -> Reads:
        places = min(self.bucket, ring.length)
        held = ring.held(self.positions, places)
        seen = visible(self.positions[:, None], held, ring.window) & (held >= 0)[:, None]
        # A mask of numbers, made once for all layers: from a boolean one each layer would make its own.
        mask = torch.zeros(seen.shape, dtype=ring.keys.dtype, device=held.device).masked_fill(~seen, -torch.inf)
        return Reads(places, self.positions % ring.length, mask[:, None])

    def length_after(self, time: int) -> int:
        """What no text is longer than, once the new token is read.

        Raises:
            ValueError: more than one token is new.
        """
        if time != 1:
            raise ValueError(f"{time} new tokens; texts in slots go on with one")
        return self.bucket

    def places(self, time: int, device: torch.device) -> Int[Tensor, "slot 1"]:
        """Where the new tokens stand, each in its text."""
        return self.positions[:, None]


class StaticLayer:
    """One layer of it."""

    def __init__(
        self,
        keys: Float[Tensor, "slot kv_head length dim"],
        values: Float[Tensor, "slot kv_head length dim"],
        rows: Int[Tensor, " slot"],
        reads: Reads,
    ) -> None:
        self.keys, self.values, self.rows, self.reads = keys, values, rows, reads

    def attend(self, q: Float[Tensor, "slot head 1 dim"], k: New, v: New) -> Float[Tensor, "slot head 1 dim"]:
        """Remember `k` and `v` where their texts stand; what each query finds in its text."""
        reads = self.reads
        self.keys[self.rows, :, reads.place] = k[:, :, 0].to(self.keys.dtype)
        self.values[self.rows, :, reads.place] = v[:, :, 0].to(self.values.dtype)
        # Heads that share a key head become its queries: no kernel has to know of groups, and none copies keys for them.
        # A mask leaves the flash kernel for the memory-efficient one or cuDNN's; all read the keys where they lie (assumed).
        groups = q[:, :, 0].unflatten(1, (k.shape[1], -1))
        keys, values = (x[:, :, : reads.places].to(q.dtype) for x in (self.keys, self.values))
        out = F.scaled_dot_product_attention(groups, keys, values, reads.mask.to(q.dtype))
        return out.flatten(1, 2)[:, :, None]
