"""What text: the files and named texts behind a recipe's ``data.source``, as pieces of documents."""

from __future__ import annotations

import ast
import atexit
import glob
import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt2lab.data.formats import Found, read_file
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.errors import DataError
from gpt2lab.paths import cache_folder, local_copy

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDIN = "-"

_NOT_PROSE = frozenset(  # tables, tests, applications, and what some systems ship as separate packages
    "site-packages dist-packages __pycache__ test tests idlelib turtledemo lib2to3 distutils tkinter encodings ensurepip "
    "pydoc_data msilib __phello__".split()
)

Reading = Callable[[], Iterator[Found | Piece | Skipped]]
"""Reads a source from its start; each time the same."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    identity: str
    read: Callable[[], Iterator[Found | Piece | Skipped]]


def source_files(source: str, fields: Sequence[str] = ()) -> list[SourceFile]:
    if os.path.isdir(source):
        folder = Path(source)
        files = [(path.relative_to(folder).as_posix(), path) for path in _below(folder)]
    elif glob.has_magic(source):
        files = [(path, Path(path)) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
    else:
        files = [(Path(source).name, Path(source))]
    return [SourceFile(name, str(path.stat().st_size), partial(read_file, path, name, fields)) for name, path in files]


@dataclass(frozen=True)
class Document:
    """A piece of text that stands by itself."""

    name: str
    text: str


def open_source(source: str, fields: Sequence[str] = ()) -> Reading:
    """What reads a source: python-docs, tinyshakespeare, a file, a folder, a pattern of files, or - for standard input.

    Args:
        fields: which columns or keys hold the text; empty: guessed.

    Raises:
        DataError: there is no such source.
    """
    if source == "python-docs":
        return _python_docs
    if source == "tinyshakespeare":
        text = _tiny_shakespeare()
        return lambda: iter([Piece(source, text, last=True)])
    if source == STDIN:
        files = [(STDIN, _keep_stdin())]
    elif os.path.isdir(source):  # unlike Path.is_dir, never an error
        folder = Path(source)
        files = [(path.relative_to(folder).as_posix(), path) for path in _below(folder)]
    elif glob.has_magic(source) and not os.path.lexists(source):
        files = [(path, Path(path)) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
    else:
        files = [(Path(source).name, Path(source))]
        _refuse_unreadable(files[0][1])
    return partial(_read_files, files, fields)


def read_documents(source: str, fields: Sequence[str] = ()) -> list[Document]:
    """Every document of a source that fits into memory; files that are no text are passed over.

    Raises:
        DataError: there is no such source, no text in it, or a fault in a text.
    """
    documents, parts, skipped = list[Document](), list[str](), list[Skipped]()
    for item in open_source(source, fields)():
        match item:
            case Skipped():
                skipped.append(item)
                if item.fault and item.where:
                    raise no_text(source, [item])
            case Piece():
                parts.append(item.text)
                if item.last:
                    documents += [Document(item.name, "".join(parts))] if any(parts) else []
                    parts = []
    if not documents:
        raise no_text(source, skipped)
    return documents


def no_text(source: str, skipped: list[Skipped]) -> DataError:
    """The error for a source in which nothing is text, or too little of what should be."""
    fault = next((item for item in skipped if item.fault), None)
    if fault is None:
        return DataError("no text", where=source, cause="it has no text in it", fix="give a file or a folder with text")
    at = f"{fault.file}, {fault.where}" if fault.where else fault.file
    fix = "convert it to UTF-8, or give a file or a folder with text"
    return DataError("not text", where=source, cause=f"{at}: {fault.reason}", fix=fix)


def _read_files(files: list[tuple[str, Path]], fields: Sequence[str]) -> Iterator[Found | Piece | Skipped]:
    for name, path in files:
        try:
            yield from read_file(path, name, fields)
        except OSError as error:
            raise DataError(
                "cannot read the text", where=str(path), cause=error.strerror or str(error), fix="look at the file"
            ) from None


def _below(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, by their names, byte by byte; what is hidden is left out."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: os.fsencode(path.relative_to(folder)))


def _refuse_unreadable(path: Path) -> None:
    """Say that a file cannot be read before anything else is done.

    Raises:
        DataError: it cannot.
    """
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:
        fix = "give python-docs, tinyshakespeare, or the path of a text file or folder"
        cause = getattr(error, "strerror", None) or str(error)
        raise DataError("cannot read the text", where=f"{path!s:.200}", cause=cause, fix=fix) from None


def _keep_stdin() -> Path:
    """Standard input, in a file that ends with this process: it is read twice."""
    handle, path = tempfile.mkstemp(prefix="gpt2lab-stdin-")
    atexit.register(os.unlink, path)
    with open(handle, "wb") as kept:
        shutil.copyfileobj(sys.stdin.buffer, kept)
    return Path(path)


def _python_docs() -> Iterator[Found | Piece | Skipped]:
    """The language reference that ``help()`` shows, then the library's source with its documentation inside."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        # The file is one assignment of a literal dict, read as such: nothing of it is run.
        assignment = next(s for s in ast.parse(topics.read_text(encoding="utf-8")).body if isinstance(s, ast.Assign))
        for topic, text in sorted(ast.literal_eval(assignment.value).items()):
            yield Piece(f"topics/{topic}", text, last=True)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        generated = relative.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize", "this"))
        if generated or _NOT_PROSE.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            yield Piece(relative.as_posix(), path.read_text(encoding="utf-8"), last=True)
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding


def _tiny_shakespeare() -> str:
    """The 40,000 lines of Karpathy's char-rnn: a local copy, or downloaded once; its hash is checked either way."""
    cached = cache_folder() / "tinyshakespeare.txt"
    copy = local_copy("tinyshakespeare/input.txt") or local_copy("tinyshakespeare.txt") or cached
    if copy.is_file():
        content = copy.read_bytes()
        if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
            return content.decode()
        cause = f"its SHA-256 is not {SHAKESPEARE_SHA256[:12]}..."
        raise DataError(
            "not tinyshakespeare", where=str(copy), cause=cause, fix=f"remove it; it comes from {SHAKESPEARE_URL}"
        )
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read(4 * 2**20)
    except OSError as error:
        raise DataError(
            "tinyshakespeare cannot be had",
            where="data.source",
            cause=f"no local copy, and the download failed ({error})",
            fix="go online once, put it at data/tinyshakespeare/input.txt, or use --data.source=python-docs",
        ) from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        cause = f"{SHAKESPEARE_URL} gave other bytes than it should"
        raise DataError(
            "not tinyshakespeare", cause=cause, fix="try again, or put a good copy at data/tinyshakespeare/input.txt"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(content)
    return content.decode()
