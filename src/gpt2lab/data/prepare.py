"""A text to a prepared folder: tokenised once, found again ever after.

A prepared folder holds ``train-00000.bin`` ..., ``validation-00000.bin`` ..., the tokenizer and ``prepared.json``. It grows in
a folder beside it that ends in ``.part``, one whole shard after another: whoever is killed, or finds the disk full, goes on
with the first shard that is missing. A shard depends on its documents alone, so several machines can share them out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from gpt2lab.config import DataConfig
from gpt2lab.data.foreign import find_foreign, prepared_by_others
from gpt2lab.data.prepared import SUMMARY, Prepared, open_prepared, refuse_other_tokenizer
from gpt2lab.data.shard_format import MAGIC
from gpt2lab.data.shard_writer import ShardWriter, finished_shard
from gpt2lab.data.shards import Shards
from gpt2lab.data.survey import SHARD_CHARS, SPLITS, Survey
from gpt2lab.data.text import Text, changed, read_text
from gpt2lab.data.tokenise import cut_safely, tokenise
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.paths import cache_folder, put_in_place, write_whole
from gpt2lab.tokenizer import Tokenizer, is_learned, open_tokenizer

PLAN = "plan.json"
MOST_PARTS = 10_000
_WORTH_WORKERS = 2**22
"""Bytes of text from which on other processes are worth their start."""

Write = Callable[[Text, list[str], Tokenizer, Path, int | None, Callable[[str], object]], None]
"""What makes these shards of a text, as `write_shards` does."""


def prepare(config: DataConfig, tokenizer: str | Tokenizer | None, *, folder: Path | None = None) -> Prepared:
    """The text of a recipe as shards: found where they were prepared before, or prepared now.

    Args:
        tokenizer: itself, or as in a recipe; one that is trained learns from the training split alone. None: that of
            prepared shards, else bytes.
        folder: where to put the shards; None: the user's cache, under a name that is a hash of text and tokenizer. Token files
            of others are used where they lie.

    Raises:
        DataError: the text cannot be used. ConfigError: no such tokenizer.
    """
    if len(config.sources) == 1 and prepared_in(config) and folder is None:
        prepared = open_prepared(Path(config.sources[0]))
        if config.validation is not None:
            cause = f"{config.sources[0]} is prepared text, which brings its own"
            raise DataError("two validation texts", where="data.validation", cause=cause, fix="leave it out")
        refuse_other_tokenizer(prepared, tokenizer)
        return prepared
    if folder is None and (files := find_foreign(config)) is not None:
        return prepared_by_others(files, tokenizer)
    whole = prepare_part(config, tokenizer, folder)
    assert whole is not None  # there is but one part
    return whole


def open_again(config: DataConfig, tokenizer: Tokenizer, folder: Path) -> Prepared | None:
    """What `prepare` gave another process, which says in which folder it lies; None: it is not on this machine.

    Raises:
        DataError: it is damaged.
    """
    if folder.is_dir() and not prepared_in(config) and (files := find_foreign(config)) is not None:
        return prepared_by_others(files, tokenizer)
    return open_prepared(folder) if folder.is_dir() else None


def prepare_part(
    config: DataConfig,
    tokenizer: str | Tokenizer | None,
    folder: Path | None,
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    progress: Callable[[str], object] = lambda text: None,
    write: Write | None = None,
) -> Prepared | None:
    """Write every n-th shard of a text, from the i-th on; whoever finds all shards there finishes the folder.

    Args:
        part: i and n; i counts from 1.
        workers: processes that tokenise; None: one a core, where there is enough to do.
        progress: is told how far it is, often.
        write: who tokenises; None: `write_shards`, on this machine.

    Returns:
        None while shards of other parts are missing.

    Raises:
        DataError, ConfigError: as in `prepare`.
    """
    for source in prepared_in(config):
        fix = "train from it as it is, with data.source, and from nothing else"
        raise DataError("already prepared", where=source, cause="it is a folder of shards", fix=fix)
    if find_foreign(config) is not None:
        fix = "train from them as they are, with data.source and a tokenizer"
        raise DataError("already prepared", where=config.sources[0], cause="these are token files", fix=fix)
    tokenizer = tokenizer or "bytes"
    if isinstance(tokenizer, str) and not is_learned(tokenizer):
        tokenizer = open_tokenizer(tokenizer)
    text = read_text(config)
    key = _key(text, tokenizer)
    folder = folder or cache_folder() / "prepared" / key
    if not _is_prepared(folder, key):
        _refuse_to_overwrite(folder)
        aside = folder.with_name(f"{folder.name}.part")
        with _alone_at(aside, part):
            if not _is_prepared(folder, key):  # by a process that was alone before
                _claim(aside, key, part)
                try:
                    if not _write_part(text, tokenizer, key, aside, part, workers, progress, write or write_shards):
                        return None
                    put_in_place(aside, folder)
                except (FileNotFoundError, DataError):  # another part, on another machine, was the last as well
                    if not _is_prepared(folder, key):
                        raise
    return open_prepared(folder)


def prepared_in(config: DataConfig) -> list[str]:
    """Those of its sources that are prepared folders."""
    return [source for source in config.sources if os.path.isfile(os.path.join(source, SUMMARY))]


def parse_part(text: str) -> tuple[int, int]:
    """``2/3`` as (2, 3).

    Raises:
        ConfigError: it is no such thing.
    """
    one, _, of = text.partition("/")
    if one.isdecimal() and of.isdecimal() and 1 <= int(one) <= int(of) <= MOST_PARTS:
        return int(one), int(of)
    cause = f"{text!r} is not I/N, with I from 1 to N and N at most {MOST_PARTS}"
    raise ConfigError("bad part", where="--part", cause=cause, fix="such as 2/3")


def _write_part(
    text: Text,
    tokenizer: str | Tokenizer,
    key: str,
    folder: Path,
    part: tuple[int, int],
    workers: int | None,
    progress: Callable[[str], object],
    write: Write,
) -> bool:
    """Write the shards of a part that are not there yet; when none of any part is missing, also what closes the folder."""
    names = [name for split in SPLITS for name in text.division.names(split)]
    if isinstance(tokenizer, str):
        tokenizer = _learn(tokenizer, text)
    tokenizer.save(folder)
    mine = names[part[0] - 1 :: part[1]]
    wanted = [name for name in mine if finished_shard(folder / f"{name}.bin", tokenizer) is None]
    if wanted:
        write(text, wanted, tokenizer, folder, workers, progress)
    if not all((folder / f"{name}.bin").exists() for name in names):
        return False
    splits = {split: Shards([folder / f"{name}.bin" for name in text.division.names(split)]) for split in SPLITS}
    if sum(shards.bytes for shards in splits.values()) != text.found.bytes:
        for name in names:  # which of them hold the changed text is not known
            (folder / f"{name}.bin").unlink()
        raise changed("some place")
    listed = {split: [asdict(header) for header in shards.headers] for split, shards in splits.items()}
    write_whole(folder / SUMMARY, json.dumps({"key": key, "account": _account(text.found), **listed}, indent=1))
    (folder / PLAN).unlink(missing_ok=True)
    return True


def write_shards(
    text: Text,
    wanted: list[str],
    tokenizer: Tokenizer,
    folder: Path,
    workers: int | None,
    progress: Callable[[str], object],
) -> None:
    """Tokenise the documents of these shards, each of which is there for good as soon as it is whole.

    Raises:
        DataError: the source is no longer what it was, or has a character that the tokenizer has never seen.
    """
    if workers is None:
        workers = (os.cpu_count() or 1) if text.found.bytes >= _WORTH_WORKERS else 1
    writers: dict[str, ShardWriter] = {}
    done = 0
    with ExitStack() as unfinished:
        for part in tokenise(text.parts(wanted), tokenizer, workers):
            split = part.name.rpartition("-")[0]
            if split in writers and writers[split].path.stem != part.name:
                writers.pop(split).finish()
            if split not in writers:
                writers[split] = unfinished.enter_context(ShardWriter(folder / f"{part.name}.bin", tokenizer))
            writers[split].add(part.ids, part.bytes, documents=int(part.last), scored=part.scored)
            done += part.bytes
            progress(f"tokenised {done:,} of {text.found.bytes:,} bytes, {part.name}")
        for writer in writers.values():
            writer.finish()
    for name in wanted:
        if not (path := folder / f"{name}.bin").exists():  # of a split without documents
            with ShardWriter(path, tokenizer) as writer:
                writer.finish()


def _learn(kind: str, text: Text) -> Tokenizer:
    """A tokenizer that is made from the training split; one of characters must know those of the validation text, too."""
    splits = SPLITS if kind == "chars" else SPLITS[:1]
    names = [name for split in splits for name in text.division.names(split)]
    return open_tokenizer(kind, (piece.text for piece in cut_safely(text.parts(names))))


def _is_prepared(folder: Path, key: str) -> bool:
    """Whether a folder holds this text, prepared with this tokenizer."""
    try:
        return bool(json.loads((folder / SUMMARY).read_text())["key"] == key)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


@contextmanager
def _alone_at(folder: Path, part: tuple[int, int]) -> Iterator[None]:
    """Wait until no other process of this machine writes this part. The lock lies elsewhere: folders are moved, and shared."""
    name = hashlib.sha256(f"{folder.absolute()} {part}".encode()).hexdigest()[:32]
    path = cache_folder() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def _refuse_to_overwrite(folder: Path) -> None:
    """Leave alone what is no prepared text.

    Raises:
        DataError: the folder is there already and is something else.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / SUMMARY).exists() or not any(folder.iterdir()))):
        cause = "it is there, and holds no shards"
        raise DataError("will not overwrite", where=str(folder), cause=cause, fix="give an empty or a new folder")


