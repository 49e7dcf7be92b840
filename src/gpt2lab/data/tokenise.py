"""Pieces of text to ids, by several processes and in order; the ids are those that one process would give.

A worker is this module run by itself: it is told the tokenizer, then texts come in and ids go out, each as a frame of byte
strings, until there is no more. It needs no torch, ends when we do, and hears no Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from queue import SimpleQueue
from typing import IO, Self

import numpy as np

from gpt2lab.data.records import Piece
from gpt2lab.errors import DataError, ProcessError
from gpt2lab.tokenizer import Tokenizer, pieces

ATTEMPTS = 2
"""Processes that may die over the same text."""
_BATCH = 1 << 18  # characters that are sent at once, or the piece that is longer
_SECONDS_TO_END = 5
_IN_FLIGHT = 2  # batches for each worker: one at work, one that waits


@dataclass(frozen=True)
class Tokens:
    """A part of a document in ids; documents come one after the other, and so do their parts.

    Attributes:
        name: of the document.
        ids: int32, with end-of-text at the end where the document ends.
        bytes: of UTF-8 text behind them.
        last: whether the document ends here.
        scored: whether a model is to learn to write them.
    """

    name: str
    ids: np.ndarray
    bytes: int
    last: bool
    scored: bool = True


def tokenise(source: Iterable[Piece], tokenizer: Tokenizer, workers: int = 1) -> Iterator[Tokens]:
    """The ids of each document, in order; where its pieces end, and how many workers there are, changes nothing.

    Args:
        workers: processes beside this one, which reads; 1: none, this one does it all.

    Raises:
        DataError: a character that the tokenizer has never seen. ProcessError: workers died.
    """
    batches = _batches(cut_safely(source))
    if workers == 1:
        for batch in batches:
            yield from _answer(batch, encode(batch, tokenizer))
        return
    pending: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
    with Workers(tokenizer, workers) as at_work:
        for batch in batches:
            pending.append((batch, at_work.submit(batch)))
            if len(pending) > _IN_FLIGHT * workers:
                done, ids = pending.popleft()
                yield from _answer(done, ids.result())
        while pending:
            done, ids = pending.popleft()
            yield from _answer(done, ids.result())


def encode(batch: list[Piece], tokenizer: Tokenizer) -> list[np.ndarray]:
    """The ids of each piece, with end-of-text after a last one.

    Raises:
        DataError: a character that the tokenizer has never seen, and where.
    """
    encoded, end = [], np.array([tokenizer.end_of_text], np.int32)
    for piece in batch:
        try:
            ids = tokenizer.encode(piece.text)
        except DataError as error:
            raise DataError(error.what, where=piece.name, cause=error.cause, fix=error.fix) from None
        encoded.append(np.concatenate([ids, end]) if piece.last else ids)
    return encoded


def _answer(batch: list[Piece], encoded: list[np.ndarray]) -> Iterator[Tokens]:
    for piece, ids in zip(batch, encoded, strict=True):
        yield Tokens(piece.name, ids, len(piece.text.encode()), piece.last, piece.scored)


def cut_safely(source: Iterable[Piece]) -> Iterator[Piece]:
    """The same documents in pieces that can be encoded by themselves. A prompt and its response are encoded apart."""
    for (_, scored), part in groupby(_numbered(source), key=lambda item: item[0]):
        read: list[Piece] = []
        cut = pieces(_texts(part, read))
        before = next(cut)
        for text in cut:
            yield Piece(read[-1].name, before, last=False, scored=scored)
            before = text
        yield Piece(read[-1].name, before, read[-1].last, scored)


def _texts(part: Iterable[tuple[object, Piece]], read: list[Piece]) -> Iterator[str]:
    """The text of some pieces; `read` holds the last of them that was read."""
    for _, piece in part:
        read[:] = [piece]
        yield piece.text


def _numbered(source: Iterable[Piece]) -> Iterator[tuple[tuple[int, bool], Piece]]:
    """Each piece with the number of its document, and whether it is scored; one without text goes with its neighbours."""
    number, scored = 0, True
    for piece in source:
        scored = piece.scored if piece.text else scored
        yield (number, scored), piece
        number += piece.last


def _batches(source: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are sent together."""
    batch, size = list[Piece](), 0
    for piece in source:
        if batch and size + len(piece.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.text) + len(piece.name) + 1
    if batch:
        yield batch


# --- Workers ----------------------------------------------------------------------------------------------------------


