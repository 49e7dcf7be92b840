"""Token files that others have made: nanoGPT's ids without a word around them, and llm.c's, read where they lie.

They are a source as they are: a folder with ``train.bin`` and ``val.bin``, or with ``..._train_000001.bin`` ... and
``..._val_000000.bin``, or a pattern of such files. What lies beside them, such as nanoGPT's meta.pkl, is never opened.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gpt2lab.config import DataConfig
from gpt2lab.data.prepared import Prepared
from gpt2lab.data.shard_format import BLOCK_BYTES, Layout, OpenFile, ShardHeader
from gpt2lab.data.shards import ShardFile, Shards
from gpt2lab.data.survey import HELD_OUT
from gpt2lab.errors import ConfigError, DataError
from gpt2lab.tokenizer import Tokenizer, is_learned, open_tokenizer

LLMC_MAGIC = 20240520
LLMC_LLAMA_MAGIC = 20240801
_LLMC_HEAD = 1024  # 256 numbers of 4 bytes
_SCAN = 2**20  # ids
_HEAD = 2**16  # bytes by which ids and text are told apart
_NAMED = re.compile(r"(?:.*_)?(train|val)(?:_.*)?\.bin")

Files = tuple[list[Path], list[Path] | None]
"""Those to train on and those to validate on; None: there are none of these."""


def find_foreign(config: DataConfig) -> Files | None:
    """The token files that a recipe's source is; None where it is something else.

    Raises:
        DataError: of source and validation text only one are token files.
    """
    each = [_token_files(source) for source in config.sources]
    found = [path for files in each for path in files or ()]
    if not found:
        return None
    if not all(each):
        cause = f"{found[0]} is a token file, and {config.sources[each.index(None)]} is text"
        raise DataError("two kinds of text", where="data.source", cause=cause, fix="give either, not both")
    train, validation = _named(found, "train"), _named(found, "val")
    if config.validation is None:
        return (train, validation) if train and validation else (found, None)
    given = _token_files(config.validation)
    if given is None:
        cause = f"{config.sources[0]} is token files, and {config.validation} is none"
        raise DataError("two kinds of text", where="data.validation", cause=cause, fix="give a token file, too")
    return train or found, _named(given, "val") or given


def prepared_by_others(files: Files, tokenizer: str | Tokenizer | None) -> Prepared:
    """Token files as prepared text; without files to validate on the last tenth of all ids is held out.

    Args:
        tokenizer: itself, or gpt2, or a folder: the one that made them.

    Raises:
        ConfigError: it is not given. DataError: a file is no token file, or its ids are not this tokenizer's.
    """
    train, validation = files
    if tokenizer is None or (isinstance(tokenizer, str) and is_learned(tokenizer)):
        cause = f"{train[0]} is a token file of nanoGPT or llm.c, which does not say what made it"
        raise ConfigError(
            "which tokenizer?", where="tokenizer", cause=cause, fix="give --tokenizer=gpt2, or its folder"
        )
    tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    shards = open_foreign(train, tokenizer)
    if validation is not None:
        splits = shards, open_foreign(validation, tokenizer)
    else:
        cut = len(shards) * (HELD_OUT - 1) // HELD_OUT
        splits = ForeignShards(train, tokenizer, slice(0, cut)), ForeignShards(train, tokenizer, slice(cut, None))
    kind = "token files of llm.c" if shards.separator_first else "token files of nanoGPT"
    account = {"read_as": {kind: len(train) + len(validation or ())}, "skipped_by_reason": {}, "skipped": []}
    return Prepared(train[0].parent, tokenizer, *splits, account)


def _named(files: list[Path], split: str) -> list[Path]:
    """Those whose names say that they are of a split."""
    return [path for path in files if (match := _NAMED.fullmatch(path.name)) and match[1] == split]


def _token_files(source: str) -> list[Path] | None:
    """The files of a source, if they are named as token files and the first does not hold text; else None."""
    if os.path.isdir(source):
        files = [path for path in Path(source).iterdir() if _NAMED.fullmatch(path.name)]
    elif glob.has_magic(source) and not os.path.lexists(source):
        files = [Path(path) for path in glob.glob(source, recursive=True)]
    else:
        files = [Path(source)]
    files = sorted((path for path in files if path.is_file()), key=os.fsencode)
    if not files or any(path.suffix != ".bin" for path in files):
        return None
    with files[0].open("rb") as file:
        return None if _is_text(file.read(_HEAD)) else files


class ForeignFile(ShardFile):
    """The ids of a file without hashes. They are compared with the vocabulary when they are first read; a file that is
    written to while it is in use is refused.

    Attributes:
        is_llmc: whether it is llm.c's; else it is nanoGPT's.
    """

    what = "unusable tokens"
    is_llmc: bool

    def __init__(self, path: Path, tokenizer: Tokenizer, part: slice = slice(None)) -> None:
        self._vocab_size, self._fingerprint, self._part = tokenizer.vocab_size, tokenizer.fingerprint, part
        super().__init__(path)
        if self.header.tokens:
            self.check(0)

    @property
    def fix(self) -> str:
        """What to do when the file cannot be used."""
        return "give token files of nanoGPT or llm.c (uint16, of GPT-2's tokenizer), or the text itself"

    def read_layout(self, file: OpenFile) -> Layout:
        """Where its ids lie.

        Raises:
            DataError: it is neither nanoGPT's nor llm.c's.
        """
        head = file.read(0, min(file.size, _LLMC_HEAD))
        magic = int.from_bytes(head[:4], "little")
        self.is_llmc = magic in (LLMC_MAGIC, LLMC_LLAMA_MAGIC) and len(head) == _LLMC_HEAD
        if self.is_llmc:
            tokens, start = _llmc_tokens(file, head), _LLMC_HEAD
        else:
            tokens, start = _nanogpt_tokens(file), 0
        digest, (first, end, _) = file.probe(), self._part.indices(tokens)
        if end - first < tokens:
            digest = hashlib.sha256(f"{digest} {first} {end}".encode()).hexdigest()
        said = ShardHeader("<u2", end - first, 0, 0, self._vocab_size, self._fingerprint, digest, BLOCK_BYTES)
        return Layout(said, start + 2 * first, None)


class ForeignShards(Shards):
    """Token files of others as one long sequence.

    The fingerprint is of their lengths and of 16 places in each file: hashing all would take minutes. Documents and bytes are
    not written down in them: whoever asks has everything read, once.

    Args:
        part: which of all their ids.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer, part: slice = slice(None)) -> None:
        self._tokenizer, self._part = tokenizer, part
        super().__init__(paths)

    def _open(self, paths: Sequence[Path]) -> Sequence[ShardFile]:
        files = [ForeignFile(path, self._tokenizer) for path in paths]
        if len({file.is_llmc for file in files}) > 1:
            other = next(file for file in files if file.is_llmc != files[0].is_llmc)
            cause = f"{paths[0]} and {other.path} are of two formats"
            raise DataError("unusable tokens", where=str(other.path), cause=cause, fix="give files of one format")
        self.separator_first = bool(files) and files[0].is_llmc
        return list(self._cut(files))

    def _cut(self, files: list[ForeignFile]) -> Iterator[ForeignFile]:
        """The files in which the part lies, and of these what belongs to it."""
        first, end, _ = self._part.indices(sum(file.header.tokens for file in files))
        at = 0
        for file in files:
            tokens = file.header.tokens
            inside = slice(max(0, first - at), max(0, min(tokens, end - at)))
            if inside.start < inside.stop:
                whole = inside == slice(0, tokens)
                yield file if whole else ForeignFile(file.path, self._tokenizer, inside)
            at += tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens."""
        return self._counts[1]

    @property
    def documents(self) -> int:
        """Documents in all files; one that is cut off counts."""
        return self._counts[0]

    @cached_property
    def _counts(self) -> tuple[int, int]:
        uses = np.zeros(self._tokenizer.vocab_size, np.int64)
        for at in range(0, len(self), _SCAN):
            uses += np.bincount(self.read(at, min(_SCAN, len(self) - at)), minlength=len(uses))
        end_of_text, separators = self._tokenizer.end_of_text, int(uses[self._tokenizer.end_of_text])
        edge = (0 if self.separator_first else len(self) - 1) if len(self) else None
        cut_off = edge is not None and int(self.read(edge, 1)[0]) != end_of_text
        return separators + cut_off, int(uses @ token_bytes(self._tokenizer))


def open_foreign(paths: Sequence[Path], tokenizer: Tokenizer) -> ForeignShards:
    """Token files of nanoGPT or llm.c, told apart by their content.

    Args:
        paths: in the order of the text.
        tokenizer: that made them; the files do not say which one it was.

    Raises:
        DataError: a file is of neither, or its ids are not this tokenizer's.
    """
    return ForeignShards(paths, tokenizer)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many UTF-8 bytes of text each id stands for; end-of-text for none."""
    said = json.loads(tokenizer.to_json())
    of_bytes = (said["decoder"] or {}).get("type") == "ByteLevel"  # then one character in the vocabulary is one byte
    sizes = np.zeros(tokenizer.vocab_size, np.int64)
    for token, number in said["model"]["vocab"].items():
        sizes[number] = len(token) if of_bytes else len(token.encode())
    sizes[tokenizer.end_of_text] = 0
    return sizes


