"""Token files that others have made: nanoGPT's ids without a word around them, and llm.c's, read where they lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from gpt2lab.data.shard_format import BLOCK_BYTES, Layout, OpenFile, ShardHeader
from gpt2lab.data.shards import ShardFile, Shards
from gpt2lab.errors import DataError
from gpt2lab.tokenizer import Tokenizer

LLMC_MAGIC = 20240520
LLMC_LLAMA_MAGIC = 20240801
_LLMC_HEAD = 1024  # 256 numbers of 4 bytes
_SCAN = 2**20  # ids


class ForeignFile(ShardFile):
    """The ids of a file without hashes. They are compared with the vocabulary when they are first read; a file that is
    written to while it is in use is refused.

    Attributes:
        is_llmc: whether it is llm.c's; else it is nanoGPT's.
    """

    what = "unusable tokens"
    is_llmc: bool

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._vocab_size, self._fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
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
        digest = file.probe()
        said = ShardHeader("<u2", tokens, 0, 0, self._vocab_size, self._fingerprint, digest, BLOCK_BYTES)
        return Layout(said, start, None)


class ForeignShards(Shards):
    """Token files of others as one long sequence.

    The fingerprint is of their lengths and of 16 places in each file: hashing all would take minutes. Documents and bytes are
    not written down in them: whoever asks has everything read, once.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        super().__init__(paths)

    def _open(self, paths: Sequence[Path]) -> Sequence[ShardFile]:
        files = [ForeignFile(path, self._tokenizer) for path in paths]
        if len({file.is_llmc for file in files}) > 1:
            other = next(file for file in files if file.is_llmc != files[0].is_llmc)
            cause = f"{paths[0]} and {other.path} are of two formats"
            raise DataError("unusable tokens", where=str(other.path), cause=cause, fix="give files of one format")
        self.separator_first = bool(files) and files[0].is_llmc
        return files

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
    start = file.read(0, min(file.size, 2**16))
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
