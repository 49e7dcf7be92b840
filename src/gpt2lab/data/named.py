"""Texts that have a name of their own: what every Python installation carries, and 40,000 lines of Shakespeare."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from gpt2lab.data.records import Piece
from gpt2lab.errors import DataError
from gpt2lab.paths import cache_folder, local_copy

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

_NOT_PROSE = frozenset(  # tables, tests, applications, and what some systems ship as separate packages
    "site-packages dist-packages __pycache__ test tests idlelib turtledemo lib2to3 distutils tkinter encodings ensurepip "
    "pydoc_data msilib __phello__".split()
)


def python_docs() -> Iterator[Piece]:
    """The language reference that ``help()`` shows, then the library's source with its documentation inside."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        # The file is one assignment of a literal dict, read as such: nothing of it is run.
        assignment = next(s for s in ast.parse(topics.read_text(encoding="utf-8")).body if isinstance(s, ast.Assign))
        for topic, text in sorted(ast.literal_eval(assignment.value).items()):
            yield Piece(f"topics/{topic}", text, last=True)
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        generated = relative.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize", "this"))
        if generated or _NOT_PROSE.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            yield Piece(relative.as_posix(), path.read_text(encoding="utf-8"), last=True)
        except UnicodeDecodeError:
            continue  # a few old modules declare another encoding


def tiny_shakespeare() -> str:
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
