"""A file on a web server, read once and forward, whatever the line does: it goes on exactly where it stood.

A server is asked for the rest of the file, provided that it is still the same one; what it says of the file at the first time
(its ETag or date, and its length) is what the file must be at every later one. Memory: one chunk.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gpt2lab.download import CHUNK, OFFLINE, TRIES, Answer, Refused, brief, get, patiently, status_of
from gpt2lab.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PATIENT_TRIES = 8
"""Of a server that has answered before: two minutes without it are waited out."""
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class RemoteFile:
    """A file at an address, which can be opened as often as one likes: it is the same file each time, or an error.

    Attributes:
        name: for people: the address without user, password and query, which may be secrets.
        length: its bytes, once the server has said; None: it has not.
    """

    def __init__(
        self,
        url: str,
        name: str = "",
        *,
        headers: Callable[[], dict[str, str]] = dict,
        pinned: bool = False,
        explain: Callable[[Exception, int], tuple[str, str]] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            headers: gives those that go with each request.
            pinned: the address itself says which content it is, so that no ETag is compared.
            explain: cause and fix of a request that failed, and how often it did.
            sleep: waits so many seconds between two tries.
        """
        self.name = name or shown(url)
        self.length: int | None = None
        self._url, self._headers, self._pinned, self._sleep = url, headers, pinned, sleep
        self._explain = explain or _explain
        self._versions: dict[str, str] = {}
        self._answered = False

    def open(self) -> io.BufferedReader:
        """Its bytes, as a stream that does not seek. Reading raises DataError when they cannot be had."""
        return io.BufferedReader(_RemoteStream(self), CHUNK)

    @property
    def identity(self) -> str:
        """What changes when the content does: ETag or date, and length. Empty: the server says none of them.

        Raises:
            DataError: it does not answer.
        """
        if not self._answered:
            with self.open() as stream:
                stream.read(1)
        said = [*self._versions.values()][:1] + [str(self.length)] * (self.length is not None)
        return " ".join(said)

    def chunks(self, at: int) -> Generator[bytes]:
        """Its content from byte `at` on, in chunks, as one answer gives it."""
        headers = self._headers() | {"Accept-Encoding": "identity"}
        if at:
            headers["Range"] = f"bytes={at}-"
            if condition := self._condition():
                headers["If-Range"] = condition
        try:
            with get(self._url, headers) as answer:
                before = at - self._start(answer, at)  # bytes that we have already
                for chunk in answer.chunks:
                    yield chunk[before:]
                    before = max(0, before - len(chunk))
        except Refused as error:
            if status_of(error) != 416 or error.response.headers.get("Content-Range") != f"bytes */{at}":
                raise
            self._compare({}, at)  # there is no more: a length that nobody had told us

    def patiently(self, ask: Callable[[], bytes], at: int) -> bytes:
        """`ask()`, again after a pause where that may help; `at`: so far it came."""
        from huggingface_hub import constants

        def refused(cause: str, fix: str) -> DataError:
            after = f", after {at:,} bytes" if at else ""
            return DataError("cannot be had from its server", where=self.name, cause=f"{cause}{after}", fix=fix)

        if constants.HF_HUB_OFFLINE:  # the client that we share refuses each request
            raise refused(*OFFLINE)
        return patiently(ask, PATIENT_TRIES if self._answered else TRIES, self._sleep, refused, self._explain)

    def changed(self, cause: str) -> DataError:
        """The error for a file that is no longer what it was."""
        fix = "give the same command again when nobody writes to it"
        return DataError("the text changed", where=self.name, cause=cause, fix=fix)

    def _condition(self) -> str:
        """What to send so that a part comes only of the same file; ETags that are weak cannot be used for that."""
        etag = self._versions.get("ETag", "")
        if self._pinned or etag.startswith("W/"):
            return ""
        return etag or self._versions.get("Last-Modified", "")

    def _start(self, answer: Answer, at: int) -> int:
        """Where in the file an answer begins.

        Raises:
            DataError: it is of another file.
        """
        start, length = 0, answer.headers.get("Content-Length", "")
        if answer.status == 206:
            found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None or int(found[1]) > at:
                raise ConnectionError("it sent another part than the one that was asked for")
            start, length = int(found[1]), found[2]
        self._compare(answer.headers, int(length) if length.isdecimal() else None)
        return start

    def _compare(self, said: Mapping[str, str], length: int | None) -> None:
        """Take down what is said of the file; later, compare it.

        Raises:
            DataError: it is another file.
        """
        if length is not None and self.length not in (None, length):
            raise self.changed(f"it has {length:,} bytes now, and had {self.length:,}")
        if length is not None:
            self.length = length
        versions = {key: said[key] for key in ("ETag", "Last-Modified") if said.get(key) and not self._pinned}
        both = next((key for key in versions if key in self._versions), "")
        if both and versions[both] != self._versions[both]:
            raise self.changed(f"its {both} is {versions[both][:80]} now, and was {self._versions[both][:80]}")
        self._versions = self._versions or versions
        self._answered = True


class _RemoteStream(io.RawIOBase):
    """The bytes of a remote file, one after the other."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0
        self._chunks: Generator[bytes] | None = None
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill a buffer with what comes next; 0 at the end."""
        if not self._rest:
            self._rest = memoryview(self._file.patiently(self._next, self._at))
            self._at += len(self._rest)
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._rest))
        view[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _next(self) -> bytes:
        """The next chunk; empty at the end."""
        length = self._file.length
        if length is not None and self._at == length:
            self._hang_up()
            return b""
        try:
            self._chunks = self._chunks or self._file.chunks(self._at)
            chunk = next(filter(None, self._chunks), b"")
            length = self._file.length
            if length is not None and self._at + len(chunk) > length:
                raise self._file.changed(f"more came than its {length:,} bytes")
            if not chunk and self._at < (length or 0):
                raise ConnectionError(f"it ended after {self._at} of {length} bytes")
            return chunk
        except BaseException:
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        """End the answer: the next bytes are asked for anew."""
        chunks, self._chunks = self._chunks, None
        if chunks is not None:
            chunks.close()


def shown(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_address(url: str) -> None:
    """Refuse what is no address, without repeating it: a password may be what is wrong with it.

    Raises:
        DataError: it is none.
    """
    try:
        parts = urlsplit(url)
        fine = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine or re.search(r"\s", url):
        cause, fix = "it has no server, or a port that is no number", "such as https://example.org/books.jsonl.zst"
        raise DataError("no web address", where="data.source", cause=cause, fix=fix)


def _explain(error: Exception, tries: int) -> tuple[str, str]:
    """Cause and fix of a request to any server that failed."""
    status, times = status_of(error), f" in {tries} tries" if tries > 1 else ""
    if status in (401, 403, 407):
        return (
            f"the server refuses it ({status})",
            "check the address: https://USER:PASSWORD@HOST/FILE, if it asks for one",
        )
    if status in (404, 410):
        return f"the server has no such file ({status})", "check the address"
    if status == 429:
        return f"the server wants fewer requests (429{times})", "wait some minutes, then give the same command again"
    if status is not None and status < 500:
        return f"the server refuses it ({status})", "check the address"
    if status is not None:
        return f"the server answers {status}{times}", "give the same command again later"
    return f"no answer{times} ({brief(error)})", "go online and give the same command again"
