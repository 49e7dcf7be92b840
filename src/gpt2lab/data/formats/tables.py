"""CSV and TSV: a header row, then a record a row, in whatever dialect the first rows agree on."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpt2lab.data.formats.fields import KNOWN, Unfit
from gpt2lab.data.formats.lines import RECORD, TOO_LONG, Line, Record, Refused, read_lines
from gpt2lab.data.unpack import Stream

COLUMNS = 10_000
"""The most columns of a table that is read."""
TOO_MANY_COLUMNS = f"more than {COLUMNS} columns"
_SAMPLE = 2**16  # bytes to judge by, and rows
_SAMPLE_ROWS = 50
_UNCLOSED = "unexpected end of data"  # as csv says it


@dataclass(frozen=True)
class Dialect:
    """What stands between columns, and whether quotes may stand around them."""

    delimiter: str
    quoted: bool = True

    def reader(self, lines: Iterator[str]) -> Any:
        """A reader that names what is wrong instead of guessing."""
        if self.quoted:
            return csv.reader(lines, delimiter=self.delimiter, strict=True)
        return csv.reader(lines, delimiter=self.delimiter, strict=True, quoting=csv.QUOTE_NONE)


_DIALECTS = tuple(Dialect(delimiter, quoted) for quoted in (True, False) for delimiter in ",\t;|")


def sniff_table(head: str, suffix: str) -> Dialect | None:
    """The dialect of a table that begins so, or None where it looks like none.

    A file that is called a table is one when most of its first rows have as many columns as its header. Under any other
    name they must all have, and the header must name a text as such: a poem may have one comma in each line.
    """
    sample = head[:_SAMPLE]
    if suffix in (".csv", ".tsv", ".tab"):
        if "\n" not in sample and len(sample) == _SAMPLE:  # a header wider than the sample
            return Dialect(max(",\t;|", key=sample.count))
        dialects = [dialect for dialect in _DIALECTS if _agreement(sample, dialect) >= 0.8]
        lone = Dialect("\t" if suffix != ".csv" else ",")
        return dialects[0] if dialects else lone if _is_one_column(sample, lone) else None
    for dialect in _DIALECTS:
        rows = _sample_rows(sample, dialect)
        if len(rows) > 2 and _agreement(sample, dialect) == 1 and KNOWN & {name.lower() for name in rows[0]}:
            return dialect
    return None


def _agreement(sample: str, dialect: Dialect) -> float:
    """The share of the first rows that have as many columns as the header, which has several."""
    rows = _sample_rows(sample, dialect)
    if not rows or len(rows[0]) < 2 or not _is_header(rows[0]):
        return 0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows)


def _is_one_column(sample: str, dialect: Dialect) -> bool:
    rows = _sample_rows(sample, dialect)
    return bool(rows) and rows[0][0].isidentifier() and all(len(row) == 1 for row in rows)


def _is_header(row: list[str]) -> bool:
    """Whether a row could name columns: short names, at most one of them empty, as pandas leaves that of its index."""
    short = all(len(name) <= 100 and "\n" not in name for name in row)
    return short and row.count("") <= 1 and any(name[:1].isalpha() for name in row)


def _sample_rows(sample: str, dialect: Dialect) -> list[list[str]]:
    """The first rows, without empty ones and without what is cut off; a broken one has no columns."""
    whole = sample if len(sample) < _SAMPLE else sample[: sample.rfind("\n") + 1]
    lines = iter([line + "\n" for line in whole.split("\n")[:_SAMPLE_ROWS]])
    rows: list[list[str]] = []
    while True:
        try:
            rows += filter(None, dialect.reader(lines))
            return rows
        except csv.Error as error:
            if _UNCLOSED in str(error):
                return rows
            rows.append([])


def read_table(stream: Stream, dialect: Dialect) -> Iterator[Record]:
    """A record a row, named by the line it begins in; the header is structure.

    Raises:
        Refused: the header cannot be used.
    """
    csv.field_size_limit(max(csv.field_size_limit(), RECORD))  # the process's, and far too low for a document
    header: list[str] = []
    for row, record in _rows(stream, dialect):
        if record.problem or not row:
            yield record
        elif not header:
            header = _checked(row)
            yield record
        elif len(row) != len(header):
            yield record._replace(problem=f"{len(row)} columns, the header has {len(header)}")
        else:
            yield record._replace(values=dict(zip(header, row, strict=True)))


def _checked(header: list[str]) -> list[str]:
    if len(header) > COLUMNS:
        raise Refused(TOO_MANY_COLUMNS)
    if len(set(header)) < len(header):
        raise Refused("two columns have one name")
    return header


def _rows(stream: Stream, dialect: Dialect) -> Iterator[tuple[list[str], Record]]:
    """Each row's columns and lines; after a broken row, reading begins anew with the next line."""
    lines, row = read_lines(stream), _Row()
    reader = dialect.reader(_feed(lines, row))
    while True:
        columns, problem = [], ""
        try:
            columns = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = "a quote is not closed" if _UNCLOSED in str(error) else f"invalid CSV: {error}"
        except Unfit as error:
            problem = str(error)
        if problem:
            reader = dialect.reader(_feed(lines, row))
        yield columns, Record("line", row.number, row.bytes, None, row.problem or problem, row.last)
        row.number = row.bytes = 0
        row.problem = ""


@dataclass
class _Row:
    """The lines that a reader took for a row, and the first thing that is wrong with them."""

    number: int = 0
    last: int = 0
    bytes: int = 0
    problem: str = ""


def _feed(lines: Iterator[Line], row: _Row) -> Iterator[str]:
    """Give lines to a reader, and note them.

    Raises:
        Unfit: the row is too long; its lines are behind us.
    """
    for line in lines:
        _note(line, row)
        if row.bytes > RECORD:
            # A reader that asks for another line is inside of quotes: they end in a line with an odd number of them.
            inside = row.number < line.number
            while inside and line.text.count('"') % 2 == 0 and (following := next(lines, None)):
                line = following
                _note(line, row)
            raise Unfit(TOO_LONG)
        yield line.text


def _note(line: Line, row: _Row) -> None:
    row.number = row.number or line.number
    row.last = line.number
    row.bytes += line.bytes
    row.problem = row.problem or line.problem
