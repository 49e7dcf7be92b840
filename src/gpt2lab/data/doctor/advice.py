"""What the doctor says: problems first, each with what to do about it, then what is there."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gpt2lab.data.doctor.copies import Copies, Place
from gpt2lab.data.doctor.duplicates import SIMILAR
from gpt2lab.data.doctor.inspect import Findings, Split
from gpt2lab.data.doctor.symptoms import FAULTS, REPEATED

BOILERPLATE = 0.05
"""The share of a text in repeated lines from which on they are a problem."""
WIDTH = 100
_LISTED = 3


@dataclass(frozen=True)
class Problem:
    """Something wrong with the text.

    Attributes:
        kind: one word for programs.
        what: in a sentence.
        where: some places.
        fix: what to do about it.
    """

    kind: str
    what: str
    where: list[str]
    fix: str


def problems(findings: Findings) -> list[Problem]:
    """All that is wrong, the worst first."""
    return [*_unreadable(findings), *_copied(findings), *_faulty(findings)]


def _unreadable(findings: Findings) -> Iterator[Problem]:
    """What does not fit together."""
    again = findings.prepared.train.fix
    for name, split in findings.splits.items():
        said = getattr(findings.prepared, name)
        if split.errors:
            yield Problem(
                "damage", f"{split.unread:,} tokens of the {name} text cannot be read", split.errors[:_LISTED], again
            )
        elif (split.documents, split.bytes) != (said.documents, said.bytes):
            what = f"the {name} text has {split.documents:,} documents and {split.bytes:,} bytes, and says it has"
            yield Problem("counts", f"{what} {said.documents:,} and {said.bytes:,}", [], again)
        if split.tokens + split.unread <= findings.seq_len:
            what = f"the {name} text has {split.tokens:,} tokens, and a sample of {findings.seq_len} needs one more than that"
            yield Problem("short", what, [], "give more text, or train with a smaller seq_len")
    if findings.beyond:
        what = f"{findings.beyond:,} ids are beyond the vocabulary of {findings.prepared.tokenizer.vocab_size:,}"
        yield Problem("vocabulary", what, [], "prepare the text again with the tokenizer that it is for")


def _copied(findings: Findings) -> Iterator[Problem]:
    """Documents that are there twice."""
    found = {"equal": findings.exact, "similar": findings.near}
    for how, kind in found.items():
        if kind.leaked.documents:
            what = f"LEAK: {_of(kind.leaked, 'validation')} {how} to training documents"
            fix = "take them out of one of the two and prepare again; this validation loss flatters"
            yield Problem("leak", what, _pairs(kind.leaked, how), fix)
    for name in findings.splits:
        for how, kind in found.items():
            copies: Copies = getattr(kind, name)
            if copies.documents:
                what = f"{_of(copies, name)} {how} to earlier ones"
                yield Problem("duplicates", what, _pairs(copies, how), "keep one of each; models learn copies by heart")


def _faulty(findings: Findings) -> Iterator[Problem]:
    """What is wrong with the text itself."""
    for name, split in findings.splits.items():
        for kind, fault in sorted(split.faults.items()):
            what = f"{FAULTS[kind]}: {fault.count:,}, in {fault.documents:,} of {split.documents:,} {name} documents"
            where = [f"{name} {fault.document:,}: {fault.text!r}"]
            yield Problem(kind, what, where, "repair these places in the source, or leave those documents out")
        if split.repeated_bytes > BOILERPLATE * split.bytes:
            share = split.repeated_bytes / split.bytes
            what = f"{share:.1%} of the {name} text is lines that were there before ({REPEATED} times or more in all)"
            where = [f"{count:,} x {line!r}" for line, count in split.repeated_lines[:_LISTED]]
            yield Problem("boilerplate", what, where, "take headers, footers and menus out of the source")
    faults = [row for row in findings.prepared.account["skipped"] if row["fault"]]
    if faults:
        what = f"{sum(row['bytes'] for row in faults):,} bytes of the source were skipped because they are faulty"
        where = [f"{row['file']} {row['where']}: {row['reason']}" for row in faults[:_LISTED]]
        yield Problem("skipped", what, where, "repair these places in the source and prepare again, or do without them")


def as_dict(findings: Findings) -> dict[str, Any]:
    """The findings for JSON: the fields that `data prepare` gives, and more."""
    splits = {
        name: asdict(split)
        | {"bytes_per_token": _ratio(split.bytes, split.tokens), "tokens_per_byte": _ratio(split.tokens, split.bytes)}
        for name, split in findings.splits.items()
    }
    duplicates = {
        kind: {where: asdict(copies) | {"share": copies.share} for where, copies in vars(found).items()}
        for kind, found in (("exact", findings.exact), ("near", findings.near))
    }
    size = findings.prepared.tokenizer.vocab_size
    return {
        **{total: sum(split[total] for split in splits.values()) for total in ("documents", "tokens")},
        **findings.prepared.account,
        "problems": [asdict(problem) for problem in problems(findings)],
        **splits,
        "vocab_size": size,
        "vocabulary": {
            "used": findings.used,
            "share": _ratio(findings.used, size),
            "unused": findings.unused,
            "beyond": findings.beyond,
        },
        "duplicates": {"shingle": findings.shingle, "similar": SIMILAR, "looked_at": findings.looked_at, **duplicates},
        "example": next((place.text for place in findings.splits["train"].examples), ""),
        "sample": findings.sample,
    }


def describe(findings: Findings) -> str:
    """The findings for people, in lines of at most `WIDTH` characters."""
    parts = [_problem_lines, _size_lines, _copy_lines, _text_lines, _account_lines]
    return "\n\n".join("\n".join(map(_fit, part(findings))) for part in parts)


def _problem_lines(findings: Findings) -> list[str]:
    found = problems(findings)
    if not found:
        return ["No problems found."]
    lines = [f"{len(found)} {'problem' if len(found) == 1 else 'problems'}"]
    for number, problem in enumerate(found, 1):
        lines += _wrap(problem.what, f"{number:3}. ")
        lines += [f"       {place}" for place in problem.where]
        lines += _wrap(f"Fix: {problem.fix}.", "     ")
    return lines


def _size_lines(findings: Findings) -> list[str]:
    rows: list[tuple[str, Callable[[Split], str]]] = [
        ("documents", lambda split: f"{split.documents:,}"),
        ("tokens", lambda split: f"{split.tokens:,}"),
        ("bytes of text", lambda split: f"{split.bytes:,}"),
        ("bytes a token", lambda split: f"{_ratio(split.bytes, split.tokens):.3f}"),
        ("tokens a byte", lambda split: f"{_ratio(split.tokens, split.bytes):.3f}"),
        ("lines", lambda split: f"{split.lines:,}"),
        ("  that end in CR LF", lambda split: f"{split.crlf_lines:,} ({_percent(split.crlf_lines, split.lines)})"),
        ("tokens in the shortest document", lambda split: _length(split, 0)),
        ("  10% have no more than", lambda split: _length(split, 1)),
        ("  half have no more than", lambda split: _length(split, 2)),
        ("  90% have no more than", lambda split: _length(split, 3)),
        ("  in the longest document", lambda split: _length(split, 4)),
    ]
    lines = [_row("", list(findings.splits))]
    lines += [_row(name, [value(split) for split in findings.splits.values()]) for name, value in rows]
    size = findings.prepared.tokenizer.vocab_size
    used = f"{findings.used:,} of {size:,} ({_percent(findings.used, size)})"
    return [*lines, _row("ids in use of the vocabulary", [used])]


def _copy_lines(findings: Findings) -> list[str]:
    lines = [_row("copies among documents", ["in train", "in validation", "train in validation"])]
    for name, found in (("equal", findings.exact), (f"similar ({SIMILAR} or more)", findings.near)):
        shown = (found.train, found.validation, found.leaked)
        lines.append(
            _row(
                f"  {name}",
                [f"{copies.documents:,} ({_percent(copies.documents, copies.of_documents)})" for copies in shown],
            )
        )
    total = sum(split.documents - split.empty for split in findings.splits.values())
    for name, count in findings.looked_at.items():
        if count < total:
            what = f"  {name} copies were looked for in {count:,} of {total:,} documents, drawn so that copies come together"
            lines.append(what)
    return lines


def _text_lines(findings: Findings) -> list[str]:
    train = findings.splits["train"]
    lines = ["longest documents", *(_line(place) for split in findings.splits.values() for place in split.longest)]
    lines += ["examples", *(_line(place) for split in findings.splits.values() for place in split.examples)]
    if train.repeated_lines:
        lines += ["lines that come again and again in train"]
        lines += [f"  {count:>7,} x {line!r}" for line, count in train.repeated_lines[:_LISTED]]
    if findings.unused:
        lines += [
            "never used, for example",
            "  " + " ".join(repr(text).replace("\\\\x", "\\x") for text in findings.unused),
        ]
    lines += [f"a sample of {findings.seq_len} tokens, as a training step gets it"]
    return lines + _wrap(repr(findings.sample), "  ")


def _account_lines(findings: Findings) -> list[str]:
    account = findings.prepared.account
    if "bytes_in" not in account:
        return ["prepared by others, who wrote down neither the text nor what they left out"]
    figures = [f"{account[name]:,}" for name in ("bytes_in", "bytes_tokenised", "bytes_skipped")]
    lines = ["when it was prepared", "  {} bytes in = {} tokenised + {} skipped".format(*figures)]
    return lines + [f"  {size:>15,} skipped: {reason}" for reason, size in account["skipped_by_reason"].items()]


def _row(name: str, values: list[str]) -> str:
    return f"{name:34}" + "".join(f"{value:>20}" for value in values)


def _wrap(text: str, indent: str) -> list[str]:
    """Lines of `WIDTH` characters; the first has the indent, the others as many spaces."""
    rest = " " * len(indent)
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False)


def _fit(line: str) -> str:
    """The line, cut at `WIDTH`."""
    return line.rstrip() if len(line) <= WIDTH else line[: WIDTH - 3].rstrip() + "..."


def _line(place: Place) -> str:
    name, size = f"{place.split} {place.document:,}", f"{place.tokens:,}"
    return f"  {name:16}{size:>11} tokens from {place.start:>13,}  {_short(place.text)}"


def _length(split: Split, quantile: int) -> str:
    return f"{split.lengths[quantile]:,}" if split.lengths else "-"


def _pairs(copies: Copies, how: str) -> list[str]:
    """Some copies, in words."""
    return [
        f"{pair.copy.split} {pair.copy.document:,} is "
        + (f"similar by {pair.similarity:.2f}" if how == "similar" else how)
        + f" to {pair.original.split} {pair.original.document:,}: {_short(pair.copy.text)}"
        for pair in copies.pairs[:_LISTED]
    ]


def _of(copies: Copies, split: str) -> str:
    """How many of a split's documents."""
    shares = (
        f"{_percent(copies.documents, copies.of_documents)}, {_percent(copies.tokens, copies.of_tokens)} of the tokens"
    )
    are = "is" if copies.documents == 1 else "are"
    return f"{copies.documents:,} of {copies.of_documents:,} {split} documents ({shares}) {are}"


def _short(text: str) -> str:
    """Some text on one line, quoted."""
    return repr(" ".join(text.split())).replace("\\\\x", "\\x")


def _percent(part: float, whole: float) -> str:
    share = _ratio(part, whole)
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
