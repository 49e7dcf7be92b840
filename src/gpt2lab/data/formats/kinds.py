"""What a file is, by how it begins; its name only decides where that is open."""

from __future__ import annotations

from typing import Literal

from gpt2lab.data.formats.html import looks_like_html
from gpt2lab.data.formats.jsons import sniff_json
from gpt2lab.data.formats.tables import sniff_table

Kind = Literal["text", "html", "json", "json lines", "table", "parquet", "arrow file", "arrow stream", "nothing"]
HEAD = 2**20
"""Bytes to judge by."""
_INVALID_SHARE = 0.5  # of bytes; a text in Latin-1 has fewer, one in another alphabet more

_MAGIC = (
    (0, b"PK\x03\x04", "zip archive"),
    (0, b"PK\x05\x06", "zip archive"),
    (257, b"ustar", "tar archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (0, b"Rar!\x1a\x07", "rar archive"),
    (0, b"\x04\x22\x4d\x18", "lz4 archive"),
    (0, b"\x1f\x9d", "compress archive"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office file"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG image"),
    (0, b"\xff\xd8\xff", "JPEG image"),
    (0, b"GIF8", "GIF image"),
    (0, b"RIFF", "RIFF media"),
    (0, b"OggS", "Ogg media"),
    (0, b"ID3", "MP3 media"),
    (4, b"ftyp", "MP4 media"),
    (0, b"\x7fELF", "program"),
    (0, b"MZ\x90\x00", "program"),
    (0, b"\xca\xfe\xba\xbe", "program"),
    (0, b"SQLite format 3\x00", "SQLite database"),
    (0, b"\x89HDF\r\n\x1a\n", "HDF5"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"GGUF", "GGUF weights"),
    (0, b"gpt2lab\x01", "token shard"),
    (0, b"FEA1", "Feather version 1"),
    (0, b"ORC", "ORC"),
    (0, b"Obj\x01", "Avro"),
)
_READABLE = ((b"%PDF-", "PDF"), (b"{\\rtf", "RTF"))  # without a NUL, which all others have: a text may begin with ORC
_ZIPS = ((b"word/", "docx"), (b"xl/", "xlsx"), (b"ppt/", "pptx"), (b"mimetypeapplication/epub", "epub"))
_COLUMNS: tuple[tuple[bytes, Kind], ...] = (
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow file"),
    (b"\xff\xff\xff\xff", "arrow stream"),
)
_PROSE = frozenset(
    ".md .rst .tex .org .py .pyi .ipynb .c .h .cc .cpp .hpp .cs .css .go .hs .java .js .jsx .kt .lua .m .ml .php .pl .r .rb "
    ".rs .scala .sh .sql .swift .ts .tsx .vim .xml .yaml .yml .toml .ini .cfg .srt".split()
)
"""Names of text that may begin as data does, or hold some: a program stays one."""


def column_kind(head: bytes) -> Kind | None:
    """Whether a file is one of columns, and which."""
    return next((kind for magic, kind in _COLUMNS if head.startswith(magic) and b"\0" in head), None)


def foreign_kind(head: bytes) -> str:
    """What a file that is not read is, in a few words; empty where it may be text."""
    for magic, kind in _READABLE:
        if head.startswith(magic):
            return kind
    for offset, magic, kind in _MAGIC:
        if head.startswith(magic, offset) and b"\0" in head:
            inner = (name for mark, name in _ZIPS if mark in head) if kind == "zip archive" else iter(())
            return next(inner, kind)
    return ""


def binary(head: bytes) -> str:
    """Why a file that begins so is no text at all; else empty."""
    if b"\0" in head:
        return "binary: NUL bytes, or UTF-16 without its byte order mark"
    valid = len(head.decode(errors="ignore").encode())
    return "binary, or text that is not UTF-8" if len(head) - valid > _INVALID_SHARE * len(head) else ""


def text_kind(head: str, suffix: str) -> Kind:
    """Which kind of text a file is. `head` is how it begins, `suffix` that of its name in lower case."""
    if suffix in _PROSE:
        return "text"
    if looks_like_html(head, suffix):
        return "html"
    return sniff_json(head, suffix) or ("table" if sniff_table(head, suffix) else "text")
