"""safetensors files. They are read without trust: the header is checked whole, and tensors come from bytes.

The library maps files: one that is cut short by someone else then kills the process. It also takes any header. Written is
what the library writes, to the byte, but hashed on the way.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gpt2lab.manifest import PIECE_BYTES, FileRecord, write_measured

LARGEST_HEADER, MOST_TENSORS = 4 * 2**20, 10_000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file.

    Attributes:
        offset: of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def read_header(file: BinaryIO) -> dict[str, Entry]:
    """The tensors of an open safetensors file: each byte after the header belongs to exactly one of them.

    Raises:
        ValueError: a header that is too large or not true.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}; at most {LARGEST_HEADER} are allowed")
    return parse_header(file.read(length), size - 8 - length)


def parse_header(header: bytes, data_bytes: int) -> dict[str, Entry]:
    """The tensors that a header describes, before `data_bytes` bytes of data.

    Raises:
        ValueError: it is not true.
    """
    try:
        listed = json.loads(header.decode(), object_pairs_hook=unique)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the header is no JSON ({type(error).__name__})") from None
    if not isinstance(listed, dict) or len(listed) > MOST_TENSORS:
        raise ValueError(f"the header is no list of at most {MOST_TENSORS} tensors")
    listed.pop("__metadata__", None)
    spans = {name: _span(name, about) for name, about in listed.items()}
    reached = 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first != reached:
            raise ValueError(f"{name[:80]!r} begins at byte {first}, where byte {reached} is next")
        reached = last
    if reached != data_bytes:
        raise ValueError(f"its tensors have {reached} bytes, but {data_bytes} are there")
    return {
        name: Entry(DTYPES[about["dtype"]], tuple(about["shape"]), 8 + len(header) + spans[name][0])
        for name, about in listed.items()
    }


def _span(name: str, about: Any) -> tuple[int, int]:
    """First and last byte (exclusive) of a tensor's data, if dtype, shape and bytes agree."""
    match about:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(first), int(last)]} if dtype in DTYPES:
            counts = all(type(n) is int and 0 <= n < 2**40 for n in (*shape, first, last)) and len(shape) <= 8
            if counts and last - first == DTYPES[dtype].itemsize * _product(shape):
                return first, last
    raise ValueError(f"what it says of {name[:80]!r} cannot be: {str(about)[:120]}")


def _product(shape: list[int]) -> int:
    """Exact, where a tensor library would overflow."""
    count = 1
    for length in shape:
        count *= length
    return count


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`, in which no key stands twice.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key[:80]!r} stands there twice")
    return found


def tensors_in(content: bytearray) -> Mapping[str, Tensor]:
    """The tensors of a safetensors file whose content is in memory; they share that memory.

    Raises:
        ValueError: it is none.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it is shorter than its header")
    entries = parse_header(bytes(content[8 : 8 + length]), len(content) - 8 - length)
    memory = torch.frombuffer(content, dtype=torch.uint8)

    def tensor(entry: Entry) -> Tensor:
        data = memory[entry.offset : entry.offset + entry.dtype.itemsize * _product(list(entry.shape))]
        aligned = data if entry.offset % entry.dtype.itemsize == 0 else data.clone()
        return aligned.view(entry.dtype).view(entry.shape)

    return {name: tensor(entry) for name, entry in entries.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file, to the byte as the library does; return its size and hash."""
    order = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start_of_file = memoryview(len(text).to_bytes(8, "little") + text)
    return write_measured(path, chain([start_of_file], *(_pieces(tensor) for _, tensor in order)))


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The numbers of a tensor as they lie in memory, a piece at a time."""
    numbers = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    yield from (numbers[at : at + PIECE_BYTES] for at in range(0, len(numbers), PIECE_BYTES))
