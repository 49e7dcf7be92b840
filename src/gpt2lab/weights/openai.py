"""OpenAI's GPT-2 as it was published: a TensorFlow checkpoint, read without TensorFlow.

``model.ckpt.index`` is a table in LevelDB's format: blocks of sorted keys, then a footer that says where they are. It says
of each tensor, in protocol buffers, where in ``model.ckpt.data-00000-of-00001`` it lies. Everything has a checksum, and
all of them are checked: those of the whole index, and that of each tensor that goes into the model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from gpt2lab.config import GPT2Config
from gpt2lab.errors import CheckpointError
from gpt2lab.model.gpt2 import GPT2
from gpt2lab.weights.files import read_json, reader, regular_file, tokenizer_for
from gpt2lab.weights.layout import EMBEDDING, Imported, Layout, Slot, Stored, fill

HPARAMS, INDEX, DATA = "hparams.json", ".index", ".data-00000-of-00001"

PIECE = 4 * 2**20  # bytes of a tensor in memory while its checksum is made
LARGEST_INDEX = 4 * 2**20
MOST_TENSORS = 2**14
MOST_DIMENSIONS = 8
LONGEST_NAME = 256
"""In bytes. Names share what they begin with, so a small index could spell out terabytes of them."""

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER, _TRAILER = 48, 5  # bytes: at the end of a table; after each block, its compression and its checksum
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}  # by TensorFlow's numbers
_PARTS = {
    "ln_1": "attn_norm",
    "attn/c_attn": "attn.qkv_proj",
    "attn/c_proj": "attn.output_proj",
    "ln_2": "mlp_norm",
    "mlp/c_fc": "mlp.up_proj",
    "mlp/c_proj": "mlp.down_proj",
}
_OPTIMIZERS = re.compile(r"(^|/)(global_step|beta[12]_power|Adam(_1)?|Momentum|Adafactor\w*)$")
_FIX = "copy the whole folder again, as it was published"

_Size = Annotated[int, Field(ge=1, le=2**20)]


class HParams(BaseModel):
    """The keys of hparams.json, bounded. Others are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True)

    n_vocab: _Size
    n_ctx: _Size
    n_embd: _Size
    n_head: _Size
    n_layer: Annotated[int, Field(ge=1, le=1024)]


@dataclass(frozen=True)
class Entry:
    """What the index says of a tensor: TensorFlow's number of its type, its shape, its place in bytes, its checksum."""

    dtype: int
    shape: tuple[int, ...]
    offset: int
    size: int
    checksum: int


def recognises(path: Path) -> bool:
    """Whether a path looks like a published GPT-2: a folder with hparams.json and an index, or an index itself."""
    if path.is_dir():
        return (path / HPARAMS).is_file() and any(path.glob(f"*{INDEX}"))
    return path.suffix == INDEX and path.is_file()


def read(path: Path, tokenizer: str | None = None) -> Imported:
    """A GPT-2 from OpenAI's folder, or from one of the indices in such a folder.

    Args:
        tokenizer: its name, where it is not the one beside the weights.

    Raises:
        CheckpointError: damaged, incomplete, or another model. UntrustedFileError: a file of it is no plain file.
    """
    index = find_index(path)
    folder, data = index.parent, index.with_name(index.name.removesuffix(INDEX) + DATA)
    config, entries = read_hparams(folder / HPARAMS), read_index(index)
    with regular_file(data).open("rb") as file:
        check_sizes(config, entries, os.fstat(file.fileno()).st_size, where=str(index))
        known = tokenizer_for(config.vocab_size or 0, folder, tokenizer)
        with torch.device("meta"):
            model = GPT2.from_config(config)
        slots = layout(config.num_layers)
        found = fill(model, slots, stored(file, entries, slots), where=str(index), ignored=_ignored)
    return Imported(model.eval(), known, found)


def layout(num_layers: int) -> Layout:
    """OpenAI's names, and which of ours they are. Their matrices have the input dimension first."""
    slots = {"model/wte": Slot(EMBEDDING), "model/wpe": Slot("position_embedding.weight")}
    parts = {f"h{i}/{theirs}": f"blocks.{i}.{ours}" for i in range(num_layers) for theirs, ours in _PARTS.items()}
    for theirs, ours in (parts | {"ln_f": "final_norm"}).items():
        is_norm = ours.endswith("norm")
        slots[f"model/{theirs}/{'g' if is_norm else 'w'}"] = Slot(f"{ours}.weight", transposed=not is_norm)
        slots[f"model/{theirs}/b"] = Slot(f"{ours}.bias")
    return slots


