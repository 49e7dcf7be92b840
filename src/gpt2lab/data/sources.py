"""What text: the documents behind a recipe's ``data.source``."""

from __future__ import annotations

import ast
import codecs
import hashlib
import os
import sysconfig
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.config import DataConfig
from gpt2lab.errors import DataError
from gpt2lab.paths import cache_folder, local_copy

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .org .py .pyi .ipynb .c .h .cc .cpp .hpp .cs .css .go .hs .html .htm .java .js .jsx .kt .lua .m "
    ".ml .php .pl .r .rb .rs .scala .sh .sql .swift .ts .tsx .vim .xml .yaml .yml .toml .ini .cfg .log .srt".split()
)
"""Files of a folder that are read as text."""

_NOT_PROSE = frozenset(  # tables, tests, applications, and what some systems ship as separate packages
    "site-packages dist-packages __pycache__ test tests idlelib turtledemo lib2to3 distutils tkinter encodings ensurepip "
    "pydoc_data msilib __phello__".split()
)
HELD_OUT = 10
"""One part in this many is validation text, where none is named."""


@dataclass(frozen=True)
class Document:
    """A piece of text that stands by itself."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Text to learn from and text to validate on."""

    train: list[Document]
    validation: list[Document]


def read_corpus(config: DataConfig) -> Corpus:
    """The documents that a recipe names, divided.

    Raises:
        DataError: there is no such source, it is not text, or nothing is in it.
    """
    documents = read_documents(config.source)
    if config.validation is not None:
        return Corpus(documents, read_documents(config.validation))
    if len(documents) < HELD_OUT:
        # The last tenth of each. A cut inside a document, but the validation text still comes after all that was read.
        cuts = [len(document.text) * (HELD_OUT - 1) // HELD_OUT for document in documents]
        heads = [Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True)]
        tails = [Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True)]
        return Corpus(heads, tails)
    # Whole documents, drawn by a hash of their text, so that neither their names nor their order matter, and a document
    # that is there twice is not learned from and validated on.
    by_hash: dict[bytes, list[Document]] = {}
    for document in documents:
        by_hash.setdefault(hashlib.sha256(document.text.encode()).digest(), []).append(document)
    wanted, held_out = sum(len(document.text) for document in documents) // HELD_OUT, []
    for digest in sorted(by_hash):
        if wanted <= 0:
            break
        held_out += (group := by_hash.pop(digest))
        wanted -= sum(len(document.text) for document in group)
    learned = {document.name for group in by_hash.values() for document in group}
    return Corpus([document for document in documents if document.name in learned], held_out)


def read_documents(source: str) -> list[Document]:
    """Every document of a source: python-docs, tinyshakespeare, a text file, or a folder of them.

    Raises:
        DataError: as in `read_corpus`.
    """
    if source == "python-docs":
        documents = list(_python_docs())
    elif source == "tinyshakespeare":
        documents = [Document(source, _tiny_shakespeare())]
    elif os.path.isdir(source):  # unlike Path.is_dir, never an error
        documents = list(_folder(Path(source)))
    else:
        documents = [Document(Path(source).name, read_text(Path(source)))]
    documents = [document for document in documents if document.text]
    if not documents:
        known = "has no text in it (empty files, or endings that are not read as text)"
        raise DataError("no text", where=source, cause=f"{source} {known}", fix="give a file or a folder with text")
    return documents


def read_text(path: Path) -> str:
    """The text of one UTF-8 file.

    Raises:
        DataError: it is missing, empty, or not text.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        fix = "give python-docs, tinyshakespeare, or the path of a text file or folder"
        cause = getattr(error, "strerror", None) or str(error)
        raise DataError("cannot read the text", where=f"{path!s:.200}", cause=cause, fix=fix) from None
    if not content:
        raise DataError("no text", where=str(path), cause="the file is empty", fix="give a file with text in it")
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + len(content) - len(error.object)  # the mark at the start counts too
        cause = f"byte 0x{content[offset]:02x} at offset {offset} is not UTF-8"
        raise DataError("not text", where=str(path), cause=cause, fix="convert it to UTF-8, or leave it out") from None
    if "\0" in text:
        cause = f"a NUL byte at offset {content.index(0)}"
        raise DataError("not text", where=str(path), cause=cause, fix="give a text file; this looks like a binary one")
    return text


def _folder(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and path.suffix.lower() in TEXT_SUFFIXES and path.is_file() and path.stat().st_size:
            yield Document(relative.as_posix(), read_text(path))


def _python_docs() -> Iterator[Document]:
    """The language reference that ``help()`` shows, then the library's source with its documentation inside."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        # The file is one assignment of a literal dict, read as such: nothing of it is run.
        assignment = next(s for s in ast.parse(topics.read_text(encoding="utf-8")).body if isinstance(s, ast.Assign))
        for topic, text in sorted(ast.literal_eval(assignment.value).items()):
            yield Document(f"topics/{topic}", text)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        generated = relative.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize", "this"))
        if generated or _NOT_PROSE.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            yield Document(relative.as_posix(), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding


def _tiny_shakespeare() -> str:
    """The 40,000 lines of Karpathy's char-rnn: a local copy, or downloaded once; its hash is checked either way."""
    cached = cache_folder() / "tinyshakespeare.txt"
    copy = local_copy("tinyshakespeare/input.txt") or local_copy("tinyshakespeare.txt") or cached
    if copy.is_file():
        content = copy.read_bytes()
        if hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256:
            return content.decode()
        cause = f"its SHA-256 is not {SHAKESPEARE_SHA256[:12]}..."
        raise DataError(
            "not tinyshakespeare", where=str(copy), cause=cause, fix=f"remove it; it comes from {SHAKESPEARE_URL}"
        )
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read(4 * 2**20)
    except OSError as error:
        raise DataError(
            "tinyshakespeare cannot be had",
            where="data.source",
            cause=f"no local copy, and the download failed ({error})",
            fix="go online once, put it at data/tinyshakespeare/input.txt, or use --data.source=python-docs",
        ) from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        cause = f"{SHAKESPEARE_URL} gave other bytes than it should"
        raise DataError(
            "not tinyshakespeare", cause=cause, fix="try again, or put a good copy at data/tinyshakespeare/input.txt"
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(content)
    return content.decode()
