"""The first of two readings of a source: what is in it, what is skipped, which of its documents are held out, and in which
shard each will be.

Everything that is decided here follows from the documents alone: not from their names, the folder they lie in, the number of
workers or machines. A document takes 24 bytes of memory here, however long it is.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gpt2lab.data.formats import Found
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.errors import DataError

SPLITS = ("train", "validation")
HELD_OUT = 10
"""One part in this many is validation text, where none is named."""
SHARD_CHARS = 2**28
"""A shard ends with the document in which it reaches so many characters: some 60 million tokens of GPT-2's."""
_LISTED = 1000


@dataclass
class Survey:
    """What a source holds.

    Attributes:
        digests: the first 8 bytes of each document's SHA-256, as a big-endian number; a prompt counts as other text.
        chars: characters in each.
        bytes: of UTF-8 text in all of them.
        skipped: what is no text, file by file; no more than a thousand rows are kept.
        skipped_bytes: by reason, of all rows.
        faulty_bytes: of lines and records that should be text and are not; files that are something else do not count.
        fingerprint: a hash of all documents, in their order.
        kinds: how many files were read as what.
    """

    digests: np.ndarray
    chars: np.ndarray
    bytes: int
    skipped: list[Skipped] = field(default_factory=list)
    skipped_bytes: Counter[str] = field(default_factory=Counter)
    faulty_bytes: int = 0
    fingerprint: str = ""
    kinds: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.digests)

    def __add__(self, other: Survey) -> Survey:
        """Both, one after the other."""
        return Survey(
            np.concatenate([self.digests, other.digests]),
            np.concatenate([self.chars, other.chars]),
            self.bytes + other.bytes,
            (self.skipped + other.skipped)[:_LISTED],
            self.skipped_bytes + other.skipped_bytes,
            self.faulty_bytes + other.faulty_bytes,
            hashlib.sha256(f"{self.fingerprint} {other.fingerprint}".encode()).hexdigest(),
            self.kinds + other.kinds,
        )

    @property
    def bytes_in(self) -> int:
        """Bytes of the source: each is text, or is skipped."""
        return self.bytes + sum(self.skipped_bytes.values())


def survey(source: Iterable[Found | Piece | Skipped], *, stop: bool = False) -> Survey:
    """Read a source through, once.

    Args:
        stop: at the first fault, rather than go on without what is faulty.

    Raises:
        DataError: there is a fault, and `stop`; or what reading the source raises.
    """
    digests, chars = array("Q"), array("q")
    found = Survey(np.empty(0), np.empty(0), 0)
    total, document, length, scored = hashlib.sha256(), hashlib.sha256(), 0, True
    for item in source:
        if isinstance(item, Found):
            found.kinds[described(item)] += 1
            continue
        if isinstance(item, Skipped):
            if stop and item.fault:
                where = f"{item.file}, {item.where}" if item.where else item.file
                fix = "mend it, or leave out what is faulty with --data.on_fault=skip"
                raise DataError("unusable text", where=where, cause=item.reason, fix=fix)
            found.skipped_bytes[item.reason] += item.bytes
            found.faulty_bytes += item.bytes if item.fault and item.where else 0
            if len(found.skipped) < _LISTED:
                found.skipped.append(item)
            continue
        encoded = item.text.encode()
        if encoded and item.scored != scored:
            scored = item.scored
            document.update(bytes([0xFF, scored]))  # no byte of UTF-8
        document.update(encoded)
        length, found.bytes = length + len(item.text), found.bytes + len(encoded)
        if item.last:
            if length:
                total.update(document.digest())
                digests.append(int.from_bytes(document.digest()[:8], "big"))
                chars.append(length)
            document, length, scored = hashlib.sha256(), 0, True
    found.digests, found.chars = np.array(digests, np.uint64), np.array(chars, np.int64)
    found.fingerprint = total.hexdigest()
    return found


def described(found: Found) -> str:
    """What a file was read as, in words: ``json lines in zstd, text from "body" (guessed)``."""
    packed = f" in {' in '.join(reversed(found.archives))}" if found.archives else ""
    encoding = f", {found.encoding}" if found.encoding != "utf-8" else ""
    if found.fields is None:
        return f"{found.kind}{packed}{encoding}"
    names = " and ".join(f'"{name}"' for name in found.fields.names)
    return f"{found.kind}{packed}{encoding}, {found.fields.kind} from {names}{' (guessed)' if found.fields.guessed else ''}"


@dataclass(frozen=True)
class Division:
    """Where each document of a source goes.

    Attributes:
        cuts: so many of a document's first characters are learned from; the rest of it is validation text.
        shards: for each split, the number of the shard in which each document's part lies; -1 where it has none.
    """

    cuts: np.ndarray
    shards: dict[str, np.ndarray]

    def names(self, split: str) -> list[str]:
        """The shards of a split: ``train-00000`` and so on. There is at least one, if an empty one."""
        count = max(1, int(self.shards[split].max(initial=-1)) + 1)
        return [shard_name(split, number) for number in range(count)]


def shard_name(split: str, number: int) -> str:
    """``train-00000``."""
    return f"{split}-{number:05d}"


def divide(found: Survey, held_out: np.ndarray | None = None) -> Division:
    """Share out the documents of a source.

    Args:
        held_out: for each document whether it comes from a validation text of its own; None: a tenth is held out.
    """
    cuts = np.where(held_out, 0, found.chars) if held_out is not None else _hold_out(found)
    lengths = {"train": cuts, "validation": found.chars - cuts}
    return Division(cuts, {split: _into_shards(chars) for split, chars in lengths.items()})


def _hold_out(found: Survey) -> np.ndarray:
    """How many characters of each document are learned from, so that about a tenth of all are not.

    Of few documents the last tenth of each is held out: the validation text still comes after all that was read. Of more,
    whole ones, drawn by their hashes, so that names and order do not matter, and twins are on the same side.
    """
    if len(found) < HELD_OUT:
        return found.chars * (HELD_OUT - 1) // HELD_OUT
    kinds, kind = np.unique(found.digests, return_inverse=True)
    chars = np.bincount(kind, weights=found.chars, minlength=len(kinds)).astype(np.int64)
    before = np.cumsum(chars) - chars
    return np.where((before < found.chars.sum() // HELD_OUT)[kind], 0, found.chars)


def _into_shards(chars: np.ndarray) -> np.ndarray:
    """The shard of each part that is not empty: a new one begins with the first document after so many characters."""
    shards = (np.cumsum(chars) - chars) // SHARD_CHARS
    present = chars > 0
    shards[~present] = -1
    shards[present] = np.unique(shards[present], return_inverse=True)[1]
    return shards
