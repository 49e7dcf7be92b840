"""A text that is learned from while it is read: its files, its tokenizer, and the validation text that was taken from it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.config import DataConfig
from gpt2lab.data.foreign import find_foreign
from gpt2lab.data.prepare import prepared_in
from gpt2lab.data.prepared import SUMMARY, open_prepared
from gpt2lab.data.records import Piece
from gpt2lab.data.shard_format import MAGIC
from gpt2lab.data.shards import Shards
from gpt2lab.data.sources import STDIN, SourceFile, no_text, source_files
from gpt2lab.data.stream.held_out import hold_out
from gpt2lab.data.stream.producer import Job, identities
from gpt2lab.data.stream.reading import Account, Reader, documents
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.paths import cache_folder
from gpt2lab.tokenizer import Tokenizer, is_learned, open_tokenizer

VALIDATION_TOKENS = 2**17
"""What is held out of a stream, about, unless a recipe says how much, or names a validation text."""
_CHARS = 4  # of English in one of GPT-2's tokens
_CORES = 4  # of which one tokenises; the others are for training


@dataclass(frozen=True)
class StreamedText:
    """A text that is learned from while it is read.

    Attributes:
        folder: where the validation text lies.
        files: name and identity of each.
    """

    config: DataConfig
    folder: Path
    tokenizer: Tokenizer
    validation: Shards
    files: list[list[str]]

    @property
    def fingerprint(self) -> str:
        """A hash of what its files say they are, of the tokenizer, and of how they are read."""
        about = (MAGIC.hex(), self.files, self.config.fields, self.config.on_fault, self.folder.name)
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def job(self, seed: int, length: int) -> Job:
        """What a process does that brings its blocks."""
        return Job(
            source=self.config.source,
            fields=self.config.fields,
            on_fault=self.config.on_fault,
            files=self.files,
            held_out=str(self.folder),
            tokenizer=self.tokenizer.to_json(),
            seed=seed,
            length=length,
            workers=max(1, (os.cpu_count() or 1) // _CORES),
        )


def open_stream(config: DataConfig, tokenizer: str | Tokenizer | None) -> StreamedText:
    """Find the files of a stream; its validation text is prepared, or found where it was prepared before.

    Raises:
        DataError: there is no such text, or nothing to validate on. ConfigError: a tokenizer that is made from the text.
    """
    tokenizer = tokenizer or "bytes"
    if isinstance(tokenizer, str):
        if is_learned(tokenizer):
            cause = f"{tokenizer} is made from the whole text, and a stream is never read as a whole"
            fix = "make it from a part of it, with `gpt2lab tokenizer train`, and give its folder"
            raise ConfigError("no tokenizer yet", where="tokenizer", cause=cause, fix=fix)
        tokenizer = open_tokenizer(tokenizer)
    if prepared_in(config) or find_foreign(config) or STDIN in config.sources:
        cause = "what is prepared is at hand as it is, and standard input cannot be read again"
        raise DataError("no source of a stream", where="data.source", cause=cause, fix="leave out data.stream")
    files = source_files(config.source, config.fields)
    held_from = source_files(config.validation, config.fields) if config.validation is not None else files
    tokens = config.validation_tokens or (None if config.validation is not None else VALIDATION_TOKENS)
    chars = tokens * _CHARS if tokens is not None else None
    about = (MAGIC.hex(), tokenizer.fingerprint, identities(held_from), config.fields, chars)
    folder = cache_folder() / "held-out" / hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    if not (folder / SUMMARY).exists():
        reader, accounts = Reader(config.on_fault), list[Account]()
        hold_out(documents(_pieces(held_from, reader, accounts)), tokenizer, chars, folder, lambda: _sum(accounts))
    prepared = open_prepared(folder)
    if not len(prepared.validation):
        raise no_text(config.validation or config.source, [])
    return StreamedText(config, folder, prepared.tokenizer, prepared.validation, identities(files))


def _pieces(files: Sequence[SourceFile], reader: Reader, accounts: list[Account]) -> Iterator[Piece]:
    for number, file in enumerate(files):
        accounts.append(Account(file.name, 0, number))
        yield from reader.pieces(file, accounts[-1])


def _sum(accounts: list[Account]) -> dict[str, Any]:
    """Where the bytes of all that was read went, as in a prepared text."""
    skipped = sum((account.skipped_by_reason for account in accounts), Counter[str]())
    bytes_in = sum(account.bytes_in for account in accounts)
    return {
        "bytes_in": bytes_in,
        "bytes_tokenised": bytes_in - skipped.total(),
        "bytes_skipped": skipped.total(),
        "read_as": dict(Counter(account.read_as for account in accounts)),
        "skipped_by_reason": dict(sorted(skipped.items())),
        "skipped": [row for account in accounts for row in account.skipped],
    }
