"""TensorFlow's checkpoints, which it calls tensor bundles: an index and its data, read without TensorFlow.

The ``.index`` is a table in LevelDB's format: blocks of sorted keys, then a footer that says where they are. It says of each
tensor, in protocol buffers, where in the data file it lies. Everything has a checksum, and all of them are checked: those of
the whole index, and that of each tensor that is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from gpt2lab.errors import CheckpointError
from gpt2lab.weights.crc32c import crc32c
from gpt2lab.weights.files import reader, regular_file
from gpt2lab.weights.layout import Stored

INDEX, DATA = ".index", ".data-00000-of-00001"
FIX = "copy the whole folder again, as it was published"
PIECE = 4 * 2**20  # bytes of a tensor in memory while its checksum is made
LARGEST_INDEX = 4 * 2**20
MOST_TENSORS = 2**14
MOST_DIMENSIONS = 8
LONGEST_NAME = 256
"""In bytes. Names share what they begin with, so a small index could spell out terabytes of them."""

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER, _TRAILER = 48, 5  # bytes: at the end of a table; after each block, its compression and its checksum
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}  # by TensorFlow's numbers


@dataclass(frozen=True)
class Entry:
    """What the index says of a tensor: TensorFlow's number of its type, its shape, its place in bytes, its checksum."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int


def read_index(path: Path) -> dict[str, Entry]:
    """Every tensor that an index names, in its order.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not read. UntrustedFileError: it is no plain file.
    """
    with regular_file(path).open("rb") as file:
        data = file.read(LARGEST_INDEX + 1)
    try:
        if len(data) > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX} bytes")
        header, *tensors = list(_table(data)) or [(b"", b"")]
        _check_header(*header)
        return {_name(key): _entry(value) for key, value in tensors}
    except ValueError as error:
        raise CheckpointError("unusable index", where=str(path), cause=str(error), fix=FIX) from None


def checked_tensor(name: str, file: BufferedReader, entry: Entry, shape: tuple[int, ...]) -> Stored:
    """A tensor of a data file, to be read as one of `shape`, which has as many numbers as its own.

    Raises:
        CheckpointError: it is of a type that is not read; or when it is read, its checksum differs.
    """
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise _unusable(name, file, f"type {entry.dtype}, not float32 (1), bfloat16 (14) or float16 (19)")
    if math.prod(entry.shape) * dtype.itemsize != entry.size:
        raise _unusable(name, file, f"{entry.size} bytes are not what {entry.shape} in {dtype} takes")
    return Stored(name, shape, _checked(name, file, entry, reader(file, entry.offset, shape, dtype)))


def _checked(
    name: str, file: BufferedReader, entry: Entry, rows: Callable[[int, int], Tensor]
) -> Callable[[int, int], Tensor]:
    """`rows`, where all of them are compared with their checksum before the first is given away."""

    def read(start: int, stop: int) -> Tensor:
        if start == 0:
            crc, left = 0, entry.size
            file.seek(entry.offset)
            while left and (piece := file.read(min(left, PIECE))):
                crc, left = crc32c(piece, crc), left - len(piece)
            if _masked(crc) != entry.checksum:
                raise _unusable(name, file, "its bytes do not match their checksum")
        return rows(start, stop)

    return read


def _unusable(name: str, file: BufferedReader, cause: str) -> CheckpointError:
    return CheckpointError(f"unusable tensor {name}", where=file.name, cause=cause, fix=FIX)


# --- The table, as in leveldb/doc/table_format.md ---------------------------------------------------------------------


