"""How a foreign format holds our weights, and the one walk that fills a model from it and the one that writes it out.

A format is a `Layout`: each of its tensors by name, and the `Slot` of ours that it is. The same layout is read in both
directions. Nothing is held in memory but the model itself: a tensor comes in a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.tokenizer import Tokenizer

CHUNK_BYTES = 16 * 2**20
EMBEDDING, HEAD = "token_embedding.weight", "head.weight"


@dataclass(frozen=True)
class Slot:
    """Where a foreign tensor belongs among ours.

    Attributes:
        ours: the name of our tensor.
        rows: first and last row (exclusive) of it, where they hold it in pieces (queries, keys, values); None: all.
        transposed: theirs has the input dimension first.
        scale: theirs is ours times this.
    """

    ours: str
    rows: tuple[int, int] | None = None
    transposed: bool = False
    scale: float = 1.0


Layout = dict[str, Slot]
"""A format: their names and our slots."""


@dataclass(frozen=True)
class Stored:
    """A tensor in somebody's file, which is read a few rows at a time.

    Attributes:
        name: theirs.
        shape: as the file states it; it is compared with ours before anything is read.
        read: ``read(start, stop)`` gives those rows, in whatever dtype they have.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Stored:
        """A tensor that is in memory already."""
        return cls(name, tuple(tensor.shape), lambda start, stop: tensor[start:stop])

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """The tensor as pieces of whole rows: first row, last row (exclusive), the rows."""
        row_bytes = 8 * max(1, torch.Size(self.shape[1:]).numel())
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, stop, self.read(start, stop)


@dataclass
class WeightMap:
    """What became of every tensor, by the names of the foreign format.

    Attributes:
        loaded: went in (or out) as they are; `transposed`: those that were turned on the way.
        cut: only a part was used: rows that pad a vocabulary.
        missing: nothing was found for them (an error, except where it is empty).
        left_over: hold nothing to learn from, each with the reason.
    """

    loaded: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)


@dataclass
class Imported:
    """A foreign model as ours.

    Attributes:
        notes: what its user should know, a sentence each.
    """

    model: GPT2
    tokenizer: Tokenizer
    map: WeightMap
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def fill(
    model: GPT2,
    layout: Layout,
    stored: Iterable[Stored],
    *,
    where: str,
    short: Callable[[str], str] = str,
    ignored: Callable[[str], str | None] = lambda name: None,
    padded: bool = False,
) -> WeightMap:
    """Put every tensor of a file into the model, which holds nothing yet (it is on the meta device).

    Args:
        short: their name without what wrappers put before it.
        ignored: the reason why a tensor of this (short) name holds nothing to learn from, or None.
        padded: whether the format fills its vocabulary up with rows that are no tokens; they are cut off.

    Raises:
        CheckpointError: tensors that are missing, twice there, of another shape, or not finite; the model is then spoilt.
    """
    found, problems, tied = WeightMap(), list[str](), None
    chosen: dict[str, Stored] = {}
    ours: dict[str, Tensor] = dict(model.named_parameters())
    for tensor in stored:
        name = short(tensor.name)
        slot = layout.get(name)
        if slot is None and name == "lm_head.weight":
            tied = tensor
        elif slot is None:
            found.left_over.append(f"{tensor.name} ({ignored(name) or 'no part of this model'})")
        elif name in chosen:
            problems.append(f"{name} is there twice, also as {tensor.name}")
        else:
            shape = tuple(_place(ours, slot, model.vocab_size).shape)
            if padded and is_embedding(slot.ours) and tensor.shape[1:] == shape[1:] and tensor.shape > shape:
                found.cut.append(f"{tensor.name} ({tensor.shape[0] - shape[0]} rows that pad the vocabulary)")
                tensor = Stored(tensor.name, shape, tensor.read)
            if tensor.shape != shape:
                problems.append(f"{tensor.name} is {tensor.shape}, not {shape}")
            chosen[name] = tensor
    found.missing = [name for name in layout if name not in chosen]
    _refuse(problems + [f"missing {name}" for name in found.missing], where)

    # Everything that the files claim is as it should be: only now is memory taken.
    model.to_empty(device="cpu")
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name in ours.keys() - {slot.ours for slot in layout.values()}:
        ours[name].zero_()  # a bias that the format does not have
    for name in filter(is_embedding, ours):
        ours[name][model.vocab_size :] = 0
    for name, tensor in chosen.items():
        slot = layout[name]
        if not _copy(tensor, _place(ours, slot, model.vocab_size), slot.scale):
            problems.append(f"{tensor.name} has numbers that are not finite")
        (found.transposed if slot.transposed else found.loaded).append(tensor.name)
    _refuse(problems, where)
    if tied is not None:
        if not _equal(tied, ours[EMBEDDING][: model.vocab_size]):
            _refuse([f"{tied.name} is not the token embedding, but this model's head is tied"], where)
        found.left_over.append(f"{tied.name} (tied to the token embedding)")
    return found


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError("weights do not fit", where=where, cause=shown, fix="give a complete model of that shape")


@torch.no_grad()
def pour(model: GPT2, layout: Layout) -> tuple[dict[str, Tensor], WeightMap]:
    """The tensors of a model as a foreign format holds them; the rows that pad the vocabulary are cut off."""
    ours, theirs, written = dict(model.named_parameters()), {}, WeightMap()
    for name, slot in layout.items():
        tensor = _place(ours, slot, model.vocab_size).detach() * slot.scale
        theirs[name] = tensor.float().contiguous().cpu()
        (written.transposed if slot.transposed else written.loaded).append(name)
        if is_embedding(slot.ours) and ours[slot.ours].shape[0] != model.vocab_size:
            written.cut.append(f"{name} ({ours[slot.ours].shape[0] - model.vocab_size} rows that pad the vocabulary)")
    used = {slot.ours for slot in layout.values()}
    written.left_over = [f"{name} (this format has no place for it)" for name in ours if name not in used]
    return theirs, written


def is_embedding(ours: str) -> bool:
    """Whether a tensor of ours has a row for each token, and rows after them that only pad."""
    return ours in (EMBEDDING, HEAD)


def _place(ours: Mapping[str, Tensor], slot: Slot, vocab_size: int) -> Tensor:
    """The part of our tensor that a slot names, as a view in their orientation."""
    tensor = ours[slot.ours]
    if is_embedding(slot.ours):
        tensor = tensor[:vocab_size]
    if slot.rows is not None:
        tensor = tensor[slice(*slot.rows)]
    return tensor.t() if slot.transposed else tensor


def _copy(source: Stored, target: Tensor, scale: float) -> bool:
    """Copy what is stored into `target`; whether all of it is finite."""
    finite = True
    for start, stop, rows in source.chunks():
        target[start:stop] = rows.float() / scale if scale != 1.0 else rows
        finite = finite and bool(target[start:stop].isfinite().all())
    return finite


def _equal(source: Stored, target: Tensor) -> bool:
    return source.shape == tuple(target.shape) and all(
        torch.equal(rows.float(), target[start:stop]) for start, stop, rows in source.chunks()
    )
