"""Pickles of strangers: what one would do, read off without running it.

A pickle is a program that builds an object when it is opened. This room only ever disassembles it; `unpickle` has a second
process open it, where the user asks for that.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gpt2lab.errors import LabError, UntrustedFileError
from gpt2lab.weights.files import regular_file

MIB = 2**20
LARGEST_PICKLE, MOST_OPCODES, MOST_MEMBERS = 64 * MIB, 200_000, 1000
"""How much of a file is disassembled. GPT-2 XL and its optimizer's state need a quarter of that."""
LARGEST_DIRECTORY = 4 * MIB
ZIP, TAR = b"PK\x03\x04", b"ustar"
_HARMLESS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|torch\.(Size|device)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter\.Parameter|torch\._tensor\._rebuild_from_type_v2|torch\.Tensor"
    r"|torch\.storage\.(Untyped|Typed)Storage|torch\.(bfloat16|float\d+|int\d+|uint8|bool)"
    r"|torch\.(Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_NAMES = re.compile(  # what training libraries call their pickles
    r".*\.(bin|pt|pth|pt2|ckpt|pkl|pickle|joblib|dill|distcp)(\.\d+)?|\.metadata|random_states_\d+.*", re.IGNORECASE
)
SAFETENSORS = "use the same model's safetensors"


def describe(path: Path) -> str:
    """What opening a pickled file would do, as a clause for a message. Nothing in it is run, and nothing raised."""
    try:
        code = code_in(regular_file(path))
    except LabError as error:
        return error.cause
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return f"it contains pickled code: {code}" if code else "it is a pickle, which can run code when it is opened"


def refuse(path: Path, *, final: bool = False) -> NoReturn:
    """Say that a pickle is not opened, and what is in it.

    Args:
        final: --allow-pickle would not help, because its format is not read.

    Raises:
        UntrustedFileError: always.
    """
    allow = "or give --allow-pickle, which reads tensors only, in a child process"
    fix = SAFETENSORS if final else f"{SAFETENSORS}, {allow}"
    raise UntrustedFileError("not opened", where=str(path), cause=describe(path), fix=fix)


def is_pickle(path: Path) -> bool:
    """Whether a file begins as torch's archives, old and new, and pickles from protocol 2 on do."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError):
        return False
    return head.startswith((ZIP, *(b"\x80%c" % protocol for protocol in range(2, 6)))) or head[257:262] == TAR


def pickles_in(folder: Path) -> list[Path]:
    """The files of a folder that are pickles, by their names or, where those say nothing, by their first bytes; sorted."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and (_NAMES.fullmatch(path.name) or is_pickle(path))
    )


def code_in(path: Path) -> str | None:
    """The first thing in a file that does more than rebuild tensors, by its name, or None."""
    with _Bounded(path) as file:
        head = file.read(512)
        disassembler = _Disassembler()
        pieces = [] if head[:4] == ZIP else [_whole]
        pieces += [_zip_members, *([_tar_members] if head[257:262] == TAR else [])]
        for piece in pieces:
            # Archives of strangers make their readers stumble in many ways, and what was found before that counts.
            with contextlib.suppress(Exception):
                for data in piece(file):
                    if isinstance(data, str):
                        return data
                    for name in disassembler.globals(data):
                        if not _HARMLESS.fullmatch(name):
                            return printable(name)
    return None


class _Bounded(io.FileIO):
    """A file that hands out no more than `left` bytes, whatever its own headers say."""

    left = LARGEST_PICKLE

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("more than a model's file has of this")
        return data


def _whole(file: _Bounded) -> Iterator[bytes | str]:
    file.seek(0)
    yield io.FileIO.read(file, LARGEST_PICKLE)


def _zip_members(file: _Bounded) -> Iterator[bytes | str]:
    """The pickles of a zip archive, after a word on those that hold programs by design."""
    file.left = LARGEST_DIRECTORY
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        file.left = left = LARGEST_PICKLE
        if any("/code/" in f"/{name}" or name.endswith("constants.pkl") for name in names):
            yield "a TorchScript program"
        if any(name.endswith(("archive_format", "serialized_exported_program.json")) for name in names):
            yield "an exported program (.pt2)"
        for member in members[:MOST_MEMBERS]:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                continue  # torch knows no others, and these are unpacked without a bound
            with archive.open(member) as content:
                head = content.read(2)
                if member.filename.endswith((".pkl", ".pickle")) or (head[:1] == b"\x80" and head[1:] <= b"\x05"):
                    data = head + content.read(left)
                    left = max(0, left - len(data))
                    yield data


def _tar_members(file: _Bounded) -> Iterator[bytes | str]:
    file.seek(0)
    file.left = LARGEST_PICKLE
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for _, member in zip(range(MOST_MEMBERS), archive, strict=False):
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                yield content.read(min(member.size, LARGEST_PICKLE))


class _Disassembler:
    """Follows the stack of pickles, of which it keeps what can name a global: strings."""

    def __init__(self) -> None:
        self.opcodes_left = MOST_OPCODES

    def globals(self, data: bytes, depth: int = 0) -> Iterator[str]:
        """The names of all globals in pickles that follow each other, up to where they stop being pickles, in order."""
        file, inner = io.BytesIO(data), []
        # The disassembler raises whatever the bytes make it stumble over; an unpickler would have run what came before.
        with contextlib.suppress(Exception):
            while True:
                stack: list[Any] = []
                memo: dict[Any, Any] = {}
                arg: Any
                for opcode, arg, _ in pickletools.genops(file):
                    self.opcodes_left -= 1
                    if self.opcodes_left < 0:
                        return
                    popped = _pop(stack, opcode.stack_before)
                    pushed: list[Any] = list(opcode.stack_after)
                    match opcode.name:
                        case "GLOBAL" | "INST":
                            yield arg.replace(" ", ".")
                        case "STACK_GLOBAL":
                            yield ".".join(map(str, popped))
                        case "EXT1" | "EXT2" | "EXT4":
                            yield f"extension {arg}"
                        case "PUT" | "BINPUT" | "LONG_BINPUT":
                            memo[arg] = stack[-1]
                        case "MEMOIZE":
                            memo[len(memo)] = popped[0]
                            pushed = popped
                        case "GET" | "BINGET" | "LONG_BINGET":
                            pushed = [memo[arg]]
                        case "DUP":
                            pushed = popped * 2
                        case _ if isinstance(arg, str | bytes | bytearray):
                            pushed = [arg]
                            text = arg.encode("latin-1", "replace") if isinstance(arg, str) else bytes(arg)
                            if text[:1] in (b"\x80", b"c", b"("):
                                inner.append(text)
                    stack += pushed
        if depth < 4:
            for text in inner:
                yield from self.globals(text, depth + 1)


def _pop(stack: list[Any], before: list[pickletools.StackObject]) -> list[Any]:
    """Take from the stack what an opcode takes."""
    count = len(before)
    if pickletools.markobject in before:
        while stack.pop() is not pickletools.markobject:
            pass
        count = before.index(pickletools.markobject)
    if count > len(stack):
        raise IndexError("nothing left on the stack")
    popped = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return popped


def printable(text: str) -> str:
    """A stranger's words for a message: no control characters, and not many of them."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])
