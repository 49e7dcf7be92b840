"""The memory of a cache: numbers by token, written once and read often, whole or in eight bits."""

from __future__ import annotations

from functools import cached_property
from itertools import repeat

import torch
from jaxtyping import Float, Int
from torch import Tensor

Shape = tuple[int, int, int, int]
New = Float[Tensor, "batch kv_head time dim"]


class Stored:
    """Room for the numbers of so many tokens, in one floating-point type.

    Args:
        shape: (batch, kv_head, slots, dim); a slot is a token's.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tensors = {"numbers": torch.zeros(shape, dtype=dtype, device=device)}

    @property
    def shape(self) -> torch.Size:
        """(batch, kv_head, slots, dim)."""
        return self.tensors["numbers"].shape

    @property
    def dtype(self) -> torch.dtype:
        """What the numbers are kept in."""
        return self.tensors["numbers"].dtype

    def write(self, slot: int, x: New) -> None:
        """Put `x` into the slots from `slot` on."""
        self.tensors["numbers"][:, :, slot : slot + x.shape[2]] = x

    def read(self, slots: int, dtype: torch.dtype) -> New:
        """What the first `slots` hold; what is already of that type is not copied."""
        return self.tensors["numbers"][:, :, :slots].to(dtype)

    def move(self, begin: int, end: int) -> None:
        """Copy what the slots from `begin` to `end` hold into the first ones."""
        for x in self.tensors.values():
            x[:, :, : end - begin] = x[:, :, begin:end].clone()

    @cached_property
    def addresses(self) -> list[tuple[int, int]]:
        """Of each text of the batch, where its numbers begin and where their scales; 0: they have none."""
        begins = {name: [row.data_ptr() for row in x] for name, x in self.tensors.items()}
        return list(zip(begins["numbers"], begins.get("scales", repeat(0)), strict=False))

    def __getstate__(self) -> dict[str, dict[str, Tensor]]:
        """A copy's numbers lie elsewhere."""
        return {"tensors": self.tensors}

    def resized(self, slots: int, held: int) -> Stored:
        """A larger copy, with what the first `held` slots hold."""
        larger = object.__new__(type(self))
        larger.tensors = {name: x.new_zeros(*x.shape[:2], slots, x.shape[3]) for name, x in self.tensors.items()}
        for name, x in self.tensors.items():
            larger.tensors[name][:, :, :held] = x[:, :, :held]
        return larger

    def select(self, rows: Int[Tensor, " row"]) -> Stored:
        """A copy with these texts of the batch, in this order."""
        chosen = object.__new__(type(self))
        chosen.tensors = {name: x.index_select(0, rows.to(x.device)) for name, x in self.tensors.items()}
        return chosen

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.nbytes for x in self.tensors.values())


class StoredInt8(Stored):
    """The same in eight bits: a token's numbers in a head share a scale, their largest over 127."""

    def __init__(self, shape: Shape, device: torch.device | str) -> None:
        super().__init__(shape, torch.int8, device)
        self.tensors["scales"] = torch.zeros((*shape[:3], 1), dtype=torch.float32, device=device)

    def write(self, slot: int, x: New) -> None:
        scales = x.float().abs().amax(dim=-1, keepdim=True) / 127
        slots = slice(slot, slot + x.shape[2])
        self.tensors["numbers"][:, :, slots] = (x / scales.clamp(min=1e-30)).round().to(torch.int8)
        self.tensors["scales"][:, :, slots] = scales

    def read(self, slots: int, dtype: torch.dtype) -> New:
        return (super().read(slots, torch.float32) * self.tensors["scales"][:, :, :slots]).to(dtype)


def store(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> Stored:
    """Room of a type: int8 has scales, any other holds the numbers themselves."""
    return StoredInt8(shape, device) if dtype == torch.int8 else Stored(shape, dtype, device)