class Workers:
    """Processes that encode batches, each served by a thread; at the end of the ``with`` none of them is left."""

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._threads = ThreadPoolExecutor(count, "tokenise")
        self._workers = [_Worker(tokenizer) for _ in range(count)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._closed = False

    def submit(self, batch: list[Piece]) -> Future[list[np.ndarray]]:
        """What `encode` gives for it, later. A batch whose worker dies is done again by another.

        Its ``result`` raises:
            DataError: a character that the tokenizer has never seen. ProcessError: that worker died too.
        """
        return self._threads.submit(self._encode, batch)

    def _encode(self, batch: list[Piece]) -> list[np.ndarray]:
        worker, cause = self._idle.get(), ""
        try:
            for _ in range(ATTEMPTS):
                if self._closed:
                    break
                try:
                    return worker.encode(batch)
                except (BrokenPipeError, EOFError):
                    cause = f"the process that tokenises {batch[0].name} {worker.end()}, {ATTEMPTS} times in a row"
            fix = "if memory is short give fewer --workers; else leave that document out"
            raise ProcessError("text not tokenised", where=batch[0].name, cause=cause, fix=fix)
        finally:
            self._idle.put(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed = True
        for worker in self._workers:
            worker.kill()  # a thread that waits for it is woken
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, started when there is something to do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.to_json().encode()
        self._process: subprocess.Popen[bytes] | None = None

    def encode(self, batch: list[Piece]) -> list[np.ndarray]:
        """What `encode` gives for it. BrokenPipeError, EOFError: the process is gone."""
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin and self._process.stdout
        _send(self._process.stdin, _pack(batch))
        problem, *encoded = _receive(self._process.stdout)
        if problem:
            what, where, cause, fix = map(_text, encoded)
            raise DataError(what, where=where, cause=cause, fix=fix)
        return [np.frombuffer(ids, np.int32) for ids in encoded]

    def _start(self) -> subprocess.Popen[bytes]:
        # With our own path, and no file of the working folder in front; away from the keys of our terminal.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gpt2lab.data.tokenise"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}, start_new_session=True,
        )  # fmt: skip
        assert process.stdin
        with suppress(BrokenPipeError):  # it is seen when an answer is missing
            _send(process.stdin, [self._tokenizer])
        return process

    def kill(self) -> None:
        """End the process, whatever it does."""
        if process := self._process:
            process.kill()

    def end(self) -> str:
        """Clear away a process that is gone or about to go, and say how it ended."""
        process, self._process = self._process, None
        if process is None:
            return "did not start"
        try:
            code = process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(BrokenPipeError):  # of what was not sent any more
                assert pipe
                pipe.close()
        return f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"


def serve() -> None:
    """What a worker does, at its standard input and output, until we close them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError), os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        questions = sys.stdin.buffer
        [tokenizer_json] = _receive(questions)
        tokenizer = Tokenizer.from_json(tokenizer_json.decode())
        while True:
            batch = _unpack(_receive(questions))
            try:
                answer = [b"", *(ids.tobytes() for ids in encode(batch, tokenizer))]
            except DataError as error:
                answer = [b"problem", *map(_utf8, (error.what, error.where, error.cause, error.fix))]
            _send(answers, answer)


# --- Frames -----------------------------------------------------------------------------------------------------------


def _send(file: IO[bytes], parts: list[bytes]) -> None:
    """Write byte strings as a frame: how many, how long each is, and they."""
    sizes = np.array([len(parts), *map(len, parts)], "<i8").tobytes()
    file.write(b"".join([sizes, *parts]))
    file.flush()


def _receive(file: IO[bytes]) -> list[bytes]:
    """The byte strings of the next frame. EOFError: there is none, or half of one."""
    count = int.from_bytes(_read(file, 8), "little")
    sizes = np.frombuffer(_read(file, 8 * count), "<i8").tolist()
    return [_read(file, size) for size in sizes]


def _read(file: IO[bytes], size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _pack(batch: list[Piece]) -> list[bytes]:
    return [part for p in batch for part in (_utf8(p.name), _utf8(p.text), b"last" if p.last else b"")]


def _unpack(parts: list[bytes]) -> list[Piece]:
    fields = iter(parts)
    return [
        Piece(_text(name), _text(text), bool(last)) for name, text, last in zip(fields, fields, fields, strict=True)
    ]


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # the tokenizer refuses half a pair, and says so


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


if __name__ == "__main__":
    serve()
