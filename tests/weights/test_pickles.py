"""Pickles of strangers: nothing in them runs, each ends in one sentence or in the right tensors, and the parent lives on."""

import io
import json
import os
import pickle
import random
import shlex
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from gpt2lab.errors import CheckpointError, LabError, UntrustedFileError
from gpt2lab.weights import sandbox, unpickle
from gpt2lab.weights.pickles import describe, is_pickle, pickles_in, refuse
from gpt2lab.weights.sandbox import unpack

WEIGHT = torch.arange(40.0).view(8, 5).sin()
GENERIC = "it is a pickle, which can run code when it is opened"


# --- Pickles by hand --------------------------------------------------------------------------------------------------
# A payload is a list of opcodes that leave one object on the stack, and make the canary on the way.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def finished(body: bytes, protocol: int = 2) -> bytes:
    return b"\x80%c" % protocol + body + b"."


def touch(canary: Path) -> str:
    return f"touch {shlex.quote(str(canary))}"


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def through_memo(canary: Path) -> bytes:
    """STACK_GLOBAL whose names were pushed long before, in the other order, and forgotten in between."""
    names = text("system") + b"\x94" + b"0" + text("posix") + b"\x94" + b"0" + b"N0" + b"h\x01" + b"h\x00" + b"\x93"
    return b"\x80\x04" + names + b"(" + text(touch(canary)) + b"tR."


def partial(canary: Path) -> bytes:
    """BUILD: functools.partial is told afterwards what it calls."""
    state = b"(" + glob("posix", "system") + b"(" + text(touch(canary)) + b"t}}t"
    return call(glob("functools", "partial") + b"(" + glob("builtins", "print") + b"t\x81" + state + b"b")


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda c: finished(call(glob("os", "system"), text(touch(c)))),
    "posix.system": lambda c: finished(call(glob("posix", "system"), text(touch(c)))),
    "posix.system in protocol 0": lambda c: f"cposix\nsystem\n(S{touch(c)!r}\ntR.".encode(),
    "posix.system in protocol 5": lambda c: (
        b"\x80\x05\x95" + struct.pack("<Q", len(through_memo(c)) - 2) + through_memo(c)[2:]
    ),
    "builtins.eval": lambda c: finished(call(glob("builtins", "eval"), text(code(c)))),
    "builtins.exec": lambda c: finished(call(glob("builtins", "exec"), text(code(c)))),
    "__builtin__.eval of Python 2": lambda c: finished(call(glob("__builtin__", "eval"), text(code(c)))),
    "subprocess.check_call": lambda c: finished(
        call(glob("subprocess", "check_call"), b"](" + text("touch") + text(str(c)) + b"e")
    ),
    "getattr of an import": lambda c: finished(
        call(
            call(glob("builtins", "getattr"), call(glob("importlib", "import_module"), text("os")), text("system")),
            text(touch(c)),
        )
    ),
    "inside an argument": lambda c: finished(
        call(
            glob("collections", "OrderedDict"),
            b"](" + b"(" + call(glob("os", "system"), text(touch(c))) + b"Nte" + b"e",
        )
    ).replace(b"te" + b"e", b"te"),
    "STACK_GLOBAL through the memo": through_memo,
    "INST": lambda c: f"(S{touch(c)!r}\niposix\nsystem\n.".encode(),
    "OBJ": lambda c: finished(b"(" + glob("posix", "system") + text(touch(c)) + b"o"),
    "NEWOBJ": lambda c: finished(
        glob("builtins", "bytes")
        + b"("
        + call(glob("builtins", "map"), glob("os", "system"), b"](" + text(touch(c)) + b"e")
        + b"t\x81"
    ),
    "BUILD": lambda c: finished(partial(c)),
    "an extension code": lambda c: finished(b"\x82\xf0" + b"(" + text(touch(c)) + b"tR"),
    "a pickle in a pickle": lambda c: finished(
        call(glob("_pickle", "loads"), b"C" + bytes([len(inner := PAYLOADS["os.system"](c))]) + inner), protocol=3
    ),
    "after the first pickle": lambda c: finished(b"}") + PAYLOADS["os.system"](c),
    "before it is cut off": lambda c: PAYLOADS["os.system"](c)[:-1],
    "under a harmless key": lambda c: finished(b"}" + text("w") + call(glob("os", "system"), text(touch(c))) + b"s"),
    "thrown away": lambda c: finished(call(glob("os", "system"), text(touch(c))) + b"0}"),
    "a name with a dot": lambda c: (
        b"\x80\x04" + text("os") + text("path.os.system") + b"\x93(" + text(touch(c)) + b"tR."
    ),
}


