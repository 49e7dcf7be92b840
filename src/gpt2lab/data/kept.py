"""Copies of what comes only once or from far away, for the second reading: in one file without a name, which ends with the
process, however that ends."""

from __future__ import annotations

import io
import os
import tempfile
import weakref
from typing import TYPE_CHECKING, BinaryIO

from gpt2lab.data.remote import RemoteFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ROOM = 2**30
"""Bytes of remote files that are kept."""
_BLOCK = 2**20


class Kept:
    """Copies, one behind the other in one file on disk. They are read one at a time, by one thread."""

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._copies: dict[RemoteFile, tuple[int, int]] = {}

    def open(self, remote: RemoteFile) -> BinaryIO:
        """A remote file's copy, made now if there is none; or itself, where there is no room for it.

        Raises:
            DataError: it cannot be had.
        """
        if remote not in self._copies:
            stream = remote.open()
            stream.peek(1)  # now its length is known
            taken = sum(size for _, size in self._copies.values())
            if remote.length is None or taken + remote.length > ROOM:
                return stream
            with stream:
                self._copies[remote] = self.add(stream)
        return self.read(*self._copies[remote])

    def add(self, stream: BinaryIO) -> tuple[int, int]:
        """Copy a stream to its end; where the copy lies, for `read`."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, os.SEEK_END)
        while data := stream.read(_BLOCK):
            self._file.write(data)
        return start, self._file.tell() - start

    def read(self, start: int, size: int) -> BinaryIO:
        """A copy as a file of its own."""
        assert self._file is not None
        return io.BufferedReader(_Part(self._file, start, size))


class _Part(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place; it may be beyond the end."""
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with what comes next; 0 at the end."""
        view = memoryview(buffer).cast("B")
        self._file.seek(self._start + self._at)
        data = self._file.read(min(len(view), max(0, self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
