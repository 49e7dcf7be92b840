"""A writer of TensorFlow's tensor bundles, from the published format, with as many ways to write them wrong."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


def shifted_out(byte: int) -> int:
    """What a byte does to the checksum when its bits have left, one after the other."""
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


SHIFTED_OUT = [shifted_out(byte) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Byte by byte, as in RFC 3720."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = SHIFTED_OUT[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def sealed(data: bytes) -> bytes:
    """The masked checksum of `data`, as it stands in a file."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def varint(number: int) -> bytes:
    """In seven bits a byte, the lowest first. A negative number is its two's complement in 64 bits."""
    number %= 2**64
    out = b""
    while number > 127:
        out += bytes([number % 128 + 128])
        number //= 128
    return out + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
    """A field of a protocol buffer: a varint, or bytes after their length."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    return varint(number * 8 + 2) + varint(len(value)) + value


def table(
    items: Iterable[tuple[bytes, bytes]],
    *,
    block_bytes: int = 200,
    restart_every: int = 4,
    compression: int = 0,
    spoil: Callable[[int, bytes], bytes] = lambda block, content: content,
    handles: Callable[[list[tuple[int, int]]], list[tuple[int, int]]] = lambda handles: handles,
) -> bytes:
    """A LevelDB table.

    Args:
        spoil: changes what stands in a block (its number, its content) before it gets its checksum.
        handles: changes the places of the data blocks, the metaindex and the index, as they are written down.
    """
    file, places = bytearray(), list[tuple[int, int]]()

    def write(entries: list[tuple[bytes, bytes]], every: int) -> None:
        block, restarts, previous = bytearray(), [0], b""
        for count, (key, value) in enumerate(entries):
            if count and count % every == 0:
                restarts.append(len(block))
                previous = b""
            same = [a == b for a, b in zip(previous, key, strict=False)]
            shared = [*same, False].index(False)
            block += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            previous = key
        block += b"".join(number.to_bytes(4, "little") for number in [*restarts, len(restarts)])
        content = spoil(len(places), bytes(block))
        places.append((len(file), len(content)))
        content += bytes([compression])
        file.extend(content + sealed(content))

    pending, size, last_keys = list[tuple[bytes, bytes]](), 0, []
    for key, value in items:
        pending.append((key, value))
        size += len(key) + len(value)
        if size >= block_bytes:
            write(pending, restart_every)
            last_keys.append(key)
            pending, size = [], 0
    if pending:
        write(pending, restart_every)
        last_keys.append(bytes((byte + 1) % 256 for byte in pending[-1][0][:1]))  # TensorFlow makes the last one short
    write([], 1)
    as_written = [varint(offset) + varint(size) for offset, size in handles(places)]
    write(list(zip(last_keys, as_written, strict=False)), 1)
    footer = b"".join(varint(offset) + varint(size) for offset, size in handles(places)[-2:])
    return bytes(file) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


@dataclass(frozen=True)
class Record:
    """A tensor's entry in the index."""

    name: bytes
    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: bytes
    shard: int = 0
    more: bytes = b""

    def item(self) -> tuple[bytes, bytes]:
        shape = b"".join(field(2, field(1, size) if size else b"") for size in self.shape)
        numbers = [(3, self.shard), (4, self.offset), (5, self.size)]
        value = field(1, self.dtype) + field(2, shape) + b"".join(field(n, value) for n, value in numbers if value)
        return self.name, value + varint(6 * 8 + 5) + self.checksum + self.more


HEADER = field(1, 1) + field(3, field(1, 1))
"""One shard, little-endian (0, left out), version 1."""


def bundle(records: Iterable[Record], header: bytes = HEADER, **how: Any) -> bytes:
    """An index."""
    return table([(b"", header), *(record.item() for record in records)], **how)