class Evil:
    """What anybody can write who lets torch.save do the pickling."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (touch(self.canary),)


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def replaced(archive: bytes, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> bytes:
    """A torch archive with other members; `change` gets them without the folder they are in."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    return zipped({f"archive/{name}": content for name, content in change(members).items()})


def torch_zip(pickled: bytes, **records: bytes) -> bytes:
    """torch's archive with any pickle in it."""
    members = {"data.pkl": pickled, ".format_version": b"1", "byteorder": b"little", "version": b"3\n"}
    return replaced(saved({}), lambda _: members | {f"data/{name[1:]}": data for name, data in records.items()})


def legacy(pickled: bytes, keys: list[str], data: bytes = b"") -> bytes:
    """torch's file before version 1.6: five pickles, then each storage's bytes after their number."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    return b"".join(pickle.dumps(part, 2) for part in start) + pickled + pickle.dumps(keys, 2) + data


def storage(numel: int, *, view: bool = False) -> bytes:
    """A persistent id: storage "0" with so many floats."""
    count = b"\x8a\x08" + struct.pack("<q", numel)
    return (
        b"(" + text("storage") + glob("torch", "FloatStorage") + text("0") + text("cpu") + count + b"N" * view + b"tQ"
    )


def tensor(numel: int, size: int, stride: int = 1, *, view: bool = False) -> bytes:
    shape, step = (b"\x8a\x08" + struct.pack("<q", value) + b"\x85" for value in (size, stride))
    hooks = glob("collections", "OrderedDict") + b")R"
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"), storage(numel, view=view), b"K\x00", shape, step, b"\x89", hooks
    )


def one(body: bytes) -> bytes:
    """The pickle of {"w": body}."""
    return finished(b"}" + text("w") + body + b"s")


DOUBLED = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"t"
"""A list that is twice a list that is twice a list..."""
SHADOWED = (
    glob("collections", "OrderedDict")
    + b")R"
    + text("w")
    + tensor(4, 4)
    + b"s}"
    + text("items")
    + glob("torch", "Size")
    + b"sb"
)
"""A dict whose items() is something else."""


# --- The corpus -------------------------------------------------------------------------------------------------------

IN_TORCH: dict[str, Callable[[Path], bytes]] = {
    "torch zip": lambda c: saved({"w": WEIGHT, "x": Evil(c)}),
    "torch zip, protocol 4": lambda c: saved({"w": WEIGHT, "x": Evil(c)}, pickle_protocol=4),
    "legacy torch file": lambda c: saved({"w": WEIGHT, "x": Evil(c)}, _use_new_zipfile_serialization=False),
    "legacy torch file, in its keys": lambda c: (
        legacy(one(tensor(1, 1, view=True)), [])[: -len(pickle.dumps([], 2))] + PAYLOADS["os.system"](c)
    ),
    "legacy torch file, at its start": lambda c: PAYLOADS["os.system"](c) + legacy(finished(b"}"), []),
    "tar": lambda c: tarred({"storages": PAYLOADS["os.system"](c), "tensors": b"", "pickle": finished(b"}")}),
    "a pickled module's hook": lambda c: saved(OrderedDict(w=nn.Parameter(WEIGHT), x=[Evil(c)])),
    "a pickle, then a sound zip": lambda c: PAYLOADS["os.system"](c) + saved({"w": WEIGHT}),
}
"""Files that torch.load runs, when it is not told to load weights only."""

UNSOUND: dict[str, Callable[[], bytes]] = {
    "a pickled module": lambda: saved(nn.Linear(2, 2)),
    "a dict with a class": lambda: saved({"w": WEIGHT, "args": Namespace(lr=1)}),
    "a tensor alone": lambda: saved(WEIGHT),
    "TorchScript": lambda: replaced(saved({}), lambda m: m | {"code/__torch__.py": b"x", "constants.pkl": finished(b")")}),
    "an exported program": lambda: zipped({"x/archive_format": b"pt2", "x/models/model.json": b"{}"}),
    "doubling lists": lambda: torch_zip(finished(DOUBLED)),
    "doubling lists in a dict": lambda: torch_zip(one(DOUBLED)),
    "endless opcodes": lambda: torch_zip(b"\x80\x02]" + b"Na" * 200_000),
    "a deep list": lambda: torch_zip(one(b"]" * 50_000 + b"a" * 49_999)),
    "a dict in itself": lambda: torch_zip(finished(b"}q\x00" + text("w") + b"h\x00s")),
    "a string of 4 GB": lambda: torch_zip(one(b"X\xff\xff\xff\xff")),
    "bytes of 2**62": lambda: finished(b"\x8e" + struct.pack("<Q", 2**62), protocol=4),
    "a number of 2 GB": lambda: finished(b"\x8b\xff\xff\xff\x7f"),
    "a number too large": lambda: saved({"n": 2**70}),
    "a bytearray of 2**40": lambda: torch_zip(one(call(glob("builtins", "bytearray"), b"\x8a\x06\0\0\0\0\0\x01"))),
    "a FloatTensor of 2**40": lambda: torch_zip(one(call(glob("torch", "FloatTensor"), b"\x8a\x06\0\0\0\0\0\x01"))),
    "a FloatTensor of nothing known": lambda: torch_zip(one(call(glob("torch", "FloatTensor"), b"K\x20"))),
    "2**40 numbers that are one": lambda: saved({"w": torch.zeros(1).expand(2**40)}),
    "numbers used twice": lambda: saved({"w": WEIGHT.flatten().as_strided((8, 8), (4, 1))}),
    "rows used twice": lambda: saved({"w": torch.ones(4).expand(3, 4)}),
    "2**40 claimed": lambda: torch_zip(one(tensor(2**40, 2**40)), _0=bytes(16)),
    "2**40 claimed, legacy": lambda: legacy(one(tensor(2**40, 2**40, view=True)), ["0"], bytes(16)),
    "more than the storage has": lambda: torch_zip(one(tensor(4, 16)), _0=bytes(16), _1=bytes(256)),
    "a storage shorter than claimed": lambda: torch_zip(one(tensor(16, 16)), _0=bytes(16), _1=bytes(256)),
    "a storage that is not there": lambda: torch_zip(one(tensor(16, 16))),
    "a storage shorter than claimed, legacy": lambda: legacy(
        one(tensor(16, 16, view=True)), ["0"], struct.pack("<q", 4) + bytes(256)
    ),
    "grown, never read, legacy": lambda: legacy(one(tensor(4, 1024, view=True)), [], bytes(8192)),
    "a negative size": lambda: torch_zip(one(tensor(4, -4)), _0=bytes(16)),
    "a negative stride": lambda: torch_zip(one(tensor(4, 4, -1)), _0=bytes(16)),
    "sparse": lambda: saved({"w": torch.eye(4).to_sparse()}),
    "sparse with false places": lambda: replaced(
        saved({"w": torch.eye(4).to_sparse()}), lambda m: m | {"data/0": struct.pack("<8q", *[10**9] * 8)}
    ),
    "quantised": lambda: torch_zip(
        one(
            call(
                glob("torch._utils", "_rebuild_qtensor"),
                storage(4).replace(b"FloatStorage", b"QInt8Storage"),
                b"K\x00", b"K\x04\x85", b"K\x01\x85",
                b"(" + glob("torch", "per_tensor_affine") + b"G?\xf0\0\0\0\0\0\0K\x00t",
                b"\x89", glob("collections", "OrderedDict") + b")R",
            )
        ),
        _0=bytes(4),
    ),
    "complex": lambda: saved({"w": WEIGHT.to(torch.complex64)}),
    "without numbers (meta)": lambda: saved({"w": torch.empty(4, device="meta")}),
    "negated on reading": lambda: saved({"w": torch.tensor([1 + 2j]).conj().imag}),
    "zip-slip": lambda: replaced(saved({"w": WEIGHT}), lambda m: {"../../" + name: data for name, data in m.items()}),
    "a zip bomb": lambda: zipped({"archive/data.pkl": bytes(80 * 2**20)}, zipfile.ZIP_DEFLATED),
    "a zip bomb in bzip2": lambda: zipped({"archive/data.pkl": bytes(50 * 2**20)}, zipfile.ZIP_BZIP2),
    "packed numbers": lambda: zipped(
        {"a/data.pkl": one(tensor(64, 64)), "a/data/0": bytes(256), "a/version": b"3\n"}, zipfile.ZIP_DEFLATED
    ),
    "many members": lambda: zipped({f"a/{i}.pkl": finished(b"N") for i in range(20_000)}),
    "twice the same name": lambda: saved({"a": {"b/c": WEIGHT}, "a/b": {"c": WEIGHT}}),
    "0 and '0'": lambda: saved({0: WEIGHT, "0": WEIGHT}),
    "1 and '1'": lambda: saved({1: "one", "1": "two"}),
    "a key that moves the cursor": lambda: saved({"\x1b[2J\x1b]0;x\x07": WEIGHT}),
    "a class that moves the cursor": lambda: torch_zip(one(glob("os\x1b[2J", "x\x07\r"))),
    "a key that is a tensor": lambda: torch_zip(finished(b"}" + tensor(4, 4) + b"Ns"), _0=bytes(16)),
    "a key called __metadata__": lambda: saved({"__metadata__": WEIGHT}),
    "one tensor 1000 times": lambda: saved({str(i): WEIGHT for i in range(1000)}),
    "empty": lambda: b"",
    "one byte": lambda: b"\x80",
    "PK": lambda: b"PK\x03\x04",
    "text": lambda: b"The cat sat on the mat.\n" * 50,
    "zeros": lambda: bytes(5000),
    "a tar of nothing": lambda: bytes(257) + b"ustar" + bytes(4000),
    "random bytes": lambda: random.Random(0).randbytes(5000),
    "random bytes in a zip": lambda: torch_zip(random.Random(1).randbytes(500)),
    "another magic number": lambda: legacy(finished(b"}"), []).replace(b"\x6c\xfc", b"\x6d\xfc", 1),
}  # fmt: skip
"""Files whose tensors cannot be had; none of them has a payload."""


def sound() -> dict[str, tuple[bytes, dict[str, torch.Tensor], dict[str, Any]]]:
    """Files that are as they should be, their tensors and their values."""
    deep = {"model": {"w": WEIGHT, "head": WEIGHT}, "n": [1, -2.5, "x", None, True, {"y": []}], "i": {0: WEIGHT.long()}}
    others = {str(dtype): WEIGHT.mul(99).to(dtype) for dtype in unpickle.DTYPES.values()}
    views = {
        "turned": WEIGHT.t(),
        "rows": WEIGHT[2:5],
        "columns": WEIGHT[:, 1:3],
        "every": WEIGHT[::3],
        "one": WEIGHT[3, 2],
    }
    attributed = WEIGHT.clone()
    vars(attributed)["contiguous"] = 1
    empty = {"none": torch.zeros(0), "neither": torch.zeros(3, 0, 2)}
    values = {"model": {}, "n": deep["n"], "i": {}}
    flat = {"model/w": WEIGHT, "model/head": WEIGHT, "i/0": WEIGHT.long()}
    return {
        "nested": (saved(deep), flat, values),
        "nested, legacy": (saved(deep, _use_new_zipfile_serialization=False), flat, values),
        "every dtype": (saved(others), others, {}),
        "views": (saved(views), views, {}),
        "views, legacy": (saved(views, _use_new_zipfile_serialization=False), views, {}),
        "empty tensors": (saved(empty), empty, {}),
        "a parameter": (saved({"w": nn.Parameter(WEIGHT)}), {"w": WEIGHT}, {}),
        "a module's state": (saved(nn.Linear(5, 8).state_dict() | {"weight": WEIGHT, "bias": WEIGHT[:, 0]}),
                             {"weight": WEIGHT, "bias": WEIGHT[:, 0]}, {}),
        "a dict with another items()": (torch_zip(finished(SHADOWED), _0=bytes(16)), {"w": torch.zeros(4)}, {}),
        "a tensor with another contiguous()": (saved({"w": attributed}), {"w": WEIGHT}, {}),
        "nothing": (saved({}), {}, {}),
        "by hand": (torch_zip(one(tensor(4, 2, 2)), _0=struct.pack("<4f", 1, 2, 3, 4)), {"w": torch.tensor([1.0, 3.0])}, {}),
        "by hand, legacy": (
            legacy(one(tensor(4, 4, view=True)), ["0"], struct.pack("<q4f", 4, 1, 2, 3, 4)),
            {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {},
        ),
        "never read, legacy": (legacy(one(tensor(1024, 1024, view=True)), [], bytes(8192)), {"w": torch.zeros(1024)}, {}),
    }  # fmt: skip


# --- One child for many files -----------------------------------------------------------------------------------------

WORKER = """
import json, sys
from pathlib import Path
from gpt2lab.errors import LabError
from gpt2lab.weights import sandbox, unpickle
sandbox.leave_network()
sandbox.limit_resources(2**21, 300)
for line in sys.stdin:
    path, folder = map(Path, json.loads(line))
    try:
        unpickle.extract(path, folder)
        answer = [0, ""]
    except LabError as error:
        answer = [error.exit_code, str(error)]
    except BaseException as error:  # the child makes a CheckpointError of it
        answer = [4, f"{type(error).__name__}: {error}".replace(chr(10), " ")]
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """The child's inner function for one file after the other: starting a process for each would take a second each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process, self.deaths = folder, self.start(), 0

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def extract(self, path: Path) -> tuple[int, str]:
        """The exit code for one file, and the sentence; what it wrote is in `folder`."""
        stdin, stdout = self.pipes()
        stdin.write(json.dumps([str(path), str(self.folder)]) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:  # what is a CheckpointError for the parent
            self.stop()
            self.deaths += 1
            self.process = self.start()
            return 4, "it died"
        number, sentence = json.loads(answer)
        return number, sentence

    def pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def stop(self) -> None:
        for pipe in self.pipes():
            pipe.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.stop()


def assert_one_sentence(error: str) -> None:
    assert error.isprintable() and 10 < len(error) < 1500


# --- Code ---------------------------------------------------------------------------------------------------------

LIVE = """
import copyreg, pathlib, sys, torch, pickle
copyreg.add_extension("posix", "system", 240)
for path in map(pathlib.Path, sys.argv[1:]):
    with path.open("rb") as file:
        try:
            if path.suffix == ".pkl":
                while True:
                    pickle.load(file)
            torch.load(path, weights_only=False)
        except Exception:
            pass
