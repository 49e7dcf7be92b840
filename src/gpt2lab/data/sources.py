"""What text: the files and named texts behind a recipe's ``data.source``, as pieces of documents."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from gpt2lab.data.formats import Found, read_file
from gpt2lab.data.hub_datasets import PREFIX, hub_files
from gpt2lab.data.kept import Kept
from gpt2lab.data.named import python_docs, tiny_shakespeare
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.remote import RemoteFile, check_address, shown
from gpt2lab.data.shard_format import OpenFile
from gpt2lab.errors import DataError

STDIN = "-"
_ADDRESS = re.compile("https?://", re.IGNORECASE)

Reading = Callable[[], Iterator[Found | Piece | Skipped]]
"""Reads a source from its start; each time the same."""


@dataclass(frozen=True)
class Document:
    """A piece of text that stands by itself."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        name: for people; its suffix may decide what it is.
        read: gives its documents from its start, each time the same.
        identify: gives its identity.
    """

    name: str
    read: Reading
    identify: Callable[[], str] = str

    @cached_property
    def identity(self) -> str:
        """What changes when its content does: size and a hash of a few places of a local file, a server's ETag or date and
        length, on the Hub the commit and the path. Empty: unknown.

        Raises:
            DataError: the file is not there, or its server does not answer.
        """
        return self.identify()


def source_files(source: str | Sequence[str], fields: Sequence[str] = ()) -> list[SourceFile]:
    """The files of a source, or of several one after the other, in the order of their text.

    Args:
        source: python-docs, tinyshakespeare, a file, a folder, a pattern of files, an http(s) address, a data set on the Hub
            such as hf:OWNER/NAME, or - for standard input, which is read to its end at once.
        fields: which columns or keys hold the text; empty: guessed.

    Raises:
        DataError: there is no such source.
    """
    return _files(source, fields, RemoteFile.open)


def open_source(source: str | Sequence[str], fields: Sequence[str] = ()) -> Reading:
    """What reads a source, or several, from the start; see `source_files`. It is for those who read twice: what is small
    and far away is copied at the first time.

    Raises:
        DataError: there is no such source.
    """
    files = _files(source, fields, Kept().open)
    return lambda: (item for file in files for item in file.read())


def read_documents(source: str | Sequence[str], fields: Sequence[str] = ()) -> list[Document]:
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


def described(source: str | Sequence[str]) -> str:
    """A source, or several, for people: without the users, passwords and queries of addresses."""
    names = [_shown(one) for one in _listed(source)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def no_text(source: str | Sequence[str], skipped: list[Skipped]) -> DataError:
    """The error for a source in which nothing is text, or too little of what should be."""
    fault = next((item for item in skipped if item.fault), None)
    where = described(source)
    if fault is None:
        return DataError("no text", where=where, cause="it has no text in it", fix="give a file or a folder with text")
    at = f"{fault.file}, {fault.where}" if fault.where else fault.file
    fix = "convert it to UTF-8, or give a file or a folder with text"
    return DataError("not text", where=where, cause=f"{at}: {fault.reason}", fix=fix)


def _listed(source: str | Sequence[str]) -> list[str]:
    return [source] if isinstance(source, str) else list(source)


def _shown(source: str) -> str:
    return shown(source) if _ADDRESS.match(source) else source


def _files(
    source: str | Sequence[str], fields: Sequence[str], fetch: Callable[[RemoteFile], BinaryIO]
) -> list[SourceFile]:
    """The files of one source or several; of several, names tell which one a file is from, and each must have files.

    Args:
        fetch: opens a remote file.
    """
    sources = _listed(source)
    if len(sources) == 1:
        return _files_of(sources[0], "", fields, fetch)
    files = []
    for one in sources:
        if not (found := _files_of(one, _shown(one), fields, fetch)):
            raise no_text(one, [])
        files += found
    return files


def _files_of(
    source: str, label: str, fields: Sequence[str], fetch: Callable[[RemoteFile], BinaryIO]
) -> list[SourceFile]:
    """The files of one source; `label` goes before their names where they would not tell it."""

    def remote(name: str, file: RemoteFile, identify: Callable[[], str]) -> SourceFile:
        return SourceFile(name, partial(_read_stream, lambda: fetch(file), name, fields), identify)

    if source == "python-docs":
        return [SourceFile(source, python_docs, lambda: f"Python {sys.version}")]
    if source == "tinyshakespeare":
        text = tiny_shakespeare()
        return [SourceFile(source, lambda: iter([Piece(source, text, last=True)]), lambda: source)]
    if source == STDIN:
        kept = Kept()
        copy = kept.add(sys.stdin.buffer)
        return [SourceFile(source, partial(_read_stream, lambda: kept.read(*copy), source, fields))]
    if source.startswith(PREFIX):
        start = f"{label}: " if label else ""
        return [
            remote(f"{start}{found.path}", found.remote, partial(str, found.identity)) for found in hub_files(source)
        ]
    if _ADDRESS.match(source):
        check_address(source)
        file = RemoteFile(source)
        return [remote(file.name, file, lambda: file.identity)]
    return [
        SourceFile(name, partial(_read_path, path, name, fields), partial(_probe, path))
        for name, path in _local_files(source, label)
    ]


def _local_files(source: str, label: str) -> list[tuple[str, Path]]:
    """Name and path of each file of a folder, a pattern, or of one file."""
    if os.path.isdir(source):  # unlike Path.is_dir, never an error
        folder = Path(source)
        return [(os.path.join(label, path.relative_to(folder).as_posix()), path) for path in _below(folder)]
    if glob.has_magic(source) and not os.path.lexists(source):
        return [(path, Path(path)) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)]
    _refuse_unreadable(Path(source))
    return [(label or Path(source).name, Path(source))]


def _probe(path: Path) -> str:
    """A local file's identity; nothing for a pipe, which can be read but once."""
    _refuse_unreadable(path)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return OpenFile(path, file.fileno(), "cannot read the text", "look at the file").probe()


def _read_path(path: Path, name: str, fields: Sequence[str]) -> Iterator[Found | Piece | Skipped]:
    try:
        yield from read_file(path, name, fields)
    except OSError as error:
        raise DataError(
            "cannot read the text", where=str(path), cause=error.strerror or str(error), fix="look at the file"
        ) from None


def _read_stream(
    open_stream: Callable[[], BinaryIO], name: str, fields: Sequence[str]
) -> Iterator[Found | Piece | Skipped]:
    with open_stream() as stream:
        yield from read_file(stream, name, fields)


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
