"""Sums of gradients that have the same bits on any number of processes, with any strategy (``--system.exact``).

Floats give other last bits when they are added in another order, integers do not. The gradient of each pass is turned into
whole numbers of `UNIT`; these are added up, over passes and processes, and their sum is rounded to fp32 once. A pass gives
the same gradient wherever it is computed, provided that it is added to nothing before it gets here.

A gradient of 2**-27 (7e-9) or more is a whole number of units as it is, and loses nothing. A smaller one is off by half a
unit at most, which moves a weight by no more than 4e-8 of the learning rate: Adam divides by at least its eps, 1e-8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor

UNIT = 2.0**-50
LARGEST = 2.0**12
"""What the gradient of one weight may come to in a step: 2**62 units, so that int64 never wraps. Each pass has its share."""
PIECE = 2**19
"""Numbers worked on at a time: what lies between them and their sum takes little memory, and stays in the cache."""


class WholeSums:
    """Sums of the gradients of weights that this process holds as a whole.

    Args:
        passes: of which a step is made, in all processes together.

    Attributes:
        last: whether the next pass is the last one of the step. Only shards need to know.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        self.last, self._passes = True, passes
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sizes = [p.numel() for p in self._parameters]
        self._sum = torch.zeros(sum(self._sizes) + 1, dtype=torch.int64, device=self._parameters[0].device)

    def add(self) -> None:
        """Take in the gradients of a pass, and leave none behind; a weight without one counts as zero."""
        *sums, misfits = self._sum.split([*self._sizes, 1])
        for parameter, total in zip(self._parameters, sums, strict=True):
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                misfits += _misfit(gradient, self._passes)
                _add_units(total, gradient)
                parameter.grad = None

    def combine(self) -> None:
        """Put the sum over all passes and processes into each weight's `grad`: NaN everywhere if a number did not fit."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sum)
        *sums, misfits = self._sum.split([*self._sizes, 1])
        for parameter, total in zip(self._parameters, sums, strict=True):
            parameter.grad = torch.empty_like(parameter)
            _to_fp32(total, misfits, _local(parameter.grad).view(-1))
        self._sum.zero_()


class ShardedSums:
    """Sums of the gradients of weights that ``fully_shard`` has cut along their first dimension, over all processes.

    Each FSDP module, told to add and not to average, reduces its gradients as integers after every pass, and keeps its
    shard of the sum. FSDP is given zeros to add, and in the last pass the sum.

    Args:
        passes: of which a step is made, in all processes together.

    Attributes:
        last: whether the next pass is the last one of the step.
    """

    def __init__(self, model: nn.Module, passes: int) -> None:
        self.last, self._parts = True, []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                part = _ShardOfSum(self, passes)
                module.set_custom_reduce_scatter(part)
                self._parts.append(part)

    def add(self) -> None:
        """Nothing is left to do: the backward pass has added its gradients."""

    def combine(self) -> None:
        """See that each module gave its sum to FSDP, which has put it into each weight's `grad`."""
        assert self.last and all(part.given for part in self._parts), "a module had no gradient in the step's last pass"


class _ShardOfSum(ReduceScatter):
    """What an FSDP module does in place of a reduce-scatter of floats.

    Attributes:
        given: whether FSDP has all that was added so far.
    """

    def __init__(self, sums: ShardedSums, passes: int) -> None:
        self._sums, self._passes = sums, passes
        self._sum: Tensor | None = None
        self.given = True

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Add a pass; write zeros into FSDP's output, or in the last pass the sum.

        Args:
            input_tensor: the gradients of the module's weights, padded with zeros: a part for each process, in a row.
        """
        # Every process must learn that a number did not fit, so that count travels at the end of each part.
        parts = input_tensor.new_zeros((group.size(), output_tensor.numel() + 1), dtype=torch.int64)
        for part, gradient in zip(parts, input_tensor.view(group.size(), -1), strict=True):
            _add_units(part[:-1], gradient)
        parts[:, -1] = _misfit(input_tensor, self._passes)
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, list(parts), group=group)
        if self._sum is None:
            self._sum = torch.zeros_like(mine)
        assert self._sum.shape == mine.shape, "a weight had a gradient in one pass of a step, and none in another"
        self._sum += mine
        self.given = self._sums.last
        if self.given:
            _to_fp32(self._sum[:-1], self._sum[-1:], output_tensor)
            self._sum.zero_()
        else:
            output_tensor.zero_()


def make_sums(model: nn.Module, passes: int) -> WholeSums | ShardedSums:
    """What adds up the gradients of a model, once ``fully_shard`` has cut it where it will be.

    Args:
        passes: of which a step is made, in all processes together.
    """
    # The one shard of one process is whole, and FSDP would not reduce it.
    sharded = isinstance(model, FSDPModule) and dist.get_world_size() > 1
    return ShardedSums(model, passes) if sharded else WholeSums(model, passes)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients, in fp64, with the same bits however they are cut along their first dimension."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sums = torch.zeros(sum(map(len, gradients)), dtype=torch.float64, device=gradients[0].device)
    for rows, gradient in zip(sums.split([len(gradient) for gradient in gradients]), gradients, strict=True):
        local = _local(gradient)
        first = _first_row(gradient)
        rows[first : first + len(local)] = _row_squares(local)
    if isinstance(gradients[0], DTensor):
        # Of each row one process has the sum, and the others 0: no order can matter.
        dist.all_reduce(sums, group=gradients[0].device_mesh.get_group())
    return _sum_in_halves(sums).sqrt()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, in order of names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _misfit(gradient: Tensor, passes: int) -> Tensor:
    """1 when a number is not finite, or larger than a pass's share of `LARGEST`; else 0."""
    low, high = gradient.aminmax()  # NaN when one is
    share = LARGEST / passes
    return torch.logical_not((low >= -share) & (high <= share)).long()


def _add_units(total: Tensor, gradient: Tensor) -> None:
    """Add a gradient to a sum of units, in place. What does not fit becomes any integer: `_misfit` tells."""
    for units, values in zip(total.split(PIECE), gradient.reshape(-1).split(PIECE), strict=True):
        units += (values * (1 / UNIT)).round_().long()  # a power of two: nothing is lost before round


def _to_fp32(total: Tensor, misfits: Tensor, out: Tensor) -> None:
    """Write a sum of units as fp32, rounded once: the unit is a power of two. All NaN after misfits."""
    out.copy_(total).mul_(torch.where(misfits == 0, UNIT, torch.nan))


def _first_row(tensor: Tensor) -> int:
    """Where this process's rows begin in the whole tensor: shards are cut as torch.chunk cuts."""
    if not isinstance(tensor, DTensor):
        return 0
    return -(-len(tensor) // tensor.device_mesh.size()) * tensor.device_mesh.get_local_rank()


def _row_squares(gradient: Tensor) -> Tensor:
    """The sum of squares of each row (dim 0), in fp64."""
    rows = gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
    at_once = max(1, PIECE // rows.shape[1])
    return torch.cat([_sum_in_halves(piece.double().square_()) for piece in rows.split(at_once)])


def _sum_in_halves(values: Tensor) -> Tensor:
    """The sum over the last dimension, each half added to the other until one number is left.

    A library's own sum chooses its order by the whole shape: a row would count differently among fewer rows.
    """
    while (length := values.shape[-1]) > 1:
        half, odd = divmod(length, 2)
        halves = values[..., :half] + values[..., half : 2 * half]
        halves[..., :odd] += values[..., 2 * half :]
        values = halves
    return values.squeeze(-1)
