"""Records to documents: each record's text in pieces, and the bytes around it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from gpt2lab.data.formats.fields import SAMPLE, Fields, Part, Unfit, guess_fields, text_of
from gpt2lab.data.formats.lines import RECORD, STRUCTURE, Bad, Record, Refused, pieces
from gpt2lab.data.records import Piece, Skipped

_UNREADABLE = 10_000  # records in a row, after which a file is given up
NO_RECORD = f"none of the first {_UNREADABLE} records can be read"


def look_ahead(records: Iterator[Record], given: Fields | None) -> tuple[list[Record], Fields | None]:
    """The first records, and their fields, as given or as guessed; None where not one of all records can be read.

    Raises:
        Refused: no field holds a text, or too many records cannot be read.
    """
    seen: list[Record] = []
    values, size = [], 0
    if given:
        return list(islice(records, 1)), given
    for record in records:
        seen.append(record)
        if record.values is not None:
            values.append(record.values)
            size += record.bytes
            if len(values) == SAMPLE or size > RECORD:
                break
        if len(seen) == _UNREADABLE:
            break
    if not values:
        if len(seen) == _UNREADABLE:
            raise Refused(NO_RECORD)
        return seen, None
    fields = guess_fields(values)
    if not fields:
        names = dict.fromkeys(name for record in values for name in record)
        raise Refused(f"no text field among {', '.join(list(names)[:20])[:200]}")
    return seen, fields


def documents(
    records: Iterator[Record], name: str, fields: Fields | None, *, structured: bool = True
) -> Iterator[Piece | Bad | Skipped]:
    """The documents of records.

    Args:
        fields: which hold the text; None where no record has any.
        structured: whether the bytes of a record hold more than its text; they are reported last, in one row.
    """
    structure = 0
    for record in records:
        text, problem = _text(record, fields)
        if problem:
            yield Bad(record.unit, record.number, record.bytes, problem, record.last)
        else:
            for number, part in enumerate(text, 1):
                ends = number == len(text)
                yield from pieces(f"{name}:{record.number}", part.text, ends=ends, scored=part.response)
            structure += record.bytes - sum(len(part.text.encode()) for part in text)
    if structured and structure:
        yield Skipped(name, "", structure, STRUCTURE, fault=False)


def _text(record: Record, fields: Fields | None) -> tuple[list[Part], str]:
    """A record's text, or why it has none; neither where there is nothing."""
    if record.values is None or fields is None:
        return [], record.problem
    try:
        return text_of(record.values, fields), ""
    except Unfit as error:
        return [], str(error)