class _Cursor:
    """A walk through bytes that does not leave them."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError("something in it is longer than what it is in")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        """A number in seven bits a byte. There is one way to write it, and nothing that we read is negative."""
        value = 0
        for count, byte in enumerate(self.data[self.at : self.at + 9]):
            value |= (byte & 0x7F) << 7 * count
            if byte == 0 and count:
                break
            if byte < 0x80:
                self.at += count + 1
                return value
        raise ValueError("a number in it is negative, longer than it need be, or cut off")


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order. Its blocks must cover all of it, so that each byte has a checksum."""
    if not data.endswith(_MAGIC):
        raise ValueError("it does not end as a table does")
    footer = _Cursor(data[-_FOOTER : -len(_MAGIC)])
    meta, index = [(footer.varint(), footer.varint()) for _ in range(2)]
    if any(footer.take(footer.left)):
        raise ValueError("its footer holds what does not belong there")
    end, count, previous = 0, 0, None
    for _, value in _block(data, *index):
        handle = _Cursor(value)
        offset, size = handle.varint(), handle.varint()
        if offset != end:
            raise ValueError(f"a block of it begins at byte {offset}, where byte {end} is expected")
        end += size + _TRAILER
        for key, content in _block(data, offset, size):
            count += 1
            if previous is not None and key <= previous:
                raise ValueError("its keys are not in order, or one is there twice")
            if count > MOST_TENSORS:
                raise ValueError(f"it names more than {MOST_TENSORS} tensors")
            yield key, content
            previous = key
    meta_end = end + meta[1] + _TRAILER
    if (meta[0], index[0], len(data)) != (end, meta_end, meta_end + index[1] + _TRAILER + _FOOTER):
        raise ValueError("its blocks do not follow one another")
    for _ in _block(data, *meta):
        pass


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block."""
    end = offset + size
    if end + _TRAILER + _FOOTER > len(data):
        raise ValueError(f"the block at byte {offset} ends beyond its end")
    compression, checksum = data[end], int.from_bytes(data[end + 1 : end + _TRAILER], "little")
    if _masked(crc32c(data[offset : end + 1])) != checksum:
        raise ValueError(f"the block at byte {offset} does not match its checksum")
    if compression:
        raise ValueError(f"it is compressed ({'snappy' if compression == 1 else compression}), which is not read")
    # A block ends with the places from which a search may begin, and their number. We read from the front.
    searches = int.from_bytes(data[max(offset, end - 4) : end], "little")
    if size < 4 * (searches + 1):
        raise ValueError(f"the block at byte {offset} is too short")
    cursor, key = _Cursor(data[offset : end - 4 * (searches + 1)]), b""
    while cursor.left:
        shared, rest, length = cursor.varint(), cursor.varint(), cursor.varint()
        if shared > len(key) or shared + rest > LONGEST_NAME:
            raise ValueError(f"a name in it has more than {LONGEST_NAME} bytes, or shares what is not there")
        key = key[:shared] + cursor.take(rest)
        yield key, cursor.take(length)


# --- Its values, as in tensorflow/core/protobuf/tensor_bundle.proto -----------------------------------------------------

_Fields = dict[int, list[int | bytes]]


def _message(data: bytes) -> _Fields:
    """The fields of a protocol buffer, by their numbers."""
    cursor, fields = _Cursor(data), _Fields()
    while cursor.left:
        number, kind = divmod(cursor.varint(), 8)
        value: int | bytes
        if kind == 0:
            value = cursor.varint()
        elif kind == 2:
            value = cursor.take(cursor.varint())
        elif kind in (1, 5):
            value = int.from_bytes(cursor.take(8 if kind == 1 else 4), "little")
        else:
            raise ValueError(f"a field in it is of the kind {kind}, which is not read")
        fields.setdefault(number, []).append(value)
    return fields


def _number(fields: _Fields, number: int) -> int:
    """A field that is one number; what is left out is 0."""
    match fields.get(number, [0]):
        case [int(value)]:
            return value
    raise ValueError(f"field {number} in it is no number, or is there twice")


def _messages(fields: _Fields, number: int, most: int) -> list[_Fields]:
    """A field that is up to `most` messages."""
    values = fields.get(number, [])
    if len(values) > most:
        raise ValueError(f"field {number} in it is there {len(values)} times; at most {most} are read")
    found = [_message(value) for value in values if isinstance(value, bytes)]
    if len(found) < len(values):
        raise ValueError(f"field {number} in it is a number")
    return found


def _check_header(key: bytes, value: bytes) -> None:
    """See that the header (BundleHeaderProto), which is the entry without a name, is of the kind that is read."""
    header = _message(value)
    if key or not header:
        raise ValueError("it has no header")
    if (shards := _number(header, 1)) != 1:
        raise ValueError(f"its data is in {shards} shards; one is read")
    if _number(header, 2) != 0:
        raise ValueError("its numbers are big-endian, which is not read")
    if any(_number(version, 2) > 1 for version in _messages(header, 3, most=1)):
        raise ValueError("it was written for newer readers than this one")


def _name(key: bytes) -> str:
    name = key.decode("utf-8", errors="replace")
    if not (name.isascii() and name.isprintable()):
        raise ValueError(f"{name[:80]!a} is no name of a tensor; a part of one is not read")
    return name


def _entry(value: bytes) -> Entry:
    """A tensor's entry (BundleEntryProto)."""
    fields = _message(value)
    if _number(fields, 3) != 0 or 7 in fields:
        raise ValueError("a tensor of it is in another shard or in parts, which is not read")
    shapes = _messages(fields, 2, most=1)
    if any(3 in shape for shape in shapes):
        raise ValueError("a tensor of it has no known shape")
    dimensions = [size for shape in shapes for size in _messages(shape, 2, most=MOST_DIMENSIONS)]
    return Entry(
        dtype=_number(fields, 1),
        shape=tuple(_number(size, 1) for size in dimensions),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        checksum=_number(fields, 6),
    )


def _masked(crc: int) -> int:
    """A checksum as these files store it, so that one over data with checksums in it still means something."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
