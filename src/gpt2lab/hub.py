"""Models and tokenizers by their name on the Hugging Face Hub: from its local cache, or downloaded and proved by their hashes.

The cache is the one of Hugging Face's own programs, so that what one of them has no other loads again, and their library
does the talking and the logging in. The downloads themselves are ours: the library waits as long as a server tells it to,
begins what broke off from zero, and checks how long a file is, but not what is in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from gpt2lab.download import OFFLINE, TRIES, patiently, receive
from gpt2lab.errors import CheckpointError, ConfigError, DataError, ResourceError, UntrustedFileError, as_lab_error
from gpt2lab.paths import sync, write_whole

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OPTIONAL = ("generation_config.json", "tokenizer.json", "vocab.json", "merges.txt")
"""Files of a model that not every repository has."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LARGEST_INDEX = 4 * 2**20

_NAME = re.compile(r"(?!.*\.\.)(gpt2(?:-medium|-large|-xl)?|[\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)

T = TypeVar("T")


def fetch(name: str, *files: str, sleep: Callable[[float], None] = time.sleep) -> Path:
    """The local folder of a repository at one commit, with `files`; without any, with what a GPT-2-like model needs.

    `name` is OWNER/NAME, or GPT-2's own (gpt2, gpt2-medium, ...); ``@REVISION`` after it pins a branch, a tag or a commit.
    The Hub is asked once which commit that is, and all files come from it. If it does not answer, or refuses, what the
    cache has for that name is used. A file is hashed once, after its download; later, its length is enough.

    Args:
        sleep: waits so many seconds between two tries.

    Raises:
        DataError: one of `files` cannot be had. CheckpointError: the model cannot. UntrustedFileError: it has only pickles.
        ResourceError: the disk is full. What came before this or another fault is kept aside; the next call goes on there.
        ConfigError: the cache may not be written to.
    """
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # one line from us says it better
    refusal = DataError if files else CheckpointError
    match = _NAME.fullmatch(name)
    if not match:
        cause, fix = f"{name!r:.80} is neither OWNER/NAME nor OWNER/NAME@REVISION", "such as openai-community/gpt2"
        raise refusal("no name on the Hub", cause=cause, fix=fix)
    repository, revision = match[1] if "/" in match[1] else f"openai-community/{match[1]}", match[2] or "main"
    snapshot = _Snapshot(repository, revision, refusal, sleep)
    missing = _missing(snapshot.folder, files)
    try:
        if constants.HF_HUB_OFFLINE:
            raise refusal("cannot be had from the Hub", where=name, cause=OFFLINE[0], fix=OFFLINE[1])
        snapshot.look_up(tries=TRIES if missing else 1)
    except refusal as error:
        if not missing:
            return snapshot.folder
        cause = f"{missing} is not in the local cache, and {error.cause}"
        raise refusal(error.what, where=name, cause=cause, fix=error.fix) from None
    for file in files or snapshot.model_files():
        snapshot.bring(file)
    snapshot.remember()
    return snapshot.folder


@dataclass(frozen=True)
class _File:
    """What the Hub says of a file: its bytes, and their sha256 or, if git itself holds it, git's sha1."""

    size: int
    digest: str

    def is_at(self, path: Path) -> bool:
        """Whether a file is there with the right length."""
        return path.is_file() and path.stat().st_size == self.size

    def is_proved_at(self, path: Path) -> bool:
        """Whether the content is the right one."""
        with path.open("rb") as file:
            if len(self.digest) == 64:
                found = hashlib.file_digest(file, "sha256")
            else:
                start = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
                found = hashlib.file_digest(file, lambda: start)
        return self.is_at(path) and found.hexdigest() == self.digest


@dataclass
class _Snapshot:
    """A repository at one commit, in the Hub's cache.

    Attributes:
        commit: as the cache remembers it, or empty; `look_up` sets it to the Hub's.
        listed: the files that the Hub has of it.
    """

    repository: str
    revision: str
    refusal: type[DataError] | type[CheckpointError]
    sleep: Callable[[float], None]
    commit: str = field(default="", init=False)
    listed: dict[str, _File] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from huggingface_hub import constants

        name = f"models--{self.repository.replace('/', '--')}"
        self.cache, self.locks = Path(constants.HF_HUB_CACHE, name), Path(constants.HF_HUB_CACHE, ".locks", name)
        self.ref = self.cache / "refs" / self.revision
        self.remembered = self.ref.read_text(errors="replace") if self.ref.is_file() else ""
        commit = self.revision if _COMMIT.fullmatch(self.revision) else self.remembered
        self.commit = commit if _COMMIT.fullmatch(commit) else ""

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.cache / "snapshots" / self.commit

    def look_up(self, tries: int) -> None:
        """Ask the Hub, once, which commit it is, and which files are in it."""
        from huggingface_hub import HfApi, constants

        def ask() -> None:
            seconds = constants.HF_HUB_ETAG_TIMEOUT
            found: Any = HfApi().model_info(
                self.repository, revision=self.revision, files_metadata=True, timeout=seconds
            )
            pinned = self.revision if _COMMIT.fullmatch(self.revision) else found.sha
            if not _COMMIT.fullmatch(str(found.sha)) or found.sha != pinned:
                raise ValueError(f"it calls {self.revision} {found.sha!r:.60}")
            self.listed = {
                file.rfilename: _File(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
                for file in found.siblings or []
            }
            self.commit = found.sha

        with self._on_disk():
            self._patiently(ask, tries, "")

    def model_files(self) -> Iterator[str]:
        """The files of a model, the weights last; the names of shards are known when their index is there."""
        if not {WEIGHTS, INDEX} & self.listed.keys():
            pickles = sorted(name for name in self.listed if name.endswith(PICKLES))
            if pickles:
                cause = f"it has no {WEIGHTS}, and {pickles[0]!r:.80} is a pickle, which can run code when it is opened"
                fix = f"name a repository that has {WEIGHTS}; most do"
                raise UntrustedFileError("not downloaded", where=self.repository, cause=cause, fix=fix)
            cause, fix = f"it has neither {WEIGHTS} nor {INDEX}", f"name a repository that has {WEIGHTS}"
            raise CheckpointError("no weights", where=self.repository, cause=cause, fix=fix)
        yield CONFIG
        yield from (name for name in OPTIONAL if name in self.listed)
        if WEIGHTS in self.listed:
            yield WEIGHTS
            return
        try:
            if self.listed[INDEX].size > LARGEST_INDEX:
                raise ValueError(f"{self.listed[INDEX].size} bytes; {LARGEST_INDEX} are allowed")
            yield INDEX
            shards = _shards(self.folder / INDEX)
        except (TypeError, ValueError) as error:
            where, fix = f"{self.repository}: {INDEX}", "tell its owner, and use another one"
            raise CheckpointError("unusable index", where=where, cause=str(error), fix=fix) from None
        yield from shards

    def bring(self, name: str) -> None:
        """See to it that a file is in the folder."""
        file = self.listed.get(name)
        if file is None:
            cause, fix = f"the repository has no {name}", "check the name, or use another repository"
            raise self.refusal("incomplete", where=self.repository, cause=cause, fix=fix)
        if type(file.size) is not int or not _DIGEST.fullmatch(str(file.digest)):
            cause, fix = "the server lists it without size and hash", "set HF_ENDPOINT to another server, or unset it"
            raise self.refusal("cannot be proved", where=f"{self.repository}: {name}", cause=cause, fix=fix)
        blob, place = self.cache / "blobs" / file.digest, self.folder / name
        if file.is_at(place):
            return
        with self._on_disk(), self._lock(file.digest):
            if not file.is_at(blob):
                self._download(name, file, blob)
            _link(blob, place)

    def remember(self) -> None:
        """Write down which commit the revision is, for later without the Hub; it is last, so all its files are there."""
        if self.commit in (self.revision, self.remembered):
            return
        with self._on_disk(), self._lock("refs"):
            self.ref.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.ref, self.commit)

    def _download(self, name: str, file: _File, blob: Path) -> None:
        """Download a blob; until it is proved it has another name."""
        from huggingface_hub import constants

        url = f"{constants.ENDPOINT}/{self.repository}/resolve/{self.commit}/{name}"
        aside = blob.with_name(f"{blob.name}.incomplete")
        blob.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            self._patiently(lambda: receive(url, aside, file.size), TRIES, name)
            if file.is_proved_at(aside):
                sync(aside)
                aside.replace(blob)
                return
            aside.unlink()
        cause = f"what came is not what the repository holds (hash {file.digest[:12]}...), twice"
        fix = "try again later, or over another network: something on the way changes it"
        raise self.refusal("damaged download", where=f"{self.repository}: {name}", cause=cause, fix=fix)

    def _patiently(self, ask: Callable[[], T], tries: int, name: str) -> T:
        """`ask()`, again after a pause where that may help."""

        def refused(cause: str, fix: str) -> DataError | CheckpointError:
            where = f"{self.repository}{': ' * bool(name)}{name}"
            return self.refusal("cannot be had from the Hub", where=where, cause=cause, fix=fix)

        return patiently(ask, tries, self.sleep, refused)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Keep other processes, also those of the library, from the same file."""
        self.locks.mkdir(parents=True, exist_ok=True)
        with FileLock(self.locks / f"{name}.lock"):
            yield

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """Word what the disk says, with the cache as its place."""
        try:
            yield
        except OSError as error:
            where, worded = str(error.filename or self.cache), as_lab_error(error)
            if isinstance(worded, ResourceError):
                raise ResourceError(worded.what, where=where, cause=worded.cause, fix=worded.fix) from None
            cause, fix = error.strerror or str(error), "set HF_HOME to a folder you may write to"
            raise ConfigError("no place for downloads", where=where, cause=cause, fix=fix) from None


def _missing(folder: Path, files: tuple[str, ...]) -> str:
    """The first file that a snapshot in the cache lacks, or nothing."""
    for name in files or (CONFIG,):
        if not (folder / name).is_file():
            return name
    if files or (folder / WEIGHTS).is_file():
        return ""
    try:
        return next((name for name in _shards(folder / INDEX) if not (folder / name).is_file()), "")
    except (OSError, ValueError):
        return WEIGHTS


def _shards(index: Path) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: it is no index, or it names what is no plain file beside it.
    """
    if index.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{index.stat().st_size} bytes; {LARGEST_INDEX} are allowed")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it has no map of weights ({type(error).__name__})") from None
    for name in names:
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise ValueError(f"it names {name!r:.80}, which is no plain name of a safetensors file")
    return sorted(names)


def _link(blob: Path, place: Path) -> None:
    """Put a blob into a snapshot: a link, or a copy where there are no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_name(f".{place.name}.part")
    try:
        aside.unlink(missing_ok=True)
        try:
            aside.symlink_to(os.path.relpath(blob, place.parent))
        except OSError:
            shutil.copyfile(blob, aside)
        aside.replace(place)
    finally:
        aside.unlink(missing_ok=True)
