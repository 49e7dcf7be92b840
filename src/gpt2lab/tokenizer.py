"""Text to token ids and back: bytes, characters, byte-pair encoding of one's own text, and GPT-2's.

All four are one class around the `tokenizers` library and are saved as its ``tokenizer.json``, which other programs read.
Text is always ordinary text: "<|endoftext|>" in it is spelled out in tokens, and only we put the real separator between
documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gpt2lab.errors import ConfigError, DataError
from gpt2lab.hub import fetch
from gpt2lab.paths import local_copy

GPT2_ON_HUB = "openai-community/gpt2"
END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
PAIRS = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]  # Hugging Face's names, and OpenAI's
LARGEST_FILE = 64 * 2**20

_PIECE = 1 << 16  # characters encoded at once; pieces are encoded in parallel
_ANY_CHARACTER = r"[\s\S]"
_SAFE_CUT = re.compile(r"\S\n(?=\S)")  # GPT-2's pattern always ends a token between this newline and what follows


class Tokenizer:
    """A tokenizer of any kind.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1.
        end_of_text: the id that separates documents.
    """

    def __init__(self, backend: Backend) -> None:
        ids = sorted(backend.get_vocab().values())
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if ids != list(range(len(ids))) or end_of_text is None:
            raise DataError(
                "unusable tokenizer",
                cause=f"{len(ids)} ids that run to {ids[-1] if ids else 'none'}, and {END_OF_TEXT} must be among them",
                fix="give a GPT-2 style vocabulary, without gaps",
            )
        self._backend = backend
        self.vocab_size = len(ids)
        self.end_of_text = int(end_of_text)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The 256 bytes, each its own id, and the separator as 256."""
        vocab = {char: byte for byte, char in _byte_characters().items()} | {END_OF_TEXT: 256}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[]), split=False))

    @classmethod
    def chars(cls, texts: Iterable[str]) -> Tokenizer:
        """The characters that occur in `texts`, in code point order, then the separator."""
        characters = sorted(set().union(*texts))
        vocab = {char: index for index, char in enumerate(characters)} | {END_OF_TEXT: len(characters)}
        backend = Backend(models.WordLevel(vocab=vocab))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(_ANY_CHARACTER), "isolated")
        backend.decoder = decoders.Fuse()
        return cls(backend)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-pair encoding (Sennrich et al. 2016, as bytes in GPT-2) with the merges that `texts` suggest.

        Raises:
            ConfigError: fewer tokens than 256 bytes and a separator.
        """
        if vocab_size < 257:
            cause = f"{vocab_size} tokens cannot hold the 256 bytes and a separator"
            raise ConfigError("vocabulary too small", cause=cause, fix="ask for 257 or more")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=sorted(_byte_characters().values()), show_progress=False
        )
        backend.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        model = json.loads(backend.to_str())["model"]
        vocab = model["vocab"] | {END_OF_TEXT: len(model["vocab"])}
        return cls(_byte_level(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in model["merges"]])))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """A tokenizer from a folder: our own ``tokenizer.json``, or GPT-2's vocabulary and merges.

        Raises:
            DataError: neither is there, or it is damaged.
        """
        folder = Path(folder)
        own, pairs = folder / FILE, [[folder / name for name in pair] for pair in PAIRS]
        try:
            for path in (own, *(path for pair in pairs for path in pair)):
                if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_FILE):
                    raise ValueError(f"{path.name} is no file of at most {LARGEST_FILE} bytes")
            for pair in pairs:
                if all(path.is_file() for path in pair):
                    return cls(_byte_level(models.BPE.from_file(*map(str, pair))))
            if own.is_file():
                return cls(_without_specials(Backend.from_file(str(own))))
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise DataError("damaged tokenizer", where=str(folder), cause=str(error), fix="copy it again") from None
        cause = f"neither {FILE} nor vocab.json with merges.txt is there"
        raise DataError("no tokenizer", where=str(folder), cause=cause, fix="give a folder that has them, or `bytes`")

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """A tokenizer from what `to_json` gave."""
        return cls(_without_specials(Backend.from_str(text)))

    def to_json(self) -> str:
        """What ``tokenizer.json`` says."""
        return str(self._backend.to_str(pretty=False))

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into `folder`."""
        Path(folder, FILE).write_text(self.to_json(), encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides ids."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, as int32, without a separator.

        Raises:
            DataError: a character that a tokenizer of characters has never seen.
        """
        return self.encode_documents([text])[0]

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text. Long texts are cut where that changes nothing, and pieces are encoded in parallel."""
        pieces = [(index, piece) for index, text in enumerate(texts) for piece in _pieces(text)]
        try:
            encoded = self._backend.encode_batch_fast([piece for _, piece in pieces], add_special_tokens=False)
        except (
            Exception
        ):  # half a surrogate pair, or the library's bare Exception: a WordLevel model met an unknown word
            unknown = self._unknown(set().union(*texts))[:5]
            cause = f"this tokenizer has never seen {', '.join(map(ascii, unknown))}"
            raise DataError(
                "unknown character", cause=cause, fix="leave it out, or train with tokenizer: bytes"
            ) from None
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for (index, _), encoding in zip(pieces, encoded, strict=True):
            ids[index].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate(parts) if parts else np.zeros(0, np.int32) for parts in ids]

    def _unknown(self, characters: set[str]) -> list[str]:
        """Those that cannot be encoded: half surrogate pairs, or else what a vocabulary of characters lacks."""
        halves = sorted(char for char in characters if "\ud800" <= char <= "\udfff")
        return halves or sorted(char for char in characters if self._backend.token_to_id(char) is None)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 show as U+FFFD."""
        return str(self._backend.decode([int(i) for i in token_ids], skip_special_tokens=False))


def open_tokenizer(name: str, texts: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer that a recipe names: bytes, chars, bpe:N, gpt2, or a folder. chars and bpe:N learn from `texts`.

    Raises:
        ConfigError: no such name. DataError: it cannot be had.
    """
    if name == "bytes":
        return Tokenizer.bytes()
    if name == "chars":
        return Tokenizer.chars(texts)
    if name.startswith("bpe:"):
        if not (name[4:].isdecimal() and len(name) <= len("bpe:") + 7):
            raise ConfigError(
                "bad tokenizer", where="tokenizer", cause=f"{name!r} names no size", fix="such as bpe:4096"
            )
        return Tokenizer.train_bpe(texts, int(name[4:]))
    if name == "gpt2":
        return Tokenizer.load(local_copy("gpt2-tokenizer") or fetch(GPT2_ON_HUB, *PAIRS[0]))
    if Path(name).is_dir():
        return Tokenizer.load(name)
    fix = "bytes, chars, bpe:4096, gpt2, or a folder with vocab.json and merges.txt"
    raise ConfigError("no such tokenizer", where="tokenizer", cause=f"{name!r} is neither a kind nor a folder", fix=fix)