def find_index(path: Path) -> Path:
    """The index that a path means: itself, or the only one in a folder.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{INDEX}"))
    if len(found) != 1:
        names = ", ".join(index.name for index in found[:5]) or f"no file ends in {INDEX}"
        fix = f"name the one that is meant, such as {found[-1]}" if found else _FIX
        raise CheckpointError("not one checkpoint", where=str(path), cause=f"there are {len(found)}: {names}", fix=fix)
    return found[0]


def read_hparams(path: Path) -> GPT2Config:
    """The shape that an hparams.json describes.

    Raises:
        CheckpointError: it is damaged, or no GPT-2 has that shape. UntrustedFileError: it is no plain file.
    """
    try:
        theirs = HParams.model_validate(read_json(path))
        return GPT2Config(
            vocab_size=theirs.n_vocab, max_seq_len=theirs.n_ctx, embed_dim=theirs.n_embd, num_heads=theirs.n_head,
            num_kv_heads=theirs.n_head, ff_hidden_dim=4 * theirs.n_embd, num_layers=theirs.n_layer,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        cause = ": ".join([*map(str, first["loc"]), first["msg"]])
        if first["loc"] and first["type"] != "missing":
            cause += f", not {first['input']!r:.80}"
    raise CheckpointError("impossible shape", where=str(path), cause=cause, fix="mend the file")


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
        raise CheckpointError("unusable index", where=str(path), cause=str(error), fix=_FIX) from None


def check_sizes(config: GPT2Config, entries: dict[str, Entry], size: int, where: str) -> None:
    """See that the tensors fill the data file, of `size` bytes, and that a model of this shape fits into as many.

    Raises:
        CheckpointError: they overlap, leave gaps, or end elsewhere; or they are too few for the model.
    """
    end, cause = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            cause = cause or f"{name} begins at byte {entry.offset} of the data, where byte {end} is expected"
        end += entry.size
    if end != size:
        cause = cause or f"its tensors have {end} bytes, the data file has {size}"
    width, rows = config.embed_dim, (config.vocab_size or 0) + config.max_seq_len + 2
    numbers = width * (rows + config.num_layers * (12 * width + 13))
    if 2 * numbers > size:  # a number has 2 bytes at least
        cause = cause or f"{HPARAMS} describes {numbers} numbers, the data file has {size} bytes"
    if cause:
        raise CheckpointError("incomplete checkpoint", where=where, cause=cause, fix=_FIX)


def stored(file: BufferedReader, entries: dict[str, Entry], slots: Layout) -> Iterator[Stored]:
    """The tensors of a data file; of those that have no slot, the names.

    Raises:
        CheckpointError: a tensor is of a type that is not read; or when it is read, its checksum differs.
    """
    for name, entry in entries.items():
        if name not in slots:
            yield Stored.of(name, torch.empty(0))
            continue
        dtype, shape = _DTYPES.get(entry.dtype), entry.shape
        if dtype is None:
            raise _unusable(name, file, f"type {entry.dtype}, not float32 (1), bfloat16 (14) or float16 (19)")
        if math.prod(shape) * dtype.itemsize != entry.size:
            raise _unusable(name, file, f"{entry.size} bytes are not what {shape} in {dtype} takes")
        if slots[name].transposed and len(shape) == 3 and shape[0] == 1:
            shape = shape[1:]  # their matrices are convolutions of width 1
        yield Stored(name, shape, _checked(name, file, entry, reader(file, entry.offset, shape, dtype)))


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
    return CheckpointError(f"unusable tensor {name}", where=file.name, cause=cause, fix=_FIX)


def _ignored(name: str) -> str | None:
    return "the optimizer's, which only training needs" if _OPTIMIZERS.search(name) else None


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


# --- The checksum -----------------------------------------------------------------------------------------------------


def _remainders() -> list[int]:
    """What each byte leaves when it is divided by the polynomial of CRC-32C, its bits in reverse (RFC 3720)."""
    values = list(range(256))
    for _ in range(8):
        values = [value >> 1 ^ (0x82F63B78 if value & 1 else 0) for value in values]
    return values


_REMAINDERS = _remainders()
_FOLDS = (4323, 5259, 5685)


def crc32c(data: bytes, crc: int = 0) -> int:
    """The CRC-32C of `data`; given that of what stands before it, that of both.

    It is the remainder of a polynomial over GF(2), and its divisor also divides x^5685 + x^1362 + x^426 + 1. So a bit may
    be XORed into those 4323, 5259 and 5685 places further on and be cleared, and the remainder stays. To square such a
    sum is to double its exponents, so the same holds for bytes and for words of 8 bytes. A few vectorised operations
    fold any length into some thousand bytes, which the table then takes one by one: 500 MB in half a second.
    """
    crc ^= 0xFFFFFFFF
    left = np.frombuffer(bytearray(data), dtype=np.uint8)
    if len(left) > _FOLDS[-1]:
        left[:4] ^= np.frombuffer(crc.to_bytes(4, "little"), dtype=np.uint8)
        crc = 0
        for size in (8, 1):
            units = left[: len(left) // size * size].view(f"u{size}")
            end = max(0, len(units) - _FOLDS[-1])
            for start in range(0, end, _FOLDS[0]):
                block = units[start : min(start + _FOLDS[0], end)]
                for fold in _FOLDS:
                    units[start + fold : start + fold + len(block)] ^= block
            left = left[end * size :]
    for byte in left.tobytes():
        crc = _REMAINDERS[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    """A checksum as these files store it, so that one over data with checksums in it still means something."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