"""


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """All files with a payload, each with its canary."""
    folder, files = tmp_path_factory.mktemp("armed"), {}
    for kinds, suffix in ((PAYLOADS, ".pkl"), (IN_TORCH, ".pt")):
        for name, make in kinds.items():
            path, canary = folder / f"{len(files)}{suffix}", folder / f"{len(files)}.canary"
            path.write_bytes(make(canary))
            files[name] = path, canary
    for name in PAYLOADS.keys() - {"after the first pickle"}:  # torch reads the first alone
        path, canary = folder / f"{len(files)}.pt", folder / f"{len(files)}.canary"
        path.write_bytes(torch_zip(PAYLOADS[name](canary)))
        files[f"{name}, in a torch zip"] = path, canary
    return files


def test_no_payload_runs(armed: dict[str, tuple[Path, Path]], worker: Worker) -> None:
    assert len(armed) == 51
    for name, (path, canary) in armed.items():
        with pytest.raises(UntrustedFileError, match="--allow-pickle") as refused:
            refuse(path)
        assert_one_sentence(str(refused.value))
        number, sentence = worker.extract(path)
        assert number in (4, 8), f"{name}: {number} {sentence}"
        assert_one_sentence(sentence)
        assert not canary.exists(), name
    # The control: every one of them is live.
    subprocess.run(
        [sys.executable, "-c", LIVE, *(str(path) for path, _ in armed.values())], check=True, capture_output=True
    )
    assert [name for name, (_, canary) in armed.items() if not canary.exists()] == []


def test_a_format_that_is_never_read_as_a_pickle_does_not_promise_it(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(saved({}))
    with pytest.raises(UntrustedFileError, match=r"Fix: use the same model's safetensors\.$"):
        refuse(tmp_path / "x.bin", final=True)


def test_the_first_function_of_a_payload_is_named(armed: dict[str, tuple[Path, Path]]) -> None:
    named = {name: describe(path).removeprefix("it contains pickled code: ") for name, (path, _) in armed.items()}
    assert GENERIC not in named.values()
    first = {
        "subprocess.check_call": "subprocess.check_call",
        "getattr of an import": "builtins.getattr",
        "NEWOBJ": "builtins.bytes",
        "BUILD": "functools.partial",
        "an extension code": "extension 240",
        "a pickle in a pickle": "_pickle.loads",
        "__builtin__.eval of Python 2": "__builtin__.eval",
        "builtins.eval": "builtins.eval",
        "builtins.exec": "builtins.exec",
        "a name with a dot": "os.path.os.system",
    }
    for name, said in named.items():
        kind = name.removesuffix(", in a torch zip")
        assert said == first.get(kind, said) and (kind in first or said in ("os.system", "posix.system")), name


def test_a_pickle_hidden_in_the_bytes_of_a_harmless_one_is_found(tmp_path: Path) -> None:
    inner = PAYLOADS["posix.system"](tmp_path / "canary")
    for hidden in (b"C" + bytes([len(inner)]) + inner, text(inner.decode("latin-1"))):
        (tmp_path / "x.pkl").write_bytes(finished(b"](" + hidden + b"Ne", protocol=3))
        assert describe(tmp_path / "x.pkl") == "it contains pickled code: posix.system"


def test_code_in_the_second_pickle_of_a_zip_is_found(tmp_path: Path) -> None:
    members = {"data.pkl": finished(b"}"), "extra/other.pkl": PAYLOADS["os.system"](tmp_path / "canary")}
    (tmp_path / "x.pt").write_bytes(zipped(members))
    assert describe(tmp_path / "x.pt") == "it contains pickled code: os.system"


def test_how_far_a_description_looks_is_bounded(tmp_path: Path) -> None:
    evil, path = PAYLOADS["os.system"](tmp_path / "canary"), tmp_path / "x.pt"
    for many in (10, 200):  # members whose names are so long that 200 fill 6 MB of the directory
        names = {f"{number}{'x' * 30_000}": b"" for number in range(many)}
        path.write_bytes(zipped({"x/data.pkl": evil} | names))
        assert describe(path) == ("it contains pickled code: os.system" if many == 10 else GENERIC)
    for many in (10, 100_000):
        path.write_bytes(b"\x80\x02" + b"N0" * many + evil[2:])
        assert describe(path) == ("it contains pickled code: os.system" if many == 10 else GENERIC)


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_file_is_refused_in_one_sentence(name: str, worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(UNSOUND[name]())
    assert_one_sentence(describe(path))
    deaths = worker.deaths
    number, sentence = worker.extract(path)
    print(number, sentence)
    assert number in (4, 8) and worker.deaths == deaths, f"{number} {sentence}"
    assert_one_sentence(sentence)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("TorchScript", "it contains pickled code: a TorchScript program"),
        ("an exported program", "it contains pickled code: an exported program (.pt2)"),
        ("a pickled module", "it contains pickled code: torch.nn.modules.linear.Linear"),
        ("a dict with a class", "it contains pickled code: argparse.Namespace"),
        ("a class that moves the cursor", "it contains pickled code: os?[2J.x??"),
        ("endless opcodes", GENERIC),
        ("random bytes", GENERIC),
        ("empty", GENERIC),
    ],
)
def test_what_a_description_says(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(UNSOUND[name]())
    assert describe(tmp_path / "x.pt") == says


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("2**40 numbers that are one", r"tensor w uses the same numbers several times \(\(1099511627776,\)\)"),
        ("numbers used twice", "tensor w uses the same numbers several times"),
        ("sparse", "tensor w is not dense"),
        ("quantised", r"tensor w is not dense \(quantised\)"),
        ("without numbers (meta)", "tensor w is not dense"),
        ("negated on reading", "numbers of a kind that no model has"),
        ("complex", "numbers of a kind that no model has"),
        ("2**40 claimed", "claims numbers that the file does not have"),
        ("a storage shorter than claimed", "claims numbers that the file does not have"),
        ("grown, never read, legacy", "claims numbers that the file does not have"),
        ("a FloatTensor of nothing known", "claims numbers that the file does not have"),
        ("packed numbers", "compressed, which torch does not do"),
        ("one tensor 1000 times", "more than the file can hold"),
        ("doubling lists in a dict", "more than 100000 values"),
        ("a dict in itself", "more than 32 in each other"),
    ],
)  # fmt: skip
def test_why_a_file_is_refused(name: str, says: str, tmp_path: Path) -> None:
    """In this process, on purpose: these are only tensors."""
    (tmp_path / "x.pt").write_bytes(UNSOUND[name]())
    with pytest.raises(LabError, match=says):
        unpickle.extract(tmp_path / "x.pt", tmp_path)


def test_what_another_library_declared_safe_is_not(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(UNSOUND["a dict with a class"]())
    with torch.serialization.safe_globals([Namespace]), pytest.raises(UntrustedFileError, match=r"argparse\.Namespace"):
        unpickle.extract(tmp_path / "x.pt", tmp_path)


@pytest.mark.parametrize("name", sound())
def test_a_sound_file_gives_its_tensors(name: str, worker: Worker, tmp_path: Path) -> None:
    content, tensors, values = sound()[name]
    (tmp_path / "x.pt").write_bytes(content)
    assert describe(tmp_path / "x.pt") == GENERIC
    assert worker.extract(tmp_path / "x.pt") == (0, "")
    assert json.loads((worker.folder / unpickle.VALUES).read_text()) == values
    found = load_file(worker.folder / unpickle.TENSORS)
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_every_length_of_a_cut_file_is_refused(worker: Worker, tmp_path: Path) -> None:
    for kind, options in (("zip", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        content = saved({"w": WEIGHT, "n": 1}, **options)
        for length in range(0, len(content), 13):
            (tmp_path / "x.pt").write_bytes(content[:length])
            assert_one_sentence(describe(tmp_path / "x.pt"))
            number, sentence = worker.extract(tmp_path / "x.pt")
            assert number in (4, 8), f"{kind} cut at {length}: {number} {sentence}"
        (tmp_path / "x.pt").write_bytes(content)
        assert worker.extract(tmp_path / "x.pt") == (0, "")
    assert worker.deaths == 0


def record(pickled: bytes) -> bytes:
    return torch_zip(pickled, _0=WEIGHT.numpy().tobytes())


PICKLED = zipfile.ZipFile(io.BytesIO(saved({"w": WEIGHT, "n": {"a": [1, "b"]}}))).read("archive/data.pkl")
SEEDS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (saved({"w": WEIGHT, "n": {"a": [1, "b"]}}), bytes),
    (saved({"w": WEIGHT}, _use_new_zipfile_serialization=False), bytes),
    (PICKLED, record),
    (one(tensor(40, 40)), record),
]
"""What is mutated, and what is put around it afterwards."""


@settings(max_examples=100)
@given(seed=st.sampled_from(SEEDS), data=st.data())
def test_mutations_never_reach_the_parent(
    worker: Worker,
    tmp_path_factory: pytest.TempPathFactory,
    seed: tuple[bytes, Callable[[bytes], bytes]],
    data: st.DataObject,
) -> None:
    path, (begin, around) = tmp_path_factory.getbasetemp() / "mutated.pt", seed
    content = bytearray(begin)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        end = place + data.draw(st.integers(0, 8))
        content[place:end] = data.draw(st.binary(max_size=8))
        content = content or bytearray(1)
    path.write_bytes(around(bytes(content)))
    assert_one_sentence(describe(path))
    number, sentence = worker.extract(path)
    assert number in (0, 4, 8)
    if number:
        assert_one_sentence(sentence)
    else:
        load_file(worker.folder / unpickle.TENSORS)


# --- The whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files have a folder of their own, which is empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert not list(folder.iterdir())


def test_tensors_and_values_come_through_the_child(tmp_path: Path, no_leftovers: None) -> None:
    content = sound()["nested"][0]
    path = tmp_path / "a name with spaces, ü.pt"
    path.write_bytes(content)
    with unpack(path, only=("model", "n", "absent")) as unpacked:
        assert unpacked.folder.is_dir()
        assert unpacked.values == {"model": {}, "n": [1, -2.5, "x", None, True, {"y": []}]}
        assert [stored.name for stored in unpacked.tensors] == ["model/w", "model/head"]
        below = {stored.name: stored for stored in unpacked.below("model")}
        assert below.keys() == {"w", "head"} and below["w"].shape == (8, 5)
        assert torch.equal(below["w"].read(2, 6), WEIGHT[2:6])
        assert list(unpacked.below("mod")) == []
    assert not unpacked.folder.exists()


def test_code_ends_the_child_with_its_name(tmp_path: Path, no_leftovers: None) -> None:
    (tmp_path / "x.pt").write_bytes(IN_TORCH["torch zip"](tmp_path / "canary"))
    with pytest.raises(UntrustedFileError, match=r"x\.pt\): it contains pickled code: posix\.system\. Fix: use"):
        unpack(tmp_path / "x.pt")
    assert not (tmp_path / "canary").exists()


def test_memory_that_no_file_needs_is_not_given(tmp_path: Path, no_leftovers: None) -> None:
    (tmp_path / "x.pt").write_bytes(torch_zip(one(call(glob("builtins", "bytearray"), b"\x8a\x05\0\0\0\x40\0"))))
    with pytest.raises(CheckpointError, match="it asks for more memory than a file of its size needs"):
        unpack(tmp_path / "x.pt")


def test_a_child_that_does_not_end_is_ended(
    tmp_path: Path, no_leftovers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    doubled = b")q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
    (tmp_path / "x.pt").write_bytes(torch_zip(finished(b"}" + doubled + b"Ns")))  # 2**60 steps to hash the key
    monkeypatch.setattr(sandbox, "SECONDS", 3)
    with pytest.raises(CheckpointError, match=r"took more than 3 seconds|SIGXCPU|SIGKILL"):
        unpack(tmp_path / "x.pt")


def test_a_child_that_dies_is_one_sentence(tmp_path: Path, no_leftovers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pt").write_bytes(saved({"w": WEIGHT}))
    for program, says in (
        ("kill -SEGV $$", "ended with SIGSEGV"),
        ("echo 'no torch here' >&2; exit 1", "code 1: no torch"),
    ):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "python").chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        with pytest.raises(CheckpointError, match=says) as ended:
            unpack(tmp_path / "x.pt")
        assert_one_sentence(str(ended.value))


def test_a_child_that_lies_is_not_believed(tmp_path: Path, no_leftovers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (tmp_path / "lie").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "none").write_bytes(struct.pack("<Q", 2) + b"{}")
    (tmp_path / "x.pt").write_bytes(saved({"w": WEIGHT}))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for said, says in (
        (f"cp {tmp_path}/lie tensors.safetensors; echo '{{}}' > values.json", "the child process wrote something else"),
        (f"cp {tmp_path}/none tensors.safetensors; echo '[]' > values.json", "the child process wrote something else"),
        (f"ln -s {tmp_path}/none tensors.safetensors; echo '{{}}' > values.json", "outside its folder"),
        ("echo '{}' > values.json", "tensors.safetensors.*No such file"),
        ("true", "values.json.*No such file"),
    ):
        (tmp_path / "python").write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / "python").chmod(0o700)
        with pytest.raises(LabError, match=says):
            unpack(tmp_path / "x.pt")


LIMITED = """
import os, resource, socket, sys
from pathlib import Path
from gpt2lab.weights import sandbox
port = int(sys.argv[1])
socket.create_connection(("127.0.0.1", port)).close()
left = sandbox.leave_network()
try:
    socket.create_connection(("127.0.0.1", port)).close()
    connected = True
