"""Every byte of every file becomes text or is named as skipped; memory is bounded, whatever the file says of itself."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gpt2lab.data.formats import Fields, Found, read_file
from gpt2lab.data.formats.columns import MESSAGE, PAGE
from gpt2lab.data.formats.fields import Part, given_fields, parts
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.unpack import FLOOR
from tests.data.nasties import POEM, Nasty, all_nasties

NASTIES = all_nasties()


class Dribble(io.RawIOBase):
    """A pipe: it gives a few bytes at a time, another number each time, and cannot be sought in."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place, self._calls = content, 0, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._calls += 1
        data = self._content[self._place : self._place + min(size, 1 + self._calls * 7919 % 70_000)]
        self._place += len(data)
        return data


def documents(items: list[Found | Piece | Skipped]) -> list[tuple[str, str]]:
    """Names and texts of whole documents."""
    found: list[tuple[str, str]] = []
    open_document = False
    for item in items:
        if isinstance(item, Piece):
            if open_document:
                assert found[-1][0] == item.name
                found[-1] = (item.name, found[-1][1] + item.text)
            else:
                found.append((item.name, item.text))
            open_document = not item.last
    assert not open_document
    return found


@pytest.mark.parametrize("nasty", NASTIES, ids=[nasty.name for nasty in NASTIES])
def test_every_byte_is_text_or_named(nasty: Nasty, tmp_path: Path) -> None:
    path = tmp_path / nasty.name
    path.write_bytes(nasty.packed)
    items = list(read_file(path, nasty.name, nasty.fields))
    texts = documents(items)
    skipped = [item for item in items if isinstance(item, Skipped)]
    assert [text for _, text in texts] == list(nasty.texts)
    faults = [(item.where, item.reason) for item in skipped if item.fault]
    assert [where for where, _ in faults] == [where for where, _ in nasty.faults], faults
    assert all(said in reason for (_, reason), (_, said) in zip(faults, nasty.faults, strict=True)), faults
    assert sum(len(text.encode()) for _, text in texts) + sum(item.bytes for item in skipped) == nasty.bytes_in
    assert all(item.bytes >= 0 for item in skipped)
    assert len({name for name, _ in texts}) == len(texts)
    assert list(read_file(cast(BinaryIO, Dribble(nasty.packed)), nasty.name, nasty.fields)) == items


def test_the_folder_is_large_enough_and_each_file_says_something_else() -> None:
    assert len(NASTIES) >= 60 and len({nasty.name for nasty in NASTIES}) == len(NASTIES)
    assert sum(bool(nasty.faults) for nasty in NASTIES) >= 40
    for nasty in NASTIES:  # counted once more, by other means, where one command of a library suffices
        if nasty.name.startswith("poem.txt"):
            unpack = {
                ".gz": gzip.decompress,
                ".bz2": bz2.decompress,
                ".xz": lzma.decompress,
                ".zst": zstandard.decompress,
            }
            assert nasty.bytes_in == len(unpack.get(Path(nasty.name).suffix, bytes)(nasty.packed)) == len(POEM)


@pytest.mark.parametrize("name", [".py", ".md", ".txt", ""])
def test_a_name_decides_only_where_the_content_leaves_it_open(name: str) -> None:
    kinds = [item.kind for item in read_file(io.BytesIO(b'{"text": "a"}\n'), f"file{name}") if isinstance(item, Found)]
    assert kinds == [{".py": "text", ".md": "text"}.get(name, "json lines")]


def test_what_was_guessed_can_be_told() -> None:
    def found(content: str, fields: tuple[str, ...] = ()) -> Found:
        items = list(read_file(io.BytesIO(gzip.compress(content.encode())), "file.jsonl.gz", fields))
        assert [type(item) for item in items].count(Found) == 1
        return next(item for item in items if isinstance(item, Found))

    line = '{"text": "a", "title": "b"}\n'
    assert found(line) == Found("file.jsonl.gz", "json lines", ("gzip",), "utf-8", Fields("text", ("text",)))
    assert found(line, ("title",)).fields == Fields("text", ("title",), guessed=False)
    assert found('{"question": "a", "answer": "b", "text": "c"}').fields == Fields(
        "instruction", ("question", "answer")
    )


