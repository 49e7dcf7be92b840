"""The doctor: what is in prepared text, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpt2lab.data.doctor.copies import SPLITS, Duplicates, Place, Reader, exact_duplicates, near_duplicates
from gpt2lab.data.doctor.scan import Scan, last_key
from gpt2lab.data.doctor.spelling import Spelling, token_bytes
from gpt2lab.data.doctor.symptoms import Fault
from gpt2lab.data.prepared import Prepared

SHINGLE_BYTES = 20
"""Near-duplicates share runs of ids that are about so long: five tokens of GPT-2's, twenty bytes."""
MOST_DOCUMENTS = 2**20
"""Copies are looked for in so many documents at most, drawn by their text."""
MOST_SIGNED = 10**5
MOST_SIGNED_TOKENS = 10**8
"""Near copies are looked for in about so many documents and tokens at most, drawn so that copies are drawn together."""
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_EXAMPLES = 3
_UNUSED = 8
_LISTED = 5


@dataclass(frozen=True)
class Split:
    """A split.

    Attributes:
        documents, empty, tokens, bytes: how many; of what could be read.
        lengths: tokens of the shortest document, of the one that 10 %, 50 % and 90 % are not longer than, of the longest.
        longest, examples: some documents.
        lines, crlf_lines: how many lines end, and how many of them in CR LF.
        faults: by kind, as in `symptoms.FAULTS`.
        repeated_lines: the worst, and how often they are there; `repeated_bytes` counts all of them but once each.
        errors: what cannot be read, the first of it; `unread` counts the tokens.
    """

    documents: int
    empty: int
    tokens: int
    bytes: int
    lengths: list[int]
    longest: list[Place]
    examples: list[Place]
    lines: int
    crlf_lines: int
    faults: dict[str, Fault]
    repeated_lines: list[tuple[str, int]]
    repeated_bytes: int
    errors: list[str]
    unread: int


@dataclass(frozen=True)
class Findings:
    """All that the doctor found.

    Attributes:
        prepared: what was looked at.
        splits: by name.
        used: how many ids the training text uses; `unused` are some that neither split does, spelled out.
        beyond: ids that the tokenizer does not have.
        sample: `seq_len` tokens from a random place, as a training step gets them.
        shingle: ids in a shingle.
        looked_at: documents among which copies were looked for, exact ones and near ones.
        exact, near: duplicates to the id; and of similarity `duplicates.SIMILAR` or more, those of the first kind left out.
    """

    prepared: Prepared
    splits: dict[str, Split]
    used: int
    unused: list[str]
    beyond: int
    seq_len: int
    sample: str
    shingle: int
    looked_at: dict[str, int]
    exact: Duplicates
    near: Duplicates


def inspect(prepared: Prepared, *, seq_len: int = 128, seed: int = 0) -> Findings:
    """Examine prepared text, in two passes and in memory that does not grow with it.

    Args:
        seq_len: tokens of the sample that is shown.
        seed: decides which documents and which sample are shown.
    """
    shards, spelling = (
        dict(zip(SPLITS, (prepared.train, prepared.validation), strict=True)),
        Spelling(prepared.tokenizer),
    )
    num_tokens, num_bytes = (sum(map(count, shards.values())) for count in (len, lambda part: part.bytes))
    num_documents = sum(part.documents for part in shards.values())
    shingle = int(np.clip(round(SHINGLE_BYTES * num_tokens / max(1, num_bytes)), 1, SHINGLE_BYTES))
    share = min(1.0, MOST_DOCUMENTS / max(1, num_documents))
    scans = {split: Scan(part, spelling, share=share, shingle=shingle) for split, part in shards.items()}
    reader = Reader(prepared, seed)
    drawn = [scan.drawn for scan in scans.values()]
    share = min(1.0, MOST_SIGNED / max(1, num_documents), MOST_SIGNED_TOKENS / max(1, num_tokens))
    signed = [documents.take(documents.key <= last_key(share)) for documents in drawn]
    unused = np.flatnonzero((scans["train"].usage + scans["validation"].usage)[:-1] == 0)
    spelled = token_bytes(prepared.tokenizer)
    return Findings(
        prepared=prepared,
        splits={split: _split(split, scan, reader) for split, scan in scans.items()},
        used=int((scans["train"].usage[:-1] > 0).sum()),
        unused=[spelled[i].decode(errors="backslashreplace") for i in reader.random.permutation(unused)[:_UNUSED]],
        beyond=sum(int(scan.usage[-1]) for scan in scans.values()),
        seq_len=seq_len,
        sample=reader.sample(seq_len),
        shingle=shingle,
        looked_at={"exact": sum(map(len, drawn)), "near": sum(map(len, signed))},
        exact=exact_duplicates(reader, drawn),
        near=near_duplicates(reader, signed, shingle),
    )


def _split(split: str, scan: Scan, reader: Reader) -> Split:
    """What is said of a split."""
    drawn, lines = scan.drawn, scan.symptoms.repeated_lines()
    others = np.sort(reader.random.permutation(np.arange(1, len(drawn)))[: _EXAMPLES - 1])
    shown = [0, *others.tolist()] if len(drawn) else []
    return Split(
        documents=scan.num_documents,
        empty=scan.num_empty,
        tokens=int(scan.usage.sum()),
        bytes=scan.bytes,
        lengths=np.quantile(drawn.tokens, QUANTILES, method="inverted_cdf").tolist() if len(drawn) else [],
        longest=[reader.place(split, scan.longest, row) for row in range(len(scan.longest))],
        examples=[reader.place(split, drawn, row) for row in shown],
        lines=scan.symptoms.lines,
        crlf_lines=scan.symptoms.crlf_lines,
        faults=scan.symptoms.faults,
        repeated_lines=lines[:_LISTED],
        repeated_bytes=sum(len(line.encode()) * (count - 1) for line, count in lines),
        errors=scan.errors,
        unread=scan.unread,
    )
