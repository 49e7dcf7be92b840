"""Where files lie that belong to no run: prepared text, corpora that somebody already has, and the Hub."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from gpt2lab.errors import DataError

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


def local_copy(name: str) -> Path | None:
    """The file or folder of that name in one of the local data folders, or None."""
    folders = [folder for folder in (os.environ.get("GPT2LAB_DATA"), *LOCAL_FOLDERS) if folder]
    return next((path for folder in folders if (path := Path(folder) / name).exists()), None)


def hub_files(repository: str, *names: str) -> list[Path]:
    """Files of a repository on the Hugging Face Hub, from its local cache or downloaded.

    Raises:
        DataError: one is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one line from us says it better
    try:
        return [Path(hf_hub_download(repository, name)) for name in names]
    except Exception as error:  # its own types and those of its HTTP client, which change between releases
        raise DataError(
            "cannot be had from the Hub",
            where=f"{repository}: {', '.join(names)}",
            cause=f"it is not in the local cache, and the download failed ({type(error).__name__})",
            fix="check the name, go online once, or give a local folder in its place",
        ) from None
