"""Tokenise once, memory-map ever after.

A prepared folder holds ``train-00000.bin`` ..., ``validation-00000.bin`` ... and ``prepared.json``. A shard is a magic
number, the length of its JSON header, the header, and the ids as little-endian uint16 or uint32. Documents follow each
other, each closed by the tokenizer's end-of-text.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from gpt2lab.config import DataConfig
from gpt2lab.data.sources import Corpus, Document, read_corpus
from gpt2lab.errors import DataError
from gpt2lab.paths import cache_folder
from gpt2lab.tokenizer import Tokenizer, is_learned, open_tokenizer

MAGIC = b"gpt2lab\x01"
SUMMARY = "prepared.json"
SHARD_TOKENS = 100_000_000
_ENCODED_AT_ONCE = 64  # documents


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        dtype: of the ids, "<u2" or "<u4".
        tokens: ids in it, separators included.
        documents: documents that end in it.
        bytes: of UTF-8 text behind it.
        vocab_size: every id is below it.
        tokenizer: its fingerprint.
        sha256: of the ids as they lie in the file.
    """

    dtype: str
    tokens: int
    documents: int
    bytes: int
    vocab_size: int
    tokenizer: str
    sha256: str


class Shards:
    """The tokens of one split as one long sequence, mapped from its files, not read into memory."""

    def __init__(self, paths: list[Path]) -> None:
        opened = [_open_shard(path) for path in paths]
        self.headers = [header for header, _ in opened]
        self._parts = [ids for _, ids in opened]
        self._ends = np.cumsum([len(ids) for ids in self._parts])
        self.bytes = sum(header.bytes for header in self.headers)
        self.documents = sum(header.documents for header in self.headers)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._parts else 0

    def read(self, start: int, length: int) -> np.ndarray:
        """Ids `start` to `start + length - 1` as a fresh int64 array."""
        out, filled = np.empty(length, np.int64), 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            offset = start + filled - (int(self._ends[shard - 1]) if shard else 0)
            part = self._parts[shard][offset : offset + length - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return out

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and of the tokenizer that made them."""
        return hashlib.sha256("".join(h.tokenizer + h.sha256 for h in self.headers).encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A prepared text: its tokenizer and its two splits."""

    folder: Path
    tokenizer: Tokenizer
    train: Shards
    validation: Shards

    def summary(self) -> dict[str, Any]:
        """What is in it, in numbers, and the start of its first sample."""
        splits = {"train": self.train, "validation": self.validation}
        counts = {name: {"documents": s.documents, "tokens": len(s), "bytes": s.bytes} for name, s in splits.items()}
        return {
            **{total: sum(count[total] for count in counts.values()) for total in ("documents", "tokens")},
            "bytes_in": sum(count["bytes"] for count in counts.values()),
            "bytes_tokenised": sum(count["bytes"] for count in counts.values()),
            "bytes_skipped": 0,
            "skipped": [],
            **counts,
            "vocab_size": self.tokenizer.vocab_size,
            "example": self.tokenizer.decode(self.train.read(0, min(32, len(self.train)))),
        }


def prepare(config: DataConfig, tokenizer: str | Tokenizer | None, *, folder: Path | None = None) -> Prepared:
    """The text of a recipe as shards: found where they were prepared before, or prepared now.

    Args:
        tokenizer: itself, or as in a recipe; one that is trained learns from the training split alone. None: that of
            prepared shards, else bytes.
        folder: where to put the shards; None: the user's cache, under a name that is a hash of text and tokenizer.

    Raises:
        DataError: the text cannot be used. ConfigError: no such tokenizer.
    """
    if os.path.isfile(os.path.join(config.source, SUMMARY)):
        prepared = open_prepared(Path(config.source))
        if config.validation is not None:
            cause = f"{config.source} is prepared text, which brings its own"
            raise DataError("two validation texts", where="data.validation", cause=cause, fix="leave it out")
        if folder is not None:
            fix = "train from it as it is, with data.source"
            raise DataError("already prepared", where=config.source, cause="it is a folder of shards", fix=fix)
        refuse_other_tokenizer(prepared, tokenizer)
        return prepared
    tokenizer = tokenizer or "bytes"
    corpus = read_corpus(config)
    if isinstance(tokenizer, str) and not is_learned(tokenizer):
        tokenizer = open_tokenizer(tokenizer)
    if folder is None:
        folder = cache_folder() / "prepared" / _corpus_key(corpus, tokenizer)
        if (folder / SUMMARY).is_file():
            return open_prepared(folder)
    if isinstance(tokenizer, str):
        alphabet = corpus.validation if tokenizer == "chars" else []  # its characters must be known too
        tokenizer = open_tokenizer(tokenizer, (document.text for document in corpus.train + alphabet))
    write_prepared(corpus, tokenizer, folder)
    return open_prepared(folder)


def refuse_other_tokenizer(prepared: Prepared, tokenizer: str | Tokenizer | None) -> None:
    """Refuse shards that were made with another tokenizer than the one that is named.

    Raises:
        DataError: they were.
    """
    if tokenizer is None:
        return
    made_with = prepared.tokenizer
    if isinstance(tokenizer, str) and is_learned(tokenizer):  # from a text that is not at hand: its size has to do
        differs = tokenizer not in ("chars", f"bpe:{made_with.vocab_size}")
    else:
        named = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        differs = named.fingerprint != made_with.fingerprint
    if differs:
        cause = f"these shards were made with another tokenizer, of {made_with.vocab_size} tokens"
        raise DataError("tokenizers differ", where=str(prepared.folder), cause=cause, fix="leave `tokenizer` out")


def write_prepared(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Tokenise both splits into `folder`; it appears whole or not at all.

    Raises:
        DataError: `folder` is there already and is something else.
    """
    if folder.exists() and not (folder.is_dir() and ((folder / SUMMARY).exists() or not any(folder.iterdir()))):
        cause = "it is there, and holds no shards"
        raise DataError("will not overwrite", where=str(folder), cause=cause, fix="give an empty or a new folder")
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    for left in folder.parent.glob(f"{folder.name}.*.part"):  # by one that was killed
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        splits = {"train": corpus.train, "validation": corpus.validation}
        headers = {name: _write_split(aside, name, documents, tokenizer) for name, documents in splits.items()}
        tokenizer.save(aside)
        summary = {name: [asdict(header) for header in written] for name, written in headers.items()}
        (aside / SUMMARY).write_text(json.dumps(summary, indent=1))
        if (folder / SUMMARY).exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def open_prepared(folder: Path) -> Prepared:
    """Shards that were prepared before.

    Raises:
        DataError: a shard is damaged or is not listed, or the tokenizer is another.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        listed = {name: [ShardHeader(**row) for row in summary[name]] for name in ("train", "validation")}
    except FileNotFoundError:
        fix = "prepare some with `gpt2lab data prepare SOURCE --out DIR`"
        raise DataError("no prepared text", where=str(folder), cause=f"{SUMMARY} is not there", fix=fix) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _damaged(folder / SUMMARY, repr(error)) from None
    tokenizer = Tokenizer.load(folder)
    splits = {name: Shards([_shard_path(folder, name, i) for i in range(len(rows))]) for name, rows in listed.items()}
    for name, rows in listed.items():
        for index, (row, header) in enumerate(zip(rows, splits[name].headers, strict=True)):
            if row != header or header.tokenizer != tokenizer.fingerprint:
                cause = "it is not the shard, or not the tokenizer, that was prepared with the others"
                raise _damaged(_shard_path(folder, name, index), cause)
    return Prepared(folder, tokenizer, splits["train"], splits["validation"])


def _write_split(folder: Path, name: str, documents: list[Document], tokenizer: Tokenizer) -> list[ShardHeader]:
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    headers: list[ShardHeader] = []
    for index, (ids, ends, size) in enumerate(_fill_shards(_encode(documents, tokenizer))):
        content = ids.astype(dtype)
        digest = hashlib.sha256(content.tobytes()).hexdigest()
        header = ShardHeader(dtype, len(ids), ends, size, tokenizer.vocab_size, tokenizer.fingerprint, digest)
        encoded = json.dumps(asdict(header)).encode()
        encoded += b" " * (-(len(MAGIC) + 4 + len(encoded)) % 64)  # the ids start at a multiple of 64 bytes
        with _shard_path(folder, name, index).open("wb") as file:
            file.write(MAGIC + len(encoded).to_bytes(4, "little") + encoded)
            content.tofile(file)
        headers.append(header)
    return headers


def _encode(documents: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Each document's ids, closed by end-of-text, with the bytes of text behind them."""
    for start in range(0, len(documents), _ENCODED_AT_ONCE):
        texts = [document.text for document in documents[start : start + _ENCODED_AT_ONCE]]
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            yield np.append(ids, np.int32(tokenizer.end_of_text)), len(text.encode())


def _fill_shards(documents: Iterable[tuple[np.ndarray, int]]) -> Iterator[tuple[np.ndarray, int, int]]:
    """Whole documents gathered until a shard is full: ids, documents, bytes. At least one shard, if an empty one."""
    parts: list[np.ndarray] = []
    tokens = size = 0
    written = False
    for ids, text_bytes in documents:
        if parts and tokens + len(ids) > SHARD_TOKENS:
            yield np.concatenate(parts), len(parts), size
            parts, tokens, size, written = [], 0, 0, True
        parts.append(ids)
        tokens, size = tokens + len(ids), size + text_bytes
    if parts or not written:
        yield np.concatenate(parts) if parts else np.zeros(0, np.int32), len(parts), size


def _open_shard(path: Path) -> tuple[ShardHeader, np.ndarray]:
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 4)
            if start[: len(MAGIC)] != MAGIC:
                raise _damaged(path, f"it starts with {start[: len(MAGIC)]!r}, not {MAGIC!r}")
            header = ShardHeader(**json.loads(file.read(min(int.from_bytes(start[len(MAGIC) :], "little"), 2**16))))
            offset = file.tell()
        expected = offset + header.tokens * np.dtype(header.dtype).itemsize
        if path.stat().st_size != expected:
            raise _damaged(path, f"it has {path.stat().st_size} bytes, its header says {expected}")
        if not header.tokens:
            return header, np.zeros(0, header.dtype)
        ids = np.memmap(path, dtype=header.dtype, mode="r", offset=offset, shape=(header.tokens,))
        if hashlib.sha256(ids.data).hexdigest() != header.sha256 or ids.max() >= header.vocab_size:
            raise _damaged(path, "its ids are not the ones that were written")
        return header, ids
    except DataError:
        raise
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, cause: str) -> DataError:
    return DataError(
        "damaged shard", where=str(path), cause=cause, fix=f"remove {path.parent} and prepare the text again"
    )


def _shard_path(folder: Path, split: str, index: int) -> Path:
    return folder / f"{split}-{index:05d}.bin"


def _corpus_key(corpus: Corpus, tokenizer: str | Tokenizer) -> str:
    """A hash of everything that decides the shards: a tokenizer that is learned from the text counts by its name."""
    digest = hashlib.sha256(MAGIC + (tokenizer if isinstance(tokenizer, str) else tokenizer.fingerprint).encode())
    for documents in (corpus.train, corpus.validation):
        for document in documents:
            digest.update(hashlib.sha256(document.text.encode()).digest())
        digest.update(b"|")
    return digest.hexdigest()[:32]
