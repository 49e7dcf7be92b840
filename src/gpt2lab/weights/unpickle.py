"""The tensors of a stranger's pickle, where the user asks for them: a second process opens it, and this one never does.

That process has torch's `weights_only`, bounded memory, time and disk, and no network, and writes what it found: tensors as
safetensors and plain values as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Self

import psutil
import torch
from torch import Tensor

from gpt2lab.errors import CheckpointError, LabError, ResourceError, UntrustedFileError, as_lab_error
from gpt2lab.tensors import DTYPES, LARGEST_HEADER, MOST_TENSORS, read_header
from gpt2lab.weights.files import LARGEST_JSON, read_json, reader, regular_file
from gpt2lab.weights.layout import Stored
from gpt2lab.weights.pickles import MIB, SAFETENSORS, ZIP, code_in, printable

MOST_VALUES, DEEPEST = 100_000, 32
SECONDS, BYTES_PER_SECOND = 60, 20 * MIB
"""The second process may take that long, and longer for a file that a slow disk needs longer for."""

TENSORS, VALUES, TROUBLE, NOISE = "tensors.safetensors", "values.json", "trouble.json", "stderr"


@dataclass
class Unpacked:
    """What a pickle held, in a temporary folder that goes when this is closed (it is a context manager).

    Attributes:
        values: numbers, strings, booleans and None, in dicts and lists as they were; tensors are left out.
        tensors: all tensors. One that lay deeper is named by its keys: "model/transformer.wte.weight".
    """

    folder: Path
    values: dict[str, Any]
    tensors: list[Stored]
    file: BinaryIO

    def below(self, key: str) -> Iterator[Stored]:
        """The tensors that lay in the dict of that key, by the names they had there."""
        for stored in self.tensors:
            if stored.name.startswith(f"{key}/"):
                yield Stored(stored.name.removeprefix(f"{key}/"), stored.shape, stored.read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def unpack(path: Path, only: tuple[str, ...] | None = None) -> Unpacked:
    """The tensors and plain values of a pickled dict, as a child process read them; none of its code is run.

    Args:
        only: the keys of the dict that are wanted, where the others need not be written out; None: all of them.

    Raises:
        UntrustedFileError: it wants more than dense tensors and plain values. CheckpointError: it is damaged, or not a
            dict. ResourceError: the disk for temporary files is full.
    """
    real = regular_file(path)
    folder = Path(tempfile.mkdtemp(prefix="gpt2lab-"))
    try:
        _run_child(path, real, folder, only)
        values = read_json(folder / VALUES)
        file = regular_file(folder / TENSORS).open("rb")
        try:
            entries = read_header(file)
            if not isinstance(values, dict):
                raise ValueError("no dict of values")
        except ValueError as error:
            file.close()
            raise _damaged(path, f"the child process wrote something else: {printable(str(error))}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    read = {name: reader(file, entry.offset, entry.shape, entry.dtype) for name, entry in entries.items()}
    return Unpacked(folder, values, [Stored(name, entries[name].shape, read[name]) for name in entries], file)


def _run_child(path: Path, real: Path, folder: Path, only: tuple[str, ...] | None) -> None:
    """Have a second process write what is in the file into `folder`; `path` is its name for the user."""
    seconds = SECONDS + real.stat().st_size // BYTES_PER_SECOND
    task = json.dumps({"path": str(real), "folder": str(folder), "only": only, "seconds": seconds})
    code = "from gpt2lab.weights.unpickle import child; child()"
    kept = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry),
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        # One thread each: a process with several cannot give up its network.
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    try:
        with (folder / NOISE).open("wb") as noise:
            ended = subprocess.run(
                [sys.executable, "-P", "-c", code, task], cwd=folder, env=environment, timeout=seconds,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=noise, check=False,
            ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        cause = f"reading its tensors took more than {seconds} seconds"
        raise _damaged(path, cause) from None
    if ended == 0:
        return
    cause = f"the process that read it ended with {signal.Signals(-ended).name if ended < 0 else f'code {ended}'}"
    if (folder / TROUBLE).is_file():
        cause = str(read_json(folder / TROUBLE))
    elif ended > 0:
        cause += f": {printable((folder / NOISE).read_bytes()[-200:].decode(errors='replace'))}"
    if ended == UntrustedFileError.exit_code:
        raise _untrusted(path, cause)
    if ended == ResourceError.exit_code:
        fix = "free some space, or set TMPDIR to a folder on another disk"
        raise ResourceError("no place for its tensors", where=str(folder), cause=cause, fix=fix)
    raise _damaged(path, cause)


# --- The child --------------------------------------------------------------------------------------------------------


def child() -> NoReturn:
    """All that the second process does: give up what it does not need, open the pickle, write what is in it, and end."""
    task = json.loads(sys.argv[1])
    path, folder = Path(task["path"]), Path(task["folder"])
    code = 0
    try:
        leave_network()
        limit_resources(path.stat().st_size, task["seconds"])
        extract(path, folder, task["only"])
    except BaseException as error:
        full = as_lab_error(error) if isinstance(error, OSError) else None
        trouble = full or (error if isinstance(error, LabError) else _explain(error, path))
        code, cause = trouble.exit_code, trouble.cause
        with contextlib.suppress(OSError):
            (folder / TROUBLE).write_text(json.dumps(printable(cause)))
    os._exit(code)  # nothing of what was unpickled is asked to tidy up after itself


def leave_network() -> bool:
    """Move this process to where there is no network. Only Linux can, and not everywhere: whether it did."""
    new_user, new_net = 0x10000000, 0x40000000  # from sched.h
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    # As root alone first: a new user would have no right to files of others.
    return unshare is not None and (unshare(new_net) == 0 or unshare(new_user | new_net) == 0)


def limit_resources(size: int, seconds: int) -> None:
    """Bound what this process may use when it opens a file of `size` bytes; more than it uses already, where it counts."""
    if sys.platform == "win32":
        return
    import resource

    limits = {
        "RLIMIT_AS": psutil.Process().memory_info().vms + 3 * size + 512 * MIB,
        "RLIMIT_FSIZE": 2 * size + LARGEST_HEADER + LARGEST_JSON,
        "RLIMIT_CPU": seconds,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system has or grants every limit
            resource.setrlimit(getattr(resource, name), (value, value))


def extract(path: Path, folder: Path, only: list[str] | None = None) -> None:
    """Write the tensors and the plain values of a pickled dict into `folder`, as safetensors and JSON.

    Raises:
        UntrustedFileError: it holds anything else. CheckpointError: it is damaged.
    """
    backing = _Backing(path)
    loaded = _load(path, backing)
    if type(loaded) not in (dict, OrderedDict):
        kind = type(loaded).__name__
        raise _damaged(path, f"it holds a {kind}, where a dict of tensors is expected")
    if only is not None:
        loaded = {key: value for key, value in dict.items(loaded) if key in only}
    walk = _Walk(path, backing)
    text = json.dumps(walk.plain(loaded, ()))
    if len(text) > LARGEST_JSON:
        raise _damaged(path, f"{len(text)} characters of plain values, where {LARGEST_JSON} are allowed")
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
        raise _explain(error, path) from None


def _explain(error: BaseException, path: Path) -> LabError:
    """What made torch give up: code, too little memory, or damage."""
    said = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    wants_more = re.match(r"Can only|Trying to (call|load)|Only persistent|Unsupported global", said)
    if isinstance(as_lab_error(error), ResourceError):
        return _damaged(path, "it asks for more memory than a file of its size needs")
    if code := code_in(path):
        return _untrusted(path, f"it contains pickled code: {code}")
    if wants_more or "weights_only=True" in said:
        return _untrusted(path, f"it wants more than tensors: {_first_line(said)}")
    return _damaged(path, f"{type(error).__name__}: {_first_line(said)}")


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
                raise _damaged(path, f"{type(error).__name__}: {_first_line(error)}") from None
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise _damaged(path, "its archive is compressed, which torch does not do")
            self.records.update(member.file_size for member in members)

    def note(self, storage: Any, location: str) -> Any:
        """torch's ``map_location``: every storage passes here before a tensor is made of it, and stays on the CPU."""
        count = storage.nbytes()
        self.claimed += count
        self.records[count] -= 1
        if self.claimed > self.size or (self.mapped and count and self.records[count] < 0):
            raise _damaged(self.path, "a tensor claims numbers that the file does not have")
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
            raise _damaged(self.path, f"more than {MOST_VALUES} values, or more than {DEEPEST} in each other")
        kind = type(value)
        if kind in (dict, OrderedDict):
            result = {}
            for key, inner in dict.items(value):
                word = str(key) if type(key) in (str, int) else ""
                if not (0 < len(word) <= 500 and word.isprintable() and word not in result):
                    raise _damaged(self.path, f"a key in it is {word[:80]!a} ({type(key).__name__})")
                result[word] = self.plain(inner, (*keys, word))
            return {word: inner for word, inner in result.items() if inner is not _TENSOR}
        if kind in (list, tuple, torch.Size):
            inner = [self.plain(inner, (*keys, str(index))) for index, inner in enumerate(value)]
            return [None if value is _TENSOR else value for value in inner]
        if kind in (Tensor, torch.nn.Parameter):
            name = "/".join(keys)
            if name in self.tensors:
                raise _damaged(self.path, f"tensor {name} is there twice")
            self.tensors[name] = self.checked(name, Tensor.detach(value))
            return _TENSOR
        if value is None or kind in (bool, float, str) or (kind is int and abs(value) < 2**63):
            return value
        raise _untrusted(
            self.path, f"{'/'.join(keys)} is a {printable(kind.__qualname__)}, neither a tensor nor a plain value"
        )

    def checked(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor whose numbers lie in the file one by one."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
            kind = "quantised" if tensor.is_quantized else f"{tensor.device.type}, {tensor.layout}"
            raise _untrusted(self.path, f"tensor {name} is not dense ({kind})")
        if tensor.dtype not in DTYPES.values() or tensor.is_neg() or tensor.is_conj():
            raise _untrusted(self.path, f"tensor {name} has numbers of a kind that no model has ({tensor.dtype})")
        count = tensor.numel() * tensor.itemsize
        steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
        reach = 1  # of the dimensions so far: a further one must step over them, or numbers would share a place
        for step, size in steps if count else ():
            if step < reach:
                raise _untrusted(
                    self.path, f"tensor {name} uses the same numbers several times ({tuple(tensor.shape)})"
                )
            reach += step * (size - 1)
        if count > self.backing.size or not self.backing.has(tensor):
            raise _damaged(self.path, f"tensor {name} claims numbers that the file does not have")
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
        raise _damaged(path, f"{len(tensors)} tensors of {end} bytes, more than the file can hold")
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _first_line(said: object) -> str:
    return printable((str(said).strip() or "no reason given").split("\n")[0])


def _damaged(path: Path | str, cause: str) -> CheckpointError:
    fix = f"copy the file again, or {SAFETENSORS}"
    return CheckpointError("not a usable pickle", where=str(path), cause=cause, fix=fix)


def _untrusted(path: Path, cause: str) -> UntrustedFileError:
    return UntrustedFileError("not a usable pickle", where=str(path), cause=cause, fix=SAFETENSORS)
