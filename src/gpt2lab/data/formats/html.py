"""HTML: the main text of a page."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import chain

from gpt2lab.data.formats.lines import CUT, MARKUP, NOT_UTF8, NUL, Refused, pieces
from gpt2lab.data.records import Piece, Skipped
from gpt2lab.data.unpack import Stream

PAGE = 2**20
"""Bytes of the longest page that is read: its tree takes some hundred times as much."""
PAGE_TOO_LONG = f"a page longer than {PAGE // 2**20} MiB"
NO_TEXT = "a page without text"
_LOOKS = re.compile(r"\s*(<\?xml[^>]*>\s*|<!--(?:[^-]|-(?!->))*+-->\s*)*+<(!doctype\s+html|html)\b", re.IGNORECASE)


def looks_like_html(head: str, suffix: str) -> bool:
    """Whether a file that begins so is a page."""
    return bool(_LOOKS.match(head)) or (suffix in (".html", ".htm", ".xhtml") and head.lstrip().startswith("<"))


def read_html(stream: Stream, name: str) -> Iterator[Piece | Skipped]:
    """The main text of a page as one document, then its markup as skipped.

    trafilatura's `extract` was chosen over its `html2txt`, which keeps menus and puts all text into one line. Its parser
    knows HTML's own entities alone: those that a page declares stay as they are, so none grows.

    Raises:
        Refused: at once, where the page is too long, is not UTF-8, or has no text.
    """
    content = stream.read(PAGE + 1)
    if len(content) > PAGE:
        raise Refused(PAGE_TOO_LONG)
    if stream.problem:
        raise Refused(CUT)
    if b"\0" in content:
        raise Refused(NUL)
    try:
        text = _extract(content.decode())
    except UnicodeDecodeError:
        raise Refused(NOT_UTF8) from None
    markup = len(content) - len(text.encode())
    if not text or markup < 0:
        raise Refused(NO_TEXT)
    return chain(pieces(name, text), [Skipped(name, "", markup, MARKUP, fault=False)])


def _extract(page: str) -> str:
    import trafilatura  # half a second, which no other format needs

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it says of a page, we say
    try:
        return trafilatura.extract(page, include_comments=False) or ""
    except (ValueError, RecursionError, AttributeError, TypeError) as error:  # of a library that walks hostile trees
        raise Refused(f"the page cannot be read: {type(error).__name__}") from None