def is_learned(name: str) -> bool:
    """Whether a recipe's tokenizer is made from the text."""
    return name == "chars" or name.startswith("bpe:")


def _byte_characters() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes as printable characters: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _byte_level(model: models.Model, *, split: bool = True) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _without_specials(backend: Backend) -> Backend:
    """The same tokenizer with no added tokens: text is ordinary text, and nothing is put around it.

    Raises:
        DataError: it changes text before it splits it, so that long texts could not be cut into pieces.
    """
    state = json.loads(backend.to_str())
    splitter = state["pre_tokenizer"] or {}
    ours = splitter.get("pattern") == {"Regex": _ANY_CHARACTER}
    gpt2s = splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space")
    if state["normalizer"] is not None or not (ours or gpt2s):
        cause = f"it changes text, or splits it by another rule than GPT-2's ({splitter.get('type')})"
        raise DataError("another kind of tokenizer", where=FILE, cause=cause, fix="give one of GPT-2's kind")
    vocab = state["model"].get("vocab")
    if isinstance(vocab, dict):
        vocab |= {token["content"]: token["id"] for token in state["added_tokens"]}
    return Backend.from_str(
        json.dumps(state | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
    )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * _PIECE:
        cut = _SAFE_CUT.search(text, start + _PIECE)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text):
        yield text[start:]
