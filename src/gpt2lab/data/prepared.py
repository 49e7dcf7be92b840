"""A prepared folder: two splits of shards, the tokenizer that made them, and ``prepared.json``, which binds them together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.data.shard_format import ShardHeader
from gpt2lab.data.shards import Shards, damaged, shard_path
from gpt2lab.data.survey import SPLITS
from gpt2lab.errors import DataError
from gpt2lab.tokenizer import Tokenizer, is_learned, open_tokenizer

SUMMARY = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """A prepared text: its tokenizer and its two splits.

    Attributes:
        account: bytes_in, bytes_tokenised, bytes_skipped, skipped and skipped_by_reason, as found when it was prepared.
    """

    folder: Path
    tokenizer: Tokenizer
    train: Shards
    validation: Shards
    account: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of all ids to learn from, and of the tokenizer."""
        return self.train.fingerprint

    def summary(self) -> dict[str, Any]:
        """What is in it, in numbers, and the start of its first sample."""
        splits = {"train": self.train, "validation": self.validation}
        counts = {name: {"documents": s.documents, "tokens": len(s), "bytes": s.bytes} for name, s in splits.items()}
        return {
            **{total: sum(count[total] for count in counts.values()) for total in ("documents", "tokens")},
            **self.account,
            **counts,
            "vocab_size": self.tokenizer.vocab_size,
            "example": self.tokenizer.decode(self.train.read(0, min(32, len(self.train)))),
        }


def open_prepared(folder: Path) -> Prepared:
    """Shards that were prepared before.

    Raises:
        DataError: a shard is damaged or is not listed, or the tokenizer is another.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
        listed = {split: [ShardHeader(**row) for row in summary[split]] for split in SPLITS}
        account = dict(summary.get("account") or _account_of(listed))
    except FileNotFoundError:
        fix = "prepare some with `gpt2lab data prepare SOURCE --out DIR`"
        raise DataError("no prepared text", where=str(folder), cause=f"{SUMMARY} is not there", fix=fix) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(folder / SUMMARY, repr(error)) from None
    tokenizer = Tokenizer.load(folder)
    splits = {split: Shards([shard_path(folder, split, i) for i in range(len(rows))]) for split, rows in listed.items()}
    for split, rows in listed.items():
        for index, (row, header) in enumerate(zip(rows, splits[split].headers, strict=True)):
            if row != header or header.tokenizer != tokenizer.fingerprint:
                cause = "it is not the shard, or not the tokenizer, that was prepared with the others"
                raise damaged(shard_path(folder, split, index), cause)
    return Prepared(folder, tokenizer, splits["train"], splits["validation"], account)


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
        raise DataError(
            "tokenizers differ", where=str(prepared.folder), cause=cause, fix="leave it out, with --tokenizer=null"
        )


def _account_of(listed: dict[str, list[ShardHeader]]) -> dict[str, Any]:
    """The account of a text that was prepared before accounts were kept: nothing was skipped then, a fault ended it."""
    size = sum(header.bytes for headers in listed.values() for header in headers)
    return {
        "bytes_in": size,
        "bytes_tokenised": size,
        "bytes_skipped": 0,
        "read_as": {},
        "skipped_by_reason": {},
        "skipped": [],
    }
