"""What a step folder must hold: the size and SHA-256 of each file, in a list that is signed with its own hash.

Hashing runs in large pieces: Python lets other threads work during each, and training is one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import CheckpointError

FORMAT = 2
"""The version of what lies in a step folder; older ones are migrated when they are read (see checkpoint.py)."""
MANIFEST = "manifest.json"
PIECE_BYTES, CACHED_BYTES = 2**24, 2**26


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A verified list.

    Attributes:
        format: the version that the folder was written in.
        files: every file but the manifest, by its name.
    """

    format: int
    files: dict[str, FileRecord]


Seen = dict[tuple[Any, ...], FileRecord]
"""Files that were hashed before, by path, size, times and inode: whoever verifies often hashes again only what changed."""


def write(folder: Path, known: Mapping[str, FileRecord], **about: Any) -> None:
    """List the folder's files, and sign the list.

    Args:
        known: files that were hashed while they were written.
        about: what else the list says, such as the step.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    files = {path.name: asdict(known.get(path.name) or measure(path)) for path in paths}
    (folder / MANIFEST).write_bytes(_signed({"format": FORMAT, **about, "files": files}))


def verify(folder: Path, seen: Seen | None = None) -> Manifest:
    """Check every file of a step folder against its manifest, and return that.

    Args:
        seen: files that need not be hashed again; gets those that are. They are not kept in the system's memory.

    Raises:
        CheckpointError: a file is missing, changed, or not listed, or a newer gpt2lab wrote the folder.
    """
    once, seen = seen is not None, {} if seen is None else seen
    try:
        manifest = _read(folder)
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != manifest.files.keys():
            raise ValueError(f"it lists {sorted(manifest.files)}, but there are {sorted(present)}")
        for name, listed in manifest.files.items():
            stamp = _stamp(folder / name)  # before it is read: what changes later has another one
            if stamp not in seen:
                seen[stamp] = measure(folder / name, once=once)
            compare(name, listed, seen[stamp])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(folder, error) from None
    return manifest


def write_measured(path: Path, pieces: Iterable[memoryview]) -> FileRecord:
    """Write a file, hashed on the way."""
    digest, size, cached = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            size, cached = size + len(piece), cached + len(piece)
            if cached > CACHED_BYTES:
                file.flush()
                os.fsync(file.fileno())
                _let_go(file.fileno())
                cached = 0
    return FileRecord(size, digest.hexdigest())


def measure(path: Path, *, once: bool = False) -> FileRecord:
    """Size and hash of a file.

    Args:
        once: it will not be read again soon.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path.name} is no file")
    digest, size = hashlib.sha256(), 0
    piece = memoryview(bytearray(min(path.stat().st_size, PIECE_BYTES) or 1))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
            if once:
                _let_go(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _let_go(handle: int) -> None:
    """Give back the memory in which the system keeps a copy of a file: new memory for all of it takes longer than a disk.

    What is read afterwards is then what the disk has.
    """
    if hasattr(os, "posix_fadvise"):  # Linux
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def compare(name: str, listed: FileRecord, found: FileRecord) -> None:
    """Refuse a file that is not the one listed.

    Raises:
        ValueError: it is not.
    """
    if found != listed:
        said = " and ".join(f"{record.size} bytes, {record.sha256[:12]}..." for record in (listed, found))
        raise ValueError(f"{name} is not what was written: listed and found are {said}")


def damaged(folder: Path, error: Exception) -> CheckpointError:
    """The error for a folder that is not what was written."""
    fix = "copy it again, or go back to an older step folder"
    return CheckpointError("damaged checkpoint", where=str(folder), cause=str(error), fix=fix)


def _read(folder: Path) -> Manifest:
    written = (folder / MANIFEST).read_bytes()
    listed = json.loads(written)
    del listed["sha256"]
    if written != _signed(listed):
        raise ValueError("the manifest does not match its own hash")
    if type(listed["format"]) is not int or listed["format"] < 1:
        raise ValueError(f"there is no format {listed['format']}")
    if listed["format"] > FORMAT:
        cause = f"format {listed['format']} > {FORMAT}"
        raise CheckpointError("newer format", where=str(folder), cause=cause, fix="update gpt2lab")
    return Manifest(listed["format"], {name: FileRecord(**about) for name, about in listed["files"].items()})


def _signed(listed: dict[str, Any]) -> bytes:
    """The bytes of a manifest, its own hash at the end."""
    digest = hashlib.sha256(json.dumps(listed, indent=1).encode()).hexdigest()
    return json.dumps(listed | {"sha256": digest}, indent=1).encode()


def _stamp(path: Path) -> tuple[Any, ...]:
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino
