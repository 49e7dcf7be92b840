"""A folder of files as people have them, and what must come of each: its bytes, its documents, and what is wrong with it.

Nothing here asks the code under test: bytes are counted before they are packed, and texts are written as they must come out.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Fault = tuple[str, str]
POEM = "Der Mond ist aufgegangen,\nDie goldnen Sternlein prangen\nAm Himmel hell und klar;\n"
FRENCH = "Il \u00e9tait une fois\nun p\u00e2tissier \u00e0 Besan\u00e7on\n"
MIX = "na\u00efve \U0001f600 text\nsecond line\n"


@dataclass(frozen=True)
class Nasty:
    """One file.

    Attributes:
        name: of the file.
        packed: its bytes on disk.
        bytes_in: of its content, counted as in the package: unpacked, and as UTF-8.
        texts: its documents.
        faults: where and why bytes must be skipped, apart from what is no text by its nature.
        fields: given by the user.
    """

    name: str
    packed: bytes
    bytes_in: int
    texts: tuple[str, ...]
    faults: tuple[Fault, ...] = ()
    fields: tuple[str, ...] = ()


def write(folder: Path) -> list[Nasty]:
    """Write all files into a folder."""
    nasties = all_nasties()
    for nasty in nasties:
        (folder / nasty.name).write_bytes(nasty.packed)
    return nasties


def all_nasties() -> list[Nasty]:
    """All files, as values."""
    return [
        *_plain(),
        *_encodings(),
        *_archives(),
        *_foreign(),
        *_json(),
        *_json_lines(),
        *_tables(),
        *_columns(),
        *_pages(),
    ]


def _file(name: str, content: str | bytes, *texts: str, faults: tuple[Fault, ...] = (), **more: Any) -> Nasty:
    """A file that is not packed."""
    data = content.encode() if isinstance(content, str) else content
    return Nasty(name, data, len(data), texts, faults, **more)


def _plain() -> Iterator[Nasty]:
    yield _file("poem.txt", POEM, POEM)
    yield _file("no-name", POEM, POEM)
    yield _file("empty.txt", b"")
    yield _file("blank.txt", "\n\n \n", "\n\n \n")
    yield _file("no-final-newline.txt", POEM[:-1], POEM[:-1])
    yield _file("crlf.txt", POEM.replace("\n", "\r\n"), POEM.replace("\n", "\r\n"))
    yield _file("mixed-ends.md", "a\rb\r\nc\n\rd\u2028e\x0bf", "a\rb\r\nc\n\rd\u2028e\x0bf")
    yield _file("end-of-text.txt", "one<|endoftext|>two\n", "one<|endoftext|>two\n")
    long_line = "word " * 600_000 + "\U0001f600\u00e9" * 100_000
    yield _file("one-line.txt", long_line, long_line)
    yield _file("program.py", '{"text": "no record"}\n', '{"text": "no record"}\n')
    yield _file("list.md", "[link](there)\n- [ ] to do\n", "[link](there)\n- [ ] to do\n")
    yield _file("settings.txt", "[section]\nkey = 1\n", "[section]\nkey = 1\n")
    yield _file("brace.txt", "{she said}\nand went\n", "{she said}\nand went\n")
    yield _file("orchestra.txt", "ORCHESTRA and PAR1, RIFF, BZh9, GGUF\n", "ORCHESTRA and PAR1, RIFF, BZh9, GGUF\n")
    yield _file("riff.txt", "RIFF is a word here\n", "RIFF is a word here\n")
    yield _file("commas.txt", "a, b\nc, d\ne, f\n", "a, b\nc, d\ne, f\n")
    yield _file("poem.jsonl", POEM, POEM)
    yield _file("poem.csv", POEM, POEM)
    yield _file("poem.parquet", POEM, POEM)
    yield _file("poem.gz", POEM, POEM)
    yield _file("poem.html", POEM, POEM)


def _encodings() -> Iterator[Nasty]:
    yield _file("mark.txt", codecs.BOM_UTF8 + MIX.encode(), MIX)
    yield _file("mark-only.txt", codecs.BOM_UTF8)
    for encoding, mark in (
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ):
        packed = mark + MIX.encode(encoding)
        yield Nasty(f"{encoding}.txt", packed, len(mark) + len(MIX.encode()), (MIX,))
    lone = codecs.BOM_UTF16_LE + "good\n".encode("utf-16-le") + b"\x00\xd8" + "bad\nend".encode("utf-16-le")
    yield Nasty("utf-16-lone.txt", lone, 2 + 5 + 2 + 4 + 3, ("good\nend",), (("line 2", "not UTF-8"),))
    odd = codecs.BOM_UTF16_LE + "good\n".encode("utf-16-le") + b"x"
    yield Nasty("utf-16-odd.txt", odd, 2 + 5 + 1, ("good\n",), (("line 2", "not UTF-8"),))
    beyond = codecs.BOM_UTF32_LE + "good\n".encode("utf-32-le") + b"\xff\xff\xff\x00"
    yield Nasty("utf-32-beyond.txt", beyond, 4 + 5 + 4, ("good\n",), (("line 2", "not UTF-8"),))
    yield _file("utf-16-no-mark.txt", POEM.encode("utf-16-le"), faults=(("", "without its byte order mark"),))
    record = json.dumps({"text": MIX}, ensure_ascii=False) + "\n"
    packed = codecs.BOM_UTF16_BE + (record * 2).encode("utf-16-be")
    yield Nasty("utf-16.jsonl", packed, 2 + 2 * len(record.encode()), (MIX, MIX))
    yield _file("mark.csv", codecs.BOM_UTF8 + b"text,n\nhello,1\n", "hello")
    yield _file("mark.json", codecs.BOM_UTF8 + b'[{"text": "hello"}]', "hello")
    latin = FRENCH.replace("Il", "Ol\n\nIl").encode("latin-1")
    yield _file("latin-1.txt", b"first\n" + latin, "first\nOl\n\n", faults=(("lines 4 to 5", "not UTF-8"),))
    yield _file("invalid.txt", b"one\ntw\xffo\nthree\nfo\xc3\nfive\n", "one\nthree\nfive\n",
                faults=(("line 2", "not UTF-8"), ("line 4", "not UTF-8")))  # fmt: skip
    yield _file("cut-character.txt", "one\ncaf\u00e9".encode()[:-1], "one\n", faults=(("line 2", "not UTF-8"),))
    yield _file(
        "overlong.txt", b"one\n\xc0\xaf\n\xed\xa0\x80\ntwo\n", "one\ntwo\n", faults=(("lines 2 to 3", "not UTF-8"),)
    )
    alphabet = "".join(map(chr, range(0x430, 0x450))) + "\n"
    yield _file("cyrillic.txt", alphabet.encode("cp1251") * 9, faults=(("", "not UTF-8"),))
    yield _file("nul.txt", b"one\ntw\0o\n", faults=(("", "NUL bytes"),))
    start = "a line of text\n" * 80_000  # NUL and bad bytes far behind what a file is judged by
    yield _file("late-nul.txt", start.encode() + b"tw\0o\nend\n", start + "end\n", faults=(("line 80001", "NUL byte"),))
    long_bad = b"x" * 2**20 + b"y" * 1000 + b"\xff" + b"y" * (2**20 - 1001) + b"z\n"
    yield _file("one-bad-byte.txt", long_bad, "x" * (2**20 - 1) + "yz\n", faults=(("line 1", "not UTF-8"),))
    yield _file("noise.bin", bytes(range(1, 256)) * 40, faults=(("", "not UTF-8"),))


def _archives() -> Iterator[Nasty]:
    data, size = POEM.encode(), len(POEM)
    pack = {
        "gz": gzip.compress,
        "bz2": partial(bz2.compress, compresslevel=1),
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    for suffix, compress in pack.items():
        packed = compress(data)
        yield Nasty(f"poem.txt.{suffix}", packed, size, (POEM,))
        yield Nasty(f"members.{suffix}.txt", packed + packed, 2 * size, (POEM * 2,))  # no suffix of an archive
        yield Nasty(f"garbage.{suffix}", packed + b"garbage! " * 4, size, (POEM,), (("", "other bytes after"),))
        lines = "".join(f"{number} bottles of beer on the wall\n" for number in range(20_000))
        whole = compress(lines.encode())
        out = _unpack_all(suffix, whole[: len(whole) // 2])
        kept = out[: out.rfind(b"\n") + 1].decode()
        cut = (f"line {kept.count(chr(10)) + 1}", "cut off where the archive ends")
        faults = (*([cut] if len(kept) < len(out) else []), ("", "truncated"))
        yield Nasty(f"truncated.{suffix}", whole[: len(whole) // 2], len(out), (kept,) if kept else (), faults)
        head = packed[:12]
        yield Nasty(f"head-only.{suffix}", head, len(head), (), (("", "truncated"),))
    yield Nasty("padded.gz", gzip.compress(data) + bytes(512), size, (POEM,))
    yield Nasty("empty.gz", gzip.compress(b""), 0, ())
    nested = gzip.compress(bz2.compress(zstandard.compress(data)))
    yield Nasty("nested.txt", nested, size, (POEM,))
    deep = gzip.compress(gzip.compress(gzip.compress(gzip.compress(data))))
    yield Nasty("too-deep.gz", deep, len(deep), (), (("", "inside one another"),))
    wrong_sum = gzip.compress(data)[:-8] + bytes(8)
    yield Nasty("wrong-sum.gz", wrong_sum, len(wrong_sum), (), (("", "damaged gzip archive"),))
    record = json.dumps({"text": POEM}) + "\n"
    cut = zstandard.compress((record * 2)[:-9].encode())
    yield Nasty("cut-inside.jsonl.zst", cut, len(record) * 2 - 9, (POEM,), (("line 2", "invalid JSON"),))
    window = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=30)
    ).compressobj()
    far = window.compress(data) + window.flush()
    yield Nasty("far.zst", far, len(far), (), (("", "damaged zstd archive"),))


def _unpack_all(suffix: str, packed: bytes) -> bytes:
    """Everything that comes out of a cut archive, a byte at a time."""
    decoder: Any = {
        "gz": lambda: zlib.decompressobj(31),
        "bz2": bz2.BZ2Decompressor,
        "xz": lzma.LZMADecompressor,
        "zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    }[suffix]()
    return b"".join(decoder.decompress(packed[place : place + 1]) for place in range(len(packed)))


def _foreign() -> Iterator[Nasty]:
    def zipped(name: str) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, POEM)
        return file.getvalue()

    tarred = io.BytesIO()
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        info = tarfile.TarInfo("../../escape.txt")
        info.size = len(POEM)
        archive.addfile(info, io.BytesIO(POEM.encode()))
    yield _file("poem.zip", zipped("poem.txt"), faults=(("", "zip archive"),))
    yield _file("traversal.txt", zipped("../../poem.txt"), faults=(("", "zip archive"),))
    yield _file("letter.docx", zipped("word/document.xml"), faults=(("", "docx"),))
    yield _file("poem.tar", tarred.getvalue(), faults=(("", "tar archive"),))
    yield Nasty("poem.tgz", gzip.compress(tarred.getvalue()), len(tarred.getvalue()), (), (("", "tar archive"),))
    yield _file("paper.pdf", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", faults=(("", "PDF"),))
    yield _file("letter.rtf", b"{\\rtf1 hello}", faults=(("", "RTF"),))
    yield _file("picture.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", faults=(("", "PNG image"),))
    yield _file("data.db", b"SQLite format 3\0" + bytes(99), faults=(("", "SQLite"),))
    yield _file("zeros.txt", bytes(5000), faults=(("", "NUL bytes"),))


def _json() -> Iterator[Nasty]:
    records = [{"text": POEM, "n": 1}, {"n": [2, {"a": "]}"}], "text": MIX}]
    yield _file("array.json", json.dumps(records, indent=2), POEM, MIX)
    yield _file("array.txt", json.dumps(records), POEM, MIX)
    yield _file("object.json", json.dumps(records[0], indent=1), POEM)
    yield _file("objects.json", "\n".join(json.dumps(record, indent=1) for record in records), POEM, MIX)
    yield _file("strings.json", json.dumps([POEM, MIX]), POEM, MIX)
    yield _file("empty-array.json", " [ ] \n")
    yield _file("numbers.json", "[1, 2]", faults=(("records 1 to 2", "neither an object nor a string"),))
    yield _file("no-text.json", '{"n": 1, "m": [2]}', faults=(("", "no text field among n, m"),))
    yield _file("broken-one.json", '[{"text": "a"}, {"text" "b"}, {"text": "c"}]', "a", "c",
                faults=(("record 2", "invalid JSON"),))  # fmt: skip
    yield _file("not-closed.json", '[{"text": "a"},\n{"text": "b"', "a",
                faults=(("record 2", "invalid JSON"), ("record 3", "not closed")))  # fmt: skip
    yield _file("after-its-end.json", '[{"text": "a"}] ]]', "a", faults=(("records 2 to 3", "invalid JSON"),))
    yield _file("deep.json", "[" * 100_000 + "]" * 100_000, faults=(("record 1", "nested deeper than 64"),))
    yield _file("deep-inside.json", '[{"text": "a", "x": ' + '{"x":' * 10_000 + "1" + "}" * 10_000 + '}, {"text": "b"}]',
                "b", faults=(("record 1", "nested deeper than 64"),))  # fmt: skip
    long_record = json.dumps({"text": "long " * 2_000_000})
    yield _file("long.json", f'[{{"text": "a"}},{long_record},{{"text": "b"}}]', "a", "b",
                faults=(("record 2", "longer than 8 MiB"),))  # fmt: skip
    edge = "a" * (2**20 - 12)  # the backslash is the last byte of the first block
    yield _file("escape-at-edge.json", f'[{{"text": "{edge}\\", ["}}, {{"text": "b"}}]', f'{edge}", [', "b")
    chat = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    yield _file("chat.json", json.dumps([chat]), "Why?\nBecause.")


def _json_lines() -> Iterator[Nasty]:
    def lines(*records: Any) -> str:
        return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)

    good = {"text": "a", "n": 1}
    yield _file("good.jsonl", lines(good, {"text": MIX}), "a", MIX)
    yield _file("lines.txt", lines(good, good), "a", "a")
    yield _file("lines.json", lines(good, good)[:-1], "a", "a")
    yield _file("crlf.jsonl", lines(good, "", good).replace("\n", "\r\n"), "a", "a")
    yield _file("surrogates.jsonl", lines(good, '{"text": "\\ud800 x"}', '{"text": "\\ud83d\\ude00"}'), "a", "\U0001f600",
                faults=(("line 2", "lone surrogate"),))  # fmt: skip
    yield _file("escaped-nul.jsonl", lines({"text": "a\0b"}), "a\0b")
    broken = ("{broken", good, '{"text": "a"', "nothing", "", "nothing", "nothing", good)
    where = ("line 1", "line 3", "line 4", "lines 6 to 7")  # line 5 is no fault
    yield _file("broken.jsonl", lines(*broken), "a", "a", faults=tuple((place, "invalid JSON") for place in where))
    yield _file("invalid.jsonl", lines(good).encode() + b'{"text": "\xff"}\n' + lines(good).encode(), "a", "a",
                faults=(("line 2", "not UTF-8"),))  # fmt: skip
    values = (None, 1, True, ["a"], {"b": 1}, float("nan"))
    kinds = enumerate(("int", "bool", "list", "dict", "float"), 3)
    wrong = (("line 2", "null text"), *((f"line {number}", f"the text is of type {kind}") for number, kind in kinds))
    missing = (("line 8", "no field 'text'"), ("line 9", "empty text"))
    others = lines(good, *({"text": value} for value in values), {"n": 1}, {"text": ""})
    yield _file("not-text.jsonl", others, "a", faults=(*wrong, *missing))
    yield _file("nan-beside.jsonl", '{"text": "a", "score": NaN}\n', "a")
    yield _file(
        "twice.jsonl", lines(good, '{"text": "a", "text": "b"}'), "a", faults=(("line 2", "a name comes twice"),)
    )
    yield _file("digits.jsonl", lines(good, '{"text": "b", "n": ' + "9" * 5000 + "}"), "a",
                faults=(("line 2", "a number too long"),))  # fmt: skip
    deep = '{"text": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    yield _file("deep.jsonl", lines(good, deep, good), "a", "a", faults=(("line 2", "nested deeper than 64"),))
    yield _file("brackets.jsonl", lines({"text": "[" * 1000}), "[" * 1000)
    yield _file("long.jsonl", lines(good, {"text": "long " * 2_000_000}, good), "a", "a",
                faults=(("line 2", "longer than 8 MiB"),))  # fmt: skip
    yield _file("guess.jsonl", lines({"id": "1", "prose": "it is long"}, {"id": "2", "prose": "so is this"}),
                "it is long", "so is this")  # fmt: skip
    yield _file("named.jsonl", lines({"text": "a", "title": "b"}), "b", fields=("title",))
    yield _file("not-there.jsonl", lines(good, good), faults=(("lines 1 to 2", "no field 'title'"),), fields=("title",))
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    yield _file("instructions.jsonl", lines(alpaca, alpaca | {"input": ""}), "Add.\n1 2\n3", "Add.\n3")
    yield _file("prompts.jsonl", lines({"prompt": "p", "completion": "c"}, {"prompt": "p"}), "p\nc",
                faults=(("line 2", "no field 'completion'"),))  # fmt: skip
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    yield _file("conversation.jsonl", lines({"conversations": turns}, {"conversations": "Hi"}), "Hi\nHo",
                faults=(("line 2", "not a list of messages"),))  # fmt: skip


def _tables() -> Iterator[Nasty]:
    yield _file("good.csv", "n,text\n1,hello\n2,world\n", "hello", "world")
    yield _file("crlf.csv", 'n,text\r\n1,"a\r\nb"\r\n', "a\r\nb")
    yield _file("quotes.csv", 'n,text\n1,"a ""b"", c\nd"\n\n2,e\n', 'a "b", c\nd', "e")
    yield _file("table.txt", "id;text\n1;hello\n2;you, there\n", "hello", "you, there")
    yield _file("good.tsv", 'text\tn\n"hello" he said, \t1\nworld\t2\n', '"hello" he said, ', "world")
    yield _file("one-column.csv", 'text\nhello\n"a, b"\n', "hello", "a, b")
    yield _file("header-only.csv", "n,text\n")
    yield _file("columns.csv", "n,text\n1,a\n2\n3\n4,b,c\n5,d\n6,e\n7,f\n8,g\n9,h\n" + "0,z\n" * 9,
                "a", "d", "e", "f", "g", "h", *["z"] * 9,
                faults=(("lines 3 to 4", "1 columns, the header has 2"),
                        ("line 5", "3 columns, the header has 2")))  # fmt: skip
    yield _file("open-quote.csv", 'n,text\n1,a\n2,"b\nc\n', "a", faults=(("lines 3 to 4", "a quote is not closed"),))
    yield _file(
        "odd-quote.csv", 'n,text\n1,a\n2,"b"c\n3,d\n4,e\n5,f\n', "a", "d", "e", "f", faults=(("line 3", "invalid CSV"),)
    )
    yield _file("invalid.csv", b"n,text\n1,a\n2,\xff\n3,b\n", "a", "b", faults=(("line 3", "not UTF-8"),))
    yield _file("empty-text.csv", "n,text\n1,\n2,b\n", "b", faults=(("line 2", "empty text"),))
    yield _file("twice.csv", "text,text\na,b\n", faults=(("", "two columns have one name"),))
    wide = ",".join(f"c{number}" for number in range(1_000_000)) + "\n"
    yield _file("wide.csv", wide + "1\n", faults=(("", "more than 10000 columns"),))
    yield _file("wide-row.csv", "n,text\n1,a\n" + "," * 10**6 + "\n2,b\n3,c\n4,d\n5,e\n", "a", "b", "c", "d", "e",
                faults=(("line 3", "1000001 columns"),))  # fmt: skip
    long_row = 'n,text\n1,a\n2,"' + ("long " * 200 + "\n") * 10_000 + '"\n3,b\n'
    yield _file("long-row.csv", long_row, "a", "b", faults=(("lines 3 to 10003", "longer than 8 MiB"),))
    yield _file("numbers.csv", "n,m\n1,2\n3,4\n", "1", "3")


def _columns() -> Iterator[Nasty]:
    table = pa.table({"n": [1, 2, 3, 4], "text": [POEM, None, "", MIX]})
    faults = (("row 2", "null text"), ("row 3", "empty text"))
    size = len((POEM + MIX).encode())

    def parquet(table: pa.Table, **options: Any) -> bytes:
        file = io.BytesIO()
        pq.write_table(table, file, **options)
        return file.getvalue()

    def arrow(table: pa.Table, new: Any) -> bytes:
        file = io.BytesIO()
        with new(file, table.schema) as writer:
            writer.write_table(table)
        return file.getvalue()

    packed = parquet(table)
    yield Nasty("good.parquet", packed, size, (POEM, MIX), faults)
    yield Nasty("parquet.txt", packed, size, (POEM, MIX), faults)
    yield Nasty("packed.parquet.zst", zstandard.compress(packed), size, (POEM, MIX), faults)
    yield Nasty("groups.parquet", parquet(table, row_group_size=1, compression="zstd"), size, (POEM, MIX), faults)
    yield Nasty("stream.arrow", arrow(table, pa.ipc.new_stream), size, (POEM, MIX), faults)
    yield Nasty("file.arrow", arrow(table, pa.ipc.new_file), size, (POEM, MIX), faults)
    yield Nasty("no-rows.parquet", parquet(table.slice(0, 0)), 0, ())
    yield _file("no-text.parquet", parquet(table.select(["n"])), faults=(("", "no text field among n"),))
    yield _file("not-there.parquet", packed, faults=(("", "no field 'title'"),), fields=("title",))
    yield _file("cut.parquet", packed[:-20], faults=(("", "damaged parquet"),))
    yield _file("cut.arrow", arrow(table, pa.ipc.new_file)[:-20], faults=(("", "damaged arrow file"),))
    strings = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 3, 4))), pa.py_buffer(b"a\xffbc")],
    )
    yield Nasty("invalid.parquet", parquet(pa.table({"text": strings})), 4, ("a", "c"), (("row 2", "not UTF-8"),))
    pair = pa.table({"prompt": ["p", "q"], "response": ["r", None]})
    yield Nasty("pairs.parquet", parquet(pair), 3 + 1, ("p\nr",), (("row 2", "null text"),))
    turns = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]]
    yield Nasty("chat.parquet", parquet(pa.table({"messages": turns})), 5, ("Hi\nHo",))


def _pages() -> Iterator[Nasty]:
    body = "<p>The first paragraph of the page.</p>\n<p>A second one &amp; its end.</p>"
    text = "The first paragraph of the page.\nA second one & its end."
    page = f"<!DOCTYPE html>\n<html><head><title>T</title><script>x</script></head><body>{body}</body></html>"
    yield _file("page.html", page, text)
    yield _file("page.txt", page, text)
    yield _file("no-text.html", "<html><body></body></html>", faults=(("", "a page without text"),))
    yield _file("latin-1.html", page.encode() + b"<!-- \xe9 -->", faults=(("", "not UTF-8"),))
    entities = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
    bomb = f'<!DOCTYPE html [<!ENTITY l0 "lol">{entities}]>\n<html><body>{body}<p>&l9;</p></body></html>'
    yield _file("entities.html", bomb, f"]>\n{text}\n&l9;")
    yield _file("nested.html", "<html><body>" + "<div>" * 200_000 + "x", faults=(("", "a page"),))
    yield _file("long.html", page + " " * 2**20, faults=(("", "a page longer than 1 MiB"),))