def _claim(folder: Path, key: str, part: tuple[int, int]) -> None:
    """Make an unfinished folder this text's; what an earlier one left in it is removed.

    Raises:
        DataError: it is something else, or other parts in it are of another text, or there are more or fewer of them.
    """
    plan = {"key": key, "parts": part[1]}
    try:
        found = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError, RecursionError):
        found = None
    if found == plan or (found and found.get("key") == key and part[1] == 1):
        return
    if found is not None and part[1] > 1:
        cause = "another text, tokenizer or number of parts is being prepared there"
        raise DataError("parts differ", where=str(folder), cause=cause, fix="give all parts the same, or remove it")
    if (
        folder.exists()
        and not {PLAN, SUMMARY} & (names := {path.name for path in folder.iterdir()})
        and names - {"plan.part"}
    ):
        cause = "it is there, and is not what an unfinished preparation leaves"
        raise DataError(
            "will not overwrite", where=str(folder), cause=cause, fix="move it away, or give another folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_whole(folder / PLAN, json.dumps(plan))


def _key(text: Text, tokenizer: str | Tokenizer) -> str:
    """A hash of everything that decides the shards: a tokenizer that is learned from the text counts by its name."""
    made = tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint
    parts = (MAGIC.hex(), SHARD_CHARS, made, text.found.fingerprint)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _account(found: Survey) -> dict[str, Any]:
    """Where every byte of the source went."""
    return {
        "bytes_in": found.bytes_in,
        "bytes_tokenised": found.bytes,
        "bytes_skipped": found.bytes_in - found.bytes,
        "read_as": dict(found.kinds.most_common()),
        "skipped_by_reason": dict(sorted(found.skipped_bytes.items())),
        "skipped": [asdict(item) for item in found.skipped],
    }
