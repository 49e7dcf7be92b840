"""Where files lie that belong to no run, and how files and folders are written whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCAL_FOLDERS = ("data", "../shared/data")
"""Looked into for a local copy before anything is downloaded; the environment variable GPT2LAB_DATA comes first."""


def cache_folder() -> Path:
    """Prepared text and downloads: ``$GPT2LAB_CACHE``, else ``gpt2lab`` in the user's cache folder."""
    if own := os.environ.get("GPT2LAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2lab"


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that after a crash it is as before or whole, never half."""
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` at the end: after a crash at any point, that is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    recover(folder)
    aside.mkdir()
    try:
        yield aside
        put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """Let a folder that was filled aside take the place of another, if there is one; both are on the same disk."""
    recover(folder)
    for path in (*aside.iterdir(), aside):
        sync(path)
    try:
        if folder.exists():
            folder.rename(_before(folder))
        aside.rename(folder)
        sync(folder.parent)
    finally:
        recover(folder)


def recover(folder: Path) -> None:
    """Undo what one that died between the two renames of `put_in_place` left behind."""
    if (before := _before(folder)).exists() and not folder.exists():
        before.rename(folder)
    shutil.rmtree(before, ignore_errors=True)


def _before(folder: Path) -> Path:
    """Where the old folder is while the new one takes its place."""
    return folder.with_name(f".{folder.name}.before.part")


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def local_copy(name: str) -> Path | None:
    """The file or folder of that name in one of the local data folders, or None."""
    folders = [folder for folder in (os.environ.get("GPT2LAB_DATA"), *LOCAL_FOLDERS) if folder]
    return next((path for folder in folders if (path := Path(folder) / name).exists()), None)
