"""What a shard looks like, byte by byte, and whether a file is one.

A shard (format 2) is

    8 bytes       magic number and version
    32 bytes      sha256 of the rest of the head
    984 bytes     the header as JSON, filled up with spaces
    from 1024     the ids, little-endian uint16 or uint32: np.memmap(path, dtype, "r", 1024, (tokens,))
    after them    sha256 of each block of ids, 32 bytes each
    at the end    first and last id (exclusive) of each prompt, little-endian uint64; the header holds the sha256 of these two

Documents follow each other, each closed by the tokenizer's end-of-text. Format 1 had the length of its header in place of the
head's hash, and one hash for all ids; it is read as one block.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gpt2lab.errors import DataError, as_lab_error

MAGIC = b"gpt2lab\x02"
MAGIC_1 = b"gpt2lab\x01"
HEAD_BYTES = 1024
HASH_BYTES = 32
PROMPT_BYTES = 16
BLOCK_BYTES = 2**18
"""Small enough that the first sample from a block costs little, large enough that hashes are 1/8000 of the ids."""
_PROBES, _PROBE_BYTES = 16, 4096


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        dtype: of the ids, "<u2" or "<u4".
        tokens: ids in it, separators included.
        documents: documents that end in it.
        bytes: of UTF-8 text in these documents.
        vocab_size: every id is below it.
        tokenizer: its fingerprint.
        sha256: of the blocks' hashes and the prompts; in format 1 of the ids as they lie in the file.
        block_bytes: of ids behind one hash; 0: all of them (format 1).
        prompts: stretches of ids that are only read, and not learned to write.
    """

    dtype: str
    tokens: int
    documents: int
    bytes: int
    vocab_size: int
    tokenizer: str
    sha256: str
    block_bytes: int = 0
    prompts: int = 0

    @property
    def size(self) -> int:
        """Bytes of all its ids."""
        return self.tokens * int(self.dtype[-1])

    @property
    def num_blocks(self) -> int:
        """How many parts are checked on their own."""
        return -(-self.size // (self.block_bytes or max(1, self.size)))


@dataclass(frozen=True)
class Layout:
    """Where in a file its ids lie, and what they must be.

    Attributes:
        header: what is said of them.
        start: the byte of the first one.
        hashes: sha256 of each block, one after the other; None: nobody has written them down.
        prompts: first and last id (exclusive) of each, one after the other.
    """

    header: ShardHeader
    start: int
    hashes: bytes | None
    prompts: bytes = b""


@dataclass(frozen=True)
class OpenFile:
    """A file, open for reading by position, and what to say when it cannot be used.

    It is not mapped: a mapped file that is cut ends the process without a word, and what was read of it counts as memory.
    """

    path: Path
    handle: int
    what: str
    fix: str

    @property
    def size(self) -> int:
        """Its bytes now."""
        return os.fstat(self.handle).st_size

    def read(self, at: int, size: int) -> bytes:
        """Bytes `at` to `at + size - 1`.

        Raises:
            DataError: it ends before, or the disk cannot read it.
        """
        parts, missing = [], size
        while missing:
            place = at + size - missing
            try:
                part = os.pread(self.handle, missing, place)
            except OSError as error:
                raise as_lab_error(error) or self.damaged(error.strerror or str(error), place) from None
            if not part:
                raise self.damaged(f"it ends there; {missing} more bytes belong to it", place)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def probe(self) -> str:
        """A hash of its length and of some places in it, the first and the last among them."""
        digest, last = hashlib.sha256(str(self.size).encode()), max(0, self.size - _PROBE_BYTES)
        for place in sorted({last * number // (_PROBES - 1) for number in range(_PROBES)}):
            digest.update(self.read(place, min(_PROBE_BYTES, self.size)))
        return digest.hexdigest()

    def damaged(self, cause: str, byte: int) -> DataError:
        """What to raise."""
        return DataError(self.what, where=f"{self.path}, byte {byte}", cause=cause, fix=self.fix)


def head_bytes(header: ShardHeader) -> bytes:
    """The first bytes of a shard."""
    encoded = json.dumps(asdict(header)).encode().ljust(HEAD_BYTES - len(MAGIC) - HASH_BYTES)
    return MAGIC + hashlib.sha256(encoded).digest() + encoded


def dtype_for(vocab_size: int) -> str:
    """The type of the ids of a vocabulary."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def shard_layout(file: OpenFile) -> Layout:
    """Where the ids of one of our shards lie; its head, hashes and size fit each other.

    Raises:
        DataError: it is no shard, or a damaged one.
    """
    magic = file.read(0, min(file.size, len(MAGIC)))
    if magic not in (MAGIC, MAGIC_1):
        raise file.damaged(f"it starts with {magic!r}, not {MAGIC!r}", 0)
    header, start = (_header if magic == MAGIC else _header_1)(file)
    hashes_size = header.num_blocks * HASH_BYTES if header.block_bytes else 0
    expected = start + header.size + hashes_size + header.prompts * PROMPT_BYTES
    if file.size != expected:
        raise file.damaged(f"it has {file.size} bytes, its header says {expected}", min(file.size, expected))
    if not header.block_bytes:
        return Layout(header, start, bytes.fromhex(header.sha256))
    end = file.read(start + header.size, hashes_size + header.prompts * PROMPT_BYTES)
    if hashlib.sha256(end).hexdigest() != header.sha256:
        raise file.damaged("the hashes of its blocks are not the ones that were written", start + header.size)
    return Layout(header, start, end[:hashes_size], end[hashes_size:])


def _header(file: OpenFile) -> tuple[ShardHeader, int]:
    """What a shard of format 2 says, and where its ids start."""
    head = file.read(0, HEAD_BYTES)
    digest, encoded = head[len(MAGIC) : len(MAGIC) + HASH_BYTES], head[len(MAGIC) + HASH_BYTES :]
    if hashlib.sha256(encoded).digest() != digest:
        raise file.damaged("its header is not the one that was written", len(MAGIC))
    return _parse(file, encoded, ["block_bytes", "prompts"]), HEAD_BYTES


def _header_1(file: OpenFile) -> tuple[ShardHeader, int]:
    """What a shard of format 1 says, and where its ids start."""
    start = len(MAGIC_1) + 4
    length = int.from_bytes(file.read(len(MAGIC_1), 4), "little")
    if length > 2**16:
        raise file.damaged(f"its header would have {length} bytes", len(MAGIC_1))
    return _parse(file, file.read(start, length), []), start + length


def _parse(file: OpenFile, encoded: bytes, more: list[str]) -> ShardHeader:
    """The header that stands in JSON; every number in it can be true."""
    names = [field.name for field in fields(ShardHeader) if field.name not in ("block_bytes", "prompts")] + more
    try:
        said: dict[str, Any] = json.loads(encoded)
        numbers = [said[name] for name in ("tokens", "documents", "bytes", "vocab_size", *more)]
        sound = sorted(said) == sorted(names) and all(type(number) is int and number >= 0 for number in numbers)
        sound = sound and said["dtype"] in ("<u2", "<u4") and isinstance(said["tokenizer"], str)
        sound = sound and len(bytes.fromhex(said["sha256"])) == HASH_BYTES
        if sound and said.get("block_bytes", 0) % 4 == 0:
            return ShardHeader(**said)
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise file.damaged(f"its header makes no sense: {encoded[:200].decode(errors='replace').strip()!r}", len(MAGIC))