def test_prompt_and_response_are_kept_apart() -> None:
    record = {
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
        "output": "No",
    }
    assert parts(record, Fields("chat", ("messages",))) == [Part("Why?", False), Part("So.", True)]
    assert parts({"a": "1", "b": "2"}, given_fields(["a", "b"])) == [Part("1", False), Part("2", True)]
    assert parts({"a": "1"}, given_fields(["a"])) == [Part("1", True)]


LINE = b"a line of text that comes again and again\n"
BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": lambda content: bz2.compress(content[: len(LINE) * 25_000]) * (len(content) // (len(LINE) * 25_000)),
    "xz": lambda content: lzma.compress(content, preset=0),
    "zstd": zstandard.compress,
    "gzip in gzip": lambda content: gzip.compress(gzip.compress(content)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_ends_where_it_has_grown_too_large(kind: str) -> None:
    bomb, small = LINE * 500_000, LINE * 100_000
    items = list(read_file(io.BytesIO(BOMBS[kind](bomb)), "bomb.txt"))
    [(_, text)] = documents(items)
    *cut, last = [item for item in items if isinstance(item, Skipped)]
    assert bomb.startswith(text.encode()) and text.endswith("\n")
    assert len(text) + sum(item.bytes for item in cut) == FLOOR < len(bomb)
    assert last.reason.startswith("decompression bomb") and last.bytes == 0
    assert [item.reason for item in cut] == ["cut off where the archive ends"] * len(cut)
    whole = list(read_file(io.BytesIO(BOMBS[kind](small)), "small.txt"))  # control: as tight, but small
    assert documents(whole) == [("small.txt", small.decode())] and not any(isinstance(item, Skipped) for item in whole)


def test_a_flipped_bit_is_told_and_costs_nothing_before_it() -> None:
    content = "".join(f"{number} bottles of beer on the wall\n" for number in range(20_000))
    with_checksum = zstandard.ZstdCompressor(write_checksum=True).compress
    for compress in (gzip.compress, partial(bz2.compress, compresslevel=1), lzma.compress, with_checksum):
        packed = bytearray(compress(content.encode()))
        packed[len(packed) * 3 // 4] ^= 16
        items = list(read_file(io.BytesIO(packed), "flipped"))
        [(_, text)] = documents(items)
        assert text[: len(content) // 3] == content[: len(content) // 3] and text.endswith("\n") and text != content
        [*_, last] = items
        assert isinstance(last, Skipped) and last.reason.startswith("damaged")


def parquet(strings: pa.Array, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": strings}), file, **options)
    file.seek(0)
    return file


def refers_often() -> io.BytesIO:
    """A thousand rows that are one string of a MiB."""
    strings = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["a" * 2**20]))
    return parquet(strings, compression="zstd")


def test_a_giant_page_is_refused() -> None:
    giant = pa.array([b"a" * (PAGE + 1)]).cast(pa.string())
    file = parquet(giant, compression="zstd", use_dictionary=False, write_statistics=False)
    _, skipped = read_file(file, "giant.parquet")
    assert skipped == Skipped("giant.parquet", "", len(file.getvalue()), "a page larger than 128 MiB")


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_a_giant_batch_is_refused(new: Any) -> None:
    def packed(size: int) -> io.BytesIO:
        table, file = pa.table({"text": [b"a" * size]}).cast(pa.schema({"text": pa.string()})), io.BytesIO()
        with new(file, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return io.BytesIO(file.getvalue())

    file = packed(MESSAGE)
    _, skipped = read_file(file, "giant.arrow")
    assert skipped == Skipped("giant.arrow", "", len(file.getvalue()), "a batch larger than 256 MiB")
    assert documents(list(read_file(packed(999), "small.arrow"))) == [("small.arrow:1", "a" * 999)]


def test_a_dictionary_that_is_referred_to_too_often_is_a_bomb() -> None:
    found, *rows, last = read_file(refers_often(), "bomb.parquet")
    assert isinstance(found, Found) and all(isinstance(row, Piece) for row in rows)
    assert all(row.text == "a" * 2**20 and row.last and row.scored for row in rows if isinstance(row, Piece))
    assert len(rows) == FLOOR // 2**20 + 1
    assert last == Skipped("bomb.parquet", "after row 17", 0, "decompression bomb: more than 100 times its size")


def test_damage_in_the_middle_of_a_parquet_file_costs_what_follows() -> None:
    content = bytearray(
        parquet(pa.array([f"{number} bottles" for number in range(9000)]), row_group_size=3000).getvalue()
    )
    start = content.find(b"PAR1") + len(content) // 2
    content[start : start + 40] = b"\xff" * 40
    *rows, last = read_file(io.BytesIO(content), "damaged.parquet")
    assert isinstance(last, Skipped) and "damaged parquet" in last.reason and last.where == f"after row {len(rows) - 1}"
    assert 0 < len(rows) - 1 < 9000


CHILD = """
import resource, sys
from gpt2lab.data.formats import Piece, Skipped, read_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
items = read_file(sys.stdin.buffer, sys.argv[1])
total = sum(len(i.text.encode()) if isinstance(i, Piece) else i.bytes for i in items if isinstance(i, (Piece, Skipped)))
print(total, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, "torch" in sys.modules)
"""
WORDS = b"word " * 2**18
GENERATED = {
    "line.txt": [WORDS] * 100,
    "record.jsonl": [b'{"text": "', *[WORDS] * 100, b'"}\n{"text": "a"}\n'],
    "record.json": [b'[{"text": "', *[WORDS] * 100, b'"}]'],
    "row.csv": [b'n,text\n1,"', *[WORDS + b"\n"] * 100, b'"\n'],
    "bomb.txt": [gzip.compress(WORDS * 100)],
    "bomb.parquet": [refers_often().getvalue()],
}


@pytest.mark.parametrize("name", GENERATED)
def test_memory_does_not_grow_with_the_file(name: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin and child.stdout
    with child:
        with contextlib.suppress(BrokenPipeError):  # of a bomb, it reads no more than it must
            for block in GENERATED[name]:
                child.stdin.write(block)
            child.stdin.close()
        total, grown, torch = child.stdout.read().split()
    bombs = {"bomb.txt": FLOOR, "bomb.parquet": FLOOR + 2**20}  # what comes out of them before they are stopped
    size = bombs.get(name, sum(map(len, GENERATED[name])))
    assert int(total) == size and torch == b"False"
    assert int(grown) < 250


@given(
    st.binary(max_size=300),
    st.sampled_from([".txt", ".json", ".jsonl", ".csv", ".tsv", ".html", ""]),
    st.integers(0, 8),
)
def test_any_bytes_are_conserved(tail: bytes, suffix: str, start: int) -> None:
    beginnings = (
        b"a",
        b'{"text": "a"}\n',
        b'[{"text": "a"},',
        b'["',
        b"n,text\n1,a\n2,",
        b'text\n"',
        b"<html><p>a</p>",
        b"{",
        b'{"',
    )
    content = beginnings[start] + tail
    items = list(read_file(io.BytesIO(content), f"file{suffix}"))
    skipped = [item.bytes for item in items if isinstance(item, Skipped)]
    assert sum(len(text.encode()) for _, text in documents(items)) + sum(skipped) == len(content)
    assert all(size >= 0 for size in skipped)


@given(st.data())
def test_no_flipped_byte_is_met_by_an_exception(data: st.DataObject) -> None:
    nasty = data.draw(st.sampled_from([nasty for nasty in NASTIES if 0 < len(nasty.packed) < 5000]))
    content = bytearray(nasty.packed)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    items = list(read_file(io.BytesIO(content), nasty.name, nasty.fields))
    documents(items)
    assert all(item.bytes >= 0 for item in items if isinstance(item, Skipped))