except OSError:
    connected = False
sandbox.limit_resources(2**20, 100)
bytearray(2**28)
Path("small").write_bytes(bytes(2**21))
caught = []
for attempt in (lambda: bytearray(2**30), lambda: Path("large").write_bytes(bytes(2**27))):
    try:
        attempt()
    except (MemoryError, OSError) as error:
        caught.append(type(error).__name__)
print(left, connected, resource.getrlimit(resource.RLIMIT_CPU)[0], *caught)
"""


def test_the_child_has_no_network_and_little_memory_and_disk(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-c", LIMITED, port],
            env=environment,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
    left, connected, *caught = ended.stdout.split()
    assert connected != left, "it says whether it left the network, and does"
    assert caught == ["100", "MemoryError", "OSError"]


# --- Which files are pickles ------------------------------------------------------------------------------------------


def test_pickles_are_found_by_name_or_by_their_first_bytes(tmp_path: Path) -> None:
    by_name = [
        ".metadata", "__0_0.distcp", "custom_checkpoint_0.pkl", "optimizer.bin", "optimizer.pt", "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin", "random_states_0.pkl", "scheduler.pt", "training_args.bin", "model.PTH",
        "last.ckpt", "model.pt2", "random_states_1",
    ]  # fmt: skip
    by_content = {
        "weights": saved({}),
        "old.dat": saved({}, _use_new_zipfile_serialization=False),
        "list": pickle.dumps([1]),
        "tar.x": tarred({"pickle": b""}),
    }
    others = ["model.safetensors", "config.json", "merges.txt", "README.md", "empty"]
    for name in by_name + others:
        (tmp_path / name).write_bytes(b"{}" if name != "empty" else b"")
    for name, content in by_content.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    assert pickles_in(tmp_path) == sorted(tmp_path / name for name in (*by_name, *by_content))


def test_what_is_no_plain_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.pt").write_bytes(saved({}))
    (tmp_path / "link.pt").symlink_to(elsewhere / "x.pt")
    for name, says in (("pipe.pt", "no plain file"), ("link.pt", "outside its folder"), ("absent.pt", "No such file")):
        path = tmp_path / name
        assert says in describe(path)
        with pytest.raises(LabError, match=says):
            unpack(path)
        with pytest.raises(UntrustedFileError, match=says):
            refuse(path)
    assert not is_pickle(tmp_path / "pipe.pt") and not is_pickle(tmp_path / "absent.pt") and not is_pickle(tmp_path)
