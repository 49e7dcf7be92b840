"""Writing a shard: ids come in as they are made, in memory that does not depend on its size.

It is written beside its place, hashed, given its header, synced, and renamed: one that was cut off half-way is never taken for
a whole one, and one that is finished stays whatever happens.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from gpt2lab.data.shard_format import BLOCK_BYTES, HEAD_BYTES, ShardHeader, dtype_for, head_bytes
from gpt2lab.data.shards import Shards
from gpt2lab.errors import DataError
from gpt2lab.paths import sync
from gpt2lab.tokenizer import Tokenizer


class ShardWriter:
    """One shard while it is written. The file is a function of its ids and counts alone, not of how they were handed over.

    A ``with`` statement removes at its end what was not finished.

    Args:
        path: its place, which it takes when it is finished.
        block_bytes: of ids behind one hash.

    Attributes:
        path: as given.
        tokens: ids in it so far, separators included.
        documents: that ended in it so far.
        bytes: of UTF-8 text behind the ids so far.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, *, block_bytes: int = BLOCK_BYTES) -> None:
        if block_bytes < 4 or block_bytes % 4:
            raise ValueError(f"blocks of {block_bytes} bytes")
        self.path, self._tokenizer, self._block_bytes = path, tokenizer, block_bytes
        self.tokens = self.documents = self.bytes = 0
        self._prompts: list[list[int]] = []
        self._dtype = np.dtype(dtype_for(tokenizer.vocab_size))
        self._aside = path.with_name(f"{path.name}.part")
        self._file = self._aside.open("w+b")
        self._file.write(bytes(HEAD_BYTES))

    def add(self, ids: np.ndarray, text_bytes: int, *, documents: int, scored: bool = True) -> None:
        """Append ids.

        Args:
            ids: end-of-text after each document that ends among them.
            text_bytes: of the text that became them.
            documents: that end among them.
            scored: whether a model is to learn to write them.

        Raises:
            ValueError: an id that the tokenizer does not have.
        """
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            raise ValueError(f"ids from {ids.min()} to {ids.max()}, of {self._tokenizer.vocab_size}")
        self._file.write(ids.astype(self._dtype).tobytes())
        if not scored and len(ids):
            goes_on = self._prompts and self._prompts[-1][1] == self.tokens
            start = self._prompts.pop()[0] if goes_on else self.tokens
            self._prompts.append([start, self.tokens + len(ids)])
        self.tokens, self.bytes, self.documents = (
            self.tokens + len(ids),
            self.bytes + text_bytes,
            self.documents + documents,
        )

    def finish(self) -> ShardHeader:
        """Add the hashes and the header, and put the file in its place for good; what it says of itself."""
        with self._file as file:
            file.seek(HEAD_BYTES)
            hashes = b"".join(
                hashlib.sha256(block).digest() for block in iter(lambda: file.read(self._block_bytes), b"")
            )
            end = hashes + np.array(self._prompts, "<u8").tobytes()
            file.write(end)
            header = ShardHeader(
                self._dtype.str,
                self.tokens,
                self.documents,
                self.bytes,
                self._tokenizer.vocab_size,
                self._tokenizer.fingerprint,
                hashlib.sha256(end).hexdigest(),
                self._block_bytes,
                len(self._prompts),
            )
            file.seek(0)
            file.write(head_bytes(header))
            file.flush()
            os.fsync(file.fileno())
        self._aside.replace(self.path)
        sync(self.path.parent)
        return header

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what is still in memory may not fit on the disk
            self._file.close()
        self._aside.unlink(missing_ok=True)


def finished_shard(path: Path, tokenizer: Tokenizer) -> ShardHeader | None:
    """What the shard at `path` says of itself if it is whole and of this tokenizer, else None; every byte of it is read."""
    try:
        shard = Shards([path])
        shard.verify()
    except DataError:
        return None
    return shard.headers[0] if shard.headers[0].tokenizer == tokenizer.fingerprint else None
