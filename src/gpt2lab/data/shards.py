"""The tokens of a prepared text, read as one long sequence of ids that are right or refused.

A split is ``train-00000.bin``, ``train-00001.bin`` ... What opening reads is small whatever the size: the head, the hashes and
the file's length must fit each other. The ids of a block are checked when the block is first read.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gpt2lab.data.shard_format import BLOCK_BYTES, HASH_BYTES, Layout, OpenFile, ShardHeader, shard_layout
from gpt2lab.errors import DataError, as_lab_error

_SCAN = 2**20  # ids


class ShardFile:
    """The ids of one file, of our format; others' are subclasses.

    Each read looks whether the file is still the one that was opened; when it is not, it is opened again, must say the
    same, and its blocks are checked again.

    Attributes:
        path: the file.
        layout: what it said when it was opened.
    """

    what = "damaged shard"

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, path.absolute()
        self._close: Callable[[], object] = lambda: None
        self.layout = self._open()

    @property
    def fix(self) -> str:
        """What to do when the file cannot be used."""
        return f"remove {self.path.parent} and prepare the text again"

    @property
    def header(self) -> ShardHeader:
        """What the file says of its ids."""
        return self.layout.header

    def read_layout(self, file: OpenFile) -> Layout:
        """Where its ids lie; what the file says of itself fits together.

        Raises:
            DataError: it does not.
        """
        return shard_layout(file)

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids `start` to `start + length - 1`, read-only, in the file's type.

        Raises:
            DataError: the file is not what it was, or these ids are not the ones that were written.
        """
        self._look()
        width = int(self.header.dtype[-1])
        at, size = start * width, length * width
        block_bytes = self.header.block_bytes or max(1, self.header.size)
        for block in range(at // block_bytes, -(-(at + size) // block_bytes)):
            if not self._checked[block]:
                self.check(block)
        return np.frombuffer(self._file.read(self.layout.start + at, size), self.header.dtype)

    def check(self, block: int) -> None:
        """Read a block and compare it with its hash, and its ids with the vocabulary.

        Raises:
            DataError: it is damaged, with the byte in the file.
        """
        header, hashes, first = self.header, self.layout.hashes, self.layout.start
        start = first + block * header.block_bytes
        end = first + min(header.size, (block + 1) * (header.block_bytes or header.size))
        digest, beyond = hashlib.sha256(), -1
        for at in range(start, end, BLOCK_BYTES):
            content = self._file.read(at, min(BLOCK_BYTES, end - at))
            digest.update(content)
            ids = np.frombuffer(content, header.dtype)
            if beyond < 0 and ids.max() >= header.vocab_size:
                beyond = at + int(np.argmax(ids >= header.vocab_size)) * ids.itemsize
        if hashes is not None and digest.digest() != hashes[block * HASH_BYTES : (block + 1) * HASH_BYTES]:
            raise self._file.damaged(f"bytes {start} to {end - 1} are not the ids that were written", start)
        if beyond >= 0:
            cause = f"there is an id beyond the vocabulary, which has {header.vocab_size}"
            raise self._file.damaged(cause, beyond)
        self._checked[block] = True

    def damage(self) -> Iterator[DataError]:
        """Everything that is wrong with the file, after reading all of it."""
        try:
            self._look()
        except DataError as error:
            yield error
            return
        for block in range(self.header.num_blocks):
            try:
                self.check(block)
            except DataError as error:
                yield error

    def _open(self) -> Layout:
        """Open the file, anew where it was open, with all its blocks unchecked."""
        self._close()
        self._stamp: tuple[int, ...] = ()  # of no file, so that nothing is read before all is well
        try:
            if not stat.S_ISREG(os.stat(self._place).st_mode):
                raise DataError(self.what, where=str(self.path), cause="it is not a file", fix=self.fix)
            handle = os.open(self._place, os.O_RDONLY)
        except OSError as error:
            raise as_lab_error(error) or self._gone(error) from None
        self._close = weakref.finalize(self, os.close, handle)
        self._file, stamp = OpenFile(self.path, handle, self.what, self.fix), _stamp(os.fstat(handle))
        try:
            layout = self.read_layout(self._file)
        except BaseException:
            self._close()
            raise
        self._checked, self._stamp = bytearray(layout.header.num_blocks), stamp
        return layout

    def _look(self) -> None:
        """Notice that the file was removed, replaced or written to since it was opened."""
        try:
            same = _stamp(os.stat(self._place)) == self._stamp
        except OSError as error:
            raise self._gone(error) from None
        if not same and (self._open() != self.layout or self.layout.hashes is None):
            self._stamp = ()
            raise DataError(self.what, where=str(self.path), cause="it was changed while it was in use", fix=self.fix)

    def _gone(self, error: OSError) -> DataError:
        return DataError(self.what, where=str(self.path), cause=error.strerror or str(error), fix=self.fix)


class Shards:
    """The tokens of one split as one long sequence, which is never held in memory.

    Attributes:
        headers: what each file says of itself.
        separator_first: whether end-of-text opens a document; in our shards it closes one.
    """

    separator_first = False

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = self._open(paths)
        self.headers = [file.header for file in self._files]
        self._ends = np.cumsum([header.tokens for header in self.headers])

    def _open(self, paths: Sequence[Path]) -> Sequence[ShardFile]:
        return [ShardFile(path) for path in paths]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._files else 0

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens."""
        return sum(header.bytes for header in self.headers)

    @property
    def documents(self) -> int:
        """Documents in all files."""
        return sum(header.documents for header in self.headers)

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids `start` to `start + length - 1` as a fresh int64 array.

        Raises:
            DataError: they are not the ones that were written, or a file is not the one that was opened.
        """
        if start < 0 or length < 0 or start + length > len(self):
            raise IndexError(f"ids {start} to {start + length - 1} of {len(self)}")
        out, filled = np.empty(length, np.int64), 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            offset = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            part = self._files[shard].read(offset, min(length - filled, self.headers[shard].tokens - offset))
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return out

    @cached_property
    def _prompts(self) -> np.ndarray:
        """First and last id (exclusive) of all prompts, one after the other."""
        starts = self._ends - [header.tokens for header in self.headers]
        found = [
            np.frombuffer(file.layout.prompts, "<u8").astype(np.int64) + start
            for file, start in zip(self._files, starts, strict=True)
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def scored(self, start: int, length: int) -> np.ndarray:
        """Which of these ids a model is to learn to write: all but those of prompts, as booleans."""
        if not len(self._prompts):
            return np.ones(length, bool)
        # Between the 2i-th and the next of these places lies a prompt.
        return np.searchsorted(self._prompts, np.arange(start, start + length), side="right") % 2 == 0

    def document_spans(self, end_of_text: int) -> Iterator[tuple[int, int]]:
        """Where each document starts, and how many ids it has, separators left out; memory is bounded however long they are.

        The last one may lack its end-of-text, as in files that were not made by us.
        """
        start = 0
        for at in range(0, len(self), _SCAN):
            ids = self.read(at, min(_SCAN, len(self) - at))
            for end in (np.flatnonzero(ids == end_of_text) + at).tolist():
                if end or not self.separator_first:
                    yield start, end - start
                start = end + 1
        if start < len(self) or (self.separator_first and start):
            yield start, len(self) - start

    @property
    def fix(self) -> str:
        """What to do when a file of them cannot be used."""
        return self._files[0].fix

    def damage(self) -> Iterator[DataError]:
        """Everything that is wrong with the files, after reading all of them."""
        for file in self._files:
            yield from file.damage()

    def verify(self) -> None:
        """Read everything once.

        Raises:
            DataError: the first thing that is wrong.
        """
        for error in self.damage():
            raise error

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and of the tokenizer that made them, by what the headers say."""
        return hashlib.sha256("".join(h.tokenizer + h.sha256 for h in self.headers).encode()).hexdigest()


def shard_path(folder: Path, split: str, index: int) -> Path:
    """Where a shard of a split lies."""
    return folder / f"{split}-{index:05d}.bin"


def damaged(path: Path, cause: str) -> DataError:
    """What to raise for a list of shards that cannot be used."""
    return DataError(
        "damaged shard", where=str(path), cause=cause, fix=f"remove {path.parent} and prepare the text again"
    )


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
