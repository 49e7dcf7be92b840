"""Text to token ids and back: bytes, characters, byte-pair encoding of one's own text, and GPT-2's.

All four are one class around the `tokenizers` library and are saved as its ``tokenizer.json``, which other programs read.
The ids are the library's; most of them come from tables, which is several times as fast.
Text is always ordinary text: "<|endoftext|>" in it is spelled out in tokens, and only we put the real separator between
documents.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gpt2lab.errors import ConfigError, DataError
from gpt2lab.hub import fetch
from gpt2lab.paths import local_copy
from gpt2lab.words import WordTable

GPT2_ON_HUB = "openai-community/gpt2"
END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
PAIRS = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]  # Hugging Face's names, and OpenAI's
LARGEST_FILE = 64 * 2**20

_PIECE = 1 << 17  # characters encoded at once, up to twice as many where a text ends
_LONGEST_PIECE = 1 << 20  # without a safe cut; one that is longer is cut all the same, and its ids may be others there
_ANY_CHARACTER = r"[\s\S]"
_EACH = pre_tokenizers.Split(Regex(_ANY_CHARACTER), "isolated")
_NO_IDS = np.zeros(0, np.int32)

# Where GPT-2's pattern always ends a token, whatever stands around: before white space that follows something else, and
# after a letter or a digit that another kind follows. No token goes across: white space stands only first in a token, and
# after a letter or digit comes only its like. Tokens before the cut are the same without what follows: only \s+(?!\S) looks
# ahead, and it looks at what comes after white space, while here something else stands before the cut. None looks behind.
# Python's \S is narrower than the library's; the rest is ASCII, which is the same everywhere.
_SAFE_CUT = re.compile(r"\S(?=[ \n])|[A-Za-z0-9](?=[!-/:-@\[-`{-~])")


class Tokenizer:
    """A tokenizer of any kind.

    Attributes:
        vocab_size: ids run from 0 to vocab_size - 1.
        end_of_text: the id that separates documents.
    """

    def __init__(self, backend: Backend) -> None:
        vocab = backend.get_vocab()
        ids = sorted(vocab.values())
        end_of_text = backend.token_to_id(END_OF_TEXT)
        if ids != list(range(len(ids))) or end_of_text is None:
            raise DataError(
                "unusable tokenizer",
                cause=f"{len(ids)} ids that run to {ids[-1] if ids else 'none'}, and {END_OF_TEXT} must be among them",
                fix="give a GPT-2 style vocabulary, without gaps",
            )
        self._backend = backend
        self._encode = _fastest_way(backend, vocab)
        self.vocab_size = len(ids)
        self.end_of_text = int(end_of_text)

    @classmethod
    def bytes(cls) -> Tokenizer:
        """The 256 bytes, each its own id, and the separator as 256."""
        return cls(_byte_level(_bytes_alone(), split=False))

    @classmethod
    def chars(cls, texts: Iterable[str]) -> Tokenizer:
        """The characters that occur in `texts`, in code point order, then the separator."""
        characters = sorted(set().union(*texts))
        vocab = {char: index for index, char in enumerate(characters)} | {END_OF_TEXT: len(characters)}
        backend = Backend(models.WordLevel(vocab=vocab))
        backend.pre_tokenizer = _EACH
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
            vocab_size=vocab_size - 1, initial_alphabet=sorted(byte_characters().values()), show_progress=False
        )
        backend.train_from_iterator((piece for text in texts for piece in pieces([text])), trainer)
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
        return self._json

    @cached_property
    def _json(self) -> str:
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
        """Token ids of each text. Long texts are cut where that changes nothing."""
        try:
            return [np.concatenate([_NO_IDS, *map(self._encode, pieces([text]))]) for text in texts]
        except Exception:  # half a surrogate pair, an unknown character, or the library's bare Exception for either
            unknown = self._unknown(set().union(*texts))[:5]
            if not unknown:
                raise
            cause = f"this tokenizer has never seen {', '.join(map(ascii, unknown))}"
            raise DataError(
                "unknown character", cause=cause, fix="leave it out, or train with tokenizer: bytes"
            ) from None

    def _unknown(self, characters: set[str]) -> list[str]:
        """Those that cannot be encoded: half surrogate pairs, or else what a vocabulary of characters lacks."""
        halves = sorted(char for char in characters if "\ud800" <= char <= "\udfff")
        return halves or sorted(char for char in characters if self._backend.token_to_id(char) is None)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 show as U+FFFD."""
        return str(self._backend.decode([int(i) for i in token_ids], skip_special_tokens=False))

    @property
    def concatenates(self) -> bool:
        """Whether a text is the bytes of its tokens, one after the other."""
        return isinstance(self._backend.decoder, decoders.ByteLevel | decoders.Fuse)

    def token_bytes(self, token_id: int) -> builtins.bytes:
        """The bytes of a token where texts are such; none of an id that is no token."""
        token = self._backend.id_to_token(token_id) or ""
        if isinstance(self._backend.decoder, decoders.ByteLevel) and all(char in _BYTES for char in token):
            return bytes(_BYTES[char] for char in token)
        return str(token).encode()


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


