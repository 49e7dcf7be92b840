"""A stream on disk: blocks of equal length, each a shard, and the journal of where in the source each begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from gpt2lab.data.shard_writer import ShardWriter
from gpt2lab.data.stream.reading import Place
from gpt2lab.data.tokenise import Tokens
from gpt2lab.tokenizer import Tokenizer


@dataclass(frozen=True)
class Block:
    """A stretch of the stream.

    Attributes:
        number: from 0 on.
        place: of its first id.
        file: that this is in.
        sha256: of its ids, as in the header of the shard.
        next: the place of its last id, which is the first of the next block.
    """

    number: int
    place: Place
    file: str
    sha256: str
    next: Place

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """What `to_dict` gave."""
        return cls(**row | {"place": Place(**row["place"]), "next": Place(**row["next"])})


def block_path(folder: Path, number: int) -> Path:
    """Where a block lies."""
    return folder / f"block-{number:08d}.bin"


def write_blocks(
    text: Iterable[tuple[Place, Tokens]],
    tokenizer: Tokenizer,
    folder: Path,
    length: int,
    first: int,
    file_at: Callable[[Place], str],
    wait: Callable[[int], object],
) -> Iterator[Block]:
    """Cut an endless text into blocks of ``length + 1`` ids, so that the target of the last of `length` ids is there, too.

    Args:
        text: from the first block's place on.
        first: the number of that block.
        file_at: the name of the file at a place.
        wait: returns when a block of this number may be written.

    Yields:
        Each block when it is on the disk.
    """
    number, start, writer = first, Place(), None
    with ExitStack() as unfinished:
        for place, part in text:
            counted = False
            while len(part.ids):
                if writer is None:
                    wait(number)
                    start = place
                    writer = unfinished.enter_context(ShardWriter(block_path(folder, number), tokenizer))
                ids = part.ids[: length + 1 - writer.tokens]
                ends = len(ids) == len(part.ids) and not counted
                writer.add(ids, part.bytes if ends else 0, documents=int(ends and part.last), scored=part.scored)
                counted |= ends
                if writer.tokens <= length:
                    break
                place = replace(place, ids=place.ids + len(ids) - 1)
                part = replace(part, ids=part.ids[len(ids) - 1 :])
                yield Block(number, start, file_at(start), writer.finish().sha256, place)
                unfinished.pop_all()
                number, writer = number + 1, None


class Journal:
    """What became of a stream: a row for each block and for each file that was read to its end.

    Attributes:
        path: of the file that holds the rows; None: they are kept in memory alone.
        blocks: by their number.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.blocks: dict[int, Block] = {}
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path and path.exists() else []:
            if line.endswith("\n") and "sha256" in (row := json.loads(line)):
                self.blocks[row["number"]] = Block.from_dict(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write down a row, unless it is there."""
        if "sha256" in row:
            if row["number"] in self.blocks:
                return
            self.blocks[row["number"]] = Block.from_dict(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def before(self, number: int) -> Block | None:
        """The last block before that one of which it is known where it ends."""
        return self.blocks.get(max((n for n in self.blocks if n < number), default=-1))
