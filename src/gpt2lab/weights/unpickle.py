"""A stranger's pickle, opened: the tensors and plain values of it as safetensors and JSON.

Only the process in `sandbox` does this, with torch's `weights_only`, which itself is not believed: every storage is compared
with the file, every tensor with its storage, and nothing but tensors and plain values is written.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lab.errors import CheckpointError, LabError, ResourceError, UntrustedFileError, as_lab_error
from gpt2lab.tensors import DTYPES, LARGEST_HEADER, MOST_TENSORS
from gpt2lab.weights.files import LARGEST_JSON
from gpt2lab.weights.pickles import SAFETENSORS, ZIP, code_in, printable

MOST_VALUES, DEEPEST = 100_000, 32
TENSORS, VALUES = "tensors.safetensors", "values.json"


def extract(path: Path, folder: Path, only: list[str] | None = None) -> None:
    """Write the tensors and the plain values of a pickled dict into `folder`, as safetensors and JSON.

    Raises:
        UntrustedFileError: it holds anything else. CheckpointError: it is damaged.
    """
    backing = _Backing(path)
    loaded = _load(path, backing)
    if type(loaded) not in (dict, OrderedDict):
        kind = type(loaded).__name__
        raise damaged(path, f"it holds a {kind}, where a dict of tensors is expected")
    if only is not None:
        loaded = {key: value for key, value in dict.items(loaded) if key in only}
    walk = _Walk(path, backing)
    text = json.dumps(walk.plain(loaded, ()))
    if len(text) > LARGEST_JSON:
        raise damaged(path, f"{len(text)} characters of plain values, where {LARGEST_JSON} are allowed")
    (folder / VALUES).write_text(text)
    _write_safetensors(folder / TENSORS, walk.tensors, path)


def _load(path: Path, backing: _Backing) -> Any:
    """What `weights_only` makes of the file, its tensors on the CPU."""
    torch.serialization.clear_safe_globals()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, weights_only=True, map_location=backing.note, mmap=backing.mapped)
    except LabError:
        raise
    except Exception as error:
        raise explain(error, path) from None


def explain(error: BaseException, path: Path) -> LabError:
    """What made torch give up: code, too little memory, or damage."""
    said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    wants_more = re.match(r"Can only|Trying to (call|load)|Only persistent|Unsupported global", said)
    if isinstance(as_lab_error(error), ResourceError):
        return damaged(path, "it asks for more memory than a file of its size needs")
    if code := code_in(path):
        return untrusted(path, f"it contains pickled code: {code}")
    if wants_more or "weights_only=True" in said:
        return untrusted(path, f"it wants more than tensors: {_first_line(said)}")
    return damaged(path, f"{type(error).__name__}: {_first_line(said)}")


class _Backing:
    """What of the file each storage is: torch takes a tensor's word for how many bytes it has.

    Attributes:
        mapped: whether it is torch's zip archive, which is mapped; the older format is read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size, self.known = path, path.stat().st_size, dict[int, int]()
        with path.open("rb") as file:
            self.mapped = file.read(4) == ZIP
        self.claimed, self.records = 0, Counter[int]()
        if self.mapped:
            try:
                with zipfile.ZipFile(path) as archive:
                    members = archive.infolist()
            except Exception as error:  # it raises more kinds than its documentation says
                raise damaged(path, f"{type(error).__name__}: {_first_line(error)}") from None
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise damaged(path, "its archive is compressed, which torch does not do")
            self.records.update(member.file_size for member in members)

    def note(self, storage: Any, location: str) -> Any:
        """torch's ``map_location``: every storage passes here before a tensor is made of it, and stays on the CPU."""
        count = storage.nbytes()
        self.claimed += count
        self.records[count] -= 1
        if self.claimed > self.size or (self.mapped and count and self.records[count] < 0):
            raise damaged(self.path, "a tensor claims numbers that the file does not have")
        if not self.mapped:
            storage.fill_(0)  # it is read later, or never, if the file does not say so
        self.known[storage.data_ptr()] = count
        return storage

    def has(self, tensor: Tensor) -> bool:
        """Whether the bytes of a tensor are among those that passed."""
        storage = tensor.untyped_storage()
        begin, count = storage.data_ptr(), storage.nbytes()
        return count == 0 or count <= self.known.get(begin, 0) or any(
            start <= begin and begin + count <= start + length for start, length in self.known.items()
        )  # fmt: skip