def byte_characters() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes as printable characters: those that print stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_BYTES = {char: byte for byte, char in byte_characters().items()}


def _byte_vocabulary() -> dict[str, int]:
    return _BYTES | {END_OF_TEXT: 256}


def _bytes_alone() -> models.Model:
    return models.BPE(vocab=_byte_vocabulary(), merges=[])


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
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model = model | {"vocab": model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}}
    if model.get("dropout"):
        model = model | {"dropout": None}  # leaves merges out by chance; a text has the same ids every time
    plain = dict.fromkeys(["post_processor", "truncation", "padding"])
    cleaned = state | {"model": model, "added_tokens": []} | plain
    return backend if cleaned == state else Backend.from_str(json.dumps(cleaned))


def pieces(parts: Iterable[str]) -> Iterator[str]:
    """The text of `parts`, one after the other, in pieces to encode by themselves; how it came in parts changes nothing.

    Yields:
        At least one piece, an empty one of no text.
    """
    rest, parts_since, size = "", list[str](), 0
    for part in parts:
        parts_since.append(part)
        size += len(part)
        if size >= _PIECE:  # not after each of many small parts: all that is held is searched again
            *whole, rest = _cut("".join([rest, *parts_since]))
            yield from whole
            parts_since, size = [], 0
    yield from _cut("".join([rest, *parts_since]))


def _cut(text: str) -> list[str]:
    """Pieces of a text; only the last may become another when more follows."""
    start, cut_off = 0, list[str]()
    while len(text) - start > 2 * _PIECE:
        found = _SAFE_CUT.search(text, start + _PIECE, start + _LONGEST_PIECE)
        if found is None and len(text) - start <= _LONGEST_PIECE:
            break
        end = found.end() if found else start + _LONGEST_PIECE
        cut_off.append(text[start:end])
        start = end
    return [*cut_off, text[start:]]


def _fastest_way(backend: Backend, vocab: dict[str, int]) -> Callable[[str], np.ndarray]:
    """What gives the ids, int32, that the library would, without its help where it can."""

    def ask(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    model, splitter = backend.model, backend.pre_tokenizer
    byte_level = isinstance(splitter, pre_tokenizers.ByteLevel)
    if byte_level and vocab == _byte_vocabulary() and _state(model) == _state(_bytes_alone()):
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    if isinstance(model, models.WordLevel) and model.unk_token not in vocab and _state(splitter) == _state(_EACH):
        return _look_up(vocab)
    if byte_level and splitter.use_regex:
        if backend.normalizer is None and not splitter.add_prefix_space:
            return WordTable(_each_word(model, ask))
        return WordTable(ask)
    return lambda text: np.array(ask(text), np.int32)


def _each_word(model: models.Model, ask: Callable[[str], list[int]]) -> Callable[[str], list[int]]:
    """What asks the model itself where a piece of text is one of GPT-2's words: for half the time."""
    spelled = {byte: char for byte, char in byte_characters().items() if byte < 128}

    def merge(word: str) -> list[int]:
        if not word.isascii():  # it may be several
            return ask(word)
        return [token.id for token in model.tokenize(word.translate(spelled))]

    return merge


def _look_up(vocab: dict[str, int]) -> Callable[[str], np.ndarray]:
    """The way of a vocabulary of characters: a table from code point to id. KeyError: a character is not in it."""
    known = {ord(token): token_id for token, token_id in vocab.items() if len(token) == 1}
    table = np.full(max(known, default=0) + 2, -1, np.int32)  # the last entry is of all that are beyond
    table[list(known)] = list(known.values())

    def encode(text: str) -> np.ndarray:
        ids = table[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(table) - 1)]
        if (ids < 0).any():
            raise KeyError("a character is not in the vocabulary")
        return ids

    return encode


def _state(part: models.Model | pre_tokenizers.PreTokenizer | None) -> bytes | None:
    """All that decides what a part of a tokenizer does."""
    return None if part is None else bytes(part.__getstate__())
