"""The bytes of one file, read forward: gzip, bzip2, xz and zstd are opened by what the file begins with, never by its name.

Memory is bounded, whatever the file says of itself: an archive that grows to more than 100 times its size ends where it
does (real text shrinks to a twentieth at most, zeros to a thousandth), and so does one that is damaged or cut off. What
came out before is the content; `Stream.problem` says why there is no more. A flipped bit may be found out as late as by
the checksum at an archive's end: then the content that came out before "damaged" was said may be wrong in places.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, Protocol

import zstandard

RATIO = 100
"""No archive may grow by more than this ..."""
FLOOR = 2**24
"""... once this many bytes have come out."""
DEPTH = 3
"""Archives inside one another."""
CHUNK = 2**16
_WINDOW = 2**27  # bytes that xz and zstd may look back; the most that their own tools use unasked
_STEP = 2**10  # damage costs what this much would give; and zstd, which knows no other limit, makes 32 MB of it at most


class _Decoder(Protocol):
    """One member of an archive, as in the modules bz2 and lzma."""

    def decompress(self, data: bytes, max_length: int) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Wrapped:
    """What zlib's and zstandard's decoders have in common."""

    _inner: Any

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)


class _Gunzip(_Wrapped):
    """zlib's decoder of gzip, with the interface of the others."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out: bytes = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = not self._inner.unconsumed_tail and len(out) < max_length
        return out


class _Unzstd(_Wrapped):
    """zstandard's decoder, with the interface of the others but for the limit: what one step gives is all it gives."""

    needs_input = True

    def __init__(self) -> None:
        self._inner = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return bytes(self._inner.decompress(data))


_DECODERS: dict[str, tuple[bytes, Callable[[], _Decoder]]] = {
    "gzip": (b"\x1f\x8b\x08", _Gunzip),
    "bzip2": (b"BZh", bz2.BZ2Decompressor),
    "xz": (b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW)),
    "zstd": (b"\x28\xb5\x2f\xfd", _Unzstd),
}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # after BZh and a digit: a text may begin with BZh
_LONGEST_MAGIC = 10
_ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, ValueError)


class Stream:
    """A file's content, unpacked, from its start to its end.

    Attributes:
        archives: what was opened, from the outside in, such as ``("gzip",)``.
        problem: why the content ends before its end; empty where it does not, and until it is met.
        file: the file itself.
        packed_bytes: how many of its bytes were read so far.
        bytes: how many of the content's were.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.archives: tuple[str, ...] = ()
        self.problem = ""
        self.packed_bytes = self.bytes = 0
        self._buffer = b""
        self._chunks = self._read_chunks(file)
        while kind := _archive(self.peek(_LONGEST_MAGIC)):
            if len(self.archives) == DEPTH:
                self._stop(f"archives inside one another, more than {DEPTH} deep")
                self.through(lambda chunks: iter(()))
                break
            self.archives += (kind,)
            self.through(partial(self._unpack, kind))
            self.through(self._bounded)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        data = self.peek(size)
        self._buffer = self._buffer[len(data) :]
        self.bytes += len(data)
        return data

    def peek(self, size: int) -> bytes:
        """What `read` would give, without going on."""
        if len(self._buffer) < size:
            parts, length = [self._buffer], len(self._buffer)
            for chunk in self._chunks:
                parts.append(chunk)
                length += len(chunk)
                if length >= size:
                    break
            self._buffer = b"".join(parts)
        return self._buffer[:size]

    def drain(self) -> int:
        """Read all that is left; how many bytes it was."""
        return sum(len(data) for data in iter(lambda: self.read(CHUNK), b""))

    def drain_packed(self) -> int:
        """Read all that is left of the file itself; how many bytes it has."""
        return self.packed_bytes + sum(len(data) for data in iter(lambda: self.file.read(CHUNK), b""))

    def through(self, step: Callable[[Iterator[bytes]], Iterator[bytes]]) -> None:
        """Let `step` change all that is still to be read."""
        ahead, self._buffer = self._buffer, b""
        self._chunks = step(chain([ahead], self._chunks) if ahead else self._chunks)

    def _stop(self, problem: str) -> None:
        self.problem = self.problem or problem  # an archive inside a damaged one is cut off too: the cause comes first

    def _read_chunks(self, file: BinaryIO) -> Iterator[bytes]:
        """The file in chunks of one size, also from a pipe that gives what it has: where a bomb ends must not depend on it."""
        while True:
            parts, missing = [], CHUNK
            while missing and (data := file.read(missing)):
                parts.append(data)
                missing -= len(data)
            if missing == CHUNK:
                return
            self.packed_bytes += CHUNK - missing
            yield b"".join(parts)

    def _unpack(self, kind: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The content of all members of an archive; zeros may stand between and after them."""
        members, decoder, given = 0, None, False
        for data in chunks:
            while data := data if decoder else data.lstrip(b"\0"):
                decoder = decoder or _DECODERS[kind][1]()
                step, data = data[:_STEP], data[_STEP:]
                try:
                    for out in _decode(decoder, step):
                        given = True
                        yield out
                except _ERRORS as error:
                    other = members and not given
                    self._stop(f"other bytes after the {kind} archive" if other else f"damaged {kind} archive: {error}")
                    return
                if decoder.eof:
                    data = decoder.unused_data + data
                    members, decoder, given = members + 1, None, False
        if decoder:
            self._stop(f"truncated {kind} archive")

    def _bounded(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        size = 0
        for chunk in chunks:
            size += len(chunk)
            beyond = size - max(FLOOR, RATIO * self.packed_bytes)
            yield chunk[: len(chunk) - max(0, beyond)]
            if beyond > 0:
                self._stop(f"decompression bomb: more than {RATIO} times its size")
                return


def _decode(decoder: _Decoder, data: bytes) -> Iterator[bytes]:
    """What a decoder makes of some bytes, in chunks."""
    while True:
        if out := decoder.decompress(data, CHUNK):
            yield out
        if decoder.eof or decoder.needs_input:
            return
        data = b""


def _archive(start: bytes) -> str:
    """The kind of archive that begins so, or an empty string."""
    for kind, (magic, _) in _DECODERS.items():
        if start.startswith(magic) and (kind != "bzip2" or start[4:10] in _BZIP2_BLOCKS):
            return kind
    return ""