class _Walk:
    """Sorts what was loaded into tensors and plain values. Methods are called by their class: an object may bring its own."""

    def __init__(self, path: Path, backing: _Backing) -> None:
        self.path, self.backing, self.values = path, backing, 0
        self.tensors: dict[str, Tensor] = {}

    def plain(self, value: Any, keys: tuple[str, ...]) -> Any:
        """The value without tensors, which are noted by their keys.

        Raises:
            UntrustedFileError: a class, or a tensor that is more than numbers in a row. CheckpointError: too much.
        """
        self.values += 1
        if self.values > MOST_VALUES or len(keys) > DEEPEST:
            raise damaged(self.path, f"more than {MOST_VALUES} values, or more than {DEEPEST} in each other")
        kind = type(value)
        if kind in (dict, OrderedDict):
            result = {}
            for key, inner in dict.items(value):
                word = str(key) if type(key) in (str, int) else ""
                if not (0 < len(word) <= 500 and word.isprintable() and word not in result):
                    raise damaged(self.path, f"a key in it is {word[:80]!a} ({type(key).__name__})")
                result[word] = self.plain(inner, (*keys, word))
            return {word: inner for word, inner in result.items() if inner is not _TENSOR}
        if kind in (list, tuple, torch.Size):
            inner = [self.plain(inner, (*keys, str(index))) for index, inner in enumerate(value)]
            return [None if value is _TENSOR else value for value in inner]
        if kind in (Tensor, torch.nn.Parameter):
            name = "/".join(keys)
            if name in self.tensors:
                raise damaged(self.path, f"tensor {name} is there twice")
            self.tensors[name] = self.checked(name, Tensor.detach(value))
            return _TENSOR
        if value is None or kind in (bool, float, str) or (kind is int and abs(value) < 2**63):
            return value
        raise untrusted(
            self.path, f"{'/'.join(keys)} is a {printable(kind.__qualname__)}, neither a tensor nor a plain value"
        )

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor whose numbers lie in the file one by one."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.device.type}, {tensor.layout}"
            raise untrusted(self.path, f"tensor {name} is not dense ({kind})")
        if tensor.dtype not in DTYPES.values() or tensor.is_neg() or tensor.is_conj():
            raise untrusted(self.path, f"tensor {name} has numbers of a kind that no model has ({tensor.dtype})")
        count = tensor.numel() * tensor.itemsize
        steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
        reach = 1  # of the dimensions so far: a further one must step over them, or numbers would share a place
        for step, size in steps if count else ():
            if step < reach:
                raise untrusted(self.path, f"tensor {name} uses the same numbers several times ({tuple(tensor.shape)})")
            reach += step * (size - 1)
        if count > self.backing.size or not self.backing.has(tensor):
            raise damaged(self.path, f"tensor {name} claims numbers that the file does not have")
        return tensor


_TENSOR = object()


def _write_safetensors(target: Path, tensors: dict[str, Tensor], path: Path) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    most = 2 * path.stat().st_size  # a tied head is written again
    if len(header) > MOST_TENSORS or len(text) > LARGEST_HEADER or end > most or "__metadata__" in header:
        raise damaged(path, f"{len(tensors)} tensors of {end} bytes, more than the file can hold")
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _first_line(said: object) -> str:
    return printable((str(said).strip() or "no reason given").split("\n")[0])


def damaged(path: Path | str, cause: str) -> CheckpointError:
    fix = f"copy the file again, or {SAFETENSORS}"
    return CheckpointError("not a usable pickle", where=str(path), cause=cause, fix=fix)


def untrusted(path: Path, cause: str) -> UntrustedFileError:
    return UntrustedFileError("not a usable pickle", where=str(path), cause=cause, fix=SAFETENSORS)