def _llmc_tokens(file: OpenFile, head: bytes) -> int:
    """How many ids a file of llm.c holds."""
    magic, version, tokens = np.frombuffer(head, "<i4")[:3].tolist()
    if (magic, version) != (LLMC_MAGIC, 1):
        kind = "Llama 3's tokens" if magic == LLMC_LLAMA_MAGIC else "a file of llm.c"
        raise file.damaged(f"it is {kind}, version {version}; GPT-2's in version 1 are read", 0)
    if tokens < 0 or file.size != _LLMC_HEAD + 2 * tokens:
        cause = f"it has {file.size} bytes, its header says {_LLMC_HEAD + 2 * tokens}"
        raise file.damaged(cause, min(file.size, max(0, _LLMC_HEAD + 2 * tokens)))
    return int(tokens)


def _nanogpt_tokens(file: OpenFile) -> int:
    """How many ids a file without a header holds, which is not something else altogether."""
    start = file.read(0, min(file.size, _HEAD))
    if file.size % 2:
        raise file.damaged(f"it has {file.size} bytes, an odd number, and an id has two", file.size - 1)
    if start.startswith((b"gpt2lab", b"\x93NUMPY")):
        raise file.damaged("it is one of our shards, or NumPy's; name our folder, or write the array with tofile", 0)
    if _is_text(start):
        raise file.damaged("it is text, or empty, and holds no ids", 0)
    ids = np.frombuffer(start, "<u2")
    if len(ids) >= 64 and not ids[1::2].any():
        raise file.damaged("every second id is 0, as in uint32; they must be uint16", 2)
    return file.size // 2


def _is_text(start: bytes) -> bool:
    """Whether these bytes hold something else: ids below 256, which are the commonest, have a zero for their second byte."""
    if b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError:
        return len(start) >= 4096  # in another encoding, or cut inside a character
    return True
