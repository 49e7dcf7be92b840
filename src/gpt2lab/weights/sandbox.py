"""The tensors of a stranger's pickle, where the user asks for them: a second process opens it, and this one never does.

That process has bounded memory, time and disk, and no network. What it does with the file is in `unpickle`; what it writes
is read here, without trust.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, Self

import psutil

from gpt2lab.errors import LabError, ResourceError, UntrustedFileError, as_lab_error
from gpt2lab.tensors import LARGEST_HEADER, read_header
from gpt2lab.weights.files import LARGEST_JSON, read_json, reader, regular_file
from gpt2lab.weights.layout import Stored
from gpt2lab.weights.pickles import MIB, printable
from gpt2lab.weights.unpickle import TENSORS, VALUES, damaged, explain, extract, untrusted

SECONDS, BYTES_PER_SECOND = 60, 20 * MIB
"""The second process may take that long, and longer for a file that a slow disk needs longer for."""

TROUBLE, NOISE = "trouble.json", "stderr"


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
    file: BufferedReader

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
            raise damaged(path, f"the child process wrote something else: {printable(str(error))}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    read = {name: reader(file, entry.offset, entry.shape, entry.dtype) for name, entry in entries.items()}
    return Unpacked(folder, values, [Stored(name, entries[name].shape, read[name]) for name in entries], file)


def _run_child(path: Path, real: Path, folder: Path, only: tuple[str, ...] | None) -> None:
    """Have a second process write what is in the file into `folder`; `path` is its name for the user."""
    seconds = SECONDS + real.stat().st_size // BYTES_PER_SECOND
    task = json.dumps({"path": str(real), "folder": str(folder), "only": only, "seconds": seconds})
    code = "from gpt2lab.weights.sandbox import child; child()"
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
        raise damaged(path, cause) from None
    if ended == 0:
        return
    cause = f"the process that read it ended with {signal.Signals(-ended).name if ended < 0 else f'code {ended}'}"
    if (folder / TROUBLE).is_file():
        cause = str(read_json(folder / TROUBLE))
    elif ended > 0:
        cause += f": {printable((folder / NOISE).read_bytes()[-200:].decode(errors='replace'))}"
    if ended == UntrustedFileError.exit_code:
        raise untrusted(path, cause)
    if ended == ResourceError.exit_code:
        fix = "free some space, or set TMPDIR to a folder on another disk"
        raise ResourceError("no place for its tensors", where=str(folder), cause=cause, fix=fix)
    raise damaged(path, cause)


# --- The second process -------------------------------------------------------------------------------------------------


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
        trouble = full or (error if isinstance(error, LabError) else explain(error, path))
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
